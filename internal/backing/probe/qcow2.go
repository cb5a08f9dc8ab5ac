package probe

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strings"
)

// What the header of a qcow2 file holds, and where, is QEMU's docs/interop/qcow2.txt;
// the limits are those of its block/qcow2.c, and its programs open nothing beyond.
const (
	qcow2HeaderV2 = 72
	qcow2HeaderV3 = 104

	maxBackingName = 1023
	maxL1          = 32 << 20 // bytes
	maxRefTable    = 8 << 20  // bytes
	maxSnapshots   = 65536
	maxExtensions  = 256

	extEnd        = 0
	extEncryption = 0x0537be77
	extData       = 0x44415441
)

// Bits of incompatible features.
var incompatible = []string{"dirty", "corrupt", "external_data", "compression", "extended_l2"}

const (
	bitCorrupt     = 1 << 1
	bitData        = 1 << 2
	bitCompression = 1 << 3
	bitExtendedL2  = 1 << 4
)

// qcow judges the header of a qcow2 image, and of its predecessor.
func (p *Report) qcow(r io.ReaderAt, size int64, head []byte) error {
	if len(head) < 8 {
		p.Format = QCOW2
		p.truncated("its header")
		return nil
	}
	switch version := binary.BigEndian.Uint32(head[4:]); version {
	case 1:
		p.qcow1(head)
		return nil
	case 2, 3:
		p.Format = QCOW2
		return p.qcow2(r, size, head, int(version))
	default:
		p.Format = QCOW2
		p.refuse("qcow2_version", "the image is of version %d of qcow2, and versions 2 and 3 are known: make another by 'qemu-img convert -O qcow2 -o compat=1.1 IMAGE NEW'", version)
		return nil
	}
}

// qcow1 judges an image of before qcow2.
func (p *Report) qcow1(head []byte) {
	p.Format = "qcow"
	p.add("qcow", convert("an image of the old qcow", "qcow"))
	if len(head) < 48 {
		p.truncated("its header")
		return
	}
	if binary.BigEndian.Uint64(head[8:]) != 0 || binary.BigEndian.Uint32(head[16:]) != 0 {
		p.backed(nil)
	}
	if binary.BigEndian.Uint32(head[36:]) != 0 {
		p.encrypted()
	}
}

