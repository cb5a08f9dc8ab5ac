package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

const (
	stripes   = 256
	maxInline = 64 << 10 // bytes of a value that lies in the index, unless it is a blob
	maxKept   = 8 << 20  // bytes of a blob that Get keeps near
	anew      = 2 * time.Second
)

// store implements storage.Store and storage.Distant.
type store struct {
	bucket   *bucket
	index    *index
	near     storage.Store
	root     string // of the near tier
	identity string // of the bucket
	settings atomic.Pointer[settings]
	now      func() time.Time

	seed    maphash.Seed
	stripes [stripes]stripe
	queue   *queue
	budget  budget
	owner   owner
	listing listing
	trouble trouble

	// distrusted are keys whose objects have been found wrong, and which have no entry.
	distrusted *lru.Cache[string, struct{}]
	// asked is when S3 was last asked for a key, while the bucket is shared.
	asked *lru.Cache[string, time.Time]
	memos *lru.Cache[string, memo]
	// traces are of uploads that a listing may not show yet.
	traces *lru.Cache[string, trace]

	uploads  chan struct{} // holds a value for each that somebody waits for
	evicting sync.Mutex    // held by who drops copies

	log    *zap.Logger
	ticker func(time.Duration) (<-chan time.Time, func())
	refs   int             // guarded by openedMu
	ctx    context.Context // until Close
	cancel context.CancelFunc
	work   sync.WaitGroup
}

// Stat implements storage.Store.
func (s *store) Stat(ctx context.Context, key string) (storage.Info, error) {
	k, err := kindOf(key)
	if err != nil {
		return storage.Info{}, err
	}
	switch k {
	case local:
		return s.near.Stat(ctx, key)
	case upload:
		o, err := s.bucket.find(ctx, key)
		s.said(err)
		return storage.Info{Key: key, Size: o.size, ModTime: o.modified}, err
	case blob:
		info, err := s.near.Stat(ctx, key)
		if err == nil && (!info.Doubtful || !s.dispensable(key)) {
			return info, nil
		}
	}
	for range maxTurns {
		e, f, version := s.look(key, k)
		switch f {
		case pending:
			info, err := s.near.Stat(ctx, key)
			if absent(err) {
				continue // it has come to the bucket since
			}
			return info, err
		case missing:
			return storage.Info{}, notThere("stat", key)
		case present:
			return e.info(key), nil
		}
		e, err := s.ask(ctx, key, version)
		if s.resort(key, k, err) {
			continue
		}
		return e.info(key), err
	}
	return storage.Info{}, restless(key)
}

// maxTurns is how often a value may change its place while somebody looks for it.
const maxTurns = 100

func restless(key string) error {
	return fmt.Errorf("s3 storage: %s is being replaced all the time", key)
}

// dispensable reports whether the bucket has a blob of which there is a near copy.
func (s *store) dispensable(key string) bool {
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	return s.spare(p, key)
}

// spare is dispensable for who holds the lock.
func (s *store) spare(p *stripe, key string) bool {
	if p.pending(key) {
		return false
	}
	e, f := s.believe(key, blob)
	return f == present && !e.is(distrusted)
}

// OpenNear implements storage.Distant.
func (s *store) OpenNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	r, info, err := s.near.Open(ctx, key, 0, -1)
	if err == nil && !info.Doubtful && isBlob(key) {
		s.index.touch(key, info.Size, s.now())
		return r, info, nil
	}
	if err == nil {
		r.Close()
	}
	return s.open(ctx, key, 0, -1, true)
}

// Open implements storage.Store.
func (s *store) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	return s.open(ctx, key, offset, length, false)
}

