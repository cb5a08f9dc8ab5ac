package retain

import (
	"fmt"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/storage"
)

// account is what the store takes, on the safe side: what the catalog knows of,
// parts of blobs, what is reserved, and what was written and is not in the
// catalog yet.
type account struct {
	mu       sync.Mutex
	known    bool  // there has been a catalog
	stored   int64 // what it says
	doubtful bool  // it may miss something, and then the store takes
	floor    int64 // at least this
	reserved int64 // by those that are not released, used or not
	settling []settling
	settled  int64 // the sum of settling

	partial int64     // what Hooks.Partial has said
	asked   time.Time // and when
	since   int64     // what has been released since: it may have become partial
}

// partialMore is how many bytes may be missing from what is partial until it is
// asked for again, and never more than a thousandth of the budget.
const partialMore = 64 << 20

// settling is what a released reservation has written: it counts until the
// catalog has everything that was noted before.
type settling struct {
	until uint64
	bytes int64
}

// update takes what the catalog says with the first n changes written.
func (a *account) update(allocated int64, n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stored, a.known = allocated, true
	settled := a.settle(n)
	if a.doubtful {
		a.floor += settled
	}
}

// settle lets go of what the catalog has with the first n changes, and returns
// how much that is. a.mu is held.
func (a *account) settle(n uint64) (settled int64) {
	for len(a.settling) > 0 && a.settling[0].until <= n {
		settled += a.settling[0].bytes
		a.settling = a.settling[1:]
	}
	a.settled -= settled
	return settled
}

// doubt says that the catalog may miss something.
func (a *account) doubt() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.doubtful {
		a.doubtful, a.floor = true, a.stored
	}
}

// believe says that it misses nothing, with the first n changes written.
func (a *account) believe(n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.doubtful, a.floor = false, 0
	a.settle(n)
}

// total is what the store takes, with parts of so many bytes. a.mu is held.
func (a *account) total(partial int64) int64 {
	return max(a.stored, a.floor) + partial + a.reserved + a.settled
}

// used is what the store takes, and whether that is known.
func (k *Keeper) used() (int64, bool) {
	partial := k.partial()
	a := &k.account
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.total(partial), a.known
}

// partial is how many bytes of blobs are on the disk that are not whole, as of a
// moment ago.
func (k *Keeper) partial() int64 { return k.partialAt(false) }

// partialAt is so as of now, if that matters.
func (k *Keeper) partialAt(now bool) int64 {
	f := k.parts.Load()
	if f == nil {
		return 0
	}
	a, most := &k.account, min(k.settings().MaxSize/1000, partialMore)
	a.mu.Lock()
	if !now && time.Since(a.asked) < k.paces.partial && a.since <= most {
		defer a.mu.Unlock()
		return a.partial
	}
	a.since = 0
	a.mu.Unlock()
	n := (*f)()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.partial, a.asked = n, time.Now()
	return n
}

// Store is the store whose Reserve knows the budgets: what is reserved and would
// take more than MaxSize fails with an error that wraps storage.ErrFull. The
// store's own limit holds besides.
//
// As long as the catalog is being opened or made again, MaxSize is held against
// what was last known of the store; where nothing is known of it, as at the very
// first start on a store that is not empty, only its own limit holds.
func (k *Keeper) Store() storage.Store { return budgeted{k.store, k} }

type budgeted struct {
	storage.Store
	keeper *Keeper
}

func (b budgeted) Reserve(n int64) (storage.Reservation, error) {
	k := b.keeper
	if r := k.eviction.gift(n); r != nil {
		return r, nil
	}
	// Those that wait for room come first.
	r, err := k.reserve(n, k.eviction.waiting())
	if err != nil {
		return nil, err
	}
	return r, nil
}

// reserve sets n bytes aside, if ahead bytes would fit besides.
func (k *Keeper) reserve(n, ahead int64) (*reservation, error) {
	limit, partial := k.settings().MaxSize, int64(0)
	if limit > 0 {
		partial = k.partial()
	}
	a := &k.account
	size := onDisk(n)
	tight := func() (used int64, yes bool) {
		used = a.total(partial)
		return used, limit > 0 && a.known && size > limit-used-ahead
	}
	a.mu.Lock()
	used, full := tight()
	if full {
		// Somebody may just have given up something to make room for this.
		a.mu.Unlock()
		partial = k.partialAt(true)
		a.mu.Lock()
		used, full = tight()
	}
	if full {
		a.mu.Unlock()
		return nil, fmt.Errorf("storage: %w for %s: %s of max_size %s are used; raise max_size, or wait until something is evicted",
			storage.ErrFull, humanize.IBytes(uint64(n)), humanize.IBytes(uint64(max(used, 0))), humanize.IBytes(uint64(limit)))
	}
	a.reserved += size
	a.mu.Unlock()
	r, err := k.store.Reserve(n)
	if err != nil {
		a.mu.Lock()
		a.reserved -= size
		a.mu.Unlock()
		return nil, err
	}
	return &reservation{Reservation: r, keeper: k, asked: n, size: size}, nil
}

// reservation counts as a whole until it is released.
type reservation struct {
	storage.Reservation
	keeper *Keeper

	asked int64

	// Guarded by keeper.account.mu.
	size, used int64
	released   bool
}

const block = 4 << 10

// onDisk is about what n bytes take on a disk, with their directory and a link
// to them, as the catalog counts them.
func onDisk(n int64) int64 { return (n+block-1)/block*block + 3*block }

func (r *reservation) Use(n int64) {
	r.Reservation.Use(n)
	a := &r.keeper.account
	a.mu.Lock()
	defer a.mu.Unlock()
	r.used = min(r.used+n, r.asked)
}

func (r *reservation) Release() {
	r.Reservation.Release()
	k := r.keeper
	k.journal.mu.Lock()
	head, written := k.journal.head, k.journal.written
	k.journal.mu.Unlock()
	a := &k.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.released {
		return
	}
	r.released = true
	a.reserved -= r.size
	a.since += r.used
	if r.used > 0 && (head > written || a.doubtful) {
		if last := len(a.settling) - 1; last >= 0 && a.settling[last].until == head {
			a.settling[last].bytes += onDisk(r.used) // as while nothing is noted any more
		} else {
			a.settling = append(a.settling, settling{head, onDisk(r.used)})
		}
		a.settled += onDisk(r.used)
	}
	if k.eviction.waiting() > 0 {
		signal(k.eviction.kick)
	}
}
