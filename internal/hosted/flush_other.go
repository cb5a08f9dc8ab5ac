//go:build !linux

package hosted

import "os"

// flush leaves it to the sync at the end.
func flush(*os.File, int64, int64) {}
