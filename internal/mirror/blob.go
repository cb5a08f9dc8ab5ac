package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/dustin/go-humanize"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// blob finds a blob, and starts a fill if it is not held.
func (m *Mirror) blob(ctx context.Context, t Target, d digest.Digest) (content.Content, cache, error) {
	known, err := m.member(ctx, t, d)
	if err != nil {
		return nil, miss, err
	}
	damaged := false
	if known.Canonical != "" {
		r, info, err := m.tree.OpenBlob(ctx, known.Canonical)
		distant := errors.Is(err, storage.ErrDistant)
		if (err == nil || distant && info.Size >= 0) && !intact(known, info.Size) {
			if err == nil {
				r.Close()
			}
			err, distant = m.damaged(t, d, known, info.Size), false
		}
		if err == nil {
			if err := m.askedFor(ctx, t, d, known); err != nil {
				r.Close()
				return nil, miss, err
			}
			return content.Held(r, info.Size), hit, nil
		}
		if distant {
			var want fill.Want
			if want, err = m.fromStore(ctx, t, d, known, info); err == nil {
				m.tree.AskedBlob(t.Repository, known, m.now())
				return m.join(want, hit)
			}
		}
		if !m.absent(t, err) {
			return nil, miss, err
		}
		if damaged = errors.Is(err, tree.ErrDamaged); damaged {
			m.log.Warn("a stored blob is damaged", zap.String("reference", t.Repository+"@"+d.String()), zap.Error(err))
			if t.Upstream != nil {
				// If it is still there: what is fetched now would be taken from it.
				if err := m.tree.Prove(ctx, known.Canonical); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return nil, miss, err
				}
			}
		}
	}
	if t.Upstream == nil {
		return nil, miss, fail(unknownContent, "the bytes of %s are missing from the store", d)
	}
	if err := m.lacks(t, oci.KindBlob, string(d)); err != nil {
		return nil, miss, err
	}
	want, err := m.want(ctx, t, d, known.Size)
	if err != nil {
		return nil, miss, err
	}
	want.Anew = damaged
	return m.join(want, stored)
}

// join joins a fill.
func (m *Mirror) join(want fill.Want, c cache) (content.Content, cache, error) {
	f, err := m.fills.Join(want)
	if err != nil {
		return nil, miss, err
	}
	return content.Live(f, want.Size), c, nil
}

// askedFor notes that a client has been given a blob that is held, and links one that
// only a manifest makes a member.
func (m *Mirror) askedFor(ctx context.Context, t Target, d digest.Digest, known tree.Member) error {
	m.tree.AskedBlob(t.Repository, known, m.now())
	if known.Linked || t.Upstream == nil {
		return nil
	}
	err := m.claim(ctx, t)
	if errors.Is(err, errUnclaimed) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := m.tree.LinkBlob(ctx, t.Repository, d, known.Canonical); err != nil && !errors.Is(err, fs.ErrNotExist) { // evicted since
		m.diskTrouble("linking a blob", t.Repository+"@"+d.String(), err)
	}
	return nil
}

// want is what a fill of a blob is told. The size is -1 where no manifest says
// it, or two disagree.
func (m *Mirror) want(ctx context.Context, t Target, d digest.Digest, size int64) (fill.Want, error) {
	if size < 0 {
		var err error
		if size, err = m.upstreamSize(ctx, t, d); err != nil {
			return fill.Want{}, err
		}
	}
	if size == 0 && d != d.Algorithm().FromBytes(nil) {
		return fill.Want{}, fail(noUpstream, "the blob is said to be empty, and its digest says that it is not")
	}
	if err := m.small(d, size); err != nil {
		return fill.Want{}, err
	}
	if err := m.claim(ctx, t); err != nil && !errors.Is(err, errUnclaimed) {
		return fill.Want{}, err
	}
	return fill.Want{
		Digest:      d,
		Size:        size,
		Repository:  t.Repository,
		Sources:     t.Upstream.Client.Blob(t.Name, d),
		Connections: t.Upstream.Connections,
	}, nil
}

// small fails for a blob that is larger than the store takes.
func (m *Mirror) small(d digest.Digest, size int64) error {
	if most := m.maxBlob.Load(); most > 0 && size > most {
		return fail(tooLarge, "its blob %s has %s, and max_blob_size of this mirror's store is %s", d, humanize.IBytes(uint64(size)), humanize.IBytes(uint64(most)))
	}
	return nil
}

