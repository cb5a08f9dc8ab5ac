package mirror

import (
	"context"
	"errors"
	"hash/maphash"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// known returns what is known of a tag.
func (m *Mirror) known(ctx context.Context, t Target, tag string) (tagState, bool, error) {
	key := tagKey{t.Repository, tag}
	for {
		if state, ok := m.tags.Get(key); ok {
			return state, true, nil
		}
		untagged := m.untagged.Load()
		asking, done := m.soon(ctx, t, false)
		d, err := m.tree.Tag(asking, t.Repository, tag)
		var record tree.TagRecord
		if err == nil {
			record, err = m.tree.TagRecord(asking, t.Repository, tag)
		}
		err = done(err)
		if m.absent(t, err) { // removed since
			return tagState{}, false, nil
		}
		if err != nil {
			return tagState{}, false, err
		}
		state := tagState{digest: d, gone: record.Gone, use: new(use), read: new(tree.LastRead)}
		// Unless more has become known since.
		known, _ := m.tags.ContainsOrAdd(key, state)
		if m.untagged.Load() == untagged {
			return state, true, nil
		}
		// It may have been removed before it was added, by one who has not seen it
		// here.
		if !known {
			m.tags.Remove(key)
		}
	}
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
		return m.discover(ctx, t, tag, head, force)
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
		asking, done := m.soon(ctx, t, false)
		had, err = m.tree.Manifest(asking, t.Repository, state.digest)
		if err = done(err); err != nil && !m.absent(t, err) {
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
		return m.recheck(ctx, t, tag, state, head, force)
	case had != nil && standing == fresh:
		return m.freshAnswer(t, tag, state, had), nil
	case had != nil:
		return m.revalidate(ctx, t, tag, state, had, force)
	case standing == fresh && head && state.size > 0:
		return state.describe(), nil
	case standing == fresh:
		if answer, err := m.byDigest(ctx, t, state.digest, head, force); err == nil {
			return answer, nil
		}
		// The tag may have moved on since; ask by name.
	}
	answer, err := m.discover(ctx, t, tag, head, force)
	if err == nil || saysNone(err) {
		return answer, err
	}
	// What it meant before may be held still, if there was no room for the new.
	if d, tagErr := m.tree.Tag(ctx, t.Repository, tag); tagErr == nil && d != state.digest {
		if had, heldErr := m.tree.Manifest(ctx, t.Repository, d); heldErr == nil {
			return m.staleAnswer(t, tag, tagState{}, had, err), nil
		}
	}
	return nil, err
}

// recheck asks whether a tag that is gone is back. Nobody needs it as what is not
// held is needed, so it stops with all checks before the end of a budget.
func (m *Mirror) recheck(ctx context.Context, t Target, tag string, state tagState, head, force bool) (*manifestAnswer, error) {
	if !force && m.failedLately(t, tag) != nil {
		return nil, m.goneSince(t, state)
	}
	ref := oci.Reference{Tag: tag}
	back, err := own(ctx, m, force, "recheck "+ref.Join(t.Repository), func(ctx context.Context) (tagState, error) {
		if state, ok := m.justChecked(t, tag); ok && !force {
			return state, nil
		}
		return m.head(ctx, t, tag, false)
	})
	switch {
	case err != nil && saysNone(err):
		return nil, err
	case err != nil:
		m.tell(t, ref.Join(t.Upstream.Name+"/"+t.Name), err, true)
		return nil, m.goneSince(t, state)
	case head && back.size > 0:
		return back.describe(), nil
	}
	return m.discover(ctx, t, tag, head, false)
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
func (m *Mirror) discover(ctx context.Context, t Target, tag string, head, force bool) (*manifestAnswer, error) {
	ref := oci.Reference{Tag: tag}
	if head {
		state, err := own(ctx, m, force, "head "+ref.Join(t.Repository), func(ctx context.Context) (tagState, error) {
			if state, ok := m.justChecked(t, tag); ok && state.size > 0 && !force {
				return state, nil
			}
			return m.head(ctx, t, tag, true)
		})
		if err != nil {
			return nil, err
		}
		if state.size > 0 && state.gone.IsZero() {
			return state.describe(), nil
		}
	}
	if force {
		asked, err := m.ask(ctx, t, tag)
		if err != nil {
			return nil, err
		}
		return held(asked, stored), nil
	}
	fetched, err := share(ctx, m, "get "+ref.Join(t.Repository), func(ctx context.Context) (*tree.Manifest, error) {
		if state, ok := m.justChecked(t, tag); ok {
			asking, done := m.soon(ctx, t, false)
			had, err := m.tree.Manifest(asking, t.Repository, state.digest)
			if done(err) == nil {
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
// where the upstream does not say enough; and without a size where more has
// become known meanwhile.
func (m *Mirror) head(ctx context.Context, t Target, tag string, must bool) (tagState, error) {
	at := m.now()
	described, err := t.Upstream.Client.Head(ctx, t.Name, oci.Reference{Tag: tag}, must)
	if err != nil {
		m.failed(ctx, t, tag, at, err)
		return tagState{}, err
	}
	if described == nil {
		return tagState{}, nil
	}
	state := tagState{digest: described.Digest, mediaType: described.MediaType, size: described.Size, checked: at}
	return m.remember(ctx, t, tag, state), nil
}

// failed remembers that the origin has no such tag, so it said when it was asked
// at the given time; or that it could not be asked.
func (m *Mirror) failed(ctx context.Context, t Target, tag string, at time.Time, err error) {
	key := tagKey{t.Repository, tag}
	if !saysNone(err) {
		m.failures.Add(key, lack{at, err})
		return
	}
	defer m.lockTag(key)()
	state, ok, err := m.known(ctx, t, tag)
	if err != nil || !ok || state.checked.After(at) {
		return // a tag that never was has no state: it may be pushed any moment
	}
	was := state.gone
	if was.IsZero() {
		state.gone = at
	}
	state.checked, state.use = at, new(use)
	m.tags.Add(key, state)
	if !was.IsZero() {
		return
	}
	if err := m.tree.SetGone(ctx, t.Repository, tag, at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.diskTrouble("recording that a tag is gone", t.Repository+":"+tag, err)
	}
	m.log.Info("a tag is gone at its origin", zap.String("reference", oci.Reference{Tag: tag}.Join(t.Repository)), zap.Bool("kept", t.Upstream.keeps(0)))
}

// failedLately returns why the last check of a tag failed, if that was moments
// ago: an upstream in trouble is not to be asked by every client.
func (m *Mirror) failedLately(t Target, tag string) error {
	failure, ok := m.failures.Get(tagKey{t.Repository, tag})
	if !ok || m.now().Sub(failure.at) >= min(lackMemory, t.Upstream.TagTTL) {
		return nil
	}
	return failure.err
}

// lockTag makes a change of what is known of a tag, in memory and in the store,
// whole. It returns what unlocks.
func (m *Mirror) lockTag(key tagKey) (unlock func()) {
	lock := &m.tagLocks[maphash.Comparable(m.seed, key)%uint64(len(m.tagLocks))]
	lock.Lock()
	return lock.Unlock
}

// maxPending bounds the tags that wait for one manifest.
const maxPending = 16

// remember keeps what a tag means, so the origin said when it was asked at
// state.checked, unless a later question has been answered before: in the store if
// the manifest is held, and otherwise until it is. Clients ask for a tag by HEAD
// and then fetch by digest; the tag is to be found all the same when the upstream
// is gone. It returns what is known now.
func (m *Mirror) remember(ctx context.Context, t Target, tag string, state tagState) tagState {
	waiting := manifestKey{t.Repository, state.digest}
	if !m.note(ctx, t, tag, &state, waiting) {
		return state
	}
	// Whoever stores the manifest settles what is pending then. It may have been
	// stored before the tag was pending.
	asking, done := m.soon(ctx, t, false)
	held, err := m.tree.Manifest(asking, t.Repository, state.digest)
	if done(err) == nil && !held.Unstored {
		m.settle(ctx, waiting)
	}
	return state
}

// note does so in memory, and reports whether that is new.
func (m *Mirror) note(ctx context.Context, t Target, tag string, state *tagState, waiting manifestKey) bool {
	key := tagKey{t.Repository, tag}
	defer m.lockTag(key)()
	before, ok, err := m.known(ctx, t, tag)
	if err == nil && ok && before.checked.After(state.checked) {
		*state = before
		return false
	}
	state.use = new(use)
	if state.read = before.read; state.read == nil {
		state.read = new(tree.LastRead)
	}
	m.tags.Add(key, *state)
	if !before.gone.IsZero() {
		if err := m.tree.SetGone(ctx, t.Repository, tag, time.Time{}); err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.diskTrouble("recording that a tag is back", t.Repository+":"+tag, err)
		}
	}
	m.pendMu.Lock()
	defer m.pendMu.Unlock()
	tags, _ := m.pending.Get(waiting)
	if !slices.Contains(tags, tag) && len(tags) < maxPending {
		m.pending.Add(waiting, append(slices.Clone(tags), tag))
	}
	return true
}

// settle stores the tags that mean a manifest that is now held, less those
// that have moved on.
func (m *Mirror) settle(ctx context.Context, key manifestKey) {
	m.pendMu.Lock()
	tags, _ := m.pending.Get(key)
	m.pending.Remove(key)
	m.pendMu.Unlock()
	for _, tag := range tags {
		m.setTag(ctx, tagKey{key.repository, tag}, key.digest)
	}
}

// setTag stores what a tag means, if it still does.
func (m *Mirror) setTag(ctx context.Context, key tagKey, d digest.Digest) {
	defer m.lockTag(key)()
	state, ok := m.tags.Get(key)
	if !ok || state.digest != d || !state.gone.IsZero() {
		return
	}
	if err := m.tree.SetTag(ctx, key.repository, key.tag, d, state.checked, nil); err != nil {
		m.diskTrouble("storing a tag", key.repository+":"+key.tag, err)
	}
}

// fetchTag gets what a tag means and stores both.
func (m *Mirror) fetchTag(ctx context.Context, t Target, tag string) (*tree.Manifest, error) {
	at := m.now()
	stored, err := m.fetch(ctx, t, oci.Reference{Tag: tag}, true)
	if err != nil {
		m.failed(ctx, t, tag, at, err)
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
	err := m.failedLately(t, tag)
	switch {
	case force:
		current, err = m.ask(patient, t, tag)
	case err == nil:
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
	return m.staleAnswer(t, tag, state, had, err), nil
}

// staleAnswer serves what is held, since the upstream could not be asked.
func (m *Mirror) staleAnswer(t Target, tag string, state tagState, had *tree.Manifest, err error) *manifestAnswer {
	m.tell(t, oci.Reference{Tag: tag}.Join(t.Upstream.Name+"/"+t.Name), err, true)
	answer := held(had, stale)
	answer.stale, answer.kept = err.Error(), state.gone
	if !state.checked.IsZero() {
		answer.age = m.now().Sub(state.checked)
	}
	return answer
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
		m.failed(ctx, t, tag, at, err)
		return nil, err
	}
	if described == nil {
		return m.fetchTag(ctx, t, tag)
	}
	current := had
	if described.Digest != had.Digest {
		if current, err = m.tree.Manifest(ctx, t.Repository, described.Digest); err != nil {
			if current, err = m.fetch(ctx, t, oci.Reference{Digest: described.Digest}, false); err != nil {
				// Not wrapped: a 404 of the manifest is not one of the tag.
				err = fail(noUpstream, "it means %s now, which cannot be had: %v", described.Digest, err)
				m.failed(ctx, t, tag, at, err)
				return nil, err
			}
		}
	}
	if current.Unstored && m.claim(ctx, t) == nil { // there may be room now
		if stored, err := m.tree.PutManifest(ctx, t.Repository, current.Digest, current.Body, nil); err == nil {
			current = stored
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
