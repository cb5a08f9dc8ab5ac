package tree

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
)

// ErrNeeded is the error of a removal of what somebody needs by then.
var ErrNeeded = errors.New("it is needed again")

// still asks whether somebody needs what is about to be removed, and nobody can
// begin to until it has been. A nil needed asks nobody.
func still(needed func() (bool, error)) error {
	if needed == nil {
		return nil
	}
	yes, err := needed()
	if err == nil && yes {
		err = ErrNeeded
	}
	return err
}

// RemoveTag lets a tag mean nothing any more, if it means d still, or if it means
// nothing and something of it is left. Its record goes too. needed is asked as by
// RemoveBlob; if it says yes, the error is [ErrNeeded].
func (t *Tree) RemoveTag(ctx context.Context, repository, tag string, d digest.Digest, needed func() (bool, error)) error {
	defer t.lockTag(repository, tag)()
	if err := still(needed); err != nil {
		return err
	}
	now, err := t.Tag(ctx, repository, tag)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && now != d {
		canonical, err := t.link(ctx, layout.RevisionLink(repository, now))
		if errors.Is(err, fs.ErrNotExist) || err == nil && canonical != d {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return t.untag(ctx, repository, tag)
}

// untag removes a tag. Its lock is held.
func (t *Tree) untag(ctx context.Context, repository, tag string) error {
	// From here on it means nothing. What is left behind it by a process that dies
	// is removed the next time, or said again by the next SetTag.
	if err := t.store.Delete(ctx, layout.TagLink(repository, tag)); err != nil {
		return err
	}
	failpoint.Hit("evict.untagged")
	t.note(Change{Kind: Untagged, Repository: repository, Tag: tag})
	if _, err := t.removeAll(ctx, layout.TagIndex(repository, tag)); err != nil {
		return err
	}
	failpoint.Hit("evict.unindexed")
	return t.store.Delete(ctx, layout.TagRecord(repository, tag))
}

// removeAll deletes everything below a prefix, and returns the keys.
func (t *Tree) removeAll(ctx context.Context, prefix string) (keys []string, err error) {
	for info, err := range t.store.List(ctx, prefix, true) {
		if err != nil {
			return nil, err
		}
		keys = append(keys, info.Key)
	}
	for _, key := range keys {
		if err := t.store.Delete(ctx, key); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// RemoveManifest takes a manifest out of a repository, whatever digest it was
// asked for by. Its bytes stay: see RemoveBlob. needed is asked as by that; if it
// says yes, the error is [ErrNeeded].
func (t *Tree) RemoveManifest(ctx context.Context, repository string, d digest.Digest, needed func() (bool, error)) error {
	canonical, err := t.canonical(ctx, repository, d, layout.RevisionLink(repository, d))
	if err != nil {
		return err
	}
	defer t.lockDigest(canonical)()
	if err := still(needed); err != nil {
		return err
	}
	named := t.names(ctx, canonical)
	names, err := t.removeLinks(ctx, layout.Revisions(repository), layout.RevisionLink(repository, canonical), canonical)
	if err != nil {
		return err
	}
	failpoint.Hit("evict.unmanifested")
	g := t.guards.of(repository)
	g.mu.Lock()
	g.removals.Add(1)
	read := false
	for _, name := range append(names, d) {
		read = t.revisions.Remove(member{repository, name}) || read
	}
	// What it names belongs to the repository no more, unless another says so.
	switch {
	case named != nil:
		for _, blob := range named.Blobs {
			t.members.Remove(member{repository, blob.Digest})
		}
		for _, child := range named.Children {
			t.members.Remove(member{repository, child.Digest})
		}
	case read: // and its bytes were lost since
		for _, key := range t.members.Keys() {
			if key.repository == repository {
				t.members.Remove(key)
			}
		}
	}
	t.scanned.Remove(repository)
	g.mu.Unlock()
	t.note(Change{Kind: Unmanifested, Repository: repository, Canonical: canonical})
	return nil
}

// names returns a manifest that lies under a digest, or nil if its bytes are lost.
func (t *Tree) names(ctx context.Context, canonical digest.Digest) *oci.Manifest {
	if w, ok := t.hot.get(canonical); ok {
		if m := cmp.Or(w.manifest, w.other); m != nil {
			return m.Manifest
		}
	}
	m, err := t.load(ctx, canonical, canonical)
	if err != nil {
		return nil
	}
	return m.Manifest
}

// canonical finds out what a digest lies under in a repository. Of what it does
// not have, memory may know.
func (t *Tree) canonical(ctx context.Context, repository string, d digest.Digest, key string) (digest.Digest, error) {
	if d.Algorithm() == digest.Canonical {
		return d, nil
	}
	canonical, err := t.link(ctx, key)
	if errors.Is(err, fs.ErrNotExist) {
		canonical, err = d, nil
		if r, ok := t.revisions.Peek(member{repository, d}); ok {
			canonical = r.canonical
		}
	}
	return canonical, err
}

// removeLinks deletes the links to content by any digest, the canonical one last,
// and returns the digests. prefix is where its links lie, and key that of the
// canonical one.
func (t *Tree) removeLinks(ctx context.Context, prefix, key string, canonical digest.Digest) ([]digest.Digest, error) {
	names := []digest.Digest{canonical}
	for algorithm, err := range t.store.List(ctx, prefix, false) {
		if err != nil {
			return nil, err
		}
		if !strings.HasSuffix(algorithm.Key, "/") || algorithm.Key == prefix+digest.Canonical.String()+"/" {
			continue
		}
		for info, err := range t.store.List(ctx, algorithm.Key, true) {
			if err != nil {
				return nil, err
			}
			name, ok := layout.DigestOf(info.Key)
			if !ok {
				continue
			}
			if to, err := t.link(ctx, info.Key); err == nil && to == canonical {
				names = append(names, name)
				err = t.store.Delete(ctx, info.Key)
				if err != nil {
					return nil, err
				}
			}
		}
	}
	return names, t.store.Delete(ctx, key)
}

// Unlink takes a blob out of a repository, whatever digest it was asked for by,
// unless a manifest there names it. Its bytes stay: see RemoveBlob. needed is asked
// as by that; if it says yes, the error is [ErrNeeded].
func (t *Tree) Unlink(ctx context.Context, repository string, d digest.Digest, needed func() (bool, error)) error {
	canonical, err := t.canonical(ctx, repository, d, layout.LayerLink(repository, d))
	if err != nil {
		return err
	}
	defer t.lockDigest(canonical)()
	if err := still(needed); err != nil {
		return err
	}
	names, err := t.removeLinks(ctx, layout.Layers(repository), layout.LayerLink(repository, canonical), canonical)
	if err != nil {
		return err
	}
	failpoint.Hit("evict.unlinked")
	g := t.guards.of(repository)
	g.mu.Lock()
	g.removals.Add(1)
	for _, name := range append(names, d) {
		t.members.Remove(member{repository, name})
	}
	t.scanned.Remove(repository) // whoever names it proves it again
	g.mu.Unlock()
	t.note(Change{Kind: Unlinked, Repository: repository, Canonical: canonical})
	return nil
}

// RemoveBlob deletes bytes unless, once nobody can begin to refer to them any
// more, needed says that somebody does. It may be nil: nobody is asked. It
// reports whether there was something to delete, and has been.
//
// Whoever has opened them reads on. A fill that has just stored the same bytes
// again and not linked them yet finds that they are gone when it does.
func (t *Tree) RemoveBlob(ctx context.Context, d digest.Digest, needed func() (bool, error)) (removed bool, err error) {
	defer t.lockDigest(d)()
	if needed != nil {
		if yes, err := needed(); err != nil || yes {
			return false, err
		}
	}
	removed = true
	if _, err := t.store.Stat(ctx, layout.Blob(d)); errors.Is(err, fs.ErrNotExist) {
		removed = false
	} else if err != nil {
		return false, err
	}
	if removed {
		if err := t.store.Delete(ctx, layout.Blob(d)); err != nil {
			return false, err
		}
	}
	failpoint.Hit("evict.removed")
	t.hot.remove(d)
	t.note(Change{Kind: Removed, Canonical: d})
	return removed, nil
}

// enter begins to put something into a repository, which it must not be while
// Forget is at work; so afterwards either there is no record and nothing else, or
// there is one.
func (t *Tree) enter(ctx context.Context, repository string) (leave func(), err error) {
	l := t.repositories.of(repository)
	for {
		l.RLock()
		record, forgotten := t.forgotten.Peek(repository)
		if !forgotten {
			return l.RUnlock, nil
		}
		l.RUnlock()
		if err := t.PutRecord(ctx, repository, record); err != nil {
			return nil, err
		}
	}
}

// Forget removes what is left of a repository that has no manifest: its links, its
// record, and its directories. Pins stay: they are of what may come again. A hosted
// one with a link is kept whole, since a manifest may be about to be pushed, and so
// is one without a record. Whoever puts something into it later records it again as
// what it was.
func (t *Tree) Forget(ctx context.Context, repository string) error {
	defer t.repositories.lock(repository)()
	record, err := t.Record(ctx, repository)
	if err != nil {
		return fmt.Errorf("nobody knows what repository %s is, and it is kept: %w", repository, err)
	}
	if record.Class != Mirrored {
		for info, err := range t.store.List(ctx, layout.Layers(repository), true) {
			if err != nil {
				return err
			}
			return fmt.Errorf("repository %s has %s, and is kept", repository, info.Key)
		}
	}
	for info, err := range t.store.List(ctx, layout.Revisions(repository), true) {
		if err != nil {
			return err
		}
		if d, ok := layout.DigestOf(info.Key); ok && !t.absentLink(ctx, info.Key) {
			return fmt.Errorf("repository %s has the manifest %s, and is kept", repository, d)
		}
	}
	tags, err := t.Tags(ctx, repository)
	if err != nil {
		return err
	}
	if record.Class != Mirrored && len(tags) > 0 {
		return fmt.Errorf("repository %s has the tag %s, and is kept", repository, tags[0])
	}
	for _, tag := range tags {
		means, err := t.Tag(ctx, repository, tag)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := t.RemoveTag(ctx, repository, tag, means, nil); err != nil {
			return err
		}
	}
	// The record goes last: a process that dies here has left a mirrored
	// repository.
	var linked []string
	for _, prefix := range []string{layout.Manifests(repository), layout.TagRecords(repository), layout.Layers(repository)} {
		if linked, err = t.removeAll(ctx, prefix); err != nil {
			return err
		}
	}
	if err := t.store.Delete(ctx, layout.Record(repository)); err != nil {
		return err
	}
	failpoint.Hit("evict.forgotten")
	g := t.guards.of(repository)
	g.mu.Lock()
	g.removals.Add(1)
	for _, key := range linked {
		if d, ok := layout.DigestOf(key); ok {
			t.members.Remove(member{repository, d})
		}
	}
	t.scanned.Remove(repository)
	t.records.Remove(repository)
	t.forgotten.Add(repository, record)
	g.mu.Unlock()
	t.note(Change{Kind: Forgotten, Repository: repository})
	for pin, err := range t.Pins(ctx, repository) {
		if err != nil {
			return err
		}
		ref, err := oci.ParseReference(pin.Reference)
		if err != nil {
			continue
		}
		t.note(t.pinned(ctx, Pinned, repository, ref, pin.Since))
	}
	return nil
}

// absentLink reports whether there is certainly nothing that a link leads to.
func (t *Tree) absentLink(ctx context.Context, key string) bool {
	_, err := t.link(ctx, key)
	return errors.Is(err, fs.ErrNotExist)
}
