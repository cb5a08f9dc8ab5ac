package tree

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"time"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// A Pin says that a tag or a manifest is not to be evicted.
type Pin struct {
	Schema     int       `json:"schema"`
	Repository string    `json:"repository"`
	Reference  string    `json:"reference"` // a tag or a digest
	Since      time.Time `json:"since"`
}

// Pin keeps a tag or a manifest from being evicted, now or when it is held. It
// survives a loss of power.
func (t *Tree) Pin(ctx context.Context, repository string, ref oci.Reference, at time.Time) error {
	defer t.repositories.lock(repository)()
	data, err := json.Marshal(Pin{Schema: recordSchema, Repository: repository, Reference: ref.String(), Since: at.UTC()})
	if err != nil {
		return err
	}
	key := layout.Pin(repository, ref.Tag, ref.Digest)
	t.note(t.pinned(ctx, Pinned, repository, ref, at))
	if err := t.store.Put(ctx, key, data, storage.Durable); err != nil {
		if ctx := context.WithoutCancel(ctx); t.absent(ctx, key) {
			t.note(t.pinned(ctx, Unpinned, repository, ref, at))
		}
		return fmt.Errorf("pinning %s: %w", ref.Join(repository), err)
	}
	return nil
}

// Unpin undoes that, and reports whether there was such a pin.
func (t *Tree) Unpin(ctx context.Context, repository string, ref oci.Reference) (bool, error) {
	defer t.repositories.lock(repository)()
	key := layout.Pin(repository, ref.Tag, ref.Digest)
	_, err := t.store.Stat(ctx, key)
	if errors.Is(err, fs.ErrNotExist) {
		// Tell all the same: then a catalog that knows of one is put right.
		t.note(t.pinned(ctx, Unpinned, repository, ref, time.Time{}))
		return false, nil
	}
	if err == nil {
		err = t.store.Delete(ctx, key)
	}
	if err != nil {
		return false, fmt.Errorf("unpinning %s: %w", ref.Join(repository), err)
	}
	t.note(t.pinned(ctx, Unpinned, repository, ref, time.Time{}))
	return true, nil
}

// pinned is the change of a pin. A manifest that is not held may be known by a
// digest only that is not a sha256: then Canonical is empty.
func (t *Tree) pinned(ctx context.Context, kind ChangeKind, repository string, ref oci.Reference, at time.Time) Change {
	c := Change{Kind: kind, Repository: repository, Tag: ref.Tag, At: at}
	if ref.Digest != "" {
		if c.Canonical = canonicalOf(ref.Digest); c.Canonical == "" {
			c.Digest = ref.Digest
			if linked, err := t.link(ctx, layout.RevisionLink(repository, ref.Digest)); err == nil {
				c.Canonical = linked
			}
		}
	}
	return c
}

// Pins yields all pins of a repository, or with "" of all repositories. One whose
// record cannot be read is a pin all the same, since nobody knows when.
func (t *Tree) Pins(ctx context.Context, repository string) iter.Seq2[Pin, error] {
	return func(yield func(Pin, error) bool) {
		for info, err := range t.store.List(ctx, layout.Pins(repository), true) {
			if err != nil {
				yield(Pin{}, err)
				return
			}
			name, tag, d, ok := layout.PinOf(info.Key)
			if !ok || repository != "" && name != repository {
				continue
			}
			data, err := t.store.Get(ctx, info.Key, maxRecord)
			if errors.Is(err, fs.ErrNotExist) {
				continue // unpinned since
			}
			var p Pin
			if err != nil || json.Unmarshal(data, &p) != nil {
				p = Pin{Schema: recordSchema, Since: info.ModTime.UTC()}
			}
			p.Repository, p.Reference = name, oci.Reference{Tag: tag, Digest: d}.String()
			if !yield(p, nil) {
				return
			}
		}
	}
}
