package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
)

// A situation is why nothing can be served.
type situation int

const (
	badName situation = iota
	badReference
	badTag      // of a push
	tooManyTags // of a push
	badPage
	badRange
	tooManyRanges
	unknownEndpoint
	unknownName // registry or repository
	unknownContent
	unobtainable   // a manifest whose blobs are not there
	tooLarge       // a manifest with a blob beyond max_blob_size, or that blob
	deniedUpstream // our credentials were refused
	privateName
	readOnly
	denied       // by the rules of the site
	noUpload     // an upload that is not there
	badUpload    // a request that makes no sense to an upload
	outOfOrder   // a chunk that does not begin where the upload ends
	wrongDigest  // of what was pushed
	wrongLength  // of what was pushed
	badManifest  // that was pushed
	missingBlob  // that a pushed manifest names
	oversized    // what was pushed
	immutableTag // that is to be moved or removed
	deleteOff    // in the repository
	closed       // a repository that is not changed by this API
	stillNamed   // a blob that is to be deleted
	noRoom       // for what is pushed
	tooMany      // uploads that are not finished
	noUpstream   // no usable answer in time
	limited      // by the upstream
	storeFailed
	storeAway // it is at a distance, and does not answer
)

// A cell is what a client is told: a status, and an OCI code.
type cell struct {
	status int
	code   string
}

// codes is the one table that turns a situation into what the client is told,
// by what was asked for and by who asks. 404 lets every client move on to its
// next source; 503 does so for containerd at once, while 429 would make it ask
// again without a pause, five times over.
//
// The family of containers/image (podman, skopeo, buildah, CRI-O) has no other
// source for the blobs of a manifest that it has had from here, and gives up at
// a 503; after a 429 it asks again, up to five times, when Retry-After says.
var codes = map[situation]struct {
	manifest cell
	blob     cell // zero: as manifest
	patient  cell // a blob for the family of containers/image; zero: as blob
	remedy   string
}{
	badName:         {manifest: cell{http.StatusBadRequest, oci.CodeNameInvalid}},
	badReference:    {manifest: cell{http.StatusBadRequest, oci.CodeManifestInvalid}, blob: cell{http.StatusBadRequest, oci.CodeDigestInvalid}},
	badTag:          {manifest: cell{http.StatusBadRequest, oci.CodeTagInvalid}},
	tooManyTags:     {manifest: cell{http.StatusRequestURITooLong, oci.CodeTagInvalid}, remedy: "set the others by further pushes"},
	badPage:         {manifest: cell{http.StatusBadRequest, oci.CodePageInvalid}},
	badRange:        {manifest: cell{http.StatusRequestedRangeNotSatisfiable, oci.CodeRangeInvalid}},
	tooManyRanges:   {manifest: cell{http.StatusBadRequest, oci.CodeRangeInvalid}, remedy: "ask for fewer at once"},
	unknownEndpoint: {manifest: cell{http.StatusNotFound, oci.CodeUnsupported}},
	unknownName:     {manifest: cell{http.StatusNotFound, oci.CodeNameUnknown}},
	unknownContent:  {manifest: cell{http.StatusNotFound, oci.CodeManifestUnknown}, blob: cell{http.StatusNotFound, oci.CodeBlobUnknown}},
	unobtainable:    {manifest: cell{http.StatusForbidden, oci.CodeDenied}, remedy: "pull from another source, or another tag"},
	tooLarge:        {manifest: cell{http.StatusForbidden, oci.CodeDenied}, remedy: "raise max_blob_size in the mirror's configuration, or pull from another source"},
	deniedUpstream:  {manifest: cell{http.StatusForbidden, oci.CodeDenied}, remedy: "check the credentials in the mirror's configuration"},
	privateName:     {manifest: cell{http.StatusForbidden, oci.CodeDenied}},
	readOnly:        {manifest: cell{http.StatusMethodNotAllowed, oci.CodeUnsupported}},
	denied:          {manifest: cell{http.StatusForbidden, oci.CodeDenied}},
	noUpload:        {manifest: cell{http.StatusNotFound, oci.CodeBlobUploadUnknown}, remedy: "begin the upload again"},
	badUpload:       {manifest: cell{http.StatusBadRequest, oci.CodeBlobUploadInvalid}},
	outOfOrder:      {manifest: cell{http.StatusRequestedRangeNotSatisfiable, oci.CodeBlobUploadInvalid}, remedy: "GET the upload to learn where it ends, and go on from there"},
	wrongDigest:     {manifest: cell{http.StatusBadRequest, oci.CodeDigestInvalid}},
	wrongLength:     {manifest: cell{http.StatusBadRequest, oci.CodeSizeInvalid}},
	badManifest:     {manifest: cell{http.StatusBadRequest, oci.CodeManifestInvalid}},
	missingBlob:     {manifest: cell{http.StatusNotFound, oci.CodeManifestBlobUnknown}, remedy: "push it first"},
	oversized:       {manifest: cell{http.StatusRequestEntityTooLarge, oci.CodeSizeInvalid}},
	immutableTag:    {manifest: cell{http.StatusForbidden, oci.CodeDenied}},
	deleteOff:       {manifest: cell{http.StatusMethodNotAllowed, oci.CodeUnsupported}},
	closed:          {manifest: cell{http.StatusForbidden, oci.CodeDenied}},
	stillNamed:      {manifest: cell{http.StatusMethodNotAllowed, oci.CodeUnsupported}, remedy: "delete the manifests that name it first"},
	noRoom:          {manifest: cell{http.StatusInsufficientStorage, oci.CodeDenied}},
	tooMany:         {manifest: cell{http.StatusTooManyRequests, oci.CodeTooManyRequests}, remedy: "finish them, cancel them with DELETE, or wait until they expire"},
	noUpstream: {
		manifest: cell{http.StatusServiceUnavailable, oci.CodeUnavailable},
		patient:  cell{http.StatusTooManyRequests, oci.CodeTooManyRequests},
		remedy:   "try again; the mirror's log and the upstream's status page tell more",
	},
	limited: {
		manifest: cell{http.StatusServiceUnavailable, oci.CodeUnavailable},
		patient:  cell{http.StatusTooManyRequests, oci.CodeTooManyRequests},
		remedy:   "wait, or configure credentials with a larger budget in the mirror",
	},
	storeFailed: {manifest: cell{http.StatusServiceUnavailable, oci.CodeUnavailable}, remedy: "the mirror's log tells more"},
	storeAway: {
		manifest: cell{http.StatusServiceUnavailable, oci.CodeUnavailable},
		patient:  cell{http.StatusTooManyRequests, oci.CodeTooManyRequests},
		remedy:   "try again; the mirror's log tells more",
	},
}

