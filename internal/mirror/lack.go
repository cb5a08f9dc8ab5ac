package mirror

import (
	"context"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// lackMemory is how long it is remembered that the upstream does not have
// something that is not held, or that a check has failed, unless tag_ttl is
// shorter. Clients that look for signatures ask for what is not there again and
// again.
const lackMemory = 10 * time.Second

// A lack is why something was not to be had from the upstream, when it was asked
// for at the given time.
type lack struct {
	at  time.Time
	err error
}

type lackKey struct {
	repository string
	kind       oci.Kind
	ref        string
}

// lacks returns the upstream's word that it does not have something, if that is
// fresh.
func (m *Mirror) lacks(t Target, kind oci.Kind, ref string) error {
	known, ok := m.lacking.Get(lackKey{t.Repository, kind, ref})
	if !ok || t.Upstream == nil {
		return nil
	}
	age := m.now().Sub(known.at)
	if age >= min(lackMemory, t.Upstream.TagTTL) {
		return nil
	}
	// Not wrapped: this is no new word, to be remembered from now.
	return fail(judge(known.err).situation, "%v (so it said %s ago)", known.err, age.Round(time.Second))
}

// learnLack remembers an error that is the upstream's word that it does not have
// something, so it said when it was asked at the given time or later.
func (m *Mirror) learnLack(t Target, kind oci.Kind, ref string, at time.Time, err error) {
	var refusal *upstream.Error
	if !errors.As(err, &refusal) || !refusal.Origin || refusal.Kind != upstream.NotFound && refusal.Kind != upstream.Unauthorized {
		return
	}
	m.lacking.Add(lackKey{t.Repository, kind, ref}, lack{at, err})
	if kind == oci.KindBlob {
		m.blobLack.Store(at.UnixNano())
	}
}

// obtainable fails if a blob of a manifest is known not to be there, nor here. A
// client that had the manifest from here would have to take the blobs from here,
// too; so it is sent to its next source beforehand.
func (m *Mirror) obtainable(ctx context.Context, t Target, manifest *tree.Manifest) error {
	if m.now().Sub(time.Unix(0, m.blobLack.Load())) >= lackMemory { // as nearly always
		return nil
	}
	for _, blob := range manifest.Blobs {
		if err := m.lacks(t, oci.KindBlob, string(blob.Digest)); err != nil && !m.holds(ctx, t, blob.Digest) {
			return fail(unobtainable, "its blob %s cannot be had: %v", blob.Digest, err)
		}
	}
	return nil
}

// holds reports whether a blob of a repository is in the store.
func (m *Mirror) holds(ctx context.Context, t Target, d digest.Digest) bool {
	known, ok, err := m.tree.Member(ctx, t.Repository, d)
	if err != nil || !ok || known.Canonical == "" {
		return false
	}
	info, err := m.tree.StatBlob(ctx, known.Canonical)
	return err == nil && intact(known, info.Size)
}
