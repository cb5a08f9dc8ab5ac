package retain

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
)

const (
	maxNamed = 500_000 // digests that changes name which wait to be written, about 60 MiB
	maxBatch = 5_000   // changes written at once
)

// paces are what the journal takes, and how long is waited. Tests are in more of
// a hurry, or in less.
type paces struct {
	noted  int           // changes that wait to be written
	batch  time.Duration // for more changes
	giveUp time.Duration // for a catalog that fails
	reopen time.Duration // before it is opened again
	finish time.Duration // for the last changes, when the keeper is closed
	room   time.Duration // for eviction
	gift   time.Duration // until somebody takes the room there is by then
	// partial is how long what is partial is not asked for again, which reads a
	// directory.
	partial time.Duration
	look    time.Duration // for others who use the store
}

var standard = paces{look: lookEvery, noted: 50_000, batch: time.Second, giveUp: time.Minute, reopen: time.Minute, finish: 10 * time.Second, room: time.Second, gift: 2 * time.Second, partial: time.Second}

// journal is what has been noted and not been written into the catalog, and what
// is known of the catalog. Its lock is never held while anything is waited for.
//
// A change is either written, in its turn, or dropped, and a drop takes away the
// belief that the catalog is complete in the same moment: so whoever finds it
// complete finds what has been noted in pending or in the catalog.
type journal struct {
	some   chan struct{} // signalled when there is a change to write
	urgent chan struct{} // signalled when it is to be written at once

	mu       sync.Mutex
	noted    []tree.Change
	head     uint64                // how many have ever been noted
	written  uint64                // how many of those are not in noted any more
	wanted   uint64                // written at least so far at once
	pending  map[digest.Digest]int // named by noted: how often
	named    int                   // the sum of pending
	dropping bool                  // until noted is empty
	drops    uint64                // how often something has been dropped
	unheard  time.Time             // when a read was last dropped
	doubts   uint64                // how often completeness has been doubted
	complete time.Time             // zero: something may be missing from the catalog
	closed   bool                  // it was closed with everything, and what others have written since is to be found
	catalog  *catalog.Catalog      // nil: there is none, for the reason in why
	why      error
	watches  map[*watch]bool
	changed  chan struct{} // closed when written, drops or catalog change
}

var errOpening = errors.New("the catalog is being opened")

func newJournal() journal {
	return journal{
		some: make(chan struct{}, 1), urgent: make(chan struct{}, 1), changed: make(chan struct{}),
		pending: map[digest.Digest]int{}, why: errOpening, watches: map[*watch]bool{},
	}
}

// signal makes a channel of one place ready.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// tell wakes who waits for a change. j.mu is held.
func (j *journal) tell() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// names visits the digests that a change lets something refer to.
func names(c tree.Change, visit func(digest.Digest)) {
	switch c.Kind {
	case tree.Manifested, tree.Linked, tree.Tagged, tree.Stored:
	default:
		return
	}
	visit(c.Canonical)
	if c.Digest != "" && c.Digest != c.Canonical {
		visit(c.Digest)
	}
	if c.Manifest == nil {
		return
	}
	for _, d := range slices.Concat(c.Manifest.Blobs, c.Manifest.Foreign) {
		visit(d.Digest)
	}
	for _, d := range c.Manifest.Children {
		visit(d.Digest)
	}
}

// Note is told of every change of the tree. It does not block. There is room for
// 50,000 changes; beyond that they are dropped until all of those are written,
// and then the catalog is to be compared with the store.
func (k *Keeper) Note(c tree.Change) {
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	for w := range j.watches {
		w.see(c)
	}
	if c.Kind == tree.Read || c.Kind == tree.ReadBlob {
		// The other changes go before. These are for the order of eviction, and for
		// whoever may be about to push what names a blob: see unheard.
		if j.dropping || len(j.noted) >= k.paces.noted/2 {
			j.unheard = k.now()
			return
		}
	} else if j.dropping || len(j.noted) >= k.paces.noted || j.named >= maxNamed {
		if !j.dropping {
			j.dropping = true
			k.log.Warn("the catalog does not keep up: changes of the store are not noted any more, and nothing is deleted until the catalog has been compared with the store")
		}
		k.drop()
		return
	}
	j.noted = append(j.noted, c)
	j.head++
	names(c, func(d digest.Digest) {
		j.pending[d]++
		j.named++
	})
	if len(j.noted) == 1 {
		signal(j.some)
	}
	if len(j.noted) == maxBatch {
		signal(j.urgent)
	}
}

