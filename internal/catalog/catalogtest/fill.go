// Package catalogtest makes large catalogs for tests and benchmarks.
package catalogtest

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	storage "github.com/caddy-registry/mirror/storage/catalog"
)

// Shape is what Fill makes: repositories of 50 manifests each, half a dozen
// layers an image.
type Shape struct {
	Manifests, Links int
}

const (
	manifestsEach = 50 // of a repository
	group         = 5  // manifests: an index with a tag, and its images
	images        = manifestsEach / group * (group - 1)
)

func (s Shape) Repositories() int { return s.Manifests / manifestsEach }

// linksEach is how many links each repository has.
func (s Shape) linksEach() int { return s.Links / s.Repositories() }

// own is how many blobs an image has for itself.
func (s Shape) own() int { return max((s.linksEach()-1)/images, 1) }

// Blobs is how many layers there are: each in two or three repositories.
func (s Shape) Blobs() int { return max(s.Links*2/5, s.linksEach()) }

// Upstream of a repository, by its number.
func (s Shape) Upstream(repository int) string {
	return [...]string{"docker.io", "quay.io", "ghcr.io"}[repository%3]
}

// Repository is the name of a repository, from 0 on.
func (s Shape) Repository(n int) string {
	return fmt.Sprintf("%s/team%d/app%d", s.Upstream(n), n/100, n)
}

// Digest is that of a manifest, from 0 on in the order of their repositories,
// and after the manifests of a blob. There is no content that has it.
func (s Shape) Digest(n int) digest.Digest {
	n++
	return digest.Digest(fmt.Sprintf("sha256:%08x%056x", n*2654435761%4294967296, n))
}

// Epoch is when everything has been stored; each manifest was read in the 90
// days after it.
const Epoch = 1_700_000_000

