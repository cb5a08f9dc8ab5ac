package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// common is a store that several processes use while it says so, and counts the
// values that were asked for.
type common struct {
	storage.Store
	shared atomic.Bool
	gets   atomic.Int64
	read   func(key string) // called when a value has been read; nil: nothing is
}

func (c *common) Distant() storage.Distant { return far{c} }

func (c *common) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	c.gets.Add(1)
	value, err := c.Store.Get(ctx, key, limit)
	if c.read != nil {
		c.read(key)
	}
	return value, err
}

// far is the common store as a distant one. Only Shared is asked.
type far struct{ *common }

func (f far) Shared() bool               { return f.shared.Load() }
func (far) Drop(string) bool             { return false }
func (far) Distrust(string)              {}
func (far) Listed(context.Context) error { return nil }
func (far) Relist(context.Context) error { return nil }
func (far) Secret() []byte               { return nil }
func (far) Presign(context.Context, string, string, time.Duration) (string, error) {
	return "", fs.ErrNotExist
}

// pair is a store with the trees of two processes.
type pair struct {
	*bench
	store *common
	other *Tree
}

func newPair(t *testing.T) *pair {
	t.Helper()
	b := newBench(t)
	p := &pair{bench: b, store: &common{Store: b.store}}
	p.bench.Tree.Close()
	p.bench.Tree, p.other = New(p.store, nil), New(p.store, nil)
	t.Cleanup(p.other.Close)
	return p
}

