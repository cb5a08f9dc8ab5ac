package retain

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

func linked(i int) tree.Change {
	return tree.Change{Kind: tree.Linked, Repository: "docker.io/a", Canonical: digest.FromString(fmt.Sprint(i)), Size: 1000, At: time.Unix(int64(i), 0)}
}

// TestFlush: what was noted before a Flush is in the catalog after it, however
// long the journal would wait.
func TestFlush(t *testing.T) {
	b := keep(t, func(b *kept) { b.paces.batch = time.Hour })
	b.flush()
	for i := range 12_000 {
		b.Note(linked(i))
	}
	if err := b.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := b.Catalog()
	if err != nil {
		t.Fatal(err)
	}
	if usage, err := c.Usage(t.Context(), ""); err != nil || usage.Blobs != 12_000 {
		t.Errorf("%+v, %v", usage, err)
	}
}

// TestWrittenSoon: what nobody waits for is written too.
func TestWrittenSoon(t *testing.T) {
	b := keep(t)
	b.ready() // or it is found out that there is no such blob
	b.Note(linked(1))
	eventually(t, "it to be written", func() error {
		c, err := b.Catalog()
		if err != nil {
			return err
		}
		if usage, err := c.Usage(t.Context(), ""); err != nil || usage.Blobs != 1 {
			return fmt.Errorf("%+v, %w", usage, err)
		}
		return nil
	})
}

// TestPending: what a change refers to is needed from the moment it is noted
// until something in the catalog says so.
func TestPending(t *testing.T) {
	b := keep(t, func(b *kept) { b.paces.batch = time.Hour })
	b.ready()
	layer, child := content(1, 100), image("child", nil, content(2, 100))
	b.repository("docker.io/a", "docker.io")
	b.flush()
	d, l := digest.FromBytes(child), digest.FromBytes(layer)
	for _, x := range []digest.Digest{d, l} {
		if needed, err := b.needed(t.Context(), x)(); needed || err != nil {
			t.Errorf("before: %v, %v", needed, err)
		}
	}
	// An index comes before its children.
	b.manifest("docker.io/a", index(child))
	b.manifest("docker.io/a", image("", nil, layer))
	for range 2 {
		for _, x := range []digest.Digest{d, l} {
			if needed, err := b.needed(t.Context(), x)(); !needed || err != nil {
				t.Errorf("%v, %v", needed, err)
			}
		}
		b.flush()
	}
	if len(b.journal.pending) != 0 || b.journal.named != 0 {
		t.Errorf("still pending: %v, %d", b.journal.pending, b.journal.named)
	}
}

// TestOverflow: a catalog that cannot be written to blocks nobody. What is
// dropped forbids deletion until the store has been compared.
func TestOverflow(t *testing.T) {
	const maxNoted = 2000
	b := keep(t, func(b *kept) { b.paces.batch, b.paces.noted = time.Hour, maxNoted })
	b.ready()
	c, _ := b.Catalog()
	release := hold(t, filepath.Join(b.dir, "catalog.db"))
	for i := range maxNoted + 10 {
		b.Note(linked(i))
	}
	if got := len(b.journal.noted); got != maxNoted {
		t.Errorf("%d are noted", got)
	}
	if _, err := b.mayDelete(); err == nil {
		t.Error("something may be deleted")
	}
	if needed, _ := b.needed(t.Context(), digest.FromString("anything"))(); !needed {
		t.Error("something dropped may have named it")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Flush(ctx); err == nil {
		t.Error("a flush of what was dropped")
	}
	if n := b.logged.FilterMessageSnippet("does not keep up").Len(); n != 1 {
		t.Errorf("said %d times", n)
	}
	release()
	// The journal goes on once it is empty, and the catalog is compared.
	b.ready()
	b.Note(linked(maxNoted + 100))
	if err := b.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if now, _ := b.Catalog(); now != c {
		t.Error("it is another catalog")
	}
}

// hold keeps everybody else from writing to a database.
func hold(t *testing.T, file string) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+file+"?_pragma=busy_timeout(10000)")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ExecContext(t.Context(), "BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	return func() {
		conn.Close()
		db.Close()
	}
}

