package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// ErrMirrored is wrapped by the error of whoever pushes to or deletes from a
// repository that is recorded as mirrored.
var ErrMirrored = errors.New("it is recorded as mirrored")

// Host records a repository as hosted, unless it is recorded already. Whatever
// pushes or deletes does so before. The record survives a loss of power.
func (t *Tree) Host(ctx context.Context, repository string) error {
	record, err := t.Claim(ctx, repository, Record{Class: Hosted, Created: t.now().UTC()})
	if err == nil && record.Class == Mirrored {
		err = fmt.Errorf("repository %s: %w from %s", repository, ErrMirrored, record.Upstream)
	}
	return err
}

// Claim records what a repository is, unless it is recorded already, and returns
// what it is recorded as.
func (t *Tree) Claim(ctx context.Context, repository string, r Record) (Record, error) {
	if record, err := t.Record(ctx, repository); !errors.Is(err, fs.ErrNotExist) {
		return record, err
	}
	defer t.repositories.lock(repository)()
	if record, err := t.Record(ctx, repository); !errors.Is(err, fs.ErrNotExist) {
		return record, err
	}
	if was, ok := t.forgotten.Peek(repository); ok && was.Class == Hosted {
		// Somebody may be pushing who has found it recorded.
		r = was
	}
	if err := t.putRecord(ctx, repository, r); err != nil {
		return Record{}, fmt.Errorf("recording repository %s: %w", repository, err)
	}
	failpoint.Hit("claim.recorded")
	return r, nil
}

