package tree

import (
	"context"
	"errors"
	"io/fs"

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
		found = append(found, describe(m))
	})
	return found, err
}

// Describe returns the descriptors of those manifests that are stored in a
// repository.
func (t *Tree) Describe(ctx context.Context, repository string, digests []digest.Digest) ([]v1.Descriptor, error) {
	var found []v1.Descriptor
	for _, d := range digests {
		m, err := t.linkedManifest(ctx, repository, d)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		found = append(found, describe(m))
	}
	return found, nil
}

func describe(m *Manifest) v1.Descriptor {
	return v1.Descriptor{
		MediaType:    m.MediaType,
		Digest:       m.Digest,
		Size:         int64(len(m.Body)),
		ArtifactType: m.ArtifactType,
		Annotations:  m.Annotations,
	}
}
