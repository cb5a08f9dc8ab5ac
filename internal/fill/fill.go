// Package fill fetches content once and lets any number of readers follow
// while it arrives.
//
// A [Fill] is the one live fetch of a blob in this process. It belongs to its
// [Table] and not to whoever asked first: requests come and go as readers, and
// the fetch knows nothing of them but where they read. It knows nothing of
// HTTP or registries either: bytes come from a [Source], and go to a
// [storage.Store].
//
// # States
//
//	joined ──► fetching ──► verified ──► committed (stored, or taken)
//	   │          │
//	   │          ├──► passing ──► paused or failed
//	   │          ├──► paused ─ ─ ► the next fill of the key
//	   │          └──► failed
//	   ├──► verified (the store has it after all)
//	   ├──► passing  (there is nowhere to put a spool)
//	   └──► failed
//
// A verified fill whose commit fails lets its readers finish and keeps nothing.
// The states mean:
//
//   - joined: in the table, and nothing asked of a source. The fill before it
//     with the same key, if one is still putting its files away, is waited for.
//     Then run looks into the store again. Without that there is a race: a
//     request misses the store, the fill it would have joined commits and
//     leaves the table, and the request starts a second fetch of what is
//     already there (groupcache's race).
//   - fetching: content of up to 1 MiB comes into memory, in one piece, and
//     nobody sees it before its digest is proven. Larger content comes in
//     spans, several at a time, into a sparse spool file; a map says which of
//     its segments are there, and a ledger beside it remembers that with their
//     checksums. The digest is computed along the contiguous prefix, by one
//     goroutine at a time (hashing): run, or the fetcher that is next.
//   - passing: the disk takes no more. Readers use what the spool has, and then
//     a stream of their own, which each hashes for itself.
//   - verified: every byte is there and the digest is right. Readers are free
//     of the fill's fate from here on.
//   - committed: the content is under its key and every repository that joined
//     has its link. Joiners that arrive while links are being written are
//     linked too; the check that none is left and the removal from the table
//     happen under both locks.
//   - paused: nobody has been reading for a while, and less than half was
//     there. The fill has left the table; its files stay, and the next fill of
//     the key goes on from them, in this process or a later one.
//   - failed: err is set, and the fill has left the table, so that the next
//     Join starts anew: from the files, unless it was the content that was
//     wrong.
//
// # What is taken
//
// Content that somebody pulls ([Table.Pull]) is fetched and proven as any other, but
// always into a spool file, however small, with both the sha256 and the sha512; and it
// is not stored, but taken by those who pull, who are asked one after the other in
// verified. That the file is whole, and its digests, is in the ledger before: a ledger
// that says so without a file is of one that was taken by somebody who did not get to
// say so, and only taken again. Committed is when the last has been asked and one has
// taken it; otherwise the fill pauses with the whole file, unless all have refused
// it. There is no passing, since nobody reads: that the disk takes no more is a
// failure, and the files stay. And a fill that nobody pulls any more pauses, however
// much is there.
//
// # Lock
//
// Fill.mu guards every field below it, and a Reader's at. Nothing blocks while
// it is held, and no file is touched. Table.mu is taken before Fill.mu, never
// after. The files belong to run, but for the data between the ends of a span,
// which belong to its fetcher. The proof belongs to whoever has set hashing.
//
// # Wake rule
//
// Whoever changes what somebody may be waiting for (a segment or part of one,
// state, err, the last user gone, a span ended, the proof given back while
// there is more to hash) does so under the lock, and
// calls wake, which closes changed and puts a new channel in its place. A
// waiter reads what it wants and changed under one lock, and waits for that
// channel or its own context; so no change can fall between looking and
// waiting. Every wake reaches every waiter, so bytes that arrive are announced
// 256 KiB at a time, or after 2 ms (wakeSoon).
//
// Whoever changes what is wanted (a new reader, an open-ended one that has
// moved on, a span that has ended) calls schedule, which starts fetchers while
// there is something to fetch and room for another: see plan.go.
//
// # Stores at a distance
//
// Content that the store has, but not near (storage.Distant), is fetched as any
// other, first from [Table.Stored], and with it from the upstream where there is one;
// its commit is what brings it near. So a herd costs one request there, and where the
// store is cut or down the next source goes on at the same offset.
//
// A request there costs more than bytes do. So while the store is the source to be
// asked, the whole is asked of it by one span, which is steady: it claims a window as
// any span does, so that readers of parts further on get spans of their own, but its
// request is for all the rest, and at the end of its window it claims the next. It
// ends where it meets what others have brought or are bringing, or when nobody wants
// the whole any more. A source that is not the store brings the rest of its window
// only, and the next spans are as ever.
//
// # Withholding
//
// A reader that asked for content up to its end gets the last segment only in
// verified, so that wrong content can never arrive complete. A reader of a
// bounded range gets what is there: lazy clients check chunks themselves, and
// ask for an archive's last bytes first.
package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// Segment is the unit of a spool's map, and of what is withheld, in bytes.
const Segment = 64 << 10

