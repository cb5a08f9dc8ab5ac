package retain

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
)

// Note is told of every change of the tree. It does not block.
func (k *Keeper) Note(c tree.Change) {}

// Flush waits until everything noted before is in the catalog. It fails when
// there is no catalog, or some of it has been dropped.
func (k *Keeper) Flush(ctx context.Context) error { panic("not written") }

// incomplete notes that something in the store may be missing from the catalog:
// nothing is deleted from now on, until a reconcile. Whatever runs into a
// difference that it cannot explain may call it.
func (k *Keeper) incomplete(reason string) {}

// doubts counts the calls of incomplete. A reconcile asks for it before it
// begins.
func (k *Keeper) doubts() uint64 { panic("not written") }

// completed notes, after a reconcile, that everything is in the catalog, unless
// there has been a doubt since doubts returned n. It flushes before.
func (k *Keeper) completed(ctx context.Context, n uint64) (bool, error) { panic("not written") }

// mayDelete returns the catalog if it is complete, or an error that says why
// nothing may be deleted now.
func (k *Keeper) mayDelete() (*catalog.Catalog, error) { panic("not written") }

// needed says whether a blob is referred to: by a change not yet written, or by
// the catalog. It is what RemoveBlob asks.
func (k *Keeper) needed(ctx context.Context, d digest.Digest) func() (bool, error) {
	return func() (bool, error) { panic("not written") }
}

// Complete says since when all that is stored is in the catalog; zero: it is not.
func (k *Keeper) completeSince() time.Time { panic("not written") }
