package fill_test

import (
	"bytes"
	"io"
	"os/signal"
	"syscall"
	"testing"

	"github.com/caddy-registry/mirror/internal/fill"
)

// TestFullInLastSegment: the disk is full when half of the last segment has come.
// Readers have been kept from that segment, and hash it as it passes. Whoever writes
// it to the disk must not have done so, or the content would be found wrong.
func TestFullInLastSegment(t *testing.T) {
	const full = 3*mib + mib/2
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: full, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Error(err)
		}
	}()
	x := newTable(t)
	x.parks = true
	fill.Tune(x.Table, mib, mib, 8*mib, 8*mib, mib)
	fill.Cores(x.Table, 0) // so that whoever writes hashes
	data, d := random(4 * mib)
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 3 * mib}
	f := x.join(t, d, len(data), "r", a)
	defer f.Release()
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	defer r.Close()
	eventually(t, "what comes before to be hashed", func() bool { return fill.Hashed(f) == 3*mib })
	close(a.gate)
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := a.blamed.Load(); n > 0 {
		t.Errorf("blamed %d times", n)
	}
	if at := fill.Hashed(f); at != 3*mib {
		t.Errorf("hashed up to %d", at)
	}
}
