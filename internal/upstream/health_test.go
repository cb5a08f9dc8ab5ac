package upstream

import (
	"errors"
	"net/http"
	"strconv"
	"testing"
	"time"
)

// A clock that moves only when told to.
type clock struct{ t time.Time }

func newClock() *clock { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) now() time.Time          { return c.t }
func (c *clock) advance(d time.Duration) { c.t = c.t.Add(d) }

var errDown = errors.New("connection refused")

// admitted asks for a place and reports whether it is a trial.
func admitted(t *testing.T, h *health, must bool) (trial bool) {
	t.Helper()
	trial, err := h.admit(must)
	if err != nil {
		t.Fatalf("not admitted: %v", err)
	}
	return trial
}

func blocked(t *testing.T, h *health, must bool, kind Kind) *Error {
	t.Helper()
	trial, err := h.admit(must)
	if err == nil {
		t.Fatalf("admitted (trial: %v), want it blocked", trial)
	}
	if trial || err.Kind != kind {
		t.Fatalf("blocked by %v (kind %d, trial %v), want kind %d", err, err.Kind, trial, kind)
	}
	return err
}

func fails(t *testing.T, h *health, n int) {
	t.Helper()
	for range n {
		h.failure(admitted(t, h, false), errDown)
	}
}

func TestBreakerOpensAfterFiveInARow(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	fails(t, h, breakerThreshold-1)
	if h.open() {
		t.Fatal("open too early")
	}
	h.success(admitted(t, h, false)) // not in a row
	fails(t, h, breakerThreshold-1)
	if admitted(t, h, false) {
		t.Error("a trial while it is closed")
	}
	h.failure(false, errDown)
	if !h.open() {
		t.Fatal("not open after five failures in a row")
	}
	err := blocked(t, h, false, Unavailable)
	if !errors.Is(err, errOpen) || !errors.Is(err, errDown) {
		t.Errorf("%v does not say that it is open, and why", err)
	}
	if breakerThreshold != 5 {
		t.Errorf("the breaker opens after %d failures", breakerThreshold)
	}
}

func TestBreakerTrialAfterThePause(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	fails(t, h, breakerThreshold)
	c.advance(breakerFirst - time.Nanosecond)
	blocked(t, h, false, Unavailable)
	c.advance(time.Nanosecond)
	if !admitted(t, h, false) {
		t.Fatal("not a trial")
	}
	blocked(t, h, false, Unavailable) // one at a time
	blocked(t, h, true, Unavailable)
	h.success(true)
	if h.open() {
		t.Fatal("open after a success")
	}
	if admitted(t, h, false) || admitted(t, h, false) {
		t.Error("a trial after it has closed")
	}
	fails(t, h, breakerThreshold-1)
	if h.open() {
		t.Error("old failures count")
	}
}

// A caller that holds nothing else may try at once, one at a time.
func TestBreakerMust(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	fails(t, h, breakerThreshold)
	if !admitted(t, h, true) {
		t.Fatal("not a trial")
	}
	blocked(t, h, true, Unavailable)
	blocked(t, h, false, Unavailable)
	h.failure(true, errDown)
	blocked(t, h, false, Unavailable)
	if !admitted(t, h, true) {
		t.Fatal("not a trial")
	}
	h.neither(true) // the caller went away: the place is free, and nothing is known
	if !h.open() {
		t.Error("closed by a caller who went away")
	}
	blocked(t, h, false, Unavailable)
	if !admitted(t, h, true) {
		t.Fatal("the place of a caller who went away is taken")
	}
	h.success(true)
	admitted(t, h, false)
}

// The end of a request that was admitted before the breaker opened does not
// give the trial's place away.
func TestBreakerLateComers(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	early := admitted(t, h, false)
	fails(t, h, breakerThreshold)
	trial := admitted(t, h, true)
	h.failure(early, errDown)
	blocked(t, h, true, Unavailable)
	h.neither(early)
	blocked(t, h, true, Unavailable)
	h.success(trial)
	if h.open() {
		t.Error("open after the trial's success")
	}
}

func TestBreakerPauseGrowsWithEachTrial(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	fails(t, h, breakerThreshold)
	for _, want := range []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, time.Minute, time.Minute} {
		c.advance(want - time.Nanosecond)
		blocked(t, h, false, Unavailable)
		c.advance(time.Nanosecond)
		h.failure(admitted(t, h, false), errDown)
	}
	c.advance(breakerLongest)
	h.success(admitted(t, h, false))
	fails(t, h, breakerThreshold)
	c.advance(breakerFirst) // begins anew
	if !admitted(t, h, false) {
		t.Error("not a trial")
	}
}

// Requests that were under way together when an upstream went down are one
// outage, not many: the first pause is the short one.
func TestBreakerBurst(t *testing.T) {
	c := newClock()
	h := &health{now: c.now}
	const burst = blobsAtOnce * DefaultConnections
	for range burst {
		if admitted(t, h, false) {
			t.Fatal("a trial while it is closed")
		}
	}
	for range burst {
		h.failure(false, errDown)
	}
	c.advance(breakerFirst)
	if _, err := h.admit(false); err != nil {
		t.Errorf("after %d failures at once and %v: %v", burst, breakerFirst, err)
	}
}

