//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// A registry is a stock registry:2.
type registry struct {
	*process
	addr   string
	dir    string
	config string // its file
}

// startRegistry starts a registry:2 on a directory. With a remote, it is a
// pull-through cache of that. Options are more lines of its configuration.
func startRegistry(t *testing.T, dir, remote string, options ...string) *registry {
	t.Helper()
	r := &registry{addr: regtest.FreeAddress(t), dir: dir}
	config := fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: true}
http: {addr: %s}
`, dir, r.addr) + strings.Join(options, "\n") + "\n"
	if remote != "" {
		config += fmt.Sprintf("proxy: {remoteurl: %q}\n", remote)
	}
	home := workDir(t)
	r.config = writeFile(t, filepath.Join(home, "config.yml"), config)
	r.process = start(t, bare(home), tool(t, "docker-registry"), "serve", r.config)
	r.untilReady(t, answers(r.addr))
	return r
}

// push puts an image into the registry under a repository, tagged latest.
func (r *registry) push(t *testing.T, repository string, img *image) {
	t.Helper()
	pushIndex(t, r.addr+"/"+repository+":latest", img)
}

// A counter stands between the mirror and a registry, and knows what has been
// fetched. It can hold a blob back in the middle, and be slow.
type counter struct {
	addr   string
	server *http.Server

	mu    sync.Mutex
	bytes map[string]int64 // of each blob
	pace  int64            // bytes a second of all blobs together; 0: no limit
	due   time.Time        // when the next bytes may go
	gets  map[string]int
	held  string        // the blob to hold back
	after int64         // after so many bytes
	holds chan struct{} // closed when it is held
	goOn  chan struct{} // closed to let it go
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/(sha256:[0-9a-f]{64})$`)

func startCounter(t *testing.T, target string) *counter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{addr: ln.Addr().String(), bytes: map[string]int64{}, gets: map[string]int{}}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: target}) },
		FlushInterval: -1,
	}
	c.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path := blobPath.FindStringSubmatch(r.URL.Path); path != nil && r.Method == http.MethodGet {
			c.mu.Lock()
			c.gets[path[1]]++
			c.mu.Unlock()
			w = &countingWriter{ResponseWriter: w, c: c, digest: path[1], ctx: r.Context()}
		}
		proxy.ServeHTTP(w, r)
	})}
	go c.server.Serve(ln)
	t.Cleanup(c.stop)
	return c
}

// stop makes the upstream unreachable.
func (c *counter) stop() { c.server.Close() }

// hold arranges for a blob to stop after so many bytes. The first result is
// closed when it has; the second lets it go on.
func (c *counter) hold(t *testing.T, digest string, after int64) (<-chan struct{}, func()) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held, c.after = digest, after
	c.holds, c.goOn = make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.held = ""
		close(c.goOn)
	})
	t.Cleanup(release)
	return c.holds, release
}

// fetchedOnce checks that of each blob exactly its bytes were fetched, and
// that all of want were.
func (c *counter) fetchedOnce(t *testing.T, img *image, want []string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for digest, n := range c.bytes {
		if n != img.blobs[digest] {
			t.Errorf("blob %s has %d bytes; %d came from upstream, in %d requests", digest, img.blobs[digest], n, c.gets[digest])
		}
	}
	for _, digest := range want {
		if c.bytes[digest] == 0 {
			t.Errorf("blob %s did not come from upstream", digest)
		}
	}
}

// fetchedWithin checks that all of want came from upstream, and of no blob more
// than so many times its bytes.
func (c *counter) fetchedWithin(t *testing.T, img *image, want []string, ratio float64) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for digest, n := range c.bytes {
		if size := img.blobs[digest]; float64(n) > ratio*float64(size) {
			t.Errorf("blob %s has %d bytes; %d came from upstream (%.3f), in %d requests", digest, size, n, float64(n)/float64(size), c.gets[digest])
		}
	}
	for _, digest := range want {
		if size := img.blobs[digest]; c.bytes[digest] < size {
			t.Errorf("blob %s has %d bytes; only %d came from upstream", digest, size, c.bytes[digest])
		}
	}
	t.Logf("%d of %d bytes of the big layer came from upstream, in %d requests", c.bytes[img.big], img.bigSize, c.gets[img.big])
}

// fetched is how many bytes of a blob have come from upstream.
func (c *counter) fetched(digest string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes[digest]
}

// slow makes the upstream deliver so many bytes a second.
func (c *counter) slow(pace int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pace = pace
}

type countingWriter struct {
	http.ResponseWriter
	c      *counter
	digest string
	ctx    context.Context
	failed bool
}

func (w *countingWriter) WriteHeader(status int) {
	w.failed = status >= 300
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if w.failed {
		return n, err
	}
	w.c.mu.Lock()
	w.c.bytes[w.digest] += int64(n)
	var pause time.Duration
	if w.c.pace > 0 {
		now := time.Now()
		if w.c.due.Before(now) {
			w.c.due = now
		}
		w.c.due = w.c.due.Add(time.Duration(n) * time.Second / time.Duration(w.c.pace))
		pause = w.c.due.Sub(now)
	}
	var goOn chan struct{}
	if w.c.held == w.digest && w.c.bytes[w.digest] >= w.c.after {
		goOn = w.c.goOn
		select {
		case <-w.c.holds:
		default:
			close(w.c.holds)
		}
	}
	w.c.mu.Unlock()
	if pause > 0 {
		select {
		case <-time.After(pause):
		case <-w.ctx.Done():
		}
	}
	if goOn != nil {
		select {
		case <-goOn:
		case <-w.ctx.Done():
		}
	}
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
