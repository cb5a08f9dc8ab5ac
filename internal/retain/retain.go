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
	store storage.Store
	log   *zap.Logger
	now   func() time.Time
	tree  *tree.Tree // since Begin
	hooks Hooks
	jobs  jobs
	// reconcile is signalled when the catalog is there and not complete.
	reconcile chan struct{}
}

// Hooks are what a Keeper asks of others.
type Hooks struct {
	// Catalog opens the catalog, an empty one if there is none. It is called in
	// the background, and again after a minute when it fails.
	Catalog func(context.Context) (*catalog.Catalog, error)
	// Heal fetches a mirrored blob again that has been deleted as damaged.
	Heal func(ctx context.Context, repository string, d digest.Digest, size int64) error
}

// New returns a keeper of an open store, which it does not close. It does
// nothing but keep a journal before Begin.
func New(store storage.Store, log *zap.Logger) *Keeper {
	return &Keeper{store: store, log: log, now: time.Now, reconcile: make(chan struct{}, 1)}
}

// Settings are what a configuration changes.
type Settings struct {
	// MaxSize is how many bytes the store may take; 0: as many as there are.
	MaxSize int64
	// Limits are those of upstreams, by name.
	Limits map[string]Limit
	// GC is when the catalog is compared with the store and what nothing refers
	// to is deleted; nil: when somebody asks for it. Grace is how old that must be.
	GC    cron.Schedule
	Grace time.Duration
	// Scrub is how many bytes are read again in a second; 0: none.
	Scrub int64
	// Emit is told what an operator may want to act on; nil: nobody is.
	Emit func(event string, data map[string]any)
}

// A Limit is what an upstream's repositories may take.
type Limit struct {
	MaxSize int64         // bytes; 0: no limit
	TTL     time.Duration // since the last pull; 0: no limit
}

// Begin opens the catalog, and keeps the store from now on.
func (k *Keeper) Begin(t *tree.Tree, hooks Hooks) { panic("not written") }

// Set replaces the settings.
func (k *Keeper) Set(s Settings) { panic("not written") }

// settings are those of the last Set.
func (k *Keeper) settings() Settings { panic("not written") }

// emit tells an operator.
func (k *Keeper) emit(event string, data map[string]any) {
	if f := k.settings().Emit; f != nil {
		f(event, data)
	}
}

// Close ends everything that is under way, writes down what has been noted, and
// closes the catalog.
func (k *Keeper) Close() { panic("not written") }

// Store is the store whose Reserve knows the budgets: what is reserved and would
// take more than MaxSize fails with an error that wraps storage.ErrFull.
func (k *Keeper) Store() storage.Store { panic("not written") }

// Room evicts so that n bytes can be reserved, and waits for it a second at
// most. It reports whether to try again.
func (k *Keeper) Room(ctx context.Context, n int64) bool { panic("not written") }

// Catalog returns the catalog, for listings, or an error that says why there is
// none now.
func (k *Keeper) Catalog() (*catalog.Catalog, error) { panic("not written") }

// Status is how a store is kept.
type Status struct {
	Usage     catalog.Usage   `json:"usage"`
	Upstreams map[string]Used `json:"upstreams"` // those that have a limit
	MaxSize   int64           `json:"max_size,omitempty"`
	Partial   int64           `json:"partial"`           // bytes of blobs that are not whole yet
	Reserved  int64           `json:"reserved"`          // bytes of those that are coming
	Catalog   string          `json:"catalog"`           // ready, rebuilding, or why there is none
	Complete  time.Time       `json:"complete,omitzero"` // since when all that is stored is in it
	Evicted   Evicted         `json:"evicted"`           // since the start of the process
	LastGC    *Job            `json:"last_gc,omitempty"`
	LastScrub time.Time       `json:"last_scrub,omitzero"` // when every blob had been read again
	Damaged   []Damage        `json:"damaged,omitempty"`   // hosted blobs that are not right, up to 100
}

// Used is what an upstream's repositories take.
type Used struct {
	Bytes   int64         `json:"bytes"`
	MaxSize int64         `json:"max_size,omitempty"`
	TTL     time.Duration `json:"ttl,omitempty"`
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
func (k *Keeper) Status(ctx context.Context) (Status, error) { panic("not written") }