// askAgain is when a client that waits is to ask again, where the upstream does
// not say.
const askAgain = 5 * time.Second

// patient reports whether a client is of the family of containers/image. The
// library calls itself containers/5.36; programs put their own name.
func patient(userAgent string) bool {
	product, _, _ := strings.Cut(userAgent, "/")
	switch strings.ToLower(product) {
	case "containers", "skopeo", "podman", "buildah", "cri-o", "libpod":
		return true
	}
	return false
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
	case errors.Is(err, storage.ErrUnavailable):
		// Where it is, and what was asked of it, is for the log.
		f.situation, f.message = storeAway, "what holds the mirror's content cannot be reached at the moment"
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
	case errors.Is(err, hosted.ErrNoUpload):
		f.situation = noUpload
	case errors.Is(err, hosted.ErrBusy):
		f.situation = tooMany
	case errors.Is(err, hosted.ErrOffset), errors.Is(err, hosted.ErrTaken):
		f.situation = outOfOrder
	case errors.Is(err, hosted.ErrLength):
		f.situation = wrongLength
	case errors.Is(err, hosted.ErrDigest), errors.Is(err, hosted.ErrAlgorithm):
		f.situation = wrongDigest
	case errors.Is(err, hosted.ErrManifest):
		f.situation = badManifest
	case errors.As(err, new(*hosted.Missing)):
		f.situation = missingBlob
	case errors.Is(err, hosted.ErrTooLarge), errors.As(err, new(*http.MaxBytesError)):
		f.situation = oversized
	case errors.Is(err, hosted.ErrImmutable):
		f.situation = immutableTag
	case errors.Is(err, hosted.ErrNoDelete):
		f.situation = deleteOff
	case errors.Is(err, hosted.ErrClosedToPush):
		f.situation = closed
	case errors.Is(err, hosted.ErrNamed):
		f.situation = stillNamed
	case errors.Is(err, storage.ErrFull):
		f.situation = noRoom
	case errors.Is(err, fs.ErrNotExist):
		f.situation = unknownContent
	}
	return f
}

// refusal is what a client is told of an error, about the thing it asked for.
func refusal(err error, kind oci.Kind, userAgent, about string) *oci.Error {
	f := judge(err)
	row := codes[f.situation]
	says := row.manifest
	if kind == oci.KindBlob {
		if row.blob != (cell{}) {
			says = row.blob
		}
		if row.patient != (cell{}) && patient(userAgent) {
			says = row.patient
		}
	}
	e := &oci.Error{Status: says.status, Code: says.code, Message: f.message, RetryAfter: f.after}
	if says.status == http.StatusTooManyRequests && f.after == 0 {
		e.RetryAfter = askAgain
	}
	if about != "" {
		e.Message = about + ": " + e.Message
	}
	if row.remedy != "" {
		e.Message += "; " + row.remedy
	}
	return e
}

// Explain is the status and the sentence for an error of this package, for
// answers that are not of the registry API. about, if it is not empty, names
// what was asked for, and begins the sentence.
func Explain(err error, about string) (status int, message string) {
	e := refusal(err, oci.KindManifest, "", about)
	return e.Status, e.Message
}

// Unavailable answers a request whose store could not be opened.
func Unavailable(w http.ResponseWriter, r *http.Request, err error) {
	refusal(fail(storeFailed, "%v", err), oci.KindUnknown, "", "").Write(w, r)
}
