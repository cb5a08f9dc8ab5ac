package api

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tus/tusd/v2/pkg/handler"
	"golang.org/x/exp/slog"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
)

// Uploads that can be resumed: tus 1.0 (https://tus.io/protocols/resumable-upload) with
// creation, creation-with-upload, termination and expiration. tusd's handler speaks the
// protocol; tusStore gives it the uploads of the library, which becomes a version with
// its last byte. Whatever fails there is kept in the exchange, and answered as anywhere
// else.

const (
	uploadsPath = "/v1/uploads"

	// locationHeader has where the version is that a finished upload has become.
	locationHeader = "Backing-Image-Location"

	maxFinished = 1000 // are remembered

	// stall is how long a client may send nothing.
	stall = time.Minute

	// settling is how long a request waits for an earlier one of its upload to end.
	settling = 20 * time.Second
)

// finished is an upload that has become a version.
type finished struct {
	size          int64
	name, version string
}

type exchangeKey struct{}

// errKept stands for an error that the exchange has.
var errKept = errors.New("kept for the answer")

func (a *API) newTus() (*handler.UnroutedHandler, error) {
	composer := handler.NewStoreComposer()
	composer.UseCore(tusStore{})
	composer.UseTerminater(tusStore{})
	return handler.NewUnroutedHandler(handler.Config{
		StoreComposer:   composer,
		BasePath:        uploadsPath,
		DisableDownload: true,
		Cors:            &handler.CorsConfig{Disable: true},
		NetworkTimeout:  stall,
		// The library is given the request's own context.
		GracefulRequestCompletionTimeout: time.Millisecond,
		Logger:                           slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.Level(100)})),
	})
}

// upload answers below /v1/uploads.
func (x *exchange) upload() error {
	id := strings.Trim(strings.TrimPrefix(x.r.URL.EscapedPath(), uploadsPath), "/")
	allow := []string{"OPTIONS", "POST"}
	if id != "" {
		allow = []string{"DELETE", "HEAD", "OPTIONS", "PATCH"}
	}
	name := x.r.Method
	if override := x.r.Header.Get("X-Http-Method-Override"); name == http.MethodPost && override != "" {
		name = override // some libraries know no PATCH
	}
	if !slices.Contains(allow, name) {
		x.w.Header().Set("Allow", strings.Join(allow, ", "))
		return fail(badMethod, "this path answers %s", strings.Join(allow, ", "))
	}
	if len(x.r.Header.Get("Upload-Metadata")) > maxHeader {
		return fail(malformed, "Upload-Metadata has at most %d bytes", maxHeader)
	}
	if name == http.MethodOptions {
		if x.site.MaxImage > 0 {
			x.w.Header().Set("Tus-Max-Size", strconv.FormatInt(x.site.MaxImage, 10))
		}
	} else if id != "" {
		if done, err := x.resume(name, id); done || err != nil {
			return err
		}
	}
	w := &tusWriter{ResponseWriter: x.w, x: x}
	r := x.r.WithContext(context.WithValue(x.r.Context(), exchangeKey{}, x))
	r.URL = &url.URL{Path: "/" + id}
	x.tus.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost:
			x.tus.PostFile(w, r)
		case http.MethodHead:
			x.tus.HeadFile(w, r)
		case http.MethodPatch:
			x.tus.PatchFile(w, r)
		case http.MethodDelete:
			x.tus.DelFile(w, r)
		}
	})).ServeHTTP(w, r)
	return w.fault()
}

// resume finds an upload for what comes next, and reports whether it has answered: for
// one that is complete already.
func (x *exchange) resume(name, id string) (bool, error) {
	u, err := x.library.Upload(x.r.Context(), id)
	if err == nil && name != http.MethodDelete {
		if err := x.allow(access.Push, u.Draft().Name); err != nil {
			return false, err
		}
		err = x.settle(u)
	}
	if err != nil {
		if f, ok := x.done.Get(id); ok && judge(err).Code == notFound && name != http.MethodDelete {
			// Whoever has missed the answer to the last byte asks where to go on.
			if err := x.allow(access.Push, f.name); err != nil {
				return false, err
			}
			return true, x.complete(name, f)
		}
		return false, err
	}
	if err := x.allow(access.Push, u.Draft().Name); err != nil {
		return false, err
	}
	x.report.Image = u.Draft().Name
	x.resumed = u
	if size := u.Size(); name == http.MethodDelete || size < 0 || u.Offset() != size {
		return false, nil
	} else if name == http.MethodPatch && x.r.Header.Get("Upload-Offset") != strconv.FormatInt(size, 10) {
		return false, nil // which tusd refuses
	}
	// Everything has come, and could not be taken then. A client that is told where the
	// upload ends would count it as done.
	f, err := x.take(u)
	if err != nil {
		return false, err
	}
	return true, x.complete(name, f)
}

