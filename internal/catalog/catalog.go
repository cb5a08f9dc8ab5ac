// Package catalog keeps in a database what is in a store: repositories, tags,
// manifests with what they refer to, links, and blobs with their size and last
// use. It is for listing, searching, accounting and evicting; no pull asks it
// anything. All of it can be made again from the store.
package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	storage "github.com/caddy-registry/mirror/storage/catalog"
)

// A Catalog is a database of what is in one store. All methods may be called at
// once. What writes waits for what is writing.
type Catalog struct {
	db      *sql.DB
	dialect sqlDialect
	life    context.Context // ends with the catalog
	end     context.CancelCauseFunc
	running sync.WaitGroup
	mu      sync.Mutex
	closed  bool // guarded by mu, and running is added to under it

	writer chan struct{} // holds a value while w, prepared and ids are in use
	w      *sql.Conn
	// prepared are the statements of w, by their text.
	prepared map[string]*sql.Stmt
	inserts  map[shape]string
	ids      struct{ upstream, repository, blob sequence }
}

// shape is that of a statement that inserts rows.
type shape struct {
	table string
	rows  int
}

// sequence is the last id that has been given away.
type sequence int64

func (s *sequence) next() int64 { *s++; return int64(*s) }

// ErrNewer is wrapped by the error of an Open that finds tables of a newer
// version of this program.
var ErrNewer = errors.New("made by a newer version of this program")

// ErrOther is wrapped by the error of an Open that finds another store's tables.
var ErrOther = errors.New("of another store")

// ErrClosed is wrapped by the errors of a catalog that is closed.
var ErrClosed = errors.New("the catalog is closed")

var errInconsistent = fmt.Errorf("the catalog contradicts itself, which is %w", storage.ErrDamaged)

// Open makes the tables in a database, or brings those of an earlier version up
// to date. The catalog owns the database from then on, also when Open fails.
func Open(ctx context.Context, db *sql.DB, dialect storage.Dialect, store string) (_ *Catalog, err error) {
	c := &Catalog{db: db, writer: make(chan struct{}, 1), prepared: map[string]*sql.Stmt{}, inserts: map[shape]string{}}
	c.life, c.end = context.WithCancelCause(context.Background())
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	var ok bool
	if c.dialect, ok = dialects[dialect]; !ok {
		return nil, fmt.Errorf("the catalog cannot be kept in %s", dialect)
	}
	if c.w, err = db.Conn(ctx); err != nil {
		return nil, fmt.Errorf("opening the catalog: %w", err)
	}
	if _, err := c.w.ExecContext(ctx, c.dialect.writer); err != nil {
		return nil, fmt.Errorf("opening the catalog: %w", c.dialect.explain(err))
	}
	if err := migrate(ctx, c.w, dialect, store); err != nil {
		return nil, fmt.Errorf("opening the catalog: %w", c.dialect.explain(err))
	}
	if err := c.renumber(ctx); err != nil {
		return nil, fmt.Errorf("opening the catalog: %w", c.dialect.explain(err))
	}
	if _, err := c.w.ExecContext(ctx, "DELETE FROM aliases WHERE NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.digest = aliases.canonical)"); err != nil {
		return nil, fmt.Errorf("opening the catalog: %w", c.dialect.explain(err))
	}
	return c, nil
}

// renumber finds the last ids.
func (c *Catalog) renumber(ctx context.Context) error {
	for query, id := range map[string]*sequence{
		"SELECT COALESCE(MAX(id), 0) FROM upstreams":    &c.ids.upstream,
		"SELECT COALESCE(MAX(id), 0) FROM repositories": &c.ids.repository,
		"SELECT COALESCE(MAX(id), 0) FROM blobs":        &c.ids.blob,
	} {
		if err := c.w.QueryRowContext(ctx, query).Scan(id); err != nil {
			return err
		}
	}
	return nil
}

// Close ends what is under way, and closes the database.
func (c *Catalog) Close() error {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return nil
	}
	c.end(ErrClosed)
	c.running.Wait()
	if c.w != nil {
		for _, s := range c.prepared {
			s.Close()
		}
		c.w.Close()
	}
	return c.db.Close()
}

// begin returns a context that ends with the catalog, which waits for done.
func (c *Catalog) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, nil, ErrClosed
	}
	c.running.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.life, func() { cancel(ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		c.running.Done()
	}, nil
}

