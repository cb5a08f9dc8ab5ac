package backing

import "fmt"

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
	Kind    string `json:"kind"` // protected, tag, registration, volume, replica, backup, job
	Name    string `json:"name"`
	Cluster string `json:"cluster,omitempty"`
}

func fail(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: err}
}
