package mirror

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

const (
	fortnight = 14 * 24 * time.Hour
	ttl       = 15 * time.Minute
	keepFor   = 2 * 24 * time.Hour
)

var fortnightSeed = flag.Uint64("fortnight", 0, "seed of the weather in TestFortnight")

// TestFortnight lets two weeks pass in which an upstream moves tags, deletes
// them, limits its clients and dies, while clients pull and the mirror is
// restarted now and then.
func TestFortnight(t *testing.T) {
	for name, policy := range map[string]func(*Upstream){
		"follow":            func(u *Upstream) { u.TagTTL = ttl },
		"keep for two days": func(u *Upstream) { u.TagTTL, u.Keep, u.KeepFor = ttl, true, keepFor },
		"keep for ever":     func(u *Upstream) { u.TagTTL, u.Keep = ttl, true },
	} {
		t.Run(name, func(t *testing.T) {
			f := &simulation{
				bench: newBench(t, regtest.Options{NoToken: true}, policy),
				rand:  rand.New(rand.NewPCG(*fortnightSeed, 1)),
				tags:  map[string]*history{},
			}
			f.run()
		})
	}
}

// history is what a tag has meant, at its origin and to clients.
type history struct {
	meant []meaning // the latest last; digest "" when it is gone

	served bool      // at least once, by GET
	seen   time.Time // when it was last served as one that is there
}

type meaning struct {
	from   time.Time
	digest digest.Digest
}

func (h *history) now() meaning { return h.meant[len(h.meant)-1] }

// had reports whether the tag meant the digest at some time since then.
func (h *history) had(d digest.Digest, since time.Time) bool {
	for i, m := range h.meant {
		until := i + 1
		if m.digest == d && (until == len(h.meant) || h.meant[until].from.After(since)) {
			return true
		}
	}
	return false
}

// gone is since when the tag may have been gone as the mirror sees it: that it
// was back in between need not have been noticed.
func (h *history) gone() time.Time {
	for i, m := range h.meant {
		if m.digest == "" && (i+1 == len(h.meant) || h.meant[i+1].from.After(h.seen)) {
			return m.from
		}
	}
	return h.now().from.Add(fortnight)
}

// An ailment is what is the matter with the upstream.
type ailment string

const (
	well    ailment = "well"
	dead    ailment = "dead"
	failing ailment = "failing" // 500
	limits  ailment = "limits"  // 429
	short   ailment = "short"   // the last tenth of the budget
)

type simulation struct {
	*bench
	rand   *rand.Rand
	tags   map[string]*history
	ail    ailment
	until  time.Time // the ailment lasts
	healed time.Time // when the last one ended
	images []regtest.Image
	total  int // requests that reached the upstream
	asks   int
}

func (f *simulation) run() {
	for i := range 40 {
		f.images = append(f.images, regtest.NewImage(fmt.Sprint("image ", i), regtest.Random(fmt.Sprint(i), 100)))
	}
	for i := range 8 {
		f.push(fmt.Sprint("t", i))
	}
	f.ail = well
	begin := f.clock.now()
	for f.clock.now().Sub(begin) < fortnight && !f.t.Failed() {
		f.pass(time.Duration(f.rand.Int64N(int64(10 * time.Minute))))
		f.weather()
		if f.rand.IntN(20) == 0 {
			f.change()
		}
		if f.rand.IntN(200) == 0 {
			f.restart()
		}
		for range f.rand.IntN(4) {
			f.pull(fmt.Sprint("t", f.rand.IntN(8)))
		}
	}
	// Each tag can be checked once in three quarters of its time to live, and
	// twice more whenever it has changed or the mirror was restarted.
	most := 8*int(fortnight/(ttl*3/4)) + 8*14*24
	if f.total > most || f.total > 2*f.asks {
		f.t.Errorf("%d requests for %d asks in two weeks", f.total, f.asks)
	}
	f.t.Logf("%d asks, %d requests at the upstream", f.asks, f.total)
}

// weather changes what is the matter with the upstream.
func (f *simulation) weather() {
	if f.clock.now().Before(f.until) {
		return
	}
	if f.ail != well {
		f.healed = f.clock.now()
	}
	f.registry.Heal()
	if f.ail == dead {
		f.registry.Up()
	}
	f.ail = well
	if f.rand.IntN(30) > 0 {
		return
	}
	f.ail = []ailment{dead, failing, limits, short}[f.rand.IntN(4)]
	f.until = f.clock.now().Add(time.Duration(f.rand.Int64N(int64(12 * time.Hour))))
	switch f.ail {
	case dead:
		f.registry.Down()
	case failing:
		f.registry.Fail(regtest.Fault{Path: "/manifests/", Status: http.StatusInternalServerError})
	case limits:
		f.registry.Fail(regtest.Fault{Path: "/manifests/", Status: http.StatusTooManyRequests, Header: http.Header{"Retry-After": {"1800"}}})
	case short:
		f.registry.Fail(regtest.Fault{Path: "/manifests/", Header: http.Header{"Ratelimit-Limit": {"100;w=3600"}, "Ratelimit-Remaining": {"5;w=3600"}}})
	}
}

