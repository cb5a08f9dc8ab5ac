package probe

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

var (
	qcowMagic = []byte("QFI\xfb")
	vhdMagic  = []byte("conectix")
	gzMagic   = []byte{0x1f, 0x8b, 8}
	xzMagic   = []byte{0xfd, '7', 'z', 'X', 'Z', 0}
	zstMagic  = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// A magic is how files of a format begin.
type magic struct {
	format  Format
	code    string
	message string
	begins  func(head []byte) bool
	// dependent says why a file of the format is none without another file, or
	// nothing.
	dependent func(r io.ReaderAt, size int64, head []byte) (string, error)
}

var magics = []magic{
	{format: "vmdk", code: "vmdk", message: convert("a VMDK", "vmdk"), begins: at(0, "KDMV"), dependent: vmdkParent},
	{format: "vmdk", code: "vmdk", message: convert("a VMDK", "vmdk"), begins: at(0, "COWD"), dependent: vmdkParent},
	{format: "vmdk", code: "vmdk", message: convert("a VMDK", "vmdk"), begins: vmdkText, dependent: func(io.ReaderAt, int64, []byte) (string, error) {
		return "the file is the description of a VMDK, and names the files that hold the disk: on the machine that has them, make one file of it by 'qemu-img convert -f vmdk -O qcow2 IMAGE NEW'", nil
	}},
	{format: "vhd", code: "vhd", message: convert("a VHD", "vpc"), begins: at(0, string(vhdMagic)), dependent: vhdParent},
	{format: "vhdx", code: "vhdx", message: convert("a VHDX", "vhdx"), begins: at(0, "vhdxfile")},
	{format: "vdi", code: "vdi", message: convert("a VDI", "vdi"), begins: at(64, "\x7f\x10\xda\xbe"), dependent: vdiParent},
	{format: "qed", code: "qed", message: convert("a QED image", "qed"), begins: at(0, "QED\x00"), dependent: qedParent},
	{format: "parallels", code: "parallels", message: convert("a Parallels disk", "parallels"), begins: at(0, "WithoutFreeSpace")},
	{format: "parallels", code: "parallels", message: convert("a Parallels disk", "parallels"), begins: at(0, "WithouFreSpacExt")},
	{format: "luks", code: "luks", message: "the file is a LUKS container, which Longhorn does not take for a disk: decrypt it by 'qemu-img convert --object secret,id=s,file=PASSWORD --image-opts driver=luks,key-secret=s,file.filename=IMAGE -O qcow2 NEW', and let Longhorn encrypt the volume", begins: at(0, "LUKS\xba\xbe")},

	{format: "gz", code: "compressed", message: compressed("gz", "gunzip IMAGE"), begins: at(0, string(gzMagic))},
	{format: "xz", code: "compressed", message: compressed("xz", "unxz IMAGE"), begins: at(0, string(xzMagic))},
	{format: "zst", code: "compressed", message: compressed("zst", "unzstd IMAGE"), begins: zst},
	{format: "bz2", code: "compressed", message: "the file is compressed with bzip2, which Longhorn keeps as it is: unpack it by 'bunzip2 IMAGE' first", begins: bz2},
	{format: "zip", code: "archive", message: archive("a zip", "unzip IMAGE"), begins: at(0, "PK\x03\x04", "PK\x05\x06")},
	{format: "7z", code: "archive", message: archive("a 7z", "7z x IMAGE"), begins: at(0, "7z\xbc\xaf\x27\x1c")},
	{format: "tar", code: "archive", message: archive("a tar", "tar -xf IMAGE"), begins: at(257, "ustar")},

	{format: "html", code: "html", message: page("HTML"), begins: text("<!doctype html", "<html", "<head", "<body")},
	{format: "xml", code: "xml", message: page("XML"), begins: text("<?xml", "<error", "<!doctype")},
}

func convert(what, driver string) string {
	return fmt.Sprintf("the file is %s, and Longhorn reads raw and qcow2 only: convert it by 'qemu-img convert -f %s -O qcow2 IMAGE NEW'", what, driver)
}

func compressed(kind, command string) string {
	return fmt.Sprintf("the file is compressed with %s, which Longhorn keeps as it is: have it decompressed here (decompress: %[1]s, or auto), or unpack it by '%s' first", kind, command)
}

func archive(what, command string) string {
	return fmt.Sprintf("the file is %s archive: unpack it by '%s', and send the disk image in it", what, command)
}

func page(kind string) string {
	return fmt.Sprintf("the file is a page of %s, as a server sends instead of a file to say what is wrong: look at it, and at the address it came from", kind)
}

// byMagic returns what files like this are, if not raw, ISO or qcow2.
func byMagic(head []byte) *magic {
	for i := range magics {
		if magics[i].begins(head) {
			return &magics[i]
		}
	}
	return nil
}

// at matches what has one of some bytes at an offset.
func at(offset int, any ...string) func([]byte) bool {
	return func(head []byte) bool {
		for _, want := range any {
			if len(head) >= offset && bytes.HasPrefix(head[offset:], []byte(want)) {
				return true
			}
		}
		return false
	}
}

// text matches a page that begins with one of some words, in any case.
func text(any ...string) func([]byte) bool {
	return func(head []byte) bool {
		head = bytes.TrimPrefix(head, []byte("\xef\xbb\xbf"))
		head = bytes.TrimLeft(head, " \t\r\n")
		for _, want := range any {
			if len(head) >= len(want) && bytes.EqualFold(head[:len(want)], []byte(want)) {
				return true
			}
		}
		return false
	}
}

// zst matches a frame of zstandard, or one that decoders skip; see RFC 8878.
func zst(head []byte) bool {
	if bytes.HasPrefix(head, zstMagic) {
		return true
	}
	return len(head) >= 4 && binary.LittleEndian.Uint32(head)&^0xf == 0x184d2a50
}

// bz2 matches "BZh", a level, and how a block or the end begins.
func bz2(head []byte) bool {
	return len(head) >= 10 && bytes.HasPrefix(head, []byte("BZh")) && head[3] >= '1' && head[3] <= '9' &&
		(string(head[4:10]) == "1AY&SY" || string(head[4:10]) == "\x17\x72\x45\x38\x50\x90")
}

// vmdkText matches the text that describes a VMDK of several files. QEMU finds it by
// its version after comments and blank lines (block/vmdk.c, vmdk_probe).
func vmdkText(head []byte) bool {
	for len(head) > 0 {
		line, rest, _ := bytes.Cut(head, []byte("\n"))
		line = bytes.TrimRight(line, "\r")
		switch {
		case bytes.HasPrefix(line, []byte("#")), len(bytes.TrimLeft(line, " ")) == 0:
			head = rest
			continue
		}
		return bytes.HasPrefix(line, []byte("version="))
	}
	return false
}

// vmdkParent looks for the name of a parent in the description that a sparse VMDK
// holds near its beginning.
func vmdkParent(r io.ReaderAt, size int64, _ []byte) (string, error) {
	head, err := readAt(r, 0, min(size, 64<<10))
	if err != nil || !bytes.Contains(head, []byte("parentFileNameHint")) {
		return "", err
	}
	return based("vmdk"), nil
}

// vhdParent: disk type 4 is a differencing disk.
func vhdParent(_ io.ReaderAt, _ int64, head []byte) (string, error) {
	if len(head) >= 64 && binary.BigEndian.Uint32(head[60:]) == 4 {
		return based("vpc"), nil
	}
	return "", nil
}

// vdiParent: image type 4 is a difference.
func vdiParent(_ io.ReaderAt, _ int64, head []byte) (string, error) {
	if len(head) >= 80 && binary.LittleEndian.Uint32(head[76:]) == 4 {
		return based("vdi"), nil
	}
	return "", nil
}

// qedParent: feature bit 0 is a backing file.
func qedParent(_ io.ReaderAt, _ int64, head []byte) (string, error) {
	if len(head) >= 24 && binary.LittleEndian.Uint64(head[16:])&1 != 0 {
		return based("qed"), nil
	}
	return "", nil
}

func based(driver string) string {
	return fmt.Sprintf("the image is only what differs from another file: on the machine that has both, make one file of them by 'qemu-img convert -f %s -O qcow2 IMAGE NEW'", driver)
}
