package tree

import (
	"hash/maphash"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

var seed = maphash.MakeSeed()

// stripes are locks for more things than there are locks. Whoever holds one of
// repositories may take one of tags or of digests, and none after that.
type stripes [1024]sync.RWMutex

func (s *stripes) of(name string) *sync.RWMutex {
	return &s[maphash.String(seed, name)%uint64(len(s))]
}

// lock takes the lock of a name and returns what gives it back.
func (s *stripes) lock(name string) (unlock func()) {
	l := s.of(name)
	l.Lock()
	return l.Unlock
}

// A guard keeps what has been removed out of memory. Who reads the store in
// order to remember does
//
//	since := g.removals.Load()
//	read
//	g.mu.Lock()
//	if g.removals.Load() != since { look again }
//	remember
//	g.mu.Unlock()
//
// and who removes
//
//	delete
//	g.mu.Lock()
//	g.removals.Add(1)
//	forget
//	g.mu.Unlock()
//
// If the reader remembers first, the remover forgets it. If the remover forgets
// first, the reader sees another number, looks again, and finds nothing. So once
// a removal has returned, memory does not have it, and never gets it from a look
// into the store that began before.
type guard struct {
	mu       sync.Mutex
	removals atomic.Uint64
}

type guards [256]guard

func (g *guards) of(name string) *guard {
	return &g[maphash.String(seed, name)%uint64(len(g))]
}

// lockDigest keeps the bytes of a digest from being removed, and links to them
// from being made or removed by anyone else.
func (t *Tree) lockDigest(canonical digest.Digest) (unlock func()) {
	return t.digests.lock(string(canonical))
}

func (t *Tree) lockTag(repository, tag string) (unlock func()) {
	return t.tags.lock(repository + ":" + tag)
}
