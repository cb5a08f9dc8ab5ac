//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/caddy-registry/mirror/internal/regtest"
)

const (
	s3Key    = "e2ekey"
	s3Secret = "e2esecret1"
	s3Region = "us-east-1"
	s3Bucket = "registry"
)

// An s3Server is a real S3 server with one bucket, and what stands before it and
// counts what it is asked for.
type s3Server struct {
	*process
	kind  string // versitygw or minio
	addr  string // the server's own
	dir   string
	calls *s3Calls
}

// bothServers runs a test with either server.
func bothServers(t *testing.T, test func(t *testing.T, kind string)) {
	for _, kind := range []string{"versitygw", "minio"} {
		t.Run(kind, func(t *testing.T) { test(t, kind) })
	}
}

// startS3 starts a server with an empty bucket.
func startS3(t *testing.T, kind string) *s3Server {
	t.Helper()
	s := &s3Server{kind: kind, addr: regtest.FreeAddress(t), dir: workDir(t)}
	s.restart(t)
	s.calls = startS3Calls(t, s.addr)
	client := s.client()
	if _, err := client.CreateBucket(t.Context(), &awss3.CreateBucketInput{Bucket: aws.String(s3Bucket)}); err != nil {
		t.Fatal(err)
	}
	return s
}

// restart starts the server on what it has kept.
func (s *s3Server) restart(t *testing.T) {
	t.Helper()
	data := filepath.Join(s.dir, "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	ready := "/health"
	if s.kind == "minio" {
		ready = "/minio/health/ready"
		s.process = start(t, bare(s.dir, "MINIO_ROOT_USER="+s3Key, "MINIO_ROOT_PASSWORD="+s3Secret, "MINIO_UPDATE=off", "MINIO_BROWSER=off", "MINIO_CI_CD=1"),
			tool(t, "minio"), "server", "--quiet", "--address", s.addr, data)
	} else {
		s.process = start(t, bare(s.dir), tool(t, "versitygw"), "--access", s3Key, "--secret", s3Secret, "--region", s3Region,
			"--port", s.addr, "--health", ready, "posix", data)
	}
	s.untilReady(t, func() bool {
		resp, err := http.Get("http://" + s.addr + ready)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// client talks to the server itself.
func (s *s3Server) client() *awss3.Client {
	return awss3.New(awss3.Options{
		BaseEndpoint: aws.String("http://" + s.addr), Region: s3Region, UsePathStyle: true,
		Credentials:                credentials.NewStaticCredentialsProvider(s3Key, s3Secret, ""),
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
}

// store is a storage line for the bucket, with a cache at a directory. What scrub
// reads is not counted: there is none.
func (s *s3Server) store(cache string, more ...string) string {
	return fmt.Sprintf("storage s3 %s {\n endpoint http://%s\n region %s\n credentials %s %s\n cache %s 10GiB\n %s\n}\nscrub off",
		s3Bucket, s.calls.addr, s3Region, s3Key, s3Secret, cache, strings.Join(more, "\n "))
}

// keys are those that begin with a prefix.
func (s *s3Server) keys(t *testing.T, prefix string) []string {
	t.Helper()
	var keys []string
	pages := awss3.NewListObjectsV2Paginator(s.client(), &awss3.ListObjectsV2Input{Bucket: aws.String(s3Bucket), Prefix: aws.String(prefix)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, object := range page.Contents {
			keys = append(keys, aws.ToString(object.Key))
		}
	}
	return keys
}

// holdsBlobs tells whether all of these blobs are in the bucket.
func (s *s3Server) holdsBlobs(t *testing.T, digests []string) bool {
	t.Helper()
	held := map[string]bool{}
	for _, key := range s.keys(t, "docker/registry/v2/blobs/") {
		held[key] = true
	}
	for _, digest := range digests {
		if !held[blobKey(digest)] {
			return false
		}
	}
	return true
}

func blobKey(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return "docker/registry/v2/blobs/sha256/" + hex[:2] + "/" + hex + "/data"
}

// upload copies what is below a directory into the bucket, as any tool would.
func (s *s3Server) upload(t *testing.T, root, below string) {
	t.Helper()
	client := s.client()
	err := filepath.WalkDir(filepath.Join(root, below), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		key, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		_, err = client.PutObject(t.Context(), &awss3.PutObjectInput{Bucket: aws.String(s3Bucket), Key: aws.String(key), Body: bytes.NewReader(data)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// download copies what is below a prefix of the bucket into a directory.
func (s *s3Server) download(t *testing.T, prefix, root string) {
	t.Helper()
	client := s.client()
	for _, key := range s.keys(t, prefix) {
		resp, err := client.GetObject(t.Context(), &awss3.GetObjectInput{Bucket: aws.String(s3Bucket), Key: aws.String(key)})
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(root, key), string(data))
	}
}

// s3Calls stands between mirrors and an S3 server, and counts what is asked for
// of everything but the mark of the bucket's owners, which is written all the time.
// It can hold a call back in the middle.
type s3Calls struct {
	addr string

	mu     sync.Mutex
	down   bool           // nothing is answered
	counts map[string]int // by operation
	keys   map[string]int // by operation and key
	wanted string         // the operation to hold back
	of     string         // of keys that begin with this
	skip   int            // so many such calls before
	after  int64          // after so many bytes of its body, either way
	holds  chan struct{}  // closed when one is held
	goOn   chan struct{}  // closed to let it go
}

func startS3Calls(t *testing.T, target string) *s3Calls {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &s3Calls{addr: ln.Addr().String(), counts: map[string]int{}, keys: map[string]int{}}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: target})
			r.Out.Host = r.In.Host // it is signed
		},
		FlushInterval: -1,
		Transport:     &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100},
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { hangUp(w) },
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		down := c.down
		c.mu.Unlock()
		if down {
			hangUp(w)
			return
		}
		operation, key := s3Operation(r)
		if !strings.HasSuffix(key, "mirror/owner.json") {
			c.mu.Lock()
			c.counts[operation]++
			c.keys[operation+" "+key]++
			var h *heldBody
			if c.wanted != "" && operation == c.wanted && strings.HasPrefix(key, c.of) {
				if c.skip--; c.skip < 0 {
					h = &heldBody{ctx: r.Context(), left: c.after, holds: c.holds, goOn: c.goOn}
					c.wanted = ""
				}
			}
			c.mu.Unlock()
			if h != nil && r.Method == http.MethodGet {
				w = &heldWriter{ResponseWriter: w, held: h}
			} else if h != nil {
				h.ReadCloser, r.Body = r.Body, h
			}
		}
		proxy.ServeHTTP(w, r)
	})}
	go server.Serve(ln)
	t.Cleanup(func() { server.Close() })
	return c
}

// hangUp is as if there were nothing here.
func hangUp(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		conn.Close()
	}
}

// setDown has nothing answered, or everything.
func (c *s3Calls) setDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
}

// s3Operation names what a request asks for, as AWS does.
func s3Operation(r *http.Request) (operation, key string) {
	_, key, _ = strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	q := r.URL.Query()
	part := q.Has("uploadId")
	switch {
	case key == "" && r.Method == http.MethodGet && q.Has("uploads"):
		operation = "ListMultipartUploads"
	case key == "" && r.Method == http.MethodGet:
		operation, key = "ListObjects", q.Get("prefix")
	case key == "":
		operation = r.Method + "Bucket"
	case r.Method == http.MethodGet && part:
		operation = "ListParts"
	case r.Method == http.MethodGet:
		operation = "GetObject"
	case r.Method == http.MethodHead:
		operation = "HeadObject"
	case r.Method == http.MethodPut && part:
		operation = "UploadPart"
	case r.Method == http.MethodPut:
		operation = "PutObject"
	case r.Method == http.MethodPost && part:
		operation = "CompleteMultipartUpload"
	case r.Method == http.MethodPost:
		operation = "CreateMultipartUpload"
	case r.Method == http.MethodDelete && part:
		operation = "AbortMultipartUpload"
	case r.Method == http.MethodDelete:
		operation = "DeleteObject"
	}
	return operation, key
}

// forget begins to count anew.
func (c *s3Calls) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.counts)
	clear(c.keys)
}

