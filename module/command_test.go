package module_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// childCommand names the environment variable that makes the test's program be
// the caddy command.
const childCommand = "REGISTRY_TEST_CHILD_COMMAND"

// command runs caddy with arguments as a process of its own.
func command(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), childCommand+"=1")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer late.Stop()
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func TestCommandRefresh(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one, two := regtest.NewImage("one"), regtest.NewImage("two")
	up.Push("library/x", one, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 1h"))
	config := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(config, fmt.Appendf(nil, "{\n\tadmin %s\n}\n", m.admin), 0o600); err != nil {
		t.Fatal(err)
	}

	status, out, errs := command(t, "registry", "refresh", "--address", m.admin, "x")
	if want := fmt.Sprintf("%s %s (not held before)\n", referenceX, one.Digest); status != 0 || out != want || errs != "" {
		t.Errorf("%d %q %q, want %q", status, out, errs, want)
	}
	status, out, errs = command(t, "registry", "--address", m.admin, "refresh", "x")
	if want := fmt.Sprintf("%s %s unchanged\n", referenceX, one.Digest); status != 0 || out != want || errs != "" {
		t.Errorf("%d %q %q, want %q", status, out, errs, want)
	}
	// The address comes from a configuration, and what fails stops nothing.
	up.Push("library/x", two, "latest")
	status, out, errs = command(t, "registry", "refresh", "-c", config, "-a", "caddyfile", "evil.example/x", "x", "org/none:1")
	if want := fmt.Sprintf("%s %s (was %s)\n", referenceX, two.Digest, one.Digest); status != 1 || out != want {
		t.Errorf("%d %q %q, want %q", status, out, errs, want)
	}
	for _, part := range []string{"evil.example/x: ", "add `upstream evil.example`", "org/none:1: ", up.URL} {
		if !strings.Contains(errs, part) {
			t.Errorf("%q does not mention %q", errs, part)
		}
	}
	if strings.Contains(errs, `"error"`) || strings.Contains(errs, "Usage:") {
		t.Errorf("no sentence: %q", errs)
	}

	up.Down()
	status, out, errs = command(t, "registry", "refresh", "--address", m.admin, "x")
	if status != 1 || out != "" || !strings.Contains(errs, up.URL) || !strings.Contains(errs, "refused") || strings.Count(errs, "\n") != 1 {
		t.Errorf("offline: %d %q %q", status, out, errs)
	}
	if a := m.want(200, "GET", "/v2/library/x/manifests/latest"); !bytes.Equal(a.body, two.Data) {
		t.Error("another manifest")
	}
}

func TestCommandMisused(t *testing.T) {
	for _, c := range []struct {
		args   []string
		status int
		out    string
		errs   string
	}{
		{[]string{"registry"}, 0, "refresh", ""},
		{[]string{"registry", "refresh", "--help"}, 0, "ghcr.io/org/app:v1", ""},
		{[]string{"registry", "refrsh"}, 1, "", `unknown command "refrsh"`},
		{[]string{"registry", "refresh"}, 1, "", "at least 1"},
		{[]string{"registry", "refresh", "--addres", "x", "y"}, 1, "", "unknown flag"},
		{[]string{"registry", "refresh", "--address", regtest.FreeAddress(t), "x"}, 1, "", "x: performing request"},
		{[]string{"registry", "refresh", "--config", "/nonexistent/Caddyfile", "x"}, 1, "", "--address"},
	} {
		status, out, errs := command(t, c.args...)
		if status != c.status || !strings.Contains(out, c.out) || !strings.Contains(errs, c.errs) || (c.out == "") != (out == "") {
			t.Errorf("%q: %d %q %q", c.args, status, out, errs)
		}
	}
}
