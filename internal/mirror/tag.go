package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// known returns what is known of a tag.
func (m *Mirror) known(ctx context.Context, t Target, tag string) (tagState, bool, error) {
	key := tagKey{t.Repository, tag}
	if state, ok := m.tags.Get(key); ok {
		return state, true, nil
	}
	d, err := m.tree.Tag(ctx, t.Repository, tag)
	if errors.Is(err, fs.ErrNotExist) {
		return tagState{}, false, nil
	}
	if err != nil {
		return tagState{}, false, err
	}
	record, err := m.tree.TagRecord(ctx, t.Repository, tag)
	if err != nil {
		return tagState{}, false, err
	}
	state := tagState{digest: d, gone: record.Gone, use: new(use)}
	// Unless more has become known since.
	m.tags.ContainsOrAdd(key, state)
	return state, true, nil
}

// tag answers for a mirrored tag, as its standing says. With force, a fresh one
// is checked all the same. Only the origin's 404 makes a tag go away.
func (m *Mirror) tag(ctx context.Context, t Target, tag string, head, force bool) (*manifestAnswer, error) {
	state, ok, err := m.known(ctx, t, tag)
	if err != nil {
		return nil, err
	}
	if !ok {
		if err := m.lacks(t, oci.KindManifest, tag); err != nil && !force {
			return nil, err
		}
		return m.discover(ctx, t, tag, head)
	}
	standing := state.standing(m.now(), t.Upstream)
	switch {
	case standing == fresh && force:
		standing = due
	case standing == gone && force:
		standing = lost
	}
	var had *tree.Manifest
	if standing <= due {
		had, err = m.tree.Manifest(ctx, t.Repository, state.digest)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if had == nil && !state.gone.IsZero() { // what is not held cannot be kept
			standing += gone - fresh
		}
	}
	switch {
	case standing == gone:
		return nil, m.goneSince(t, state)
	case standing == lost:
		answer, err := m.discover(ctx, t, tag, head)
		if err != nil && !saysNone(err) {
			m.tell(t, oci.Reference{Tag: tag}.Join(t.Upstream.Name+"/"+t.Name), err, true)
			err = m.goneSince(t, state)
		}
		return answer, err
	case had != nil && standing == fresh:
		return m.freshAnswer(t, tag, state, had), nil
	case had != nil:
		return m.revalidate(ctx, t, tag, state, had, force)
	case standing == fresh && head && state.size > 0:
		return state.describe(), nil
	case standing == fresh:
		if answer, err := m.byDigest(ctx, t, state.digest, head); err == nil {
			return answer, nil
		}
		// The tag may have moved on since; ask by name.
	}
	return m.discover(ctx, t, tag, head)
}

// freshAnswer serves what is held without asking, unless this is when to ask
// ahead.
func (m *Mirror) freshAnswer(t Target, tag string, state tagState, had *tree.Manifest) *manifestAnswer {
	if state.ripe(m.now(), t.Upstream) {
		m.checkAhead(t, tag, had)
	}
	answer := held(had, hit)
	answer.kept = state.gone
	return answer
}

func (s tagState) describe() *manifestAnswer {
	return &manifestAnswer{digest: s.digest, mediaType: s.mediaType, size: s.size, cache: miss}
}

func (m *Mirror) goneSince(t Target, state tagState) error {
	return fail(unknownContent, "upstream %s says since %s that it has no such tag", t.Upstream.Name, state.gone.UTC().Format(time.RFC3339))
}

// saysNone reports whether an error is the origin's word that something does not
// exist, and not only trouble on the way.
func saysNone(err error) bool {
	var refusal *upstream.Error
	return errors.As(err, &refusal) && refusal.Kind == upstream.NotFound && refusal.Origin
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
			return m.head(ctx, t, tag)
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
	return state, ok && state.gone.IsZero() && state.standing(m.now(), t.Upstream) == fresh
}

