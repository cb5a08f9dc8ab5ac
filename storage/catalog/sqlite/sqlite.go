// Package sqlite is the guest module registry.catalog.sqlite: a catalog in a
// local file.
package sqlite

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"database/sql/driver"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"modernc.org/sqlite"

	"github.com/caddy-registry/mirror/storage/catalog"
)

func init() {
	caddy.RegisterModule(new(SQLite))
}

// SQLite keeps the catalog in a file on a local disk. It needs about 1 GiB for
// a million images, and nothing is lost with it: it is made again from the
// store.
//
// A file that is damaged, of a newer version of this program or of another store
// is renamed to one that ends in `.aside-` and the time, and a new one is made.
// The last two of those are kept. A file that another process uses is refused.
type SQLite struct {
	// The file. Its directory is made when it is first needed. It must lie on
	// a local disk: on NFS and SMB the locks of SQLite do not hold.
	// Placeholders such as {env.HOME} are resolved. Default:
	// `registry-catalog-` and a short name of the store, `.db`, in Caddy's data
	// directory, so that two stores never share one.
	File string `json:"file,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*SQLite) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "registry.catalog.sqlite",
		New: func() caddy.Module { return new(SQLite) },
	}
}

// Provision resolves the name of the file, and touches nothing.
func (s *SQLite) Provision(caddy.Context) error {
	if s.File == "" {
		return nil
	}
	file, err := caddy.NewReplacer().ReplaceOrErr(s.File, true, true)
	if err != nil {
		return fmt.Errorf("file: %w", err)
	}
	if file, err = filepath.Abs(file); err != nil {
		return fmt.Errorf("file: %w", err)
	}
	if info, err := os.Stat(file); err == nil && info.IsDir() {
		return fmt.Errorf("file: %s is a directory; name a file in it", file)
	}
	// So that one file has one identity whatever links lead to its directory.
	if dir, err := filepath.EvalSymlinks(filepath.Dir(file)); err == nil {
		file = filepath.Join(dir, filepath.Base(file))
	}
	s.File = file
	return nil
}

// UnmarshalCaddyfile sets up the catalog from Caddyfile tokens:
//
//	catalog sqlite [<file>]
func (s *SQLite) UnmarshalCaddyfile(tok *caddyfile.Dispenser) error {
	tok.Next() // the module's name
	if tok.NextArg() {
		s.File = tok.Val()
	}
	if tok.NextArg() {
		return tok.ArgErr()
	}
	for nesting := tok.Nesting(); tok.NextBlock(nesting); {
		return tok.Errf("unrecognized option %q of a catalog in sqlite; it has none", tok.Val())
	}
	return nil
}

// Identity is the file.
func (s *SQLite) Identity(store string) string { return "sqlite:" + s.file(store) }

// Dialect implements [catalog.Backend].
func (s *SQLite) Dialect() catalog.Dialect { return catalog.SQLite }

func (s *SQLite) file(store string) string {
	if s.File != "" {
		return s.File
	}
	sum := sha256.Sum256([]byte(store))
	return filepath.Join(caddy.AppDataDir(), "registry-catalog-"+hex.EncodeToString(sum[:6])+".db")
}

const (
	fileMode = 0o640
	dirMode  = 0o750

	// connections are one that writes and those that read.
	connections = 5
	maxAside    = 2
	asidePart   = ".aside-"
)

// Open opens the file, and makes it and its directory if there is none.
func (s *SQLite) Open(ctx context.Context, store string) (*sql.DB, error) {
	file := s.file(store)
	lock, err := hold(file)
	if err != nil {
		return nil, err
	}
	c, err := connect(file, lock)
	if err != nil {
		lock.Close()
		return nil, err
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	if err := check(ctx, db); err != nil {
		db.Close()
		return nil, fmt.Errorf("the catalog %s: %w", file, err)
	}
	return db, nil
}

// hold makes the directory of a file and keeps other processes out.
func hold(file string) (*os.File, error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return nil, fmt.Errorf("making the directory of the catalog: %w", err)
	}
	if kind, err := remote(dir); err != nil {
		return nil, fmt.Errorf("the directory of the catalog: %w", err)
	} else if kind != "" {
		return nil, fmt.Errorf("the catalog %s would lie on %s, where the locks of SQLite do not hold; name a file on a local disk: catalog sqlite <file>", file, kind)
	}
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, fileMode)
	if err != nil {
		return nil, fmt.Errorf("locking the catalog: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			holder, _ := io.ReadAll(io.LimitReader(lock, 32))
			return nil, fmt.Errorf("the catalog %s is in use (process %s); stop it, or name another file: catalog sqlite <file>", file, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("locking the catalog %s: %w; it must lie on a filesystem with locks", file, err)
	}
	if err := lock.Truncate(0); err == nil {
		fmt.Fprintln(lock, os.Getpid())
	}
	return lock, nil
}

// A connector opens connections to a file, and lets go of it with the last.
type connector struct {
	driver.Connector
	lock *os.File
}

// Close is called by the Close of the database.
func (c *connector) Close() error { return c.lock.Close() }

func connect(file string, lock *os.File) (*connector, error) {
	// SQLite makes files that all may read.
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, fileMode)
	if err != nil {
		return nil, fmt.Errorf("the catalog: %w", err)
	}
	f.Close()
	query := url.Values{"_pragma": {
		"busy_timeout(10000)",
		"journal_mode(WAL)",
		"synchronous(NORMAL)",
		"foreign_keys(OFF)",
		"cache_size(-8192)",
		"temp_store(MEMORY)",
		"journal_size_limit(67108864)",
	}}
	c, err := sqlite.NewConnector((&url.URL{Scheme: "file", Path: file, RawQuery: query.Encode()}).String())
	if err != nil {
		return nil, err
	}
	return &connector{c, lock}, nil
}

// check reads the schema and one row of each table.
func check(ctx context.Context, db *sql.DB) error {
	rows, err := db.QueryContext(ctx, "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'")
	if err != nil {
		return explain(err)
	}
	defer rows.Close()
	var tables []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return explain(err)
		}
		tables = append(tables, name)
	}
	if err := rows.Err(); err != nil {
		return explain(err)
	}
	for _, name := range tables {
		row, err := db.QueryContext(ctx, `SELECT * FROM "`+strings.ReplaceAll(name, `"`, `""`)+`" LIMIT 1`)
		if err != nil {
			return explain(err)
		}
		for row.Next() {
		}
		if err := errors.Join(row.Err(), row.Close()); err != nil {
			return explain(err)
		}
	}
	return nil
}

