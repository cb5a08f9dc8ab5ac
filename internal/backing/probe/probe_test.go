package probe_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing/probe"
)

// image is the header of a qcow2 file as qemu-img makes it, and room for its tables.
type image []byte

// qcow2 is an image of 1 MiB in clusters of 64 KiB: the header, the refcount table, a
// refcount block, and the L1 table.
func qcow2(version int) image {
	b := make(image, 4<<16)
	copy(b, "QFI\xfb")
	b.set32(4, uint32(version))
	b.set32(20, 16)
	b.set64(24, 1<<20)
	b.set32(36, 1)
	b.set64(40, 3<<16)
	b.set64(48, 1<<16)
	b.set32(56, 1)
	if version == 3 {
		b.set32(96, 4)
		b.set32(100, 112)
	}
	return b
}

func (b image) set32(at int, n uint32) image { binary.BigEndian.PutUint32(b[at:], n); return b }
func (b image) set64(at int, n uint64) image { binary.BigEndian.PutUint64(b[at:], n); return b }
func (b image) put(at int, s string) image   { copy(b[at:], s); return b }
func (b image) to(size int) image            { return append(b, make(image, max(0, size-len(b)))...)[:size] }

// extension puts a header extension where those begin, and returns the image.
func (b image) extension(kind uint32, data string) image {
	at := 72
	if b[7] == 3 {
		at = int(binary.BigEndian.Uint32(b[100:]))
	}
	for b[at+3] != 0 || b[at] != 0 {
		at += 8 + int(binary.BigEndian.Uint32(b[at+4:])+7)&^7
	}
	return b.set32(at, kind).set32(at+4, uint32(len(data))).put(at+8, data)
}

