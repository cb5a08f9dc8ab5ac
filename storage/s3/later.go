package s3

import (
	"bytes"
	"context"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

// A call that was cut, by the network, by Close or by the end of the process, may still be
// carried out by a server that has it. If a value was being stored that way and has been
// deleted since, it comes back. So what S3 may have been sent is deleted a second time when
// it must have come, unless somebody else may have put it there.

// maxAgain is how many values are deleted a second time in one turn.
const maxAgain = 100

// forget removes what is remembered of deletions that no listing can lag behind. It
// returns those keys, not above maxAgain, that are to be deleted again before.
func (x *index) forget(now time.Time) (again []string, err error) {
	err = x.update(func(tx *bolt.Tx) error {
		var old [][]byte
		again = nil
		c := tx.Bucket(goneName).Cursor()
		for k, _ := c.First(); k != nil && len(old) < 10_000; k, _ = c.Next() {
			d, _ := gone(tx, k)
			switch {
			case now.Sub(d.at) < settle:
			case d.late && d.epoch == x.epoch.Load():
				if len(again) < maxAgain {
					again = append(again, string(k))
				}
			default:
				old = append(old, bytes.Clone(k))
			}
		}
		for _, k := range old {
			if err := tx.Bucket(goneName).Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
	return again, err
}

// late reports whether a key was deleted so in the present epoch, and nothing has been
// put there since.
func (x *index) late(key string) (is bool) {
	x.db.View(func(tx *bolt.Tx) error {
		d, ok := gone(tx, []byte(key))
		is = ok && d.late && d.epoch == x.epoch.Load() && tx.Bucket(entriesName).Get([]byte(key)) == nil
		return nil
	})
	return is
}

// deleteAgain deletes what may have come to the bucket after it had been deleted. What
// fails is tried again in the next turn.
func (s *store) deleteAgain(ctx context.Context) {
	again, err := s.index.forget(s.now())
	if err != nil {
		return
	}
	for _, key := range again {
		if s.bucket.breaker.open() || ctx.Err() != nil || s.removeLate(ctx, key) != nil {
			return
		}
	}
}

func (s *store) removeLate(ctx context.Context, key string) error {
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.states[key] != nil {
		return nil // it has been put anew, or is about to be deleted
	}
	if _, err := s.take(ctx, p, key, false); err != nil {
		return err
	}
	defer s.give(p, key)
	if !s.alone() || !s.index.late(key) {
		return nil
	}
	p.mu.Unlock()
	err := s.bucket.delete(ctx, key)
	s.said(err)
	failpoint.Hit("s3.deleted.again")
	p.mu.Lock()
	if err != nil {
		return err
	}
	// Listings lag behind this deletion, too.
	return s.index.remove(key, false, s.now())
}
