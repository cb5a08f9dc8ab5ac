package clients_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/clients"
)

var update = flag.Bool("update", false, "write the golden files anew")

// text is all that a client's steps say.
func text(steps []clients.Step) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&b, "# %s\n# %s\n", s.Text.In("en"), s.Text.In("zh"))
		if s.File != "" {
			fmt.Fprintf(&b, "==> %s\n", s.File)
		}
		b.WriteString(s.Content)
		if s.Commands != "" {
			b.WriteString("$ " + strings.ReplaceAll(s.Commands, "\n", "\n$ ") + "\n")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// TestSettings: the settings of each client, in testdata.
func TestSettings(t *testing.T) {
	some := []clients.Registry{{Name: "docker.io"}, {Name: "ghcr.io", Path: "gh"}, {Name: "registry.test:5000"}}
	for name, m := range map[string]clients.Mirror{
		"https":  {URL: "https://mirror.example.com", Registries: some, Default: "docker.io"},
		"http":   {URL: "http://mirror.lan:5000/", Registries: some, Default: "docker.io", Every: true},
		"ca":     {URL: "https://mirror.lan:8443", Registries: some[1:], CA: "/etc/ssl/mirror-ca.pem"},
		"strict": {URL: "https://mirror.example.com", Registries: some[:2], Default: "docker.io", Strict: true},
	} {
		var b strings.Builder
		for _, c := range clients.All {
			fmt.Fprintf(&b, "######## %s: %s, %s\n\n", c.ID, c.Name.In("en"), c.Name.In("zh"))
			steps, err := c.Steps(m)
			if err != nil {
				fmt.Fprintf(&b, "error: %v\n\n", err)
				continue
			}
			b.WriteString(text(steps))
		}
		golden := filepath.Join("testdata", name+".txt")
		if *update {
			if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil || b.String() != string(want) {
			t.Errorf("%s differs from what is set: %v\n%s", golden, err, b.String())
		}
	}
}

func TestStepsAreComplete(t *testing.T) {
	for _, c := range clients.All {
		if found, ok := clients.Find(c.ID); !ok || found.Name != c.Name {
			t.Errorf("%s is not found", c.ID)
		}
		steps, err := c.Steps(clients.Mirror{URL: "https://m.test", Registries: []clients.Registry{{Name: "docker.io"}}, Default: "docker.io"})
		if err != nil || len(steps) == 0 {
			t.Errorf("%s: %v", c.ID, err)
		}
		for _, s := range steps {
			if s.Text.English == "" || s.Text.Chinese == "" || s.File != "" && s.Content == "" {
				t.Errorf("%s: %+v", c.ID, s)
			}
		}
	}
	if _, ok := clients.Find("rkt"); ok {
		t.Error("one that there is not is found")
	}
}

func TestRefused(t *testing.T) {
	good := clients.Mirror{URL: "https://m.test", Registries: []clients.Registry{{Name: "docker.io"}}, Default: "docker.io"}
	for name, c := range map[string]struct {
		client string
		change func(*clients.Mirror)
		want   string
	}{
		"no scheme":     {"containerd", func(m *clients.Mirror) { m.URL = "m.test" }, "https://host"},
		"a path":        {"containerd", func(m *clients.Mirror) { m.URL += "/x" }, "without a path"},
		"a command":     {"containerd", func(m *clients.Mirror) { m.URL = "https://x';reboot;'" }, "https://host"},
		"a way up":      {"docker", func(m *clients.Mirror) { m.URL = "https://.." }, "https://host"},
		"a password":    {"containerd", func(m *clients.Mirror) { m.URL = "https://a:b@m.test" }, "https://host"},
		"no registry":   {"containerd", func(m *clients.Mirror) { m.Registries = nil }, "no registry"},
		"wildcard":      {"podman", func(m *clients.Mirror) { m.Registries = []clients.Registry{{Name: "*.pkg.dev"}} }, "host of a registry"},
		"injection":     {"podman", func(m *clients.Mirror) { m.Registries = []clients.Registry{{Name: "a\"\nb"}} }, "host of a registry"},
		"odd authority": {"podman", func(m *clients.Mirror) { m.CA = "/a b" }, "authority"},
		"another hub":   {"docker", func(m *clients.Mirror) { m.Default = "ghcr.io" }, "docker.io only"},
		"no ns":         {"containerd", func(m *clients.Mirror) { m.NoNS, m.Default = true, "" }, "does not read"},
		"strict docker": {"docker", func(m *clients.Mirror) { m.Strict = true }, "Docker: it goes to the registry itself"},
	} {
		m := good
		c.change(&m)
		is, _ := clients.Find(c.client)
		if _, err := is.Steps(m); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	docker, _ := clients.Find("docker")
	good.Strict = true
	if _, err := docker.Steps(good); !errors.Is(err, clients.ErrStrict) {
		t.Error(err)
	}
}
