package catalog

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"strings"

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
	// quiet is ctx without its end, for statements that take no time: SQLite
	// needs a goroutine for each that can be ended.
	quiet context.Context
	// entered says that there are manifests that are not in the database yet.
	entered bool

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
	b := &batch{ctx: ctx, c: c, quiet: context.WithoutCancel(ctx)}
	b.upstreams, b.upstreamByID = map[string]*row[upstreamRow]{}, map[int64]*row[upstreamRow]{}
	b.repositories, b.repoByID = map[string]*row[repositoryRow]{}, map[int64]*row[repositoryRow]{}
	b.blobs, b.blobByID = map[string]*row[blobRow]{}, map[int64]*row[blobRow]{}
	b.members = map[pair]*row[memberRow]{}
	b.uses = map[pair]*row[useRow]{}
	b.manifests = map[pair]*row[manifestRow]{}
	b.tags = map[tagKey]*row[tagRow]{}
	b.meaning = map[pair]map[string]bool{}
	b.references = map[int64]*references{}
	return b
}

func (b *batch) fail(err error) {
	if b.err == nil && err != nil {
		b.err = err
	}
}

// statement returns a prepared one, or nil if there is an error.
func (b *batch) statement(query string) *sql.Stmt {
	if b.err == nil && b.ctx.Err() != nil {
		b.err = context.Cause(b.ctx)
	}
	if b.err != nil {
		return nil
	}
	stmt, err := b.c.writing(b.quiet, query)
	b.fail(err)
	return stmt
}

// exec runs one statement.
func (b *batch) exec(query string, args ...any) {
	if stmt := b.statement(query); stmt != nil {
		_, err := stmt.ExecContext(b.quiet, args...)
		b.fail(err)
	}
}

// insert writes rows of so many columns, many at once.
func (b *batch) insert(table string, columns int, args []any) {
	for _, rows := range [...]int{16, 4, 1} {
		for ; len(args) >= rows*columns && b.err == nil; args = args[rows*columns:] {
			b.exec(b.c.inserting(table, columns, rows), args[:rows*columns]...)
		}
	}
}

// each calls row for all rows of a query, which may not ask another.
func (b *batch) each(query string, args []any, row func(scan func(...any) error) error) {
	stmt := b.statement(query)
	if stmt == nil {
		return
	}
	rows, err := stmt.QueryContext(b.quiet, args...)
	if err != nil {
		b.fail(err)
		return
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			b.fail(err)
			return
		}
	}
	b.fail(rows.Err())
}

// scan reads one row, and reports whether there is one.
func (b *batch) scan(query string, args []any, into ...any) (found bool) {
	b.each(query, args, func(scan func(...any) error) error {
		found = true
		return scan(into...)
	})
	return found && b.err == nil
}

