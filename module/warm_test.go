package module_test

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// hide takes the store's content away from the mirror, and gives it back.
func (m *mirror) hide() (show func()) {
	m.t.Helper()
	from, to := filepath.Join(m.dir, "docker"), filepath.Join(m.dir, "hidden")
	if err := os.Rename(from, to); err != nil {
		m.t.Fatal(err)
	}
	return func() {
		if err := os.Rename(to, from); err != nil {
			m.t.Fatal(err)
		}
	}
}

// TestWarmWithoutStore: what is warm is served by tag and by digest, manifests
// and configs, while the store cannot be read and the upstream is down.
func TestWarmWithoutStore(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 100_000))
	up.Push("library/x", image, "latest")
	app := upstreamFor("docker.io", up, "tag_ttl 1h")
	m := start(t, app, "")
	paths := map[string][]byte{
		"/v2/library/x/manifests/latest":                         image.Data,
		"/v2/library/x/manifests/" + image.Digest.String():       image.Data,
		"/v2/library/x/blobs/" + image.Blobs[0].Digest.String():  image.Blobs[0].Data,
		"/v2/docker.io/library/x/manifests/latest":               image.Data,
		"/v2/library/x/manifests/latest?ns=registry-1.docker.io": image.Data,
	}
	// served reports whether everything is.
	served := func() bool {
		for path, want := range paths {
			for _, method := range []string{"GET", "HEAD"} {
				a := m.do(method, path)
				if a.StatusCode != http.StatusOK || method == "GET" && string(a.body) != string(want) {
					return false
				}
			}
		}
		return true
	}
	up.Down()
	defer up.Up()
	for _, step := range []struct {
		cache string
		warm  bool
	}{{"", true}, {"hot_cache off\n", false}, {"hot_cache 1MiB\n", true}} {
		up.Up()
		if err := m.load(step.cache+app, ""); err != nil {
			t.Fatal(err)
		}
		m.pull("library/x", "latest", image)
		up.Down()
		eventually(t, "everything to be held", served)
		if step.warm {
			// Memory shows what it was given some time later.
			eventually(t, "everything to be warm", func() bool {
				show := m.hide()
				defer show()
				return served()
			})
			continue
		}
		show := m.hide()
		if served() {
			t.Error("served without a store and without memory")
		}
		show()
	}
}

// TestOffline: with the upstream down everything that is held is served, at once
// and also after a restart.
func TestOffline(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 3<<20))
	up.Push("library/x", image, "latest")
	app := upstreamFor("docker.io", up, "tag_ttl 0")
	m := start(t, app, "")
	m.pull("library/x", "latest", image)
	up.Down()
	for _, restart := range []bool{false, true} {
		fastest := time.Hour
		for range 5 {
			if restart {
				m.stop()
				if err := m.load(app, ""); err != nil {
					t.Fatal(err)
				}
			}
			m.pull("library/x", "latest", image)
			fastest = min(fastest, m.firstByte("/v2/library/x/manifests/latest"))
		}
		// Not that it is fast on a machine that has other things to do, but that
		// nothing is waited for.
		if fastest > 50*time.Millisecond {
			t.Errorf("first byte after %v at best; restarted: %v", fastest, restart)
		}
	}
	if a := m.want(200, "GET", "/v2/library/x/manifests/latest"); !strings.HasPrefix(a.Header.Get("Warning"), "299 - ") {
		t.Errorf("no warning: %v", a.Header)
	}
}

// firstByte is how long a request waits for an answer.
func (m *mirror) firstByte(path string) (after time.Duration) {
	m.t.Helper()
	began := time.Now()
	ctx := httptrace.WithClientTrace(m.t.Context(), &httptrace.ClientTrace{GotFirstResponseByte: func() { after = time.Since(began) }})
	r, err := http.NewRequestWithContext(ctx, "GET", m.URL+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	return after
}

// recorder is an event handler.
type recorder struct{}

var recorded = make(chan caddy.Event, 100)

func init() { caddy.RegisterModule(recorder{}) }

func (recorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.recorder", New: func() caddy.Module { return new(recorder) }}
}

func (*recorder) Handle(_ context.Context, e caddy.Event) error {
	recorded <- e
	return nil
}

var _ caddyevents.Handler = (*recorder)(nil)

// TestEvents: what an operator may want to act on is told to Caddy's event
// handlers, those of the configuration that runs.
func TestEvents(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	m := start(t, "", "")
	load := func(event string) {
		t.Helper()
		m.subscribe(upstreamFor("docker.io", up, "tag_ttl 0"), event)
	}
	wants := func(event string) {
		t.Helper()
		select {
		case e := <-recorded:
			if e.Name() != event || e.Data["upstream"] != "docker.io" || e.Data["reference"] != "docker.io/library/x:latest" || e.Data["error"] == "" {
				t.Errorf("event %s, %v; want %s", e.Name(), e.Data, event)
			}
		case <-time.After(time.Minute):
			t.Errorf("no event %s", event)
		}
	}
	load("upstream_denied")
	m.pull("library/x", "latest", image)
	up.Fail(regtest.Fault{Path: "/manifests/", Status: http.StatusForbidden})
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	wants("upstream_denied")
	load("upstream_down")
	up.Heal()
	up.Down()
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	wants("upstream_down")
	up.Up()
}
