package sqlite

import (
	"os"

	"golang.org/x/sys/unix"
)

// remote names the network filesystem that a directory lies on, or "".
func remote(dir string) (string, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", os.NewSyscallError("statfs", err)
	}
	switch uint32(fs.Type) {
	case unix.NFS_SUPER_MAGIC:
		return "NFS", nil
	case unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC:
		return "SMB", nil
	}
	return "", nil
}
