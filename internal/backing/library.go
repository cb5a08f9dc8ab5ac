package backing

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
)

// A Library is the backing images of a store. It outlives configurations.
type Library struct {
	parts     Parts
	registrar *registrar
}

// New returns a library, which does nothing before Set.
func New(p Parts) *Library {
	l := &Library{parts: p, registrar: newRegistrar(p)}
	l.registrar.version, l.registrar.open = l.Version, l.Open
	return l
}

// Set replaces the settings. With the first that have a Prefix the library reads its
// records and goes on with jobs of an earlier process.
func (l *Library) Set(s Settings) {
	if err := l.registrar.set(s); err != nil {
		l.parts.Log.Error("a Longhorn cannot be used", zap.Error(err))
	}
}

// Close ends what is under way; jobs go on in the next process.
func (l *Library) Close() { l.registrar.close() }

// Query chooses images.
type Query struct {
	Label string // key=value, or key
	After string // a name: those that sort behind it
	Limit int    // 0: 100; 1,000 at most
	May   func(name string) bool
}

// Images lists images by their names; next is the After of the next page, or empty.
func (l *Library) Images(ctx context.Context, q Query) (images []Image, next string, err error) {
	panic("seam")
}

// Image returns an image.
func (l *Library) Image(ctx context.Context, name string) (Image, error) { panic("seam") }

// Version returns a version by its name, by a tag, or by sha512:… or sha256:….
// An empty reference is the tag latest, or without one the version made last.
func (l *Library) Version(ctx context.Context, name, reference string) (Version, error) {
	panic("seam")
}

// Edit is a change of an image; a nil field stays as it is. A label without value ("")
// is removed.
type Edit struct {
	Labels    map[string]string `json:"labels"`
	Protected *bool             `json:"protected"`
}

// Edit changes an image, if its Revision is still the given one; empty: whichever.
func (l *Library) Edit(ctx context.Context, name, revision string, e Edit) (Image, error) {
	panic("seam")
}

// SetTag lets a tag mean a version, given as to Version.
func (l *Library) SetTag(ctx context.Context, name, tag, reference, revision string) (Tag, error) {
	panic("seam")
}

// RemoveTag removes a tag.
func (l *Library) RemoveTag(ctx context.Context, name, tag, revision string) error { panic("seam") }

// Delete deletes a version, or with an empty reference the image and all its versions.
// What stands against it is an Error with code InUse and its Blockers; with unregister
// registrations are deleted in Longhorn first, which has the last word, and are waited
// for until ctx ends. Where Longhorn cannot be asked nothing is deleted.
func (l *Library) Delete(ctx context.Context, name, reference, revision string, unregister bool) error {
	panic("seam")
}

// File is the version whose file has a digest, under whichever image, if it is ready.
// name is what the last component of its address says, and must be the file name of one
// of them; image is then the one.
func (l *Library) File(ctx context.Context, sha512 digest.Digest, name string) (Version, error) {
	panic("seam")
}

// Token is the image that a token in a path is for, or NotFound. The name of a token's
// maker is in its record.
func (l *Library) Token(ctx context.Context, token string) (image string, err error) { panic("seam") }

// Open opens the bytes of a version as tree.OpenBlob does: the error may be
// storage.ErrDistant.
func (l *Library) Open(ctx context.Context, v Version) (io.ReadCloser, storage.Info, error) {
	panic("seam")
}
