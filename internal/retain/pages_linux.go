package retain

import (
	"os"

	"golang.org/x/sys/unix"
)

// forgetPages tells the kernel that what has been read of a file is not needed
// again soon, so that it keeps what pulls read instead.
func forgetPages(f *os.File, offset, length int64) {
	// It is advice: nothing depends on it.
	_ = unix.Fadvise(int(f.Fd()), offset, length, unix.FADV_DONTNEED)
}
