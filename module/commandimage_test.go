package module_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// imageProcess is `caddy registry backing-images` as a process, with nothing but its
// environment.
type imageProcess struct {
	*mirror
	cmd    *exec.Cmd
	stderr *safeBuffer
	ended  chan error
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// imageEnv is an environment without anything of whoever runs the tests but what a
// program needs.
func imageEnv(t *testing.T, more ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), childCommand + "=1", "CADDY_ADMIN=" + regtest.FreeAddress(t)}, more...)
}

func startImageProcess(t *testing.T, env []string) *imageProcess {
	t.Helper()
	address := regtest.FreeAddress(t)
	p := &imageProcess{mirror: &mirror{t: t, URL: "http://" + address}, stderr: new(safeBuffer), ended: make(chan error, 1)}
	p.cmd = exec.Command(os.Args[0], "registry", "backing-images", "--listen", address)
	p.cmd.Env, p.cmd.Stderr = env, p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	died := make(chan struct{})
	go func() {
		p.ended <- p.cmd.Wait()
		close(died)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-died
	})
	eventually(t, "the server to answer", func() bool {
		select {
		case <-died:
			t.Fatalf("it ended: %s", p.stderr)
		default:
		}
		resp, err := client.Get(p.URL + "/health")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	})
	return p
}

// stop ends the process as a container's runtime does.
func (p *imageProcess) stop() {
	p.t.Helper()
	client.CloseIdleConnections()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case err := <-p.ended:
		if err != nil {
			p.t.Errorf("at SIGTERM: %v: %s", err, p.stderr)
		}
	case <-time.After(time.Minute):
		p.t.Fatal("it does not end at SIGTERM")
	}
}

