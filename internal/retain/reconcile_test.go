package retain

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	database "github.com/caddy-registry/mirror/storage/catalog"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
	"github.com/opencontainers/go-digest"
)

// stored is what a walk over the files of a store finds, one line each.
func (b *kept) stored() []string {
	b.t.Helper()
	root := filepath.Join(b.dir, "store")
	var lines []string
	records := map[string]string{}
	repositories := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		key, _ := filepath.Rel(root, path)
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if rest, ok := strings.CutPrefix(key, "docker/registry/v2/repositories/"); ok && len(data) > 0 { // or a crash has emptied it
			name, what, _ := strings.Cut(rest, "/_")
			repositories[name] = true
			parts := strings.Split(what, "/")
			switch {
			case strings.HasPrefix(what, "manifests/tags/") && strings.HasSuffix(what, "/current/link"):
				lines = append(lines, fmt.Sprintf("%s:%s %s", name, parts[2], data))
			case strings.HasPrefix(what, "manifests/revisions/"):
				lines = append(lines, fmt.Sprintf("%s manifest %s", name, data))
			case strings.HasPrefix(what, "layers/"):
				lines = append(lines, fmt.Sprintf("%s link %s", name, data))
			}
		}
		if rest, ok := strings.CutPrefix(key, "docker/registry/v2/blobs/sha256/"); ok {
			lines = append(lines, fmt.Sprintf("sha256:%s %d", strings.Split(rest, "/")[1], len(data)))
		}
		if rest, ok := strings.CutPrefix(key, "mirror/records/repositories/"); ok && strings.HasSuffix(rest, "/_record.json") {
			name := strings.TrimSuffix(rest, "/_record.json")
			records[name], repositories[name] = string(data), true
		}
		if name, tag, d, ok := layout.PinOf(key); ok {
			lines = append(lines, fmt.Sprintf("%s pin %s%s", name, tag, d))
		}
		return nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	for name := range repositories {
		class := tree.Hosted
		if strings.Contains(records[name], `"class":"mirrored"`) {
			class = tree.Mirrored
		}
		lines = append(lines, fmt.Sprintf("%s is %s", name, class))
	}
	slices.Sort(lines)
	return lines
}

// catalogued is what the catalog knows, in the same words.
func (b *kept) catalogued(c *catalog.Catalog) []string {
	b.t.Helper()
	ctx := b.t.Context()
	var lines []string
	repositories, err := c.Repositories(ctx, "", "", 10_000)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, r := range repositories {
		lines = append(lines, fmt.Sprintf("%s is %s", r.Name, r.Class))
	}
	all, err := c.RepositoryNames(ctx, "", 10_000)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, name := range all {
		known, err := c.Names(ctx, name)
		if err != nil {
			b.t.Fatal(err)
		}
		for tag, d := range known.Tags {
			lines = append(lines, fmt.Sprintf("%s:%s %s", name, tag, d))
		}
		for d := range known.Manifests {
			lines = append(lines, fmt.Sprintf("%s manifest %s", name, d))
		}
		for d := range known.Links {
			lines = append(lines, fmt.Sprintf("%s link %s", name, d))
		}
		for pin := range known.Pins {
			lines = append(lines, fmt.Sprintf("%s pin %s", name, pin))
		}
	}
	blobs, err := c.Blobs(ctx, "")
	if err != nil {
		b.t.Fatal(err)
	}
	for d, size := range blobs {
		lines = append(lines, fmt.Sprintf("%s %d", d, size))
	}
	slices.Sort(lines)
	return lines
}

// agrees checks that the catalog and the store say the same.
func (b *kept) agrees(c *catalog.Catalog) {
	b.t.Helper()
	// What a comparison has found suspect is looked at behind it.
	patience := time.NewTimer(20 * time.Second)
	defer patience.Stop()
	for {
		differ := b.differ(c)
		if len(differ) == 0 {
			return
		}
		again := time.NewTimer(20 * time.Millisecond)
		select {
		case <-again.C:
		case <-patience.C:
			b.t.Errorf("catalog and store differ: %s", strings.Join(differ, "; "))
			return
		}
	}
}

