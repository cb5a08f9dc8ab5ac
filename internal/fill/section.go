package fill

import (
	"fmt"
	"io"
	"os"

	"github.com/caddy-registry/mirror/internal/section"
)

// writeSections sends what has arrived at each wake, as long as it lies in a
// file. It returns without an error when that is not so (any more).
func (r *Reader) writeSections(w section.Writer) (total int64, err error) {
	var own *os.File
	defer func() {
		if own != nil {
			own.Close()
		}
	}()
	for {
		limit, content, pass, err := r.wait(r.ctx)
		file, ok := content.(*os.File)
		if err != nil || pass || !ok {
			return total, err
		}
		if own == nil {
			if own, err = section.Reopen(file); err != nil {
				return total, nil
			}
			if _, err := own.Seek(r.offset, io.SeekStart); err != nil {
				return total, err
			}
		}
		n, err := w.WriteSection(section.New(own, limit, false))
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
