// Package disktest opens disk stores for tests that know nothing of Caddy.
package disktest

import (
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
)

// Open opens the store in a directory. The test closes it.
func Open(t testing.TB, dir string) storage.Store {
	t.Helper()
	backend := &disk.Disk{Directory: dir, MinFree: "1MB"}
	if err := backend.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	store, err := backend.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return store
}