func (p *Report) qcow2(r io.ReaderAt, size int64, head []byte, version int) error {
	info := &QCOW2Info{Version: version, Compression: "zlib", IncompatibleFeatures: []string{}, HeaderLength: qcow2HeaderV2}
	p.QCOW2 = info
	need := qcow2HeaderV2
	if version == 3 {
		need = qcow2HeaderV3
	}
	if len(head) < need {
		p.truncated("its header")
		return nil
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(head[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(head[at:]) }

	bits := u32(20)
	if bits < 9 || bits > 21 {
		p.header("its clusters have 2^%d bytes, where 2^9 to 2^21 are allowed", bits)
		return nil
	}
	cluster := int64(1) << bits
	info.ClusterSize = cluster
	if u64(24) > math.MaxInt64-sector {
		p.header("its disk has %d bytes", u64(24))
		return nil
	}
	p.VirtualSize = int64(u64(24))

	var incompat uint64
	if version == 3 {
		incompat = u64(72)
		length := u32(100)
		if length < qcow2HeaderV3 || length%8 != 0 || int64(length) > cluster {
			p.header("it has a header of %d bytes", length)
			return nil
		}
		if int64(length) > size {
			p.truncated("its header")
			return nil
		}
		info.HeaderLength = int(length)
		p.features(incompat, head)
		if compat := u64(80); compat&^1 != 0 {
			p.add("compatible_features", fmt.Sprintf("the image has compatible features (%#x) that Longhorn's reader refuses: make another by 'qemu-img convert -O qcow2 IMAGE NEW'", compat))
		}
		if length != 104 && length != 112 {
			p.add("header_length", fmt.Sprintf("the image has a header of %d bytes, and Longhorn's reader knows those of 104 and 112: make another by 'qemu-img convert -O qcow2 IMAGE NEW'", length))
		}
		if order := u32(96); order > 6 {
			p.header("its references are counted in 2^%d bits, where at most 2^6 are allowed", order)
		}
	}
	if p.VirtualSize%sector != 0 {
		p.add("virtual_size_not_aligned", fmt.Sprintf("the disk has %d bytes, and Longhorn takes only multiples of 512: enlarge it by 'qemu-img resize IMAGE %d'", p.VirtualSize, p.VirtualSize-p.VirtualSize%sector+sector))
	}
	if method := u32(32); method != 0 {
		p.encrypted()
	}

	entry := int64(8)
	if incompat&bitExtendedL2 != 0 {
		entry = 16
	}
	p.tables(size, cluster, entry, u64, u32)

	end := min(cluster, size)
	if at, length := u64(8), u32(16); at != 0 || length != 0 {
		var name []byte
		switch {
		case length > maxBackingName:
			p.header("the name of its backing file has %d bytes, where %d are allowed", length, maxBackingName)
		case at > uint64(end) || uint64(length) > uint64(end)-at:
			p.truncated("the name of its backing file")
		case at < uint64(info.HeaderLength):
			p.header("the name of its backing file lies in its header")
		default:
			var err error
			if name, err = readAt(r, int64(at), int64(length)); err != nil {
				return err
			}
			end = int64(at)
		}
		p.backed(name)
	}
	return p.extensions(r, int64(info.HeaderLength), end)
}

// features names the incompatible features of an image, and says which of them are
// wrong.
func (p *Report) features(bits uint64, head []byte) {
	info := p.QCOW2
	for i := range 64 {
		if bits&(1<<i) == 0 {
			continue
		}
		if i < len(incompatible) {
			info.IncompatibleFeatures = append(info.IncompatibleFeatures, incompatible[i])
			continue
		}
		info.IncompatibleFeatures = append(info.IncompatibleFeatures, fmt.Sprintf("bit_%d", i))
	}
	if bits>>len(incompatible) != 0 {
		// By QEMU's definition nobody may open what has a bit that he does not know.
		p.refuse("unknown_feature", "the image has features (%s) that change what its bytes mean, and that nobody here knows: make another by 'qemu-img convert -O qcow2 IMAGE NEW'", strings.Join(info.IncompatibleFeatures, ", "))
	}
	if bits&bitCorrupt != 0 {
		p.refuse("corrupt", "the image is marked as damaged: look at what 'qemu-img check IMAGE' says, repair it by 'qemu-img check -r all IMAGE', and compare what is in it")
	}
	if bits&bitData != 0 {
		p.external()
	}
	if bits&bitExtendedL2 != 0 {
		p.add("extended_l2", "the image has extended L2 entries, which Longhorn's reader refuses: make another by 'qemu-img convert -O qcow2 -o extended_l2=off IMAGE NEW'")
	}
	kind := byte(0)
	if info.HeaderLength > qcow2HeaderV3 {
		kind = head[104]
	}
	switch {
	case kind == 0 && bits&bitCompression == 0:
	case kind == 1 && bits&bitCompression != 0:
		info.Compression = "zstd"
		p.add("zstd", "the clusters of the image are compressed with zstd, which Longhorn's reader refuses: make another by 'qemu-img convert -O qcow2 -c -o compression_type=zlib IMAGE NEW'")
	default:
		info.Compression = "unknown"
		p.header("the kind of its compression is %d, and the bit that announces one says otherwise", kind)
	}
}

// tables looks whether the tables of an image lie inside the file.
func (p *Report) tables(size, cluster, entry int64, u64 func(int) uint64, u32 func(int) uint32) {
	inside := func(what string, at uint64, length int64) {
		switch {
		case at%uint64(cluster) != 0 || at == 0:
			p.header("%s begins at %d, where no cluster does that could hold it", what, at)
		case at > uint64(size) || uint64(length) > uint64(size)-at:
			p.truncated(what)
		}
	}
	// One entry of L1 stands for a cluster of entries of L2, each of them for a cluster.
	each := cluster / entry * cluster
	l1 := int64(u32(36))
	switch need := p.VirtualSize/each + min(1, p.VirtualSize%each); {
	case l1*8 > maxL1:
		p.header("its L1 table has %d entries", l1)
	case l1 < need:
		p.header("its L1 table has %d entries, and its disk needs %d", l1, need)
	case l1 > 0:
		inside("its L1 table", u64(40), l1*8)
	}
	if clusters := int64(u32(56)); clusters == 0 || clusters > maxRefTable/cluster+1 {
		p.header("its refcount table has %d clusters", clusters)
	} else {
		inside("its refcount table", u64(48), clusters*cluster)
	}
	if n := u32(60); n > maxSnapshots {
		p.header("it has %d snapshots", n)
	} else if n > 0 {
		// An entry has 40 bytes at least.
		inside("its table of snapshots", u64(64), int64(n)*40)
	}
}

// extensions goes through the header's extensions, from one offset to another.
func (p *Report) extensions(r io.ReaderAt, at, end int64) error {
	var data, encryption bool
	for range maxExtensions {
		if at+8 > end {
			return nil
		}
		head, err := readAt(r, at, 8)
		if err != nil {
			return err
		}
		kind, length := binary.BigEndian.Uint32(head), int64(binary.BigEndian.Uint32(head[4:]))
		if kind == extEnd {
			return nil
		}
		at += 8
		if length > end-at {
			p.header("an extension of its header (%#x) has %d bytes, and %d are left", kind, length, end-at)
			return nil
		}
		at += (length + 7) &^ 7
		// The name of the backing file's format means nothing without one, the names
		// of features are for messages, and bitmaps are of no use to a new disk.
		switch kind {
		case extData:
			if !data {
				p.external()
			}
			data = true
		case extEncryption:
			if !encryption {
				p.encrypted()
			}
			encryption = true
		}
	}
	p.header("its header has more than %d extensions", maxExtensions)
	return nil
}

// refuseOnce adds a problem that is found in several places once.
func (p *Report) refuseOnce(code, message string) {
	for _, known := range p.Longhorn.Problems {
		if known.Code == code {
			return
		}
	}
	p.refuse(code, "%s", message)
}

func (p *Report) header(format string, args ...any) {
	p.refuse("qcow2_header", "the image cannot be right: %s; look at what 'qemu-img info IMAGE' and 'qemu-img check IMAGE' say, and make another by 'qemu-img convert -O qcow2 IMAGE NEW'", fmt.Sprintf(format, args...))
}

func (p *Report) truncated(what string) {
	p.refuse("truncated", "the file ends before %s does: transfer it again, and look at what 'qemu-img check IMAGE' says where it comes from", what)
}

func (p *Report) backed(name []byte) {
	text := strings.ToValidUTF8(string(name), "\uFFFD")
	of := "another file"
	if text != "" {
		of = fmt.Sprintf("the file %q", text)
	}
	if p.QCOW2 != nil {
		p.QCOW2.BackingFile = &text
	}
	p.refuse("backing_file", "the image is only what differs from %s: on the machine that has both, make one file of them by 'qemu-img convert -O qcow2 IMAGE NEW'", of)
}

func (p *Report) encrypted() {
	p.refuseOnce("encrypted", "the image is encrypted, and nobody here has the key: decrypt it by 'qemu-img convert --object secret,id=s,file=PASSWORD --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=IMAGE -O qcow2 NEW', and let Longhorn encrypt the volume")
}

func (p *Report) external() {
	p.refuseOnce("external_data", "the image keeps its data in another file: on the machine that has both, make one file of them by 'qemu-img convert -O qcow2 IMAGE NEW'")
}
