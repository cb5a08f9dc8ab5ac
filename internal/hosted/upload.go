package hosted

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
)

const (
	// uploadLife is how long an upload is kept after the last byte of it came.
	uploadLife = 24 * time.Hour
	// maxUploads is how many there may be at once, of all repositories.
	maxUploads = 10_000
	sweepEvery = 10 * time.Minute
)

// Errors of uploads.
var (
	// ErrTaken: another request has gone on with the upload meanwhile.
	ErrTaken = errors.New("another request has gone on with the upload")
	// ErrBusy: there are too many uploads that are not finished.
	ErrBusy = errors.New("too many uploads are not finished")
	// ErrAlgorithm: the algorithm of a digest is not one that can be verified.
	ErrAlgorithm = errors.New("the algorithm is none of sha256, sha384 and sha512")
)

// uploads are those that are not finished, in a directory: of each a file with
// what has come, and one that says what of it can be relied on.
type uploads struct {
	dir     string
	large   chan struct{} // holds a value for each request with large buffers
	partial atomic.Int64  // the sum of Upload.loose

	mu     sync.Mutex
	open   map[string]*Upload
	timer  *time.Timer // of the next sweep; nil: there is nothing to sweep
	closed bool

	distant distantSweep
}

// An Upload is a blob that comes in pieces. It outlives the process: what has
// come is kept for a day after the last byte, and the next process goes on from
// there.
//
// One request writes at a time. A later one takes the upload over from one that
// is still reading, since that is how it looks here when a client has lost its
// connection and tries again: the earlier one is interrupted and keeps what has
// come by then, and only then the later one finds out where the upload ends.
type Upload struct {
	registry *Registry
	id       string
	path     string
	once     bool // nobody knows of it but the request that brings all of it
	ends     atomic.Int64

	mu     sync.Mutex
	holder *holder   // who writes, or nil
	gone   bool      // finished, cancelled or expired
	last   time.Time // when the last byte came
	known  bool      // what follows is known; an earlier process's is read when it is asked for

	repository string
	received   bool // begun by Receive
	late       bool // sums are of nothing yet; Keep computes them
	started    time.Time
	sums       sums
	// proven says that the file has what sums has been made of: after another
	// start of the machine it may not.
	proven bool

	noted int64 // where the upload ended when that was last written down
	loose int64 // bytes in the file that no reservation covers

	// stored are the digests of what lies in the store already, since its link could
	// not be put where it has to be: nothing can be added, and to finish is to link.
	stored []digest.Digest

	shared *shared // nil: only this process and those after it can go on with it

	allowed int64    // bytes that the quota has been asked for, by who writes
	quotas  []func() // give them back
}

// A holder is a request that writes.
type holder struct {
	interrupt func() // nil: it is not reading
	taken     bool   // somebody else wants to
	done      chan struct{}
}

// begin looks at what an earlier process has left.
func (h *Registry) begin() {
	u := &h.uploads
	u.open, u.large = map[string]*Upload{}, make(chan struct{}, maxLarge)
	if h.store == nil {
		return
	}
	dir, err := h.store.Spool("uploads")
	if err == nil {
		u.dir = dir
		err = h.restore()
	}
	if err != nil {
		h.log.Error("looking for uploads of an earlier process", zap.Error(err))
	}
	h.beginDistant()
}

func (h *Registry) restore() error {
	entries, err := os.ReadDir(h.uploads.dir)
	if err != nil {
		return err
	}
	sizes := map[string]int64{}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			continue
		}
		id, isState := strings.CutSuffix(entry.Name(), stateSuffix)
		switch {
		case isState && validID(id):
			h.uploads.open[id] = &Upload{registry: h, id: id, path: h.uploads.path(id), last: info.ModTime()}
		case validID(id):
			sizes[id] = info.Size()
		default: // half of a state
			os.Remove(filepath.Join(h.uploads.dir, entry.Name()))
		}
	}
	for id, size := range sizes {
		up := h.uploads.open[id]
		if up == nil {
			os.Remove(filepath.Join(h.uploads.dir, id))
			continue
		}
		up.loosen(size)
	}
	h.sweep()
	return nil
}

// sweep removes uploads that have expired, and comes again as long as there are
// others.
func (h *Registry) sweep() {
	us := &h.uploads
	for _, u := range us.all() {
		u.mu.Lock()
		if u.holder == nil && !u.gone && h.now().Sub(u.last) >= uploadLife {
			u.drop()
		}
		u.mu.Unlock()
	}
	us.mu.Lock()
	defer us.mu.Unlock()
	us.timer = nil
	h.sweepLater()
}

// all are those that are not finished, in no order.
func (us *uploads) all() []*Upload {
	us.mu.Lock()
	defer us.mu.Unlock()
	return slices.Collect(maps.Values(us.open))
}

