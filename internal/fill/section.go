package fill

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// A Section is what a reader may have of a file now. It lends the file's
// descriptor, so that the kernel can send from it.
//
// Whoever sends through the descriptor moves the file's own offset, and knows
// nothing of where the section ends. So the descriptor is lent only while at
// least Chunk bytes are left; the rest is to be had from Read.
type Section struct {
	// Chunk is the most that is sent from the descriptor before it is asked for
	// again; 0: never more than is left.
	Chunk int64

	file *os.File
	end  int64
}

// A SectionWriter is a writer that has a better way to take a section than to
// have it copied.
type SectionWriter interface {
	// WriteSection takes all of a section.
	WriteSection(*Section) (int64, error)
}

// Left is how many bytes of the section are left.
func (s *Section) Left() (int64, error) {
	at, err := s.file.Seek(0, io.SeekCurrent)
	return s.end - at, err
}

func (s *Section) Read(p []byte) (int, error) {
	left, err := s.Left()
	if err != nil {
		return 0, err
	}
	if left <= 0 {
		return 0, io.EOF
	}
	return s.file.Read(p[:min(int64(len(p)), left)])
}

var errShort = errors.New("less than a chunk is left")

// SyscallConn implements [syscall.Conn].
func (s *Section) SyscallConn() (syscall.RawConn, error) {
	left, err := s.Left()
	if err != nil {
		return nil, err
	}
	if left < s.Chunk {
		return nil, errShort
	}
	return s.file.SyscallConn()
}

// reopen opens a file again, for an offset of one's own, whatever has become of
// its name. Where the system cannot do that, it fails.
func reopen(file *os.File) (again *os.File, err error) {
	conn, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := conn.Control(func(fd uintptr) {
		again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	})
	return again, errors.Join(controlErr, err)
}

// writeSections sends what has arrived at each wake, as long as it lies in a
// file. It returns without an error when that is not so (any more).
func (r *Reader) writeSections(w SectionWriter) (total int64, err error) {
	var section *Section
	defer func() {
		if section != nil {
			section.file.Close()
		}
	}()
	for {
		limit, content, pass, err := r.wait(r.ctx)
		file, ok := content.(*os.File)
		if err != nil || pass || !ok {
			return total, err
		}
		if section == nil {
			own, err := reopen(file)
			if err != nil {
				return total, nil
			}
			section = &Section{file: own}
			if _, err := own.Seek(r.offset, io.SeekStart); err != nil {
				return total, err
			}
		}
		if run := limit - r.offset; limit < r.end && run > Segment {
			limit -= run % Segment // more is coming, and whole chunks need no copy
		}
		section.end = limit
		n, err := w.WriteSection(section)
		total += n
		r.offset += n
		if err != nil {
			return total, err
		}
		if r.offset != limit {
			return total, fmt.Errorf("spool: %d of %d bytes: %w", n, limit-r.offset+n, io.ErrUnexpectedEOF)
		}
	}
}