// drop says that the catalog will never hear of something. j.mu is held.
func (k *Keeper) drop() {
	j := &k.journal
	j.drops++
	j.doubts++
	j.unheard = k.now()
	j.complete, j.closed = time.Time{}, false
	k.account.doubt()
	j.tell()
}

// Flush waits until everything noted before is in the catalog. It fails when
// there is no catalog, or some of it has been dropped.
func (k *Keeper) Flush(ctx context.Context) error {
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	target, drops := j.head, j.drops
	if target > j.written {
		j.wanted = max(j.wanted, target)
		signal(j.urgent)
	}
	for {
		switch {
		case j.dropping || j.drops != drops:
			return errors.New("changes of the store have not been noted; the catalog has to be compared with it first")
		case j.catalog == nil:
			return fmt.Errorf("there is no catalog now: %w", j.why)
		case j.written >= target:
			return nil
		}
		changed := j.changed
		j.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		j.mu.Lock()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// incomplete notes that something in the store may be missing from the catalog:
// nothing is deleted from now on, until a reconcile. Whatever runs into a
// difference that it cannot explain may call it.
func (k *Keeper) incomplete(reason string) {
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.complete.IsZero() {
		k.log.Warn("the catalog has to be compared with the store before anything is deleted", zap.String("reason", reason))
	}
	j.doubts++
	j.complete, j.closed = time.Time{}, false
	k.account.doubt()
	if j.catalog != nil {
		signal(k.reconcile)
	}
}

// doubts counts the calls of incomplete, and what has been dropped. A reconcile
// asks for it before it begins.
func (k *Keeper) doubts() uint64 {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return k.journal.doubts
}

// completed notes, after a reconcile, that everything is in the catalog, unless
// there has been a doubt since doubts returned n. It flushes before. After a
// doubt k.reconcile is signalled again.
func (k *Keeper) completed(ctx context.Context, n uint64) (bool, error) {
	if err := k.Flush(ctx); err != nil {
		return false, err
	}
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.doubts != n || j.catalog == nil {
		if j.catalog != nil {
			signal(k.reconcile)
		}
		return false, nil
	}
	// Whole seconds, as the catalog keeps it.
	j.complete = k.now().Truncate(time.Second)
	k.account.believe(j.written)
	signal(k.eviction.kick)
	return true, nil
}

// mayDelete returns the catalog if it is complete, or an error that says why
// nothing may be deleted now.
func (k *Keeper) mayDelete() (*catalog.Catalog, error) {
	// Before the catalog: what another process leaves makes that incomplete first.
	if err := k.afar.mayRemove(); err != nil {
		return nil, err
	}
	return k.entire()
}

// entire returns the catalog if it has everything that this process knows of.
func (k *Keeper) entire() (*catalog.Catalog, error) {
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case j.catalog == nil:
		return nil, fmt.Errorf("nothing may be deleted without the catalog: %w", j.why)
	case j.complete.IsZero():
		return nil, errors.New("nothing may be deleted before the catalog has been compared with the store, which is under way or about to be")
	}
	return j.catalog, nil
}

// isPending reports whether a change that is not in the catalog yet refers to a
// digest, or may have: something has been dropped.
func (k *Keeper) isPending(d digest.Digest) bool {
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.complete.IsZero() || j.pending[d] > 0
}

// needed says whether a blob is referred to: by a change not yet written, or by
// the catalog. It is what RemoveBlob asks.
func (k *Keeper) needed(ctx context.Context, d digest.Digest) func() (bool, error) {
	return func() (bool, error) {
		c, err := k.mayDelete()
		if err != nil || k.isPending(d) {
			return true, err
		}
		// A change leaves pending after it has come into the catalog: what was
		// not in the one is in the other.
		referenced, err := c.Referenced(ctx, d)
		return referenced || err != nil, err
	}
}

// unheard is until when somebody may have been told that a blob is there without
// the catalog having heard of it.
func (k *Keeper) unheard(ctx context.Context, c *catalog.Catalog) (time.Time, error) {
	until, err := c.Unheard(ctx)
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	if k.journal.unheard.After(until) {
		until = k.journal.unheard
	}
	return until, err
}

// completeSince says since when all that is stored is in the catalog; zero: it
// is not.
func (k *Keeper) completeSince() time.Time {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return k.journal.complete
}

// Catalog returns the catalog, for listings, or an error that says why there is
// none now.
func (k *Keeper) Catalog() (*catalog.Catalog, error) {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return k.journal.catalog, k.journal.why
}

// keep opens the catalog and writes what is noted into it, until the context
// ends, and then what is left.
func (k *Keeper) keep(ctx context.Context) {
	told := false // of this trouble
	for {
		c, err := k.hooks.Catalog(ctx)
		if err == nil {
			if err = k.admit(ctx, c); err == nil {
				before := k.progress()
				err = k.write(ctx, c)
				told = told && k.progress() == before
			}
			if ctx.Err() != nil {
				k.finish(c)
				return
			}
			k.dismiss(c, err)
		}
		if ctx.Err() != nil {
			k.dismiss(nil, errClosed)
			return
		}
		if !told {
			told = true
			k.log.Error("no catalog: nothing is evicted or deleted, and listings are empty, until there is one; pulls go on", zap.Error(err), zap.Duration("again_in", k.paces.reopen))
		}
		k.journal.mu.Lock()
		k.journal.why = err
		k.journal.mu.Unlock()
		again := time.NewTimer(k.paces.reopen)
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
		}
	}
}

