package module_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// Names of the environment of a process that a test starts of itself: the
// store to use, where to answer, whom to ask, and where to die; or the whole
// configuration.
const (
	childDir      = "REGISTRY_TEST_CHILD_DIR"
	childURL      = "REGISTRY_TEST_CHILD_URL"
	childUpstream = "REGISTRY_TEST_CHILD_UPSTREAM"
	childDies     = "REGISTRY_TEST_CHILD_DIES"
	childConfig   = "REGISTRY_TEST_CHILD_CONFIG"
)

// runChild is a mirror that kills itself, as kill -9 would, when it comes to
// the failpoint it was told: "name", or "name#n" for the nth time.
func runChild() {
	if at := os.Getenv(childDies); at != "" {
		at, nth, _ := strings.Cut(at, "#")
		times, _ := strconv.Atoi(nth)
		var hits atomic.Int64
		failpoint.Set(func(name string) {
			if name == at && hits.Add(1) == int64(max(times, 1)) {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
	}
	caddy.TrapSignals()
	config := os.Getenv(childConfig)
	if config == "" {
		config = fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n grace_period 300ms\n registry {\n storage disk %s {\n min_free 1MB\n }\n upstream docker.io {\n origin %s\n allow_private\n }\n }\n}\n%s {\n registry_mirror\n}",
			os.Getenv(childDir), os.Getenv(childUpstream), os.Getenv(childURL))
	}
	adapted, err := adapt(config)
	if err == nil {
		err = caddy.Load(adapted, true)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("serving")
	weigh(os.Stdin, os.Stdout) // until the test ends
}

// child starts a mirror as a process of its own.
func child(t *testing.T, dir, upstream, dies string) *mirror {
	t.Helper()
	return spawn(t, dir, dies, func(url string) []string { return []string{childURL + "=" + url, childUpstream + "=" + upstream} })
}

// childOf starts one with a configuration for its URL.
func childOf(t *testing.T, dir string, config func(url string) string, dies string) *mirror {
	t.Helper()
	return spawn(t, dir, dies, func(url string) []string { return []string{childConfig + "=" + config(url)} })
}

func spawn(t *testing.T, dir, dies string, env func(url string) []string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: dir}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), childDir+"="+dir, childDies+"="+dies,
		"XDG_DATA_HOME="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir()), env(m.URL)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer late.Stop()
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "serving" {
	}
	if lines.Text() != "serving" {
		t.Fatalf("the child does not serve: %v", cmd.Wait())
	}
	m.process, m.died = cmd.Process, make(chan struct{})
	go func() {
		cmd.Wait()
		close(m.died)
	}()
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		<-m.died
		client.CloseIdleConnections()
	})
	return m
}

// dead waits for a child's end.
func (m *mirror) dead() {
	m.t.Helper()
	select {
	case <-m.died:
	case <-time.After(time.Minute):
		m.t.Fatal("the child is still alive")
	}
}