func TestLimit(t *testing.T) {
	for _, c := range []struct {
		retryAfter string
		want       time.Duration
	}{
		{"30", 30 * time.Second},
		{"", defaultBlock},
		{"soon", defaultBlock},
		{"-5", defaultBlock},
		{"7200", longestBlock},
		{"9223372037", longestBlock}, // a Duration cannot hold it
		{"18446744074", longestBlock},
		{"99999999999999999999999999", defaultBlock},
		{"Fri, 02 Jan 2026 03:05:05 GMT", time.Minute},
		{"Fri, 02 Jan 2026 03:04:00 GMT", 0},
		{"Sat, 03 Jan 2026 03:04:05 GMT", longestBlock},
		{"0", 0},
	} {
		clk := newClock()
		h := &health{now: clk.now}
		header := http.Header{}
		if c.retryAfter != "" {
			header.Set("Retry-After", c.retryAfter)
		}
		if got := h.limit(header); got != c.want {
			t.Errorf("Retry-After %q: blocked for %v, want %v", c.retryAfter, got, c.want)
			continue
		}
		if c.want > 0 {
			// Even who has nothing else must not dig deeper.
			for _, must := range []bool{false, true} {
				if err := blocked(t, h, must, RateLimited); err.After != c.want || err.Status != http.StatusTooManyRequests {
					t.Errorf("Retry-After %q: %+v", c.retryAfter, err)
				}
			}
			clk.advance(c.want - time.Second)
			if err := blocked(t, h, true, RateLimited); err.After != time.Second {
				t.Errorf("Retry-After %q: %v are left", c.retryAfter, err.After)
			}
			clk.advance(time.Second)
		}
		if admitted(t, h, false) {
			t.Errorf("Retry-After %q: a rate limit opened the breaker", c.retryAfter)
		}
	}
}

func TestContentRange(t *testing.T) {
	for _, c := range []struct {
		in                string
		start, end, total int64
		ok                bool
	}{
		{"bytes 100-199/500", 100, 199, 500, true},
		{"bytes 0-0/1", 0, 0, 1, true},
		{"bytes 100-199/*", 100, 199, -1, true},
		{"bytes 100-499/500", 100, 499, 500, true},
		{in: ""},
		{in: "bytes"},
		{in: "bytes */500"},
		{in: "bytes 100/500"},
		{in: "bytes 100-199"},
		{in: "bytes 100-/500"},
		{in: "bytes 199-100/500"},
		{in: "bytes 100-500/500"},
		{in: "bytes 500-599/500"},
		{in: "bytes -1-5/500"},
		{in: "bytes 0-5/-1"},
		{in: "bytes 0-5/x"},
		{in: "bytes 0-x/500"},
		{in: "bytes x-5/500"},
		{in: "bytes 99999999999999999999-5/500"},
		{in: "bytes 0-9223372036854775807/*"}, // one more is no number any more
		{in: "items 0-5/500"},
		{in: "0-5/500"},
	} {
		start, end, total, ok := contentRange(http.Header{"Content-Range": {c.in}})
		if ok != c.ok || ok && (start != c.start || end != c.end || total != c.total) {
			t.Errorf("contentRange(%q) = %d, %d, %d, %v; want %d, %d, %d, %v", c.in, start, end, total, ok, c.start, c.end, c.total, c.ok)
		}
	}
	multipart := http.Header{"Content-Range": {"bytes 0-1/5"}, "Content-Type": {"multipart/byteranges; boundary=x"}}
	if _, _, _, ok := contentRange(multipart); ok {
		t.Error("the parts of a multipart answer are one range")
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"", "bytes 100-199/500", "bytes 100-199/*", "bytes */500", "bytes 0-0/0", "bytes --1/5", "bytes 1-/9223372036854775807"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		start, end, total, ok := contentRange(http.Header{"Content-Range": {s}})
		if ok && (start < 0 || end < start || total != -1 && total <= end) {
			t.Errorf("contentRange(%q) = %d, %d, %d", s, start, end, total)
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	now := newClock().t
	for _, s := range []string{"", "0", "30", "-1", "9223372037", "99999999999", "18446744074", "Fri, 02 Jan 2026 03:05:05 GMT", "Friday, 02-Jan-26 03:05:05 GMT", "soon", "1.5"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		wait, ok := retryAfter(http.Header{"Retry-After": {s}}, now)
		if wait < 0 || !ok && wait != 0 {
			t.Errorf("retryAfter(%q) = %v, %v", s, wait, ok)
		}
		if seconds, err := strconv.ParseInt(s, 10, 64); err == nil && seconds >= 0 {
			if want := time.Duration(min(seconds, int64(longestBlock/time.Second))) * time.Second; !ok || wait != want {
				t.Errorf("retryAfter(%q) = %v, %v; want %v", s, wait, ok, want)
			}
		}
	})
}
