package s3

import (
	"errors"
	"io/fs"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// TestAbsenceIsS3s: that there is nothing is not taken from a 404 that is not S3's own.
func TestAbsenceIsS3s(t *testing.T) {
	for name, code := range map[string]string{"a key that is unknown": "XAdminUserNotFound", "a proxy": "", "a bucket that is gone": "NoSuchBucket"} {
		t.Run(name, func(t *testing.T) {
			d := newDouble(t, s3double.Options{}, nil)
			c := &clock{now: time.Now()}
			s := still(t, d, t.TempDir(), c)
			defer closed(t, s)
			if err := s.Listed(t.Context()); err != nil {
				t.Fatal(err)
			}
			key, data := blobOf("blob", 1000)
			mustPut(t, s, key, data, storage.Durable)
			mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Durable)
			s.Drop(key)
			other := still(t, d, t.TempDir(), c)
			defer closed(t, other)
			beat(t, s)
			wantShared(t, "with another", s, true) // so that S3 is asked
			c.pass(anew)

			end := d.Strike(s3double.Fault{Key: "docker/", Status: 404, Code: code})
			unknown := func(what string, err error) {
				t.Helper()
				if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s: %v", what, err)
				}
			}
			_, err := s.Stat(t.Context(), linkOf("a"))
			unknown("Stat", err)
			_, err = s.Get(t.Context(), linkOf("a"), 100)
			unknown("Get", err)
			_, _, err = s.Open(t.Context(), key, 0, -1)
			unknown("Open", err)
			_, err = s.Stat(t.Context(), linkOf("none"))
			unknown("Stat of nothing", err)
			_, err = s.Stat(t.Context(), storage.Uploads+"docker/0")
			unknown("Stat of an upload", err)
			unknown("Delete", s.Delete(t.Context(), linkOf("a")))
			end()
			s.bucket.breaker.answered()
			wantValue(t, s, linkOf("a"), []byte("sha256:x"))
			wantValue(t, s, key, data)
			wantNothing(t, s, linkOf("none"))
		})
	}
}
