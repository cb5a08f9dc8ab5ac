package retain

import (
	"context"
	"errors"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/opencontainers/go-digest"
)

// errLarge says that a root takes more than a limit.
var errLarge = errors.New("larger than the limit")

// removeRoot removes a root, and what nothing else in the store refers to
// without it; or nothing, if that takes more than a limit that is not 0. What
// has come meanwhile stays. It is in the catalog then, so that two roots that
// share something do not leave it behind. k.eviction.running is held.
func (k *Keeper) removeRoot(ctx context.Context, c *catalog.Catalog, root catalog.Root, limit int64) (gone Evicted, err error) {
	// What has been noted is in the catalog now; what is noted from now on is
	// pending, or has been written, when RemoveBlob asks.
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
		if err := k.tree.RemoveTag(ctx, root.Repository, root.Tag, root.Digest); err != nil {
			return gone, err
		}
	}
	for _, d := range removal.Manifests {
		if k.isPending(d) {
			continue // somebody wants it again
		}
		if err := k.tree.RemoveManifest(ctx, root.Repository, d); err != nil {
			return gone, err
		}
	}
	gone.Roots = 1
	for _, d := range removal.Links {
		if k.isPending(d) {
			continue
		}
		if err := k.tree.Unlink(ctx, root.Repository, d); err != nil {
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
// may go on naming: it is fetched again when it is asked for.
func (k *Keeper) evictBlob(ctx context.Context, c *catalog.Catalog, s *scope, blob catalog.Blob) error {
	owners, err := c.Owners(ctx, blob.Digest, maxOwners)
	if err != nil {
		return err
	}
	elsewhere := len(owners) == maxOwners
	for _, owner := range owners {
		if s.upstream != "" && owner.Upstream != s.upstream {
			elsewhere = true
			continue
		}
		if k.isPending(blob.Digest) {
			return nil
		}
		if err := k.tree.Unlink(ctx, owner.Name, blob.Digest); err != nil {
			return err
		}
	}
	if elsewhere {
		return nil // it is in another's budget
	}
	removed, err := k.tree.RemoveBlob(ctx, blob.Digest, k.wanted(blob.Digest))
	if err != nil || !removed {
		return err
	}
	k.count(s, Evicted{Blobs: 1, Bytes: blob.Size})
	return k.Flush(ctx)
}

// maxOwners is how many repositories a blob may belong to that is evicted by
// itself.
const maxOwners = 1_000

// wanted says whether somebody has just begun to refer to a blob.
func (k *Keeper) wanted(d digest.Digest) func() (bool, error) {
	return func() (bool, error) {
		_, err := k.mayDelete()
		return err != nil || k.isPending(d), err
	}
}
