package s3

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/storage"
)

// A budget counts what is near, in bytes as a disk has them.
type budget struct {
	mu       sync.Mutex
	limit    int64
	near     int64 // of all near files
	pending  int64 // of those that are not in the bucket
	waiting  int64 // how many those are
	reserved int64 // set aside for files that are on their way
	over     chan struct{}
}

const (
	block       = 4096
	maxWaiting  = 1_000_000 // pending values, about 300 MiB of memory
	evictAtOnce = 256
)

// occupied is how much of a disk n bytes take.
func occupied(n int64) int64 { return (n + block - 1) / block * block }

// admit refuses what would leave too little room for what is read. What is no blob is
// small, and counts by number only.
func (b *budget) admit(size int64, k kind, replaced *state) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	need := occupied(size)
	if replaced != nil && replaced.pending {
		need -= occupied(replaced.size)
	}
	if (k != blob || b.pending+need <= b.limit/2) && b.waiting < maxWaiting {
		return nil
	}
	return fmt.Errorf("s3 storage: %w for %s: %d values of %s are waiting for the bucket, and may take half of cache %s; see why they do not get there, or enlarge cache",
		storage.ErrFull, humanize.IBytes(uint64(size)), b.waiting, humanize.IBytes(uint64(b.pending)), humanize.IBytes(uint64(b.limit)))
}

// waits counts a pending value of size bytes, or one less if n is -1.
func (b *budget) waits(size, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n < 0 {
		b.pending -= occupied(-size)
	} else {
		b.pending += occupied(size)
	}
	b.waiting += n
}

// holds counts near files that have come, or gone.
func (b *budget) holds(occupied int64) {
	b.mu.Lock()
	b.near += occupied
	over := b.near+b.reserved > b.limit
	b.mu.Unlock()
	if over {
		b.full()
	}
}

func (b *budget) full() {
	select {
	case b.over <- struct{}{}:
	default:
	}
}

// set sets room aside, and reports how much is lacking.
func (b *budget) set(n int64) (lacking int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if lacking = b.near + b.reserved + n - b.limit; lacking > 0 {
		return lacking
	}
	b.reserved += n
	return 0
}

// write puts a near file, and counts it. The caller holds the key's lock.
func (s *store) write(ctx context.Context, key string, size int64, write func() error) error {
	before, err := s.near.Stat(ctx, key)
	had := err == nil
	if err := write(); err != nil {
		return err
	}
	n := occupied(size)
	if had {
		n -= occupied(before.Size)
	}
	s.budget.holds(n)
	return nil
}

// remove removes a near file, if there is one. The caller holds the key's lock.
func (s *store) remove(ctx context.Context, key string) error {
	before, err := s.near.Stat(ctx, key)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.near.Delete(ctx, key); err != nil {
		return err
	}
	s.budget.holds(-occupied(before.Size))
	s.index.note(key, -1, s.now())
	return nil
}

// Drop implements storage.Distant.
func (s *store) Drop(key string) bool {
	k, err := kindOf(key)
	if err != nil || k != blob {
		return false
	}
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.spare(p, key) {
		return false
	}
	if _, err := s.near.Stat(s.ctx, key); err != nil {
		return false
	}
	return s.remove(s.ctx, key) == nil
}

// Distrust implements storage.Distant.
func (s *store) Distrust(key string) {
	if k, err := kindOf(key); err != nil || k == local || k == upload {
		return
	}
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.version++ // whoever is reading it has been told the wrong thing
	if e, ok := s.index.get(key); ok {
		e.flags = e.flags&^held | distrusted
		e.data = nil
		if s.index.set(key, e) == nil {
			return
		}
	}
	s.distrusted.Add(key, struct{}{})
}

// Spool implements storage.Store.
func (s *store) Spool(name string) (string, error) { return s.near.Spool(name) }

