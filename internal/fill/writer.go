package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/storage"
)

// writer is the fetching side of a fill: one goroutine, no lock of its own.
type writer struct {
	fill        *Fill
	report      *Summary
	sha256      hasher
	asked       hasher // nil unless asked for by another algorithm
	file        *os.File
	path        string
	reservation storage.Reservation
	reserved    int64           // the offset up to which room is set aside
	from        map[Source]bool // who contributed
	written     int64           // and hashed; fill.written trails it
	broken      bool            // the spool cannot be written

	// Guarded by Fill.mu, since a timer publishes too.
	pending   int64 // written, as far as the lock holder knows
	published time.Time
	timer     *time.Timer
}

type hasher interface {
	io.Writer
	Sum([]byte) []byte
}

// copyFrom appends what the source delivers. It reports whether the content is
// complete.
func (w *writer) copyFrom(ctx context.Context, source Source) (complete bool, err error) {
	stream, err := source.Open(ctx, Span{Offset: w.written, Length: -1})
	if err != nil {
		return false, err
	}
	defer stream.Close()
	if err := w.begin(stream); err != nil {
		return false, err
	}
	w.report.From = stream.From
	w.from[source] = true
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	skip := w.written - stream.Offset
	size := w.fill.size // only this goroutine sets it
	for {
		n, err := stream.Read(buffer[:])
		w.report.Fetched += int64(n)
		run := buffer[:n]
		if skip > 0 {
			dropped := min(skip, int64(n))
			run, skip = run[dropped:], skip-dropped
		}
		if size >= 0 && w.written+int64(len(run)) > size {
			err := fmt.Errorf("%w: %s delivers more than %d bytes", ErrSize, stream.From, size)
			source.Blame(err)
			return false, err
		}
		if len(run) > 0 {
			if err := w.append(run); err != nil {
				w.broken = true
				return false, err
			}
		}
		switch {
		case size >= 0 && w.written == size:
			// Every byte is here: how the stream ends says nothing more. One
			// that does not end is looked at for more, and read to its end so
			// that its connection can be used again.
			if err == nil {
				if n, _ := stream.Read(buffer[:1]); n > 0 {
					err := fmt.Errorf("%w: %s delivers more than %d bytes", ErrSize, stream.From, size)
					source.Blame(err)
					return false, err
				}
			}
			return true, nil
		case errors.Is(err, io.EOF) && skip == 0 && size < 0:
			w.fill.mu.Lock()
			w.fill.size = w.written
			w.fill.mu.Unlock()
			return true, nil
		case errors.Is(err, io.EOF):
			return false, fmt.Errorf("%s: cut at %d of %d bytes: %w", stream.From, w.written, size, io.ErrUnexpectedEOF)
		case err != nil:
			return false, fmt.Errorf("%s: at %d of %d bytes: %w", stream.From, w.written, size, err)
		}
	}
}

// begin readies the spool for a stream, once the size is known.
func (w *writer) begin(stream *Stream) error {
	if stream.Offset > w.written {
		return fmt.Errorf("%s: starts at %d when asked for %d", stream.From, stream.Offset, w.written)
	}
	f := w.fill
	f.mu.Lock()
	expected := f.size
	if expected < 0 {
		expected = f.promised
	}
	if stream.Size >= 0 && expected >= 0 && stream.Size != expected {
		f.mu.Unlock()
		return fmt.Errorf("%w: %s has %d bytes, %d were promised", ErrSize, stream.From, stream.Size, expected)
	}
	size := max(expected, stream.Size)
	f.mu.Unlock()

	if err := w.reserve(max(size, w.written)); err != nil {
		return err
	}
	if w.file == nil {
		spool, err := f.table.store.Spool("fills")
		if err != nil {
			w.broken = true
			return fmt.Errorf("spool: %w", err)
		}
		path := filepath.Join(spool, "fill-"+f.digest.Encoded()[:16]+"-"+strconv.FormatUint(rand.Uint64(), 36))
		file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			w.broken = true
			return fmt.Errorf("spool: %w", err)
		}
		w.file, w.path = file, path
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.file = w.file
	if size != f.size {
		f.size = size
		f.publish()
	}
	return nil
}

// reserve sets room aside for the content up to an offset.
func (w *writer) reserve(to int64) error {
	if w.reservation != nil && to <= w.reserved {
		return nil
	}
	reservation, err := w.fill.table.store.Reserve(to - w.written)
	if err != nil {
		return err
	}
	if w.reservation != nil {
		w.reservation.Release()
	}
	w.reservation, w.reserved = reservation, to
	return nil
}

// append hashes and writes the next run, and publishes it now or soon.
func (w *writer) append(run []byte) error {
	if need := w.written + int64(len(run)); need > w.reserved { // a size nobody has said
		if err := w.reserve(need + reserveStep); err != nil {
			return err
		}
	}
	w.sha256.Write(run)
	if w.asked != nil {
		w.asked.Write(run)
	}
	if _, err := w.file.WriteAt(run, w.written); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	w.written += int64(len(run))
	w.reservation.Use(int64(len(run)))

	f := w.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	w.pending = w.written
	if w.pending-f.written >= bufferSize || time.Since(w.published) >= publishDelay {
		w.publishPending()
	} else if w.timer == nil {
		w.timer = time.AfterFunc(publishDelay, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			w.publishPending()
		})
	}
	return nil
}

// publishPending shows readers what has been written. Fill.mu is held.
func (w *writer) publishPending() {
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	if w.pending > w.fill.written {
		w.fill.written = w.pending
		w.published = time.Now()
		w.fill.publish()
	}
}

// verify proves the complete content, or says that it is not what was wanted.
func (w *writer) verify() (canonical digest.Digest, err error) {
	canonical = digest.NewDigestFromBytes(digest.Canonical, w.sha256.Sum(nil))
	got := canonical
	if w.asked != nil {
		got = digest.NewDigestFromBytes(w.fill.digest.Algorithm(), w.asked.Sum(nil))
	}
	if got != w.fill.digest {
		err := fmt.Errorf("%w: %s delivered %s for %s", ErrDigest, w.report.From, got, w.fill.digest)
		// Of several it may have been any.
		for source := range w.from {
			source.Blame(err)
		}
		return "", err
	}
	f := w.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written, f.size, f.state = w.written, w.written, verified
	f.publish()
	return canonical, nil
}

// finish gives back what is not needed any more. The file stays open for the
// readers; the last to release the fill closes it.
func (w *writer) finish() {
	w.fill.mu.Lock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	w.fill.mu.Unlock()
	if w.reservation != nil {
		w.reservation.Release()
	}
}

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}
