package s3double_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

func (c *client) refused(what string, r *http.Request, code string) {
	c.t.Helper()
	res, err := c.send(r)
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
	if res.StatusCode < 400 || !strings.Contains(res.body, "<Code>"+code+"</Code>") {
		c.t.Errorf("%s: %d %s, want %s", what, res.StatusCode, res.body, code)
	}
}

func TestSignatures(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	s.Write("key", []byte("value"))
	c := newClient(t, s)
	empty := sum("")

	c.refused("unsigned", c.request("GET", "/bucket/key", ""), "AccessDenied")

	r := c.request("GET", "/bucket/key", "")
	c.sign(r, empty)
	r.Method = "HEAD"
	if res, err := c.send(r); err != nil || res.StatusCode != 403 {
		t.Errorf("HEAD with the signature of a GET: %d, %v", res.StatusCode, err)
	}

	for what, change := range map[string]func(r *http.Request){
		"another path":  func(r *http.Request) { r.URL.Path = "/bucket/other" },
		"another query": func(r *http.Request) { r.URL.RawQuery = "response-content-type=a%2Fb" },
		"another host":  func(r *http.Request) { r.Host = "other.localhost" },
		"another signature": func(r *http.Request) {
			r.Header.Set("Authorization", r.Header.Get("Authorization")[:len(r.Header.Get("Authorization"))-4]+"0000")
		},
		"another x-amz-content-sha256": func(r *http.Request) { r.Header.Set("X-Amz-Content-Sha256", sum("x")) },
	} {
		r := c.request("GET", "/bucket/key", "")
		c.sign(r, empty)
		change(r)
		c.refused(what, r, "SignatureDoesNotMatch")
	}

	r = c.request("GET", "/bucket/key", "")
	c.sign(r, empty)
	r.Header.Set("X-Amz-Meta-Late", "1")
	c.refused("a header not signed", r, "AccessDenied")

	c.secret = "wrong"
	r = c.request("GET", "/bucket/key", "")
	c.sign(r, empty)
	c.refused("a wrong secret", r, "SignatureDoesNotMatch")
	c.secret = s3double.Secret

	r = c.request("GET", "/bucket/key", "")
	c.sign(r, empty)
	r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), s3double.Key, "nobody", 1))
	c.refused("a wrong key", r, "InvalidAccessKeyId")

	r = c.request("GET", "/bucket/key", "")
	c.sign(r, empty)
	r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), s3double.Region, "eu-west-1", 1))
	c.refused("a wrong region", r, "AuthorizationHeaderMalformed")

	for _, skew := range []time.Duration{-16 * time.Minute, 16 * time.Minute} {
		s.Set(func(q *s3double.Quirks) { q.Skew = skew })
		r = c.request("GET", "/bucket/key", "")
		c.sign(r, empty)
		c.refused("a wrong clock", r, "RequestTimeTooSkewed")
		s.Set(func(q *s3double.Quirks) { q.Skew = 0 })
	}

	// Proxies that change Accept-Encoding break a signature that covers it.
	s.Set(func(q *s3double.Quirks) { q.AcceptEncoding = "gzip,gfe" })
	r = c.request("GET", "/bucket/key", "")
	r.Header.Set("Accept-Encoding", "identity")
	c.sign(r, empty)
	c.refused("a changed Accept-Encoding", r, "SignatureDoesNotMatch")
	c.want(200, "value", "GET", "/bucket/key", "")
}

