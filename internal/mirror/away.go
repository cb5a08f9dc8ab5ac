package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// A distant store may not be able to say what it has. Of what is mirrored the
// upstream has it, too: it counts as not held then, and nothing is put where something
// else may be. Of what is hosted nobody else knows, and the answer is a 503.

// away reports whether an error of the store means that it cannot be reached, of
// something that can be had elsewhere. The operator is told.
func (m *Mirror) away(t Target, err error) bool {
	if t.Upstream == nil || !errors.Is(err, storage.ErrUnavailable) {
		return false
	}
	m.diskTrouble("asking the store", t.Repository, err)
	return true
}

// A store that takes questions and does not answer them keeps nobody from what the
// upstream has.
const (
	// storePatience is how long a distant store has to answer what is asked of it about
	// a mirrored repository before the upstream is asked. Where there is none it has
	// four times as long. storeHaste is how long it has for storePause after it has not
	// answered.
	storePatience = 2 * time.Second
	storeHaste    = 200 * time.Millisecond
	storePause    = 30 * time.Second
)

var errSilent = fmt.Errorf("%w: it does not answer", storage.ErrUnavailable)

// soon bounds the asking of the store for one value of a repository, or many. done ends
// it, and gives its error a meaning: see absent. For a hosted one there is nobody else to
// ask.
func (m *Mirror) soon(ctx context.Context, t Target, many bool) (_ context.Context, done func(error) error) {
	if m.distant == nil {
		return ctx, func(err error) error { return err }
	}
	most := 4 * m.hurry
	if t.Upstream != nil {
		most = m.hurry
		if time.Since(time.Unix(0, m.silent.Load())) < storePause {
			most = min(most, storeHaste)
		}
	}
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, most, errSilent)
	return ctx, func(err error) error {
		defer cancel()
		if err == nil || context.Cause(ctx) != errSilent {
			return err
		}
		if t.Upstream != nil && !many {
			m.silent.Store(began.UnixNano())
		}
		return errSilent
	}
}

// absent reports whether what was asked of the store counts as not held.
func (m *Mirror) absent(t Target, err error) bool {
	return errors.Is(err, fs.ErrNotExist) || m.away(t, err)
}

// link makes a blob that a fill has stored a member of the repository that it was
// fetched for; "" is one that has it already.
func (m *Mirror) link(ctx context.Context, repository string, asked, canonical digest.Digest) error {
	if repository == "" {
		return nil
	}
	if t, ok := m.unclaimed.Peek(repository); ok {
		if err := m.claim(ctx, t); err != nil {
			return err
		}
	}
	return m.tree.LinkBlob(ctx, repository, asked, canonical)
}

// fromStore is what a fill is told of a blob that the store has, but not near. info is
// what is known of it there.
func (m *Mirror) fromStore(ctx context.Context, t Target, d digest.Digest, known tree.Member, info storage.Info) (fill.Want, error) {
	size := known.Size
	if size < 0 {
		size = info.Size
	}
	if size < 0 {
		asking, done := m.soon(ctx, t, false)
		info, err := m.tree.StatBlob(asking, known.Canonical)
		if err = done(err); err != nil {
			return fill.Want{}, err
		}
		size = info.Size
	}
	want := fill.Want{
		Digest:      d,
		Size:        size,
		Sources:     []fill.Source{m.fills.Stored(layout.Blob(known.Canonical), t.Upstream == nil)},
		Connections: storeConnections,
	}
	if t.Upstream != nil {
		// What is hosted is linked, or has been deleted since.
		want.Repository = t.Repository
		want.Sources = append(want.Sources, t.Upstream.Client.Blob(t.Name, d)...)
		want.Connections = t.Upstream.Connections
		if err := m.claim(ctx, t); err != nil && !errors.Is(err, errUnclaimed) {
			return fill.Want{}, err
		}
	}
	return want, nil
}

// storeConnections is how many parts of a hosted blob are fetched from a distant store
// at once.
const storeConnections = 4

// lost makes sense of why a blob that is hosted here could not be read: there is no
// upstream to have trouble with.
func (m *Mirror) lost(t Target, d digest.Digest, err error) error {
	var known *failure
	switch {
	case t.Upstream != nil || err == nil || errors.As(err, &known):
		return err
	case errors.Is(err, fill.ErrDigest), errors.Is(err, fill.ErrSize):
		m.suspect(d)
		return &failure{situation: unknownContent, message: fmt.Sprintf("the stored bytes of %s are damaged: %v", d, err), err: err}
	case errors.Is(err, errNoAnswer), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
	}
	return err
}