// column reads one column of all rows.
func column[T any](b *batch, query string, args ...any) (all []T) {
	b.each(query, args, func(scan func(...any) error) error {
		var v T
		err := scan(&v)
		all = append(all, v)
		return err
	})
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

func (b *batch) loadRepositories(where string, args ...any) {
	b.each("SELECT "+repositoryColumns+" FROM repositories WHERE "+where, args, func(scan func(...any) error) error {
		r := &row[repositoryRow]{there: true}
		v := &r.v
		err := scan(&v.id, &v.name, &v.present, &v.class, &v.upstream, &v.created, &v.pins,
			&v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
		r.written()
		if b.repositories[v.name] == nil {
			b.repositories[v.name], b.repoByID[v.id] = r, r
		}
		return err
	})
}

// repository returns a repository; not there if it is not known.
func (b *batch) repository(name string) *row[repositoryRow] {
	if b.repositories[name] == nil {
		b.loadRepositories("name = ?", name)
	}
	return b.noRepository(name)
}

// noRepository returns the copy of a repository, which is not in the database if
// there is no copy yet.
func (b *batch) noRepository(name string) *row[repositoryRow] {
	r := b.repositories[name]
	if r == nil {
		r = &row[repositoryRow]{v: repositoryRow{name: name}}
		b.repositories[name] = r
	}
	return r
}

func (b *batch) repositoryWithID(id int64) *row[repositoryRow] {
	if b.repoByID[id] == nil {
		b.loadRepositories("id = ?", id)
	}
	r := b.repoByID[id]
	if r == nil {
		b.fail(fmt.Errorf("repository %d is named and not there: %w", id, errInconsistent))
		return &row[repositoryRow]{}
	}
	return r
}

const blobColumns = "id, digest, size, stored, touched, COALESCE(hashed, 0), members, holders, manifests, hosted, tags, subjects, parsed"

// loadBlobs copies blobs.
func (b *batch) loadBlobs(where string, args ...any) {
	b.each("SELECT "+blobColumns+" FROM blobs WHERE "+where, args, func(scan func(...any) error) error {
		r := &row[blobRow]{there: true}
		v := &r.v
		var raw []byte
		err := scan(&v.id, &raw, &v.size, &v.stored, &v.touched, &v.hashed,
			&v.members, &v.holders, &v.manifests, &v.hosted, &v.tags, &v.subjects, &v.parsed)
		v.digest = string(raw)
		r.written()
		if b.blobs[v.digest] == nil {
			b.blobs[v.digest], b.blobByID[v.id] = r, r
		}
		return err
	})
}

// atOnce is how many rows are asked for with one query.
const atOnce = 64

var anyOf = " IN (?" + strings.Repeat(", ?", atOnce-1) + ")"

// prefetch copies the repositories and the blobs that changes name.
func (b *batch) prefetch(changes []tree.Change) {
	names, digests := map[string]bool{}, map[string]bool{}
	want := func(d digest.Digest) {
		if raw := pack(d); raw != "" {
			digests[b.canonical(raw)] = true
		}
	}
	for _, c := range changes {
		if c.Repository != "" {
			names[c.Repository] = true
		}
		want(c.Canonical)
		if c.Manifest == nil {
			continue
		}
		for _, d := range slices.Concat(c.Manifest.Blobs, c.Manifest.Foreign) {
			want(d.Digest)
		}
		for _, d := range c.Manifest.Children {
			want(d.Digest)
		}
	}
	inChunks(names, func(name string) any { return name }, func(args []any) { b.loadRepositories("name"+anyOf, args...) })
	for name := range names {
		b.noRepository(name)
	}
	inChunks(digests, func(raw string) any { return []byte(raw) }, func(args []any) { b.loadBlobs("digest"+anyOf, args...) })
	for raw := range digests {
		b.newBlob(raw)
	}
}

// inChunks calls load with so many arguments as anyOf takes, some of them more
// than once at the end. They are in order, as they lie in an index.
func inChunks(all map[string]bool, arg func(string) any, load func([]any)) {
	for chunk := range slices.Chunk(slices.Sorted(maps.Keys(all)), atOnce) {
		args := make([]any, atOnce)
		for i := range args {
			args[i] = arg(chunk[min(i, len(chunk)-1)])
		}
		load(args)
	}
}

// newBlob returns the copy of a blob that is not in the database, unless there
// is one.
func (b *batch) newBlob(raw string) *row[blobRow] {
	r := b.blobs[raw]
	if r == nil {
		r = &row[blobRow]{v: blobRow{id: b.c.ids.blob.next(), digest: raw}, there: true}
		b.blobs[raw], b.blobByID[r.v.id] = r, r
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
	raw = b.canonical(raw)
	if r := b.blobs[raw]; r != nil {
		return r
	}
	b.loadBlobs("digest = ?", []byte(raw))
	return b.newBlob(raw)
}

func (b *batch) blobWithID(id int64) *row[blobRow] {
	if r := b.blobByID[id]; r != nil {
		return r
	}
	b.loadBlobs("id = ?", id)
	r := b.blobByID[id]
	if r == nil {
		b.fail(fmt.Errorf("blob %d is named and not there: %w", id, errInconsistent))
		return &row[blobRow]{}
	}
	return r
}

// fresh says that a blob is not in the database, and so nothing about it.
func (b *batch) fresh(blob int64) bool {
	r := b.blobByID[blob]
	return r != nil && !r.saved
}

func (b *batch) member(repository, blob int64) *row[memberRow] {
	key := pair{repository, blob}
	r := b.members[key]
	if r == nil {
		r = &row[memberRow]{}
		r.there = !b.fresh(blob) && b.scan("SELECT linked, manifest, named, namers FROM members WHERE repository = ? AND blob = ?", []any{repository, blob},
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
		r.there = !b.fresh(blob) && b.scan("SELECT repositories FROM uses WHERE blob = ? AND upstream = ?", []any{blob, upstream}, &r.v.repositories)
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
		r.there = !b.fresh(blob) && b.scan("SELECT since, touched, tags, parents, pinned, scope FROM manifests WHERE repository = ? AND blob = ?", []any{repository, blob},
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
func (b *batch) tagsOf(repository, blob int64) (tags []*row[tagRow]) {
	b.each("SELECT name, since, touched, meanings, pinned, kept, scope FROM tags WHERE blob = ? AND repository = ?", []any{blob, repository}, func(scan func(...any) error) error {
		r := &row[tagRow]{v: tagRow{blob: blob}, there: true}
		v := &r.v
		key := tagKey{repository: repository}
		err := scan(&key.name, &v.since, &v.touched, &v.meanings, &v.pinned, &v.kept, &v.scope)
		r.written()
		if b.tags[key] == nil {
			b.tags[key] = r
			b.means(repository, blob, key.name)
		}
		return err
	})
	for name := range b.meaning[pair{repository, blob}] {
		if t := b.tags[tagKey{repository, name}]; t.there && t.v.blob == blob {
			tags = append(tags, t)
		}
	}
	return tags
}

// parentsOf returns the manifests of a repository that one goes with.
func (b *batch) parentsOf(repository, blob int64) (parents []int64) {
	if b.entered { // and so not everything is in the database
		for _, id := range column[int64](b, "SELECT parent FROM edges WHERE child = ?", blob) {
			if b.manifest(repository, id).there {
				parents = append(parents, id)
			}
		}
		return parents
	}
	b.each("SELECT m.blob, m.since, m.touched, m.tags, m.parents, m.pinned, m.scope FROM edges e JOIN manifests m ON m.repository = ? AND m.blob = e.parent WHERE e.child = ?", []any{repository, blob}, func(scan func(...any) error) error {
		r := &row[manifestRow]{there: true}
		v := &r.v
		key := pair{a: repository}
		err := scan(&key.b, &v.since, &v.touched, &v.tags, &v.parents, &v.pinned, &v.scope)
		r.written()
		if b.manifests[key] == nil {
			b.manifests[key] = r
		}
		if b.manifests[key].there {
			parents = append(parents, key.b)
		}
		return err
	})
	return parents
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
