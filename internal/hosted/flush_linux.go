package hosted

import (
	"os"

	"golang.org/x/sys/unix"
)

// flush tells the kernel to begin to write a part of a file to the disk, so that
// little is left for the sync at the end.
func flush(f *os.File, offset, n int64) {
	// That it fails shows in the sync.
	unix.SyncFileRange(int(f.Fd()), offset, n, unix.SYNC_FILE_RANGE_WRITE)
}
