package catalog

import (
	"context"

	"github.com/opencontainers/go-digest"
)

// Referrers returns the manifests of a repository that name a subject, in the
// order of their sha256: up to n of those after one, or with none from the
// beginning.
func (c *Catalog) Referrers(ctx context.Context, repository string, subject, after digest.Digest, n int) (referrers []digest.Digest, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each("SELECT b.digest FROM blobs s JOIN edges e ON e.parent = s.id AND e.kind = 2 JOIN repositories r ON r.name = ? JOIN manifests m ON m.repository = r.id AND m.blob = e.child JOIN blobs b ON b.id = e.child WHERE s.digest = ? AND b.digest > ? ORDER BY b.digest LIMIT ?",
			[]any{repository, []byte(pack(subject)), []byte(pack(after)), n}, func(scan func(...any) error) error {
				var raw []byte
				err := scan(&raw)
				referrers = append(referrers, unpack(raw))
				return err
			})
	})
	return referrers, err
}
