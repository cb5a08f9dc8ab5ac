//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// systemCalls is what a process has sent or written, by the call that did it.
// How a spool is written, at an offset, is not in it.
type systemCalls struct {
	calls map[string]int
	bytes map[string]int64
}

// finished is a call in strace's output, or the end of one.
var finished = regexp.MustCompile(`(?m)^\d+ +(?:<\.\.\. )?(sendfile|write|writev|sendto|sendmsg|splice)(?: resumed>|\().*= (\d+)$`)

// watch counts the system calls of a process until the function that it returns
// is called.
func watch(t *testing.T, pid int) func() systemCalls {
	t.Helper()
	out := filepath.Join(workDir(t), "strace")
	tracer := start(t, bare(workDir(t)), tool(t, "strace"), "-f", "-o", out, "-s", "0",
		"-e", "trace=sendfile,write,writev,sendto,sendmsg,splice", "-p", strconv.Itoa(pid))
	tracer.untilReady(t, func() bool {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil || len(tasks) == 0 {
			return false
		}
		for _, task := range tasks {
			status, err := os.ReadFile(task)
			if err == nil && strings.Contains(string(status), "\nTracerPid:\t0\n") {
				return false
			}
		}
		return true
	})
	return func() systemCalls {
		t.Helper()
		tracer.signal(t, syscall.SIGINT) // it leaves the process as it was
		tracer.wait(t, 20*time.Second)
		text, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		s := systemCalls{map[string]int{}, map[string]int64{}}
		for _, call := range finished.FindAllStringSubmatch(string(text), -1) {
			n, err := strconv.ParseInt(call[2], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			s.calls[call[1]]++
			s.bytes[call[1]] += n
		}
		return s
	}
}

// TestSendfile: blobs, parts of blobs, and blobs on their way are sent by the
// kernel from their files.
func TestSendfile(t *testing.T) {
	const pace = 16 << 20
	img := newImageOf(t, "sendfile", 64)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	counted := startCounter(t, upstream.addr)
	m := startMirror(t, setup{registry: dockerHub(counted.addr)})
	// The manifests say how long the layer is.
	for _, reference := range []string{"latest", img.child} {
		wantStatus(t, m.addr, "/v2/library/hello/manifests/"+reference, http.StatusOK)
	}
	compressed, err := img.layer.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := io.ReadAll(compressed)
	if err != nil {
		t.Fatal(err)
	}
	size := len(layer)

	// get gets the layer or a part of it, and returns what the mirror did for
	// that.
	get := func(t *testing.T, ranges string, from, to int, early func()) systemCalls {
		t.Helper()
		stop := watch(t, m.cmd.Process.Pid)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.addr+"/v2/library/hello/blobs/"+img.big, nil)
		if err != nil {
			t.Fatal(err)
		}
		if ranges != "" {
			req.Header.Set("Range", ranges)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		early()
		body, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(body, layer[from:to]) {
			t.Fatalf("%s: %s, %d bytes of %d, or wrong ones: %v", ranges, resp.Status, len(body), to-from, err)
		}
		return stop()
	}
	check := func(t *testing.T, s systemCalls, length, most int, others int64) {
		t.Helper()
		t.Logf("of %d bytes: %v, calls %v", length, s.bytes, s.calls)
		if sent := s.bytes["sendfile"]; float64(sent) < 0.95*float64(length) || sent > int64(length) {
			t.Errorf("%d of %d bytes were sent by sendfile", sent, length)
		}
		if n := s.calls["sendfile"]; n > most {
			t.Errorf("%d calls of sendfile for %d bytes", n, length)
		}
		var rest int64
		for call, n := range s.bytes {
			if call != "sendfile" {
				rest += n
			}
		}
		if rest > others {
			t.Errorf("%d bytes were written otherwise: %v", rest, s.bytes)
		}
	}

	t.Run("live", func(t *testing.T) {
		counted.slow(pace)
		var before atomic.Int64
		s := get(t, "", 0, size, func() { before.Store(counted.fetched(img.big)) })
		if n := before.Load(); n > int64(size)/2 {
			t.Errorf("%d bytes had come when the answer began; this proves nothing", n)
		}
		check(t, s, size, size/(16<<10), int64(size)/20)
	})
	eventually(t, 20*time.Second, "the layer to be kept", func() bool { return m.said("filled", img.big) })
	counted.stop()
	for _, c := range []struct {
		name, ranges string
		from, to     int
	}{
		{"whole", "", 0, size},
		{"all by a range", "bytes=0-", 0, size},
		{"bounded", fmt.Sprintf("bytes=12345-%d", size-54322), 12345, size - 54321},
		{"open", "bytes=12345-", 12345, size},
		{"suffix", "bytes=-33333333", size - 33333333, size},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := get(t, c.ranges, c.from, c.to, func() {})
			check(t, s, c.to-c.from, (c.to-c.from)/(128<<10), 64<<10)
		})
	}
}
