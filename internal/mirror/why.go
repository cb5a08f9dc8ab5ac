package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// Why is how a reference would be answered, and from where.
type Why struct {
	// Reference in full: docker.io/library/alpine:3.20.
	Reference string `json:"reference"`
	// Answer says in a sentence what a client would get now.
	Answer string `json:"answer"`

	Upstream string `json:"upstream,omitempty"` // "": it is hosted here
	// Endpoints in the order in which they are asked, and what is wrong with them.
	Endpoints []string `json:"endpoints,omitempty"`
	// Repository is its name in the store, and Record what the store says of it.
	Repository string `json:"repository"`
	Record     string `json:"record"`
	// Readers says who may read it, where the mirror asks with credentials.
	Readers string `json:"readers,omitempty"`

	Tag *WhyTag `json:"tag,omitempty"` // nil: asked for by digest, or nothing is known
	// Digest is what the reference means here; empty: nothing.
	Digest   digest.Digest `json:"digest,omitempty"`
	Pinned   string        `json:"pinned,omitempty"`   // since when, and what of it
	Manifest *WhyManifest  `json:"manifest,omitempty"` // nil: it is not held
}

// WhyTag is what is known of a tag.
type WhyTag struct {
	Standing string        `json:"standing"` // as in the freshness table: fresh, due for a check, gone; unknown
	Checked  time.Time     `json:"checked,omitzero"`
	TTL      float64       `json:"tag_ttl_seconds"`
	Gone     time.Time     `json:"gone,omitzero"`
	Moved    time.Time     `json:"moved,omitzero"`
	Previous digest.Digest `json:"previous,omitempty"`
	Failure  string        `json:"failure,omitempty"` // of the last check
}

// WhyManifest is a manifest that is held, and what of it is held besides.
type WhyManifest struct {
	MediaType string    `json:"media_type"`
	Size      int64     `json:"size"`
	Hot       bool      `json:"hot"`      // it is answered from memory
	Unstored  bool      `json:"unstored"` // it is in memory only
	Blobs     []WhyBlob `json:"blobs,omitempty"`
	Children  []WhyBlob `json:"children,omitempty"` // manifests of an index
}

// WhyBlob is a blob, or a manifest that an index names.
type WhyBlob struct {
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"` // -1: unknown
	Platform string        `json:"platform,omitempty"`
	Held     bool          `json:"held"`
	Hot      bool          `json:"hot,omitempty"`
}

// Find is what a person means by a reference to something that may be held. A name
// under which something is stored means that, be it mirrored or hosted by a site;
// others mean what [Upstreams.Find] says.
func (m *Mirror) Find(ctx context.Context, u *Upstreams, reference string) (Target, oci.Reference, error) {
	name, ref, err := splitReference(reference)
	if err == nil && oci.ValidName(name) {
		if t, ok, err := m.stored(ctx, u, name); ok || err != nil {
			return t, ref, err
		}
	}
	return u.Find(reference)
}

// stored is what the name of a repository in the store stands for.
func (m *Mirror) stored(ctx context.Context, u *Upstreams, name string) (t Target, ok bool, err error) {
	record, err := m.tree.Record(ctx, name)
	switch {
	case err == nil:
		if t, ok = u.Owner(name, record); ok {
			return t, true, nil
		}
	case !errors.Is(err, fs.ErrNotExist):
		return t, false, err
	}
	u.mu.Lock()
	sites := u.sites
	u.mu.Unlock()
	if !slices.ContainsFunc(sites, func(s *Site) bool { return s.hosts(name) }) {
		return t, false, nil
	}
	ok, err = m.tree.IsKept(ctx, name)
	return Target{Name: name, Repository: name}, ok, err
}

