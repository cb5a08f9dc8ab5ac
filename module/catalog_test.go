package module_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/module"
	"github.com/caddy-registry/mirror/storage/catalog"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

// catalogFile has the catalog in a file that the test knows.
func catalogFile(t *testing.T) (file, option string) {
	file = filepath.Join(t.TempDir(), "catalog.db")
	return file, "catalog sqlite " + file + "\n"
}

// TestCatalogLost: whatever has become of the catalog, what is held is served at
// once, and the catalog is made again.
func TestCatalogLost(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 5000))
	up.Push("library/x", image, "latest")
	file, option := catalogFile(t)
	m := startAdmin(t, option+upstreamFor("docker.io", up, "tag_ttl 1h"))
	m.pull("library/x", "latest", image)
	m.complete()
	for _, loss := range []struct {
		name  string
		aside bool
		harm  func() error
	}{
		{"deleted", false, func() error { return os.Remove(file) }},
		{"truncated", true, func() error { return os.Truncate(file, 5000) }},
		{"garbage", true, func() error { return os.WriteFile(file, bytes.Repeat([]byte("no database "), 1000), 0o600) }},
		{"newer", true, func() error { return change(file, "UPDATE meta SET value = '999' WHERE name = 'schema'") }},
		{"another store's", true, func() error { return change(file, "UPDATE meta SET value = 'disk:/elsewhere' WHERE name = 'store'") }},
	} {
		m.stop()
		for _, journal := range []string{"-wal", "-shm"} {
			if _, err := os.Stat(file + journal); err == nil {
				t.Errorf("%s: %s was left behind", loss.name, journal)
			}
		}
		if err := loss.harm(); err != nil {
			t.Fatal(err)
		}
		up.Down()
		warned := len(m.logs.with(putAway))
		if err := m.load(option+upstreamFor("docker.io", up, "tag_ttl 1h"), ""); err != nil {
			t.Fatal(err)
		}
		m.pull("library/x", "latest", image)
		if use := m.complete()["usage"].(object); use["tags"] != 1.0 || use["manifests"] != 1.0 {
			t.Errorf("%s: made again as %v", loss.name, use)
		}
		warnings := m.logs.with(putAway)[warned:]
		if (len(warnings) == 1) != loss.aside || len(warnings) > 1 {
			t.Errorf("%s: warnings %v", loss.name, warnings)
		}
		for _, w := range warnings {
			if w["level"] != "warn" || w["store"] != "disk:"+m.dir {
				t.Errorf("%s: %v", loss.name, w)
			}
		}
		up.Up()
	}
}

const putAway = "the catalog was of no use and has been put away; it is made again from the store, and nothing is evicted until then"

// change runs a statement in a catalog that nobody uses.
func change(file, statement string) error {
	db, err := sql.Open("sqlite", file)
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = db.Exec(statement)
	return err
}

// TestCatalogClosed: no pull needs the database.
func TestCatalogClosed(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image, other := regtest.NewImage("x", regtest.Random("x", 2<<20)), regtest.NewImage("y", regtest.Random("y", 2<<20))
	up.Push("library/x", image, "latest")
	up.Push("library/y", other, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 1h"))
	m.pull("library/x", "latest", image)
	m.complete()
	if n := module.CloseCatalogs(); n != 1 {
		t.Fatalf("%d catalogs were closed", n)
	}
	m.pull("library/y", "latest", other)
	up.Down()
	for range 3 {
		m.pull("library/x", "latest", image)
		m.pull("library/y", "latest", other)
	}
}

// slow is a catalog that opens when it is told to.
type slow struct {
	sqlite.SQLite
}

var opens chan struct{}

func init() { caddy.RegisterModule(new(slow)) }

func (*slow) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "registry.catalog.slow", New: func() caddy.Module { return new(slow) }}
}

func (s *slow) Open(ctx context.Context, store string) (*sql.DB, error) {
	select {
	case <-opens:
		return s.SQLite.Open(ctx, store)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

var _ catalog.Backend = (*slow)(nil)

// TestSlowCatalog: nobody waits for a catalog that takes its time; lists say that
// there is none yet.
func TestSlowCatalog(t *testing.T) {
	opens = make(chan struct{})
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	file, _ := catalogFile(t)
	m := startAdmin(t, "catalog slow "+file+"\n"+upstreamFor("docker.io", up))
	m.pull("library/x", "latest", image)
	if status := m.admins("GET", "status"); status["complete"] != nil || status["catalog"] == "ready" {
		t.Errorf("status %v", status)
	}
	checkRefusal(t, m.adminDo("GET", "repositories"), 503, "nothing can be listed now")
	status, out, errs := command(t, "registry", "--address", m.admin, "status")
	if status != 0 || !strings.Contains(out, "partial") || errs != "" {
		t.Errorf("%d %q %q", status, out, errs)
	}
	close(opens)
	m.complete()
	if got := names(m.admins("GET", "repositories")["repositories"]); !slices.Equal(got, []string{"docker.io/library/x"}) {
		t.Errorf("%q", got)
	}
	// And one that never opens does not keep Caddy from stopping.
	m.stop()
	opens = make(chan struct{})
	if err := m.load("catalog slow "+file+"\n"+upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	m.stop()
}

// TestValidateBesideCatalog: a configuration that is checked makes no catalog and
// touches none.
func TestValidateBesideCatalog(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 5000))
	up.Push("library/x", image, "latest")
	file, option := catalogFile(t)
	m := startAdmin(t, option+upstreamFor("docker.io", up))
	m.pull("library/x", "latest", image)
	m.complete()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range []string{option, "catalog sqlite " + filepath.Join(filepath.Dir(file), "other", "c.db") + "\n"} {
		adapted, err := m.adapt(option+upstreamFor("docker.io", up), "")
		if err != nil {
			t.Fatal(err)
		}
		var config caddy.Config
		if err := json.Unmarshal(adapted, &config); err != nil {
			t.Fatal(err)
		}
		config.Admin.Listen = regtest.FreeAddress(t)
		if err := caddy.Validate(&config); err != nil {
			t.Fatal(err)
		}
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the catalog was written to: %v", err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(file), "other")); err == nil {
		t.Error("a catalog was made")
	}
	m.pull("library/x", "latest", image)
	if got := names(m.admins("GET", "repositories")["repositories"]); len(got) != 1 {
		t.Errorf("%q", got)
	}
}

// TestCatalogOfTwoStores: a file that is named for one store after another is
// each one's in turn, and never both's at once.
func TestCatalogOfTwoStores(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one, two := bigImage(t), regtest.NewImage("two", regtest.Random("2", 5000))
	up.Push("library/x", one, "latest")
	up.Push("library/y", two, "latest")
	_, option := catalogFile(t)
	m := startAdmin(t, option+upstreamFor("docker.io", up))
	m.complete()
	rest, hold := halfPulled(t, m, up, "library/x", one)
	old := m.dir
	m.dir = t.TempDir()
	if err := m.load(option+upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	// The first store is still being read, and has its catalog.
	m.pull("library/y", "latest", two)
	if status := m.admins("GET", "status"); status["catalog"] == "ready" || status["complete"] != nil {
		t.Errorf("status %v", status)
	}
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	unlocked(t, old)
	m.complete()
	if got := names(m.admins("GET", "repositories")["repositories"]); !slices.Equal(got, []string{"docker.io/library/y"}) {
		t.Errorf("%q", got)
	}
}
