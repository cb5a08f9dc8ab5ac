package s3

import (
	"encoding/binary"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// An access is when a file that is near was last read or written, and its size.
type access struct {
	at   int64 // Unix time, in seconds
	size int64 // -1: the file is gone
}

// touch takes note of an access. It writes nothing.
func (x *index) touch(key string, size int64, now time.Time) {
	x.accessMu.Lock()
	if len(x.accessed) < maxAccessed {
		x.accessed[key] = access{now.Unix(), size}
	}
	x.accessMu.Unlock()
}

// note takes note of a file that has come, or, with a size of -1, gone. Unlike an
// access it must not be lost: what is not known to be near is never evicted.
func (x *index) note(key string, size int64, now time.Time) {
	x.accessMu.Lock()
	x.accessed[key] = access{now.Unix(), size}
	full := len(x.accessed) >= maxAccessed
	x.accessMu.Unlock()
	if full {
		x.flush()
	}
}

// flush writes down the accesses.
func (x *index) flush() error {
	x.flushing.Lock()
	defer x.flushing.Unlock()
	x.accessMu.Lock()
	accessed := x.accessed
	x.accessed = map[string]access{}
	x.accessMu.Unlock()
	if len(accessed) == 0 {
		return nil
	}
	err := x.update(func(tx *bolt.Tx) error {
		near := tx.Bucket(nearName)
		for key, a := range accessed {
			if a.size < 0 {
				if err := near.Delete([]byte(key)); err != nil {
					return err
				}
				continue
			}
			b := binary.AppendVarint(nil, a.at)
			if err := near.Put([]byte(key), binary.AppendVarint(b, a.size)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil { // a file that nobody knows of would never go
		x.accessMu.Lock()
		defer x.accessMu.Unlock()
		for key, a := range accessed {
			if _, newer := x.accessed[key]; !newer {
				x.accessed[key] = a
			}
		}
	}
	return err
}

// knows reports whether an access to a near file has been written down.
func (x *index) knows(key string) (ok bool) {
	x.db.View(func(tx *bolt.Tx) error {
		ok = tx.Bucket(nearName).Get([]byte(key)) != nil
		return nil
	})
	return ok
}

// A cold file is one that may go.
type cold struct {
	key string
	access
}

// coldest returns the near files that have not been accessed for longest, up to limit
// of them, coldest first.
func (x *index) coldest(limit int) (found []cold, err error) {
	if err := x.flush(); err != nil {
		return nil, err
	}
	byAge := func(a, b cold) int { return int(min(max(a.at-b.at, -1), 1)) }
	err = x.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(nearName).ForEach(func(k, v []byte) error {
			at, n := binary.Varint(v)
			if n <= 0 {
				return nil
			}
			size, _ := binary.Varint(v[n:])
			if len(found) >= 2*limit {
				slices.SortFunc(found, byAge)
				found = found[:limit]
			}
			found = append(found, cold{string(k), access{at, size}})
			return nil
		})
	})
	slices.SortFunc(found, byAge)
	return found[:min(limit, len(found))], err
}
