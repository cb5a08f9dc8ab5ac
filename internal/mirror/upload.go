package mirror

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/oci"
)

// maxOwners is how many repositories are looked at for one that a blob may be
// mounted from, where the client names none.
const maxOwners = 100

// upload answers what is asked of uploads (OCI distribution-spec, "Pushing
// blobs").
func (x *exchange) upload() error {
	ctx := x.r.Context()
	if x.r.Method == http.MethodPost {
		return x.beginUpload(ctx)
	}
	u, err := x.mirror.hosted.Upload(ctx, x.target.Repository, x.route.Ref)
	if err != nil {
		return err
	}
	switch x.r.Method {
	case http.MethodPatch:
		var body hosted.Body
		if body, err = x.body(); err == nil {
			_, err = u.Append(ctx, body)
		}
		if err == nil {
			return x.uploading(u, http.StatusAccepted)
		}
	case http.MethodPut:
		err = x.finishUpload(ctx, u)
	case http.MethodDelete:
		if err = u.Cancel(ctx); err == nil {
			content.Hasten(x.w, x.r)
			x.w.WriteHeader(http.StatusNoContent)
		}
	default:
		if err = u.Look(ctx); err == nil {
			return x.uploading(u, http.StatusNoContent)
		}
	}
	if err != nil && !errors.Is(err, hosted.ErrNoUpload) && !errors.Is(err, hosted.ErrDigest) {
		x.whereabouts(u) // what it takes to go on
	}
	return err
}

// whereabouts says where an upload is, and where it ends. An empty one ends where
// one of one byte does: the header cannot tell them apart.
func (x *exchange) whereabouts(u *hosted.Upload) {
	header := x.w.Header()
	set(header, "Location", "/v2/"+x.route.Name+"/blobs/uploads/"+u.ID())
	set(header, "Range", "0-"+strconv.FormatInt(max(u.Offset()-1, 0), 10))
	set(header, "Docker-Upload-Uuid", u.ID())
}

func (x *exchange) uploading(u *hosted.Upload, status int) error {
	x.whereabouts(u)
	content.Hasten(x.w, x.r)
	if status != http.StatusNoContent {
		set(x.w.Header(), "Content-Length", "0")
	}
	x.w.WriteHeader(status)
	return nil
}

// created says that a blob is there.
func (x *exchange) created(d digest.Digest) {
	header := x.w.Header()
	set(header, "Location", "/v2/"+x.route.Name+"/blobs/"+string(d))
	set(header, "Docker-Content-Digest", string(d))
	set(header, "Content-Length", "0")
	content.Hasten(x.w, x.r)
	x.w.WriteHeader(http.StatusCreated)
}

// beginUpload answers POST: a mount, a whole blob, or the beginning of an upload.
func (x *exchange) beginUpload(ctx context.Context) error {
	query := x.r.URL.RawQuery
	if mount := queryValue(query, "mount"); mount != "" {
		// What cannot be mounted is uploaded, whatever the reason.
		if d, err := oci.ParseDigest(mount); err == nil && x.mount(ctx, d, queryValue(query, "from")) {
			return nil
		}
	} else if text := queryValue(query, "digest"); text != "" {
		d, err := oci.ParseDigest(text)
		if err != nil {
			return fail(wrongDigest, "%v", err)
		}
		// Without a body, and if that is not what the digest is of, the blob is
		// to come by PUT.
		if x.r.ContentLength != 0 || d == d.Algorithm().FromBytes(nil) {
			body, err := x.body()
			if err != nil {
				return err
			}
			size, err := x.mirror.hosted.Push(ctx, x.target.Repository, d, body)
			if err != nil {
				return err
			}
			return x.pushed(d, size)
		}
	}
	u, err := x.mirror.hosted.Begin(ctx, x.target.Repository, digest.Algorithm(queryValue(query, "digest-algorithm")))
	if err != nil {
		return err
	}
	return x.uploading(u, http.StatusAccepted)
}

