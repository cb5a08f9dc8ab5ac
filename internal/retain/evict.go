package retain

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// Above so much of a budget, in percent, there is eviction down to so much.
	highWater, lowWater = 95, 90
	// min_free is kept with so much more, in percent of itself, and when less
	// than that is free there is eviction until twice as much more is.
	moreFree = 5

	// lively is how long after its last pull an image is not evicted as a whole
	// while there is anything else: somebody may be at it.
	lively = 5 * time.Minute

	batchRoots = 64
	batchWork  = 100 * time.Millisecond
	batchPause = 10 * time.Millisecond // in which others have the disk

	ttlEvery   = time.Minute
	eventEvery = time.Minute
)

// evict evicts whatever a budget asks for until the context ends.
func (k *Keeper) evict(ctx context.Context) {
	tick := time.NewTicker(ttlEvery)
	defer tick.Stop()
	for {
		expire := false
		select {
		case <-k.eviction.kick:
		case <-tick.C:
			expire = true
		case <-ctx.Done():
			return
		}
		k.relieve(ctx, expire)
	}
}

// relieve looks at all budgets once.
func (k *Keeper) relieve(ctx context.Context, expire bool) {
	k.eviction.running.Lock()
	defer k.eviction.running.Unlock()
	k.serve()
	c, err := k.mayDelete()
	if err != nil {
		k.disappoint()
		return
	}
	set := k.set.Load()
	settings := *set
	k.shrink(ctx, c, &scope{set: set, limit: settings.MaxSize, why: "max_size"})
	for _, name := range slices.Sorted(maps.Keys(settings.Limits)) {
		limit := settings.Limits[name]
		if limit.TTL > 0 && expire {
			k.shrink(ctx, c, &scope{set: set, upstream: name, before: k.now().Add(-limit.TTL), why: "ttl of " + name})
		}
		if limit.MaxSize > 0 {
			k.shrink(ctx, c, &scope{set: set, upstream: name, limit: limit.MaxSize, why: "max_size of " + name})
		}
	}
	if k.afar.distant != nil {
		// There is room in the store, and who waits has none near: that is the
		// store's to make, which has had its chance.
		k.disappoint()
	}
	k.tellEvicted()
}

// A scope is what is evicted from, and why.
type scope struct {
	set      *Settings // that ask for it: once there are others, it ends
	upstream string    // "": everything
	limit    int64     // bytes; 0: none
	before   time.Time // what was last read before is evicted, whatever the limit
	why      string

	// What was too much when it was first looked at goes down to the low water.
	full, crowded bool
	evicted       Evicted
	last          map[string]bool // the roots evicted by the step before
}

