package retain

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
)

// errLarge says that a root takes more than a limit.
var errLarge = errors.New("larger than the limit")

// A watch sees what is noted while something is chosen and removed, whether or
// not it has been written since: what somebody has come back to stays.
type watch struct {
	keeper *Keeper

	// Guarded by keeper.journal.mu.
	seen map[watched]bool
	all  bool             // more than can be remembered, or what cannot be told apart
	read map[watched]bool // blobs that clients have asked for; nil: it does not matter
}

// watched is a digest in a repository, or with "" anywhere.
type watched struct {
	repository string
	digest     digest.Digest
}

// watch begins one, which somebody has to end. What was noted before is in the
// catalog after the next Flush.
func (k *Keeper) watch() *watch {
	w := &watch{keeper: k, seen: map[watched]bool{}}
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	k.journal.watches[w] = true
	return w
}

// watchReads begins one that sees reads of blobs, too.
func (k *Keeper) watchReads() *watch {
	w := k.watch()
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	w.read = map[watched]bool{}
	return w
}

func (w *watch) end() {
	w.keeper.journal.mu.Lock()
	defer w.keeper.journal.mu.Unlock()
	delete(w.keeper.journal.watches, w)
}

// see notes a change. The journal's lock is held.
func (w *watch) see(c tree.Change) {
	switch {
	case c.Kind == tree.Pinned, c.Kind == tree.Recorded && (c.Record == nil || c.Record.Class != tree.Mirrored), len(w.seen)+len(w.read) > maxNamed:
		// It may be about everything that hangs together with what it names.
		w.all, w.seen = true, nil
	}
	if w.all {
		return
	}
	if c.Kind == tree.ReadBlob && w.read != nil {
		w.read[watched{c.Repository, c.Canonical}] = true
	}
	names(c, func(d digest.Digest) {
		w.seen[watched{c.Repository, d}] = true
		w.seen[watched{"", d}] = true
	})
}

// needs says whether somebody has begun to refer to a digest in a repository, or
// with "" anywhere, since the watch began. It is what the tree asks.
func (w *watch) needs(repository string, d digest.Digest) func() (bool, error) {
	return func() (bool, error) {
		if _, err := w.keeper.mayDelete(); err != nil {
			return true, err
		}
		w.keeper.journal.mu.Lock()
		defer w.keeper.journal.mu.Unlock()
		return w.all || w.seen[watched{repository, d}] || w.read[watched{repository, d}], nil
	}
}

// removeRoot removes a root, and what nothing else in the store refers to
// without it; or nothing, if that takes more than a limit that is not 0. What
// has come meanwhile stays. It is in the catalog then, so that two roots that
// share something do not leave it behind. k.eviction.running is held.
func (k *Keeper) removeRoot(ctx context.Context, c *catalog.Catalog, root catalog.Root, limit int64) (gone Evicted, err error) {
	w := k.watch()
	defer w.end()
	// What has been noted before is in the catalog then.
	if err := k.Flush(ctx); err != nil {
		return gone, err
	}
	removal, err := c.Removal(ctx, root)
	if err != nil {
		return gone, err
	}
	if limit > 0 && removal.Bytes > limit {
		return gone, errLarge
	}
	if root.Tag == "" && len(removal.Manifests) == 0 {
		return gone, nil // it is part of something by now
	}
	if root.Tag != "" {
		if err := k.tree.RemoveTag(ctx, root.Repository, root.Tag, root.Digest, w.needs(root.Repository, root.Digest)); err != nil {
			return gone, err
		}
	}
	for i, d := range removal.Manifests {
		err := k.tree.RemoveManifest(ctx, root.Repository, d, w.needs(root.Repository, d))
		if errors.Is(err, tree.ErrNeeded) && (i > 0 || root.Tag != "") {
			continue
		}
		if err != nil {
			return gone, err
		}
	}
	gone.Roots = 1
	for _, d := range removal.Links {
		if err := k.tree.Unlink(ctx, root.Repository, d, w.needs(root.Repository, d)); err != nil && !errors.Is(err, tree.ErrNeeded) {
			return gone, err
		}
	}
	// Or the catalog would say that what has been removed refers to them.
	if err := k.Flush(ctx); err != nil {
		return gone, err
	}
	for _, d := range removal.Blobs {
		removed, err := k.tree.RemoveBlob(ctx, d, k.needed(ctx, d))
		if err != nil {
			return gone, err
		}
		if removed {
			gone.Blobs++
		}
	}
	if all := int64(len(removal.Blobs)); gone.Blobs == all {
		gone.Bytes = removal.Bytes
	} else {
		gone.Bytes = removal.Bytes / all * gone.Blobs
	}
	return gone, k.Flush(ctx)
}

// evictBlob deletes the bytes of a blob, which manifests of mirrored repositories
// may go on naming: it is fetched again when it is asked for. w has watched since
// the blob was chosen.
func (k *Keeper) evictBlob(ctx context.Context, c *catalog.Catalog, s *scope, w *watch, blob catalog.Blob) error {
	owners, err := c.Owners(ctx, blob.Digest, maxOwners)
	if err != nil || hosted(owners) {
		return err
	}
	elsewhere := len(owners) == maxOwners
	for _, owner := range owners {
		if s.upstream != "" && owner.Upstream != s.upstream {
			elsewhere = true
			continue
		}
		err := k.tree.Unlink(ctx, owner.Name, blob.Digest, w.needs("", blob.Digest))
		if errors.Is(err, tree.ErrNeeded) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	if elsewhere {
		return nil // it is in another's budget
	}
	removed, err := k.tree.RemoveBlob(ctx, blob.Digest, w.needs("", blob.Digest))
	if err != nil || !removed {
		return err
	}
	k.count(s, Evicted{Blobs: 1, Bytes: blob.Size})
	return k.Flush(ctx)
}

// maxOwners is how many repositories a blob may belong to that is evicted by
// itself.
const maxOwners = 1_000
