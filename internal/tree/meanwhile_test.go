package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// held lets readings of one key wait when they have read.
type held struct {
	storage.Store
	key     string
	reading chan struct{}
	goOn    chan struct{}
}

func (b *bench) hold(key string) *held {
	h := &held{Store: b.store, key: key, reading: make(chan struct{}), goOn: make(chan struct{})}
	b.Tree.store = h
	return h
}

func (h *held) wait(key string) {
	if key == h.key {
		h.reading <- struct{}{}
		<-h.goOn
	}
}

func (h *held) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	data, err := h.Store.Get(ctx, key, limit)
	h.wait(key)
	return data, err
}

func (h *held) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, info, err := h.Store.Open(ctx, key, offset, length)
	h.wait(key)
	return r, info, err
}

// TestReadWhileRemoved: somebody reads what is being removed, and must not bring
// it back into memory.
func TestReadWhileRemoved(t *testing.T) {
	config, layer := digest.FromString("a config too"), digest.FromString("a layer")
	body := image(config)
	d, long := digest.FromString(body), digest.SHA512.FromString(body)
	record := Record{Class: Mirrored}
	for name, c := range map[string]struct {
		key    string // of what is read when the removal comes
		read   func(*bench) error
		remove func(*bench) error
		has    func(*bench) bool // from memory or else
	}{
		"manifest": {
			layout.Blob(d),
			func(b *bench) error { return second(b.Manifest(b.t.Context(), "r", d)) },
			func(b *bench) error { return b.RemoveManifest(b.t.Context(), "r", d, nil) },
			func(b *bench) bool { return has(b.Manifest(b.t.Context(), "r", d)) },
		},
		"manifest by sha512": {
			layout.Blob(d),
			func(b *bench) error { return second(b.Manifest(b.t.Context(), "r", long)) },
			func(b *bench) error { return b.RemoveManifest(b.t.Context(), "r", d, nil) },
			func(b *bench) bool { return has(b.Manifest(b.t.Context(), "r", long)) },
		},
		"what a manifest names": {
			layout.Blob(d),
			func(b *bench) error { return third(b.Member(b.t.Context(), "r", config)) },
			func(b *bench) error { return b.RemoveManifest(b.t.Context(), "r", d, nil) },
			func(b *bench) bool { _, ok, _ := b.Member(b.t.Context(), "r", config); return ok },
		},
		"bytes of a manifest": {
			layout.Blob(d),
			func(b *bench) error { return second(b.Manifest(b.t.Context(), "r", d)) },
			func(b *bench) error { return second(b.RemoveBlob(b.t.Context(), d, nil)) },
			func(b *bench) bool { return has(b.Manifest(b.t.Context(), "r", d)) },
		},
		"link": {
			layout.LayerLink("r", layer),
			func(b *bench) error { return third(b.Member(b.t.Context(), "r", layer)) },
			func(b *bench) error { return b.Unlink(b.t.Context(), "r", layer, nil) },
			func(b *bench) bool { _, ok, _ := b.Member(b.t.Context(), "r", layer); return ok },
		},
		"bytes": {
			layout.Blob(layer),
			func(b *bench) error { return third(b.OpenBlob(b.t.Context(), layer)) },
			func(b *bench) error { return second(b.RemoveBlob(b.t.Context(), layer, nil)) },
			func(b *bench) bool { return has(b.StatBlob(b.t.Context(), layer)) },
		},
		"record": {
			layout.Record("s"),
			func(b *bench) error { return second(b.Record(b.t.Context(), "s")) },
			func(b *bench) error { // which looks for the record itself
				other := New(b.store, nil)
				defer other.Close()
				if err := other.Forget(b.t.Context(), "s"); err != nil {
					return err
				}
				g := b.Tree.guards.of("s")
				g.removals.Add(1)
				return nil
			},
			func(b *bench) bool { return has(b.Record(b.t.Context(), "s")) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.put("r", body)
			_, err := b.PutManifest(t.Context(), "r", long, []byte(body), nil)
			b.ok(err)
			b.layer("r", "a layer")
			b.ok(b.PutRecord(t.Context(), "s", record))
			b.restart()
			h := b.hold(c.key)
			done := make(chan error)
			go func() { done <- c.read(b) }()
			arrive(t, "the reading", h.reading)
			b.Tree.store = b.store
			if err := c.remove(b); err != nil {
				t.Error(err)
			}
			close(h.goOn)
			for { // a repository may be read twice
				select {
				case <-h.reading:
					continue
				case err := <-done:
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
					}
				case <-time.After(time.Minute):
					t.Fatal("the reading does not end")
				}
				break
			}
			b.settle()
			if c.has(b) {
				t.Error("it is still there")
			}
		})
	}
}