// head asks what a tag means and remembers the answer. The state is empty
// where the upstream does not say enough.
func (m *Mirror) head(ctx context.Context, t Target, tag string) (tagState, error) {
	at := m.now()
	described, err := t.Upstream.Client.Head(ctx, t.Name, oci.Reference{Tag: tag}, true)
	if err != nil {
		m.missing(ctx, t, tag, at, err)
		return tagState{}, err
	}
	if described == nil {
		return tagState{}, nil
	}
	state := tagState{digest: described.Digest, mediaType: described.MediaType, size: described.Size, checked: at}
	return m.remember(ctx, t, tag, state), nil
}

// learn replaces what is known of a tag by the answer to a question that was put
// at state.checked, unless a later question has been answered before. It returns
// what is known now, and what was.
func (m *Mirror) learn(ctx context.Context, t Target, tag string, state tagState) (now, before tagState) {
	before, _, err := m.known(ctx, t, tag)
	m.tagMu.Lock()
	defer m.tagMu.Unlock()
	key := tagKey{t.Repository, tag}
	if last, ok := m.tags.Get(key); ok {
		before = last
	} else if err != nil {
		before = tagState{}
	}
	if before.checked.After(state.checked) {
		return before, before
	}
	state.use = new(use)
	m.tags.Add(key, state)
	return state, before
}

// missing remembers that the origin has no such tag, so it said when it was
// asked at the given time.
func (m *Mirror) missing(ctx context.Context, t Target, tag string, at time.Time, err error) {
	if !saysNone(err) {
		return
	}
	// A tag that never was has no state: it may be pushed any moment.
	state, ok, err := m.known(ctx, t, tag)
	if err != nil || !ok {
		return
	}
	state.checked = at
	if state.gone.IsZero() {
		state.gone = at
	}
	now, before := m.learn(ctx, t, tag, state)
	if now.gone.IsZero() || !before.gone.IsZero() {
		return
	}
	if err := m.tree.SetGone(ctx, t.Repository, tag, at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.diskTrouble("recording that a tag is gone", t.Repository+":"+tag, err)
	}
	m.log.Info("a tag is gone at its origin", zap.String("reference", oci.Reference{Tag: tag}.Join(t.Repository)), zap.Bool("kept", t.Upstream.keeps(0)))
}

// maxPending bounds the tags that wait for one manifest.
const maxPending = 16

// remember keeps what a tag means, so the origin said when it was asked at
// state.checked: in the store if the manifest is held, and otherwise until it
// is. Clients ask for a tag by HEAD and then fetch by digest; the tag is to be
// found all the same when the upstream is gone.
func (m *Mirror) remember(ctx context.Context, t Target, tag string, state tagState) tagState {
	now, before := m.learn(ctx, t, tag, state)
	if now.use == before.use { // something later is known
		return now
	}
	if !before.gone.IsZero() {
		if err := m.tree.SetGone(ctx, t.Repository, tag, time.Time{}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.diskTrouble("recording that a tag is back", t.Repository+":"+tag, err)
		}
	}
	if _, ok := m.tree.Warm(t.Repository, now.digest); ok {
		m.setTag(ctx, t.Repository, tag, now)
		return now
	}
	waiting := manifestKey{t.Repository, now.digest}
	m.pendMu.Lock()
	tags, _ := m.pending.Get(waiting)
	if !slices.Contains(tags, tag) && len(tags) < maxPending {
		m.pending.Add(waiting, append(slices.Clone(tags), tag))
	}
	m.pendMu.Unlock()
	// Whoever stores the manifest settles what is pending then. It may have been
	// stored before the tag was pending.
	if _, err := m.tree.Manifest(ctx, t.Repository, now.digest); err == nil {
		m.settle(ctx, waiting)
	}
	return now
}

// settle stores the tags that mean a manifest that is now held, less those
// that have moved on.
func (m *Mirror) settle(ctx context.Context, key manifestKey) {
	m.pendMu.Lock()
	tags, _ := m.pending.Get(key)
	m.pending.Remove(key)
	m.pendMu.Unlock()
	for _, tag := range tags {
		state, ok := m.tags.Get(tagKey{key.repository, tag})
		if !ok {
			state = tagState{digest: key.digest, checked: m.now()}
		}
		if state.digest == key.digest && state.gone.IsZero() {
			m.setTag(ctx, key.repository, tag, state)
		}
	}
}

