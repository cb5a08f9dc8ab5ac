// Package catalog keeps in a database what is in a store: repositories, tags,
// manifests with what they refer to, links, and blobs with their size and last
// use. It is for listing, searching, accounting and evicting; no pull asks it
// anything. All of it can be made again from the store.
package catalog

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
	storage "github.com/caddy-registry/mirror/storage/catalog"
)

// A Catalog is a database of what is in one store. All methods may be called at
// once, Apply by one goroutine at a time.
type Catalog struct {
	db *sql.DB
}

// ErrNewer is wrapped by the error of an Open that finds tables of a newer
// version of this program.
var ErrNewer = errors.New("made by a newer version of this program")

// ErrOther is wrapped by the error of an Open that finds another store's tables.
var ErrOther = errors.New("of another store")

// Open makes the tables in a database, or brings those of an earlier version up
// to date. The catalog owns the database from then on, also when Open fails.
func Open(ctx context.Context, db *sql.DB, dialect storage.Dialect, store string) (*Catalog, error) {
	panic("not written")
}

// Close closes the database.
func (c *Catalog) Close() error { return c.db.Close() }

// Apply writes down changes, in their order and all at once. A change that
// contradicts what is there replaces it; one that removes what is not there does
// nothing.
func (c *Catalog) Apply(ctx context.Context, changes []tree.Change) error { panic("not written") }

// Complete says whether everything in the store is in the catalog: since when,
// or never.
func (c *Catalog) Complete(ctx context.Context) (time.Time, error) { panic("not written") }

// SetComplete notes that everything in the store is in the catalog, or with the
// zero time that something may be missing.
func (c *Catalog) SetComplete(ctx context.Context, at time.Time) error { panic("not written") }

// Usage is what something takes.
type Usage struct {
	Repositories, Tags, Manifests, Blobs int64
	// Bytes are those of the blobs, each counted once; Allocated is about what
	// they and all links to them take on a disk with blocks of 4 KiB.
	Bytes, Allocated int64
}

// Usage returns what the repositories of an upstream take, or with "" all that
// is in the store.
func (c *Catalog) Usage(ctx context.Context, upstream string) (Usage, error) { panic("not written") }

// A Root is what is evicted as a whole: a tag, or a manifest without a tag and
// without an index that names it.
type Root struct {
	Repository string
	Tag        string // "" of an untagged manifest
	Digest     digest.Digest
	Read       time.Time
}

// Coldest returns up to n evictable roots, those longest unread first, of one
// upstream or with "" of all. Hosted and pinned ones are not evictable. With a
// time that is not zero only those last read before.
func (c *Catalog) Coldest(ctx context.Context, upstream string, before time.Time, n int) ([]Root, error) {
	panic("not written")
}

// A Removal is what nobody needs any more without a root.
type Removal struct {
	Root
	// Manifests belong to the repository for no other tag, index or subject:
	// the root's own first.
	Manifests []digest.Digest
	// Links are blobs that no other manifest of the repository names.
	Links []digest.Digest
	// Blobs are those of both that nothing else in the store refers to, and
	// Bytes what they take.
	Blobs []digest.Digest
	Bytes int64
}

// Removal says what goes with a root.
func (c *Catalog) Removal(ctx context.Context, root Root) (Removal, error) { panic("not written") }

// A Blob is bytes in the store.
type Blob struct {
	Digest       digest.Digest
	Size         int64
	Stored, Read time.Time
	Hashed       time.Time // zero: never
}

// ColdestBlobs returns up to n blobs that are no manifests, belong to no hosted
// repository and to no pinned root, those longest unread first, of one upstream
// or with "" of all.
func (c *Catalog) ColdestBlobs(ctx context.Context, upstream string, n int) ([]Blob, error) {
	panic("not written")
}

// Referenced reports whether any link or any manifest in the store names a blob,
// or it is a manifest of a repository.
func (c *Catalog) Referenced(ctx context.Context, d digest.Digest) (bool, error) {
	panic("not written")
}

// Unreferenced returns up to n blobs, in the order of their digests, that
// nothing refers to and that were stored before a time.
func (c *Catalog) Unreferenced(ctx context.Context, before time.Time, after digest.Digest, n int) ([]Blob, error) {
	panic("not written")
}

// Unhashed returns up to n blobs, those hashed longest ago first and before all
// those that never were, hashed before a time.
func (c *Catalog) Unhashed(ctx context.Context, before time.Time, n int) ([]Blob, error) {
	panic("not written")
}

// Owners returns the repositories that a blob belongs to, up to n of them,
// hosted ones first.
func (c *Catalog) Owners(ctx context.Context, d digest.Digest, n int) ([]Repository, error) {
	panic("not written")
}

// A Repository as the catalog knows it.
type Repository struct {
	Name     string
	Class    tree.Class // tree.Hosted if it has no record
	Upstream string
	Created  time.Time
	Usage    Usage // of Repositories only
}

// Repositories returns up to n repositories in the order of their names, after
// a name, whose name contains a text.
func (c *Catalog) Repositories(ctx context.Context, containing, after string, n int) ([]Repository, error) {
	panic("not written")
}

// A Tag as the catalog knows it.
type Tag struct {
	Name   string
	Digest digest.Digest
	Since  time.Time
	Read   time.Time
	Pinned bool
	// Bytes are those of its manifests and blobs that are held.
	Bytes int64
}

// Tags returns up to n tags of a repository in the order of their names, after
// a name.
func (c *Catalog) Tags(ctx context.Context, repository, after string, n int) ([]Tag, error) {
	panic("not written")
}

// Names are what is known of a repository, or of all blobs whose digest begins
// with the same two digits, for comparing with the store.
type Names struct {
	Tags      map[string]digest.Digest
	Manifests map[digest.Digest]bool
	Links     map[digest.Digest]bool
	Pins      map[string]bool // tags and digests
}

// Names returns all that is known of a repository.
func (c *Catalog) Names(ctx context.Context, repository string) (Names, error) {
	panic("not written")
}

// Blobs returns the size of all blobs whose sha256 begins with the given
// hexadecimal digits.
func (c *Catalog) Blobs(ctx context.Context, prefix string) (map[digest.Digest]int64, error) {
	panic("not written")
}