// push stores an image with one layer and a tag, as a client of a tree does.
func (p *pair) push(to *Tree, repository, tag, layer string) (manifest, blob digest.Digest) {
	p.t.Helper()
	ctx := p.t.Context()
	if err := to.Host(ctx, repository); err != nil {
		p.t.Fatal(err)
	}
	blob = p.blob(layer)
	if err := to.LinkBlob(ctx, repository, blob, blob); err != nil {
		p.t.Fatal(err)
	}
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`,
		v1.MediaTypeImageManifest, v1.MediaTypeImageConfig, blob, len(layer))
	manifest = digest.FromString(body)
	if _, err := to.PutManifest(ctx, repository, manifest, []byte(body), nil); err != nil {
		p.t.Fatal(err)
	}
	if err := to.SetTag(ctx, repository, tag, manifest, time.Now(), nil); err != nil {
		p.t.Fatal(err)
	}
	return manifest, blob
}

// look is what a tree says of an image: its manifest, its blob, and its tag.
func (p *pair) look(at *Tree, repository, tag string, manifest, blob digest.Digest) (there [3]bool) {
	p.t.Helper()
	ctx := p.t.Context()
	yes := func(err error) bool {
		p.t.Helper()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.t.Fatal(err)
		}
		return err == nil
	}
	_, err := at.Manifest(ctx, repository, manifest)
	_, is, memberErr := at.Member(ctx, repository, blob)
	_, tagErr := at.Tagged(ctx, repository, tag)
	return [3]bool{yes(err), yes(memberErr) && is, yes(tagErr)}
}

var (
	all  = [3]bool{true, true, true}
	none = [3]bool{}
)

// TestShared: what a process pushes and deletes is seen by another while both use
// the store, whatever that one remembers.
func TestShared(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	p.store.shared.Store(true)
	if got := p.look(p.other, "apps/web", "v1", digest.FromString("m"), digest.FromString("b")); got != none {
		t.Fatalf("before the push: %v", got)
	}
	if exists, err := p.other.Exists(ctx, "apps/web"); exists || err != nil {
		t.Fatal(exists, err)
	}
	m, b := p.push(p.Tree, "apps/web", "v1", "layer")
	if got := p.look(p.other, "apps/web", "v1", m, b); got != all {
		t.Fatalf("after the push: %v", got)
	}
	if record, err := p.other.Record(ctx, "apps/web"); err != nil || record.Class != Hosted {
		t.Fatal(record, err)
	}
	if tags, err := p.other.Tags(ctx, "apps/web"); err != nil || !slices.Equal(tags, []string{"v1"}) {
		t.Fatal(tags, err)
	}
	p.other.hot.cache.Wait()
	if _, ok := p.other.Warm("apps/web", m, time.Time{}); ok {
		t.Error("a manifest comes from memory alone")
	}
	// Of this one memory has had nothing before it was there.
	m2, b2 := p.push(p.Tree, "apps/new", "v1", "another layer")
	if got := p.look(p.other, "apps/new", "v1", m2, b2); got != all {
		t.Fatal(got)
	}
	p.other.hot.cache.Wait()
	if _, ok := p.other.Warm("apps/new", m2, time.Time{}); ok {
		t.Error("a manifest comes from memory alone, since its repository is known")
	}
	if _, err := p.DeleteManifest(ctx, "apps/web", m, nil); err != nil {
		t.Fatal(err)
	}
	if err := p.DeleteBlob(ctx, "apps/web", b); err != nil {
		t.Fatal(err)
	}
	if got := p.look(p.other, "apps/web", "v1", m, b); got != none {
		t.Fatalf("after the deletion: %v", got)
	}
	if _, ok := p.other.WarmBlob("apps/web", b, time.Time{}); ok {
		t.Error("a blob comes from memory alone")
	}
	if tags, err := p.other.Tags(ctx, "apps/web"); err != nil || len(tags) > 0 {
		t.Fatal(tags, err)
	}
}

// TestSharedTags: what is left of a tag by a process that died is none, though tags
// are not asked for one by one.
func TestSharedTags(t *testing.T) {
	p := newPair(t)
	p.store.shared.Store(true)
	m, _ := p.push(p.Tree, "apps/web", "v1", "layer")
	if err := p.store.Put(t.Context(), layout.TagIndexLink("apps/web", "torn", m), []byte(m), storage.Lazy); err != nil {
		t.Fatal(err)
	}
	// Nor is what no client could ask for.
	if err := p.store.Put(t.Context(), layout.Tags("apps/web")+".odd/current/link", []byte(m), storage.Lazy); err != nil {
		t.Fatal(err)
	}
	if tags, err := p.other.Tags(t.Context(), "apps/web"); err != nil || !slices.Equal(tags, []string{"v1"}) {
		t.Error(tags, err)
	}
}

// TestSharedMirrored: what is mirrored is remembered while the store is shared.
func TestSharedMirrored(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	p.store.shared.Store(true)
	if _, err := p.other.Record(ctx, "docker.io/app"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := p.PutRecord(ctx, "docker.io/app", Record{Class: Mirrored, Upstream: "docker.io"}); err != nil {
		t.Fatal(err)
	}
	b := p.blob("layer")
	if err := p.LinkBlob(ctx, "docker.io/app", b, b); err != nil {
		t.Fatal(err)
	}
	if _, is, err := p.other.Member(ctx, "docker.io/app", b); !is || err != nil {
		t.Fatal(is, err)
	}
	before := p.store.gets.Load()
	if _, is, err := p.other.Member(ctx, "docker.io/app", b); !is || err != nil {
		t.Fatal(is, err)
	}
	if n := p.store.gets.Load() - before; n != 0 {
		t.Errorf("the store was asked %d times for what is mirrored and known", n)
	}
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":5},"layers":[]}`,
		v1.MediaTypeImageManifest, v1.MediaTypeImageConfig, b)
	m, err := p.PutManifest(ctx, "docker.io/app", digest.FromString(body), []byte(body), nil)
	if err == nil {
		_, err = p.other.Manifest(ctx, "docker.io/app", m.Digest)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.other.hot.cache.Wait()
	if _, ok := p.other.Warm("docker.io/app", m.Digest, time.Time{}); !ok {
		t.Error("a mirrored manifest does not come from memory")
	}
}

