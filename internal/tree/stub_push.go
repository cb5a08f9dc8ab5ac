package tree

import (
	"context"
	"io/fs"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// PutBlob moves an uploaded, verified file in and links it.
func (t *Tree) PutBlob(ctx context.Context, repository string, names []digest.Digest, path string, size int64) error {
	if err := t.store.PutFile(ctx, layout.Blob(names[0]), path, storage.Durable); err != nil {
		return err
	}
	failpoint.Hit("blob.stored")
	for _, name := range names {
		if err := t.LinkBlob(ctx, repository, name, names[0]); err != nil {
			return err
		}
	}
	failpoint.Hit("blob.linked")
	return nil
}

// Mount takes a blob over from another repository.
func (t *Tree) Mount(ctx context.Context, repository string, from string, d digest.Digest) (int64, error) {
	known, ok, err := t.Member(ctx, from, d)
	if err != nil {
		return 0, err
	}
	if !ok || known.Canonical == "" {
		return 0, fs.ErrNotExist
	}
	info, err := t.StatBlob(ctx, known.Canonical)
	if err != nil {
		return 0, err
	}
	return info.Size, t.LinkBlob(ctx, repository, d, known.Canonical)
}
