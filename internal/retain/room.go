package retain

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// barren is how long nothing is tried again after nothing could be evicted.
const barren = 5 * time.Second

// eviction is who waits for room, and what has been evicted. Its lock is taken
// before that of the account.
type eviction struct {
	kick   chan struct{} // signalled when there may be something to evict
	wanted atomic.Int64  // bytes that those in waiters want

	running sync.Mutex // of whoever evicts; taken before mu

	mu      sync.Mutex
	waiters []*waiter // those who came first first
	gifts   []*gift
	closed  bool
	barren  map[string]time.Time // by upstream, or "": nothing can be evicted until then
	total   Evicted
	untold  Evicted   // since the last event
	why     string    // the last of it
	told    time.Time // of the last event
}

type waiter struct {
	bytes int64
	ready chan bool // whether to try again
}

// A gift is a reservation for somebody who has waited, until he asks for it: or
// whoever comes first would take the room.
type gift struct {
	*reservation
	timer *time.Timer
}

func newEviction() eviction {
	return eviction{kick: make(chan struct{}, 1), barren: map[string]time.Time{}}
}

// waiting is how many bytes are being waited for.
func (e *eviction) waiting() int64 { return e.wanted.Load() }

// gift returns what has been set aside for somebody who wants n bytes, or nil.
func (e *eviction) gift(n int64) storage.Reservation {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, g := range e.gifts {
		if g.asked == n {
			g.timer.Stop()
			e.gifts = slices.Delete(e.gifts, i, i+1)
			return g.reservation
		}
	}
	return nil
}

// give sets room aside for whoever asks for n bytes soon, or reports that there
// is none. e.mu is held.
func (k *Keeper) give(n int64) bool {
	e := &k.eviction
	r, err := k.reserve(n, 0)
	if err != nil || e.closed {
		if err == nil {
			r.Release()
		}
		return false
	}
	g := &gift{reservation: r}
	g.timer = time.AfterFunc(k.paces.gift, func() {
		e.mu.Lock()
		i := slices.Index(e.gifts, g)
		if i >= 0 {
			e.gifts = slices.Delete(e.gifts, i, i+1)
		}
		e.mu.Unlock()
		if i >= 0 {
			g.Release()
		}
	})
	e.gifts = append(e.gifts, g)
	return true
}

// Room evicts so that n bytes can be reserved, and waits for it a second at
// most. It reports whether to try again: the room is kept for who does so with
// the same n within two seconds. Those who came first are served first. Where
// nothing can be evicted it does not wait, and remembers so for five seconds.
func (k *Keeper) Room(ctx context.Context, n int64) bool {
	e := &k.eviction
	_, err := k.mayDelete()
	e.mu.Lock()
	if len(e.waiters) == 0 && k.give(n) {
		e.mu.Unlock()
		return true
	}
	limit := k.settings().MaxSize
	if err != nil || e.closed || limit > 0 && onDisk(n) > limit || time.Now().Before(e.barren[""]) {
		e.mu.Unlock()
		return false
	}
	w := &waiter{bytes: n, ready: make(chan bool, 1)}
	e.waiters = append(e.waiters, w)
	e.wanted.Add(n)
	e.mu.Unlock()
	signal(e.kick)

	patience := time.NewTimer(k.paces.room)
	defer patience.Stop()
	select {
	case again := <-w.ready:
		return again
	case <-patience.C:
	case <-ctx.Done():
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := slices.Index(e.waiters, w); i >= 0 {
		e.waiters = slices.Delete(e.waiters, i, i+1)
		e.wanted.Add(-n)
		return false
	}
	return <-w.ready // in the same moment
}

// serve gives room to those who wait, in their order.
func (k *Keeper) serve() {
	e := &k.eviction
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.waiters) > 0 && k.give(e.waiters[0].bytes) {
		e.dismiss(true)
	}
}

// dismiss answers who has waited longest. e.mu is held.
func (e *eviction) dismiss(again bool) {
	w := e.waiters[0]
	e.waiters = e.waiters[1:]
	e.wanted.Add(-w.bytes)
	w.ready <- again
}

// disappoint says to all who wait that there will be no room, but for those
// whose wants are small enough.
func (k *Keeper) disappoint() {
	e := &k.eviction
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.waiters) > 0 {
		e.dismiss(k.give(e.waiters[0].bytes))
	}
}

// despair remembers that nothing of an upstream, or with "" of all, can be
// evicted now.
func (e *eviction) despair(upstream string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.barren[upstream] = time.Now().Add(barren)
}

func (e *eviction) despaired(upstream string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return time.Now().Before(e.barren[upstream])
}

// hope forgets that nothing could be evicted.
func (e *eviction) hope() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.barren)
}

// close turns away who waits, and gives back what nobody has asked for.
func (e *eviction) close() {
	e.mu.Lock()
	e.closed = true
	for len(e.waiters) > 0 {
		e.dismiss(false)
	}
	gifts := e.gifts
	e.gifts = nil
	e.mu.Unlock()
	for _, g := range gifts {
		g.timer.Stop()
		g.Release()
	}
}

func (e *eviction) evicted() Evicted {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.total
}
