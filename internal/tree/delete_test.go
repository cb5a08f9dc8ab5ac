package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
)

// TestDelete: what is deleted is gone for all who ask afterwards, here and after a
// restart, and from the disk after one sync.
func TestDelete(t *testing.T) {
	b := newBench(t)
	ctx, data := t.Context(), "some layer."
	long := digest.SHA512.FromString(data)
	layer := b.push("r", data)
	b.ok(b.PutBlob(ctx, "r", []digest.Digest{layer, long}, b.upload(data), int64(len(data))))
	first, other := image(layer), image(long)
	one, two := b.pushManifest("r", first), b.pushManifest("r", other)
	alias := digest.SHA512.FromString(first)
	b.ok(second(b.PutManifest(ctx, "r", alias, []byte(first), anything)))
	parent := b.pushManifest("r", index(one))
	for tag, d := range map[string]digest.Digest{"a": one, "b": one, "c": alias, "d": two} {
		b.ok(b.SetTag(ctx, "r", tag, two, time.Now(), nil))
		b.ok(b.SetTag(ctx, "r", tag, d, time.Now(), nil))
	}
	l := b.ledger()
	b.told.take()

	if _, err := b.DeleteTag(ctx, "r", "none", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such tag: %v", err)
	}
	was, err := b.DeleteTag(ctx, "r", "a", nil)
	if err != nil || was != one {
		t.Errorf("it meant %s, %v", was, err)
	}
	l.lasts(t, "tag", 1)
	b.wantTold("untagged r a")
	b.wantTag("r", "a", "")
	b.wantManifest("r", one, first)

	for _, d := range []digest.Digest{layer, long} {
		if err := b.DeleteBlob(ctx, "r", d); !errors.Is(err, ErrNamed) {
			t.Errorf("blob %s is named: %v", d, err)
		}
	}
	b.wantMember("r", layer, true)
	b.wantTold()

	tags, err := b.DeleteManifest(ctx, "r", alias, nil)
	slices.Sort(tags)
	if err != nil || !slices.Equal(tags, []string{"b", "c"}) {
		t.Errorf("the tags %q went, %v", tags, err)
	}
	l.lasts(t, "manifest", 1)
	gone := func() {
		t.Helper()
		for _, d := range []digest.Digest{one, alias} {
			b.wantNoManifest("r", d) // though an index names it and its bytes are there
			if _, ok := b.Warm("r", d, time.Time{}); ok {
				t.Errorf("memory has %s", d)
			}
			if _, err := b.DeleteManifest(ctx, "r", d, nil); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("deleted twice: %v", err)
			}
		}
		for _, tag := range []string{"a", "b", "c"} {
			b.wantTag("r", tag, "")
		}
		b.wantTag("r", "d", two)
		b.wantManifest("r", two, other)
		b.wantManifest("r", parent, index(one))
	}
	gone()

	if err := b.DeleteBlob(ctx, "r", layer); !errors.Is(err, ErrNamed) {
		t.Errorf("it is named by its other digest: %v", err)
	}
	b.ok(second(b.DeleteManifest(ctx, "r", two, nil)))
	b.ok(second(b.Mount(ctx, "s", "r", layer)))
	b.told.take()
	l.syncs = 0
	b.ok(b.DeleteBlob(ctx, "r", long))
	l.lasts(t, "blob", 1)
	b.wantTold("unlinked r " + short(layer))
	for _, d := range []digest.Digest{layer, long} {
		b.wantMember("r", d, false)
		if err := b.DeleteBlob(ctx, "r", d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("deleted twice: %v", err)
		}
	}
	b.wantMember("s", layer, true)
	if _, err := b.StatBlob(ctx, layer); err != nil {
		t.Errorf("the bytes are gone at once: %v", err)
	}
	b.restart()
	b.wantNoManifest("r", one)
	b.wantMember("r", layer, false)
}

