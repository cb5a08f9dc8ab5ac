package catalog

import (
	"cmp"
	"maps"
	"slices"
)

// flush writes what has become different, in the order of the tables, where
// neighbours lie together. What has been read stays.
func (b *batch) flush() {
	for _, r := range b.upstreams {
		if r.changed() {
			b.flushUpstream(r.saved, &r.v)
			r.written()
		}
	}
	for _, r := range b.repositories {
		if r.changed() {
			b.flushRepository(r)
			r.written()
		}
	}
	b.flushBlobs()
	write(b, b.members, pair.compare, table[pair, memberRow]{
		name: "members", columns: 6,
		insert: func(k pair, v *memberRow) []any {
			return []any{k.a, k.b, v.linked, v.manifest, v.named, v.namers}
		},
		update: "UPDATE members SET linked = ?, manifest = ?, named = ?, namers = ? WHERE repository = ? AND blob = ?",
		remove: "DELETE FROM members WHERE repository = ? AND blob = ?",
		key:    pair.args,
	})
	write(b, b.uses, pair.compare, table[pair, useRow]{
		name: "uses", columns: 3,
		insert: func(k pair, v *useRow) []any { return []any{k.a, k.b, v.repositories} },
		update: "UPDATE uses SET repositories = ? WHERE blob = ? AND upstream = ?",
		remove: "DELETE FROM uses WHERE blob = ? AND upstream = ?",
		key:    pair.args,
	})
	for key, r := range b.manifests {
		if r.there {
			b.scopeManifest(key.a, &r.v)
		}
	}
	write(b, b.manifests, pair.compare, table[pair, manifestRow]{
		name: "manifests", columns: 8,
		insert: func(k pair, v *manifestRow) []any {
			return []any{k.a, k.b, v.since, v.touched, v.tags, v.parents, v.pinned, v.scope}
		},
		update: "UPDATE manifests SET since = ?, touched = ?, tags = ?, parents = ?, pinned = ?, scope = ? WHERE repository = ? AND blob = ?",
		remove: "DELETE FROM manifests WHERE repository = ? AND blob = ?",
		key:    pair.args,
	})
	b.entered = false
	for key, r := range b.tags {
		if r.there {
			b.scopeTag(key.repository, &r.v)
		}
	}
	write(b, b.tags, tagKey.compare, table[tagKey, tagRow]{
		name: "tags", columns: 9,
		insert: func(k tagKey, v *tagRow) []any {
			return []any{k.repository, k.name, v.blob, v.since, v.touched, v.meanings, v.pinned, v.kept, v.scope}
		},
		update: "UPDATE tags SET blob = ?, since = ?, touched = ?, meanings = ?, pinned = ?, kept = ?, scope = ? WHERE repository = ? AND name = ?",
		remove: "DELETE FROM tags WHERE repository = ? AND name = ?",
		key:    tagKey.args,
	})
}

func (p pair) compare(o pair) int { return cmp.Or(cmp.Compare(p.a, o.a), cmp.Compare(p.b, o.b)) }
func (p pair) args() []any        { return []any{p.a, p.b} }

func (t tagKey) compare(o tagKey) int {
	return cmp.Or(cmp.Compare(t.repository, o.repository), cmp.Compare(t.name, o.name))
}
func (t tagKey) args() []any { return []any{t.repository, t.name} }

// A table is how rows that have a key of two columns are written. The key is
// what insert begins with, and update and remove end with.
type table[K comparable, R any] struct {
	name           string
	columns        int
	insert         func(K, *R) []any
	update, remove string
	key            func(K) []any
}

// write writes the rows of a table that have become different.
func write[K, R comparable](b *batch, rows map[K]*row[R], compare func(K, K) int, t table[K, R]) {
	var inserts []any
	for _, k := range slices.SortedFunc(changed(rows), compare) {
		r := rows[k]
		switch {
		case !r.there:
			b.exec(t.remove, t.key(k)...)
		case r.saved:
			key := t.key(k)
			b.exec(t.update, append(t.insert(k, &r.v)[len(key):], key...)...)
		default:
			inserts = append(inserts, t.insert(k, &r.v)...)
		}
		r.written()
	}
	b.insert(t.name, t.columns, inserts)
}

func changed[K, R comparable](rows map[K]*row[R]) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k, r := range rows {
			if r.changed() && !yield(k) {
				return
			}
		}
	}
}

func (b *batch) flushUpstream(saved bool, v *upstreamRow) {
	if saved {
		b.exec("UPDATE upstreams SET repositories = ?, tags = ?, manifests = ?, blobs = ?, bytes = ?, blocks = ?, extra = ? WHERE id = ?",
			v.repositories, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra, v.id)
		return
	}
	b.insert("upstreams", 9, []any{v.id, v.name, v.repositories, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra})
}

func (b *batch) flushRepository(r *row[repositoryRow]) {
	v := &r.v
	switch {
	case !r.there:
		b.exec("DELETE FROM repositories WHERE id = ?", r.was.id)
		delete(b.repoByID, r.was.id)
	case r.saved:
		b.exec("UPDATE repositories SET present = ?, class = ?, upstream = ?, created = ?, pins = ?, tags = ?, manifests = ?, blobs = ?, bytes = ?, blocks = ?, extra = ? WHERE id = ?",
			v.present, string(v.class), v.upstream, v.created, v.pins, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra, v.id)
	default:
		b.insert("repositories", 13, []any{v.id, v.name, v.present, string(v.class), v.upstream, v.created, v.pins,
			v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra})
	}
}

func (b *batch) flushBlobs() {
	for _, r := range b.blobs {
		r.there = r.v.useful()
	}
	var inserts, loose []any
	for _, id := range slices.Sorted(maps.Keys(b.blobByID)) {
		r := b.blobByID[id]
		v := &r.v
		if r.changed() {
			if now, before := r.there && v.loose(), r.saved && r.was.loose(); now && !before {
				loose = append(loose, []byte(v.digest), v.id)
			} else if before && !now {
				b.exec("DELETE FROM loose WHERE digest = ?", []byte(v.digest))
			}
			switch {
			case !r.there:
				b.exec("DELETE FROM blobs WHERE id = ?", v.id)
			case r.saved:
				b.exec("UPDATE blobs SET size = ?, stored = ?, touched = ?, cold = ?, hashed = ?, members = ?, holders = ?, manifests = ?, hosted = ?, tags = ?, subjects = ?, parsed = ? WHERE id = ?",
					v.size, v.stored, v.touched, v.cold(), v.lastHashed(), v.members, v.holders, v.manifests, v.hosted, v.tags, v.subjects, v.parsed, v.id)
			default:
				inserts = append(inserts, v.id, []byte(v.digest), v.size, v.stored, v.touched, v.cold(), v.lastHashed(),
					v.members, v.holders, v.manifests, v.hosted, v.tags, v.subjects, v.parsed)
			}
			r.written()
		}
		r.there = true // a copy is always of use; see batch.blob
	}
	b.insert("blobs", 14, inserts)
	b.insert("loose", 2, loose)
}

func (b *batch) scopeManifest(repository int64, v *manifestRow) {
	v.scope = b.repositoryWithID(repository).v.scope()
	if v.tags > 0 || v.parents > 0 || v.pinned || !v.scope.Valid {
		v.scope.Int64, v.scope.Valid = 0, false
	}
}

func (b *batch) scopeTag(repository int64, v *tagRow) {
	v.scope = b.repositoryWithID(repository).v.scope()
	if v.pinned || v.kept || !v.scope.Valid {
		v.scope.Int64, v.scope.Valid = 0, false
	}
}