// differ is what only one of the catalog and the store has.
func (b *kept) differ(c *catalog.Catalog) (lines []string) {
	b.eviction.running.Lock() // or something goes between the two looks
	defer b.eviction.running.Unlock()
	b.flush()
	stored, catalogued := b.stored(), b.catalogued(c)
	for _, line := range stored {
		if !slices.Contains(catalogued, line) {
			lines = append(lines, "only in the store: "+line)
		}
	}
	for _, line := range catalogued {
		if !slices.Contains(stored, line) {
			lines = append(lines, "only in the catalog: "+line)
		}
	}
	return lines
}

func (b *kept) path(key string) string {
	return filepath.Join(b.dir, "store", filepath.FromSlash(key))
}

// behind writes a file behind the store's back.
func (b *kept) behind(key string, data []byte) {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(b.path(key)), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(b.path(key), data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// lose removes files behind the store's back.
func (b *kept) lose(key string) {
	b.t.Helper()
	if _, err := os.Stat(b.path(key)); err != nil {
		b.t.Fatal(err)
	}
	if err := os.RemoveAll(b.path(key)); err != nil {
		b.t.Fatal(err)
	}
}

// ended waits for the end of a job.
func (b *kept) ended(j Job, err error) Job {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
	eventually(b.t, "the end of "+j.ID, until(func() bool {
		j, _ = b.Job(j.ID)
		return !j.Ended.IsZero()
	}))
	return j
}

// done waits for the end of a job, which must be a good one.
func (b *kept) done(j Job, err error) Job {
	b.t.Helper()
	if j = b.ended(j, err); j.Error != "" {
		b.t.Fatalf("%s: %s", j.ID, j.Error)
	}
	return j
}

// populate stores a bit of everything: images that share layers, an index, a
// referrer, pins, a hosted repository, and one that registry:2 has written.
func (b *kept) populate() {
	b.t.Helper()
	ctx := b.t.Context()
	base, own, config := content(1, 5000), content(2, 100), content(3, 50)
	b.repository("docker.io/library/nginx", "docker.io")
	b.repository("ghcr.io/org/tool", "ghcr.io")
	b.repository("apps/web", "")
	d := b.pull("docker.io/library/nginx", "latest", config, base)
	b.tag("docker.io/library/nginx", "1.27", d)
	b.pull("ghcr.io/org/tool", "v1", content(4, 60), base, own)
	child := image("child", nil, content(5, 70), own)
	b.manifest("ghcr.io/org/tool", child)
	b.tag("ghcr.io/org/tool", "multi", b.manifest("ghcr.io/org/tool", index(child)))
	subject := describe("application/vnd.oci.image.manifest.v1+json", child)
	b.manifest("ghcr.io/org/tool", image("signature", &subject, content(6, 10)))
	b.pull("apps/web", "prod", content(7, 80), base)
	for _, reference := range []string{"v1", "absent", d.String()} {
		ref, err := oci.ParseReference(reference)
		if err != nil {
			b.t.Fatal(err)
		}
		if err := b.tree.Pin(ctx, "ghcr.io/org/tool", ref, b.clock.time()); err != nil {
			b.t.Fatal(err)
		}
	}
	// Pinned before it is held.
	if err := b.tree.Pin(ctx, "quay.io/not/yet", oci.Reference{Tag: "x"}, b.clock.time()); err != nil {
		b.t.Fatal(err)
	}
	b.foreign("old/registry", "v0", content(8, 90), base)
	b.blobAlone(content(9, 1000))
}

// foreign writes an image as registry:2 does, which tells nobody.
func (b *kept) foreign(repository, tag string, layers ...[]byte) digest.Digest {
	b.t.Helper()
	body := image(tag, nil, layers...)
	d := digest.FromBytes(body)
	for _, data := range append(layers, body) {
		b.behind(layout.Blob(digest.FromBytes(data)), data)
	}
	for _, data := range layers {
		l := digest.FromBytes(data)
		b.behind(layout.LayerLink(repository, l), []byte(l))
	}
	b.behind(layout.RevisionLink(repository, d), []byte(d))
	b.behind(layout.TagIndexLink(repository, tag, d), []byte(d))
	b.behind(layout.TagLink(repository, tag), []byte(d))
	return d
}

// blobAlone is bytes that belong to nobody.
func (b *kept) blobAlone(data []byte) digest.Digest {
	b.t.Helper()
	d := digest.FromBytes(data)
	if err := b.store.Put(b.t.Context(), layout.Blob(d), data, storage.Lazy); err != nil {
		b.t.Fatal(err)
	}
	if err := b.tree.TellBlob(b.t.Context(), d); err != nil {
		b.t.Fatal(err)
	}
	return d
}

// anyFile opens the catalog as the module does: what is of no use is put aside.
func (b *kept) anyFile(ctx context.Context) (*catalog.Catalog, error) {
	c, err := b.file(ctx)
	if errors.Is(err, database.ErrDamaged) || errors.Is(err, catalog.ErrNewer) || errors.Is(err, catalog.ErrOther) {
		if _, err := (&sqlite.SQLite{File: filepath.Join(b.dir, "catalog.db")}).Aside(ctx, "store"); err != nil {
			return nil, err
		}
		return b.file(ctx)
	}
	return c, err
}

// The database can be lost in any way: what is in it is made again from the store
// (peers §2, 36 and 38).
func TestPeers38CatalogMadeAgain(t *testing.T) {
	t.Parallel()
	statement := func(query string) func(*testing.T, string) {
		return func(t *testing.T, file string) {
			db, err := sql.Open("sqlite", file)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec(query); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, harm := range map[string]func(t *testing.T, file string){
		"untouched": func(*testing.T, string) {},
		"deleted": func(t *testing.T, file string) {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		},
		"truncated": func(t *testing.T, file string) {
			if err := os.Truncate(file, 8192); err != nil {
				t.Fatal(err)
			}
		},
		"garbage": func(t *testing.T, file string) {
			if err := os.WriteFile(file, bytes.Repeat([]byte("no database"), 1000), 0o644); err != nil {
				t.Fatal(err)
			}
		},
		"newer":     statement("UPDATE meta SET value = '999' WHERE name = 'schema'"),
		"another's": statement("UPDATE meta SET value = 'elsewhere' WHERE name = 'store'"),
		"unclean":   statement("UPDATE meta SET value = '0' WHERE name = 'complete'"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := keep(t, func(b *kept) { b.catalog = b.anyFile })
			b.ready()
			b.populate()
			b.done(b.Reindex())
			b.stop()
			harm(t, filepath.Join(b.dir, "catalog.db"))
			b.start()
			b.agrees(b.ready())
			// And what is found besides is right, too: what manifests refer to.
			c := b.ready()
			usage, err := c.Usage(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			if usage.Repositories != 4 || usage.Tags != 6 || usage.Manifests != 7 {
				t.Errorf("usage is %+v", usage)
			}
			for _, data := range [][]byte{content(1, 5000), content(5, 70)} {
				if referenced, err := c.Referenced(t.Context(), digest.FromBytes(data)); err != nil || !referenced {
					t.Errorf("referenced: %v, %v", referenced, err)
				}
			}
		})
	}
}

// Whatever has changed behind the mirror's back is found.
func TestReconcileFindsDifferences(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.populate()
	b.done(b.Reindex())
	tool := b.means("ghcr.io/org/tool", "v1")
	b.lose(layout.Tags("docker.io/library/nginx") + "1.27")
	b.lose(layout.Revisions("ghcr.io/org/tool") + "sha256/" + tool.Encoded())
	b.lose(layout.TagLink("ghcr.io/org/tool", "v1"))
	b.lose(layout.LayerLink("apps/web", digest.FromBytes(content(7, 80))))
	b.lose(layout.Blob(digest.FromBytes(content(9, 1000))))
	b.lose(layout.Pin("ghcr.io/org/tool", "absent", ""))
	b.lose(layout.Pin("quay.io/not/yet", "x", ""))
	b.lose("docker/registry/v2/repositories/old")
	b.lose(layout.Record("docker.io/library/nginx"))
	b.behind(layout.Blob(digest.FromBytes(content(2, 100))), content(2, 99))
	b.behind(layout.TagLink("apps/web", "prod"), []byte(b.foreign("apps/web", "new", content(20, 30))))
	b.behind(layout.Record("new/one"), []byte(`{"schema":1,"class":"mirrored","upstream":"quay.io"}`))
	b.behind(layout.Pin("apps/web", "new", ""), []byte(`{"schema":1}`))
	b.foreign("another/new", "x", content(21, 30))
	b.behind(layout.LayerLink("apps/web", digest.FromBytes(content(1, 5000))), nil)

	b.incomplete("test")
	b.agrees(b.ready())
}

// A mirrored manifest's blobs that are stored get their links, without which
// registry:2 does not serve them. A hosted repository is nobody's to change.
func TestReconcileMendsLinks(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.populate()
	layer := digest.FromBytes(content(1, 5000))
	mirrored, hosted := layout.LayerLink("docker.io/library/nginx", layer), layout.LayerLink("apps/web", layer)
	b.lose(mirrored)
	b.lose(hosted)
	b.done(b.GC(true)) // changes nothing
	if _, err := os.Stat(b.path(mirrored)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a dry run has linked: %v", err)
	}
	b.done(b.Reindex())
	if got, err := os.ReadFile(b.path(mirrored)); err != nil || string(got) != layer.String() {
		t.Errorf("the link is %q, %v", got, err)
	}
	if _, err := os.Stat(b.path(hosted)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a hosted repository was changed: %v", err)
	}
	b.agrees(b.ready())
}

// While somebody adds and removes, a reconcile ends with what the store says.
func TestReconcileBesideWriters(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.populate()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for writer := range 3 {
		repository := fmt.Sprintf("docker.io/writer/%d", writer)
		b.repository(repository, "docker.io")
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				layer := content(100+writer, 10+i%7)
				body := image(fmt.Sprint(i%5), nil, content(100+writer, 5), layer)
				d, l := digest.FromBytes(body), digest.FromBytes(layer)
				tag := fmt.Sprint("t", i%3)
				failed := func(err error) {
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("writer: %v", err)
						cancel()
					}
				}
				if err := b.store.Put(t.Context(), layout.Blob(l), layer, storage.Lazy); err != nil {
					t.Error(err)
				}
				failed(b.tree.LinkBlob(t.Context(), repository, l, l))
				_, err := b.tree.PutManifest(t.Context(), repository, d, body, nil)
				failed(err)
				failed(b.tree.SetTag(t.Context(), repository, tag, d, time.Now(), nil))
				if i%2 == 0 {
					failed(b.tree.RemoveTag(t.Context(), repository, tag, d, nil))
					failed(b.tree.RemoveManifest(t.Context(), repository, d, nil))
					failed(b.tree.Unlink(t.Context(), repository, l, nil))
					// Before the catalog is complete it says that it cannot know.
					b.tree.RemoveBlob(t.Context(), d, b.needed(t.Context(), d))
				}
				if i%10 == 0 { // there are slower journals than writers
					failed(b.Flush(t.Context()))
				}
			}
		})
	}
	for range 3 {
		b.ended(b.Reindex())
	}
	cancel()
	wg.Wait()
	b.agrees(b.ready())
}

