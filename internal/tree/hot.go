package tree

import (
	"sync"

	"github.com/dgraph-io/ristretto/v2"
	"github.com/opencontainers/go-digest"
)

const (
	// maxHot is the largest blob that is kept in memory, in bytes: configs and
	// small layers. Manifests are kept whatever their size.
	maxHot = 64 << 10
	// DefaultHot is how many bytes are kept in memory unless Heat says more or
	// less.
	DefaultHot = 64 << 20
	// parsedCost is about how much larger a parsed manifest is than its bytes.
	parsedCost = 3
	// entryCost is what an entry takes besides its content.
	entryCost = 512
)

// hot keeps small content in memory by its digest, less what has been asked for
// seldom. It is no source of truth: ristretto makes a value visible some time
// after it was set, or drops it. Nothing in it is ever wrong, since content
// never changes; who may see it is decided elsewhere, by revisions and members.
type hot struct {
	cache   *ristretto.Cache[string, *warm]
	guards  guards // by digest
	heating sync.Mutex
	size    int64 // guarded by heating
}

// warm is content in memory. It is never changed once it is there.
type warm struct {
	body     []byte
	manifest *Manifest // nil where it was asked for as a blob only
	other    *Manifest // as it was last asked for by a digest that is not a sha256
}

func newHot() *hot {
	cache, err := ristretto.NewCache(&ristretto.Config[string, *warm]{
		// Ten for each entry that is expected; 2 MiB.
		NumCounters: 1 << 20,
		MaxCost:     DefaultHot,
		BufferItems: 64,
	})
	if err != nil {
		panic(err) // the numbers above are positive
	}
	return &hot{cache: cache, size: DefaultHot}
}

// heat changes how many bytes are kept. ristretto frees nothing when its bound
// falls, and later only as it admits something: so all go where there is less
// room, and come again as they are asked for. Clear may run beside Get and Set:
// nothing is made visible while it runs.
func (h *hot) heat(size int64) {
	h.heating.Lock()
	defer h.heating.Unlock()
	h.cache.UpdateMaxCost(max(size, 1))
	if size < h.size {
		h.cache.Clear()
	}
	h.size = size
}

func (h *hot) get(d digest.Digest) (*warm, bool) { return h.cache.Get(string(d)) }

// since is to be asked before content is read from the store, and given to add.
func (h *hot) since(d digest.Digest) uint64 { return h.guards.of(string(d)).removals.Load() }

// add keeps content, unless some has been removed since it was read.
func (h *hot) add(d digest.Digest, w *warm, since uint64) {
	g := h.guards.of(string(d))
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.removals.Load() != since {
		return // it comes again when it is asked for
	}
	if old, ok := h.get(d); ok {
		if w.manifest == nil {
			w.manifest = old.manifest
		}
		if w.other == nil {
			w.other = old.other
		}
	}
	cost := int64(len(w.body))
	if w.manifest != nil || w.other != nil {
		cost *= parsedCost
	}
	// Set says that it has taken what is larger than everything, and drops it.
	h.cache.Set(string(d), w, cost+entryCost)
}

// remove forgets content. A value that was set before may become visible only
// after Del has returned, until Del comes to its turn behind it: that is waited
// for.
func (h *hot) remove(d digest.Digest) {
	g := h.guards.of(string(d))
	g.mu.Lock()
	g.removals.Add(1)
	h.cache.Del(string(d))
	g.mu.Unlock()
	h.cache.Wait()
}
