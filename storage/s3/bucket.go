package s3

import (
	"context"
	"io"
	"iter"
	"time"
)

// A bucket is what the store asks of S3: one prefix of one bucket. It keeps nothing
// in memory, and knows nothing of what is near.
//
// Keys are the store's; the prefix of the configuration is put before them here.
// An absent key is an fs.ErrNotExist. What may be otherwise at another time (no
// answer, 5xx, SlowDown, refused credentials) wraps storage.ErrUnavailable, and after
// several in a row so does every call for a while, at once.
type bucket struct{}

// An object is what S3 says of one. A shallow listing yields directories as well,
// as keys that end in a slash.
type object struct {
	key      string
	size     int64
	etag     string
	modified time.Time
}

// get reads length bytes of an object from offset, or all from there if length is
// negative, in one call.
func (b *bucket) get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object, error) {
	panic("unwritten")
}

// head describes an object.
func (b *bucket) head(ctx context.Context, key string) (object, error) { panic("unwritten") }

// put stores size bytes under a key, in one call. sum is their sha256 in
// hexadecimal; it is what is signed, so the bytes are not read for that.
func (b *bucket) put(ctx context.Context, key string, body io.ReadSeeker, size int64, sum string) error {
	panic("unwritten")
}

// putFile stores a local file: in one call up to put_limit, else in equal parts. p
// is where the upload stands: it goes on from there, and saved is called with what
// it has come to, one call at a time, so that another process can go on after this.
// The upload is over, and p worth nothing, when putFile returns nil.
func (b *bucket) putFile(ctx context.Context, key, path string, size int64, sum string, p parts, saved func(parts) error) error {
	panic("unwritten")
}

// abort ends an upload that will not be gone on with.
func (b *bucket) abort(ctx context.Context, key string, p parts) error { panic("unwritten") }

// delete removes an object. There need not be one.
func (b *bucket) delete(ctx context.Context, key string) error { panic("unwritten") }

// list yields the objects whose keys begin with a prefix, which is empty or ends in
// a slash, in no order.
func (b *bucket) list(ctx context.Context, prefix string, deep bool) iter.Seq2[object, error] {
	panic("unwritten")
}

// presign returns a URL for one GET or HEAD request of an object.
func (b *bucket) presign(ctx context.Context, method, key string, life time.Duration) (string, error) {
	panic("unwritten")
}

// parts is an upload in parts under way: our own ledger, since what servers say of
// parts cannot be relied upon (seed: more than 200 of them).
type parts struct {
	Upload string   `json:"upload,omitempty"` // its ID; empty: not begun
	Size   int64    `json:"size,omitempty"`   // bytes of a part, but for the last
	ETags  []string `json:"etags,omitempty"`  // of the parts that are there; "" of one that is not
}
