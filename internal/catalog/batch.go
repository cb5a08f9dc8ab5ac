package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// A batch is changes that are written in one transaction. It has a copy of each
// row it touches, changes that, and writes at the end what has become
// different; so that a row is read and written once however many changes touch
// it, and no statement is peculiar to one database. Only layers and edges are
// written at once.
//
// The first error stays in err. After it everything reads as absent, and what is
// computed is thrown away.
type batch struct {
	ctx context.Context
	c   *Catalog
	err error

	upstreams    map[string]*row[upstreamRow]
	upstreamByID map[int64]*row[upstreamRow]
	repositories map[string]*row[repositoryRow]
	repoByID     map[int64]*row[repositoryRow]
	blobs        map[string]*row[blobRow]
	blobByID     map[int64]*row[blobRow]
	members      map[pair]*row[memberRow]
	uses         map[pair]*row[useRow]
	manifests    map[pair]*row[manifestRow]
	tags         map[tagKey]*row[tagRow]
	meaning      map[pair]map[string]bool // repository, blob: tags in tags that have meant it
	references   map[int64]*references
}

// A row is a copy of one in the database.
type row[R comparable] struct {
	v     R
	there bool // it exists
	was   R    // in the database
	saved bool // it exists in the database
}

// changed says that the database has to learn of it.
func (r *row[R]) changed() bool { return r.there != r.saved || r.there && r.v != r.was }

func (r *row[R]) written() { r.was, r.saved = r.v, r.there }

type pair struct{ a, b int64 }

type tagKey struct {
	repository int64
	name       string
}

type counts struct {
	repositories, tags, manifests, blobs, bytes, blocks, extra int64
}

type upstreamRow struct {
	id   int64
	name string
	counts
}

type repositoryRow struct {
	id       int64
	name     string
	present  bool
	class    tree.Class
	upstream int64
	created  int64
	pins     int64
	counts
}

// scope is where the roots of a repository are evicted from.
func (r *repositoryRow) scope() sql.NullInt64 {
	return sql.NullInt64{Int64: r.upstream, Valid: r.class == tree.Mirrored}
}

type blobRow struct {
	id                                                  int64
	digest                                              string
	size, stored, touched, hashed                       int64
	members, holders, manifests, hosted, tags, subjects int64
	parsed                                              bool
}

func (b *blobRow) cold() sql.NullInt64 {
	return sql.NullInt64{Int64: b.touched, Valid: b.stored > 0 && b.manifests == 0}
}

func (b *blobRow) lastHashed() sql.NullInt64 {
	return sql.NullInt64{Int64: b.hashed, Valid: b.stored > 0}
}

func (b *blobRow) loose() bool { return b.stored > 0 && b.members == 0 && b.tags == 0 }

// useful says that there is a reason for the row.
func (b *blobRow) useful() bool {
	return b.stored > 0 || b.members > 0 || b.tags > 0 || b.subjects > 0
}

type memberRow struct {
	linked, manifest bool
	named, namers    int64
}

func (m memberRow) holds() bool { return m.linked || m.manifest }

type useRow struct{ repositories int64 }

type manifestRow struct {
	since, touched, tags, parents int64
	pinned                        bool
	scope                         sql.NullInt64
}

type tagRow struct {
	blob, since, touched, meanings int64
	pinned, kept                   bool
	scope                          sql.NullInt64
}

// references are what a manifest refers to.
type references struct {
	layers, children []int64
	subject          int64 // 0: none
}

func newBatch(ctx context.Context, c *Catalog) *batch {
	b := &batch{ctx: ctx, c: c}
	b.forget()
	return b
}

// forget drops all copies.
func (b *batch) forget() {
	b.upstreams, b.upstreamByID = map[string]*row[upstreamRow]{}, map[int64]*row[upstreamRow]{}
	b.repositories, b.repoByID = map[string]*row[repositoryRow]{}, map[int64]*row[repositoryRow]{}
	b.blobs, b.blobByID = map[string]*row[blobRow]{}, map[int64]*row[blobRow]{}
	b.members = map[pair]*row[memberRow]{}
	b.uses = map[pair]*row[useRow]{}
	b.manifests = map[pair]*row[manifestRow]{}
	b.tags = map[tagKey]*row[tagRow]{}
	b.meaning = map[pair]map[string]bool{}
	b.references = map[int64]*references{}
}

func (b *batch) fail(err error) {
	if b.err == nil && err != nil {
		b.err = err
	}
}