// TestDeleteIsPermitted: nothing is deleted that permit does not allow.
func TestDeleteIsPermitted(t *testing.T) {
	b := newBench(t)
	ctx, refused := t.Context(), errors.New("refused")
	d := b.pushManifest("r", index())
	for _, tag := range []string{"a", "b", "c"} {
		b.ok(b.SetTag(ctx, "r", tag, d, time.Now(), nil))
	}
	b.told.take()
	if _, err := b.DeleteTag(ctx, "r", "a", func(means digest.Digest) error {
		if means != d {
			t.Errorf("it means %s", means)
		}
		return refused
	}); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	for _, immutable := range []string{"a", "b", "c"} {
		tags, err := b.DeleteManifest(ctx, "r", d, func(tag string) error {
			if tag == immutable {
				return refused
			}
			return nil
		})
		if len(tags) > 0 || !errors.Is(err, refused) {
			t.Errorf("%q, %v", tags, err)
		}
	}
	b.wantTold()
	for _, tag := range []string{"a", "b", "c"} {
		b.wantTag("r", tag, d)
	}
	b.wantManifest("r", d, index())
}

// stall lets the deletion of a key wait.
func (b *bench) stall(key string) *stalled {
	s := &stalled{Store: b.store, key: key, begun: make(chan struct{}), goOn: make(chan struct{})}
	b.Tree.store = s
	return s
}

// later starts something that has to wait for what is under way, and says how it
// ends.
func (b *bench) later(do func() error) <-chan error {
	b.t.Helper()
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		b.t.Fatalf("it does not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	return done
}

// TestTagWhileDeleted: somebody tags a manifest while it is being deleted.
func TestTagWhileDeleted(t *testing.T) {
	t.Run("before its links go", func(t *testing.T) {
		b := newBench(t)
		ctx := t.Context()
		d := b.pushManifest("r", index())
		b.ok(b.SetTag(ctx, "r", "first", d, time.Now(), nil))
		times := 0
		failpoint.Set(func(name string) {
			if name == "delete.untagged" {
				if times++; times == 1 {
					b.ok(b.SetTag(ctx, "r", "second", d, time.Now(), nil))
				}
			}
		})
		defer failpoint.Set(nil)
		tags, err := b.DeleteManifest(ctx, "r", d, nil)
		if err != nil || !slices.Equal(tags, []string{"first", "second"}) || times != 2 {
			t.Errorf("%q went in %d rounds, %v", tags, times, err)
		}
		b.wantTag("r", "second", "")
		b.wantNoManifest("r", d)
	})
	t.Run("while they go", func(t *testing.T) {
		b := newBench(t)
		ctx := t.Context()
		d := b.pushManifest("r", index())
		s := b.stall(layout.RevisionLink("r", d))
		deleted := make(chan error)
		go func() { deleted <- second(b.DeleteManifest(ctx, "r", d, nil)) }()
		arrive(t, "the deletion", s.begun)
		tagged := b.later(func() error { return b.SetTag(ctx, "r", "v1", d, time.Now(), nil) })
		close(s.goOn)
		b.ok(arrive(t, "the end", deleted))
		if err := arrive(t, "the tagging", tagged); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it was tagged: %v", err)
		}
		b.wantTag("r", "v1", "")
	})
}

