package backing

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
)

// Delete deletes a version, or with an empty reference the image and all its versions.
// What stands against it is an Error with code InUse and its Blockers; with unregister
// registrations are deleted in Longhorn first, which has the last word, and are waited
// for until ctx ends. Where Longhorn cannot be asked nothing is deleted.
func (l *Library) Delete(ctx context.Context, name, reference, revision string, unregister bool) error {
	i, err := l.Image(ctx, name)
	if err != nil {
		return err
	}
	if i.Error != "" {
		return fail(Exists, "backing image %s cannot be deleted: %s", name, i.Error)
	}
	if revision != "" && revision != i.Revision {
		return fail(PreconditionFail, "backing image %s has been changed since: read it again, and repeat the deletion", name)
	}
	going := i.Versions
	if reference != "" {
		v, err := l.Version(ctx, name, reference)
		if err != nil {
			return err
		}
		going = []Version{v}
	}
	if err := l.against(ctx, i, going, reference == "", unregister); err != nil {
		return err
	}
	if unregister {
		// Longhorn may refuse: nothing is marked before it has not.
		for _, v := range going {
			for _, r := range v.Registrations {
				if err := l.Unregister(ctx, name, v.Version, r.Cluster); err != nil {
					return err
				}
			}
		}
		if going, err = l.still(ctx, name, going); err != nil {
			return err
		}
		if i, err = l.Image(ctx, name); err != nil {
			return err
		}
		if err := l.against(ctx, i, going, reference == "", false); err != nil {
			return err
		}
	}
	marked, err := l.mark(ctx, name, revision, going, reference == "")
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	for _, v := range marked {
		if err := l.remove(ctx, name, v); err != nil {
			return err
		}
	}
	if reference == "" {
		return l.removeImage(ctx, name)
	}
	return nil
}

// still are versions as they are now.
func (l *Library) still(ctx context.Context, name string, versions []Version) ([]Version, error) {
	now := make([]Version, 0, len(versions))
	for _, v := range versions {
		v, err := l.Version(ctx, name, v.Version)
		if err != nil {
			return nil, err
		}
		now = append(now, v)
	}
	return now, nil
}

// against says what stands against a deletion.
func (l *Library) against(ctx context.Context, i Image, going []Version, whole, unregister bool) error {
	var by []Blocker
	if i.Protected {
		by = append(by, Blocker{Kind: "protected", Name: i.Name})
	}
	for n, v := range going {
		if v.Error != "" && v.Digests.SHA256 == "" && v.Job == "" {
			return fail(Exists, "version %s of %s cannot be deleted: %s", v.Version, i.Name, v.Error)
		}
		if !whole {
			for _, tag := range v.Tags {
				by = append(by, Blocker{Kind: "tag", Name: tag})
			}
		}
		switch v.State {
		case Receiving, Fetching, Verifying:
			by = append(by, Blocker{Kind: "job", Name: v.Job})
		}
		going[n].Registrations = slices.DeleteFunc(slices.Clone(v.Registrations), func(r Registration) bool { return r.Cluster == "" })
		if !unregister {
			for _, r := range v.Registrations {
				by = append(by, Blocker{Kind: "registration", Name: r.Name, Cluster: r.Cluster})
			}
		}
	}
	others, err := l.blockers(ctx, going)
	if err != nil {
		return err
	}
	for _, b := range others {
		if b.Kind == "registration" && (unregister || slices.Contains(by, b)) {
			continue
		}
		by = append(by, b)
	}
	if len(by) == 0 {
		return nil
	}
	var names []string
	for _, b := range by {
		names = append(names, b.Kind+" "+b.Name)
	}
	e := fail(InUse, "%s cannot be deleted: %s", i.Name, strings.Join(names[:min(len(names), 10)], ", "))
	e.Blockers = by
	return e
}

// mark records that versions are being deleted. From then on nobody gets them.
func (l *Library) mark(ctx context.Context, name, revision string, going []Version, whole bool) (marked []string, err error) {
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r, err := l.existing(ctx, name, revision)
	if err != nil {
		return nil, err
	}
	if r.Protected {
		return nil, &Error{Code: InUse, Message: name + " is protected", Blockers: []Blocker{{Kind: "protected", Name: name}}}
	}
	for _, v := range going {
		l.mu.RLock()
		var is *version
		if i := l.images[name]; i != nil {
			is = i.versions[v.Version]
		}
		l.mu.RUnlock()
		if is == nil || is.bad != "" {
			continue
		}
		for tag, means := range r.Tags {
			if !whole && means.Version == v.Version {
				return nil, &Error{Code: InUse, Message: "version " + v.Version + " has the tag " + tag + ": move or remove that first", Blockers: []Blocker{{Kind: "tag", Name: tag}}}
			}
		}
		next := *is.record
		next.State = Deleting
		marked = append(marked, v.Version) // which it may be though an error is told
		if err := l.putVersion(context.WithoutCancel(ctx), &next); err != nil {
			l.unmarkLocked(context.WithoutCancel(ctx), name, marked)
			return nil, err
		}
	}
	failpoint.Hit("backing.deleting")
	return marked, nil
}

