package module_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// Names of the environment of a process that a test starts of itself: the
// store to use, where to answer, whom to ask, and where to die.
const (
	childDir      = "REGISTRY_TEST_CHILD_DIR"
	childURL      = "REGISTRY_TEST_CHILD_URL"
	childUpstream = "REGISTRY_TEST_CHILD_UPSTREAM"
	childDies     = "REGISTRY_TEST_CHILD_DIES"
)

// runChild is a mirror that kills itself, as kill -9 would, when it comes to
// the failpoint it was told.
func runChild() {
	if at := os.Getenv(childDies); at != "" {
		failpoint.Set(func(name string) {
			if name == at {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
	}
	adapted, err := adapt(fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage disk %s {\n min_free 1MB\n }\n upstream docker.io {\n origin %s\n allow_private\n }\n }\n}\n%s {\n registry_mirror\n}",
		os.Getenv(childDir), os.Getenv(childUpstream), os.Getenv(childURL)))
	if err == nil {
		err = caddy.Load(adapted, true)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("serving")
	os.Stdin.Read(make([]byte, 1)) // until the test ends
}

// child starts a mirror as a process of its own.
func child(t *testing.T, dir, upstream, dies string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + freeAddress(t), dir: dir}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir, childURL+"="+m.URL, childUpstream+"="+upstream, childDies+"="+dies,
		"XDG_DATA_HOME="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir())
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
	m.died = make(chan struct{})
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

// TestKill kills the mirror at each step of a commit. Whatever it had done by
// then, the next start serves the right bytes, and sweeps what is left.
func TestKill(t *testing.T) {
	for _, at := range []string{
		"manifest.stored", "manifest.linked", "tag.indexed",
		"fill.verified", "fill.stored", "fill.linked",
	} {
		t.Run(at, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			image := regtest.NewImage(at, regtest.Random(at, 700_000))
			up.Push("library/x", image, "latest")
			dir := t.TempDir()
			doomed := child(t, dir, up.URL, at)
			for _, path := range []string{
				"/manifests/latest",
				"/blobs/" + image.Blobs[0].Digest.String(),
				"/blobs/" + image.Blobs[1].Digest.String(),
			} {
				resp, err := client.Get(doomed.URL + "/v2/library/x" + path)
				if err != nil {
					break
				}
				resp.Body.Close()
			}
			select {
			case <-doomed.died:
			case <-time.After(10 * time.Second):
				t.Fatal("the child came through without reaching the failpoint")
			}
			m := &mirror{t: t, URL: "http://" + freeAddress(t), dir: dir, logs: captureLogs(t)}
			if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
				t.Fatal(err)
			}
			defer m.stop()
			if left, _ := filepath.Glob(filepath.Join(dir, "mirror/spool/*/*")); len(left) > 0 {
				t.Errorf("left in the spool: %q", left)
			}
			m.pull("library/x", "latest", image)
			m.pull("library/x", image.Digest.String(), image)
		})
	}
}

// TestKillInMidFill leaves half a blob, which must not be taken for a whole.
func TestKillInMidFill(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	dir := t.TempDir()
	doomed := child(t, dir, up.URL, "")
	rest, hold := halfPulled(t, doomed, up, "library/x", image)
	holder, err := os.ReadFile(filepath.Join(dir, "mirror", "lock"))
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(strings.TrimSpace(string(holder)), &pid); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	if err := rest(); err == nil {
		t.Error("half a blob arrived complete")
	}
	close(hold)
	up.Heal()
	<-doomed.died
	m := &mirror{t: t, URL: "http://" + freeAddress(t), dir: dir, logs: captureLogs(t)}
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	defer m.stop()
	m.pull("library/x", "latest", image)
}
