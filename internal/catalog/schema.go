package catalog

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"strconv"
	"strings"

	storage "github.com/caddy-registry/mirror/storage/catalog"
)

// schema is the number of the tables below; each number's file makes them from
// those of the number before.
const schema = 1

//go:embed schema/*.sql
var schemas embed.FS

// sqlDialect is where databases differ.
type sqlDialect struct {
	begin  string // a transaction that writes
	writer string // what makes a connection one that writes
	tables string // how many there are, and how many of them are meta
	// damaged are parts of errors that say so.
	damaged []string
}

var dialects = map[storage.Dialect]sqlDialect{
	storage.SQLite: {
		begin:   "BEGIN IMMEDIATE",
		tables:  "SELECT COUNT(*), COUNT(CASE WHEN name = 'meta' THEN 1 END) FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
		damaged: []string{"malformed", "not a database"},
	},
}

// migrate makes the tables, or brings them up to date.
func migrate(ctx context.Context, w *sql.Conn, dialect storage.Dialect, store string) (err error) {
	d := dialects[dialect]
	if _, err := w.ExecContext(ctx, d.begin); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			w.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
		}
	}()
	var all, ours int
	if err := w.QueryRowContext(ctx, d.tables).Scan(&all, &ours); err != nil {
		return err
	}
	at := 0
	if all > 0 && ours == 0 {
		return errors.New("the database has tables of another program; name one of its own for the catalog")
	}
	if all == 0 {
		if _, err := w.ExecContext(ctx, "CREATE TABLE meta (name VARCHAR(32) NOT NULL PRIMARY KEY, value VARCHAR(1024) NOT NULL)"); err != nil {
			return err
		}
		for name, value := range map[string]string{"schema": "0", "store": store, "complete": "0"} {
			if _, err := w.ExecContext(ctx, "INSERT INTO meta (name, value) VALUES (?, ?)", name, value); err != nil {
				return err
			}
		}
	} else {
		var number, of string
		if err := w.QueryRowContext(ctx, "SELECT value FROM meta WHERE name = 'schema'").Scan(&number); err != nil {
			return fmt.Errorf("reading its number: %w", missing(err))
		}
		if at, err = strconv.Atoi(number); err != nil {
			return fmt.Errorf("its number is %w: %w", storage.ErrDamaged, err)
		}
		if at > schema {
			return fmt.Errorf("the catalog has schema %d and this program knows %d: %w", at, schema, ErrNewer)
		}
		if err := w.QueryRowContext(ctx, "SELECT value FROM meta WHERE name = 'store'").Scan(&of); err != nil {
			return fmt.Errorf("reading what store it is of: %w", missing(err))
		}
		if of != store {
			return fmt.Errorf("the catalog is of %s: %w", of, ErrOther)
		}
	}
	for ; at < schema; at++ {
		statements, err := schemas.ReadFile(fmt.Sprintf("schema/%s-%d.sql", dialect, at+1))
		if err != nil {
			return err
		}
		if _, err := w.ExecContext(ctx, string(statements)); err != nil {
			return fmt.Errorf("making schema %d: %w", at+1, err)
		}
	}
	if _, err := w.ExecContext(ctx, "UPDATE meta SET value = ? WHERE name = 'schema'", strconv.Itoa(schema)); err != nil {
		return err
	}
	_, err = w.ExecContext(ctx, "COMMIT")
	return err
}

// missing says of a row that should be there that the database is damaged.
func missing(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%w: %w", storage.ErrDamaged, err)
	}
	return err
}

// explain says of an error whether it means that the database is damaged.
func (d sqlDialect) explain(err error) error {
	for _, text := range d.damaged {
		if strings.Contains(err.Error(), text) {
			return fmt.Errorf("%w: %w", storage.ErrDamaged, err)
		}
	}
	return err
}
