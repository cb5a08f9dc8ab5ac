//go:build !linux

package module

import "errors"

// onNFS reports whether a directory lies on NFS, of whichever version.
func onNFS(string) (bool, error) {
	return false, errors.New("that cannot be found out on this system; mount the share and use STORAGE_BACKEND_TYPE=local")
}
