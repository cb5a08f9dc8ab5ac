package hosted_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/storage"
	"github.com/opencontainers/go-digest"
)

// clock is a clock that a test moves.
type clock struct{ now atomic.Int64 }

func newClock(h *host) *clock {
	c := &clock{}
	c.now.Store(time.Now().UnixNano())
	h.At(func() time.Time { return time.Unix(0, c.now.Load()) })
	return c
}

func (c *clock) wait(d time.Duration) { c.now.Add(int64(d)) }

// under sets options for patterns.
func (h *host) under(patterns ...string) {
	h.t.Helper()
	var settings hosted.Settings
	for _, s := range patterns {
		pattern, err := oci.ParsePattern(s)
		if err != nil {
			h.t.Fatal(err)
		}
		settings.Options = append(settings.Options, hosted.Options{Pattern: pattern, Sparse: true})
	}
	h.Set(settings)
}

// there checks which uploads can still be gone on with.
func (h *host) there(want bool, uploads ...*hosted.Upload) {
	h.t.Helper()
	for i, u := range uploads {
		if _, err := h.Upload(h.t.Context(), "apps/web", u.ID()); (err == nil) != want {
			h.t.Errorf("upload %d: %v, want it there: %v", i, err, want)
		}
	}
}

// TestIdleUploadsMakeRoomInQuota: what clients have abandoned counts against nobody
// who finds no room, once nothing has come for a quarter of an hour: the oldest go
// first, and no more than must.
func TestIdleUploadsMakeRoomInQuota(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 10 << 20}
	h.again(a)
	h.under("apps/**")
	c := newClock(h)
	data := random(1, 8<<20)
	var cut []*hosted.Upload
	for range 3 {
		u := h.begin("")
		h.append(u, body(data[:3<<20]), 3<<20)
		cut = append(cut, u)
		c.wait(time.Minute)
	}
	push := func(n int) error {
		_, err := h.Push(t.Context(), "apps/other", digest.FromBytes(data[:n]), body(data[:n]))
		return err
	}
	c.wait(11 * time.Minute) // the first is idle for 14 minutes
	if err := push(4 << 20); !errors.Is(err, storage.ErrFull) {
		t.Fatalf("before anything is idle: %v", err)
	}
	h.there(true, cut...)
	c.wait(2 * time.Minute) // the first two are idle
	if err := push(4 << 20); err != nil {
		t.Fatalf("with an idle upload of 3 of 10 MiB: %v", err)
	}
	h.there(false, cut[0])
	h.there(true, cut[1:]...)
	a.is(t, 6<<20, 6<<20)
	// A manifest, or a mount, needs room as well.
	a.mu.Lock()
	a.limit = 6 << 20
	a.mu.Unlock()
	manifest := regtest.NewImage("x", regtest.Random("x", 10)).Content
	if _, err := h.PutManifest(t.Context(), hosted.Push{Repository: "apps/web", Tags: []string{"v1"}, Body: manifest.Data}); err != nil {
		t.Errorf("a manifest: %v", err)
	}
	h.there(false, cut[1])
	h.there(true, cut[2])
}

// TestIdleUploadsOfOthersStay: neither what counts in another quota is given up nor
// what somebody writes to.
func TestIdleUploadsOfOthersStay(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 4 << 20}
	h.again(a)
	h.under("apps/**", "libs/**")
	c := newClock(h)
	data := random(1, 3<<20)
	u := h.begin("")
	h.append(u, body(data[:2<<20]), 2<<20)
	c.wait(time.Hour)
	if _, err := h.Push(t.Context(), "libs/web", digest.FromBytes(data), body(data)); !errors.Is(err, storage.ErrFull) {
		t.Errorf("of another pattern: %v", err)
	}
	u = h.find(u.ID())
	s, ended := newStuck(data[:1000]), make(chan error, 1)
	go func() {
		_, err := u.Append(context.Background(), s.body(-1, 2000))
		ended <- err
	}()
	<-s.waiting
	c.wait(time.Hour)
	if _, err := h.Push(t.Context(), "apps/other", digest.FromBytes(data), body(data)); !errors.Is(err, storage.ErrFull) {
		t.Errorf("with one that is written to: %v", err)
	}
	s.interrupt()
	<-ended
	h.there(true, u)
}

// TestIdleUploadsMakeRoomInStore: the same in a store that is full, for pushes and
// for those who fetch, after eviction has been asked, and of an earlier process too.
func TestIdleUploadsMakeRoomInStore(t *testing.T) {
	h := newHost(t)
	data := random(1, 4<<20)
	first, second := h.begin(""), h.begin("")
	h.append(first, body(data[:2<<20]), 2<<20)
	h.append(second, body(data[:2<<20]), 2<<20)
	h.restart()
	c := newClock(h)
	h.store.full = func(n int64) bool { return h.Partial()+n > 4<<20 }
	evicted := 0
	h.room = func(int64) bool { evicted++; return false }
	if h.Room(t.Context(), 1<<20) || evicted != 1 || h.Partial() != 4<<20 {
		t.Errorf("while they are young: evicted %d times, %d partial", evicted, h.Partial())
	}
	c.wait(20 * time.Minute)
	if !h.Room(t.Context(), 1<<20) || evicted != 3 || h.Partial() != 2<<20 {
		t.Errorf("for a fill: evicted %d times, %d partial", evicted, h.Partial())
	}
	d := digest.FromBytes(data)
	if _, err := h.Push(t.Context(), "apps/web", d, body(data)); err != nil || h.Partial() != 0 {
		t.Errorf("for a push: %v, %d partial", err, h.Partial())
	}
	h.has("apps/web", d, data)
}

// TestFailedRequestCountsWhatCame: a push of much that was cut off counts as much as
// came of it, not as much as it had announced.
func TestFailedRequestCountsWhatCame(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 1 << 30}
	h.again(a)
	data := random(1, 1<<20)
	u := h.begin("")
	if _, err := u.Append(t.Context(), cut(data, 900<<20)); !errors.Is(err, hosted.ErrLength) {
		t.Fatal(err)
	}
	a.is(t, 1<<20, 1<<20)
	// And nothing of one that the store has no room for.
	h.store.most.Store(1 << 20)
	other := h.begin("")
	if _, err := other.Append(t.Context(), cut(data, 900<<20)); !errors.Is(err, storage.ErrFull) {
		t.Fatal(err)
	}
	a.is(t, 1<<20, 1<<20)
}

// TestIdleUploadsMakeRoomForOthers: of the many that there may be, those that nobody
// comes back to are given up.
func TestIdleUploadsMakeRoomForOthers(t *testing.T) {
	h := newHost(t)
	c := newClock(h)
	first := h.begin("")
	c.wait(time.Minute)
	for range hosted.MaxUploads - 1 {
		h.begin("")
	}
	c.wait(14 * time.Minute)
	h.begin("")
	h.there(false, first)
	if _, err := h.Begin(t.Context(), "apps/web", ""); !errors.Is(err, hosted.ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
}