func (f *simulation) push(tag string) {
	image := f.images[f.rand.IntN(len(f.images))]
	f.registry.Push("team/app", image, tag)
	f.note(tag, image.Digest)
}

func (f *simulation) note(tag string, d digest.Digest) {
	if f.tags[tag] == nil {
		f.tags[tag] = new(history)
	}
	h := f.tags[tag]
	if len(h.meant) == 0 || h.now().digest != d {
		h.meant = append(h.meant, meaning{f.clock.now(), d})
	}
}

// change moves, deletes or brings back a tag.
func (f *simulation) change() {
	tag := fmt.Sprint("t", f.rand.IntN(8))
	if f.rand.IntN(3) == 0 && f.tags[tag].now().digest != "" {
		f.registry.DeleteTag("team/app", tag)
		f.note(tag, "")
		return
	}
	f.push(tag)
}

// pull asks for a tag and checks what must hold whatever the weather.
func (f *simulation) pull(tag string) {
	h, now := f.tags[tag], f.clock.now()
	f.asks++
	method := []string{"GET", "HEAD"}[f.rand.IntN(2)]
	f.registry.Forget()
	w := f.ask(method, "team/app/manifests/"+tag)
	f.mirror.wg.Wait() // what goes on behind lasts no minutes
	requests := f.registry.Requests(func(r regtest.Request) bool { return r.Status != http.StatusUnauthorized })
	reached := len(requests)
	f.total += reached
	got, warning := digest.Digest(w.Header().Get("Docker-Content-Digest")), strings.Join(w.Header().Values("Warning"), "; ")
	where := fmt.Sprintf("%s of %s at %s (%s until %s): %d %s, Warning %q, Cache-Status %q, asked %+v; %v",
		method, tag, now.Format(time.DateTime), f.ail, f.until.Format(time.DateTime), w.Code, got, warning, w.Header().Get("Cache-Status"), requests, h.meant)
	keeps := f.upstream.Keep && (f.upstream.KeepFor == 0 || now.Sub(h.gone()) < f.upstream.KeepFor)

	if reached > 6 {
		f.t.Errorf("too many requests: %s", where)
	}
	switch w.Code {
	case http.StatusOK:
		if !strings.Contains(warning, "it is kept here") {
			h.seen = now
		}
		// Without a warning it was right within tag_ttl.
		if warning == "" && !h.had(got, now.Add(-ttl)) {
			f.t.Errorf("an old tag without a warning: %s", where)
		}
		// With one, it once was.
		if warning != "" && !h.had(got, time.Time{}) {
			f.t.Errorf("what the tag never was: %s", where)
		}
		if strings.Contains(warning, "it is kept here") && !f.upstream.Keep {
			f.t.Errorf("kept without being told to: %s", where)
		}
		// A healthy upstream is asked, and believed. The breaker and a limit
		// are obeyed for up to an hour after it has recovered, and a budget for
		// its window.
		if f.ail == well && now.Sub(f.healed) > time.Hour && !strings.Contains(warning, "it is kept here") && (warning != "" || !h.had(got, now.Add(-ttl))) {
			f.t.Errorf("stale though the upstream is well: %s", where)
		}
		if method == "GET" {
			h.served = true
		}
	case http.StatusNotFound:
		if h.served && keeps {
			f.t.Errorf("what is held is not kept: %s", where)
		}
		if !h.had("", now.Add(-ttl)) && f.ail == well && now.Sub(f.healed) > time.Hour {
			f.t.Errorf("gone without reason: %s", where)
		}
		h.served = false // what it will mean when it is back is not held
		gone := false
		for _, m := range h.meant {
			gone = gone || m.digest == ""
		}
		if !gone {
			f.t.Errorf("it never was gone: %s", where)
		}
	case http.StatusServiceUnavailable:
		if h.served || f.ail == well && now.Sub(f.healed) > time.Hour {
			f.t.Errorf("unavailable: %s", where)
		}
	default:
		f.t.Errorf("%s", where)
	}
}
