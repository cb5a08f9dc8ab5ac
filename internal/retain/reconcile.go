package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// tellBatch is how many changes a reconcile puts into the journal before it
	// waits until they are written: few, since pulls put theirs into the same.
	tellBatch = 512
	// pageSize is how many are asked of the catalog at once.
	pageSize = 500
	// A reconcile works for workSpan at most and rests as long, but for restMost.
	workSpan = 20 * time.Millisecond
	restMost = time.Second

	retryFirst = 5 * time.Second
	retryLast  = 10 * time.Minute
)

// A reconcile compares the whole store with the catalog. Of what differs the
// tree tells anew, as if it had just been stored or removed: so nothing that
// changes meanwhile is told in the wrong order, and what it compares with may be
// old. Nothing is held in memory but the names of one repository, or of a 256th
// of the blobs.
type reconcile struct {
	*Keeper
	catalog *catalog.Catalog
	job     *job
	// anew tells of everything, whatever the catalog says.
	anew bool
	// mend links the blobs of mirrored manifests that are stored and not linked.
	mend       bool
	unlinkable bool // and said so

	told int
	pace pace
}

// pace lets work rest as long as it has worked.
type pace struct{ since time.Time }

func (p *pace) rest(ctx context.Context) error {
	now := time.Now()
	if p.since.IsZero() {
		p.since = now
	}
	worked := now.Sub(p.since)
	if worked < workSpan {
		return ctx.Err()
	}
	err := sleep(ctx, min(worked, restMost))
	p.since = time.Now()
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// compare reconciles whenever that is asked for, until it has worked.
func (k *Keeper) compare(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.reconcile:
		}
		for wait := retryFirst; ctx.Err() == nil && k.completeSince().IsZero(); wait = min(2*wait, retryLast) {
			if err := k.compareOnce(ctx); err == nil {
				break
			} else if ctx.Err() == nil && !k.unreachable(err) {
				k.log.Warn("the catalog could not be compared with the store; nothing is deleted until it has been, which is tried again",
					zap.Error(err), zap.Duration("in", wait))
			}
			if sleep(ctx, wait) != nil {
				return
			}
		}
	}
}

