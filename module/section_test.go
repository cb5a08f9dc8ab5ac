package module_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// wire is the Caddy module caddy.listeners.regtest. It counts how what is sent
// gets to a connection.
type wire struct {
	Buffer int `json:"buffer"` // of a connection, in bytes; 0: what the system gives
}

// sent is what went over a connection.
type sent struct {
	lent   int64 // bytes of files whose descriptor could be had
	copied int64 // all others, with headers
	calls  int   // that sent anything
}

// wires are the connections by the client's address.
var wires struct {
	mu sync.Mutex
	of map[string]sent
}

func init() { caddy.RegisterModule(wire{}) }

func (wire) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.regtest", New: func() caddy.Module { return new(wire) }}
}

func (w wire) WrapListener(l net.Listener) net.Listener { return wiredListener{l, w.Buffer} }

type wiredListener struct {
	net.Listener
	buffer int
}

func (l wiredListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	if l.buffer > 0 {
		if err := tcp.SetWriteBuffer(l.buffer); err != nil {
			return nil, err
		}
	}
	return wiredConn{tcp}, nil
}

type wiredConn struct{ *net.TCPConn }

// ReadFrom finds out what the connection is about to: see net.sendFile.
func (c wiredConn) ReadFrom(r io.Reader) (int64, error) {
	from := r
	if limited, ok := r.(*io.LimitedReader); ok {
		from = limited.R
	}
	lent := false
	if file, ok := from.(syscall.Conn); ok {
		_, err := file.SyscallConn()
		lent = err == nil
	}
	n, err := c.TCPConn.ReadFrom(r)
	c.note(n, lent)
	return n, err
}

func (c wiredConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	c.note(int64(n), false)
	return n, err
}

func (c wiredConn) note(n int64, lent bool) {
	if n == 0 {
		return
	}
	wires.mu.Lock()
	defer wires.mu.Unlock()
	if wires.of == nil {
		wires.of = map[string]sent{}
	}
	to := c.RemoteAddr().String()
	s := wires.of[to]
	s.calls++
	if lent {
		s.lent += n
	} else {
		s.copied += n
	}
	wires.of[to] = s
}

// measure sends a request, reads a body of so many bytes, and returns how it was
// sent.
func (m *mirror) measure(length int, path, ranges string) (*http.Response, []byte, sent) {
	m.t.Helper()
	var to string
	ctx := httptrace.WithClientTrace(m.t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		wires.mu.Lock()
		defer wires.mu.Unlock()
		to = info.Conn.LocalAddr().String()
		delete(wires.of, to)
	}})
	req, err := http.NewRequestWithContext(ctx, "GET", m.URL+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", "gzip")
	if ranges != "" {
		req.Header.Set("Range", ranges)
	}
	resp, err := client.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		m.t.Error(err)
	}
	var s sent
	eventually(m.t, "all to be sent", func() bool {
		wires.mu.Lock()
		defer wires.mu.Unlock()
		s = wires.of[to]
		return s.lent+s.copied > int64(length)
	})
	return resp, body, s
}

// wired loads a configuration with that listener, with server options in JSON,
// and with encode before the mirror.
func (m *mirror) wired(buffer int, app, server string) {
	m.t.Helper()
	adapted, err := m.adapt(app, "")
	if err != nil {
		m.t.Fatal(err)
	}
	server += fmt.Sprintf(`"listener_wrappers": [{"wrapper": "regtest", "buffer": %d}],`, buffer)
	adapted = bytes.Replace(adapted, []byte(`"listen":`), []byte(server+`"listen":`), 1)
	// A handler that looks at what is sent, and may not change it.
	encode := `{"handler":"encode","encodings":{"gzip":{}},"match":{"headers":{"Content-Type":["*"]}}},`
	const mirror = `{"handler":"registry_mirror"`
	if !bytes.Contains(adapted, []byte(mirror)) {
		m.t.Fatalf("no %s in %s", mirror, adapted)
	}
	adapted = bytes.Replace(adapted, []byte(mirror), []byte(encode+mirror), 1)
	if err := m.loadJSON(adapted); err != nil {
		m.t.Fatal(err)
	}
}

