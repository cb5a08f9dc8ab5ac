// Package probe finds out what a disk image is, and whether Longhorn can use it. It
// judges a qcow2 header by itself, and nothing opens the file before, because an image
// may name another file of this machine as the one it is based on.
//
// No length that a file states is allocated, and no more of it is read than its first
// cluster and its last sector. What this cannot find out is whether the clusters of an
// image hold what they should: the digest that a client gives says that.
package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Format is what a file is. Besides those named here it is the name of a magic, as in
// the code of the problem with it: vmdk, vhd, gz, html, …
type Format string

const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
	ISO   Format = "iso"
)

// Report is what a file is, and what of it Longhorn cannot use.
type Report struct {
	Format Format `json:"format"`
	// VirtualSize is how large a disk the file is, in bytes; 0 where only a library of
	// its format would know.
	VirtualSize int64      `json:"virtualSize"`
	QCOW2       *QCOW2Info `json:"qcow2,omitempty"`
	Longhorn    Longhorn   `json:"longhorn"`
}

// QCOW2Info is what the header of a qcow2 file says.
type QCOW2Info struct {
	Version              int      `json:"version"`
	ClusterSize          int64    `json:"clusterSize"`
	Compression          string   `json:"compression"` // zlib or zstd; unknown
	BackingFile          *string  `json:"backingFile"`
	IncompatibleFeatures []string `json:"incompatibleFeatures"`
	HeaderLength         int      `json:"headerLength"`
}

// Longhorn is whether Longhorn can use a file, and why not.
type Longhorn struct {
	Compatible bool      `json:"compatible"`
	Problems   []Problem `json:"problems"` // what is always refused first
}

// Problem is one reason why Longhorn cannot use a file, or nobody should.
type Problem struct {
	// Code is one of
	//
	//	empty, truncated, qcow2_header, qcow2_version, unknown_feature, corrupt,
	//	backing_file, encrypted, external_data    nobody should use it
	//	zstd, extended_l2, compatible_features, header_length,
	//	size_not_aligned, virtual_size_not_aligned,
	//	compressed, archive, html, xml, luks,
	//	qcow, vmdk, vhd, vhdx, vdi, qed, parallels    Longhorn cannot
	Code string `json:"code"`
	// Message says what is wrong and what to do about it.
	Message string `json:"message"`
	// Refused says that it is refused whatever the configuration.
	Refused bool `json:"refused"`
}

// sector is what Longhorn's files and disks are multiples of.
const sector = 512

// File looks at a file. Its errors are those of reading: whatever is wrong with the
// file itself is a problem in the report.
func File(ctx context.Context, r io.ReaderAt, size int64) (*Report, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	report := &Report{Format: Raw, Longhorn: Longhorn{Problems: []Problem{}}}
	head, err := readAt(r, 0, min(size, 4096))
	if err != nil {
		return nil, err
	}
	switch known := byMagic(head); {
	case size == 0:
		report.refuse("empty", "the file is empty: look whether the command that made it, or the transfer, failed")
		return report, nil
	case bytes.HasPrefix(head, qcowMagic):
		if err := report.qcow(r, size, head); err != nil {
			return nil, err
		}
	case known != nil:
		report.Format = known.format
		report.add(known.code, known.message)
		if known.dependent != nil {
			why, err := known.dependent(r, size, head)
			if err != nil {
				return nil, err
			}
			if why != "" {
				report.refuse("backing_file", "%s", why)
			}
		}
	default:
		if err := report.raw(r, size); err != nil {
			return nil, err
		}
	}
	// What has to be unpacked or converted changes its size by that.
	if rest := size % sector; rest != 0 && (report.Format == Raw || report.Format == QCOW2 || report.Format == ISO) {
		report.add("size_not_aligned", fmt.Sprintf("the file has %d bytes, and Longhorn takes only multiples of 512: fill it with zeros by 'truncate -s %d IMAGE', or for a raw disk 'qemu-img resize -f raw IMAGE %[2]d'", size, size-rest+sector))
	}
	slices.SortStableFunc(report.Longhorn.Problems, func(a, b Problem) int {
		switch {
		case a.Refused && !b.Refused:
			return -1
		case b.Refused && !a.Refused:
			return 1
		}
		return 0
	})
	report.Longhorn.Compatible = len(report.Longhorn.Problems) == 0
	return report, ctx.Err()
}

// raw looks at a file that begins like no format.
func (p *Report) raw(r io.ReaderAt, size int64) error {
	p.VirtualSize = size
	// The first volume descriptor of ISO 9660 is in sector 16 of 2048 bytes. What
	// lies before it is free for a boot sector.
	const descriptor = 16*2048 + 1
	if size >= descriptor+5 {
		id, err := readAt(r, descriptor, 5)
		if err != nil {
			return err
		}
		if string(id) == "CD001" {
			p.Format = ISO
			return nil
		}
	}
	// A VHD of fixed size is a raw disk and a footer.
	if size >= sector {
		footer, err := readAt(r, size-sector, 8)
		if err != nil {
			return err
		}
		if bytes.Equal(footer, vhdMagic) {
			p.Format, p.VirtualSize = "vhd", 0
			p.add("vhd", convert("a VHD", "vpc"))
		}
	}
	return nil
}

func (p *Report) add(code, message string) {
	p.Longhorn.Problems = append(p.Longhorn.Problems, Problem{Code: code, Message: message})
}

func (p *Report) refuse(code, format string, args ...any) {
	p.Longhorn.Problems = append(p.Longhorn.Problems, Problem{Code: code, Message: fmt.Sprintf(format, args...), Refused: true})
}

// readAt reads n bytes, which the file has.
func readAt(r io.ReaderAt, at, n int64) ([]byte, error) {
	b := make([]byte, n)
	if got, err := r.ReadAt(b, at); int64(got) < n {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("reading the image at %d: %w", at, err)
	}
	return b, nil
}
