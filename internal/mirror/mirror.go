package mirror

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// manifestBudget bounds the asking of all endpoints for a manifest: with
	// it a client hears from us before 10 s, and containerd can move on.
	manifestBudget = 8 * time.Second
	// blobPatience is how long a client waits for a blob's first byte, all
	// asking included.
	blobPatience = 20 * time.Second

	maxTags  = 100_000 // remembered
	maxLacks = 10_000  // remembered of what upstreams do not have
)

// A Mirror is the state behind all sites of one store. It outlives
// configurations.
type Mirror struct {
	tree     *tree.Tree
	hosted   *hosted.Registry
	fills    *fill.Table
	distant  storage.Distant // nil: what is stored is near
	log      *zap.Logger
	now      func() time.Time
	complete func(context.Context) *catalog.Catalog // Parts.Catalog
	suspect  func(digest.Digest)                    // Parts.Suspect
	// patience is blobPatience, and hurry is storePatience, but in tests.
	patience, hurry time.Duration
	silent          atomic.Int64 // when the store was last asked something that it has not answered, by Unix in ns

	ctx    context.Context
	cancel context.CancelFunc
	ending sync.Mutex
	ended  bool           // guarded by ending
	wg     sync.WaitGroup // added to under ending, while not ended

	tags     *lru.Cache[tagKey, tagState]
	failures *lru.Cache[tagKey, lack] // checks that have failed
	tagLocks [64]sync.Mutex
	seed     maphash.Seed
	pending  *lru.Cache[manifestKey, []string]
	pendMu   sync.Mutex // makes changes of pending whole
	flights  singleflight.Group
	aheads   chan struct{} // holds a value for each check ahead
	lacking  *lru.Cache[lackKey, lack]
	blobLack atomic.Int64                     // when the last lack of a blob was learnt, in nanoseconds of Unix time
	probes   *lru.Cache[string, tree.Verdict] // verdicts not worth a record
	told     *lru.Cache[trouble, time.Time]   // when it was last told of
	emit     atomic.Pointer[func(string, map[string]any)]
	notify   atomic.Pointer[func(notify.Event)]
	pulls    atomic.Bool                 // notify is told of pulls
	coming   *lru.Cache[member, *layers] // of manifests that have just come
	untagged atomic.Uint64               // tags that were removed
	changes  atomic.Uint64               // pushes and deletes that were answered
	maxBlob  atomic.Int64
	proven   *lru.Cache[digest.Digest, struct{}] // blobs that were hashed on suspicion
	// unclaimed are repositories of which the store could not say what they are,
	// by their names.
	unclaimed *lru.Cache[string, Target]
}

type tagKey struct{ repository, tag string }

type manifestKey struct {
	repository string
	digest     digest.Digest
}

// Parts are what a mirror works with. It closes none of them, and they outlive it.
type Parts struct {
	Store storage.Store
	Tree  *tree.Tree // in the store
	// Hosted is what is hosted in the store.
	Hosted *hosted.Registry
	// Room makes room for n bytes where there is none, and reports whether it is
	// worth trying again; nil: nobody does.
	Room func(ctx context.Context, n int64) bool
	// Catalog returns the catalog, if it has everything that is stored by now,
	// or nil; nil: there is none. Listings are quicker with it.
	Catalog func(context.Context) *catalog.Catalog
	// Suspect is told of a hosted blob that has another length than its manifest
	// says; nil: nobody is.
	Suspect func(digest.Digest)
	Log     *zap.Logger
}