// settle ends an earlier request that still writes to the upload: its client has lost
// it, and asks where to go on, or goes on.
func (x *exchange) settle(u *backing.Upload) error {
	ctx, cancel := context.WithTimeout(x.r.Context(), settling)
	defer cancel()
	return u.Settle(ctx)
}

// complete answers a client whose upload has become a version.
func (x *exchange) complete(name string, f finished) error {
	header := x.w.Header()
	header.Set("Tus-Resumable", "1.0.0")
	header.Set("Cache-Control", "no-store")
	header.Set("Upload-Offset", strconv.FormatInt(f.size, 10))
	header.Set(locationHeader, x.relative(versionPath(f.name, f.version)))
	if name == http.MethodPatch {
		x.w.WriteHeader(http.StatusNoContent)
		return nil
	}
	header.Set("Upload-Length", strconv.FormatInt(f.size, 10))
	x.w.WriteHeader(http.StatusOK)
	return nil
}

// take makes a version of an upload of which everything has come, once for all who ask
// for it at a time.
func (x *exchange) take(u *backing.Upload) (finished, error) {
	// It may take longer than a client may be silent; the connection is watched
	// meanwhile, and a deadline that passes would count as its end.
	control := http.NewResponseController(x.w)
	control.SetReadDeadline(time.Time{})
	control.SetWriteDeadline(time.Time{})
	id, size := u.ID(), u.Size()
	result, err, _ := x.taking.Do(id, func() (any, error) {
		if f, ok := x.done.Get(id); ok {
			return f, nil
		}
		v, _, err := u.Finish(x.r.Context(), u.Draft())
		if err != nil {
			return nil, err
		}
		f := finished{size: size, name: v.Name, version: v.Version}
		x.done.Add(id, f)
		return f, nil
	})
	if err != nil {
		return finished{}, err
	}
	f := result.(finished)
	x.report.Image, x.report.Version = f.name, f.version
	return f, nil
}

// tusStore is the uploads of the exchange that a context is of.
type tusStore struct{}

func (tusStore) NewUpload(ctx context.Context, info handler.FileInfo) (handler.Upload, error) {
	x := ctx.Value(exchangeKey{}).(*exchange)
	u, err := x.begin(info)
	if err != nil {
		return nil, x.keep(err)
	}
	return tusUpload{x, u}, nil
}

func (tusStore) GetUpload(ctx context.Context, id string) (handler.Upload, error) {
	x := ctx.Value(exchangeKey{}).(*exchange)
	if x.resumed == nil || x.resumed.ID() != id {
		return nil, handler.ErrNotFound
	}
	return tusUpload{x, x.resumed}, nil
}

func (tusStore) AsTerminatableUpload(u handler.Upload) handler.TerminatableUpload {
	return u.(tusUpload)
}

// begin begins an upload, of which everything is told but its bytes.
func (x *exchange) begin(info handler.FileInfo) (*backing.Upload, error) {
	if !x.mayAnywhere(access.Push) {
		return nil, x.refused(access.Push, "")
	}
	var d backing.Draft
	for _, field := range slices.Sorted(maps.Keys(info.MetaData)) {
		switch field {
		case "filename", "filetype", "type", "relativePath":
			continue // which clients send by themselves
		}
		if err := describe(&d, field, info.MetaData[field]); err != nil {
			return nil, err
		}
	}
	if d.Name == "" {
		return nil, fail(malformed, "Upload-Metadata has to name the image: name <base64 of its name>")
	}
	if err := x.allow(access.Push, d.Name); err != nil {
		return nil, err
	}
	if d.Decompress == "" || d.Decompress == "none" {
		if err := x.small(info.Size); err != nil {
			return nil, err
		}
	}
	x.report.Image = d.Name
	return x.library.Receive(x.r.Context(), d, info.Size)
}

// keep keeps an error for the answer.
func (x *exchange) keep(err error) error {
	x.kept = err
	return errKept
}

type tusUpload struct {
	x *exchange
	u *backing.Upload
}