// TestSharedTurns: what a process has found out before another came, and while it
// was there, is not believed afterwards.
func TestSharedTurns(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	m, b := p.push(p.Tree, "apps/web", "v1", "layer")
	if got := p.look(p.other, "apps/web", "v1", m, b); got != all {
		t.Fatal(got)
	}
	if _, err := p.other.Record(ctx, "apps/db"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	p.other.hot.cache.Wait()
	if _, ok := p.other.Warm("apps/web", m, time.Time{}); !ok {
		t.Fatal("a manifest of a sole owner does not come from memory")
	}
	p.store.shared.Store(true)
	if !p.other.Shared() { // as the keeper does each second
		t.Fatal("not shared")
	}
	if got := p.look(p.other, "apps/web", "v1", m, b); got != all {
		t.Fatal(got)
	}
	if _, err := p.DeleteManifest(ctx, "apps/web", m, nil); err != nil {
		t.Fatal(err)
	}
	if err := p.DeleteBlob(ctx, "apps/web", b); err != nil {
		t.Fatal(err)
	}
	p.push(p.Tree, "apps/db", "v1", "other layer")
	p.store.shared.Store(false)
	if _, ok := p.other.Warm("apps/web", m, time.Time{}); ok {
		t.Error("a deleted manifest comes from memory")
	}
	if got := p.look(p.other, "apps/web", "v1", m, b); got != none {
		t.Error("what was deleted is still there:", got)
	}
	if record, err := p.other.Record(ctx, "apps/db"); err != nil || record.Class != Hosted {
		t.Error("what was recorded meanwhile is not known:", record, err)
	}
}

// TestSharedScans: what the manifests of a mirrored repository name is found out again
// when another process has come.
func TestSharedScans(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	if err := p.PutRecord(ctx, "docker.io/app", Record{Class: Mirrored, Upstream: "docker.io"}); err != nil {
		t.Fatal(err)
	}
	layer := digest.FromString("layer")
	if _, is, err := p.other.Member(ctx, "docker.io/app", layer); is || err != nil {
		t.Fatal(is, err)
	}
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":5},"layers":[]}`,
		v1.MediaTypeImageManifest, v1.MediaTypeImageConfig, layer)
	if _, err := p.PutManifest(ctx, "docker.io/app", digest.FromString(body), []byte(body), nil); err != nil {
		t.Fatal(err)
	}
	p.store.shared.Store(true)
	if known, is, err := p.other.Member(ctx, "docker.io/app", layer); !is || err != nil || known.Size != 5 {
		t.Error(known, is, err)
	}
}

// TestSharedForgets: nobody finds that the store has come to be shared, or not, before
// everything has been forgotten.
func TestSharedForgets(t *testing.T) {
	p := newPair(t)
	guards := &p.other.guards
	first, last := &guards[0], &guards[len(guards)-1]
	p.store.shared.Store(true)
	last.mu.Lock()
	forgotten := make(chan bool)
	go func() { forgotten <- p.other.Shared() }()
	for first.mu.TryLock() { // until it forgets
		first.mu.Unlock()
		runtime.Gosched()
	}
	if p.other.sharing.last.Load() {
		t.Error("the store counts as shared while memory is being cleared")
	}
	last.mu.Unlock()
	if !<-forgotten || !p.other.sharing.last.Load() {
		t.Error("the store does not count as shared")
	}
}

// TestSharedReads: what was being read when another process left is not remembered.
func TestSharedReads(t *testing.T) {
	p := newPair(t)
	ctx := t.Context()
	p.store.shared.Store(true)
	p.other.Shared()
	reading, goOn := make(chan struct{}), make(chan struct{})
	p.store.read = func(key string) {
		if key == layout.Record("apps/web") {
			reading <- struct{}{}
			<-goOn
		}
	}
	done := make(chan error)
	go func() {
		_, err := p.other.Record(ctx, "apps/web")
		done <- err
	}()
	<-reading
	p.store.read = nil
	if err := p.Host(ctx, "apps/web"); err != nil {
		t.Fatal(err)
	}
	p.store.shared.Store(false)
	p.other.Shared()
	close(goOn)
	if err := <-done; !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("it was there from the beginning:", err)
	}
	if record, err := p.other.Record(ctx, "apps/web"); err != nil || record.Class != Hosted {
		t.Error("that it was not there is remembered:", record, err)
	}
}

// TestSharedRace: memory is right after any change of whether the store is shared,
// however many ask meanwhile.
func TestSharedRace(t *testing.T) {
	p := newPair(t)
	m, b := p.push(p.Tree, "apps/web", "v1", "layer")
	done := make(chan struct{})
	ended := make(chan struct{}, 4)
	for range cap(ended) {
		go func() {
			defer func() { ended <- struct{}{} }()
			for {
				select {
				case <-done:
					return
				default:
				}
				p.other.Warm("apps/web", m, time.Time{})
				p.other.Manifest(t.Context(), "apps/web", m)
				p.other.Member(t.Context(), "apps/web", b)
			}
		}()
	}
	for i := range 200 {
		p.store.shared.Store(i%2 == 0)
		p.other.Shared()
	}
	p.store.shared.Store(true)
	p.other.Shared()
	if _, err := p.DeleteManifest(t.Context(), "apps/web", m, nil); err != nil {
		t.Fatal(err)
	}
	p.store.shared.Store(false)
	p.other.Shared()
	if _, err := p.other.Manifest(t.Context(), "apps/web", m); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a deleted manifest is still there:", err)
	}
	close(done)
	for range cap(ended) {
		<-ended
	}
}

func (far) OpenNear(context.Context, string) (io.ReadCloser, storage.Info, error) {
	return nil, storage.Info{}, storage.ErrDistant
}
