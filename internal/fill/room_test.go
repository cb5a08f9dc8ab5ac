package fill_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
)

// TestRoomIsMade: where there is none it is asked for, once, and not by who reads.
func TestRoomIsMade(t *testing.T) {
	for _, size := range []int{mib / 2, 3 * mib} {
		for _, made := range []bool{true, false} {
			x := newTable(t)
			x.fill(true)
			var asked []int64
			room := func(ctx context.Context, n int64) bool {
				if ctx.Err() != nil {
					t.Error("the fill has ended")
				}
				asked = append(asked, n)
				x.fill(!made)
				return true // if not, it is tried in vain
			}
			x.room.Store(&room)
			data, d := random(size)
			f := x.join(t, d, size, "r", &source{name: "a", data: data})
			if got, err := read(t, f, 0, size, true); err != nil || !bytes.Equal(got, data) {
				t.Error(err)
			}
			f.Release()
			eventually(t, "the end", func() bool { return len(x.summaries()) == 1 })
			if end := x.summaries()[0].Err; (end == nil) != made || x.linked("r", d) != made {
				t.Errorf("%d bytes, room %v: ended with %v", size, made, end)
			}
			x.close()
			if len(asked) != 1 || asked[0] != int64(size) {
				t.Errorf("%d bytes: asked for %d", size, asked)
			}
		}
	}
}

// TestRoomOutlivesReader: the room is waited for though who wanted the content
// has left, and no longer than the fill goes on.
func TestRoomOutlivesReader(t *testing.T) {
	x := newTable(t)
	x.parks = true
	x.fill(true)
	asked, ended := make(chan bool), make(chan error, 1)
	room := func(ctx context.Context, _ int64) bool {
		close(asked)
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return false
	}
	x.room.Store(&room)
	data, d := random(3 * mib)
	f := x.join(t, d, len(data), "r", &source{name: "a", data: data})
	ctx, cancel := context.WithCancel(t.Context())
	r := f.NewReader(ctx, 0, int64(len(data)), true)
	<-asked
	cancel()
	r.Close()
	select {
	case err := <-ended:
		t.Errorf("ended with its reader: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	f.Release()
	x.close()
	if err := <-ended; !errors.Is(err, fill.ErrClosed) && !errors.Is(err, fill.ErrPaused) && !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
}

// allocated is what the files in the spool take.
func (x *table) allocated(t *testing.T) (sum int64) {
	t.Helper()
	for _, path := range x.spooled() {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sum += info.Sys().(*syscall.Stat_t).Blocks * 512
	}
	return sum
}

func TestPartial(t *testing.T) {
	x := newTable(t)
	x.parks = true
	if n := x.Partial(); n != 0 {
		t.Errorf("%d bytes of nothing", n)
	}
	data, d := random(8 * mib)
	x.park(t, data, d)
	parked := x.Partial()
	if parked < mib || parked != x.allocated(t) {
		t.Errorf("%d bytes parked, and %d on the disk", parked, x.allocated(t))
	}

	// What is fetched now is covered by what was set aside, what was parked is not.
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 6 * mib}
	f := x.join(t, d, len(data), "r", a)
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what comes", func() bool { return x.allocated(t) >= 4*mib && a.sent.Load() >= 3*mib })
	eventually(t, "the account", func() bool {
		n := x.Partial()
		return n >= mib && n < parked+mib
	})
	close(a.gate)
	if _, err := r.WriteTo(&bytes.Buffer{}); err != nil {
		t.Error(err)
	}
	r.Close()
	f.Release()
	eventually(t, "it to be kept", func() bool { return x.linked("r", d) })
	eventually(t, "the end", func() bool { return x.Partial() == 0 })
}

func TestFetch(t *testing.T) {
	x := newTable(t)
	for _, size := range []int{mib / 2, 3 * mib} {
		data, d := random(size)
		a := &source{name: "a", data: data}
		for range 2 {
			if err := x.Fetch(t.Context(), fill.Want{Digest: d, Size: int64(size), Repository: "r", Sources: []fill.Source{a}}); err != nil {
				t.Error(err)
			}
			if !x.linked("r", d) {
				t.Error("it is not linked")
			}
		}
		if n := a.sent.Load(); n != int64(size) {
			t.Errorf("%d bytes sent of %d", n, size)
		}
		for _, span := range a.spans() {
			if !span.Background {
				t.Errorf("asked for %+v, though nobody waits", span)
			}
		}
	}
	data, d := random(mib)
	broken := errors.New("no")
	err := x.Fetch(t.Context(), fill.Want{Digest: d, Size: mib, Repository: "r", Sources: []fill.Source{&source{name: "b", err: permanent{broken}}}})
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	gate := make(chan struct{})
	left := make(chan error)
	go func() {
		left <- x.Fetch(ctx, fill.Want{Digest: d, Size: mib, Repository: "r", Sources: []fill.Source{&source{name: "c", data: data, gate: gate}}})
	}()
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	close(gate)
	eventually(t, "it to be kept all the same", func() bool { return x.linked("r", d) })
	x.close()
	if err := x.Fetch(t.Context(), fill.Want{Digest: d, Size: mib, Repository: "r"}); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("once closed: %v", err)
	}
}

// TestFetchGoesOn: somebody comes for what is being fetched, and leaves again;
// that puts it away, and it is fetched to its end all the same.
func TestFetchGoesOn(t *testing.T) {
	x := newTable(t)
	data, d := random(8 * mib)
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 2 * mib}
	done := make(chan error, 1)
	go func() {
		done <- x.Fetch(t.Context(), fill.Want{Digest: d, Size: int64(len(data)), Repository: "r", Sources: []fill.Source{a}})
	}()
	eventually(t, "it to begin", func() bool { return a.sent.Load() == 2*mib })
	f := x.join(t, d, len(data), "r", a)
	f.Release()
	eventually(t, "it to be put away", func() bool { return len(x.summaries()) > 0 })
	close(a.gate)
	select {
	case err := <-done:
		if err != nil || !x.linked("r", d) {
			t.Errorf("fetched: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it does not end")
	}
	if names, _ := filepath.Glob(filepath.Join(x.dir, "mirror/spool/fills/*")); len(names) > 0 {
		t.Errorf("left: %q", names)
	}
}
