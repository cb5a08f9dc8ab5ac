//go:build e2e

package e2e

import (
	"fmt"
	"regexp"
	"testing"
	"time"
)

var openRange = regexp.MustCompile(`^bytes=\d+-$`)

// TestParallelRanges: containerd that fetches a layer in pieces asks for the
// rest of it, from several places at once, and hangs up after each piece. Still
// every byte comes from upstream once.
func TestParallelRanges(t *testing.T) {
	img := newImageOf(t, "parallel", 48)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	for _, c := range []struct{ piece, connections int }{{8 << 20, 3}, {1 << 20, 8}} {
		t.Run(fmt.Sprintf("%d MiB by %d", c.piece>>20, c.connections), func(t *testing.T) {
			counted := startCounter(t, upstream.addr)
			m := startMirror(t, setup{registry: dockerHub(counted.addr), server: accessLog})
			pullInParallel(t, m.addr, img, ":latest", c.piece, c.connections)
			counted.fetchedWithin(t, img, img.amd64, 1.02)

			// What is logged late was dropped as well.
			var ranges, dropped int
			want := int(img.bigSize) / c.piece
			eventually(t, 20*time.Second, "the requests to end", func() bool {
				ranges, dropped = 0, 0
				for _, r := range m.asked(t, img.big) {
					if openRange.MatchString(r.Request.Headers.Get("Range")) {
						ranges++
						var from int64
						fmt.Sscanf(r.Request.Headers.Get("Range"), "bytes=%d-", &from)
						if r.Size < img.bigSize-from {
							dropped++
						}
					}
				}
				return ranges >= want
			})
			t.Logf("%d open-ended ranges, %d dropped", ranges, dropped)
			if dropped == 0 {
				t.Errorf("containerd took all it asked for; this proves nothing")
			}
			pullInParallel(t, m.addr, img, ":latest", c.piece, c.connections)
			counted.stop()
			pullInParallel(t, m.addr, img, "@"+img.digest, c.piece, c.connections)
		})
	}
}