func (m *Mirror) setTag(ctx context.Context, repository, tag string, state tagState) {
	if err := m.tree.SetTag(ctx, repository, tag, state.digest, state.checked); err != nil {
		m.diskTrouble("storing a tag", repository+":"+tag, err)
	}
}

// fetchTag gets what a tag means and stores both.
func (m *Mirror) fetchTag(ctx context.Context, t Target, tag string) (*tree.Manifest, error) {
	at := m.now()
	stored, err := m.fetch(ctx, t, oci.Reference{Tag: tag})
	if err != nil {
		m.missing(ctx, t, tag, at, err)
		return nil, err
	}
	m.remember(ctx, t, tag, tagState{digest: stored.Digest, checked: at})
	return stored, nil
}

var errNoAnswer = errors.New("no answer in time")

// revalidate answers for a tag that is held and due for a check. A client waits
// 2 s for it, and gets what is held if the upstream fails or is slow. With force,
// a check that is under way already will not do.
func (m *Mirror) revalidate(ctx context.Context, t Target, tag string, state tagState, had *tree.Manifest, force bool) (*manifestAnswer, error) {
	patient, cancel := context.WithTimeoutCause(ctx, checkPatience, errNoAnswer)
	defer cancel()
	var current *tree.Manifest
	var err error
	if force {
		current, err = m.ask(patient, t, tag)
	} else {
		current, err = share(patient, m, checkKey(t, tag), m.checking(t, tag, had))
	}
	switch {
	case err == nil && current.Digest == had.Digest:
		return held(current, revalidated), nil
	case err == nil:
		return held(current, stored), nil
	case saysNone(err):
		if now, ok, err := m.known(ctx, t, tag); err == nil && ok && now.standing(m.now(), t.Upstream) <= due {
			answer := held(had, hit)
			answer.kept = now.gone
			return answer, nil
		}
		return nil, err
	}
	m.tell(t, oci.Reference{Tag: tag}.Join(t.Upstream.Name+"/"+t.Name), err, true)
	answer := held(had, stale)
	answer.stale, answer.kept = err.Error(), state.gone
	if !state.checked.IsZero() {
		answer.age = m.now().Sub(state.checked)
	}
	return answer, nil
}

func checkKey(t Target, tag string) string { return "check " + t.Repository + ":" + tag }

// checking is a flight that checks a tag, unless one has just ended: the flight
// was begun by somebody who had looked before.
func (m *Mirror) checking(t Target, tag string, had *tree.Manifest) func(context.Context) (*tree.Manifest, error) {
	before, _ := m.tags.Get(tagKey{t.Repository, tag})
	return func(ctx context.Context) (*tree.Manifest, error) {
		if state, ok := m.justChecked(t, tag); ok && state.checked.After(before.checked) {
			if now, err := m.tree.Manifest(ctx, t.Repository, state.digest); err == nil {
				return now, nil
			}
		}
		return m.check(ctx, t, tag, had)
	}
}

// check asks what a held tag means now, and fetches the new manifest before
// the tag moves to it.
func (m *Mirror) check(ctx context.Context, t Target, tag string, had *tree.Manifest) (*tree.Manifest, error) {
	at := m.now()
	described, err := t.Upstream.Client.Head(ctx, t.Name, oci.Reference{Tag: tag}, false)
	if err != nil {
		m.missing(ctx, t, tag, at, err)
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
	m.remember(ctx, t, tag, tagState{digest: described.Digest, checked: at})
	return current, nil
}

// checksAhead is how many tags are checked ahead at once.
const checksAhead = 16

// checkAhead checks a fresh tag in the background. What fails is tried again
// when the tag is stale.
func (m *Mirror) checkAhead(t Target, tag string, had *tree.Manifest) {
	select {
	case m.aheads <- struct{}{}:
	default:
		return
	}
	if !m.begin() {
		<-m.aheads
		return
	}
	check := m.checking(t, tag, had)
	go func() {
		defer m.wg.Done()
		defer func() { <-m.aheads }()
		share(m.ctx, m, checkKey(t, tag), check)
	}()
}
