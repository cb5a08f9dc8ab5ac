package probe

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"math"

	"github.com/ulikunitz/xz/lzma"
)

// An xzReader decompresses the xz container (The .xz File Format, version 1.2.1):
// streams of blocks, with an index at the end of each. Its decoder of LZMA2 allocates
// the dictionary that it is told of, so who tells it has to look at the size first.
type xzReader struct {
	in   *bufio.Reader
	at   int64 // in the input
	err  error // what every further Read returns
	open bool  // a stream has begun and not ended
	none bool  // no stream has begun yet

	flags  [2]byte // of the stream
	blocks int64   // of the stream
	sizes  hash.Hash

	// Of the block that is being read; body is nil between blocks.
	body  io.Reader
	check hash.Hash // nil where the stream has none
	begin int64     // where the block begins in the input
	size  int64     // of what has been read of it

	// What the block's header says of its sizes, or -1.
	wantPacked, wantSize int64
	dataAt               int64
}

var errXZ = errors.New("the xz data are damaged")

func newXZ(r io.Reader) (*xzReader, error) {
	x := &xzReader{in: bufio.NewReaderSize(r, 64<<10), none: true}
	if err := x.stream(); err != nil {
		return nil, unexpected(err)
	}
	return x, nil
}

func (x *xzReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, x.err
	}
	for x.err == nil {
		if x.body == nil {
			x.err = x.next()
			continue
		}
		n, err := x.body.Read(p)
		x.size += int64(n)
		if x.check != nil {
			x.check.Write(p[:n])
		}
		if errors.Is(err, io.EOF) {
			err = unexpected(x.endBlock())
		}
		x.err = unexpected(err)
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

func (x *xzReader) Close() error {
	x.err = errors.New("the decompression is closed")
	return nil
}

// unexpected makes the end of the input an error: every place but one is inside
// something.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// counted is the input for those who count what they read of it.
type counted struct{ x *xzReader }

func (c counted) Read(p []byte) (int, error) {
	n, err := c.x.in.Read(p)
	c.x.at += int64(n)
	return n, err
}

func (x *xzReader) read(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(counted{x}, b)
	return b, err
}

// next goes on to the next block. Its error is io.EOF after the last.
func (x *xzReader) next() error {
	if !x.open {
		return x.stream()
	}
	x.begin = x.at
	size, err := x.read(1)
	if err != nil {
		return unexpected(err)
	}
	if size[0] == 0 {
		return unexpected(x.index())
	}
	return unexpected(x.block(size[0]))
}

// stream begins a stream. Zeros between two of them are skipped in groups of four.
func (x *xzReader) stream() error {
	var head []byte
	for {
		var err error
		if head, err = x.read(4); err != nil {
			return err // io.EOF only where a stream might begin
		}
		if x.none || binary.LittleEndian.Uint32(head) != 0 {
			break
		}
	}
	rest, err := x.read(8)
	if err != nil {
		return unexpected(err)
	}
	head = append(head, rest...)
	if !bytes.HasPrefix(head, xzMagic) || crc32.ChecksumIEEE(head[6:8]) != binary.LittleEndian.Uint32(head[8:]) {
		return fmt.Errorf("%w: what follows byte %d is no stream", errXZ, x.at-12)
	}
	if _, err := checkOf(head[7]); err != nil || head[6] != 0 {
		return fmt.Errorf("%w: a kind of check (%#x) that nobody here knows", errXZ, head[6:8])
	}
	x.flags = [2]byte(head[6:8])
	x.none, x.open, x.blocks, x.sizes = false, true, 0, sha256.New()
	return nil
}

// checkOf returns the hash of a stream's blocks by its flags, nil for none.
func checkOf(flag byte) (hash.Hash, error) {
	switch flag {
	case 0:
		return nil, nil
	case 1:
		return crc32.NewIEEE(), nil
	case 4:
		return crc64.New(crc64Table), nil
	case 10:
		return sha256.New(), nil
	}
	return nil, errXZ
}

var crc64Table = crc64.MakeTable(crc64.ECMA)

// block begins a block, whose first byte says how long its header is.
func (x *xzReader) block(size byte) error {
	rest, err := x.read((int(size)+1)*4 - 1)
	if err != nil {
		return err
	}
	head := append([]byte{size}, rest[:len(rest)-4]...)
	if crc32.ChecksumIEEE(head) != binary.LittleEndian.Uint32(rest[len(rest)-4:]) {
		return fmt.Errorf("%w: the header of a block at byte %d", errXZ, x.begin)
	}
	flags, fields := head[1], bytes.NewReader(head[2:])
	x.wantPacked, x.wantSize = -1, -1
	if flags&0x40 != 0 {
		if x.wantPacked, err = number(fields); err != nil {
			return err
		}
	}
	if flags&0x80 != 0 {
		if x.wantSize, err = number(fields); err != nil {
			return err
		}
	}
	filter, err := number(fields)
	if err != nil {
		return err
	}
	if flags&0x3f != 0 || filter != 0x21 {
		return errors.New("the xz data are filtered for a processor or a format, which nobody here can undo: compress the image by 'xz -9 IMAGE'")
	}
	if n, err := number(fields); err != nil || n != 1 {
		return fmt.Errorf("%w: the header of a block at byte %d", errXZ, x.begin)
	}
	code, err := fields.ReadByte()
	if err != nil {
		return err
	}
	dictionary, err := lzma.DecodeDictCap(code)
	if err != nil {
		return fmt.Errorf("%w: %w", errXZ, err)
	}
	if dictionary > maxWindow {
		return fmt.Errorf("the xz data need %d bytes of memory, and %d are allowed: compress the image by 'xz -9 IMAGE'", dictionary, maxWindow)
	}
	if x.check, err = checkOf(x.flags[1]); err != nil {
		return err
	}
	x.size, x.dataAt = 0, x.at
	x.body, err = lzma.Reader2Config{DictCap: max(int(dictionary), lzma.MinDictCap)}.NewReader2(counted{x})
	return err
}

// endBlock looks whether a block is what its header and its check say.
func (x *xzReader) endBlock() error {
	packed := x.at - x.dataAt
	padding, err := x.read(int(-packed & 3))
	if err != nil {
		return err
	}
	var sum []byte
	if x.check != nil {
		if sum, err = x.read(x.check.Size()); err != nil {
			return err
		}
		is := x.check.Sum(nil)
		if x.check.Size() < sha256.Size {
			// The CRCs are stored with their lowest byte first.
			for i := range len(is) / 2 {
				is[i], is[len(is)-1-i] = is[len(is)-1-i], is[i]
			}
		}
		if !bytes.Equal(is, sum) {
			return fmt.Errorf("%w: the check of a block at byte %d", errXZ, x.begin)
		}
	}
	if x.wantPacked >= 0 && x.wantPacked != packed || x.wantSize >= 0 && x.wantSize != x.size || len(bytes.Trim(padding, "\x00")) != 0 {
		return fmt.Errorf("%w: the sizes of a block at byte %d", errXZ, x.begin)
	}
	x.body = nil
	x.blocks++
	x.record(x.sizes, x.dataAt-x.begin+packed+int64(len(sum)), x.size)
	return nil
}

// record adds the sizes of a block to a hash: of them all, the index is compared by
// that, and no list of them is kept.
func (x *xzReader) record(h hash.Hash, packed, size int64) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], uint64(packed))
	binary.LittleEndian.PutUint64(b[8:], uint64(size))
	h.Write(b[:])
}