// PutBlob moves a file of proven bytes to its place, and makes it a member of a
// hosted repository under each of its digests, of which the first is the sha256.
// It takes the file as [storage.Store.PutFile] does. What it has done survives a
// loss of power.
func (t *Tree) PutBlob(ctx context.Context, repository string, names []digest.Digest, path string, size int64) error {
	if err := t.Host(ctx, repository); err != nil {
		return err
	}
	w := t.write(ctx, repository)
	defer w.end()
	key := layout.Blob(names[0])
	put := func(d storage.Durability) error {
		err := t.store.PutFile(ctx, key, path, d)
		if err == nil {
			t.note(Change{Kind: Hashed, Canonical: names[0], Size: size, At: t.now()})
		}
		failpoint.Hit("push.stored")
		return err
	}
	// A loss of power must not leave a link to bytes that are not there: whoever asks
	// for them would be told that he need not push them. And they are synced now,
	// which may take long, since it is done under no lock. At a distant place they
	// can be synced there only, where they are to be in the end: so they are stored
	// first, and kept from being collected until they are linked, since they are new.
	store := func() error {
		// Bytes that are there already may be wrong: pushing them again is how
		// they are put right.
		_, err := t.store.Stat(ctx, key)
		return put(over(err))
	}
	if t.store.Distant() == nil {
		if err := syncFile(path); err != nil {
			return err
		}
	} else {
		w.touch(key)
		t.note(Change{Kind: Stored, Canonical: names[0], Size: size, At: t.now()})
		if err := put(storage.Durable); err != nil {
			return err
		}
		store = func() error {
			_, err := t.store.Stat(ctx, key)
			return err
		}
	}
	err := t.bind(ctx, w, repository, names, func() (int64, error) { return size, nil }, func() error {
		w.touch(key)
		return store()
	})
	if err != nil {
		return err
	}
	failpoint.Hit("push.linked")
	if err := w.sync(ctx); err != nil {
		return err
	}
	failpoint.Hit("push.synced")
	return nil
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Mount makes a blob of the repository from a member of a hosted one, and returns
// its size. If it is no member of from, or its bytes are not there, the error is an
// fs.ErrNotExist. What it has done survives a loss of power.
func (t *Tree) Mount(ctx context.Context, repository, from string, d digest.Digest) (size int64, err error) {
	known, ok, err := t.Member(ctx, from, d)
	if err == nil && (!ok || known.Canonical == "") {
		err = fmt.Errorf("blob %s of repository %s: %w", d, from, fs.ErrNotExist)
	}
	if err != nil {
		return 0, err
	}
	info, err := t.store.Stat(ctx, layout.Blob(known.Canonical))
	if err != nil {
		return 0, err
	}
	if err := t.Host(ctx, repository); err != nil {
		return 0, err
	}
	return info.Size, t.LinkBlob(ctx, repository, d, known.Canonical)
}

// LinkBlob makes a stored blob a member of a repository, under the digest it
// was asked for by and under the one it lies at. If its bytes are not there any
// more, the error is an fs.ErrNotExist.
func (t *Tree) LinkBlob(ctx context.Context, repository string, asked, canonical digest.Digest) error {
	w := t.write(ctx, repository)
	defer w.end()
	names := []digest.Digest{canonical}
	if asked != canonical {
		names = append(names, asked)
	}
	key := layout.Blob(canonical)
	if w.lasting { // before they are linked, as in PutBlob: they may be mirrored
		if err := t.store.Sync(ctx, key); err != nil {
			return err
		}
	}
	err := t.bind(ctx, w, repository, names, func() (int64, error) {
		info, err := t.store.Stat(ctx, key)
		return info.Size, err
	}, func() error {
		w.touch(key) // which may have been replaced since
		return nil
	})
	if err != nil || !w.lasting {
		return err
	}
	failpoint.Hit("mount.linked")
	if err := w.sync(ctx); err != nil {
		return err
	}
	failpoint.Hit("mount.synced")
	return nil
}

// bind makes a blob a member of a repository under its digests, the sha256 first,
// once store has seen to its bytes, and tells of it before.
func (t *Tree) bind(ctx context.Context, w *writing, repository string, names []digest.Digest, size func() (int64, error), store func() error) error {
	canonical, other := names[0], names[len(names)-1]
	leave, err := t.enter(ctx, repository)
	if err != nil {
		return err
	}
	defer leave()
	defer t.lockDigest(canonical)()
	bytes, err := size()
	if err != nil {
		return err
	}
	t.note(Change{Kind: Linked, Repository: repository, Canonical: canonical, Digest: otherThan(canonical, other), Size: bytes, At: t.now()})
	err = store()
	g := t.guards.of(repository)
	for _, d := range names {
		if err == nil {
			err = w.link(ctx, layout.LayerLink(repository, d), canonical)
		}
		if err != nil {
			ctx := context.WithoutCancel(ctx)
			if t.absent(ctx, layout.LayerLink(repository, canonical)) {
				t.note(Change{Kind: Unlinked, Repository: repository, Canonical: canonical})
			}
			if t.absent(ctx, layout.Blob(canonical)) {
				t.note(Change{Kind: Removed, Canonical: canonical})
			}
			return err
		}
		g.mu.Lock()
		t.linked(member{repository, d}, canonical)
		g.mu.Unlock()
	}
	return nil
}

// PutManifest stores a manifest whose bytes match the digest.
//
// A check makes that a push: the repository is recorded as hosted, and check says
// whether it may be, when the manifest has been told of and nothing is written yet.
// What the manifest names is not removed meanwhile. check may ask Member and
// StatBlob, and nothing of the tree that writes, or that reads a blob.
func (t *Tree) PutManifest(ctx context.Context, repository string, d digest.Digest, body []byte, check func(*oci.Manifest) error) (*Manifest, error) {
	parsed, err := parse(d, body)
	if err != nil {
		return nil, err
	}
	m, canonical := newManifest(d, body, parsed), digest.FromBytes(body)
	canonicals := map[digest.Digest]digest.Digest{}
	var named []digest.Digest
	if check != nil {
		if err := t.Host(ctx, repository); err != nil {
			return nil, err
		}
		if canonicals, named, err = t.namedBy(ctx, repository, parsed); err != nil {
			return nil, err
		}
	}
	w := t.write(ctx, repository)
	defer w.end()
	if err := t.putManifest(ctx, w, repository, canonical, m, named, check); err != nil {
		return nil, err
	}
	failpoint.Hit("manifest.linked")
	w.restOn(repository, parsed, func(d digest.Digest) digest.Digest {
		if canonical, ok := canonicals[d]; ok {
			return canonical
		}
		return d
	})
	if err := w.sync(ctx); err != nil {
		return nil, err
	}
	if w.lasting {
		failpoint.Hit("manifest.synced")
	}
	return m, nil
}

// putManifest does so, up to the sync.
func (t *Tree) putManifest(ctx context.Context, w *writing, repository string, canonical digest.Digest, m *Manifest, named []digest.Digest, check func(*oci.Manifest) error) error {
	leave, err := t.enter(ctx, repository)
	if err != nil {
		return err
	}
	defer leave()
	defer t.lockReferring(canonical, named)()
	err = t.manifested(ctx, w, repository, canonical, m, func() error {
		if check != nil {
			if err := check(m.Manifest); err != nil {
				return err
			}
		}
		err := w.keep(ctx, layout.Blob(canonical), m.Body)
		failpoint.Hit("manifest.stored")
		return err
	})
	if err == nil {
		t.known(repository, m, canonical, t.hot.since(canonical))
	}
	return err
}

// namedBy finds out where what a manifest names lies, by the digests it is named by
// where those are no sha256, and altogether.
func (t *Tree) namedBy(ctx context.Context, repository string, m *oci.Manifest) (others map[digest.Digest]digest.Digest, all []digest.Digest, err error) {
	others = map[digest.Digest]digest.Digest{}
	add := func(d digest.Digest, key string) {
		canonical, linkErr := t.canonical(ctx, repository, d, key)
		if linkErr != nil && err == nil {
			err = linkErr
		}
		if canonical != d {
			others[d] = canonical
		}
		all = append(all, canonical)
	}
	for _, blob := range slices.Concat(m.Blobs, m.Foreign) {
		add(blob.Digest, layout.LayerLink(repository, blob.Digest))
	}
	for _, child := range m.Children {
		add(child.Digest, layout.RevisionLink(repository, child.Digest))
	}
	return others, all, err
}

// manifested links a manifest once store has stored it, and tells of it before.
// The lock of its digest is held.
func (t *Tree) manifested(ctx context.Context, w *writing, repository string, canonical digest.Digest, m *Manifest, store func() error) error {
	t.note(Change{
		Kind: Manifested, Repository: repository, Canonical: canonical, Digest: otherThan(canonical, m.Digest),
		Size: int64(len(m.Body)), Manifest: m.Manifest, At: t.now(),
	})
	err := store()
	if err == nil {
		err = w.link(ctx, layout.RevisionLink(repository, canonical), canonical)
	}
	if err == nil && m.Digest != canonical {
		return w.link(ctx, layout.RevisionLink(repository, m.Digest), canonical)
	}
	if err != nil {
		ctx := context.WithoutCancel(ctx)
		if t.absent(ctx, layout.RevisionLink(repository, canonical)) {
			t.note(Change{Kind: Unmanifested, Repository: repository, Canonical: canonical})
		}
		if t.absent(ctx, layout.Blob(canonical)) {
			t.note(Change{Kind: Removed, Canonical: canonical})
		}
	}
	return err
}
