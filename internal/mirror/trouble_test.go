package mirror

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const repository = "reg.example/team/app"

// asUser is a registry that knows a user, whom the mirror asks as.
var asUser = regtest.Options{User: "me", Secret: "secret", NoRedirect: true}

// TestHeldWithCredentials: where the mirror asks with credentials, what is held
// is served whatever the probe of whether it is public meets.
func TestHeldWithCredentials(t *testing.T) {
	b := newBench(t, asUser, func(u *Upstream) { u.Keep = true })
	b.registry.Push("team/app", first, "latest")
	layer := "team/app/blobs/" + first.Blobs[1].Digest.String()
	b.wantManifest(latest, first)
	b.wantStatus(200, "GET", layer)
	b.eventually("the layer to be linked", func() bool {
		known, _, err := b.mirror.tree.Member(t.Context(), repository, first.Blobs[1].Digest)
		return err == nil && known.Linked
	})
	for name, trouble := range map[string]func(){
		"the tag is gone":   func() { b.registry.DeleteTag("team/app", "latest") },
		"the layer is gone": func() { b.registry.Fail(regtest.Fault{Path: first.Blobs[1].Digest.String(), Status: 404}) },
		"all are refused":   func() { b.registry.Fail(regtest.Fault{Path: "/team/app/", Status: 403}) },
	} {
		b.pass(2 * publicFor)
		trouble()
		for range 2 {
			if w := b.ask("GET", latest); w.Code != http.StatusOK {
				t.Errorf("%s: the tag: %d %s", name, w.Code, w.Body)
			}
			if w := b.ask("GET", layer); w.Code != http.StatusOK {
				t.Errorf("%s: the layer: %d %s", name, w.Code, w.Body)
			}
		}
		b.registry.Heal()
	}
}

// TestWarmIsPrivate: that something is in memory opens it to nobody.
func TestWarmIsPrivate(t *testing.T) {
	b := newBench(t, asUser, nil)
	b.registry.Push("team/app", first, "latest")
	config := "team/app/blobs/" + first.Blobs[0].Digest.String()
	b.wantStatus(200, "GET", latest)
	b.eventually("everything to be warm", func() bool {
		b.wantStatus(200, "GET", config)
		_, manifest := b.mirror.tree.Warm(repository, first.Digest, time.Time{})
		_, blob := b.mirror.tree.WarmBlob(repository, first.Blobs[0].Digest, time.Time{})
		return manifest && blob
	})
	paths := []string{latest, "team/app/manifests/" + first.Digest.String(), config}
	b.asked()
	b.pass(publicFor)
	for _, path := range paths[1:] { // it is asked again whether everyone may
		b.wantStatus(200, "GET", path)
		if b.asked() == "" {
			t.Errorf("%s: an old verdict is believed", path)
		}
		b.pass(publicFor)
	}
	b.mirror.probes.Add(repository, tree.Verdict{Public: false, Checked: b.now()})
	for _, path := range paths {
		b.wantStatus(403, "GET", path)
		b.wantStatus(403, "HEAD", path)
	}
}

// TestWarmBlob: a blob in memory has ranges and conditions like any other.
func TestWarmBlob(t *testing.T) {
	b := warmed(t)
	config := first.Blobs[0]
	path := "team/app/blobs/" + config.Digest.String()
	w := b.ask("GET", path, "Range", "bytes=2-5")
	if w.Code != http.StatusPartialContent || w.Body.String() != string(config.Data[2:6]) {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	b.wantStatus(304, "GET", path, "If-None-Match", quoted(config.Digest))
	b.wantStatus(304, "GET", latest, "If-None-Match", quoted(first.Digest))
	if w := b.ask("HEAD", path); w.Code != 200 || w.Body.Len() != 0 || w.Header().Get("Content-Length") == "" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
}

// TestHeadOvertaken: a HEAD whose answer comes after that of a later GET is
// answered in full.
func TestHeadOvertaken(t *testing.T) {
	b := newBench(t, regtest.Options{NoToken: true}, nil)
	b.registry.Push("team/app", first, "latest")
	hold := make(chan struct{})
	b.registry.FailSlowly("HEAD", latest, hold)
	header := make(chan http.Header)
	go func() { header <- b.ask("HEAD", latest).Header() }()
	b.eventually("the HEAD to be under way", func() bool { return b.registry.Connections("registry") > 0 })
	b.pass(time.Second)
	b.wantManifest(latest, first)
	close(hold)
	if h := <-header; h.Get("Content-Length") != strconv.Itoa(len(first.Data)) || h.Get("Content-Type") == "" {
		t.Errorf("%v", h)
	}
}

// full is a store that takes nothing while it is full, and lets a write wait.
type full struct {
	storage.Store
	mu   sync.Mutex
	full bool
	wait func(key string)
}

func (f *full) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	f.mu.Lock()
	full, wait := f.full, f.wait
	f.mu.Unlock()
	if wait != nil {
		wait(key)
	}
	if full {
		return storage.ErrFull
	}
	return f.Store.Put(ctx, key, data, d)
}

