package catalog

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Blob is bytes in the store.
type Blob struct {
	Digest       digest.Digest
	Size         int64
	Stored, Read time.Time
	Hashed       time.Time // zero: never
}

const blobFields = "b.digest, b.size, b.stored, b.touched, COALESCE(b.hashed, 0)"

func scanBlob(scan func(...any) error, more ...any) (blob Blob, err error) {
	var raw []byte
	var stored, read, hashed int64
	err = scan(append([]any{&raw, &blob.Size, &stored, &read, &hashed}, more...)...)
	blob.Digest = unpack(raw)
	blob.Stored, blob.Read, blob.Hashed = fromSeconds(stored), fromSeconds(read), fromSeconds(hashed)
	return blob, err
}

func (c *Catalog) blobs(ctx context.Context, query string, args ...any) (blobs []Blob, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each(query, args, func(scan func(...any) error) error {
			blob, err := scanBlob(scan)
			blobs = append(blobs, blob)
			return err
		})
	})
	return blobs, err
}

// Referenced reports whether any link, tag or manifest in the store names a
// blob, or it is a manifest of a repository. A subject's referrers do not
// count: they go with it.
func (c *Catalog) Referenced(ctx context.Context, d digest.Digest) (referenced bool, err error) {
	err = c.read(ctx, func(r *reader) error {
		var n int64
		raw, err := r.raw(d)
		if err == nil {
			_, err = r.one("SELECT members + tags FROM blobs WHERE digest = ?", []any{raw}, &n)
		}
		referenced = n > 0
		return err
	})
	return referenced, err
}

// Unreferenced returns up to n blobs, in the order of their digests, that
// nothing refers to and that were stored before a time.
func (c *Catalog) Unreferenced(ctx context.Context, before time.Time, after digest.Digest, n int) ([]Blob, error) {
	return c.blobs(ctx, "SELECT "+blobFields+" FROM loose l JOIN blobs b ON b.id = l.blob WHERE l.digest > ? AND b.stored < ? ORDER BY l.digest LIMIT ?",
		[]byte(pack(after)), before.Unix(), n)
}

// Unhashed returns up to n blobs, those hashed longest ago first and before all
// those that never were, hashed before a time.
func (c *Catalog) Unhashed(ctx context.Context, before time.Time, n int) ([]Blob, error) {
	return c.blobs(ctx, "SELECT "+blobFields+" FROM blobs b WHERE b.hashed < ? ORDER BY b.hashed LIMIT ?", before.Unix(), n)
}

// Blobs returns the size of all blobs whose sha256 begins with the given
// hexadecimal digits.
func (c *Catalog) Blobs(ctx context.Context, prefix string) (map[digest.Digest]int64, error) {
	if len(prefix) > 64 {
		return nil, fmt.Errorf("%.80q is longer than a digest", prefix)
	}
	low, err := hex.DecodeString(prefix + strings.Repeat("0", 64-len(prefix)))
	if err != nil {
		return nil, fmt.Errorf("%q are no hexadecimal digits", prefix)
	}
	high, _ := hex.DecodeString(prefix + strings.Repeat("f", 64-len(prefix)))
	sizes := map[digest.Digest]int64{}
	err = c.read(ctx, func(r *reader) error {
		return r.each("SELECT digest, size FROM blobs WHERE digest >= ? AND digest <= ? AND stored > 0", []any{low, high}, func(scan func(...any) error) error {
			var raw []byte
			var size int64
			err := scan(&raw, &size)
			if len(raw) == len(low) {
				sizes[unpack(raw)] = size
			}
			return err
		})
	})
	return sizes, err
}
