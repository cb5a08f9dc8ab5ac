package hosted

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// largeBuffer is how much is read before it is written, of which a request has
	// up to maxBuffers: see conveyor. Those who come when maxLarge requests have
	// them do with one small one.
	largeBuffer = 512 << 10
	maxBuffers  = 3
	smallBuffer = 32 << 10
	maxLarge    = 8

	noteRun  = 64 << 20 // bytes between two notes of the state
	flushRun = 8 << 20  // bytes that the kernel is told to begin to write

	// What is set aside for a body that does not say how long it is.
	leastRoom = 4 << 20
	mostRoom  = 64 << 20
)

var (
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
)

// A Body is what a request brings of a blob.
type Body struct {
	// Reader gives it; nil: there is nothing.
	io.Reader
	// At is the offset that the client believes it begins at; below 0: wherever
	// the upload ends.
	At int64
	// Length in bytes; below 0: as much as comes.
	Length int64
	// Interrupt lets a Read that is under way fail, and every later one; nil:
	// nothing can. Another goroutine calls it.
	Interrupt func()
}

// Append adds what a request brings, and returns where the upload ends then, also
// when it fails: what has come is kept. The error is [ErrOffset] if the body does
// not begin where the upload ends; [ErrLength] if it is cut short or too long;
// [ErrTooLarge], and storage.ErrFull if there is no room, both before anything is
// read if the length is known; and [ErrTaken].
func (u *Upload) Append(ctx context.Context, body Body) (int64, error) {
	release, err := u.hold(ctx, body.Interrupt)
	if err != nil {
		return u.Offset(), err
	}
	defer release()
	room := room{upload: u}
	defer room.release()
	err = u.take(ctx, body, &room)
	if failed := u.save(ctx); err == nil {
		err = failed
	}
	if err != nil {
		u.modest(ctx)
	}
	return u.Offset(), err
}

// Finish adds the last of it, if there is any, and stores the blob in the
// repository: when it returns nil the blob survives a loss of power, and its
// size is returned. Wrong bytes are [ErrDigest] and end the upload; other errors
// are as of Append, and it can be gone on with.
func (u *Upload) Finish(ctx context.Context, d digest.Digest, body Body) (int64, error) {
	release, err := u.hold(ctx, body.Interrupt)
	if err != nil {
		return 0, err
	}
	defer release()
	room := room{upload: u, last: true}
	defer room.release()
	if err = u.take(ctx, body, &room); err == nil && u.shared != nil {
		err = u.gather(ctx, &room)
	}
	if err == nil {
		// The client may go, but not half of a commit.
		err = u.commit(context.WithoutCancel(ctx), d)
	}
	if u.shared != nil {
		u.finished(ctx)
	}
	if err != nil {
		u.modest(ctx)
		if u.shared == nil {
			u.save(ctx)
		}
		return 0, err
	}
	return u.Offset(), nil
}

// Push stores a blob that comes as a whole. Of one that fails nothing stays. See
// [Upload.Finish].
func (h *Registry) Push(ctx context.Context, repository string, d digest.Digest, body Body) (int64, error) {
	if err := h.options(repository).closed(); err != nil {
		return 0, err
	}
	u, err := h.newUpload(repository, d.Algorithm())
	if err != nil {
		return 0, err
	}
	u.once = true
	size, err := u.Finish(ctx, d, body)
	if err != nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		if !u.gone {
			u.drop()
		}
	}
	return size, err
}

// save writes the state down after a request. Without it only another process
// would not know of what has come. Where other processes go on with it, what they
// cannot know has not come: then there is an error.
func (u *Upload) save(ctx context.Context) error {
	if u.shared != nil {
		return u.share(ctx)
	}
	if u.gone || u.stored != nil || u.Offset() == u.noted {
		return nil
	}
	failpoint.Hit("upload.written")
	if err := u.note(); err != nil {
		u.registry.log.Warn("writing down how far an upload has come", zap.String("repository", u.repository), zap.Error(err))
		return nil
	}
	failpoint.Hit("upload.state")
	return nil
}