// through puts a store of that kind before the mirror's own.
func (b *bench) through() *full {
	b.mirror.Close()
	b.tree.Close()
	f := &full{Store: b.store}
	b.store = f
	b.start()
	return f
}

// TestFullThenDown: a tag has moved while there was no room for what it means
// now. That is served from memory, and when it has gone from there and the
// upstream is down, what the tag meant before.
func TestFullThenDown(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	store := b.through()
	b.registry.Push("team/app", first, "latest")
	b.wantManifest(latest, first)
	store.full = true
	b.registry.Push("team/app", second, "latest")
	b.pass(time.Minute)
	b.wantManifest(latest, second)
	b.eventually("it to be in memory", func() bool {
		_, ok := b.mirror.tree.Warm(repository, second.Digest, time.Time{})
		return ok
	})
	b.asked()
	for range 5 {
		b.wantManifest(latest, second)
	}
	b.wantAsked("")
	memory := b.mirror.tree
	memory.Heat(0)
	b.registry.Down()
	b.pass(time.Minute)
	if header := b.wantManifest(latest, first); header.Get("Warning") == "" {
		t.Errorf("%v", header)
	}
	// When there is room again, the next check stores it.
	memory.Heat(DefaultHot)
	b.registry.Up()
	b.pass(10 * time.Minute)
	b.wantManifest(latest, second)
	b.eventually("it to be in memory", func() bool {
		_, ok := memory.Warm(repository, second.Digest, time.Time{})
		return ok
	})
	store.full = false
	b.pass(time.Minute)
	b.wantManifest(latest, second)
	b.registry.Down()
	b.restart()
	b.wantManifest(latest, second)
}

// TestTroubleIsBounded: an upstream in trouble is not asked by every client.
func TestTroubleIsBounded(t *testing.T) {
	for name, fault := range map[string]regtest.Fault{
		"403":                          {Path: "/manifests/", Status: 403},
		"500":                          {Path: "/manifests/", Status: 500},
		"429":                          {Path: "/manifests/", Status: 429, Header: http.Header{"Retry-After": {"0"}}},
		"a manifest that is not there": {Path: second.Digest.String(), Status: 404},
	} {
		t.Run(name, func(t *testing.T) {
			b := heldTag(t, nil)
			b.registry.Push("team/app", second, "latest")
			b.registry.Fail(fault)
			b.pass(time.Minute)
			for range 30 {
				b.pass(time.Second)
				b.wantManifest(latest, first)
			}
			if n := len(strings.Split(b.asked(), ", ")); n > 2*4 {
				t.Errorf("%d requests in 30 seconds", n)
			}
			if b.logs.FilterMessage("upstream trouble").Len() != 1 {
				t.Error("nothing is logged of it")
			}
		})
	}
}

// TestForcedIsAsked: with no-cache the question is put after the request came,
// whatever is known or under way.
func TestForcedIsAsked(t *testing.T) {
	noCache := []string{"Cache-Control", "no-cache"}
	t.Run("known by HEAD", func(t *testing.T) {
		b := newBench(t, regtest.Options{}, nil)
		b.registry.Push("team/app", first, "latest")
		b.wantStatus(200, "HEAD", latest)
		b.registry.Push("team/app", second, "latest")
		if h := b.wantStatus(200, "HEAD", latest, noCache...); h.Get("Docker-Content-Digest") != second.Digest.String() {
			t.Errorf("%v", h)
		}
		b.wantManifest(latest, second, noCache...)
	})
	t.Run("not held, one under way", func(t *testing.T) {
		b := newBench(t, regtest.Options{NoToken: true}, nil)
		b.registry.Push("team/app", first, "latest")
		hold := make(chan struct{})
		b.registry.Fail(regtest.Fault{Path: latest, Hold: hold, Count: 1})
		early := make(chan struct{})
		go func() {
			defer close(early)
			b.ask("GET", latest)
		}()
		b.eventually("the first to be under way", func() bool { return b.registry.Connections("registry") > 0 })
		b.pass(time.Second)
		b.registry.Push("team/app", second, "latest")
		late := make(chan string)
		go func() { late <- b.ask("GET", latest, noCache...).Header().Get("Docker-Content-Digest") }()
		close(hold)
		if d := <-late; d != second.Digest.String() {
			t.Errorf("an answer from before: %s", d)
		}
		<-early
	})
	t.Run("a digest that was missing", func(t *testing.T) {
		b := newBench(t, regtest.Options{}, nil)
		b.wantStatus(404, "GET", "team/app/manifests/"+first.Digest.String())
		b.registry.Push("team/app", first, "latest")
		b.wantManifest("team/app/manifests/"+first.Digest.String(), first, noCache...)
	})
}

