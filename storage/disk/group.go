package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

// syncEvery is how long a lazy write waits for others to be synced with.
const syncEvery = 30 * time.Second

// A host is what a store asks of the machine it runs on.
type host struct {
	boot  string // storage.Boot
	now   func() time.Time
	after func(time.Duration, func()) (stop func() bool)
	sync  func(dir *os.File) error // of a whole filesystem
	fsync func(*os.File) error
}

func thisHost() host {
	return host{
		boot:  storage.Boot(),
		now:   time.Now,
		after: func(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop },
		sync:  syncfs,
		fsync: (*os.File).Sync,
	}
}

// A group brings the lazy writes of this process to the disk, many at a time,
// and knows which of earlier ones may not have come there. There is one for
// each directory that is open.
//
// The first lazy write after a sync starts a timer, and at its end everything
// is synced and the mark moved on. A write that comes while a sync is running
// starts the next timer, whether or not the sync has taken it along.
type group struct {
	root string
	mode fs.FileMode // of the mark
	host host
	// dir is the root. It is open for as long as the group, since the kernel
	// tells of a write that failed those who had a file open then.
	dir *os.File

	syncs *syncs

	doubt atomic.Pointer[interval] // that of the mark

	syncing sync.Mutex // held through a sync
	mark    mark       // what lies on the disk; guarded by syncing

	mu     sync.Mutex
	stop   func() bool // of the timer; nil if nothing is to be synced
	closed bool
}

// newGroup reads the mark and finds out what is in doubt. last is when the last
// value was written, at the earliest. When it returns, the mark on the disk
// says that the store is in use.
func newGroup(root string, mode fs.FileMode, h host, last time.Time) (*group, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	g := &group{root: root, mode: mode, host: h, dir: dir, syncs: newSyncs(root, h.fsync)}
	now := h.now()
	if now.After(last) {
		last = now
	}
	m, err := readMark(root)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Everything here was written by somebody who does not write lazily:
		// registry:2, or an earlier version of this package.
	case err != nil: // damaged
		m.Doubt = &interval{To: last}
	case !m.Clean && m.Boot == h.boot && h.boot != "":
		// The process was killed, and the kernel still has what it wrote.
		g.mark = m
		g.doubt.Store(m.Doubt)
		g.wrote()
		return g, nil
	case !m.Clean:
		m.Doubt = m.Doubt.join(m.Time.Add(-markMargin), last)
	}
	// Whatever is not in doubt is on the disk.
	g.mark = mark{Boot: h.boot, Time: now.UTC(), Doubt: m.Doubt}
	g.doubt.Store(m.Doubt)
	err = g.mark.write(root, mode)
	if err == nil {
		// The directory of the mark may be new.
		err = syncPath(root)
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("writing down what has been synced: %w", err)
	}
	return g, nil
}

// wrote says that a value has been written lazily.
func (g *group) wrote() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stop == nil && !g.closed {
		g.stop = g.host.after(syncEvery, g.sync)
	}
}

// sync is what the timer does. If it fails, the timer is started again.
func (g *group) sync() {
	g.syncing.Lock()
	defer g.syncing.Unlock()
	g.mu.Lock()
	closed := g.closed
	g.stop = nil
	g.mu.Unlock()
	if closed {
		return
	}
	if err := g.commit(true, false); err != nil {
		g.wrote()
	}
}

// close syncs what is left and marks the store clean. If it fails, the next
// start doubts what was written since the last sync, unless it is in the same
// boot.
func (g *group) close() error {
	g.syncing.Lock()
	defer g.syncing.Unlock()
	g.mu.Lock()
	dirty := g.stop != nil
	if dirty {
		g.stop()
		g.stop = nil
	}
	g.closed = true
	g.mu.Unlock()
	err := g.commit(dirty, true)
	return errors.Join(err, g.dir.Close())
}

// lost doubts what a sync of single values may have failed to bring to the disk.
func (g *group) lost() {
	g.syncing.Lock()
	defer g.syncing.Unlock()
	next := g.mark
	next.Doubt = g.unsynced()
	g.doubt.Store(next.Doubt)
	if err := next.write(g.root, g.mode); err == nil {
		g.mark = next
	}
}

// unsynced is what is in doubt once a sync has failed. The kernel tells once of
// what it could not write, and from then on takes it for written: that the next
// sync succeeds proves nothing for these values. The caller holds syncing.
func (g *group) unsynced() *interval {
	return g.mark.Doubt.join(g.mark.Time.Add(-markMargin), g.host.now().UTC())
}

// commit syncs, if anything is dirty, and then writes the mark. The caller
// holds syncing.
func (g *group) commit(dirty, clean bool) error {
	next := g.mark
	var failed error
	if dirty {
		began := g.host.now().UTC()
		if failed = g.host.sync(g.dir); failed == nil {
			failpoint.Hit("store.synced")
			next.Time = began
		} else {
			next.Doubt = g.unsynced()
			g.doubt.Store(next.Doubt)
		}
	}
	next.Clean = clean && failed == nil
	if err := next.write(g.root, g.mode); err != nil {
		return errors.Join(failed, fmt.Errorf("writing down what has been synced: %w", err))
	}
	g.mark = next
	failpoint.Hit("store.marked")
	return failed
}