// exec runs one statement.
func (b *batch) exec(query string, args ...any) {
	if b.err != nil {
		return
	}
	stmt, err := b.c.writing(b.ctx, query)
	if err == nil {
		_, err = stmt.ExecContext(b.ctx, args...)
	}
	b.fail(err)
}

// scan reads one row, and reports whether there is one.
func (b *batch) scan(query string, args []any, into ...any) bool {
	if b.err != nil {
		return false
	}
	stmt, err := b.c.writing(b.ctx, query)
	if err == nil {
		err = stmt.QueryRowContext(b.ctx, args...).Scan(into...)
	}
	if errors.Is(err, sql.ErrNoRows) {
		return false
	}
	b.fail(err)
	return err == nil
}

// column reads one column of all rows.
func column[T any](b *batch, query string, args ...any) (all []T) {
	if b.err != nil {
		return nil
	}
	stmt, err := b.c.writing(b.ctx, query)
	if err != nil {
		b.fail(err)
		return nil
	}
	rows, err := stmt.QueryContext(b.ctx, args...)
	if err != nil {
		b.fail(err)
		return nil
	}
	defer rows.Close()
	for rows.Next() {
		var v T
		if err := rows.Scan(&v); err != nil {
			b.fail(err)
			return nil
		}
		all = append(all, v)
	}
	b.fail(rows.Err())
	return all
}

const upstreamColumns = "id, name, repositories, tags, manifests, blobs, bytes, blocks, extra"