// TestLateAnswers: what was asked first does not count when it is answered last.
func TestLateAnswers(t *testing.T) {
	b := heldTag(t, nil)
	target := Target{Upstream: b.upstream, Name: "team/app", Repository: repository}
	early := b.now()
	b.pass(time.Second)
	b.mirror.remember(t.Context(), target, "latest", tagState{digest: second.Digest, checked: b.now()})
	b.mirror.remember(t.Context(), target, "latest", tagState{digest: first.Digest, checked: early})
	b.mirror.failed(t.Context(), target, "latest", early, none(t, b))
	if state, _, _ := b.mirror.known(t.Context(), target, "latest"); state.digest != second.Digest || !state.gone.IsZero() {
		t.Errorf("%+v", state)
	}
}

// none is the origin's word that there is no such tag.
func none(t *testing.T, b *bench) error {
	_, err := b.upstream.Client.Head(t.Context(), "team/app", oci.Reference{Tag: "none"}, true)
	if !saysNone(err) {
		t.Fatal(err)
	}
	return err
}

// TestGoneAndBack: that a tag is gone is written down slowly, and it comes back
// meanwhile.
func TestGoneAndBack(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	store := b.through()
	b.registry.Push("team/app", first, "latest")
	b.wantManifest(latest, first)
	target := Target{Upstream: b.upstream, Name: "team/app", Repository: repository}
	gone := none(t, b)
	b.pass(time.Minute)
	at := b.now()
	b.pass(time.Second)
	writing, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	store.wait = func(key string) {
		if strings.Contains(key, "/_tags/") {
			once.Do(func() {
				close(writing)
				<-goOn
			})
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { b.mirror.failed(t.Context(), target, "latest", at, gone) })
	<-writing
	back := make(chan struct{})
	wg.Go(func() {
		defer close(back)
		b.mirror.remember(t.Context(), target, "latest", tagState{digest: first.Digest, checked: b.now()})
	})
	select { // it waits for the other, or else has time to come first
	case <-back:
	case <-time.After(100 * time.Millisecond):
	}
	close(goOn)
	wg.Wait()
	b.restart()
	b.registry.Down()
	b.wantManifest(latest, first)
}

// TestHeldBlobIsObtainable: a blob that the upstream has lost, and that is held
// all the same, makes no manifest unobtainable.
func TestHeldBlobIsObtainable(t *testing.T) {
	b := heldTag(t, nil)
	layer := first.Blobs[1]
	b.registry.Fail(regtest.Fault{Path: layer.Digest.String(), Status: 404})
	b.wantStatus(404, "GET", "team/app/blobs/"+layer.Digest.String())
	b.wantStatus(403, "GET", latest)
	if err := b.store.Put(t.Context(), "docker/registry/v2/blobs/sha256/"+layer.Digest.Encoded()[:2]+"/"+layer.Digest.Encoded()+"/data", layer.Data, storage.Lazy); err != nil {
		t.Fatal(err)
	}
	b.wantManifest(latest, first)
}

// TestGoneIsNotListed: what answers 404 is in no list, after a restart as well.
func TestGoneIsNotListed(t *testing.T) {
	b := heldTag(t, nil)
	b.registry.Push("team/app", first, "other")
	b.registry.DeleteTag("team/app", "latest")
	b.pass(time.Minute)
	b.wantStatus(404, "GET", latest)
	b.registry.Down()
	for range 2 {
		if w := b.ask("GET", "team/app/tags/list"); strings.Contains(w.Body.String(), "latest") {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		b.restart()
	}
}

// TestGoneInLastTenth: a tag that is gone is not asked for with what is kept of a
// budget.
func TestGoneInLastTenth(t *testing.T) {
	b := heldTag(t, nil)
	b.registry.DeleteTag("team/app", "latest")
	b.pass(time.Minute)
	b.wantStatus(404, "GET", latest)
	b.registry.Fail(regtest.Fault{Path: "/manifests/", Header: http.Header{"Ratelimit-Limit": {"100;w=3600"}, "Ratelimit-Remaining": {"5;w=3600"}}})
	b.wantStatus(404, "GET", "team/app/manifests/none")
	b.asked()
	for range 10 {
		b.pass(time.Minute)
		b.wantStatus(404, "GET", latest)
	}
	b.wantAsked("")
}

// TestGoneIsNotSettled: a tag that was to be stored with its manifest, and has
// gone since, is not.
func TestGoneIsNotSettled(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	b.wantStatus(200, "HEAD", latest)
	b.registry.DeleteTag("team/app", "latest")
	b.pass(time.Minute)
	b.wantStatus(404, "HEAD", latest)
	b.wantManifest("team/app/manifests/"+first.Digest.String(), first)
	b.restart()
	b.registry.Down()
	b.wantStatus(503, "GET", latest)
}

// TestPublicAfterRestart: a verdict that was written down is remembered once it
// has been read, so that what is warm is not asked of the store.
func TestPublicAfterRestart(t *testing.T) {
	b := newBench(t, asUser, nil)
	b.registry.Push("team/app", first, "latest")
	b.wantManifest(latest, first)
	b.restart()
	b.wantManifest(latest, first)
	if !b.mirror.readable(Target{Upstream: b.upstream, Name: "team/app", Repository: repository}) {
		t.Error("it is asked of the store each time")
	}
}