var errClosed = errors.New("the store is being closed")

// admit takes a catalog that has been opened into use.
func (k *Keeper) admit(ctx context.Context, c *catalog.Catalog) error {
	at, err := c.Complete(ctx)
	if err == nil {
		err = c.SetComplete(ctx, time.Time{})
	}
	if err != nil {
		return err
	}
	heard, err := c.Unheard(ctx)
	if err == nil && (heard.IsZero() || at.IsZero() || at.Unix() != k.before.Unix()) {
		// What was read before is not in it, or not all.
		err = c.SetUnheard(ctx, k.now())
	}
	if err != nil {
		return err
	}
	usage, err := c.Usage(ctx, "")
	if err != nil {
		return err
	}
	j := &k.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	// The store has the last word: only a catalog that was closed together with
	// it has missed nothing that the mirror did. Another program may have
	// written meanwhile.
	j.closed = j.drops == 0 && !at.IsZero() && at.Unix() == k.before.Unix()
	k.before = time.Time{}
	j.catalog, j.why = c, nil
	k.account.update(usage.Allocated, j.written)
	j.tell()
	signal(k.reconcile)
	return nil
}

// wasClosed reports whether the catalog was closed with everything, and nothing
// has been compared or missed since. What is hosted is to be compared all the
// same.
func (k *Keeper) wasClosed() bool {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return k.journal.closed
}

// dismiss closes a catalog that is of no use, if there is one, and drops what
// has been noted for it.
func (k *Keeper) dismiss(c *catalog.Catalog, why error) {
	j := &k.journal
	j.mu.Lock()
	j.catalog, j.why = nil, why
	if c != nil && len(j.noted) > 0 {
		j.forget(len(j.noted))
		k.drop()
	}
	j.tell()
	j.mu.Unlock()
	if c != nil {
		c.Close()
	}
}

// forget takes the first n changes out of the journal. j.mu is held.
func (j *journal) forget(n int) {
	for _, c := range j.noted[:n] {
		names(c, func(d digest.Digest) {
			j.named--
			if j.pending[d]--; j.pending[d] == 0 {
				delete(j.pending, d)
			}
		})
	}
	clear(j.noted[:n])
	j.noted = j.noted[n:]
	j.written += uint64(n)
	if len(j.noted) == 0 {
		j.noted = nil
	}
}

