package module_test

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

// TestPushOutageAlone: a push that the bucket has not taken in whole is not
// confirmed. The client finishes it later and sends nothing again; of one that it
// adds to, or means otherwise now, nothing is stored.
func TestPushOutageAlone(t *testing.T) {
	b := startS3(t, "", hostedSite)
	u := uploader{b.mirror, "apps/web"}
	for _, c := range []struct{ name, part string }{
		{"bytes", "/data"},
		{"link", "/_layers/"},
	} {
		t.Run(c.name, func(t *testing.T) {
			data := regtest.Random(c.name, 300_000).Data
			d := digest.FromBytes(data)
			at := u.begin()
			u.says("202", "PATCH", at, bytes.NewReader(data))
			end := b.Strike(s3double.Fault{Op: s3double.PutObject, Key: c.part, Status: 503, Code: "SlowDown"})
			for range 2 {
				u.says("503 UNAVAILABLE", "PUT", finish(at, d), nil)
				if c.name == "bytes" {
					u.says("404", "HEAD", "blobs/"+d.String(), nil)
				}
				u.at(u.says("204", "GET", at, nil), len(data))
			}
			end()
			u.says("404 BLOB_UPLOAD_UNKNOWN", "PATCH", at, bytes.NewReader(data))
			b.Forget()
			eventually(t, "the push to end", func() bool {
				return u.ask("PUT", finish(at, d), nil).StatusCode == http.StatusCreated
			})
			u.keeps(d, data)
			if stored, ok := b.Read(layout.Blob(d)); !ok || !bytes.Equal(stored, data) {
				t.Error("it is confirmed, and the bucket does not have it")
			}
			u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
		})
	}

	data := regtest.Random("otherwise", 300_000).Data
	at := u.begin()
	u.says("202", "PATCH", at, bytes.NewReader(data))
	end := b.Strike(s3double.Fault{Op: s3double.PutObject, Key: "/data", Status: 503, Code: "SlowDown"})
	u.says("503 UNAVAILABLE", "PUT", finish(at, digest.FromBytes(data)), nil)
	end()
	other := digest.FromString("other")
	u.says("404 BLOB_UPLOAD_UNKNOWN", "PUT", finish(at, other), nil)
	u.says("404", "HEAD", "blobs/"+other.String(), nil)
	u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
}
