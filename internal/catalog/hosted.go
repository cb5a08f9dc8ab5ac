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
