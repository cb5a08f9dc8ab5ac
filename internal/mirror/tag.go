package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// A tagState is what is known of a mirrored tag. It is replaced, never
// changed. A tag that is only in the store, after a restart, has never been
// checked.
type tagState struct {
	digest    digest.Digest
	mediaType string // as a HEAD described it, while the manifest is not held
	size      int64
	checked   time.Time
	gone      bool // the origin said 404
}

// known returns what is known of a tag.
func (m *Mirror) known(ctx context.Context, t Target, tag string) (tagState, bool, error) {
	if state, ok := m.tags.Get(tagKey{t.Repository, tag}); ok {
		return state, true, nil
	}
	d, err := m.tree.Tag(ctx, t.Repository, tag)
	if errors.Is(err, fs.ErrNotExist) {
		return tagState{}, false, nil
	}
	return tagState{digest: d}, err == nil, err
}

// tag answers for a mirrored tag. Within the upstream's tag_ttl of the last
// check it is fresh. After that one HEAD asks, for everyone, what it means now;
// a client waits for that 2 s, and gets what is held if the upstream fails or
// is slow. Only the origin's 404 makes a tag go away.
func (m *Mirror) tag(ctx context.Context, t Target, tag string, head bool) (*manifestAnswer, error) {
	state, ok, err := m.known(ctx, t, tag)
	if err != nil {
		return nil, err
	}
	age := m.now().Sub(state.checked)
	fresh := ok && !state.checked.IsZero() && age < t.Upstream.TagTTL
	if fresh && state.gone {
		return nil, fail(unknownContent, "upstream %s said %s ago that it has no such tag", t.Upstream.Name, age.Round(time.Second))
	}
	var had *tree.Manifest
	if ok && !state.gone {
		had, err = m.tree.Manifest(ctx, t.Repository, state.digest)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if fresh {
		switch {
		case had != nil:
			return held(had, hit), nil
		case head && state.size > 0:
			return state.describe(), nil
		}
		answer, err := m.byDigest(ctx, t, state.digest, head)
		if err == nil {
			return answer, nil
		}
		// The tag may have moved on since; ask by name.
	}
	if had == nil {
		return m.discover(ctx, t, tag, head)
	}
	return m.revalidate(ctx, t, tag, state, had)
}

func (s tagState) describe() *manifestAnswer {
	return &manifestAnswer{digest: s.digest, mediaType: s.mediaType, size: s.size, cache: miss}
}

// discover answers for a tag of which nothing is held: HEAD by HEAD, GET by
// GET, since upstreams count a GET as a pull.
func (m *Mirror) discover(ctx context.Context, t Target, tag string, head bool) (*manifestAnswer, error) {
	ref := oci.Reference{Tag: tag}
	if head {
		state, err := share(ctx, m, "head "+ref.Join(t.Repository), func(ctx context.Context) (tagState, error) {
			if state, ok := m.justChecked(t, tag); ok && state.size > 0 {
				return state, nil
			}
			return m.head(ctx, t, tag, true)
		})
		if err != nil {
			return nil, err
		}
		if state.digest != "" {
			return state.describe(), nil
		}
	}
	fetched, err := share(ctx, m, "get "+ref.Join(t.Repository), func(ctx context.Context) (*tree.Manifest, error) {
		if state, ok := m.justChecked(t, tag); ok {
			if had, err := m.tree.Manifest(ctx, t.Repository, state.digest); err == nil {
				return had, nil
			}
		}
		return m.fetchTag(ctx, t, tag)
	})
	if err != nil {
		return nil, err
	}
	return held(fetched, stored), nil
}

// justChecked returns what a tag means if that is fresh. A flight looks again
// before it asks: the one before it may have ended after its asker looked.
func (m *Mirror) justChecked(t Target, tag string) (tagState, bool) {
	state, ok := m.tags.Get(tagKey{t.Repository, tag})
	return state, ok && !state.gone && m.now().Sub(state.checked) < t.Upstream.TagTTL
}

// head asks what a tag means and remembers the answer. The state is empty
// where the upstream does not say enough.
func (m *Mirror) head(ctx context.Context, t Target, tag string, must bool) (tagState, error) {
	described, err := t.Upstream.Client.Head(ctx, t.Name, oci.Reference{Tag: tag}, must)
	if err != nil {
		m.missing(t, tag, err)
		return tagState{}, err
	}
	if described == nil {
		return tagState{}, nil
	}
	state := tagState{digest: described.Digest, mediaType: described.MediaType, size: described.Size, checked: m.now()}
	m.remember(ctx, t, tag, state)
	return state, nil
}

// missing remembers that the origin has no such tag.
func (m *Mirror) missing(t Target, tag string, err error) {
	var refusal *upstream.Error
	if !errors.As(err, &refusal) || refusal.Kind != upstream.NotFound || !refusal.Origin {
		return
	}
	// A tag that never was is not remembered: it may be pushed any moment.
	key := tagKey{t.Repository, tag}
	if state, ok := m.tags.Get(key); ok || m.inStore(t, tag) {
		state.gone, state.checked = true, m.now()
		m.tags.Add(key, state)
	}
}

func (m *Mirror) inStore(t Target, tag string) bool {
	_, err := m.tree.Tag(m.ctx, t.Repository, tag)
	return err == nil
}

// maxPending bounds the tags that wait for one manifest.
const maxPending = 16

// remember keeps what a tag means: in the store if the manifest is held, and
// otherwise until it is. Clients ask for a tag by HEAD and then fetch by
// digest; the tag is to be found all the same when the upstream is gone.
func (m *Mirror) remember(ctx context.Context, t Target, tag string, state tagState) {
	m.tags.Add(tagKey{t.Repository, tag}, state)
	key := manifestKey{t.Repository, state.digest}
	m.pendMu.Lock()
	tags, _ := m.pending.Get(key)
	if !slices.Contains(tags, tag) && len(tags) < maxPending {
		m.pending.Add(key, append(slices.Clone(tags), tag))
	}
	m.pendMu.Unlock()
	// Whoever stores the manifest settles what is pending then. It may have
	// been stored before the tag was pending.
	if _, err := m.tree.Manifest(ctx, t.Repository, state.digest); err == nil {
		m.settle(ctx, key)
	}
}

// settle stores the tags that mean a manifest that is now held, less those
// that have moved on.
func (m *Mirror) settle(ctx context.Context, key manifestKey) {
	m.pendMu.Lock()
	tags, _ := m.pending.Get(key)
	m.pending.Remove(key)
	m.pendMu.Unlock()
	for _, tag := range tags {
		if state, ok := m.tags.Get(tagKey{key.repository, tag}); ok && state.digest != key.digest {
			continue
		}
		if current, err := m.tree.Tag(ctx, key.repository, tag); err == nil && current == key.digest {
			continue
		}
		if err := m.tree.SetTag(ctx, key.repository, tag, key.digest); err != nil {
			m.diskTrouble("storing a tag", key.repository+":"+tag, err)
		}
	}
}

// fetchTag gets what a tag means and stores both.
func (m *Mirror) fetchTag(ctx context.Context, t Target, tag string) (*tree.Manifest, error) {
	stored, err := m.fetch(ctx, t, oci.Reference{Tag: tag})
	if err != nil {
		m.missing(t, tag, err)
		return nil, err
	}
	m.remember(ctx, t, tag, tagState{digest: stored.Digest, checked: m.now()})
	return stored, nil
}

var errNoAnswer = errors.New("no answer in time")

// revalidate answers for a tag that is held and due for a check.
func (m *Mirror) revalidate(ctx context.Context, t Target, tag string, state tagState, had *tree.Manifest) (*manifestAnswer, error) {
	ref := oci.Reference{Tag: tag}
	patient, cancel := context.WithTimeoutCause(ctx, checkPatience, errNoAnswer)
	defer cancel()
	current, err := share(patient, m, "check "+ref.Join(t.Repository), func(ctx context.Context) (*tree.Manifest, error) {
		if state, ok := m.justChecked(t, tag); ok {
			if now, err := m.tree.Manifest(ctx, t.Repository, state.digest); err == nil {
				return now, nil
			}
		}
		return m.check(ctx, t, tag, had)
	})
	var refusal *upstream.Error
	switch {
	case err == nil && current.Digest == had.Digest:
		return held(current, revalidated), nil
	case err == nil:
		return held(current, stored), nil
	case errors.As(err, &refusal) && refusal.Kind == upstream.NotFound && refusal.Origin:
		return nil, err
	}
	m.tell(t, ref.Join(t.Upstream.Name+"/"+t.Name), err)
	answer := held(had, stale)
	answer.stale = err.Error()
	if !state.checked.IsZero() {
		answer.age = m.now().Sub(state.checked)
	}
	return answer, nil
}

// check asks what a held tag means now, and fetches the new manifest before
// the tag moves to it.
func (m *Mirror) check(ctx context.Context, t Target, tag string, had *tree.Manifest) (*tree.Manifest, error) {
	described, err := t.Upstream.Client.Head(ctx, t.Name, oci.Reference{Tag: tag}, false)
	if err != nil {
		m.missing(t, tag, err)
		return nil, err
	}
	if described == nil {
		return m.fetchTag(ctx, t, tag)
	}
	current := had
	if described.Digest != had.Digest {
		if current, err = m.tree.Manifest(ctx, t.Repository, described.Digest); err != nil {
			if current, err = m.fetch(ctx, t, oci.Reference{Digest: described.Digest}); err != nil {
				// Not wrapped: a 404 of the manifest is not one of the tag.
				return nil, fmt.Errorf("it means %s now, which cannot be had: %v", described.Digest, err)
			}
		}
	}
	m.remember(ctx, t, tag, tagState{digest: described.Digest, checked: m.now()})
	return current, nil
}
