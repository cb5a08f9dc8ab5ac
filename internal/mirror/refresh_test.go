package mirror

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestFind(t *testing.T) {
	pin := digest.FromString("x").String()
	for _, c := range []struct {
		ref    string
		stored string // and the upstream and its name for it
		up     string
		name   string
		want   string // reference
	}{
		{"alpine", "docker.io/library/alpine", "docker.io", "library/alpine", "latest"},
		{"alpine:3.20", "docker.io/library/alpine", "docker.io", "library/alpine", "3.20"},
		{"org/app", "docker.io/org/app", "docker.io", "org/app", "latest"},
		{"corp/app", "docker.io/corp/app", "docker.io", "corp/app", "latest"}, // no path name
		{"docker.io/alpine", "docker.io/library/alpine", "docker.io", "library/alpine", "latest"},
		{"docker.io/library/alpine:3.20", "docker.io/library/alpine", "docker.io", "library/alpine", "3.20"},
		{"index.docker.io/org/app:V1", "docker.io/org/app", "docker.io", "org/app", "V1"},
		{"ghcr.io/org/app:v1", "ghcr.io/org/app", "ghcr.io", "org/app", "v1"},
		{"GHCR.IO:443/org/app", "ghcr.io/org/app", "ghcr.io", "org/app", "latest"},
		{"ghcr.io/app", "ghcr.io/app", "ghcr.io", "app", "latest"},
		{"registry.corp:5000/x:1", "registry.corp__5000/x", "registry.corp:5000", "x", "1"},
		{"registry.corp:5000/x", "registry.corp__5000/x", "registry.corp:5000", "x", "latest"},
		{"images.corp/x:1", "mirrors/corp/x", "images.corp", "x", "1"},
		{"bare.corp/a/x:1", "a/x", "bare.corp", "a/x", "1"},
		{"gcr.io/google.com/p/x", "gcr.io/google.com/p/x", "gcr.io", "google.com/p/x", "latest"},
		{"k8s.gcr.io/pause:3", "registry.k8s.io/pause", "registry.k8s.io", "pause", "3"},
		{"us-docker.pkg.dev/p/r/i:1", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", "p/r/i", "1"},
		{"alpine:3@" + pin, "docker.io/library/alpine", "docker.io", "library/alpine", pin},
		{"ghcr.io/org/app@" + pin, "ghcr.io/org/app", "ghcr.io", "org/app", pin},
		{"registry.corp:5000", "docker.io/library/registry.corp", "docker.io", "library/registry.corp", "5000"},
	} {
		u := newUpstreams(t, siteList(t))
		target, ref, err := u.Find(c.ref)
		if err != nil {
			t.Errorf("%s: %v", c.ref, err)
			continue
		}
		if target.Upstream.Name != c.up || target.Name != c.name || target.Repository != c.stored || ref.String() != c.want {
			t.Errorf("%s: %s of %s, stored as %s, %s", c.ref, target.Name, target.Upstream.Name, target.Repository, ref)
		}
		// It is what clients are given that name the registry.
		site, err := NewSite(SiteConfig{Upstreams: u})
		if err != nil {
			t.Fatal(err)
		}
		resolved, err := site.Resolve(self, "ns="+url.QueryEscape(c.up), c.name)
		if resolved.Namespace = ""; err != nil || resolved != target {
			t.Errorf("%s: %+v, and a client is given %+v: %v", c.ref, target, resolved, err)
		}
	}
}

func TestFindNothing(t *testing.T) {
	u := newUpstreams(t, siteList(t))
	pattern, err := oci.ParsePattern("apps/**")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSite(SiteConfig{Upstreams: u, Hosted: []oci.Pattern{pattern}}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		ref    string
		status int
		says   string
	}{
		{"evil.example/x", 404, "add `upstream evil.example`"},
		{"localhost/x", 404, "add `upstream localhost`"},
		{"Corp/x", 404, "add `upstream corp`"},
		{"alpine:3/x", 404, "alpine:3"},
		{"*.pkg.dev/p/x", 404, "add `upstream"},
		{"a.b.pkg.dev/p/x", 404, "add `upstream"},
		{"\x1b[31m.x/y", 404, "`upstream ?[31m.x`"},
		{"", 400, "repository name"},
		{"Alpine", 400, "Alpine"},
		{"ghcr.io/", 400, "repository name"},
		{"ghcr.io/Org/app", 400, "Org/app"},
		{"alpine:", 400, "tag"},
		{"alpine:-x", 400, "-x"},
		{"a:b:c", 400, "a:b"},
		{"alpine@", 400, "digest"},
		{"alpine@sha256:abc", 400, "sha256:abc"},
		{"alpine:-x@" + digest.FromString("x").String(), 400, "-x"},
		{"docker://alpine", 400, "docker://"},
		{"ghcr.io/" + strings.Repeat("x", 256), 400, "255"},
		// What would lie among a site's own images must not be claimed for an
		// upstream, nor what lies among another's.
		{"bare.corp/apps/web", 404, "hosts"},
		{"bare.corp/ghcr.io/org/app", 404, "ghcr.io"},
	} {
		target, ref, err := u.Find(c.ref)
		if err == nil || target != (Target{}) || ref != (oci.Reference{}) {
			t.Errorf("%q: found %+v %s: %v", c.ref, target, ref, err)
			continue
		}
		status, message := Explain(err, "")
		if status != c.status || !strings.Contains(message, c.says) || strings.Contains(message, "\x1b") {
			t.Errorf("%q: %d %q", c.ref, status, message)
		}
	}
}

// siteList are the registries that siteOptions.site knows.
func siteList(t testing.TB) []*Upstream {
	named := known(t, "images.corp")
	named.PathName, named.Prefix = "corp", "mirrors/corp"
	bare := known(t, "bare.corp")
	bare.Prefix = ""
	return builtin(t, known(t, "registry.corp:5000"), known(t, "own.pkg.dev"), named, bare)
}

// refreshing is a mirror of one repository of a fake registry.
type refreshing struct {
	*Mirror
	t        *testing.T
	registry *regtest.Registry
	url      string // of the endpoint, which passes on to the registry
	target   Target
	// answered runs when the registry has answered the next HEAD, before
	// the answer is passed on.
	answered atomic.Pointer[func()]
}

var tagV1 = oci.Reference{Tag: "v1"}

func newRefreshing(t *testing.T, opts regtest.Options, repository string, store storage.Store, credentials upstream.Credentials) *refreshing {
	registry := regtest.New(t, opts)
	address, err := url.Parse(registry.URL)
	if err != nil {
		t.Fatal(err)
	}
	r := new(refreshing)
	proxy := httputil.NewSingleHostReverseProxy(address)
	proxy.ModifyResponse = func(resp *http.Response) error {
		if resp.Request.Method == http.MethodHead {
			if f := r.answered.Swap(nil); f != nil {
				(*f)()
			}
		}
		return nil
	}
	proxy.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	transport := new(http.Transport)
	proxy.Transport = transport
	t.Cleanup(transport.CloseIdleConnections)
	between := httptest.NewServer(proxy)
	t.Cleanup(between.Close)
	if address, err = url.Parse(between.URL); err != nil {
		t.Fatal(err)
	}
	client, err := new(upstream.Pool).Open("reg.example", []upstream.Endpoint{{URL: address, Origin: true, Pull: true, Resolve: true, AllowPrivate: true, Credentials: credentials}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	t.Cleanup(func() { store.Close() })
	held := tree.New(store, nil)
	t.Cleanup(held.Close)
	m := New(Parts{Store: store, Tree: held, Log: zap.NewNop()})
	t.Cleanup(m.Close)
	r.Mirror, r.t, r.registry, r.url = m, t, registry, between.URL
	r.target = Target{
		Upstream:   &Upstream{Name: "reg.example", Prefix: "reg.example", TagTTL: time.Hour, Client: client},
		Name:       repository,
		Repository: "reg.example/" + repository,
	}
	return r
}

func (r *refreshing) refreshed(want Refreshed) {
	r.t.Helper()
	want.Reference = "reg.example/" + r.target.Name + ":v1"
	if got, err := r.Refresh(r.t.Context(), r.target, tagV1); err != nil || got != want {
		r.t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func (r *refreshing) fails(status int, says ...string) {
	r.t.Helper()
	_, err := r.Refresh(r.t.Context(), r.target, tagV1)
	if err == nil {
		r.t.Error("refreshed")
		return
	}
	got, message := Explain(err, "reg.example/team/app:v1")
	if got != status {
		r.t.Errorf("%d %s, want %d", got, message, status)
	}
	for _, part := range says {
		if !strings.Contains(message, part) {
			r.t.Errorf("%q does not mention %q", message, part)
		}
	}
}

// serves checks what a client gets for the tag without a word to the upstream.
func (r *refreshing) serves(image regtest.Image) {
	r.t.Helper()
	asked := r.registry.Count("", "")
	answer, err := r.manifest(r.t.Context(), r.target, tagV1, false, false)
	if err != nil || string(answer.held.Body) != string(image.Data) {
		r.t.Errorf("wrong answer: %v", err)
	}
	if held, err := r.tree.Tag(r.t.Context(), r.target.Repository, "v1"); err != nil || held != image.Digest {
		r.t.Errorf("the store has the tag at %s: %v", held, err)
	}
	if n := r.registry.Count("", ""); n != asked {
		r.t.Errorf("%d requests", n-asked)
	}
}

func TestRefresh(t *testing.T) {
	r := newRefreshing(t, regtest.Options{}, "team/app", disktest.Open(t, t.TempDir()), upstream.Credentials{})
	one, two := regtest.NewImage("one"), regtest.NewImage("two")

	// A tag that never was.
	r.fails(404, "reg.example/team/app:v1", "404")

	r.registry.Push("team/app", one, "v1")
	r.refreshed(Refreshed{Digest: one.Digest, Changed: true})
	r.serves(one)

	// Unchanged: that costs a HEAD, though the tag is fresh.
	r.registry.Forget()
	r.refreshed(Refreshed{Digest: one.Digest, Before: one.Digest})
	if heads, gets := r.registry.Count("HEAD", "/manifests/v1"), r.registry.Count("GET", "/manifests/"); heads != 1 || gets != 0 {
		t.Errorf("%d HEAD and %d GET", heads, gets)
	}

	r.registry.Push("team/app", two, "v1")
	r.serves(one) // it is fresh
	r.refreshed(Refreshed{Digest: two.Digest, Before: one.Digest, Changed: true})
	r.serves(two)

	// The new manifest cannot be had: the tag stays.
	r.registry.Push("team/app", regtest.NewImage("three"), "v1")
	r.registry.Fail(regtest.Fault{Path: "/manifests/sha256:", Status: 500})
	r.fails(503, "cannot be had")
	r.registry.Heal()
	r.serves(two)

	// Nobody answers: the tag is still served.
	r.registry.Down()
	r.fails(503, "reg.example", r.url)
	r.registry.Up()
	r.serves(two)

	// Gone at the origin: gone here, until it comes back.
	r.registry.DeleteTag("team/app", "v1")
	r.fails(404, r.url)
	if _, err := r.manifest(t.Context(), r.target, tagV1, false, false); err == nil {
		t.Error("a tag is served that is known to be gone")
	}
	r.registry.Push("team/app", two, "v1")
	r.refreshed(Refreshed{Digest: two.Digest, Changed: true})
	r.serves(two)
}

// TestRefreshDigest: a digest is refused without a question.
func TestRefreshDigest(t *testing.T) {
	r := newRefreshing(t, regtest.Options{}, "team/app", disktest.Open(t, t.TempDir()), upstream.Credentials{})
	image := regtest.NewImage("x")
	r.registry.Push("team/app", image, "v1")
	_, err := r.Refresh(t.Context(), r.target, oci.Reference{Digest: image.Digest})
	if err == nil {
		t.Fatal("a digest was refreshed")
	}
	if status, message := Explain(err, ""); status != 400 || !strings.Contains(message, "digest") {
		t.Errorf("%d %s", status, message)
	}
	if n := len(r.registry.Requests(func(regtest.Request) bool { return true })); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestRefreshPrivate: what only the mirror's credentials can read is refused,
// as it is to clients.
func TestRefreshPrivate(t *testing.T) {
	r := newRefreshing(t, regtest.Options{User: "u", Secret: "s"}, "private/app", disktest.Open(t, t.TempDir()), upstream.Credentials{User: "u", Secret: "s"})
	r.registry.Push("private/app", regtest.NewImage("x"), "v1")
	r.fails(403, "credentials")
	if _, err := r.tree.Tag(t.Context(), r.target.Repository, "v1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tag was stored: %v", err)
	}
}

// TestRefreshHosted: a repository that the store has as hosted is left alone.
func TestRefreshHosted(t *testing.T) {
	r := newRefreshing(t, regtest.Options{}, "team/app", disktest.Open(t, t.TempDir()), upstream.Credentials{})
	r.registry.Push("team/app", regtest.NewImage("x"), "v1")
	other := r.target
	other.Upstream = &Upstream{Name: "other.example"}
	if err := r.claim(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	r.fails(404, "other.example", "repository_prefix")
}

// fullStore takes no manifests.
type fullStore struct{ storage.Store }

var errFull = errors.New("no space left")

func (s fullStore) Put(ctx context.Context, key string, data []byte, how storage.Durability) error {
	return errFull
}

// TestRefreshNotStored: it is told of, since keeping the image is what a refresh
// is for.
func TestRefreshNotStored(t *testing.T) {
	r := newRefreshing(t, regtest.Options{}, "team/app", fullStore{disktest.Open(t, t.TempDir())}, upstream.Credentials{})
	image := regtest.NewImage("x")
	r.registry.Push("team/app", image, "v1")
	r.fails(503, image.Digest.String(), "could not be stored")
}

// TestRefreshAfterPush: questions of clients, and of other refreshes, that were
// put before a push do not answer a refresh after it, and the last word is the
// newest. Those that come after the push share questions.
func TestRefreshAfterPush(t *testing.T) {
	one, two := regtest.NewImage("one"), regtest.NewImage("two")
	for name, c := range map[string]struct {
		before  func(*refreshing)
		waiting int // refreshes among those
	}{
		"check of a client": {func(r *refreshing) { r.manifest(r.t.Context(), r.target, tagV1, false, false) }, 0},
		"refresh":           {func(r *refreshing) { r.Refresh(r.t.Context(), r.target, tagV1) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRefreshing(t, regtest.Options{NoToken: true}, "team/app", disktest.Open(t, t.TempDir()), upstream.Credentials{})
			r.registry.Push("team/app", one, "v1")
			r.refreshed(Refreshed{Digest: one.Digest, Changed: true})
			r.target.Upstream.TagTTL = 0
			// The answer to the first question is on its way when the push comes.
			answering, goOn := make(chan struct{}), make(chan struct{})
			release := sync.OnceFunc(func() { close(goOn) })
			defer release()
			hold := func() { close(answering); <-goOn }
			r.answered.Store(&hold)
			var all sync.WaitGroup
			all.Go(func() { c.before(r) })
			<-answering
			r.registry.Push("team/app", two, "v1")
			r.registry.Forget()
			const n = 50
			for range n {
				all.Go(func() { r.refreshed(Refreshed{Digest: two.Digest, Before: one.Digest, Changed: true}) })
			}
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for late := time.After(time.Minute); asking() < n+c.waiting; {
				select {
				case <-tick.C:
				case <-late:
					t.Fatal("the refreshes do not wait for the question that is under way")
				}
			}
			release()
			all.Wait()
			if heads := r.registry.Count("HEAD", "/manifests/v1"); heads > n/2 {
				t.Errorf("%d HEAD for %d refreshes", heads, n)
			}
			r.target.Upstream.TagTTL = time.Hour
			r.serves(two)
		})
	}
}

// asking is how many goroutines wait in ask.
func asking() (n int) {
	stacks := make([]byte, 4<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		state, calls, _ := strings.Cut(stack, "\n")
		if strings.Contains(state, "[select") && strings.Contains(calls, "(*Mirror).ask(") {
			n++
		}
	}
	return n
}