// TestKill kills the mirror at each step of a commit. Whatever it had done by
// then, the next start serves the right bytes, without the upstream as far as
// they are stored, and in the end nothing is left over.
func TestKill(t *testing.T) {
	const small, large = 700_000, 3 << 20
	type how int
	const (
		pulling  how = iota
		leaving      // a client goes in the middle
		stopping     // after a pull
	)
	for _, c := range []struct {
		at   string
		size int
		how  how
		held string // what is there without the upstream
	}{
		{"manifest.stored", small, pulling, ""},
		{"manifest.linked", small, pulling, "digest"},
		{"tag.indexed", small, pulling, "digest"},
		{"fill.noted", large, pulling, "digest tag"},
		{"fill.noted#2", large, pulling, "digest tag"},
		{"fill.parked", large, leaving, "digest tag"},
		{"fill.verified", small, pulling, "digest tag"},
		{"fill.verified", large, pulling, "digest tag"},
		{"fill.stored", small, pulling, "digest tag layer"},
		{"fill.stored", large, pulling, "digest tag layer"},
		{"fill.linked", small, pulling, "digest tag layer"},
		{"fill.linked", large, pulling, "digest tag layer"},
		{"store.synced", large, stopping, "digest tag layer"},
		{"store.marked", small, stopping, "digest tag layer"},
	} {
		t.Run(fmt.Sprintf("%s %d", c.at, c.size), func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			image := regtest.NewImage(c.at, regtest.Random(c.at, c.size))
			layer := image.Blobs[1]
			up.Push("library/x", image, "latest")
			if c.how == leaving {
				hold := make(chan struct{})
				defer close(hold)
				up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: 200_000})
			} else {
				up.Fail(regtest.Fault{Path: layer.Digest.String(), Rate: 12 << 20})
			}
			dir := t.TempDir()
			doomed := child(t, dir, up.URL, c.at)
			for _, path := range []string{"/manifests/latest", "/blobs/" + layer.Digest.String()} {
				resp, err := client.Get(doomed.URL + "/v2/library/x" + path)
				if err != nil {
					break
				}
				if c.how == leaving {
					io.CopyN(io.Discard, resp.Body, 100_000)
				} else if body, err := io.ReadAll(resp.Body); err == nil && len(body) == len(layer.Data) && !bytes.Equal(body, layer.Data) {
					t.Error("wrong bytes arrived complete")
				}
				resp.Body.Close()
			}
			if c.how == stopping {
				client.CloseIdleConnections()
				doomed.process.Signal(syscall.SIGTERM)
			}
			doomed.dead()
			up.Heal()

			m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: dir, logs: captureLogs(t)}
			if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
				t.Fatal(err)
			}
			defer m.stop()
			up.Down()
			for what, path := range map[string]string{
				"digest": "/manifests/" + image.Digest.String(),
				"tag":    "/manifests/latest",
				"layer":  "/blobs/" + layer.Digest.String(),
			} {
				if !strings.Contains(c.held, what) {
					continue // an upstream that is down is waited for
				}
				want := image.Data
				if what == "layer" {
					want = layer.Data
				}
				if a := m.want(200, "GET", "/v2/library/x"+path); !bytes.Equal(a.body, want) {
					t.Errorf("%s: wrong bytes", what)
				}
			}
			if !strings.Contains(c.held, "layer") && len(kept(dir, layer.Digest)) > 0 {
				t.Error("the layer is kept, and was not proven")
			}
			up.Up()
			m.pull("library/x", "latest", image)
			m.pull("library/x", image.Digest.String(), image)
			eventually(t, "nothing to be left over", func() bool { return len(spooled(dir)) == 0 })
		})
	}
}

// TestKillInMidFill kills two mirrors in the middle of one blob, and the third
// fetches only what is missing.
func TestKillInMidFill(t *testing.T) {
	up := regtest.New(t, regtest.Options{Rate: 2 << 20})
	image := regtest.NewImage("x", regtest.Random("x", 24<<20))
	layer := image.Blobs[1]
	size := int64(len(layer.Data))
	up.Push("library/x", image, "latest")
	dir := t.TempDir()
	for _, percent := range []int64{30, 70} {
		doomed := child(t, dir, up.URL, "")
		doomed.want(200, "GET", "/v2/library/x/manifests/latest")
		got := make(chan *answer)
		go func() { got <- doomed.do("GET", "/v2/library/x/blobs/"+layer.Digest.String()) }()
		eventually(t, "some of the blob to be sent", func() bool { return up.Sending(layer.Digest) >= size*percent/100 })
		doomed.process.Kill()
		if a := <-got; a.err == nil || !bytes.HasPrefix(layer.Data, a.body) {
			t.Errorf("of half a blob %d bytes arrived, or wrong ones: %v", len(a.body), a.err)
		}
		doomed.dead()
		if files := kept(dir, layer.Digest); len(files) > 0 {
			t.Errorf("half a blob is kept: %q", files)
		}
	}
	m := child(t, dir, up.URL, "")
	m.pull("library/x", "latest", image)
	m.pull("library/x", "latest", image)
	if sent := up.Sent(layer.Digest); sent > size*105/100 {
		t.Errorf("%d bytes of %d were fetched, %.3f of it", sent, size, float64(sent)/float64(size))
	} else {
		t.Logf("%.3f of the blob was fetched", float64(sent)/float64(size))
	}
	eventually(t, "nothing to be left over", func() bool { return len(spooled(dir)) == 0 })
}
