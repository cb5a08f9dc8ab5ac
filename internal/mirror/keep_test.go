package mirror

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// target is the repository of the tests.
func (b *bench) target() Target {
	return Target{Upstream: b.upstream, Name: "team/app", Repository: repository}
}

func (b *bench) linked(d digest.Digest) {
	b.t.Helper()
	b.eventually("the blob to be linked", func() bool {
		known, _, err := b.mirror.tree.Member(b.t.Context(), repository, d)
		return err == nil && known.Linked
	})
}

func (b *bench) file(key string) string { return filepath.Join(b.dir, filepath.FromSlash(key)) }

// wantBlob asks for a blob and checks its bytes.
func (b *bench) wantBlob(blob regtest.Content) {
	b.t.Helper()
	if w := b.ask("GET", "team/app/blobs/"+blob.Digest.String()); w.Code != http.StatusOK || w.Body.String() != string(blob.Data) {
		b.t.Errorf("%s: %d, %d bytes of %d: %.300s", blob.Digest, w.Code, w.Body.Len(), len(blob.Data), w.Body)
	}
}

// TestReadsAreTold: of what clients ask for, and of nothing else.
func TestReadsAreTold(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	var mu sync.Mutex
	var told []tree.Change
	b.notes = func(c tree.Change) {
		mu.Lock()
		defer mu.Unlock()
		if c.Kind == tree.Read || c.Kind == tree.ReadBlob {
			told = append(told, c)
		}
	}
	want := func(kind tree.ChangeKind, tag string, d digest.Digest) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 1 || told[0].Kind != kind || told[0].Repository != repository || told[0].Tag != tag || told[0].Canonical != d || !told[0].At.Equal(b.now()) {
			t.Errorf("told %+v, want %d %s %s", told, kind, tag, d)
		}
		told = nil
	}
	none := func() {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 0 {
			t.Errorf("told %+v", told)
		}
		told = nil
	}
	b.registry.Push("team/app", first, "latest")
	byDigest, layer := "team/app/manifests/"+first.Digest.String(), first.Blobs[1]
	b.wantManifest(latest, first)
	want(tree.Read, "latest", "")
	b.wantManifest(byDigest, first)
	want(tree.Read, "", first.Digest)
	b.wantBlob(layer)
	b.linked(layer.Digest)
	mu.Lock()
	told = nil
	mu.Unlock()
	for range 2 {
		b.pass(time.Minute) // the tag is checked
		b.wantManifest(latest, first)
		want(tree.Read, "latest", "")
		b.wantStatus(200, "HEAD", byDigest)
		want(tree.Read, "", first.Digest)
		b.wantBlob(layer)
		want(tree.ReadBlob, "", layer.Digest)
		b.pass(time.Second)
		b.wantManifest(latest, first)
		b.wantManifest(byDigest, first)
		b.wantStatus(200, "HEAD", "team/app/blobs/"+layer.Digest.String())
		none()
		// What the mirror does for itself.
		if _, err := b.mirror.Why(t.Context(), b.target(), oci.Reference{Tag: "latest"}); err != nil {
			t.Error(err)
		}
		b.pass(time.Hour)
		if _, err := b.mirror.Refresh(t.Context(), b.target(), oci.Reference{Tag: "latest"}); err != nil {
			t.Error(err)
		}
		none()
	}
}

// TestRemovedTag: a tag that is removed is not answered from memory.
func TestRemovedTag(t *testing.T) {
	b := heldTag(t, nil)
	b.wantManifest(latest, first)
	b.registry.Down()
	if err := b.tree.RemoveTag(t.Context(), repository, "latest", first.Digest, nil); err != nil {
		t.Fatal(err)
	}
	b.wantStatus(503, "GET", latest)
	b.registry.Up()
	b.pass(10 * time.Minute)
	b.wantManifest(latest, first)
	if d, err := b.tree.Tag(t.Context(), repository, "latest"); err != nil || d != first.Digest {
		t.Errorf("pulled again, it means %s, %v", d, err)
	}
}

// TestRemovedWhileRead: a tag is removed while somebody reads what it means, who
// must not bring it back into memory.
func TestRemovedWhileRead(t *testing.T) {
	b := heldTag(t, nil)
	b.mirror.Close()
	b.tree.Close()
	slow := &slowLink{Store: b.store, key: layout.TagLink(repository, "latest"), read: make(chan struct{}), goOn: make(chan struct{})}
	plain := b.store
	b.store = slow
	b.start()
	b.registry.Down()
	answered := make(chan int)
	go func() { answered <- b.ask("GET", latest).Code }()
	<-slow.read
	other := tree.New(plain, b.mirror.Note)
	if err := other.RemoveTag(t.Context(), repository, "latest", first.Digest, nil); err != nil {
		t.Error(err)
	}
	other.Close()
	close(slow.goOn)
	<-answered
	b.wantStatus(503, "GET", latest)
}