// commit stores the blob. The caller is the one who writes.
func (u *Upload) commit(ctx context.Context, d digest.Digest) error {
	size := u.Offset()
	if u.stored != nil {
		return u.link(ctx, d)
	}
	if err := u.exist(); err != nil {
		return err
	}
	canonical, got, err := u.sum(ctx, d.Algorithm())
	if err != nil {
		return fmt.Errorf("reading what was uploaded: %w", err)
	}
	if got != d {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.drop()
		return fmt.Errorf("%w: the %d bytes that came are %s, and should be %s", ErrDigest, size, got, d)
	}
	names := []digest.Digest{canonical}
	if d != canonical {
		names = append(names, d)
	}
	err = u.registry.tree.PutBlob(ctx, u.repository, names, u.path, size)
	u.mu.Lock()
	defer u.mu.Unlock()
	if err != nil {
		if _, lost := os.Lstat(u.path); errors.Is(lost, os.ErrNotExist) && u.shared == nil {
			// It is stored, and was not linked.
			if u.once || !errors.Is(err, storage.ErrUnavailable) {
				u.drop()
			} else {
				u.keep(names)
			}
		}
		return fmt.Errorf("storing a blob of %d bytes: %w", size, full(err))
	}
	u.drop()
	return nil
}

// keep has an upload be finished later whose bytes have left it. u.mu is held.
func (u *Upload) keep(names []digest.Digest) {
	u.stored = names
	u.loosen(-u.loose)
	// What another process could not go on with.
	if err := os.Remove(u.path + stateSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.registry.log.Warn("removing the state of an upload; the next start does", zap.Error(err))
	}
}