func (s *store) open(ctx context.Context, key string, offset, length int64, near bool) (io.ReadCloser, storage.Info, error) {
	k, err := kindOf(key)
	if err != nil {
		return nil, storage.Info{}, err
	}
	switch k {
	case local:
		return s.near.Open(ctx, key, offset, length)
	case upload:
		if near {
			info, err := s.Stat(ctx, key)
			if err == nil {
				err = fmt.Errorf("s3 storage: %s: %w", key, storage.ErrDistant)
			}
			return nil, info, err
		}
		return s.fetch(ctx, key, offset, length)
	case blob:
		r, info, err := s.near.Open(ctx, key, offset, length)
		if err == nil {
			if !info.Doubtful || !s.dispensable(key) {
				s.index.touch(key, info.Size, s.now())
				return r, info, nil
			}
			r.Close()
			s.Drop(key)
		} else if !absent(err) {
			return nil, storage.Info{}, err
		}
	}
	for range maxTurns {
		e, f, version := s.look(key, k)
		switch f {
		case pending:
			r, info, err := s.near.Open(ctx, key, offset, length)
			if absent(err) {
				continue
			}
			return r, info, err
		case missing:
			return nil, storage.Info{}, notThere("open", key)
		case present:
			if offset < 0 || offset > e.size || length > e.size-offset {
				return nil, storage.Info{}, outside(key, offset, length, e.size)
			}
			if e.is(held) {
				data := e.data[offset:]
				if length >= 0 {
					data = data[:length]
				}
				return io.NopCloser(bytes.NewReader(data)), e.info(key), nil
			}
		case unknown:
			if k == ordinary {
				// It is small, most likely, and then this is one call for all who ask.
				data, e, err := s.fetchSmall(ctx, key, version, maxInline)
				if err == nil && data != nil {
					return openBytes(key, data, e, offset, length)
				}
				if s.resort(key, k, err) {
					continue
				}
				if err != nil && !errors.Is(err, storage.ErrTooLarge) {
					return nil, storage.Info{}, err
				}
			}
			if near {
				e, err := s.ask(ctx, key, version)
				if absent(err) {
					return nil, storage.Info{}, err
				}
				if err != nil {
					e.size = -1
				}
				return nil, e.info(key), fmt.Errorf("s3 storage: %s: %w", key, storage.ErrDistant)
			}
		}
		if near {
			return nil, e.info(key), fmt.Errorf("s3 storage: %s: %w", key, storage.ErrDistant)
		}
		if f == present && (offset == e.size || length == 0) {
			return io.NopCloser(bytes.NewReader(nil)), e.info(key), nil
		}
		r, o, err := s.bucket.get(ctx, key, offset, length)
		s.said(err)
		if err != nil && !absent(err) {
			return nil, storage.Info{}, err
		}
		e = s.learn(key, version, o, nil, err)
		return r, e.info(key), err
	}
	return nil, storage.Info{}, restless(key)
}

func openBytes(key string, data []byte, e entry, offset, length int64) (io.ReadCloser, storage.Info, error) {
	size := int64(len(data))
	if offset < 0 || offset > size || length > size-offset {
		return nil, storage.Info{}, outside(key, offset, length, size)
	}
	data = data[offset:]
	if length >= 0 {
		data = data[:length]
	}
	return io.NopCloser(bytes.NewReader(data)), e.info(key), nil
}

// fetch reads from the bucket, and remembers nothing.
func (s *store) fetch(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, o, err := s.bucket.get(ctx, key, offset, length)
	s.said(err)
	return r, storage.Info{Key: key, Size: o.size, ModTime: o.modified}, err
}

// Get implements storage.Store.
func (s *store) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	k, err := kindOf(key)
	if err != nil {
		return nil, err
	}
	switch k {
	case local:
		return s.near.Get(ctx, key, limit)
	case upload:
		data, _, err := s.bucket.read(ctx, key, limit)
		s.said(err)
		return data, err
	case blob:
		data, err := s.getNear(ctx, key, limit)
		if !absent(err) {
			return data, err
		}
	}
	for range maxTurns {
		e, f, version := s.look(key, k)
		switch f {
		case pending:
			data, err := s.near.Get(ctx, key, limit)
			if absent(err) {
				continue
			}
			return data, err
		case missing:
			return nil, notThere("get", key)
		case present:
			if e.size > limit {
				return nil, fmt.Errorf("s3 storage: %s has %d bytes, %w (%d)", key, e.size, storage.ErrTooLarge, limit)
			}
			if e.is(held) {
				return e.data, nil
			}
		}
		data, _, err := s.fetchSmall(ctx, key, version, limit)
		if f == unknown && s.resort(key, k, err) {
			continue
		}
		return data, err
	}
	return nil, restless(key)
}