// TestReadsGiveWay: how somebody orders what is to be evicted is no reason to
// lose what is stored.
func TestReadsGiveWay(t *testing.T) {
	k := New(nil, zap.NewNop())
	maxNoted := k.paces.noted
	for range maxNoted {
		k.Note(tree.Change{Kind: tree.Read, Repository: "r", Tag: "t"})
	}
	if n := len(k.journal.noted); n != maxNoted/2 || k.journal.drops != 0 {
		t.Errorf("%d are noted, and %d dropped", n, k.journal.drops)
	}
	for i := range maxNoted / 2 {
		k.Note(linked(i))
	}
	if k.journal.drops != 0 {
		t.Error("reads are in the way of what is stored")
	}
	k.Note(tree.Change{Kind: tree.Read, Repository: "r", Tag: "t"})
	if k.journal.drops != 0 {
		t.Error("a read is no loss")
	}
	k.Note(linked(1))
	if k.journal.drops != 1 {
		t.Error("there is no limit")
	}
}

// TestManyNames: a few changes may name very much.
func TestManyNames(t *testing.T) {
	k := New(nil, zap.NewNop())
	var children [][]byte
	for i := range 1000 {
		children = append(children, []byte(fmt.Sprint(i)))
	}
	c := parsed(t, index(children...))
	for range 2 * maxNamed / 1000 {
		k.Note(c)
	}
	if k.journal.named > maxNamed+1001 || k.journal.drops == 0 {
		t.Errorf("%d names, %d drops", k.journal.named, k.journal.drops)
	}
}

