package s3double_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestObjects(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	c.want(404, "NoSuchKey", "GET", "/bucket/a/b%20c", "")
	c.want(404, "", "HEAD", "/bucket/a/b%20c", "")
	tag := c.want(200, "", "PUT", "/bucket/a/b%20c", "0123456789").Header.Get("ETag")
	if tag != `"781e5e245d69b566979b86e28d23f2c7"` {
		t.Errorf("the ETag is %s", tag)
	}
	got := c.want(200, "0123456789", "GET", "/bucket/a/b%20c", "")
	if got.ContentLength != 10 || got.Header.Get("ETag") != tag {
		t.Errorf("%d bytes with ETag %s", got.ContentLength, got.Header.Get("ETag"))
	}
	if head := c.want(200, "", "HEAD", "/bucket/a/b%20c", ""); head.ContentLength != 10 {
		t.Errorf("HEAD says %d bytes", head.ContentLength)
	}
	for _, r := range []struct{ header, want, span string }{
		{"bytes=2-4", "234", "bytes 2-4/10"}, {"bytes=7-", "789", "bytes 7-9/10"},
		{"bytes=-2", "89", "bytes 8-9/10"}, {"bytes=8-99", "89", "bytes 8-9/10"},
	} {
		got := c.do("GET", "/bucket/a/b%20c", "", "Range", r.header)
		if got.StatusCode != 206 || got.body != r.want || got.Header.Get("Content-Range") != r.span {
			t.Errorf("%s: %d %s %s", r.header, got.StatusCode, got.body, got.Header.Get("Content-Range"))
		}
	}
	c.want(416, "InvalidRange", "GET", "/bucket/a/b%20c", "", "Range", "bytes=10-")
	c.want(412, "PreconditionFailed", "PUT", "/bucket/a/b%20c", "x", "If-None-Match", "*")
	c.want(204, "", "DELETE", "/bucket/a/b%20c", "")
	c.want(204, "", "DELETE", "/bucket/a/b%20c", "")
	c.want(404, "NoSuchKey", "GET", "/bucket/a/b%20c", "")
	c.want(404, "NoSuchBucket", "GET", "/other/a", "")
	c.want(501, "NotImplemented", "GET", "/bucket/a?acl", "")
	if n := s.Count(s3double.GetObject); n != 9 {
		t.Errorf("%d calls", n)
	}
}
