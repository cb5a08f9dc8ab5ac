package mirror

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// Find is what a person means by a reference, as they would write it after
// `docker pull`: alpine, ghcr.io/org/app:v1, registry.corp:5000/x@sha256:… .
// Without a registry it is docker.io, whatever the default of a site is, and
// without a tag latest. Beside a digest a tag says nothing.
//
// A first component is a registry's host, and never its path name, if it has a
// dot, a colon or a capital, or is localhost. What a site hosts is not found.
func (u *Upstreams) Find(ref string) (Target, oci.Reference, error) {
	none := func(err error) (Target, oci.Reference, error) { return Target{}, oci.Reference{}, err }
	if scheme, _, ok := strings.Cut(ref, "://"); ok {
		return none(fail(badReference, "%q begins with a scheme; leave %s:// out", printable(ref), printable(scheme)))
	}
	host, name := "docker.io", ref
	if first, rest, nested := strings.Cut(ref, "/"); nested && (first == "localhost" || strings.ContainsAny(first, ".:") || strings.ToLower(first) != first) {
		host, name = NormalizeHost(first), rest
	}
	name, parsed, err := splitReference(name)
	if err != nil {
		return none(err)
	}
	if err := checkName(name); err != nil {
		return none(err)
	}
	entry := u.named(host)
	if entry == nil {
		return none(fmt.Errorf("%w %q: this mirror does not know it; add `upstream %s` to its configuration", errUnknownUpstream, printable(host), printable(host)))
	}
	t, err := u.target(entry, host, name)
	if err != nil {
		return none(err)
	}
	u.mu.Lock()
	sites := u.sites
	u.mu.Unlock()
	for _, s := range sites {
		if err := s.spares(t); err != nil {
			return none(err)
		}
	}
	return t, parsed, nil
}

// splitReference divides what stands after the registry. Without a tag it is latest,
// and beside a digest a tag says nothing.
func splitReference(s string) (name string, ref oci.Reference, err error) {
	name, pin, pinned := strings.Cut(s, "@")
	ref = oci.Reference{Tag: "latest"}
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		if ref, err = oci.ParseReference(name[colon+1:]); err != nil {
			return "", ref, fail(badReference, "%v", err)
		}
		name = name[:colon]
	}
	if pinned {
		d, err := oci.ParseDigest(pin)
		if err != nil {
			return "", ref, fail(badReference, "%v", err)
		}
		ref = oci.Reference{Digest: d}
	}
	return name, ref, nil
}

// Refreshed is what a tag was found to mean.
type Refreshed struct {
	// Reference is the tag in full: docker.io/library/alpine:3.20.
	Reference string `json:"reference"`
	// Digest is what it means now.
	Digest digest.Digest `json:"digest"`
	// Before is what it meant here until now; empty if it was not held.
	Before digest.Digest `json:"before,omitempty"`
	// Changed says that those two differ.
	Changed bool `json:"changed"`
}

// Refresh asks the upstream what a tag means, however lately that was done, and
// holds the manifest before the tag moves to it. The question is put after the
// call began, so that whoever has pushed can rely on the answer; callers at one
// time share it. It takes 9 s at most. Where it fails, what is held is served
// on; but a tag that the origin does not have is gone here too, unless the
// upstream keeps such tags. [Explain] makes sense of the error.
//
// The repository must be one that clients may read: see public.
func (m *Mirror) Refresh(ctx context.Context, t Target, ref oci.Reference) (Refreshed, error) {
	refreshed := Refreshed{Reference: ref.Join(t.Upstream.Name + "/" + t.Name)}
	if ref.Tag == "" {
		return refreshed, fail(badReference, "a digest never means anything else; name a tag to have it checked")
	}
	patient, cancel := context.WithTimeoutCause(ctx, manifestBudget+time.Second, errNoAnswer)
	defer cancel()
	err := m.refresh(patient, t, ref, &refreshed)
	if err != nil && ctx.Err() == nil {
		m.tell(t, refreshed.Reference, err, refreshed.Before != "")
	}
	return refreshed, err
}

func (m *Mirror) refresh(ctx context.Context, t Target, ref oci.Reference, refreshed *Refreshed) error {
	if err := m.admit(ctx, t); err != nil {
		return err
	}
	if err := m.public(ctx, t, oci.KindManifest, ref); err != nil {
		return err
	}
	had, err := m.meant(ctx, t, ref.Tag)
	if err != nil {
		return err
	}
	if had != nil {
		refreshed.Before = had.Digest
	}
	current, err := m.ask(ctx, t, ref.Tag)
	if err != nil {
		return err
	}
	if current.Unstored {
		return fail(storeFailed, "it means %s now, which could not be stored", current.Digest)
	}
	refreshed.Digest, refreshed.Changed = current.Digest, refreshed.Before != current.Digest
	return nil
}

// meant is the held manifest that a tag stands for without asking anyone, or
// nil.
func (m *Mirror) meant(ctx context.Context, t Target, tag string) (*tree.Manifest, error) {
	state, ok, err := m.known(ctx, t, tag)
	if err != nil || !ok || state.standing(m.now(), t.Upstream) >= gone {
		return nil, err
	}
	had, err := m.tree.Manifest(ctx, t.Repository, state.digest)
	if m.absent(t, err) {
		return nil, nil
	}
	return had, err
}

// ask finds out what a tag means by a question that is put after the call. One
// that was already under way may have been answered before the push that the
// caller knows of; the flight after that one will do, whoever began it.
func (m *Mirror) ask(ctx context.Context, t Target, tag string) (*tree.Manifest, error) {
	return own(ctx, m, true, "refresh "+oci.Reference{Tag: tag}.Join(t.Repository), func(context.Context) (*tree.Manifest, error) {
		return m.askNow(t, tag)
	})
}

// askNow asks as clients' requests do, in their flights, so that no question of
// theirs is under way beside it: the older answer could come last, and stay.
// Flights of theirs need not have asked anyone, so it goes on until it has had
// its own.
func (m *Mirror) askNow(t Target, tag string) (*tree.Manifest, error) {
	// More than the flight inside has: its error says more.
	ctx, cancel := context.WithTimeoutCause(m.ctx, manifestBudget+time.Second, errNoAnswer)
	defer cancel()
	ref := oci.Reference{Tag: tag}
	for {
		had, err := m.meant(ctx, t, tag)
		if err != nil {
			return nil, err
		}
		var mine atomic.Bool
		key, question := "get ", func(ctx context.Context) (*tree.Manifest, error) {
			mine.Store(true)
			return m.fetchTag(ctx, t, tag)
		}
		if had != nil {
			key, question = "check ", func(ctx context.Context) (*tree.Manifest, error) {
				mine.Store(true)
				return m.check(ctx, t, tag, had)
			}
		}
		current, err := share(ctx, m, key+ref.Join(t.Repository), question)
		if mine.Load() || ctx.Err() != nil {
			return current, err
		}
	}
}