// getNear is Get of a near blob.
func (s *store) getNear(ctx context.Context, key string, limit int64) ([]byte, error) {
	r, info, err := s.near.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if info.Doubtful && s.dispensable(key) {
		s.Drop(key)
		return nil, notThere("get", key)
	}
	if info.Size > limit {
		return nil, fmt.Errorf("s3 storage: %s has %d bytes, %w (%d)", key, info.Size, storage.ErrTooLarge, limit)
	}
	s.index.touch(key, info.Size, s.now())
	data := make([]byte, info.Size)
	_, err = io.ReadFull(r, data)
	return data, err
}

// fetchSmall reads a whole value from the bucket, in one call. A small value comes
// to lie in the index, and a blob that is what its key says near.
func (s *store) fetchSmall(ctx context.Context, key string, version uint64, limit int64) ([]byte, entry, error) {
	data, o, err := s.bucket.read(ctx, key, limit)
	s.said(err)
	switch {
	case absent(err):
		return nil, s.learn(key, version, o, nil, err), err
	case err != nil:
		return nil, entry{}, err
	}
	if data == nil {
		data = []byte{}
	}
	d, ok := layout.BlobOf(key)
	if !ok {
		if int64(len(data)) > maxInline {
			return data, s.learn(key, version, o, nil, nil), nil
		}
		return data, s.learn(key, version, o, data, nil), nil
	}
	e := s.learn(key, version, o, nil, nil)
	if d.Algorithm() == "sha256" && len(data) <= maxKept && sum(data) == d.Encoded() {
		s.keep(ctx, key, data)
	}
	return data, e, nil
}

func sum(data []byte) string {
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

// keep has a copy of a blob near, if there is room. It is no matter if it fails.
func (s *store) keep(ctx context.Context, key string, data []byte) {
	r, err := s.Reserve(int64(len(data)))
	if err != nil {
		return
	}
	defer r.Release()
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.spare(p, key) && s.write(ctx, key, int64(len(data)), func() error { return s.near.Put(ctx, key, data, storage.Lazy) }) == nil {
		s.index.note(key, int64(len(data)), s.now())
	}
}

// Put implements storage.Store.
func (s *store) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	k, err := kindOf(key)
	if err != nil {
		return err
	}
	switch k {
	case local:
		return s.near.Put(ctx, key, data, d)
	case upload:
		_, err := s.bucket.put(ctx, key, bytes.NewReader(data), int64(len(data)), sum(data))
		s.said(err)
		if err == nil {
			s.trace(key, int64(len(data)))
		}
		return err
	}
	return s.put(ctx, key, k, int64(len(data)), data, d, func() error { return s.near.Put(ctx, key, data, storage.Lazy) })
}

// PutFile implements storage.Store.
func (s *store) PutFile(ctx context.Context, key, path string, d storage.Durability) error {
	k, err := kindOf(key)
	if err != nil {
		return err
	}
	if k == local {
		return s.near.PutFile(ctx, key, path, d)
	}
	stat, err := os.Stat(path)
	if err != nil {
		return err
	}
	if k == upload {
		hash, err := hashFile(path)
		if err != nil {
			return err
		}
		err = s.bucket.putFile(ctx, ctx, key, path, stat.Size(), hash, parts{}, func(parts) error { return nil })
		s.said(err)
		if err != nil {
			return err
		}
		s.trace(key, stat.Size())
		return os.Remove(path)
	}
	return s.put(ctx, key, k, stat.Size(), nil, d, func() error { return s.near.PutFile(ctx, key, path, storage.Lazy) })
}