// sweepLater is called with uploads.mu held.
func (h *Registry) sweepLater() {
	if us := &h.uploads; us.timer == nil && !us.closed && len(us.open) > 0 {
		us.timer = time.AfterFunc(sweepEvery, h.sweep)
	}
}

// closeUploads ends the sweeping. Nobody may be writing any more.
func (h *Registry) closeUploads() {
	us := &h.uploads
	us.mu.Lock()
	us.closed = true
	if us.timer != nil {
		us.timer.Stop()
	}
	us.mu.Unlock()
	us.distant.end()
}

func validID(id string) bool {
	if len(id) != 32 {
		return false
	}
	for i := range len(id) {
		if c := id[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// newUpload makes one that nobody knows of yet.
func (h *Registry) newUpload(repository string, algorithm digest.Algorithm) (*Upload, error) {
	if h.uploads.dir == "" {
		return nil, errors.New("there is no place for uploads in the store; the log of the start tells why")
	}
	sums, err := newSums(algorithm)
	if err != nil {
		return nil, err
	}
	var random [16]byte
	rand.Read(random[:])
	id, now := hex.EncodeToString(random[:]), h.now()
	return &Upload{
		registry: h, id: id, path: h.uploads.path(id),
		repository: repository, started: now, last: now, sums: sums, known: true, proven: true,
	}, nil
}

// Begin begins an upload to a repository. algorithm is that of the digest it will
// have; empty: sha256. With any other digest what has come is read once more at
// the end.
func (h *Registry) Begin(ctx context.Context, repository string, algorithm digest.Algorithm) (*Upload, error) {
	if err := h.options(repository).closed(); err != nil {
		return nil, err
	}
	u, err := h.newUpload(repository, algorithm)
	if err != nil {
		return nil, err
	}
	if key := h.signing(); key != nil {
		h.uncrowd()
		return h.beginShared(ctx, u, key)
	}
	if err := h.enterHere(u); err != nil {
		return nil, err
	}
	return u, nil
}

// enterHere has this process know of a new upload, and later ones on this machine.
func (h *Registry) enterHere(u *Upload) error {
	h.uncrowd()
	us := &h.uploads
	us.mu.Lock()
	defer us.mu.Unlock()
	if err := us.takes(); err != nil {
		return err
	}
	if err := u.note(); err != nil {
		return fmt.Errorf("beginning an upload: %w", full(err))
	}
	us.open[u.id] = u
	h.sweepLater()
	return nil
}

// uncrowd gives up an idle upload where there may be no more.
func (h *Registry) uncrowd() {
	if us := &h.uploads; us.crowded() {
		h.giveUp(1, func(*Upload) int64 { return 1 }, func() bool { return !us.crowded() })
	}
}

func (us *uploads) path(id string) string { return filepath.Join(us.dir, id) }

// takes says why there may be no more. uploads.mu is held.
func (us *uploads) takes() error {
	switch {
	case us.closed:
		return errClosed
	case len(us.open) >= maxUploads:
		return fmt.Errorf("%w: %d, of which each is kept for a day", ErrBusy, len(us.open))
	}
	return nil
}

// crowded reports whether there may be no more.
func (us *uploads) crowded() bool {
	us.mu.Lock()
	defer us.mu.Unlock()
	return len(us.open) >= maxUploads
}

var errClosed = errors.New("the store is being closed; try again")

// Upload returns an upload to a repository that is not finished.
func (h *Registry) Upload(ctx context.Context, repository, id string) (*Upload, error) {
	if !validID(id) {
		return nil, fmt.Errorf("%w: no upload has such a name", ErrNoUpload)
	}
	if err := h.options(repository).closed(); err != nil {
		return nil, err
	}
	u := h.found(id)
	if u == nil {
		if key := h.signing(); key != nil {
			return h.join(ctx, repository, id, key)
		}
		return nil, ErrNoUpload
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.recalled(); err != nil {
		return nil, err
	}
	if u.gone || u.received || u.repository != repository {
		return nil, ErrNoUpload
	}
	return u, nil
}

// found returns what this process knows of under a name, or nil.
func (h *Registry) found(id string) *Upload {
	h.uploads.mu.Lock()
	defer h.uploads.mu.Unlock()
	return h.uploads.open[id]
}

// recalled makes known what an earlier process has left of an upload, which is gone
// where that cannot be used. The error says that it could not be read. u.mu is held.
func (u *Upload) recalled() error {
	if u.gone || u.known {
		return nil
	}
	err := u.recall()
	if _, unread := errors.AsType[*fs.PathError](err); unread && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading how far an upload has come: %w", err)
	}
	if err != nil {
		u.registry.log.Warn("an upload cannot be gone on with", zap.String("upload", u.id), zap.Error(err))
		u.drop()
	}
	return nil
}

// Mount makes a blob of one repository one of another, and returns its size. The
// error is fs.ErrNotExist if the one does not have it, or its bytes are not held or
// not right; and storage.ErrFull if the other may not take so much.
func (h *Registry) Mount(ctx context.Context, repository, from string, d digest.Digest) (int64, error) {
	if err := h.options(repository).closed(); err != nil {
		return 0, err
	}
	// What was mirrored before a loss of power may be damaged, and what is hosted
	// nobody can fetch again.
	known, ok, err := h.tree.Member(ctx, from, d)
	if err != nil {
		return 0, err
	}
	if ok && known.Canonical != "" {
		if info, err := h.tree.StatBlob(ctx, known.Canonical); err == nil && info.Doubtful {
			if err := h.tree.Prove(ctx, known.Canonical); err != nil {
				return 0, err
			}
		}
	}
	if !h.together(repository, from) && ok && known.Canonical != "" {
		info, err := h.tree.StatBlob(ctx, known.Canonical)
		if err != nil {
			return 0, err
		}
		done, err := h.grant(ctx, repository, info.Size)
		if err != nil {
			return 0, err
		}
		defer done()
	}
	return h.tree.Mount(ctx, repository, from, d)
}

// ID names the upload.
func (u *Upload) ID() string { return u.id }

// Offset is how many bytes have come.
func (u *Upload) Offset() int64 { return u.ends.Load() }

// Cancel ends an upload. Nothing is left of it.
func (u *Upload) Cancel(ctx context.Context) error {
	release, err := u.hold(ctx, nil)
	if err != nil {
		return err
	}
	defer release()
	if u.shared != nil {
		if err := u.clean(ctx); err != nil {
			return err
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drop()
	return nil
}

// settleGrace is how long a request may go on whose client seems to be lost: what has
// come of it is read in less, and how its connection ended is known then.
const settleGrace = 2 * time.Second

// Settle ends what writes to the upload, so that Offset stays as it is until the next
// request: the rest of a request whose client has gone may still be on its way. The
// error is [ErrNoUpload] if the upload is over.
func (u *Upload) Settle(ctx context.Context) error {
	u.mu.Lock()
	writes := u.holder
	u.mu.Unlock()
	if writes != nil {
		timer := time.NewTimer(settleGrace)
		defer timer.Stop()
		select {
		case <-writes.done:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	release, err := u.hold(ctx, nil)
	if err != nil {
		return err
	}
	release()
	return nil
}

// hold makes the caller the one who writes, once nobody else does. interrupt lets
// a Read of its body fail that is under way, and every later one. It is called
// before release only.
func (u *Upload) hold(ctx context.Context, interrupt func()) (release func(), err error) {
	mine := &holder{interrupt: interrupt, done: make(chan struct{})}
	for {
		u.mu.Lock()
		if u.gone {
			u.mu.Unlock()
			return nil, ErrNoUpload
		}
		before := u.holder
		if before == nil {
			break
		}
		if before.taken = true; before.interrupt != nil {
			before.interrupt()
		}
		u.mu.Unlock()
		select {
		case <-before.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the request that writes to the upload: %w", context.Cause(ctx))
		}
	}
	u.holder = mine
	u.mu.Unlock()
	release = func() { u.release(mine) }
	if u.shared != nil {
		if err := u.refresh(ctx); err != nil {
			release()
			return nil, err
		}
		return release, nil
	}
	// Another request may wait for this; it is not in vain.
	err = u.proof(ctx)
	if errors.Is(err, errSpoilt) || errors.Is(err, fs.ErrNotExist) {
		u.registry.log.Warn("an upload cannot be gone on with", zap.String("upload", u.id), zap.Error(err))
		u.mu.Lock()
		u.drop()
		u.mu.Unlock()
		err = ErrNoUpload
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// release lets others write. The caller has, as h.
func (u *Upload) release(h *holder) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.holder = nil
	close(h.done)
}

// taken reports whether somebody waits for the caller, who writes, to end.
func (u *Upload) taken() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.holder.taken
}

// read says that the caller, who writes, has read all that it will.
func (u *Upload) read() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.holder.interrupt = nil
}

// drop lets an upload be no more. u.mu is held.
func (u *Upload) drop() {
	u.gone = true
	u.disallow()
	for _, name := range []string{u.path + stateSuffix, u.path} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			u.registry.log.Warn("removing what is left of an upload; the next start does", zap.Error(err))
		}
	}
	u.loosen(-u.loose)
	if u.once {
		return
	}
	us := &u.registry.uploads
	us.mu.Lock()
	defer us.mu.Unlock()
	delete(us.open, u.id)
}

// loosen says that so many more bytes are on the disk that nothing covers. u.mu
// is held.
func (u *Upload) loosen(n int64) {
	u.loose += n
	u.registry.uploads.partial.Add(n)
}

// full gives the error of a disk without room its meaning.
func full(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w; free some space on the disk of the store, or raise its quota", storage.ErrFull, err)
	}
	return err
}
