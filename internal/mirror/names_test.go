package mirror

import (
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/upstream"
)

// client is a registry's client, which nothing is asked of here.
func client(t testing.TB, host string) *upstream.Upstream {
	t.Helper()
	c, err := (&upstream.Pool{}).Open(host, []upstream.Endpoint{{
		URL: &url.URL{Scheme: "https", Host: OriginHost(host)}, Origin: true, Pull: true, Resolve: true,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// known is a registry with everything by default.
func known(t testing.TB, host string) *Upstream {
	t.Helper()
	path := DefaultPathName(host)
	return &Upstream{Name: host, PathName: path, Prefix: path, Client: client(t, host)}
}

// wildcard is a registry of many hosts. It counts the hosts opened.
func wildcard(t testing.TB, name string, opened *[]string) *Upstream {
	t.Helper()
	c := client(t, "any"+name[1:])
	return &Upstream{Name: name, Open: func(host string) (*upstream.Upstream, error) {
		if opened != nil {
			*opened = append(*opened, host)
		}
		return c, nil
	}}
}

// builtin are the registries that are always known, and more.
func builtin(t testing.TB, more ...*Upstream) []*Upstream {
	var list []*Upstream
	for _, name := range Builtin {
		if strings.HasPrefix(name, "*.") {
			list = append(list, wildcard(t, name, nil))
		} else {
			list = append(list, known(t, name))
		}
	}
	return append(list, more...)
}

func newUpstreams(t testing.TB, list []*Upstream) *Upstreams {
	t.Helper()
	u, err := NewUpstreams(list)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// byHost is the registry of a host, or nil; byPath that of a first component.
func byHost(u *Upstreams, host string) (*Upstream, error) {
	entry := u.named(host)
	if entry == nil {
		return nil, nil
	}
	return u.concrete(entry, host)
}

func byPath(u *Upstreams, component string) (*Upstream, error) {
	entry, host := u.inPath(component)
	if entry == nil {
		return nil, nil
	}
	return u.concrete(entry, host)
}

func TestNormalizeHost(t *testing.T) {
	for in, want := range map[string]string{
		"ghcr.io":                   "ghcr.io",
		"GHCR.io":                   "ghcr.io",
		"ghcr.io.":                  "ghcr.io",
		"ghcr.io:443":               "ghcr.io",
		"ghcr.io.:443":              "ghcr.io",
		"registry.corp:5000":        "registry.corp:5000",
		"registry.corp:80":          "registry.corp:80",
		"index.docker.io":           "docker.io",
		"Index.Docker.IO.":          "docker.io",
		"registry-1.docker.io":      "docker.io",
		"registry-1.docker.io:443":  "docker.io",
		"registry-1.docker.io:5000": "registry-1.docker.io:5000",
		"k8s.gcr.io":                "registry.k8s.io",
		"elastic.co":                "docker.elastic.co",
		"registry.gcr.io":           "gcr.io",
		"[2001:db8::1]:443":         "[2001:db8::1]",
		"[2001:DB8::1]:5000":        "[2001:db8::1]:5000",
		"127.0.0.1:443":             "127.0.0.1",
		"":                          "",
	} {
		if got := NormalizeHost(in); got != want {
			t.Errorf("NormalizeHost(%q) = %q, want %q", in, got, want)
		}
		if got := NormalizeHost(want); got != want {
			t.Errorf("NormalizeHost(%q) = %q: not a fixed point", want, got)
		}
	}
}

// Every alias leads to a registry that is always known.
func TestAliasesAndBuiltins(t *testing.T) {
	u := newUpstreams(t, builtin(t))
	for alias, name := range aliases {
		if up, err := byHost(u, name); err != nil || up == nil || up.Name != name {
			t.Errorf("alias %s: of host %s = %v, %v", alias, name, up, err)
		}
		if up, err := byPath(u, alias); err != nil || up == nil || up.Name != name {
			t.Errorf("alias %s: in path = %v, %v", alias, up, err)
		}
	}
	for _, name := range []string{"docker.io", "ghcr.io", "gcr.io", "quay.io", "registry.k8s.io", "mcr.microsoft.com", "nvcr.io", "docker.elastic.co", "public.ecr.aws", "registry.gitlab.com", "lscr.io", "us-docker.pkg.dev"} {
		if up, err := byHost(u, name); err != nil || up == nil || up.Name != name || up.Client == nil {
			t.Errorf("of host %s = %v, %v", name, up, err)
		}
		if up, err := byPath(u, name); err != nil || up == nil || up.Name != name {
			t.Errorf("in path %s = %v, %v", name, up, err)
		}
	}
	if OriginHost("docker.io") != "registry-1.docker.io" || OriginHost("ghcr.io") != "ghcr.io" {
		t.Error("OriginHost")
	}
}

func TestNewUpstreams(t *testing.T) {
	alter := func(host string, change func(*Upstream)) *Upstream {
		u := known(t, host)
		change(u)
		return u
	}
	path := func(s string) func(*Upstream) { return func(u *Upstream) { u.PathName = s } }
	prefix := func(s string) func(*Upstream) { return func(u *Upstream) { u.Prefix = s } }
	for _, c := range []struct {
		name string
		more []*Upstream
		want []string // in the error; none: accepted
	}{
		{"nothing more", nil, nil},
		{"a port", []*Upstream{known(t, "registry.corp:5000")}, nil},
		{"empty prefix", []*Upstream{alter("registry.corp", prefix(""))}, nil},
		{"nested path as a prefix", []*Upstream{alter("registry.corp", prefix("mirrors/corp")), alter("other.corp", prefix("mirrors/other"))}, nil},
		{"prefix that begins alike", []*Upstream{alter("registry.corp", prefix("mirror")), alter("other.corp", prefix("mirror2/x"))}, nil},
		{"twice", []*Upstream{known(t, "ghcr.io")}, []string{"ghcr.io", "twice"}},
		{"same path name", []*Upstream{alter("registry.corp", path("ghcr.io"))}, []string{"registry.corp", "ghcr.io", "path_name"}},
		{"path name with a colon", []*Upstream{alter("registry.corp:5000", path("registry.corp:5000"))}, []string{"registry.corp:5000", "path_name"}},
		{"path name with a slash", []*Upstream{alter("registry.corp", path("a/b"))}, []string{"registry.corp", "path_name"}},
		{"no path name", []*Upstream{alter("registry.corp", path(""))}, []string{"registry.corp", "path_name"}},
		{"path name in upper case", []*Upstream{alter("registry.corp", path("Corp"))}, []string{"registry.corp", "path_name"}},
		{"invalid prefix", []*Upstream{alter("registry.corp", prefix("a/../b"))}, []string{"registry.corp", "repository_prefix"}},
		{"prefix with a slash at its end", []*Upstream{alter("registry.corp", prefix("a/"))}, []string{"registry.corp", "repository_prefix"}},
		{"same prefix", []*Upstream{alter("registry.corp", prefix("ghcr.io"))}, []string{"registry.corp", "ghcr.io", "repository_prefix"}},
		{"two empty prefixes", []*Upstream{alter("registry.corp", prefix("")), alter("other.corp", prefix(""))}, []string{"registry.corp", "other.corp", "repository_prefix"}},
		{"nested prefix", []*Upstream{alter("registry.corp", prefix("ghcr.io/corp"))}, []string{"registry.corp", "ghcr.io", "repository_prefix"}},
		{"nested prefix, the outer last", []*Upstream{alter("registry.corp", prefix("a/b/c")), alter("other.corp", prefix("a"))}, []string{"registry.corp", "other.corp", "repository_prefix"}},
	} {
		_, err := NewUpstreams(builtin(t, c.more...))
		if len(c.want) == 0 {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not name %s", c.name, err, want)
			}
		}
	}
}

func TestWildcard(t *testing.T) {
	var opened []string
	u := newUpstreams(t, []*Upstream{wildcard(t, "*.pkg.dev", &opened), known(t, "own.pkg.dev")})
	for _, host := range []string{"", "pkg.dev", ".pkg.dev", "*.pkg.dev", "a.b.pkg.dev", "-.pkg.dev", "A.pkg.dev", "a.pkg.dev.evil.example", "apkg.dev",
		"a/b.pkg.dev", "a:1.pkg.dev", "a@b.pkg.dev", "us-docker.pkg.dev:5000", strings.Repeat("a", 64) + ".pkg.dev"} {
		if up, err := byHost(u, host); up != nil || err != nil {
			t.Errorf("of host %q = %v, %v", host, up, err)
		}
	}
	if len(opened) != 0 {
		t.Fatalf("opened %q", opened)
	}
	first, err := byHost(u, "us-docker.pkg.dev")
	if err != nil || first == nil {
		t.Fatalf("%v, %v", first, err)
	}
	if first.Name != "us-docker.pkg.dev" || first.PathName != first.Name || first.Prefix != first.Name || first.Client == nil {
		t.Errorf("%+v", first)
	}
	if again, err := byPath(u, "us-docker.pkg.dev"); err != nil || again != first {
		t.Errorf("asked again: %p, %v; want %p", again, err, first)
	}
	if own, err := byHost(u, "own.pkg.dev"); err != nil || own == nil || own.Open != nil {
		t.Errorf("a host with a configuration of its own: %+v, %v", own, err)
	}
	if len(opened) != 1 {
		t.Errorf("opened %q, want one", opened)
	}
	// Whoever asks for ever new hosts neither fills the memory nor keeps others
	// out.
	for i := range 2 * maxWild {
		if up, err := byHost(u, "h"+strconv.Itoa(i)+".pkg.dev"); err != nil || up == nil {
			t.Fatalf("host %d: %v, %v", i, up, err)
		}
	}
	if n := u.opened.Len(); n > maxWild {
		t.Errorf("%d hosts are open", n)
	}
}

func TestWildcardAfterClose(t *testing.T) {
	u := newUpstreams(t, []*Upstream{wildcard(t, "*.pkg.dev", nil)})
	u.Close()
	if up, err := byHost(u, "us-docker.pkg.dev"); err == nil {
		t.Errorf("opened %+v, which nobody will close", up)
	}
}

// TestWildcardSettings: what is configured for a wildcard holds for each of its
// hosts.
func TestWildcardSettings(t *testing.T) {
	w := wildcard(t, "*.pkg.dev", nil)
	w.TagTTL, w.Keep, w.KeepFor, w.Connections = time.Hour, true, time.Minute, 7
	u := newUpstreams(t, []*Upstream{w})
	target, _, err := u.Find("europe-docker.pkg.dev/org/x")
	if err != nil {
		t.Fatal(err)
	}
	if up := target.Upstream; up == w || up.TagTTL != w.TagTTL || !up.Keep || up.KeepFor != w.KeepFor || up.Connections != w.Connections {
		t.Errorf("%+v", up)
	}
}
