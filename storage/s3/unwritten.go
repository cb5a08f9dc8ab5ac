package s3

import (
	"context"
	"errors"

	_ "go.etcd.io/bbolt" // the index

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
)

type store struct{ storage.Store }

// open opens the store that a bucket and its near tier are. It closes the bucket
// when it is closed itself, and not when open fails.
func open(ctx context.Context, near *disk.Disk, b *bucket, s settings) (*store, error) {
	return nil, errors.New("s3: the store is not written yet")
}

// configure has the store, and its bucket, use other settings from now on.
func (s *store) configure(to settings) error { return nil }
