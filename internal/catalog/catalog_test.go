package catalog_test

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const theStore = "disk:/var/lib/registry"

// open opens the catalog in a file.
func open(t testing.TB, file string) *catalog.Catalog {
	t.Helper()
	backend := &sqlite.SQLite{File: file}
	db, err := backend.Open(context.Background(), theStore)
	if err != nil {
		t.Fatal(err)
	}
	c, err := catalog.Open(context.Background(), db, backend.Dialect(), theStore)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// How many random changes, and of how many worlds.
var steps, worlds = 2500, uint64(3)

func TestModel(t *testing.T) {
	for seed := range worlds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "catalog.db")
			c, w, m := open(t, file), newWorld(seed), newModel()
			ctx := context.Background()
			var last []tree.Change
			for step := 0; step < steps && !t.Failed(); {
				var batch []tree.Change
				for range 1 + w.random.IntN(12) {
					change := w.change()
					if change.Size < 0 && m.blobs[change.Canonical] == nil {
						change.Size = w.sizes[change.Canonical]
					}
					batch, last = append(batch, change), append(last, change)
					m.apply(change)
					step++
				}
				if err := c.Apply(ctx, batch); err != nil {
					t.Fatal(err)
				}
				if w.random.IntN(20) == 0 {
					c.Close()
					c = open(t, file)
					m.restart()
				}
				if w.random.IntN(4) == 0 || step >= steps {
					compare(t, w, m, c, step >= steps)
					last = nil
				}
			}
			empty(t, m, c, file)
			if t.Failed() {
				for _, change := range last {
					t.Logf("%+v", change)
				}
			}
		})
	}
}

