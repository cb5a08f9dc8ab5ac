package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// A Rule keeps some of the tags that it is about. It has one of Keep and Newer.
type Rule struct {
	Keep  int              // so many, those that were pushed last
	Newer time.Duration    // those that were pushed so lately
	On    []oci.TagPattern // it is about tags that match one of these; none: all
}

func matches(patterns []oci.TagPattern, tag string) bool {
	return slices.ContainsFunc(patterns, func(p oci.TagPattern) bool { return p.Match(tag) })
}

// expired are the tags that no rule keeps and some rule is about. Those that were
// pushed last come first. Pinned and immutable ones stay; kept says how many of
// them would have gone.
func (h *Hosted) expired(tags []catalog.Tag, now time.Time) (expired []catalog.Tag, kept int64) {
	counts := make([]int, len(h.Retention))
	for _, tag := range tags {
		about, keep := false, tag.Since.IsZero() // nobody knows how old it is
		for i, rule := range h.Retention {
			if len(rule.On) > 0 && !matches(rule.On, tag.Name) {
				continue
			}
			about = true
			counts[i]++
			keep = keep || counts[i] <= rule.Keep || rule.Newer > 0 && now.Sub(tag.Since) <= rule.Newer
		}
		switch {
		case !about || keep:
		case tag.Pinned || matches(h.Immutable, tag.Name):
			kept++
		default:
			expired = append(expired, tag)
		}
	}
	return expired, kept
}

// retains reports whether tags of hosted repositories are removed in time.
func (s *Settings) retains() bool {
	return slices.ContainsFunc(s.Hosted, func(h Hosted) bool { return len(h.Retention) > 0 && !h.NoDelete })
}

// Retention begins to remove the tags of hosted repositories that the settings do
// not keep, and the manifests to which nothing leads without them; or with dry
// to say which tags these are. What only they needed is left to GC. A repository
// without a record, as another program has left it, is left alone. While another
// process uses the store the error is [ErrShared].
func (k *Keeper) Retention(dry bool) (Job, error) {
	if err := k.afar.mayRemove(); err != nil {
		return Job{}, err
	}
	return k.start(k.retention(dry))
}

func (k *Keeper) retention(dry bool) (Job, func(context.Context, *job) error) {
	return Job{Kind: kindRetention, Unit: "repositories", DryRun: dry}, func(ctx context.Context, j *job) error {
		c, err := k.whole(ctx, j)
		if err == nil {
			err = take(ctx, k.jobs.turn)
		}
		if err != nil {
			return err
		}
		defer func() { <-k.jobs.turn }()
		if err := k.Flush(ctx); err != nil { // repositories may have been told of that are not listed yet
			return err
		}
		j.update(func(now *Job) { now.Done, now.Total = 0, 0 })
		set := k.set.Load()
		var pace pace
		return pages(ctx, c.Hosted, func(name string) error {
			if k.set.Load() != set {
				return errors.New("the configuration has changed meanwhile; the next one goes by that")
			}
			i := set.hosted(name)
			if i < 0 || len(set.Hosted[i].Retention) == 0 || set.Hosted[i].NoDelete {
				return nil
			}
			if !k.recorded(ctx, name) {
				return pace.rest(ctx)
			}
			j.update(func(now *Job) { now.Total++ })
			if err := k.retain(ctx, j, &set.Hosted[i], name, dry); err != nil {
				return fmt.Errorf("repository %s: %w", name, err)
			}
			j.update(func(now *Job) { now.Done++ })
			return pace.rest(ctx)
		})
	}
}

// recorded reports whether a repository's record says that it is hosted.
func (k *Keeper) recorded(ctx context.Context, repository string) bool {
	record, err := k.tree.Record(ctx, repository)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil && !k.unreachable(err) {
		k.log.Warn("nothing of a repository is removed whose record cannot be read", zap.String("repository", repository), zap.Error(err))
	}
	return err == nil && record.Class == tree.Hosted
}

// retain removes what is expired of one repository.
func (k *Keeper) retain(ctx context.Context, j *job, h *Hosted, repository string, dry bool) error {
	// Whatever is pushed from now on stays.
	w := k.watch()
	defer w.end()
	if err := k.Flush(ctx); err != nil {
		return err
	}
	c, err := k.mayDelete()
	if err != nil {
		return err
	}
	tags, err := c.TagsByAge(ctx, repository)
	if err != nil {
		return err
	}
	expired, kept := h.expired(tags, k.now())
	j.update(func(now *Job) { now.Kept += kept })
	var pace pace
	for _, tag := range expired {
		gone, err := k.untag(ctx, w, catalog.Root{Repository: repository, Tag: tag.Name, Digest: tag.Digest}, dry)
		if err != nil {
			return err
		}
		if gone.Tag != "" {
			j.found(repository+":"+gone.Tag, gone.Bytes)
		}
		if err := pace.rest(ctx); err != nil {
			return err
		}
	}
	return nil
}

// untag removes a tag and the manifests that go with it, or with dry says what that
// would be; nothing, if somebody has pushed it again.
func (k *Keeper) untag(ctx context.Context, w *watch, tag catalog.Root, dry bool) (removal catalog.Removal, err error) {
	if k.hooks.Alone != nil && !dry {
		// A push stores a manifest first and tags it then.
		defer k.hooks.Alone(tag.Repository)()
	}
	if err := k.Flush(ctx); err != nil {
		return removal, err
	}
	c, err := k.mayDelete()
	if err != nil {
		return removal, err
	}
	removal, err = c.Removal(ctx, tag)
	if err != nil || dry {
		return removal, err
	}
	needed := func(d digest.Digest) func() (bool, error) { return w.needs(tag.Repository, d) }
	err = k.tree.RemoveTag(ctx, tag.Repository, tag.Tag, tag.Digest, needed(tag.Digest))
	if errors.Is(err, tree.ErrNeeded) {
		return catalog.Removal{}, nil
	}
	if err != nil {
		return removal, err
	}
	if _, err := k.tree.Tag(ctx, tag.Repository, tag.Tag); !errors.Is(err, fs.ErrNotExist) {
		return catalog.Removal{}, err // it means something else
	}
	for _, d := range removal.Manifests {
		if err := k.tree.RemoveManifest(ctx, tag.Repository, d, needed(d)); err != nil && !errors.Is(err, tree.ErrNeeded) {
			return removal, err
		}
	}
	return removal, nil
}
