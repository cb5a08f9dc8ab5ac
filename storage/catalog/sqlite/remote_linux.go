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
	return network(uint32(fs.Type)), nil
}

// network names a network filesystem by its number, or is "".
func network(magic uint32) string {
	switch magic {
	case unix.NFS_SUPER_MAGIC:
		return "NFS"
	case unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC:
		return "SMB"
	}
	return ""
}
