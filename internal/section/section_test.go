package section_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/caddy-registry/mirror/internal/section"
)

// open returns a file of 100 bytes at an offset.
func open(t *testing.T, at int64) (*os.File, []byte) {
	data := make([]byte, 100)
	for i := range data {
		data[i] = byte(i)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if _, err := file.Seek(at, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return file, data
}

// TestLending: the descriptor is there only while what stands around the reader
// cannot let more through than is left.
func TestLending(t *testing.T) {
	file, data := open(t, 10)
	r := section.New(file, 60, false)
	lent := func(want bool) {
		t.Helper()
		if _, err := r.SyscallConn(); (err == nil) != want {
			t.Errorf("lent: %v, want %v", err == nil, want)
		}
	}
	next := func(from, to int) {
		t.Helper()
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data[from:to]) {
			t.Errorf("read %v, %v, want from %d to %d", got, err, from, to)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if r.Asked() {
		t.Error("nobody has asked")
	}
	lent(false)
	if !r.Asked() {
		t.Error("somebody has asked")
	}
	do(r.Hold(5))
	lent(false)
	next(10, 15)
	do(r.Lend(20)) // 45 are left
	lent(true)
	io.ReadFull(r, make([]byte, 21))
	lent(false)
	next(36, 55)
	lent(false)
	do(r.Rewind(25))
	do(r.Lend(0))
	lent(true)
	next(35, 60)
	if left, err := r.Left(); left != 0 || err != nil {
		t.Error(left, err)
	}

	file, data = open(t, 10)
	r = section.New(file, 100, true)
	lent(false)
	do(r.Lend(40))
	io.ReadFull(r, make([]byte, 85))
	lent(true) // nothing comes after its end
	next(95, 100)
}

// TestWriteTo: who knows nothing of sections gets bytes, and never a descriptor.
func TestWriteTo(t *testing.T) {
	file, data := open(t, 10)
	r := section.New(file, 60, false)
	if err := r.Lend(0); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if n, err := io.Copy(&got, r); n != 50 || err != nil || !bytes.Equal(got.Bytes(), data[10:60]) || r.Asked() {
		t.Errorf("%d bytes, %v, asked: %v", n, err, r.Asked())
	}
	again, err := section.Reopen(file)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if at, err := again.Seek(0, io.SeekCurrent); at != 0 || err != nil {
		t.Errorf("reopened at %d, %v", at, err)
	}
}
