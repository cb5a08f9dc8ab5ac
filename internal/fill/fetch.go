package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// memory is small content.
type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// fetchSmall brings small content into memory, proves it, lets readers have
// it, and then stores it. Nobody has seen a byte before, so what one source
// delivered wrong is asked of the next.
func (f *Fill) fetchSmall() error {
	data := make([]byte, f.key.size)
	var canonical digest.Digest
	for again := true; ; {
		t := tap{fill: f, ctx: f.ctx, end: f.key.size}
		f.mu.Lock()
		if t.background = f.users == 1; t.background {
			f.hurried = make(chan struct{})
			t.hurry = f.hurried
		}
		f.mu.Unlock()
		_, err := io.ReadFull(&t, data)
		t.Close()
		if err != nil {
			return err
		}
		f.mu.Lock()
		from := f.from
		f.hurried = nil
		f.mu.Unlock()
		sum := newProof(f.key.digest.Algorithm())
		sum.Write(data)
		if canonical, err = sum.check(f.key.digest, from); err == nil {
			break
		}
		if !f.blame(err) {
			// A bit that turned over on the way is right the next time.
			if !again || !f.pardon() {
				return err
			}
			again = false
		}
	}
	f.release(memory{bytes.NewReader(data)})
	var room storage.Reservation
	defer func() {
		if room != nil {
			room.Release() // once the links tell of what it was used for
		}
	}()
	return f.commit(canonical, func(key string) error {
		ctx := context.WithoutCancel(f.ctx)
		var err error
		if room, err = f.table.reserve(ctx, f.key.size); err != nil {
			room = nil
			return err
		}
		if err := f.table.store.Put(ctx, key, data, storage.Lazy); err != nil {
			return err
		}
		room.Use(f.key.size)
		f.swap(ctx, key)
		return nil
	})
}

// swap lets readers that are still there go on from the store, so that slow
// ones do not keep the content in memory.
func (f *Fill) swap(ctx context.Context, key string) {
	f.mu.Lock()
	alone := f.users == 1
	f.mu.Unlock()
	if alone {
		return
	}
	r, _, err := f.table.openNear(ctx, key)
	if err != nil {
		return
	}
	file, ok := r.(content)
	if !ok {
		r.Close()
		return
	}
	f.mu.Lock()
	f.file = file
	f.mu.Unlock()
}

// fetchLarge lets larger content come into the spool as it is wanted, and
// follows it with the digest and the ledger.
func (f *Fill) fetchLarge() error {
	taken := f.key.take != ""
	algorithm := digest.SHA512
	if !taken {
		algorithm = f.key.digest.Algorithm()
	}
	if f.key.size > f.table.limits.trust && !f.vouched() {
		// The map of it takes memory, and a manifest says what it likes.
		t := tap{fill: f, ctx: f.ctx, end: 1}
		err := t.open()
		t.Close()
		if err != nil {
			return err
		}
	}
	f.mu.Lock()
	f.begin(f.key.size, f.table.limits, f.connections)
	f.mu.Unlock()
	sum := newProof(algorithm)
	s, err := f.openSpool()
	if err != nil && (taken || f.ctx.Err() != nil) {
		return err
	}
	if err != nil {
		return f.pass(err, nil, sum)
	}
	defer s.close()
	f.mu.Lock()
	f.file, f.spool, f.proof, f.state = s.data, s.data, sum, fetching
	f.schedule()
	f.wake()
	f.mu.Unlock()
	defer func() {
		f.drain()
		f.unreserve()
	}()

	f.table.large.Add(1)
	err = f.follow(s, sum)
	f.table.large.Add(-1)
	if err != nil {
		if !taken && (errors.Is(err, storage.ErrFull) || errors.As(err, new(*diskError))) {
			f.stop(err)
			return f.pass(err, s, sum)
		}
		f.fail(err) // unless it is paused; before the files are put away, since somebody waits
		f.stop(err)
		f.park(s)
		return err
	}
	f.mu.Lock()
	f.note(s)
	from := f.from
	f.mu.Unlock()
	if taken {
		file, err := sum.file(f.key.digest, from)
		if err != nil {
			return f.judge(s, err)
		}
		return f.hand(s, file)
	}
	canonical, err := sum.check(f.key.digest, from)
	if err != nil {
		return f.judge(s, err)
	}
	f.release(s.data)
	return f.commit(canonical, func(key string) error {
		s.settle()
		err := f.table.store.PutFile(context.WithoutCancel(f.ctx), key, s.path, storage.Lazy)
		s.remove()
		return err
	})
}

