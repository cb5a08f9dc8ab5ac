package hosted

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// ErrClosedToPush: the repository has an [Owner], and nobody else changes it.
var ErrClosedToPush = errors.New("nothing can be pushed to this repository or deleted from it")

// closed fails for a repository that clients of the registry API may not change.
func (o Options) closed() error {
	if o.Closed == "" {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrClosedToPush, o.Closed)
}

// An Owner does to repositories what [Options.Closed] keeps clients from.
type Owner struct{ registry *Registry }

// Owner is for the part of the program that the closed repositories belong to.
func (h *Registry) Owner() Owner { return Owner{h} }

// PutManifest does as [Registry.PutManifest].
func (o Owner) PutManifest(ctx context.Context, p Push) (*tree.Manifest, error) {
	return o.registry.putManifest(ctx, p, o.registry.options(p.Repository))
}

// DeleteTag does as [Registry.DeleteTag].
func (o Owner) DeleteTag(ctx context.Context, repository, tag string) (was digest.Digest, err error) {
	return o.registry.deleteTag(ctx, repository, tag, o.registry.options(repository))
}

// DeleteManifest does as [Registry.DeleteManifest].
func (o Owner) DeleteManifest(ctx context.Context, repository string, d digest.Digest) (tags []string, err error) {
	return o.registry.deleteManifest(ctx, repository, d, o.registry.options(repository))
}