func look(t *testing.T, b []byte) *probe.Report {
	t.Helper()
	report, err := probe.File(context.Background(), bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// codes are the problems of a report, those that are always refused with a mark.
func codes(report *probe.Report) string {
	var all []string
	for _, p := range report.Longhorn.Problems {
		if p.Refused {
			p.Code += "!"
		}
		all = append(all, p.Code)
	}
	return strings.Join(all, " ")
}

func at(offset int, s string) []byte {
	return image(nil).to(offset+len(s)).put(offset, s).to(64 << 10)
}

func TestFile(t *testing.T) {
	vhd := at(0, "conectix")
	child := image(at(0, "conectix")).set32(60, 4)
	for name, test := range map[string]struct {
		file   []byte
		format probe.Format
		codes  string
	}{
		"raw":                       {make([]byte, 1<<20), "raw", ""},
		"raw, unaligned":            {make([]byte, 1<<20+1), "raw", "size_not_aligned"},
		"one byte":                  {[]byte{0}, "raw", "size_not_aligned"},
		"empty":                     {nil, "raw", "empty!"},
		"boot sector":               {at(510, "\x55\xaa"), "raw", ""},
		"iso":                       {at(32769, "CD001"), "iso", ""},
		"hybrid iso":                {image(at(32769, "CD001")).put(510, "\x55\xaa"), "iso", ""},
		"iso, cut":                  {at(32769, "CD001")[:32772], "raw", "size_not_aligned"},
		"vmdk":                      {at(0, "KDMV"), "vmdk", "vmdk"},
		"vmdk of old":               {at(0, "COWD"), "vmdk", "vmdk"},
		"vmdk with a parent":        {image(at(0, "KDMV")).put(512, `parentFileNameHint="/etc/shadow"`), "vmdk", "backing_file! vmdk"},
		"vmdk text":                 {[]byte("# Disk DescriptorFile\nversion=1\nRW 1 FLAT \"/etc/shadow\" 0\n"), "vmdk", "backing_file! vmdk"},
		"vmdk text after blanks":    {[]byte("#\r\n  \r\n\nversion=2\r\n"), "vmdk", "backing_file! vmdk"},
		"vhd":                       {vhd, "vhd", "vhd"},
		"vhd of fixed size":         {append(make([]byte, 4096), vhd[:512]...), "vhd", "vhd"},
		"vhd with a parent":         {child, "vhd", "backing_file! vhd"},
		"vhdx":                      {at(0, "vhdxfile"), "vhdx", "vhdx"},
		"vdi":                       {at(64, "\x7f\x10\xda\xbe"), "vdi", "vdi"},
		"vdi with a parent":         {image(at(64, "\x7f\x10\xda\xbe")).put(76, "\x04"), "vdi", "backing_file! vdi"},
		"qed":                       {at(0, "QED\x00"), "qed", "qed"},
		"qed with a backing file":   {image(at(0, "QED\x00")).put(16, "\x01"), "qed", "backing_file! qed"},
		"parallels":                 {at(0, "WithoutFreeSpace"), "parallels", "parallels"},
		"parallels of today":        {at(0, "WithouFreSpacExt"), "parallels", "parallels"},
		"luks":                      {at(0, "LUKS\xba\xbe"), "luks", "luks"},
		"gz":                        {at(0, "\x1f\x8b\x08"), "gz", "compressed"},
		"xz":                        {at(0, "\xfd7zXZ\x00"), "xz", "compressed"},
		"zst":                       {at(0, "\x28\xb5\x2f\xfd"), "zst", "compressed"},
		"zst after a skipped frame": {at(0, "\x5e\x2a\x4d\x18"), "zst", "compressed"},
		"bz2":                       {at(0, "BZh91AY&SY"), "bz2", "compressed"},
		"zip":                       {at(0, "PK\x03\x04"), "zip", "archive"},
		"7z":                        {at(0, "7z\xbc\xaf\x27\x1c"), "7z", "archive"},
		"tar":                       {at(257, "ustar\x0000"), "tar", "archive"},
		"html":                      {[]byte("\xef\xbb\xbf \r\n<!DOCTYPE html><html>"), "html", "html"},
		"html in small letters":     {[]byte("<html>"), "html", "html"},
		"xml":                       {[]byte(`<?xml version="1.0"?><Error>`), "xml", "xml"},
		"qcow2 2":                   {qcow2(2), "qcow2", ""},
		"qcow2 3":                   {qcow2(3), "qcow2", ""},
		"qcow":                      {image(at(0, "QFI\xfb\x00\x00\x00\x01")), "qcow", "qcow"},
		"qcow with a backing file":  {image(at(0, "QFI\xfb\x00\x00\x00\x01")).set64(8, 48).set32(16, 3), "qcow", "backing_file! qcow"},
		"qcow, encrypted":           {image(at(0, "QFI\xfb\x00\x00\x00\x01")).set32(36, 1), "qcow", "encrypted! qcow"},
	} {
		t.Run(name, func(t *testing.T) {
			report := look(t, test.file)
			if report.Format != test.format || codes(report) != test.codes {
				t.Errorf("it is %s with %q, want %s with %q", report.Format, codes(report), test.format, test.codes)
			}
			if report.Longhorn.Compatible != (test.codes == "") {
				t.Errorf("compatible is %v", report.Longhorn.Compatible)
			}
			if test.format == "raw" && report.VirtualSize != int64(len(test.file)) && test.codes != "empty!" {
				t.Errorf("it is a disk of %d bytes, and the file has %d", report.VirtualSize, len(test.file))
			}
		})
	}
}

func TestQCOW2(t *testing.T) {
	const v2, v3 = 2, 3
	for name, test := range map[string]struct {
		file  image
		codes string
	}{
		"version 4":                   {qcow2(v3).set32(4, 4), "qcow2_version!"},
		"header cut, 4":               {qcow2(v2)[:4], "truncated! size_not_aligned"},
		"header cut, 2":               {qcow2(v2)[:71], "truncated! size_not_aligned"},
		"header cut, 3":               {qcow2(v3)[:103], "truncated! size_not_aligned"},
		"clusters of 256 bytes":       {qcow2(v3).set32(20, 8), "qcow2_header!"},
		"clusters of 4 MiB":           {qcow2(v3).set32(20, 22), "qcow2_header!"},
		"clusters of 2^32":            {qcow2(v3).set32(20, 1<<31), "qcow2_header!"},
		"disk of 2^64":                {qcow2(v3).set64(24, 1<<64-512), "qcow2_header!"},
		"disk of an odd size":         {qcow2(v3).set64(24, 1<<20+1), "virtual_size_not_aligned"},
		"file of an odd size":         {qcow2(v3).to(4<<16 + 8), "size_not_aligned"},
		"encrypted":                   {qcow2(v2).set32(32, 1), "encrypted!"},
		"encrypted with LUKS":         {qcow2(v3).set32(32, 2).extension(0x0537be77, strings.Repeat("x", 16)), "encrypted!"},
		"keys, though not encrypted":  {qcow2(v3).extension(0x0537be77, strings.Repeat("x", 16)), "encrypted!"},
		"backing file":                {qcow2(v2).set64(8, 512).set32(16, 11).put(512, "/etc/shadow"), "backing_file!"},
		"backing file, no length":     {qcow2(v3).set64(8, 512), "backing_file!"},
		"backing file, no place":      {qcow2(v3).set32(16, 5), "qcow2_header! backing_file!"},
		"backing file, long":          {qcow2(v3).set64(8, 512).set32(16, 1024), "qcow2_header! backing_file!"},
		"backing file, longer":        {qcow2(v3).set64(8, 512).set32(16, 1<<31), "qcow2_header! backing_file!"},
		"backing file, far":           {qcow2(v3).set64(8, 1<<16-5).set32(16, 6), "truncated! backing_file!"},
		"backing file, farthest":      {qcow2(v3).set64(8, 1<<63).set32(16, 6), "truncated! backing_file!"},
		"format of a backing file":    {qcow2(v3).extension(0xe2792aca, "raw"), ""},
		"names of features":           {qcow2(v3).extension(0x6803f857, strings.Repeat("x", 48*5)), ""},
		"unknown extension":           {qcow2(v3).extension(0x12345678, "abc").extension(0x44415441, "/etc/shadow"), "external_data!"},
		"extension beyond":            {qcow2(v3).extension(0x12345678, "").set32(116, 1<<16-119), "qcow2_header!"},
		"extension far beyond":        {qcow2(v3).extension(0x12345678, "").set32(116, 1<<32-1), "qcow2_header!"},
		"external data":               {qcow2(v3).set64(72, 4), "external_data!"},
		"external data, named":        {qcow2(v3).set64(72, 4).extension(0x44415441, "/etc/shadow"), "external_data!"},
		"external data of 2":          {qcow2(v2).extension(0x44415441, "/etc/shadow"), "external_data!"},
		"dirty":                       {qcow2(v3).set64(72, 1), ""},
		"corrupt":                     {qcow2(v3).set64(72, 2), "corrupt!"},
		"zstd":                        {qcow2(v3).set64(72, 8).put(104, "\x01"), "zstd"},
		"zlib with the bit":           {qcow2(v3).set64(72, 8), "qcow2_header!"},
		"zstd without the bit":        {qcow2(v3).put(104, "\x01"), "qcow2_header!"},
		"unknown compression":         {qcow2(v3).set64(72, 8).put(104, "\x02"), "qcow2_header!"},
		"extended L2":                 {qcow2(v3).set64(72, 16), "extended_l2"},
		"unknown feature":             {qcow2(v3).set64(72, 32), "unknown_feature!"},
		"the last feature":            {qcow2(v3).set64(72, 1<<63), "unknown_feature!"},
		"features are of 3":           {qcow2(v2).set64(72, 0).set32(100, 7), ""},
		"lazy refcounts":              {qcow2(v3).set64(80, 1), ""},
		"compatible feature":          {qcow2(v3).set64(80, 2), "compatible_features"},
		"autoclear feature":           {qcow2(v3).set64(88, 3), ""},
		"header of 104":               {qcow2(v3).set32(100, 104), ""},
		"header of 120":               {qcow2(v3).set32(100, 120), "header_length"},
		"header of 103":               {qcow2(v3).set32(100, 103), "qcow2_header!"},
		"header of 96":                {qcow2(v3).set32(100, 96), "qcow2_header!"},
		"header of 2 GiB":             {qcow2(v3).set32(100, 1<<31), "qcow2_header!"},
		"header beyond the file":      {qcow2(v3).set32(100, 1<<15)[:1<<14], "truncated!"},
		"references of 2^7 bits":      {qcow2(v3).set32(96, 7), "qcow2_header!"},
		"L1 ends with the file":       {qcow2(v3)[:3<<16+512], ""},
		"L1 beyond the file":          {qcow2(v3)[:3<<16], "truncated!"},
		"L1 across the end":           {qcow2(v3).set32(36, 65)[:3<<16+512], "truncated!"},
		"L1 far beyond":               {qcow2(v3).set64(40, 1<<63), "truncated!"},
		"L1 in no cluster":            {qcow2(v3).set64(40, 3<<16+8), "qcow2_header!"},
		"L1 in the header":            {qcow2(v3).set64(40, 0), "qcow2_header!"},
		"L1 too short":                {qcow2(v3).set64(24, 1<<29+512), "qcow2_header!"},
		"L1 too short, extended":      {qcow2(v3).set64(72, 16).set64(24, 1<<28+512), "qcow2_header! extended_l2"},
		"L1 of 32 GiB":                {qcow2(v3).set32(36, 1<<32-1), "qcow2_header!"},
		"no disk":                     {qcow2(v3).set64(24, 0).set32(36, 0).set64(40, 0), ""},
		"refcount table beyond":       {qcow2(v3).set64(48, 4<<16), "truncated!"},
		"refcount table of none":      {qcow2(v3).set32(56, 0), "qcow2_header!"},
		"refcount table of 2^32":      {qcow2(v3).set32(56, 1<<32-1), "qcow2_header!"},
		"refcount table in no place":  {qcow2(v3).set64(48, 100), "qcow2_header!"},
		"snapshots":                   {qcow2(v3).set32(60, 2).set64(64, 2<<16), ""},
		"snapshots beyond the file":   {qcow2(v3).set32(60, 2).set64(64, 4<<16), "truncated!"},
		"too many snapshots":          {qcow2(v3).set32(60, 65537).set64(64, 2<<16), "qcow2_header!"},
		"an end of the extensions":    {qcow2(v3).set64(8, 200).set32(16, 3).put(200, "abcd"), "backing_file!"},
		"too many header extensions":  {many(300), "qcow2_header!"},
		"extensions end with cluster": {many(0), ""},
	} {
		t.Run(name, func(t *testing.T) {
			report := look(t, test.file)
			if report.Format != probe.QCOW2 || codes(report) != test.codes {
				t.Errorf("it is %s with %q, want qcow2 with %q", report.Format, codes(report), test.codes)
			}
			for _, p := range report.Longhorn.Problems {
				if !strings.Contains(p.Message, "qemu-img") {
					t.Errorf("%s names no command: %s", p.Code, p.Message)
				}
			}
		})
	}
}

// many is an image with n empty extensions.
func many(n int) image {
	b := qcow2(3)
	for i := range n {
		b.set32(112+8*i, 0x12345678)
	}
	return b
}

func TestQCOW2Info(t *testing.T) {
	b := qcow2(3).set64(72, 8|1|1<<40).put(104, "\x01").set64(8, 512).set32(16, 6).put(512, "a\xffb.im")
	info := look(t, b).QCOW2
	if info.Version != 3 || info.ClusterSize != 1<<16 || info.Compression != "zstd" || info.HeaderLength != 112 {
		t.Errorf("%+v", info)
	}
	if !slices.Equal(info.IncompatibleFeatures, []string{"dirty", "compression", "bit_40"}) {
		t.Errorf("features %q", info.IncompatibleFeatures)
	}
	if info.BackingFile == nil || *info.BackingFile != "a\uFFFDb.im" {
		t.Errorf("backing file %v", info.BackingFile)
	}
	if report := look(t, qcow2(2)); report.VirtualSize != 1<<20 || report.QCOW2.HeaderLength != 72 || report.QCOW2.BackingFile != nil {
		t.Errorf("%+v %+v", report, report.QCOW2)
	}
}

// broken cannot be read beyond a point.
type broken struct {
	image
	from int64
}

var errBroken = errors.New("the disk is broken")

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > b.from {
		return 0, errBroken
	}
	return bytes.NewReader(b.image).ReadAt(p, off)
}

// What cannot be read is an error, and no judgement of the file.
func TestFileCannotBeRead(t *testing.T) {
	ctx := context.Background()
	raw := make(image, 1<<20)
	for name, b := range map[string]broken{
		"head":      {raw, 100},
		"iso":       {raw, 5000},
		"footer":    {raw, 40000},
		"extension": {qcow2(3).set32(100, 1<<13), 5000},
		"name":      {qcow2(3).set64(8, 8192).set32(16, 100), 5000},
	} {
		if report, err := probe.File(ctx, b, int64(len(b.image))); !errors.Is(err, errBroken) {
			t.Errorf("%s: %+v, %v", name, report, err)
		}
	}
	if _, err := probe.File(ctx, bytes.NewReader(raw[:100]), 200); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a file shorter than it was: %v", err)
	}
	ended, end := context.WithCancel(ctx)
	end()
	if _, err := probe.File(ended, bytes.NewReader(raw), int64(len(raw))); !errors.Is(err, context.Canceled) {
		t.Errorf("ended: %v", err)
	}
}

