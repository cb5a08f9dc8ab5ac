//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A process is a program in the background. It leads a process group, so that
// nothing it starts outlives it.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string        // the file that has its output
	done chan struct{} // closed when it has ended
	err  error         // how it ended, once done is closed
}

// start runs a program until the test ends. Its output is shown if the test
// fails.
func start(t *testing.T, env []string, path string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(path), cmd: exec.Command(path, args...), done: make(chan struct{})}
	log, err := os.CreateTemp(t.TempDir(), p.name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.log = log.Name()
	p.cmd.Env = env
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Dir = checkout
	// A test binary that is killed takes its children along.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("%s said:\n%s", p.name, p.tail())
		}
	})
	return p
}

// signal sends a signal to the process itself.
func (p *process) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
}

// wait returns how the process ended.
func (p *process) wait(t *testing.T, within time.Duration) error {
	t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(within):
		t.Fatalf("%s still runs after %v:\n%s", p.name, within, p.tail())
		return nil
	}
}

// stop asks the process to end, then makes its group end.
func (p *process) stop(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
	default:
		p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			t.Errorf("%s ignores SIGTERM", p.name)
		}
	}
	p.kill()
}

// kill ends the whole group at once.
func (p *process) kill() {
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) output() string {
	text, _ := os.ReadFile(p.log)
	return string(text)
}

func (p *process) tail() string {
	lines := strings.Split(strings.TrimSpace(p.output()), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// untilReady waits until ready, or fails if the process ends before.
func (p *process) untilReady(t *testing.T, ready func() bool) {
	t.Helper()
	eventually(t, 30*time.Second, p.name+" to be ready", func() bool {
		if p.ended() {
			t.Fatalf("%s ended: %v\n%s", p.name, p.err, p.tail())
		}
		return ready()
	})
}

// run runs a program to its end, which must be good, and returns its standard
// output.
func run(t *testing.T, env []string, path string, args ...string) string {
	t.Helper()
	out, err := try(t, env, path, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try is run for a program that may fail.
func try(t *testing.T, env []string, path string, args ...string) (string, error) {
	t.Helper()
	return feed(t, nil, env, path, args...)
}

// feed is try for a program that reads.
func feed(t *testing.T, input []byte, env []string, path string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdin = bytes.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(path), strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// bare is an environment with nothing of the machine's own in it: no proxies,
// no credentials, no configuration.
func bare(home string, more ...string) []string {
	return append([]string{"PATH=" + systemPath, "HOME=" + home, "LANG=C.UTF-8"}, more...)
}

// workDir is a directory that is gone when the test ends, with whatever is
// mounted below it. Its name is short: paths of sockets have to be.
func workDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unmountBelow(t, dir)
		// What a daemon had started may need a moment to end after it.
		eventually(t, 10*time.Second, "the removal of "+dir, func() bool { return os.RemoveAll(dir) == nil })
	})
	return dir
}

// unmountBelow undoes what container engines leave mounted.
func unmountBelow(t *testing.T, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- { // the latest first
		fields := strings.Fields(lines[i])
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			if err := syscall.Unmount(fields[4], syscall.MNT_DETACH); err != nil {
				t.Errorf("unmounting %s: %v", fields[4], err)
			}
		}
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	late := time.After(within)
	for !ok() {
		select {
		case <-ticker.C:
		case <-late:
			t.Fatalf("waited %v in vain for %s", within, what)
		}
	}
}

// answers tells whether a registry answers at the address, be it that one has
// to log in.
func answers(addr string) func() bool {
	client := &http.Client{Timeout: 5 * time.Second}
	return func() bool {
		resp, err := client.Get("http://" + addr + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusUnauthorized
	}
}

func writeFile(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}
