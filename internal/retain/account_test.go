package retain

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

const mib = 1 << 20

// used is what counts, in MiB and rounded up.
func (b *kept) counted() int64 {
	n, _ := b.used()
	return (n + mib - 1) / mib
}

// TestReserve: what is reserved, what is partly there and what is stored count
// against max_size, each once, from the moment they are.
func TestReserve(t *testing.T) {
	var partial atomic.Int64
	b := keep(t, func(b *kept) {
		b.settings.MaxSize = 10 * mib
		b.partial = partial.Load
		b.paces.batch = time.Hour
	})
	b.repository("docker.io/a", "docker.io")
	b.ready()
	b.flush()
	store := b.Store()
	r, err := store.Reserve(4 * mib)
	if err != nil {
		t.Fatal(err)
	}
	r.Use(2 * mib)
	if n := b.counted(); n != 5 { // the repository takes a bit
		t.Errorf("reserved, and used in part: %d", n)
	}
	partial.Store(3 * mib)
	_, err = store.Reserve(3 * mib)
	if !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "max_size") {
		t.Errorf("3 in 10 - 4 - 3, with some for the repository: %v", err)
	}
	partial.Store(0)
	// What was used counts until the catalog knows of it.
	r.Use(1 * mib)
	b.Note(linked(1))
	r.Release()
	r.Release()
	if n := b.counted(); n != 4 {
		t.Errorf("released: %d", n)
	}
	b.flush()
	if n := b.counted(); n != 1 {
		t.Errorf("written: %d", n)
	}
	// With nothing to be written there is nothing to wait for.
	if r, err = store.Reserve(2 * mib); err != nil {
		t.Fatal(err)
	}
	r.Use(2 * mib)
	r.Release()
	if n := b.counted(); n != 1 {
		t.Errorf("released at once: %d", n)
	}
	data := content(1, 3*mib)
	b.pull("docker.io/a", "v1", data)
	for range 2 {
		if n := b.counted(); n != 4 {
			t.Errorf("stored: %d", n)
		}
		b.flush()
	}
	// The store's own limit holds too.
	b.Set(Settings{})
	if _, err := store.Reserve(1 << 60); !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "min_free") {
		t.Errorf("without max_size: %v", err)
	}
	if n := b.counted(); n != 4 {
		t.Errorf("what was refused counts: %d", n)
	}
}

// TestReserveWithoutCatalog: what is known holds on; where nothing is, only the
// store's own limit does.
func TestReserveWithoutCatalog(t *testing.T) {
	opening := make(chan struct{})
	b := keep(t, func(b *kept) {
		b.settings.MaxSize = 10 * mib
		b.catalog = later(b, opening)
	})
	r, err := b.Store().Reserve(20 * mib)
	if err != nil {
		t.Fatalf("before anything is known: %v", err)
	}
	r.Release()
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "v1", content(1, 9*mib))
	close(opening)
	b.ready()
	b.flush()
	b.incomplete("a test")
	for range 2 {
		if _, err := b.Store().Reserve(2 * mib); !errors.Is(err, storage.ErrFull) {
			t.Errorf("while it is being compared: %v", err)
		}
		b.journal.mu.Lock()
		b.account.update(0, b.journal.written) // as with an empty one
		b.journal.mu.Unlock()
	}
}

// TestManyReserve: max_size holds for a herd.
func TestManyReserve(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.MaxSize = 10 * onDisk(mib) })
	b.ready()
	var wg sync.WaitGroup
	got := make(chan storage.Reservation, 100)
	for range 100 {
		wg.Go(func() {
			if r, err := b.Store().Reserve(mib); err == nil {
				got <- r
			}
		})
	}
	wg.Wait()
	close(got)
	n := 0
	for r := range got {
		n++
		r.Release()
	}
	if n != 10 {
		t.Errorf("%d have got room", n)
	}
}

