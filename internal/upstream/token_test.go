package upstream

import (
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestTokenLimit: a token server that asks to be left alone is.
func TestTokenLimit(t *testing.T) {
	for _, c := range []struct {
		says string // Retry-After
		want time.Duration
	}{{"90", 90 * time.Second}, {"", defaultBlock}, {"86400", longestBlock}} {
		clk := newClock()
		r, _ := manifests(t, regtest.Options{})
		u := open(t, clk, nil, r)
		ask := func(after time.Duration) {
			t.Helper()
			_, err := u.Head(t.Context(), "a/b", latest, true)
			var known *Error
			if !errors.As(err, &known) || known.Kind != RateLimited || known.After != after {
				t.Errorf("Retry-After %q: %v, want %v", c.says, err, after)
			}
		}
		asked := func() int {
			return len(r.Requests(func(req regtest.Request) bool { return req.Server == "token" }))
		}
		header := http.Header{}
		if c.says != "" {
			header.Set("Retry-After", c.says)
		}
		r.Fail(regtest.Fault{Path: "/token", Status: 429, Header: header, Count: 1})
		ask(c.want)
		ask(c.want)
		clk.advance(c.want - time.Second)
		ask(time.Second)
		if n := asked(); n != 1 {
			t.Errorf("Retry-After %q: asked %d times", c.says, n)
		}
		clk.advance(time.Second)
		if _, err := u.Head(t.Context(), "a/b", latest, true); err != nil || asked() != 2 {
			t.Errorf("Retry-After %q: after that %v, asked %d times", c.says, err, asked())
		}
	}
}
