//go:build !race

package retain

const race = false