// slowLink lets the first look at a key, which is the last that tells of a tag,
// wait once it has looked.
type slowLink struct {
	storage.Store
	key        string
	once       sync.Once
	read, goOn chan struct{}
}

func (s *slowLink) Stat(ctx context.Context, key string) (storage.Info, error) {
	info, err := s.Store.Stat(ctx, key)
	if key == s.key {
		s.once.Do(func() {
			s.read <- struct{}{}
			<-s.goOn
		})
	}
	return info, err
}

// TestMaxBlobSize: what names a blob that is too large is refused, whatever it is
// asked for by, and served once the blob is held.
func TestMaxBlobSize(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	large := regtest.NewImage("large", regtest.Random("large", 5000), regtest.Random("small", 100))
	index := regtest.NewIndex(large, first)
	b.registry.Push("team/app", large, "large")
	b.registry.Push("team/app", first, "latest")
	b.registry.Push("team/app", index, "index")
	b.mirror.Set(Settings{Hot: DefaultHot, MaxBlob: 4999})
	layer := large.Blobs[1]
	for _, agent := range []string{"docker/28", "containerd/2.1", "skopeo/1.9.3"} {
		b.agent = agent
		for range 2 { // fetched, and warm
			for _, ref := range []string{"large", large.Digest.String()} {
				for _, method := range []string{"GET", "HEAD"} {
					w := b.ask(method, "team/app/manifests/"+ref)
					if w.Code != 403 || method == "GET" && (!strings.Contains(w.Body.String(), "DENIED") || !strings.Contains(w.Body.String(), "max_blob_size")) {
						t.Errorf("%s %s for %s: %d %s", method, ref, agent, w.Code, w.Body)
					}
				}
			}
			b.wantStatus(403, "GET", "team/app/blobs/"+layer.Digest.String())
			b.wantStatus(200, "GET", "team/app/blobs/"+large.Blobs[2].Digest.String())
			b.wantManifest("team/app/manifests/index", index)
			b.wantManifest(latest, first)
		}
	}
	if n := b.registry.Sent(layer.Digest); n > 0 {
		t.Errorf("%d bytes of it were fetched", n)
	}
	if w, err := b.mirror.Why(t.Context(), b.target(), oci.Reference{Tag: "large"}); err != nil || !strings.Contains(w.Answer, "max_blob_size") {
		t.Errorf("%+v, %v", w, err)
	}
	for _, most := range []int64{0, 5000} {
		b.mirror.Set(Settings{Hot: DefaultHot, MaxBlob: most})
		b.wantManifest("team/app/manifests/large", large)
	}
	for _, blob := range large.Blobs {
		b.wantBlob(blob)
		b.linked(blob.Digest)
	}
	b.mirror.Set(Settings{Hot: DefaultHot, MaxBlob: 10})
	b.wantManifest("team/app/manifests/large", large)
	b.wantBlob(layer)
}

// TestDamagedIsFetchedAgain: what is stored is short, long, or wrong.
func TestDamagedIsFetchedAgain(t *testing.T) {
	image := regtest.NewImage("damaged", regtest.Random("small", 1000), regtest.Random("large", 3<<20))
	for name, damage := range map[string]func(data []byte) []byte{
		"short": func(data []byte) []byte { return data[:len(data)/2] },
		"empty": func([]byte) []byte { return nil },
		"long":  func(data []byte) []byte { return append(slices.Clone(data), 'x') },
		"wrong": func(data []byte) []byte { return append([]byte{data[0] ^ 1}, data[1:]...) },
	} {
		for _, layer := range image.Blobs[1:] {
			if name == "wrong" && len(layer.Data) > 64<<10 {
				continue // is found by reading all of it
			}
			t.Run(name+" "+layer.Digest.Encoded()[:8], func(t *testing.T) {
				b := newBench(t, regtest.Options{}, nil)
				b.registry.Push("team/app", image, "latest")
				b.wantManifest(latest, image)
				b.wantBlob(layer)
				b.linked(layer.Digest)
				b.restart()
				path := b.file(layout.Blob(layer.Digest))
				if err := os.WriteFile(path, damage(layer.Data), 0o640); err != nil {
					t.Fatal(err)
				}
				b.registry.Fail(regtest.Fault{Path: layer.Digest.String(), Status: 404})
				b.wantStatus(404, "GET", "team/app/blobs/"+layer.Digest.String())
				b.eventually("it to be removed", func() bool {
					_, err := os.Stat(path)
					return os.IsNotExist(err)
				})
				b.registry.Heal()
				b.pass(time.Hour)
				b.wantBlob(layer)
				b.eventually("it to be stored", func() bool {
					data, err := os.ReadFile(path)
					return err == nil && string(data) == string(layer.Data)
				})
			})
		}
	}
}