// TestTagMovesWhileRead: a tag is moved on while it is being read, and what it meant
// is deleted. It has always meant something.
func TestTagMovesWhileRead(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	one, two := b.pushManifest("r", index()), b.pushManifest("r", index()+" ")
	b.ok(b.SetTag(ctx, "r", "v1", one, time.Now(), nil))
	h := b.hold(layout.TagLink("r", "v1"))
	read := make(chan *Manifest)
	go func() {
		m, err := b.Tagged(ctx, "r", "v1")
		if err != nil {
			t.Error(err)
		}
		read <- m
	}()
	arrive(t, "the reading", h.reading)
	b.Tree.store = b.store
	b.ok(b.SetTag(ctx, "r", "v1", two, time.Now(), nil))
	b.ok(second(b.DeleteManifest(ctx, "r", one, nil)))
	close(h.goOn)
	if m := arrive(t, "the manifest", read); m != nil && m.Digest != two {
		t.Errorf("it means %s", m.Digest)
	}
	b.ok(second(b.DeleteManifest(ctx, "r", two, nil)))
	if _, err := b.Tagged(ctx, "r", "v1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// TestRemovedWhilePushed: a manifest is pushed that names a blob which is being
// removed. Either it finds that the blob is missing, or the blob stays.
func TestRemovedWhilePushed(t *testing.T) {
	layer := digest.FromString("a layer")
	body := image(layer)
	d := digest.FromString(body)
	for name, c := range map[string]struct {
		key    string // of what the removal deletes
		remove func(b *bench, needed func() (bool, error)) error
		stays  error
	}{
		"bytes": {
			layout.Blob(layer),
			func(b *bench, needed func() (bool, error)) error {
				removed, err := b.RemoveBlob(b.t.Context(), layer, needed)
				if err == nil && !removed {
					err = ErrNeeded
				}
				return err
			},
			ErrNeeded,
		},
		"link": {
			layout.LayerLink("r", layer),
			func(b *bench, needed func() (bool, error)) error {
				return b.Unlink(b.t.Context(), "r", layer, needed)
			},
			ErrNeeded,
		},
		"link by a client": {
			layout.LayerLink("r", layer),
			func(b *bench, _ func() (bool, error)) error { return b.DeleteBlob(b.t.Context(), "r", layer) },
			ErrNamed,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			ctx := t.Context()
			var mu sync.Mutex
			named := false // as a journal would know
			b.told.hook = func(c Change) {
				mu.Lock()
				defer mu.Unlock()
				named = c.Kind == Manifested || named && c.Kind != Unmanifested
			}
			needed := func() (bool, error) {
				mu.Lock()
				defer mu.Unlock()
				return named, nil
			}
			b.push("r", "a layer")
			put := func(check func(*oci.Manifest) error) error {
				return second(b.PutManifest(ctx, "r", d, []byte(body), check))
			}

			// The removal is asked first, and has not begun to delete.
			s := b.stall(c.key)
			removed := make(chan error)
			go func() { removed <- c.remove(b, needed) }()
			arrive(t, "the removal", s.begun)
			pushed := b.later(func() error { return put(b.complete("r")) })
			close(s.goOn)
			b.ok(arrive(t, "the end of the removal", removed))
			if err := arrive(t, "the push", pushed); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a manifest was taken in without its blob: %v", err)
			}
			b.wantNoManifest("r", d)

			// The manifest comes first, and has found the blob.
			b.Tree.store = b.store
			b.push("r", "a layer")
			var gone <-chan error
			b.ok(put(func(m *oci.Manifest) error {
				err := b.complete("r")(m)
				gone = b.later(func() error { return c.remove(b, needed) })
				return err
			}))
			if err := arrive(t, "the removal", gone); !errors.Is(err, c.stays) {
				t.Errorf("the blob was removed: %v", err)
			}
			b.whole("r")
			b.wantManifest("r", d, body)
		})
	}
}

// TestRemovedWhileMounted: a blob is mounted while its bytes are being removed.
func TestRemovedWhileMounted(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	layer := b.push("r", "a layer")
	b.ok(b.Host(ctx, "s"))
	s := b.stall(layout.Blob(layer))
	removed := make(chan error)
	go func() { removed <- second(b.RemoveBlob(ctx, layer, nil)) }()
	arrive(t, "the removal", s.begun)
	mounted := b.later(func() error { return second(b.Mount(ctx, "s", "r", layer)) })
	close(s.goOn)
	b.ok(arrive(t, "the end of the removal", removed))
	if err := arrive(t, "the mount", mounted); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was mounted: %v", err)
	}
	b.wantMember("s", layer, false)
}