// Reserve implements storage.Store. It drops copies to make room.
func (s *store) Reserve(n int64) (storage.Reservation, error) {
	if n < 0 || n > s.budget.most() {
		return nil, s.noRoom(n)
	}
	for {
		if lacking := s.budget.set(n); lacking > 0 {
			// Somebody else may have made room while this waited to.
			if s.evict(lacking) > 0 {
				continue
			}
			if s.budget.set(n) > 0 {
				return nil, s.noRoom(n)
			}
		}
		r, err := s.near.Reserve(n)
		if err == nil {
			return &reservation{budget: &s.budget, near: r, left: n}, nil
		}
		s.budget.release(n)
		if !errors.Is(err, storage.ErrFull) {
			return nil, err
		}
		if s.evict(n) == 0 {
			return nil, fmt.Errorf("s3 storage: %w for %s: a tenth of the disk that has the cache %s stays free, and there is nothing left to drop; free some space there, or let cache name a directory on another disk",
				storage.ErrFull, humanize.IBytes(uint64(n)), s.root)
		}
	}
}

func (s *store) noRoom(n int64) error {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	return fmt.Errorf("s3 storage: %w for %s: of cache %s, %s wait for the bucket and %s are set aside; enlarge cache",
		storage.ErrFull, humanize.IBytes(uint64(max(n, 0))), humanize.IBytes(uint64(s.budget.limit)), humanize.IBytes(uint64(s.budget.pending)), humanize.IBytes(uint64(s.budget.reserved)))
}

func (b *budget) most() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit
}

func (b *budget) release(n int64) {
	b.mu.Lock()
	b.reserved -= n
	b.mu.Unlock()
}

// A reservation counts as used to its end: what it is for is counted anew when it is
// put.
type reservation struct {
	budget *budget
	near   storage.Reservation
	left   int64 // guarded by budget.mu
}

func (r *reservation) Use(n int64) { r.near.Use(n) }

func (r *reservation) Release() {
	r.near.Release()
	r.budget.mu.Lock()
	defer r.budget.mu.Unlock()
	r.budget.reserved -= r.left
	r.left = 0
}

// evict drops copies, coldest first, until n bytes are free of them, or some are. It
// returns how many.
func (s *store) evict(n int64) (freed int64) {
	s.evicting.Lock()
	defer s.evicting.Unlock()
	for range 8 {
		files, err := s.index.coldest(evictAtOnce)
		if err != nil {
			return freed
		}
		for _, file := range files {
			if freed >= n || s.ctx.Err() != nil {
				return freed
			}
			if s.Drop(file.key) {
				freed += occupied(file.size)
			} else if _, err := s.near.Stat(s.ctx, file.key); absent(err) {
				s.index.note(file.key, -1, s.now())
			} else {
				// It has to stay, and would stand in the way of what may go.
				s.index.note(file.key, file.size, s.now())
			}
		}
		if freed > 0 || len(files) < evictAtOnce {
			break
		}
	}
	return freed
}

// tidy keeps what is near within its limits, and writes down what was accessed. It is
// what one goroutine does until Close.
func (s *store) tidy() {
	tick, stop := s.ticker(tidyEvery)
	defer stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.budget.over:
		case <-tick:
			s.index.flush()
			s.deleteAgain(s.ctx)
		}
		for s.ctx.Err() == nil {
			excess := s.excess()
			if excess <= 0 || s.evict(excess) == 0 {
				break
			}
		}
	}
}

// excess is how many bytes of copies should go.
func (s *store) excess() int64 {
	s.budget.mu.Lock()
	n := s.budget.near + s.budget.reserved - s.budget.limit
	if n > 0 {
		n += s.budget.limit / 20 // so that the next does not have to wait
	}
	s.budget.mu.Unlock()
	if m, ok := s.near.(storage.Measured); ok {
		if free, keep, err := m.Free(); err == nil {
			n = max(n, keep-free)
		}
	}
	return n
}
