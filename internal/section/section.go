// Package section is parts of files that the kernel sends.
package section

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"
)

// A Reader reads a file from its offset up to an end. It can lend the file's
// descriptor, so that the kernel sends from it.
//
// Whoever sends through the descriptor moves the file's own offset, and knows
// nothing of where the section ends: what bounds him is a limit that somebody
// has put around the reader. So the descriptor is lent only while as much is
// left as that limit lets through; the rest is to be had from Read. A reader
// belongs to one goroutine, and nobody else may move the file's offset.
type Reader struct {
	file  *os.File
	end   int64
	last  bool // the file ends there, too
	stop  int64
	limit int64
	asked bool
}

// A Writer is a writer that has a better way to take a section than to have it
// copied.
type Writer interface {
	// WriteSection takes all of a section, or fails.
	WriteSection(*Reader) (int64, error)
}

// New returns a reader of a file from its offset up to end. With last, the file
// ends there and will not grow: then no limit is needed around the reader.
// Nothing is lent before Lend.
func New(file *os.File, end int64, last bool) *Reader {
	return &Reader{file: file, end: end, last: last, stop: end, limit: math.MaxInt64}
}

// Left is how many bytes of the section are left.
func (r *Reader) Left() (int64, error) {
	at, err := r.at()
	return r.end - at, err
}

func (r *Reader) at() (int64, error) { return r.file.Seek(0, io.SeekCurrent) }

// Last reports whether the file ends where the section does.
func (r *Reader) Last() bool { return r.last }

// Lend lends the descriptor from now on, to whoever gets at most limit bytes of
// the reader at a time; 0: never more than is left. The reader ends, until Lend
// or Hold is called again, where limit does not fit another time.
func (r *Reader) Lend(limit int64) error {
	at, err := r.at()
	if err != nil {
		return err
	}
	r.limit, r.stop = limit, r.end
	if limit > 0 && !r.last {
		r.stop -= (r.end - at) % limit
	}
	return nil
}

// Hold lends the descriptor no more. The reader ends, until Lend or Hold is
// called again, after n bytes.
func (r *Reader) Hold(n int64) error {
	at, err := r.at()
	if err != nil {
		return err
	}
	r.limit, r.stop = math.MaxInt64, min(at+n, r.end)
	return nil
}

// Asked reports whether anybody has asked for the descriptor, as a connection
// does from which the kernel can send.
func (r *Reader) Asked() bool { return r.asked }

// Rewind goes back to where so many bytes of the section are left, since what
// was read was not all sent.
func (r *Reader) Rewind(left int64) error {
	_, err := r.file.Seek(r.end-left, io.SeekStart)
	return err
}

func (r *Reader) Read(p []byte) (int, error) {
	at, err := r.at()
	if err != nil {
		return 0, err
	}
	if at >= r.stop {
		return 0, io.EOF
	}
	return r.file.Read(p[:min(int64(len(p)), r.stop-at)])
}

var errHeld = errors.New("the descriptor is not lent")

// SyscallConn implements [syscall.Conn].
func (r *Reader) SyscallConn() (syscall.RawConn, error) {
	r.asked = true
	at, err := r.at()
	if err != nil {
		return nil, err
	}
	if r.limit == math.MaxInt64 || !r.last && r.stop-at < r.limit {
		return nil, errHeld
	}
	return r.file.SyscallConn()
}

// WriteTo lets a [Writer] take the section, and copies it to any other.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	if sections, ok := w.(Writer); ok {
		return sections.WriteSection(r)
	}
	if err := r.Hold(r.end); err != nil {
		return 0, err
	}
	return io.Copy(w, struct{ io.Reader }{r})
}

// Reopen opens a file again, for an offset of one's own, whatever has become of
// its name. Where the system cannot do that, it fails.
func Reopen(file *os.File) (again *os.File, err error) {
	conn, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := conn.Control(func(fd uintptr) {
		again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	})
	return again, errors.Join(controlErr, err)
}
