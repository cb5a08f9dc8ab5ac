package hosted

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
)

// KeepFile stores a file that is whole and proven in a repository under its sha256, as
// [Upload.Keep] does, and within the same quota. It takes the file as
// [storage.Store.PutFile] does.
func (h *Registry) KeepFile(ctx context.Context, repository string, file fill.File) error {
	done, err := h.grant(ctx, repository, file.Size)
	if err != nil {
		return err
	}
	defer done()
	// Whoever asked may go, but not half of a commit.
	err = h.tree.PutBlob(context.WithoutCancel(ctx), repository, []digest.Digest{file.SHA256}, file.Path, file.Size)
	if err != nil {
		return fmt.Errorf("storing a blob of %d bytes: %w", file.Size, err)
	}
	return nil
}