// TestLyingManifestRemovesNothing: a manifest gives a blob another size than it
// has. That is no reason to delete what is right, and maybe somebody else's.
func TestLyingManifestRemovesNothing(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	layer := first.Blobs[1]
	if err := b.store.Put(t.Context(), layout.Blob(layer.Digest), layer.Data, storage.Lazy); err != nil {
		t.Fatal(err)
	}
	hashed := make(chan tree.Change, 10)
	b.notes = func(c tree.Change) {
		if c.Kind == tree.Hashed || c.Kind == tree.Removed {
			hashed <- c
		}
	}
	liar := tree.Member{Canonical: layer.Digest, Size: 17}
	for range 3 {
		if err := b.mirror.damaged(b.target(), layer.Digest, liar, int64(len(layer.Data))); err == nil {
			t.Error("no error")
		}
	}
	if c := <-hashed; c.Kind != tree.Hashed {
		t.Errorf("%+v", c)
	}
	b.mirror.damaged(b.target(), layer.Digest, liar, int64(len(layer.Data)))
	if _, err := b.tree.StatBlob(t.Context(), layer.Digest); err != nil {
		t.Error(err)
	}
	b.mirror.Close()
	if len(hashed) > 0 {
		t.Error("it is hashed again and again")
	}
	b.mirror = New(Parts{Store: b.store, Tree: b.tree, Log: zap.NewNop()})
}

// TestHeal: what was deleted is fetched again though nobody asks for it.
func TestHeal(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	layer := first.Blobs[1]
	b.wantManifest(latest, first)
	record, err := b.tree.Record(t.Context(), repository)
	if err != nil {
		t.Fatal(err)
	}
	target, ok := b.site.upstreams.Owner(repository, record)
	if want := b.target(); !ok || target != want {
		t.Fatalf("%+v, %v", target, ok)
	}
	for _, size := range []int64{int64(len(layer.Data)), -1} {
		if err := b.mirror.Fetch(t.Context(), target, layer.Digest, size); err != nil {
			t.Error(err)
		}
		if info, err := b.tree.StatBlob(t.Context(), layer.Digest); err != nil || info.Size != int64(len(layer.Data)) {
			t.Errorf("%+v, %v", info, err)
		}
		if _, err := b.tree.RemoveBlob(t.Context(), layer.Digest, nil); err != nil {
			t.Error(err)
		}
	}
	if err := b.mirror.Fetch(t.Context(), target, digest.FromString("none"), 4); err == nil {
		t.Error("it fetched what is not there")
	}
	if err := b.tree.PutRecord(t.Context(), repository, tree.Record{Class: tree.Hosted}); err != nil {
		t.Fatal(err)
	}
	if err := b.mirror.Fetch(t.Context(), target, layer.Digest, 1000); err == nil {
		t.Error("it fetched into a hosted repository")
	}
}

func TestOwner(t *testing.T) {
	u := newUpstreams(t, siteList(t))
	for _, c := range []struct {
		repository, upstream, prefix string
		name                         string // "": nobody
	}{
		{"docker.io/library/alpine", "docker.io", "docker.io", "library/alpine"},
		{"mirrors/corp/x", "images.corp", "mirrors/corp", "x"},
		{"old/place/x", "images.corp", "old/place", "x"}, // the prefix was another then
		{"a/x", "bare.corp", "", "a/x"},
		{"us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", "us-docker.pkg.dev", "p/r/i"},
		{"docker.io/library/alpine", "unknown.corp", "docker.io", ""},
		{"ghcr.io/x", "docker.io", "docker.io", ""},
	} {
		target, ok := u.Owner(c.repository, tree.Record{Class: tree.Mirrored, Upstream: c.upstream, Prefix: c.prefix})
		if ok != (c.name != "") || ok && (target.Name != c.name || target.Repository != c.repository || target.Upstream.Name != c.upstream || target.Upstream.Client == nil) {
			t.Errorf("%+v: %+v, %v", c, target, ok)
		}
		for _, class := range []tree.Class{tree.Hosted, ""} {
			if _, ok := u.Owner(c.repository, tree.Record{Class: class, Upstream: c.upstream, Prefix: c.prefix}); ok {
				t.Errorf("%s, %q, has an owner", c.repository, class)
			}
		}
	}
}

