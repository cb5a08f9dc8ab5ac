package tree

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// The methods here tell what the store says at this moment about one thing, as
// if it had just been stored or removed: for whoever remembers something else.
// They hold the locks of those who change it, so what has been told last is true.

// present keeps a repository from being forgotten.
func (t *Tree) present(repository string) (release func()) {
	l := t.repositories.of(repository)
	l.RLock()
	return l.RUnlock
}

// TellRepository tells of a repository's record, or that there is nothing of the
// repository. One without a record that can be read counts as hosted.
func (t *Tree) TellRepository(ctx context.Context, repository string) error {
	defer t.repositories.lock(repository)()
	data, err := t.store.Get(ctx, layout.Record(repository), maxRecord)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, storage.ErrTooLarge) {
		return err
	}
	var r Record
	if err == nil && json.Unmarshal(data, &r) == nil && r.Schema <= recordSchema {
		t.note(Change{Kind: Recorded, Repository: repository, Record: &r})
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		kept, err := t.IsKept(ctx, repository)
		if err != nil {
			return err
		}
		if !kept {
			t.note(Change{Kind: Forgotten, Repository: repository})
			return nil
		}
	}
	t.note(Change{Kind: Recorded, Repository: repository, Record: &Record{Class: Hosted}})
	return nil
}

// TellTag tells what a tag means.
func (t *Tree) TellTag(ctx context.Context, repository, tag string) error {
	defer t.present(repository)()
	defer t.lockTag(repository, tag)()
	d, err := t.Tag(ctx, repository, tag)
	var info storage.Info
	if err == nil {
		info, err = t.store.Stat(ctx, layout.TagLink(repository, tag))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		t.note(Change{Kind: Untagged, Repository: repository, Tag: tag})
	case err != nil:
		return err
	default:
		t.tagged(ctx, repository, tag, d, info.ModTime)
	}
	return nil
}

// TellManifest tells of a manifest of a repository, by its sha256. One that is
// linked and whose bytes are gone is none. Of one whose bytes are wrong it does
// not tell what it names.
func (t *Tree) TellManifest(ctx context.Context, repository string, d digest.Digest) error {
	defer t.present(repository)()
	defer t.lockDigest(d)()
	at, err := t.linkedSince(ctx, layout.RevisionLink(repository, d), d)
	var body []byte
	if err == nil {
		body, err = t.store.Get(ctx, layout.Blob(d), oci.MaxStoredManifest)
	}
	c := Change{Kind: Manifested, Repository: repository, Canonical: d, Size: int64(len(body)), At: at}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c = Change{Kind: Unmanifested, Repository: repository, Canonical: d}
	case errors.Is(err, storage.ErrTooLarge):
		info, err := t.store.Stat(ctx, layout.Blob(d))
		if err != nil {
			return err
		}
		c.Size = info.Size
	case err != nil:
		return err
	case digest.FromBytes(body) == d:
		if parsed, err := oci.ParseManifest(body); err == nil {
			c.Manifest = parsed
		}
	}
	t.note(c)
	return nil
}

// TellLink tells whether a blob belongs to a repository by a link, by its sha256.
// A link to bytes that are gone is none.
func (t *Tree) TellLink(ctx context.Context, repository string, d digest.Digest) error {
	defer t.present(repository)()
	defer t.lockDigest(d)()
	at, err := t.linkedSince(ctx, layout.LayerLink(repository, d), d)
	var info storage.Info
	if err == nil {
		info, err = t.store.Stat(ctx, layout.Blob(d))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		t.note(Change{Kind: Unlinked, Repository: repository, Canonical: d})
	case err != nil:
		return err
	default:
		t.note(Change{Kind: Linked, Repository: repository, Canonical: d, Size: info.Size, At: at})
	}
	return nil
}

// TellBlob tells whether bytes are in the store.
func (t *Tree) TellBlob(ctx context.Context, d digest.Digest) error {
	defer t.lockDigest(d)()
	info, err := t.store.Stat(ctx, layout.Blob(d))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		t.note(Change{Kind: Removed, Canonical: d})
	case err != nil:
		return err
	default:
		t.note(Change{Kind: Stored, Canonical: d, Size: info.Size, At: info.ModTime})
	}
	return nil
}

// TellPin tells whether a tag or a manifest is pinned.
func (t *Tree) TellPin(ctx context.Context, repository string, ref oci.Reference) error {
	defer t.repositories.lock(repository)()
	info, err := t.store.Stat(ctx, layout.Pin(repository, ref.Tag, ref.Digest))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		t.note(t.pinned(ctx, Unpinned, repository, ref, time.Time{}))
	case err != nil:
		return err
	default:
		t.note(t.pinned(ctx, Pinned, repository, ref, info.ModTime))
	}
	return nil
}

// linkedSince returns since when a link leads to d.
func (t *Tree) linkedSince(ctx context.Context, key string, d digest.Digest) (time.Time, error) {
	to, err := t.link(ctx, key)
	if err != nil {
		return time.Time{}, err
	}
	if to != d {
		return time.Time{}, fmt.Errorf("the link %s leads to %s: %w", key, to, ErrDamaged)
	}
	info, err := t.store.Stat(ctx, key)
	return info.ModTime, err
}
