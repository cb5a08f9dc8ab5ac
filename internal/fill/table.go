package fill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/storage"
)

const (
	maxLive   = 1024    // fills at once
	maxSize   = 1 << 40 // bytes of one content
	maxParked = 1024    // fills whose files are kept
)

// key is what makes two wants one fill. Size belongs to it so that a manifest
// that lies about a size can spoil nobody's fill but its own.
type key struct {
	digest digest.Digest // empty: nobody knows
	size   int64
	take   string // of content that is taken, and not stored; see Want.taken
}

// name is that of the key's files in the spool directory.
func (k key) name() string {
	if k.take != "" {
		name := takePrefix + k.take
		if k.digest != "" {
			name += "-" + k.digest.Algorithm().String() + "-" + k.digest.Encoded()
		}
		return name + "-" + strconv.FormatInt(k.size, 10)
	}
	return k.digest.Algorithm().String() + "-" + k.digest.Encoded() + "-" + strconv.FormatInt(k.size, 10)
}

// takePrefix begins the names of the files of content that is taken.
const takePrefix = "take-"

// A Table holds the live fills of a store.
type Table struct {
	store  storage.Store
	link   func(ctx context.Context, repository string, asked, canonical digest.Digest) error
	done   func(Summary)
	room   func(ctx context.Context, n int64) bool
	limits limits
	boot   string
	spool  string // "": there is none, for the reason in broken
	broken error

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	live   map[key]*Fill
	ending map[key]*Fill // have left, and are putting their files away

	// misled are the keys for which the store has delivered wrong bytes.
	misled *lru.Cache[string, struct{}]

	cores int
	large atomic.Int64 // fills that are fetching larger content; see proof.go

	parking sync.Mutex // of whoever removes parked files
	swept   time.Time  // guarded by parking
}

// NewTable returns a table that commits to the given store. link makes
// committed content a member of a repository: asked is the digest it was asked
// for by, canonical the sha256 it lies under. done, which may be nil, is
// called at the end of each fill that asked a source, but for those that somebody
// pulls, who is told. room, which may be nil, is
// asked to make room for n bytes where there is none, and reports whether it is
// worth trying again.
//
// The directory fills in the store's spool is the table's own. What an earlier
// one left there is used when it is asked for again, within a week.
func NewTable(store storage.Store, link func(ctx context.Context, repository string, asked, canonical digest.Digest) error, done func(Summary), room func(ctx context.Context, n int64) bool) *Table {
	t := &Table{
		store: store, link: link, done: done, room: room, limits: standard, boot: storage.Boot(),
		cores: runtime.GOMAXPROCS(0),
		live:  map[key]*Fill{}, ending: map[key]*Fill{},
	}
	t.misled, _ = lru.New[string, struct{}](maxMisled) // fails only for a size below 1
	t.ctx, t.cancel = context.WithCancelCause(context.Background())
	if t.spool, t.broken = store.Spool("fills"); t.broken == nil {
		t.sweep()
	}
	return t
}

// Join returns the fill of the wanted content, starting one if there is none.
// The caller releases the fill.
func (t *Table) Join(want Want) (*Fill, error) { return t.join(want, nil) }

// Ahead fetches content that somebody will soon ask for, in the background. Once
// somebody has come for it and left, it is a fill as any other. Unless there is
// room for it, it does nothing.
func (t *Table) Ahead(want Want) {
	t.mu.Lock()
	busy := len(t.live) >= maxLive/2
	t.mu.Unlock()
	if !busy {
		t.ahead(want) // closed, or busy after all
	}
}

// Fetch fetches content as Ahead does, and waits until it is stored and linked,
// or why it is not.
func (t *Table) Fetch(ctx context.Context, want Want) error {
	for {
		f, err := t.ahead(want)
		if err != nil {
			return err
		}
		select {
		case <-f.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		// Somebody had come for it, left, and let it be put away.
		if !errors.Is(f.ended, ErrPaused) {
			return f.ended
		}
	}
}

// ahead joins without a user.
func (t *Table) ahead(want Want) (*Fill, error) { return t.enter(want, false, nil) }

// join joins with a user, who pulls, or with nil, who reads.
func (t *Table) join(want Want, tk *taker) (*Fill, error) {
	return t.enter(want, true, tk)
}

func (t *Table) enter(want Want, user bool, tk *taker) (*Fill, error) {
	if tk == nil && (want.Take != nil || want.Name != "") {
		return nil, errors.New("fill: what is to be taken is pulled, and not joined")
	}
	if want.Size < 0 || want.Size > maxSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, want.Size)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil {
		return nil, ErrClosed
	}
	k := key{want.Digest, want.Size, want.taken()}
	if f := t.live[k]; f != nil && f.join(want, user, tk) {
		return f, nil
	}
	if len(t.live)+len(t.ending) >= maxLive {
		return nil, ErrBusy
	}
	f := &Fill{
		table:        t,
		key:          k,
		repository:   want.Repository,
		started:      time.Now(),
		gone:         make(chan struct{}),
		changed:      make(chan struct{}),
		users:        1, // run
		repositories: map[string]bool{},
	}
	f.ctx, f.cancel = context.WithCancelCause(t.ctx)
	f.sources.heard = f.started
	f.progress.width = 1
	f.connections = 1
	f.anew = want.Anew
	f.join(want, user, tk)
	if last := t.ending[k]; last != nil {
		f.before = last.gone
	}
	t.live[k] = f
	t.wg.Go(f.run)
	return f, nil
}

