//go:build race

package module_test

// The race detector knows no more than 8,128 goroutines, and takes memory of its
// own for each.
func init() { mostConnections, residentCounts = 2_000, false }
