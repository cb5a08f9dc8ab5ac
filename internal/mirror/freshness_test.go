package mirror

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

var (
	first  = regtest.NewImage("first", regtest.Random("1", 1000))
	second = regtest.NewImage("second", regtest.Random("2", 1000))
)

const latest = "team/app/manifests/latest"

// heldTag is a mirror that holds a tag, checked now.
func heldTag(t *testing.T, policy func(*Upstream)) *bench {
	b := newBench(t, regtest.Options{}, policy)
	b.registry.Push("team/app", first, "latest")
	b.wantManifest(latest, first)
	b.asked()
	return b
}

// TestFreshness has one test for each row of the freshness table.
func TestFreshness(t *testing.T) {
	t.Run("checked within tag_ttl", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.pass(time.Minute - 1)
		b.wantCache(b.wantManifest(latest, first), "registry; hit")
		b.wantStatus(200, "HEAD", latest)
		b.wantAsked("")
	})
	t.Run("stale, same digest", func(t *testing.T) {
		b := heldTag(t, nil)
		b.pass(time.Minute)
		b.wantCache(b.wantManifest(latest, first), "fwd=stale; fwd-status=304")
		b.wantAsked("HEAD latest")
		b.pass(time.Minute - 1) // fresh again
		b.wantCache(b.wantManifest(latest, first), "registry; hit")
		b.wantAsked("")
	})
	t.Run("stale, the check takes long", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.pass(2 * time.Minute)
		hold := make(chan struct{})
		b.registry.FailSlowly("", "/manifests/", hold)
		header := b.wantManifest(latest, first)
		b.wantCache(header, "hit; ttl=-1")
		if header.Get("Age") != "120" || !strings.HasPrefix(header.Get("Warning"), "299 - ") {
			t.Errorf("%v", header)
		}
		b.registry.Heal()
		close(hold) // it goes on behind
		b.eventually("the tag to move", func() bool {
			state, _ := b.mirror.tags.Get(tagKey{"reg.example/team/app", "latest"})
			return state.digest == second.Digest
		})
		b.asked()
		b.wantCache(b.wantManifest(latest, second), "registry; hit")
		b.wantAsked("")
	})
	t.Run("new digest", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.pass(time.Minute)
		b.wantCache(b.wantManifest(latest, second), "stored")
		b.wantAsked("HEAD latest, GET " + second.Digest.String())
		record, err := b.mirror.tree.TagRecord(t.Context(), "reg.example/team/app", "latest")
		if err != nil || !record.Moved.Equal(b.now()) || record.Previous != first.Digest || record.FirstSeen.IsZero() {
			t.Errorf("record %+v, %v", record, err)
		}
	})
	t.Run("new digest that cannot be had", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.registry.Fail(regtest.Fault{Path: second.Digest.String(), Status: 404})
		b.pass(time.Minute)
		header := b.wantManifest(latest, first)
		b.wantCache(header, "hit; ttl=-1")
		if !strings.Contains(header.Get("Warning"), second.Digest.String()) {
			t.Errorf("Warning %q", header.Get("Warning"))
		}
		b.asked()
		b.wantManifest(latest, first) // it stays stale, and is not asked for by everyone
		b.wantAsked("")
		b.pass(lackMemory)
		b.wantManifest(latest, first)
		if asked := b.asked(); !strings.HasPrefix(asked, "HEAD latest") {
			t.Errorf("asked %q", asked)
		}
		b.registry.Heal()
		b.pass(lackMemory)
		b.wantManifest(latest, second)
	})
	t.Run("origin says 404, follow", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.DeleteTag("team/app", "latest")
		b.pass(time.Minute)
		b.wantStatus(404, "GET", latest)
		b.wantAsked("HEAD latest")
		b.wantStatus(404, "HEAD", latest) // from now on
		b.wantAsked("")
		b.wantManifest("team/app/manifests/"+first.Digest.String(), first)
		// It is asked for again, and gone while nobody can be asked.
		b.pass(time.Minute)
		b.wantStatus(404, "GET", latest)
		b.wantAsked("HEAD latest")
		b.registry.Down()
		b.pass(time.Minute)
		b.wantStatus(404, "GET", latest)
		b.wantEvent(upstreamDown)
		b.restart()
		b.wantStatus(404, "GET", latest)
		b.registry.Up()
		b.registry.Push("team/app", first, "latest")
		b.pass(10 * time.Minute)
		b.wantManifest(latest, first)
		b.registry.Down()
		b.restart() // that it is back is remembered, too
		b.wantManifest(latest, first)
	})
	t.Run("origin says 404, keep", func(t *testing.T) {
		b := heldTag(t, func(u *Upstream) { u.Keep, u.KeepFor = true, 24*time.Hour })
		b.registry.DeleteTag("team/app", "latest")
		b.pass(time.Minute)
		kept := func() {
			t.Helper()
			if header := b.wantManifest(latest, first); !strings.Contains(header.Get("Warning"), "kept") {
				t.Errorf("Warning %q", header["Warning"])
			}
		}
		kept()
		b.wantAsked("HEAD latest")
		kept()
		b.wantAsked("")
		b.pass(time.Hour)
		kept()
		b.wantAsked("HEAD latest") // it is rechecked
		b.pass(time.Hour)
		b.restart()
		kept()
		b.pass(22 * time.Hour) // the time counts from when it was first gone
		b.wantStatus(404, "GET", latest)
		b.registry.Push("team/app", second, "latest")
		b.pass(time.Minute)
		b.wantManifest(latest, second)
	})
	t.Run("origin says 404, keep, not held", func(t *testing.T) {
		b := newBench(t, regtest.Options{}, func(u *Upstream) { u.Keep = true })
		b.registry.Push("team/app", first, "latest")
		b.wantStatus(200, "HEAD", latest)
		b.registry.DeleteTag("team/app", "latest")
		b.pass(time.Minute)
		b.wantStatus(404, "HEAD", latest)
		b.wantStatus(404, "GET", latest)
		b.pass(time.Minute)
		b.wantStatus(404, "GET", latest)
	})
	t.Run("origin says 404, keep for ever", func(t *testing.T) {
		b := heldTag(t, func(u *Upstream) { u.Keep = true })
		b.registry.DeleteTag("team/app", "latest")
		b.pass(time.Minute)
		b.wantManifest(latest, first)
		b.pass(20 * 365 * 24 * time.Hour)
		b.wantManifest(latest, first)
		b.registry.Push("team/app", first, "latest")
		b.pass(time.Minute)
		if header := b.wantManifest(latest, first); header.Get("Warning") != "" {
			t.Errorf("it is back: %v", header)
		}
	})
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run("origin says "+http.StatusText(status), func(t *testing.T) {
			b := heldTag(t, nil)
			b.registry.Fail(regtest.Fault{Path: "/manifests/", Status: status})
			b.pass(time.Minute)
			header := b.wantManifest(latest, first)
			b.wantCache(header, "hit; ttl=-1")
			b.wantEvent(upstreamDenied)
			if b.logs.FilterMessage("upstream trouble").Len() != 1 {
				t.Error("nothing is logged of it")
			}
			b.wantManifest(latest, first)
			if len(b.events) > 0 {
				t.Error("told of twice in a minute")
			}
		})
	}
	for name, c := range map[string]struct {
		fault regtest.Fault
		event string
	}{
		"429":         {regtest.Fault{Status: 429}, rateLimited},
		"500":         {regtest.Fault{Status: 500}, upstreamDown},
		"503":         {regtest.Fault{Status: 503}, upstreamDown},
		"a web page":  {regtest.Fault{Status: 200, Body: "<html>log in</html>"}, upstreamDown},
		"cut at once": {regtest.Fault{Cut: 0.01}, upstreamDown},
	} {
		t.Run("upstream says "+name, func(t *testing.T) {
			b := heldTag(t, nil)
			b.registry.Push("team/app", second, "latest")
			c.fault.Path = "/manifests/"
			b.registry.Fail(c.fault)
			b.pass(time.Minute)
			for _, method := range []string{"GET", "HEAD"} {
				header := b.wantStatus(200, method, latest)
				if header.Get("Docker-Content-Digest") != first.Digest.String() || header.Get("Warning") == "" {
					t.Errorf("%s: %v", method, header)
				}
			}
			if name != "cut at once" || len(b.events) > 0 {
				b.wantEvent(c.event)
			}
			b.registry.Heal()
			b.pass(time.Hour)
			b.wantManifest(latest, second)
		})
	}
	t.Run("upstream is down, breaker and restart", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Down()
		for range 20 {
			b.pass(time.Minute)
			b.wantManifest(latest, first)
		}
		b.restart()
		header := b.wantManifest(latest, first)
		if header.Get("Age") != "" || header.Get("Warning") == "" {
			t.Errorf("after a restart nobody knows how old it is: %v", header)
		}
	})
	t.Run("not held", func(t *testing.T) {
		b := newBench(t, regtest.Options{}, nil)
		b.registry.Push("team/app", first, "latest", "other")
		b.wantStatus(200, "HEAD", latest)
		b.wantAsked("HEAD latest")
		b.wantManifest("team/app/manifests/other", first)
		b.wantAsked("GET other")
	})
	t.Run("after a restart", func(t *testing.T) {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.restart()
		b.wantManifest(latest, second)
	})
}

