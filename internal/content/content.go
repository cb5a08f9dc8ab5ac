// Package content sends blobs: those that are held and those that are on their way,
// whole or by ranges, and never a body that ends short as if it were complete. It also
// answers those who are sending one, and need not.
package content

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/section"
)

// Content is a blob that can be sent: held, or on its way.
type Content interface {
	io.Closer
	Size() int64
	// Prepare says which spans will be read, and waits until the first of them
	// begins to be there, or certainly will not. With proven, the end of the
	// blob comes only once its digest is proven. ctx bounds the waiting, and
	// sending the reading.
	Prepare(ctx, sending context.Context, spans []oci.Span, proven bool) error
	// Reader returns a reader of the span of that number, of those that were
	// prepared. Where the bytes lie in a file it gives [section.Writer]s sections
	// of that. Only one reader is used at a time, and once.
	Reader(i int) (io.Reader, error)
}

// Held is a blob in the store, which r reads, and can seek in. It closes r.
func Held(r io.ReadCloser, size int64) Content { return &held{r: r, size: size} }

// Live is a blob that is being filled. It releases the fill.
func Live(f *fill.Fill, size int64) Content { return &live{fill: f, size: size} }

type held struct {
	r     io.ReadCloser
	size  int64
	spans []oci.Span
}

func (b *held) Close() error { return b.r.Close() }
func (b *held) Size() int64  { return b.size }

func (b *held) Prepare(_, _ context.Context, spans []oci.Span, _ bool) error {
	b.spans = spans
	return nil
}

func (b *held) Reader(i int) (io.Reader, error) {
	span := b.spans[i]
	seeker, ok := b.r.(io.ReadSeeker)
	if !ok {
		return nil, errors.New("content: the store's reader cannot seek")
	}
	if _, err := seeker.Seek(span.Offset, io.SeekStart); err != nil {
		return nil, err
	}
	end := span.Offset + span.Length
	if file, ok := b.r.(*os.File); ok {
		return section.New(file, end, end == b.size), nil
	}
	return io.LimitReader(seeker, span.Length), nil
}

// live has all its readers from the beginning, so that what they ask for is fetched
// side by side.
type live struct {
	fill    *fill.Fill
	size    int64
	readers []*fill.Reader
}

func (b *live) Close() error {
	for _, r := range b.readers {
		r.Close()
	}
	b.fill.Release()
	return nil
}

func (b *live) Size() int64 { return b.size }

func (b *live) Prepare(ctx, sending context.Context, spans []oci.Span, proven bool) error {
	for _, span := range spans {
		b.readers = append(b.readers, b.fill.NewReader(sending, span.Offset, span.Length, proven))
	}
	return b.readers[0].Ready(ctx)
}

func (b *live) Reader(i int) (io.Reader, error) {
	if i > 0 {
		b.readers[i-1].Close()
	}
	return b.readers[i], nil
}
