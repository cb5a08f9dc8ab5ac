package retain

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
)

// gcBatch is how many are removed before the catalog hears of it, and before a
// rest.
const gcBatch = 100

// GC begins to compare the catalog with the store and to delete what nothing
// refers to, or with dry to say what that is. One that is under way is
// returned.
func (k *Keeper) GC(dry bool) (Job, error) {
	return k.start(Job{Kind: kindGC, Unit: "repositories", DryRun: dry}, func(ctx context.Context, j *job) error {
		if err := take(ctx, k.jobs.turn); err != nil {
			return err
		}
		defer func() { <-k.jobs.turn }()
		if err := k.reconcileNow(ctx, j, false, !dry); err != nil {
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

// collectLinks removes links of mirrored repositories to blobs that no manifest
// of theirs names.
func (k *Keeper) collectLinks(ctx context.Context, j *job, dry bool, before time.Time) error {
	var pace pace
	for after := (catalog.Link{}); ; {
		c, err := k.mayDelete()
		if err != nil {
			return err
		}
		page, err := c.Loose(ctx, before, after, gcBatch)
		if err != nil {
			return err
		}
		for _, link := range page {
			after = link
			if !dry {
				if err := k.tree.Unlink(ctx, link.Repository, link.Digest); err != nil {
					return err
				}
			}
			j.found(link.Repository+"@"+link.Digest.String(), 0)
		}
		if err := k.between(ctx, &pace, dry); err != nil || len(page) < gcBatch {
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

// collectBlobs deletes blobs to which nothing refers, but for links that are
// collected, too.
func (k *Keeper) collectBlobs(ctx context.Context, j *job, dry bool, before time.Time) error {
	var pace pace
	for after := digest.Digest(""); ; {
		c, err := k.mayDelete()
		if err != nil {
			return err
		}
		page, err := c.Garbage(ctx, before, after, gcBatch)
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

// collectRepositories forgets mirrored repositories of which nothing is held and
// in which nothing is pinned.
func (k *Keeper) collectRepositories(ctx context.Context, j *job, dry bool, before time.Time) error {
	var pace pace
	for after := ""; ; {
		c, err := k.mayDelete()
		if err != nil {
			return err
		}
		page, err := c.Empty(ctx, before, after, gcBatch)
		if err != nil {
			return err
		}
		for _, name := range page {
			after = name
			r, err := k.tree.Record(ctx, name)
			if err != nil || r.Class != tree.Mirrored {
				continue // the store knows better
			}
			if !dry {
				if err := k.tree.Forget(ctx, name); err != nil {
					return err
				}
			}
			j.found(name, 0)
		}
		if err := k.between(ctx, &pace, dry); err != nil || len(page) < gcBatch {
			return err
		}
	}
}
