package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

const (
	maxSources   = 16                     // remembered per fill
	patience     = 20 * time.Second       // without a byte, if each source was asked again
	firstBackoff = 100 * time.Millisecond // doubled up to lastBackoff, with jitter
	lastBackoff  = 5 * time.Second
)

// roster is the sources of a fill, and what is known of them. Fill.mu guards
// it.
type roster struct {
	entries []*entry
	groups  int
	heard   time.Time // when a byte last came from any of them
	last    error     // the latest trouble with one
}

type entry struct {
	source    Source
	group     int // of those that one joiner brought
	hopeless  bool
	notBefore time.Time
	failures  int  // in a row, without a byte
	slow      bool // it delivers, and others are to be tried first until notBefore
	delivered bool
	wrong     bool // hopeless for what it delivered
}

func (r *roster) add(sources []Source) {
	r.groups++
next:
	for _, source := range sources {
		for _, e := range r.entries {
			if e.source == source {
				continue next
			}
		}
		if len(r.entries) < maxSources {
			r.entries = append(r.entries, &entry{source: source, group: r.groups})
		}
	}
}

var errNoSource = errors.New("nobody to ask")

// pick returns the source to ask now, or how long to wait until there is one,
// or why that is of no use any more.
func (r *roster) pick(now time.Time) (e *entry, wait time.Duration, err error) {
	wait = -1
	asked := true
	var slow *entry
	for _, e := range r.entries {
		if e.hopeless {
			continue
		}
		pause := e.notBefore.Sub(now)
		if pause <= 0 {
			return e, 0, nil
		}
		if e.slow {
			slow = e
		} else {
			asked = asked && e.failures >= 2
		}
		if wait < 0 || pause < wait {
			wait = pause
		}
	}
	if slow != nil && asked {
		return slow, 0, nil // better than nobody
	}
	if err = r.last; err == nil {
		err = errNoSource
	}
	if wait < 0 || asked && now.Sub(r.heard)+wait > patience {
		return nil, 0, err
	}
	return nil, wait, nil
}

// failed notes that a source has failed. It reports whether none need be asked
// any more.
func (r *roster) failed(e *entry, err error, now time.Time) (final bool) {
	r.last = err
	var last interface{ Final() bool }
	var hint interface{ Retry() (time.Duration, bool) }
	after, worthwhile := time.Duration(0), !errors.Is(err, ErrSize)
	switch {
	case errors.As(err, &last) && last.Final():
		// Its word is about what its joiner asked for, and is disproved for
		// whoever has delivered.
		final, worthwhile = true, false
		for _, other := range r.entries {
			if other != e && other.group == e.group && !other.delivered {
				other.hopeless = true
			}
			final = final && (other == e || other.hopeless)
		}
		if final {
			return true
		}
	case worthwhile && errors.As(err, &hint):
		after, worthwhile = hint.Retry()
	}
	if !worthwhile || e.given(err) {
		e.hopeless = true
		return false
	}
	var speed interface{ Slow() bool }
	slow := errors.As(err, &speed) && speed.Slow()
	if e.slow && !slow {
		e.notBefore = now // it was to be left alone for its speed only
	}
	e.slow = slow
	if e.notBefore.After(now) { // several connections have failed at once: once is enough
		if until := now.Add(after); until.After(e.notBefore) {
			e.notBefore = until
		}
		return false
	}
	backoff := min(firstBackoff<<min(e.failures, 10), lastBackoff)
	e.failures++
	e.notBefore = now.Add(max(after, backoff/2+rand.N(backoff/2)))
	return false
}

// blame tells all who delivered that it was wrong. Of several it may have been
// any. It reports whether there is one left that did not deliver.
func (f *Fill) blame(err error) (others bool) {
	f.mu.Lock()
	var guilty []Source
	for _, e := range f.sources.entries {
		if e.delivered {
			e.hopeless, e.wrong, e.delivered = true, true, false
			guilty = append(guilty, e.source)
		}
		others = others || !e.hopeless
	}
	f.sources.last = err
	f.mu.Unlock()
	for _, source := range guilty {
		source.Blame(err)
	}
	return others
}

// pardon lets those be asked once more that delivered wrong bytes. It reports
// whether there are any.
func (f *Fill) pardon() (found bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.sources.entries {
		if e.wrong {
			e.hopeless, e.wrong, found = false, false, true
		}
	}
	return found
}

// A tap reads a part of the content from one source after another, each going
// on where the one before failed. It gives up when no source can deliver, or
// none has for 20 s. It belongs to one goroutine.
type tap struct {
	fill       *Fill
	ctx        context.Context
	pos, end   int64
	background bool
	hurry      <-chan struct{} // Span.Hurry
	// opened, which may be nil, is called with each new stream, and may move
	// pos and end. Its error is not the source's fault, and ends the reading.
	opened func(*Stream) error
	// span, if it is not nil, goes on at its end while the store delivers.
	span *span

	stream  *Stream
	entry   *entry
	asked   int64 // where the stream ends
	skip    int64
	waiting time.Duration // spent in reading
}

