package hosted

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// stripes are locks of repositories. Whoever pushes shares one, so that pushes do
// not wait for each other; whoever deletes has it alone. Then what is there when a
// deletion begins is all that it has to care for.
type stripes [256]sync.RWMutex

var seed = maphash.MakeSeed()

func (s *stripes) of(repository string) *sync.RWMutex {
	return &s[maphash.String(seed, repository)%uint64(len(s))]
}

// share keeps deletions out of a repository until done.
func (h *Registry) share(repository string) (done func()) {
	l := h.repositories.of(repository)
	l.RLock()
	return l.RUnlock
}

// deleting is how everything begins that removes something: it fails where that
// is off, whatever it is (CVE-2026-41888), and keeps pushes out until done.
func (h *Registry) deleting(repository string) (options Options, done func(), err error) {
	options = h.options(repository)
	if options.NoDelete {
		return options, nil, fmt.Errorf("%w: it is configured with `delete off`", ErrNoDelete)
	}
	return options, h.Alone(repository), nil
}

// Alone keeps pushes and deletions out of a repository until done, for whoever
// removes something for another reason than a client's wish.
func (h *Registry) Alone(repository string) (done func()) {
	l := h.repositories.of(repository)
	l.Lock()
	return l.Unlock
}

// DeleteTag takes a tag away, and returns what it meant. What that is stays. The
// error is an fs.ErrNotExist if there is no such tag; or it wraps [ErrNoDelete] or
// [ErrImmutable].
func (h *Registry) DeleteTag(ctx context.Context, repository, tag string) (was digest.Digest, err error) {
	options, done, err := h.deleting(repository)
	if err != nil {
		return "", err
	}
	defer done()
	return h.tree.DeleteTag(ctx, repository, tag, func(digest.Digest) error { return options.removable(tag) })
}

// DeleteManifest takes a manifest out of a repository, and every tag that means
// it, whatever digest it is asked for by. It returns the tags. Blobs stay until
// they are collected. The errors are those of DeleteTag: one immutable tag keeps
// the manifest.
func (h *Registry) DeleteManifest(ctx context.Context, repository string, d digest.Digest) (tags []string, err error) {
	options, done, err := h.deleting(repository)
	if err != nil {
		return nil, err
	}
	defer done()
	return h.tree.DeleteManifest(ctx, repository, d, options.removable)
}

// DeleteBlob takes a blob out of a repository, unless a manifest there names it:
// then the error is [ErrNamed]. Otherwise they are those of DeleteTag.
func (h *Registry) DeleteBlob(ctx context.Context, repository string, d digest.Digest) error {
	_, done, err := h.deleting(repository)
	if err != nil {
		return err
	}
	defer done()
	if err := h.tree.DeleteBlob(ctx, repository, d); errors.Is(err, tree.ErrNamed) {
		return fmt.Errorf("%w: %w", ErrNamed, err)
	} else if err != nil {
		return err
	}
	return nil
}

func (o Options) removable(tag string) error {
	if o.immutable(tag) {
		return fmt.Errorf("%w: %s", ErrImmutable, tag)
	}
	return nil
}