const (
	sqliteCorrupt = 11 // the database disk image is malformed
	sqliteNotADB  = 26 // file is not a database
)

// explain says of an error whether it means that the file is damaged.
func explain(err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) && (e.Code()&0xff == sqliteCorrupt || e.Code()&0xff == sqliteNotADB) {
		return fmt.Errorf("%w: %w", catalog.ErrDamaged, err)
	}
	return err
}

// Aside renames the file and what SQLite has beside it, and deletes all but the
// last two that have been renamed before.
func (s *SQLite) Aside(_ context.Context, store string) (string, error) {
	file := s.file(store)
	lock, err := hold(file)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	aside := file + asidePart + time.Now().UTC().Format("20060102T150405.000000000")
	// The log first: a file without its log is what SQLite can read, and a log
	// without its file is not.
	for _, end := range []string{"-wal", "-shm", ""} {
		if err := os.Rename(file+end, aside+end); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("putting the catalog aside: %w", err)
		}
	}
	found, err := filepath.Glob(escape(file) + asidePart + "*")
	if err != nil {
		return "", err
	}
	found = slices.DeleteFunc(found, func(name string) bool { return strings.HasSuffix(name, "-wal") || strings.HasSuffix(name, "-shm") })
	slices.Sort(found)
	for len(found) > maxAside {
		for _, end := range []string{"-wal", "-shm", ""} {
			if err := os.Remove(found[0] + end); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return "", fmt.Errorf("deleting a catalog put aside before: %w", err)
			}
		}
		found = found[1:]
	}
	return "it is now " + aside, nil
}

// escape keeps a name from being a pattern.
func escape(name string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(name)
}

var (
	_ caddy.Provisioner     = (*SQLite)(nil)
	_ caddyfile.Unmarshaler = (*SQLite)(nil)
	_ catalog.Backend       = (*SQLite)(nil)
)
