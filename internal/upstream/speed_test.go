package upstream

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// dripping brings some bytes at each read, which takes its time.
type dripping struct {
	clock *clock
	bytes int
	takes time.Duration
	reads int // left; then it ends
}

func (d *dripping) Read(p []byte) (int, error) {
	d.clock.advance(d.takes)
	if d.reads--; d.reads < 0 {
		return 0, io.EOF
	}
	return min(len(p), d.bytes), nil
}

func (d *dripping) Close() error { return nil }

func TestPace(t *testing.T) {
	least := Speed{Bytes: 1000, Over: 10 * time.Second}
	for _, c := range []struct {
		name   string
		source dripping
		busy   time.Duration // between reads
		reads  int           // that go well; -1: all
	}{
		{"fast", dripping{bytes: 2000, takes: time.Second, reads: 100}, 0, -1},
		{"just fast enough", dripping{bytes: 1000, takes: time.Second, reads: 100}, 0, -1},
		{"slow", dripping{bytes: 999, takes: time.Second, reads: 100}, 0, 9},
		{"slow at the end", dripping{bytes: 10, takes: time.Second, reads: 9}, 0, -1},
		{"one slow read", dripping{bytes: 2000, takes: 10 * time.Second, reads: 5}, 0, 0},
		{"a busy reader", dripping{bytes: 2000, takes: time.Second, reads: 100}, time.Hour, -1},
		{"a busy reader of a slow one", dripping{bytes: 100, takes: time.Second, reads: 100}, time.Hour, 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			clk := newClock()
			c.source.clock = clk
			b := &body{ReadCloser: &c.source, stall: time.Hour, pace: &pace{least: least}, now: clk.now, cancel: func(error) {}}
			all := c.source.reads
			var reads int
			for buffer := make([]byte, 4096); ; reads++ {
				_, err := b.Read(buffer)
				if errors.Is(err, io.EOF) {
					if c.reads != -1 || reads != all {
						t.Errorf("ended after %d reads of %d; want it too slow after %d", reads, all, c.reads)
					}
					return
				}
				if err != nil {
					if !errors.Is(err, errMinSpeed) || reads != c.reads {
						t.Errorf("after %d reads: %v; want it too slow after %d", reads, err, c.reads)
					}
					return
				}
				clk.advance(c.busy)
			}
		})
	}
}

func TestPaceLeft(t *testing.T) {
	p := &pace{least: Speed{Bytes: 1000, Over: 10 * time.Second}}
	for _, c := range []struct {
		n    int
		took time.Duration
		left time.Duration
	}{
		{0, 0, 10 * time.Second},
		{5000, 2 * time.Second, 8 * time.Second},
		{20_000, time.Second, 22 * time.Second}, // so long is what has come good for
		{0, 7 * time.Second, 10 * time.Second},  // begun anew
		{1 << 40, 0, time.Hour},
	} {
		if err := p.add(c.n, c.took); err != nil {
			t.Fatal(err)
		}
		if left := p.left(); left != c.left {
			t.Errorf("after %d bytes more in %v, %v are left, want %v", c.n, c.took, left, c.left)
		}
	}
}

// TestMinSpeed: an endpoint that drips is given up while there is another, and
// never if it is the last.
func TestMinSpeed(t *testing.T) {
	slow := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x", regtest.Random("x", 1<<20))
	slow.Push("a/b", image)
	layer := image.Blobs[1]
	slow.Fail(regtest.Fault{Path: layer.Digest.String(), Rate: 100_000})
	set := func(e *Endpoint) { e.MinSpeed = Speed{1 << 30, 20 * time.Millisecond} }
	u := open(t, nil, set, slow, slow)

	sources := u.Blob("a/b", layer.Digest)
	stream, err := sources[0].Open(t.Context(), fill.Span{Length: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	_, err = io.Copy(io.Discard, stream)
	var failure *Error
	if !errors.As(err, &failure) || failure.Kind != Unavailable || failure.Upstream != "reg.test" || !strings.HasPrefix(failure.Endpoint, "http://") {
		t.Fatalf("the slow stream ends with %#v", err)
	}
	for _, part := range []string{"min_speed", "KiB/s", "1.0 GiB/s over 20ms"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if after, worthwhile := failure.Retry(); after != slowPause || !worthwhile {
		t.Errorf("it may be asked again after %v (%v)", after, worthwhile)
	}

	stream, err = sources[1].Open(t.Context(), fill.Span{Length: 20_000})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if n, err := io.Copy(io.Discard, stream); n != 20_000 || err != nil {
		t.Errorf("of the last source: %d bytes, %v", n, err)
	}
}

// TestMinSpeedSilence: a stream from which nothing comes any more is too slow
// when the time is over, not when it counts as stalled.
func TestMinSpeedSilence(t *testing.T) {
	silent := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x", regtest.Random("x", 1<<20))
	silent.Push("a/b", image)
	layer := image.Blobs[1]
	hold := make(chan struct{})
	defer close(hold)
	silent.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, At: 1000})
	u := open(t, nil, func(e *Endpoint) { e.MinSpeed = Speed{1 << 20, 50 * time.Millisecond} }, silent, silent)
	stream, err := u.Blob("a/b", layer.Digest)[0].Open(t.Context(), fill.Span{Length: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if n, err := io.Copy(io.Discard, stream); n != 1000 || !errors.Is(err, errMinSpeed) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// TestRetryOfSlowness: nothing but slowness is worth a retry after that long.
func TestRetryOfSlowness(t *testing.T) {
	if _, worthwhile := (&Error{Kind: Unavailable, After: slowPause, Err: context.DeadlineExceeded}).Retry(); worthwhile {
		t.Error("an endpoint that asked for a minute of rest is to be asked again")
	}
}