// write runs something in a transaction that writes.
func (c *Catalog) write(ctx context.Context, do func(context.Context) error) (err error) {
	ctx, done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	select {
	case c.writer <- struct{}{}:
		defer func() { <-c.writer }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// A context that ends in one of these would leave the connection in a
	// transaction, or not, and nobody would know.
	whole := context.WithoutCancel(ctx)
	if _, err = c.w.ExecContext(whole, c.dialect.begin); err == nil {
		if err = do(ctx); err == nil {
			_, err = c.w.ExecContext(whole, "COMMIT")
		}
	}
	if err != nil {
		c.w.ExecContext(whole, "ROLLBACK") // fails where there is none
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("writing to the catalog: %w", c.dialect.explain(err))
	}
	return nil
}

// writing returns a prepared statement of the writer.
func (c *Catalog) writing(ctx context.Context, query string) (*sql.Stmt, error) {
	if s := c.prepared[query]; s != nil {
		return s, nil
	}
	s, err := c.w.PrepareContext(ctx, query)
	if err == nil {
		c.prepared[query] = s
	}
	return s, err
}

// inserting is the statement that inserts so many rows.
func (c *Catalog) inserting(table string, columns, rows int) string {
	key := shape{table, rows}
	query, ok := c.inserts[key]
	if !ok {
		values := "(?" + strings.Repeat(", ?", columns-1) + ")"
		query = "INSERT INTO " + table + " VALUES " + values + strings.Repeat(", "+values, rows-1)
		c.inserts[key] = query
	}
	return query
}

// read runs queries that see one state of the database.
func (c *Catalog) read(ctx context.Context, do func(*reader) error) error {
	ctx, done, err := c.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	tx, err := c.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err == nil {
		err = do(&reader{ctx, c, tx, map[string]*sql.Stmt{}})
		tx.Rollback()
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("reading the catalog: %w", c.dialect.explain(err))
	}
	return nil
}

// A reader sees one state of the database.
type reader struct {
	ctx context.Context
	c   *Catalog
	tx  *sql.Tx
	// stmts are what has been prepared, by their text; tx closes them.
	stmts map[string]*sql.Stmt
}

func (r *reader) prepare(query string) (*sql.Stmt, error) {
	if s := r.stmts[query]; s != nil {
		return s, nil
	}
	s, err := r.tx.PrepareContext(r.ctx, query)
	if err == nil {
		r.stmts[query] = s
	}
	return s, err
}

// each calls row for all rows of a query.
func (r *reader) each(query string, args []any, row func(scan func(...any) error) error) error {
	stmt, err := r.prepare(query)
	if err != nil {
		return err
	}
	rows, err := stmt.QueryContext(r.ctx, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// raw is the digest under which bytes lie.
func (r *reader) raw(d digest.Digest) ([]byte, error) {
	raw := []byte(pack(d))
	if len(raw) > digest.SHA256.Size() {
		_, err := r.one("SELECT canonical FROM aliases WHERE digest = ?", []any{raw}, &raw)
		return raw, err
	}
	return raw, nil
}

// one reads one row, and reports whether there is one.
func (r *reader) one(query string, args []any, into ...any) (bool, error) {
	found := false
	err := r.each(query, args, func(scan func(...any) error) error {
		if found {
			return nil
		}
		found = true
		return scan(into...)
	})
	return found, err
}

// Complete says whether everything in the store is in the catalog: since when,
// or never.
func (c *Catalog) Complete(ctx context.Context) (time.Time, error) { return c.meta(ctx, "complete") }

// SetComplete notes that everything in the store is in the catalog, or with the
// zero time that something may be missing.
func (c *Catalog) SetComplete(ctx context.Context, at time.Time) error {
	return c.setMeta(ctx, "complete", seconds(at))
}

// Unheard is until when something may have been read without the catalog having
// heard of it; zero: nobody has said.
func (c *Catalog) Unheard(ctx context.Context) (time.Time, error) { return c.meta(ctx, "unheard") }

// SetUnheard notes that what was read until then may be missing.
func (c *Catalog) SetUnheard(ctx context.Context, until time.Time) error {
	return c.setMeta(ctx, "unheard", seconds(until)+1) // or what is cut off a second would be
}

// meta returns a time that is kept beside the tables.
func (c *Catalog) meta(ctx context.Context, name string) (at time.Time, err error) {
	err = c.read(ctx, func(r *reader) error {
		value := "0"
		if _, err := r.one("SELECT value FROM meta WHERE name = ?", []any{name}, &value); err != nil {
			return err
		}
		s, err := strconv.ParseInt(value, 10, 64)
		at = fromSeconds(s)
		return err
	})
	return at, err
}

func (c *Catalog) setMeta(ctx context.Context, name string, seconds int64) error {
	return c.write(ctx, func(ctx context.Context) error {
		value := strconv.FormatInt(seconds, 10)
		done, err := c.w.ExecContext(ctx, "UPDATE meta SET value = ? WHERE name = ?", value, name)
		if err != nil {
			return err
		}
		if n, err := done.RowsAffected(); err != nil || n > 0 {
			return err
		}
		_, err = c.w.ExecContext(ctx, "INSERT INTO meta (name, value) VALUES (?, ?)", name, value)
		return err
	})
}
