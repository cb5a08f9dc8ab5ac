// Package fill fetches content once and lets any number of readers follow
// while it arrives.
//
// A [Fill] is the one live fetch of a blob in this process. It belongs to its
// [Table] and not to whoever asked first: requests come and go as readers, and
// the fetch knows nothing of them. It knows nothing of HTTP or registries
// either: bytes come from a [Source], and go to a [storage.Store].
//
// # States, lock and wake rule
//
//		joined ──► fetching ──► verified ──► committed
//		   │           │            │
//		   │           ▼            ▼
//		   │         failed     (commit failed: readers finish, nothing is kept)
//		   └──► committed           (the store had it after all)
//
//	  - joined: in the table, nothing asked of a source yet. The first thing run
//	    does is to look into the store again. Without that there is a race: a
//	    request misses the store, the fill it would have joined commits and
//	    leaves the table, and the request starts a second fetch of what is
//	    already there (groupcache's race).
//	  - fetching: bytes are appended to a spool file, hashed in order, and
//	    published by raising written. The sources that joiners brought are used
//	    in turn; one that fails is resumed by the next at the same offset.
//	  - verified: every byte is there and the digest is right. Readers are free
//	    of the fill's fate from here on.
//	  - committed: the content is under its key and every repository that joined
//	    has its link. Joiners that arrive while links are being written are
//	    linked too; the check that none is left and the removal from the table
//	    happen under both locks.
//	  - failed: err is set, and the fill leaves the table, so that the next
//	    Join starts anew.
//
// Lock: Fill.mu guards every field below it. Nothing blocks while it is held.
// Table.mu is taken before Fill.mu, never after.
//
// Wake: whoever changes size, written, state or err under the lock closes
// changed and puts a new channel in its place (publish). A waiter reads what it
// wants and changed under one lock, and waits for that channel or its own
// context; so no change can fall between looking and waiting. Bytes are
// published in runs of up to 256 KiB, or after 2 ms, because every publish
// wakes every reader.
//
// Withholding: a reader that asked for content up to its end gets the last
// segment only in verified, so that wrong content can never arrive complete.
// A reader of a bounded range gets what is written: lazy clients check chunks
// themselves, and ask for an archive's last bytes first.
package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// Segment is the unit of what is withheld, in bytes.
const Segment = 64 << 10

const (
	maxLive      = 1024                   // fills at once
	maxSources   = 16                     // remembered per fill
	bufferSize   = 256 << 10              // read at once, and published at once
	reserveStep  = 64 << 20               // of room, where no size is known
	publishDelay = 2 * time.Millisecond   // longest that bytes stay unpublished
	patience     = 20 * time.Second       // without a byte, if each source was asked again
	firstBackoff = 100 * time.Millisecond // doubled up to lastBackoff, with jitter
	lastBackoff  = 5 * time.Second
)

var (
	// ErrDigest is wrapped when a source delivered bytes that are not the
	// content. Nothing of them is kept.
	ErrDigest = errors.New("content does not match its digest")
	// ErrSize is wrapped when a source's content is not as long as promised.
	ErrSize = errors.New("content does not have the promised size")
	// ErrBusy is returned by Join when 1,024 fills are under way.
	ErrBusy = errors.New("too many fills under way")
	// ErrClosed is what readers and joiners see once the table is closed.
	ErrClosed = errors.New("the store is being closed")
)

// A Source is a place that can deliver one content.
//
// An error of Open or of a Stream's Read may implement
//
//	Retry() (after time.Duration, worthwhile bool)
//	Final() bool
//
// to say whether, and how soon, it makes sense to ask this source again, and
// that no other source need be asked either. An error that does not is worth
// another try after a pause. Sources are compared by ==.
type Source interface {
	// Open starts to deliver a span. A source that cannot start in the middle
	// starts earlier, and says so in the stream.
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
	// Size in bytes as a manifest promises it, or -1.
	Size int64
	// Repository is linked to the content once it is verified. The joiner has
	// proven beforehand that the content belongs to it.
	Repository string
	// Sources are asked in this order, each going on where the one before
	// failed.
	Sources []Source
}

