package hosted

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"mime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// MaxManifest is how large a manifest of a repository may be, in bytes.
func (h *Registry) MaxManifest(repository string) int64 {
	if most := h.options(repository).MaxManifest; most > 0 {
		return most
	}
	return oci.MaxManifestSize
}

// A Push is a manifest that is to be stored.
type Push struct {
	Repository string
	// Digest is what the bytes must have, in its own algorithm; empty: whatever
	// they have.
	Digest digest.Digest
	// Tags are to mean it from now on.
	Tags []string
	// ContentType is what the client says the bytes are; empty: it does not say.
	ContentType string
	Body        []byte
}

// PutManifest takes in a manifest, as it is to the byte, and lets tags mean it.
// Both survive a loss of power once it returns. To push the same again changes
// nothing.
//
// An error wraps [ErrManifest], [ErrDigest], [ErrTooLarge], [ErrImmutable],
// [ErrClosedToPush] or [storage.ErrFull], or is a [Missing]. Whether tags may be moved is looked at
// before anything is stored, and again when each is set: who loses a race for an
// immutable tag has stored the manifest, and is told.
func (h *Registry) PutManifest(ctx context.Context, p Push) (*tree.Manifest, error) {
	options := h.options(p.Repository)
	if err := options.closed(); err != nil {
		return nil, err
	}
	return h.putManifest(ctx, p, options)
}

func (h *Registry) putManifest(ctx context.Context, p Push, options Options) (*tree.Manifest, error) {
	if most := h.MaxManifest(p.Repository); int64(len(p.Body)) > most {
		return nil, fmt.Errorf("a manifest of more than %d bytes is %w: see max_manifest_size", most, ErrTooLarge)
	}
	parsed, required, err := oci.ParsePushed(p.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if err := sameType(p.ContentType, parsed.MediaType); err != nil {
		return nil, err
	}
	d := p.Digest
	switch {
	case d == "":
		d = digest.FromBytes(p.Body)
	case d.Algorithm().FromBytes(p.Body) != d:
		return nil, fmt.Errorf("%w: the %d bytes of the manifest have %s", ErrDigest, len(p.Body), d.Algorithm().FromBytes(p.Body))
	}
	// Whoever removes it waits until its tags are set, which would fail otherwise.
	defer h.tree.Pushing(p.Repository)()
	for _, tag := range p.Tags {
		before, err := h.tree.Tag(ctx, p.Repository, tag)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = options.movable(tag, p.Body)(before)
		}
		if err != nil {
			return nil, err
		}
	}
	done, err := h.grant(ctx, p.Repository, int64(len(p.Body)))
	if err != nil {
		return nil, err
	}
	defer done()
	if err := h.await(ctx, p.Repository, required, options.Sparse); err != nil {
		return nil, err
	}
	m, err := h.tree.PutManifest(ctx, p.Repository, d, p.Body, func(*oci.Manifest) error {
		return h.has(ctx, p.Repository, required, options.Sparse)
	})
	if err != nil {
		return nil, err
	}
	for _, tag := range p.Tags {
		failpoint.Hit("push.tag")
		if err := h.tree.SetTag(ctx, p.Repository, tag, d, h.now(), options.movable(tag, p.Body)); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// sameType checks that a manifest is what the client says it is. Its type is a
// pure function of its bytes: the same bytes never mean two things
// (CVE-2021-41190).
func sameType(says, is string) error {
	if says == "" {
		return nil
	}
	if mediaType, _, err := mime.ParseMediaType(says); err == nil {
		says = mediaType
	} else {
		says, _, _ = strings.Cut(says, ";") // parameters are nobody's business
	}
	if !strings.EqualFold(strings.TrimSpace(says), is) {
		return fmt.Errorf("%w: its bytes are of type %.100s, and Content-Type says %.100q", ErrManifest, is, says)
	}
	return nil
}

// movable says whether a tag may mean a manifest from now on. It may go on to mean
// the same, whatever digest of it is named.
func (o Options) movable(tag string, body []byte) func(before digest.Digest) error {
	return func(before digest.Digest) error {
		if before == "" || !o.immutable(tag) || before == before.Algorithm().FromBytes(body) {
			return nil
		}
		return fmt.Errorf("%w: %s means %s; push another tag", ErrImmutable, tag, before)
	}
}

func (o Options) immutable(tag string) bool {
	for _, pattern := range o.Immutable {
		if pattern.Match(tag) {
			return true
		}
	}
	return false
}

const (
	// sharedPatience is how long what another process has pushed may take to be seen
	// here, and a bit; see [storage.Distant].
	sharedPatience = 2500 * time.Millisecond
	sharedLook     = 100 * time.Millisecond
)

// await waits, while the store is shared, until a repository has the blobs: a client
// may push them through one process and their manifest through another, which has
// just told it that it does not have them. It fails only when ctx ends.
func (h *Registry) await(ctx context.Context, repository string, blobs []v1.Descriptor, sparse bool) error {
	if !h.tree.Shared() {
		return nil
	}
	patient, cancel := context.WithTimeout(ctx, sharedPatience)
	defer cancel()
	look := time.NewTicker(sharedLook)
	defer look.Stop()
	for {
		var missing *Missing
		if err := h.has(patient, repository, blobs, sparse); !errors.As(err, &missing) {
			return context.Cause(ctx) // whatever it is, it is found again
		}
		select {
		case <-look.C:
		case <-patient.Done():
			return context.Cause(ctx)
		}
	}
}

// has checks that a repository has blobs: what is held for another repository is
// not this one's (CVE-2024-39897). With sparse they may be missing.
func (h *Registry) has(ctx context.Context, repository string, blobs []v1.Descriptor, sparse bool) error {
	for _, blob := range blobs {
		known, ok, err := h.tree.Member(ctx, repository, blob.Digest)
		if err != nil {
			return err
		}
		size := int64(-1)
		if ok && known.Canonical != "" {
			info, err := h.tree.StatBlob(ctx, known.Canonical)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err == nil {
				size = info.Size
			}
		}
		switch {
		case size < 0 && !sparse:
			return &Missing{What: blob.Digest.String()}
		case size >= 0 && size != blob.Size:
			return fmt.Errorf("%w: it says that %s has %d bytes, and it has %d", ErrManifest, blob.Digest, blob.Size, size)
		}
	}
	return nil
}
