package tree

import (
	"context"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Referrers returns the descriptors of the stored manifests of a repository
// that name a subject. It reads them all, up to 5,000.
func (t *Tree) Referrers(ctx context.Context, repository string, subject digest.Digest) ([]v1.Descriptor, error) {
	var found []v1.Descriptor
	err := t.manifests(ctx, repository, func(m *Manifest) {
		if m.Subject == nil || m.Subject.Digest != subject {
			return
		}
		// One that was asked for by sha512 is linked by its sha256, too.
		if m.Digest.Algorithm() != digest.Canonical {
			return
		}
		found = append(found, v1.Descriptor{
			MediaType:    m.MediaType,
			Digest:       m.Digest,
			Size:         int64(len(m.Body)),
			ArtifactType: m.ArtifactType,
			Annotations:  m.Annotations,
		})
	})
	return found, err
}
