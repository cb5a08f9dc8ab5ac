package hosted

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// fetchTries is how often the bytes of a piece are asked for, one after the other,
	// though none come.
	fetchTries = 3
	// cleaners is how many pieces of an upload are removed at once.
	cleaners = 8
	// Bounds of one sweep of the distant place, in uploads.
	maxLooks  = 100
	maxSweeps = 1_000
)

// errSpoilt: what there is of an upload is certainly not what was sent.
var errSpoilt = errors.New("it is spoilt")

// gather fetches the pieces that this process does not have, and proves the whole
// then.
func (u *Upload) gather(ctx context.Context, room *room) error {
	sh := u.shared
	// Another process may have asked its quota for it.
	if err := u.allow(ctx, 0); err != nil {
		return err
	}
	mixed := len(sh.held) > 0
	if err := u.complete(ctx, room); err != nil {
		return u.unusable(ctx, err)
	}
	err := u.proof(ctx)
	if errors.Is(err, errSpoilt) && mixed {
		// It may be what was here before: then what is in the bucket is right.
		u.mu.Lock()
		clear(sh.held)
		u.mu.Unlock()
		if err := u.complete(ctx, room); err != nil {
			return u.unusable(ctx, err)
		}
		err = u.proof(ctx)
	}
	if errors.Is(err, errSpoilt) {
		// Or what this request has brought, which its client still has.
		sum, failed := sh.acked.sums()
		if failed == nil {
			failed = u.prove(ctx, sh.acked.Offset, sum)
		}
		if failed == nil {
			return errors.New("the disk has not kept what was uploaded; try again")
		}
		err = failed
	}
	if err != nil {
		return u.unusable(ctx, err)
	}
	failpoint.Hit("upload.gathered")
	return nil
}

// proof proves what has come, unless it is proven.
func (u *Upload) proof(ctx context.Context) error {
	if u.proven {
		return nil
	}
	if u.late {
		return fmt.Errorf("%w: the machine has stopped since, and nobody knows what the bytes were", errSpoilt)
	}
	if err := u.prove(ctx, u.Offset(), u.sums); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.proven = true
	return nil
}

// complete fetches the pieces that are not in the file.
func (u *Upload) complete(ctx context.Context, room *room) error {
	sh := u.shared
	var missing int64
	for _, p := range sh.acked.Pieces {
		if !sh.held[p.Name] {
			missing += p.Size
		}
	}
	if missing == 0 {
		return nil
	}
	if err := room.set(ctx, missing); err != nil {
		return err
	}
	f, err := os.OpenFile(u.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return full(err)
	}
	defer f.Close()
	var at int64
	for _, p := range sh.acked.Pieces {
		if !sh.held[p.Name] {
			if err := u.fetch(ctx, f, p, at); err != nil {
				return err
			}
			room.use(p.Size)
			u.mu.Lock()
			sh.held[p.Name], u.proven = true, false
			u.mu.Unlock()
		}
		at += p.Size
	}
	return nil
}

// unusable ends an upload of which some is certainly lost. Whatever else has failed, it
// can be gone on with.
func (u *Upload) unusable(ctx context.Context, err error) error {
	if !errors.Is(err, errSpoilt) {
		return err
	}
	u.registry.log.Warn("an upload cannot be gone on with", zap.String("upload", u.id), zap.Error(err))
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drop()
	return ErrNoUpload
}

// fetch writes a piece to its place in the file.
func (u *Upload) fetch(ctx context.Context, f *os.File, p piece, at int64) error {
	var came int64
	for tries := 0; came < p.Size; tries++ {
		if tries == fetchTries {
			return fmt.Errorf("fetching what was uploaded to another process: %w: %d bytes of %d came", storage.ErrUnavailable, came, p.Size)
		}
		n, err := u.fetchFrom(ctx, f, p, at, came)
		if came += n; n > 0 {
			tries = 0
		}
		if err != nil {
			return fmt.Errorf("fetching what was uploaded to another process: %w", err)
		}
	}
	return nil
}

// fetchFrom fetches a piece, but for what came, and returns how much came now. That
// less comes than there is, is no error.
func (u *Upload) fetchFrom(ctx context.Context, f *os.File, p piece, at, came int64) (n int64, err error) {
	r, info, err := u.registry.store.Open(ctx, pieceKey(u.id, p.Name), came, -1)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%w: the piece %s is gone", errSpoilt, p.Name)
	}
	if err != nil {
		return 0, err
	}
	defer r.Close()
	if info.Size != p.Size {
		return 0, fmt.Errorf("%w: the piece %s has %d bytes of %d", errSpoilt, p.Name, info.Size, p.Size)
	}
	buffer := smallBuffers.Get().(*[smallBuffer]byte)
	defer smallBuffers.Put(buffer)
	in := io.LimitReader(r, p.Size-came)
	for {
		m, err := readFull(in, buffer[:])
		if _, failed := f.WriteAt(buffer[:m], at+came+n); failed != nil {
			return n, full(failed)
		}
		n += int64(m)
		if err != nil {
			if ctx.Err() != nil {
				return n, context.Cause(ctx)
			}
			return n, nil
		}
	}
}