// TestSendfile: blobs and parts of them, held or on their way, are sent from
// their files by the kernel, in few calls, with Caddy's limit on how much is
// written at once and without it, and behind a handler that looks at the body.
func TestSendfile(t *testing.T) {
	const size = 5<<20 + 12345
	const copied = 48 << 10 // the beginning, the header and the end
	for name, c := range map[string]struct {
		server string
		chunk  int // what a call may send
	}{
		"limited":       {"", 1 << 20},
		"large chunks":  {`"max_write_chunk": 3000000,`, 3_000_000},
		"small chunks":  {`"max_write_chunk": 10000,`, 1 << 20},
		"unlimited":     {`"write_idle_timeout": -1,`, size},
		"access log on": {`"logs": {},`, 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			layer := regtest.Random("x", size)
			up.Push("library/x", regtest.NewImage("x", layer), "latest")
			m := start(t, upstreamFor("docker.io", up, "connections 1"), "")
			m.wired(0, upstreamFor("docker.io", up, "connections 1"), c.server)
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			path := "/v2/library/x/blobs/" + layer.Digest.String()
			part := func(what string, status, from, to int, ranges string) {
				t.Helper()
				resp, body, sent := m.measure(to-from, path, ranges)
				if resp.StatusCode != status || !bytes.Equal(body, layer.Data[from:to]) {
					t.Fatalf("%s: status %d, or wrong bytes, %d of %d", what, resp.StatusCode, len(body), to-from)
				}
				if sent.lent < int64(to-from-copied) || sent.copied > copied {
					t.Errorf("%s: of %d bytes %d were sent from the file, and %d copied", what, to-from, sent.lent, sent.copied)
				}
				most := (to-from)/c.chunk + 4
				if what == "live" {
					most += 4 // it may come in several runs
				}
				if sent.calls > most {
					t.Errorf("%s: %d calls for %d bytes", what, sent.calls, to-from)
				}
			}

			hold := make(chan struct{})
			up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: 4 << 20})
			first := m.open("GET", path)
			if _, err := io.CopyN(io.Discard, first.Body, 7<<19); err != nil {
				t.Fatal(err)
			}
			part("live", 206, 1, 7<<19, fmt.Sprintf("bytes=1-%d", 7<<19-1))
			close(hold)
			if _, err := io.Copy(io.Discard, first.Body); err != nil {
				t.Fatal(err)
			}
			first.Body.Close()
			eventually(t, "the blob to be held", func() bool { return len(m.logs.with("filled")) == 1 && len(spooled(m.dir)) == 0 })

			part("whole", 200, 0, size, "")
			part("all by a range", 206, 0, size, "bytes=0-")
			part("open", 206, 777, size, "bytes=777-")
			part("suffix", 206, size-3_333_333, size, "bytes=-3333333")
			part("bounded", 206, 777, 4_000_001, "bytes=777-4000000")
			part("a MiB", 206, 1<<20, 2<<20, fmt.Sprintf("bytes=%d-%d", 1<<20, 2<<20-1))
			part("half a MiB", 206, 777, 777+500_000, "bytes=777-500776")
			for _, n := range []int{1, 511, 512, 513, 2 << 10, 8 << 10, 8<<10 + 1, 10<<10 + 1, 32 << 10, 32<<10 + 1, 64 << 10, 64<<10 + 1, 66 << 10} {
				a := m.want(206, "GET", path, "Range", fmt.Sprintf("bytes=777-%d", 777+n-1))
				if !bytes.Equal(a.body, layer.Data[777:777+n]) {
					t.Errorf("wrong bytes of %d", n)
				}
				a = m.want(206, "GET", path, "Range", fmt.Sprintf("bytes=-%d", n))
				if !bytes.Equal(a.body, layer.Data[size-n:]) {
					t.Errorf("wrong bytes of the last %d", n)
				}
			}
		})
	}
}

