package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/upstream"
)

const (
	// maxReferrers bounds a page to 4 MiB, what clients will read.
	maxReferrers = 4 << 20
	// maxLooked are looked at for one page.
	maxLooked = 5_000
)

// referrers answers with what refers to a manifest, at the upstream and held, in
// the order of digests. A page goes on after the digest that `last` names, which
// need not be there any more.
func (x *exchange) referrers(ctx context.Context, subject digest.Digest) error {
	query := x.r.URL.Query()
	var last digest.Digest
	if text := query.Get("last"); text != "" {
		var err error
		if last, err = oci.ParseDigest(text); err != nil {
			return fail(badPage, "last=%s is not a digest", printable(text))
		}
	}
	wanted := map[string]bool{}
	for _, kind := range query["artifactType"] {
		if kind != "" {
			// Who does not write the + of +json as %2B means it all the same: no
			// media type has a space.
			wanted[strings.ReplaceAll(kind, " ", "+")] = true
		}
	}
	told, err := x.toldReferrers(ctx, subject, last)
	if err != nil {
		return err
	}
	page := referrerPage{wanted: wanted}
	more, err := x.fill(ctx, &page, told, subject, last)
	if err != nil {
		return err
	}
	if more {
		x.more(0, string(page.last))
	}
	header := x.w.Header()
	if len(wanted) > 0 {
		header.Set("OCI-Filters-Applied", "artifactType")
	}
	if page.cut {
		header.Add("Warning", `299 - "annotations that do not fit a page were left out"`)
	}
	header.Set("Content-Type", v1.MediaTypeImageIndex)
	return x.json(page.index())
}

// toldReferrers are the referrers after one of which others say so: the upstream,
// or when it cannot be asked a fallback tag that is held.
func (x *exchange) toldReferrers(ctx context.Context, subject, last digest.Digest) (map[digest.Digest]v1.Descriptor, error) {
	t := x.target
	if t.Upstream == nil {
		x.cached(hit)
		return nil, nil
	}
	theirs, err := share(ctx, x.mirror, "referrers "+t.Repository+" "+subject.String(), func(ctx context.Context) ([]v1.Descriptor, error) {
		return t.Upstream.Client.Referrers(ctx, t.Name, subject)
	})
	var refusal *upstream.Error
	switch {
	case err == nil:
		x.cached(miss)
	case errors.As(err, &refusal) && (refusal.Kind == upstream.NotFound || refusal.Kind == upstream.Unauthorized):
		return nil, err
	default:
		x.cached(stale)
		x.w.Header().Set("Warning", `299 - "`+warning("only referrers that are held: "+err.Error())+`"`)
		theirs = x.mirror.fallback(ctx, t, subject)
	}
	told := map[digest.Digest]v1.Descriptor{}
	for _, d := range theirs {
		if _, err := oci.ParseDigest(string(d.Digest)); err == nil && d.Digest > last {
			told[d.Digest] = d
		}
	}
	return told, nil
}

// fallback is what a stored fallback tag lists.
func (m *Mirror) fallback(ctx context.Context, t Target, subject digest.Digest) []v1.Descriptor {
	d, err := m.tree.Tag(ctx, t.Repository, oci.FallbackTag(subject))
	if err != nil {
		return nil
	}
	list, err := m.tree.Manifest(ctx, t.Repository, d)
	if err != nil || list.MediaType != v1.MediaTypeImageIndex {
		return nil
	}
	return list.Children
}

// fill fills a page with what others have told of and what is held. It reports
// whether there may be more.
func (x *exchange) fill(ctx context.Context, page *referrerPage, told map[digest.Digest]v1.Descriptor, subject, last digest.Digest) (more bool, err error) {
	t, m := x.target, x.mirror
	// A look that began before something was pushed or deleted is for those who
	// asked before.
	key := fmt.Sprint("held referrers ", t.Repository, " ", subject, " ", last, " ", m.changes.Load())
	if m.tree.Shared() {
		key += fmt.Sprint(" ", m.now().Unix()) // what others push is not counted
	}
	held, err := share(ctx, m, key, func(ctx context.Context) ([]digest.Digest, error) {
		return m.heldReferrers(ctx, t, subject, last)
	})
	if err != nil && !m.away(t, err) {
		return false, err
	}
	all := slices.Clone(held)
	for d := range told {
		all = append(all, d)
	}
	if t.Upstream == nil {
		// What was pushed before there was an API for it.
		for _, d := range m.fallback(ctx, t, subject) {
			if d.Digest > last {
				all = append(all, d.Digest)
			}
		}
	}
	slices.Sort(all)
	all = slices.Compact(all)
	if len(held) == maxLooked { // and what comes next is not known
		end, _ := slices.BinarySearch(all, held[len(held)-1])
		all, more = all[:end+1], true
	}
	if len(all) > maxLooked {
		all, more = all[:maxLooked], true
	}
	for _, d := range all {
		descriptor, ok := told[d]
		if !ok {
			if descriptor, ok, err = m.referrer(ctx, t, d, subject); err != nil {
				return false, err
			}
		}
		if ok && !page.add(descriptor) {
			return true, nil
		}
		page.last = d
	}
	return more, nil
}