// alone reports whether nobody else can have changed what the index says. As long as S3
// has not been asked who there is, that is not known.
func (s *store) alone() bool { return s.owner.met.Load() && !s.owner.shared.Load() }

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// put makes a value pending, or both if the bucket has it. data is nil if it is in a
// file.
func (s *store) put(ctx context.Context, key string, k kind, size int64, data []byte, d storage.Durability, write func() error) error {
	p := s.stripe(key)
	p.mu.Lock()
	if !p.pending(key) {
		e, f := s.believe(key, k)
		_, wrong := s.distrusted.Peek(key)
		switch {
		case f != present || e.size != size || e.is(distrusted) || wrong:
		case k == blob:
			defer p.mu.Unlock()
			err := s.write(ctx, key, size, write)
			s.index.note(key, size, s.now())
			return err
		case data != nil && e.is(held) && bytes.Equal(e.data, data) && s.alone():
			e.modified = s.now().UTC()
			err := s.index.set(key, e)
			p.mu.Unlock()
			if err == nil && d == storage.Durable {
				err = s.near.Sync(ctx, key)
			}
			return err
		}
	}
	if d == storage.Lazy {
		if err := s.budget.admit(size, k, p.states[key]); err != nil {
			p.mu.Unlock()
			return err
		}
	}
	if err := s.write(ctx, key, size, write); err != nil {
		p.mu.Unlock()
		return err
	}
	failpoint.Hit("s3.put.near")
	s.await(p, key, k, size)
	p.mu.Unlock()
	if d == storage.Durable {
		return s.Sync(ctx, key)
	}
	return nil
}

// Delete implements storage.Store.
func (s *store) Delete(ctx context.Context, key string) error {
	k, err := kindOf(key)
	if err != nil {
		return err
	}
	switch k {
	case local:
		return s.near.Delete(ctx, key)
	case upload:
		err := s.bucket.delete(ctx, key)
		s.said(err)
		if err == nil {
			s.trace(key, -1)
		}
		return err
	}
	p := s.stripe(key)
	p.mu.Lock()
	st, err := s.take(ctx, p, key, true)
	if err != nil {
		p.mu.Unlock()
		return err
	}
	defer func() {
		s.give(p, key)
		p.mu.Unlock()
	}()
	gen, sent := st.gen, st.tried
	e, had := s.index.get(key)
	p.version++
	if had || st.tried || s.owner.shared.Load() || !s.index.complete.Load() {
		e.flags |= unsure
		if !had {
			e.size = -1
		}
		if err := s.index.set(key, e); err != nil {
			return err
		}
		p.mu.Unlock()
		failpoint.Hit("s3.deleting")
		// Who asks for it does not end it: what S3 has been sent could delete what is
		// put there later.
		err := s.forgo(s.ctx, key)
		if err == nil {
			err = s.bucket.delete(s.ctx, key)
			s.said(err)
		}
		failpoint.Hit("s3.deleted")
		p.mu.Lock()
		// Whoever has asked S3 meanwhile may have made it sure again.
		if err != nil {
			s.index.set(key, e)
			return err
		}
		if err := s.index.remove(key, sent, s.now()); err != nil {
			return err
		}
		s.distrusted.Remove(key)
		if s.owner.shared.Load() {
			s.asked.Add(key, s.now())
		}
	}
	p.version++
	if st.gen != gen { // put anew
		return nil
	}
	if err := s.remove(ctx, key); err != nil {
		return err
	}
	s.arrived(p, key)
	return nil
}

// Vouch implements storage.Store.
func (s *store) Vouch(ctx context.Context, key string) error {
	info, err := s.Stat(ctx, key)
	if err != nil || !info.Doubtful {
		return err
	}
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	err = s.near.Vouch(ctx, key)
	if absent(err) {
		return nil // it has come to the bucket since
	}
	s.queue.retry(key)
	return err
}
