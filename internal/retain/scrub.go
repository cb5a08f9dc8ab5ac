package retain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const (
	// scrubAgain is how long after it has been read a blob is not read again
	// unless somebody asks for it.
	scrubAgain = 7 * 24 * time.Hour
	// scrubIdle is how long nothing is looked for once all have been read, and
	// scrubSoon how long while there is no complete catalog.
	scrubIdle  = time.Hour
	scrubSoon  = time.Second
	scrubBatch = 64
	scrubChunk = 256 << 10 // bytes read at once, at most
	// scrubMost is how many blobs are read in a second at most: small ones are not
	// bytes only, but files to open and rows to write.
	scrubMost = 50

	// hotFor is how long after a pull the kernel may keep what it has of a blob
	// in memory.
	hotFor = time.Hour
)

// scrub reads every blob again, slowly, and what somebody suspects at once.
func (k *Keeper) scrub(ctx context.Context) {
	var heals sync.WaitGroup
	defer heals.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	s := &scrubber{Keeper: k, heals: &heals, near: func() bool { return !k.settings().ScrubDistant }}
	s.wait = s.paced
	for {
		timer.Reset(s.some(ctx))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-k.damage.wake:
		}
	}
}

// A scrubber reads blobs and sees to those that are wrong.
type scrubber struct {
	*Keeper
	job   *job
	heals *sync.WaitGroup
	// wait is called after n bytes have been read.
	wait func(ctx context.Context, n int64) error
	// near reports whether only what is near is read.
	near func() bool
	due  time.Time
}

var errScrubOff = errors.New("scrub is off")

// paced is a bucket of tokens that holds no more than one chunk.
func (s *scrubber) paced(ctx context.Context, n int64) error {
	rate := s.settings().Scrub
	if rate <= 0 {
		return errScrubOff
	}
	now := time.Now()
	if s.due.Before(now) {
		s.due = now
	}
	s.due = s.due.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	return sleep(ctx, s.due.Sub(now))
}

// chunk is how many bytes are read at once: at a low rate few, or a change of it
// would come late.
func (s *scrubber) chunk() int64 {
	if rate := s.settings().Scrub; rate > 0 {
		return min(scrubChunk, max(rate/4, 4<<10))
	}
	return scrubChunk
}

// some reads suspects, and a batch of the others. It returns when to go on.
func (s *scrubber) some(ctx context.Context) time.Duration {
	c, err := s.entire()
	if err != nil {
		return scrubSoon
	}
	on := s.settings().Scrub > 0
	suspects := &scrubber{Keeper: s.Keeper, heals: s.heals, wait: unpaced, near: everything}
	for {
		d, ok := s.damage.suspect()
		if !ok {
			break
		}
		if err := suspects.look(ctx, c, catalog.Blob{Digest: d}, s.now()); err != nil {
			return s.failed(ctx, err)
		}
	}
	if !on {
		return scrubIdle
	}
	if s.jobs.under(kindScrub) {
		return scrubSoon
	}
	if d, ok := s.damage.doubtful(); ok {
		if err := s.look(ctx, c, catalog.Blob{Digest: d}, s.now()); err != nil {
			return s.failed(ctx, err)
		}
		return 0
	}
	before := s.now().Add(-scrubAgain)
	n, err := s.batch(ctx, c, before, func() bool { return s.damage.waits() || s.jobs.under(kindScrub) })
	switch {
	case err != nil:
		return s.failed(ctx, err)
	case n > 0:
		return 0
	}
	s.damage.allRead(s.now())
	s.retry(ctx)
	return scrubIdle
}

func (s *scrubber) failed(ctx context.Context, err error) time.Duration {
	if ctx.Err() == nil && !errors.Is(err, errScrubOff) && !s.unreachable(err) {
		s.log.Warn("the scrub could not go on; it is tried again in a minute", zap.Error(err))
	}
	return time.Minute
}

func unpaced(ctx context.Context, _ int64) error { return ctx.Err() }

func everything() (near bool) { return false }

// ScrubNow begins to read every blob again, as fast as the disk gives them.
func (k *Keeper) ScrubNow() (Job, error) {
	return k.start(Job{Kind: kindScrub, Unit: "bytes"}, func(ctx context.Context, j *job) error {
		c, err := k.whole(ctx, j)
		if err != nil {
			return err
		}
		usage, err := c.Usage(ctx, "")
		if err != nil {
			return err
		}
		j.update(func(now *Job) { now.Done, now.Total = 0, usage.Bytes })
		defer k.damage.rouse()
		var heals sync.WaitGroup
		defer heals.Wait()
		s := &scrubber{Keeper: k, job: j, heals: &heals, wait: unpaced, near: everything}
		s.retry(ctx)
		for before := k.now(); ; {
			n, err := s.batch(ctx, c, before, func() bool { return false })
			if err != nil {
				return err
			}
			if n == 0 {
				k.damage.allRead(k.now())
				return nil
			}
		}
	})
}