// openSpool opens the files, unless there is nowhere to put them.
func (f *Fill) openSpool() (*spool, error) {
	if f.table.broken != nil {
		return nil, f.table.broken
	}
	return openSpool(f.ctx, f.table.spool, f.table.boot, f.key, &f.progress)
}

// diskError is trouble with the spool.
type diskError struct{ error }

func (e *diskError) Unwrap() error { return e.error }

// follow stays with the spool until every byte is there and hashed, nobody
// wants it, or it cannot be had.
func (f *Fill) follow(s *spool, sum *proof) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var alone time.Time // since when there is nobody
	for {
		f.mu.Lock()
		hashable, changed := f.hashable(), f.changed
		if f.size == 0 {
			f.mu.Unlock()
			return nil
		}
		f.note(s)
		wanted, err := f.wanted()
		mine := err == nil && !f.hashing && sum.at < hashable
		f.hashing = f.hashing || mine
		f.mu.Unlock()
		if err != nil {
			return err
		}
		wait := time.Hour
		switch {
		case wanted:
			alone = time.Time{}
		case alone.IsZero():
			alone = time.Now()
			wait = f.table.limits.linger
		default:
			if wait = f.table.limits.linger - time.Since(alone); wait <= 0 && f.abandon(ErrPaused) {
				return ErrPaused
			}
		}
		if mine {
			err := sum.follow(s.data, min(hashable, sum.at+hashRun))
			done := sum.at == f.key.size
			f.mu.Lock()
			f.hashing = false
			f.mu.Unlock()
			if err != nil {
				return &diskError{err}
			}
			if done {
				return nil
			}
			wait = 0
		}
		due, err := s.keep()
		if err != nil {
			return &diskError{err}
		}
		if wait = min(wait, due); wait <= 0 {
			continue
		}
		timer.Reset(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-f.ctx.Done():
		}
	}
}

// wanted reports whether the fill is to go on, or why it cannot. f.mu is held.
func (f *Fill) wanted() (bool, error) {
	switch {
	case f.ctx.Err() != nil:
		return false, context.Cause(f.ctx)
	case f.trouble != nil:
		return false, f.trouble
	case f.full != nil:
		return false, f.full
	case f.users > 1 || f.ahead || f.finishing:
		return true, nil
	case f.got >= f.size/2 && f.key.take == "":
		f.finishing, f.settled = true, false
		f.schedule()
		return true, nil
	}
	return false, nil
}

// note takes down what is not in the ledger yet. f.mu is held.
func (f *Fill) note(s *spool) {
	for _, i := range f.fresh {
		s.pending = append(s.pending, [2]int64{i, int64(f.sums[i])})
		s.unsaved += f.length(i)
	}
	f.fresh = f.fresh[:0]
}

// abandon takes a fill that nobody uses out of the table, unless it has failed.
// It reports whether that is so.
func (f *Fill) abandon(err error) bool {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.users > 1 || f.err != nil {
		return false
	}
	f.table.remove(f)
	f.state, f.err = paused, err
	f.wake()
	return true
}

// stop ends all fetching.
func (f *Fill) stop(err error) {
	f.cancel(err)
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.spans) > 0 {
		f.await()
	}
}

// drainTime is how long spans have to come to the end of their streams, so that
// connections can be used again.
const drainTime = time.Second

// drain waits for the spans of a fill that has ended.
func (f *Fill) drain() {
	timer := time.AfterFunc(drainTime, func() { f.cancel(nil) })
	defer timer.Stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.spans) > 0 {
		f.await()
	}
}

// await waits for a wake. f.mu is held, and let go meanwhile.
func (f *Fill) await() { f.awaitOr(context.Background()) }

