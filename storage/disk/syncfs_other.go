//go:build !linux

package disk

import (
	"os"
	"syscall"
)

// syncfs tells the kernel to write what it holds back to the disk. Unlike on
// Linux it may return before that is done.
func syncfs(*os.File) error {
	return os.NewSyscallError("sync", syscall.Sync())
}
