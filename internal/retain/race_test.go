//go:build race

package retain

const race = true
