package probe_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/caddy-registry/mirror/internal/backing/probe"
)

// content is n bytes, half of which compress.
func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := 0; i < n; i += 512 {
		if i/512%2 == 0 {
			continue
		}
		for j := i; j < min(n, i+512); j++ {
			b[j] = byte(r.Uint32())
		}
	}
	return b
}

// compress is how the tests make files of each kind.
var compress = map[string]func(*testing.T, []byte) []byte{
	"gz": func(t *testing.T, b []byte) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		return finish(t, w, &out, b)
	},
	"zst": func(t *testing.T, b []byte) []byte {
		var out bytes.Buffer
		w, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		return finish(t, w, &out, b)
	},
	"xz": func(t *testing.T, b []byte) []byte { return xzOf(t, xz.CRC64, b) },
}

func finish(t *testing.T, w io.WriteCloser, out *bytes.Buffer, b []byte) []byte {
	t.Helper()
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// xzOf makes a stream of several blocks.
func xzOf(t *testing.T, check byte, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	c := xz.WriterConfig{CheckSum: check, BlockSize: 20000}
	if check == xz.None {
		c.NoCheckSum = true
	}
	w, err := c.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, w, &out, b)
}

func decompress(kind string, r io.Reader) ([]byte, error) {
	d, err := probe.Decompress(kind, r)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return io.ReadAll(d)
}

func TestDecompress(t *testing.T) {
	one, two := content(70001), content(333)
	for kind, make := range compress {
		t.Run(kind, func(t *testing.T) {
			packed := make(t, one)
			if is := probe.Compression(packed[:16]); is != kind {
				t.Errorf("it is taken for %q", is)
			}
			several := bytes.Join([][]byte{packed, make(t, two), make(t, nil), make(t, two)}, nil)
			want := bytes.Join([][]byte{one, two, two}, nil)
			for name, r := range map[string]io.Reader{
				"at once":        bytes.NewReader(several),
				"byte by byte":   iotest.OneByteReader(bytes.NewReader(several)),
				"error with end": iotest.DataErrReader(bytes.NewReader(several)),
			} {
				if got, err := decompress(kind, r); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
				}
			}
		})
	}
}

func TestDecompressChecks(t *testing.T) {
	want := content(50000)
	for _, check := range []byte{xz.None, xz.CRC32, xz.CRC64, xz.SHA256} {
		if got, err := decompress("xz", bytes.NewReader(xzOf(t, check, want))); err != nil || !bytes.Equal(got, want) {
			t.Errorf("check %d: %d bytes, %v", check, len(got), err)
		}
	}
	padded := append(xzOf(t, xz.CRC32, want), make([]byte, 8)...)
	if got, err := decompress("xz", bytes.NewReader(padded)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("with zeros behind it: %d bytes, %v", len(got), err)
	}
}

// A file that was cut anywhere must not seem to be a shorter one.
func TestDecompressCut(t *testing.T) {
	for kind, make := range compress {
		t.Run(kind, func(t *testing.T) {
			packed := make(t, content(1200))
			for n := 1; n < len(packed); n++ {
				if got, err := decompress(kind, bytes.NewReader(packed[:n])); err == nil {
					t.Errorf("cut after %d of %d bytes, it is %d bytes without an error", n, len(packed), len(got))
				}
			}
		})
	}
}

// A bit that is wrong must not give other bytes without an error.
func TestDecompressDamaged(t *testing.T) {
	for kind, make := range compress {
		t.Run(kind, func(t *testing.T) {
			want := content(1200)
			packed := make(t, want)
			for i := range packed {
				bad := bytes.Clone(packed)
				bad[i] ^= 0x10
				if got, err := decompress(kind, bytes.NewReader(bad)); err == nil && !bytes.Equal(got, want) {
					t.Errorf("byte %d is wrong, and it is %d other bytes without an error", i, len(got))
				}
			}
		})
	}
}

func TestDecompressNeedsTooMuchMemory(t *testing.T) {
	// A frame that wants a window of 2 GiB, and an empty last block.
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 1, 0, 0}
	if _, err := decompress("zst", bytes.NewReader(frame)); err == nil {
		t.Error("a window of 2 GiB is no error")
	}
	// A stream whose first block wants a dictionary of 4 GiB.
	head := xzOf(t, xz.CRC32, nil)[:12]
	block := []byte{2, 0, 0x21, 1, 40, 0, 0, 0}
	block = binary.LittleEndian.AppendUint32(block, crc32.ChecksumIEEE(block))
	_, err := decompress("xz", bytes.NewReader(append(append(head, block...), 0, 0, 0, 0)))
	if err == nil || !strings.Contains(err.Error(), "exceeds max") {
		t.Errorf("a dictionary of 4 GiB: %v", err)
	}
}

func TestDecompressUnknown(t *testing.T) {
	if _, err := probe.Decompress("bz2", strings.NewReader("BZh9")); err == nil {
		t.Error("no error")
	}
	if kind := probe.Compression([]byte("plain")); kind != "" {
		t.Errorf("plain bytes are taken for %q", kind)
	}
}

func FuzzDecompress(f *testing.F) {
	for kind, make := range compress {
		f.Add(kind, make(&testing.T{}, content(2000)))
	}
	f.Fuzz(func(t *testing.T, kind string, data []byte) {
		d, err := probe.Decompress(kind, bytes.NewReader(data))
		if err != nil {
			return
		}
		defer d.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(d, 16<<20))
	})
}
