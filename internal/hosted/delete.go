package hosted

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// deleting is how everything begins that removes something: it fails where that
// is off, whatever it is (CVE-2026-41888).
func (o Options) deleting() error {
	if o.NoDelete {
		return fmt.Errorf("%w: it is configured with `delete off`", ErrNoDelete)
	}
	return nil
}

// DeleteTag takes a tag away, and returns what it meant. What that is stays. The
// error is an fs.ErrNotExist if there is no such tag; or it wraps [ErrNoDelete],
// [ErrImmutable] or [ErrClosedToPush].
func (h *Registry) DeleteTag(ctx context.Context, repository, tag string) (was digest.Digest, err error) {
	options := h.options(repository)
	if err := options.closed(); err != nil {
		return "", err
	}
	return h.deleteTag(ctx, repository, tag, options)
}

func (h *Registry) deleteTag(ctx context.Context, repository, tag string, options Options) (was digest.Digest, err error) {
	if err := options.deleting(); err != nil {
		return "", err
	}
	return h.tree.DeleteTag(ctx, repository, tag, func(digest.Digest) error { return options.removable(tag) })
}

// DeleteManifest takes a manifest out of a repository, and every tag that means
// it, whatever digest it is asked for by. It returns the tags. Blobs stay until
// they are collected. The errors are those of DeleteTag: one immutable tag keeps
// the manifest.
func (h *Registry) DeleteManifest(ctx context.Context, repository string, d digest.Digest) (tags []string, err error) {
	options := h.options(repository)
	if err := options.closed(); err != nil {
		return nil, err
	}
	return h.deleteManifest(ctx, repository, d, options)
}

func (h *Registry) deleteManifest(ctx context.Context, repository string, d digest.Digest, options Options) (tags []string, err error) {
	if err := options.deleting(); err != nil {
		return nil, err
	}
	defer h.tree.Alone(repository)()
	return h.tree.DeleteManifest(ctx, repository, d, options.removable)
}

// DeleteBlob takes a blob out of a repository, unless a manifest there names it:
// then the error is [ErrNamed]. Otherwise they are those of DeleteTag.
func (h *Registry) DeleteBlob(ctx context.Context, repository string, d digest.Digest) error {
	options := h.options(repository)
	if err := options.closed(); err != nil {
		return err
	}
	if err := options.deleting(); err != nil {
		return err
	}
	if err := h.tree.DeleteBlob(ctx, repository, d); errors.Is(err, tree.ErrNamed) {
		return fmt.Errorf("%w: %w", ErrNamed, err)
	} else if err != nil {
		return err
	}
	return nil
}

func (o Options) removable(tag string) error {
	if o.immutable(tag) {
		return fmt.Errorf("%w: %s; only the mirror's configuration can let go of it", ErrImmutable, tag)
	}
	return nil
}
