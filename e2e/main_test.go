//go:build e2e

// Package e2e runs the mirror as people do: the real binary, between real
// clients and a real registry. It needs root and what install.sh installs;
// `make e2e` brings both together.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var (
	checkout string // the project's root
	caddyBin string // the product
	helloBin string // what the test image runs
)

func TestMain(m *testing.M) {
	code, err := setUp(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func setUp(m *testing.M) (int, error) {
	if os.Geteuid() != 0 {
		return 0, fmt.Errorf("container engines need root: run `make e2e` as root")
	}
	var err error
	if checkout, err = filepath.Abs(".."); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	caddyBin = filepath.Join(dir, "caddy")
	helloBin = filepath.Join(dir, "hello")
	// The flags are those of `make build` and of xcaddy: one build cache
	// serves all three.
	if err := build(caddyBin, "./xcaddy"); err != nil {
		return 0, err
	}
	if err := build(helloBin, "./e2e/testdata/hello"); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

func build(out, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "nobadger,nomysql,nopgx", "-ldflags", "-w -s", "-o", out, pkg)
	cmd.Dir = checkout
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %v\n%s", pkg, err, text)
	}
	return nil
}

// systemPath leaves out /usr/local: what counts is what Debian has.
const systemPath = "/usr/sbin:/usr/bin:/sbin:/bin"

// tool finds a program that install.sh installs.
func tool(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range append([]string{filepath.Join(checkout, ".cache/bin")}, strings.Split(systemPath, ":")...) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path
		}
	}
	t.Fatalf("%s is not installed: run e2e/install.sh", name)
	return ""
}
