package module_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-registry/mirror"
	"github.com/caddy-registry/mirror/internal/regtest"
)

func TestMain(m *testing.M) {
	if os.Getenv(childCommand) != "" {
		caddycmd.Main() // see command_test.go
		return
	}
	if os.Getenv(childDir) != "" {
		runChild() // see kill_test.go
		return
	}
	home, err := os.MkdirTemp("", "registry-test-")
	if err != nil {
		log.Fatal(err)
	}
	os.Setenv("XDG_DATA_HOME", home)
	os.Setenv("XDG_CONFIG_HOME", home)
	code := m.Run()
	caddy.Stop()
	client.CloseIdleConnections()
	if code == 0 {
		// Of Caddy's own goroutines these outlive Stop.
		find := func() error {
			return goleak.Find(
				goleak.IgnoreTopFunction("github.com/caddyserver/caddy/v2.(*fakeCloseListener).Accept"),
				goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
				goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth.init.0.func1"),
				goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
				goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"),
			)
		}
		err := find()
		for range 10 {
			if err == nil {
				break
			}
			// A connection whose body was refused ends half a second after the answer.
			err = find() // which waits about as long
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.RemoveAll(home)
	os.Exit(code)
}

// A mirror is an in-process Caddy, of which there is one at a time.
type mirror struct {
	t   testing.TB
	URL string
	dir string // of the store
	// admin is the address of the admin API; "": off.
	admin string
	logs  *logs
	// loaded is when a configuration was last loaded.
	loaded time.Time
	// process and died are of one that is a process of its own; see child.
	process *os.Process
	died    chan struct{}
}

// start runs Caddy with the app's options and the site's, as they stand in a
// Caddyfile. Words in braces are replaced: DIR, the store's directory.
func start(t testing.TB, app, site string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	if err := m.load(app, site); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	return m
}

func (m *mirror) stop() {
	if err := caddy.Stop(); err != nil {
		m.t.Error(err)
	}
	client.CloseIdleConnections()
	unlocked(m.t, m.dir)
}

// unlocked waits until nobody has a store open: closing goes on behind a
// configuration's end.
func unlocked(t testing.TB, dir string) {
	eventually(t, "the store to be closed", func() bool {
		f, err := os.Open(filepath.Join(dir, "mirror", "lock"))
		if err != nil {
			return true // never opened
		}
		defer f.Close()
		return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
	})
}

// load loads a configuration, in place of the one that runs.
func (m *mirror) load(app, site string) error {
	m.t.Helper()
	adapted, err := m.adapt(app, site)
	if err != nil {
		return err
	}
	return m.loadJSON(adapted)
}

func (m *mirror) loadJSON(adapted []byte) error {
	// Connections of the configuration that ends are closed under the client.
	defer func() {
		client.CloseIdleConnections()
		m.loaded = time.Now()
	}()
	return caddy.Load(adapted, true)
}

func (m *mirror) adapt(app, site string) ([]byte, error) {
	if !strings.Contains(app, "storage ") {
		app = "storage disk " + m.dir + " {\n min_free 1MB\n}\n" + app
	}
	return adapt(fmt.Sprintf(`{
		admin %s
		auto_https off
		persist_config off
		grace_period 10s
		log {
			output regtest
			level debug
		}
		registry {
			%s
		}
	}
	%s {
		registry_mirror {
			%s
		}
		respond "not the mirror" 418
	}`, cmp.Or(m.admin, "off"), app, m.URL, site))
}

func adapt(text string) ([]byte, error) {
	adapted, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Testfile"})
	return adapted, err
}

// upstreamFor is the Caddyfile block that makes a fake registry an upstream.
func upstreamFor(name string, r *regtest.Registry, options ...string) string {
	return fmt.Sprintf("upstream %s {\n origin %s\n allow_private\n %s\n}\n", name, r.URL, strings.Join(options, "\n"))
}

var client = &http.Client{
	Transport:     &http.Transport{MaxIdleConnsPerHost: 100, DisableCompression: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Timeout:       time.Minute,
}

// An answer is a response that has been read to its end.
type answer struct {
	*http.Response
	body []byte
	err  error // of reading the body
}

func (m *mirror) do(method, path string, header ...string) *answer {
	m.t.Helper()
	resp := m.open(method, path, header...)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return &answer{resp, body, err}
}

// open sends a request and leaves the body to be read. header is pairs of
// names and values.
func (m *mirror) open(method, path string, header ...string) *http.Response {
	m.t.Helper()
	resp, err := m.send(method, path, header...)
	if err != nil {
		m.t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp
}

func (m *mirror) send(method, path string, header ...string) (*http.Response, error) {
	req, err := http.NewRequest(method, m.URL+path, nil)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	return m.roundTrip(req)
}

// roundTrip sends a request, and again if it met a socket that was closing. On a
// reload Caddy opens a second one on the port (SO_REUSEPORT) and closes the first a
// moment later. The kernel resets connections that still wait in the first one's
// queue, as any client may see.
func (m *mirror) roundTrip(req *http.Request) (*http.Response, error) {
	resp, err := client.Do(req)
	for err != nil && time.Since(m.loaded) < time.Second && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		if req.GetBody != nil {
			req.Body, _ = req.GetBody() // of bytes: it cannot fail
		}
		resp, err = client.Do(req)
	}
	return resp, err
}

// want asks and checks the status.
func (m *mirror) want(status int, method, path string, header ...string) *answer {
	m.t.Helper()
	a := m.do(method, path, header...)
	if a.StatusCode != status {
		m.t.Fatalf("%s %s %q: status %d, want %d: %.300q", method, path, header, a.StatusCode, status, a.body)
	}
	if a.err != nil {
		m.t.Fatalf("%s %s %q: %v", method, path, header, a.err)
	}
	return a
}

// wantError asks, and checks status, OCI code and parts of the message.
func (m *mirror) wantError(status int, code, method, path string, says ...string) *answer {
	m.t.Helper()
	a := m.want(status, method, path)
	if got := a.Header.Get("Content-Type"); got != "application/json" {
		m.t.Errorf("%s %s: an error of type %q", method, path, got)
	}
	if method == http.MethodHead {
		return a
	}
	var reply struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(a.body, &reply); err != nil || len(reply.Errors) != 1 {
		m.t.Fatalf("%s %s: %s: %v", method, path, a.body, err)
	}
	if reply.Errors[0].Code != code {
		m.t.Errorf("%s %s: code %s, want %s (%s)", method, path, reply.Errors[0].Code, code, reply.Errors[0].Message)
	}
	for _, part := range says {
		if !strings.Contains(reply.Errors[0].Message, part) {
			m.t.Errorf("%s %s: %q does not mention %q", method, path, reply.Errors[0].Message, part)
		}
	}
	return a
}

// pull does what a client does with an image, and checks every byte.
func (m *mirror) pull(repository, reference string, image regtest.Image) {
	m.t.Helper()
	if err := m.tryPull(repository, reference, image); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mirror) tryPull(repository, reference string, image regtest.Image) error {
	a := m.do(http.MethodGet, "/v2/"+repository+"/manifests/"+reference)
	if err := check(a, image.Content); err != nil {
		return fmt.Errorf("%s:%s: %w", repository, reference, err)
	}
	for _, child := range image.Children {
		if err := m.tryPull(repository, child.Digest.String(), child); err != nil {
			return err
		}
	}
	for _, blob := range image.Blobs {
		a := m.do(http.MethodGet, "/v2/"+repository+"/blobs/"+blob.Digest.String())
		blob.MediaType = "application/octet-stream"
		if err := check(a, blob); err != nil {
			return fmt.Errorf("%s@%s: %w", repository, blob.Digest, err)
		}
	}
	return nil
}

func check(a *answer, want regtest.Content) error {
	switch {
	case a.StatusCode != http.StatusOK:
		return fmt.Errorf("status %d: %.300s", a.StatusCode, a.body)
	case a.err != nil:
		return a.err
	case !bytes.Equal(a.body, want.Data):
		return fmt.Errorf("%d bytes that are not the %d expected", len(a.body), len(want.Data))
	case a.Header.Get("Docker-Content-Digest") != want.Digest.String():
		return fmt.Errorf("digest %s", a.Header.Get("Docker-Content-Digest"))
	case a.Header.Get("Content-Type") != want.MediaType:
		return fmt.Errorf("type %s, want %s", a.Header.Get("Content-Type"), want.MediaType)
	case a.ContentLength != int64(len(want.Data)):
		return fmt.Errorf("Content-Length %d", a.ContentLength)
	case a.Header.Get("ETag") != `"`+want.Digest.String()+`"`:
		return fmt.Errorf("ETag %s", a.Header.Get("ETag"))
	case a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0":
		return errors.New("no Docker-Distribution-Api-Version")
	case a.Header.Get("Content-Encoding") != "":
		return errors.New("it is encoded")
	}
	return nil
}

// forgetRecords makes a store look as if registry:2 had written it.
func forgetRecords(t testing.TB, dir string) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(dir, "mirror", "records")); err != nil {
		t.Fatal(err)
	}
}

// spooled lists what is on its way into a store.
func spooled(dir string) []string {
	files, _ := filepath.Glob(filepath.Join(dir, "mirror/spool/*/*"))
	halves, _ := filepath.Glob(filepath.Join(dir, "mirror/temp/*"))
	return append(files, halves...)
}

// kept lists the files of a blob's bytes in a store.
func kept(dir string, d digest.Digest) []string {
	files, _ := filepath.Glob(filepath.Join(dir, "docker/registry/v2/blobs/sha256/*/"+d.Encoded()+"/*"))
	return files
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// logs collects what Caddy logs, by its own log output module.
type logs struct {
	mu    sync.Mutex
	lines []map[string]any
}

var capture struct {
	mu sync.Mutex
	to *logs
}

func captureLogs(t testing.TB) *logs {
	l := new(logs)
	capture.mu.Lock()
	capture.to = l
	capture.mu.Unlock()
	t.Cleanup(func() {
		if t.Failed() {
			l.mu.Lock()
			defer l.mu.Unlock()
			for _, line := range l.lines {
				if name, _ := line["logger"].(string); strings.Contains(name, "registry") {
					t.Log(line)
				}
			}
		}
	})
	return l
}

// with returns the lines that have a message.
func (l *logs) with(message string) []map[string]any {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []map[string]any
	for _, line := range l.lines {
		if line["msg"] == message {
			found = append(found, maps.Clone(line))
		}
	}
	return found
}

// logOutput is the Caddy module caddy.logging.writers.regtest.
type logOutput struct{}

func init() { caddy.RegisterModule(logOutput{}) }

func (logOutput) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.regtest", New: func() caddy.Module { return new(logOutput) }}
}
func (*logOutput) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }
func (logOutput) String() string                                 { return "regtest" }
func (logOutput) WriterKey() string                              { return "regtest" }
func (logOutput) OpenWriter() (io.WriteCloser, error)            { return logOutput{}, nil }
func (logOutput) Close() error                                   { return nil }
func (logOutput) Write(p []byte) (int, error) {
	capture.mu.Lock()
	to := capture.to
	capture.mu.Unlock()
	var line map[string]any
	if to != nil && json.Unmarshal(p, &line) == nil {
		to.mu.Lock()
		to.lines = append(to.lines, line)
		to.mu.Unlock()
	}
	return len(p), nil
}
