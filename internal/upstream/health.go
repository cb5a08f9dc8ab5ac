package upstream

import (
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	breakerThreshold = 5 // failures in a row
	breakerFirst     = 10 * time.Second
	breakerLongest   = time.Minute
	longestBlock     = time.Hour // obeyed of a Retry-After
	defaultBlock     = time.Minute
)

// errOpen is wrapped while the breaker is open.
var errOpen = errors.New("it failed several times in a row and is left alone for now")

// health decides whether an endpoint is asked at all.
//
// The breaker opens after several failures in a row: what is held is then
// served without waiting for a dead upstream. While it is open, and until the
// first success after it, one request at a time may try: after the pause, or
// at once when the caller has nothing else (must).
type health struct {
	now func() time.Time

	mu       sync.Mutex
	failures int
	until    time.Time // the breaker is open
	pause    time.Duration
	trying   bool
	limited  time.Time // not to be asked before, says a 429
	last     error
}

// admit lets a request pass or says why not. Whoever was admitted reports how
// it went, exactly once.
func (h *health) admit(must bool) (trial bool, err *Error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	if wait := h.limited.Sub(now); wait > 0 {
		return false, &Error{Kind: RateLimited, Status: http.StatusTooManyRequests, After: wait, Reason: "it asked to be left alone for " + wait.Round(time.Second).String()}
	}
	if h.failures < breakerThreshold {
		return false, nil
	}
	if h.trying || now.Before(h.until) && !must {
		return false, &Error{Kind: Unavailable, Err: errors.Join(errOpen, h.last)}
	}
	h.trying = true
	return true, nil
}

// success says that the endpoint answered, be it with 404.
func (h *health) success(trial bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if trial {
		h.trying = false
	}
	h.failures, h.pause, h.last = 0, 0, nil
}

// failure says that it did not.
func (h *health) failure(trial bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if trial {
		h.trying = false
	}
	h.failures++
	h.last = err
	// Requests that were under way when it opened add nothing.
	if h.failures == breakerThreshold || trial && h.failures > breakerThreshold {
		h.pause = min(max(2*h.pause, breakerFirst), breakerLongest)
		h.until = h.now().Add(h.pause)
	}
}

// neither ends a request that says nothing of the endpoint, because the caller
// went away.
func (h *health) neither(trial bool) {
	if trial {
		h.mu.Lock()
		h.trying = false
		h.mu.Unlock()
	}
}

// open reports whether the breaker is open.
func (h *health) open() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failures >= breakerThreshold
}

// limit obeys a 429, and returns for how long.
func (h *health) limit(header http.Header) time.Duration {
	wait, ok := retryAfter(header, h.now())
	if !ok {
		// Docker Hub may not say. A pause keeps us from digging deeper, and
		// ends long before the window would.
		wait = defaultBlock
	}
	wait = min(wait, longestBlock)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.limited = h.now().Add(wait)
	return wait
}

// retryAfter reads the header, in seconds or as a date.
func retryAfter(header http.Header, now time.Time) (time.Duration, bool) {
	value := header.Get("Retry-After")
	if seconds, err := strconv.Atoi(value); err == nil && seconds >= 0 {
		return time.Duration(min(seconds, int(longestBlock/time.Second))) * time.Second, true
	}
	if date, err := http.ParseTime(value); err == nil {
		return max(0, date.Sub(now)), true
	}
	return 0, false
}
