package catalog_test

import (
	"context"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// TestReport: what people ask about a store.
func TestReport(t *testing.T) {
	c := open(t, filepath.Join(t.TempDir(), "catalog.db"))
	ctx := context.Background()
	sum := func(name string) digest.Digest { return digest.FromString(name) }
	at := func(n int64) time.Time { return time.Unix(1_700_000_000+n, 0).UTC() }
	image := func(layers ...string) *oci.Manifest {
		m := new(oci.Manifest)
		for _, l := range layers {
			m.Blobs = append(m.Blobs, v1.Descriptor{Digest: sum(l), Size: 5000})
		}
		return m
	}
	var changes []tree.Change
	add := func(repository, manifest string, when int64, layers ...string) {
		changes = append(changes, tree.Change{Kind: tree.Manifested, Repository: repository, Canonical: sum(manifest), Size: 500, Manifest: image(layers...), At: at(when)})
		for _, l := range layers {
			changes = append(changes, tree.Change{Kind: tree.Linked, Repository: repository, Canonical: sum(l), Size: 5000, At: at(when)})
		}
	}
	tag := func(repository, name, manifest string, when int64) {
		changes = append(changes, tree.Change{Kind: tree.Tagged, Repository: repository, Tag: name, Canonical: sum(manifest), At: at(when)})
	}
	record := func(repository string, r tree.Record) {
		changes = append(changes, tree.Change{Kind: tree.Recorded, Repository: repository, Record: &r})
	}
	record("docker.io/a", tree.Record{Class: tree.Mirrored, Upstream: "docker.io"})
	record("ghcr.io/b", tree.Record{Class: tree.Mirrored, Upstream: "ghcr.io"})
	add("docker.io/a", "one", 1, "l1", "l2")
	tag("docker.io/a", "1", "one", 10)
	tag("docker.io/a", "2", "one", 20)
	add("ghcr.io/b", "two", 2, "l2")
	changes = append(changes, tree.Change{Kind: tree.Read, Repository: "ghcr.io/b", Canonical: sum("two"), At: at(15)})
	add("apps/c", "three", 3, "l3")
	tag("apps/c", "1", "three", 3)
	changes = append(changes, tree.Change{Kind: tree.Pinned, Repository: "docker.io/a", Tag: "2"})
	if err := c.Apply(ctx, changes); err != nil {
		t.Fatal(err)
	}

	used, err := c.Upstreams(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][2]int64{}
	for name, u := range used {
		got[name] = [2]int64{u.Repositories, u.Bytes}
	}
	if want := map[string][2]int64{"": {1, 5500}, "docker.io": {1, 10500}, "ghcr.io": {1, 5500}}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}

	largest, err := c.Largest(ctx, 2)
	if err != nil || len(largest) != 2 || largest[0].Name != "docker.io/a" || largest[0].Upstream != "docker.io" || largest[0].Usage.Bytes != 10500 {
		t.Errorf("%+v %v", largest, err)
	}

	for _, c1 := range []struct {
		repository string
		ref        oci.Reference
		want       catalog.Held
		ok         bool
	}{
		{"docker.io/a", oci.Reference{Tag: "1"}, catalog.Held{Digest: sum("one"), Since: at(10), Read: at(10), Evictable: true, Before: 0, Bytes: 10500}, true},
		{"docker.io/a", oci.Reference{Tag: "2"}, catalog.Held{Digest: sum("one"), Since: at(20), Read: at(20), Pinned: true, Bytes: 10500}, true},
		{"ghcr.io/b", oci.Reference{Digest: sum("two")}, catalog.Held{Digest: sum("two"), Since: at(2), Read: at(15), Evictable: true, Before: 1, Bytes: 5500}, true},
		{"apps/c", oci.Reference{Tag: "1"}, catalog.Held{Digest: sum("three"), Since: at(3), Read: at(3), Bytes: 5500}, true},
		{"apps/c", oci.Reference{Tag: "2"}, catalog.Held{}, false},
		{"apps/none", oci.Reference{Tag: "2"}, catalog.Held{}, false},
	} {
		held, ok, err := c.Held(ctx, c1.repository, c1.ref)
		held.Since, held.Read = held.Since.UTC(), held.Read.UTC()
		if !ok {
			held.Since, held.Read = time.Time{}, time.Time{}
		}
		if err != nil || ok != c1.ok || held != c1.want {
			t.Errorf("%s: %+v %v %v, want %+v", c1.ref.Join(c1.repository), held, ok, err, c1.want)
		}
	}
}
