//go:build bench

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// A fileServer is what backing images are uploaded to and downloaded from.
type fileServer struct {
	pushServer
	put    func(round int) string // the path to upload to
	stored int                    // the status of an upload
	prefer string
	get    func(t *testing.T, round int, answer []byte, b blob) string
	after  func(t *testing.T, round int)

	up, down           []float64 // MB/s
	upPeaks, downPeaks []int64   // MiB
	jobs               []float64 // seconds that went by after the answer
}

// TestBackingImages: how fast an image is uploaded and downloaded, beside an nginx that
// takes and gives files by itself. They begin with an empty directory on the same disk
// and take turns. nginx answers when the bytes are in its file; so does the product where
// that is preferred ("async"), and a job does the rest. Else it has hashed them twice, and
// has them on the disk, before it answers.
func TestBackingImages(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Log("there is no nginx in PATH: only the product is measured")
	}
	caddy := build(t)
	servers := []*fileServer{startImages(t, caddy, ""), startImages(t, caddy, "respond-async")}
	if nginx != "" {
		servers = append(servers, startNginx(t, nginx))
	}
	for round := range *rounds {
		b := newBlob(1<<60|uint64(round), *largeLayer)
		for i := range servers {
			servers[(i+round)%len(servers)].exchange(t, round, b)
		}
	}
	for _, s := range servers {
		t.Logf("%-6s upload   median %6.1f MB/s, rounds %.1f; peak RSS of the rounds %d MiB", s.name, median(s.up), s.up, s.upPeaks)
		if len(s.jobs) > 0 {
			t.Logf("%-6s jobs after the answer: %.1f s", s.name, s.jobs)
		}
		t.Logf("%-6s download median %6.1f MB/s, rounds %.1f; peak RSS of the rounds %d MiB", s.name, median(s.down), s.down, s.downPeaks)
	}
	if nginx == "" {
		return
	}
	is := servers[len(servers)-1]
	for _, s := range servers[:len(servers)-1] {
		t.Logf("%s: %.2f times nginx in upload, %.2f in download", s.name, median(s.up)/median(is.up), median(s.down)/median(is.down))
	}
}

// startImages runs the product; prefer is what its clients prefer, or empty.
func startImages(t *testing.T, caddy, prefer string) *fileServer {
	t.Helper()
	s := &fileServer{
		pushServer: pushServer{name: "images", addr: regtest.FreeAddress(t)},
		put:        func(round int) string { return fmt.Sprintf("/v1/backing-images/image%d/content", round) },
		stored:     http.StatusCreated,
		get: func(t *testing.T, _ int, answer []byte, b blob) string {
			var v backing.Version
			if err := json.Unmarshal(answer, &v); err != nil || v.Digests.SHA256 != b.digest {
				t.Fatalf("%v: %s", err, answer)
			}
			return v.URLs.File
		},
		after: func(*testing.T, int) {},
	}
	if prefer != "" {
		s.name, s.prefer, s.stored = "async", prefer, http.StatusAccepted
		made := s.get
		s.get = func(t *testing.T, round int, answer []byte, b blob) string {
			return made(t, round, s.made(t, answer), b)
		}
	}
	s.run(t, "Caddyfile", fmt.Sprintf(`{
	admin off
	registry {
		storage disk %s {
			min_free 1%%
		}
		backing_images {
			public_url http://%s
		}
	}
}
http://%[2]s {
	backing_images {
		access {
			allow any to anyone
		}
	}
}
`, t.TempDir(), s.addr), caddy, "run", "--adapter", "caddyfile", "--config")
	return s
}

// made waits for the job of an upload, and returns the version that it has made.
func (s *fileServer) made(t *testing.T, answer []byte) []byte {
	t.Helper()
	var j backing.Job
	err := json.Unmarshal(answer, &j)
	begun := time.Now()
	resp, err := get(s.addr, "/v1/jobs/"+j.ID+"?watch=1", err)
	if err != nil || !strings.Contains(string(resp), `"state":"succeeded"`) {
		t.Fatalf("%v: %s", err, resp)
	}
	s.jobs = append(s.jobs, time.Since(begun).Seconds())
	resp, err = get(s.addr, "/v1/backing-images/"+j.Name+"/versions/"+j.Version, nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func get(addr, path string, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	resp, err := http.Get("http://" + addr + path)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

func startNginx(t *testing.T, nginx string) *fileServer {
	t.Helper()
	dir := t.TempDir()
	path := func(round int) string { return fmt.Sprintf("/image%d", round) }
	s := &fileServer{
		pushServer: pushServer{name: "nginx", addr: regtest.FreeAddress(t)},
		put:        path,
		stored:     http.StatusCreated,
		after: func(t *testing.T, round int) {
			if err := os.Remove(filepath.Join(dir, "files", path(round))); err != nil {
				t.Fatal(err)
			}
		},
	}
	s.get = func(_ *testing.T, round int, _ []byte, _ blob) string { return "http://" + s.addr + path(round) }
	for _, sub := range []string{"files", "tmp"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t, "nginx.conf", fmt.Sprintf(`
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr;
events {}
http {
	access_log off;
	sendfile on;
	client_max_body_size 0;
	client_body_temp_path %[1]s/tmp;
	server {
		listen %[2]s;
		root %[1]s/files;
		location / { dav_methods PUT; }
	}
}
`, dir, s.addr), nginx, "-p", dir, "-c")
	return s
}

// exchange uploads an image and downloads it.
func (s *fileServer) exchange(t *testing.T, round int, b blob) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{}}
	defer c.CloseIdleConnections()
	var answer []byte
	s.timed(t, b, &s.up, &s.upPeaks, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+s.addr+s.put(round), b.open())
		if err != nil {
			return err
		}
		req.ContentLength = b.size
		if s.prefer != "" {
			req.Header.Set("Prefer", s.prefer)
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if answer, err = io.ReadAll(resp.Body); err == nil && resp.StatusCode != s.stored {
			err = fmt.Errorf("%s: %s", resp.Status, answer)
		}
		return err
	})
	from := s.get(t, round, answer, b)
	s.timed(t, b, &s.down, &s.downPeaks, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, from, nil)
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		buffer := make([]byte, 1<<20)
		var n int64
		for err == nil {
			var m int
			m, err = resp.Body.Read(buffer)
			n += int64(m)
		}
		if err != io.EOF || n != b.size || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s, %d bytes of %d: %v", resp.Status, n, b.size, err)
		}
		return nil
	})
	s.after(t, round)
}

func (s *fileServer) timed(t *testing.T, b blob, rates *[]float64, peaks *[]int64, do func() error) {
	t.Helper()
	// What the one before has left to be written is not this one's burden.
	syscall.Sync()
	// 5 makes VmHWM begin anew.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	*rates = append(*rates, float64(b.size)/1e6/time.Since(begun).Seconds())
	*peaks = append(*peaks, s.peak(t)>>10)
}