// link is commit for what is stored.
func (u *Upload) link(ctx context.Context, d digest.Digest) error {
	err := ErrNoUpload
	if slices.Contains(u.stored, d) {
		err = u.registry.tree.LinkBlob(ctx, u.repository, d, u.stored[0])
	}
	if errors.Is(err, storage.ErrUnavailable) {
		return fmt.Errorf("linking a blob of %d bytes: %w", u.Offset(), err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drop()
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNoUpload
	}
	return err
}

// take reads a body to its end. What it could not read to the end stays, as far
// as it came.
func (u *Upload) take(ctx context.Context, body Body, room *room) error {
	if body.Reader == nil {
		u.read()
		return nil
	}
	offset := u.Offset()
	if body.At >= 0 && body.At != offset {
		return fmt.Errorf("%w: it begins at %d, and the upload ends at %d", ErrOffset, body.At, offset)
	}
	most := u.registry.settings.Load().MaxBlob
	tooLarge := func() error {
		return fmt.Errorf("%w: max_blob_size of the store is %s", ErrTooLarge, humanize.IBytes(uint64(most)))
	}
	if body.Length >= 0 {
		if most > 0 && body.Length > most-offset {
			return tooLarge()
		}
		if err := room.want(ctx, body.Length); err != nil {
			return err
		}
	}
	limit := body.Length
	if limit < 0 && most > 0 {
		limit = most - offset
	}
	in := body.Reader
	if limit >= 0 {
		in = io.LimitReader(in, limit)
	}
	if err := u.write(ctx, in, room); err != nil {
		if u.taken() {
			return ErrTaken
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%w: %d bytes of it came", ErrLength, u.Offset()-offset)
		}
		return err
	}
	came := u.Offset() - offset
	if body.Length >= 0 && came < body.Length {
		return fmt.Errorf("%w: %d bytes of %d came", ErrLength, came, body.Length)
	}
	if limit >= 0 && came == limit { // is that all?
		var more [1]byte
		n, err := readFull(body.Reader, more[:])
		switch {
		case n > 0 && body.Length < 0:
			return tooLarge()
		case n > 0:
			return fmt.Errorf("%w: there is more than %d bytes", ErrLength, body.Length)
		case err == nil || err == io.EOF:
		case u.taken():
			return ErrTaken
		default:
			return fmt.Errorf("reading the body: %w", err)
		}
	}
	u.read()
	return nil
}

// readFull reads until a buffer is full. The end of r is io.EOF, whether or not there
// was something before it.
func readFull(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// write writes what a reader gives, to its end.
func (u *Upload) write(ctx context.Context, r io.Reader, room *room) error {
	w := &writer{upload: u, room: room, ctx: ctx, noted: u.Offset(), flushed: u.Offset()}
	defer w.close()
	select {
	case u.registry.uploads.large <- struct{}{}:
		defer func() { <-u.registry.uploads.large }()
	default:
		buffer := smallBuffers.Get().(*[smallBuffer]byte)
		defer smallBuffers.Put(buffer)
		for {
			n, err := readFull(r, buffer[:])
			if failed := w.write(buffer[:n]); failed != nil {
				return failed
			}
			if err != nil {
				return ended(err)
			}
		}
	}
	first := largeBuffers.Get().(*[largeBuffer]byte)
	n, err := readFull(r, first[:])
	if err == nil {
		return w.convey(r, first)
	}
	defer largeBuffers.Put(first) // most blobs are small
	if failed := w.write(first[:n]); failed != nil {
		return failed
	}
	return ended(err)
}

func ended(err error) error {
	if err == io.EOF {
		return nil
	}
	return fmt.Errorf("reading the body: %w", err)
}

// A writer writes what one request brings.
type writer struct {
	upload  *Upload
	room    *room
	ctx     context.Context
	file    *os.File // opened by the first write
	behind  *hashing // what hashes; nil: the writer does
	noted   int64    // offset when the state was last written down
	flushed int64    // offset up to which the kernel was told to write
}

// write writes one run, and takes it into the hashes as far as it was written.
func (w *writer) write(run []byte) error {
	if len(run) == 0 {
		return nil
	}
	u := w.upload
	if u.stored != nil {
		return ErrNoUpload
	}
	if w.file == nil {
		var err error
		if w.file, err = os.OpenFile(u.path, os.O_CREATE|os.O_WRONLY, 0o600); err != nil {
			return full(err)
		}
	}
	if err := w.room.need(w.ctx, int64(len(run))); err != nil {
		return err
	}
	offset := u.Offset()
	n, err := w.file.WriteAt(run, offset)
	switch {
	case u.late:
	case w.behind != nil:
		w.behind.take(run[:n])
	default:
		u.sums.write(run[:n])
	}
	w.room.use(int64(n))
	offset += int64(n)
	u.mu.Lock()
	u.last = u.registry.now()
	u.ends.Store(offset)
	u.mu.Unlock()
	if err != nil {
		return fmt.Errorf("writing what is uploaded: %w", full(err))
	}
	// Nobody waits for the disk where even the hashes can wait.
	if !u.late && offset-w.flushed >= flushRun {
		flush(w.file, w.flushed, offset-w.flushed)
		w.flushed = offset
	}
	if offset-w.noted >= u.registry.run && !(w.room.last && u.shared != nil) {
		if w.behind != nil {
			w.behind.wait()
		}
		if err := u.save(w.ctx); err != nil {
			return err
		}
		w.noted = offset
	}
	return nil
}

// close needs no sync: whatever it loses, the commit finds out.
func (w *writer) close() {
	if w.file != nil {
		w.file.Close()
	}
}

// room is what is set aside in the store for what one request brings.
type room struct {
	upload *Upload
	parts  []part
	free   int64 // not used yet
	used   int64
	tight  bool // there was no room to set more aside than has come
	last   bool // the request brings the end of the blob
}

type part struct {
	storage.Reservation
	left int64
}

// want sets n more bytes aside.
func (r *room) want(ctx context.Context, n int64) error {
	if n <= 0 {
		return nil
	}
	if err := r.upload.allow(ctx, r.free+n); err != nil {
		return err
	}
	return r.set(ctx, n)
}

// set sets n more bytes aside that the quota has been asked for.
func (r *room) set(ctx context.Context, n int64) error {
	set, err := r.upload.registry.reserve(ctx, n)
	if err != nil {
		return err
	}
	r.parts = append(r.parts, part{set, n})
	r.free += n
	return nil
}

// need makes sure that n bytes are set aside, more the more there have been;
// unless there is only room for what has come.
func (r *room) need(ctx context.Context, n int64) error {
	short := n - r.free
	if short <= 0 {
		return nil
	}
	if ahead := min(max(r.used, leastRoom), mostRoom); !r.tight && ahead > short {
		err := r.want(ctx, ahead)
		if !errors.Is(err, storage.ErrFull) {
			return err
		}
		r.tight = true
	}
	return r.want(ctx, short)
}

// use says that n bytes are on the disk.
func (r *room) use(n int64) {
	r.used += n
	r.free -= n
	for i := range r.parts {
		p := &r.parts[i]
		m := min(n, p.left)
		if m > 0 {
			p.Use(m)
			p.left -= m
			n -= m
		}
	}
}

// release gives back what was not used. What was counts for itself from now on,
// if it has not become a blob.
func (r *room) release() {
	u := r.upload
	u.mu.Lock()
	switch {
	case u.gone:
	case u.shared != nil:
		u.settle()
	default:
		u.loosen(r.used)
	}
	u.mu.Unlock()
	for _, p := range r.parts {
		p.Release()
	}
}
