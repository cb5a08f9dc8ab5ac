package mirror

import (
	"fmt"
	"regexp"
	"testing"
)

// FuzzChunkRange: what is taken is exactly what the spec's expression takes, of
// numbers that a program can count with. Seeds are in testdata.
func FuzzChunkRange(f *testing.F) {
	spec := regexp.MustCompile(`^[0-9]+-[0-9]+$`)
	f.Fuzz(func(t *testing.T, s string) {
		first, last, ok := chunkRange(s)
		if !ok {
			var a, b int64
			if n, _ := fmt.Sscanf(s, "%d-%d", &a, &b); n == 2 && spec.MatchString(s) && a <= b && b < 1<<62 && len(s) <= 38 {
				t.Errorf("%q is refused", s)
			}
			return
		}
		if !spec.MatchString(s) || first < 0 || last < first || last-first+1 <= 0 {
			t.Errorf("%q is %d to %d", s, first, last)
		}
		if a, b, ok := chunkRange(fmt.Sprintf("%d-%d", first, last)); !ok || a != first || b != last {
			t.Errorf("%q does not read back", s)
		}
	})
}
