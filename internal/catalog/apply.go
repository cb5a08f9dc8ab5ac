package catalog

import (
	"context"
	"fmt"
	"slices"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// Apply writes down changes, in their order and all at once. A change that
// contradicts what is there replaces it; one that removes what is not there does
// nothing. So does the reading of what is not there.
func (c *Catalog) Apply(ctx context.Context, changes []tree.Change) error {
	return c.write(ctx, func(ctx context.Context) error {
		b := newBatch(ctx, c)
		b.prefetch(changes)
		for _, change := range changes {
			b.apply(change)
			if b.err != nil {
				return b.err
			}
		}
		b.flush()
		return b.err
	})
}

func (b *batch) apply(c tree.Change) {
	at := seconds(c.At)
	if c.Digest != "" && c.Canonical != "" {
		b.alias(c.Digest, c.Canonical)
	}
	switch c.Kind {
	case tree.Recorded:
		b.recorded(c.Repository, c.Record)
	case tree.Manifested:
		if blob := b.blob(c.Canonical); blob != nil {
			b.manifested(b.present(c.Repository), blob, c, at)
		}
	case tree.Linked:
		if blob := b.blob(c.Canonical); blob != nil {
			b.linked(b.present(c.Repository), blob, c.Size, at)
		}
	case tree.Tagged:
		if blob := b.blob(c.Canonical); blob != nil {
			b.tagged(b.present(c.Repository), c.Tag, blob, at)
		}
	case tree.Stored:
		if blob := b.blob(c.Canonical); blob != nil {
			b.store(blob, max(at, 1), c.Size)
			blob.v.touched = max(blob.v.touched, at)
		}
	case tree.Hashed:
		if blob := b.blob(c.Canonical); blob != nil && blob.v.stored > 0 {
			blob.v.hashed = at
		}
	case tree.Removed:
		if blob := b.blob(c.Canonical); blob != nil {
			b.store(blob, 0, blob.v.size)
			blob.v.hashed, blob.v.touched = 0, 0
		}
	case tree.Pinned:
		b.pin(c, true)
	case tree.Unpinned:
		b.pin(c, false)
	case tree.Read, tree.ReadBlob, tree.Untagged, tree.Unmanifested, tree.Unlinked, tree.Forgotten:
		repo := b.repository(c.Repository)
		if !repo.there {
			return
		}
		switch {
		case c.Kind == tree.Forgotten:
			b.forgotten(repo)
			return
		case c.Kind == tree.Untagged:
			b.untagged(repo, c.Tag)
			return
		case c.Kind == tree.Read && c.Tag != "":
			b.readTag(repo, c.Tag, at)
			return
		}
		blob := b.blob(c.Canonical)
		if blob == nil {
			return
		}
		switch c.Kind {
		case tree.Read:
			b.read(repo.v.id, blob.v.id, at, map[int64]bool{})
		case tree.ReadBlob:
			b.readBlob(repo, blob, at)
		case tree.Unmanifested:
			if b.manifest(repo.v.id, blob.v.id).there {
				b.leave(repo, blob)
			}
		case tree.Unlinked:
			b.unlinked(repo, blob)
		}
	default:
		b.fail(fmt.Errorf("a change of the unknown kind %d", c.Kind))
	}
}

// present returns a repository of which there is something in the store.
func (b *batch) present(name string) *row[repositoryRow] {
	r := b.known(name)
	if !r.v.present {
		r.v.present = true
		b.count(r, counts{repositories: 1, extra: repositoryExtra})
	}
	return r
}

// known returns a repository, with its row made.
func (b *batch) known(name string) *row[repositoryRow] {
	r := b.repository(name)
	if !r.there {
		if r.saved {
			b.flush() // it has been forgotten
		}
		r.v = repositoryRow{id: b.c.ids.repository.next(), name: name, class: tree.Hosted, upstream: whole}
		r.there = true
		b.repoByID[r.v.id] = r
	}
	return r
}

func (b *batch) recorded(name string, record *tree.Record) {
	r := b.present(name)
	class, upstream := tree.Hosted, whole
	if record != nil {
		r.v.created = seconds(record.Created)
		if record.Class == tree.Mirrored {
			class, upstream = tree.Mirrored, b.upstream(record.Upstream).v.id
		}
	}
	if r.v.class == class && r.v.upstream == upstream {
		return
	}
	b.reclass(r, class, upstream)
}

// reclass moves a repository to another upstream.
func (b *batch) reclass(r *row[repositoryRow], class tree.Class, upstream int64) {
	if r.v.tags == 0 && r.v.manifests == 0 && r.v.extra == repositoryExtra {
		b.rescope(r, class, upstream) // there is nothing in it
		return
	}
	b.flush()
	hosted := int64(0)
	if (class == tree.Hosted) != (r.v.class == tree.Hosted) {
		hosted = 1
		if class != tree.Hosted {
			hosted = -1
		}
	}
	for _, id := range column[int64](b, "SELECT blob FROM members WHERE repository = ?", r.v.id) {
		blob := b.blobWithID(id)
		blob.v.hosted += hosted
		if b.member(r.v.id, id).v.holds() {
			b.useBy(r.v.upstream, blob, -1)
			b.useBy(upstream, blob, 1)
		}
	}
	b.rescope(r, class, upstream)
	b.flush()
	scope := r.v.scope()
	if scope.Valid {
		b.exec("UPDATE manifests SET scope = ? WHERE repository = ? AND tags = 0 AND parents = 0 AND pinned = 0", scope.Int64, r.v.id)
		b.exec("UPDATE tags SET scope = ? WHERE repository = ? AND pinned = 0 AND kept = 0", scope.Int64, r.v.id)
	} else {
		b.exec("UPDATE manifests SET scope = NULL WHERE repository = ?", r.v.id)
		b.exec("UPDATE tags SET scope = NULL WHERE repository = ?", r.v.id)
	}
	b.manifests, b.tags, b.meaning = map[pair]*row[manifestRow]{}, map[tagKey]*row[tagRow]{}, map[pair]map[string]bool{}
}

// rescope moves what a repository counts by itself.
func (b *batch) rescope(r *row[repositoryRow], class tree.Class, upstream int64) {
	own := counts{repositories: 1, tags: r.v.tags, manifests: r.v.manifests, extra: r.v.extra}
	if r.v.upstream != whole {
		b.upstreamWithID(r.v.upstream).v.add(own, -1)
	}
	if upstream != whole {
		b.upstreamWithID(upstream).v.add(own, 1)
	}
	r.v.class, r.v.upstream = class, upstream
}

func (b *batch) linked(repo *row[repositoryRow], blob *row[blobRow], size, at int64) {
	b.stored(blob, size, at)
	blob.v.touched = max(blob.v.touched, at)
	if m := b.member(repo.v.id, blob.v.id); !m.v.linked {
		b.change(repo, blob, m, func(v *memberRow) { v.linked = true })
		b.count(repo, counts{extra: linkExtra})
	}
}

func (b *batch) unlinked(repo *row[repositoryRow], blob *row[blobRow]) {
	if m := b.member(repo.v.id, blob.v.id); m.v.linked {
		b.change(repo, blob, m, func(v *memberRow) { v.linked = false })
		b.count(repo, counts{extra: -linkExtra})
	}
}

func (b *batch) manifested(repo *row[repositoryRow], blob *row[blobRow], c tree.Change, at int64) {
	b.stored(blob, c.Size, at)
	if c.Manifest != nil && !blob.v.parsed {
		b.parse(blob, c.Manifest)
	}
	m := b.manifest(repo.v.id, blob.v.id)
	if !m.there {
		b.enter(repo, blob, manifestRow{})
	}
	m.v.since = at
	m.v.touched = max(m.v.touched, at)
}

// Kinds of edges.
const (
	isIndex   = 1
	isSubject = 2
)

// parse writes down what a manifest refers to.
func (b *batch) parse(blob *row[blobRow], m *oci.Manifest) {
	r := &references{}
	refer := func(to *[]int64, descriptors []v1.Descriptor) {
		for _, d := range descriptors {
			if blob := b.blob(d.Digest); blob != nil {
				b.expect(blob, d.Size)
				*to = append(*to, blob.v.id)
			}
		}
	}
	refer(&r.layers, m.Blobs)
	refer(&r.layers, m.Foreign)
	refer(&r.children, m.Children)
	if m.Subject != nil {
		if to := b.blob(m.Subject.Digest); to != nil {
			r.subject = to.v.id
		}
	}
	b.rewrite(blob, r)
}

// rewrite changes what a manifest refers to. Repositories may have it already,
// from a change that did not say what that is.
func (b *batch) rewrite(blob *row[blobRow], r *references) {
	var again []int64
	rows := map[int64]manifestRow{}
	if blob.v.manifests > 0 {
		b.flush()
		again = column[int64](b, "SELECT repository FROM manifests WHERE blob = ?", blob.v.id)
		for _, id := range again {
			rows[id] = b.manifest(id, blob.v.id).v
			b.leave(b.repositoryWithID(id), blob)
		}
	}
	var layers, edges []any
	r.layers, r.children = once(r.layers), once(r.children)
	for _, id := range r.layers {
		layers = append(layers, blob.v.id, id)
	}
	for _, id := range r.children {
		edges = append(edges, blob.v.id, isIndex, id)
	}
	if r.subject != 0 {
		b.blobWithID(r.subject).v.subjects++
		edges = append(edges, r.subject, isSubject, blob.v.id)
	}
	b.insert("layers", 2, layers)
	b.insert("edges", 3, edges)
	blob.v.parsed = true
	b.references[blob.v.id] = r
	for _, id := range again {
		b.enter(b.repositoryWithID(id), blob, rows[id])
	}
}

// once are numbers, each of them once.
func once(ids []int64) []int64 {
	slices.Sort(ids)
	return slices.Compact(ids)
}

// expect notes the size of bytes that are not there yet.
func (b *batch) expect(blob *row[blobRow], size int64) {
	if blob.v.stored == 0 && size > 0 {
		blob.v.size = size
	}
}

// enter makes a manifest one of a repository.
func (b *batch) enter(repo *row[repositoryRow], blob *row[blobRow], v manifestRow) {
	id := repo.v.id
	m := b.manifest(id, blob.v.id)
	m.v, m.there = manifestRow{since: v.since, touched: v.touched}, true
	b.entered = true
	blob.v.manifests++
	member := b.member(id, blob.v.id)
	b.change(repo, blob, member, func(v *memberRow) { v.manifest = true })
	b.count(repo, counts{manifests: 1, extra: linkExtra})
	b.repin(repo, blob, m)
	if blob.v.tags > 0 {
		m.v.tags = int64(len(b.tagsOf(id, blob.v.id)))
	}
	refs := b.refers(blob)
	if refs.subject != 0 && b.manifest(id, refs.subject).there {
		m.v.parents++
	}
	if member.v.named > 0 {
		for _, parent := range column[int64](b, "SELECT parent FROM edges WHERE child = ? AND kind = 1", blob.v.id) {
			if b.manifest(id, parent).there {
				m.v.parents++
			}
		}
	}
	b.refer(repo, blob, 1)
}

// leave undoes enter.
func (b *batch) leave(repo *row[repositoryRow], blob *row[blobRow]) {
	m := b.manifest(repo.v.id, blob.v.id)
	m.v, m.there = manifestRow{}, false
	b.refer(repo, blob, -1)
	blob.v.manifests--
	b.change(repo, blob, b.member(repo.v.id, blob.v.id), func(v *memberRow) { v.manifest = false })
	b.count(repo, counts{manifests: -1, extra: -linkExtra})
	if blob.v.manifests > 0 || !blob.v.parsed {
		return
	}
	if refs := b.refers(blob); refs.subject != 0 {
		b.blobWithID(refs.subject).v.subjects--
	}
	b.exec("DELETE FROM layers WHERE manifest = ?", blob.v.id)
	b.exec("DELETE FROM edges WHERE parent = ? AND kind = 1", blob.v.id)
	b.exec("DELETE FROM edges WHERE child = ? AND kind = 2", blob.v.id)
	delete(b.references, blob.v.id)
	blob.v.parsed = false
}

// refer tells what goes with a manifest of a repository, or is named by it, that
// it has come or gone.
func (b *batch) refer(repo *row[repositoryRow], blob *row[blobRow], sign int64) {
	name := func(to *row[blobRow]) {
		b.change(repo, to, b.member(repo.v.id, to.v.id), func(v *memberRow) {
			v.named += sign
			v.namers += sign * blob.v.id
		})
	}
	refs := b.refers(blob)
	for _, id := range refs.layers {
		name(b.blobWithID(id))
	}
	for _, id := range refs.children {
		name(b.blobWithID(id))
		if child := b.manifest(repo.v.id, id); child.there {
			child.v.parents += sign
		}
	}
	if blob.v.subjects == 0 {
		return
	}
	for _, id := range column[int64](b, "SELECT child FROM edges WHERE parent = ? AND kind = 2", blob.v.id) {
		if referrer := b.manifest(repo.v.id, id); referrer.there {
			referrer.v.parents += sign
		}
	}
}

func (b *batch) tagged(repo *row[repositoryRow], name string, blob *row[blobRow], at int64) {
	t := b.tag(repo.v.id, name)
	if t.there && t.v.blob == blob.v.id {
		t.v.since, t.v.touched = at, max(t.v.touched, at)
		return
	}
	extra := -tagExtra(t.v.meanings)
	if t.there {
		b.mean(repo, t, -1)
	} else {
		t.v = tagRow{pinned: b.pinned(repo, name)}
		t.there, extra = true, 0
		b.count(repo, counts{tags: 1})
	}
	t.v.blob, t.v.since, t.v.touched = blob.v.id, at, max(t.v.touched, at)
	t.v.meanings++
	t.v.kept = b.keeps(repo, blob)
	b.means(repo.v.id, blob.v.id, name)
	b.mean(repo, t, 1)
	b.count(repo, counts{extra: extra + tagExtra(t.v.meanings)})
}

func (b *batch) untagged(repo *row[repositoryRow], name string) {
	t := b.tag(repo.v.id, name)
	if !t.there {
		return
	}
	b.mean(repo, t, -1)
	b.count(repo, counts{tags: -1, extra: -tagExtra(t.v.meanings)})
	t.v, t.there = tagRow{}, false
}

// mean tells what a tag means that it does, or does no more.
func (b *batch) mean(repo *row[repositoryRow], t *row[tagRow], sign int64) {
	b.blobWithID(t.v.blob).v.tags += sign
	if m := b.manifest(repo.v.id, t.v.blob); m.there {
		m.v.tags += sign
	}
}

func (b *batch) readTag(repo *row[repositoryRow], name string, at int64) {
	t := b.tag(repo.v.id, name)
	if !t.there {
		return
	}
	t.v.touched = max(t.v.touched, at)
	if m := b.manifest(repo.v.id, t.v.blob); m.there {
		m.v.touched = max(m.v.touched, at)
	}
}

// read notes that a manifest has been read, and with it all that it goes with.
func (b *batch) read(repo, blob, at int64, seen map[int64]bool) {
	m := b.manifest(repo, blob)
	if !m.there || seen[blob] {
		return
	}
	seen[blob] = true
	m.v.touched = max(m.v.touched, at)
	if m.v.tags > 0 {
		for _, t := range b.tagsOf(repo, blob) {
			t.v.touched = max(t.v.touched, at)
		}
	}
	if m.v.parents > 0 {
		for _, id := range b.parentsOf(repo, blob) {
			b.read(repo, id, at, seen)
		}
	}
}

func (b *batch) readBlob(repo *row[repositoryRow], blob *row[blobRow], at int64) {
	m := b.member(repo.v.id, blob.v.id)
	if !m.there {
		return
	}
	if blob.v.stored > 0 {
		blob.v.touched = max(blob.v.touched, at)
	}
	if m.v.named == 1 {
		b.read(repo.v.id, m.v.namers, at, map[int64]bool{})
	}
}

// forgotten takes away all that is left of a repository but its pins.
func (b *batch) forgotten(repo *row[repositoryRow]) {
	if !repo.v.present {
		return
	}
	b.flush()
	for _, name := range column[string](b, "SELECT name FROM tags WHERE repository = ?", repo.v.id) {
		b.untagged(repo, name)
	}
	for _, id := range column[int64](b, "SELECT blob FROM manifests WHERE repository = ?", repo.v.id) {
		b.leave(repo, b.blobWithID(id))
	}
	b.flush()
	for _, id := range column[int64](b, "SELECT blob FROM members WHERE repository = ?", repo.v.id) {
		b.unlinked(repo, b.blobWithID(id))
	}
	b.reclass(repo, tree.Hosted, whole)
	b.count(repo, counts{repositories: -1, extra: -repositoryExtra})
	repo.v.present, repo.v.created = false, 0
	repo.there = repo.v.pins > 0
}
