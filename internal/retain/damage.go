package retain

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const (
	maxHeals    = 2       // blobs fetched again at once
	maxUnhealed = 1_000   // blobs that could not be, and are tried again
	maxBad      = 10_000  // blobs known to be damaged or unreadable
	maxDamages  = 100     // of Status.Damaged
	maxSuspects = 1_000   // blobs found to be wrong as they were served
	maxDoubtful = 100_000 // blobs that a loss of power may have damaged
	maxTold     = 10      // of Damage.Repositories
	tellAgain   = 24 * time.Hour

	suspectAgain = time.Hour // a blob known to be damaged is suspected again
)

// damage is what the scrub knows besides the catalog.
type damage struct {
	mu       sync.Mutex
	bad      map[digest.Digest]*bad
	suspects []digest.Digest
	doubts   []digest.Digest
	unhealed []heal
	complete time.Time // when all had been read
	allDone  bool      // and nothing has been read since

	wake  chan struct{} // signalled when there is something to do for the scrub
	heals chan struct{} // holds a value for each blob that is being fetched again
}

// bad is a blob that is damaged and stays, or that the disk does not give.
type bad struct {
	Damage
	unreadable bool
	checked    time.Time
	told       time.Time
}

// heal is a blob to be fetched again.
type heal struct {
	repository string
	digest     digest.Digest
	replace    bool // what is there still, and is wrong
}

func newDamage() damage {
	return damage{bad: map[digest.Digest]*bad{}, wake: make(chan struct{}, 1), heals: make(chan struct{}, maxHeals)}
}

// rouse has the scrub look for something to do.
func (s *damage) rouse() { signal(s.wake) }

// Suspect has a blob read again soon, because it was found to be wrong as it was
// served. It does not block. One that is known to be damaged is not read again
// within an hour, however often it is asked for.
func (k *Keeper) Suspect(d digest.Digest) {
	s, now := &k.damage, k.now()
	s.mu.Lock()
	b := s.bad[d]
	known := b != nil && !b.unreadable && now.Sub(b.checked).Abs() < suspectAgain
	if !known && len(s.suspects) < maxSuspects && !slices.Contains(s.suspects, d) {
		s.suspects = append(s.suspects, d)
	}
	s.mu.Unlock()
	s.rouse()
}

// doubt has a blob read before all that nobody suspects.
func (s *damage) doubt(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.doubts) < maxDoubtful {
		s.doubts = append(s.doubts, d)
	}
}

func (s *damage) suspect() (digest.Digest, bool)  { return s.next(&s.suspects) }
func (s *damage) doubtful() (digest.Digest, bool) { return s.next(&s.doubts) }

func (s *damage) next(queue *[]digest.Digest) (d digest.Digest, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ok = len(*queue) > 0; ok {
		d, *queue = (*queue)[0], (*queue)[1:]
	}
	return d, ok
}

// waits reports whether there is something to be read before the others.
func (s *damage) waits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.suspects)+len(s.doubts) > 0
}

// since returns the bad blobs that have been read since a time.
func (s *damage) since(before time.Time) map[digest.Digest]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	read := map[digest.Digest]bool{}
	for d, b := range s.bad {
		if !b.checked.Before(before) {
			read[d] = true
		}
	}
	return read
}

func (s *damage) right(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.allDone = false
	delete(s.bad, d)
}

func (s *damage) unreadable(d digest.Digest, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.bad[d]; b != nil {
		b.checked = at
		return
	}
	s.bad[d] = &bad{unreadable: true, checked: at}
}

// stays notes a blob that is damaged and cannot be fetched again, and reports
// whether somebody is to be told.
func (s *damage) stays(d Damage, at time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.bad[d.Digest]
	if b == nil || b.unreadable {
		b = &bad{}
		d.Found = at
		b.Damage = d
		s.bad[d.Digest] = b
	}
	b.Repositories, b.checked = d.Repositories, at
	tell := b.told.IsZero() || at.Sub(b.told) >= tellAgain
	if tell {
		b.told = at
	}
	return tell
}

func (s *damage) allRead(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.allDone {
		s.complete, s.allDone = at, true
	}
}

// lastScrub is when every blob had been read again.
func (s *damage) lastScrub() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.complete
}

// list returns what is damaged and stays, the first found first.
func (s *damage) list() []Damage {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Damage
	for _, b := range s.bad {
		if !b.unreadable {
			all = append(all, b.Damage)
		}
	}
	slices.SortFunc(all, func(a, b Damage) int { return a.Found.Compare(b.Found) })
	return all[:min(len(all), maxDamages)]
}

