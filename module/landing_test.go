package module_test

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// landing runs Caddy with one site, whose routes are those.
func landing(t *testing.T, options, app, routes string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	adapted, err := adapt(fmt.Sprintf(`{
		admin off
		persist_config off
		log {
			output regtest
		}
		%s
		registry {
			storage disk %s {
				min_free 1MB
			}
			%s
		}
	}
	%s {
		%s
	}`, options, m.dir, app, m.URL, routes))
	if err == nil {
		err = m.loadJSON(adapted)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	return m
}

// TestLandingPage: `/` tells how clients are set up to use this very host, unless
// something else answers it.
func TestLandingPage(t *testing.T) {
	m := landing(t, "", "upstream ghcr.io {\npath_name gh\n}\n", `
		respond /mine "mine"
		registry_mirror
	`)
	a := m.want(200, "GET", "/")
	host := strings.TrimPrefix(m.URL, "http://")
	for _, want := range []string{
		`<html lang="en">`, "<title>" + host + "</title>", "<li>docker.io</li><li>ghcr.io</li>",
		`[host.&#34;` + m.URL + `&#34;]`, "location = &#34;" + host + "/gh&#34;", "insecure-registries", "docker pull " + host + "/docker.io/library/alpine:3",
	} {
		if !strings.Contains(string(a.body), want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	if strings.Contains(string(a.body), "*.pkg.dev") || a.Header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Errorf("%v", a.Header)
	}
	// What the page runs and looks like is what its policy lets it.
	policy := a.Header.Get("Content-Security-Policy")
	for _, tag := range []string{"style", "script"} {
		found := regexp.MustCompile("(?s)<" + tag + ">(.*)</" + tag + ">").FindSubmatch(a.body)
		if found == nil {
			t.Fatalf("there is no %s", tag)
		}
		sum := sha256.Sum256(found[1])
		if !strings.Contains(policy, tag+"-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'") {
			t.Errorf("%s: %s", tag, policy)
		}
	}
	for want, c := range map[string]struct{ path, header string }{
		`<html lang="zh">`:  {"/", "zh-CN,zh;q=0.9,en;q=0.8"},
		`<html lang="en">`:  {"/", "de,en;q=0.8"},
		`<html lang="zh"> `: {"/?lang=zh", "en"},
		`<html lang="en"> `: {"/?lang=en", "zh"},
	} {
		if a := m.want(200, "GET", c.path, "Accept-Language", c.header); !strings.Contains(string(a.body), strings.TrimSpace(want)) {
			t.Errorf("%s %s: not %s", c.path, c.header, want)
		}
	}
	if a := m.want(200, "HEAD", "/"); len(a.body) > 0 || a.Header.Get("Content-Length") == "" {
		t.Errorf("%v", a.Header)
	}
	for _, path := range []string{"/mine", "/other"} {
		if a := m.do("GET", path); strings.Contains(string(a.body), "<html") {
			t.Errorf("%s: %s", path, a.body)
		}
	}
	if a := m.do("POST", "/"); strings.Contains(string(a.body), "<html") {
		t.Errorf("POST: %s", a.body)
	}
}

// TestLandingPageOfOthers: what a site does not do is not told of.
func TestLandingPageOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		site      string
		has, lack []string
	}{
		"another": {`
			respond / "mine"
			registry_mirror
		`, []string{"mine"}, []string{"<html"}},
		"below a path": {`
			handle_path /mirror/* {
				registry_mirror
			}
		`, nil, []string{"<html"}},
		"some registries": {`registry_mirror {
			default ghcr.io
			upstreams ghcr.io quay.io
		}`, []string{`certs.d/quay.io/hosts.toml`, `id="podman"`}, []string{"_default", `id="docker"`, "docker.io/library", "docker login"}},
		"hosted only": {`registry_mirror {
			default off
			hosted **
			access {
				allow pull push to authenticated
			}
		}`, []string{"docker login", "docker push", "This is a mirror of container registries, and has images of its own", "Not everybody may pull here"}, []string{`id="docker"`}},
		"no ns": {`registry_mirror {
			ns ignore
		}`, []string{"certs.d/docker.io/hosts.toml"}, []string{"certs.d/ghcr.io", "_default"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := landing(t, "", "", c.site)
			paths := []string{"/"}
			if name == "below a path" {
				paths = []string{"/mirror/", "/"}
			}
			for _, path := range paths {
				a := m.do("GET", path)
				for _, want := range c.has {
					if !strings.Contains(string(a.body), want) {
						t.Errorf("%s lacks %s", path, want)
					}
				}
				for _, not := range c.lack {
					if strings.Contains(string(a.body), not) {
						t.Errorf("%s has %s", path, not)
					}
				}
			}
		})
	}
}