// TestBuiltOnUnsynced: a manifest names a blob that another client has pushed and is
// still syncing. It survives with the manifest.
func TestBuiltOnUnsynced(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.ok(b.Host(ctx, "r"))
	layer := digest.FromString("a layer")
	l := b.ledger()
	begun, goOn := make(chan struct{}), make(chan struct{})
	l.hold = func(keys []string) {
		if slices.Contains(keys, layout.Blob(layer)) && !slices.Contains(keys, layout.Blob(digest.FromString(image(layer)))) {
			begun <- struct{}{}
			<-goOn
		}
	}
	path := b.upload("a layer")
	pushed := make(chan error)
	go func() { pushed <- b.PutBlob(ctx, "r", []digest.Digest{layer}, path, 7) }()
	arrive(t, "the sync", begun)
	d := b.pushManifest("r", image(layer))
	l.lasts(t, "manifest", 1)
	close(goOn)
	b.ok(arrive(t, "the end", pushed))
	l.hold = nil
	l.syncs = 0
	b.pushManifest("r", image(layer, layer)) // it is synced now
	b.ok(b.SetTag(ctx, "r", "v1", d, time.Now(), nil))
	if n := len(b.Tree.unsynced.keys); n != 0 {
		t.Errorf("%d keys are taken for unsynced", n)
	}
}