// shrink evicts from a scope until it is as small as it should be.
func (k *Keeper) shrink(ctx context.Context, c *catalog.Catalog, s *scope) {
	if s.before.IsZero() && k.eviction.despaired(s.upstream) {
		if s.upstream == "" {
			k.disappoint()
		}
		return
	}
	begun, barren := time.Now(), false
	err := k.settle(ctx, c, s)
	for err == nil && ctx.Err() == nil {
		var excess int64
		if excess, err = k.excess(ctx, c, s); err != nil || excess <= 0 {
			break
		}
		before := s.evicted
		if err = k.step(ctx, c, s); err != nil {
			break
		}
		if barren = s.evicted == before; barren {
			if s.before.IsZero() {
				k.eviction.despair(s.upstream)
			}
			break
		}
		pause := time.NewTimer(batchPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
	if s.upstream == "" && (barren || err != nil) {
		k.disappoint() // and otherwise nobody: who has come since is in the next round
	}
	if err != nil && ctx.Err() == nil {
		k.eviction.despair(s.upstream)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, ErrShared) && !k.unreachable(err) {
		k.log.Warn("eviction has ended early", zap.String("why", s.why), zap.Error(err))
	}
	if s.evicted == (Evicted{}) {
		return
	}
	k.log.Info("evicted", zap.String("why", s.why), zap.Int64("roots", s.evicted.Roots), zap.Int64("blobs", s.evicted.Blobs),
		zap.Int64("bytes", s.evicted.Bytes), zap.Duration("took", time.Since(begun)))
}

// settle waits, where there seems to be too much, until the catalog has what was
// noted: what has just been stored may have been counted twice.
func (k *Keeper) settle(ctx context.Context, c *catalog.Catalog, s *scope) error {
	excess, err := k.excess(ctx, c, s)
	if err != nil || excess <= 0 {
		return err
	}
	s.full, s.crowded = false, false
	return k.Flush(ctx)
}

// excess is how many bytes too much there are in a scope.
func (k *Keeper) excess(ctx context.Context, c *catalog.Catalog, s *scope) (int64, error) {
	if k.set.Load() != s.set {
		return 0, nil // the next round goes by others
	}
	if !s.before.IsZero() {
		return 1, nil // until there is no root left
	}
	if s.upstream != "" {
		usage, err := c.Usage(ctx, s.upstream)
		s.full = s.full || usage.Allocated > s.limit/100*highWater
		if err != nil || !s.full {
			return 0, err
		}
		return usage.Allocated - s.limit/100*lowWater, nil
	}
	k.serve()
	waiting := k.eviction.waiting()
	var excess int64
	if used, known := k.used(); s.limit > 0 && known {
		s.full = s.full || used+waiting > s.limit/100*highWater
		if s.full {
			excess = used + waiting - s.limit/100*lowWater
		}
	}
	if k.afar.distant != nil {
		return excess, nil // what is near is no matter of what is kept
	}
	disk, ok := k.store.(storage.Measured)
	if !ok {
		return max(excess, waiting), nil
	}
	free, keep, err := disk.Free()
	if err != nil {
		return excess, err
	}
	more := keep / 100 * moreFree
	s.crowded = s.crowded || free-waiting < keep+more
	if s.crowded {
		if excess <= 0 {
			s.why = "min_free"
		}
		excess = max(excess, keep+2*more+waiting-free)
	}
	return excess, nil
}

// step evicts a batch: roots longest unread first; then, of those that are in
// use, or larger than the whole scope may be, single blobs; and if there are
// none, the roots after all.
func (k *Keeper) step(ctx context.Context, c *catalog.Catalog, s *scope) error {
	if err := k.Flush(ctx); err != nil {
		return err
	}
	before := s.before
	if before.IsZero() {
		before = k.now().Add(-lively)
	}
	roots, err := c.Coldest(ctx, s.upstream, before, batchRoots)
	if err != nil {
		return err
	}
	began, evicted, large := time.Now(), s.evicted, false
	last := s.last
	s.last = map[string]bool{}
	for _, root := range roots {
		if last[occurrence(root)] {
			err := fmt.Errorf("%s is in the catalog and not in the store", name(root))
			k.incomplete(err.Error())
			return err
		}
		if large, err = k.evictRoot(ctx, c, s, root, s.limit); err != nil {
			return err
		}
		if large || time.Since(began) > batchWork {
			break
		}
		if excess, err := k.excess(ctx, c, s); err != nil || excess <= 0 {
			return err
		}
	}
	if s.evicted != evicted || !s.before.IsZero() {
		return nil
	}
	w := k.watch()
	defer w.end()
	if err := k.Flush(ctx); err != nil {
		return err
	}
	blobs, err := c.ColdestBlobs(ctx, s.upstream, batchRoots)
	if err != nil {
		return err
	}
	for _, blob := range blobs {
		if err := k.evictBlob(ctx, c, s, w, blob); err != nil {
			return err
		}
		if excess, err := k.excess(ctx, c, s); err != nil || excess <= 0 {
			return err
		}
	}
	if s.evicted != evicted {
		return nil
	}
	if roots, err = c.Coldest(ctx, s.upstream, time.Time{}, 1); err != nil || len(roots) == 0 {
		return err
	}
	_, err = k.evictRoot(ctx, c, s, roots[0], 0)
	return err
}

// evictRoot evicts a root, unless it takes more than a limit that is not 0.
func (k *Keeper) evictRoot(ctx context.Context, c *catalog.Catalog, s *scope, root catalog.Root, limit int64) (large bool, err error) {
	gone, err := k.removeRoot(ctx, c, root, limit)
	k.count(s, gone)
	switch {
	case errors.Is(err, errLarge):
		return true, nil
	case errors.Is(err, tree.ErrNeeded):
		return false, nil
	}
	s.last[occurrence(root)] = true
	return false, err
}

// occurrence is a root as it was last read: another once somebody has pulled it
// again.
func occurrence(r catalog.Root) string { return name(r) + " " + r.Read.String() }

func name(r catalog.Root) string {
	if r.Tag != "" {
		return r.Repository + ":" + r.Tag + "@" + r.Digest.String()
	}
	return r.Repository + "@" + r.Digest.String()
}

func (k *Keeper) count(s *scope, gone Evicted) {
	add := func(to *Evicted) {
		to.Roots += gone.Roots
		to.Blobs += gone.Blobs
		to.Bytes += gone.Bytes
	}
	add(&s.evicted)
	e := &k.eviction
	e.mu.Lock()
	defer e.mu.Unlock()
	add(&e.total)
	add(&e.untold)
	e.why = s.why
}

// tellEvicted tells an operator what has been evicted, once a minute at most.
func (k *Keeper) tellEvicted() {
	e := &k.eviction
	e.mu.Lock()
	untold, why := e.untold, e.why
	due := untold != Evicted{} && time.Since(e.told) >= eventEvery
	if due {
		e.untold, e.told = Evicted{}, time.Now()
	}
	e.mu.Unlock()
	if due {
		k.emit("evicted", map[string]any{"roots": untold.Roots, "blobs": untold.Blobs, "bytes": untold.Bytes, "why": why})
	}
}