// Summary describes a fill that has ended.
type Summary struct {
	Digest     digest.Digest
	Repository string // of the first joiner
	From       string
	Size       int64
	Fetched    int64 // bytes read from sources
	Duration   time.Duration
	Err        error
}

// A Table holds the live fills of a store.
type Table struct {
	store storage.Store
	link  func(ctx context.Context, repository string, asked, canonical digest.Digest) error
	done  func(Summary)

	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	live  map[digest.Digest][]*Fill
	count int
}

// NewTable returns a table that commits to the given store. link makes
// committed content a member of a repository: asked is the digest it was asked
// for by, canonical the sha256 it lies under. done, which may be nil, is
// called at the end of each fill that asked a source.
func NewTable(store storage.Store, link func(ctx context.Context, repository string, asked, canonical digest.Digest) error, done func(Summary)) *Table {
	t := &Table{store: store, link: link, done: done, live: map[digest.Digest][]*Fill{}}
	t.ctx, t.cancel = context.WithCancelCause(context.Background())
	return t
}

// Join returns the fill of the wanted content, starting one if there is none.
// Fills are keyed by digest and size, so that a manifest that lies about a
// size can spoil nobody's fill but its own. The caller releases the fill.
func (t *Table) Join(want Want) (*Fill, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil {
		return nil, ErrClosed
	}
	for _, f := range t.live[want.Digest] {
		if f.join(want) {
			return f, nil
		}
	}
	if t.count >= maxLive {
		return nil, ErrBusy
	}
	f := &Fill{
		table:        t,
		digest:       want.Digest,
		changed:      make(chan struct{}),
		promised:     want.Size,
		size:         -1,
		sources:      slices.Clone(want.Sources),
		repository:   want.Repository,
		repositories: map[string]bool{want.Repository: false},
		users:        2, // run and the caller
		started:      time.Now(),
	}
	t.live[want.Digest] = append(t.live[want.Digest], f)
	t.count++
	t.wg.Go(f.run)
	return f, nil
}

// Close ends all fills, waits until they have ended, and refuses new ones.
func (t *Table) Close() {
	t.mu.Lock()
	t.cancel(ErrClosed)
	t.mu.Unlock()
	t.wg.Wait()
}

// remove takes a fill out of the table. t.mu is held.
func (t *Table) remove(f *Fill) {
	rest := t.live[f.digest]
	for i, g := range rest {
		if g == f {
			rest = append(rest[:i:i], rest[i+1:]...)
			t.count--
			break
		}
	}
	if len(rest) == 0 {
		delete(t.live, f.digest)
	} else {
		t.live[f.digest] = rest
	}
}

type state int

const (
	fetching state = iota // and joined: written is 0
	verified
	committed
	failed
)

// A Fill is one content on its way into the store. See the package comment for
// its states, lock and wake rule.
type Fill struct {
	table      *Table
	digest     digest.Digest
	repository string // of the first joiner
	started    time.Time

	mu           sync.Mutex
	changed      chan struct{}
	state        state
	err          error // in failed
	trouble      error // the latest of a source, while others are tried
	promised     int64 // by the joiners, or -1
	size         int64 // -1 until a source has said
	written      int64 // published bytes
	file         content
	users        int // run and everyone who has not released
	sources      []Source
	repositories map[string]bool // joined → linked
}

// content is what readers read: the spool, or the value the store had.
type content interface {
	io.ReaderAt
	io.Closer
}

