package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
)

// BlobSize asks for the size of a blob without fetching it. Success is the
// upstream's proof that the blob belongs to the repository.
func (u *Upstream) BlobSize(ctx context.Context, repository string, d digest.Digest) (int64, error) {
	size := int64(-1)
	err := u.persist(ctx, toPull, func(ctx context.Context, e *endpoint, last bool) error {
		c := call{method: http.MethodHead, repository: repository, what: "blobs/" + d.String(), must: last}
		resp, err := e.do(ctx, c)
		var odd *Error
		switch {
		case err == nil && !isRedirect(resp.StatusCode) && resp.ContentLength >= 0 && !webPage(resp.Header):
			resp.Body.Close()
			size = resp.ContentLength
			return nil
		case err == nil:
			resp.Body.Close()
		case errors.As(err, &odd) && odd.Kind == Invalid:
			// HEAD of a blob is not known there.
		default:
			return err
		}
		// The size is behind a redirect, whose presigned address would refuse
		// a HEAD. One byte tells it.
		c.method, c.follow, c.header = http.MethodGet, true, http.Header{"Range": {"bytes=0-0"}}
		resp, err = e.do(ctx, c)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK && !webPage(resp.Header) {
			size = resp.ContentLength
		} else if _, total, ok := contentRange(resp.Header); ok {
			size = total
		}
		if size < 0 {
			return &Error{Kind: Invalid, Endpoint: e.name, Reason: "it does not say how long the blob is"}
		}
		return nil
	})
	return size, err
}

// Blob is the upstream's endpoints as the sources of one blob, in the order of
// asking. Equal arguments give equal sources.
func (u *Upstream) Blob(repository string, d digest.Digest) []fill.Source {
	var sources []fill.Source
	for i, e := range u.endpoints {
		if e.can(toPull) {
			sources = append(sources, blob{e.endpoint, u.name, repository, d, i == len(u.endpoints)-1})
		}
	}
	return sources
}

type blob struct {
	endpoint   *endpoint
	upstream   string
	repository string
	digest     digest.Digest
	last       bool // nobody else is asked after it
}

// hurry is how long an endpoint has to begin while there are others.
const hurry = 5 * time.Second

// Open asks the endpoint once; how long to persist is the fill's to decide.
func (b blob) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	if at, ok := b.endpoint.blamed.Get(b.digest); ok && b.endpoint.now().Sub(at) < blameMemory && !b.last {
		return nil, &Error{Kind: Invalid, Upstream: b.upstream, Endpoint: b.endpoint.name, Reason: "it delivered wrong bytes for this blob a while ago"}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	if !b.last {
		defer time.AfterFunc(hurry, func() { cancel(ErrSlow) }).Stop()
	}
	stream, err := b.endpoint.blob(ctx, b, span)
	if err != nil {
		cancel(nil)
		var failure *Error
		if errors.As(err, &failure) {
			failure.Upstream = b.upstream
		}
		return nil, err
	}
	inner := stream.ReadCloser.(*freeing)
	free := inner.free
	inner.free = func() { free(); cancel(nil) }
	return stream, nil
}

// Blame implements fill.Source: the endpoint is passed over for this blob for
// a while, unless there is no other.
func (b blob) Blame(error) { b.endpoint.blamed.Add(b.digest, b.endpoint.now()) }

func (e *endpoint) blob(ctx context.Context, b blob, span fill.Span) (_ *fill.Stream, err error) {
	select {
	case e.streams <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	free := func() { <-e.streams }
	defer func() {
		if err != nil {
			free()
		}
	}()
	header := http.Header{"Accept": {"application/octet-stream, */*"}}
	switch {
	case span.Length >= 0:
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", span.Offset, span.Offset+span.Length-1))
	case span.Offset > 0:
		header.Set("Range", fmt.Sprintf("bytes=%d-", span.Offset))
	}
	resp, err := e.do(ctx, call{method: http.MethodGet, repository: b.repository, what: "blobs/" + b.digest.String(), header: header, follow: true, must: b.last})
	if err != nil {
		return nil, err
	}
	stream := &fill.Stream{ReadCloser: &freeing{resp.Body, free, false}, From: e.name}
	var odd string
	if coding := resp.Header.Get("Content-Encoding"); coding != "" && !strings.EqualFold(coding, "identity") {
		odd = "it encodes the blob as " + coding
	} else if resp.StatusCode == http.StatusPartialContent {
		var ok bool
		if stream.Offset, stream.Size, ok = contentRange(resp.Header); !ok || stream.Offset > span.Offset {
			odd = "its Content-Range does not fit what was asked for"
		}
	} else {
		stream.Size, stream.Whole = resp.ContentLength, true
		if webPage(resp.Header) {
			odd = "it sends a web page instead of the blob"
		}
	}
	if odd != "" {
		resp.Body.Close()
		return nil, &Error{Kind: Invalid, Endpoint: e.name, Status: resp.StatusCode, Reason: odd}
	}
	return stream, nil
}

// freeing gives back the place among an endpoint's streams.
type freeing struct {
	io.ReadCloser
	free   func()
	closed bool
}

func (f *freeing) Close() error {
	if !f.closed {
		f.closed = true
		defer f.free()
	}
	return f.ReadCloser.Close()
}

// webPage reports what a captive portal or a login page sends.
func webPage(header http.Header) bool {
	return strings.HasPrefix(header.Get("Content-Type"), "text/html")
}

// contentRange reads "bytes 100-199/500". The total is -1 where it is "*".
func contentRange(header http.Header) (start, total int64, ok bool) {
	value, ok := strings.CutPrefix(header.Get("Content-Range"), "bytes ")
	if !ok {
		return 0, 0, false
	}
	span, size, ok := strings.Cut(value, "/")
	from, _, ok2 := strings.Cut(span, "-")
	start, err := strconv.ParseInt(from, 10, 64)
	if !ok || !ok2 || err != nil || start < 0 {
		return 0, 0, false
	}
	if size == "*" {
		return start, -1, true
	}
	total, err = strconv.ParseInt(size, 10, 64)
	return start, total, err == nil && total > start
}
