package retain

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	registry "github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
)

// Hosted is how hosted repositories are kept.
type Hosted struct {
	Pattern oci.Pattern
	// MaxSize is how many bytes they may take together; 0: no limit.
	MaxSize int64
	// Retention says which tags stay; none: all.
	Retention []Rule
	// Immutable tags stay whatever Retention says, and with NoDelete all do.
	Immutable []oci.TagPattern
	NoDelete  bool
}

// hosted is how a hosted repository is kept, by the first pattern that matches:
// its place in Settings.Hosted, or -1.
func (s *Settings) hosted(repository string) int {
	for i := range s.Hosted {
		if s.Hosted[i].Pattern.Match(repository) {
			return i
		}
	}
	return -1
}

const (
	// remeasure is how long what has been measured of a pattern counts, while
	// what is pushed fits in beside it: another program may have written.
	remeasure = time.Minute
	// maxGrants is how many grants that are done are added to what was measured,
	// rather than measuring again.
	maxGrants = 1_000
)

// quota is what the hosted patterns that have a limit take. What is measured is
// what the catalog has; beside it count all grants that this may not have yet.
// So several who push at once never get more than the limit together; it is
// overdrawn only by what is stored without having been asked for.
type quota struct {
	turn chan struct{} // holds a value while something is measured

	mu     sync.Mutex
	set    *Settings // those that scopes are of
	scopes []measurement
	grants map[*grant]struct{}
	done   int // how many of grants
}

// A measurement is what a pattern takes.
type measurement struct {
	at    time.Time // zero: it has not been
	bytes int64
	// journal is how many changes the catalog had then.
	journal uint64
	// sure says that the catalog was complete.
	sure bool
}

// A grant is bytes that have been set aside.
type grant struct {
	repository string
	scope      int // of quota.set, or -1
	bytes      int64
	// until is, once it is done, how many changes had been noted: a catalog that
	// has those has what it was for.
	until uint64
	done  bool
}

func newQuota() quota {
	return quota{turn: make(chan struct{}, 1), grants: map[*grant]struct{}{}}
}

// Quota sets n bytes aside for what is pushed to a repository. It fails with an
// error that wraps [storage.ErrFull] where they would be more than the hosted
// pattern of the repository may take. They count until done is called: once what
// they were for has been noted, or is given up.
//
// Links and directories count as they do in other budgets, and a blob once,
// however many repositories of the pattern have it. Until the catalog is open for
// the first time nothing is known, and nothing is refused; while it is made again
// at least what was known before counts.
func (k *Keeper) Quota(ctx context.Context, repository string, n int64) (done func(), err error) {
	q := &k.quota
	g, ok, err := k.grant(repository, n, false)
	if err == nil && !ok {
		if err := take(ctx, q.turn); err != nil {
			return nil, err
		}
		defer func() { <-q.turn }()
		// Somebody may have measured meanwhile.
		if g, ok, err = k.grant(repository, n, false); err == nil && !ok {
			set := k.set.Load()
			if err := k.measure(ctx, set, set.hosted(repository)); err != nil {
				return nil, err
			}
			g, _, err = k.grant(repository, n, true)
		}
	}
	if err != nil {
		return nil, err
	}
	return sync.OnceFunc(func() { k.ungrant(g) }), nil
}

// grant sets bytes aside, if what has been measured allows it, and says whether it
// has; with final it says why not.
func (k *Keeper) grant(repository string, n int64, final bool) (_ *grant, ok bool, err error) {
	q := &k.quota
	q.mu.Lock()
	defer q.mu.Unlock()
	q.adapt(k.set.Load())
	g := &grant{repository: repository, scope: q.set.hosted(repository), bytes: onDisk(n)}
	if g.scope < 0 || q.set.Hosted[g.scope].MaxSize == 0 {
		g.scope = -1
		return g, true, nil
	}
	m, limit := &q.scopes[g.scope], q.set.Hosted[g.scope].MaxSize
	used := m.bytes + q.granted(g.scope)
	switch fits := g.bytes <= limit-used; {
	case !final && (!fits || m.at.IsZero() || k.now().Sub(m.at).Abs() > remeasure || q.done > maxGrants):
		return nil, false, nil
	case !fits && (m.sure || !m.at.IsZero()):
		return nil, false, fmt.Errorf("%w for %s: %s of the max_size %s of `hosted %s` are used; delete images of it that nobody needs and run gc, or raise it",
			registry.ErrQuota, humanize.IBytes(uint64(n)), humanize.IBytes(uint64(max(used, 0))), humanize.IBytes(uint64(limit)), q.set.Hosted[g.scope].Pattern)
	}
	q.grants[g] = struct{}{}
	return g, true, nil
}

