package catalog

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
)

// Upstreams returns what the repositories of each upstream take that has any.
// Under the name "" are the hosted ones: what they share is counted for each of
// them.
func (c *Catalog) Upstreams(ctx context.Context) (map[string]Usage, error) {
	found := map[string]Usage{}
	err := c.read(ctx, func(r *reader) error {
		row := func(scan func(...any) error) error {
			var name string
			var v counts
			err := scan(&name, &v.repositories, &v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
			found[name] = v.usage()
			return err
		}
		if err := r.each("SELECT name, repositories, tags, manifests, blobs, bytes, blocks, extra FROM upstreams WHERE name <> '' AND repositories > 0", nil, row); err != nil {
			return err
		}
		return r.each("SELECT '', COUNT(*), SUM(tags), SUM(manifests), SUM(blobs), SUM(bytes), SUM(blocks), SUM(extra) FROM repositories WHERE upstream = 1 AND present = 1 HAVING COUNT(*) > 0", nil, row)
	})
	return found, err
}

// Largest returns up to n repositories, those first that take most.
func (c *Catalog) Largest(ctx context.Context, n int) (repositories []Repository, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each(listRepositories+"ORDER BY r.blocks + r.extra DESC, r.name LIMIT ?", []any{n}, func(scan func(...any) error) error {
			repository, err := scanRepository(scan)
			repositories = append(repositories, repository)
			return err
		})
	})
	return repositories, err
}

// Held is what is known of a tag or a manifest.
type Held struct {
	Digest      digest.Digest // the manifest, or what the tag means
	Since, Read time.Time
	Pinned      bool
	// Evictable says that it is a root, and neither hosted nor pinned; Before is
	// how many such roots were last read before it, up to 10,000.
	Evictable bool
	Before    int64
	// Bytes are those of its manifests and blobs that are held.
	Bytes int64
}

// maxBefore bounds a count that is for people.
const maxBefore = 10_000

// Held returns what is known of a tag or a manifest of a repository, and whether
// that is there.
func (c *Catalog) Held(ctx context.Context, repository string, ref oci.Reference) (held Held, ok bool, err error) {
	err = c.read(ctx, func(r *reader) error {
		var id, blob, since, read, pinned int64
		var raw []byte
		if found, err := r.one("SELECT id FROM repositories WHERE name = ?", []any{repository}, &id); !found {
			return err
		}
		query, name := "SELECT t.blob, b.digest, t.since, t.touched, t.pinned + t.kept, t.scope IS NOT NULL FROM tags t JOIN blobs b ON b.id = t.blob WHERE t.repository = ? AND t.name = ?", any(ref.Tag)
		if ref.Tag == "" {
			query, name = "SELECT m.blob, b.digest, m.since, m.touched, m.pinned, m.scope IS NOT NULL FROM manifests m JOIN blobs b ON b.id = m.blob WHERE m.repository = ? AND b.digest = ?", []byte(pack(ref.Digest))
		}
		if ok, err = r.one(query, []any{id, name}, &blob, &raw, &since, &read, &pinned, &held.Evictable); !ok {
			return err
		}
		held.Digest, held.Since, held.Read, held.Pinned = unpack(raw), fromSeconds(since), fromSeconds(read), pinned > 0
		if _, err = r.one(below+bytesBelow, []any{id, blob, id}, &held.Bytes); err != nil || !held.Evictable {
			return err
		}
		_, err = r.one(`SELECT COUNT(*) FROM (
			SELECT 1 FROM tags WHERE scope IS NOT NULL AND touched < ? UNION ALL SELECT 1 FROM manifests WHERE scope IS NOT NULL AND touched < ? LIMIT ?)`,
			[]any{read, read, maxBefore}, &held.Before)
		return err
	})
	return held, ok, err
}
