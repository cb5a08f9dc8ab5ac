package tree

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

// between is a store that does something once, after it has described a value.
type between struct {
	storage.Store
	key string
	do  func()
}

func (s *between) Stat(ctx context.Context, key string) (storage.Info, error) {
	info, err := s.Store.Stat(ctx, key)
	if key == s.key && s.do != nil {
		do := s.do
		s.do = nil
		do()
	}
	return info, err
}

// What is told of the store is true when it is told: who removes it meanwhile
// removes it before or after, and the last word is the right one.
func TestTellInOrder(t *testing.T) {
	body := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}`)
	const repository = "docker.io/a"
	m := digest.FromBytes(body)
	for name, test := range map[string]struct {
		key    string // described by what tells
		tell   func(*Tree) error
		remove func(*Tree) error
		last   ChangeKind
	}{
		"tag": {layout.TagLink(repository, "x"),
			func(t *Tree) error { return t.TellTag(context.Background(), repository, "x") },
			func(t *Tree) error { return t.RemoveTag(context.Background(), repository, "x", m, nil) }, Untagged},
		"manifest": {layout.RevisionLink(repository, m),
			func(t *Tree) error { return t.TellManifest(context.Background(), repository, m) },
			func(t *Tree) error { return t.RemoveManifest(context.Background(), repository, m, nil) }, Unmanifested},
		"link": {layout.LayerLink(repository, m),
			func(t *Tree) error { return t.TellLink(context.Background(), repository, m) },
			func(t *Tree) error { return t.Unlink(context.Background(), repository, m, nil) }, Unlinked},
		"blob": {layout.Blob(m),
			func(t *Tree) error { return t.TellBlob(context.Background(), m) },
			func(t *Tree) error {
				_, err := t.RemoveBlob(context.Background(), m, nil)
				return err
			}, Removed},
		"pin": {layout.Pin(repository, "x", ""),
			func(t *Tree) error { return t.TellPin(context.Background(), repository, oci.Reference{Tag: "x"}) },
			func(t *Tree) error {
				_, err := t.Unpin(context.Background(), repository, oci.Reference{Tag: "x"})
				return err
			}, Unpinned},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var told []ChangeKind
			store := &between{Store: disktest.Open(t, t.TempDir())}
			defer store.Close()
			tree := New(store, func(c Change) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, c.Kind)
			})
			defer tree.Close()
			ctx := t.Context()
			if _, err := tree.PutManifest(ctx, repository, m, body, nil); err != nil {
				t.Fatal(err)
			}
			if err := tree.SetTag(ctx, repository, "x", m, time.Now(), nil); err != nil {
				t.Fatal(err)
			}
			if err := tree.LinkBlob(ctx, repository, m, m); err != nil {
				t.Fatal(err)
			}
			if err := tree.Pin(ctx, repository, oci.Reference{Tag: "x"}, time.Now()); err != nil {
				t.Fatal(err)
			}
			told = nil
			removed := make(chan error, 1)
			store.key, store.do = test.key, func() {
				go func() { removed <- test.remove(tree) }()
				// It cannot end before this returns; if it could, it would in less.
				wait := time.NewTimer(100 * time.Millisecond)
				defer wait.Stop()
				select {
				case err := <-removed:
					removed <- err
				case <-wait.C:
				}
			}
			if err := test.tell(tree); err != nil {
				t.Fatal(err)
			}
			if err := <-removed; err != nil {
				t.Fatal(err)
			}
			if len(told) != 2 || told[1] != test.last {
				t.Errorf("told were %v, want %v last", told, test.last)
			}
			// And again there is nothing.
			told = nil
			if err := test.tell(tree); err != nil || !slices.Equal(told, []ChangeKind{test.last}) {
				t.Errorf("told were %v, %v", told, err)
			}
		})
	}
}
