package backing

import (
	"errors"
	"fmt"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/storage"
)

// A Code says what kind of error it is, as clients are told.
type Code string

const (
	Malformed        Code = "malformed"
	NotFound         Code = "not_found"
	Exists           Code = "exists"
	InUse            Code = "in_use"
	VersionConflict  Code = "version_conflict"
	PreconditionFail Code = "precondition_failed"
	TooLarge         Code = "too_large"
	ChecksumMismatch Code = "checksum_mismatch"
	Unsupported      Code = "unsupported_image"
	NotAligned       Code = "size_not_aligned"
	BackingFile      Code = "backing_file_refused"
	UpstreamError    Code = "upstream_error"
	LonghornError    Code = "longhorn_error"
	LonghornAway     Code = "longhorn_unreachable"
	QuotaExceeded    Code = "quota_exceeded"
	NoSpace          Code = "no_space"
	Busy             Code = "busy"
	StoreAway        Code = "store_unavailable"
)

// An Error is what a client is told: what is wrong and what to do about it.
type Error struct {
	Code     Code
	Message  string
	Blockers []Blocker // of InUse
	Err      error
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.Err }

// A Blocker is why something may not be deleted.
type Blocker struct {
	Kind    string `json:"kind"` // protected, tag, registration, volume, replica, backup, backing-image, job
	Name    string `json:"name"`
	Cluster string `json:"cluster,omitempty"`
}

func fail(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: err}
}

// Known is what clients are told of an error, whether a request or a job met it: the
// Error that it wraps, or what an error of the store or of hosted content means here.
// nil: of any other error.
func Known(err error) *Error {
	var told *Error
	if errors.As(err, &told) {
		return told
	}
	code, message := Code(""), ""
	switch {
	case errors.Is(err, storage.ErrUnavailable):
		// Where it is, and what was asked of it, is for the log.
		code, message = StoreAway, "what holds the images cannot be reached at the moment; try again"
	case errors.Is(err, hosted.ErrQuota):
		code, message = QuotaExceeded, err.Error()
	case errors.Is(err, storage.ErrFull):
		code, message = NoSpace, "there is no room for this; delete what is not needed, or enlarge the store"
	case errors.Is(err, hosted.ErrBusy):
		code, message = Busy, "too many uploads are not finished: finish them, cancel them with DELETE, or wait until they expire"
	case errors.Is(err, hosted.ErrTooLarge):
		code, message = TooLarge, err.Error()
	default:
		return nil
	}
	return &Error{Code: code, Message: message, Err: err}
}
