package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
)

// Codes of what only an HTTP server can find wrong.
const (
	unauthorized backing.Code = "unauthorized"
	denied       backing.Code = "denied"
	badMethod    backing.Code = "method_not_allowed"
	badType      backing.Code = "unsupported_media_type"
	badRange     backing.Code = "range_not_satisfiable"
	wrongOffset  backing.Code = "offset_conflict" // of an upload
	badVersion   backing.Code = "tus_version"
	internal     backing.Code = "internal"
)

// codes is the one table that turns a code into what a client is told.
var codes = map[backing.Code]struct {
	status int
	title  string
	after  time.Duration // Retry-After; 0: none
}{
	backing.Malformed:        {status: http.StatusBadRequest, title: "the request is malformed"},
	unauthorized:             {status: http.StatusUnauthorized, title: "who asks is not known"},
	denied:                   {status: http.StatusForbidden, title: "not allowed"},
	backing.NotFound:         {status: http.StatusNotFound, title: "not found"},
	badMethod:                {status: http.StatusMethodNotAllowed, title: "method not allowed"},
	backing.Exists:           {status: http.StatusConflict, title: "it exists already"},
	backing.InUse:            {status: http.StatusConflict, title: "image in use"},
	backing.VersionConflict:  {status: http.StatusConflict, title: "the version is taken"},
	wrongOffset:              {status: http.StatusConflict, title: "the upload ends elsewhere"},
	backing.PreconditionFail: {status: http.StatusPreconditionFailed, title: "it has changed since"},
	badVersion:               {status: http.StatusPreconditionFailed, title: "another version of tus"},
	backing.TooLarge:         {status: http.StatusRequestEntityTooLarge, title: "too large"},
	badType:                  {status: http.StatusUnsupportedMediaType, title: "unsupported media type"},
	badRange:                 {status: http.StatusRequestedRangeNotSatisfiable, title: "there is no such range"},
	backing.ChecksumMismatch: {status: http.StatusUnprocessableEntity, title: "the checksum does not match"},
	backing.Unsupported:      {status: http.StatusUnprocessableEntity, title: "unsupported image"},
	backing.NotAligned:       {status: http.StatusUnprocessableEntity, title: "the size is not aligned"},
	backing.BackingFile:      {status: http.StatusUnprocessableEntity, title: "the image needs another file"},
	backing.Busy:             {status: http.StatusTooManyRequests, title: "too much at once", after: 5 * time.Second},
	internal:                 {status: http.StatusInternalServerError, title: "internal error"},
	backing.UpstreamError:    {status: http.StatusBadGateway, title: "the source failed"},
	backing.LonghornError:    {status: http.StatusBadGateway, title: "Longhorn refused"},
	backing.LonghornAway:     {status: http.StatusServiceUnavailable, title: "Longhorn cannot be reached", after: 10 * time.Second},
	backing.StoreAway:        {status: http.StatusServiceUnavailable, title: "the store cannot be reached", after: 5 * time.Second},
	backing.QuotaExceeded:    {status: http.StatusInsufficientStorage, title: "quota exceeded"},
	backing.NoSpace:          {status: http.StatusInsufficientStorage, title: "no space left"},
}

// A problem is an error as RFC 9457 has it.
type problem struct {
	Title    string            `json:"title"`
	Status   int               `json:"status"`
	Code     backing.Code      `json:"code"`
	Detail   string            `json:"detail"`
	Blockers []backing.Blocker `json:"blockers,omitempty"`
}

// judge finds what a client is told of an error.
func judge(err error) *backing.Error {
	if known := backing.Known(err); known != nil {
		if _, ok := codes[known.Code]; ok {
			return known
		}
	}
	code, message := internal, "the server's log tells more"
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, fill.ErrBusy), errors.Is(err, fill.ErrClosed):
		code, message = backing.StoreAway, "what holds the images cannot be reached at the moment; try again"
	case errors.Is(err, oci.ErrRange):
		code, message = badRange, err.Error()
	case errors.Is(err, oci.ErrTooManyRanges):
		code, message = backing.Malformed, err.Error()+"; ask for fewer at once"
	case errors.Is(err, hosted.ErrNoUpload):
		code, message = backing.NotFound, "there is no such upload; begin it again"
	case errors.Is(err, hosted.ErrOffset), errors.Is(err, hosted.ErrTaken):
		code, message = wrongOffset, err.Error()+"; HEAD the upload to learn where it ends"
	case errors.Is(err, hosted.ErrLength), errors.Is(err, io.ErrUnexpectedEOF):
		code, message = backing.Malformed, "the body ends before its length, or goes on after it"
	case errors.Is(err, hosted.ErrDigest):
		code, message = backing.ChecksumMismatch, err.Error()
	case errors.As(err, new(*http.MaxBytesError)):
		code, message = backing.TooLarge, err.Error()
	case errors.Is(err, fs.ErrNotExist):
		code, message = backing.NotFound, "there is no such thing here"
	}
	return &backing.Error{Code: code, Message: message, Err: err}
}

// problem answers with an error.
func (x *exchange) problem(err error) {
	e := judge(err)
	row := codes[e.Code]
	if row.status >= http.StatusInternalServerError {
		x.log.Warn("a request for backing images failed", zap.String("image", x.report.Image), zap.Error(err))
	}
	header := x.w.Header()
	for _, name := range [...]string{"Etag", "Last-Modified", "Repr-Digest", "Content-Disposition", "Content-Location", "Accept-Ranges"} {
		header.Del(name)
	}
	body, _ := json.Marshal(problem{Title: row.title, Status: row.status, Code: e.Code, Detail: e.Message, Blockers: e.Blockers})
	body = append(body, '\n')
	header.Set("Content-Type", "application/problem+json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if row.after > 0 {
		header.Set("Retry-After", strconv.Itoa(int(row.after/time.Second)))
	}
	if e.Code == unauthorized {
		header.Set("Www-Authenticate", `Bearer realm="backing images"`)
	}
	x.w.WriteHeader(row.status)
	if x.r.Method != http.MethodHead {
		x.w.Write(body)
	}
}
