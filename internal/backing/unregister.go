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
// stays there. It is for a Longhorn that is no more, and a configured one makes no
// difference.
func (l *Library) Forget(ctx context.Context, name, reference, cluster string) error {
	r := l.registrar
	if err := r.load(ctx); err != nil {
		return err
	}
	version := reference
	if len(r.of(name, reference)) == 0 {
		v, err := l.Version(ctx, name, reference)
		if err != nil {
			return err
		}
		version = v.Version
	}
	unlock, err := r.lock(ctx, cluster)
	if err != nil {
		return err
	}
	defer unlock()
	p := place{name, version, cluster}
	r.mu.Lock()
	held := r.held[p]
	r.mu.Unlock()
	if held == nil {
		return fail(NotFound, "%s %s is not registered with %s", name, version, cluster)
	}
	return r.forget(ctx, p)
}

func (r *registrar) unregister(ctx context.Context, v Version, name string) error {
	if err := r.load(ctx); err != nil {
		return err
	}
	c, err := r.find(name)
	if err != nil {
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

// ours reports whether an image in Longhorn is what was registered, and not somebody
// else's of the same name. One that is younger than its checksum is ours if we have seen
// it made, or it has our address.
func (record *registration) ours(image longhorn.Image) bool {
	if sum := cmp.Or(image.CurrentChecksum, image.ExpectedChecksum); sum != "" {
		return sum == record.SHA512.Encoded()
	}
	return record.Made || record.URL != "" && image.Parameters["url"] == record.URL
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
	var sums, served []string
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
			served = append(served, "/"+v.Digests.SHA512.Encoded()+"/", "/v1/backing-images/"+v.Name+"/download")
		}
	}
	if len(sums) == 0 {
		return found, nil
	}
	r.mu.Lock()
	clusters, public := slices.Collect(maps.Values(r.clusters)), r.settings.PublicURL
	r.mu.Unlock()
	slices.SortFunc(clusters, func(a, b *cluster) int { return cmp.Compare(a.Name, b.Name) })
	for _, c := range clusters {
		others, err := c.fetched(ctx, public, served, sums, names[c.Name])
		if err != nil {
			return nil, r.unasked(c, err)
		}
		mine := append(slices.Clone(names[c.Name]), usual...)
		for _, b := range others {
			mine = append(mine, b.Name)
		}
		users, err := c.users(ctx, sums, mine)
		if err != nil {
			return nil, r.unasked(c, err)
		}
		found = append(append(found, others...), users...)
	}
	return found, nil
}

// unasked is why nothing may be deleted while a Longhorn cannot be asked.
func (r *registrar) unasked(c *cluster, err error) error {
	e := Known(err)
	return &Error{Code: e.Code, Message: e.Message + "; whether its volumes need the image nobody knows. Where this Longhorn is no more, take it out of backing_images, and forget its registrations", Err: err}
}

// fetched are images of a cluster that are not registered, but have one of our addresses,
// and so would be fetched from here again: somebody has made them by hand.
func (c *cluster) fetched(ctx context.Context, public *url.URL, served, sums, registered []string) ([]Blocker, error) {
	if public == nil {
		return nil, nil
	}
	images, err := c.client.Images(ctx)
	if err != nil {
		return nil, told(err)
	}
	base := strings.TrimRight(public.String(), "/") + "/"
	var found []Blocker
	for _, image := range images {
		from := image.Parameters["url"]
		if sum := cmp.Or(image.CurrentChecksum, image.ExpectedChecksum); sum != "" && !slices.Contains(sums, sum) {
			continue // it is another version's
		}
		if strings.HasPrefix(from, base) && !slices.Contains(registered, image.Name) &&
			slices.ContainsFunc(served, func(part string) bool { return strings.Contains(from, part) }) {
			found = append(found, Blocker{Kind: "backing image", Name: image.Name, Cluster: c.Name})
		}
	}
	return found, nil
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