// finished makes good after the end of an upload, or a failed one: what the request
// has brought has not come then.
func (u *Upload) finished(ctx context.Context) {
	if u.gone {
		failpoint.Hit("upload.committed")
		if err := u.clean(ctx); err != nil {
			u.registry.log.Warn("removing what is left of an upload in the bucket; a sweep does within a day", zap.String("upload", u.id), zap.Error(err))
		}
		return
	}
	if _, err := os.Lstat(u.path); errors.Is(err, fs.ErrNotExist) {
		u.mu.Lock()
		clear(u.shared.held)
		u.mu.Unlock()
	}
	if err := u.become(u.shared.acked); err != nil {
		u.registry.log.Warn("going back in an upload to what is in the bucket", zap.String("upload", u.id), zap.Error(err))
	}
}

// clean removes an upload from the distant place. It fails if others can still go on
// with it; pieces that stay are swept.
func (u *Upload) clean(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanPatience)
	defer cancel()
	if err := u.registry.store.Delete(ctx, sessionKey(u.id)); err != nil {
		return fmt.Errorf("ending an upload: %w", err)
	}
	failpoint.Hit("upload.ended")
	names := u.shared.strays
	for _, p := range u.shared.acked.Pieces {
		names = append(names, p.Name)
	}
	u.remove(ctx, names)
	return nil
}

// remove removes pieces, a few at once.
func (u *Upload) remove(ctx context.Context, names []string) {
	if len(names) == 0 {
		return
	}
	var failed error
	var all sync.WaitGroup
	var mu sync.Mutex
	for i := range min(cleaners, len(names)) {
		all.Go(func() {
			for j := i; j < len(names); j += cleaners {
				if err := u.registry.store.Delete(ctx, pieceKey(u.id, names[j])); err != nil {
					mu.Lock()
					defer mu.Unlock()
					failed = err
					return // the others will hardly fare better
				}
			}
		})
	}
	all.Wait()
	if failed != nil {
		u.registry.log.Warn("removing pieces of an upload from the bucket; a sweep does within a day", zap.String("upload", u.id), zap.Error(failed))
	}
}

// distantSweep is the removal of what nobody goes on with at the distant place.
type distantSweep struct {
	forged sync.Once // the log has told of a wrong signature
	ctx    context.Context
	cancel context.CancelFunc
	under  sync.WaitGroup // a sweep is under way

	mu    sync.Mutex
	timer *time.Timer
}

// beginDistant sweeps from now on, where there may be something to sweep.
func (h *Registry) beginDistant() {
	if h.distant == nil {
		return
	}
	s := &h.uploads.distant
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(sweepEvery, func() {
		s.mu.Lock()
		if s.ctx.Err() != nil {
			s.mu.Unlock()
			return
		}
		s.under.Add(1)
		s.mu.Unlock()
		defer s.under.Done()
		h.sweepDistant(s.ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ctx.Err() == nil {
			s.timer.Reset(sweepEvery)
		}
	})
}

// end ends the sweeping, and waits for it.
func (s *distantSweep) end() {
	if s.cancel == nil {
		return
	}
	s.mu.Lock()
	s.cancel()
	s.timer.Stop()
	s.mu.Unlock()
	s.under.Wait()
}

// sweepDistant forgets what another process has ended, and removes from the distant
// place what nobody has gone on with for a day, whoever began it.
func (h *Registry) sweepDistant(ctx context.Context) {
	if h.signing() == nil {
		return
	}
	looks := 0
	for _, u := range h.uploads.all() {
		u.mu.Lock()
		idle := u.shared != nil && u.idle(func(*Upload) int64 { return 1 }) > 0
		u.mu.Unlock()
		if !idle {
			continue
		}
		if looks++; looks > maxLooks || ctx.Err() != nil {
			break
		}
		u.Look(ctx) // it will be told of when somebody goes on with it
	}
	if err := h.sweepSessions(ctx); err != nil && ctx.Err() == nil {
		h.log.Warn("looking for uploads in the bucket that have expired", zap.Error(err))
	}
}

func (h *Registry) sweepSessions(ctx context.Context) error {
	last := map[string]time.Time{} // by upload, of the last that came of it
	for info, err := range h.store.List(ctx, storage.Uploads, true) {
		if err != nil {
			return err
		}
		id, _, ok := strings.Cut(strings.TrimPrefix(info.Key, storage.Uploads), "/")
		if _, known := last[id]; !ok || !validID(id) || !known && len(last) == maxUploads {
			continue
		}
		if info.ModTime.After(last[id]) {
			last[id] = info.ModTime
		}
	}
	swept := 0
	for id, at := range last {
		if h.now().Sub(at) < uploadLife {
			continue
		}
		if swept == maxSweeps {
			break
		}
		swept++
		if err := h.sweepSession(ctx, id); err != nil {
			return err
		}
	}
	if swept > 0 {
		h.log.Info("removed uploads from the bucket to which nothing had come for a day", zap.Int("uploads", swept))
	}
	return nil
}

func (h *Registry) sweepSession(ctx context.Context, id string) error {
	keys := []string{sessionKey(id)} // first, so that nobody finds one without its pieces
	for info, err := range h.store.List(ctx, storage.Uploads+id+"/", true) {
		if err != nil {
			return err
		}
		if len(keys) <= maxPieces+maxStrays && info.Key != keys[0] {
			keys = append(keys, info.Key)
		}
	}
	for _, key := range keys {
		if err := h.store.Delete(ctx, key); err != nil {
			return err
		}
	}
	return nil
}
