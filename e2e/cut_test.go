//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// A cutter stands between clients and a mirror, and cuts a connection that has
// brought a client so many bytes; so many times.
type cutter struct {
	addr   string
	target string
	after  int64

	mu    sync.Mutex
	left  int
	conns map[net.Conn]bool
}

func startCutter(t *testing.T, target string, after int64, times int) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: ln.Addr().String(), target: target, after: after, left: times, conns: map[net.Conn]bool{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { c.carry(conn) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		c.mu.Lock()
		for conn := range c.conns {
			conn.Close()
		}
		c.mu.Unlock()
		wg.Wait()
		if c.left != 0 && !t.Failed() {
			t.Errorf("%d connections were not cut; this proves nothing", c.left)
		}
	})
	return c
}

func (c *cutter) carry(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.target)
	if err != nil {
		return
	}
	defer server.Close()
	c.mu.Lock()
	c.conns[client] = true
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.conns, client)
		c.mu.Unlock()
	}()
	go func() {
		io.Copy(server, client)
		server.Close() // the client has gone
	}()
	if n, err := io.CopyN(client, server, c.after); n < c.after || err != nil {
		return
	}
	c.mu.Lock()
	cut := c.left > 0
	if cut {
		c.left--
	}
	c.mu.Unlock()
	if !cut {
		io.Copy(client, server)
	}
}

// TestCut: connections between client and mirror are cut in the middle of a
// layer. A client that knows how to goes on from there, another one starts
// again, and no byte comes from upstream twice. What regctl then asks for ends
// one past the last byte.
func TestCut(t *testing.T) {
	img := newImage(t, "cut")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	type pull = func(t *testing.T, addr string)
	pulls := func(pull func(*testing.T, string, *image, string)) pull {
		return func(t *testing.T, addr string) { pull(t, addr, img, ":latest") }
	}

	for _, c := range []struct {
		name  string
		times int                                        // of cuts
		want  []string                                   // the blobs it fetches
		fails func(t *testing.T, dir, addr string) error // of a client that does not go on
		pull  pull
	}{
		{"containers-image", 1, img.amd64, nil, pulls(pullWithContainersImage)},
		{"containers-image", 2, img.amd64, nil, pulls(pullWithContainersImage)},
		{"containerd-1.6", 2, img.amd64, nil, pulls(pullWithContainerd)},
		{"containerd-2.4", 2, img.amd64, nil, pulls(pullWithContainerd2)},
		{"docker", 1, img.amd64, nil, pulls(pullWithDocker)},
		{"regctl", 1, img.all(), nil, pulls(pullWithRegctl)},
		{"regctl", 2, img.all(), nil, pulls(pullWithRegctl)},
		{"regctl-blob", 1, []string{img.big}, nil, func(t *testing.T, addr string) { regctlBlob(t, addr, img.big) }},
		{"skopeo", 1, img.amd64, func(t *testing.T, dir, addr string) error { return trySkopeo(t, dir, addr, ":latest") }, pulls(pullWithSkopeo)},
		{"podman", 1, img.amd64, func(t *testing.T, dir, addr string) error {
			_, err := tryPodman(t, dir, addr, "pull", "--tls-verify=false", "--signature-policy", anySignature(t, dir), "docker.io/library/hello")
			return err
		}, pulls(pullWithPodman)},
		{"crane", 1, img.all(), func(t *testing.T, dir, addr string) error { return tryCrane(t, dir, addr, ":latest") }, pulls(pullWithCrane)},
	} {
		t.Run(fmt.Sprintf("%s/%d", c.name, c.times), func(t *testing.T) {
			counted := startCounter(t, upstream.addr)
			counted.slow(16 << 20) // or all is here before the client is cut
			m := startMirror(t, setup{registry: dockerHub(counted.addr) + deadRegistry(counted.addr), server: accessLog})
			cut := startCutter(t, m.addr, 7<<20, c.times)
			if c.fails != nil {
				if err := c.fails(t, workDir(t), cut.addr); err == nil {
					t.Errorf("%s took a broken pull for a whole one, or goes on by now", c.name)
				}
			}
			c.pull(t, cut.addr)
			counted.fetchedWithin(t, img, c.want, 1.02)

			if c.fails != nil {
				return
			}
			var ranges []string
			eventually(t, 20*time.Second, "as many requests from the middle as cuts", func() bool {
				ranges = nil
				for _, r := range m.asked(t, img.big) {
					if asked := r.Request.Headers.Get("Range"); asked != "" && r.Status == http.StatusPartialContent {
						ranges = append(ranges, asked)
					}
				}
				return len(ranges) >= c.times
			})
			if len(ranges) > c.times {
				t.Errorf("%d cuts, and requests for %q", c.times, ranges)
			}
			for _, asked := range ranges {
				if strings.HasPrefix(c.name, "regctl") && !strings.HasSuffix(asked, fmt.Sprintf("-%d", img.bigSize)) {
					t.Errorf("regctl asked for %s of %d bytes; this proves nothing of an end beyond the last", asked, img.bigSize)
				}
			}
		})
	}
}

// regctlBlob gets one blob by regctl.
func regctlBlob(t *testing.T, addr, digest string) {
	t.Helper()
	dir := workDir(t)
	out := run(t, regctlEnv(t, dir, addr), tool(t, "regctl"), "blob", "get", "docker.io/library/hello", digest)
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(out))); got != digest {
		t.Errorf("regctl got %s, not %s", got, digest)
	}
}
