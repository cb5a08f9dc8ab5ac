package mirror

import (
	"errors"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// layers is what an image consists of, until its first layer is asked for.
type layers struct {
	blobs []v1.Descriptor
	once  sync.Once
}

type member struct {
	repository string
	digest     digest.Digest
}

// expect remembers the layers of an image that has just come, since they will
// be asked for one after another.
func (m *Mirror) expect(t Target, image *oci.Manifest) {
	if len(image.Blobs) < 3 { // a config, a layer, and nothing to come
		return
	}
	l := &layers{blobs: image.Blobs}
	for _, d := range image.Blobs[1:] {
		m.coming.Add(member{t.Repository, d.Digest}, l)
	}
}

// ahead begins to fetch the next layers of an image when the first is asked for
// as a whole: as many as there are connections to fetch one with. Clients ask for three
// at a time, or for one.
func (m *Mirror) ahead(t Target, d digest.Digest) {
	l, ok := m.coming.Get(member{t.Repository, d})
	if !ok || t.Upstream == nil {
		return
	}
	l.once.Do(func() {
		for _, d := range l.blobs {
			m.coming.Remove(member{t.Repository, d.Digest})
		}
		next := l.blobs
		for i, blob := range l.blobs {
			if blob.Digest == d {
				next = l.blobs[i+1:]
			}
		}
		for _, blob := range next[:min(len(next), t.Upstream.Connections)] {
			if blob.Size < 0 {
				continue // it would have to be asked for first
			}
			if want, err := m.wantAhead(t, blob); err == nil {
				m.fills.Ahead(want)
			}
		}
	})
}

// wantAhead is what a fill is told of a blob that will be asked for: the store comes
// first if it has it, but not near.
func (m *Mirror) wantAhead(t Target, blob v1.Descriptor) (fill.Want, error) {
	if m.distant != nil {
		known, ok, err := m.tree.Member(m.ctx, t.Repository, blob.Digest)
		if err == nil && ok && known.Canonical != "" {
			r, info, err := m.tree.OpenBlob(m.ctx, known.Canonical)
			if err == nil {
				r.Close() // it is near, as the fill will find
			} else if errors.Is(err, storage.ErrDistant) && (info.Size < 0 || intact(known, info.Size)) {
				return m.fromStore(m.ctx, t, blob.Digest, known, info)
			}
		}
	}
	return m.want(m.ctx, t, blob.Digest, blob.Size)
}
