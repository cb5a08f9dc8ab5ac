package mirror

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

// clock is the time that a mirror and its upstreams live in.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// bench is a mirror of one fake registry, with a clock of its own.
type bench struct {
	*clock
	t        testing.TB
	dir      string
	registry *regtest.Registry
	pool     upstream.Pool
	upstream *Upstream
	site     *Site
	mirror   *Mirror
	store    storage.Store
	tree     *tree.Tree
	notes    func(tree.Change) // nil: nobody is told but the mirror
	room     func(context.Context, int64) bool
	logs     *observer.ObservedLogs
	agent    string // User-Agent of the requests
	events   chan string
}

// newBench starts one, which asks as the user that the registry knows. policy
// changes the upstream, unless it is nil.
func newBench(t testing.TB, options regtest.Options, policy func(*Upstream)) *bench {
	t.Helper()
	b := &bench{
		clock: &clock{at: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)},
		t:     t, dir: t.TempDir(), registry: regtest.New(t, options), events: make(chan string, 1000),
	}
	b.pool.Now, b.pool.Pause = b.now, time.Millisecond
	address, err := url.Parse(b.registry.URL)
	if err != nil {
		t.Fatal(err)
	}
	client, err := b.pool.Open("reg.example", []upstream.Endpoint{{URL: address, Origin: true, Pull: true, Resolve: true, AllowPrivate: true, Credentials: upstream.Credentials{User: options.User, Secret: options.Secret}}})
	if err != nil {
		t.Fatal(err)
	}
	b.upstream = &Upstream{Name: "reg.example", PathName: "reg.example", Prefix: "reg.example", TagTTL: time.Minute, Connections: 1, Client: client}
	if policy != nil {
		policy(b.upstream)
	}
	all, err := NewUpstreams([]*Upstream{b.upstream})
	if err != nil {
		t.Fatal(err)
	}
	if b.site, err = NewSite(SiteConfig{Upstreams: all, Default: "reg.example"}); err != nil {
		t.Fatal(err)
	}
	b.open()
	t.Cleanup(func() {
		b.close()
		all.Close()
	})
	return b
}

func (b *bench) open() {
	b.store = disktest.Open(b.t, b.dir)
	b.start()
}

// start starts a mirror on the store.
func (b *bench) start() {
	core, logs := observer.New(zap.InfoLevel)
	b.logs = logs
	b.tree = tree.New(b.store, func(c tree.Change) {
		if m := b.mirror; m != nil {
			m.Note(c)
		}
		if b.notes != nil {
			b.notes(c)
		}
	})
	b.mirror = New(Parts{Store: b.store, Tree: b.tree, Room: b.room, Log: zap.New(core)})
	b.mirror.now = b.now
	b.mirror.Set(Settings{Hot: DefaultHot, Emit: func(event string, _ map[string]any) {
		select {
		case b.events <- event:
		default: // nobody looks at so many
		}
	}})
}

func (b *bench) close() {
	b.mirror.Close()
	b.tree.Close()
	b.mirror = nil
	b.store.Close()
}

// restart forgets what is only in memory.
func (b *bench) restart() {
	b.close()
	b.open()
}

// ask sends a request with the given headers, name and value in turn.
func (b *bench) ask(method, path string, headers ...string) *httptest.ResponseRecorder {
	b.t.Helper()
	r := httptest.NewRequest(method, "http://mirror.example/v2/"+path, nil).WithContext(b.t.Context())
	r.Header.Set("User-Agent", b.agent)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	route, _ := oci.ParsePath(r.URL.Path)
	w := httptest.NewRecorder()
	b.site.ServeHTTP(b.mirror, w, r, route, access.Caller{})
	return w
}

// wantManifest asks for a manifest and checks that it is the image's.
func (b *bench) wantManifest(path string, image regtest.Image, headers ...string) http.Header {
	b.t.Helper()
	w := b.ask("GET", path, headers...)
	if w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), image.Data) {
		b.t.Errorf("%s: %d %.300s", path, w.Code, w.Body)
	}
	return w.Header()
}

func (b *bench) wantStatus(status int, method, path string, headers ...string) http.Header {
	b.t.Helper()
	w := b.ask(method, path, headers...)
	if w.Code != status {
		b.t.Errorf("%s %s: %d, want %d: %.300s", method, path, w.Code, status, w.Body)
	}
	return w.Header()
}

// asked returns the requests at the registry since the last time, tokens aside.
func (b *bench) asked() string {
	var asked []string
	for _, r := range b.registry.Requests(func(r regtest.Request) bool { return r.Server == "registry" && r.Status != http.StatusUnauthorized }) {
		asked = append(asked, r.Method+" "+r.Path[strings.LastIndexByte(r.Path, '/')+1:])
	}
	b.registry.Forget()
	return strings.Join(asked, ", ")
}

func (b *bench) wantAsked(want string) {
	b.t.Helper()
	if got := b.asked(); got != want {
		b.t.Errorf("the upstream was asked %q, want %q", got, want)
	}
}

func (b *bench) wantCache(header http.Header, want string) {
	b.t.Helper()
	if got := header.Get("Cache-Status"); !strings.Contains(got, want) {
		b.t.Errorf("Cache-Status %q, want %q", got, want)
	}
}

func (b *bench) wantEvent(want string) {
	b.t.Helper()
	select {
	case got := <-b.events:
		if got != want {
			b.t.Errorf("event %s, want %s", got, want)
		}
	case <-time.After(time.Minute):
		b.t.Errorf("no event %s", want)
	}
}

// eventually waits for something that happens behind.
func (b *bench) eventually(what string, holds func() bool) {
	b.t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			b.t.Fatal("not in time: " + fmt.Sprint(what))
		}
	}
}