// TestRoom: many who find no room wait for eviction, each gets what it asked for,
// and nobody who comes later takes it.
func TestRoom(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.MaxSize = 4 * mib })
	b.repository("docker.io/a", "docker.io")
	for i := range 14 {
		b.clock.pass(time.Minute)
		b.pull("docker.io/a", "v"+string(rune('a'+i)), content(i, 1<<18-20_000))
	}
	b.clock.pass(time.Hour)
	b.ready()
	b.flush()
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			n := int64(200_000 + i)
			r, err := b.Store().Reserve(n)
			if errors.Is(err, storage.ErrFull) {
				if !b.Room(t.Context(), n) {
					t.Errorf("no room for %d", n)
					return
				}
				r, err = b.Store().Reserve(n)
			}
			if err != nil {
				t.Errorf("%d: %v", n, err)
				return
			}
			defer r.Release()
		})
	}
	wg.Wait()
	if n, _ := b.used(); n > 4*mib {
		t.Errorf("%d are used", n)
	}
	if b.means("docker.io/a", "va") != "" || b.means("docker.io/a", "vn") == "" {
		t.Error("not the coldest were evicted")
	}
}

// TestRoomInOrder: who wants much is not passed by those who want little.
func TestRoomInOrder(t *testing.T) {
	b := keep(t)
	b.ready()
	e := &b.eviction
	e.running.Lock() // nobody else gives, or says that there is nothing to give
	defer e.running.Unlock()
	b.Set(Settings{MaxSize: 10*mib + 30*block})
	r, err := b.Store().Reserve(10 * mib)
	if err != nil {
		t.Fatal(err)
	}
	big := &waiter{bytes: 6 * mib, ready: make(chan bool, 1)}
	e.mu.Lock()
	e.waiters = append(e.waiters, big)
	e.wanted.Add(big.bytes)
	e.mu.Unlock()
	r.Release()
	if _, err := b.Store().Reserve(6 * mib); !errors.Is(err, storage.ErrFull) {
		t.Errorf("somebody who came later: %v", err)
	}
	small, err := b.Store().Reserve(3 * mib)
	if err != nil {
		t.Errorf("there is room for both: %v", err)
	}
	b.serve()
	if !<-big.ready {
		t.Error("no room for the first")
	}
	if _, err := b.Store().Reserve(2 * mib); !errors.Is(err, storage.ErrFull) {
		t.Errorf("what was given is given again: %v", err)
	}
	given, err := b.Store().Reserve(6 * mib)
	if err != nil {
		t.Errorf("what was given: %v", err)
	}
	given.Release()
	small.Release()
}

// TestRoomNotTaken: what nobody comes for is free again.
func TestRoomNotTaken(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.MaxSize, b.paces.gift = 10*mib, 10*time.Millisecond })
	b.ready()
	if !b.Room(t.Context(), 9*mib) {
		t.Error("no room")
	}
	eventually(t, "it to be given back", func() error {
		r, err := b.Store().Reserve(8 * mib)
		if err == nil {
			r.Release()
		}
		return err
	})
}

// TestNoRoom: where nothing can be evicted nobody waits.
func TestNoRoom(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.MaxSize = 4 * mib })
	b.repository("apps/web", "")
	b.pull("apps/web", "v1", content(1, 3*mib))
	b.clock.pass(time.Hour)
	b.ready()
	b.flush()
	if b.Room(t.Context(), 2*mib) {
		t.Error("room beside what is hosted")
	}
	b.eviction.mu.Lock()
	tired := b.eviction.barren[""]
	b.eviction.mu.Unlock()
	if time.Until(tired) <= 0 {
		t.Error("it is tried again for the next one")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	begun := time.Now()
	for range 1000 {
		if b.Room(ctx, 2*mib) {
			t.Error("room beside what is hosted")
		}
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	if !b.Room(t.Context(), mib/2) {
		t.Error("no room though there is")
	}
	if !b.holds(content(1, 3*mib)) {
		t.Error("something hosted was evicted")
	}
	if b.Room(t.Context(), 5*mib) {
		t.Error("more than everything")
	}
}