// New returns a mirror.
func New(p Parts) *Mirror {
	m := &Mirror{tree: p.Tree, hosted: p.Hosted, distant: p.Store.Distant(), complete: p.Catalog, suspect: p.Suspect, log: p.Log, now: time.Now, patience: blobPatience, hurry: storePatience, aheads: make(chan struct{}, checksAhead)}
	if m.suspect == nil {
		m.suspect = func(digest.Digest) {}
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	// lru.New fails only for a size below 1.
	m.tags, _ = lru.New[tagKey, tagState](maxTags)
	m.failures, _ = lru.New[tagKey, lack](maxLacks)
	m.seed = maphash.MakeSeed()
	m.pending, _ = lru.New[manifestKey, []string](maxTags)
	m.lacking, _ = lru.New[lackKey, lack](maxLacks)
	m.probes, _ = lru.New[string, tree.Verdict](10_000)
	m.told, _ = lru.New[trouble, time.Time](1_000)
	m.coming, _ = lru.New[member, *layers](10_000)
	m.proven, _ = lru.New[digest.Digest, struct{}](1_000)
	m.unclaimed, _ = lru.New[string, Target](10_000)
	m.fills = fill.NewTable(p.Store, m.link, m.filled, p.Room)
	return m
}

// Close ends every fill and every question to an upstream, and waits for them.
func (m *Mirror) Close() {
	m.ending.Lock()
	m.ended = true
	m.ending.Unlock()
	m.cancel()
	m.fills.Close()
	m.wg.Wait()
}

// Note is told of every change of the tree. It forgets what a tag has meant that
// is removed.
func (m *Mirror) Note(c tree.Change) {
	if c.Kind == tree.Untagged {
		m.untagged.Add(1)
		m.tags.Remove(tagKey{c.Repository, c.Tag})
	}
}

// Partial is how many bytes on the disk are of blobs that are not whole yet, but
// for those that fills under way have set aside.
func (m *Mirror) Partial() int64 { return m.fills.Partial() }

// Fills is the one table of what is being fetched, for others who fetch into the store.
func (m *Mirror) Fills() *fill.Table { return m.fills }

// begin keeps the mirror open for something that no request waits for, until
// wg.Done. It fails when the mirror is being closed.
func (m *Mirror) begin() bool {
	m.ending.Lock()
	defer m.ending.Unlock()
	if !m.ended {
		m.wg.Add(1)
	}
	return !m.ended
}

// DefaultHot is how many bytes of memory there are for small content unless
// Settings say more or less.
const DefaultHot = tree.DefaultHot

// Settings are what a configuration changes in a mirror.
type Settings struct {
	// Hot is how many bytes of memory there are for small content.
	Hot int64
	// MaxBlob is how large a blob may be that is not held already, in bytes; 0:
	// as large as any. A manifest that names a larger one is refused.
	MaxBlob int64
	// Emit is told what an operator may want to act on; nil: nobody is. Its
	// events have `reference` and `error`: upstream_down, upstream_denied and
	// rate_limited besides `upstream`, digest_mismatch `endpoint`, and
	// storage_full no more. Each comes once a minute at most, for each upstream
	// or repository.
	Emit func(event string, data map[string]any)
	// Notify is told of every push, mount and delete, before the client is
	// answered; nil: nobody is. With Pulls it is told of every pull of what is
	// hosted here, too.
	Notify func(notify.Event)
	Pulls  bool
}

// Set replaces the settings.
func (m *Mirror) Set(s Settings) {
	m.tree.Heat(s.Hot)
	m.maxBlob.Store(s.MaxBlob)
	m.emit.Store(&s.Emit)
	m.pulls.Store(s.Pulls)
	m.notify.Store(&s.Notify)
}

// share runs f once for all who ask with the same key at the same time, on the
// mirror's own time: who asked may leave. It returns early when ctx ends.
func share[T any](ctx context.Context, m *Mirror, key string, f func(context.Context) (T, error)) (T, error) {
	result := m.flights.DoChan(key, func() (any, error) {
		if !m.begin() {
			return nil, fill.ErrClosed
		}
		defer m.wg.Done()
		ctx, cancel := context.WithTimeoutCause(m.ctx, manifestBudget, upstream.ErrSlow)
		defer cancel()
		return f(ctx)
	})
	select {
	case r := <-result:
		got, _ := r.Val.(T)
		return got, r.Err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// own is share, and with force makes sure that f has begun after the call: a
// question that was already under way may be answered by what was true before.
func own[T any](ctx context.Context, m *Mirror, force bool, key string, f func(context.Context) (T, error)) (got T, err error) {
	if !force {
		return share(ctx, m, key, f)
	}
	for range 2 { // the flight after the one that is under way will do, whoever began it
		var mine atomic.Bool
		got, err = share(ctx, m, "forced "+key, func(ctx context.Context) (T, error) {
			mine.Store(true)
			return f(ctx)
		})
		if mine.Load() || ctx.Err() != nil {
			break
		}
	}
	return got, err
}

// filled logs a fill that has ended: one line each.
func (m *Mirror) filled(s fill.Summary) {
	fields := []zap.Field{
		zap.String("reference", s.Repository+"@"+s.Digest.String()),
		zap.String("endpoint", s.From),
		zap.Int64("bytes", s.Fetched),
		zap.Float64("seconds", s.Duration.Seconds()),
	}
	switch {
	case s.Err == nil:
		fields = append(fields, zap.Float64("mb_per_s", float64(s.Fetched)/1e6/max(s.Duration.Seconds(), 1e-6)))
		m.log.Info("filled", fields...)
	case errors.Is(s.Err, fill.ErrClosed), errors.Is(s.Err, fill.ErrPaused),
		errors.Is(s.Err, fill.ErrCommit) && errors.Is(s.Err, fs.ErrNotExist): // evicted before it was linked
		m.log.Info("fill put away", append(fields, zap.String("reason", s.Err.Error()))...)
	case errors.Is(s.Err, fill.ErrSpool), errors.Is(s.Err, fill.ErrPassed), errors.Is(s.Err, fill.ErrCommit):
		m.diskTrouble("keeping a blob", s.Repository+"@"+s.Digest.String(), s.Err)
	default:
		m.log.Warn("fill failed", append(fields, zap.Error(s.Err))...)
		if errors.Is(s.Err, fill.ErrDigest) && m.due(trouble{digestMismatch, s.Repository}) {
			m.event(digestMismatch, map[string]any{"endpoint": s.From, "reference": s.Repository + "@" + s.Digest.String(), "error": s.Err.Error()})
		}
	}
}

// admit checks that a repository is what the request takes it for. A record
// decides for ever whether a repository is hosted, and whose images it has: a
// change of configuration must not mix two registries' images, nor let a
// hosted one be taken for something that can be fetched again.
func (m *Mirror) admit(ctx context.Context, t Target) error {
	asking, done := m.soon(ctx, t, false)
	record, err := m.tree.Record(asking, t.Repository)
	if err = done(err); m.absent(t, err) {
		return nil
	}
	if err != nil {
		return err
	}
	return conflict(t, record)
}

func conflict(t Target, record tree.Record) error {
	switch {
	case t.Upstream == nil && record.Class == tree.Mirrored:
		return fail(unknownName, "the store has %s as a mirror of %s; choose another hosted name, or another repository_prefix for that upstream", t.Repository, record.Upstream)
	case t.Upstream != nil && record.Class != tree.Mirrored:
		return fail(unknownName, "the store has %s as a hosted repository, and will not mix it with images of %s; give that upstream another repository_prefix", t.Repository, t.Upstream.Name)
	case t.Upstream != nil && record.Upstream != t.Upstream.Name:
		return fail(unknownName, "the store has %s as a mirror of %s, and will not mix it with images of %s; give that upstream another repository_prefix", t.Repository, record.Upstream, t.Upstream.Name)
	}
	return nil
}

// errUnclaimed says that nobody knows what a repository is recorded as: what is
// mirrored is served, and nothing is put into it.
var errUnclaimed = fmt.Errorf("what the repository is recorded as is not known: %w", storage.ErrUnavailable)

// claim records a mirrored repository before anything is stored in it. Where the
// store cannot say what it is, the error is errUnclaimed.
func (m *Mirror) claim(ctx context.Context, t Target) error {
	asking, done := m.soon(ctx, t, false)
	record, err := m.tree.Claim(asking, t.Repository, tree.Record{
		Class:    tree.Mirrored,
		Upstream: t.Upstream.Name,
		Prefix:   t.Upstream.Prefix,
		Created:  m.now().UTC(),
	})
	err = done(err)
	if err == nil {
		if err = conflict(t, record); err == nil {
			m.unclaimed.Remove(t.Repository)
		}
		return err
	}
	if m.away(t, err) {
		m.unclaimed.Add(t.Repository, t)
		return errUnclaimed
	}
	if _, known := m.tree.Record(ctx, t.Repository); !errors.Is(known, fs.ErrNotExist) {
		return known
	}
	// A repository without a record belongs to whoever's prefix it is under.
	m.diskTrouble("recording a repository", t.Repository, err)
	return nil
}
