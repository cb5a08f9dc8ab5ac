//go:build race

package catalog_test

// The race detector makes SQLite ten times as slow.
func init() { steps, worlds = 400, 1 }
