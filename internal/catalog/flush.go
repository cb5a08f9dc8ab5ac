package catalog

// flush writes what has become different. What has been read stays.
func (b *batch) flush() {
	for _, r := range b.upstreams {
		if v := &r.v; r.changed() {
			b.upstreamTo(r.saved, v)
			r.written()
		}
	}
	for _, r := range b.repositories {
		if !r.changed() {
			continue
		}
		v := &r.v
		switch {
		case !r.there:
			b.exec("DELETE FROM repositories WHERE id = ?", r.was.id)
			delete(b.repoByID, r.was.id)
		case r.saved:
			b.exec("UPDATE repositories SET present = ?, class = ?, upstream = ?, created = ?, pins = ?, tags = ?, manifests = ?, blobs = ?, bytes = ?, blocks = ?, extra = ? WHERE id = ?",
				v.present, string(v.class), v.upstream, v.created, v.pins, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra, v.id)
		default:
			b.exec("INSERT INTO repositories ("+repositoryColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
				v.id, v.name, v.present, string(v.class), v.upstream, v.created, v.pins, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra)
		}
		r.written()
	}
	for _, r := range b.blobs {
		b.flushBlob(r)
	}
	for key, r := range b.members {
		if v := &r.v; r.changed() {
			switch {
			case !r.there:
				b.exec("DELETE FROM members WHERE repository = ? AND blob = ?", key.a, key.b)
			case r.saved:
				b.exec("UPDATE members SET linked = ?, manifest = ?, named = ?, namers = ? WHERE repository = ? AND blob = ?",
					v.linked, v.manifest, v.named, v.namers, key.a, key.b)
			default:
				b.exec("INSERT INTO members (repository, blob, linked, manifest, named, namers) VALUES (?, ?, ?, ?, ?, ?)",
					key.a, key.b, v.linked, v.manifest, v.named, v.namers)
			}
			r.written()
		}
	}
	for key, r := range b.uses {
		if v := &r.v; r.changed() {
			switch {
			case !r.there:
				b.exec("DELETE FROM uses WHERE blob = ? AND upstream = ?", key.a, key.b)
			case r.saved:
				b.exec("UPDATE uses SET repositories = ? WHERE blob = ? AND upstream = ?", v.repositories, key.a, key.b)
			default:
				b.exec("INSERT INTO uses (blob, upstream, repositories) VALUES (?, ?, ?)", key.a, key.b, v.repositories)
			}
			r.written()
		}
	}
	for key, r := range b.manifests {
		if r.there {
			b.scopeManifest(key.a, &r.v)
		}
		if v := &r.v; r.changed() {
			switch {
			case !r.there:
				b.exec("DELETE FROM manifests WHERE repository = ? AND blob = ?", key.a, key.b)
			case r.saved:
				b.exec("UPDATE manifests SET since = ?, touched = ?, tags = ?, parents = ?, pinned = ?, scope = ? WHERE repository = ? AND blob = ?",
					v.since, v.touched, v.tags, v.parents, v.pinned, v.scope, key.a, key.b)
			default:
				b.exec("INSERT INTO manifests (repository, blob, since, touched, tags, parents, pinned, scope) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
					key.a, key.b, v.since, v.touched, v.tags, v.parents, v.pinned, v.scope)
			}
			r.written()
		}
	}
	for key, r := range b.tags {
		if r.there {
			b.scopeTag(key.repository, &r.v)
		}
		if v := &r.v; r.changed() {
			switch {
			case !r.there:
				b.exec("DELETE FROM tags WHERE repository = ? AND name = ?", key.repository, key.name)
			case r.saved:
				b.exec("UPDATE tags SET blob = ?, since = ?, touched = ?, meanings = ?, pinned = ?, kept = ?, scope = ? WHERE repository = ? AND name = ?",
					v.blob, v.since, v.touched, v.meanings, v.pinned, v.kept, v.scope, key.repository, key.name)
			default:
				b.exec("INSERT INTO tags (repository, name, blob, since, touched, meanings, pinned, kept, scope) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
					key.repository, key.name, v.blob, v.since, v.touched, v.meanings, v.pinned, v.kept, v.scope)
			}
			r.written()
		}
	}
}

func (b *batch) upstreamTo(saved bool, v *upstreamRow) {
	if saved {
		b.exec("UPDATE upstreams SET repositories = ?, tags = ?, manifests = ?, blobs = ?, bytes = ?, blocks = ?, extra = ? WHERE id = ?",
			v.repositories, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra, v.id)
		return
	}
	b.exec("INSERT INTO upstreams ("+upstreamColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
		v.id, v.name, v.repositories, v.tags, v.manifests, v.blobs, v.bytes, v.blocks, v.extra)
}

func (b *batch) flushBlob(r *row[blobRow]) {
	r.there = r.v.useful()
	if !r.changed() {
		r.there = true
		return
	}
	v := &r.v
	if now, before := r.there && v.loose(), r.saved && r.was.loose(); now && !before {
		b.exec("INSERT INTO loose (digest, blob) VALUES (?, ?)", []byte(v.digest), v.id)
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
		b.exec("INSERT INTO blobs (id, digest, size, stored, touched, cold, hashed, members, holders, manifests, hosted, tags, subjects, parsed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
			v.id, []byte(v.digest), v.size, v.stored, v.touched, v.cold(), v.lastHashed(), v.members, v.holders, v.manifests, v.hosted, v.tags, v.subjects, v.parsed)
	}
	r.written()
	r.there = true // a copy is always of use; see batch.blob
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
