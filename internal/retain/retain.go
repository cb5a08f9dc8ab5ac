// Package retain keeps a store within its budgets and whole. It hears of every
// change of the tree (journal.go) and writes it into the catalog behind; it
// evicts what has not been pulled for longest when a budget is used up
// (evict.go); it compares the catalog with the store (reconcile.go), deletes
// what nothing refers to (gc.go), and reads everything again now and then
// (scrub.go).
//
// Nothing here is on the way of a pull: a pull that finds no room waits a moment
// for eviction, and is passed through otherwise.
package retain

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/robfig/cron/v3"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// A Keeper keeps one store. It outlives configurations.
type Keeper struct {
	store    storage.Store
	log      *zap.Logger
	now      func() time.Time
	paces    paces
	journal  journal
	account  account
	quota    quota
	eviction eviction
	jobs     jobs
	damage   damage
	afar     afar
	set      atomic.Pointer[Settings]
	parts    atomic.Pointer[func() int64]

	// Since Begin.
	tree   *tree.Tree
	hooks  Hooks
	before time.Time // when the last process has closed a catalog with everything; until there is one
	closed time.Time // when this one has
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // of what uses the catalog
	end    context.CancelFunc
	ended  chan struct{} // closed when the catalog is

	// reconcile is signalled when the catalog is there and not complete.
	reconcile chan struct{}
}

// Hooks are what a Keeper asks of others.
type Hooks struct {
	// Catalog opens the catalog, an empty one if there is none. It is called in
	// the background, and again after a minute when it fails.
	Catalog func(context.Context) (*catalog.Catalog, error)
	// Heal fetches a blob of a mirrored repository again that has been deleted
	// as damaged. Its size is -1 if it is not known.
	Heal func(ctx context.Context, repository string, d digest.Digest, size int64) error
	// Partial is how many bytes of blobs that are not whole yet are on the disk,
	// but for those that a reservation covers which is not released. It is
	// called about once a second while there are reservations; nil: none.
	Partial func() int64
	// Alone keeps pushes to a hosted repository out until done; nil: nobody
	// pushes.
	Alone func(repository string) (done func())
}

// New returns a keeper of an open store, which it does not close. It does
// nothing but keep a journal and an account before Begin.
func New(store storage.Store, log *zap.Logger) *Keeper {
	k := &Keeper{
		store: store, log: log, now: time.Now, paces: standard,
		journal: newJournal(), eviction: newEviction(), quota: newQuota(),
		jobs: newJobs(), damage: newDamage(), reconcile: make(chan struct{}, 1),
	}
	k.set.Store(&Settings{})
	return k
}

// Settings are what a configuration changes.
type Settings struct {
	// MaxSize is how many bytes the store may take; 0: as many as there are.
	MaxSize int64
	// Limits are those of upstreams, by name.
	Limits map[string]Limit
	// Hosted are those of hosted repositories: the first whose pattern matches
	// are a repository's.
	Hosted []Hosted
	// GC is when the catalog is compared with the store and what nothing refers
	// to is deleted; nil: when somebody asks for it. Grace is how old that must be.
	GC    cron.Schedule
	Grace time.Duration
	// Scrub is how many bytes are read again in a second; 0: none. Of a store whose
	// values are at a distance, only what is near is read unless ScrubDistant:
	// elsewhere each byte read may cost money.
	Scrub        int64
	ScrubDistant bool
	// Emit is told what an operator may want to act on; nil: nobody is.
	Emit func(event string, data map[string]any)
}

// A Limit is what an upstream's repositories may take.
type Limit struct {
	MaxSize int64         // bytes; 0: no limit
	TTL     time.Duration // since the last pull; 0: no limit
}

// Begin opens the catalog, in the background, and keeps the store from now on.
func (k *Keeper) Begin(t *tree.Tree, hooks Hooks) {
	k.tree, k.hooks = t, hooks
	k.afar.distant = k.store.Distant()
	t.Guard(k.stays, k.Suspect)
	if hooks.Partial != nil {
		k.parts.Store(&hooks.Partial)
	}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	// Before the first change: whatever becomes of this process, no catalog of
	// before is taken for complete by the next one.
	k.before = k.enter()
	k.afar.shared = t.Shared()
	writing, end := context.WithCancel(context.Background())
	k.end, k.ended = end, make(chan struct{})
	go func() {
		defer close(k.ended)
		k.keep(writing)
	}()
	k.wg.Go(func() { k.evict(k.ctx) })
	k.wg.Go(func() { k.work(k.ctx) })
}

// Stop ends everything that is under way, so that the tree may be closed. What is
// noted is still written until Close.
func (k *Keeper) Stop() {
	if k.cancel == nil {
		return
	}
	k.cancel()
	k.wg.Wait()
	k.eviction.close()
}

