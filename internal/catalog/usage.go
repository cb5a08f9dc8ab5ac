package catalog

import "context"

// Usage is what something takes.
type Usage struct {
	Repositories, Tags, Manifests, Blobs int64
	// Bytes are those of the blobs, each counted once; Allocated is about what
	// they and all links to them take on a disk with blocks of 4 KiB.
	Bytes, Allocated int64
}

// Usage returns what the repositories of an upstream take, or with "" all that
// is in the store.
func (c *Catalog) Usage(ctx context.Context, upstream string) (u Usage, err error) {
	err = c.read(ctx, func(r *reader) error {
		var v counts
		_, err := r.one("SELECT repositories, tags, manifests, blobs, bytes, blocks, extra FROM upstreams WHERE name = ?", []any{upstream},
			&v.repositories, &v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
		u = v.usage()
		return err
	})
	return u, err
}
