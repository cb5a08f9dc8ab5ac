package retain

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// model is what a store should hold, by itself: which images were pulled where,
// and when they were last read.
type model struct {
	*kept
	r      *rand.Rand
	layers [][]byte
	images map[digest.Digest]artifact
	order  []digest.Digest
	read   map[string]time.Time // of repository:tag
	pinned map[string]bool      // repository:tag
	hosted map[string]digest.Digest
	did    []string
}

// artifact is an image, or an index.
type artifact struct {
	body     []byte
	layers   [][]byte
	children []digest.Digest
	subject  digest.Digest
}

var repositories = map[string]string{
	"docker.io/a": "docker.io", "docker.io/b": "docker.io", "docker.io/team/c": "docker.io",
	"ghcr.io/a": "ghcr.io", "ghcr.io/b": "ghcr.io",
	"apps/web": "",
}

func newModel(t *testing.T, seed uint64) *model {
	m := &model{
		kept: keep(t), r: rand.New(rand.NewPCG(seed, 1)),
		images: map[digest.Digest]artifact{}, read: map[string]time.Time{}, pinned: map[string]bool{}, hosted: map[string]digest.Digest{},
	}
	for i := range 30 {
		m.layers = append(m.layers, content(i, 1000+m.r.IntN(60_000)))
	}
	add := func(a artifact) digest.Digest {
		d := digest.FromBytes(a.body)
		m.images[d] = a
		m.order = append(m.order, d)
		return d
	}
	for i := range 24 {
		var layers [][]byte
		for _, n := range m.r.Perm(len(m.layers))[:1+m.r.IntN(4)] {
			layers = append(layers, m.layers[n])
		}
		a := artifact{body: image(fmt.Sprint(i), nil, layers...), layers: layers}
		d := add(a)
		switch m.r.IntN(4) {
		case 0: // with an attestation
			extra := content(1000+i, 500)
			s := artifact{layers: [][]byte{extra}, subject: d}
			s.body = image("of", &v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d, Size: int64(len(a.body))}, extra)
			add(s)
		case 1: // in an index with another
			other := m.order[m.r.IntN(len(m.order))]
			if len(m.images[other].layers) > 0 && other != d {
				add(artifact{body: index(a.body, m.images[other].body), children: []digest.Digest{d, other}})
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(repositories)) {
		m.repository(name, repositories[name])
	}
	return m
}

func (m *model) say(format string, args ...any) {
	m.did = append(m.did, fmt.Sprintf(format, args...))
}

// fetch stores an artifact in a repository, as a client's pull does.
func (m *model) fetch(repository string, d digest.Digest) {
	a := m.images[d]
	m.manifest(repository, a.body)
	m.askManifest(repository, d)
	for _, child := range a.children {
		m.fetch(repository, child)
	}
	for _, l := range a.layers {
		m.blob(repository, l)
	}
	m.touch(repository, d)
}

// touch notes that something has been read by its digest.
func (m *model) touch(repository string, d digest.Digest) {
	for name := range m.read {
		repo, tag, _ := cutTag(name)
		if repo == repository && m.reaches(m.means(repo, tag), d, map[digest.Digest]bool{}) {
			m.read[name] = m.clock.time()
		}
	}
}

func cutTag(name string) (repository, tag string, ok bool) {
	ref := name[len(name)-2:]
	return name[:len(name)-3], ref, true
}

func (m *model) reaches(from, to digest.Digest, seen map[digest.Digest]bool) bool {
	if from == to {
		return true
	}
	if seen[from] {
		return false
	}
	seen[from] = true
	for _, child := range m.images[from].children {
		if m.reaches(child, to, seen) {
			return true
		}
	}
	// What says something about an image is read for it.
	return m.images[to].subject != "" && m.reaches(from, m.images[to].subject, seen)
}

func (m *model) step() {
	names := slices.Sorted(maps.Keys(repositories))
	repository := names[m.r.IntN(len(names))]
	tag := fmt.Sprint("v", m.r.IntN(4))
	name := repository + ":" + tag
	d := m.order[m.r.IntN(len(m.order))]
	m.clock.pass(time.Duration(1+m.r.IntN(100)) * time.Minute)
	switch m.r.IntN(20) {
	default:
		m.say("pull %s as %s", d.Encoded()[:6], name)
		if repositories[repository] == "" {
			m.hosted[name] = d
		}
		m.manifest(repository, m.images[d].body)
		m.tag(repository, tag, d)
		m.read[name] = m.clock.time()
		m.fetch(repository, d)
	case 8, 9:
		m.say("pull %s from %s by digest", d.Encoded()[:6], repository)
		m.fetch(repository, d)
	case 10, 11, 12, 13:
		if m.means(repository, tag) != "" {
			m.say("read %s", name)
			m.Keeper.Note(tree.Change{Kind: tree.Read, Repository: repository, Tag: tag, At: m.clock.time()})
			m.read[name] = m.clock.time()
		}
	case 14:
		ref, _ := oci.ParseReference(tag)
		if m.pinned[name] {
			m.say("unpin %s", name)
			if _, err := m.tree.Unpin(m.t.Context(), repository, ref); err != nil {
				m.t.Fatal(err)
			}
			delete(m.pinned, name)
		} else if m.means(repository, tag) != "" && len(m.pinned) < 3 {
			m.say("pin %s", name)
			if err := m.tree.Pin(m.t.Context(), repository, ref, m.clock.time()); err != nil {
				m.t.Fatal(err)
			}
			m.pinned[name] = true
		}
	case 15:
		m.say("restart")
		m.ready()
		m.restart()
	case 16:
		if m.r.IntN(2) == 0 {
			m.say("kill")
			m.forget()
		} else {
			m.say("kill, with all written")
			m.flush()
		}
		m.kill()
		m.start()
		m.ready() // or what is compared later counts as read then
	case 17:
		m.say("lose the catalog")
		m.stop()
		for _, end := range []string{"", "-wal", "-shm"} {
			os.Remove(filepath.Join(m.dir, "catalog.db"+end))
		}
		m.forget()
		m.start()
		m.ready()
	case 18:
		// Back is as possible as forward.
		jump := time.Duration(m.r.IntN(2000)-500) * time.Hour
		m.say("jump %v", jump)
		m.clock.pass(jump)
		m.forget()
	case 19:
		if repositories[repository] == "" {
			m.ready()
			if m.hosted[name] != "" {
				m.say("delete %s", name)
				if _, err := m.tree.DeleteTag(m.t.Context(), repository, tag, nil); err != nil {
					m.t.Fatal(err)
				}
				delete(m.hosted, name)
				delete(m.read, name)
			}
			m.say("gc")
			m.done(m.GC(false))
			for name, upstream := range repositories {
				if _, err := m.tree.Record(m.t.Context(), name); err != nil {
					m.repository(name, upstream) // as whoever comes for it next does
				}
			}
			return
		}
		m.say("purge %s", name)
		m.ready()
		m.done(m.Purge(repository+":"+tag, false))
	}
}

// forget says that nothing is known of when anything was read.
func (m *model) forget() { clear(m.read) }

// settle lets a budget be kept, and looks at everything.
func (m *model) settle() {
	m.clock.pass(10 * time.Minute) // nobody is at anything any more
	c := m.ready()
	m.flush()
	pinned := map[string]digest.Digest{}
	held := map[digest.Digest]bool{} // under what is pinned or hosted
	for name := range m.pinned {
		repository, tag, _ := cutTag(name)
		if d := m.means(repository, tag); d != "" {
			pinned[name] = d
			m.mark(repository, d, held)
		}
	}
	for name, d := range m.hosted {
		repository, _, _ := cutTag(name)
		m.mark(repository, d, held)
	}
	before, err := c.Usage(m.t.Context(), "")
	if err != nil {
		m.t.Fatal(err)
	}
	there := maps.Clone(m.read)
	maps.DeleteFunc(there, func(name string, _ time.Time) bool {
		repository, tag, _ := cutTag(name)
		return m.means(repository, tag) == ""
	})
	settings := Settings{Emit: m.settings.Emit}
	switch m.r.IntN(3) {
	case 0:
		settings.MaxSize = 1 + m.r.Int64N(before.Allocated+1)
	case 1:
		settings.Limits = map[string]Limit{"docker.io": {MaxSize: 1 + m.r.Int64N(before.Allocated+1)}}
	case 2:
		settings.Limits = map[string]Limit{"ghcr.io": {TTL: time.Duration(m.r.IntN(20)) * time.Hour}}
	}
	m.say("settle with %d and %v", settings.MaxSize, settings.Limits)
	m.Set(settings)
	m.relieved()
	if err := m.Flush(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	m.check(settings, pinned, held, there)
	m.Set(Settings{Emit: m.settings.Emit})
	m.ready()
	m.agrees(c)
	if m.t.Failed() {
		for _, line := range m.did {
			m.t.Log(line)
		}
		m.t.FailNow()
	}
	for name := range there {
		repository, tag, _ := cutTag(name)
		if m.means(repository, tag) == "" {
			delete(m.read, name)
		}
	}
}

// mark notes what is held of something.
func (m *model) mark(repository string, d digest.Digest, held map[digest.Digest]bool) {
	if _, err := m.store.Stat(m.t.Context(), layout.RevisionLink(repository, d)); err != nil {
		return
	}
	a := m.images[d]
	held[d] = true
	for _, l := range a.layers {
		l := digest.FromBytes(l)
		if _, err := m.store.Stat(m.t.Context(), layout.Blob(l)); err == nil {
			held[l] = true
		}
	}
	for _, child := range a.children {
		m.mark(repository, child, held)
	}
}

func (m *model) check(s Settings, pinned map[string]digest.Digest, held map[digest.Digest]bool, there map[string]time.Time) {
	ctx := m.t.Context()
	for name, d := range pinned {
		repository, tag, _ := cutTag(name)
		if m.means(repository, tag) != d {
			m.t.Errorf("%s was pinned and is gone", name)
		}
	}
	for name, d := range m.hosted {
		repository, tag, _ := cutTag(name)
		if m.means(repository, tag) != d {
			m.t.Errorf("%s is hosted and gone", name)
		}
	}
	for d := range held {
		if _, err := m.store.Stat(ctx, layout.Blob(d)); err != nil {
			m.t.Errorf("%s belongs to what is pinned or hosted: %v", d, err)
		}
	}
	// What is left is whole, but for what is larger than its budget.
	catalog := m.ready()
	for repository, upstream := range repositories {
		for listed, err := range m.tree.ListManifests(ctx, repository) {
			if err != nil {
				m.t.Fatal(err)
			}
			if _, err := m.store.Stat(ctx, layout.Blob(listed.Digest)); err != nil {
				m.t.Errorf("manifest %s of %s is lost: %v", listed.Digest, repository, err)
			}
		}
		limit := s.MaxSize
		if l, ok := s.Limits[upstream]; ok && upstream != "" {
			limit = max(limit, l.MaxSize)
			usage, err := catalog.Usage(ctx, upstream)
			if err != nil {
				m.t.Fatal(err)
			}
			if l.MaxSize > 0 && usage.Allocated > l.MaxSize {
				m.nothingLeft(upstream)
			}
			if l.TTL > 0 {
				old, err := catalog.Coldest(ctx, upstream, m.clock.time().Add(-l.TTL), 1)
				if err != nil || len(old) > 0 {
					m.t.Errorf("expired and still there: %v, %v", old, err)
				}
			}
		}
	}
	if used, _ := m.used(); s.MaxSize > 0 && used > s.MaxSize {
		m.nothingLeft("")
	}
	m.coldest(there)
}

// nothingLeft checks that nothing could be evicted any more.
func (m *model) nothingLeft(upstream string) {
	roots, err := m.ready().Coldest(m.t.Context(), upstream, time.Time{}, 10)
	if err != nil {
		m.t.Fatal(err)
	}
	blobs, err := m.ready().ColdestBlobs(m.t.Context(), upstream, 10)
	if err != nil {
		m.t.Fatal(err)
	}
	if len(roots) > 0 || len(blobs) > 0 {
		m.t.Errorf("over the budget of %q with %v and %v left", upstream, roots, blobs)
	}
}

// coldest checks that what went had not been read since what has stayed, in the
// same upstream.
func (m *model) coldest(there map[string]time.Time) {
	for gone, read := range there {
		repository, tag, _ := cutTag(gone)
		if m.means(repository, tag) != "" {
			continue
		}
		for stays, other := range there {
			repo, tag, _ := cutTag(stays)
			if m.means(repo, tag) == "" || m.pinned[stays] || repositories[repo] == "" || repositories[repo] != repositories[repository] {
				continue
			}
			if other.Before(read.Add(-time.Second)) {
				m.t.Errorf("%s, read at %v, was evicted, and %s, read at %v, stays", gone, read, stays, other)
			}
		}
	}
}

// TestModel: whatever happens, and whatever is deleted or collected, nothing pinned, hosted or referred to is missing,
// the budgets hold, the catalog is what the store is, and what goes is what was
// not read for longest.
func TestModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := newModel(t, seed)
			for range 5 {
				for range 20 {
					m.step()
				}
				m.settle()
			}
		})
	}
}
