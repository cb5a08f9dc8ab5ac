package hosted

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/oci"
)

// ErrRefused is wrapped by the check of a [Upload.Keep] that does not want the file,
// and never will.
var ErrRefused = errors.New("refused")

// Receive begins an upload whose digest nobody has to know before, and which is no
// client's of the registry API: [Registry.Upload] does not find it. It is kept on
// this machine, whatever the store shares, so another process does not find it
// either. Until [Upload.Keep] says where it goes, it counts in the quota of the
// repository, which may be one that there will never be.
func (h *Registry) Receive(ctx context.Context, repository string) (*Upload, error) {
	u, err := h.newUpload(repository, digest.SHA512)
	if err != nil {
		return nil, err
	}
	u.received = true
	if err := h.enterHere(u); err != nil {
		return nil, err
	}
	return u, nil
}

// HashLater has Keep compute the hashes of an upload, which reads it once more for that,
// and nobody before: so it comes as fast as the disk takes it. Until then what has come
// survives the process, and not a stop of the machine. It is called before anything has
// come.
func (u *Upload) HashLater() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.late = true
}

// Received returns an upload that [Registry.Receive] has begun, in this process or an
// earlier one, and that is not finished. Otherwise the error is [ErrNoUpload].
func (h *Registry) Received(ctx context.Context, id string) (*Upload, error) {
	u := h.found(id)
	if u == nil {
		return nil, ErrNoUpload
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.recalled(); err != nil {
		return nil, err
	}
	if u.gone || !u.received {
		return nil, ErrNoUpload
	}
	return u, nil
}

// Keep ends an upload that has been received: it has check look at the whole file, and
// stores it in a repository under its sha256. When it returns nil the blob survives a
// loss of power; it is collected in time unless a manifest comes to name it. The file
// is check's to read until it returns, and nobody writes to it meanwhile.
//
// Where the error of check wraps [ErrRefused], or the store has lost the bytes, the
// upload is no more. After any other error it can be kept again, or gone on with. One
// whose bytes the store has, and only their link is missing, is not checked again, but
// for its next Keep in this process to store the link.
func (u *Upload) Keep(ctx context.Context, repository string, check func(fill.File) error) (fill.File, error) {
	release, err := u.hold(ctx, nil)
	if err != nil {
		return fill.File{}, err
	}
	defer release()
	if !u.received {
		return fill.File{}, errors.New("keeping an upload that is a client's to finish")
	}
	file, err := u.keepIn(ctx, repository, check)
	if err != nil {
		u.modest(ctx)
		return fill.File{}, err
	}
	return file, nil
}

// keepIn does so. The caller is the one who writes.
func (u *Upload) keepIn(ctx context.Context, repository string, check func(fill.File) error) (fill.File, error) {
	u.move(repository)
	if err := u.allow(ctx, 0); err != nil {
		return fill.File{}, err
	}
	if err := u.hash(ctx); err != nil {
		return fill.File{}, err
	}
	file := fill.File{
		Size:   u.Offset(),
		SHA256: digest.NewDigest(digest.SHA256, u.sums.sha256),
		SHA512: digest.NewDigest(digest.SHA512, u.sums.other),
	}
	if u.stored == nil {
		if err := u.exist(); err != nil {
			return fill.File{}, err
		}
		whole := file
		whole.Path = u.path
		err := check(whole)
		if errors.Is(err, ErrRefused) {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.drop()
		}
		if err != nil {
			return fill.File{}, err
		}
		failpoint.Hit("receive.checked")
	}
	// Whoever asked may go, but not half of a commit.
	err := u.commit(context.WithoutCancel(ctx), file.SHA256)
	return file, err
}

// hash computes the hashes of everything that has come without. The caller is the one
// who writes.
func (u *Upload) hash(ctx context.Context) error {
	if !u.late {
		return nil
	}
	if err := u.exist(); err != nil {
		return err
	}
	s, err := newSums(u.sums.algorithm)
	if err != nil {
		return err
	}
	f, err := os.Open(u.path)
	if err != nil {
		return fmt.Errorf("reading what has come of an upload: %w", err)
	}
	defer f.Close()
	size := u.Offset()
	group, ctx := errgroup.WithContext(ctx)
	for _, sum := range []hash.Hash{s.sha256, s.other} {
		group.Go(func() error {
			n, err := oci.Feed(ctx, sum, io.NewSectionReader(f, 0, size))
			if err == nil && n != size {
				err = io.ErrUnexpectedEOF
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("reading what has come of an upload: %w", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sums, u.late = s, false
	return nil
}

// move lets an upload go to another repository than it was begun for.
func (u *Upload) move(repository string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if repository != u.repository && !u.registry.together(repository, u.repository) {
		u.disallow()
	}
	u.repository = repository
}

// exist makes the file of an upload of which nothing has come.
func (u *Upload) exist() error {
	if u.Offset() > 0 || u.stored != nil {
		return nil
	}
	f, err := os.OpenFile(u.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("making a file for an upload: %w", full(err))
	}
	return f.Close()
}

// Expires is when the upload ends by itself, unless more of it comes before.
func (u *Upload) Expires() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.last.Add(uploadLife)
}