// awaitOr waits for a wake or the end of ctx.
func (f *Fill) awaitOr(ctx context.Context) error {
	changed := f.changed
	f.mu.Unlock()
	defer f.mu.Lock()
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// park puts the files of a fill away for the next one. The spans have ended.
func (f *Fill) park(s *spool) {
	f.mu.Lock()
	f.note(s)
	got := f.got
	f.mu.Unlock()
	if got == 0 {
		s.remove()
		return
	}
	if s.append(line{Segments: s.pending}) == nil && s.unsaved >= syncLeast {
		s.settle()
		s.sync()
	}
	failpoint.Hit("fill.parked")
	f.table.tidy()
}

// pass lets readers go on by themselves, since the disk takes no more, until
// the last has left. The spans have ended.
func (f *Fill) pass(cause error, s *spool, sum *proof) error {
	f.unreserve()
	f.mu.Lock()
	// Readers keep the last segment back, so it is theirs to hash.
	contiguous := min(f.contiguous(), f.last())
	f.mu.Unlock()
	if s != nil {
		// Where that fails, readers begin where it did.
		sum.follow(s.data, contiguous)
	}
	f.mu.Lock()
	f.state, f.reached = passing, sum
	f.wake()
	f.mu.Unlock()
	cause = fmt.Errorf("%w: %w", ErrPassed, cause)
	for !f.abandon(cause) {
		f.mu.Lock()
		changed, users, err := f.changed, f.users, f.err
		f.mu.Unlock()
		if err != nil {
			return f.judge(s, err)
		}
		if users == 1 {
			continue
		}
		select {
		case <-changed:
		case <-f.table.ctx.Done():
			cause = context.Cause(f.table.ctx)
			f.fail(cause)
			if s != nil {
				f.park(s)
			}
			return cause
		}
	}
	if s != nil {
		f.park(s)
	}
	return cause
}

// judge lets a fill fail whose content has turned out wrong. Who is to blame is
// the disk, if the spool is not what was written, and then only that is fetched
// again; or else whoever delivered it.
func (f *Fill) judge(s *spool, err error) error {
	if s != nil {
		if lost := s.lost(&f.progress); len(lost) > 0 {
			err = fmt.Errorf("%w: %d segments are not what was written", ErrSpool, len(lost))
			f.fail(err)
			s.append(line{Segments: s.pending, Lost: lost})
			return err
		}
	}
	f.fail(err)
	f.blame(err)
	if s != nil {
		s.remove()
	}
	return err
}

// schedule starts fetchers while there is something to fetch and room for
// another. f.mu is held.
func (f *Fill) schedule() {
	for f.state == fetching && f.ctx.Err() == nil && f.full == nil && f.trouble == nil {
		s := f.next(f.connections, f.table.limits.ahead, f.ahead, f.sources.steady(time.Now()))
		if s == nil {
			return
		}
		var ctx context.Context
		ctx, s.cancel = context.WithCancelCause(f.ctx)
		go f.fetch(ctx, s)
	}
}

// fetch brings a span into the spool.
func (f *Fill) fetch(ctx context.Context, s *span) {
	err := f.copy(ctx, s)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.Is(err, storage.ErrFull) || errors.As(err, new(*diskError)):
		f.full = err
	default:
		f.trouble = err
	}
	s.cancel(nil)
	f.drop(s)
	f.schedule()
	f.wake()
}

// errYield ends a span because another one brings everything.
var errYield = errors.New("another span brings everything")

func (f *Fill) copy(ctx context.Context, s *span) error {
	w := writer{fill: f, span: s}
	defer w.release()
	if err := w.reserve(); err != nil {
		return err
	}
	f.mu.Lock()
	t := tap{fill: f, ctx: ctx, pos: s.pos, end: min(s.end*f.segment, f.size), background: s.background, hurry: s.hurry}
	if s.steady {
		t.span = s
	}
	f.mu.Unlock()
	defer t.Close()
	w.waiting = &t.waiting
	t.opened = func(stream *Stream) error {
		if !stream.Whole {
			return nil
		}
		if taken, err := f.takeOver(ctx, s); !taken {
			return err
		}
		t.pos, t.end = 0, f.key.size
		return w.reserve()
	}
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for {
		// Writes that end at multiples of the buffer's size cost less: the page
		// cache takes each as one large folio.
		n, err := t.Read(buffer[:bufferSize-t.pos%bufferSize])
		if n > 0 {
			if err := w.write(t.pos-int64(n), buffer[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// takeOver makes a span the only one, of all content, since its source knows
// no spans. It reports whether that is new.
func (f *Fill) takeOver(ctx context.Context, s *span) (taken bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.sequential == s || s.first == 0 && s.end == f.segments():
		return false, nil
	case f.sequential != nil:
		return false, errYield
	}
	f.sequential = s
	for len(f.spans) > 1 {
		for _, other := range f.spans {
			if other != s {
				other.cancel(errYield)
			}
		}
		f.await()
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	f.leave(s)
	s.first, s.end, s.whole, s.part = 0, f.segments(), true, part{}
	for i := range s.end {
		f.claimed.set(i)
	}
	return true, nil
}
