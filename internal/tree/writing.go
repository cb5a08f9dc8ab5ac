package tree

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// A writing is what one operation puts into a repository or takes out of it. Where
// the repository is not recorded as mirrored, it survives a loss of power: it is
// written lazily, and all of it is synced at the end, when no lock is held.
//
// What somebody else has written and is still syncing can be seen by then, and be
// built upon: a manifest is pushed that names a blob which another client is just
// pushing. So whoever builds on it syncs it as well. It is among unsynced from
// before it can be seen until it has been synced.
type writing struct {
	tree    *Tree
	lasting bool
	keys    []string
	on      []string
}

// unsynced are the keys that somebody is writing and has not synced yet.
type unsynced struct {
	mu   sync.Mutex
	keys map[string]int // how many are
}

// write begins to write in a repository. The writing is to be ended.
func (t *Tree) write(ctx context.Context, repository string) *writing {
	return &writing{tree: t, lasting: !t.isMirrored(ctx, repository)}
}

// isMirrored reports whether a repository is recorded as mirrored.
func (t *Tree) isMirrored(ctx context.Context, repository string) bool {
	record, err := t.Record(ctx, repository)
	return err == nil && record.Class == Mirrored
}

// isHosted reports whether a repository is recorded as hosted, or may be. One that
// registry:2 has made is recorded when it is first pushed to or deleted from.
func (t *Tree) isHosted(ctx context.Context, repository string) bool {
	record, err := t.Record(ctx, repository)
	return !errors.Is(err, fs.ErrNotExist) && (err != nil || record.Class != Mirrored)
}

// touch has a key synced, which may have been written or deleted.
func (w *writing) touch(key string) {
	if !w.lasting {
		return
	}
	w.keys = append(w.keys, key)
	u := &w.tree.unsynced
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.keys == nil {
		u.keys = map[string]int{}
	}
	u.keys[key]++
}

// rest has keys synced that others are still syncing.
func (w *writing) rest(keys ...string) {
	if !w.lasting {
		return
	}
	u := &w.tree.unsynced
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, key := range keys {
		if u.keys[key] > 0 {
			w.on = append(w.on, key)
		}
	}
}

// restOn has what a manifest names synced where others are still syncing it.
func (w *writing) restOn(repository string, named *oci.Manifest, canonical func(digest.Digest) digest.Digest) {
	for _, blob := range slices.Concat(named.Blobs, named.Foreign) {
		w.rest(layout.Blob(canonical(blob.Digest)), layout.LayerLink(repository, canonical(blob.Digest)), layout.LayerLink(repository, blob.Digest))
	}
	for _, child := range named.Children {
		w.rest(layout.Blob(canonical(child.Digest)), layout.RevisionLink(repository, canonical(child.Digest)), layout.RevisionLink(repository, child.Digest))
	}
}

// sync brings all of it to the disk.
func (w *writing) sync(ctx context.Context) error {
	if !w.lasting {
		return nil
	}
	return w.tree.store.Sync(ctx, append(w.keys, w.on...)...)
}

func (w *writing) end() {
	u := &w.tree.unsynced
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, key := range w.keys {
		if u.keys[key]--; u.keys[key] == 0 {
			delete(u.keys, key)
		}
	}
}

// link writes a link. Where it is there already, it stays.
func (w *writing) link(ctx context.Context, key string, d digest.Digest) error {
	if !w.lasting {
		return w.tree.setLink(ctx, key, d)
	}
	return w.keep(ctx, key, []byte(d))
}

// keep writes a value that never changes: what is there already stays, unless it
// may be damaged.
func (w *writing) keep(ctx context.Context, key string, data []byte) error {
	w.touch(key)
	info, err := w.tree.store.Stat(ctx, key)
	if err == nil && !info.Doubtful && info.Size == int64(len(data)) {
		had, err := w.tree.store.Get(ctx, key, int64(len(data)))
		if err == nil && bytes.Equal(had, data) {
			return nil
		}
	}
	return w.tree.store.Put(ctx, key, data, over(err))
}

// replace writes a value that may have been another before.
func (w *writing) replace(ctx context.Context, key string, data []byte) error {
	if !w.lasting {
		return w.tree.store.Put(ctx, key, data, storage.Lazy)
	}
	w.touch(key)
	_, err := w.tree.store.Stat(ctx, key)
	return w.tree.store.Put(ctx, key, data, over(err))
}

// over is how a value is to be put where Stat says err. One that has been promised
// to somebody must not be lost for a new one that is not on the disk yet.
func over(err error) storage.Durability {
	if errors.Is(err, fs.ErrNotExist) {
		return storage.Lazy
	}
	return storage.Durable
}