// unmarkLocked takes mark back: what was to be deleted stays. The image's lock is held.
func (l *Library) unmarkLocked(ctx context.Context, name string, versions []string) {
	for _, v := range versions {
		l.mu.RLock()
		var is *version
		if i := l.images[name]; i != nil {
			is = i.versions[v]
		}
		l.mu.RUnlock()
		if is == nil || is.bad != "" {
			continue
		}
		next := *is.record
		next.State = Ready
		if err := l.putVersion(ctx, &next); err != nil {
			l.parts.Log.Error("a version that is not deleted after all stays marked; the next start deletes it", zap.String("image", name), zap.String("version", v), zap.Error(err))
		}
	}
}

// remove takes a version that is being deleted out of the store.
func (l *Library) remove(ctx context.Context, name, v string) error {
	// Before the image's lock, which the end of a token takes. Nobody registers what is
	// marked.
	if err := l.forget(ctx, name, v); err != nil {
		return err
	}
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	l.mu.RLock()
	var is *version
	if i := l.images[name]; i != nil {
		is = i.versions[v]
	}
	l.mu.RUnlock()
	if is == nil || is.bad != "" || is.record.State != Deleting {
		return nil
	}
	r, err := l.current(ctx, name)
	if err != nil {
		return err
	}
	if r != nil {
		for tag, means := range r.Tags {
			if means.Version == v {
				delete(r.Tags, tag)
			}
		}
		// Its name is not given again.
		r.Last = max(r.Last, number(v))
		if err := l.putImage(ctx, r); err != nil {
			return err
		}
	}
	failpoint.Hit("backing.untagged")
	if err := l.unmanifest(ctx, name, is.record.Manifest); err != nil {
		return err
	}
	failpoint.Hit("backing.unmanifest")
	if err := l.delete(ctx, layout.ImageVersion(name, v)); err != nil {
		return err
	}
	l.setVersion(name, v, nil)
	failpoint.Hit("backing.unrecord")
	return nil
}

// unmanifest removes a manifest and its tags.
func (l *Library) unmanifest(ctx context.Context, name string, d digest.Digest) error {
	_, err := l.parts.Hosted.Owner().DeleteManifest(ctx, l.repository(name), d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// delete removes a record, which is not back after a loss of power.
func (l *Library) delete(ctx context.Context, key string) error {
	if err := l.parts.Store.Delete(ctx, key); err != nil {
		return err
	}
	return l.parts.Store.Sync(ctx, key)
}

// removeImage removes the record of an image that has no version.
func (l *Library) removeImage(ctx context.Context, name string) error {
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	l.mu.RLock()
	i := l.images[name]
	left, begun := i != nil && (len(i.versions) > 0 || i.bad != ""), len(l.reserved[name]) > 0
	l.mu.RUnlock()
	if i == nil {
		return nil
	}
	if left {
		return fail(Busy, "a version of %s has been made while the others were deleted, and stays with the image's labels and tokens; repeat the deletion if it is to go, too", name)
	}
	if begun && i.record != nil {
		// One is being made. It is of a new image, which has nothing of the old one but
		// the names that are not given again.
		return l.putImage(ctx, &imageRecord{Name: name, Created: l.now().UTC(), Labels: map[string]string{}, Tags: map[string]Tag{}, Last: i.record.Last})
	}
	if err := l.delete(ctx, layout.Image(name)); err != nil {
		return err
	}
	l.setImage(name, nil, "")
	failpoint.Hit("backing.unimage")
	return nil
}

// resumeDeletions goes on with what an earlier process was deleting.
func (l *Library) resumeDeletions(ctx context.Context) {
	type one struct{ name, version string }
	var going []one
	l.mu.RLock()
	for name, i := range l.images {
		for v, is := range i.versions {
			if is.bad == "" && is.record.State == Deleting {
				going = append(going, one{name, v})
			}
		}
	}
	l.mu.RUnlock()
	for _, g := range going {
		if err := l.resumeDeletion(ctx, g.name, g.version); err != nil {
			l.parts.Log.Warn("a version that is being deleted cannot be removed; it is tried again", zap.String("image", g.name), zap.String("version", g.version), zap.Error(err))
		}
	}
}

func (l *Library) resumeDeletion(ctx context.Context, name, v string) error {
	for _, r := range l.registrations(name, v) {
		if err := l.Unregister(ctx, name, v, r.Cluster); err != nil {
			return err
		}
	}
	return l.remove(ctx, name, v)
}

// sweep removes what is noted of what is no more.
func (l *Library) sweep(ctx context.Context) {
	l.recoverDrafts(ctx)
	l.pruneJobs(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, u := range l.unfinished {
		if l.now().After(u.Expires()) {
			delete(l.unfinished, id)
		}
	}
}
