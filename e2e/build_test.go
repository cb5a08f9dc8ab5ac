//go:build e2e

package e2e

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestXcaddy: the module builds into Caddy as its users build it, and its
// modules are in the result.
func TestXcaddy(t *testing.T) {
	dir := workDir(t)
	// xcaddy as a tool of a module of its own, at a pinned version.
	writeFile(t, dir+"/go.mod", `module smoke

go 1.26.0

tool github.com/caddyserver/xcaddy/cmd/xcaddy

require github.com/caddyserver/xcaddy v0.4.5
`)
	goTool(t, dir, "mod", "tidy")
	goTool(t, dir, "tool", "xcaddy", "build", "v2.11.9", "--output", dir+"/caddy",
		"--with", "github.com/caddy-registry/mirror@v0.0.0-00010101000000-000000000000="+checkout)

	modules := strings.Fields(run(t, bare(dir), dir+"/caddy", "list-modules"))
	for _, want := range []string{"registry", "registry.storage.disk", "registry.storage.s3", "http.handlers.registry_mirror", "admin.api.registry"} {
		found := false
		for _, module := range modules {
			found = found || module == want
		}
		if !found {
			t.Errorf("list-modules lacks %s", want)
		}
	}
}

func goTool(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestExamplesFormatted(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(checkout, "examples/*/Caddyfile"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(filepath.Dir(file)), func(t *testing.T) {
			if diff, err := try(t, bare(workDir(t)), caddyBin, "fmt", "--diff", file); err != nil {
				t.Errorf("run `caddy fmt --overwrite %s`:\n%s", file, diff)
			}
		})
	}
}

// TestMakeRun: `make run` is a mirror on port 5000, says how to use it, and
// ends when asked to.
func TestMakeRun(t *testing.T) {
	const addr = "127.0.0.1:5000"
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Fatal("something listens on port 5000; `make run` needs it: stop that first")
	}
	data := filepath.Join(checkout, "data")
	if _, err := os.Stat(data); os.IsNotExist(err) {
		t.Cleanup(func() { os.RemoveAll(data) })
	}
	p := start(t, os.Environ(), "/usr/bin/make", "run")
	eventually(t, 5*time.Minute, "an answer on port 5000", func() bool {
		if p.ended() {
			t.Fatalf("make run ended: %v\n%s", p.err, p.tail())
		}
		return answers(addr)()
	})
	for _, want := range []string{"docker", "daemon.json", "containerd", "hosts.toml", "podman", "registries.conf", ":5000"} {
		if !strings.Contains(p.output(), want) {
			t.Errorf("make run does not mention %s:\n%s", want, p.output())
		}
	}

	p.signal(t, syscall.SIGTERM)
	p.wait(t, 40*time.Second) // make, which is told to end, does not count that as success
	if answers(addr)() {
		t.Error("the mirror still answers")
	}
	if !strings.Contains(p.output(), `"msg":"shutdown complete"`) {
		t.Errorf("the mirror did not end cleanly:\n%s", p.tail())
	}
}
