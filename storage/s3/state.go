package s3

import (
	"context"
	"fmt"
	"hash/maphash"
	"io/fs"
	"strings"
	"sync"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// A stripe has the states of the keys that fall into it.
type stripe struct {
	mu      sync.Mutex
	states  map[string]*state // of keys that are pending, or whose slot is taken
	version uint64            // counts what has been put and deleted
}

// A state is what is going on with one key. The stripe's lock guards it.
type state struct {
	pending bool
	gen     uint64        // of the pending value; counts in the stripe's version
	size    int64         // of the pending value
	tried   bool          // S3 may have been sent it
	slot    chan struct{} // closed when the slot is given back; nil: it is free
	deletes int           // who waits for the slot to delete
	yield   func()        // of the upload that has the slot: ends it, if it is not too late
}

func (s *store) stripe(key string) *stripe {
	return &s.stripes[maphash.String(s.seed, key)%stripes]
}

// state returns that of a key, and makes it. The caller holds the lock.
func (p *stripe) state(key string) *state {
	st := p.states[key]
	if st == nil {
		st = &state{}
		p.states[key] = st
	}
	return st
}

// settle forgets a state that says nothing. The caller holds the lock.
func (p *stripe) settle(key string) {
	if st := p.states[key]; st != nil && !st.pending && st.slot == nil {
		delete(p.states, key)
	}
}

func (p *stripe) pending(key string) bool {
	st := p.states[key]
	return st != nil && st.pending
}

// What a key is decides where its value lies.
type kind int

const (
	ordinary kind = iota
	blob          // its key is its digest
	local         // near only
	upload        // in the bucket only
)

// ours is where the near tier and the owners' mark keep their own.
var ours = []string{"mirror/temp", "mirror/spool", "mirror/lock", "mirror/synced", ownDir, ownerKey}

const ownDir = "mirror/s3"

func kindOf(key string) (kind, error) {
	if err := storage.CheckKey(key); err != nil {
		return 0, err
	}
	switch {
	case strings.HasPrefix(key, storage.Local):
		return local, nil
	case strings.HasPrefix(key, storage.Uploads):
		return upload, nil
	case isOurs(key):
		return 0, fmt.Errorf("s3 storage: %s is the store's own", key)
	}
	if isBlob(key) {
		return blob, nil
	}
	return ordinary, nil
}

// isBlob is what layout.BlobOf says, sooner.
func isBlob(key string) bool {
	const prefix = "docker/registry/v2/blobs/"
	rest, ok := strings.CutPrefix(key, prefix)
	if !ok {
		return false
	}
	if hex, ok := strings.CutPrefix(rest, "sha256/"); ok && len(hex) == len("00/")+64+len("/data") && hex[2] == '/' && hex[67:] == "/data" {
		for i := 3; i < 67; i++ {
			if c := hex[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return false
			}
		}
		return true
	}
	_, ok = layout.BlobOf(key)
	return ok
}

func isOurs(key string) bool {
	if !strings.HasPrefix(key, "mirror/") {
		return false
	}
	for _, own := range ours {
		if rest, ok := strings.CutPrefix(key, own); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}

// A finding is what is known of a key without asking S3.
type finding int

const (
	unknown finding = iota
	missing         // there is none
	pending         // the near file is the value
	present         // the bucket has what the entry says
)

// look finds out what is known. The version is for learn.
func (s *store) look(key string, k kind) (e entry, f finding, version uint64) {
	p := s.stripe(key)
	p.mu.Lock()
	version = p.version
	is := p.pending(key)
	p.mu.Unlock()
	if is {
		return e, pending, version
	}
	e, f = s.believe(key, k)
	return e, f, version
}

// believe is what the index says of a key that is not pending.
func (s *store) believe(key string, k kind) (entry, finding) {
	e, ok := s.index.get(key)
	if s.contested() && (!ok || k != blob) {
		if at, known := s.asked.Get(key); !known || s.now().Sub(at) >= anew {
			return e, unknown
		}
		if !ok {
			return e, missing
		}
	}
	switch {
	case ok && !e.is(unsure) && e.size >= 0 && s.index.current(e):
		return e, present
	case !ok && s.index.complete.Load():
		return e, missing
	}
	return e, unknown
}

// learn writes down what S3 has said of a key, unless something has been put or
// deleted since the version was seen.
func (s *store) learn(key string, version uint64, o object, data []byte, err error) entry {
	e := entry{size: o.size, modified: o.modified, etag: o.etag, data: data}
	if data != nil {
		e.flags |= held
	}
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	old, had := s.index.get(key)
	if err == nil && had && same(key, old, o) {
		e.modified, e.put, e.flags = old.modified, old.put, e.flags|old.flags&^unsure
		if data == nil {
			e.data = old.data
		}
	} else if had {
		e.flags |= old.flags & distrusted
	}
	if p.version != version {
		return e
	}
	if s.owner.shared.Load() {
		s.asked.Add(key, s.now())
	}
	switch {
	case err == nil:
		s.index.set(key, e)
	case had:
		s.index.remove(key, false, s.now())
	}
	return e
}

// ask asks S3 for a key.
func (s *store) ask(ctx context.Context, key string, version uint64) (entry, error) {
	o, err := s.bucket.find(ctx, key)
	s.said(err)
	if err != nil && !absent(err) {
		return entry{}, err
	}
	return s.learn(key, version, o, nil, err), err
}

func notThere(op, key string) error {
	return &fs.PathError{Op: op, Path: key, Err: fs.ErrNotExist}
}

// await makes pending of what is near. The caller holds the lock.
func (s *store) await(p *stripe, key string, k kind, size int64) *state {
	st := p.state(key)
	if st.pending {
		s.budget.waits(-st.size, -1)
	}
	p.version++
	st.pending, st.gen, st.size = true, p.version, size
	s.budget.waits(size, 1)
	s.queue.add(key, k == blob)
	return st
}

// arrived ends pending. The caller holds the lock.
func (s *store) arrived(p *stripe, key string) {
	st := p.states[key]
	if st == nil || !st.pending {
		return
	}
	s.budget.waits(-st.size, -1)
	st.pending, st.tried = false, false
	s.queue.remove(key)
}

// take waits for a key's slot and takes it. The caller holds the lock, and does when
// it returns.
func (s *store) take(ctx context.Context, p *stripe, key string, deletion bool) (*state, error) {
	for {
		st := p.state(key)
		if st.slot == nil {
			st.slot = make(chan struct{})
			return st, nil
		}
		slot := st.slot
		if deletion {
			st.deletes++
			if st.yield != nil {
				st.yield()
			}
		}
		p.mu.Unlock()
		select {
		case <-slot:
		case <-ctx.Done():
		}
		p.mu.Lock()
		if deletion {
			st.deletes--
		}
		if err := ctx.Err(); err != nil {
			p.settle(key)
			return nil, err
		}
	}
}

// give gives a slot back. The caller holds the lock.
func (s *store) give(p *stripe, key string) {
	st := p.states[key]
	close(st.slot)
	st.slot, st.yield = nil, nil
	p.settle(key)
}
