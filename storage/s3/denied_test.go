package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"

	"github.com/caddy-registry/mirror/storage"
)

// TestDeniedOnce: what is stored is sent once more when the server has refused it, and
// nothing else is.
func TestDeniedOnce(t *testing.T) {
	for _, c := range []struct {
		name  string
		code  string
		times int // that the server refuses it
		call  func(*bucket) error
		tries int
		fails bool
	}{
		{"a value", "AccessDenied", 1, storing, 2, false},
		{"a value, for good", "AccessDenied", 9, storing, 2, true},
		{"an upload", "AccessDenied", 1, func(b *bucket) error {
			_, _, err := b.create(context.Background(), "k")
			return err
		}, 2, false},
		{"another's key", "InvalidAccessKeyId", 9, storing, 1, true},
		{"a wrong secret", "SignatureDoesNotMatch", 9, storing, 1, true},
		{"reading", "AccessDenied", 9, func(b *bucket) error {
			_, _, err := b.read(context.Background(), "k", 10)
			return err
		}, 1, true},
		{"deleting", "AccessDenied", 9, func(b *bucket) error { return b.delete(context.Background(), "k") }, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tries := 0
				b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
					tries = n
					if r.Method == http.MethodPut {
						if data, err := io.ReadAll(r.Body); err != nil || string(data) != "value" {
							t.Errorf("try %d sends %q, %v", n, data, err)
						}
					}
					if n <= c.times {
						return sayError(r, 403, c.code)
					}
					return says(r, 200, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>", "ETag", `"e"`)
				})
				err := c.call(b)
				if (err != nil) != c.fails || c.fails && !errors.Is(err, storage.ErrUnavailable) {
					t.Errorf("got %v", err)
				}
				if tries != c.tries {
					t.Errorf("tried %d times, want %d", tries, c.tries)
				}
				if c.fails && hopeless(err) == nil {
					t.Errorf("a start goes on after %v", err)
				}
				if want := min(c.times, 1); !c.fails && b.breaker.fails != 0 || c.fails && b.breaker.fails != want {
					t.Errorf("it counts as %d failures of the server", b.breaker.fails)
				}
			})
		})
	}
}

func storing(b *bucket) error {
	_, err := b.put(context.Background(), "k", bytes.NewReader([]byte("value")), 5, "")
	return err
}