// compare asks the catalog and the model everything, or of all that can be asked
// for one by one, only a few.
func compare(t *testing.T, w *world, m *model, c *catalog.Catalog, everything bool) {
	t.Helper()
	ctx := context.Background()
	check := func(what string, got any, err error, want any) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		} else if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
		}
	}
	some := 1 + w.random.IntN(5)
	few := func(n int) int {
		if everything {
			return n
		}
		return min(n, 4)
	}
	for _, upstream := range []string{"", "docker.io", "quay.io", "gcr.io"} {
		usage, err := c.Usage(ctx, upstream)
		check("usage of "+upstream, usage, err, m.usageOf(upstream))
		for _, before := range []time.Time{{}, time.Unix(w.now-100, 0)} {
			roots, err := c.Coldest(ctx, upstream, before, 1000)
			want := m.coldest(upstream, before)
			check("coldest of "+upstream, roots, err, want)
			coldest, err := c.Coldest(ctx, upstream, before, some)
			reads := func(roots []catalog.Root) (all []time.Time) {
				for _, root := range roots {
					all = append(all, root.Read)
				}
				return all
			}
			check("the very coldest of "+upstream, reads(coldest), err, reads(want[:min(some, len(want))]))
		}
		blobs, err := c.ColdestBlobs(ctx, upstream, 1000)
		sortBlobs(blobs, func(b catalog.Blob) time.Time { return b.Read })
		check("coldest blobs of "+upstream, blobs, err, m.coldestBlobs(upstream))
		first, err := c.ColdestBlobs(ctx, upstream, some)
		check("number of coldest blobs", len(first), err, min(some, len(blobs)))
		for i := range first {
			check("the very coldest blobs", first[i].Read, nil, blobs[i].Read)
		}
	}

	roots := m.coldest("", time.Time{})
	for name, r := range m.repositories { // those that are not evicted can be asked for, too
		for tag, other := range r.tags {
			roots = append(roots, catalog.Root{Repository: name, Tag: tag, Digest: other.digest})
		}
	}
	roots = append(roots, catalog.Root{Repository: pick(w, w.repositories), Tag: "latest", Digest: pick(w, w.manifests)},
		catalog.Root{Repository: pick(w, w.repositories), Digest: pick(w, w.manifests)})
	w.random.Shuffle(len(roots), func(i, j int) { roots[i], roots[j] = roots[j], roots[i] })
	for _, root := range roots[:few(len(roots))] {
		removal, err := c.Removal(ctx, root)
		if len(removal.Manifests) > 0 && removal.Manifests[0] != root.Digest {
			t.Errorf("the removal of %v begins with %v", root, removal.Manifests[0])
		}
		want := m.removal(root)
		for _, r := range []*catalog.Removal{&removal, &want} {
			slices.Sort(r.Manifests)
			slices.Sort(r.Links)
			slices.Sort(r.Blobs)
		}
		check("removal", removal, err, want)
	}

	var loose, unhashed []catalog.Blob
	limit := time.Unix(w.now-20, 0).UTC()
	for d, b := range m.blobs {
		if !m.referenced(d) && b.stored.Before(limit) {
			loose = append(loose, m.blob(d, b))
		}
		if b.hashed.Before(limit) {
			unhashed = append(unhashed, m.blob(d, b))
		}
	}
	sortBlobs(loose, func(catalog.Blob) time.Time { return time.Time{} })
	var paged []catalog.Blob
	after := digest.Digest("")
	for {
		page, err := c.Unreferenced(ctx, limit, after, some)
		if err != nil {
			t.Fatal(err)
		}
		paged = append(paged, page...)
		if len(page) < some {
			break
		}
		after = page[len(page)-1].Digest
	}
	check("unreferenced", paged, nil, loose)
	sortBlobs(unhashed, func(b catalog.Blob) time.Time { return b.Hashed })
	hashed, err := c.Unhashed(ctx, limit, 1000)
	sortBlobs(hashed, func(b catalog.Blob) time.Time { return b.Hashed })
	check("unhashed", hashed, err, unhashed)

	all := map[digest.Digest]int64{}
	for d, b := range m.blobs {
		all[d] = b.size
	}
	got := map[digest.Digest]int64{}
	for _, prefix := range pick(w, []string{"0123456789abcdef", "\x00"}) {
		part, err := c.Blobs(ctx, strings.Trim(string(prefix), "\x00"))
		if err != nil {
			t.Error(err)
		}
		for d, size := range part {
			if prefix != 0 && !strings.HasPrefix(d.Encoded(), string(prefix)) {
				t.Errorf("%s does not begin with %c", d, prefix)
			}
			got[d] = size
		}
	}
	check("blobs", got, nil, all)

	digests := slices.Concat(w.blobs, w.manifests)
	w.random.Shuffle(len(digests), func(i, j int) { digests[i], digests[j] = digests[j], digests[i] })
	for _, d := range digests[:few(len(digests))] {
		referenced, err := c.Referenced(ctx, d)
		check("referenced "+d.String(), referenced, err, m.referenced(d))
		referenced, err = c.Referenced(ctx, w.others[d])
		check("referenced "+d.String()+" by its sha512", referenced, err, m.referenced(m.resolve(w.others[d])))
		owners, err := c.Owners(ctx, d, 100)
		var want []catalog.Repository
		for _, class := range []tree.Class{tree.Hosted, tree.Mirrored} {
			for _, name := range slices.Sorted(slices.Values(w.repositories)) {
				if r := m.repositories[name]; r != nil && r.class == class && m.member(r, d) {
					want = append(want, catalog.Repository{Name: name, Class: class, Upstream: r.upstream, Created: r.created})
				}
			}
		}
		check("owners of "+d.String(), owners, err, want)
	}

	for _, containing := range []string{"", pick(w, []string{"a", "io/", "X"})} {
		var want, got []catalog.Repository
		for _, name := range slices.Sorted(slices.Values(w.repositories)) {
			if r := m.repositories[name]; r != nil && r.present && strings.Contains(name, containing) {
				usage := m.usage(func(o *modelRepository) bool { return o == r }, func(d digest.Digest) bool { return m.holds(r, d) })
				want = append(want, catalog.Repository{Name: name, Class: r.class, Upstream: r.upstream, Created: r.created, Usage: usage})
			}
		}
		after := ""
		for {
			page, err := c.Repositories(ctx, containing, after, some)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, page...)
			if len(page) < some {
				break
			}
			after = page[len(page)-1].Name
		}
		check("repositories with "+containing, got, nil, want)
	}
	names := slices.Clone(w.repositories)
	w.random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names[:few(len(names))] {
		want := catalog.Names{Tags: map[string]digest.Digest{}, Manifests: map[digest.Digest]bool{}, Links: map[digest.Digest]bool{}, Pins: map[string]bool{}}
		var tags []catalog.Tag
		if r := m.repositories[name]; r != nil {
			for tag, v := range r.tags {
				want.Tags[tag] = v.digest
				tags = append(tags, catalog.Tag{Name: tag, Digest: v.digest, Since: v.since, Read: v.read, Pinned: r.pins[tag] || m.pinned(r, v.digest), Bytes: m.tagBytes(r, v.digest)})
			}
			for d := range r.manifests {
				want.Manifests[d] = true
			}
			want.Links, want.Pins = r.links, r.pins
		}
		names, err := c.Names(ctx, name)
		check("names of "+name, names, err, want)
		slices.SortFunc(tags, func(a, b catalog.Tag) int { return strings.Compare(a.Name, b.Name) })
		var got []catalog.Tag
		after := ""
		for {
			page, err := c.Tags(ctx, name, after, some)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, page...)
			if len(page) < some {
				break
			}
			after = page[len(page)-1].Name
		}
		check("tags of "+name, got, nil, tags)
	}
}