// write writes what is noted until the context ends, or the catalog has failed
// for too long.
func (k *Keeper) write(ctx context.Context, c *catalog.Catalog) error {
	j := &k.journal
	more := time.NewTimer(0)
	defer more.Stop()
	for left, wanted := 0, true; ; {
		if !wanted && left == 0 {
			select {
			case <-j.some:
			case <-j.urgent:
				wanted = true
			case <-ctx.Done():
				return nil
			}
		}
		if !wanted {
			more.Reset(k.paces.batch)
			select {
			case <-more.C:
			case <-j.urgent:
			case <-ctx.Done():
				return nil
			}
		}
		for {
			var err error
			if left, wanted, err = k.writeBatch(ctx, c); err != nil {
				return err
			}
			if !wanted {
				break
			}
		}
	}
}

// writeBatch writes the next changes. It says how many are left, and whether to
// write those at once.
func (k *Keeper) writeBatch(ctx context.Context, c *catalog.Catalog) (left int, wanted bool, err error) {
	j := &k.journal
	j.mu.Lock()
	batch := j.noted[:min(len(j.noted), maxBatch)]
	j.mu.Unlock()
	var allocated int64
	if len(batch) > 0 {
		if err := k.patiently(ctx, func() error { return c.Apply(ctx, batch) }); err != nil {
			return 0, false, err
		}
		// Eviction goes by it, and would not end if it stayed as it was.
		err := k.patiently(ctx, func() error {
			usage, err := c.Usage(ctx, "")
			allocated = usage.Allocated
			return err
		})
		if err != nil {
			return 0, false, err
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.forget(len(batch))
	if len(batch) > 0 {
		k.account.update(allocated, j.written)
		signal(k.eviction.kick)
	}
	if j.dropping && len(j.noted) == 0 {
		j.dropping = false
		signal(k.reconcile)
	}
	j.tell()
	return len(j.noted), len(j.noted) >= maxBatch || j.wanted > j.written, nil
}

// patiently does something again while it fails, for a minute at most. A catalog
// that somebody has closed stays closed.
func (k *Keeper) patiently(ctx context.Context, do func() error) error {
	begun, pause := time.Now(), 50*time.Millisecond
	for {
		err := do()
		if err == nil || ctx.Err() != nil || errors.Is(err, catalog.ErrClosed) || time.Since(begun) > k.paces.giveUp {
			return err
		}
		again := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// progress is how many changes have left the journal.
func (k *Keeper) progress() uint64 {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return k.journal.written
}

// finish writes what is left, says that the catalog misses nothing if that is
// so, and closes it.
func (k *Keeper) finish(c *catalog.Catalog) {
	ctx, cancel := context.WithTimeout(context.Background(), k.paces.finish)
	defer cancel()
	var err error
	for left := 1; left > 0 && err == nil; {
		left, _, err = k.writeBatch(ctx, c)
	}
	k.journal.mu.Lock()
	unheard := k.journal.unheard
	k.journal.mu.Unlock()
	if err == nil && !unheard.IsZero() {
		err = c.SetUnheard(ctx, unheard)
	}
	if err == nil && k.quiet() {
		// Each close has a time of its own: the copy of an earlier catalog is
		// not mistaken for this one.
		k.closed = k.now().UTC().Truncate(time.Second)
		err = c.SetComplete(ctx, k.closed)
	}
	if err != nil {
		k.closed = time.Time{}
		k.log.Warn("the catalog could not be closed as it should, and will be compared with the store at the next start", zap.Error(err))
	}
	k.dismiss(c, errClosed)
}

// quiet says that the catalog misses nothing that was noted: because it is
// complete, or was when it was last closed, though what is hosted has not been
// compared since.
func (k *Keeper) quiet() bool {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return (!k.journal.complete.IsZero() || k.journal.closed) && len(k.journal.noted) == 0
}

// untouched says that nothing has been noted, nor any catalog been opened.
func (k *Keeper) untouched() bool {
	k.journal.mu.Lock()
	defer k.journal.mu.Unlock()
	return !k.before.IsZero() && k.journal.head == 0 && k.journal.drops == 0
}

// listingPatience is how long a listing waits until the catalog has what has
// just changed.
const listingPatience = 500 * time.Millisecond

// Listing returns the catalog if it has everything that is stored, with all that
// was noted before the call, or nil.
func (k *Keeper) Listing(ctx context.Context) *catalog.Catalog {
	c, err := k.entire()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, listingPatience)
	defer cancel()
	if k.Flush(ctx) != nil {
		return nil
	}
	return c
}