// TestForced: a client that says no-cache lets a fresh tag be checked.
func TestForced(t *testing.T) {
	for name, value := range map[string]string{"Cache-Control": "max-age=0, No-Cache", "Pragma": "no-cache"} {
		b := heldTag(t, nil)
		b.registry.Push("team/app", second, "latest")
		b.wantManifest(latest, first)
		b.wantAsked("")
		b.wantManifest(latest, second, name, value)
		b.wantAsked("HEAD latest, GET " + second.Digest.String())
		b.wantManifest(latest, second, name, value)
		b.wantAsked("HEAD latest")
		b.wantManifest("team/app/manifests/"+first.Digest.String(), first, name, value)
		b.wantAsked("") // that can be no other
		// What has been missing a moment ago, too.
		b.wantStatus(404, "GET", "team/app/manifests/none")
		b.registry.Push("team/app", first, "none")
		b.wantStatus(404, "GET", "team/app/manifests/none")
		b.wantManifest("team/app/manifests/none", first, name, value)
	}
}

// TestCheckAhead: a tag that is asked for often is checked before it is stale,
// and nobody waits for that.
func TestCheckAhead(t *testing.T) {
	b := heldTag(t, nil)
	b.registry.Push("team/app", second, "latest")
	for range 5 {
		b.wantManifest(latest, first)
	}
	b.wantAsked("") // too early
	b.pass(45 * time.Second)
	hold := make(chan struct{})
	b.registry.FailSlowly("", "/manifests/latest", hold)
	for range 5 {
		b.wantCache(b.wantManifest(latest, first), "registry; hit")
	}
	b.registry.Heal()
	close(hold)
	b.eventually("the tag to move", func() bool {
		state, _ := b.mirror.tags.Get(tagKey{"reg.example/team/app", "latest"})
		return state.digest == second.Digest
	})
	b.wantAsked("HEAD latest, GET " + second.Digest.String())
	b.wantCache(b.wantManifest(latest, second), "registry; hit")
	// Asked for seldom: not ahead.
	b.pass(50 * time.Second)
	b.wantManifest(latest, second)
	b.mirror.wg.Wait()
	b.wantAsked("")
}

