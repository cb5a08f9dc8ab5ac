package tree

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// newDistantBench is a tree on a store with a distant place in memory.
func newDistantBench(t *testing.T) (*bench, *storagetest.Double) {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir()}
	store := storagetest.NewDouble(disktest.Open(t, b.dir))
	b.store = store
	b.Tree = New(store, b.told.note)
	t.Cleanup(func() {
		b.Tree.Close()
		b.store.Close()
	})
	return b, store
}

// TestDistantBlobs: a blob that is not near is not read for one who asks, be it ever
// so small, and what is known of it is said.
func TestDistantBlobs(t *testing.T) {
	for _, size := range []int{100, maxHot + 1} {
		b, store := newDistantBench(t)
		data := bytes.Repeat([]byte("x"), size)
		d := digest.FromBytes(data)
		key := layout.Blob(d)
		if _, _, err := b.OpenBlob(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what nobody has: %v", err)
		}
		store.Place(key, data)
		for range 2 {
			if _, info, err := b.OpenBlob(t.Context(), d); !errors.Is(err, storage.ErrDistant) || info.Size != int64(size) {
				t.Errorf("%+v, %v", info, err)
			}
		}
		if info, err := b.StatBlob(t.Context(), d); err != nil || info.Size != int64(size) {
			t.Errorf("%+v, %v", info, err)
		}
		if asked := store.Asks("get", ""); len(asked) > 0 {
			t.Errorf("asked for %v", asked)
		}
		if err := store.Store.Put(t.Context(), key, data, storage.Lazy); err != nil {
			t.Fatal(err)
		}
		b.opens(d, string(data))
	}
}

// TestNearCopyWrong: a near copy that is wrong is let go of, and nothing is damaged.
func TestNearCopyWrong(t *testing.T) {
	for _, size := range []int{100, maxHot + 1} {
		for _, doubtful := range []bool{false, true} {
			b, store := newDistantBench(t)
			suspected := false
			b.Guard(func(context.Context, digest.Digest) (bool, error) { return true, nil }, func(digest.Digest) { suspected = true })
			data := bytes.Repeat([]byte("x"), size)
			d := digest.FromBytes(data)
			key := layout.Blob(d)
			store.Place(key, data)
			if err := store.Store.Put(t.Context(), key, bytes.Repeat([]byte("y"), size), storage.Lazy); err != nil {
				t.Fatal(err)
			}
			if doubtful {
				store.Store = &doubting{Store: store.Store, vouched: make(chan string, 100), doubtful: map[string]bool{key: true}}
			}
			r, info, err := b.OpenBlob(t.Context(), d)
			if size <= maxHot || doubtful {
				if !errors.Is(err, storage.ErrDistant) || info.Size != int64(size) {
					t.Errorf("%d bytes, doubtful %v: %+v, %v", size, doubtful, info, err)
				}
			} else if err == nil {
				r.Close() // nobody has looked
			}
			if err := b.Prove(t.Context(), d); err != nil {
				t.Errorf("%d bytes, doubtful %v: %v", size, doubtful, err)
			}
			if suspected || store.Distrusted(key) || !bytes.Equal(store.Placed(key), data) {
				t.Errorf("%d bytes, doubtful %v: the distant bytes are suspected, or gone", size, doubtful)
			}
		}
	}
}

// TestDistantBytesWrong: what is wrong at the distant place is damaged, deleted there
// unless it is to stay, and replaced by what comes in its place.
func TestDistantBytesWrong(t *testing.T) {
	for _, stays := range []bool{false, true} {
		b, store := newDistantBench(t)
		b.Guard(func(context.Context, digest.Digest) (bool, error) { return stays, nil }, func(digest.Digest) {})
		data := []byte("right")
		d := digest.FromBytes(data)
		key := layout.Blob(d)
		store.Place(key, []byte("wrong"))
		if err := b.Prove(t.Context(), d); !errors.Is(err, ErrDamaged) {
			t.Errorf("stays %v: %v", stays, err)
		}
		if got := store.Placed(key); (got != nil) != stays {
			t.Errorf("stays %v: %q is there", stays, got)
		}
		path := filepath.Join(t.TempDir(), "blob")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.PutBlob(t.Context(), "apps/web", []digest.Digest{d}, path, int64(len(data))); err != nil {
			t.Fatal(err)
		}
		if got := store.Placed(key); !bytes.Equal(got, data) {
			t.Errorf("stays %v: %q is there after a push", stays, got)
		}
	}
}