// ungrant ends a grant: what it was for has been noted, or nothing has.
func (k *Keeper) ungrant(g *grant) {
	k.journal.mu.Lock()
	head := k.journal.head
	k.journal.mu.Unlock()
	q := &k.quota
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.grants[g]; !ok {
		return
	}
	if g.scope < 0 || head <= q.scopes[g.scope].journal {
		delete(q.grants, g)
		return
	}
	g.until, g.done = head, true
	q.done++
}

// prune lets go of grants that are done and have been measured. q.mu is held.
func (q *quota) prune() {
	for g := range q.grants {
		if g.done && (g.scope < 0 || g.until <= q.scopes[g.scope].journal) {
			delete(q.grants, g)
			q.done--
		}
	}
}

// granted is what has been granted beside what was measured. q.mu is held.
func (q *quota) granted(scope int) (sum int64) {
	for g := range q.grants {
		if g.scope == scope {
			sum += g.bytes
		}
	}
	return sum
}

// adapt goes by other settings from now on. q.mu is held.
func (q *quota) adapt(set *Settings) {
	if q.set == set {
		return
	}
	before := map[string]measurement{}
	if q.set != nil {
		for i, m := range q.scopes {
			before[q.set.Hosted[i].Pattern.String()] = m
		}
	}
	q.set, q.scopes = set, make([]measurement, len(set.Hosted))
	for i := range q.scopes {
		// What it took at least, in case there is no catalog to say so. It is
		// measured again: a pattern before it may have others now.
		m := before[set.Hosted[i].Pattern.String()]
		q.scopes[i] = measurement{bytes: m.bytes, sure: m.sure}
	}
	for g := range q.grants {
		g.scope = set.hosted(g.repository)
	}
}

// measure asks the catalog what a pattern takes. The caller has its turn. Without a
// catalog it does nothing.
func (k *Keeper) measure(ctx context.Context, set *Settings, scope int) error {
	// What has just been deleted counts no more, and what has been stored counts
	// once.
	if err := k.Flush(ctx); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	k.journal.mu.Lock()
	c, written, complete := k.journal.catalog, k.journal.written, !k.journal.complete.IsZero()
	k.journal.mu.Unlock()
	if scope < 0 || c == nil {
		return nil
	}
	usage, err := c.Together(ctx, func(repository string) bool { return set.hosted(repository) == scope })
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		k.log.Warn("what the repositories of a hosted pattern take could not be found out; its max_size is held against what was last known",
			zap.Stringer("pattern", set.Hosted[scope].Pattern), zap.Error(err))
		return nil
	}
	q := &k.quota
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.set != set {
		return nil // the next one goes by others
	}
	m := &q.scopes[scope]
	bytes := usage.Allocated
	if !complete && m.sure {
		// Something may be missing from the catalog.
		bytes = max(bytes, m.bytes)
	}
	*m = measurement{at: k.now(), bytes: bytes, journal: written, sure: complete || m.sure}
	q.prune()
	return nil
}

// hostedUsed is what the hosted patterns take that have a limit.
func (k *Keeper) hostedUsed(ctx context.Context) ([]HostedUsed, error) {
	var all []HostedUsed
	set, q := k.set.Load(), &k.quota
	for i := range set.Hosted {
		if set.Hosted[i].MaxSize == 0 {
			continue
		}
		used, err := k.remeasured(ctx, set, i)
		if err != nil {
			return nil, err
		}
		q.mu.Lock()
		if q.set == set {
			used += q.granted(i)
		}
		q.mu.Unlock()
		all = append(all, HostedUsed{Pattern: set.Hosted[i].Pattern.String(), Bytes: used, MaxSize: set.Hosted[i].MaxSize})
	}
	return all, nil
}

// remeasured is what a pattern takes, measured again if anything has changed.
func (k *Keeper) remeasured(ctx context.Context, set *Settings, scope int) (int64, error) {
	q := &k.quota
	last := func() (measurement, bool) {
		k.journal.mu.Lock()
		head := k.journal.head
		k.journal.mu.Unlock()
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.set != set {
			return measurement{}, true // the next one goes by others
		}
		m := q.scopes[scope]
		return m, !m.at.IsZero() && m.journal == head && k.now().Sub(m.at).Abs() <= remeasure
	}
	if m, ok := last(); ok {
		return m.bytes, nil
	}
	if err := take(ctx, q.turn); err != nil {
		return 0, err
	}
	defer func() { <-q.turn }()
	if err := k.measure(ctx, set, scope); err != nil {
		return 0, err
	}
	m, _ := last()
	return m.bytes, nil
}