// TestLandingPageBehindProxy: a proxy that is trusted says how clients reach the site.
func TestLandingPageBehindProxy(t *testing.T) {
	for _, trusted := range []bool{true, false} {
		options := ""
		if trusted {
			options = "servers {\ntrusted_proxies static 127.0.0.1/32\n}\n"
		}
		m := landing(t, options, "", "registry_mirror")
		// What a host pretends to be is nothing that is pasted into a shell.
		if a := m.do("GET", "/", "X-Forwarded-Host", "x';reboot;'"); strings.Contains(string(a.body), "reboot") || trusted && strings.Contains(string(a.body), "<html") {
			t.Errorf("%s", a.body)
		}
		a := m.want(200, "GET", "/", "X-Forwarded-Proto", "https", "X-Forwarded-Host", "mirror.example.com")
		if got := strings.Contains(string(a.body), `https://mirror.example.com`); got != trusted {
			t.Errorf("trusted %v: %v", trusted, got)
		}
	}
}

// TestClientConfigCheck: what the command proves is proven by a mirror.
func TestClientConfigCheck(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	up.Push("library/x", regtest.NewImage("x"), "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	status, out, errs := command(t, "registry", "client-config", "podman", "--mirror", m.URL, "--for", "docker.io", "--check", "--image", "docker.io/library/x")
	if status != 0 || !strings.Contains(out, "insecure = true") || strings.Count(errs, "ok: ") < 5 {
		t.Errorf("%d %q %q", status, out, errs)
	}
	status, _, errs = command(t, "registry", "client-config", "podman", "--mirror", m.URL, "--check", "--image", "docker.io/library/none")
	if status != 1 || !strings.Contains(errs, "404") {
		t.Errorf("%d %q", status, errs)
	}
}

// TestClientConfigCommand: what is printed, written and refused.
func TestClientConfigCommand(t *testing.T) {
	root := t.TempDir()
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{nil, 0, "podman, buildah, skopeo"},
		{[]string{"--lang", "zh"}, 0, "NAS 与服务器面板"},
		{[]string{"--json"}, 0, `"all_registries": true`},
		{[]string{"--write"}, 1, "for one client"},
		{[]string{"rkt", "--mirror", "https://m.test"}, 1, "no settings for"},
		{[]string{"docker"}, 1, "--mirror"},
		{[]string{"docker", "--mirror", "m.test"}, 1, "https://host"},
		{[]string{"docker", "--mirror", "https://m.test", "--strict"}, 1, "goes to the registry itself"},
		{[]string{"docker", "--mirror", "https://m.test", "--default", "off"}, 1, "docker.io only"},
		{[]string{"docker", "--mirror", "https://m.test", "--root", root}, 1, "--write"},
		{[]string{"docker", "--mirror", "https://m.test", "--image", "x"}, 1, "--check"},
		{[]string{"docker", "--mirror", "https://m.test/", "--lang", "xx"}, 1, "en and zh"},
		{[]string{"docker", "--mirror", "https://m.test/", "--lang", "zh"}, 0, "填写镜像站地址"},
		{[]string{"containerd", "--mirror", "https://m.test", "--strict"}, 0, "server = \"https://m.test\""},
		{[]string{"k3s", "--mirror", "https://m.test"}, 0, "\"*\":"},
		{[]string{"podman", "--mirror", "https://m.test", "--for", "index.docker.io,ghcr.io"}, 0, "m.test/docker.io"},
		{[]string{"podman", "--mirror", "https://m.test", "--json"}, 0, `"file": "/etc/containers/registries.conf.d/mirror.conf"`},
		{[]string{"containerd", "--mirror", "https://m.test", "--write", "--root", root}, 0, root + "/etc/containerd/certs.d/_default/hosts.toml"},
		{[]string{"containerd", "--mirror", "https://other.test", "--write", "--root", root}, 1, "says something else"},
	} {
		status, out, errs := command(t, append([]string{"registry", "client-config"}, c.args...)...)
		if status != c.status || !strings.Contains(out+errs, c.says) {
			t.Errorf("%q: %d %q %q", c.args, status, out, errs)
		}
	}
}