func TestPayloads(t *testing.T) {
	s := s3double.New(t, s3double.Options{PutLimit: 100})
	c := newClient(t, s)
	put := func(what, payload, code string, headers ...string) {
		t.Helper()
		r := c.request("PUT", "/bucket/key", "body")
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		c.sign(r, payload)
		c.refused(what, r, code)
	}
	put("another body", sum("other"), "XAmzContentSHA256Mismatch")
	put("an unsigned body", "UNSIGNED-PAYLOAD", "InvalidRequest")
	put("no hash", "hash", "InvalidArgument")
	put("a streamed body", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "NotImplemented")
	put("aws-chunked", sum("body"), "NotImplemented", "Content-Encoding", "aws-chunked")
	put("a trailer", sum("body"), "NotImplemented", "X-Amz-Trailer", "x-amz-checksum-crc32")
	put("a checksum", sum("body"), "NotImplemented", "X-Amz-Checksum-Crc32", "AAAAAA==")
	put("a wrong MD5", sum("body"), "BadDigest", "Content-MD5", "AAAAAAAAAAAAAAAAAAAAAA==")
	put("a copy", sum("body"), "NotImplemented", "X-Amz-Copy-Source", "/bucket/other")

	r := c.request("PUT", "/bucket/key", "body")
	r.ContentLength = -1
	c.sign(r, sum("body"))
	c.refused("a body of unknown length", r, "MissingContentLength")

	c.want(400, "EntityTooLarge", "PUT", "/bucket/key", strings.Repeat("x", 101))
	c.want(400, "KeyTooLongError", "PUT", "/bucket/"+strings.Repeat("k", 1025), "x")
	if keys := s.Keys(""); len(keys) != 0 {
		t.Errorf("stored %q", keys)
	}
	c.want(200, "", "PUT", "/bucket/key", "body", "Content-MD5", md5sum("body"))
}

func TestPresigned(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	s.Write("a key", []byte("value"))
	c := newClient(t, s)
	send := func(method, target string) response {
		t.Helper()
		res, err := c.send(c.request(method, target, ""))
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	target := c.presign("GET", "/bucket/a%20key?response-content-type=application%2Foctet-stream", 60)
	target = strings.Replace(target, " ", "%20", 1)
	if res := send("GET", target); res.StatusCode != 200 || res.body != "value" || res.Header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("%d %s %s", res.StatusCode, res.body, res.Header)
	}
	if res := send("HEAD", target); res.StatusCode != 403 {
		t.Errorf("HEAD of what was signed for GET: %d", res.StatusCode)
	}
	head := strings.Replace(c.presign("HEAD", "/bucket/a%20key", 60), " ", "%20", 1)
	if res := send("HEAD", head); res.StatusCode != 200 || res.ContentLength != 5 {
		t.Errorf("HEAD: %d", res.StatusCode)
	}
	if res := send("GET", strings.Replace(target, "60", "61", 1)); res.StatusCode != 403 {
		t.Errorf("a life made longer: %d", res.StatusCode)
	}
	s.Set(func(q *s3double.Quirks) { q.Skew = 2 * time.Minute })
	if res := send("GET", target); res.StatusCode != 403 || !strings.Contains(res.body, "expired") {
		t.Errorf("after its life: %d %s", res.StatusCode, res.body)
	}
	if res := send("GET", strings.Replace(c.presign("GET", "/bucket/key", 604801), " ", "%20", 1)); res.StatusCode != 400 {
		t.Errorf("for more than a week: %d", res.StatusCode)
	}
}

func TestVirtualHost(t *testing.T) {
	s := s3double.New(t, s3double.Options{Buckets: []string{"one", "two"}, Domain: "s3.test"})
	c := newClient(t, s)
	for _, bucket := range []string{"one", "two"} {
		r := c.request("PUT", "/key", bucket)
		r.Host = bucket + ".s3.test"
		c.sign(r, sum(bucket))
		if res, err := c.send(r); err != nil || res.StatusCode != 200 {
			t.Errorf("%d %v", res.StatusCode, err)
		}
	}
	c.want(200, "two", "GET", "/two/key", "")
	if data, there := s.Read("key"); !there || string(data) != "one" {
		t.Errorf("%q", data)
	}
	s.Set(func(q *s3double.Quirks) { q.VirtualOnly = true })
	c.want(403, "SecondLevelDomainForbidden", "GET", "/two/key", "")
}