// bounded fails a test if much of a file is read.
type bounded struct {
	t    *testing.T
	r    io.ReaderAt
	left int
}

func (b *bounded) ReadAt(p []byte, off int64) (int, error) {
	if b.left -= len(p); b.left < 0 {
		b.t.Fatal("more than 128 KiB are read")
	}
	return b.r.ReadAt(p, off)
}

func FuzzFile(f *testing.F) {
	for _, b := range [][]byte{
		qcow2(2)[:600], qcow2(3)[:600],
		qcow2(3).set64(8, 512).set32(16, 11).put(512, "/etc/shadow")[:600],
		qcow2(3).set64(72, 4).extension(0x44415441, "data")[:600],
		qcow2(3).set64(72, 24).put(104, "\x01")[:600],
		[]byte("# Disk DescriptorFile\nversion=1\n"), []byte("<html>"), at(0, "KDMV")[:600],
	} {
		f.Add(b, int64(1<<20))
	}
	f.Fuzz(func(t *testing.T, head []byte, size int64) {
		// A file of any size, zeros after its head.
		size = max(int64(len(head)), size)
		r := &bounded{t, sparse{head, size}, 128 << 10}
		report, err := probe.File(context.Background(), r, size)
		if err != nil {
			t.Fatal(err)
		}
		if report.Longhorn.Compatible != (len(report.Longhorn.Problems) == 0) || report.VirtualSize < 0 {
			t.Errorf("%+v", report)
		}
		if report.QCOW2 != nil && report.QCOW2.BackingFile != nil && !strings.Contains(codes(report), "backing_file!") {
			t.Errorf("a backing file is accepted: %+v", report)
		}
	})
}

type sparse struct {
	head []byte
	size int64
}

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(s.head)) {
		copy(p, s.head[off:])
	}
	if left := s.size - off; left < int64(len(p)) {
		return int(max(0, left)), io.EOF
	}
	return len(p), nil
}