// TestGivesUp: a catalog that fails for long is closed, said so once, and opened
// again; pulls go on, and it is complete in the end.
func TestGivesUp(t *testing.T) {
	var opened, failing atomic.Int64
	b := keep(t, func(b *kept) {
		b.paces.giveUp = 20 * time.Millisecond
		b.catalog = func(ctx context.Context) (*catalog.Catalog, error) {
			opened.Add(1)
			if failing.Load() > 0 {
				failing.Add(1)
				return nil, errors.New("no such disk")
			}
			return b.file(ctx)
		}
	})
	b.repository("docker.io/a", "docker.io")
	b.ready()
	failing.Store(1)
	c, _ := b.Catalog()
	c.Close()
	d := b.pull("docker.io/a", "v1", content(1, 100))
	eventually(t, "it to be given up and tried again", until(func() bool { return failing.Load() > 3 }))
	if _, err := b.Catalog(); err == nil || !strings.Contains(err.Error(), "no such disk") {
		t.Errorf("the catalog: %v", err)
	}
	if n := b.logged.FilterMessageSnippet("no catalog").Len(); n != 1 {
		t.Errorf("said %d times", n)
	}
	if m, err := b.tree.Manifest(t.Context(), "docker.io/a", d); err != nil || m.Digest != d {
		t.Errorf("a pull without a catalog: %v", err)
	}
	failing.Store(0)
	b.ready()
	again, _ := b.Catalog()
	if r, err := again.Coldest(t.Context(), "docker.io", time.Time{}, 10); err != nil || len(r) != 1 || r[0].Digest != d {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestClosedWithEverything: only a catalog that was closed together with the
// store is believed to be complete at the next start.
func TestClosedWithEverything(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "v1", content(1, 100))
	b.ready()
	believed := func() bool {
		t.Helper()
		b.ready()
		return b.wasClosed()
	}
	file := filepath.Join(b.dir, "catalog.db")
	b.clock.pass(2 * time.Hour)
	b.stop()
	copied, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b.clock.pass(2 * time.Hour)
	b.start()
	if !believed() {
		t.Error("after an orderly end")
	}
	b.clock.pass(2 * time.Hour)
	b.kill()
	b.clock.pass(2 * time.Hour)
	b.start()
	if believed() {
		t.Error("after a kill")
	}
	b.ready()
	b.clock.pass(2 * time.Hour)
	b.stop()
	if err := os.WriteFile(file, copied, 0o600); err != nil {
		t.Fatal(err)
	}
	b.clock.pass(2 * time.Hour)
	b.start()
	if believed() {
		t.Error("the copy of an earlier one")
	}
	b.ready()
	b.clock.pass(2 * time.Hour)
	b.stop()
	// A process that never had the catalog changes the store, in good order.
	b.catalog = func(context.Context) (*catalog.Catalog, error) { return nil, errors.New("no such disk") }
	b.clock.pass(2 * time.Hour)
	b.start()
	b.pull("docker.io/a", "v2", content(2, 100))
	b.clock.pass(2 * time.Hour)
	b.stop()
	b.catalog = nil
	b.clock.pass(2 * time.Hour)
	b.start()
	if believed() {
		t.Error("one that has missed a process")
	}
}

// TestCatalogWiped: the catalog is made again from the store, and nothing is
// deleted before.
func TestCatalogWiped(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	shared := content(1, 5000)
	b.pull("docker.io/a", "v1", shared, content(2, 5000))
	b.pull("docker.io/a", "v2", shared, content(3, 5000))
	before := b.everything()
	b.stop()
	for _, end := range []string{"", "-wal", "-shm"} {
		os.Remove(filepath.Join(b.dir, "catalog.db"+end))
	}
	b.start()
	if got := b.everything(); got != before {
		t.Errorf("before: %s\nnow: %s", before, got)
	}
}

// everything is what the catalog knows, once it is complete.
func (b *kept) everything() string {
	b.t.Helper()
	c := b.ready()
	b.flush()
	usage, err := c.Usage(b.t.Context(), "")
	if err != nil {
		b.t.Fatal(err)
	}
	text := fmt.Sprintf("%+v", usage)
	repositories, err := c.Repositories(b.t.Context(), "", "", 1000)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, r := range repositories {
		names, err := c.Names(b.t.Context(), r.Name)
		if err != nil {
			b.t.Fatal(err)
		}
		text += fmt.Sprintf("\n%s %s %s: %v", r.Name, r.Class, r.Upstream, names)
	}
	return text
}

// TestBeginWritesFirst: the note of who uses the store is there before anything
// can change.
func TestBeginWritesFirst(t *testing.T) {
	b := keep(t)
	data, err := b.store.Get(t.Context(), layout.Session, 1000)
	if err != nil || strings.Contains(string(data), "closed") {
		t.Errorf("%s, %v", data, err)
	}
	b.ready()
	b.stop()
	data, err = os.ReadFile(filepath.Join(b.dir, "store", filepath.FromSlash(layout.Session)))
	if err != nil || !strings.Contains(string(data), "closed") {
		t.Errorf("%s, %v", data, err)
	}
}

// parsed is the change of a manifest.
func parsed(t *testing.T, body []byte) tree.Change {
	t.Helper()
	m, err := oci.ParseManifest(body)
	if err != nil {
		t.Fatal(err)
	}
	return tree.Change{Kind: tree.Manifested, Repository: "r", Canonical: digest.FromBytes(body), Size: int64(len(body)), Manifest: m}
}

// unlisted is a store whose listings take for ever once it is on.
type unlisted struct {
	storage.Store
	on atomic.Bool
}

func (u *unlisted) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	if !u.on.Load() {
		return u.Store.List(ctx, prefix, deep)
	}
	return func(yield func(storage.Info, error) bool) {
		<-ctx.Done()
		yield(storage.Info{}, ctx.Err())
	}
}

// TestClosedEarly: a process that ends before it has compared what is hosted, or
// before it has the catalog, leaves one that is as good as it was.
func TestClosedEarly(t *testing.T) {
	u := &unlisted{}
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store { u.Store = s; return u }
	})
	b.ready()
	b.stop()

	u.on.Store(true)
	b.start()
	eventually(t, "the catalog", until(func() bool { _, err := b.Catalog(); return err == nil }))
	if !b.completeSince().IsZero() {
		t.Fatal("compared already")
	}
	b.stop()
	u.on.Store(false)
	b.start()
	if b.ready(); !b.wasClosed() {
		t.Error("not believed after an end before the comparison")
	}
	b.stop()

	b.catalog = func(ctx context.Context) (*catalog.Catalog, error) { <-ctx.Done(); return nil, ctx.Err() }
	b.start()
	b.stop()
	b.catalog = nil
	b.start()
	if b.ready(); !b.wasClosed() {
		t.Error("not believed after an end before the catalog was open")
	}
}