// TestLacks: that something does not exist is remembered for seconds.
func TestLacks(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	nothing := regtest.Random("nothing", 10).Digest.String()
	for _, path := range []string{
		"team/app/manifests/sha256-0123.sig", "team/app/manifests/" + nothing, "team/app/blobs/" + nothing, "team/none/manifests/latest",
	} {
		b.wantStatus(404, "GET", path)
		if b.asked() == "" {
			t.Errorf("%s: nobody was asked", path)
		}
		for range 3 { // asking again does not make it last
			b.pass(3 * time.Second)
			b.wantStatus(404, "HEAD", path)
			b.wantStatus(404, "GET", path)
			b.wantAsked("")
		}
		b.pass(time.Second)
		b.wantStatus(404, "GET", path)
		if b.asked() == "" {
			t.Errorf("%s: nobody was asked again", path)
		}
	}
	// Trouble is no such word.
	b.registry.Fail(regtest.Fault{Path: "/manifests/", Status: 500})
	b.wantStatus(503, "GET", "team/app/manifests/v2")
	b.registry.Heal()
	b.registry.Push("team/app", second, "v2")
	b.wantManifest("team/app/manifests/v2", second)
}

// TestLacksNothing: with tag_ttl 0 every request asks.
func TestLacksNothing(t *testing.T) {
	b := newBench(t, regtest.Options{}, func(u *Upstream) { u.TagTTL = 0 })
	b.wantStatus(404, "GET", latest)
	b.registry.Push("team/app", first, "latest")
	b.wantManifest(latest, first)
}

// TestUnobtainable: a manifest whose blobs are known to be gone is refused, so
// that a client takes both from elsewhere.
func TestUnobtainable(t *testing.T) {
	b := heldTag(t, nil)
	layer := first.Blobs[1].Digest.String()
	b.registry.Fail(regtest.Fault{Path: layer, Status: 404})
	b.wantStatus(404, "GET", "team/app/blobs/"+layer)
	w := b.ask("GET", latest)
	if w.Code != http.StatusForbidden || !strings.Contains(w.Body.String(), layer) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	b.registry.Heal()
	b.pass(10 * time.Second)
	b.wantManifest(latest, first)
}