// TestImageServer: the server that its environment alone configures, with the commands
// that speak to it.
func TestImageServer(t *testing.T) {
	manager := longhorn.New(t, longhorn.Options{})
	dir := t.TempDir()
	env := imageEnv(t, "LONGHORN_API_URL="+manager.URL, "BACKING_IMAGE_STORAGE_PATH="+dir, "LOG_LEVEL=info")
	p := startImageProcess(t, env)
	if a := p.want(200, "GET", "/health"); string(bytes.TrimSpace(a.body)) != `{"status":"ok"}` {
		t.Errorf("/health answers %q", a.body)
	}
	if !strings.Contains(p.stderr.String(), "BACKING_IMAGE_API_TOKEN is not set") {
		t.Errorf("no warning: %s", p.stderr)
	}
	if a := p.want(200, "GET", "/"); !bytes.Contains(a.body, []byte("/v1/backing-images")) || !strings.HasPrefix(a.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("a browser is told %v %q", a.Header, a.body)
	}
	p.want(404, "GET", "/index.html")
	eventually(t, "Longhorn to be seen", func() bool {
		return bytes.Contains(p.want(200, "GET", "/ready").body, []byte(`{"name":"longhorn default","ok":true`))
	})
	p.want(200, "GET", "/v2/")
	p.want(403, "GET", "/v2/library/alpine/manifests/latest?ns=docker.io")

	// As written: a form, without a token.
	file := diskImage("base", 1<<20)
	if a := p.form(map[string]string{"name": "base-ubuntu-20.04"}, file); a.StatusCode != 201 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}

	image := func(args ...string) (int, string, string) {
		t.Helper()
		return command(t, append([]string{"registry", "image", "--url", p.URL}, args...)...)
	}
	second := diskImage("second", 1<<20)
	sum := sha512.Sum512(second)
	status, out, errs := image("add", "base-ubuntu-20.04", imageFile(t, second), "--tag", "stable", "--label", "os=ubuntu", "--sha512", hex.EncodeToString(sum[:]))
	if status != 0 || !strings.Contains(out, "base-ubuntu-20.04:v2") || !strings.Contains(out, hex.EncodeToString(sum[:])) || errs != "" {
		t.Errorf("add: %d %q %q", status, out, errs)
	}
	if status, _, errs := image("add", "x", imageFile(t, second), "--sha512", strings.Repeat("0", 128)); status != 1 || errs == "" || strings.Contains(errs, "Usage:") {
		t.Errorf("a wrong digest: %d %q", status, errs)
	}
	if status, out, errs := image("ls"); status != 0 || !strings.Contains(out, "base-ubuntu-20.04") || !strings.Contains(out, "stable=v2") {
		t.Errorf("ls: %d %q %q", status, out, errs)
	}
	if status, out, errs := image("show", "base-ubuntu-20.04"); status != 0 || !strings.Contains(out, "v1") || !strings.Contains(out, "os=ubuntu") {
		t.Errorf("show: %d %q %q", status, out, errs)
	}
	if status, out, errs := image("tag", "base-ubuntu-20.04:v1", "stable"); status != 0 || out != "base-ubuntu-20.04:stable is v1\n" {
		t.Errorf("tag: %d %q %q", status, out, errs)
	}
	status, out, errs = image("show", "base-ubuntu-20.04:stable", "--json")
	var shown struct{ Version string }
	if err := json.Unmarshal([]byte(out), &shown); err != nil || status != 0 || shown.Version != "v1" {
		t.Errorf("show: %d %q %q", status, out, errs)
	}
	to := filepath.Join(t.TempDir(), "got.img")
	if err := os.WriteFile(to+".part", second[:1<<19], 0o600); err != nil {
		t.Fatal(err)
	}
	if status, out, errs := image("get", "base-ubuntu-20.04:v2", to); status != 0 || out != to+"\n" {
		t.Errorf("get: %d %q %q", status, out, errs)
	}
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, second) {
		t.Errorf("get: %d bytes, %v", len(got), err)
	}
	if status, _, errs := image("rm", "base-ubuntu-20.04"); status != 1 || !strings.Contains(errs, "--all") {
		t.Errorf("rm of all: %d %q", status, errs)
	}
	if status, _, errs := image("rm", "base-ubuntu-20.04:v1"); status != 1 || !strings.Contains(errs, "tag stable") {
		t.Errorf("rm with a tag: %d %q", status, errs)
	}
	if status, _, errs := image("tag", "--delete", "base-ubuntu-20.04", "stable"); status != 0 {
		t.Errorf("tag --delete: %d %q", status, errs)
	}
	if status, _, errs := image("rm", "base-ubuntu-20.04:v1"); status != 0 {
		t.Errorf("rm: %d %q", status, errs)
	}
	if status, _, errs := image("show", "no-such"); status != 1 || strings.Contains(errs, "{") || strings.Count(errs, "\n") != 1 {
		t.Errorf("what is not there: %d %q", status, errs)
	}

	// What it has is there for the next process.
	p.stop()
	p = startImageProcess(t, env)
	if a := p.want(200, "GET", "/v1/backing-images/base-ubuntu-20.04/download"); !bytes.Equal(a.body, second) {
		t.Error("other bytes")
	}
	p.stop()
}

// TestImageUploadCut: the command goes on with an upload that is cut, also when the
// server's last answer is lost.
func TestImageUploadCut(t *testing.T) {
	m := startImages(t, "", "api_token "+imageToken)
	cuts := cutter(t, strings.TrimPrefix(m.URL, "http://"), 300_000, 3)
	file := diskImage("cut", 2<<20)
	status, out, errs := command(t, "registry", "image", "add", "cut", imageFile(t, file), "--url", cuts, "--token", imageToken)
	if status != 0 || !strings.Contains(out, "cut:v1") {
		t.Errorf("%d %q %q", status, out, errs)
	}
	if a := m.want(200, "GET", "/v1/backing-images/cut/download"); !bytes.Equal(a.body, file) {
		t.Error("other bytes")
	}
	if status, _, errs := command(t, "registry", "image", "add", "cut", imageFile(t, file), "--url", m.URL, "--token", "x"); status != 1 || !strings.Contains(errs, "token") {
		t.Errorf("a wrong token: %d %q", status, errs)
	}
}

