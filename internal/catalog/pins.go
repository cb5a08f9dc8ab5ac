package catalog

import (
	"cmp"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// pin notes that something is pinned, under the name it has been pinned by, or
// is no more.
func (b *batch) pin(c tree.Change, on bool) {
	name := cmp.Or(c.Tag, c.Digest.String(), c.Canonical.String())
	repo := b.repository(c.Repository)
	switch was := repo.there && b.pinned(repo, name); {
	case was == on:
		return
	case on:
		repo = b.known(c.Repository)
		b.exec("INSERT INTO pins (repository, name) VALUES (?, ?)", repo.v.id, name)
		repo.v.pins++
	default:
		b.exec("DELETE FROM pins WHERE repository = ? AND name = ?", repo.v.id, name)
		repo.v.pins--
		repo.there = repo.v.present || repo.v.pins > 0
	}
	if c.Tag != "" {
		if t := b.tag(repo.v.id, name); t.there {
			t.v.pinned = on
		}
	} else if blob := b.blob(cmp.Or(c.Canonical, c.Digest)); blob != nil {
		b.repin(repo, blob, b.manifest(repo.v.id, blob.v.id))
	}
}

// repin finds out whether a manifest of a repository is pinned.
func (b *batch) repin(repo *row[repositoryRow], blob *row[blobRow], m *row[manifestRow]) {
	pinned := b.keeps(repo, blob)
	if m.there {
		m.v.pinned = pinned
	}
	if blob.v.tags > 0 {
		for _, t := range b.tagsOf(repo.v.id, blob.v.id) {
			t.v.kept = pinned
		}
	}
}

func (b *batch) pinned(repo *row[repositoryRow], name string) bool {
	var n int
	return repo.v.pins > 0 && b.scan("SELECT 1 FROM pins WHERE repository = ? AND name = ?", []any{repo.v.id, name}, &n)
}

// keeps says whether a manifest is pinned, by whatever digest.
func (b *batch) keeps(repo *row[repositoryRow], blob *row[blobRow]) bool {
	if repo.v.pins == 0 {
		return false
	}
	raw := []byte(blob.v.digest)
	if b.pinned(repo, unpack(raw).String()) {
		return true
	}
	for _, alias := range column[[]byte](b, "SELECT digest FROM aliases WHERE canonical = ?", raw) {
		if b.pinned(repo, unpack(alias).String()) {
			return true
		}
	}
	return false
}

// canonical returns what bytes lie under that have another digest than a sha256,
// if that is known.
func (b *batch) canonical(raw string) string {
	var canonical []byte
	if len(raw) != digest.SHA256.Size() && b.scan("SELECT canonical FROM aliases WHERE digest = ?", []any{[]byte(raw)}, &canonical) {
		return string(canonical)
	}
	return raw
}

// alias notes that bytes have another digest. What has been named by that is
// what lies under the canonical one from now on.
func (b *batch) alias(other, canonical digest.Digest) {
	from, to := pack(other), b.blob(canonical)
	if len(from) <= digest.SHA256.Size() || to == nil || len(to.v.digest) != digest.SHA256.Size() || b.canonical(from) != from {
		return
	}
	b.loadBlobs("digest = ?", []byte(from)) // not by blob, which makes one
	named := b.blobs[from]
	delete(b.blobs, from)
	b.insert("aliases", 2, []any{[]byte(from), []byte(to.v.digest)})
	if named != nil {
		b.blobs[from] = named
		b.rename(named, to)
	}
	if to.v.manifests == 0 && to.v.tags == 0 {
		return
	}
	b.flush()
	for _, id := range column[int64](b, "SELECT repository FROM manifests WHERE blob = ? UNION SELECT repository FROM tags WHERE blob = ?", to.v.id, to.v.id) {
		b.repin(b.repositoryWithID(id), to, b.manifest(id, to.v.id))
	}
}

// rename lets manifests that refer to one blob refer to another.
func (b *batch) rename(from, to *row[blobRow]) {
	b.flush()
	replace := func(ids []int64) (replaced []int64) {
		for _, id := range ids {
			if id == from.v.id {
				id = to.v.id
			}
			replaced = append(replaced, id)
		}
		return replaced
	}
	for _, id := range column[int64](b, `SELECT l.manifest FROM members m JOIN manifests x ON x.repository = m.repository JOIN layers l ON l.manifest = x.blob AND l.blob = m.blob WHERE m.blob = ? AND m.named > 0
		UNION SELECT parent FROM edges WHERE child = ? AND kind = 1
		UNION SELECT child FROM edges WHERE parent = ? AND kind = 2`, from.v.id, from.v.id, from.v.id) {
		by := b.blobWithID(id)
		r := b.refers(by)
		b.rewrite(by, &references{replace(r.layers), replace(r.children), replace([]int64{r.subject})[0]})
	}
}