func (t tusUpload) GetInfo(context.Context) (handler.FileInfo, error) {
	d := t.u.Draft()
	meta := handler.MetaData{"name": d.Name}
	for field, value := range map[string]string{"version": d.Version, "tag": strings.Join(d.Tags, ","), "sha256": d.SHA256.String(), "sha512": d.SHA512.String(),
		"decompress": d.Decompress, "register": strings.Join(d.Register, ",")} {
		if value != "" {
			meta[field] = value
		}
	}
	t.expires()
	return handler.FileInfo{ID: t.u.ID(), Size: t.u.Size(), Offset: t.u.Offset(), MetaData: meta}, nil
}

// expires tells how long the upload is kept (extension expiration).
func (t tusUpload) expires() {
	t.x.w.Header().Set("Upload-Expires", t.u.Expires().UTC().Format(http.TimeFormat))
}

func (t tusUpload) WriteChunk(_ context.Context, offset int64, src io.Reader) (int64, error) {
	body := t.x.body(src, offset, t.x.r.ContentLength)
	// tusd moves the deadline on after every read, and so after an interruption too.
	reader := &interruptible{Reader: src}
	interrupt := body.Interrupt
	body.Reader, body.Interrupt = reader, func() { reader.over.Store(true); interrupt() }
	end, err := t.u.Append(t.x.r.Context(), body)
	t.expires()
	if err != nil {
		err = t.x.keep(err)
	}
	return max(end-offset, 0), err
}

// interruptible is what can be read until it is over.
type interruptible struct {
	io.Reader
	over atomic.Bool
}

func (r *interruptible) Read(p []byte) (int, error) {
	if r.over.Load() {
		return 0, os.ErrDeadlineExceeded
	}
	return r.Reader.Read(p)
}

func (t tusUpload) GetReader(context.Context) (io.ReadCloser, error) {
	return nil, handler.ErrNotImplemented
}

func (t tusUpload) FinishUpload(context.Context) error {
	if t.x.kept != nil {
		return errKept // the last byte has come with an error
	}
	f, err := t.x.take(t.u)
	if err != nil {
		return t.x.keep(err)
	}
	header := t.x.w.Header()
	header.Del("Upload-Expires")
	header.Set(locationHeader, t.x.relative(versionPath(f.name, f.version)))
	return nil
}

func (t tusUpload) Terminate(context.Context) error {
	if err := t.u.Cancel(t.x.r.Context()); err != nil {
		return t.x.keep(err)
	}
	t.x.w.Header().Del("Upload-Expires")
	return nil
}

// tusWriter lets through what tusd answers, but for errors.
type tusWriter struct {
	http.ResponseWriter
	x      *exchange
	failed int
	text   []byte
}

func (w *tusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *tusWriter) WriteHeader(status int) {
	if status >= http.StatusBadRequest {
		w.failed = status
		return
	}
	header := w.Header()
	if extensions := header.Get("Tus-Extension"); extensions != "" {
		header.Set("Tus-Extension", extensions+",expiration")
	}
	if location := header.Get("Location"); location != "" {
		// tusd's own is absolute, and made of what proxies say.
		header.Set("Location", w.x.relative(uploadsPath+location[strings.LastIndexByte(location, '/'):]))
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *tusWriter) Write(p []byte) (int, error) {
	if w.failed == 0 {
		return w.ResponseWriter.Write(p)
	}
	w.text = append(w.text, p[:min(len(p), maxQuery-len(w.text))]...)
	return len(p), nil
}

// fault is why the request has failed, or nil.
func (w *tusWriter) fault() error {
	if w.failed == 0 {
		return w.x.kept
	}
	header := w.Header()
	if w.x.kept != nil {
		return w.x.kept
	}
	name, text, _ := strings.Cut(strings.TrimSpace(string(w.text)), ": ")
	switch {
	case w.failed == http.StatusPreconditionFailed:
		header.Set("Tus-Version", "1.0.0")
		return fail(badVersion, "send Tus-Resumable: 1.0.0")
	case name == "ERR_INVALID_CONTENT_TYPE":
		return fail(badType, "send Content-Type: application/offset+octet-stream")
	case w.failed == http.StatusRequestEntityTooLarge:
		return fail(backing.TooLarge, "the body goes on behind the Upload-Length")
	case w.failed == http.StatusConflict:
		return fail(wrongOffset, "the upload does not end at Upload-Offset; HEAD it to learn where it does")
	case w.failed == http.StatusNotFound:
		return fail(notFound, "there is no such upload; begin it again")
	case text == "":
		text = "it makes no sense to an upload"
	}
	return fail(malformed, "%.200s", text)
}
