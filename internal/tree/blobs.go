package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// maxProofs is how many blobs are hashed at once: more would only make the disk
// seek.
const maxProofs = 2

var errClosed = errors.New("the store is being closed")

// OpenBlob opens the bytes of a blob, whoever it belongs to. If they may have
// been damaged by a loss of power, they are hashed first, once for all who ask
// and whether or not they wait. Bytes that are wrong are deleted, unless Guard's
// function keeps them, and the error wraps [ErrDamaged] for those who waited.
//
// Small ones come from memory, and are hashed whenever they come there. One
// that is wrong though nobody doubted it is left where it is; see Prove.
//
// Where the store is distant and the bytes are not near, the error is
// [storage.ErrDistant], and the Info what is known of them: whoever wants them fetches
// them for all who do. A wrong copy that is near is let go of, if they are at the
// distant place, too.
func (t *Tree) OpenBlob(ctx context.Context, canonical digest.Digest) (io.ReadCloser, storage.Info, error) {
	key := layout.Blob(canonical)
	if w, ok := t.hot.get(canonical); ok {
		return w.open(), storage.Info{Key: key, Size: int64(len(w.body))}, nil
	}
	since := t.hot.since(canonical)
	r, info, err := t.near(ctx, key)
	if err == nil && info.Doubtful {
		r.Close()
		if since, ok := t.wrong.Peek(canonical); ok && since.Equal(info.ModTime) {
			return nil, storage.Info{}, fmt.Errorf("the stored bytes of %s are %w", canonical, ErrDamaged)
		}
		if err := t.proveOnce(ctx, canonical, false); err != nil {
			return nil, storage.Info{}, err
		}
		r, info, err = t.near(ctx, key)
	}
	if err != nil || info.Size > maxHot || info.Doubtful {
		return r, info, err
	}
	defer r.Close()
	w := &warm{body: make([]byte, info.Size)}
	if _, err := io.ReadFull(r, w.body); err != nil {
		return nil, info, fmt.Errorf("reading the stored bytes of %s: %w", canonical, err)
	}
	if canonical.Algorithm().FromBytes(w.body) != canonical {
		if t.drop(key) {
			if r, info, err := t.near(ctx, key); err != nil {
				return nil, info, err
			} else {
				r.Close() // it has come again meanwhile
			}
		}
		t.suspect(canonical)
		return nil, info, fmt.Errorf("the stored bytes of %s are %w", canonical, ErrDamaged)
	}
	t.hot.add(canonical, w, since)
	return w.open(), info, nil
}

// near opens stored bytes that are on a local disk.
func (t *Tree) near(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	if distant := t.store.Distant(); distant != nil {
		return distant.OpenNear(ctx, key)
	}
	return t.store.Open(ctx, key, 0, -1)
}

// drop lets go of bytes that are near and wrong, if they are at a distant place, too.
func (t *Tree) drop(key string) bool {
	distant := t.store.Distant()
	return distant != nil && distant.Drop(key)
}

// inMemory is the bytes of a blob in memory.
type inMemory struct{ *bytes.Reader }

func (inMemory) Close() error { return nil }

func (w *warm) open() io.ReadCloser { return inMemory{bytes.NewReader(w.body)} }

// StatBlob describes the bytes of a blob, whoever it belongs to. It does not
// hash doubtful ones, which can take minutes: OpenBlob may then find that a blob
// StatBlob has described is damaged.
func (t *Tree) StatBlob(ctx context.Context, canonical digest.Digest) (storage.Info, error) {
	if w, ok := t.hot.get(canonical); ok {
		return storage.Info{Key: layout.Blob(canonical), Size: int64(len(w.body))}, nil
	}
	return t.store.Stat(ctx, layout.Blob(canonical))
}

// Close ends the hashing of doubtful blobs and the reading of repositories, and
// waits for its end. Whoever waits for one gets an error, and so does every later
// OpenBlob of one. Nothing may be
// reading manifests or small blobs at that moment: setting a value in ristretto
// while it is being closed panics. The store may be closed then.
func (t *Tree) Close() {
	t.life.mu.Lock()
	t.life.closed = true
	t.life.mu.Unlock()
	t.life.cancel(errClosed)
	t.life.wg.Wait()
	t.hot.cache.Close()
}

