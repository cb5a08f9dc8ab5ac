package fill

import (
	"context"
	"io"
)

// A Reader reads a span of a fill's content, waiting for bytes that have not
// arrived. It belongs to one goroutine; a fill may have any number of them,
// and they all read the one spool file.
type Reader struct {
	fill   *Fill
	ctx    context.Context
	offset int64
	end    int64
	proven bool
}

// NewReader returns a reader of length bytes from offset. The span lies inside
// the size, which the caller has waited for. With proven, the reader gets the
// last segment of the content only when its digest is proven; whoever could
// take what it reads for the whole content asks for that. ctx bounds each
// wait. The caller releases the fill after the last use of the reader.
func (f *Fill) NewReader(ctx context.Context, offset, length int64, proven bool) *Reader {
	return &Reader{fill: f, ctx: ctx, offset: offset, end: offset + length, proven: proven}
}

// next waits for bytes and returns how many may be read now.
func (r *Reader) next() (int64, content, error) {
	if r.offset >= r.end {
		return 0, nil, io.EOF
	}
	limit, file, err := r.fill.await(r.ctx, r.offset, r.proven)
	return min(limit, r.end) - r.offset, file, err
}

func (r *Reader) Read(p []byte) (int, error) {
	available, file, err := r.next()
	if err != nil {
		return 0, err
	}
	n, err := file.ReadAt(p[:min(int64(len(p)), available)], r.offset)
	r.offset += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

// WriteTo sends everything that has arrived at each wake, in pieces of up to
// 256 KiB.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	var total int64
	for {
		n, err := r.Read(buffer[:])
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		written, err := w.Write(buffer[:n])
		total += int64(written)
		if err != nil {
			return total, err
		}
	}
}
