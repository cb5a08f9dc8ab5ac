package fill

import (
	"fmt"
	"hash/crc32"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// writer takes the bytes of one span into the spool.
type writer struct {
	fill *Fill
	span *span
	room storage.Reservation
	done []complete // of one run

	waiting *time.Duration // spent waiting for the source
	began   time.Time      // of the first run
	waited  time.Duration  // until then
}

type complete struct {
	segment int64
	sum     uint32
}

// shared is the reservation of a whole fill, as one span uses it.
type shared struct {
	storage.Reservation
	fill *Fill
}

func (s shared) Use(n int64) {
	s.Reservation.Use(n)
	s.fill.covered.Add(n)
}

func (shared) Release() {}

// reserve sets room aside, in place of what was set aside before. The first
// span for the whole reserves all that is missing, so that what will not fit is
// known before it is fetched.
func (w *writer) reserve() error {
	room, err := w.fill.reserve(w.span)
	if err != nil {
		return err
	}
	w.release()
	w.room = room
	return nil
}

func (w *writer) release() {
	if w.room != nil {
		w.room.Release()
	}
}

// unreserve gives back what the whole has not used.
func (f *Fill) unreserve() {
	f.rooms.Lock()
	defer f.rooms.Unlock()
	if f.room != nil {
		f.covered.Store(0)
		f.room.Release()
		f.room = nil
	}
}

func (f *Fill) reserve(s *span) (storage.Reservation, error) {
	f.mu.Lock()
	whole, need := s.whole, f.size-f.got
	if !whole {
		need = min(s.end*f.segment, f.size) - s.first*f.segment
	}
	f.mu.Unlock()
	if !whole {
		return f.table.reserve(f.ctx, need)
	}
	f.rooms.Lock()
	defer f.rooms.Unlock()
	if f.room == nil {
		var err error
		if f.room, err = f.table.reserve(f.ctx, need); err != nil {
			f.room = nil
			return nil, err
		}
	}
	return shared{f.room, f}, nil
}

// write takes the next run of the span's bytes, which begins at an offset.
func (w *writer) write(at int64, run []byte) error {
	f, s := w.fill, w.span
	for len(run) > 0 {
		f.mu.Lock()
		n, skip := f.lacking(s, at, int64(len(run)))
		file, sum := f.spool, s.sum
		f.mu.Unlock()
		if skip {
			at, run = at+n, run[n:]
			continue
		}
		if _, err := file.WriteAt(run[:n], at); err != nil {
			return &diskError{fmt.Errorf("spool: %w", err)}
		}
		w.room.Use(n)
		w.done = w.done[:0]
		begin, written := at, run[:n]
		for part := run[:n]; len(part) > 0; {
			i := at / f.segment
			if at == i*f.segment {
				sum = 0
			}
			end := i*f.segment + f.length(i)
			m := min(int64(len(part)), end-at)
			sum = crc32.Update(sum, castagnoli, part[:m])
			part, at = part[m:], at+m
			if at == end {
				w.done = append(w.done, complete{i, sum})
			}
		}
		run = run[n:]

		f.mu.Lock()
		s.part = part{at, sum}
		for _, c := range w.done {
			f.arrived(c.segment, c.sum)
			f.fresh = append(f.fresh, c.segment)
		}
		w.widen()
		f.wakeSoon(n)
		lent := f.lend(begin)
		f.mu.Unlock()
		if lent {
			if err := f.hash(file, begin, written); err != nil {
				return &diskError{err}
			}
		}
	}
	return nil
}

// widen opens another connection when this one takes long, unless it is we who
// are slow: then more would not help. f.mu is held.
func (w *writer) widen() {
	f, s, now := w.fill, w.span, time.Now()
	switch {
	case !s.whole || f.width >= f.connections:
	case s.ramp.IsZero():
		s.ramp, w.began, w.waited = now.Add(f.table.limits.ramp), now, *w.waiting
	case now.After(s.ramp) && *w.waiting-w.waited > now.Sub(w.began)*3/4:
		s.ramp = now.Add(f.table.limits.ramp)
		f.width++
		f.settled = false
		f.schedule()
	}
}
