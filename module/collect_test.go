package module

import (
	"context"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// TestCollectTwice: two stores whose mirrors ask the same registry as the same
// user have one budget, which was told of to one of them last. A registry as
// pedantic as Caddy's would give nothing at all if a series came twice.
func TestCollectTwice(t *testing.T) {
	const account = "robot\xff" // and no label
	up := regtest.New(t, regtest.Options{User: account, Secret: "s"})
	up.Push("a/b", regtest.NewImage("x"), "latest")
	base, err := url.Parse(up.URL)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	for name, remaining := range map[string]string{"one store": "80", "another": "70"} {
		value, loaded := states.LoadOrStore(name, &state{identity: name, closed: make(chan struct{})})
		s := value.(*state)
		if loaded {
			t.Fatalf("%s is there already", name)
		}
		s.users.Store(1)
		t.Cleanup(func() {
			if err := s.unuse(); err != nil {
				t.Error(err)
			}
			<-s.closed
		})
		later := time.Duration(0)
		if remaining == "70" {
			later = time.Second
		}
		s.endpoints.Now = func() time.Time { return now.Add(later) }
		client, err := s.endpoints.Open("docker.io", []upstream.Endpoint{{
			URL: base, Origin: true, Pull: true, Resolve: true, AllowPrivate: true, Credentials: upstream.Credentials{User: account, Secret: "s"},
			Proxy:    func(*http.Request) (*url.URL, error) { return nil, nil },
			Timeouts: upstream.Timeouts{Connect: time.Minute, Header: time.Minute, Stall: time.Minute},
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(client.Close)
		up.Heal()
		up.Fail(regtest.Fault{Path: "/manifests/", Header: http.Header{"Ratelimit-Limit": {"100;w=60"}, "Ratelimit-Remaining": {remaining + ";w=60"}}})
		if _, err := client.Head(context.Background(), "a/b", oci.Reference{Tag: "latest"}, true); err != nil {
			t.Fatal(err)
		}
	}
	registry := prometheus.NewPedanticRegistry()
	for range 2 {
		if err := registerMetrics(registry); err != nil {
			t.Fatal(err)
		}
	}
	want := func(want map[string]float64) {
		t.Helper()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, family := range families {
			for _, metric := range family.Metric {
				if label := metric.Label[0]; label.GetName() != "account" || label.GetValue() != "robot\uFFFD" {
					t.Errorf("%s: %v", family.GetName(), metric.Label)
				}
				got[strings.TrimPrefix(family.GetName(), "caddy_registry_upstream_ratelimit_")] += metric.GetGauge().GetValue()
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
	want(map[string]float64{"limit": 100, "remaining": 70, "window_seconds": 60})
	now = now.Add(time.Minute) // nobody knows what is left after the window
	want(map[string]float64{"limit": 100, "window_seconds": 60})
}
