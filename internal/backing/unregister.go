package backing

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddy-registry/mirror/internal/backing/longhorn"
	"github.com/caddy-registry/mirror/internal/failpoint"
)

// Unregister deletes a version's backing image in Longhorn, and then its registration.
// What stands against it is an Error with code InUse and its Blockers. It waits until
// Longhorn has deleted it, or ctx ends: it goes on then behind the caller.
func (l *Library) Unregister(ctx context.Context, name, reference, cluster string) error {
	// One that is being deleted is no version to anybody any more, but registered.
	v := Version{Name: name, Version: reference}
	if len(l.registrar.of(name, reference)) == 0 {
		var err error
		if v, err = l.Version(ctx, name, reference); err != nil {
			return err
		}
	}
	return l.registrar.unregister(ctx, v, cluster)
}

// Forget lets go of a version's registration, and asks Longhorn nothing: what it has
// stays there. It is for a Longhorn that is no more, and one that is configured makes no
// difference.
func (l *Library) Forget(ctx context.Context, name, reference, cluster string) error {
	if len(l.registrar.of(name, reference)) == 0 {
		v, err := l.Version(ctx, name, reference)
		if err != nil {
			return err
		}
		reference = v.Version
	}
	return l.registrar.disown(ctx, place{name, reference, cluster})
}

func (r *registrar) disown(ctx context.Context, p place) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	unlock, err := r.lock(ctx, p.cluster)
	if err != nil {
		return err
	}
	defer unlock()
	r.mu.Lock()
	held := r.held[p]
	r.mu.Unlock()
	if held == nil {
		return fail(NotFound, "%s %s is not registered with a cluster %.63q", p.image, p.version, p.cluster)
	}
	return r.forget(ctx, p)
}

func (r *registrar) unregister(ctx context.Context, v Version, name string) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	c, err := r.find(name)
	if err != nil {
		r.mu.Lock()
		held := r.held[place{v.Name, v.Version, name}]
		r.mu.Unlock()
		if held != nil {
			return fail(LonghornAway, "Longhorn %s is not configured, so it cannot be asked to delete %s; forget the registration (DELETE …?forget=true) if the cluster is no more", name, held.record.Name)
		}
		return err
	}
	p := place{v.Name, v.Version, c.Name}
	if err := r.dismiss(ctx, c, p); err != nil {
		return err
	}
	c.wake()
	for {
		unlock, err := c.lock(ctx)
		if err != nil {
			return err
		}
		gone, err := r.remove(ctx, c, p)
		unlock()
		if gone || err != nil {
			return err
		}
		timer := time.NewTimer(r.pace.poll)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fail(Busy, "Longhorn %s has not deleted the image yet; it goes on: %w", c.Name, ctx.Err())
		}
	}
}

// dismiss notes that a registration is to go, if no volume uses its image.
func (r *registrar) dismiss(ctx context.Context, c *cluster, p place) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r.mu.Lock()
	held := r.held[p]
	if held == nil {
		r.mu.Unlock()
		return fail(NotFound, "%s %s is not registered with %s", p.image, p.version, c.Name)
	}
	record := held.record
	r.mu.Unlock()
	blockers, err := c.users(ctx, []string{record.SHA512.Encoded()}, []string{record.Name})
	if err != nil {
		return err
	}
	blockers = slices.DeleteFunc(blockers, func(b Blocker) bool { return b.Kind != "volume" })
	if len(blockers) > 0 {
		return inUse(blockers, "volumes in Longhorn %s use %s", c.Name, record.Name)
	}
	record.Removing = true
	if err := r.write(ctx, record); err != nil {
		return err
	}
	failpoint.Hit("backing.unregistering")
	return nil
}

// remove takes a removal on: it asks Longhorn to delete the image, or finds that it
// is gone. A refusal ends the removal, and everything is as it was. The caller holds
// the cluster's lock.
func (r *registrar) remove(ctx context.Context, c *cluster, p place) (gone bool, err error) {
	r.mu.Lock()
	held := r.held[p]
	if held == nil || !held.record.Removing {
		r.mu.Unlock()
		return held == nil, nil
	}
	held.state = Removing
	record := held.record
	r.mu.Unlock()
	image, err := c.client.Image(ctx, record.Name)
	if err == nil && !record.ours(image) {
		return true, r.forget(ctx, p)
	}
	if err == nil && image.DeletionTimestamp == "" {
		if err = c.client.Delete(ctx, record.Name); err == nil {
			return false, nil
		}
	}
	switch {
	case err == nil:
		return false, nil
	case errors.Is(err, longhorn.ErrNotFound):
		failpoint.Hit("backing.unregistered")
		return true, r.forget(ctx, p)
	case errors.Is(err, longhorn.ErrRefused):
		record.Removing = false
		if err := r.write(ctx, record); err != nil {
			return false, err
		}
		return false, inUse([]Blocker{{Kind: "replica", Name: record.Name, Cluster: c.Name}}, "%w", err)
	}
	return false, told(err)
}

// ours reports whether an image in Longhorn is what was made for a registration, with its
// bytes. No other is deleted there: not one that somebody else had it make with the same
// bytes, and was adopted, nor one restored, cloned or exported.
func (record *registration) ours(image longhorn.Image) bool {
	sum := cmp.Or(image.CurrentChecksum, image.ExpectedChecksum)
	return record.makes(image) && (sum == "" || sum == record.SHA512.Encoded())
}

