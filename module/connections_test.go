package module_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

var (
	mostConnections = 15_000 // idle ones
	residentCounts  = true   // what the kernel sees is what the program takes
)

// weight is the memory of a process, in bytes.
type weight struct {
	resident int64 // as the kernel sees it
	used     int64 // heap and stacks, as Go does
}

// weigh answers each line with the process's own weight, after a collection.
func weigh(in io.Reader, out io.Writer) {
	for lines := bufio.NewScanner(in); lines.Scan(); {
		runtime.GC() // what pools hold goes with the second one
		debug.FreeOSMemory()
		var w weight
		if status, err := os.ReadFile("/proc/self/status"); err == nil {
			if _, line, ok := strings.Cut(string(status), "VmRSS:"); ok {
				fmt.Sscan(line, &w.resident)
			}
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		w.used = int64(m.HeapAlloc + m.StackInuse)
		fmt.Fprintln(out, w.resident<<10, w.used)
	}
}

// A scale is a Caddy in a process of its own that can be weighed.
type scale struct {
	t    *testing.T
	addr string
	in   io.WriteCloser
	out  *bufio.Scanner
}

// startScale starts one with the given options, and with a site.
func startScale(t *testing.T, options, site string) *scale {
	t.Helper()
	s := &scale{t: t, addr: regtest.FreeAddress(t)}
	config := fmt.Sprintf(`{
		admin off
		auto_https off
		persist_config off
		%s
	}
	http://%s {
		%s
	}`, options, s.addr, site)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"=none", childConfig+"="+config,
		"XDG_DATA_HOME="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if s.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		late.Stop()
		cmd.Process.Kill()
		cmd.Wait()
	})
	s.out = bufio.NewScanner(out)
	for s.out.Scan() && s.out.Text() != "serving" {
	}
	if s.out.Text() != "serving" {
		t.Fatal("the child does not serve")
	}
	return s
}

// weigh returns what the process weighs once that does not change any more.
func (s *scale) weigh() weight {
	s.t.Helper()
	var last weight
	for range 100 {
		if _, err := io.WriteString(s.in, "\n"); err != nil || !s.out.Scan() {
			s.t.Fatalf("the child has died: %v", errors.Join(err, s.out.Err()))
		}
		var now weight
		if _, err := fmt.Sscan(s.out.Text(), &now.resident, &now.used); err != nil || now.resident == 0 {
			s.t.Fatalf("the child says %q: %v", s.out.Text(), err)
		}
		if near(now.resident, last.resident) && near(now.used, last.used) {
			return now
		}
		last = now
	}
	s.t.Fatal("the child's weight does not come to rest")
	return last
}

// near tells whether two weights differ by less than half a percent.
func near(a, b int64) bool { return max(a, b)-min(a, b) <= max(a, b)/200 }

// A held is a connection on which a request has been answered.
type held struct {
	net.Conn
	resp *http.Response
}

// ask sends a request and reads the answer's header.
func (h *held) ask(addr, path string) (err error) {
	if _, err = fmt.Fprintf(h, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, addr); err != nil {
		return err
	}
	if h.resp, err = http.ReadResponse(bufio.NewReaderSize(h, 1<<10), nil); err == nil && h.resp.StatusCode != http.StatusOK {
		err = errors.New(h.resp.Status)
	}
	return err
}

// hold opens n connections and sends a request on each. It reads the answers'
// bodies where all is set, and nothing of them otherwise.
func (s *scale) hold(n int, path string, all bool) []*held {
	s.t.Helper()
	// Without this the kernel takes megabytes for whoever does not read.
	dialer := net.Dialer{Control: func(_, _ string, conn syscall.RawConn) (err error) {
		if controlErr := conn.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10)
		}); controlErr != nil {
			return controlErr
		}
		return err
	}}
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	conns := make([]*held, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	failures := make(chan error, 8)
	for range cap(failures) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				conn, err := dialer.DialContext(ctx, "tcp", s.addr)
				if err == nil {
					conns[i] = &held{Conn: conn}
					conn.SetDeadline(time.Now().Add(5 * time.Minute))
					err = conns[i].ask(s.addr, path)
				}
				if err == nil && all {
					_, err = io.Copy(io.Discard, conns[i].resp.Body)
				}
				if err != nil {
					failures <- fmt.Errorf("connection %d, GET %s: %w", i, path, err)
					return
				}
			}
		})
	}
	wg.Wait()
	s.t.Cleanup(func() { drop(conns) })
	close(failures)
	for err := range failures {
		s.t.Fatal(err)
	}
	return conns
}