func (b *batch) loadUpstream(where string, arg any) *row[upstreamRow] {
	r := &row[upstreamRow]{}
	v := &r.v
	r.there = b.scan("SELECT "+upstreamColumns+" FROM upstreams WHERE "+where, []any{arg},
		&v.id, &v.name, &v.repositories, &v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
	if r.there {
		r.written()
		b.upstreams[v.name], b.upstreamByID[v.id] = r, r
	}
	return r
}

// upstream returns the upstream with a name, and makes it if there is none.
func (b *batch) upstream(name string) *row[upstreamRow] {
	if r := b.upstreams[name]; r != nil {
		return r
	}
	r := b.loadUpstream("name = ?", name)
	if !r.there {
		r.v.id, r.v.name, r.there = b.c.ids.upstream.next(), name, true
		b.upstreams[name], b.upstreamByID[r.v.id] = r, r
	}
	return r
}

func (b *batch) upstreamWithID(id int64) *row[upstreamRow] {
	if r := b.upstreamByID[id]; r != nil {
		return r
	}
	return b.loadUpstream("id = ?", id)
}

const repositoryColumns = "id, name, present, class, upstream, created, pins, tags, manifests, blobs, bytes, blocks, extra"

func (b *batch) loadRepository(where string, arg any) *row[repositoryRow] {
	r := &row[repositoryRow]{}
	v := &r.v
	r.there = b.scan("SELECT "+repositoryColumns+" FROM repositories WHERE "+where, []any{arg},
		&v.id, &v.name, &v.present, &v.class, &v.upstream, &v.created, &v.pins,
		&v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
	if r.there {
		r.written()
		b.repositories[v.name], b.repoByID[v.id] = r, r
	}
	return r
}

// repository returns a repository; not there if it is not known.
func (b *batch) repository(name string) *row[repositoryRow] {
	r := b.repositories[name]
	if r == nil {
		r = b.loadRepository("name = ?", name)
		r.v.name = name
		b.repositories[name] = r
	}
	return r
}

func (b *batch) repositoryWithID(id int64) *row[repositoryRow] {
	if r := b.repoByID[id]; r != nil {
		return r
	}
	return b.loadRepository("id = ?", id)
}

const blobColumns = "id, digest, size, stored, touched, COALESCE(hashed, 0), members, holders, manifests, hosted, tags, subjects, parsed"

func (b *batch) loadBlob(where string, arg any) *row[blobRow] {
	r := &row[blobRow]{}
	v := &r.v
	var raw []byte
	r.there = b.scan("SELECT "+blobColumns+" FROM blobs WHERE "+where, []any{arg},
		&v.id, &raw, &v.size, &v.stored, &v.touched, &v.hashed,
		&v.members, &v.holders, &v.manifests, &v.hosted, &v.tags, &v.subjects, &v.parsed)
	v.digest = string(raw)
	if r.there {
		r.written()
		b.blobs[v.digest], b.blobByID[v.id] = r, r
	}
	return r
}

// blob returns the row of a digest, a new one if there is none: it stays only
// if it becomes useful. nil if it is no digest.
func (b *batch) blob(d digest.Digest) *row[blobRow] {
	raw := pack(d)
	if raw == "" {
		return nil
	}
	if r := b.blobs[raw]; r != nil {
		return r
	}
	r := b.loadBlob("digest = ?", []byte(raw))
	if !r.there {
		r.v.id, r.v.digest, r.there = b.c.ids.blob.next(), raw, true
		b.blobs[raw], b.blobByID[r.v.id] = r, r
	}
	return r
}

func (b *batch) blobWithID(id int64) *row[blobRow] {
	if r := b.blobByID[id]; r != nil {
		return r
	}
	r := b.loadBlob("id = ?", id)
	if !r.there {
		b.fail(fmt.Errorf("blob %d is named and not there: %w", id, errInconsistent))
	}
	return r
}

func (b *batch) member(repository, blob int64) *row[memberRow] {
	key := pair{repository, blob}
	r := b.members[key]
	if r == nil {
		r = &row[memberRow]{}
		r.there = b.scan("SELECT linked, manifest, named, namers FROM members WHERE repository = ? AND blob = ?", []any{repository, blob},
			&r.v.linked, &r.v.manifest, &r.v.named, &r.v.namers)
		r.written()
		b.members[key] = r
	}
	return r
}

func (b *batch) use(blob, upstream int64) *row[useRow] {
	key := pair{blob, upstream}
	r := b.uses[key]
	if r == nil {
		r = &row[useRow]{}
		r.there = b.scan("SELECT repositories FROM uses WHERE blob = ? AND upstream = ?", []any{blob, upstream}, &r.v.repositories)
		r.written()
		b.uses[key] = r
	}
	return r
}

func (b *batch) manifest(repository, blob int64) *row[manifestRow] {
	key := pair{repository, blob}
	r := b.manifests[key]
	if r == nil {
		r = &row[manifestRow]{}
		v := &r.v
		r.there = b.scan("SELECT since, touched, tags, parents, pinned, scope FROM manifests WHERE repository = ? AND blob = ?", []any{repository, blob},
			&v.since, &v.touched, &v.tags, &v.parents, &v.pinned, &v.scope)
		r.written()
		b.manifests[key] = r
	}
	return r
}

func (b *batch) tag(repository int64, name string) *row[tagRow] {
	key := tagKey{repository, name}
	r := b.tags[key]
	if r == nil {
		r = &row[tagRow]{}
		v := &r.v
		r.there = b.scan("SELECT blob, since, touched, meanings, pinned, kept, scope FROM tags WHERE repository = ? AND name = ?", []any{repository, name},
			&v.blob, &v.since, &v.touched, &v.meanings, &v.pinned, &v.kept, &v.scope)
		r.written()
		b.tags[key] = r
		if r.there {
			b.means(repository, v.blob, name)
		}
	}
	return r
}

// means notes that a tag in tags means, or has meant, a blob.
func (b *batch) means(repository, blob int64, name string) {
	key := pair{repository, blob}
	if b.meaning[key] == nil {
		b.meaning[key] = map[string]bool{}
	}
	b.meaning[key][name] = true
}

// tagsOf returns the tags of a repository that mean a blob.
func (b *batch) tagsOf(repository int64, blob *row[blobRow]) (tags []*row[tagRow]) {
	if blob.v.tags == 0 {
		return nil
	}
	for _, name := range column[string](b, "SELECT name FROM tags WHERE blob = ? AND repository = ?", blob.v.id, repository) {
		b.means(repository, blob.v.id, name)
	}
	for name := range b.meaning[pair{repository, blob.v.id}] {
		if t := b.tag(repository, name); t.there && t.v.blob == blob.v.id {
			tags = append(tags, t)
		}
	}
	return tags
}

// refers returns what a manifest refers to.
func (b *batch) refers(blob *row[blobRow]) *references {
	r := b.references[blob.v.id]
	if r == nil {
		r = &references{}
		if blob.v.parsed {
			r.layers = column[int64](b, "SELECT blob FROM layers WHERE manifest = ?", blob.v.id)
			r.children = column[int64](b, "SELECT child FROM edges WHERE parent = ? AND kind = 1", blob.v.id)
			for _, id := range column[int64](b, "SELECT parent FROM edges WHERE child = ? AND kind = 2", blob.v.id) {
				r.subject = id
			}
		}
		b.references[blob.v.id] = r
	}
	return r
}