// Fill makes the catalog of a store with content that nobody has, straight into
// its tables. Each repository has tags v0, v1 and so on, each of an index of
// four images; every image has layers of its own, and one that it shares with
// others of its repository. Nobody may have the catalog open.
func Fill(ctx context.Context, backend storage.Backend, store string, s Shape) error {
	db, err := backend.Open(ctx, store)
	if err != nil {
		return err
	}
	c, err := catalog.Open(ctx, db, backend.Dialect(), store)
	if err != nil {
		return err
	}
	if err := c.Close(); err != nil {
		return err
	}
	if db, err = backend.Open(ctx, store); err != nil {
		return err
	}
	defer db.Close()
	w, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer w.Close()
	const (
		day   = 86400
		count = "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?) "
		// The number of a manifest's repository; id of what is number i.
		hash = "unhex(printf('%08x%056x', id * 2654435761 % 4294967296, id))"
	)
	n, each, links, own, blobs := s.Manifests, manifestsEach, s.linksEach(), s.own(), s.Blobs()
	shared := max(links-own*images, 1)
	n = s.Repositories() * each
	at := fmt.Sprintf("(%d + i * 7919 %% %d)", Epoch, 90*day)
	for _, q := range []struct {
		query string
		args  []any
	}{
		{"PRAGMA synchronous = OFF", nil},
		{"PRAGMA cache_size = -500000", nil},
		{"PRAGMA temp_store = FILE", nil},
		{"INSERT INTO upstreams SELECT column1, column2, 0, 0, 0, 0, 0, 0, 0 FROM (VALUES (2, 'docker.io'), (3, 'quay.io'), (4, 'ghcr.io'))", nil},
		{count + "INSERT INTO layers SELECT i + 1, ? + 1 + ((i / ?) * ? + k) % ? FROM (SELECT i, i % ? AS k FROM n WHERE i % ? > 0 UNION ALL SELECT i, ? + (i % ? - i % ? / ? - 1) * ? + j.value FROM n, json_each(?) j WHERE i % ? > 0)",
			[]any{n, n, each, links, blobs, shared, group, shared, each, each, group, own, numbers(own), group}},
		{count + "INSERT INTO edges SELECT i / ? * ? + 1, 1, i + 1 FROM n WHERE i % ? > 0", []any{n, group, group, group}},
		{"INSERT INTO members SELECT r, blob, 1, 0, count(*), sum(manifest) FROM (SELECT (manifest - 1) / ? + 1 AS r, blob, manifest FROM layers) GROUP BY r, blob", []any{each}},
		{count + "INSERT INTO members SELECT i / ? + 1, i + 1, 0, 1, i % ? > 0, CASE WHEN i % ? > 0 THEN i / ? * ? + 1 ELSE 0 END FROM n", []any{n, each, group, group, group, group}},
		{count + "INSERT INTO manifests SELECT i / ? + 1, i + 1, ?, " + at + ", i % ? = 0, i % ? > 0, 0, NULL FROM n", []any{n, each, Epoch, group, group}},
		{count + "INSERT INTO tags SELECT i / ? + 1, 'v' || (i % ? / ?), i + 1, ?, " + at + ", 1, 0, 0, 2 + i / ? % 3 FROM n WHERE i % ? = 0", []any{n, each, each, group, Epoch, each, group}},
		{"INSERT INTO uses SELECT blob, 2 + (repository - 1) % 3 AS u, count(*) FROM members GROUP BY blob, u", nil},
		{"INSERT INTO blobs SELECT id, " + hash + ", size, ?, touched, CASE WHEN manifest > 0 THEN NULL ELSE touched END, 0, members, members, manifest, 0, tags, 0, parsed FROM (SELECT blob AS id, CASE WHEN max(manifest) THEN 1000 ELSE 1000000 + blob * 7919 % 50000000 END AS size, ? + blob * 7919 % ? AS touched, count(*) AS members, max(manifest) AS manifest, CASE WHEN max(manifest) THEN (blob - 1) % ? = 0 ELSE 0 END AS tags, max(manifest) AS parsed FROM members GROUP BY blob)",
			[]any{Epoch, Epoch, 90 * day, group}},
		{count + "INSERT INTO repositories SELECT i + 1, CASE i % 3 WHEN 0 THEN 'docker.io' WHEN 1 THEN 'quay.io' ELSE 'ghcr.io' END || '/team' || (i / 100) || '/app' || i, 1, 'mirrored', 2 + i % 3, ?, 0, 0, 0, 0, 0, 0, 0 FROM n", []any{n / each, Epoch}},
		{"UPDATE repositories SET tags = t, manifests = m, blobs = b, bytes = s, blocks = a, extra = 9*4096 + t*7*4096 + b*8192 FROM (SELECT r.repository, (SELECT count(*) FROM tags WHERE tags.repository = r.repository) AS t, sum(r.manifest) AS m, count(*) AS b, sum(size) AS s, sum((size+4095)/4096*4096+4096) AS a FROM members r JOIN blobs ON blobs.id = r.blob GROUP BY r.repository) WHERE id = repository", nil},
		{"UPDATE upstreams SET repositories = r, tags = t, manifests = m, extra = e FROM (SELECT upstream, count(*) AS r, sum(tags) AS t, sum(manifests) AS m, sum(extra) AS e FROM repositories GROUP BY upstream) x WHERE id = x.upstream", nil},
		{"UPDATE upstreams SET blobs = b, bytes = s, blocks = a FROM (SELECT upstream, count(*) AS b, sum(size) AS s, sum((size+4095)/4096*4096+4096) AS a FROM uses JOIN blobs ON blobs.id = uses.blob GROUP BY upstream) x WHERE id = x.upstream", nil},
		{"UPDATE upstreams SET repositories = r, tags = t, manifests = m, extra = e FROM (SELECT sum(repositories) AS r, sum(tags) AS t, sum(manifests) AS m, sum(extra) AS e FROM upstreams) WHERE id = 1", nil},
		{"UPDATE upstreams SET blobs = b, bytes = s, blocks = a FROM (SELECT count(*) AS b, sum(size) AS s, sum((size+4095)/4096*4096+4096) AS a FROM blobs) WHERE id = 1", nil},
		{"UPDATE meta SET value = ? WHERE name = 'complete'", []any{fmt.Sprint(Epoch)}},
	} {
		if _, err := w.ExecContext(ctx, q.query, q.args...); err != nil {
			return fmt.Errorf("%s: %w", q.query, err)
		}
	}
	_, err = w.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)")
	return err
}

// numbers is [0,1,…,n-1].
func numbers(n int) string {
	s := "["
	for i := range n {
		if i > 0 {
			s += ","
		}
		s += fmt.Sprint(i)
	}
	return s + "]"
}