func (x *exchange) finishUpload(ctx context.Context, u *hosted.Upload) error {
	d, err := oci.ParseDigest(queryValue(x.r.URL.RawQuery, "digest"))
	if err != nil {
		return fail(wrongDigest, "?digest=: %v", err)
	}
	var body hosted.Body
	if x.r.ContentLength != 0 {
		if body, err = x.body(); err != nil {
			return err
		}
	}
	size, err := u.Finish(ctx, d, body)
	if err != nil {
		return err
	}
	return x.pushed(d, size)
}

func (x *exchange) pushed(d digest.Digest, size int64) error {
	x.report.Reference = string(d)
	x.notify(notify.Push, d, "", size, "", "")
	x.created(d)
	return nil
}

// body is what the request brings, and where the client believes it belongs.
func (x *exchange) body() (hosted.Body, error) {
	control := http.NewResponseController(x.w)
	body := hosted.Body{
		Reader: x.r.Body, At: -1, Length: x.r.ContentLength,
		// A time that has passed.
		Interrupt: func() { control.SetReadDeadline(time.Unix(1, 0)) },
	}
	ranges := x.r.Header["Content-Range"]
	if len(ranges) == 0 {
		return body, nil
	}
	first, last, ok := chunkRange(ranges[0])
	if !ok || len(ranges) > 1 {
		return body, fail(badUpload, "Content-Range: %s is not the numbers of the first and the last byte, such as 0-1023", printable(strings.Join(ranges, ", ")))
	}
	length := last - first + 1
	if body.Length >= 0 && body.Length != length {
		return body, fail(wrongLength, "the body has %d bytes, and its Content-Range %d", body.Length, length)
	}
	body.At, body.Length = first, length
	return body, nil
}

// chunkRange reads the Content-Range of a chunk: ^[0-9]+-[0-9]+$ as the spec has
// it, and not what RFC 9110 has.
func chunkRange(s string) (first, last int64, ok bool) {
	from, to, ok := strings.Cut(s, "-")
	if !ok || len(s) > 40 {
		return 0, 0, false
	}
	for _, text := range [...]string{from, to} {
		if text == "" || strings.Trim(text, "0123456789") != "" {
			return 0, 0, false
		}
	}
	first, err := strconv.ParseInt(from, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	last, err = strconv.ParseInt(to, 10, 64)
	// One less than the largest, so that the length is a number, too.
	if err != nil || last < first || last == 1<<63-1 {
		return 0, 0, false
	}
	return first, last, true
}

// mount takes a blob over from another repository that the caller may pull from:
// the one that is named, or any. It reports whether it has answered.
func (x *exchange) mount(ctx context.Context, d digest.Digest, from string) bool {
	// For all that is asked, however many there are.
	asking, cancel := context.WithTimeoutCause(ctx, checkPatience, errNoAnswer)
	defer cancel()
	if from != "" {
		source, ok := x.source(asking, from, d)
		return ok && x.mountFrom(ctx, d, source)
	}
	c := x.mirror.catalog(ctx)
	if c == nil {
		return false
	}
	owners, err := c.Owners(ctx, d, maxOwners)
	if err != nil {
		x.mirror.log.Warn("asking the catalog who has a blob", zap.Error(err))
		return false
	}
	for _, owner := range owners {
		name, ok := x.visible(asking, owner.Name)
		if !ok {
			continue
		}
		if source, ok := x.source(asking, name, d); ok && x.mountFrom(ctx, d, source) {
			return true
		}
	}
	return false
}

func (x *exchange) mountFrom(ctx context.Context, d digest.Digest, source Target) bool {
	size, err := x.mirror.hosted.Mount(ctx, x.target.Repository, source.Repository, d)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, hosted.ErrClosedToPush) {
			x.mirror.log.Warn("mounting a blob", zap.String("from", source.Repository), zap.String("to", x.target.Repository), zap.Error(err))
		}
		return false
	}
	x.report.Reference = string(d)
	x.notify(notify.Mount, d, "", size, "", source.addressed())
	x.created(d)
	return true
}
