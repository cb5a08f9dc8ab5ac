// Package hosted takes in what is pushed: blobs in uploads that outlive the
// process, manifests and tags; and removes what is to be deleted. What comes by
// another way than the registry API is received, and kept where it is to be
// ([Registry.Receive], [Upload.Keep]). It knows no HTTP: package mirror speaks the
// protocol and turns its errors into what a client is told.
package hosted

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// Errors that say why something was not taken in, or not removed.
var (
	// ErrNoUpload: there is no such upload in the repository; it was finished or
	// cancelled, or has expired.
	ErrNoUpload = errors.New("no such upload")
	// ErrOffset: a chunk does not begin where the upload ends.
	ErrOffset = errors.New("the chunk does not begin where the upload ends")
	// ErrLength: a body is shorter or longer than was announced.
	ErrLength = errors.New("the body has another length than announced")
	// ErrDigest: the bytes are not what the digest says.
	ErrDigest = errors.New("the digest is not that of the bytes")
	// ErrManifest: the bytes are no manifest that is taken in.
	ErrManifest = errors.New("no valid manifest")
	// ErrTooLarge: a manifest is larger than max_manifest_size, or a blob than
	// max_blob_size.
	ErrTooLarge = errors.New("too large")
	// ErrImmutable: the tag means something else already and may not be moved or
	// removed.
	ErrImmutable = errors.New("the tag is immutable")
	// ErrNoDelete: the repository is configured with `delete off`.
	ErrNoDelete = errors.New("deleting is off for this repository")
	// ErrNamed: a manifest of the repository names the blob.
	ErrNamed = errors.New("a manifest names it")
)

// A Missing error says that a manifest names content that the repository does
// not have.
type Missing struct{ What string }

func (m *Missing) Error() string {
	return fmt.Sprintf("the manifest names %s, which has not been pushed to this repository", m.What)
}

// A Registry is what is hosted in a store. It outlives configurations.
type Registry struct {
	store    storage.Store
	distant  storage.Distant // of the store; nil: everything is on a local disk
	tree     *tree.Tree
	room     func(ctx context.Context, n int64) bool
	quota    func(ctx context.Context, repository string, n int64) (done func(), err error)
	log      *zap.Logger
	now      func() time.Time
	settings atomic.Pointer[Settings]
	run      int64 // bytes between two states of an upload under way
	uploads  uploads
}

// ErrQuota is wrapped by what a quota refuses. It is a [storage.ErrFull], too.
var ErrQuota = fmt.Errorf("%w", storage.ErrFull)

// Parts are what a registry works with. It closes none of them, and they outlive
// it.
type Parts struct {
	Store storage.Store
	Tree  *tree.Tree // in the store
	// Room makes room for n bytes where there is none, and reports whether it is
	// worth trying again; nil: nobody does.
	Room func(ctx context.Context, n int64) bool
	// Quota sets n bytes aside for what is pushed to a repository, beside those of
	// earlier calls. Where its hosted pattern may not take so many more, the error
	// wraps [ErrQuota] and names the pattern. They count until done is
	// called, once: when the tree has told of what they were for, or it is given
	// up. nil: nothing is limited.
	Quota func(ctx context.Context, repository string, n int64) (done func(), err error)
	Log   *zap.Logger
}

// New returns a registry.
func New(p Parts) *Registry {
	if p.Quota == nil {
		p.Quota = func(context.Context, string, int64) (func(), error) { return func() {}, nil }
	}
	h := &Registry{store: p.Store, tree: p.Tree, room: p.Room, quota: p.Quota, log: p.Log, now: time.Now, run: noteRun}
	if p.Store != nil {
		h.distant = p.Store.Distant()
	}
	h.settings.Store(&Settings{})
	h.begin()
	return h
}

// Settings are what a configuration changes.
type Settings struct {
	// MaxBlob is how large a pushed blob may be, in bytes; 0: as large as any.
	MaxBlob int64
	// Options are those of repositories: the first whose pattern matches are a
	// repository's.
	Options []Options
}

// Options are those of hosted repositories.
type Options struct {
	Pattern oci.Pattern
	// MaxManifest is how large a manifest may be, in bytes, up to
	// [oci.MaxStoredManifest]; 0: [oci.MaxManifestSize].
	MaxManifest int64
	// NoDelete refuses the removal of anything.
	NoDelete bool
	// Immutable are tags that are never moved or removed once they are set.
	Immutable []oci.TagPattern
	// Sparse takes manifests in whose config or layers the repository does not
	// have. Without it only children and subjects may be missing.
	Sparse bool
	// Closed, unless it is empty, refuses whatever changes the repository by the
	// registry API: it is the sentence that says why, and what to do instead. The
	// repository's [Owner] may.
	Closed string
}

// Set replaces the settings.
func (h *Registry) Set(s Settings) { h.settings.Store(&s) }

// options are those of a repository.
func (h *Registry) options(repository string) Options {
	for _, o := range h.settings.Load().Options {
		if o.Pattern.Match(repository) {
			return o
		}
	}
	return Options{}
}

// Close ends what is under way. What has been uploaded so far stays for the next
// process, or for all with the same secret. Nobody may be writing any more.
func (h *Registry) Close() { h.closeUploads() }

// Partial is how many bytes on the disk are of uploads that are not finished,
// less what requests under way have set aside and not given back.
func (h *Registry) Partial() int64 { return h.uploads.partial.Load() }