// remove takes a fill out of those that can be joined, if it has not left. It
// counts as ending until forget. t.mu is held.
func (t *Table) remove(f *Fill) {
	if t.live[f.key] == f {
		delete(t.live, f.key)
		t.ending[f.key] = f
	}
}

// forget says that a fill has left and touches its files no more.
func (t *Table) forget(f *Fill) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(f)
	delete(t.ending, f.key)
	close(f.gone)
}

// Close ends all fills, waits until they have put their files away, and refuses
// new ones.
func (t *Table) Close() {
	t.mu.Lock()
	t.cancel(ErrClosed)
	t.mu.Unlock()
	t.wg.Wait()
}

// parked lists the names of fills that are not under way, those longest
// untouched first.
func (t *Table) parked() ([]string, error) {
	entries, err := os.ReadDir(t.spool)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	busy := t.busy()
	t.mu.Unlock()
	type file struct {
		name    string
		touched time.Time
	}
	newest := map[string]time.Time{}
	for _, entry := range entries {
		name := strings.TrimSuffix(entry.Name(), ledgerSuffix)
		info, err := entry.Info()
		if err != nil || busy[name] {
			continue
		}
		if touched := info.ModTime(); touched.After(newest[name]) {
			newest[name] = touched
		}
	}
	var files []file
	for name, touched := range newest {
		files = append(files, file{name, touched})
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(a.touched.Compare(b.touched), cmp.Compare(a.name, b.name)) })
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
	}
	return names, nil
}

// discard removes a parked fill's files, unless somebody has come back for
// them since they were listed.
func (t *Table) discard(name string) error {
	path := filepath.Join(t.spool, name)
	// Renamed under the lock, since removing a large file takes its time.
	t.mu.Lock()
	err := errors.ErrUnsupported
	if !t.busy()[name] {
		os.Rename(path+ledgerSuffix, path+ledgerSuffix+goneSuffix)
		if err = os.Rename(path, path+goneSuffix); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	t.mu.Unlock()
	if err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(path+ledgerSuffix+goneSuffix), os.RemoveAll(path+goneSuffix))
}

// busy are the names of the files that fills are using. t.mu is held.
func (t *Table) busy() map[string]bool {
	names := make(map[string]bool, len(t.live)+len(t.ending))
	for k := range t.live {
		names[k.name()] = true
	}
	for k := range t.ending {
		names[k.name()] = true
	}
	return names
}

// sweep removes what nobody has come back for, what has no ledger, and what is
// too much.
func (t *Table) sweep() {
	t.parking.Lock()
	defer t.parking.Unlock()
	t.swept = time.Now()
	names, err := t.parked()
	if err != nil {
		return
	}
	for i, name := range names {
		info, err := os.Stat(filepath.Join(t.spool, name+ledgerSuffix))
		if err == nil && !strings.HasPrefix(name, takePrefix) { // one that was taken has left its ledger
			_, err = os.Stat(filepath.Join(t.spool, name))
		}
		if err != nil || time.Since(info.ModTime()) > t.limits.keep || len(names)-i > maxParked {
			t.discard(name)
		}
	}
}

// tidyEvery is how often parked files are looked through while there are new
// ones.
const tidyEvery = time.Minute

func (t *Table) tidy() {
	t.parking.Lock()
	due := time.Since(t.swept) > tidyEvery
	t.parking.Unlock()
	if due {
		t.sweep()
	}
}

// Partial is how many bytes on the disk are of content that is not whole yet, less
// what fills under way have set aside and not given back.
func (t *Table) Partial() int64 {
	entries, err := os.ReadDir(t.spool)
	if err != nil {
		return 0
	}
	covered := map[string]int64{}
	t.mu.Lock()
	for _, fills := range []map[key]*Fill{t.live, t.ending} {
		for k, f := range fills {
			covered[k.name()] = f.covered.Load()
		}
	}
	t.mu.Unlock()
	var sum int64
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			continue // committed or removed since
		}
		allocated := info.Size()
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			allocated = stat.Blocks * 512
		}
		sum += max(0, allocated-covered[entry.Name()])
	}
	return sum
}

// reserve sets room aside, and if there is none, gives up parked fills for it,
// those longest untouched first, and then asks for room.
func (t *Table) reserve(ctx context.Context, n int64) (storage.Reservation, error) {
	r, err := t.store.Reserve(n)
	if !errors.Is(err, storage.ErrFull) {
		return r, err
	}
	if r, err = t.reserveParked(n, err); !errors.Is(err, storage.ErrFull) || t.room == nil || !t.room(ctx, n) {
		return r, err
	}
	return t.store.Reserve(n)
}

// reserveParked gives up parked fills until there is room. full is why there is
// none.
func (t *Table) reserveParked(n int64, full error) (storage.Reservation, error) {
	t.parking.Lock()
	defer t.parking.Unlock()
	names, err := t.parked()
	if err != nil {
		return nil, full
	}
	for _, name := range names {
		if t.discard(name) != nil {
			continue
		}
		r, err := t.store.Reserve(n)
		if !errors.Is(err, storage.ErrFull) {
			return r, err
		}
		full = err
	}
	return nil, full
}
