package fill

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/caddy-registry/mirror/internal/section"
)

// A Reader reads a part of a fill's content, waiting for bytes that have not
// arrived. It belongs to one goroutine; a fill may have any number of them,
// and they all read the one spool file.
type Reader struct {
	fill   *Fill
	ctx    context.Context
	start  int64
	offset int64
	end    int64
	proven bool
	own    *stream // once the fill is passing

	at int64 // as offset, guarded by Fill.mu
}

// NewReader returns a reader of length bytes from offset; this is what lets
// the fill fetch. The span lies inside the size. With proven, the reader gets
// the last segment of the content only when its digest is proven; whoever could
// take what it reads for the whole content, or for all of its rest, asks for
// that. ctx bounds each wait. The caller closes the reader, and releases the
// fill after that.
func (f *Fill) NewReader(ctx context.Context, offset, length int64, proven bool) *Reader {
	r := &Reader{fill: f, ctx: ctx, start: offset, offset: offset, end: offset + length, proven: proven, at: offset}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readers = append(f.readers, r)
	f.settled = false
	f.hurry(r)
	f.schedule()
	return r
}

// Close says that the reader will read no more. Readers may leave at any time.
func (r *Reader) Close() error {
	if r.own != nil {
		r.own.close()
	}
	f := r.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, other := range f.readers {
		if other == r {
			last := len(f.readers) - 1
			f.readers[i] = f.readers[last]
			f.readers[last] = nil
			f.readers = f.readers[:last]
			break
		}
	}
	return nil
}

// Ready waits until there is something to read, and some source has begun to
// deliver if one will be needed; or until it is certain that there will not be.
// Where ctx ends the waiting, the error tells what trouble there has been with
// sources so far.
func (r *Reader) Ready(ctx context.Context) error {
	f := r.fill
	var pass bool
	var err error
	if r.withheld() {
		// All that it asks for comes when the whole is proven, which may take
		// long. Its answer can begin before.
		pass, err = r.waitSource(ctx)
	} else if _, _, pass, err = r.wait(ctx); err == nil && !pass {
		_, err = r.waitSource(ctx)
	}
	if pass && err == nil {
		err = r.pass().ready(ctx)
	}
	if ctx.Err() != nil && err != nil {
		f.mu.Lock()
		trouble := f.sources.last
		f.mu.Unlock()
		if trouble != nil {
			// Not wrapped: it is not the verdict.
			return fmt.Errorf("%w; so far: %v", context.Cause(ctx), trouble)
		}
		return context.Cause(ctx)
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// withheld reports whether the reader is to get nothing but the last segment of
// larger content.
func (r *Reader) withheld() bool {
	size, l := r.fill.key.size, r.fill.table.limits
	return r.proven && size > l.small && r.offset >= (size-1)/l.segment*l.segment
}

// waitSource waits until a source has delivered something in this fill, or none
// is needed, or the fill passes: what an earlier fill has left says nothing of
// whether the rest can be had now, and who is told so may still ask somebody
// else.
func (r *Reader) waitSource(ctx context.Context) (pass bool, err error) {
	from := r.offset
	if r.proven {
		from = 0
	}
	f := r.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.state == failed || f.state == paused:
			return false, f.err
		case f.state == passing:
			return true, nil
		case f.state >= verified, f.state == fetching && (f.fetched > 0 || f.has(from, r.end)):
			return false, nil
		}
		if err := f.awaitOr(ctx); err != nil {
			return false, err
		}
	}
}

// wait waits until bytes may be read, and returns how far; or until the reader
// is to go on by itself.
func (r *Reader) wait(ctx context.Context) (limit int64, file content, pass bool, err error) {
	if r.offset >= r.end {
		return 0, nil, false, io.EOF
	}
	f := r.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.at != r.offset {
		r.at = r.offset
		if r.proven && r.start > 0 && f.state == fetching { // its 8 MiB have moved on
			f.settled = false
			f.hurry(r)
			f.schedule()
		}
	}
	for {
		switch f.state {
		case verified, committed:
			return r.end, f.file, false, nil
		case failed, paused:
			return 0, nil, false, f.err
		case fetching, passing:
			if limit = min(f.readable(r.offset), r.end); r.proven {
				limit = min(limit, (f.size-1)/f.segment*f.segment)
			}
			if f.state == passing && r.proven {
				limit = min(limit, f.reached.at)
			}
			if limit > r.offset {
				return limit, f.file, false, nil
			}
			if f.state == passing {
				return 0, nil, true, nil
			}
		}
		if err := f.awaitOr(ctx); err != nil {
			return 0, nil, false, err
		}
	}
}

func (r *Reader) Read(p []byte) (int, error) {
	if r.own == nil {
		limit, file, pass, err := r.wait(r.ctx)
		if err != nil {
			return 0, err
		}
		if !pass {
			n, err := file.ReadAt(p[:min(int64(len(p)), limit-r.offset)], r.offset)
			r.offset += int64(n)
			if n > 0 {
				err = nil
			}
			return n, err
		}
	}
	n, err := r.pass().Read(p)
	r.offset += int64(n)
	return n, err
}

// few is how many readers get large buffers. A thousand slow ones are not to
// hold a quarter of a GiB.
const few = 64

var smallBuffers = sync.Pool{New: func() any { return new([bufferSize / 8]byte) }}

// WriteTo sends what has arrived at each wake.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	if sections, ok := w.(section.Writer); ok && r.own == nil {
		sent, err := r.writeSections(sections)
		if err == io.EOF {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
		copied, err := r.copyTo(w)
		return sent + copied, err
	}
	return r.copyTo(w)
}

func (r *Reader) copyTo(w io.Writer) (int64, error) {
	r.fill.mu.Lock()
	many := len(r.fill.readers) > few
	r.fill.mu.Unlock()
	if many {
		buffer := smallBuffers.Get().(*[bufferSize / 8]byte)
		defer smallBuffers.Put(buffer)
		return r.writeTo(w, buffer[:])
	}
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	return r.writeTo(w, buffer[:])
}

func (r *Reader) writeTo(w io.Writer, buffer []byte) (total int64, err error) {
	for {
		n, err := r.Read(buffer)
		if n > 0 {
			written, err := w.Write(buffer[:n])
			total += int64(written)
			if err != nil {
				return total, err
			}
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
