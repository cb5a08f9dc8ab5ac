package probe

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/mikelolasagasti/xz"
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

// Decompress returns a reader of all that is in a file compressed by one of those:
// what consists of several members, streams or frames is all of them. A file that ends
// too early, or is damaged, is an error. It uses little more memory than maxWindow, and
// closing it frees that.
func Decompress(kind string, r io.Reader) (io.ReadCloser, error) {
	switch kind {
	case "gz":
		g, err := gzip.NewReader(r)
		if err != nil {
			return nil, unexpected(err)
		}
		return g, nil
	case "xz":
		// It loses bytes that come together with the end, which a MultiReader gives
		// one after the other.
		x, err := xz.NewReader(io.MultiReader(r, strings.NewReader("")), maxWindow)
		if err != nil {
			return nil, unexpected(err)
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

// unexpected is the error of a file that ends before anything has begun.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