// makes reports whether an image is made as its registration has it made: fetched from
// our address, which nothing else has, or sent by us, which only the record tells.
func (record *registration) makes(image longhorn.Image) bool {
	switch {
	case record.Adopted || image.SourceType != string(record.Mode):
		return false
	case record.Mode == Download:
		return record.URL != "" && image.Parameters["url"] == record.URL
	}
	return record.Made && image.ExpectedChecksum == record.SHA512.Encoded()
}

func inUse(blockers []Blocker, format string, args ...any) *Error {
	e := fail(InUse, format, args...)
	e.Blockers = blockers
	return e
}

// told is an error of a call to Longhorn as clients are told.
func told(err error) error {
	if errors.Is(err, longhorn.ErrAway) {
		return fail(LonghornAway, "%w", err)
	}
	return fail(LonghornError, "%w", err)
}

// blockers are what of the clusters stands against the deletion of versions. Where a
// configured Longhorn cannot be asked the answer is an error, and nothing may be
// deleted.
func (l *Library) blockers(ctx context.Context, versions []Version) ([]Blocker, error) {
	return l.registrar.blockers(ctx, versions)
}

func (r *registrar) blockers(ctx context.Context, versions []Version) ([]Blocker, error) {
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	var found []Blocker
	var sums []string
	names := map[string][]string{}
	var usual []string // names, whether registered or not
	for _, v := range versions {
		for _, told := range r.of(v.Name, v.Version) {
			found = append(found, Blocker{Kind: "registration", Name: told.Name, Cluster: told.Cluster})
			names[told.Cluster] = append(names[told.Cluster], told.Name)
		}
		if v.Digests.SHA512 != "" {
			sums = append(sums, v.Digests.SHA512.Encoded())
			usual = append(usual, longhornNameOf(v.Name, v.Digests.SHA512))
		}
	}
	if len(sums) == 0 {
		return found, nil
	}
	r.mu.Lock()
	clusters := slices.Collect(maps.Values(r.clusters))
	r.mu.Unlock()
	slices.SortFunc(clusters, func(a, b *cluster) int { return cmp.Compare(a.Name, b.Name) })
	for _, c := range clusters {
		others, err := c.holders(ctx, versions, names[c.Name])
		if err == nil {
			for _, image := range others {
				if image.from {
					found = append(found, Blocker{Kind: "backing-image", Name: image.name, Cluster: c.Name})
				}
				names[c.Name] = append(names[c.Name], image.name)
			}
			var users []Blocker
			users, err = c.users(ctx, sums, append(names[c.Name], usual...))
			found = append(found, users...)
		}
		if err != nil {
			return nil, fail(LonghornAway, "%w; if Longhorn %s is no more, take it out of the configuration and forget its registrations (DELETE …/registrations/%s?forget=true)", err, c.Name, c.Name)
		}
	}
	return found, nil
}

// A holder is a backing image that is not registered, and has the bytes of a version.
type holder struct {
	name string
	from bool // it was fetched from us, and would be again
}

// holders are the backing images of a cluster that have the bytes of versions, or an
// address of them, under other names than those that are registered.
func (c *cluster) holders(ctx context.Context, versions []Version, registered []string) ([]holder, error) {
	images, err := c.client.Images(ctx)
	if err != nil {
		return nil, told(err)
	}
	var found []holder
	for _, image := range images {
		if image.DeletionTimestamp != "" || slices.Contains(registered, image.Name) {
			continue
		}
		sum := cmp.Or(image.CurrentChecksum, image.ExpectedChecksum)
		for _, v := range versions {
			if from := fetches(image.Parameters["url"], v); from || v.Digests.SHA512 != "" && sum == v.Digests.SHA512.Encoded() {
				found = append(found, holder{image.Name, from})
				break
			}
		}
	}
	return found, nil
}

// fetches reports whether an address is one of a version's, whatever the host: of the
// file, with a token or without, or the one for people.
func fetches(address string, v Version) bool {
	u, err := url.Parse(address)
	if err != nil || address == "" {
		return false
	}
	if v.Digests.SHA512 != "" && strings.Contains(u.Path, "/v1/files/") && strings.Contains(u.Path, "/"+v.Digests.SHA512.Encoded()+"/") {
		return true
	}
	of := u.Query().Get("version") // none: whichever was the latest then
	return strings.HasSuffix(u.Path, "/v1/backing-images/"+v.Name+"/download") && (of == "" || of == v.Version || slices.Contains(v.Tags, of))
}

// users are the volumes of a cluster that use images by their names, and what
// there are backups of that can only be restored on it.
func (c *cluster) users(ctx context.Context, sums, names []string) ([]Blocker, error) {
	volumes, err := c.client.Volumes(ctx)
	if err != nil {
		return nil, told(err)
	}
	backups, err := c.client.BackupVolumes(ctx)
	if err != nil {
		return nil, told(err)
	}
	var found []Blocker
	for _, v := range volumes {
		if slices.Contains(names, v.BackingImage) {
			found = append(found, Blocker{Kind: "volume", Name: v.Name, Cluster: c.Name})
		}
	}
	for _, b := range backups {
		if slices.Contains(names, b.BackingImageName) || slices.Contains(sums, b.BackingImageChecksum) {
			found = append(found, Blocker{Kind: "backup", Name: b.Name, Cluster: c.Name})
		}
	}
	return found, nil
}
