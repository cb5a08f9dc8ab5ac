package tree

import (
	"context"
	"fmt"
	"io/fs"
	"sync/atomic"
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

// readEvery is how often reads of one thing are told of.
const readEvery = time.Minute

// A LastRead is when a read of something was last told of.
type LastRead struct{ at atomic.Int64 } // in seconds of Unix time

// again reports whether a read at the given time is to be told of.
func (l *LastRead) again(at time.Time) bool {
	now, last := at.Unix(), l.at.Load()
	age := now - last
	// A clock that has been set back must not end the telling.
	return (age >= int64(readEvery/time.Second) || age <= -int64(readEvery/time.Second)) && l.at.CompareAndSwap(last, now)
}

// Asked tells that a client has asked for a tag, once a minute for each last.
func (t *Tree) Asked(repository, tag string, last *LastRead, at time.Time) {
	if last.again(at) {
		t.note(Change{Kind: Read, Repository: repository, Tag: tag, At: at})
	}
}

// AskedManifest tells that a client has asked for a manifest by its digest. It
// says nothing of one that memory does not know.
func (t *Tree) AskedManifest(repository string, d digest.Digest, at time.Time) {
	if r, ok := t.revisions.Peek(member{repository, d}); ok && r.read.again(at) {
		t.note(Change{Kind: Read, Repository: repository, Canonical: r.canonical, Digest: otherThan(r.canonical, d), At: at})
	}
}

// AskedBlob tells that a client has asked for a stored blob, a member of the
// repository.
func (t *Tree) AskedBlob(repository string, m Member, at time.Time) {
	if m.read != nil && m.Canonical != "" && m.read.again(at) {
		t.note(Change{Kind: ReadBlob, Repository: repository, Canonical: m.Canonical, At: at})
	}
}

// Promise does what AskedBlob does, and finds out then whether the blob is still
// there: from now on whoever collects knows that it was asked for. If it has gone,
// the error is an fs.ErrNotExist.
func (t *Tree) Promise(ctx context.Context, repository string, d digest.Digest, m Member, at time.Time) error {
	t.AskedBlob(repository, m, at)
	// A removal that has not heard of it has ended then, and memory knows.
	t.keepDigest(m.Canonical)()
	now, ok, err := t.Member(ctx, repository, d)
	if err == nil && (!ok || now.Canonical == "") {
		err = fmt.Errorf("blob %s of repository %s: %w", d, repository, fs.ErrNotExist)
	}
	return err
}