// limits are the sizes and times a fill works with. Tests make them small.
type limits struct {
	segment int64
	small   int64         // up to which content is fetched into memory
	trust   int64         // up to which a size is believed before a source confirms it
	window  [2]int64      // least and most asked for at once, of what is larger
	ahead   int64         // of an open-ended reader
	linger  time.Duration // without a reader, before a fill is paused
	ramp    time.Duration // a span may take before another connection is opened
	keep    time.Duration // of files nobody has come back for
}

var standard = limits{
	segment: Segment,
	small:   1 << 20,
	trust:   16 << 30,
	window:  [2]int64{1 << 20, 8 << 20},
	ahead:   8 << 20,
	linger:  2 * time.Second,
	ramp:    20 * time.Millisecond,
	keep:    7 * 24 * time.Hour,
}

const (
	bufferSize = 256 << 10            // read at once, and announced at once
	wakeDelay  = 2 * time.Millisecond // longest that bytes stay unannounced
)

var (
	// ErrDigest is wrapped when a source delivered bytes that are not the
	// content. Nothing of them is kept.
	ErrDigest = errors.New("content does not match its digest")
	// ErrSize is wrapped when a source's content is not as long as promised.
	ErrSize = errors.New("content does not have the promised size")
	// ErrSpool is wrapped when the spool's disk did not keep what was written.
	ErrSpool = errors.New("the spool has lost bytes")
	// ErrPassed is wrapped when the disk took no more, and every reader went on
	// by itself.
	ErrPassed = errors.New("passed through")
	// ErrCommit is wrapped when verified content could not be stored or linked.
	// Its readers have had it.
	ErrCommit = errors.New("committing")
	// ErrTooLarge is wrapped by the error of a Join of more than 1 TiB.
	ErrTooLarge = errors.New("larger than any content")
	// ErrBusy is returned by Join when 1,024 fills are under way.
	ErrBusy = errors.New("too many fills under way")
	// ErrClosed is what readers and joiners see once the table is closed.
	ErrClosed = errors.New("the store is being closed")
	// ErrPaused is reported of a fill that everyone left.
	ErrPaused = errors.New("paused, since nobody is reading")
)

// A Source is a place that can deliver one content.
//
// An error of Open or of a Stream's Read may implement
//
//	Retry() (after time.Duration, worthwhile bool)
//	Final() bool
//	Slow() bool
//
// to say whether, and how soon, it makes sense to ask this source again; that
// no other source of the same joiner need be asked either; and that there is
// nothing wrong with it but its speed, so that it may be asked at once if no
// other can. An error that says nothing is worth another try after a pause.
// Sources are compared by ==.
type Source interface {
	// Open starts to deliver a span. A source that cannot start in the middle
	// starts earlier, and says so in the stream. It is called from several
	// goroutines at once.
	Open(ctx context.Context, span Span) (*Stream, error)
	// Blame says that what the source delivered, as part or whole of a
	// content, turned out wrong.
	Blame(err error)
}

// A Span is what a source is asked for.
type Span struct {
	Offset int64
	// Length in bytes; negative: all there is from Offset.
	Length int64
	// Background says that nobody is waiting for it: it yields to spans that
	// somebody waits for.
	Background bool
	// Hurry is closed when somebody has come to wait for it after all. It is
	// nil unless Background.
	Hurry <-chan struct{}
}

// A Stream is bytes on their way from a source.
type Stream struct {
	io.ReadCloser
	// Offset is where the stream begins: at most what was asked for.
	Offset int64
	// Whole says that the source does not deliver spans: the stream begins at
	// 0 and goes on to the end of the content, whatever was asked for.
	Whole bool
	// Size is that of the whole content, or -1 while the source does not say.
	Size int64
	// From names who delivers, for logs and errors.
	From string
}

