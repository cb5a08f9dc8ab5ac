package registry_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A graph is who imports whom in this module, test files left out.
type graph struct {
	module  string
	imports map[string][]string // by directory, "." is the root
}

// load parses the imports of every package, whatever its build constraints. It
// needs neither a network nor the go command.
func load(t *testing.T) graph {
	t.Helper()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^module (\S+)$`).FindSubmatch(mod)
	if found == nil {
		t.Fatal("go.mod names no module")
	}
	g := graph{string(found[1]), map[string][]string{}}
	err = fs.WalkDir(os.DirFS("."), ".", func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := entry.Name()
		if entry.IsDir() {
			if file != "." && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "vendor") {
				return fs.SkipDir
			}
			if file != "." {
				if _, err := os.Stat(path.Join(file, "go.mod")); err == nil {
					return fs.SkipDir // a module of its own
				}
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir := path.Dir(file)
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if !slices.Contains(g.imports[dir], imported) {
				g.imports[dir] = append(g.imports[dir], imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// own is the directory of an import of this module.
func (g graph) own(imported string) (string, bool) {
	if imported == g.module {
		return ".", true
	}
	return strings.CutPrefix(imported, g.module+"/")
}

// path is the chain by which a package comes to import what forbidden says,
// through packages of this module.
func (g graph) path(dir string, forbidden func(string) bool, seen map[string]bool) []string {
	if seen[dir] {
		return nil
	}
	seen[dir] = true
	for _, imported := range g.imports[dir] {
		if forbidden(imported) {
			return []string{dir, imported}
		}
		if own, ok := g.own(imported); ok {
			if chain := g.path(own, forbidden, seen); chain != nil {
				return append([]string{dir}, chain...)
			}
		}
	}
	return nil
}

func (g graph) forbid(t *testing.T, dir, what string, forbidden func(string) bool) {
	t.Helper()
	if chain := g.path(dir, forbidden, map[string]bool{}); chain != nil {
		t.Errorf("%s must not import %s: %s", dir, what, strings.Join(chain, " → "))
	}
}

func below(prefixes ...string) func(string) bool {
	return func(imported string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return imported == p || strings.HasPrefix(imported, p+"/") })
	}
}

var (
	caddy = below("github.com/caddyserver", "github.com/mholt")
	heavy = below("github.com/caddyserver", "github.com/mholt",
		"github.com/aws", "github.com/minio", "go.etcd.io",
		"modernc.org/sqlite", "github.com/mattn/go-sqlite3", "github.com/ncruces/go-sqlite3",
		"github.com/go-sql-driver", "github.com/jackc", "github.com/lib/pq")
)

func isStd(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return !strings.Contains(first, ".")
}

func TestImports(t *testing.T) {
	g := load(t)

	// Were the parsing broken, everything below would hold.
	for _, edge := range [][2]string{
		{".", g.module + "/module"}, {"caddyfile", g.module + "/module"}, {"module", g.module + "/internal/mirror"},
		{"internal/mirror", g.module + "/internal/upstream"}, {"internal/fill", g.module + "/storage"},
		{"module", "github.com/caddyserver/caddy/v2"}, {"storage/disk", "github.com/caddyserver/caddy/v2"},
		{"storage/s3", "github.com/aws/aws-sdk-go-v2/service/s3"}, {"storage/s3", "go.etcd.io/bbolt"},
	} {
		if !slices.Contains(g.imports[edge[0]], edge[1]) {
			t.Errorf("%s does not import %s, or the imports cannot be read", edge[0], edge[1])
		}
	}
	if g.path("module", below("net/http"), map[string]bool{}) == nil || g.path(".", below(g.module+"/internal/oci"), map[string]bool{}) == nil {
		t.Error("chains of imports are not followed")
	}

	for dir, imports := range g.imports {
		inside := strings.HasPrefix(dir, "internal/")
		if inside {
			g.forbid(t, dir, "Caddy, SQL drivers or AWS", heavy)
		}
		if dir != "storage/s3" && dir != "." && dir != "xcaddy" {
			g.forbid(t, dir, "AWS or bbolt", below("github.com/aws", "go.etcd.io"))
		}
		for _, imported := range imports {
			to, ok := g.own(imported)
			if !ok {
				continue
			}
			switch {
			case to == "module" && dir != "caddyfile" && dir != ".":
				t.Errorf("%s imports module; only caddyfile and the root do", dir)
			case to == "caddyfile" && dir != ".":
				t.Errorf("%s imports caddyfile; only the root does", dir)
			case inside && !strings.HasPrefix(to, "internal/") && to != "storage" && (!strings.HasPrefix(dir, "internal/catalog") || to != "storage/catalog"):
				t.Errorf("%s imports %s; the arrows go from module over internal to storage", dir, to)
			case strings.HasPrefix(dir, "storage") && strings.HasPrefix(to, "internal/mirror"):
				t.Errorf("%s imports %s, which is above it", dir, to)
			case strings.HasPrefix(to, "storage/") && to != "storage/storagetest" && to != "storage/catalog" && !strings.HasPrefix(dir, to) &&
				dir != "." && dir != "xcaddy" && (dir != "module" && dir != "storage/s3" || to != "storage/disk"): // disk is the default, and before every bucket
				t.Errorf("%s imports %s; a user who needs no such module builds without it", dir, to)
			}
		}
	}

	g.forbid(t, "storage", "Caddy", caddy)
	g.forbid(t, "storage", "this module", below(g.module))
	g.forbid(t, "storage/catalog", "Caddy or SQL drivers", heavy)
	g.forbid(t, "storage/catalog", "this module", below(g.module))
	g.forbid(t, "module", "SQL drivers", below("modernc.org", "github.com/go-sql-driver"))
	g.forbid(t, "internal/fill", "net/http, the upstream client or policy", below("net/http", g.module+"/internal/upstream", g.module+"/internal/mirror"))
	for _, dir := range []string{"internal/oci", "internal/layout"} {
		g.forbid(t, dir, "anything of this module", below(g.module))
	}
	for _, imported := range g.imports["internal/layout"] {
		if !isStd(imported) && imported != "github.com/opencontainers/go-digest" {
			t.Errorf("internal/layout imports %s", imported)
		}
	}
	for _, dir := range []string{"internal/tree", "internal/upstream", "internal/fill"} {
		g.forbid(t, dir, "policy", below(g.module+"/internal/mirror"))
	}
}
