package clients_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/clients"
)

func steps(t *testing.T, client string) []clients.Step {
	t.Helper()
	c, ok := clients.Find(client)
	if !ok {
		t.Fatalf("there is no %s", client)
	}
	all, err := c.Steps(clients.Mirror{URL: "https://m.test", Registries: []clients.Registry{{Name: "docker.io"}, {Name: "ghcr.io"}}, Default: "docker.io"})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestWriteDocker: daemon.json keeps what it has.
func TestWriteDocker(t *testing.T) {
	for name, c := range map[string]struct{ before, after string }{
		"none":       {"", "{\n  \"registry-mirrors\": [\n    \"https://m.test\"\n  ]\n}\n"},
		"others":     {`{"debug":true,"registry-mirrors":["https://other.test"]}`, "{\n  \"debug\": true,\n  \"registry-mirrors\": [\n    \"https://m.test\",\n    \"https://other.test\"\n  ]\n}\n"},
		"behind":     {`{"registry-mirrors":["https://other.test","https://m.test"]}`, "{\n  \"registry-mirrors\": [\n    \"https://m.test\",\n    \"https://other.test\"\n  ]\n}\n"},
		"as it is":   {`{"registry-mirrors":["https://m.test"],"x":1}`, `{"registry-mirrors":["https://m.test"],"x":1}`},
		"no mirrors": {`{"big":12345678901234567890}`, "{\n  \"big\": 12345678901234567890,\n  \"registry-mirrors\": [\n    \"https://m.test\"\n  ]\n}\n"},
		"null":       {"null", "{\n  \"registry-mirrors\": [\n    \"https://m.test\"\n  ]\n}\n"},
	} {
		root := t.TempDir()
		file := filepath.Join(root, "etc/docker/daemon.json")
		if c.before != "" {
			put(t, file, c.before)
		}
		written, err := clients.Write(root, steps(t, "docker"))
		if err != nil || (len(written) == 1) != (c.before != c.after) {
			t.Errorf("%s: %q, %v", name, written, err)
		}
		if got := read(t, file); got != c.after {
			t.Errorf("%s: %s", name, got)
		}
		if again, err := clients.Write(root, steps(t, "docker")); err != nil || len(again) > 0 {
			t.Errorf("%s: %q, %v", name, again, err)
		}
		if info, err := os.Stat(file); c.before != "" && c.before != c.after && (err != nil || info.Mode().Perm() != 0o600) {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
		if entries, _ := os.ReadDir(filepath.Dir(file)); len(entries) != 1 {
			t.Errorf("%s: left: %v", name, entries)
		}
	}
	for name, before := range map[string]string{"no JSON": "{", "no object": "[]", "odd mirrors": `{"registry-mirrors":"x"}`} {
		root := t.TempDir()
		file := filepath.Join(root, "etc/docker/daemon.json")
		put(t, file, before)
		if written, err := clients.Write(root, steps(t, "docker")); err == nil || len(written) > 0 || read(t, file) != before {
			t.Errorf("%s: %q, %v: %s", name, written, err, read(t, file))
		}
	}
}

// TestWriteNothing: where one file says something else, none is written.
func TestWriteNothing(t *testing.T) {
	root := t.TempDir()
	hub, ghcr := filepath.Join(root, "etc/containerd/certs.d/docker.io/hosts.toml"), filepath.Join(root, "etc/containerd/certs.d/ghcr.io/hosts.toml")
	put(t, ghcr, "# mine\n")
	written, err := clients.Write(root, steps(t, "containerd"))
	if !errors.Is(err, clients.ErrDiffers) || !strings.Contains(err.Error(), ghcr) || len(written) > 0 || read(t, ghcr) != "# mine\n" {
		t.Errorf("%q, %v", written, err)
	}
	if _, err := os.Stat(hub); err == nil {
		t.Error("the other is written")
	}
	os.Remove(ghcr)
	for _, want := range []int{2, 0} {
		if written, err := clients.Write(root, steps(t, "containerd")); err != nil || len(written) != want {
			t.Errorf("%q, %v", written, err)
		}
	}
	if got := read(t, hub); !strings.HasPrefix(got, "server = \"https://registry-1.docker.io\"\n") {
		t.Error(got)
	}
}