// index reads the index and the footer of a stream.
func (x *xzReader) index() error {
	sum := crc32.NewIEEE()
	sum.Write([]byte{0})
	in := byteReader{io.TeeReader(counted{x}, sum)}
	n, err := number(in)
	if err != nil {
		return err
	}
	if n != x.blocks {
		return fmt.Errorf("%w: there are %d blocks, and its index has %d", errXZ, x.blocks, n)
	}
	is := sha256.New()
	for range n {
		packed, err := number(in)
		if err != nil {
			return err
		}
		size, err := number(in)
		if err != nil {
			return err
		}
		x.record(is, packed, size)
	}
	if !bytes.Equal(is.Sum(nil), x.sizes.Sum(nil)) {
		return fmt.Errorf("%w: its index has other sizes than its blocks", errXZ)
	}
	for (x.at-x.begin)&3 != 0 {
		b, err := in.ReadByte()
		if err != nil {
			return err
		}
		if b != 0 {
			return fmt.Errorf("%w: its index", errXZ)
		}
	}
	want := sum.Sum32()
	tail, err := x.read(4)
	if err != nil {
		return err
	}
	length := x.at - x.begin
	footer, err := x.read(12)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(tail) != want ||
		crc32.ChecksumIEEE(footer[4:10]) != binary.LittleEndian.Uint32(footer) ||
		(int64(binary.LittleEndian.Uint32(footer[4:]))+1)*4 != length ||
		[2]byte(footer[8:10]) != x.flags || string(footer[10:]) != "YZ" {
		return fmt.Errorf("%w: the end of a stream at byte %d", errXZ, x.at)
	}
	x.open = false
	return nil
}

type byteReader struct{ io.Reader }

func (r byteReader) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r.Reader, b[:])
	return b[0], err
}

// number reads a number as the container stores it: seven bits a byte, the lowest
// first, in at most nine bytes.
func number(r io.ByteReader) (int64, error) {
	n, err := binary.ReadUvarint(r)
	if err != nil {
		return 0, err
	}
	if n > math.MaxInt64 {
		return 0, errXZ
	}
	return int64(n), nil
}
