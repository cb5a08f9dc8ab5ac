package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/module"
)

// halfPulled starts a pull that stands still in the middle until the returned
// channel is closed, and returns what is to be read of it.
func halfPulled(t *testing.T, m *mirror, up *regtest.Registry, repository string, image regtest.Image) (rest func() error, hold chan struct{}) {
	t.Helper()
	layer := image.Blobs[1]
	hold = make(chan struct{})
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Method: "GET", Hold: hold, Offset: int64(len(layer.Data) / 2)})
	m.want(200, "GET", "/v2/"+repository+"/manifests/latest")
	resp := m.open("GET", "/v2/"+repository+"/blobs/"+layer.Digest.String())
	begin := make([]byte, len(layer.Data)/4)
	if _, err := io.ReadFull(resp.Body, begin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return func() error {
		end, err := io.ReadAll(resp.Body)
		if err == nil && !bytes.Equal(append(begin, end...), layer.Data) {
			err = fmt.Errorf("%d bytes, and not those of the layer", len(begin)+len(end))
		}
		return err
	}, hold
}

func bigImage(t *testing.T) regtest.Image {
	return regtest.NewImage(t.Name(), regtest.Random(t.Name(), 3<<20))
}

func TestReloadInMidPull(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	rest, hold := halfPulled(t, m, up, "library/x", image)
	for i := range 3 {
		if err := m.load(upstreamFor("docker.io", up, fmt.Sprintf("tag_ttl %dm", i+2)), ""); err != nil {
			t.Fatal(err)
		}
		// The new configuration finds the fill that is under way.
		a := m.want(206, "GET", "/v2/library/x/blobs/"+image.Blobs[1].Digest.String(), "Range", "bytes=0-99")
		if !bytes.Equal(a.body, image.Blobs[1].Data[:100]) {
			t.Error("wrong bytes")
		}
	}
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	if sent := up.Sent(image.Blobs[1].Digest); sent != 3<<20 {
		t.Errorf("%d bytes were fetched", sent)
	}
	// Tokens survive too.
	up.Forget()
	up.Push("library/x", regtest.NewImage("more"), "more")
	m.want(200, "GET", "/v2/library/x/manifests/more")
	if n := len(up.Requests(func(r regtest.Request) bool { return r.Server == "token" })); n != 0 {
		t.Errorf("%d tokens were asked for after a reload that changed nothing", n)
	}
}

// TestReloadToAnotherStore: the old store stays for those who read it.
func TestReloadToAnotherStore(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	rest, hold := halfPulled(t, m, up, "library/x", image)
	old := m.dir
	m.dir = t.TempDir()
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	// Back to the first while it is still in use by the old configuration's
	// request, and away again.
	other := m.dir
	m.dir = old
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.dir = other
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	unlocked(t, old)
	if left := spooled(old); len(left) > 0 {
		t.Errorf("left in the old store: %q", left)
	}
}

// TestRejectedReload: what fails to load changes nothing.
func TestRejectedReload(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	rest, hold := halfPulled(t, m, up, "library/x", image)
	for range 2 { // twice: a reference given back too often would show
		for name, c := range map[string][2]string{
			"hosted beside a default":   {upstreamFor("docker.io", up), "hosted apps/**"},
			"hosted over a path name":   {upstreamFor("docker.io", up), "default off\nhosted ghcr.io/**"},
			"unknown default":           {upstreamFor("docker.io", up), "default unknown.test"},
			"unset secret":              {upstreamFor("docker.io", up, "credentials a {env.SURELY_NOT_SET}"), ""},
			"two with one path name":    {upstreamFor("docker.io", up, "path_name ghcr.io"), ""},
			"two with one prefix":       {upstreamFor("docker.io", up, "repository_prefix ghcr.io"), ""},
			"one prefix inside another": {upstreamFor("docker.io", up, "repository_prefix ghcr.io/hub"), ""},
			"no such CA":                {upstreamFor("docker.io", up, "ca /nonexistent/ca.pem"), ""},
			"a bad path name":           {upstreamFor("docker.io", up, "path_name Upper"), ""},
			"store in a file":           {"storage disk " + os.Args[0], ""},
		} {
			if err := m.load(c[0], c[1]); err == nil {
				t.Errorf("%s was loaded", name)
			}
		}
	}
	// A store that another process holds is found at the start of the app,
	// the last moment to refuse.
	locked := t.TempDir()
	child(t, locked, "http://127.0.0.1:1", "")
	if err := m.load("storage disk "+locked, ""); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a store in use: %v", err)
	}
	m.want(206, "GET", "/v2/library/x/blobs/"+image.Blobs[1].Digest.String(), "Range", "bytes=0-99")
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	m.pull("library/x", "latest", image)
}