// join adds a joiner unless the fill is of another size or over. t.mu is held.
func (f *Fill) join(want Want) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == failed || want.Size >= 0 && f.promised >= 0 && want.Size != f.promised {
		return false
	}
	if want.Size >= 0 && f.promised < 0 {
		if f.size >= 0 && f.size != want.Size {
			return false
		}
		f.promised = want.Size
	}
	for _, source := range want.Sources {
		if len(f.sources) < maxSources && !slices.Contains(f.sources, source) {
			f.sources = append(f.sources, source)
		}
	}
	if _, ok := f.repositories[want.Repository]; !ok {
		f.repositories[want.Repository] = false
	}
	f.users++
	return true
}

// Release says that the caller is done with the fill and all readers it made.
// It ends nothing: the fetch goes on.
func (f *Fill) Release() {
	f.mu.Lock()
	f.users--
	file := f.file
	last := f.users == 0
	f.mu.Unlock()
	if last && file != nil {
		file.Close()
	}
}

// publish wakes everyone. f.mu is held.
func (f *Fill) publish() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// Size waits until the size of the content is known. Where ctx ends the waiting,
// the error tells what trouble there has been with sources so far.
func (f *Fill) Size(ctx context.Context) (int64, error) {
	for {
		f.mu.Lock()
		size, err, changed, trouble := f.size, f.err, f.changed, f.trouble
		f.mu.Unlock()
		if err != nil {
			return 0, err
		}
		if size >= 0 {
			return size, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if trouble != nil {
				// Not wrapped: it is not the verdict.
				return 0, fmt.Errorf("%w; so far: %v", context.Cause(ctx), trouble)
			}
			return 0, context.Cause(ctx)
		}
	}
}

// await waits until bytes beyond offset may be read, and returns how far.
func (f *Fill) await(ctx context.Context, offset int64, proven bool) (int64, content, error) {
	for {
		f.mu.Lock()
		limit, err, changed, file := f.written, f.err, f.changed, f.file
		if proven && f.state == fetching {
			if f.size < 0 {
				limit = 0
			} else {
				limit = min(limit, max(0, f.size-1)/Segment*Segment)
			}
		}
		f.mu.Unlock()
		if err != nil {
			return 0, nil, err
		}
		if limit > offset {
			return limit, file, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, nil, context.Cause(ctx)
		}
	}
}