// TestTaggedAtOnce: of two who move a tag at once the last wins, and both are in
// its index.
func TestTaggedAtOnce(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	var all []digest.Digest
	for i := range 8 {
		all = append(all, b.pushManifest("r", index()+strings.Repeat(" ", i)))
	}
	b.ok(b.SetTag(ctx, "r", "v1", all[0], time.Now(), nil))
	var mu sync.Mutex
	last, before := all[0], digest.Digest("")
	b.told.hook = func(c Change) {
		mu.Lock()
		defer mu.Unlock()
		if c.Kind == Tagged {
			last, before = c.Canonical, last
		}
	}
	var wg sync.WaitGroup
	for _, d := range all[1:] {
		wg.Go(func() {
			if err := b.SetTag(ctx, "r", "v1", d, time.Now(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	b.wantTag("r", "v1", last)
	if r, err := b.TagRecord(ctx, "r", "v1"); err != nil || r.Previous != before {
		t.Errorf("%+v, %v; want it to come from %s", r, err, before)
	}
	if events, err := b.History(ctx, "r", "v1"); err != nil || len(events) != len(all) {
		t.Errorf("%d events, %v", len(events), err)
	}
}

// TestHostedIsWhole: whatever is pushed, tagged, mounted, deleted and collected at
// once, a tag means a manifest that can be had, and a manifest has its blobs.
func TestHostedIsWhole(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	layers := []string{"a layer", "another", "a third"}
	var bodies []string
	holders := map[digest.Digest][]string{}
	for i, l := range layers {
		bodies = append(bodies, image(digest.FromString(l)), image(digest.FromString(l), digest.FromString(layers[(i+1)%3])))
	}
	var mu sync.Mutex
	model := map[string]bool{} // what has been told of: repository and digest
	b.told.hook = func(c Change) {
		mu.Lock()
		defer mu.Unlock()
		b.told.changes = nil
		key := c.Repository + " " + c.Canonical.String()
		switch c.Kind {
		case Manifested:
			model[key] = true
			for _, blob := range c.Manifest.Blobs {
				if !slices.Contains(holders[blob.Digest], key) {
					holders[blob.Digest] = append(holders[blob.Digest], key)
				}
			}
		case Unmanifested:
			delete(model, key)
		}
	}
	held := func(repository string, d digest.Digest) func() (bool, error) {
		return func() (bool, error) {
			mu.Lock()
			defer mu.Unlock()
			return slices.ContainsFunc(holders[d], func(key string) bool {
				return model[key] && strings.HasPrefix(key, repository)
			}), nil
		}
	}
	allowed := func(err error) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrNamed) && !errors.Is(err, ErrNeeded) {
			t.Error(err)
		}
	}
	repositories := []string{"r", "s"}
	for _, r := range repositories {
		b.ok(b.Host(ctx, r))
	}
	done := make(chan struct{})
	var wg, readers sync.WaitGroup
	for g := range 6 {
		random := rand.New(rand.NewPCG(uint64(g), 5))
		wg.Go(func() {
			for i := range 40 {
				r, other := repositories[random.IntN(2)], repositories[random.IntN(2)]
				layer, body, tag := layers[random.IntN(3)], bodies[random.IntN(len(bodies))], fmt.Sprintf("v%d", random.IntN(2))
				l, d := digest.FromString(layer), digest.FromString(body)
				switch random.IntN(10) {
				case 0, 1, 2:
					for _, layer := range layers {
						dir, err := b.store.Spool(fmt.Sprintf("u%d", g))
						if err != nil {
							t.Error(err)
							return
						}
						path := fmt.Sprintf("%s/%d", dir, i)
						if err := writeFile(path, layer); err != nil {
							t.Error(err)
							return
						}
						allowed(b.PutBlob(ctx, r, []digest.Digest{digest.FromString(layer)}, path, int64(len(layer))))
					}
					_, err := b.PutManifest(ctx, r, d, []byte(body), b.complete(r))
					allowed(err)
					if err == nil {
						allowed(b.SetTag(ctx, r, tag, d, time.Now(), nil))
					}
				case 3:
					_, err := b.Mount(ctx, r, other, l)
					allowed(err)
				case 4:
					allowed(b.SetTag(ctx, r, tag, d, time.Now(), nil))
				case 5:
					_, err := b.DeleteTag(ctx, r, tag, nil)
					allowed(err)
				case 6:
					_, err := b.DeleteManifest(ctx, r, d, nil)
					allowed(err)
				case 7:
					allowed(b.DeleteBlob(ctx, r, l))
				case 8:
					allowed(b.Unlink(ctx, r, l, held(r, l)))
				case 9:
					_, err := b.RemoveBlob(ctx, l, held("", l))
					allowed(err)
				}
			}
		})
	}
	for _, r := range repositories {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				_, err := b.Tagged(ctx, r, "v0")
				if _, gone := b.Tag(ctx, r, "v0"); err == nil || gone != nil {
					continue
				}
				// It may have been deleted and set again in between, over and over.
				for range 20 {
					if _, err = b.Tagged(ctx, r, "v0"); err == nil {
						break
					}
				}
				if d, gone := b.Tag(ctx, r, "v0"); err != nil && gone == nil {
					t.Errorf("%s:v0 means %s: %v", r, d, err)
				}
			}
		})
	}
	wg.Wait()
	close(done)
	readers.Wait()
	for range 2 {
		for _, r := range repositories {
			for manifest, err := range b.ListManifests(ctx, r) {
				b.ok(err)
				if _, err := b.Manifest(ctx, r, manifest.Digest); err != nil {
					t.Errorf("%s@%s: %v", r, manifest.Digest, err)
				}
			}
			for tag, err := range b.ListTags(ctx, r) {
				b.ok(err)
				if _, err := b.Manifest(ctx, r, tag.Digest); err != nil {
					t.Errorf("%s:%s: %v", r, tag.Tag, err)
				}
			}
			b.stored(ctx, r)
		}
		b.restart()
	}
}

// stored checks that a repository has the blobs that its manifests name.
func (b *bench) stored(ctx context.Context, repository string) {
	b.t.Helper()
	for manifest, err := range b.ListManifests(ctx, repository) {
		b.ok(err)
		m, err := b.Manifest(ctx, repository, manifest.Digest)
		if err != nil {
			continue
		}
		for _, blob := range m.Blobs {
			b.wantMember(repository, blob.Digest, true)
			if _, err := b.StatBlob(ctx, blob.Digest); err != nil {
				b.t.Errorf("%s@%s names %s: %v", repository, manifest.Digest, blob.Digest, err)
			}
		}
	}
}
