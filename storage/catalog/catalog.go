// Package catalog is the contract between the mirror and the database in which
// it keeps what makes a store fast to list, search, account and evict. What is
// in the database can be lost: it is made again from the store.
package catalog

import (
	"context"
	"database/sql"
	"errors"
)

// A Backend is a Caddy module in the namespace registry.catalog: one
// configuration of one kind of database.
type Backend interface {
	// Identity names the database that this configuration means for the store
	// of the given identity. Two configurations with one identity share it.
	Identity(store string) string

	// Dialect is what its SQL is written in.
	Dialect() Dialect

	// Open opens the database of a store, and makes it if there is none. It is
	// called once the store is in use, never while a configuration is only
	// being checked. A database that cannot be read as one is reported as an
	// error that wraps [ErrDamaged].
	Open(ctx context.Context, store string) (*sql.DB, error)

	// Aside puts away a database that is of no use, so that the next Open makes
	// an empty one, and says in words where it is now. Nobody has it open.
	Aside(ctx context.Context, store string) (string, error)
}

// A Dialect is what two databases say differently.
type Dialect string

// SQLite is the dialect of SQLite 3.35 and later.
const SQLite Dialect = "sqlite"

// ErrDamaged is wrapped by the error of a Backend.Open that finds something it
// cannot read.
var ErrDamaged = errors.New("damaged")