// Want is what a joiner asks of a table.
type Want struct {
	Digest digest.Digest
	// Size in bytes, as a manifest or the upstream says.
	Size int64
	// Repository is linked to the content once it is verified. The joiner has
	// proven beforehand that the content belongs to it.
	Repository string
	// Sources are asked in this order, each going on where the one before
	// failed.
	Sources []Source
	// Connections is how many spans are fetched at once; 0: 1.
	Connections int
	// Name is what content is known by whose digest nobody knows, instead of Digest:
	// its address and a validator, say. The same name promises the same bytes. It is
	// written down nowhere but as a hash. Only Pull takes it.
	Name string
	// Take gets the whole file, proven if there is a Digest, with the digests that it
	// has: instead of what is done for Repository. It moves the file away, or has no
	// need of it, and returns nil; see [Table.Pull]. ctx ends with that of Pull, and
	// with the table.
	Take func(ctx context.Context, file File) error
	// Anew says that what the store has is wrong, and is to be replaced.
	Anew bool
}

// Summary describes a fill that has ended.
type Summary struct {
	Digest     digest.Digest
	Repository string // of the first joiner
	From       string // who delivered last
	Size       int64
	Fetched    int64 // bytes read from sources
	Duration   time.Duration
	// Err is nil after a commit. ErrPaused, ErrClosed, ErrSpool, ErrPassed
	// and ErrCommit are not the fault of any source.
	Err error
}

type state int

const (
	joined state = iota
	fetching
	passing
	verified
	committed
	paused
	failed
)

// A Fill is one content on its way into the store. See the package comment for
// its states, lock and wake rule.
type Fill struct {
	table      *Table
	key        key
	repository string // of the first joiner
	started    time.Time
	before     <-chan struct{} // closed when the fill before it has put its files away
	gone       chan struct{}   // closed when this one has
	ended      error           // why it did not commit, once gone is closed
	ctx        context.Context // of all fetching
	cancel     context.CancelCauseFunc

	mu           sync.Mutex
	changed      chan struct{}
	state        state
	err          error // in failed and paused
	file         content
	users        int // run and everyone who has not released
	ahead        bool
	sources      roster
	connections  int
	anew         bool            // Want.Anew, of the first joiner
	repositories map[string]bool // joined → linked
	takers       []*taker        // of content that is taken: who waits for it
	hurried      chan struct{}   // Span.Hurry of small content that comes in the background, or nil
	progress                     // of larger content
	spool        *os.File        // its data
	proof        *proof          // of its prefix; belongs to whoever has set hashing
	hashing      bool

	rooms sync.Mutex
	room  storage.Reservation // for the whole, or nil; guarded by rooms
	// covered is how many bytes of the spool room is set aside for.
	covered atomic.Int64

	from    string
	fetched int64

	unannounced int64
	announced   time.Time
	timer       *time.Timer
}

// content is what readers read: the spool, memory, or the value in the store.
type content interface {
	io.ReaderAt
	io.Closer
}

// join adds a joiner unless the fill is over. t.mu is held.
func (f *Fill) join(want Want, user bool, tk *taker) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == failed || f.state == paused {
		return false
	}
	f.sources.add(want.Sources)
	f.connections = max(f.connections, want.Connections)
	if tk != nil {
		f.takers = append(f.takers, tk)
	} else if _, ok := f.repositories[want.Repository]; !ok {
		f.repositories[want.Repository] = false
	}
	if user {
		f.users++
		if f.hurried != nil {
			close(f.hurried)
			f.hurried = nil
		}
	} else {
		f.ahead = true
	}
	f.settled = false
	f.schedule()
	return true
}

// Release says that the caller is done with the fill and has closed the
// readers it made. It ends nothing by itself.
func (f *Fill) Release() {
	f.mu.Lock()
	f.users--
	file := f.file
	last := f.users == 0
	if f.users == 1 {
		f.ahead = false // somebody has come, and left
		f.wake()
	}
	f.mu.Unlock()
	if last && file != nil {
		file.Close()
	}
}