// empty takes everything out of a catalog, of which no row may be left.
func empty(t *testing.T, m *model, c *catalog.Catalog, file string) {
	t.Helper()
	var changes []tree.Change
	for name, r := range m.repositories {
		changes = append(changes, tree.Change{Kind: tree.Forgotten, Repository: name})
		for pin := range r.pins {
			change := tree.Change{Kind: tree.Unpinned, Repository: name, Tag: pin}
			if strings.Contains(pin, ":") {
				change.Tag, change.Digest = "", digest.Digest(pin)
			}
			changes = append(changes, change)
		}
	}
	for d := range m.blobs {
		changes = append(changes, tree.Change{Kind: tree.Removed, Canonical: d})
	}
	if err := c.Apply(context.Background(), changes); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, file).Close() // drops what is known of digests
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, table := range []string{"repositories", "blobs", "members", "uses", "manifests", "tags", "pins", "layers", "edges", "loose", "aliases"} {
		var n int
		if err := db.QueryRow("SELECT COUNT(*) FROM " + table).Scan(&n); err != nil || n > 0 {
			t.Errorf("%d left of %s, %v", n, table, err)
		}
	}
}

// Whoever reads a manifest reads its index and that one's tag, also when all of
// them are new.
func TestReadOfWhatIsNew(t *testing.T) {
	c, w := open(t, filepath.Join(t.TempDir(), "catalog.db")), newWorld(1)
	at := func(n int64) time.Time { return time.Unix(1000+n, 0).UTC() }
	image, index := w.manifests[0], w.manifests[1]
	err := c.Apply(context.Background(), []tree.Change{
		{Kind: tree.Recorded, Repository: "a", Record: &tree.Record{Class: tree.Mirrored, Upstream: "docker.io"}},
		{Kind: tree.Manifested, Repository: "a", Canonical: image, Manifest: &oci.Manifest{}, At: at(1)},
		{Kind: tree.Manifested, Repository: "a", Canonical: index, Manifest: &oci.Manifest{Children: []v1.Descriptor{{Digest: image}}}, At: at(2)},
		{Kind: tree.Tagged, Repository: "a", Tag: "x", Canonical: index, At: at(3)},
		{Kind: tree.Read, Repository: "a", Canonical: image, At: at(100)},
	})
	if err != nil {
		t.Fatal(err)
	}
	roots, err := c.Coldest(context.Background(), "", time.Time{}, 10)
	if want := []catalog.Root{{Repository: "a", Tag: "x", Digest: index, Read: at(100)}}; err != nil || !reflect.DeepEqual(roots, want) {
		t.Errorf("%v, %v; want %v", roots, err, want)
	}
}