// Why says how a reference would be answered and from where. It asks no upstream.
func (m *Mirror) Why(ctx context.Context, t Target, ref oci.Reference) (Why, error) {
	w := Why{Reference: ref.Join(t.Name), Repository: t.Repository, Digest: ref.Digest}
	if t.Upstream != nil {
		w.Reference, w.Upstream = ref.Join(t.Upstream.Name+"/"+t.Name), t.Upstream.Name
		w.Endpoints = t.Upstream.Client.Standing()
	}
	refused := m.admit(ctx, t)
	if refused != nil && judge(refused).situation == storeFailed {
		return w, refused
	}
	private, err := m.whoseName(ctx, t, &w)
	if err != nil {
		return w, err
	}
	var state tagState
	if ref.Tag != "" {
		if state, err = m.whyTag(ctx, t, ref.Tag, &w); err != nil {
			return w, err
		}
	}
	had, err := m.whyManifest(ctx, t, &w)
	if err != nil {
		return w, err
	}
	if err := m.whyPinned(ctx, ref, &w); err != nil {
		return w, err
	}
	var limit error
	if had != nil {
		limit = m.withinLimits(ctx, t, had)
		if limit == nil {
			limit = m.obtainable(ctx, t, had)
		}
	}
	switch {
	case refused != nil:
		w.Answer = "refused: " + refused.Error()
	case private != "":
		w.Answer = private
	case t.Upstream == nil && had == nil:
		w.Answer = "404: it is hosted here, and has not been pushed"
	case t.Upstream == nil:
		w.Answer = "from the store" + w.rest()
	case limit != nil:
		w.Answer = "refused: " + limit.Error()
	case ref.Tag == "":
		w.Answer = m.whyDigest(t, ref.Digest, had, &w)
	default:
		w.Answer = m.whyAnswer(t, ref.Tag, state, had, &w)
	}
	return w, nil
}

// whoseName says what is known of a repository. If it may not be opened to
// everyone, private is the answer.
func (m *Mirror) whoseName(ctx context.Context, t Target, w *Why) (private string, err error) {
	record, err := m.tree.Record(ctx, t.Repository)
	switch {
	case errors.Is(err, fs.ErrNotExist) && t.Upstream == nil:
		w.Record = "hosted, without a record, as registry:2 leaves it"
	case errors.Is(err, fs.ErrNotExist):
		w.Record = "without a record: one is made by the first pull from an upstream, and what is stored before is never evicted"
	case err != nil:
		return "", err
	case record.Class == tree.Mirrored:
		w.Record = "mirrored from " + record.Upstream + " since " + stamp(record.Created)
	default:
		w.Record = string(record.Class) + " since " + stamp(record.Created)
	}
	if t.Upstream == nil || t.Upstream.Client.Anonymous() == nil {
		return "", nil
	}
	verdict, known := m.probes.Get(t.Repository)
	if !known && record.Public != nil {
		verdict, known = *record.Public, true
	}
	switch {
	case !known:
		w.Readers = "nobody has asked yet whether everyone may read it"
		private = "the upstream is asked first whether everyone may read it, and if not it is refused, except where a rule of a site names it"
	case verdict.Public:
		w.Readers = "everyone, as was found " + stamp(verdict.Checked)
	default:
		w.Readers = "only those with the mirror's credentials, as was found " + stamp(verdict.Checked)
		private = "refused, unless the upstream says that everyone may read it now, or a rule of a site names it"
	}
	return private, nil
}

func stamp(at time.Time) string { return at.UTC().Format(time.RFC3339) }

// whyTag says what is known of a tag.
func (m *Mirror) whyTag(ctx context.Context, t Target, tag string, w *Why) (tagState, error) {
	if t.Upstream == nil {
		d, err := m.tree.Tag(ctx, t.Repository, tag)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return tagState{}, err
		}
		w.Digest = d
		return tagState{}, nil
	}
	state, ok, err := m.known(ctx, t, tag)
	if err != nil {
		return tagState{}, err
	}
	failure := ""
	if err := m.failedLately(t, tag); err != nil {
		failure = err.Error()
	}
	if !ok {
		if failure != "" {
			w.Tag = &WhyTag{Standing: "unknown", TTL: t.Upstream.TagTTL.Seconds(), Failure: failure}
		}
		return tagState{}, nil
	}
	w.Digest = state.digest
	w.Tag = &WhyTag{Checked: state.checked, TTL: t.Upstream.TagTTL.Seconds(), Gone: state.gone, Failure: failure}
	switch record, err := m.tree.TagRecord(ctx, t.Repository, tag); {
	case err == nil:
		w.Tag.Moved, w.Tag.Previous = record.Moved, record.Previous
	case !errors.Is(err, fs.ErrNotExist):
		return tagState{}, err
	}
	w.Tag.Standing = map[standing]string{
		fresh: "fresh",
		due:   "due for a check",
		gone:  "gone",
		lost:  "gone, and due for a check",
	}[state.standing(m.now(), t.Upstream)]
	if !state.gone.IsZero() && state.standing(m.now(), t.Upstream) <= due {
		w.Tag.Standing = "gone and kept, " + w.Tag.Standing
	}
	return state, nil
}