// heldReferrers are the manifests of a repository that name a subject, in order.
func (m *Mirror) heldReferrers(ctx context.Context, t Target, subject, last digest.Digest) ([]digest.Digest, error) {
	if last != "" && last.Algorithm() != digest.Canonical {
		return nil, nil // those come after all that are held, which have a sha256
	}
	c := m.catalog(ctx)
	if m.tree.Shared() && m.complete != nil {
		var err error
		if c, err = m.caughtUp(ctx, t); err != nil {
			return nil, err
		}
	}
	if c != nil {
		if held, err := c.Referrers(ctx, t.Repository, subject, last, maxLooked); err == nil {
			return held, nil
		}
	}
	found, err := m.tree.Referrers(ctx, t.Repository, subject)
	var held []digest.Digest
	for _, d := range found {
		if d.Digest > last {
			held = append(held, d.Digest)
		}
	}
	slices.Sort(held)
	return held, err
}

// caughtUp is the catalog, once it has every manifest that other processes have
// stored in a repository, or nil. It may have what they have removed.
func (m *Mirror) caughtUp(ctx context.Context, t Target) (*catalog.Catalog, error) {
	c := m.complete(ctx)
	if c == nil || t.Upstream != nil { // which the upstream tells of
		return c, nil
	}
	known, err := c.Names(ctx, t.Repository)
	if err != nil {
		return nil, nil // it is read from the store
	}
	if len(known.Manifests) == 0 {
		if err := m.tree.TellRepository(ctx, t.Repository); err != nil {
			return nil, err
		}
	}
	told := 0
	for listed, err := range m.tree.ListManifests(ctx, t.Repository) {
		if err == nil && !known.Manifests[listed.Digest] {
			err = m.tree.TellManifest(ctx, t.Repository, listed.Digest)
			told++
		}
		if err != nil {
			return nil, err
		}
		if told == maxLooked {
			break
		}
	}
	if told > 0 {
		c = m.complete(ctx)
	}
	return c, nil
}

// referrer describes a manifest of the repository, unless it has been removed
// meanwhile, or names another subject.
func (m *Mirror) referrer(ctx context.Context, t Target, d, subject digest.Digest) (v1.Descriptor, bool, error) {
	held, err := m.tree.Manifest(ctx, t.Repository, d)
	if errors.Is(err, fs.ErrNotExist) || err == nil && held.Subject != nil && held.Subject.Digest != subject {
		return v1.Descriptor{}, false, nil
	}
	if err != nil {
		return v1.Descriptor{}, false, err
	}
	return v1.Descriptor{
		MediaType: held.MediaType, Digest: held.Digest, Size: int64(len(held.Body)),
		ArtifactType: held.ArtifactType, Annotations: held.Annotations,
	}, true, nil
}

// A referrerPage is a page on its way.
type referrerPage struct {
	wanted map[string]bool // artifact types; empty: all
	body   bytes.Buffer    // the descriptors, with commas between
	last   digest.Digest   // that was looked at
	cut    bool            // annotations have been left out
}

const (
	beforeReferrers = `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[`
	afterReferrers  = `]}`
)

// add puts a descriptor onto the page, if it is wanted, and reports whether there
// was room for it. On an empty page there always is: annotations of one manifest
// may be as long as a page, and then they are left out.
func (p *referrerPage) add(d v1.Descriptor) bool {
	if len(p.wanted) > 0 && !p.wanted[d.ArtifactType] {
		return true
	}
	room := maxReferrers - len(beforeReferrers) - len(afterReferrers) - 1
	text := plainJSON(d)
	if len(text) > room {
		d.Annotations, p.cut = nil, true
		text = plainJSON(d)
	}
	if p.body.Len() > 0 {
		if p.body.Len()+len(text) > room {
			return false
		}
		p.body.WriteByte(',')
	}
	p.body.WriteString(text)
	return true
}

func (p *referrerPage) index() []byte {
	return slices.Concat([]byte(beforeReferrers), p.body.Bytes(), []byte(afterReferrers))
}

// plainJSON encodes a descriptor as it is: to write <, > and & as six characters
// each would make it longer than the manifest it comes from.
func plainJSON(d v1.Descriptor) string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	encoder.Encode(d) // which cannot fail
	return strings.TrimSuffix(text.String(), "\n")
}
