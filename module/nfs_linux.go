package module

import (
	"os"

	"golang.org/x/sys/unix"
)

// onNFS reports whether a directory lies on NFS, of whichever version.
func onNFS(dir string) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return false, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return fs.Type == unix.NFS_SUPER_MAGIC, nil
}