// withinLimits fails for a mirrored manifest that names a blob which is larger
// than the store takes, unless it is held: a client that had the manifest from
// here would have to take the blob from here, too.
func (m *Mirror) withinLimits(ctx context.Context, t Target, manifest *tree.Manifest) error {
	if m.maxBlob.Load() <= 0 || t.Upstream == nil {
		return nil
	}
	for _, blob := range manifest.Blobs {
		if err := m.small(blob.Digest, blob.Size); err != nil && !m.holds(ctx, t, blob.Digest) {
			return err
		}
	}
	return nil
}

// Fetch fetches a mirrored blob that is not held, or held and wrong, behind
// everything that somebody waits for, and waits until it is stored. A size below 0 is
// asked for first.
func (m *Mirror) Fetch(ctx context.Context, t Target, d digest.Digest, size int64) error {
	if err := m.admit(ctx, t); err != nil {
		return err
	}
	want, err := m.want(ctx, t, d, size)
	if err != nil {
		return err
	}
	want.Anew = true
	return m.fills.Fetch(ctx, want)
}

// upstreamSize asks the upstream how long a blob is, once for all who ask.
func (m *Mirror) upstreamSize(ctx context.Context, t Target, d digest.Digest) (int64, error) {
	return share(ctx, m, "blob "+t.Repository+"@"+d.String(), func(ctx context.Context) (int64, error) {
		return t.Upstream.Client.BlobSize(ctx, t.Name, d)
	})
}

// intact reports whether stored bytes can be a blob's, by their length. After a
// loss of power a file may be short or empty.
func intact(known tree.Member, size int64) bool {
	if known.Size >= 0 {
		return size == known.Size
	}
	return size > 0 || known.Canonical == known.Canonical.Algorithm().FromBytes(nil)
}

// damaged makes a blob that is not intact count as absent, so that a mirrored one
// is fetched again. It may be that the manifest lies about its length, and what is
// stored is right and somebody else's; so a mirrored one is hashed, and deleted if
// it is wrong and no hosted repository's. Nobody waits for that: what is fetched
// takes its place.
func (m *Mirror) damaged(t Target, d digest.Digest, known tree.Member, size int64) error {
	m.log.Warn("a stored blob has the wrong length", zap.String("reference", t.Repository+"@"+d.String()), zap.Int64("bytes", size), zap.Int64("expected", known.Size))
	switch {
	case m.proven.Contains(known.Canonical):
	case t.Upstream == nil:
		m.proven.Add(known.Canonical, struct{}{})
		m.suspect(known.Canonical)
	case m.begin():
		m.proven.Add(known.Canonical, struct{}{})
		go func() {
			defer m.wg.Done()
			if err := m.tree.Prove(m.ctx, known.Canonical); err != nil {
				m.proven.Remove(known.Canonical) // wrong, and it may be so again
			}
		}()
	}
	return fmt.Errorf("%w: the stored bytes of %s are damaged", fs.ErrNotExist, d)
}

// member proves that a blob belongs to the repository: from what is stored, or
// for a mirrored one by asking the upstream.
func (m *Mirror) member(ctx context.Context, t Target, d digest.Digest) (tree.Member, error) {
	known, ok, err := m.tree.Member(ctx, t.Repository, d)
	if ok || err != nil && !m.absent(t, err) {
		return known, err
	}
	if t.Upstream == nil {
		return known, fail(unknownContent, "%s is not part of the hosted repository %s", d, t.Repository)
	}
	if err := m.lacks(t, oci.KindBlob, string(d)); err != nil {
		return known, err
	}
	size, err := m.upstreamSize(ctx, t, d)
	if err != nil {
		return known, err
	}
	return m.tree.AddMember(t.Repository, d, size), nil
}

// describeBlob is the answer to a HEAD: from the manifest that names the blob,
// the store, or the upstream, and never by fetching.
func (m *Mirror) describeBlob(ctx context.Context, t Target, d digest.Digest) (int64, cache, error) {
	known, err := m.member(ctx, t, d)
	if err != nil {
		return 0, miss, err
	}
	if known.Canonical != "" {
		info, err := m.tree.StatBlob(ctx, known.Canonical)
		if err == nil && !intact(known, info.Size) {
			err = m.damaged(t, d, known, info.Size)
		}
		if err == nil && t.Upstream == nil {
			// Whoever is to push a manifest will not push the blob again.
			err = m.tree.Promise(ctx, t.Repository, d, known, m.now())
		} else if err == nil {
			m.tree.AskedBlob(t.Repository, known, m.now())
		}
		if err == nil {
			return info.Size, hit, nil
		}
		if !m.absent(t, err) {
			return 0, miss, err
		}
	}
	if t.Upstream == nil {
		return 0, miss, fail(unknownContent, "the bytes of %s are missing from the store", d)
	}
	if known.Size >= 0 {
		return known.Size, miss, nil
	}
	size, err := m.upstreamSize(ctx, t, d)
	return size, miss, err
}
