package sqlite_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/storage/catalog"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const store = "disk:/var/lib/registry"

func TestCaddyfile(t *testing.T) {
	for _, c := range []struct{ input, file, err string }{
		{"sqlite", "", ""},
		{"sqlite /srv/catalog.db", "/srv/catalog.db", ""},
		{"sqlite {env.HOME}/catalog.db", "{env.HOME}/catalog.db", ""},
		{"sqlite {\n}", "", ""},
		{"sqlite a b", "", "Testfile:1"},
		{"sqlite a {\n journal off\n}", "", "Testfile:2"},
	} {
		s := new(sqlite.SQLite)
		err := s.UnmarshalCaddyfile(caddyfile.NewTestDispenser(c.input))
		if c.err == "" && (err != nil || s.File != c.file) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%q: %q, %v", c.input, s.File, err)
		}
	}
}

func provision(t *testing.T, file string) (*sqlite.SQLite, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	s := &sqlite.SQLite{File: file}
	return s, s.Provision(ctx)
}

func TestProvision(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CATALOG_DIR", dir)
	s, err := provision(t, "{env.CATALOG_DIR}/sub/catalog.db")
	if err != nil || s.File != dir+"/sub/catalog.db" {
		t.Fatalf("%q, %v", s.File, err)
	}
	if found, err := os.ReadDir(dir); err != nil || len(found) > 0 {
		t.Errorf("checking has made %v, %v", found, err)
	}
	if _, err := provision(t, "{env.CATALOG_NOWHERE}/catalog.db"); err == nil {
		t.Error("a placeholder that means nothing is taken")
	}
	if _, err := provision(t, dir); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("a directory: %v", err)
	}
	if err := os.Symlink(dir, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	linked, err := provision(t, dir+"/link/catalog.db")
	if err != nil {
		t.Fatal(err)
	}
	direct, err := provision(t, dir+"/catalog.db")
	if err != nil || linked.Identity(store) != direct.Identity(store) {
		t.Errorf("one file is %s and %s, %v", linked.Identity(store), direct.Identity(store), err)
	}
	s, err = provision(t, "")
	if err != nil || s.Identity("disk:/a") == s.Identity("disk:/b") || s.Identity("disk:/a") != s.Identity("disk:/a") {
		t.Errorf("two stores share %s, %v", s.Identity("disk:/a"), err)
	}
	if name := filepath.Base(s.Identity("disk:/a")); !strings.HasPrefix(name, "registry-catalog-") || len(name) != len("registry-catalog-.db")+12 {
		t.Errorf("the default is %s", name)
	}
}

func open(t *testing.T, file string) *sql.DB {
	t.Helper()
	db, err := (&sqlite.SQLite{File: file}).Open(context.Background(), store)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestOpen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "some where?mode=ro#1", "catalog.db")
	db := open(t, file)
	if _, err := db.Exec("CREATE TABLE t (v TEXT); INSERT INTO t VALUES ('x')"); err != nil {
		t.Fatal(err)
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "1", "busy_timeout": "10000"} {
		var got string
		if err := db.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %s, %v", pragma, got, err)
		}
	}
	for path, want := range map[string]fs.FileMode{file: 0o640, file + "-wal": 0o640, file + ".lock": 0o640, filepath.Dir(file): fs.ModeDir | 0o750} {
		if info, err := os.Stat(path); err != nil || info.Mode()&^want != 0 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	var v string
	if err := open(t, file).QueryRow("SELECT v FROM t").Scan(&v); err != nil || v != "x" {
		t.Errorf("%q, %v", v, err)
	}
}

// What another process has open is neither opened nor put aside.
func TestInUse(t *testing.T) {
	file := filepath.Join(t.TempDir(), "catalog.db")
	db := open(t, file)
	s := &sqlite.SQLite{File: file}
	check := func(what string, err error) {
		t.Helper()
		if err == nil || errors.Is(err, catalog.ErrDamaged) || !strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := s.Open(context.Background(), store)
	check("open", err)
	_, err = s.Aside(context.Background(), store)
	check("aside", err)
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, file)
}

func TestDamaged(t *testing.T) {
	for name, damage := range map[string]func(data []byte) []byte{
		"no database":     func(data []byte) []byte { return bytes.Repeat([]byte("x"), len(data)) },
		"cut":             func(data []byte) []byte { return data[:len(data)/2] },
		"a broken schema": func(data []byte) []byte { copy(data[100:], bytes.Repeat([]byte{0xff}, 3000)); return data },
		"a table's root":  func(data []byte) []byte { clear(data[4096:8192]); return data },
		"a log, not a file": func([]byte) []byte {
			return []byte("SQLite format 3\x00 and no more, but longer than its head is, which is a hundred bytes: that should do.")
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "catalog.db")
			db := open(t, file)
			if _, err := db.Exec("CREATE TABLE t (v TEXT); WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) INSERT INTO t SELECT 'some words ' || i FROM n"); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, damage(data), 0o600); err != nil {
				t.Fatal(err)
			}
			s := &sqlite.SQLite{File: file}
			if db, err := s.Open(context.Background(), store); !errors.Is(err, catalog.ErrDamaged) {
				t.Errorf("%v", err)
				if err == nil {
					db.Close()
				}
			}
			where, err := s.Aside(context.Background(), store)
			if err != nil || !strings.Contains(where, file+".aside-") {
				t.Errorf("%q, %v", where, err)
			}
			open(t, file)
		})
	}
	// A file without a byte is a new one: that is how SQLite begins.
	file := filepath.Join(t.TempDir(), "catalog.db")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, file)
}

func TestAsideKeepsTwo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "[a]*")
	file := filepath.Join(dir, "catalog.db")
	s := &sqlite.SQLite{File: file}
	var names []string
	for i := range 4 {
		db := open(t, file)
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		for _, end := range []string{"-wal", "-shm"} { // as a killed process leaves them
			if err := os.WriteFile(file+end, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		where, err := s.Aside(context.Background(), store)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(where[strings.LastIndex(where, " ")+1:])
		names = append(names, name)
		found, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var got, want []string
		for _, entry := range found {
			got = append(got, entry.Name())
		}
		for _, name := range names[max(0, i-1):] {
			want = append(want, name, name+"-shm", name+"-wal")
		}
		want = append(want, "catalog.db.lock")
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("after %d: %v, want %v", i+1, got, want)
		}
	}
	if _, err := s.Aside(context.Background(), store); err != nil {
		t.Errorf("nothing to put aside: %v", err)
	}
}