func drop(conns []*held) {
	for _, c := range conns {
		if c != nil {
			c.Conn.(*net.TCPConn).SetLinger(0) // and leave no TIME_WAIT
			c.Close()
		}
	}
}

// A perConnection is what one connection weighs, in bytes.
type perConnection struct{ idle, slow weight }

// compare measures the connections to a site: idle ones after a request for one
// path, and others that do not read what they asked for, which is at another.
func (s *scale) compare(idle, slow int, small, large string) (each perConnection) {
	s.t.Helper()
	drop(s.hold(100, small, true)) // whatever is made once is there now
	drop(s.hold(20, large, false))
	empty := s.weigh()
	conns := s.hold(idle, small, true)
	some := s.weigh()
	readers := s.hold(slow, large, false)
	full := s.weigh()
	each.idle = less(some, empty, idle)
	each.slow = less(full, some, slow)

	// They are what they are meant to be.
	for i := 0; i < idle; i += idle / 50 {
		if err := conns[i].ask(s.addr, small); err != nil {
			s.t.Errorf("an idle connection is of no use: %v", err)
		}
	}
	for i := 0; i < slow; i += slow / 20 {
		if n, err := io.CopyN(io.Discard, readers[i].resp.Body, 4<<20); err != nil {
			s.t.Errorf("a slow connection ended after %d bytes: %v", n, err)
		}
	}
	drop(conns)
	drop(readers)
	return each
}

func less(a, b weight, n int) weight {
	return weight{(a.resident - b.resident) / int64(n), (a.used - b.used) / int64(n)}
}

// TestConnectionMemory: a connection to a mirror, idle or in the middle of a blob
// that its client does not read, takes as much memory as one to Caddy's own
// handlers.
func TestConnectionMemory(t *testing.T) {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	files.Cur = files.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	idle, slow := mostConnections, max(mostConnections/15, 100)
	// A slow one takes a socket and a file, and each process has its own files.
	if most := int(min(files.Max, 1<<20)) - 500; idle+2*slow > most {
		idle, slow = most*15/17, most/17
	}
	if idle < 1000 || slow < 100 {
		t.Fatalf("no more than %d files can be open, which is too few to tell anything: raise the hard limit (ulimit -Hn) to 3000 or more", files.Max)
	}
	t.Logf("%d idle connections and %d slow ones, of up to %d files", idle, slow, files.Max)

	up := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x", regtest.Random("x", 64<<20))
	layer := image.Blobs[1]
	up.Push("library/x", image, "latest")
	dir := t.TempDir()

	mirrored := startScale(t, fmt.Sprintf("servers {\n timeouts {\n write_idle 10m\n }\n }\n registry {\n storage disk %s {\n min_free 1MB\n }\n %s\n }", dir, upstreamFor("docker.io", up)), "registry_mirror")
	m := &mirror{t: t, URL: "http://" + mirrored.addr}
	m.pull("library/x", "latest", image)
	client.CloseIdleConnections()
	eventually(t, "the blob to be stored", func() bool { return len(kept(dir, layer.Digest)) > 0 })
	ours := mirrored.compare(idle, slow, "/v2/library/x/manifests/"+image.Digest.String(), "/v2/library/x/blobs/"+layer.Digest.String())

	file := kept(dir, layer.Digest)[0]
	// With its limit, Caddy copies files instead of having the kernel send them,
	// and every connection has a buffer for that.
	plain := startScale(t, "servers {\n timeouts {\n write_idle -1s\n }\n }", "respond /ok ok\nfile_server {\n root "+filepath.Dir(file)+"\n}")
	theirs := plain.compare(idle, slow, "/ok", "/"+filepath.Base(file))

	for _, c := range []struct {
		what         string
		ours, theirs int64
	}{
		{"idle, resident", ours.idle.resident, theirs.idle.resident},
		{"idle, used", ours.idle.used, theirs.idle.used},
		{"slow, resident", ours.slow.resident, theirs.slow.resident},
		{"slow, used", ours.slow.used, theirs.slow.used},
	} {
		t.Logf("%s: %d bytes a connection of the mirror, %d of Caddy", c.what, c.ours, c.theirs)
		if c.ours > c.theirs*5/4+2<<10 && (residentCounts || !strings.HasSuffix(c.what, "resident")) {
			t.Errorf("%s: a connection of the mirror takes %d bytes, one of Caddy's own handlers %d", c.what, c.ours, c.theirs)
		}
	}
}
