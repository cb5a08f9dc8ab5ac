package catalog

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

func at(n int64) time.Time { return time.Unix(1_700_000_000+n, 0).UTC() }

func sum(name string) digest.Digest { return digest.FromString(name) }

func open(t testing.TB, dir, store string) *Catalog {
	t.Helper()
	backend := &sqlite.SQLite{File: dir + "/catalog.db"}
	db, err := backend.Open(context.Background(), store)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Open(context.Background(), db, backend.Dialect(), store)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestSmoke(t *testing.T) {
	c := open(t, t.TempDir(), "disk:/a")
	ctx := context.Background()
	m := &oci.Manifest{Blobs: []v1.Descriptor{{Digest: sum("layer"), Size: 5000}}}
	err := c.Apply(ctx, []tree.Change{
		{Kind: tree.Recorded, Repository: "docker.io/a", Record: &tree.Record{Class: tree.Mirrored, Upstream: "docker.io"}},
		{Kind: tree.Manifested, Repository: "docker.io/a", Canonical: sum("m"), Size: 500, Manifest: m, At: at(1)},
		{Kind: tree.Tagged, Repository: "docker.io/a", Tag: "x", Canonical: sum("m"), At: at(2)},
		{Kind: tree.Linked, Repository: "docker.io/a", Canonical: sum("layer"), Size: 5000, At: at(3)},
	})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(c.Usage(ctx, ""))
	fmt.Println(c.Usage(ctx, "docker.io"))
	roots, err := c.Coldest(ctx, "", time.Time{}, 10)
	fmt.Println(roots, err)
	fmt.Println(c.Removal(ctx, roots[0]))
	err = c.Apply(ctx, []tree.Change{
		{Kind: tree.Untagged, Repository: "docker.io/a", Tag: "x"},
		{Kind: tree.Unmanifested, Repository: "docker.io/a", Canonical: sum("m")},
		{Kind: tree.Unlinked, Repository: "docker.io/a", Canonical: sum("layer")},
	})
	fmt.Println(err)
	fmt.Println(c.Unreferenced(ctx, at(100), "", 10))
	fmt.Println(c.Names(ctx, "docker.io/a"))
	fmt.Println(c.Blobs(ctx, ""))
	fmt.Println(c.Usage(ctx, ""))
	fmt.Println(c.Complete(ctx))
}