// many is a store with a repository of many tags, which are nowhere.
type many struct {
	storage.Store
	tags    int
	digest  digest.Digest
	halfway func()
}

const manyTags = "docker.io/library/many"

func (m many) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	if prefix != layout.Tags(manyTags) {
		return m.Store.List(ctx, prefix, deep)
	}
	return func(yield func(storage.Info, error) bool) {
		for i := range m.tags {
			if ctx.Err() != nil {
				yield(storage.Info{}, ctx.Err())
				return
			}
			if i == m.tags/2 {
				m.halfway()
			}
			if !yield(storage.Info{Key: fmt.Sprintf("%st%06d/", prefix, i)}, nil) {
				return
			}
		}
	}
}

func (m many) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	if strings.HasPrefix(key, layout.Tags(manyTags)) {
		return []byte(m.digest), nil
	}
	return m.Store.Get(ctx, key, limit)
}

func (m many) Stat(ctx context.Context, key string) (storage.Info, error) {
	if strings.HasPrefix(key, layout.Tags(manyTags)) {
		return storage.Info{Key: key, Size: 71, ModTime: time.Unix(1_700_000_000, 0)}, nil
	}
	return m.Store.Stat(ctx, key)
}

// A repository of 100,000 tags is compared in little memory; a process that ends
// in the middle of it leaves what the next one makes whole.
func TestReconcileManyTags(t *testing.T) {
	tags := 100_000
	if race {
		tags = 10_000 // of which each takes ten times as long
	}
	b := keep(t)
	b.ready()
	b.repository(manyTags, "docker.io")
	d := b.pull(manyTags, "", content(1, 10), content(2, 20))
	b.stop()
	if err := os.Remove(filepath.Join(b.dir, "catalog.db")); err != nil {
		t.Fatal(err)
	}

	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	halfway := make(chan struct{})
	var once sync.Once
	var during uint64
	run := func(at func()) (*kept, func()) {
		b := &kept{t: t, dir: b.dir, clock: b.clock, paces: hasty}
		b.beginOn(many{b.disk(), tags, d, at})
		return b, b.stop
	}
	_, stop := run(func() {
		once.Do(func() {
			during = heap()
			close(halfway)
		})
	})
	select {
	case <-halfway:
	case <-t.Context().Done():
	}
	stop()
	if grown := int64(during) - int64(before); grown > 64<<20 {
		t.Errorf("%d MiB more are in use in the middle", grown>>20)
	}

	second, stop := run(func() {})
	defer stop()
	c := second.ready()
	usage, err := c.Usage(t.Context(), "")
	if err != nil || usage.Tags != int64(tags) || usage.Manifests != 1 {
		t.Errorf("usage is %+v, %v", usage, err)
	}
}

// A store is served from while its catalog is made again, however long that
// takes (peers §2, 37).
func TestPeers37ServesFirst(t *testing.T) {
	t.Parallel()
	gate := make(chan struct{})
	b := keep(t)
	b.repository(manyTags, "docker.io")
	d := b.pull(manyTags, "", content(1, 10))
	b.stop()
	if err := os.Remove(filepath.Join(b.dir, "catalog.db")); err != nil {
		t.Fatal(err)
	}
	b.beginOn(many{b.disk(), 10, d, func() { <-gate }})
	eventually(t, "the comparison to have begun", until(func() bool { return len(b.Jobs()) > 0 }))
	if m, err := b.tree.Manifest(t.Context(), manyTags, d); err != nil || m.Digest != d {
		t.Errorf("manifest: %v, %v", m, err)
	}
	b.pull(manyTags, "new", content(1, 10), content(2, 20))
	status, err := b.Status(t.Context())
	if err != nil || !status.Complete.IsZero() {
		t.Errorf("status: %+v, %v", status, err)
	}
	close(gate)
	b.ready()
}