// wrong sees to a blob that is not what its digest says: it is deleted and
// fetched again where that can be done, and left where it is otherwise, since
// part of it may still be of use to somebody.
func (s *scrubber) wrong(ctx context.Context, c *catalog.Catalog, d digest.Digest, info storage.Info, at time.Time) error {
	// What is being written may make it a hosted repository's.
	if err := s.Flush(ctx); err != nil {
		return err
	}
	owners, err := c.Owners(ctx, d, maxTold)
	if err != nil {
		return err
	}
	if hosted(owners) {
		s.keep(d, owners, at)
		return nil
	}
	if s.afar.distant != nil && len(owners) > 0 {
		_, err := s.store.Stat(ctx, layout.RevisionLink(owners[0].Name, d))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err != nil { // no manifest, which is fetched only when it is not there
			s.replace(ctx, d, info, owners, at)
			return nil
		}
	}
	removed, err := s.tree.RemoveBlob(ctx, d, func() (bool, error) {
		now, err := s.store.Stat(ctx, info.Key)
		if errors.Is(err, fs.ErrNotExist) || err == nil && (now.Size != info.Size || !now.ModTime.Equal(info.ModTime)) {
			return true, nil // somebody has stored the right bytes meanwhile
		}
		if err != nil {
			return true, err
		}
		return s.stays(ctx, d)
	})
	if err != nil {
		return err
	}
	if !removed {
		s.damage.unreadable(d, at) // looked at again in the next cycle
		return nil
	}
	s.damage.right(d)
	s.job.found(d.String(), info.Size)
	s.log.Warn("a stored blob was damaged and has been deleted", zap.String("digest", d.String()), zap.Int64("size", info.Size),
		zap.Strings("repositories", namesOf(owners)))
	if len(owners) == 0 {
		return nil
	}
	if _, err := s.store.Stat(ctx, layout.RevisionLink(owners[0].Name, d)); err == nil {
		return nil // a manifest, which is fetched again as it is asked for
	}
	s.heal(ctx, heal{repository: owners[0].Name, digest: d})
	return nil
}

// replace has a mirrored blob of a distant store fetched again: what is there stays
// until it is replaced, since another process may refer to it.
func (s *scrubber) replace(ctx context.Context, d digest.Digest, info storage.Info, owners []catalog.Repository, at time.Time) {
	s.afar.distant.Distrust(info.Key)
	s.damage.unreadable(d, at) // not again in this cycle
	s.job.found(d.String(), info.Size)
	s.log.Warn("a stored blob is damaged and is fetched again", zap.String("digest", d.String()), zap.Int64("size", info.Size),
		zap.Strings("repositories", namesOf(owners)))
	s.heal(ctx, heal{repository: owners[0].Name, digest: d, replace: true})
}

// stays says whether a damaged blob may be a hosted repository's, so that nobody
// can fetch it again: as long as it is not known to be none's, it is. The tree
// asks.
func (k *Keeper) stays(ctx context.Context, d digest.Digest) (bool, error) {
	c, err := k.mayDelete()
	if err != nil || k.isPending(d) {
		return true, nil
	}
	owners, err := c.Owners(ctx, d, 1)
	return hosted(owners) || err != nil, err
}

// hosted says whether one of those who own a blob is hosted; they come first.
func hosted(owners []catalog.Repository) bool {
	return len(owners) > 0 && owners[0].Class != tree.Mirrored
}

func namesOf(owners []catalog.Repository) []string {
	var all []string
	for _, owner := range owners {
		all = append(all, owner.Name)
	}
	return all
}

// keep is loud about a blob that only its owner can put right.
func (s *scrubber) keep(d digest.Digest, owners []catalog.Repository, at time.Time) {
	s.job.update(func(now *Job) { now.name(d.String()) })
	if !s.damage.stays(Damage{Digest: d, Repositories: namesOf(owners)}, at) {
		return
	}
	s.log.Error("a blob of a hosted repository is damaged and cannot be fetched again; restore it from a backup, or push it again",
		zap.String("digest", d.String()), zap.Strings("repositories", namesOf(owners)), zap.String("key", layout.Blob(d)))
	s.emit("damaged", map[string]any{"digest": d.String(), "repositories": namesOf(owners)})
}

// heal fetches a deleted blob again, in the background.
func (s *scrubber) heal(ctx context.Context, h heal) {
	if s.hooks.Heal == nil || take(ctx, s.damage.heals) != nil {
		return
	}
	s.heals.Go(func() {
		defer func() { <-s.damage.heals }()
		// Nobody knows its size: what was stored may have been too short.
		err := s.hooks.Heal(ctx, h.repository, h.digest, -1)
		if err == nil {
			if h.replace {
				s.damage.right(h.digest)
			}
			s.job.update(func(now *Job) { now.Healed++ })
			s.log.Info("a damaged blob has been fetched again", zap.String("repository", h.repository), zap.String("digest", h.digest.String()))
			s.emit("healed", map[string]any{"repository": h.repository, "digest": h.digest.String()})
			return
		}
		if ctx.Err() == nil && !s.unreachable(err) {
			s.log.Warn("a damaged blob could not be fetched again; it is tried again later, and when it is pulled",
				zap.String("repository", h.repository), zap.String("digest", h.digest.String()), zap.Error(err))
		}
		s.damage.mu.Lock()
		defer s.damage.mu.Unlock()
		if len(s.damage.unhealed) < maxUnhealed {
			s.damage.unhealed = append(s.damage.unhealed, h)
		}
	})
}

// retry fetches what could not be fetched before, unless it has come meanwhile.
func (s *scrubber) retry(ctx context.Context) {
	s.damage.mu.Lock()
	unhealed := s.damage.unhealed
	s.damage.unhealed = nil
	s.damage.mu.Unlock()
	for _, h := range unhealed {
		if _, err := s.store.Stat(ctx, layout.Blob(h.digest)); h.replace || errors.Is(err, fs.ErrNotExist) {
			s.heal(ctx, h)
		}
	}
}
