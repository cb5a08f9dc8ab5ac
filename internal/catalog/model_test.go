package catalog_test

import (
	"cmp"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// A model is a catalog in maps, which computes every answer from nothing.
type model struct {
	repositories map[string]*modelRepository
	blobs        map[digest.Digest]*modelBlob // that are stored
	parsed       map[digest.Digest]*oci.Manifest
	aliases      map[digest.Digest]digest.Digest // by what is no sha256
}

type modelRepository struct {
	present   bool
	class     tree.Class
	upstream  string
	created   time.Time
	tags      map[string]*modelTag
	manifests map[digest.Digest]*modelManifest
	links     map[digest.Digest]bool
	pins      map[string]bool
}

type modelTag struct {
	digest      digest.Digest
	since, read time.Time
	meanings    int64
}

type modelManifest struct{ since, read time.Time }

type modelBlob struct {
	size                 int64
	stored, read, hashed time.Time
}

func newModel() *model {
	return &model{map[string]*modelRepository{}, map[digest.Digest]*modelBlob{}, map[digest.Digest]*oci.Manifest{}, map[digest.Digest]digest.Digest{}}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func (m *model) known(name string) *modelRepository {
	r := m.repositories[name]
	if r == nil {
		r = &modelRepository{class: tree.Hosted, tags: map[string]*modelTag{}, manifests: map[digest.Digest]*modelManifest{}, links: map[digest.Digest]bool{}, pins: map[string]bool{}}
		m.repositories[name] = r
	}
	return r
}

func (m *model) present(name string) *modelRepository {
	r := m.known(name)
	r.present = true
	return r
}

func (m *model) store(d digest.Digest, size int64, at time.Time, always bool) *modelBlob {
	b := m.blobs[d]
	switch {
	case b == nil:
		b = &modelBlob{size: max(size, 0), stored: at}
		m.blobs[d] = b
	case always, size >= 0 && b.size != size:
		b.stored = at
		if size >= 0 {
			b.size = size
		}
	}
	return b
}

func (m *model) apply(c tree.Change) {
	d := c.Canonical
	if d != "" && c.Digest != "" {
		m.aliases[c.Digest] = d
	}
	switch c.Kind {
	case tree.Recorded:
		r := m.present(c.Repository)
		r.class, r.upstream, r.created = c.Record.Class, c.Record.Upstream, c.Record.Created
		if r.class != tree.Mirrored {
			r.class, r.upstream = tree.Hosted, ""
		}
		return
	case tree.Manifested:
		r := m.present(c.Repository)
		m.store(d, c.Size, c.At, false)
		if c.Manifest != nil {
			m.parsed[d] = c.Manifest
		}
		if r.manifests[d] == nil {
			r.manifests[d] = &modelManifest{}
		}
		r.manifests[d].since, r.manifests[d].read = c.At, later(r.manifests[d].read, c.At)
		return
	case tree.Linked:
		b := m.store(d, c.Size, c.At, false)
		b.read = later(b.read, c.At)
		m.present(c.Repository).links[d] = true
		return
	case tree.Tagged:
		r := m.present(c.Repository)
		t := r.tags[c.Tag]
		if t == nil {
			t = &modelTag{}
			r.tags[c.Tag] = t
		}
		if t.digest != d {
			t.meanings++
		}
		t.digest, t.since, t.read = d, c.At, later(t.read, c.At)
		return
	case tree.Stored:
		b := m.store(d, c.Size, c.At, true)
		b.read = later(b.read, c.At)
		return
	case tree.Hashed:
		if b := m.blobs[d]; b != nil {
			b.hashed = c.At
		}
		return
	case tree.Removed:
		delete(m.blobs, d)
		return
	case tree.Pinned:
		m.known(c.Repository).pins[cmp.Or(c.Tag, c.Digest.String(), d.String())] = true
		return
	}
	r := m.repositories[c.Repository]
	if r == nil {
		return
	}
	switch c.Kind {
	case tree.Unpinned:
		delete(r.pins, cmp.Or(c.Tag, c.Digest.String(), d.String()))
	case tree.Read:
		if c.Tag == "" {
			m.read(r, d, c.At)
		} else if t := r.tags[c.Tag]; t != nil {
			t.read = later(t.read, c.At)
			if man := r.manifests[t.digest]; man != nil {
				man.read = later(man.read, c.At)
			}
		}
	case tree.ReadBlob:
		namers := m.namers(r, d)
		if b := m.blobs[d]; b != nil && m.member(r, d) {
			b.read = later(b.read, c.At)
		}
		if len(namers) == 1 {
			m.read(r, namers[0], c.At)
		}
	case tree.Untagged:
		delete(r.tags, c.Tag)
	case tree.Unmanifested:
		delete(r.manifests, d)
	case tree.Unlinked:
		delete(r.links, d)
	case tree.Forgotten:
		*r = modelRepository{class: tree.Hosted, tags: map[string]*modelTag{}, manifests: map[digest.Digest]*modelManifest{}, links: map[digest.Digest]bool{}, pins: r.pins}
	}
	m.tidy()
}

// tidy forgets what no repository has: what its manifests refer to, and
// repositories of which nothing is known.
func (m *model) tidy() {
	maps.DeleteFunc(m.parsed, func(d digest.Digest, _ *oci.Manifest) bool {
		for _, r := range m.repositories {
			if r.manifests[d] != nil {
				return false
			}
		}
		return true
	})
	maps.DeleteFunc(m.repositories, func(_ string, r *modelRepository) bool { return !r.present && len(r.pins) == 0 })
}

func (m *model) read(r *modelRepository, d digest.Digest, at time.Time) {
	man := r.manifests[d]
	if man == nil {
		return
	}
	man.read = later(man.read, at)
	for _, t := range r.tags {
		if t.digest == d {
			t.read = later(t.read, at)
		}
	}
	for _, parent := range m.parents(r, d) {
		m.read(r, parent, at)
	}
}

func (m *model) resolve(d digest.Digest) digest.Digest { return cmp.Or(m.aliases[d], d) }

func (m *model) has(descriptors []v1.Descriptor, d digest.Digest) bool {
	return slices.ContainsFunc(descriptors, func(v v1.Descriptor) bool { return m.resolve(v.Digest) == d })
}

// pinned says whether a manifest is pinned, by whatever digest.
func (m *model) pinned(r *modelRepository, d digest.Digest) bool {
	for pin := range r.pins {
		if m.resolve(digest.Digest(pin)) == d {
			return true
		}
	}
	return false
}

// restart forgets the digests of what is not there any more.
func (m *model) restart() {
	maps.DeleteFunc(m.aliases, func(_, d digest.Digest) bool {
		if m.blobs[d] != nil || m.referenced(d) {
			return false
		}
		for _, p := range m.parsed {
			if p.Subject != nil && m.resolve(p.Subject.Digest) == d {
				return false
			}
		}
		return true
	})
}

// namers are the manifests of a repository that name a blob.
func (m *model) namers(r *modelRepository, d digest.Digest) (namers []digest.Digest) {
	for by := range r.manifests {
		if p := m.parsed[by]; p != nil && (m.has(p.Blobs, d) || m.has(p.Children, d)) {
			namers = append(namers, by)
		}
	}
	return namers
}

// parents are the manifests of a repository that a manifest goes with.
func (m *model) parents(r *modelRepository, d digest.Digest) (parents []digest.Digest) {
	for by := range r.manifests {
		if p := m.parsed[by]; p != nil && m.has(p.Children, d) {
			parents = append(parents, by)
		}
	}
	if p := m.parsed[d]; p != nil && p.Subject != nil && r.manifests[m.resolve(p.Subject.Digest)] != nil {
		parents = append(parents, m.resolve(p.Subject.Digest))
	}
	return parents
}

func (m *model) holds(r *modelRepository, d digest.Digest) bool {
	return r.links[d] || r.manifests[d] != nil
}

func (m *model) member(r *modelRepository, d digest.Digest) bool {
	return m.holds(r, d) || len(m.namers(r, d)) > 0
}

func (m *model) referenced(d digest.Digest) bool {
	for _, r := range m.repositories {
		if m.member(r, d) {
			return true
		}
		for _, t := range r.tags {
			if t.digest == d {
				return true
			}
		}
	}
	return false
}

func (m *model) usage(in func(*modelRepository) bool, stored func(digest.Digest) bool) (u catalog.Usage) {
	const block = 4096
	for _, r := range m.repositories {
		if !r.present || !in(r) {
			continue
		}
		u.Repositories++
		u.Tags += int64(len(r.tags))
		u.Manifests += int64(len(r.manifests))
		u.Allocated += 9*block + int64(len(r.links)+len(r.manifests))*2*block
		for _, t := range r.tags {
			u.Allocated += 5*block + t.meanings*2*block
			if t.meanings > 1 {
				u.Allocated += block
			}
		}
	}
	for d, b := range m.blobs {
		if stored(d) {
			u.Blobs++
			u.Bytes += b.size
			u.Allocated += (b.size+block-1)/block*block + block
		}
	}
	return u
}

func (m *model) usageOf(upstream string) catalog.Usage {
	in := func(r *modelRepository) bool {
		return upstream == "" || r.class == tree.Mirrored && r.upstream == upstream
	}
	return m.usage(in, func(d digest.Digest) bool {
		if upstream == "" {
			return true
		}
		for _, r := range m.repositories {
			if in(r) && m.holds(r, d) {
				return true
			}
		}
		return false
	})
}

func (m *model) coldest(upstream string, before time.Time) (roots []catalog.Root) {
	add := func(root catalog.Root) {
		if before.IsZero() || root.Read.Before(before) {
			roots = append(roots, root)
		}
	}
	for name, r := range m.repositories {
		if r.class != tree.Mirrored || upstream != "" && r.upstream != upstream {
			continue
		}
		tagged := map[digest.Digest]bool{}
		for tag, t := range r.tags {
			tagged[t.digest] = true
			if !r.pins[tag] && !m.pinned(r, t.digest) {
				add(catalog.Root{Repository: name, Tag: tag, Digest: t.digest, Read: t.read})
			}
		}
		for d, man := range r.manifests {
			if !tagged[d] && !m.pinned(r, d) && len(m.parents(r, d)) == 0 {
				add(catalog.Root{Repository: name, Digest: d, Read: man.read})
			}
		}
	}
	slices.SortFunc(roots, func(a, b catalog.Root) int {
		return cmp.Or(a.Read.Compare(b.Read), cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.Tag, b.Tag), cmp.Compare(a.Digest, b.Digest))
	})
	return roots
}

// removal computes what goes with a root: what goes with nothing else, and so on
// until nothing more does.
func (m *model) removal(root catalog.Root) catalog.Removal {
	out := catalog.Removal{Root: root}
	r := m.repositories[root.Repository]
	if r == nil || root.Tag != "" && (r.tags[root.Tag] == nil || r.tags[root.Tag].digest != root.Digest) {
		return out
	}
	gone := map[digest.Digest]bool{}
	free := func(d digest.Digest) bool {
		if r.manifests[d] == nil || m.pinned(r, d) {
			return false
		}
		for tag, t := range r.tags {
			if t.digest == d && tag != root.Tag {
				return false
			}
		}
		return !slices.ContainsFunc(m.parents(r, d), func(p digest.Digest) bool { return !gone[p] })
	}
	if !free(root.Digest) {
		return out
	}
	gone[root.Digest] = true
	for more := true; more; {
		more = false
		for d := range r.manifests {
			if !gone[d] && free(d) && slices.ContainsFunc(m.parents(r, d), func(p digest.Digest) bool { return gone[p] }) {
				gone[d], more = true, true
			}
		}
	}
	without := newModel()
	for name, r := range m.repositories {
		copied := *r
		copied.links, copied.manifests, copied.tags = maps.Clone(r.links), maps.Clone(r.manifests), maps.Clone(r.tags)
		without.repositories[name] = &copied
	}
	without.parsed, without.aliases = m.parsed, m.aliases
	own := without.repositories[root.Repository]
	delete(own.tags, root.Tag)
	named := map[digest.Digest]bool{}
	for d := range gone {
		delete(own.manifests, d)
		out.Manifests = append(out.Manifests, d)
		named[d] = named[d] || len(m.namers(r, d)) > 0 || r.links[d]
		if p := m.parsed[d]; p != nil {
			for _, v := range slices.Concat(p.Blobs, p.Children) {
				named[m.resolve(v.Digest)] = true
			}
		}
	}
	for d := range named {
		if own.links[d] && len(without.namers(own, d)) == 0 {
			delete(own.links, d)
			out.Links = append(out.Links, d)
		}
	}
	for d, b := range m.blobs {
		if (gone[d] || slices.Contains(out.Links, d)) && !without.referenced(d) {
			out.Blobs = append(out.Blobs, d)
			out.Bytes += b.size
		}
	}
	return out
}

func (m *model) coldestBlobs(upstream string) (found []catalog.Blob) {
	pinned := map[digest.Digest]bool{}
	for _, r := range m.repositories {
		var walk func(d digest.Digest)
		walk = func(d digest.Digest) {
			if p := m.parsed[d]; r.manifests[d] != nil && p != nil {
				for _, v := range p.Blobs {
					pinned[m.resolve(v.Digest)] = true
				}
				for _, v := range p.Children {
					walk(m.resolve(v.Digest))
				}
			}
		}
		for pin := range r.pins {
			if t := r.tags[pin]; t != nil {
				walk(t.digest)
			}
			walk(m.resolve(digest.Digest(pin)))
		}
	}
	for d, b := range m.blobs {
		use := false
		for _, r := range m.repositories {
			if r.manifests[d] != nil || r.class == tree.Hosted && m.member(r, d) {
				use = false
				break
			}
			use = use || m.holds(r, d)
		}
		if use && upstream != "" {
			use = false
			for _, r := range m.repositories {
				use = use || r.upstream == upstream && m.holds(r, d)
			}
		}
		if use && !pinned[d] {
			found = append(found, m.blob(d, b))
		}
	}
	sortBlobs(found, func(b catalog.Blob) time.Time { return b.Read })
	return found
}

func (m *model) blob(d digest.Digest, b *modelBlob) catalog.Blob {
	return catalog.Blob{Digest: d, Size: b.size, Stored: b.stored, Read: b.read, Hashed: b.hashed}
}

func sortBlobs(blobs []catalog.Blob, by func(catalog.Blob) time.Time) {
	slices.SortFunc(blobs, func(a, b catalog.Blob) int {
		return cmp.Or(by(a).Compare(by(b)), cmp.Compare(a.Digest, b.Digest))
	})
}

func (m *model) tagBytes(r *modelRepository, d digest.Digest) (n int64) {
	seen := map[digest.Digest]bool{}
	add := func(d digest.Digest) {
		if b := m.blobs[d]; b != nil && !seen[d] {
			n += b.size
		}
		seen[d] = true
	}
	var walk func(d digest.Digest)
	walk = func(d digest.Digest) {
		if r.manifests[d] == nil {
			return
		}
		add(d)
		if p := m.parsed[d]; p != nil {
			for _, v := range p.Blobs {
				add(m.resolve(v.Digest))
			}
			for _, v := range p.Children {
				walk(m.resolve(v.Digest))
			}
		}
	}
	walk(d)
	return n
}

// A world is what random changes speak of.
type world struct {
	random       *rand.Rand
	now          int64
	repositories []string
	blobs        []digest.Digest
	manifests    []digest.Digest
	content      map[digest.Digest]*oci.Manifest
	sizes        map[digest.Digest]int64
	others       map[digest.Digest]digest.Digest // the sha512 of all
}

func newWorld(seed uint64) *world {
	w := &world{random: rand.New(rand.NewPCG(seed, 1)), now: 1000, content: map[digest.Digest]*oci.Manifest{}, sizes: map[digest.Digest]int64{}, others: map[digest.Digest]digest.Digest{}}
	w.repositories = []string{"docker.io/library/a", "docker.io/b", "quay.io/c", "quay.io/a/d", "apps/web", "apps/old"}
	for range 16 {
		d := w.digest("blob " + strings.Repeat("b", len(w.blobs)))
		w.blobs = append(w.blobs, d)
		w.sizes[d] = w.random.Int64N(3) * w.random.Int64N(9000)
	}
	// A manifest names only those before it, as hashes have it.
	for i := range 20 {
		d := w.digest("manifest " + strings.Repeat("m", i))
		m := &oci.Manifest{}
		if i > 6 && w.random.IntN(3) == 0 {
			for range 1 + w.random.IntN(3) {
				m.Children = append(m.Children, w.descriptor(w.manifests[w.random.IntN(i)]))
			}
		} else {
			for range w.random.IntN(5) { // the same twice at times
				m.Blobs = append(m.Blobs, w.descriptor(w.blobs[w.random.IntN(len(w.blobs))]))
			}
		}
		if i > 2 && w.random.IntN(4) == 0 {
			s := w.descriptor(w.manifests[w.random.IntN(i)])
			m.Subject = &s
		}
		w.manifests, w.content[d], w.sizes[d] = append(w.manifests, d), m, int64(100+i)
	}
	return w
}

func (w *world) descriptor(d digest.Digest) v1.Descriptor {
	if w.random.IntN(6) == 0 {
		return v1.Descriptor{Digest: w.others[d], Size: w.sizes[d]}
	}
	return v1.Descriptor{Digest: d, Size: w.sizes[d]}
}

func (w *world) digest(content string) digest.Digest {
	d := digest.FromString(content)
	w.others[d] = digest.SHA512.FromString(content)
	return d
}

func (w *world) time() time.Time {
	if w.random.IntN(50) == 0 {
		w.now -= w.random.Int64N(30) // clocks jump
	}
	w.now += w.random.Int64N(3)
	return time.Unix(w.now, 0).UTC()
}

func pick[T any](w *world, from []T) T { return from[w.random.IntN(len(from))] }

func (w *world) change() tree.Change {
	repository, tag := pick(w, w.repositories), pick(w, []string{"latest", "1", "1.2", "X"})
	blob, manifest := pick(w, w.blobs), pick(w, w.manifests)
	c := tree.Change{Repository: repository, At: w.time()}
	if w.random.IntN(40) == 0 { // what is a blob here is a manifest there
		blob, manifest = manifest, blob
	}
	named := func(kind tree.ChangeKind) tree.Change {
		c.Kind, c.Canonical = kind, manifest
		if w.random.IntN(2) == 0 {
			c.Tag, c.Canonical = tag, ""
		} else if kind != tree.Read && w.random.IntN(3) == 0 {
			c.Digest = w.others[manifest]
			if w.random.IntN(2) == 0 {
				c.Canonical = "" // it is not held, as far as the tree knows
			}
		}
		return c
	}
	size := func(d digest.Digest) int64 {
		switch w.random.IntN(30) {
		case 0:
			return w.sizes[d] + 5000
		case 1:
			return -1
		}
		return w.sizes[d]
	}
	switch n := w.random.IntN(100); {
	case n < 4:
		c.Kind = tree.Recorded
		c.Record = &tree.Record{Class: tree.Hosted, Created: c.At}
		if upstream, _, _ := strings.Cut(repository, "/"); upstream != "apps" && w.random.IntN(8) > 0 {
			c.Record.Class, c.Record.Upstream = tree.Mirrored, upstream
		}
	case n < 24:
		c.Kind, c.Canonical, c.Size, c.Manifest = tree.Manifested, manifest, size(manifest), w.content[manifest]
		if w.random.IntN(10) == 0 {
			c.Manifest = nil
		}
	case n < 38:
		c.Kind, c.Canonical, c.Size = tree.Linked, blob, size(blob)
	case n < 50:
		c.Kind, c.Tag, c.Canonical = tree.Tagged, tag, manifest
	case n < 58:
		return named(tree.Read)
	case n < 65:
		c.Kind, c.Canonical = tree.ReadBlob, blob
	case n < 68:
		return named(tree.Pinned)
	case n < 72:
		return named(tree.Unpinned)
	case n < 75:
		c.Kind, c.Canonical, c.Size = tree.Stored, blob, size(blob)
	case n < 78:
		c.Kind, c.Canonical = tree.Hashed, pick(w, []digest.Digest{blob, manifest})
	case n < 83:
		c.Kind, c.Tag = tree.Untagged, tag
	case n < 90:
		c.Kind, c.Canonical = tree.Unmanifested, manifest
	case n < 95:
		c.Kind, c.Canonical = tree.Unlinked, blob
	case n < 99:
		c.Kind, c.Canonical = tree.Removed, pick(w, []digest.Digest{blob, manifest})
	default:
		c.Kind = tree.Forgotten
	}
	switch c.Kind {
	case tree.Manifested, tree.Linked, tree.Tagged:
		if w.random.IntN(12) == 0 {
			c.Digest = w.others[c.Canonical]
		}
	}
	return c
}
