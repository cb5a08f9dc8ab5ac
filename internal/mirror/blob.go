package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/tree"
)

// content is a blob that can be sent: held, or on its way.
type content interface {
	io.Closer
	size() int64
	// span returns a reader of length bytes from offset. With proven, the end
	// of the blob comes only once its digest is proven. The reader is an
	// *os.File where that makes sendfile possible. Only one reader is used at
	// a time.
	span(ctx context.Context, offset, length int64, proven bool) (io.Reader, error)
}

// blob finds a blob, and starts a fill if it is not held.
func (m *Mirror) blob(ctx context.Context, t Target, d digest.Digest) (content, cache, error) {
	known, err := m.member(ctx, t, d)
	if err != nil {
		return nil, miss, err
	}
	if known.Canonical != "" {
		r, info, err := m.tree.OpenBlob(ctx, known.Canonical)
		if err == nil && !intact(known, info.Size) {
			r.Close()
			err = m.damaged(t, d, known, info.Size)
		}
		if err == nil {
			if !known.Linked && t.Upstream != nil {
				if err := m.link(ctx, t, d, known.Canonical); err != nil {
					r.Close()
					return nil, miss, err
				}
			}
			return &heldBlob{r: r, bytes: info.Size}, hit, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, miss, err
		}
	}
	if t.Upstream == nil {
		return nil, miss, fail(unknownContent, "the bytes of %s are missing from the store", d)
	}
	if err := m.claim(ctx, t); err != nil {
		return nil, miss, err
	}
	f, err := m.fills.Join(fill.Want{
		Digest:     d,
		Size:       known.Size,
		Repository: t.Repository,
		Sources:    t.Upstream.Client.Blob(t.Name, d),
	})
	if err != nil {
		return nil, miss, err
	}
	size, err := f.Size(ctx)
	switch {
	case err != nil:
	case known.Size >= 0 && size != known.Size:
		err = fail(noUpstream, "the blob has %d bytes, its manifest says %d", size, known.Size)
	case size == 0 && d != d.Algorithm().FromBytes(nil):
		// There would be no byte to withhold.
		err = fail(noUpstream, "the upstream says that the blob is empty, and its digest says that it is not")
	}
	if err != nil {
		f.Release()
		return nil, miss, err
	}
	return &liveBlob{fill: f, bytes: size}, stored, nil
}

// intact reports whether stored bytes can be a blob's, by their length. After a
// loss of power a file may be short or empty.
func intact(known tree.Member, size int64) bool {
	if known.Size >= 0 {
		return size == known.Size
	}
	return size > 0 || known.Canonical == known.Canonical.Algorithm().FromBytes(nil)
}

// damaged makes a mirrored blob that is not intact count as absent, so that it
// is fetched again.
func (m *Mirror) damaged(t Target, d digest.Digest, known tree.Member, size int64) error {
	m.log.Warn("a stored blob has the wrong length", zap.String("reference", t.Repository+"@"+d.String()), zap.Int64("bytes", size), zap.Int64("expected", known.Size))
	return fmt.Errorf("%w: the stored bytes of %s are damaged", fs.ErrNotExist, d)
}

// link writes down that a repository has a blob that another one brought.
func (m *Mirror) link(ctx context.Context, t Target, d, canonical digest.Digest) error {
	if err := m.claim(ctx, t); err != nil {
		return err
	}
	return m.tree.LinkBlob(ctx, t.Repository, d, canonical)
}

// member proves that a blob belongs to the repository: from what is stored, or
// for a mirrored one by asking the upstream.
func (m *Mirror) member(ctx context.Context, t Target, d digest.Digest) (tree.Member, error) {
	known, ok, err := m.tree.Member(ctx, t.Repository, d)
	if ok || err != nil {
		return known, err
	}
	if t.Upstream == nil {
		return known, fail(unknownContent, "%s is not part of the hosted repository %s", d, t.Repository)
	}
	size, err := share(ctx, m, "blob "+t.Repository+"@"+d.String(), func(ctx context.Context) (int64, error) {
		return t.Upstream.Client.BlobSize(ctx, t.Name, d)
	})
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
		if err == nil {
			return info.Size, hit, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return 0, miss, err
		}
	}
	if t.Upstream == nil {
		return 0, miss, fail(unknownContent, "the bytes of %s are missing from the store", d)
	}
	if known.Size >= 0 {
		return known.Size, miss, nil
	}
	size, err := share(ctx, m, "blob "+t.Repository+"@"+d.String(), func(ctx context.Context) (int64, error) {
		return t.Upstream.Client.BlobSize(ctx, t.Name, d)
	})
	return size, miss, err
}

// heldBlob is a blob in the store.
type heldBlob struct {
	r     io.ReadCloser
	bytes int64
}

func (b *heldBlob) Close() error { return b.r.Close() }
func (b *heldBlob) size() int64  { return b.bytes }

func (b *heldBlob) span(_ context.Context, offset, length int64, _ bool) (io.Reader, error) {
	file, ok := b.r.(io.ReadSeeker)
	if !ok {
		return nil, errors.New("mirror: the store's reader cannot seek")
	}
	if _, err := file.Seek(offset, io.SeekStart); err != nil {
		return nil, err
	}
	if offset+length == b.bytes {
		return file, nil
	}
	return io.LimitReader(file, length), nil
}

// liveBlob is a blob that is being filled.
type liveBlob struct {
	fill  *fill.Fill
	bytes int64
}

func (b *liveBlob) Close() error { b.fill.Release(); return nil }
func (b *liveBlob) size() int64  { return b.bytes }

func (b *liveBlob) span(ctx context.Context, offset, length int64, proven bool) (io.Reader, error) {
	return b.fill.NewReader(ctx, offset, length, proven), nil
}

// seeker reads a content at changing places, for multi-range answers.
type seeker struct {
	ctx     context.Context
	content content
	proven  bool
	offset  int64
	reader  io.Reader
	err     error // the first failure
}

func (s *seeker) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += s.offset
	case io.SeekEnd:
		offset += s.content.size()
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	s.offset, s.reader = offset, nil
	return offset, nil
}

func (s *seeker) Read(p []byte) (int, error) {
	if s.reader == nil {
		if s.offset >= s.content.size() {
			return 0, io.EOF
		}
		s.reader, s.err = s.content.span(s.ctx, s.offset, s.content.size()-s.offset, s.proven)
		if s.err != nil {
			return 0, s.err
		}
	}
	n, err := s.reader.Read(p)
	s.offset += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}
