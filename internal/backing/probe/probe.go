// Package probe finds out what a disk image is, and whether Longhorn can use it. It
// judges a qcow2 header by itself before any library opens the file, because an image
// may name another file of this machine as the one it is based on.
package probe

import (
	"context"
	"io"
)

// Format is what a file is.
type Format string

const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
	ISO   Format = "iso"
)

// Report is what a file is, and what of it Longhorn cannot use.
type Report struct {
	Format      Format     `json:"format"`
	VirtualSize int64      `json:"virtualSize"`
	QCOW2       *QCOW2Info `json:"qcow2,omitempty"`
	Longhorn    Longhorn   `json:"longhorn"`
}

// QCOW2Info is what the header of a qcow2 file says.
type QCOW2Info struct {
	Version              int      `json:"version"`
	ClusterSize          int64    `json:"clusterSize"`
	Compression          string   `json:"compression"` // zlib or zstd
	BackingFile          *string  `json:"backingFile"`
	IncompatibleFeatures []string `json:"incompatibleFeatures"`
	HeaderLength         int      `json:"headerLength"`
}

// Longhorn is whether Longhorn can use a file, and why not.
type Longhorn struct {
	Compatible bool      `json:"compatible"`
	Problems   []Problem `json:"problems"`
}

// Problem is one reason why Longhorn cannot use a file, or nobody should.
type Problem struct {
	Code    string `json:"code"` // size_not_aligned, backing_file, encrypted, external_data, zstd, extended_l2, compressed, html, vmdk, …
	Message string `json:"message"`
	// Refused says that it is refused whatever the configuration.
	Refused bool `json:"refused"`
}

// File looks at a file.
func File(ctx context.Context, r io.ReaderAt, size int64) (*Report, error) { panic("seam") }

// Compression is gz, xz or zst, by a file's first bytes, or empty.
func Compression(head []byte) string { panic("seam") }

// Decompress returns a reader of what is in a file compressed by one of those. It uses
// bounded memory.
func Decompress(kind string, r io.Reader) (io.ReadCloser, error) { panic("seam") }