// tight is a store without room.
type tight struct{ storage.Store }

func (tight) Reserve(int64) (storage.Reservation, error) { return nil, storage.ErrFull }

// TestFullOnce: many pulls meet a full disk for which no room is made. All get
// what they want, and the operator is told once.
func TestFullOnce(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.mirror.Close()
	b.tree.Close()
	var mu sync.Mutex
	asked := 0
	b.room = func(context.Context, int64) bool {
		mu.Lock()
		defer mu.Unlock()
		asked++
		return asked%2 == 0
	}
	b.store = tight{b.store}
	b.start()
	b.registry.Push("team/app", first, "latest")
	large := regtest.NewImage("large", regtest.Random("large", 3<<20))
	b.registry.Push("team/app", large, "large")
	b.wantManifest(latest, first)
	b.wantManifest("team/app/manifests/large", large)
	for range 10 {
		for _, blob := range []regtest.Content{first.Blobs[1], large.Blobs[1]} {
			b.wantBlob(blob)
		}
	}
	b.eventually("room to be asked for again and again", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return asked >= 4
	})
	b.mirror.Close()
	if n := b.logs.FilterMessage("disk trouble").Len(); n != 1 {
		t.Errorf("%d log lines", n)
	}
	if n := len(b.events); n != 1 {
		t.Errorf("%d events", n)
	}
	b.wantEvent(storageFull)
}

// TestDamagedStays: damaged bytes that are a hosted repository's, too, are not
// deleted, and what is fetched for the mirrored one takes their place.
func TestDamagedStays(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	layer := first.Blobs[1]
	b.wantManifest(latest, first)
	b.wantBlob(layer)
	b.linked(layer.Digest)
	b.restart()
	b.tree.Guard(func(context.Context, digest.Digest) (bool, error) { return true, nil }, func(digest.Digest) {})
	wrong := append([]byte{layer.Data[0] ^ 1}, layer.Data[1:]...)
	path := b.file(layout.Blob(layer.Digest))
	if err := os.WriteFile(path, wrong, 0o640); err != nil {
		t.Fatal(err)
	}
	b.registry.Fail(regtest.Fault{Path: layer.Digest.String(), Status: 404})
	b.wantStatus(404, "GET", "team/app/blobs/"+layer.Digest.String())
	if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, wrong) {
		t.Errorf("the only copy was touched: %v", err)
	}
	b.registry.Heal()
	b.pass(time.Hour)
	b.wantBlob(layer)
	b.eventually("it to be stored", func() bool {
		data, err := os.ReadFile(path)
		return err == nil && bytes.Equal(data, layer.Data)
	})
}

// TestHostedDamageIsTold: a hosted blob of another length than its manifest says is
// not served, and whoever reads blobs again is told of it, once.
func TestHostedDamageIsTold(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	var suspects []digest.Digest
	b.mirror.Close()
	b.mirror = New(Parts{Store: b.store, Tree: b.tree, Log: zap.NewNop(), Suspect: func(d digest.Digest) { suspects = append(suspects, d) }})
	layer := regtest.NewImage("hosted", regtest.Random("large", 1<<20)).Blobs[1]
	if err := b.store.Put(t.Context(), layout.Blob(layer.Digest), layer.Data[1:], storage.Lazy); err != nil {
		t.Fatal(err)
	}
	hosted := Target{Name: "apps/web", Repository: "apps/web"}
	if err := b.tree.LinkBlob(t.Context(), "apps/web", layer.Digest, layer.Digest); err != nil {
		t.Fatal(err)
	}
	b.tree.AddMember("apps/web", layer.Digest, int64(len(layer.Data)))
	for range 3 {
		if _, _, err := b.mirror.blob(t.Context(), hosted, layer.Digest); err == nil {
			t.Error("it is served")
		}
	}
	if !slices.Equal(suspects, []digest.Digest{layer.Digest}) {
		t.Errorf("suspected: %v", suspects)
	}
}
