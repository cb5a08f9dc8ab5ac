package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncfs writes what the kernel holds back of the filesystem of dir to the
// disk, and fails if it has lost any of it since dir was opened.
func syncfs(dir *os.File) error {
	return os.NewSyscallError("syncfs", unix.Syncfs(int(dir.Fd())))
}
