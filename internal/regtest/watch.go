package regtest

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// watch is what is known of requests before they end. Registry.mu guards it.
type watch struct {
	conns   map[string]map[int]bool // by server, those that a request came over
	sent    map[string]int64        // bytes of answers, by path
	busy    int                     // blobs being sent
	most    int
	ending  int       // requests that have sent all, but are not in the log yet
	settled sync.Cond // ending is 0
}

// settle waits until whatever a client may have seen the end of is in the log.
// r.mu is held.
func (r *Registry) settle() {
	for r.watch.ending > 0 {
		r.watch.settled.Wait()
	}
}

// Connections is how many connections requests have come over, to "registry",
// "token" or "cdn".
func (r *Registry) Connections(server string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.watch.conns[server])
}

// MostBlobs is the largest number of requests for a blob's bytes that were
// under way at once, where they are sent from.
func (r *Registry) MostBlobs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.watch.most
}

// Sending is how many bytes of a blob have been sent so far, also by requests
// that are still under way.
func (r *Registry) Sending(d digest.Digest) (bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for path, sent := range r.watch.sent {
		if strings.HasSuffix(path, d.String()) {
			bytes += sent
		}
	}
	return bytes
}

// Fetches are the requests for a blob's bytes that were answered where they
// are sent from, in the order in which they ended. Their Range is what was
// asked for, and their Bytes what was sent.
func (r *Registry) Fetches(d digest.Digest) []Request {
	return r.Requests(func(req Request) bool {
		return r.sends(req.Server, req.Method, req.Path) && strings.HasSuffix(req.Path, d.String())
	})
}

// SentByRange is how many bytes of a blob have been sent, by the Range header
// that asked for them; "" is all of it.
func (r *Registry) SentByRange(d digest.Digest) map[string]int64 {
	sent := map[string]int64{}
	for _, req := range r.Fetches(d) {
		if req.Status == http.StatusOK || req.Status == http.StatusPartialContent {
			sent[req.Range] += req.Bytes
		}
	}
	return sent
}

// sends reports a request for a blob that the server does not redirect.
func (r *Registry) sends(server, method, path string) bool {
	from := "cdn"
	if r.opts.NoRedirect {
		from = "registry"
	}
	return server == from && method == http.MethodGet && strings.Contains(path, "/blobs/")
}

type connKey struct{}

var conns atomic.Int64

// numberConn tells connections apart; ports are used again.
func numberConn(ctx context.Context, _ net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, int(conns.Add(1)))
}

// arrives counts a request that begins.
func (r *Registry) arrives(server string, req *http.Request, conn int, c *counter) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.registry, c.gone, c.path = r, req.Context().Done(), req.URL.Path
	if r.watch.conns == nil {
		r.watch.conns = map[string]map[int]bool{}
	}
	if r.watch.conns[server] == nil {
		r.watch.conns[server] = map[int]bool{}
	}
	r.watch.conns[server][conn] = true
	if r.sends(server, req.Method, req.URL.Path) {
		c.busy = true
		r.watch.busy++
		r.watch.most = max(r.watch.most, r.watch.busy)
	}
}

// counter counts what is sent, and paces it.
type counter struct {
	http.ResponseWriter
	status int
	bytes  int64
	rate   int64 // a second; 0: no limit
	began  time.Time

	registry *Registry
	path     string
	gone     <-chan struct{} // closed with the client gone
	busy     bool            // counted in watch.busy
	ending   bool            // counted in watch.ending
}

// counterOf is the counter below what a handler writes to.
func counterOf(w http.ResponseWriter) *counter {
	if s, ok := w.(*spoiler); ok {
		return s.counter
	}
	return w.(*counter)
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (written int, err error) {
	if c.rate == 0 {
		return c.write(p)
	}
	if c.began.IsZero() {
		c.began = time.Now()
	}
	piece := int(min(max(c.rate/50, 1), 32<<10))
	for written < len(p) && err == nil {
		// Each piece comes when the time for all before it has passed.
		due := c.began.Add(time.Duration(float64(c.bytes) / float64(c.rate) * float64(time.Second)))
		select {
		case <-time.After(time.Until(due)):
		case <-c.gone:
			return written, context.Canceled
		}
		var n int
		n, err = c.write(p[written:min(written+piece, len(p))])
		written += n
		c.ResponseWriter.(http.Flusher).Flush()
	}
	return written, err
}

func (c *counter) write(p []byte) (int, error) {
	if length, err := strconv.ParseInt(c.Header().Get("Content-Length"), 10, 64); err == nil && c.bytes+int64(len(p)) >= length {
		c.end()
	}
	n, err := c.ResponseWriter.Write(p)
	c.bytes += int64(n)
	c.registry.mu.Lock()
	if c.registry.watch.sent == nil {
		c.registry.watch.sent = map[string]int64{}
	}
	c.registry.watch.sent[c.path] += int64(n)
	c.registry.mu.Unlock()
	return n, err
}

// end says that after the next write a client may have seen everything.
func (c *counter) end() {
	c.registry.mu.Lock()
	defer c.registry.mu.Unlock()
	if !c.ending {
		c.ending = true
		c.registry.watch.ending++
	}
	c.idle()
}

// leave ends a request. Registry.mu is held, and the request is in the log
// when it is released.
func (c *counter) leave() {
	c.idle()
	if w := &c.registry.watch; c.ending {
		if w.ending--; w.ending == 0 {
			w.settled.Broadcast()
		}
	}
}

// idle counts a blob as sent. Registry.mu is held.
func (c *counter) idle() {
	if c.busy {
		c.busy = false
		c.registry.watch.busy--
	}
}

// rest lets some time pass, unless the client goes.
func rest(req *http.Request, d time.Duration) {
	if d > 0 {
		select {
		case <-time.After(d):
		case <-req.Context().Done():
		}
	}
}