// run is the life of a fill.
func (f *Fill) run() {
	defer f.Release()
	ctx := f.table.ctx
	held, err := f.held(ctx)
	var path string
	var canonical digest.Digest
	var report Summary
	if err == nil && !held {
		path, canonical, err = f.fetch(ctx, &report)
	} else {
		canonical = f.digest
	}
	if err != nil {
		if path != "" {
			os.Remove(path)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		f.end(err)
	} else {
		err = f.commit(ctx, path, canonical)
	}
	if !held && f.table.done != nil {
		report.Digest, report.Repository, report.Err = f.digest, f.repository, err
		report.Duration = time.Since(f.started)
		f.mu.Lock()
		report.Size = f.size
		f.mu.Unlock()
		f.table.done(report)
	}
}

// end lets a fill fail.
func (f *Fill) end(err error) {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	f.table.remove(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state, f.err = failed, err
	f.publish()
}

// held looks whether the store has the content, and if so lets readers have
// it from there.
func (f *Fill) held(ctx context.Context) (bool, error) {
	if f.digest.Algorithm() != digest.Canonical {
		return false, nil // lies under a digest that is not known yet
	}
	r, info, err := f.table.store.Open(ctx, layout.Blob(f.digest), 0, -1)
	if errors.Is(err, fs.ErrNotExist) {
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
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.promised >= 0 && f.promised != info.Size || info.Size == 0 && f.digest != digest.FromBytes(nil) {
		// What a loss of power left behind, or a manifest that lies. Fetching
		// tells, and heals the former.
		file.Close()
		return false, nil
	}
	f.file, f.size, f.written, f.state = file, info.Size, info.Size, verified
	f.publish()
	return true, nil
}

// fetch brings the content into a spool file and proves its digest. It returns
// the file's path even on error, for removal.
func (f *Fill) fetch(ctx context.Context, report *Summary) (path string, canonical digest.Digest, err error) {
	w := &writer{fill: f, sha256: digest.Canonical.Hash(), report: report, from: map[Source]bool{}}
	defer w.finish()
	if f.digest.Algorithm() != digest.Canonical {
		w.asked = f.digest.Algorithm().Hash()
	}
	f.mu.Lock()
	promised := f.promised
	f.mu.Unlock()
	if promised >= 0 { // before anything is asked for that may have no room
		if err := w.reserve(promised); err != nil {
			return "", "", err
		}
	}
	progress := time.Now()
	backoff := firstBackoff
	exhausted := map[Source]bool{}
	notBefore := map[Source]time.Time{}
	for idle := 1; ; idle++ { // rounds over all sources without a byte
		for _, source := range f.remaining(exhausted) {
			if time.Now().Before(notBefore[source]) {
				continue
			}
			before := w.written
			var complete bool
			complete, err = w.copyFrom(ctx, source)
			if complete {
				canonical, err := w.verify()
				return w.path, canonical, err
			}
			if ctx.Err() != nil || errors.Is(err, storage.ErrFull) || w.broken {
				return w.path, "", err
			}
			if w.written > before {
				progress, backoff, idle = time.Now(), firstBackoff, 0
			}
			f.mu.Lock()
			f.trouble = err
			f.publish()
			f.mu.Unlock()
			after, verdict := judge(err)
			switch verdict {
			case final:
				return w.path, "", err
			case hopeless:
				exhausted[source] = true
			default:
				notBefore[source] = time.Now().Add(after)
			}
		}
		rest := f.remaining(exhausted)
		if len(rest) == 0 {
			return w.path, "", err
		}
		pause := backoff/2 + rand.N(backoff/2)
		backoff = min(2*backoff, lastBackoff)
		soonest := time.Until(notBefore[rest[0]])
		for _, source := range rest[1:] {
			soonest = min(soonest, time.Until(notBefore[source]))
		}
		pause = max(pause, soonest)
		if time.Since(progress)+pause > patience && idle >= 2 {
			return w.path, "", err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return w.path, "", context.Cause(ctx)
		}
	}
}

// remaining are the sources that may still have the content. Joiners may have
// brought more since the last look.
func (f *Fill) remaining(exhausted map[Source]bool) []Source {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.sources), func(s Source) bool { return exhausted[s] })
}

type verdict int

const (
	again    verdict = iota
	hopeless         // of this source
	final            // of all of them
)

// judge says what an error means for the source it comes from.
func judge(err error) (after time.Duration, v verdict) {
	var last interface{ Final() bool }
	var hint interface{ Retry() (time.Duration, bool) }
	switch {
	case errors.As(err, &last) && last.Final():
		return 0, final
	case errors.Is(err, ErrSize):
		return 0, hopeless
	case errors.As(err, &hint):
		after, worthwhile := hint.Retry()
		if !worthwhile {
			return 0, hopeless
		}
		return after, again
	}
	return 0, again
}

// commit stores verified content and links it. Readers do not wait for it, and
// its failure is not theirs.
func (f *Fill) commit(ctx context.Context, path string, canonical digest.Digest) error {
	failpoint.Hit("fill.verified")
	var err error
	if path != "" {
		// Durable, since nothing hashes a blob again before it is served.
		err = f.table.store.PutFile(ctx, layout.Blob(canonical), path, storage.Durable)
		if err != nil {
			os.Remove(path)
		}
		failpoint.Hit("fill.stored")
	}
	for err == nil {
		repository, ok := f.unlinked()
		if !ok {
			break
		}
		err = f.table.link(ctx, repository, f.digest, canonical)
		failpoint.Hit("fill.linked")
	}
	if err != nil {
		// Readers hold the open file and finish. Whoever joins from now on
		// starts a fill of his own.
		f.table.mu.Lock()
		f.table.remove(f)
		f.table.mu.Unlock()
		return fmt.Errorf("committing: %w", err)
	}
	return nil
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