// Close does what Stop does, writes down what has been noted, and closes the
// catalog. The tree may not change any more: a change that comes later is not in
// the catalog of the next process. The store is still open.
func (k *Keeper) Close() {
	if k.cancel == nil {
		return
	}
	k.Stop()
	k.end()
	<-k.ended
	switch {
	case k.afar.mayRemove() != nil:
		// The catalog lacks what others have written.
	case !k.closed.IsZero() && k.quiet():
		k.leave(k.closed)
	case k.untouched():
		k.leave(k.before)
	}
}

// Set replaces the settings.
func (k *Keeper) Set(s Settings) {
	s.Limits = maps.Clone(s.Limits)
	k.set.Store(&s)
	k.quota.mu.Lock()
	k.quota.adapt(&s)
	k.quota.mu.Unlock()
	k.eviction.hope()
	signal(k.eviction.kick)
	k.jobs.settled()
}

// settings are those of the last Set. Nobody may change them.
func (k *Keeper) settings() Settings { return *k.set.Load() }

// emit tells an operator.
func (k *Keeper) emit(event string, data map[string]any) {
	if f := k.settings().Emit; f != nil {
		f(event, data)
	}
}

// Status is how a store is kept.
type Status struct {
	Usage     catalog.Usage   `json:"usage"`
	Upstreams map[string]Used `json:"upstreams"`        // those that have a limit
	Hosted    []HostedUsed    `json:"hosted,omitempty"` // those that have a limit
	MaxSize   int64           `json:"max_size,omitempty"`
	Partial   int64           `json:"partial"`           // bytes of blobs that are not whole yet
	Reserved  int64           `json:"reserved"`          // bytes of those that are coming
	Catalog   string          `json:"catalog"`           // ready, rebuilding, or why there is none
	Complete  time.Time       `json:"complete,omitzero"` // since when all that is stored is in it
	Evicted   Evicted         `json:"evicted"`           // since the start of the process
	LastGC    *Job            `json:"last_gc,omitempty"`
	LastScrub time.Time       `json:"last_scrub,omitzero"` // when every blob had been read again
	Damaged   []Damage        `json:"damaged,omitempty"`   // hosted blobs that are not right, up to 100
	Off       string          `json:"off,omitempty"`       // why nothing is deleted, if others use the store
	// Distant says how it stands with the place where the store has its values;
	// nil: that is a local disk.
	Distant *storage.Backlog `json:"-"`
}

// Used is what an upstream's repositories take.
type Used struct {
	Bytes   int64         `json:"bytes"`
	MaxSize int64         `json:"max_size,omitempty"`
	TTL     time.Duration `json:"ttl,omitempty"`
}

// HostedUsed is what the repositories of a hosted pattern take, with what is on its
// way to them.
type HostedUsed struct {
	Pattern string `json:"pattern"`
	Bytes   int64  `json:"bytes"`
	MaxSize int64  `json:"max_size"`
}

// Evicted counts.
type Evicted struct {
	Roots, Blobs, Bytes int64
}

// Damage is a blob that is not what its digest says and cannot be fetched again.
type Damage struct {
	Digest       digest.Digest `json:"digest"`
	Repositories []string      `json:"repositories"` // up to 10
	Found        time.Time     `json:"found"`
}

// Status says how the store is kept.
func (k *Keeper) Status(ctx context.Context) (Status, error) {
	settings := k.settings()
	s := Status{
		Upstreams: map[string]Used{}, MaxSize: settings.MaxSize, Partial: k.partial(),
		Catalog: "ready", Complete: k.completeSince(), Evicted: k.eviction.evicted(),
	}
	k.account.mu.Lock()
	s.Reserved = k.account.reserved
	k.account.mu.Unlock()
	k.report(&s)
	s.Off = k.Off()
	if backlog, ok := k.Backlog(); ok {
		s.Distant = &backlog
	}
	c, err := k.Catalog()
	if err != nil {
		s.Catalog = err.Error()
		return s, nil
	}
	if s.Complete.IsZero() {
		s.Catalog = "rebuilding"
	}
	if s.Usage, err = c.Usage(ctx, ""); err != nil {
		return s, err
	}
	if s.Hosted, err = k.hostedUsed(ctx); err != nil {
		return s, err
	}
	for name, limit := range settings.Limits {
		usage, err := c.Usage(ctx, name)
		if err != nil {
			return s, err
		}
		s.Upstreams[name] = Used{Bytes: usage.Allocated, MaxSize: limit.MaxSize, TTL: limit.TTL}
	}
	return s, nil
}