// slow asks for a blob with a small buffer of its own.
func (m *mirror) slow(path string, header ...string) *http.Response {
	m.t.Helper()
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10)
		})
		return errors.Join(controlErr, err)
	}}
	transport := &http.Transport{DialContext: dialer.DialContext, DisableCompression: true, ReadBufferSize: 4 << 10}
	m.t.Cleanup(transport.CloseIdleConnections)
	req, err := http.NewRequest("GET", m.URL+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// TestSlowClients: a client that is slow and alive is not cut, though it takes
// longer for what is sent at once than it may be idle; one that stands still is.
func TestSlowClients(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", 1<<20+200_000)
	up.Push("library/x", regtest.NewImage("x", layer), "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	m.wired(32<<10, upstreamFor("docker.io", up), `"write_idle_timeout": 1000000000,`)
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	m.want(200, "GET", path)
	eventually(t, "the blob to be held", func() bool { return len(m.logs.with("filled")) == 1 && len(spooled(m.dir)) == 0 })

	var all sync.WaitGroup
	for _, from := range []int{0, 777} {
		all.Go(func() {
			to := len(layer.Data) - from
			resp := m.slow(path, "Range", fmt.Sprintf("bytes=%d-%d", from, to-1))
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			var body bytes.Buffer
			var err error
			begun := time.Now()
			for err == nil {
				_, err = io.CopyN(&body, resp.Body, 6<<10)
				<-tick.C
			}
			if err != io.EOF || !bytes.Equal(body.Bytes(), layer.Data[from:to]) {
				t.Errorf("%d bytes of %d arrived: %v", body.Len(), to-from, err)
			}
			if took := time.Since(begun); took < 2*time.Second {
				t.Errorf("it took %v; this proves nothing", took)
			}
		})
	}
	all.Wait()
	if lines := m.logs.with("answer broken off"); len(lines) != 0 {
		t.Error(lines)
	}

	resp := m.slow(path)
	eventually(t, "the client that stands still to be cut", func() bool { return len(m.logs.with("answer broken off")) == 1 })
	if line := fmt.Sprint(m.logs.with("answer broken off")[0]["error"]); !strings.Contains(line, "timeout") {
		t.Error(line)
	}
	if body, err := io.ReadAll(resp.Body); err == nil || len(body) == len(layer.Data) {
		t.Errorf("%d bytes arrived, %v", len(body), err)
	}
}

// TestHangUps: a client that goes away is nothing to warn of, and a source that
// fails is.
func TestHangUps(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", 24<<20)
	up.Push("library/x", regtest.NewImage("x", layer), "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	const message = "answer broken off"
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.want(200, "GET", path)
	eventually(t, "the blob to be held", func() bool { return len(m.logs.with("filled")) == 1 && len(spooled(m.dir)) == 0 })

	const clients = 20
	address := strings.TrimPrefix(m.URL, "http://")
	for range clients {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, address)
		if _, err := io.CopyN(io.Discard, conn, 100_000); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
	eventually(t, "all answers to be broken off", func() bool { return len(m.logs.with(message)) == clients })
	for _, line := range m.logs.with(message) {
		if line["level"] != "debug" {
			t.Error(line)
		}
	}

	resp := m.open("GET", path) // more than fits into buffers on the way
	defer resp.Body.Close()
	files := kept(m.dir, layer.Digest)
	if len(files) != 1 {
		t.Fatalf("kept: %q", files)
	}
	if err := os.Truncate(files[0], 23<<20); err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("%d bytes, and no error", len(body))
	}
	eventually(t, "another answer to be broken off", func() bool { return len(m.logs.with(message)) == clients+1 })
	if line := m.logs.with(message)[clients]; line["level"] != "warn" {
		t.Error(line)
	}
}
