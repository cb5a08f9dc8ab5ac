package tree

import (
	"context"
	"iter"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
)

// A Change is one thing that has changed in a store, or has become known of it.
// The tree tells of each before it begins to write, and of each removal after it
// has removed: what is in the store has always been told of. It tells in the
// order of what it does, for each tag and each digest.
type Change struct {
	Kind       ChangeKind
	Repository string
	Tag        string
	// Canonical is the sha256 the bytes lie under, and Digest what they were
	// asked for by, where that is another one.
	Canonical, Digest digest.Digest
	Size              int64
	Manifest          *oci.Manifest
	Record            *Record
	At                time.Time
}

// A ChangeKind says what has changed, and which fields of a [Change] tell of it.
type ChangeKind int

const (
	// Recorded: the repository has the record Record.
	Recorded ChangeKind = iota + 1
	// Manifested: the repository has the manifest Canonical, Size, Manifest
	// since At.
	Manifested
	// Linked: the blob Canonical, of Size bytes, is stored and belongs to the
	// repository since At.
	Linked
	// Tagged: Tag of the repository means Canonical since At.
	Tagged
	// Read: a client has asked at At for Tag; or for the manifest Canonical, by
	// its digest.
	Read
	// ReadBlob: a client has asked at At for the blob Canonical of the
	// repository.
	ReadBlob
	// Pinned and Unpinned: Tag, or the manifest Canonical, is not to be evicted,
	// or may be again. It need not be held.
	Pinned
	Unpinned
	// Stored: the bytes Canonical, Size are in the store since At, whoever they
	// belong to.
	Stored
	// Hashed: the bytes Canonical have been read at At and are right.
	Hashed
	// Untagged: the repository has no such Tag any more.
	Untagged
	// Unmanifested: the manifest Canonical belongs to the repository no more.
	Unmanifested
	// Unlinked: the blob Canonical belongs to the repository no more.
	Unlinked
	// Removed: the bytes Canonical are gone.
	Removed
	// Forgotten: there is nothing left of the repository.
	Forgotten
)

// A Pin says that a tag or a manifest is not to be evicted.
type Pin struct {
	Schema     int       `json:"schema"`
	Repository string    `json:"repository"`
	Reference  string    `json:"reference"` // a tag or a digest
	Since      time.Time `json:"since"`
}

// Pin keeps a tag or a manifest from being evicted, now or when it is held.
func (t *Tree) Pin(ctx context.Context, repository string, ref oci.Reference, at time.Time) error {
	panic("not written")
}

// Unpin undoes that, and reports whether there was such a pin.
func (t *Tree) Unpin(ctx context.Context, repository string, ref oci.Reference) (bool, error) {
	panic("not written")
}

// Pins yields all pins of a repository, or with "" of all repositories.
func (t *Tree) Pins(ctx context.Context, repository string) iter.Seq2[Pin, error] {
	panic("not written")
}

// RemoveTag lets a tag mean nothing any more, if it means d still. Its record
// goes too.
func (t *Tree) RemoveTag(ctx context.Context, repository, tag string, d digest.Digest) error {
	panic("not written")
}

// RemoveManifest takes a manifest out of a repository.
func (t *Tree) RemoveManifest(ctx context.Context, repository string, d digest.Digest) error {
	panic("not written")
}

// Unlink takes a blob out of a repository.
func (t *Tree) Unlink(ctx context.Context, repository string, d digest.Digest) error {
	panic("not written")
}

// RemoveBlob deletes bytes unless, once nobody can begin to refer to them any
// more, needed says that somebody does.
func (t *Tree) RemoveBlob(ctx context.Context, d digest.Digest, needed func() (bool, error)) (removed bool, err error) {
	panic("not written")
}

// Forget removes what is left of a repository that has no manifest: its record,
// and its directories.
func (t *Tree) Forget(ctx context.Context, repository string) error { panic("not written") }
