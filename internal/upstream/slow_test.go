package upstream

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
)

// TestSlowOpensTheBreaker: an upstream that takes requests and never answers is
// as dead as one that refuses them; a caller who leaves says nothing of it.
func TestSlowOpensTheBreaker(t *testing.T) {
	hole := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer hole.Close()
	base, err := url.Parse(hole.URL)
	if err != nil {
		t.Fatal(err)
	}
	pool := new(Pool)
	u, err := pool.Open("hole.test", []Endpoint{{URL: base, Origin: true, Pull: true, Resolve: true, Timeouts: Timeouts{time.Minute, time.Minute, time.Minute}}})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	ask := func(cause error) error {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 5*time.Millisecond, cause)
		defer cancel()
		_, err := u.Head(ctx, "a/b", oci.Reference{Tag: "latest"}, false)
		return err
	}
	for range 2 * breakerThreshold {
		if err := ask(errors.New("the caller left")); errors.Is(err, errOpen) {
			t.Fatal("callers who leave have opened the breaker")
		}
	}
	for range breakerThreshold {
		ask(ErrSlow)
	}
	if err := ask(ErrSlow); !errors.Is(err, errOpen) {
		t.Errorf("after %d unanswered requests: %v", breakerThreshold, err)
	}
}
