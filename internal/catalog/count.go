package catalog

// What things take beside the bytes of blobs: each directory and each small
// file is a block.
const (
	block = 4096

	// linkExtra is a directory named after a digest, with the file link.
	linkExtra = 2 * block
	// repositoryExtra is its directory with _layers, its sha256, _manifests,
	// revisions, its sha256 and tags; and the record in a directory of its own.
	repositoryExtra = 9 * block
)

// tagExtra is the tag's directory with current and its link, and index, its
// sha256 and a link for each digest that the tag has meant. If that is more than
// one, the tag has a record.
func tagExtra(meanings int64) int64 {
	extra := 5*block + meanings*linkExtra
	if meanings > 1 {
		extra += block
	}
	return extra
}

// whole is the id of the upstream that counts the whole store.
const whole int64 = 1

func (c *counts) add(d counts, sign int64) {
	c.repositories += sign * d.repositories
	c.tags += sign * d.tags
	c.manifests += sign * d.manifests
	c.blobs += sign * d.blobs
	c.bytes += sign * d.bytes
	c.blocks += sign * d.blocks
	c.extra += sign * d.extra
}

func (c counts) usage() Usage {
	return Usage{Repositories: c.repositories, Tags: c.tags, Manifests: c.manifests, Blobs: c.blobs, Bytes: c.bytes, Allocated: c.blocks + c.extra}
}

// count counts what belongs to one repository only.
func (b *batch) count(repo *row[repositoryRow], d counts) {
	repo.v.add(d, 1)
	b.upstreamWithID(whole).v.add(d, 1)
	if repo.v.upstream != whole {
		b.upstreamWithID(repo.v.upstream).v.add(d, 1)
	}
}

// counts are those of the bytes of a blob: none if there are none.
func (b *blobRow) counts() counts {
	if b.stored == 0 {
		return counts{}
	}
	return counts{blobs: 1, bytes: b.size, blocks: (b.size+block-1)/block*block + block}
}

// stored notes that bytes are there, as what refers to them implies.
func (b *batch) stored(blob *row[blobRow], size, at int64) {
	if blob.v.stored == 0 || size >= 0 && size != blob.v.size {
		b.store(blob, max(at, 1), size)
	}
}

// store notes since when there are bytes of a blob, and how many, if that is
// known; or with 0 that there are none.
func (b *batch) store(blob *row[blobRow], at, size int64) {
	before := blob.v.counts()
	if size >= 0 {
		blob.v.size = size
	}
	blob.v.stored = at
	after := blob.v.counts()
	if before == after {
		return
	}
	count := func(c *counts) {
		c.add(before, -1)
		c.add(after, 1)
	}
	count(&b.upstreamWithID(whole).v.counts)
	if blob.v.holders == 0 {
		return
	}
	b.flush()
	for _, id := range column[int64](b, "SELECT upstream FROM uses WHERE blob = ?", blob.v.id) {
		count(&b.upstreamWithID(id).v.counts)
	}
	for _, id := range column[int64](b, "SELECT repository FROM members WHERE blob = ? AND (linked = 1 OR manifest = 1)", blob.v.id) {
		count(&b.repositoryWithID(id).v.counts)
	}
}

// useBy counts that one repository more, or less, of an upstream holds a blob.
func (b *batch) useBy(upstream int64, blob *row[blobRow], sign int64) {
	if upstream == whole {
		return // which counts what is stored
	}
	u := b.use(blob.v.id, upstream)
	before := u.there
	u.v.repositories += sign
	u.there = u.v.repositories > 0
	if u.there != before {
		b.upstreamWithID(upstream).v.add(blob.v.counts(), sign)
	}
}

// change changes what a blob is to a repository, and counts what follows.
func (b *batch) change(repo *row[repositoryRow], blob *row[blobRow], m *row[memberRow], change func(*memberRow)) {
	was, held := m.there, m.there && m.v.holds()
	change(&m.v)
	m.there = m.v != memberRow{}
	if m.there != was {
		sign := int64(1)
		if was {
			sign = -1
		}
		blob.v.members += sign
		if !repo.v.scope().Valid {
			blob.v.hosted += sign
		}
	}
	if holds := m.v.holds(); holds != held {
		sign := int64(1)
		if held {
			sign = -1
		}
		blob.v.holders += sign
		b.useBy(repo.v.upstream, blob, sign)
		repo.v.add(blob.v.counts(), sign)
	}
}
