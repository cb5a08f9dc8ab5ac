package upstream

import (
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestExpiry(t *testing.T) {
	now := newClock().t // 2026-01-02 03:04:05 UTC
	at := func(d time.Duration) string { return fmt.Sprint(now.Add(d).Unix()) }
	for _, c := range []struct {
		address string
		want    time.Duration // from now; 0: none
	}{
		{"https://cdn.test/a?sig=1", 0},
		{"https://s3.test/a?X-Amz-Date=20260102T030400Z&X-Amz-Expires=20&X-Amz-Signature=x", 15 * time.Second},
		{"https://s3.test/a?X-Amz-Expires=20", 20 * time.Second},
		{"https://s3.test/a?X-Amz-Date=20260102T030400Z", 0},
		{"https://s3.test/a?X-Amz-Date=20260102T030400Z&X-Amz-Expires=soon", 0},
		{"https://gcs.test/a?X-Goog-Date=20260102T030405Z&X-Goog-Expires=30", 30 * time.Second},
		{"https://oss.test/a?x-oss-date=20260102T030405Z&x-oss-expires=40", 40 * time.Second},
		{"https://d1.test/a?Expires=" + at(time.Minute) + "&Signature=x", time.Minute},
		{"https://hub.test/a?expires=" + at(time.Hour) + "&signature=x", time.Hour},
		{"https://d1.test/a?Expires=never", 0},
		{"https://az.test/a?se=2026-01-02T03%3A05%3A05Z&sig=x", time.Minute},
		{"https://az.test/a?se=2026-01-02T03%3A05Z", 55 * time.Second},
		{"https://az.test/a?se=2026-01-03", 20*time.Hour + 55*time.Minute + 55*time.Second},
		{"https://az.test/a?se=en", 0},
		{"https://ak.test/a?hdnts=st=1~exp=" + at(25*time.Second) + "~acl=/*~hmac=0", 25 * time.Second},
		{"https://ak.test/a?__token__=st%3D1~exp%3D" + at(25*time.Second) + "~hmac%3D0", 25 * time.Second},
		{"https://ak.test/exp=" + at(25*time.Second) + "~hmac=0/a", 25 * time.Second},
		{"https://cdn.test/a?token=x&exp=" + at(35*time.Second), 35 * time.Second},
		{"https://cdn.test/a?texp=1000000000", 0},
		{"https://cdn.test/a?exp=123", 0},
		{"https://cdn.test/a?Expires=" + at(time.Hour) + "&X-Amz-Date=20260102T030405Z&X-Amz-Expires=12", 12 * time.Second},
		{"https://cdn.test/a?Expires=" + at(-time.Hour), -time.Hour},
	} {
		end, ok := expiry(mustURL(t, c.address), now)
		if ok != (c.want != 0) || ok && end.Sub(now) != c.want {
			t.Errorf("%s ends %v from now (%v), want %v", c.address, end.Sub(now), ok, c.want)
		}
	}
}

func FuzzExpiry(f *testing.F) {
	now := newClock().t
	for _, s := range []string{"", "Expires=1", "se=2026-01-02", "X-Amz-Expires=9999999999", "x=~exp=17000000000~", "%zz&exp=170000000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		c := newTargets(func() time.Time { return now })
		u := &url.URL{Scheme: "https", Host: "cdn.test", Path: "/a", RawQuery: query}
		c.remember(content{}, u)
		if held, ok := c.cache.Peek(content{}); ok && (!held.until.After(now) || held.until.Sub(now) > targetLife) {
			t.Errorf("%q is remembered for %v", query, held.until.Sub(now))
		}
	})
}

func TestTargets(t *testing.T) {
	c := newClock()
	memory := newTargets(c.now)
	a := content{"a/b", digest.FromString("a")}
	first, second := mustURL(t, "https://cdn.test/1"), mustURL(t, "https://cdn.test/2")
	memory.remember(a, first)
	if memory.of(a) != first || memory.of(content{"a/c", a.digest}) != nil {
		t.Error("not remembered for its repository, or for another")
	}
	c.advance(targetLife - 1)
	if memory.of(a) != first {
		t.Error("forgotten too early")
	}
	c.advance(1)
	if memory.of(a) != nil {
		t.Error("remembered for too long")
	}

	// The end that the address names counts, with a margin.
	short := mustURL(t, fmt.Sprintf("https://cdn.test/?Expires=%d", c.t.Add(30*time.Second).Unix()))
	memory.remember(a, short)
	c.advance(20*time.Second - 1)
	if memory.of(a) != short {
		t.Error("forgotten too early")
	}
	c.advance(1)
	if memory.of(a) != nil {
		t.Error("remembered to the last")
	}

	// Who fails with an old address does not take the new one away.
	memory.remember(a, second)
	memory.drop(a, first)
	if memory.of(a) != second {
		t.Error("the wrong one was dropped")
	}
	memory.drop(a, second)
	if memory.of(a) != nil {
		t.Error("not dropped")
	}

	for i := range 2 * maxTargets {
		memory.remember(content{fmt.Sprint("r", i), a.digest}, first)
	}
	if n := memory.cache.Len(); n != maxTargets {
		t.Errorf("%d are remembered", n)
	}
}
