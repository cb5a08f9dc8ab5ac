package module_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// passing is a mirror whose disk is full, and a layer of 6 MiB that it can only
// pass through.
func passing(t *testing.T) (m *mirror, layer regtest.Content, path string) {
	up := regtest.New(t, regtest.Options{})
	layer = regtest.Random("x", 6<<20)
	up.Push("library/x", regtest.NewImage("x", layer), "latest")
	m = start(t, "", "")
	if err := m.load("storage disk "+m.dir+" {\n min_free 99.99%\n}\n"+upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	return m, layer, "/v2/library/x/blobs/" + layer.Digest.String()
}

// TestManyPartsOnFullDisk: parts that have been sent do not keep connections that
// the next ones need.
func TestManyPartsOnFullDisk(t *testing.T) {
	for _, n := range []int{10, 20} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			m, layer, path := passing(t)
			var ranges []string
			var spans [][2]int
			for i := range n {
				from := i * 150_000
				ranges = append(ranges, fmt.Sprintf("%d-%d", from, from+9_999))
				spans = append(spans, [2]int{from, from + 10_000})
			}
			checkParts(t, m.want(206, "GET", path, "Range", "bytes="+strings.Join(ranges, ",")), layer.Data, spans...)
		})
	}
}

// TestTwoPartsOfAll: of two parts that are everything, the first ends inside the
// last segment.
func TestTwoPartsOfAll(t *testing.T) {
	m, layer, path := passing(t)
	s := len(layer.Data)
	a := m.want(206, "GET", path, "Range", fmt.Sprintf("bytes=0-%d,%d-%d", s-2, s-1, s-1))
	checkParts(t, a, layer.Data, [2]int{0, s - 1}, [2]int{s - 1, s})
	if lines := m.logs.with("answer broken off"); len(lines) > 0 {
		t.Error(lines)
	}
}
