package catalog_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/catalog/catalogtest"
	"github.com/caddy-registry/mirror/internal/tree"
	storage "github.com/caddy-registry/mirror/storage/catalog"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

// tryOpen opens the catalog in a file, for a store.
func tryOpen(file, store string) (*catalog.Catalog, error) {
	backend := &sqlite.SQLite{File: file}
	db, err := backend.Open(context.Background(), store)
	if err != nil {
		return nil, err
	}
	return catalog.Open(context.Background(), db, backend.Dialect(), store)
}

func linked(repository, blob string) tree.Change {
	return tree.Change{Kind: tree.Linked, Repository: repository, Canonical: digest.FromString(blob), Size: 10, At: time.Unix(1000, 0)}
}

// A catalog that has something in it.
func made(t *testing.T) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "catalog.db")
	c := open(t, file)
	if err := c.Apply(context.Background(), []tree.Change{linked("a", "x"), linked("a", "y")}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetComplete(context.Background(), time.Unix(5, 0)); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return file
}

func run(t *testing.T, file string, queries ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, q := range queries {
		if _, err := db.Exec(q); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenAgain(t *testing.T) {
	c := open(t, made(t))
	ctx := context.Background()
	usage, err := c.Usage(ctx, "")
	if err != nil || usage.Blobs != 2 || usage.Repositories != 1 {
		t.Errorf("after a restart: %+v, %v", usage, err)
	}
	if at, err := c.Complete(ctx); err != nil || !at.Equal(time.Unix(5, 0)) {
		t.Errorf("complete: %v, %v", at, err)
	}
	if err := c.SetComplete(ctx, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if at, err := c.Complete(ctx); err != nil || !at.IsZero() {
		t.Errorf("complete: %v, %v", at, err)
	}
	// What comes after a restart must not be taken for what was there before.
	if err := c.Apply(ctx, []tree.Change{linked("b", "z")}); err != nil {
		t.Fatal(err)
	}
	if names, err := c.Names(ctx, "b"); err != nil || len(names.Links) != 1 || !names.Links[digest.FromString("z")] {
		t.Errorf("%v, %v", names, err)
	}
}

func TestOpenMissing(t *testing.T) {
	file := made(t)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	c := open(t, file)
	usage, err := c.Usage(context.Background(), "")
	if err != nil || usage != (catalog.Usage{}) {
		t.Errorf("of a new catalog: %+v, %v", usage, err)
	}
	if at, err := c.Complete(context.Background()); err != nil || !at.IsZero() {
		t.Errorf("a new catalog says that it is complete since %v, %v", at, err)
	}
}

func TestOpenOlder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "catalog.db")
	run(t, file,
		"CREATE TABLE meta (name VARCHAR(32) NOT NULL PRIMARY KEY, value VARCHAR(1024) NOT NULL)",
		"INSERT INTO meta VALUES ('schema', '0'), ('store', '"+theStore+"'), ('complete', '7')")
	c := open(t, file)
	if err := c.Apply(context.Background(), []tree.Change{linked("a", "x")}); err != nil {
		t.Error(err)
	}
	if at, err := c.Complete(context.Background()); err != nil || !at.Equal(time.Unix(7, 0)) {
		t.Errorf("complete: %v, %v", at, err)
	}
	c.Close()
	c = open(t, file) // with the number it has now
	if usage, err := c.Usage(context.Background(), ""); err != nil || usage.Blobs != 1 {
		t.Errorf("%+v, %v", usage, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		name, store string
		damage      func(t *testing.T, file string)
		want, not   error
	}{
		{"newer", theStore, func(t *testing.T, file string) {
			run(t, file, "UPDATE meta SET value = '999' WHERE name = 'schema'", "DROP TABLE blobs")
		}, catalog.ErrNewer, storage.ErrDamaged},
		{"other", "disk:/srv", func(*testing.T, string) {}, catalog.ErrOther, storage.ErrDamaged},
		{"newer and other", "disk:/srv", func(t *testing.T, file string) {
			run(t, file, "UPDATE meta SET value = '999' WHERE name = 'schema'")
		}, catalog.ErrNewer, storage.ErrDamaged},
		{"no database", theStore, func(t *testing.T, file string) {
			if err := os.WriteFile(file, make([]byte, 10_000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, storage.ErrDamaged, catalog.ErrOther},
		{"cut", theStore, func(t *testing.T, file string) {
			if err := os.Truncate(file, 20_000); err != nil {
				t.Fatal(err)
			}
		}, storage.ErrDamaged, catalog.ErrOther},
		{"overwritten", theStore, func(t *testing.T, file string) {
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			junk := make([]byte, info.Size()-8192)
			for i := range junk {
				junk[i] = byte(i * 7)
			}
			if _, err := f.WriteAt(junk, 8192); err != nil {
				t.Fatal(err)
			}
		}, storage.ErrDamaged, catalog.ErrOther},
		{"no number", theStore, func(t *testing.T, file string) {
			run(t, file, "DELETE FROM meta")
		}, storage.ErrDamaged, catalog.ErrOther},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := made(t)
			c.damage(t, file)
			opened, err := tryOpen(file, c.store)
			if err == nil {
				opened.Close()
			}
			if !errors.Is(err, c.want) || errors.Is(err, c.not) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			// It has let go, and what is put aside makes room for a new one.
			backend := &sqlite.SQLite{File: file}
			if _, err := backend.Aside(context.Background(), c.store); err != nil {
				t.Fatal(err)
			}
			if opened, err = tryOpen(file, c.store); err != nil {
				t.Fatal(err)
			}
			if err := opened.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The file of another program is not put aside.
func TestOpenForeign(t *testing.T) {
	file := filepath.Join(t.TempDir(), "places.db")
	run(t, file, "CREATE TABLE bookmarks (url TEXT)")
	c, err := tryOpen(file, theStore)
	if err == nil {
		c.Close()
	}
	if err == nil || errors.Is(err, storage.ErrDamaged) || errors.Is(err, catalog.ErrOther) || errors.Is(err, catalog.ErrNewer) {
		t.Errorf("%v", err)
	}
}

// What goes wrong in the middle leaves nothing behind.
func TestApplyAllOrNothing(t *testing.T) {
	c := open(t, filepath.Join(t.TempDir(), "catalog.db"))
	ctx := context.Background()
	if err := c.Apply(ctx, []tree.Change{linked("a", "x"), {Kind: tree.Forgotten, Repository: "a"}, {Kind: 99}}); err == nil {
		t.Error("an unknown change has been written")
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Apply(ended, []tree.Change{linked("a", "x")}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if usage, err := c.Usage(ctx, ""); err != nil || usage != (catalog.Usage{}) {
		t.Errorf("%+v, %v", usage, err)
	}
	if err := c.Apply(ctx, []tree.Change{linked("a", "x")}); err != nil {
		t.Error(err)
	}
	if usage, err := c.Usage(ctx, ""); err != nil || usage.Blobs != 1 {
		t.Errorf("%+v, %v", usage, err)
	}
}

// asking are goroutines that ask until they get an error.
func asking(c *catalog.Catalog, n int) (begun, ended *sync.WaitGroup, errs chan error) {
	begun, ended, errs = new(sync.WaitGroup), new(sync.WaitGroup), make(chan error, n)
	ctx := context.Background()
	for i := range n {
		begun.Add(1)
		ended.Go(func() {
			for asked := 0; ; asked++ {
				var err error
				switch i % 4 {
				case 0:
					_, err = c.Repositories(ctx, "a", "", 100)
				case 1:
					_, err = c.Coldest(ctx, "", time.Time{}, 100)
				case 2:
					_, err = c.Tags(ctx, "docker.io/library/a", "", 100)
				case 3:
					_, err = c.Blobs(ctx, "")
				}
				if asked == 3 {
					begun.Done()
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	return begun, ended, errs
}

// Whoever asks while somebody writes gets an answer, and an error once the
// catalog is closed, which waits for nobody who could wait longer.
func TestCloseWhileAsked(t *testing.T) {
	c := open(t, filepath.Join(t.TempDir(), "catalog.db"))
	w := newWorld(7)
	begun, ended, errs := asking(c, 8)
	var writing sync.WaitGroup
	writing.Go(func() {
		for {
			var changes []tree.Change
			for range 100 {
				change := w.change()
				change.Size = max(change.Size, 0)
				changes = append(changes, change)
			}
			if err := c.Apply(context.Background(), changes); err != nil {
				if !errors.Is(err, catalog.ErrClosed) {
					t.Error(err)
				}
				return
			}
		}
	})
	begun.Wait()
	select {
	case err := <-errs:
		t.Errorf("while it was written to: %v", err)
	default:
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	ended.Wait()
	writing.Wait()
	close(errs)
	for err := range errs {
		if !errors.Is(err, catalog.ErrClosed) {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := c.Usage(context.Background(), ""); !errors.Is(err, catalog.ErrClosed) {
		t.Errorf("asked after its end: %v", err)
	}
}

// What the generator makes is what the same changes would have made.
func TestGenerated(t *testing.T) {
	shape := catalogtest.Shape{Manifests: 400, Links: 2000}
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "catalog.db")
	if err := catalogtest.Fill(ctx, &sqlite.SQLite{File: file}, theStore, shape); err != nil {
		t.Fatal(err)
	}
	c := open(t, file)
	usage, err := c.Usage(ctx, "")
	if err != nil || usage.Manifests != 400 || usage.Repositories != 8 || usage.Tags != 80 {
		t.Errorf("%+v, %v", usage, err)
	}
	// All of it can be evicted, and nothing is left then.
	for n := 0; ; n++ {
		roots, err := c.Coldest(ctx, "", time.Time{}, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(roots) == 0 {
			if n != 80 {
				t.Errorf("%d roots", n)
			}
			break
		}
		removal, err := c.Removal(ctx, roots[0])
		if err != nil {
			t.Fatal(err)
		}
		if len(removal.Manifests) != 5 {
			t.Fatalf("%+v", removal)
		}
		if err := c.Apply(ctx, removed(removal)); err != nil {
			t.Fatal(err)
		}
	}
	for repository := range shape.Repositories() {
		if err := c.Apply(ctx, []tree.Change{{Kind: tree.Forgotten, Repository: shape.Repository(repository)}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, upstream := range []string{"", "docker.io", "quay.io", "ghcr.io"} {
		if usage, err := c.Usage(ctx, upstream); err != nil || usage != (catalog.Usage{}) {
			t.Errorf("left of %q: %+v, %v", upstream, usage, err)
		}
	}
}
