package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

// park lets a fill be put away with its first MiB.
func (x *table) park(t *testing.T, data []byte, d digest.Digest) {
	t.Helper()
	before := len(x.summaries())
	f := x.join(t, d, len(data), "r", &source{name: "a", data: data})
	if _, err := read(t, f, 0, mib, false); err != nil {
		t.Fatal(err)
	}
	f.Release()
	eventually(t, "the fill to be put away", func() bool { return len(x.summaries()) > before })
}

// TestRoomFromParked: what was put away goes when there is no room for what is
// asked for now.
func TestRoomFromParked(t *testing.T) {
	x := newTable(t)
	old, oldDigest := random(8 * mib)
	x.park(t, old, oldDigest)
	data, d := random(3 * mib)
	store := x.store.(*fillable)
	store.until = func(int64) bool {
		for _, name := range x.spooled() {
			if strings.Contains(name, oldDigest.Encoded()) {
				return false
			}
		}
		return true
	}
	x.fill(true)
	f := x.join(t, d, len(data), "r", &source{name: "a", data: data})
	defer f.Release()
	if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	eventually(t, "it to be kept", func() bool { return x.linked("r", d) })
}

// TestSuccessorWaits: who joins while a fill is putting its files away goes on
// from them.
func TestSuccessorWaits(t *testing.T) {
	x := newTable(t)
	data, d := random(8 * mib)
	parking, proceed := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	failpoint.Set(func(name string) {
		if name == "fill.parked" && first.CompareAndSwap(false, true) {
			close(parking)
			<-proceed
		}
	})
	defer failpoint.Set(nil)
	f := x.join(t, d, len(data), "r", &source{name: "a", data: data})
	if _, err := read(t, f, 0, mib, false); err != nil {
		t.Fatal(err)
	}
	f.Release()
	<-parking
	src := &source{name: "b", data: data}
	g := x.join(t, d, len(data), "r", src)
	defer g.Release()
	r := g.NewReader(t.Context(), 0, int64(len(data)), true)
	defer r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Ready(ctx); !errors.Is(err, context.DeadlineExceeded) || src.opened.Load() > 0 {
		t.Errorf("before the files are put away: %v, %d requests", err, src.opened.Load())
	}
	close(proceed)
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	if n := src.sent.Load(); n != int64(len(data)-mib) {
		t.Errorf("%d bytes were fetched", n)
	}
}

// TestTornLedger: the last line of a ledger was cut off by a kill. It is taken
// away before the next one is written.
func TestTornLedger(t *testing.T) {
	x := newTable(t)
	data, d := random(8 * mib)
	x.park(t, data, d)
	for _, name := range x.spooled() {
		if strings.HasSuffix(name, ".ledger") {
			file, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := file.WriteString(`0badc0de {"segments":[[12`); err != nil {
				t.Fatal(err)
			}
			file.Close()
		}
	}
	second := &source{name: "b", data: data}
	f := x.join(t, d, len(data), "r", second)
	if _, err := read(t, f, mib, mib, false); err != nil {
		t.Fatal(err)
	}
	f.Release()
	eventually(t, "the fill to be put away", func() bool { return len(x.summaries()) == 2 })
	third := &source{name: "c", data: data}
	g := x.join(t, d, len(data), "r", third)
	defer g.Release()
	if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	if a, b := second.sent.Load(), third.sent.Load(); a != mib || b != int64(len(data)-2*mib) {
		t.Errorf("%d and %d bytes were fetched", a, b)
	}
}

// TestDeadSourceBehindPart: what is there of a content says nothing of the rest.
// Who could still ask somebody else hears it before the first byte.
func TestDeadSourceBehindPart(t *testing.T) {
	x := newTable(t)
	x.parks = true
	data, d := random(8 * mib)
	x.park(t, data, d)
	f := x.join(t, d, len(data), "r", &source{name: "b", err: permanent{os.ErrPermission}})
	defer f.Release()
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	defer r.Close()
	if err := r.Ready(t.Context()); !errors.Is(err, os.ErrPermission) {
		t.Errorf("the whole: %v", err)
	}
	// A part that is all there needs nobody.
	g := x.join(t, d, len(data), "r", &source{name: "b", err: permanent{os.ErrPermission}})
	defer g.Release()
	if got, err := read(t, g, 1000, 1000, false); err != nil || !bytes.Equal(got, data[1000:2000]) {
		t.Errorf("a part: %v", err)
	}
}

// TestNotedWhileRunning: a kill takes little of what has come.
func TestNotedWhileRunning(t *testing.T) {
	x := newTable(t)
	data, d := random(8 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: mib}
	f := x.join(t, d, len(data), "r", src)
	defer f.Release()
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, mib)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the segments to be in the ledger", func() bool {
		for _, name := range x.spooled() {
			if text, _ := os.ReadFile(name); strings.HasSuffix(name, ".ledger") && bytes.Contains(text, []byte("[15,")) {
				return true
			}
		}
		return false
	})
	close(src.gate)
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data[mib:]) {
		t.Error(err)
	}
}