// compareOnce is a reconcile as a job, so that it can be watched.
func (k *Keeper) compareOnce(ctx context.Context) error {
	j, err := k.begin(Job{Kind: kindCompare, Unit: "repositories"}, func(ctx context.Context, j *job) error {
		_, err := k.whole(ctx, j)
		return err
	})
	if err != nil {
		return err
	}
	select {
	case <-j.over:
		return j.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Reindex begins to make the catalog again from the store, as it is now.
func (k *Keeper) Reindex() (Job, error) {
	return k.start(Job{Kind: kindReindex, Unit: "repositories"}, func(ctx context.Context, j *job) error {
		if err := take(ctx, k.jobs.turn); err != nil {
			return err
		}
		defer func() { <-k.jobs.turn }()
		return k.reconcileNow(ctx, j, true, true)
	})
}

var errDoubt = errors.New("something has gone past the catalog meanwhile; try again")

// reconcileNow compares everything, and says so to the keeper. The caller has
// its turn.
func (k *Keeper) reconcileNow(ctx context.Context, j *job, anew, mend bool) error {
	c, err := k.Catalog()
	if err != nil {
		return err
	}
	doubts := k.doubts()
	if err := k.listed(ctx, anew); err != nil {
		return fmt.Errorf("listing the store: %w", err)
	}
	if usage, err := c.Usage(ctx, ""); err == nil {
		j.update(func(now *Job) { now.Done, now.Total = 0, usage.Repositories })
	}
	r := &reconcile{Keeper: k, catalog: c, job: j, anew: anew, mend: mend}
	for prefix := range 256 {
		if err := r.blobs(ctx, fmt.Sprintf("%02x", prefix)); err != nil {
			return fmt.Errorf("comparing blobs: %w", err)
		}
	}
	for name, err := range k.tree.Kept(ctx) {
		if err == nil {
			err = r.repository(ctx, name)
		}
		if err != nil {
			return fmt.Errorf("comparing repository %s: %w", name, err)
		}
	}
	if err := r.gone(ctx); err != nil {
		return fmt.Errorf("comparing what is gone: %w", err)
	}
	for pin, err := range k.tree.Pins(ctx, "") {
		if err == nil {
			err = r.pin(ctx, pin.Repository, pin.Reference)
		}
		if err != nil {
			return fmt.Errorf("comparing pins: %w", err)
		}
	}
	if err := r.links(ctx); err != nil {
		return fmt.Errorf("linking blobs: %w", err)
	}
	sure, err := k.completed(ctx, doubts)
	if err == nil && !sure {
		err = errDoubt
	}
	return err
}

// reconcileHosted compares what may be hosted, in a catalog that was closed with
// everything: while nothing of ours was running, another program may have pushed
// what shares blobs with mirrored images, and those are evicted. What it may have
// put into mirrored repositories can be fetched again, and is found by the next
// collection.
func (k *Keeper) reconcileHosted(ctx context.Context, j *job) error {
	c, err := k.Catalog()
	if err != nil {
		return err
	}
	doubts := k.doubts()
	if err := k.listed(ctx, false); err != nil {
		return fmt.Errorf("listing the store: %w", err)
	}
	r := &reconcile{Keeper: k, catalog: c, job: j}
	for name, err := range k.tree.Kept(ctx) {
		if err == nil {
			err = r.unlessMirrored(ctx, name)
		}
		if err != nil {
			return fmt.Errorf("comparing repository %s: %w", name, err)
		}
	}
	sure, err := k.completed(ctx, doubts)
	if err == nil && !sure {
		err = errDoubt
	}
	return err
}

// unlessMirrored compares a repository, unless both its record and the catalog
// say that it is mirrored.
func (r *reconcile) unlessMirrored(ctx context.Context, name string) error {
	mirrored, err := r.catalog.IsMirrored(ctx, name)
	if err != nil {
		return err
	}
	if mirrored {
		if record, err := r.tree.Record(ctx, name); err == nil && record.Class == tree.Mirrored {
			return r.pace.rest(ctx)
		}
	}
	return r.repository(ctx, name)
}

// gone compares repositories of which nothing is in the store any more.
func (r *reconcile) gone(ctx context.Context) error {
	return pages(ctx, r.catalog.RepositoryNames, func(name string) error {
		kept, err := r.tree.IsKept(ctx, name)
		if err == nil && !kept {
			err = r.repository(ctx, name)
		}
		if err == nil {
			err = r.pace.rest(ctx)
		}
		return err
	})
}

// pages visits all names that the catalog gives page by page.
func pages(ctx context.Context, page func(ctx context.Context, after string, n int) ([]string, error), visit func(name string) error) error {
	for after := ""; ; {
		names, err := page(ctx, after, pageSize)
		if err != nil {
			return err
		}
		for _, name := range names {
			after = name
			if err := visit(name); err != nil {
				return err
			}
		}
		if len(names) < pageSize {
			return nil
		}
	}
}

func (r *reconcile) pin(ctx context.Context, repository, reference string) error {
	ref, err := oci.ParseReference(reference)
	if err != nil {
		return nil // no pin of ours
	}
	return r.tell(ctx, r.tree.TellPin(ctx, repository, ref))
}

// links makes the links that registry:2 needs and a kill has kept from being
// written: of blobs that are stored and that a mirrored manifest names.
func (r *reconcile) links(ctx context.Context) error {
	if !r.mend {
		return nil
	}
	if err := r.flush(ctx); err != nil {
		return err
	}
	return pages(ctx, r.catalog.Mirrored, func(name string) error {
		for after := digest.Digest(""); ; {
			blobs, err := r.catalog.Unlinked(ctx, name, after, tellBatch)
			if err != nil {
				return err
			}
			for _, d := range blobs {
				after = d
				err := r.tree.LinkBlob(ctx, name, d, d)
				switch {
				case ctx.Err() != nil:
					return context.Cause(ctx)
				case err == nil, errors.Is(err, fs.ErrNotExist): // removed meanwhile
				case errors.Is(err, storage.ErrUnavailable):
					return err
				case !r.unlinkable:
					// As on a full disk, where nothing could be evicted if this
					// were the end.
					r.unlinkable = true
					r.log.Warn("blobs could not be linked, which is tried again with the next gc", zap.String("repository", name), zap.Error(err))
				}
				if err := r.tell(ctx, nil); err != nil {
					return err
				}
			}
			if len(blobs) < tellBatch {
				return r.pace.rest(ctx)
			}
		}
	})
}

// tell lets the tree tell, and waits now and then until that is written.
func (r *reconcile) tell(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	if r.told++; r.told%tellBatch != 0 {
		return r.pace.rest(ctx)
	}
	return r.flush(ctx)
}

func (r *reconcile) flush(ctx context.Context) error {
	if err := r.Flush(ctx); err != nil {
		return err
	}
	return r.pace.rest(ctx)
}

// blobs compares those whose digest begins with two digits.
func (r *reconcile) blobs(ctx context.Context, digits string) error {
	known, err := r.catalog.Blobs(ctx, digits)
	if err != nil {
		return err
	}
	for found, err := range r.tree.ListBlobs(ctx, digits) {
		if err != nil {
			return err
		}
		if found.Doubtful {
			r.damage.doubt(found.Digest)
		}
		size, ok := known[found.Digest]
		if ok && size != found.Size {
			r.Suspect(found.Digest) // what a digest names does not change
		}
		delete(known, found.Digest)
		if r.anew || !ok || size != found.Size {
			err = r.tell(ctx, r.tree.TellBlob(ctx, found.Digest))
		} else {
			err = r.pace.rest(ctx)
		}
		if err != nil {
			return err
		}
	}
	for d := range known {
		if err := r.tell(ctx, r.tree.TellBlob(ctx, d)); err != nil {
			return err
		}
	}
	return nil
}

// repository compares one repository. Manifests come before the tags that mean
// them.
func (r *reconcile) repository(ctx context.Context, name string) error {
	known, err := r.catalog.Names(ctx, name)
	if err != nil {
		return err
	}
	if err := r.tell(ctx, r.tree.TellRepository(ctx, name)); err != nil {
		return err
	}
	digests := func(known map[digest.Digest]bool, list func(context.Context, string) iter.Seq2[tree.Listed, error], tell func(context.Context, string, digest.Digest) error) error {
		for found, err := range list(ctx, name) {
			if err != nil {
				return err
			}
			ok := known[found.Digest]
			delete(known, found.Digest)
			if r.anew || !ok || !found.Whole {
				err = r.tell(ctx, tell(ctx, name, found.Digest))
			} else {
				err = r.pace.rest(ctx)
			}
			if err != nil {
				return err
			}
		}
		for d := range known {
			if err := r.tell(ctx, tell(ctx, name, d)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := digests(known.Manifests, r.tree.ListManifests, r.tree.TellManifest); err != nil {
		return err
	}
	if err := digests(known.Links, r.tree.ListLinks, r.tree.TellLink); err != nil {
		return err
	}
	for found, err := range r.tree.ListTags(ctx, name) {
		if err != nil {
			return err
		}
		means, ok := known.Tags[found.Tag]
		delete(known.Tags, found.Tag)
		if r.anew || !ok || means != found.Digest {
			err = r.tell(ctx, r.tree.TellTag(ctx, name, found.Tag))
		} else {
			err = r.pace.rest(ctx)
		}
		if err != nil {
			return err
		}
	}
	for tag := range maps.Keys(known.Tags) {
		if err := r.tell(ctx, r.tree.TellTag(ctx, name, tag)); err != nil {
			return err
		}
	}
	for reference := range known.Pins {
		if err := r.pin(ctx, name, reference); err != nil {
			return err
		}
	}
	r.job.update(func(now *Job) {
		now.Done++
		now.Total = max(now.Total, now.Done)
	})
	return nil
}
