package module_test

import (
	"io"
	"net/http"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// warm is a mirror that holds an image with the layers, and nothing else to do.
func warm(b *testing.B, layers ...regtest.Content) (*mirror, regtest.Image) {
	b.Helper()
	up := regtest.New(b, regtest.Options{})
	image := regtest.NewImage("warm", layers...)
	up.Push("library/warm", image, "latest")
	m := start(b, upstreamFor("docker.io", up), "")
	m.pull("library/warm", "latest", image)
	eventually(b, "the image to be held", func() bool { return len(spooled(m.dir)) == 0 })
	up.Down()
	return m, image
}

// request sends the same request again and again over one connection, and reads
// bodies of so many bytes.
func (m *mirror) request(b *testing.B, path string, status int, length int64, header ...string) {
	b.Helper()
	req, err := http.NewRequest("GET", m.URL+path, nil)
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	buffer := make([]byte, 256<<10)
	b.SetBytes(length)
	b.ReportAllocs() // of the client, too
	for b.Loop() {
		resp, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, buffer)
		resp.Body.Close()
		if resp.StatusCode != status || n != length || err != nil {
			b.Fatalf("status %d, %d bytes of %d, %v", resp.StatusCode, n, length, err)
		}
	}
}

// BenchmarkWarmBlob: blobs that are held, and parts of them, over loopback.
func BenchmarkWarmBlob(b *testing.B) {
	small, large := regtest.Random("small", 64<<10), regtest.Random("large", 64<<20)
	m, _ := warm(b, small, large)
	path := func(c regtest.Content) string { return "/v2/library/warm/blobs/" + c.Digest.String() }
	b.Run("64KiB", func(b *testing.B) { m.request(b, path(small), 200, 64<<10) })
	b.Run("64MiB", func(b *testing.B) { m.request(b, path(large), 200, 64<<20) })
	b.Run("64KiB-range", func(b *testing.B) {
		m.request(b, path(large), 206, 64<<10, "Range", "bytes=12345-77880")
	})
	b.Run("32MiB-range", func(b *testing.B) {
		m.request(b, path(large), 206, 32<<20, "Range", "bytes=12345-33566776")
	})
}
