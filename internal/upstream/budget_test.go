package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

func told(limit, remaining string) http.Header {
	h := http.Header{}
	h.Set("RateLimit-Limit", limit)
	h.Set("RateLimit-Remaining", remaining)
	return h
}

func TestObserve(t *testing.T) {
	c := newClock()
	b := &budget{now: c.now}
	if got := b.rateLimit(); got != (RateLimit{}) {
		t.Errorf("%+v before anything was said", got)
	}
	b.observe(told("100;w=21600", "76;w=21600"))
	want := RateLimit{Limit: 100, Remaining: 76, Window: 6 * time.Hour, At: c.t}
	if got := b.rateLimit(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	c.advance(time.Hour)
	for _, useless := range []http.Header{{}, told("", "5"), told("100", ""), told("x", "5"), told("100;w=21600", "-1"), told("-1", "1")} {
		b.observe(useless)
	}
	if got := b.rateLimit(); got != want {
		t.Errorf("%+v after nothing was said, want %+v", got, want)
	}
	b.observe(told("200", "0"))
	if got, want := b.rateLimit(), (RateLimit{Limit: 200, At: c.t}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestWithhold(t *testing.T) {
	for _, c := range []struct {
		limit, remaining string
		after            time.Duration // since it was said
		want             time.Duration // 0: it passes
	}{
		{"100;w=21600", "11;w=21600", 0, 0},
		{"100;w=21600", "10;w=21600", 0, 6 * time.Hour},
		{"100;w=21600", "0;w=21600", 0, 6 * time.Hour},
		{"100;w=21600", "7;w=21600", 6*time.Hour - time.Second, time.Second},
		{"100;w=21600", "7;w=21600", 6 * time.Hour, 0},
		{"109;w=60", "10;w=60", 0, time.Minute},
		{"109;w=60", "11;w=60", 0, 0},
		{"9;w=60", "1;w=60", 0, 0},
		{"9;w=60", "0;w=60", 0, time.Minute},
		{"0;w=21600", "0;w=21600", 0, 0},
		{"100", "0", 0, 0}, // for how long is not said
		{"100;w=21600", "1000;w=21600", 0, 0},
		{"100;w=99999999999999", "0;w=1", 0, 24 * time.Hour},
		{"100;w=99999999999999", "0;w=1", 24 * time.Hour, 0},
		{"9223372036854775807;w=60", "9223372036854775807;w=60", 0, 0},
		{"9223372036854775807;w=60", "1;w=60", 0, time.Minute},
	} {
		clk := newClock()
		b := &budget{now: clk.now}
		if err := b.withhold(); err != nil {
			t.Errorf("before anything was said: %v", err)
		}
		b.observe(told(c.limit, c.remaining))
		clk.advance(c.after)
		var got time.Duration
		if err := b.withhold(); err != nil {
			got = err.After
			if err.Kind != RateLimited || got <= 0 {
				t.Errorf("%s of %s after %v: %+v", c.remaining, c.limit, c.after, err)
			}
		}
		if got != c.want {
			t.Errorf("%s of %s after %v: withheld for %v, want %v", c.remaining, c.limit, c.after, got, c.want)
		}
	}
}

func TestWithholdSaysWhy(t *testing.T) {
	c := newClock() // 03:04:05 UTC
	b := &budget{now: c.now}
	b.observe(told("100;w=21600", "7;w=21600"))
	const want = "7 of 100 requests are left until 09:04 UTC, and are kept for what is not held here"
	if err := b.withhold(); err == nil || err.Reason != want {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestExhausted: what was said at which minute, and when it will be used up.
func TestExhausted(t *testing.T) {
	const hour, day = 60, 24 * 60
	type said struct {
		minute, limit, remaining, window int // the window in minutes
	}
	const w = 6 * hour
	for name, c := range map[string]struct {
		said []said
		at   int // the minute of the question
		want int // the minute of exhaustion; -1: not in sight
	}{
		"nothing":                    {nil, 0, -1},
		"once":                       {[]said{{0, 100, 90, w}}, 10, -1},
		"no use":                     {[]said{{0, 100, 90, w}, {10, 100, 90, w}}, 20, -1},
		"steady use":                 {[]said{{0, 100, 100, w}, {10, 100, 80, w}, {20, 100, 60, w}}, 20, 20 + 30},
		"idle since":                 {[]said{{0, 100, 100, w}, {10, 100, 80, w}, {20, 100, 60, w}}, 40, 40 + 60},
		"too slow to get there":      {[]said{{0, 100, 100, w}, {100, 100, 90, w}}, 100, -1},
		"just in sight":              {[]said{{0, 120, 120, w}, {120, 120, 90, w}}, 120, 120 + 360},
		"used up":                    {[]said{{0, 100, 100, w}, {10, 100, 0, w}}, 30, 10},
		"used up from the beginning": {[]said{{10, 100, 0, w}}, 30, 10},
		"used up, long ago":          {[]said{{10, 100, 0, w}}, 10 + w, -1},
		"long ago":                   {[]said{{0, 100, 100, w}, {10, 100, 10, w}}, 10 + w, -1},
		"refilled":                   {[]said{{0, 100, 100, w}, {10, 100, 10, w}, {20, 100, 100, w}}, 30, -1},
		"use after a refill":         {[]said{{0, 100, 100, w}, {10, 100, 10, w}, {20, 100, 95, w}, {30, 100, 85, w}}, 30, 30 + 85},
		"refilled above the oldest":  {[]said{{0, 100, 50, w}, {10, 100, 49, w}, {20, 100, 52, w}, {30, 100, 42, w}}, 30, 30 + 42},
		"an answer overtaken":        {[]said{{0, 100, 100, w}, {20, 100, 59, w}, {20, 100, 60, w}}, 20, 20 + 30},
		"another limit":              {[]said{{0, 200, 200, w}, {10, 100, 50, w}}, 10, -1},
		"another window":             {[]said{{0, 100, 100, day}, {10, 100, 50, w}}, 10, -1},
		"only what is in the window": {[]said{{0, 1000, 1000, w}, {300, 1000, 700, w}, {400, 1000, 200, w}}, 400, 400 + 40},
		"the question comes later":   {[]said{{0, 1000, 1000, w}, {300, 1000, 700, w}, {350, 1000, 200, w}}, 400, 400 + 40},
		"no window":                  {[]said{{0, 100, 100, 0}, {10, 100, 50, 0}}, 10, -1},
		"a limit of 0":               {[]said{{0, 0, 0, w}}, 0, -1},
		"more than the limit":        {[]said{{0, 10, 400, w}, {10, 10, 380, w}}, 10, 10 + 190},
		// Three requests at once, spread over the window's 64th part.
		"one pull":      {[]said{{0, 100, 100, 64}, {0, 100, 99, 64}, {0, 100, 98, 64}}, 0, 0 + 49},
		"a short burst": {[]said{{0, 100, 100, 16 * hour}, {5, 100, 97, 16 * hour}}, 10, 10 + 485},
	} {
		clk := newClock()
		begin := clk.t
		minute := func(n int) time.Time { return begin.Add(time.Duration(n) * time.Minute) }
		b := &budget{now: clk.now}
		for _, s := range c.said {
			clk.t = minute(s.minute)
			suffix := ""
			if s.window > 0 {
				suffix = fmt.Sprintf(";w=%d", s.window*60)
			}
			b.observe(told(fmt.Sprint(s.limit, suffix), fmt.Sprint(s.remaining, suffix)))
		}
		clk.t = minute(c.at)
		var want time.Time
		if c.want >= 0 {
			want = minute(c.want)
		}
		if got := b.exhausted(); got.Sub(want).Abs() > time.Millisecond {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

// TestSamplesAreBounded: however often something is said, and the oldest that
// counts is there all the same.
func TestSamplesAreBounded(t *testing.T) {
	c := newClock()
	b := &budget{now: c.now}
	const remaining = 100_000
	for i := range 20_000 { // 5.5 hours, one a second
		c.advance(time.Second)
		b.observe(told("100000;w=3600", fmt.Sprintf("%d;w=3600", remaining-i)))
	}
	if n := len(b.samples); n > maxSamples {
		t.Errorf("%d samples, want no more than %d", n, maxSamples)
	}
	if age := c.t.Sub(b.samples[0].at); age < time.Hour*(maxSamples-1)/maxSamples || age >= time.Hour {
		t.Errorf("the oldest sample has %v, want nearly the window", age)
	}
	b.observe(told("100000;w=3600", "600;w=3600"))
	if got := b.exhausted().Sub(c.t); got > time.Minute {
		t.Errorf("used up in %v", got)
	}
}

// manifests is a registry with a tag, that says how much of a limit is left.
func manifests(t *testing.T, opts regtest.Options) (r *regtest.Registry, left func(remaining string)) {
	t.Helper()
	r = regtest.New(t, opts)
	r.Push("a/b", regtest.NewImage("x"), "latest")
	return r, func(remaining string) {
		r.Heal()
		r.Fail(regtest.Fault{Path: "/manifests/", Header: told("100;w=21600", remaining+";w=21600")})
	}
}

var latest = oci.Reference{Tag: "latest"}

// TestLastTenth: it is spent on what must be had alone, until the window is
// over; nothing of that harms the endpoint.
func TestLastTenth(t *testing.T) {
	c := newClock()
	r, left := manifests(t, regtest.Options{})
	u := open(t, c, nil, r)
	ctx := t.Context()
	ask := func(must bool, want error) {
		t.Helper()
		_, err := u.Head(ctx, "a/b", latest, must)
		if (err == nil) != (want == nil) {
			t.Errorf("HEAD, must %v: %v", must, err)
		}
		if _, err = u.Manifest(ctx, "a/b", latest, must); (err == nil) != (want == nil) {
			t.Errorf("GET, must %v: %v", must, err)
		}
	}
	errWithheld := errors.New("withheld")

	left("11")
	ask(false, nil)
	left("10")
	ask(true, nil)
	r.Forget()
	for range 2 * breakerThreshold { // withheld, they are no failures
		ask(false, errWithheld)
	}
	if n := len(r.Requests(func(regtest.Request) bool { return true })); n != 0 {
		t.Errorf("%d requests came that were to be withheld", n)
	}
	_, err := u.Head(ctx, "a/b", latest, false)
	var refusal *Error
	if !errors.As(err, &refusal) || refusal.Kind != RateLimited || refusal.After != 6*time.Hour || refusal.Upstream != "reg.test" || refusal.Endpoint != r.URL || !refusal.Origin ||
		!strings.Contains(err.Error(), "10 of 100 requests are left until 09:04 UTC") || strings.Contains(err.Error(), "answers") {
		t.Errorf("%v: %+v", err, refusal)
	}
	e := u.endpoints[0].endpoint
	if e.health.open() || e.health.failures != 0 || !e.health.limited.IsZero() {
		t.Errorf("what was withheld has changed the endpoint's health: %+v", e.health)
	}
	// A blob and a list of tags are asked for all the same.
	if _, _, err := u.Tags(ctx, "a/b", 0, ""); err != nil {
		t.Error(err)
	}
	if _, err := u.BlobSize(ctx, "a/b", digest.FromString("{}")); !errors.As(err, &refusal) || refusal.Kind != NotFound {
		t.Errorf("the size of a blob: %v", err)
	}
	ask(true, nil)

	// Each answer begins the wait anew, since it says so of that time.
	c.advance(6*time.Hour - time.Second)
	ask(true, nil)
	c.advance(6*time.Hour - time.Minute)
	ask(false, errWithheld)
	left("99")
	c.advance(time.Minute)
	ask(false, nil)

	// The answer to a single request can be the one that tells of more.
	left("3")
	ask(true, nil)
	ask(false, errWithheld)
	left("80")
	ask(true, nil)
	ask(false, nil)
}

// TestLastTenthOf429: an answer that refuses tells of the budget too.
func TestLastTenthOf429(t *testing.T) {
	c := newClock()
	r, _ := manifests(t, regtest.Options{})
	u := open(t, c, nil, r)
	header := told("100;w=21600", "0;w=21600")
	header.Set("Retry-After", "60")
	r.Fail(regtest.Fault{Path: "/manifests/", Status: 429, Header: header})
	_, err := u.Head(t.Context(), "a/b", latest, false)
	if err == nil || !strings.Contains(err.Error(), "0 of 100 requests are left") {
		t.Errorf("%v does not tell of the limit", err)
	}
	r.Heal()
	r.Forget()
	c.advance(time.Minute)
	if _, err := u.Head(t.Context(), "a/b", latest, false); err == nil || r.Count("HEAD", "") != 0 {
		t.Errorf("after Retry-After, and with nothing left: %v", err)
	}
	if _, err := u.Head(t.Context(), "a/b", latest, true); err != nil {
		t.Errorf("what must be had: %v", err)
	}
}

// TestLastTenthElsewhere: the next endpoint is asked, and one that has a
// budget left for what must be had is not passed over for that.
func TestLastTenthElsewhere(t *testing.T) {
	first, left := manifests(t, regtest.Options{})
	origin, _ := manifests(t, regtest.Options{})
	u := open(t, newClock(), nil, first, origin)
	left("5")
	from := func(must bool) string {
		t.Helper()
		got, err := u.Head(t.Context(), "a/b", latest, must)
		if err != nil || got == nil {
			t.Fatalf("must %v: %v", must, err)
		}
		return got.From
	}
	if from(true) != first.URL || from(false) != origin.URL || from(true) != first.URL {
		t.Error("the wrong endpoints were asked")
	}
}

// TestBudgetOfAnother: what the place that a redirect leads to says of limits
// is not about the registry.
func TestBudgetOfAnother(t *testing.T) {
	r, layer, source := pushed(t, newClock(), regtest.Options{}, 1000)
	r.Fail(regtest.Fault{Path: "/blobs/", Header: told("100;w=21600", "1;w=21600")})
	if _, _, err := fetch(source, 0, -1); err != nil {
		t.Fatal(err)
	}
	if len(r.Fetches(layer.Digest)) != 1 {
		t.Fatal("it did not come from the CDN")
	}
	if got := source.(blob).endpoint.budget.rateLimit(); got != (RateLimit{}) {
		t.Errorf("%+v", got)
	}
}

func TestBudgets(t *testing.T) {
	c := newClock()
	r, left := manifests(t, regtest.Options{User: "robot", Secret: "s"})
	silent := regtest.New(t, regtest.Options{})
	silent.Push("a/b", regtest.NewImage("x"), "latest")
	pool := &Pool{Now: c.now}
	opened := func(name, user string, r *regtest.Registry, stall time.Duration) *Upstream {
		t.Helper()
		e := Endpoint{URL: mustURL(t, r.URL), Origin: true, Pull: true, Resolve: true, AllowPrivate: true, Proxy: noProxy, Timeouts: Timeouts{time.Minute, time.Minute, stall}}
		if user != "" {
			e.Credentials = Credentials{user, "s"}
		}
		u, err := pool.Open(name, []Endpoint{e})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(u.Close)
		return u
	}
	ask := func(u *Upstream) {
		t.Helper()
		if _, err := u.Head(context.Background(), "a/b", latest, true); err != nil {
			t.Fatal(err)
		}
	}
	want := func(why string, want ...Budget) {
		t.Helper()
		if got := pool.Budgets(); !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n%+v, want\n%+v", why, got, want)
		}
	}
	u := opened("b.test", "robot", r, time.Minute)
	quiet := opened("silent.test", "", silent, time.Minute)
	ask(quiet)
	want("nothing was said")

	left("90")
	ask(u)
	c.advance(10 * time.Minute)
	left("80")
	ask(u)
	robot := Budget{"b.test", r.URL, "robot", RateLimit{100, 80, 6 * time.Hour, c.t}, false, c.t.Add(80 * time.Minute)}
	want("one account", robot)

	left("50")
	ask(u.Anonymous())
	nobody := Budget{"b.test", r.URL, "", RateLimit{100, 50, 6 * time.Hour, c.t}, false, time.Time{}}
	want("two accounts", nobody, robot)

	other := opened("a.test", "", r, time.Minute) // has the same endpoint as nobody
	aliased := nobody
	aliased.Upstream = "a.test"
	want("two names", aliased, nobody, robot)

	again := opened("b.test", "", r, time.Hour)
	c.advance(time.Second)
	left("49")
	ask(again)
	newer := Budget{"b.test", r.URL, "", RateLimit{100, 49, 6 * time.Hour, c.t}, false, time.Time{}}
	robot.Exhausted = c.t.Add(time.Duration(80 * float64(10*time.Minute+time.Second) / 10))
	want("two settings", aliased, newer, nobody, robot)
	again.Close()
	other.Close()
	want("closed", nobody, robot)

	c.advance(6 * time.Hour)
	nobody.Over, robot.Over, robot.Exhausted = true, true, time.Time{}
	want("the window is over", nobody, robot)
	u.Close()
	want("all closed")

	silent.Fail(regtest.Fault{Path: "/manifests/", Header: told("100", "50")})
	ask(quiet)
	said := RateLimit{Limit: 100, Remaining: 50, At: c.t}
	c.advance(time.Hour)
	want("no window", Budget{Upstream: "silent.test", Endpoint: silent.URL, RateLimit: said})
}

func TestRateField(t *testing.T) {
	for _, c := range []struct {
		in     string
		n      int
		window time.Duration
		ok     bool
	}{
		{"100;w=21600", 100, 6 * time.Hour, true},
		{"100; w=21600", 100, 6 * time.Hour, true},
		{" 100 ;x=1;w=60;y", 100, time.Minute, true},
		{"0;w=60", 0, time.Minute, true},
		{"100", 100, 0, true},
		{"100;w=", 100, 0, true},
		{"100;w=-60", 100, 0, true},
		{"100;w=x", 100, 0, true},
		{"", 0, 0, false},
		{";w=60", 0, 0, false},
		{"-1;w=60", 0, 0, false},
		{"x", 0, 0, false},
		{"1e3", 0, 0, false},
		{"99999999999999999999", 0, 0, false},
	} {
		n, window, ok := rateField(c.in)
		if n != c.n || window != c.window || ok != c.ok {
			t.Errorf("rateField(%q) = %d, %v, %v; want %d, %v, %v", c.in, n, window, ok, c.n, c.window, c.ok)
		}
	}
}

func FuzzRateField(f *testing.F) {
	for _, s := range []string{"", "100;w=21600", "100", ";w=1", "0;w=9223372037", "0;w=99999999999999", "1;w=1;w=2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, window, ok := rateField(s)
		if n < 0 || window < 0 || !ok && (n != 0 || window != 0) {
			t.Errorf("rateField(%q) = %d, %v, %v", s, n, window, ok)
		}
	})
}
