package mirror

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// discard is a ResponseWriter that keeps nothing.
type discard struct {
	header http.Header
	status int
	bytes  int
}

func (d *discard) Header() http.Header { return d.header }
func (d *discard) WriteHeader(s int)   { d.status = s }
func (d *discard) Write(p []byte) (int, error) {
	d.bytes += len(p)
	return len(p), nil
}

// BenchmarkWarm is the handler's own share of a warm answer, without Caddy and
// net/http.
func BenchmarkWarm(b *testing.B) {
	config := first.Blobs[0].Digest.String()
	for name, path := range map[string]string{
		"tag":    latest,
		"digest": "team/app/manifests/" + first.Digest.String(),
		"config": "team/app/blobs/" + config,
	} {
		b.Run(name, func(b *testing.B) {
			m := warmed(b)
			r := httptest.NewRequest("GET", "http://mirror.example/v2/"+path, nil)
			w := &discard{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				w.bytes = 0
				route, _ := oci.ParsePath(r.URL.Path)
				m.site.ServeHTTP(m.mirror, w, r, route, access.Caller{})
			}
			if w.status != http.StatusOK || w.bytes == 0 {
				b.Errorf("%d, %d bytes", w.status, w.bytes)
			}
		})
	}
}

// warmed is a mirror that has everything of an image in memory.
func warmed(t testing.TB) *bench {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Push("team/app", first, "latest")
	config := "team/app/blobs/" + first.Blobs[0].Digest.String()
	b.wantStatus(200, "GET", latest)
	b.wantStatus(200, "GET", config)
	b.eventually("the config to be linked", func() bool {
		b.wantStatus(200, "GET", config)
		_, ok := b.mirror.tree.WarmBlob("reg.example/team/app", first.Blobs[0].Digest, time.Time{})
		return ok
	})
	b.eventually("the manifest to be warm", func() bool {
		_, ok := b.mirror.tree.Warm("reg.example/team/app", first.Digest, time.Time{})
		return ok
	})
	return b
}
