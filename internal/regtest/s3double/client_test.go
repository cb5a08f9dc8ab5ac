package s3double_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

// A client signs requests itself, so that a test can do it wrongly.
type client struct {
	t      *testing.T
	s      *s3double.Server
	http   *http.Client
	secret string
	at     time.Time
}

func newClient(t *testing.T, s *s3double.Server) *client {
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return &client{t, s, &http.Client{Transport: transport}, s3double.Secret, time.Now()}
}

type response struct {
	*http.Response
	body string
	err  error // of reading the body
}

// request is unsigned. target is the path, escaped, and the query.
func (c *client) request(method, target, body string) *http.Request {
	c.t.Helper()
	r, err := http.NewRequest(method, c.s.URL+target, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

func sum(data string) string {
	s := sha256.Sum256([]byte(data))
	return hex.EncodeToString(s[:])
}

func mac(key []byte, data string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, data)
	return h.Sum(nil)
}

// escape is independent of that of the server.
func escape(text string) string {
	return strings.ReplaceAll(url.QueryEscape(text), "+", "%20")
}

// signature is that of a request with a payload's hash and some headers.
func (c *client) signature(r *http.Request, payload string, names []string) string {
	var pairs []string
	for name, values := range r.URL.Query() {
		for _, v := range values {
			pairs = append(pairs, escape(name)+"="+escape(v))
		}
	}
	slices.Sort(pairs)
	path := strings.ReplaceAll(escape(r.URL.Path), "%2F", "/")
	text := r.Method + "\n" + path + "\n" + strings.Join(pairs, "&") + "\n"
	for _, name := range names {
		value := r.Header.Get(name)
		if name == "host" {
			value = r.URL.Host
			if r.Host != "" {
				value = r.Host
			}
		}
		text += name + ":" + value + "\n"
	}
	text += "\n" + strings.Join(names, ";") + "\n" + payload
	day := c.at.UTC().Format("20060102")
	scope := day + "/" + s3double.Region + "/s3/aws4_request"
	key := mac(mac(mac(mac([]byte("AWS4"+c.secret), day), s3double.Region), "s3"), "aws4_request")
	return hex.EncodeToString(mac(key, "AWS4-HMAC-SHA256\n"+c.at.UTC().Format("20060102T150405Z")+"\n"+scope+"\n"+sum(text)))
}

// sign signs all headers that are there now.
func (c *client) sign(r *http.Request, payload string) {
	r.Header.Set("X-Amz-Date", c.at.UTC().Format("20060102T150405Z"))
	r.Header.Set("X-Amz-Content-Sha256", payload)
	names := []string{"host"}
	for name := range r.Header {
		names = append(names, strings.ToLower(name))
	}
	slices.Sort(names)
	r.Header.Set("Authorization", fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s/%s/s3/aws4_request, SignedHeaders=%s, Signature=%s",
		s3double.Key, c.at.UTC().Format("20060102"), s3double.Region, strings.Join(names, ";"), c.signature(r, payload, names)))
}

// presign is the query to sign a request with.
func (c *client) presign(method, target string, life int) string {
	r := c.request(method, target, "")
	q := r.URL.Query()
	q.Set("X-Amz-Algorithm", "AWS4-HMAC-SHA256")
	q.Set("X-Amz-Credential", s3double.Key+"/"+c.at.UTC().Format("20060102")+"/"+s3double.Region+"/s3/aws4_request")
	q.Set("X-Amz-Date", c.at.UTC().Format("20060102T150405Z"))
	q.Set("X-Amz-Expires", fmt.Sprint(life))
	q.Set("X-Amz-SignedHeaders", "host")
	r.URL.RawQuery = q.Encode()
	q.Set("X-Amz-Signature", c.signature(r, "UNSIGNED-PAYLOAD", []string{"host"}))
	return r.URL.Path + "?" + q.Encode()
}

func (c *client) send(r *http.Request) (response, error) {
	res, err := c.http.Do(r)
	if err != nil {
		return response{}, err
	}
	defer res.Body.Close()
	var body bytes.Buffer
	_, err = io.Copy(&body, res.Body)
	return response{res, body.String(), err}, nil
}

// do signs a request well, and sends it. Headers are name, value, …
func (c *client) do(method, target, body string, headers ...string) response {
	c.t.Helper()
	res, err := c.try(method, target, body, headers...)
	if err != nil {
		c.t.Fatalf("%s %s: %v", method, target, err)
	}
	return res
}

func (c *client) try(method, target, body string, headers ...string) (response, error) {
	c.t.Helper()
	r := c.request(method, target, body)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	c.sign(r, sum(body))
	return c.send(r)
}

// want sends a request that is signed well, and holds the answer to a status and a
// part of its body.
func (c *client) want(status int, part, method, target, body string, headers ...string) response {
	c.t.Helper()
	res := c.do(method, target, body, headers...)
	if res.StatusCode != status || !strings.Contains(res.body, part) || res.err != nil {
		c.t.Errorf("%s %s: %d %.300s %v, want %d %s", method, target, res.StatusCode, res.body, res.err, status, part)
	}
	return res
}