// whyManifest looks what is held of what the reference means.
func (m *Mirror) whyManifest(ctx context.Context, t Target, w *Why) (*tree.Manifest, error) {
	if w.Digest == "" {
		return nil, nil
	}
	had, hot := m.tree.Warm(t.Repository, w.Digest, time.Time{})
	if !hot {
		var err error
		if had, err = m.tree.Manifest(ctx, t.Repository, w.Digest); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
	}
	w.Manifest = &WhyManifest{MediaType: had.MediaType, Size: int64(len(had.Body)), Hot: hot, Unstored: had.Unstored}
	for _, d := range had.Blobs {
		_, hot := m.tree.WarmBlob(t.Repository, d.Digest, time.Time{})
		w.Manifest.Blobs = append(w.Manifest.Blobs, WhyBlob{Digest: d.Digest, Size: d.Size, Held: m.holds(ctx, t, d.Digest), Hot: hot})
	}
	for _, d := range had.Children {
		child := WhyBlob{Digest: d.Digest, Size: d.Size}
		if p := d.Platform; p != nil {
			child.Platform = p.OS + "/" + p.Architecture
			if p.Variant != "" {
				child.Platform += "/" + p.Variant
			}
		}
		_, err := m.tree.StatBlob(ctx, d.Digest)
		child.Held = err == nil
		_, child.Hot = m.tree.Warm(t.Repository, d.Digest, time.Time{})
		w.Manifest.Children = append(w.Manifest.Children, child)
	}
	return had, nil
}

// whyPinned looks whether it may be evicted.
func (m *Mirror) whyPinned(ctx context.Context, ref oci.Reference, w *Why) error {
	for pin, err := range m.tree.Pins(ctx, w.Repository) {
		if err != nil {
			return err
		}
		switch {
		case pin.Reference == ref.String():
			w.Pinned = "since " + stamp(pin.Since)
			return nil
		case pin.Reference == w.Digest.String():
			w.Pinned = "its manifest, since " + stamp(pin.Since)
		}
	}
	return nil
}

// rest says what of a held manifest is not held.
func (w *Why) rest() string {
	missing, bytes := 0, int64(0)
	for _, blob := range w.Manifest.Blobs {
		if !blob.Held {
			missing++
			bytes += max(blob.Size, 0)
		}
	}
	switch {
	case len(w.Manifest.Blobs) == 0:
		held := 0
		for _, child := range w.Manifest.Children {
			if child.Held {
				held++
			}
		}
		if len(w.Manifest.Children) == 0 {
			return ""
		}
		return fmt.Sprintf("; of the %d manifests it names %d are held", len(w.Manifest.Children), held)
	case missing == 0:
		return "; all its blobs are held"
	case w.Upstream == "":
		return fmt.Sprintf("; %d of its %d blobs are missing", missing, len(w.Manifest.Blobs))
	default:
		return fmt.Sprintf("; %d of its %d blobs, %s, are fetched when they are asked for", missing, len(w.Manifest.Blobs), humanize.IBytes(uint64(bytes)))
	}
}

// place is where a held manifest is answered from.
func (w *Why) place() string {
	if w.Manifest.Hot {
		return "from memory"
	}
	return "from the store"
}

func (m *Mirror) whyDigest(t Target, d digest.Digest, had *tree.Manifest, w *Why) string {
	if had != nil {
		return w.place() + ", and the upstream is not asked" + w.rest()
	}
	if err := m.lacks(t, oci.KindManifest, string(d)); err != nil {
		return "refused for now: " + err.Error()
	}
	return "from the upstream: it is not held"
}

func (m *Mirror) whyAnswer(t Target, tag string, state tagState, had *tree.Manifest, w *Why) string {
	if state.digest == "" {
		if err := m.lacks(t, oci.KindManifest, tag); err != nil {
			return "refused for now: " + err.Error()
		}
		return "from the upstream: nothing is held of this tag"
	}
	standing := state.standing(m.now(), t.Upstream)
	if had == nil && !state.gone.IsZero() && standing <= due { // as in tag
		standing += gone - fresh
	}
	switch {
	case standing == gone:
		return "404: the upstream says since " + stamp(state.gone) + " that it has no such tag"
	case standing == lost:
		return "the upstream is asked whether it has the tag again, and 404 otherwise"
	case had == nil:
		return "from the upstream: what the tag means is not held"
	case standing == fresh:
		return w.place() + ", and the upstream is not asked" + w.rest()
	case w.Tag.Failure != "":
		return w.place() + " though it could not be checked" + w.rest()
	}
	return w.place() + " once the upstream has said that it is current, or after " + checkPatience.String() + w.rest()
}