// count is how often an operation was asked for.
func (c *s3Calls) count(operation string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[operation]
}

// ofKey is how often operations were asked for of one key, by operation.
func (c *s3Calls) ofKey(key string) map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	found := map[string]int{}
	for asked, n := range c.keys {
		if operation, of, _ := strings.Cut(asked, " "); of == key {
			found[operation] = n
		}
	}
	return found
}

// all are all counts, for a message.
func (c *s3Calls) all() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprint(c.counts)
}

// hold arranges for a call of an operation, of a key that begins so, to stop after
// so many bytes of what it carries: the next one, but for so many. The first result
// is closed when it has; the second lets it go on.
func (c *s3Calls) hold(t *testing.T, operation, prefix string, skip int, after int64) (<-chan struct{}, func()) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted, c.of, c.skip, c.after = operation, prefix, skip, after
	c.holds, c.goOn = make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.wanted = ""
		close(c.goOn)
	})
	t.Cleanup(release)
	return c.holds, release
}

// A heldBody stops in the middle.
type heldBody struct {
	io.ReadCloser
	ctx   context.Context
	left  int64
	holds chan struct{}
	goOn  chan struct{}
	once  sync.Once
}

func (h *heldBody) wait() error {
	h.once.Do(func() { close(h.holds) })
	select {
	case <-h.goOn:
		return nil
	case <-h.ctx.Done():
		return errors.New("given up while it was held")
	}
}

func (h *heldBody) Read(p []byte) (int, error) {
	if h.left <= 0 {
		if err := h.wait(); err != nil {
			return 0, err
		}
		return h.ReadCloser.Read(p)
	}
	if int64(len(p)) > h.left {
		p = p[:h.left]
	}
	n, err := h.ReadCloser.Read(p)
	h.left -= int64(n)
	return n, err
}

type heldWriter struct {
	http.ResponseWriter
	held *heldBody
}

func (w *heldWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if w.held.left -= int64(n); w.held.left <= 0 && err == nil {
		http.NewResponseController(w.ResponseWriter).Flush()
		err = w.held.wait()
	}
	return n, err
}

func (w *heldWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
