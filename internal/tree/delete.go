package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
)

// ErrNamed is wrapped by the error of the deletion of a blob that a manifest of the
// repository names.
var ErrNamed = errors.New("a manifest of the repository names it")

// What is here deletes at the wish of a client, in hosted repositories only. When it
// returns, nobody sees any more what has been deleted, and it is not back after a
// loss of power. The bytes stay until they are collected.

// DeleteTag lets a tag mean nothing any more, if permit agrees, and returns what it
// meant. A nil permit always does; it is asked under the tag's lock. If there is no
// such tag the error is an fs.ErrNotExist.
func (t *Tree) DeleteTag(ctx context.Context, repository, tag string, permit func(means digest.Digest) error) (was digest.Digest, err error) {
	if _, err := t.Tag(ctx, repository, tag); err != nil {
		return "", err
	}
	if err := t.Host(ctx, repository); err != nil {
		return "", err
	}
	w := t.write(ctx, repository)
	defer w.end()
	was, err = t.untagIf(ctx, repository, tag, func(means digest.Digest) (bool, error) {
		if permit == nil {
			return true, nil
		}
		return true, permit(means)
	})
	if err != nil {
		return "", err
	}
	w.touch(layout.TagLink(repository, tag))
	if err := w.sync(ctx); err != nil {
		return "", err
	}
	failpoint.Hit("delete.synced")
	return was, nil
}

// untagIf removes a tag if goes says so of what it means, and returns that.
func (t *Tree) untagIf(ctx context.Context, repository, tag string, goes func(means digest.Digest) (bool, error)) (digest.Digest, error) {
	defer t.lockTag(repository, tag)()
	means, err := t.Tag(ctx, repository, tag)
	if err != nil {
		return "", err
	}
	yes, err := goes(means)
	if err != nil || !yes {
		return "", err
	}
	return means, t.untag(ctx, repository, tag)
}

// DeleteManifest removes a manifest and the tags that mean it, which it returns, if
// permit agrees to each of them; otherwise nothing. A nil permit always does. If the
// repository does not have it, the error is an fs.ErrNotExist.
func (t *Tree) DeleteManifest(ctx context.Context, repository string, d digest.Digest, permit func(tag string) error) (tags []string, err error) {
	canonical, err := t.canonical(ctx, repository, d, layout.RevisionLink(repository, d))
	if err != nil {
		return nil, err
	}
	key := layout.RevisionLink(repository, canonical)
	if _, err := t.store.Stat(ctx, key); err != nil {
		return nil, err
	}
	if err := t.Host(ctx, repository); err != nil {
		return nil, err
	}
	w := t.write(ctx, repository)
	defer w.end()
	w.touch(key)
	w.touch(layout.RevisionLink(repository, d))
	// Somebody may tag it while its tags are being removed.
	for removed := false; !removed; {
		meaning, err := t.meaning(ctx, repository, canonical)
		if err != nil {
			return nil, err
		}
		for _, tag := range meaning {
			if permit == nil {
				break
			}
			if err := permit(tag); err != nil {
				return nil, err
			}
		}
		for _, tag := range meaning {
			was, err := t.untagIf(ctx, repository, tag, func(means digest.Digest) (bool, error) {
				return t.means(ctx, repository, means, canonical)
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			w.touch(layout.TagLink(repository, tag))
			if was != "" && !slices.Contains(tags, tag) {
				tags = append(tags, tag)
			}
		}
		failpoint.Hit("delete.untagged")
		err = t.RemoveManifest(ctx, repository, d, func() (bool, error) {
			meaning, err := t.meaning(ctx, repository, canonical)
			return len(meaning) > 0, err
		})
		if err != nil && !errors.Is(err, ErrNeeded) {
			return nil, err
		}
		removed = err == nil
	}
	if err := w.sync(ctx); err != nil {
		return nil, err
	}
	failpoint.Hit("delete.synced")
	return tags, nil
}

// meaning returns the tags that mean a manifest.
func (t *Tree) meaning(ctx context.Context, repository string, canonical digest.Digest) ([]string, error) {
	var tags []string
	for tag, err := range t.ListTags(ctx, repository) {
		if err != nil {
			return nil, err
		}
		yes, err := t.means(ctx, repository, tag.Digest, canonical)
		if err != nil {
			return nil, err
		}
		if yes {
			tags = append(tags, tag.Tag)
		}
	}
	return tags, nil
}

// means reports whether a digest is that of a manifest, or another one of it.
func (t *Tree) means(ctx context.Context, repository string, d, canonical digest.Digest) (bool, error) {
	if d == canonical || d.Algorithm() == digest.Canonical {
		return d == canonical, nil
	}
	linked, err := t.link(ctx, layout.RevisionLink(repository, d))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return linked == canonical, err
}

// DeleteBlob takes a blob out of a repository, whatever digest it is known by. If a
// manifest there names it, the error wraps [ErrNamed]; if the repository does not
// have it, it is an fs.ErrNotExist. It reads every manifest of the repository.
func (t *Tree) DeleteBlob(ctx context.Context, repository string, d digest.Digest) error {
	canonical, err := t.canonical(ctx, repository, d, layout.LayerLink(repository, d))
	if err != nil {
		return err
	}
	key := layout.LayerLink(repository, canonical)
	if _, err := t.store.Stat(ctx, key); err != nil {
		return err
	}
	if err := t.Host(ctx, repository); err != nil {
		return err
	}
	w := t.write(ctx, repository)
	defer w.end()
	w.touch(key)
	w.touch(layout.LayerLink(repository, d))
	var by digest.Digest
	err = t.Unlink(ctx, repository, d, func() (bool, error) {
		by, err = t.naming(ctx, repository, canonical)
		return by != "", err
	})
	if errors.Is(err, ErrNeeded) {
		return fmt.Errorf("blob %s of repository %s stays, since %w: %s", d, repository, ErrNamed, by)
	}
	if err != nil {
		return err
	}
	if err := w.sync(ctx); err != nil {
		return err
	}
	failpoint.Hit("delete.synced")
	return nil
}

// naming returns a manifest of a repository that names a blob, if there is one. The
// lock of the blob's digest is held, so nobody stores another one meanwhile.
func (t *Tree) naming(ctx context.Context, repository string, canonical digest.Digest) (digest.Digest, error) {
	for listed, err := range t.ListManifests(ctx, repository) {
		if err != nil {
			return "", err
		}
		named := t.names(ctx, listed.Digest)
		if named == nil {
			continue // it cannot be served either
		}
		// An index may name blobs, as BuildKit's caches do.
		for _, blob := range slices.Concat(named.Blobs, named.Foreign, named.Children) {
			names, err := t.canonical(ctx, repository, blob.Digest, layout.LayerLink(repository, blob.Digest))
			if err != nil {
				return "", err
			}
			if names == canonical {
				return listed.Digest, nil
			}
		}
	}
	return "", nil
}
