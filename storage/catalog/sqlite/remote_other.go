//go:build !linux

package sqlite

// remote names the network filesystem that a directory lies on; nobody knows
// here.
func remote(string) (string, error) { return "", nil }