// Read reads up to end, and only then returns io.EOF.
func (t *tap) Read(p []byte) (int, error) {
	for t.pos < t.end || t.goOn() {
		if t.stream == nil {
			if err := t.open(); err != nil {
				return 0, err
			}
			continue
		}
		part := p
		if t.skip == 0 {
			part = p[:min(int64(len(p)), t.end-t.pos)]
		}
		asked := time.Now()
		n, err := t.stream.Read(part)
		t.waiting += time.Since(asked)
		came := int64(n)
		if t.skip > 0 {
			skipped := min(t.skip, int64(n))
			t.skip -= skipped
			n = copy(p, part[skipped:n])
		}
		fresh := int(min(int64(n), t.end-t.pos))
		t.pos += int64(fresh)
		t.heard(came, fresh > 0)
		if t.pos == t.end && (err != nil || t.stream.Whole && t.end < t.fill.key.size) {
			t.Close() // nothing more is to come, or to be read
		} else if err != nil {
			from := t.stream.From
			t.Close()
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			if err := t.failed(fmt.Errorf("%s: cut at %d of %d bytes: %w", from, t.pos, t.fill.key.size, err)); err != nil {
				return fresh, err
			}
		}
		if fresh > 0 {
			return fresh, nil
		}
	}
	t.finish()
	return 0, io.EOF
}

// goOn moves the end on, where a steady stream has come to it.
func (t *tap) goOn() bool {
	f := t.fill
	if t.span == nil || t.stream == nil || t.end == f.key.size {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	// What is half there is finished when everybody has left: see wanted.
	finish := f.ahead || len(f.readers) == 0 && f.got >= f.size/2
	if !t.span.steady || !f.extend(t.span, finish, t.asked) {
		return false
	}
	t.end = min(t.span.end*f.segment, f.size)
	return true
}

// finish lets a stream of which everything has been read come to its end, so
// that its connection can be used again.
func (t *tap) finish() {
	if t.stream != nil && (t.stream.Whole && t.end == t.fill.key.size || !t.stream.Whole && t.pos == t.asked) {
		var more [1]byte
		t.stream.Read(more[:])
	}
	t.Close()
}

// Close ends the stream under way.
func (t *tap) Close() {
	if t.stream != nil {
		t.stream.Close()
		t.stream = nil
	}
}

// open asks the next source, after a pause if need be.
func (t *tap) open() error {
	f := t.fill
	for {
		f.mu.Lock()
		e, wait, err := f.sources.pick(time.Now())
		changed, end := f.changed, t.end
		if t.span != nil && e != nil {
			if t.span.steady = e.isStored(); t.span.steady {
				end = f.rest(t.span)
			}
		}
		f.mu.Unlock()
		if err != nil {
			return err
		}
		if e == nil {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-changed: // a joiner may have brought another source
			case <-t.ctx.Done():
				timer.Stop()
				return context.Cause(t.ctx)
			}
			timer.Stop()
			continue
		}
		t.entry = e
		stream, err := e.source.Open(t.ctx, Span{Offset: t.pos, Length: end - t.pos, Background: t.background, Hurry: t.hurry})
		if t.ctx.Err() != nil {
			if err == nil {
				stream.Close()
			}
			return context.Cause(t.ctx)
		}
		if err == nil {
			t.stream, t.asked = stream, end
			if stream.Size >= 0 && stream.Size != f.key.size {
				err = fmt.Errorf("%w: %s has %d bytes, %d were promised", ErrSize, stream.From, stream.Size, f.key.size)
			} else if t.opened != nil {
				if err := t.opened(stream); err != nil {
					t.Close()
					return err
				}
			}
			if err == nil {
				err = t.begin(stream)
			}
			if err == nil {
				return nil
			}
			t.Close()
		}
		if err := t.failed(err); err != nil {
			return err
		}
	}
}

// begin goes to where the reading is in a stream.
func (t *tap) begin(stream *Stream) error {
	f := t.fill
	if stream.Offset > t.pos {
		return fmt.Errorf("%s: starts at %d when asked for %d", stream.From, stream.Offset, t.pos)
	}
	t.skip = t.pos - stream.Offset
	f.mu.Lock()
	f.from = stream.From
	f.mu.Unlock()
	return nil
}

// failed notes that the source has failed, and returns an error if no other
// need be asked.
func (t *tap) failed(err error) error {
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	f := t.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	f.width = max(1, f.width-1) // it may be that it does not like so many
	final := f.sources.failed(t.entry, err, time.Now())
	f.wake() // who gives up waiting wants to say why
	if final {
		return err
	}
	return nil
}

// heard notes bytes that came.
func (t *tap) heard(n int64, fresh bool) {
	if n == 0 {
		return
	}
	f := t.fill
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fetched += n
	if fresh {
		t.entry.delivered, t.entry.failures = true, 0
		f.sources.heard = time.Now()
	}
}
