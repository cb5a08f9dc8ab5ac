package tree

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// A TagRecord is what a tag's links cannot tell. There is none of a tag that has
// meant the same from the beginning: it was first seen when its link was
// written.
type TagRecord struct {
	Schema int `json:"schema"`
	// FirstSeen is when the tag came into the store.
	FirstSeen time.Time `json:"first_seen"`
	// Moved is when it last began to mean something else, and Previous what it
	// meant before.
	Moved    time.Time     `json:"moved,omitzero"`
	Previous digest.Digest `json:"previous,omitempty"`
	// Gone is since when its origin says that there is no such tag.
	Gone time.Time `json:"gone,omitzero"`
}

// Tag returns what a tag means.
func (t *Tree) Tag(ctx context.Context, repository, tag string) (digest.Digest, error) {
	return t.link(ctx, layout.TagLink(repository, tag))
}

// TagRecord returns what is known of a tag that is stored, record or not. A
// record that a loss of power has damaged counts as none.
func (t *Tree) TagRecord(ctx context.Context, repository, tag string) (TagRecord, error) {
	data, err := t.store.Get(ctx, layout.TagRecord(repository, tag), maxRecord)
	var r TagRecord
	switch {
	case err == nil && json.Unmarshal(data, &r) == nil:
		if r.Schema > recordSchema {
			return TagRecord{}, fmt.Errorf("the record of tag %s:%s has schema %d, which a newer version of this program wrote", repository, tag, r.Schema)
		}
		return r, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return TagRecord{}, err
	}
	info, err := t.store.Stat(ctx, layout.TagLink(repository, tag))
	return TagRecord{FirstSeen: info.ModTime.UTC()}, err
}

func (t *Tree) putTagRecord(ctx context.Context, repository, tag string, r TagRecord) error {
	r.Schema = recordSchema
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return t.store.Put(ctx, layout.TagRecord(repository, tag), data, storage.Lazy)
}

// SetTag lets a tag mean a manifest from the given time on. The index, which
// remembers all it ever meant, comes first, as in registry:2.
func (t *Tree) SetTag(ctx context.Context, repository, tag string, d digest.Digest, at time.Time) error {
	leave, err := t.enter(ctx, repository)
	if err != nil {
		return err
	}
	defer leave()
	defer t.lockTag(repository, tag)()
	before, err := t.Tag(ctx, repository, tag)
	if err == nil && before == d {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t.tagged(ctx, repository, tag, d, at)
	if err := t.setTag(ctx, repository, tag, before, d, at); err != nil {
		ctx := context.WithoutCancel(ctx)
		switch now, tagErr := t.Tag(ctx, repository, tag); {
		case errors.Is(tagErr, fs.ErrNotExist):
			t.note(Change{Kind: Untagged, Repository: repository, Tag: tag})
		case tagErr == nil && now == before:
			if info, err := t.store.Stat(ctx, layout.TagLink(repository, tag)); err == nil {
				t.tagged(ctx, repository, tag, before, info.ModTime)
			}
		}
		return err
	}
	return nil
}

// tagged tells what a tag means.
func (t *Tree) tagged(ctx context.Context, repository, tag string, d digest.Digest, at time.Time) {
	canonical := d
	if d.Algorithm() != digest.Canonical {
		if linked, err := t.link(ctx, layout.RevisionLink(repository, d)); err == nil {
			canonical = linked
		}
	}
	t.note(Change{Kind: Tagged, Repository: repository, Tag: tag, Canonical: canonical, Digest: otherThan(canonical, d), At: at})
}

// setTag lets a tag mean d. before is what it has meant until now, if it has. The
// tag's lock is held.
func (t *Tree) setTag(ctx context.Context, repository, tag string, before, d digest.Digest, at time.Time) error {
	if before != "" {
		r, err := t.TagRecord(ctx, repository, tag)
		if err != nil {
			return err
		}
		r.Moved, r.Previous = at.UTC(), before
		if err := t.putTagRecord(ctx, repository, tag, r); err != nil {
			return err
		}
	}
	if err := t.setLink(ctx, layout.TagIndexLink(repository, tag, d), d); err != nil {
		return err
	}
	failpoint.Hit("tag.indexed")
	return t.setLink(ctx, layout.TagLink(repository, tag), d)
}

// SetGone notes since when the origin of a stored tag says that there is no such
// tag, or with the zero time that there is.
func (t *Tree) SetGone(ctx context.Context, repository, tag string, since time.Time) error {
	defer t.lockTag(repository, tag)()
	r, err := t.TagRecord(ctx, repository, tag)
	if err != nil || r.Gone.Equal(since) {
		return err
	}
	r.Gone = since.UTC()
	return t.putTagRecord(ctx, repository, tag, r)
}

// Tags returns the tags of a repository, in no order.
func (t *Tree) Tags(ctx context.Context, repository string) ([]string, error) {
	var tags []string
	prefix := layout.Tags(repository)
	for info, err := range t.store.List(ctx, prefix, false) {
		if err != nil {
			return nil, err
		}
		tag := strings.TrimSuffix(strings.TrimPrefix(info.Key, prefix), "/")
		if strings.HasSuffix(info.Key, "/") && oci.ValidTag(tag) {
			tags = append(tags, tag)
		}
	}
	return tags, nil
}
