package tree

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
)

var seed = maphash.MakeSeed()

// stripes are locks for more things than there are locks. They are taken in this
// order, and none of a kind after another of that kind:
//
//	one of pushes, one of repositories, one of tags, those of digests all at once.
//
// Pushes of manifests share that of their repository, so that they do not wait for
// each other; whoever removes a manifest at somebody's wish has it alone. Then no
// push finds its manifest gone before its tag is set.
//
// What refers to content holds the content's lock, shared, from before it is told
// of until it is written: a manifest those of the blobs and manifests it names, and
// a tag that of its manifest. What removes content holds it alone, asks whether
// somebody refers to it, and removes. So either the removal hears of the reference,
// or the reference finds that the content is gone.
type stripes [1024]sync.RWMutex

func (s *stripes) index(name string) uint64 { return maphash.String(seed, name) % uint64(len(s)) }

func (s *stripes) of(name string) *sync.RWMutex { return &s[s.index(name)] }

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

// lockReferring does so for a manifest, and keeps what it names from being removed,
// though not from being referred to by others.
func (t *Tree) lockReferring(canonical digest.Digest, named []digest.Digest) (unlock func()) {
	own := t.digests.index(string(canonical))
	all := []uint64{own}
	for _, d := range named {
		all = append(all, t.digests.index(string(d)))
	}
	slices.Sort(all)
	all = slices.Compact(all)
	for _, i := range all {
		if i == own {
			t.digests[i].Lock()
		} else {
			t.digests[i].RLock()
		}
	}
	return func() {
		for _, i := range all {
			if i == own {
				t.digests[i].Unlock()
			} else {
				t.digests[i].RUnlock()
			}
		}
	}
}

// keepDigest keeps the bytes of a digest, and links to them, from being removed.
func (t *Tree) keepDigest(canonical digest.Digest) (release func()) {
	l := t.digests.of(string(canonical))
	l.RLock()
	return l.RUnlock
}

func (t *Tree) lockTag(repository, tag string) (unlock func()) {
	return t.tags.lock(repository + ":" + tag)
}

// Pushing keeps Alone out of a repository until done: it is for whoever stores a
// manifest and tags it then. Any number may push at a time.
func (t *Tree) Pushing(repository string) (done func()) {
	l := t.pushes.of(repository)
	l.RLock()
	return l.RUnlock
}

// Alone keeps pushes of manifests, and others who are alone, out of a repository
// until done.
func (t *Tree) Alone(repository string) (done func()) { return t.pushes.lock(repository) }
