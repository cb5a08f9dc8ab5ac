//go:build race

package fill_test

// The race detector makes each schedule take ten times as long.
func init() { defaultSchedules = 15_000 }
