package hosted_test

import (
	"io"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/hosted"
)

// endless gives the same bytes again and again.
type endless struct{ data []byte }

func (e endless) Read(p []byte) (int, error) { return copy(p, e.data), nil }

// BenchmarkAppend: 256 MiB come, with one digest and with two.
func BenchmarkAppend(b *testing.B) {
	for name, algorithm := range map[string]digest.Algorithm{"sha256": digest.SHA256, "sha512": digest.SHA512} {
		b.Run(name, func(b *testing.B) {
			h := &host{t: b, dir: b.TempDir()}
			h.start()
			defer h.stop()
			const size = 256 << 20
			b.SetBytes(size)
			for b.Loop() {
				var u *hosted.Upload
				var err error
				if algorithm == digest.SHA512 {
					u, err = h.Receive(b.Context(), "images/_")
				} else {
					u, err = h.Begin(b.Context(), "images/_", algorithm)
				}
				if err != nil {
					b.Fatal(err)
				}
				if _, err := u.Append(b.Context(), hosted.Body{Reader: io.LimitReader(endless{make([]byte, 1<<20)}, size), At: 0, Length: size}); err != nil {
					b.Fatal(err)
				}
				if err := u.Cancel(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
