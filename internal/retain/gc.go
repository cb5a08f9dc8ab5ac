package retain

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
)

const (
	// gcBatch is how many are removed before the catalog hears of it, and before
	// a rest.
	gcBatch = 100
	// gcAgain is how often the comparison is made again if something has gone
	// past the catalog.
	gcAgain = 2
)

// GC begins to compare the catalog with the store and to delete what nothing
// refers to, or with dry to say what that is. One that is under way is
// returned. While another process uses the store the error is [ErrShared], of a dry
// run as well: nobody here knows what would go.
func (k *Keeper) GC(dry bool) (Job, error) {
	if err := k.afar.mayRemove(); err != nil {
		return Job{}, err
	}
	return k.start(Job{Kind: kindGC, Unit: "repositories", DryRun: dry}, func(ctx context.Context, j *job) error {
		if err := take(ctx, k.jobs.turn); err != nil {
			return err
		}
		defer func() { <-k.jobs.turn }()
		err := k.reconcileNow(ctx, j, false, !dry)
		for range gcAgain {
			if errors.Is(err, errDoubt) {
				err = k.reconcileNow(ctx, j, false, !dry)
			}
		}
		if err != nil {
			return err
		}
		return k.collect(ctx, j, dry)
	})
}

// collect deletes what nothing refers to.
func (k *Keeper) collect(ctx context.Context, j *job, dry bool) error {
	before := k.now().Add(-k.settings().Grace)
	if err := k.collectLinks(ctx, j, dry, before); err != nil {
		return fmt.Errorf("deleting links: %w", err)
	}
	if err := k.collectBlobs(ctx, j, dry, before); err != nil {
		return fmt.Errorf("deleting blobs: %w", err)
	}
	if err := k.collectRepositories(ctx, j, dry, before); err != nil {
		return fmt.Errorf("deleting repositories: %w", err)
	}
	return nil
}

// collectLinks removes links to blobs that no manifest of their repository names:
// of mirrored repositories, and of hosted ones that have a record. What is in
// those of another program is its own.
func (k *Keeper) collectLinks(ctx context.Context, j *job, dry bool, before time.Time) error {
	c, err := k.mayDelete()
	if err != nil {
		return err
	}
	var pace pace
	if err := pages(ctx, c.Mirrored, func(name string) error {
		return k.collectLinksOf(ctx, c, j, &pace, name, tree.Mirrored, dry, before)
	}); err != nil {
		return err
	}
	// Whoever has been told lately that a blob is there may be about to push a
	// manifest that names it.
	unheard, err := k.unheard(ctx, c)
	if err != nil {
		return err
	}
	if !unheard.Before(before) {
		k.log.Info("blobs of hosted repositories that no manifest names are left for a later gc: it is not known which were asked for before the catalog was made or the last process was killed",
			zap.Time("known_since", unheard))
		return nil
	}
	return pages(ctx, c.Hosted, func(name string) error {
		if !k.recorded(ctx, name) {
			return pace.rest(ctx)
		}
		return k.collectLinksOf(ctx, c, j, &pace, name, tree.Hosted, dry, before)
	})
}

func (k *Keeper) collectLinksOf(ctx context.Context, c *catalog.Catalog, j *job, pace *pace, name string, class tree.Class, dry bool, before time.Time) error {
	batch := func(after *digest.Digest) (int, error) {
		begin := k.watch
		if class == tree.Hosted {
			begin = k.watchReads
		}
		w := begin()
		defer w.end()
		if err := k.Flush(ctx); err != nil {
			return 0, err
		}
		links, err := c.Loose(ctx, name, class, before, *after, gcBatch)
		if err != nil {
			return 0, err
		}
		for _, link := range links {
			*after = link.Digest
			if dry {
				j.found(name+"@"+link.Digest.String(), 0)
				if link.Frees > 0 {
					j.found(link.Digest.String(), link.Frees)
				}
				continue
			}
			err := k.tree.Unlink(ctx, name, link.Digest, w.needs(name, link.Digest))
			if errors.Is(err, tree.ErrNeeded) {
				continue // somebody wants it again
			}
			if err != nil {
				return 0, err
			}
			j.found(name+"@"+link.Digest.String(), 0)
		}
		return len(links), nil
	}
	for after := digest.Digest(""); ; {
		n, err := batch(&after)
		if err == nil && n > 0 {
			err = k.between(ctx, pace, dry)
		} else if err == nil {
			err = pace.rest(ctx)
		}
		if err != nil || n < gcBatch {
			return err
		}
	}
}

// between is what comes after a batch.
func (k *Keeper) between(ctx context.Context, p *pace, dry bool) error {
	if !dry {
		if err := k.Flush(ctx); err != nil {
			return err
		}
	}
	return p.rest(ctx)
}

// collectBlobs deletes blobs to which nothing refers.
func (k *Keeper) collectBlobs(ctx context.Context, j *job, dry bool, before time.Time) error {
	var pace pace
	for after := digest.Digest(""); ; {
		c, err := k.mayDelete()
		if err != nil {
			return err
		}
		page, err := c.Unreferenced(ctx, before, after, gcBatch)
		if err != nil {
			return err
		}
		for _, blob := range page {
			after = blob.Digest
			removed := dry
			if !dry {
				if removed, err = k.tree.RemoveBlob(ctx, blob.Digest, k.needed(ctx, blob.Digest)); err != nil {
					return err
				}
			}
			if removed {
				j.found(blob.Digest.String(), blob.Size)
			}
		}
		if err := k.between(ctx, &pace, dry); err != nil || len(page) < gcBatch {
			return err
		}
	}
}

// collectRepositories forgets repositories that have a record, of which nothing is
// held and in which nothing is pinned.
func (k *Keeper) collectRepositories(ctx context.Context, j *job, dry bool, before time.Time) error {
	c, err := k.mayDelete()
	if err != nil {
		return err
	}
	empty := func(ctx context.Context, after string, n int) ([]string, error) {
		return c.Empty(ctx, before, after, n)
	}
	var pace pace
	return pages(ctx, empty, func(name string) error {
		if _, err := k.mayDelete(); err != nil {
			return err
		}
		if !dry {
			// The tree looks again, and keeps what has come meanwhile.
			if err := k.tree.Forget(ctx, name); err != nil {
				k.log.Info("a repository that looked empty is kept", zap.String("repository", name), zap.Error(err))
				return pace.rest(ctx)
			}
		}
		j.found(name, 0)
		return pace.rest(ctx)
	})
}