// wake wakes everyone. f.mu is held.
func (f *Fill) wake() {
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	f.unannounced, f.announced = 0, time.Now()
	close(f.changed)
	f.changed = make(chan struct{})
}

// wakeSoon announces n more bytes, at once if they are many or the last time is
// long past. f.mu is held.
func (f *Fill) wakeSoon(n int64) {
	f.unannounced += n
	switch {
	case f.unannounced >= bufferSize || time.Since(f.announced) >= wakeDelay:
		f.wake()
	case f.timer == nil:
		f.timer = time.AfterFunc(wakeDelay, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.timer != nil {
				f.wake()
			}
		})
	}
}

// run is the life of a fill.
func (f *Fill) run() {
	defer f.Release()
	defer f.table.forget(f)
	if f.before != nil {
		<-f.before
	}
	if f.key.take != "" {
		if err := f.pull(); err != nil {
			f.fail(err)
			f.ended = err
		}
		f.cancel(nil)
		return
	}
	held, err := f.held()
	if err == nil && !held {
		if f.key.size <= f.table.limits.small {
			err = f.fetchSmall()
		} else {
			err = f.fetchLarge()
		}
	} else if held {
		err = f.commit(f.key.digest, nil)
	}
	if err != nil {
		f.fail(err) // unless it has failed already, or its content is free
	}
	f.cancel(nil)
	f.ended = err
	if !held && f.table.done != nil {
		f.mu.Lock()
		summary := Summary{
			Digest: f.key.digest, Repository: f.repository, From: f.from, Size: f.key.size,
			Fetched: f.fetched, Duration: time.Since(f.started), Err: err,
		}
		f.mu.Unlock()
		f.table.done(summary)
	}
}

// fail lets a fill fail, which its readers and waiters hear at once.
func (f *Fill) fail(err error) {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.table.remove(f)
	if f.state < verified {
		f.state, f.err = failed, err
		f.wake()
	}
}

// held looks whether the store has the content, and if so lets readers have
// it from there.
func (f *Fill) held() (bool, error) {
	if f.key.digest.Algorithm() != digest.Canonical {
		return false, nil // lies under a digest that is not known yet
	}
	if f.anew {
		return false, nil
	}
	r, info, err := f.table.openNear(f.ctx, layout.Blob(f.key.digest))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrDistant) || errors.Is(err, storage.ErrUnavailable) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	file, ok := r.(content)
	if !ok {
		r.Close()
		return false, fmt.Errorf("fill: %T cannot be read at an offset", r)
	}
	if info.Size != f.key.size || info.Doubtful {
		// What a loss of power left behind, or a manifest that lies. Fetching
		// tells, and heals the former.
		file.Close()
		if distant := f.table.store.Distant(); distant != nil {
			distant.Drop(layout.Blob(f.key.digest)) // or it would be asked first
		}
		return false, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.file, f.state = file, verified
	f.wake()
	return true, nil
}

// release lets readers have everything.
func (f *Fill) release(file content) {
	f.mu.Lock()
	f.file, f.state = file, verified
	f.wake()
	f.mu.Unlock()
	failpoint.Hit("fill.verified")
}

// commit stores verified content, by the given function, and links it. Readers
// do not wait for it, and its failure is not theirs.
func (f *Fill) commit(canonical digest.Digest, store func(key string) error) error {
	// A commit that has begun is not given up because the store is being
	// closed: what was fetched would have to be fetched again.
	ctx := context.WithoutCancel(f.ctx)
	if store != nil {
		if err := store(layout.Blob(canonical)); err != nil {
			return fmt.Errorf("%w: %w", ErrCommit, err)
		}
		f.table.misled.Remove(layout.Blob(canonical))
		failpoint.Hit("fill.stored")
	}
	for {
		repository, ok := f.unlinked()
		if !ok {
			return nil
		}
		if err := f.table.link(ctx, repository, f.key.digest, canonical); err != nil {
			return fmt.Errorf("%w: %w", ErrCommit, err)
		}
		failpoint.Hit("fill.linked")
	}
}

// unlinked takes one repository that joined and has no link yet. When there is
// none, the fill is committed and leaves the table, in one step.
func (f *Fill) unlinked() (string, bool) {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	for repository, linked := range f.repositories {
		if !linked {
			f.repositories[repository] = true
			return repository, true
		}
	}
	f.state = committed
	f.table.remove(f)
	return "", false
}