// life is what a tree does for nobody in particular.
type life struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	mu     sync.Mutex
	closed bool           // guarded by mu
	wg     sync.WaitGroup // added to under mu, while not closed
}

// begin keeps the tree open until wg.Done, or reports that it is closed.
func (l *life) begin() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.wg.Add(1)
	}
	return !l.closed
}

// proofs are the blobs that are being hashed.
type proofs struct {
	flights singleflight.Group
	slots   chan struct{} // holds a value for each that is being read
}

// Prove hashes the stored bytes of a blob, for one who has a reason to doubt
// them. Bytes that are wrong are deleted, unless Guard's function keeps them, and
// the error wraps [ErrDamaged].
func (t *Tree) Prove(ctx context.Context, canonical digest.Digest) error {
	return t.proveOnce(ctx, canonical, true)
}

// Guard has stays asked before bytes that are wrong are deleted: whether they are
// to stay, because nobody may be able to fetch them again. suspect is told of
// those that are wrong and have not been deleted; it neither blocks nor calls the
// tree. Guard is to be called before anything is read.
func (t *Tree) Guard(stays func(context.Context, digest.Digest) (bool, error), suspect func(digest.Digest)) {
	t.stays, t.suspect = stays, suspect
}

// proveOnce waits until a blob has been proven: one that is doubtful, or with
// anyway any. It goes on when nobody waits any more, or a client without patience
// would never get a large one.
func (t *Tree) proveOnce(ctx context.Context, canonical digest.Digest, anyway bool) error {
	flight := canonical.String()
	if anyway {
		flight = "anyway " + flight
	}
	result := t.proofs.flights.DoChan(flight, func() (any, error) {
		if !t.life.begin() {
			return nil, errClosed
		}
		defer t.life.wg.Done()
		select {
		case t.proofs.slots <- struct{}{}:
			defer func() { <-t.proofs.slots }()
		case <-t.life.ctx.Done():
			return nil, context.Cause(t.life.ctx)
		}
		return nil, t.prove(t.life.ctx, canonical, anyway)
	})
	select {
	case r := <-result:
		return r.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// prove hashes a blob, and vouches for it, or deletes it if it may. Of a copy that is
// near and wrong it lets go, if the blob is at a distant place, too, and that is what
// it hashes then; unless it was doubt of what was near that it was asked for.
func (t *Tree) prove(ctx context.Context, canonical digest.Digest, anyway bool) error {
	key := layout.Blob(canonical)
	r, hashed, err := t.store.Open(ctx, key, 0, -1)
	if err != nil {
		return err
	}
	defer func() { r.Close() }()
	if !hashed.Doubtful && !anyway { // proven since it was asked for
		return nil
	}
	is, err := oci.DigestOf(ctx, canonical.Algorithm(), r)
	if err != nil {
		return fmt.Errorf("hashing the stored bytes of %s: %w", canonical, err)
	}
	if is != canonical && t.drop(key) {
		if !anyway {
			return nil
		}
		r.Close()
		if r, hashed, err = t.store.Open(ctx, key, 0, -1); err != nil {
			return err
		}
		if is, err = oci.DigestOf(ctx, canonical.Algorithm(), r); err != nil {
			return fmt.Errorf("hashing the stored bytes of %s: %w", canonical, err)
		}
	}
	if is == canonical {
		// A store that cannot write it down asks again the next time.
		if err := t.store.Vouch(ctx, key); errors.Is(err, fs.ErrNotExist) {
			return err
		}
		t.note(Change{Kind: Hashed, Canonical: canonical, Size: hashed.Size, At: t.now()})
		return nil
	}
	if distant := t.store.Distant(); distant != nil {
		distant.Distrust(key) // so that what is stored in its place is stored there
	}
	kept := false
	removed, err := t.RemoveBlob(ctx, canonical, func() (bool, error) {
		// Somebody may have stored the right bytes meanwhile.
		now, err := t.store.Stat(ctx, key)
		if err != nil || !now.ModTime.Equal(hashed.ModTime) {
			return err == nil, err
		}
		stays, err := t.stays(ctx, canonical)
		kept = stays || err != nil // whoever cannot say does not allow it
		return kept, nil
	})
	if kept {
		t.wrong.Add(canonical, hashed.ModTime)
		t.suspect(canonical)
	} else if err != nil || !removed {
		return err
	}
	return fmt.Errorf("the stored bytes of %s are %w", canonical, ErrDamaged)
}
