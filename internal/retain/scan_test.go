package retain

import (
	"path/filepath"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func reference(t *testing.T, s string) oci.Reference {
	t.Helper()
	ref, err := oci.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// disk opens the store of a bench.
func (b *kept) disk() storage.Store {
	b.t.Helper()
	return disktest.Open(b.t, filepath.Join(b.dir, "store"))
}

// beginOn begins to keep another store than the disk's, with its own tree. The
// bench is not open.
func (b *kept) beginOn(store storage.Store) {
	b.t.Helper()
	core, logged := observer.New(zap.InfoLevel)
	b.store, b.logged = store, logged
	b.Keeper = New(store, zap.New(core))
	b.Keeper.now, b.Keeper.paces = b.clock.time, b.paces
	b.tree = tree.New(store, b.Note)
	b.Set(b.settings)
	open := b.catalog
	if open == nil {
		open = b.file
	}
	b.Begin(b.tree, Hooks{Catalog: open})
	b.open = true
}
