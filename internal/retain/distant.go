package retain

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
)

// ErrShared is wrapped by the error of whatever would delete something while
// another process may be writing to the store: what that one needs is not in the
// catalog of this one.
var ErrShared = errors.New("another process uses the store, and nobody here knows what it needs")

const (
	// lookEvery is how often it is looked who else uses the store and whether it
	// can be reached: more often than a store stops being shared.
	lookEvery = time.Second
	// outageAgain is how long nothing more is said of a store that cannot be
	// reached, unless it could be meanwhile.
	outageAgain = 10 * time.Minute
	// outageLeast is how long it must not have been reached before that is said.
	outageLeast = 5 * time.Second
)

// afar is what a keeper knows of the others who use a distant store, and of the
// way there. It is empty for a store that has everything on a local disk.
type afar struct {
	distant storage.Distant // nil: there is no such place

	mu sync.Mutex
	// shared is whether others were using the store when it was last looked.
	shared bool
	told   bool // what of it was told last
	others []string
	// out is when it was last told that the store cannot be reached; zero: it could
	// be since.
	out time.Time
}

// mayRemove fails while somebody else may be writing to the store, or may have
// been since the catalog was last held to be complete.
func (a *afar) mayRemove() error {
	if a.distant == nil {
		return nil
	}
	now := a.distant.Shared()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !now && !a.shared {
		return nil
	}
	who := ""
	if len(a.others) > 0 {
		who = " (" + strings.Join(a.others, ", ") + ")"
	}
	return fmt.Errorf("%w%s: gc, eviction, retention and purge are off until it has ended; a process that was killed counts for half a minute more", ErrShared, who)
}

// look notes who else uses the store, and whether it can be reached, and tells of
// what has changed.
func (k *Keeper) look() {
	var backlog storage.Backlog
	if b, ok := k.store.(storage.Backlogged); ok {
		backlog = b.Backlog()
	}
	a, shared := &k.afar, k.tree.Shared()
	a.mu.Lock()
	was, told := a.shared, a.told
	a.others = backlog.Others
	a.mu.Unlock()
	if was && !shared {
		// Before anything is deleted again. What the other has told its clients is
		// there, nobody here has heard of.
		k.incomplete("another process has used the store")
		k.journal.mu.Lock()
		k.journal.unheard = k.now()
		k.journal.mu.Unlock()
	}
	// What was so at the beginning has been told to nobody, and may be over by now.
	a.mu.Lock()
	a.shared, a.told = shared, shared
	a.mu.Unlock()
	if told != shared {
		if shared {
			k.log.Warn("another process uses the store: gc, eviction, retention and purge are off, and what is hosted is asked of the store each time",
				zap.Strings("others", backlog.Others))
		} else {
			k.log.Warn("no other process uses the store any more: gc, eviction and retention are on again once the catalog has been compared with it")
		}
		k.happened("storage_shared", map[string]any{"shared": shared, "others": append([]string{}, backlog.Others...)})
	}
	switch {
	case backlog.Err == nil:
		k.reached()
	case k.now().Sub(backlog.Since) >= outageLeast:
		k.outage(backlog.Err.Error())
	}
}

// outage tells that the store cannot be reached, once.
func (k *Keeper) outage(why string) {
	a := &k.afar
	a.mu.Lock()
	told := !a.out.IsZero() && k.now().Sub(a.out) < outageAgain
	if !told {
		a.out = k.now()
	}
	a.mu.Unlock()
	if !told {
		k.log.Warn("the store cannot be reached: what is held near is served, the rest comes from upstreams, pushes are refused, and gc, eviction and scrub wait", zap.String("error", why))
		k.happened("storage_unavailable", map[string]any{"error": why})
	}
}

// reached tells that the store can be reached again, if it was told that it cannot.
func (k *Keeper) reached() {
	if _, ok := k.store.(storage.Backlogged); !ok {
		return // nobody knows
	}
	a := &k.afar
	a.mu.Lock()
	since := a.out
	a.out = time.Time{}
	a.mu.Unlock()
	if !since.IsZero() {
		k.log.Info("the store can be reached again", zap.Duration("after", k.now().Sub(since)))
		k.happened("storage_available", map[string]any{"seconds": k.now().Sub(since).Seconds()})
	}
}

// happened tells an operator, who may take his time to hear it. The caller works
// for the keeper.
func (k *Keeper) happened(event string, data map[string]any) {
	k.wg.Go(func() { k.emit(event, data) })
}

// unreachable reports whether an error says that the store cannot be reached: whatever
// has met it is tried again later. It tells of that, once, unless the store knows
// better: one answer that was cut is no outage.
func (k *Keeper) unreachable(err error) bool {
	if !errors.Is(err, storage.ErrUnavailable) {
		return false
	}
	if _, ok := k.store.(storage.Backlogged); !ok {
		k.outage(err.Error())
	}
	return true
}

// watchAfar looks each second until the context ends.
func (k *Keeper) watchAfar(ctx context.Context) {
	if k.afar.distant == nil {
		return
	}
	tick := time.NewTicker(k.paces.look)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			k.look()
		case <-ctx.Done():
			return
		}
	}
}

// listed waits until the store can be listed as it is: at once, where everything
// is on a local disk. With anew it finds out first what others have put there.
func (k *Keeper) listed(ctx context.Context, anew bool) error {
	switch d := k.afar.distant; {
	case d == nil:
		return nil
	case anew:
		return d.Relist(ctx)
	default:
		return d.Listed(ctx)
	}
}

// Off is why nothing is deleted, while another process uses the store, or empty.
func (k *Keeper) Off() string {
	if err := k.afar.mayRemove(); err != nil {
		return err.Error()
	}
	return ""
}

// Backlog says how it stands with the place where the store has its values, unless
// that is a local disk.
func (k *Keeper) Backlog() (storage.Backlog, bool) {
	b, ok := k.store.(storage.Backlogged)
	if !ok {
		return storage.Backlog{}, false
	}
	return b.Backlog(), true
}