func has[T any](_ T, err error) bool { return err == nil }

// TestScanWhileRemoved: of two manifests that name a blob one is removed while
// the repository is being read. The other goes on proving it.
func TestScanWhileRemoved(t *testing.T) {
	b := newBench(t)
	shared := digest.FromString("shared")
	first, second := image(shared), image(shared, shared)
	b.put("r", first)
	b.put("r", second)
	b.restart()
	for _, body := range []string{first, second} {
		h := b.hold(layout.Blob(digest.FromString(body)))
		found := make(chan bool)
		go func() {
			_, ok, err := b.Member(t.Context(), "r", shared)
			if err != nil {
				t.Error(err)
			}
			found <- ok
		}()
		arrive(t, "the reading", h.reading)
		b.Tree.store = b.store
		// What it names has been learnt from the other, if that was read first.
		b.ok(b.RemoveManifest(t.Context(), "r", digest.FromString(body), nil))
		close(h.goOn)
		for {
			select {
			case <-h.reading:
				continue
			case ok := <-found:
				if !ok {
					t.Error("it is no member")
				}
			case <-time.After(time.Minute):
				t.Fatal("no answer")
			}
			break
		}
		b.put("r", body)
		b.restart()
	}
}

// TestLinkWhileRemoved: a link that comes while bytes are being removed comes too
// late.
func TestLinkWhileRemoved(t *testing.T) {
	b := newBench(t)
	d := b.blob("a layer")
	linked := make(chan error)
	removed, err := b.RemoveBlob(t.Context(), d, func() (bool, error) {
		go func() { linked <- b.LinkBlob(t.Context(), "r", d, d) }()
		select {
		case err := <-linked:
			t.Errorf("linked in between: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		return false, nil
	})
	if !removed || err != nil {
		t.Errorf("RemoveBlob: %v, %v", removed, err)
	}
	if err := arrive(t, "the link", linked); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("LinkBlob: %v", err)
	}
	b.wantFiles("docker/registry/v2/repositories")
}

// stalled lets the deletion of one key wait.
type stalled struct {
	storage.Store
	key   string
	begun chan struct{}
	goOn  chan struct{}
}

func (s *stalled) Delete(ctx context.Context, key string) error {
	if key == s.key {
		s.begun <- struct{}{}
		<-s.goOn
	}
	return s.Store.Delete(ctx, key)
}

// TestOneAfterTheOther: what is removed and put at once is put after it was
// removed, and told of in this order.
func TestOneAfterTheOther(t *testing.T) {
	layer, body := digest.FromString("a layer"), image(digest.FromString("config"))
	d := digest.FromString(body)
	ctx := t.Context()
	put := func(b *bench) error { return second(b.PutManifest(ctx, "r", d, []byte(body), nil)) }
	for name, c := range map[string]struct {
		key    string
		remove func(b *bench) error
		put    func(b *bench) error
		told   []string
	}{
		"tag": {
			layout.TagLink("r", "v1"),
			func(b *bench) error { return b.RemoveTag(ctx, "r", "v1", d, nil) },
			func(b *bench) error { return b.SetTag(ctx, "r", "v1", layer, time.Now(), nil) },
			[]string{"untagged r v1", "tagged r v1 " + short(layer)},
		},
		"gone tag": {
			layout.TagRecord("r", "v1"),
			func(b *bench) error { return b.RemoveTag(ctx, "r", "v1", d, nil) },
			func(b *bench) error {
				if err := b.SetGone(ctx, "r", "v1", time.Now()); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("got %w", err)
				}
				return nil
			},
			[]string{"untagged r v1"},
		},
		"manifest": {
			layout.RevisionLink("r", d),
			func(b *bench) error { return b.RemoveManifest(ctx, "r", d, nil) },
			put,
			[]string{"unmanifested r " + short(d), "manifested r " + short(d)},
		},
		"link": {
			layout.LayerLink("r", layer),
			func(b *bench) error { return b.Unlink(ctx, "r", layer, nil) },
			func(b *bench) error { return b.LinkBlob(ctx, "r", layer, layer) },
			[]string{"unlinked r " + short(layer), "linked r " + short(layer)},
		},
		"bytes": {
			layout.Blob(d),
			func(b *bench) error { return second(b.RemoveBlob(ctx, d, nil)) },
			put,
			[]string{"removed " + short(d), "manifested r " + short(d)},
		},
		"child": {
			layout.Blob(d),
			func(b *bench) error { return second(b.RemoveBlob(ctx, d, nil)) },
			func(b *bench) error {
				if err := second(b.Manifest(ctx, "s", d)); !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("got %w", err)
				}
				return nil
			},
			[]string{"removed " + short(d)},
		},
		"repository": {
			layout.Record("empty"),
			func(b *bench) error { return b.Forget(ctx, "empty") },
			func(b *bench) error { return b.LinkBlob(ctx, "empty", layer, layer) },
			[]string{"forgotten empty", "recorded empty", "linked empty " + short(layer)},
		},
		"record": {
			layout.Record("empty"),
			func(b *bench) error { return b.Forget(ctx, "empty") },
			func(b *bench) error { return b.PutRecord(ctx, "empty", Record{Class: Mirrored}) },
			[]string{"forgotten empty", "recorded empty"},
		},
		"pin": {
			layout.Pin("r", "v1", ""),
			func(b *bench) error { return second(b.Unpin(ctx, "r", oci.Reference{Tag: "v1"})) },
			func(b *bench) error { return b.Pin(ctx, "r", oci.Reference{Tag: "v1"}, time.Now()) },
			[]string{"unpinned r v1", "pinned r v1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.ok(put(b))
			b.layer("r", "a layer")
			b.put("s", index(d))
			b.ok(b.SetTag(ctx, "r", "v1", d, time.Now(), nil))
			b.ok(b.PutRecord(ctx, "empty", Record{Class: Mirrored}))
			b.ok(b.Pin(ctx, "r", oci.Reference{Tag: "v1"}, time.Now()))
			b.told.take()
			s := &stalled{Store: b.store, key: c.key, begun: make(chan struct{}), goOn: make(chan struct{})}
			b.Tree.store = s
			removed, done := make(chan error), make(chan error)
			go func() { removed <- c.remove(b) }()
			arrive(t, "the removal", s.begun)
			go func() { done <- c.put(b) }()
			select {
			case err := <-done:
				t.Fatalf("put while it is being removed: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			close(s.goOn)
			b.ok(arrive(t, "the end of the removal", removed))
			b.ok(arrive(t, "the end", done))
			b.wantTold(c.told...)
		})
	}
}

// TestToldIsStored: whatever happens at once, and whatever fails, what has been
// told of is what is stored.
func TestToldIsStored(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	var mu sync.Mutex
	model := map[string]string{}
	b.told.hook = func(c Change) {
		mu.Lock()
		defer mu.Unlock()
		b.told.changes = nil
		switch c.Kind {
		case Recorded:
			model["record "+c.Repository] = string(c.Record.Class)
		case Manifested:
			model["manifest "+c.Repository+" "+short(c.Canonical)] = "held"
			model["blob "+short(c.Canonical)] = "held"
		case Linked:
			model["link "+c.Repository+" "+short(c.Canonical)] = "held"
			model["blob "+short(c.Canonical)] = "held"
		case Tagged:
			model["tag "+c.Repository+" "+c.Tag] = short(c.Canonical)
		case Untagged:
			delete(model, "tag "+c.Repository+" "+c.Tag)
		case Unmanifested:
			delete(model, "manifest "+c.Repository+" "+short(c.Canonical))
		case Unlinked:
			delete(model, "link "+c.Repository+" "+short(c.Canonical))
		case Removed:
			delete(model, "blob "+short(c.Canonical))
		case Forgotten:
			maps.DeleteFunc(model, func(key, _ string) bool {
				return !strings.HasPrefix(key, "blob ") && strings.Fields(key)[1] == c.Repository
			})
		}
	}
	b.Tree.store = full{b.store, func(key string) bool {
		return strings.HasPrefix(key, "docker/") && rand.IntN(8) == 0 // stored or not
	}}
	bodies := []string{index(), image(digest.FromString("a layer"))}
	layers := []string{"a layer", "another"}
	repositories := []string{"r", "s"}
	for _, repository := range repositories {
		b.ok(b.PutRecord(ctx, repository, Record{Class: Mirrored}))
	}
	var wg sync.WaitGroup
	for g := range 8 {
		random := rand.New(rand.NewPCG(uint64(g), 1))
		wg.Go(func() {
			for range 300 {
				repository, tag := repositories[random.IntN(2)], []string{"v1", "v2"}[random.IntN(8)/7]
				body, layer := bodies[random.IntN(2)], layers[random.IntN(8)/7]
				d, l := digest.FromString(body), digest.FromString(layer)
				switch random.IntN(10) {
				case 0, 1:
					b.PutManifest(ctx, repository, d, []byte(body), nil)
				case 2:
					b.Tree.store.Put(ctx, layout.Blob(l), []byte(layer), storage.Lazy)
					b.LinkBlob(ctx, repository, l, l)
				case 3:
					b.SetTag(ctx, repository, tag, d, time.Now(), nil)
				case 4:
					b.RemoveTag(ctx, repository, tag, d, nil)
				case 5:
					b.RemoveManifest(ctx, repository, d, nil)
				case 6:
					b.Unlink(ctx, repository, l, nil)
				case 7:
					b.RemoveBlob(ctx, []digest.Digest{d, l}[random.IntN(2)], nil)
				case 8:
					b.Forget(ctx, repository)
				case 9:
					b.Manifest(ctx, repository, d)
					b.Member(ctx, repository, l)
				}
			}
		})
	}
	wg.Wait()
	stored := map[string]string{}
	for _, repository := range repositories {
		if r, err := b.Record(ctx, repository); err == nil {
			stored["record "+repository] = string(r.Class)
		}
		for _, tag := range []string{"v1", "v2"} {
			if d, err := b.Tag(ctx, repository, tag); err == nil {
				stored["tag "+repository+" "+tag] = short(d)
			}
		}
		for _, body := range bodies {
			d := digest.FromString(body)
			if _, err := b.store.Stat(ctx, layout.RevisionLink(repository, d)); err == nil {
				stored["manifest "+repository+" "+short(d)] = "held"
			}
		}
		for _, layer := range layers {
			d := digest.FromString(layer)
			if _, err := b.store.Stat(ctx, layout.LayerLink(repository, d)); err == nil {
				stored["link "+repository+" "+short(d)] = "held"
			}
		}
	}
	for _, content := range append(bodies, layers...) {
		if _, err := b.store.Stat(ctx, layout.Blob(digest.FromString(content))); err == nil {
			stored["blob "+short(digest.FromString(content))] = "held"
		}
	}
	// A fill stores bytes before it links them, and if that fails nobody has been
	// told of them.
	for _, layer := range layers {
		key := "blob " + short(digest.FromString(layer))
		if stored[key] != "" && model[key] == "" {
			delete(stored, key)
		}
	}
	if !maps.Equal(model, stored) {
		t.Errorf("told\n%v\nstored\n%v", model, stored)
	}
}
