package tree

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
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

// Tagged returns the manifest that a tag means. One that has been moved on while it
// was being read is read again: what it meant before may have been deleted.
func (t *Tree) Tagged(ctx context.Context, repository, tag string) (*Manifest, error) {
	d, err := t.Tag(ctx, repository, tag)
	for err == nil {
		m, absent := t.Manifest(ctx, repository, d)
		if !errors.Is(absent, fs.ErrNotExist) {
			return m, absent
		}
		before := d
		if d, err = t.Tag(ctx, repository, tag); err == nil && d == before {
			return nil, absent
		}
	}
	return nil, err
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

func (t *Tree) putTagRecord(ctx context.Context, w *writing, repository, tag string, r TagRecord) error {
	r.Schema = recordSchema
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return w.replace(ctx, layout.TagRecord(repository, tag), data)
}

// SetTag lets a tag mean a manifest from the given time on. The index, which
// remembers all it ever meant, comes first, as in registry:2. permit is asked, under
// the tag's lock, whether it may be so; before is what the tag means, or empty. A
// nil permit always agrees.
//
// In a hosted repository the manifest must be stored there; if it is not, the error
// is an fs.ErrNotExist. A tag that means d already counts as pushed again there.
func (t *Tree) SetTag(ctx context.Context, repository, tag string, d digest.Digest, at time.Time, permit func(before digest.Digest) error) error {
	w := t.write(ctx, repository)
	defer w.end()
	if err := t.setTag(ctx, w, repository, tag, d, at, permit); err != nil || !w.lasting {
		return err
	}
	failpoint.Hit("tag.linked")
	if err := w.sync(ctx); err != nil {
		return err
	}
	failpoint.Hit("tag.synced")
	return nil
}

// setTag does so, up to the sync.
func (t *Tree) setTag(ctx context.Context, w *writing, repository, tag string, d digest.Digest, at time.Time, permit func(before digest.Digest) error) error {
	leave, err := t.enter(ctx, repository)
	if err != nil {
		return err
	}
	defer leave()
	defer t.lockTag(repository, tag)()
	before, err := t.Tag(ctx, repository, tag)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if permit != nil {
		if err := permit(before); err != nil {
			return err
		}
	}
	if before == d && !t.isHosted(ctx, repository) {
		w.touch(layout.TagLink(repository, tag))
		return nil
	}
	canonical := t.canonicalManifest(ctx, repository, d)
	defer t.keepDigest(canonical)()
	t.tagged(ctx, repository, tag, d, at)
	if err := t.pointTag(ctx, w, repository, tag, before, d, canonical, at); err != nil {
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

// canonicalManifest is the sha256 of a manifest of a repository, or d if it is not
// known there.
func (t *Tree) canonicalManifest(ctx context.Context, repository string, d digest.Digest) digest.Digest {
	if d.Algorithm() != digest.Canonical {
		if linked, err := t.link(ctx, layout.RevisionLink(repository, d)); err == nil {
			return linked
		}
	}
	return d
}

// tagged tells what a tag means.
func (t *Tree) tagged(ctx context.Context, repository, tag string, d digest.Digest, at time.Time) {
	canonical := t.canonicalManifest(ctx, repository, d)
	t.note(Change{Kind: Tagged, Repository: repository, Tag: tag, Canonical: canonical, Digest: otherThan(canonical, d), At: at})
}

// pointTag lets a tag mean d. before is what it has meant until now, if it has. The
// tag's lock is held, and that of the manifest is shared.
func (t *Tree) pointTag(ctx context.Context, w *writing, repository, tag string, before, d, canonical digest.Digest, at time.Time) error {
	if t.isHosted(ctx, repository) {
		stored := []string{layout.RevisionLink(repository, d), layout.RevisionLink(repository, canonical), layout.Blob(canonical)}
		for _, key := range stored {
			if _, err := t.store.Stat(ctx, key); err != nil {
				return fmt.Errorf("tagging %s in repository %s: %w", d, repository, err)
			}
		}
		w.rest(stored...)
	}
	if before != "" && before != d {
		r, err := t.TagRecord(ctx, repository, tag)
		if err != nil {
			return err
		}
		r.Moved, r.Previous = at.UTC(), before
		if err := t.putTagRecord(ctx, w, repository, tag, r); err != nil {
			return err
		}
	}
	if err := w.replace(ctx, layout.TagIndexLink(repository, tag, d), []byte(d)); err != nil {
		return err
	}
	failpoint.Hit("tag.indexed")
	return w.replace(ctx, layout.TagLink(repository, tag), []byte(d))
}

// A TagEvent is that a tag began to mean something.
type TagEvent struct {
	Digest digest.Digest `json:"digest"`
	Since  time.Time     `json:"since"`
}

// maxHistory is how many events of a tag are told.
const maxHistory = 100

// History returns what a tag has meant, and since when, the latest first: as far as
// its index says, which has the last time only of what it has meant several times.
// It has 100 entries at most. If there is no such tag, the error is an
// fs.ErrNotExist.
func (t *Tree) History(ctx context.Context, repository, tag string) ([]TagEvent, error) {
	means, err := t.Tag(ctx, repository, tag)
	if err != nil {
		return nil, err
	}
	now, err := t.store.Stat(ctx, layout.TagLink(repository, tag))
	if err != nil {
		return nil, err
	}
	var before []TagEvent
	latest := func() {
		slices.SortFunc(before, func(a, b TagEvent) int { return b.Since.Compare(a.Since) })
		before = before[:min(len(before), maxHistory-1)]
	}
	for info, err := range t.store.List(ctx, layout.TagIndex(repository, tag), true) {
		if err != nil {
			return nil, err
		}
		if d, ok := layout.DigestOf(info.Key); ok && d != means {
			before = append(before, TagEvent{d, info.ModTime.UTC()})
		}
		if len(before) == 10*maxHistory {
			latest()
		}
	}
	latest()
	return append([]TagEvent{{means, now.ModTime.UTC()}}, before...), nil
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
	return t.putTagRecord(ctx, &writing{tree: t}, repository, tag, r)
}

// Tags returns the tags of a repository, in no order. A process that died while it
// removed a tag may have left something of it; while the store is shared it is
// certain that each means something.
func (t *Tree) Tags(ctx context.Context, repository string) ([]string, error) {
	if t.Shared() {
		return t.whole(ctx, repository)
	}
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
