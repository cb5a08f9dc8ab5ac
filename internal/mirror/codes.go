package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// A situation is why nothing can be served.
type situation int

const (
	badName situation = iota
	badReference
	badPage
	badRange
	tooManyRanges
	unknownEndpoint
	unknownName // registry or repository
	unknownContent
	deniedUpstream // our credentials were refused
	privateName
	readOnly
	noUpstream // no usable answer in time
	limited    // by the upstream
	storeFailed
)

// codes is the one table that turns a situation into what the client is told,
// by what was asked for. 404 lets every client move on to its next source;
// 503 does so for containerd at once, while 429 would make it ask again
// without a pause, five times over.
var codes = map[situation]struct {
	status         int
	manifest, blob string // OCI codes; blob "" is as manifest
	remedy         string
}{
	badName:         {http.StatusBadRequest, oci.CodeNameInvalid, "", ""},
	badReference:    {http.StatusBadRequest, oci.CodeManifestInvalid, oci.CodeDigestInvalid, ""},
	badPage:         {http.StatusBadRequest, oci.CodePageInvalid, "", ""},
	badRange:        {http.StatusRequestedRangeNotSatisfiable, oci.CodeRangeInvalid, "", ""},
	tooManyRanges:   {http.StatusBadRequest, oci.CodeRangeInvalid, "", "ask for fewer at once"},
	unknownEndpoint: {http.StatusNotFound, oci.CodeUnsupported, "", ""},
	unknownName:     {http.StatusNotFound, oci.CodeNameUnknown, "", ""},
	unknownContent:  {http.StatusNotFound, oci.CodeManifestUnknown, oci.CodeBlobUnknown, ""},
	deniedUpstream:  {http.StatusForbidden, oci.CodeDenied, "", "check the credentials in the mirror's configuration"},
	privateName:     {http.StatusForbidden, oci.CodeDenied, "", ""},
	readOnly:        {http.StatusMethodNotAllowed, oci.CodeUnsupported, "", ""},
	noUpstream:      {http.StatusServiceUnavailable, oci.CodeUnavailable, "", "try again; the mirror's log and the upstream's status page tell more"},
	limited:         {http.StatusServiceUnavailable, oci.CodeUnavailable, "", "wait, or configure credentials with a larger budget in the mirror"},
	storeFailed:     {http.StatusServiceUnavailable, oci.CodeUnavailable, "", "the mirror's log tells more"},
}

// A failure is a situation with the sentence that explains it.
type failure struct {
	situation situation
	message   string
	after     time.Duration
	err       error
}

func (f *failure) Error() string { return f.message }
func (f *failure) Unwrap() error { return f.err }

func fail(s situation, format string, args ...any) error {
	return &failure{situation: s, message: fmt.Sprintf(format, args...)}
}

// judge finds the situation behind an error.
func judge(err error) *failure {
	var known *failure
	if errors.As(err, &known) {
		return known
	}
	f := &failure{situation: storeFailed, message: err.Error(), err: err}
	var up *upstream.Error
	switch {
	case errors.As(err, &up):
		switch up.Kind {
		case upstream.NotFound, upstream.Unauthorized:
			// Registries answer 401 and 403 for what does not exist, too.
			f.situation = unknownContent
		case upstream.Denied:
			f.situation = deniedUpstream
		case upstream.RateLimited:
			f.situation, f.after = limited, up.After
		default:
			f.situation, f.after = noUpstream, up.After
		}
	case errors.Is(err, errInvalidName):
		f.situation = badName
	case errors.Is(err, errUnknownUpstream), errors.Is(err, errTakenName):
		f.situation = unknownName
	case errors.Is(err, oci.ErrRange):
		f.situation = badRange
	case errors.Is(err, oci.ErrTooManyRanges):
		f.situation = tooManyRanges
	case errors.Is(err, fill.ErrDigest), errors.Is(err, fill.ErrSize), errors.Is(err, fill.ErrTooLarge), errors.Is(err, fill.ErrBusy), errors.Is(err, fill.ErrClosed),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, errNoAnswer):
		f.situation = noUpstream
	case errors.Is(err, fs.ErrNotExist):
		f.situation = unknownContent
	}
	return f
}

// refusal is what a client is told of an error, about the thing it asked for.
func refusal(err error, kind oci.Kind, about string) *oci.Error {
	f := judge(err)
	code := codes[f.situation]
	e := &oci.Error{Status: code.status, Code: code.manifest, Message: f.message, RetryAfter: f.after}
	if kind == oci.KindBlob && code.blob != "" {
		e.Code = code.blob
	}
	if about != "" {
		e.Message = about + ": " + e.Message
	}
	if code.remedy != "" {
		e.Message += "; " + code.remedy
	}
	return e
}

// Explain is the status and the sentence for an error of this package, for
// answers that are not of the registry API. about, if it is not empty, names
// what was asked for, and begins the sentence.
func Explain(err error, about string) (status int, message string) {
	e := refusal(err, oci.KindManifest, about)
	return e.Status, e.Message
}

// Unavailable answers a request whose store could not be opened.
func Unavailable(w http.ResponseWriter, r *http.Request, err error) {
	refusal(fail(storeFailed, "%v", err), oci.KindUnknown, "").Write(w, r)
}