// TestDistantManifest: a near copy of a manifest that is wrong does not hide it, and
// distant bytes that are wrong are replaced.
func TestDistantManifest(t *testing.T) {
	b, store := newDistantBench(t)
	b.record("r", Mirrored)
	body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
	d := digest.FromBytes(body)
	key := layout.Blob(d)
	bad := bytes.Clone(body)
	bad[len(bad)-1] = ' '
	if _, err := b.PutManifest(t.Context(), "r", d, body, nil); err != nil {
		t.Fatal(err)
	}
	cold := New(store, nil)
	defer cold.Close()
	if err := store.Store.Put(t.Context(), key, bad, storage.Lazy); err != nil {
		t.Fatal(err)
	}
	if m, err := cold.Manifest(t.Context(), "r", d); err != nil || !bytes.Equal(m.Body, body) {
		t.Fatalf("%v", err)
	}
	store.Place(key, bad)
	colder := New(store, nil)
	defer colder.Close()
	if err := store.Store.Delete(t.Context(), key); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := colder.Manifest(t.Context(), "r", d); !errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
	if _, err := colder.PutManifest(t.Context(), "r", d, body, nil); err != nil {
		t.Fatal(err)
	}
	if got := store.Placed(key); !bytes.Equal(got, body) {
		t.Error("the distant bytes are still wrong")
	}
}

func (b *bench) record(repository string, class Class) {
	b.t.Helper()
	if _, err := b.Claim(b.t.Context(), repository, Record{Class: class, Upstream: "docker.io", Created: time.Unix(1, 0)}); err != nil {
		b.t.Fatal(err)
	}
}

// TestPushToDistant: a push is acknowledged when it is at the distant place, and leaves
// no link when it cannot get there.
func TestPushToDistant(t *testing.T) {
	b, store := newDistantBench(t)
	b.record("apps/web", Hosted)
	push := func(body string) (digest.Digest, error) {
		path := filepath.Join(t.TempDir(), "blob")
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		d := digest.FromString(body)
		return d, b.PutBlob(t.Context(), "apps/web", []digest.Digest{d}, path, int64(len(body)))
	}
	d, err := push("up")
	if err != nil || store.Placed(layout.Blob(d)) == nil || store.Placed(layout.LayerLink("apps/web", d)) == nil {
		t.Errorf("%v", err)
	}
	store.Down(true)
	d, err = push("down")
	if !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	if _, ok, err := b.Member(t.Context(), "apps/web", d); ok || err != nil {
		t.Errorf("it is a member: %v, %v", ok, err)
	}
	store.Down(false)
	if _, err := push("down"); err != nil {
		t.Errorf("%v", err)
	}
}

// TestNoLockOnTheNetwork: while the distant place does not answer one who reads, the
// locks that others need are free.
func TestNoLockOnTheNetwork(t *testing.T) {
	for _, c := range []struct {
		what string
		ask  func(ctx context.Context, b *bench, d digest.Digest) error
		free func(b *bench, d digest.Digest) bool
	}{
		{"a child that is adopted", func(ctx context.Context, b *bench, d digest.Digest) error {
			_, err := b.adopt(ctx, "r", d)
			return err
		}, func(b *bench, d digest.Digest) bool {
			l := b.digests.of(string(d))
			ok := l.TryLock()
			if ok {
				l.Unlock()
			}
			return ok
		}},
		{"a manifest", func(ctx context.Context, b *bench, d digest.Digest) error {
			_, err := b.Manifest(ctx, "r", d)
			return err
		}, guardFree},
		{"a member", func(ctx context.Context, b *bench, d digest.Digest) error {
			_, _, err := b.Member(ctx, "r", d)
			return err
		}, guardFree},
	} {
		b, store := newDistantBench(t)
		b.record("r", Mirrored)
		body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
		d := digest.FromBytes(body)
		store.Place(layout.Blob(d), body)
		store.Place(layout.RevisionLink("r", d), []byte(d))
		store.Place(layout.LayerLink("r", d), []byte(d))
		asked, gate := make(chan struct{}, 100), make(chan struct{})
		store.Trouble(func(a storagetest.Asked) error {
			if a.What == "get" {
				// What is read is removed meanwhile, so that it is looked at again.
				b.guards.of("r").removals.Add(1)
				asked <- struct{}{}
				<-gate
			}
			return nil
		})
		done := make(chan error, 1)
		go func() { done <- c.ask(context.Background(), b, d) }()
		<-asked
		if !c.free(b, d) {
			t.Errorf("%s: a lock is held", c.what)
		}
		gate <- struct{}{}
		for waiting := true; waiting; {
			select {
			case <-asked:
				if !c.free(b, d) {
					t.Errorf("%s: a lock is held when it is looked at again", c.what)
				}
				gate <- struct{}{}
			case err := <-done:
				waiting = false
				if err != nil {
					t.Errorf("%s: %v", c.what, err)
				}
			}
		}
	}
}

func guardFree(b *bench, _ digest.Digest) bool {
	g := b.guards.of("r")
	ok := g.mu.TryLock()
	if ok {
		g.mu.Unlock()
	}
	return ok
}