// cutter passes connections on to an address, and cuts as many of those as it is told
// that have sent so many bytes.
func cutter(t *testing.T, address string, after int64, times int32) (url string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var left atomic.Int32
	left.Store(times)
	var all sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		all.Wait()
		if left.Load() > 0 {
			t.Errorf("%d connections were not cut", left.Load())
		}
	})
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				to, err := net.Dial("tcp", address)
				if err != nil {
					return
				}
				defer to.Close()
				back := make(chan struct{})
				go func() {
					io.Copy(conn, to)
					conn.Close()
					close(back)
				}()
				if n, _ := io.CopyN(to, conn, after); n == after && left.Add(-1) >= 0 {
					conn.(*net.TCPConn).SetLinger(0)
				} else {
					io.Copy(to, conn)
					to.(*net.TCPConn).CloseWrite()
					<-back
					return
				}
				conn.Close()
				to.Close()
				<-back
			})
		}
	})
	return "http://" + listener.Addr().String()
}

// TestImagePullCommand: a pull is followed to its end, and its failure is told of.
func TestImagePullCommand(t *testing.T) {
	m := startImages(t, "allow_private", "api_token "+imageToken)
	file := diskImage("pulled", 1<<20)
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/x.img" {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "x.img", time.Unix(1e9, 0), bytes.NewReader(file))
	}))
	defer source.Close()
	image := func(args ...string) (int, string, string) {
		t.Helper()
		return command(t, append([]string{"registry", "image", "--url", m.URL, "--token", imageToken}, args...)...)
	}
	if status, out, errs := image("pull", "p", source.URL+"/x.img", "--tag", "latest"); status != 0 || !strings.Contains(out, "p:v1") {
		t.Errorf("%d %q %q", status, out, errs)
	}
	if status, _, errs := image("add", "q", source.URL+"/none.img"); status != 1 || !strings.Contains(errs, "404") {
		t.Errorf("404: %d %q", status, errs)
	}
}

// TestImageServerRefused: nothing starts with an environment that is wrong, and all
// that is wrong is told.
func TestImageServerRefused(t *testing.T) {
	cmd := exec.Command(os.Args[0], "registry", "backing-images", "--listen", regtest.FreeAddress(t))
	cmd.Env = imageEnv(t, "STORAGE_BACKEND_TYPE=s3", "LOG_LEVEL=loud", "BACKING_IMAGE_STORAGE_PATH="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v", err)
	}
	for _, part := range []string{"LONGHORN_API_URL", "http://longhorn-backend.longhorn-system:9500", "S3_ENDPOINT", "S3_BUCKET", "S3_ACCESS_KEY", "S3_SECRET_KEY", "LOG_LEVEL"} {
		if !strings.Contains(string(out), part) {
			t.Errorf("%q does not mention %s", out, part)
		}
	}
	if strings.Contains(string(out), "Usage:") {
		t.Errorf("usage: %s", out)
	}
}

// TestImageServerPrint: what is printed can be run, and has no secret in it.
func TestImageServerPrint(t *testing.T) {
	cmd := exec.Command(os.Args[0], "registry", "backing-images", "--print")
	cmd.Env = imageEnv(t, "LONGHORN_API_URL=http://longhorn-backend.longhorn-system:9500", "BACKING_IMAGE_API_TOKEN=the-secret", "BACKING_IMAGE_STORAGE_PATH="+t.TempDir())
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid(out) || bytes.Contains(out, []byte("the-secret")) || !bytes.Contains(out, []byte("{env.BACKING_IMAGE_API_TOKEN}")) {
		t.Errorf("%s", out)
	}
	file := filepath.Join(t.TempDir(), "caddy.json")
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	check := exec.Command(os.Args[0], "validate", "--config", file)
	check.Env = cmd.Env
	if said, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	// Without the secret it does not run.
	check = exec.Command(os.Args[0], "validate", "--config", file)
	check.Env = imageEnv(t)
	if said, err := check.CombinedOutput(); err == nil || !strings.Contains(string(said), "BACKING_IMAGE_API_TOKEN") {
		t.Errorf("%v: %s", err, said)
	}
}
