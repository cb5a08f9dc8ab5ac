package probe

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxWindow is how far back what is compressed may refer, in bytes: what "zstd
// --long" and "xz -9" need at most. It is what decompressing takes of memory.
const maxWindow = 128 << 20

// Compression is gz, xz or zst, by a file's first bytes, or empty.
func Compression(head []byte) string {
	switch {
	case bytes.HasPrefix(head, gzMagic):
		return "gz"
	case bytes.HasPrefix(head, xzMagic):
		return "xz"
	case zst(head):
		return "zst"
	}
	return ""
}

// Decompress returns a reader of what is in a file compressed by one of those. It uses
// bounded memory.
func Decompress(kind string, r io.Reader) (io.ReadCloser, error) {
	switch kind {
	case "gz":
		return gzip.NewReader(r)
	case "xz":
		x, err := xz.NewReader(r)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(x), nil
	case "zst":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return nil, fmt.Errorf("no compression is called %q: use gz, xz or zst", kind)
}
