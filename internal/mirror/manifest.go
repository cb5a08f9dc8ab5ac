package mirror

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// A manifestAnswer is a manifest, or after a HEAD of what is not held only its
// description.
type manifestAnswer struct {
	held *tree.Manifest // or else:

	digest    digest.Digest
	mediaType string
	size      int64

	// stale is why a tag is answered from what is held though it should have
	// been checked; age is since its last check.
	stale string
	age   time.Duration
	kept  time.Time // since when the tag is gone at its origin, or zero
	cache cache
}

func held(m *tree.Manifest, c cache) *manifestAnswer { return &manifestAnswer{held: m, cache: c} }

// warmManifest answers a client that asks at the given time from memory alone, or
// returns nil.
func (m *Mirror) warmManifest(t Target, ref oci.Reference, at time.Time) *manifestAnswer {
	d, byDigest := ref.Digest, at
	var state tagState
	if ref.Tag != "" {
		if t.Upstream == nil {
			return nil
		}
		var ok bool
		if state, ok = m.tags.Get(tagKey{t.Repository, ref.Tag}); !ok || state.standing(m.now(), t.Upstream) != fresh {
			return nil
		}
		d, byDigest = state.digest, time.Time{}
	}
	had, ok := m.tree.Warm(t.Repository, d, byDigest)
	switch {
	case !ok:
		return nil
	case ref.Tag != "":
		m.tree.Asked(t.Repository, ref.Tag, state.read, at)
		return m.freshAnswer(t, ref.Tag, state, had)
	}
	return held(had, hit)
}

// asked notes that a client has been answered with what is held.
func (m *Mirror) asked(t Target, ref oci.Reference, at time.Time) {
	if ref.Tag == "" {
		m.tree.AskedManifest(t.Repository, ref.Digest, at)
	} else if state, ok := m.tags.Peek(tagKey{t.Repository, ref.Tag}); ok {
		m.tree.Asked(t.Repository, ref.Tag, state.read, at)
	}
}

// manifest answers for a tag or a digest. With head, what is not held is not
// fetched; with force, a tag is checked though it is fresh.
func (m *Mirror) manifest(ctx context.Context, t Target, ref oci.Reference, head, force bool) (*manifestAnswer, error) {
	if t.Upstream == nil {
		var stored *tree.Manifest
		var err error
		if ref.Tag != "" {
			stored, err = m.tree.Tagged(ctx, t.Repository, ref.Tag)
		} else {
			stored, err = m.tree.Manifest(ctx, t.Repository, ref.Digest)
		}
		if err != nil {
			return nil, notHosted(err)
		}
		return held(stored, hit), nil
	}
	if ref.Tag != "" {
		return m.tag(ctx, t, ref.Tag, head, force)
	}
	return m.byDigest(ctx, t, ref.Digest, head, force)
}

func notHosted(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fail(unknownContent, "it is hosted here, and has not been pushed")
	}
	return err
}

// byDigest answers from the store, or by one GET for all who ask.
func (m *Mirror) byDigest(ctx context.Context, t Target, d digest.Digest, head, force bool) (*manifestAnswer, error) {
	asking, done := m.soon(ctx, t, false)
	had, err := m.tree.Manifest(asking, t.Repository, d)
	if err = done(err); err == nil {
		return held(had, hit), nil
	}
	if !m.absent(t, err) {
		return nil, err
	}
	if err := m.lacks(t, oci.KindManifest, string(d)); err != nil && !force {
		return nil, err
	}
	ref := oci.Reference{Digest: d}
	if head {
		described, err := share(ctx, m, "head "+ref.Join(t.Repository), func(ctx context.Context) (*upstream.Manifest, error) {
			return t.Upstream.Client.Head(ctx, t.Name, ref, true)
		})
		if err != nil {
			return nil, err
		}
		if described != nil {
			return &manifestAnswer{digest: d, mediaType: described.MediaType, size: described.Size, cache: miss}, nil
		}
	}
	fetched, err := share(ctx, m, "get "+ref.Join(t.Repository), func(ctx context.Context) (*tree.Manifest, error) {
		// Whoever fetched it may have ended between the look above and this
		// flight (groupcache's race).
		asking, done := m.soon(ctx, t, false)
		had, err := m.tree.Manifest(asking, t.Repository, d)
		if done(err) == nil {
			return had, nil
		}
		return m.fetch(ctx, t, ref, true)
	})
	if err != nil {
		return nil, err
	}
	return held(fetched, stored), nil
}

// fetch gets a manifest and stores it, with every tag that is known to mean
// it. One that cannot be stored is remembered for as long as there is memory.
// must is as for the upstream.
func (m *Mirror) fetch(ctx context.Context, t Target, ref oci.Reference, must bool) (*tree.Manifest, error) {
	got, err := t.Upstream.Client.Manifest(ctx, t.Name, ref, must)
	if err != nil {
		return nil, err
	}
	if err := m.claim(ctx, t); errors.Is(err, errUnclaimed) {
		return m.tree.Remember(t.Repository, got.Digest, got.Body)
	} else if err != nil {
		return nil, err
	}
	stored, err := m.tree.PutManifest(ctx, t.Repository, got.Digest, got.Body, nil)
	if err != nil {
		m.diskTrouble("storing a manifest", ref.Join(t.Repository), err)
		return m.tree.Remember(t.Repository, got.Digest, got.Body)
	}
	m.settle(ctx, manifestKey{t.Repository, got.Digest})
	m.expect(t, stored.Manifest)
	return stored, nil
}