// TestValidate provisions a configuration beside a running pull, and leaves no
// trace of it.
func TestValidate(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	rest, hold := halfPulled(t, m, up, "library/x", image)
	fresh := filepath.Join(t.TempDir(), "not", "yet")
	for _, app := range []string{upstreamFor("docker.io", up), "storage disk " + fresh} {
		var cfg caddy.Config
		adapted, err := m.adapt(app, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(adapted, &cfg); err != nil {
			t.Fatal(err)
		}
		if err := caddy.Validate(&cfg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(fresh)); err == nil {
		t.Error("validating made a directory")
	}
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
}

// TestTwoSites share one store, and one fill.
func TestTwoSites(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	second := *m
	second.URL = "http://" + regtest.FreeAddress(t)
	adapted, err := adapt(fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage disk %s {\n min_free 1MB\n }\n %s\n }\n}\n%s {\n registry_mirror\n}\n%s {\n registry_mirror {\n upstreams docker.io\n }\n}",
		m.dir, upstreamFor("docker.io", up), m.URL, second.URL))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.loadJSON(adapted); err != nil {
		t.Fatal(err)
	}
	rest, hold := halfPulled(t, m, up, "library/x", image)
	done := make(chan error)
	go func() { done <- second.tryPull("library/x", "latest", image) }()
	second.want(206, "GET", "/v2/library/x/blobs/"+image.Blobs[1].Digest.String(), "Range", "bytes=0-9")
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if sent := up.Sent(image.Blobs[1].Digest); sent != 3<<20 {
		t.Errorf("%d bytes were fetched for two sites", sent)
	}
	second.wantError(404, oci.CodeNameUnknown, "GET", "/v2/x/y/manifests/z?ns=ghcr.io")
}

// TestStopWithGrace: a pull under way is finished before Caddy stops.
func TestStopWithGrace(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := bigImage(t)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	rest, hold := halfPulled(t, m, up, "library/x", image)
	stopped := make(chan error)
	go func() { stopped <- caddy.Stop() }()
	address := strings.TrimPrefix(m.URL, "http://")
	eventually(t, "the listener to close", func() bool {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestStoreInTheWay: a store that cannot be made is told of, and nothing of the
// failure stays behind. (A file stands in the way: permissions would not stop
// root.)
func TestStoreInTheWay(t *testing.T) {
	dir := t.TempDir()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: filepath.Join(dir, "store"), logs: captureLogs(t)}
	if err := os.MkdirAll(m.dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.dir, "mirror"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := m.load("", "")
	if err == nil || !strings.Contains(err.Error(), m.dir) {
		t.Errorf("a store that cannot be made: %v", err)
	}
	if err := os.Remove(filepath.Join(m.dir, "mirror")); err != nil {
		t.Fatal(err)
	}
	if err := m.load("", ""); err != nil {
		t.Error(err)
	}
	m.want(http.StatusOK, "GET", "/v2/")
	m.stop()
}

// TestWarnsOnce says once at the start that the site is open to everyone.
func TestWarnsOnce(t *testing.T) {
	m := start(t, "", "")
	const warning = "registry_mirror lets everyone who reaches it pull; keep it inside your network, put remote_ip, basic_auth or forward_auth in front of it, or say in its access block who may pull"
	if n := len(m.logs.with(warning)); n != 1 {
		t.Errorf("%d warnings", n)
	}
}

// TestAccessLog has what became of a request.
func TestAccessLog(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	adapted, err := m.adapt(upstreamFor("docker.io", up), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.loadJSON(bytes.Replace(adapted, []byte(`"srv0":{`), []byte(`"srv0":{"logs":{},`), 1)); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.want(404, "GET", "/v2/library/x/manifests/none")
	var lines []map[string]any
	eventually(t, "two access log lines", func() bool {
		lines = m.logs.with("handled request")
		return len(lines) == 2
	})
	for field, want := range map[string]any{"registry_upstream": "docker.io", "registry_repository": "docker.io/library/x", "registry_reference": "latest", "registry_cache": "stored"} {
		if lines[0][field] != want {
			t.Errorf("%s is %v, want %v", field, lines[0][field], want)
		}
	}
	if text, _ := lines[1]["registry_error"].(string); !strings.Contains(text, "404") {
		t.Errorf("registry_error: %v", lines[1])
	}
}

// TestReloadKeepsNothing: a configuration that has been replaced is collected,
// and its secrets with it.
func TestReloadKeepsNothing(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	collected := make(chan int, 3)
	watch := func(n int) {
		t.Helper()
		app, err := caddy.ActiveContext().AppIfConfigured("registry")
		if err != nil {
			t.Fatal(err)
		}
		runtime.AddCleanup(app.(*module.App), func(n int) { collected <- n }, n)
	}
	// The latest runs, and nothing of the others is needed, nor of one that was
	// rejected in between.
	for n := range cap(collected) {
		watch(n)
		m.pull("library/x", "latest", image)
		if err := m.load(upstreamFor("docker.io", up, "tag_ttl 0", "credentials a {env.SURELY_NOT_SET}"), ""); err == nil {
			t.Fatal("loaded with a secret that is not set")
		}
		if err := m.load(upstreamFor("docker.io", up, fmt.Sprintf("tag_ttl %dms", n+1)), ""); err != nil {
			t.Fatal(err)
		}
	}
	m.pull("library/x", "latest", image)
	left := map[int]bool{0: true, 1: true, 2: true}
	eventually(t, "three old configurations to be collected", func() bool {
		runtime.GC()
		for {
			select {
			case n := <-collected:
				delete(left, n)
			default:
				return len(left) == 0
			}
		}
	})
}
