package catalog_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/catalog/catalogtest"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

var scale = flag.Int("manifests", 1_000_000, "how many manifests BenchmarkScale has; five times as many links")

// BenchmarkScale prints what a large catalog takes.
func BenchmarkScale(b *testing.B) {
	ctx := context.Background()
	shape := catalogtest.Shape{Manifests: *scale, Links: 5 * *scale}
	file := filepath.Join(b.TempDir(), "catalog.db")
	clock := time.Now()
	took := func() time.Duration {
		d := time.Since(clock)
		clock = time.Now()
		return d
	}
	say := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) } // Logf shows ten lines
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(catalogtest.Fill(ctx, &sqlite.SQLite{File: file}, theStore, shape))
	info, err := os.Stat(file)
	must(err)
	say("filled in %v: %d MiB", took(), info.Size()>>20)
	c := open(b, file)
	say("open: %v", took())
	usage, err := c.Usage(ctx, "")
	must(err)
	say("usage: %v: %+v", took(), usage)
	random := rand.New(rand.NewPCG(1, 1))

	measure := func(what string, n int, do func()) {
		var all []time.Duration
		for range n {
			took()
			do()
			all = append(all, took())
		}
		slices.Sort(all)
		say("%s: median %v, slowest %v", what, all[n/2], all[n-1])
	}
	measure("usage", 20, func() {
		_, err := c.Usage(ctx, "quay.io")
		must(err)
	})
	measure("100 repositories", 20, func() {
		_, err := c.Repositories(ctx, "", shape.Repository(random.IntN(shape.Repositories())), 100)
		must(err)
	})
	measure("100 repositories of which few match", 20, func() {
		_, err := c.Repositories(ctx, "app777", "", 100)
		must(err)
	})
	measure("tags of a repository", 20, func() {
		tags, err := c.Tags(ctx, shape.Repository(random.IntN(shape.Repositories())), "", 100)
		must(err)
		if len(tags) != 10 {
			b.Fatal(tags)
		}
	})
	measure("coldest 100", 20, func() {
		_, err := c.Coldest(ctx, "", time.Time{}, 100)
		must(err)
	})
	measure("coldest 1000 of an upstream", 20, func() {
		_, err := c.Coldest(ctx, "ghcr.io", time.Time{}, 1000)
		must(err)
	})
	roots, err := c.Coldest(ctx, "", time.Time{}, 1000)
	must(err)
	i := 0
	measure("removal", 1000, func() {
		removal, err := c.Removal(ctx, roots[i])
		must(err)
		if len(removal.Manifests) != 5 {
			b.Fatal(removal)
		}
		i++
	})
	measure("coldest 100 blobs of an upstream", 20, func() {
		_, err := c.ColdestBlobs(ctx, "ghcr.io", 100)
		must(err)
	})
	measure("unreferenced", 20, func() {
		_, err := c.Unreferenced(ctx, time.Now(), "", 100)
		must(err)
	})
	measure("unhashed", 20, func() {
		_, err := c.Unhashed(ctx, time.Now(), 100)
		must(err)
	})
	measure("names", 20, func() {
		_, err := c.Names(ctx, shape.Repository(random.IntN(shape.Repositories())))
		must(err)
	})
	measure("blobs of two digits", 20, func() {
		_, err := c.Blobs(ctx, fmt.Sprintf("%02x", random.IntN(256)))
		must(err)
	})
	measure("referenced", 1000, func() {
		_, err := c.Referenced(ctx, shape.Digest(random.IntN(shape.Manifests)))
		must(err)
	})

	rate := func(what string, changes []tree.Change) {
		before := used()
		took()
		for batch := range slices.Chunk(changes, 10_000) {
			must(c.Apply(ctx, batch))
		}
		d, cpu := took(), used()-before
		say("%s: %d in %v, %.0f/s; %v of CPU, %.0f/s", what, len(changes), d, float64(len(changes))/d.Seconds(), cpu, float64(len(changes))/cpu.Seconds())
	}
	var changes []tree.Change
	for range 50_000 {
		n := random.IntN(shape.Manifests)
		changes = append(changes, tree.Change{Kind: tree.Read, Repository: shape.Repository(n / 50), Canonical: shape.Digest(n), At: time.Now()})
	}
	rate("reads of manifests all over", changes)
	rate("images that are new", newImages(shape, 20_000))
	changes = nil
	roots, err = c.Coldest(ctx, "", time.Time{}, 1000)
	must(err)
	for _, root := range roots {
		removal, err := c.Removal(ctx, root)
		must(err)
		changes = append(changes, removed(removal)...)
	}
	rate("evictions", changes)
}

// used is what the process has had of the processors, which others use, too.
func used() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// newImages is what the pulls of images say: the manifest, a tag, its config and
// seven layers, two of which others have.
func newImages(shape catalogtest.Shape, n int) (changes []tree.Change) {
	for i := range n {
		repository, at := shape.Repository(i*7%shape.Repositories()), time.Now()
		m := &oci.Manifest{}
		for j := range 8 {
			d := digest.FromString(fmt.Sprint(i, "blob", j))
			if j > 5 {
				d = digest.FromString(fmt.Sprint(i/100, "base", j))
			}
			m.Blobs = append(m.Blobs, v1.Descriptor{Digest: d, Size: 1000})
		}
		d := digest.FromString(fmt.Sprint(i, "manifest"))
		changes = append(changes, tree.Change{Kind: tree.Manifested, Repository: repository, Canonical: d, Size: 100, Manifest: m, At: at},
			tree.Change{Kind: tree.Tagged, Repository: repository, Tag: "new", Canonical: d, At: at},
			tree.Change{Kind: tree.Read, Repository: repository, Tag: "new", At: at})
		for _, blob := range m.Blobs {
			changes = append(changes, tree.Change{Kind: tree.Linked, Repository: repository, Canonical: blob.Digest, Size: 1000, At: at})
		}
	}
	return changes
}

// removed is what the tree says when a removal has been done.
func removed(r catalog.Removal) (changes []tree.Change) {
	change := func(kind tree.ChangeKind, d digest.Digest) {
		changes = append(changes, tree.Change{Kind: kind, Repository: r.Repository, Tag: r.Tag, Canonical: d, At: time.Now()})
	}
	if r.Tag != "" {
		change(tree.Untagged, "")
	}
	for _, d := range r.Manifests {
		change(tree.Unmanifested, d)
	}
	for _, d := range r.Links {
		change(tree.Unlinked, d)
	}
	for _, d := range r.Blobs {
		change(tree.Removed, d)
	}
	return changes
}
