package catalog

import (
	"context"

	"github.com/caddy-registry/mirror/internal/tree"
)

// maxShared is how many blobs of several repositories [Catalog.Together] tells
// from each other: about 50 MiB. Beyond that each counts for every repository.
const maxShared = 1_000_000

// Together returns what the hosted repositories whose names match take together:
// bytes that several of them have count once.
func (c *Catalog) Together(ctx context.Context, match func(repository string) bool) (Usage, error) {
	var sum counts
	err := c.read(ctx, func(r *reader) error {
		var ids []int64
		err := r.each("SELECT id, name, tags, manifests, blobs, bytes, blocks, extra FROM repositories WHERE present = 1 AND class = ?", []any{string(tree.Hosted)}, func(scan func(...any) error) error {
			var id int64
			var name string
			v := counts{repositories: 1}
			if err := scan(&id, &name, &v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra); err != nil {
				return err
			}
			if match(name) {
				ids = append(ids, id)
				sum.add(v, 1)
			}
			return nil
		})
		if err != nil || len(ids) < 2 {
			return err
		}
		seen := map[int64]bool{}
		for _, id := range ids {
			err := r.each(`SELECT b.id, b.size FROM members m JOIN blobs b ON b.id = m.blob
				WHERE m.repository = ? AND (m.linked = 1 OR m.manifest = 1) AND b.holders > 1 AND b.stored > 0`, []any{id}, func(scan func(...any) error) error {
				var blob int64
				again := blobRow{stored: 1}
				if err := scan(&blob, &again.size); err != nil {
					return err
				}
				if seen[blob] {
					sum.add(again.counts(), -1)
				} else if len(seen) < maxShared {
					seen[blob] = true
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return sum.usage(), err
}

// Hosted returns up to n names of hosted repositories in their order, after a
// name, whether or not they have a record.
func (c *Catalog) Hosted(ctx context.Context, after string, n int) ([]string, error) {
	return c.names(ctx, "SELECT name FROM repositories WHERE present = 1 AND class = ? AND name > ? ORDER BY name LIMIT ?",
		string(tree.Hosted), after, n)
}

// TagsByAge returns the tags of a repository, those first that began to mean what
// they do last. Bytes are not counted.
func (c *Catalog) TagsByAge(ctx context.Context, repository string) (tags []Tag, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each(`SELECT t.name, b.digest, t.since, t.touched, t.pinned + t.kept
			FROM repositories r JOIN tags t ON t.repository = r.id JOIN blobs b ON b.id = t.blob
			WHERE r.name = ? ORDER BY t.since DESC, t.name DESC`, []any{repository}, func(scan func(...any) error) error {
			var tag Tag
			var raw []byte
			var since, read, pinned int64
			err := scan(&tag.Name, &raw, &since, &read, &pinned)
			tag.Digest, tag.Since, tag.Read, tag.Pinned = unpack(raw), fromSeconds(since), fromSeconds(read), pinned > 0
			tags = append(tags, tag)
			return err
		})
	})
	return tags, err
}