// whole returns the catalog once it is complete, and sees to it if need be.
func (k *Keeper) whole(ctx context.Context, j *job) (*catalog.Catalog, error) {
	if err := take(ctx, k.jobs.turn); err != nil {
		return nil, err
	}
	defer func() { <-k.jobs.turn }()
	if k.completeSince().IsZero() {
		compare := func() error { return k.reconcileNow(ctx, j, false, true) }
		if k.wasClosed() {
			compare = func() error { return k.reconcileHosted(ctx, j) }
		}
		if err := compare(); err != nil {
			return nil, err
		}
	}
	return k.entire()
}

// batch reads the blobs that have not been read for longest, until stop says so.
// It returns how many.
func (s *scrubber) batch(ctx context.Context, c *catalog.Catalog, before time.Time, stop func() bool) (int, error) {
	skip := s.damage.since(before)
	if len(skip) >= maxBad {
		return 0, fmt.Errorf("more than %d blobs cannot be read or are damaged; look after the disk", maxBad)
	}
	blobs, err := c.Unhashed(ctx, before, scrubBatch+len(skip))
	if err != nil {
		return 0, err
	}
	n := 0
	for _, blob := range blobs {
		if skip[blob.Digest] {
			continue
		}
		if n > 0 && stop() {
			break
		}
		n++
		if err := s.wait(ctx, s.settings().Scrub/scrubMost); err != nil {
			return n, err
		}
		if err := s.look(ctx, c, blob, before); err != nil {
			return n, err
		}
	}
	// So that they are not asked for again.
	return n, s.Flush(ctx)
}

// look reads one blob, and does what is to be done then. Its error is not about
// the blob.
func (s *scrubber) look(ctx context.Context, c *catalog.Catalog, blob catalog.Blob, before time.Time) error {
	info, right, err := s.hash(ctx, blob)
	if d := s.afar.distant; d != nil && err == nil && !right && d.Drop(info.Key) {
		s.log.Warn("what was kept near of a blob was damaged, and has been dropped; what the store has of it is read", zap.String("digest", blob.Digest.String()))
		info, right, err = s.hash(ctx, blob)
	}
	// A clock that was set back must not make it look as if it had not been read.
	at := s.now()
	if at.Before(before) {
		at = before
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, errScrubOff), errors.Is(err, storage.ErrUnavailable):
		return err
	case errors.Is(err, storage.ErrDistant): // its turn is over all the same
		s.Note(tree.Change{Kind: tree.Hashed, Canonical: blob.Digest, Size: blob.Size, At: at})
		return nil
	case errors.Is(err, fs.ErrNotExist):
		s.damage.right(blob.Digest)
		return s.tree.TellBlob(ctx, blob.Digest)
	case err != nil:
		s.log.Warn("a stored blob could not be read", zap.String("digest", blob.Digest.String()), zap.Error(err))
		s.damage.unreadable(blob.Digest, at)
	case right:
		s.damage.right(blob.Digest)
		if info.Doubtful {
			if err := s.store.Vouch(ctx, info.Key); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		s.Note(tree.Change{Kind: tree.Hashed, Canonical: blob.Digest, At: at})
	default:
		if err := s.wrong(ctx, c, blob.Digest, info, at); err != nil {
			return err
		}
	}
	s.job.update(func(now *Job) { now.Done += max(info.Size, blob.Size) })
	return nil
}

// hash reads a blob, and says whether it is what its digest says. The error of one
// that is not to be read, since it is not near, wraps [storage.ErrDistant].
func (s *scrubber) hash(ctx context.Context, blob catalog.Blob) (storage.Info, bool, error) {
	var r io.ReadCloser
	var info storage.Info
	var err error
	if s.afar.distant != nil && s.near() {
		r, info, err = s.afar.distant.OpenNear(ctx, layout.Blob(blob.Digest))
	} else {
		r, info, err = s.store.Open(ctx, layout.Blob(blob.Digest), 0, -1)
	}
	if err != nil {
		return info, false, err
	}
	defer func() { r.Close() }()
	opened := int64(0) // where r begins
	file, _ := r.(*os.File)
	cold := file != nil && s.now().Sub(blob.Read) > hotFor
	chunk := make([]byte, min(s.chunk(), max(info.Size, 1)))
	verifier := blob.Digest.Verifier()
	for at := int64(0); ; {
		n, err := r.Read(chunk)
		verifier.Write(chunk[:n])
		if cold {
			forgetPages(file, at, int64(n))
		}
		at += int64(n)
		if errors.Is(err, io.EOF) {
			return info, verifier.Verified(), nil
		}
		if err != nil && s.afar.distant != nil && ctx.Err() == nil && at > opened {
			// Who reads as slowly is cut off now and then.
			rest, now, again := s.store.Open(ctx, layout.Blob(blob.Digest), at, -1)
			if again == nil && now.Size == info.Size && now.ModTime.Equal(info.ModTime) {
				r.Close()
				r, opened, err = rest, at, nil
				file, cold = nil, false
			} else if again == nil {
				rest.Close()
			}
		}
		if err != nil {
			return info, false, err
		}
		if err := s.wait(ctx, int64(n)); err != nil {
			return info, false, err
		}
	}
}
