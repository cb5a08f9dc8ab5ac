package upstream

import (
	"cmp"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// reserve is the part of a limit, one in so many, that is kept for what is
	// not held.
	reserve = 10
	// longestWindow is believed of the window that an upstream speaks of.
	longestWindow = 24 * time.Hour
	// maxSamples is how many observations are kept of a window.
	maxSamples = 64
)

// A RateLimit is what an upstream last said of our budget, as Docker Hub does
// in ratelimit-limit and ratelimit-remaining.
type RateLimit struct {
	Limit, Remaining int           // requests
	Window           time.Duration // 0: it did not say
	At               time.Time     // when it said so
}

func (r RateLimit) window() time.Duration { return min(r.Window, longestWindow) }

// end is when what was said counts no more: by then, what was used before has
// been given back.
func (r RateLimit) end() time.Time { return r.At.Add(r.window()) }

// budget is how often an endpoint may be asked, by its own word. Others may
// spend of it too: all who share our address, or our account.
type budget struct {
	now func() time.Time

	mu      sync.Mutex
	last    RateLimit
	samples []sample // since the last refill and within the window, oldest first
}

type sample struct {
	at        time.Time
	remaining int
}

// withhold says why a request that its caller can do without is not sent; nil:
// it may be. What is left is never kept for longer than a window, after which
// the answer to one request tells anew.
func (b *budget) withhold() *Error {
	b.mu.Lock()
	defer b.mu.Unlock()
	wait := b.last.end().Sub(b.now())
	if b.last.Limit == 0 || b.last.Remaining > b.last.Limit/reserve || wait <= 0 {
		return nil
	}
	return &Error{Kind: RateLimited, After: wait, Reason: fmt.Sprintf("%d of %d requests are left until %s, and are kept for what is not held here",
		b.last.Remaining, b.last.Limit, b.last.end().UTC().Format("15:04 MST"))}
}

// observe keeps what an answer says of the budget. Most say nothing.
func (b *budget) observe(header http.Header) {
	limit, window, ok := rateField(header.Get("Ratelimit-Limit"))
	if !ok {
		return
	}
	remaining, _, ok := rateField(header.Get("Ratelimit-Remaining"))
	if !ok {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	said := RateLimit{Limit: limit, Remaining: remaining, Window: window, At: b.now()}
	if b.refilled(said) {
		b.samples = b.samples[:0]
	}
	b.last = said
	b.samples = slices.DeleteFunc(b.samples, func(s sample) bool { return said.At.Sub(s.at) >= said.window() })
	// Spaced, they are few enough, and the oldest is as old as it can be.
	if n := len(b.samples); n == 0 || said.At.Sub(b.samples[n-1].at) >= said.window()/maxSamples {
		b.samples = append(b.samples, sample{said.At, said.Remaining})
	}
}

// refilled reports that what was used before says nothing of the use since. A
// small rise is none: answers overtake each other, and where the window slides,
// requests come back one by one.
func (b *budget) refilled(said RateLimit) bool {
	return said.Limit != b.last.Limit || said.Window != b.last.Window ||
		said.Remaining > b.last.Remaining+said.Limit/reserve ||
		len(b.samples) > 0 && said.Remaining > b.samples[0].remaining
}

func (b *budget) rateLimit() RateLimit {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.last
}

// exhausted is when nothing will be left if use goes on as it was in the
// window, or when nothing was; zero if that is not in sight, and further than
// a window is out of sight. Use in a time that is shorter than the distance of
// two samples counts as spread over it: a pull is a handful of requests at
// once, and not a rate.
func (b *budget) exhausted() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, window := b.now(), b.last.window()
	if b.last.Limit == 0 || !now.Before(b.last.end()) {
		return time.Time{}
	}
	if b.last.Remaining == 0 {
		return b.last.At
	}
	oldest := slices.IndexFunc(b.samples, func(s sample) bool { return now.Sub(s.at) < window })
	if oldest < 0 {
		return time.Time{}
	}
	used := b.samples[oldest].remaining - b.last.Remaining
	if used <= 0 {
		return time.Time{}
	}
	since := max(now.Sub(b.samples[oldest].at), window/maxSamples)
	left := float64(b.last.Remaining) * (float64(since) / float64(used))
	if left > float64(window) {
		return time.Time{}
	}
	return now.Add(time.Duration(left))
}

// A Budget is how often one address may still be asked by one account.
type Budget struct {
	Upstream string // the registry's name: docker.io
	Endpoint string // https://registry-1.docker.io
	Account  string // the user of the credentials; "" is nobody
	RateLimit
	// Over says that the window has passed since: Remaining means nothing now.
	Over bool
	// Exhausted is when nothing will be left at the present rate of use; zero:
	// that is not in sight.
	Exhausted time.Time
}

// Budgets lists what the endpoints that are open have said of their budgets,
// once for each upstream that has them. Endpoints that never said anything are
// left out; those that differ only in settings of the connection are listed
// one by one, the latest word first.
func (p *Pool) Budgets() []Budget {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []Budget
	for _, held := range p.endpoints {
		said := held.budget.rateLimit()
		if said.Limit == 0 {
			continue
		}
		over := said.Window > 0 && !held.now().Before(said.end())
		exhausted := held.budget.exhausted()
		for name := range held.users {
			list = append(list, Budget{name, held.name, held.account, said, over, exhausted})
		}
	}
	slices.SortFunc(list, func(a, b Budget) int {
		return cmp.Or(cmp.Compare(a.Upstream, b.Upstream), cmp.Compare(a.Endpoint, b.Endpoint), cmp.Compare(a.Account, b.Account), b.At.Compare(a.At))
	})
	return list
}

// rateField reads "100;w=21600": a count, and the window in seconds.
func rateField(s string) (n int, window time.Duration, ok bool) {
	count, params, _ := strings.Cut(s, ";")
	n, err := strconv.Atoi(strings.TrimSpace(count))
	if err != nil || n < 0 {
		return 0, 0, false
	}
	for param := range strings.SplitSeq(params, ";") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(param), "w="); ok {
			if seconds, err := strconv.Atoi(value); err == nil && seconds > 0 {
				window = time.Duration(min(seconds, math.MaxInt32)) * time.Second
			}
		}
	}
	return n, window, true
}
