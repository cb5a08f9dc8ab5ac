package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
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
		c.method, c.follow = http.MethodGet, true
		stream, err := e.ask(ctx, c, content{repository, d}, fill.Span{Length: 1})
		var refused rangeError
		if errors.As(err, &refused) && refused.size == 0 { // it has no first byte
			size = 0
			return nil
		}
		if err != nil {
			return err
		}
		defer stream.Close()
		io.CopyN(io.Discard, stream, 1) // so that the connection can be used again
		if size = stream.Size; size < 0 {
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
			last := !slices.ContainsFunc(u.endpoints[i+1:], func(r ranked) bool { return r.can(toPull) })
			sources = append(sources, blob{e.endpoint, u.name, content{repository, d}, last})
		}
	}
	return sources
}

type blob struct {
	endpoint *endpoint
	upstream string
	content
	last bool // nobody else is asked after it
}

// hurry is how long an endpoint has to begin while there are others.
const hurry = 5 * time.Second

// Open asks the endpoint once; how long to persist is the fill's to decide.
// What is asked for in the background waits for its turn however long that
// takes.
func (b blob) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	e := b.endpoint
	if at, ok := e.blamed.Get(b.digest); ok && e.now().Sub(at) < blameMemory && !b.last {
		return nil, &Error{Kind: Invalid, Upstream: b.upstream, Endpoint: e.name, Reason: "it delivered wrong bytes for this blob a while ago"}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	hasten := func() (stop func() bool) {
		if b.last {
			return func() bool { return true }
		}
		return time.AfterFunc(hurry, func() { cancel(ErrSlow) }).Stop
	}
	if !span.Background {
		defer hasten()()
	}
	background, err := e.places.take(ctx, span.Background, span.Hurry)
	if err != nil {
		cancel(nil)
		if errors.Is(err, ErrSlow) {
			err = &Error{Kind: Unavailable, Upstream: b.upstream, Endpoint: e.name, Reason: fmt.Sprintf("none of its %d streams has come free for %v", e.places.limit, hurry)}
		}
		return nil, err
	}
	if span.Background {
		defer hasten()()
	}
	free := func() {
		e.places.give(background)
		cancel(nil)
	}
	stream, err := e.blob(ctx, b, span)
	if err != nil {
		free()
		var failure *Error
		if errors.As(err, &failure) {
			failure.Upstream = b.upstream
		}
		return nil, err
	}
	d := stream.ReadCloser.(*delivery)
	d.upstream, d.free = b.upstream, free
	if !b.last && e.minSpeed.Bytes > 0 {
		d.body.pace = &pace{least: e.minSpeed}
	}
	return stream, nil
}

// Blame implements fill.Source: the endpoint is passed over for this blob for
// a while, unless there is no other.
func (b blob) Blame(error) {
	b.endpoint.blamed.Add(b.digest, b.endpoint.now())
	if target := b.endpoint.targets.of(b.content); target != nil {
		b.endpoint.targets.drop(b.content, target)
	}
}

// blob asks for a span, first where a redirect led before.
func (e *endpoint) blob(ctx context.Context, b blob, span fill.Span) (*fill.Stream, error) {
	c := call{
		method: http.MethodGet, repository: b.repository, what: "blobs/" + b.digest.String(),
		header: http.Header{"Accept": {"application/octet-stream, */*"}}, follow: true, must: b.last,
	}
	if stream, err := e.revisit(ctx, c, b.content, span); stream != nil || err != nil {
		return stream, err
	}
	return e.ask(ctx, c, b.content, span)
}

// ask asks the endpoint for a span, and for the whole where that is not
// understood.
func (e *endpoint) ask(ctx context.Context, c call, what content, span fill.Span) (*fill.Stream, error) {
	stream, err := e.visit(ctx, c.ranged(span), what, span)
	var refused rangeError
	switch {
	case !errors.As(err, &refused):
		return stream, err
	case refused.cannotHold(span):
		failure := err.(*Error)
		failure.Kind, failure.Reason = Invalid, fmt.Sprintf("the blob has %d bytes there, and what follows the first %d was asked for", refused.size, span.Offset)
		return nil, failure
	}
	return e.visit(ctx, c, what, span)
}

// visit asks the endpoint, and remembers where it redirects to.
func (e *endpoint) visit(ctx context.Context, c call, what content, span fill.Span) (*fill.Stream, error) {
	resp, err := e.do(ctx, c)
	if err != nil {
		return nil, err
	}
	stream, err := e.accept(resp, span)
	if err == nil {
		d := stream.ReadCloser.(*delivery)
		d.what, d.target = what, e.remember(what, resp)
	}
	return stream, err
}

// revisit asks where a redirect led before. It returns nothing if there is no
// such place, or it is of no use any more: what is said there is not the
// registry's word, and the registry is to be asked.
func (e *endpoint) revisit(ctx context.Context, c call, what content, span fill.Span) (*fill.Stream, error) {
	target := e.targets.of(what)
	if target == nil {
		return nil, nil
	}
	c.follow = false
	resp, err := e.request(ctx, c.ranged(span), target, "")
	if err == nil && (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent) {
		var stream *fill.Stream
		if stream, err = e.accept(resp, span); err == nil {
			d := stream.ReadCloser.(*delivery)
			d.what, d.target = what, target
			return stream, nil
		}
	} else if err == nil {
		drain(resp)
	}
	if ctx.Err() != nil && !errors.Is(context.Cause(ctx), ErrSlow) {
		return nil, context.Cause(ctx)
	}
	e.targets.drop(what, target)
	if ctx.Err() != nil {
		return nil, &Error{Kind: Unavailable, Endpoint: e.name, Origin: e.origin, Reason: target.Host + ", where it redirected to", Err: ErrSlow}
	}
	return nil, nil
}

// remember keeps the address that a good answer came from, if it is somewhere
// else, and returns it.
func (e *endpoint) remember(what content, resp *http.Response) *url.URL {
	from := resp.Request.URL
	if e.transports.guard.trusts(from) {
		return nil
	}
	e.targets.remember(what, from)
	return from
}

// delivery is the body of an answer that holds a span. It ends with the range
// that the answer speaks of.
type delivery struct {
	body     *body
	left     int64 // bytes to the end of the range; negative: no end is set
	endpoint *endpoint
	upstream string
	what     content
	target   *url.URL // where it comes from, if that is elsewhere
	free     func()   // of a place; nil if it has none, and once closed
}

func (d *delivery) Read(p []byte) (int, error) {
	if d.left == 0 {
		// Every byte is here. Reading to the end lets the connection be used
		// again; how it ends says nothing more.
		d.body.Read(make([]byte, 1))
		return 0, io.EOF
	}
	if d.left > 0 {
		p = p[:min(int64(len(p)), d.left)]
	}
	n, err := d.body.Read(p)
	if d.left > 0 {
		d.left -= int64(n)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if d.left == 0 {
			return n, io.EOF
		}
		if d.target != nil { // another may do better
			d.endpoint.targets.drop(d.what, d.target)
		}
		if errors.Is(err, errMinSpeed) {
			err = &Error{Kind: Unavailable, Upstream: d.upstream, Endpoint: d.endpoint.name, Origin: d.endpoint.origin, After: slowPause, Err: err}
		}
	}
	return n, err
}

func (d *delivery) Close() error {
	err := d.body.Close()
	if d.free != nil {
		d.free()
		d.free = nil
	}
	return err
}
