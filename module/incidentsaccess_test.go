package module_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// The tests of this file are named after what has happened to other registries.

// writes are the requests that change a repository: method and path.
func writes(repository string, image regtest.Image) [][2]string {
	base := "/v2/" + repository
	digest, layer := image.Digest.String(), image.Blobs[1].Digest.String()
	session := base + "/blobs/uploads/01234567-89ab-cdef-0123-456789abcdef"
	return [][2]string{
		{"POST", base + "/blobs/uploads/"},
		{"POST", base + "/blobs/uploads/?digest=" + layer},
		{"POST", base + "/blobs/uploads/?mount=" + layer + "&from=apps/other"},
		{"POST", base + "/blobs/uploads/?mount=" + layer},
		{"GET", session},
		{"HEAD", session},
		{"PATCH", session},
		{"PUT", session + "?digest=" + layer},
		{"DELETE", session},
		{"PUT", base + "/manifests/v1"},
		{"PUT", base + "/manifests/" + digest},
		{"PUT", base + "/manifests/" + digest + "?tag=v2"},
	}
}

func deletes(repository string, image regtest.Image) [][2]string {
	base := "/v2/" + repository
	return [][2]string{
		{"DELETE", base + "/manifests/v1"},
		{"DELETE", base + "/manifests/" + image.Digest.String()},
		{"DELETE", base + "/blobs/" + image.Blobs[1].Digest.String()},
	}
}

// TestCVE_2026_41888: the switch against deleting was looked at by one route, and
// not by another. Here one gate stands before every route that changes anything,
// and asks for the right that the route needs.
func TestCVE_2026_41888_EveryMutatingRoute(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web", "apps/other")
	for rule, allowed := range map[string]string{
		"allow pull":                            "pull",
		"deny pull\nallow any to user:eve":      "",
		"deny pull\nallow push to user:bob":     "push",
		"deny pull\nallow delete to user:bob":   "delete",
		"allow any to user:bob on apps/other/*": "",
		"allow any to net:192.0.2.0/24":         "",
	} {
		// The default placeholder has nobody in it where there is no authenticator.
		for _, directives := range []string{"", passwords} {
			if err := m.behind("", directives, "", site(rule)); err != nil {
				t.Fatal(err)
			}
			all := map[string][][2]string{"push": writes("apps/web", image), "delete": deletes("apps/web", image)}
			for _, path := range reads("apps/web", image) {
				all["pull"] = append(all["pull"], [2]string{"GET", path}, [2]string{"HEAD", path})
			}
			for right, requests := range all {
				if right == allowed && (right == "pull" || directives != "") {
					continue // what is allowed is another test's
				}
				for _, r := range requests {
					a := m.want(403, r[0], r[1], as("bob")...)
					if r[0] != "HEAD" && !strings.Contains(string(a.body), oci.CodeDenied) {
						t.Errorf("%q: %s %s: %s", rule, r[0], r[1], a.body)
					}
				}
			}
		}
	}
	// Nothing of it had an effect.
	if err := m.behind("", "", "", site("allow pull")); err != nil {
		t.Fatal(err)
	}
	m.pull("apps/web", "v1", image)
}

// TestRightsOpenTheirRoutes: what TestCVE_2026_41888 says is refused is not when
// somebody may.
func TestRightsOpenTheirRoutes(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web", "apps/other")
	for right, requests := range map[string][][2]string{"push": writes("apps/web", image), "delete": deletes("apps/web", image)} {
		if err := m.behind("", passwords, "", site("allow "+right+" to user:bob on apps/web")); err != nil {
			t.Fatal(err)
		}
		for _, r := range requests {
			if a := m.do(r[0], r[1], as("bob")...); a.StatusCode == http.StatusForbidden || a.StatusCode == http.StatusUnauthorized {
				t.Errorf("%s: %s %s: status %d: %s", right, r[0], r[1], a.StatusCode, a.body)
			}
		}
	}
}

// TestCVE_2026_27771: private images could be pulled by anyone. Here nothing that
// is hosted is shown to anyone until a rule says so, by any route, and neither is
// that it exists.
func TestCVE_2026_27771_AnonymousPull(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web")
	for _, site := range []string{
		"default off\nhosted apps/**", // no rules
		site("allow pull to authenticated"),
		site("allow pull to user:bob on apps/**"),
		site("deny pull on apps/web", "allow pull"),
	} {
		if err := m.behind("", "", "", site); err != nil {
			t.Fatal(err)
		}
		// What is there and what is not look the same.
		for _, repository := range []string{"apps/web", "apps/none"} {
			if repository == "apps/none" && strings.Contains(site, "deny") {
				continue // it may be pulled, and is not there
			}
			for _, path := range reads(repository, image) {
				for _, header := range [][]string{nil, {"Authorization", "Basic Og=="}, as("bob")} {
					m.want(403, "HEAD", path, header...)
					if a := m.want(403, "GET", path, header...); strings.Contains(string(a.body), image.Blobs[0].Digest.Encoded()+image.Blobs[1].Digest.Encoded()) || a.Header.Get("Docker-Content-Digest") != "" {
						t.Errorf("%s tells %s, %v", path, a.body, a.Header)
					}
				}
			}
		}
		if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":[]}` {
			t.Errorf("catalog: %s", a.body)
		}
	}
}

// pushes an image as somebody, by POST and PUT.
func (m *mirror) pushes(user, repository, tag string, image regtest.Image) {
	m.t.Helper()
	for _, blob := range image.Blobs {
		begun := m.sends(202, "POST", "/v2/"+repository+"/blobs/uploads/", nil, as(user)...)
		m.sends(201, "PUT", withQuery(begun.Header.Get("Location"), "digest", blob.Digest.String()), blob.Data, as(user)...)
	}
	m.sends(201, "PUT", "/v2/"+repository+"/manifests/"+tag, image.Data, append(as(user), "Content-Type", image.MediaType)...)
}

// TestRightsOfNames: what those with a name push, pull and delete behind a login,
// and what others do not.
func TestRightsOfNames(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := start(t, "", "")
	m.stop()
	if err := m.behind("", passwords, "", site("allow pull push to user:bob on apps/**", "allow pull delete to user:eve on apps/web")); err != nil {
		t.Fatal(err)
	}
	m.pushes("bob", "apps/web", "v1", image)
	m.pushes("bob", "apps/other", "v1", image)
	for _, path := range reads("apps/web", image) {
		m.want(200, "GET", path, as("bob")...)
		m.want(200, "GET", path, as("eve")...)
		m.want(401, "GET", path)
	}
	for _, path := range reads("apps/other", image) {
		m.want(403, "GET", path, as("eve")...)
	}
	for _, r := range writes("apps/web", image) {
		m.want(403, r[0], r[1], as("eve")...)
		m.want(401, r[0], r[1])
	}
	for _, r := range deletes("apps/web", image) {
		m.want(403, r[0], r[1], as("bob")...)
		m.want(401, r[0], r[1])
	}
	m.want(202, "DELETE", "/v2/apps/web/manifests/"+image.Digest.String(), as("eve")...)
	m.want(404, "GET", "/v2/apps/web/manifests/v1", as("bob")...)
	m.want(200, "GET", "/v2/apps/other/manifests/v1", as("bob")...)
}

// TestCVE_2024_39897: blobs that are stored once for all leaked from a repository
// to those who may not read it, by HEAD and by mount. Here a blob is seen in a
// repository only if it was pushed there, or mounted by somebody who may pull where
// it comes from.
func TestCVE_2024_39897_BlobOfAnother(t *testing.T) {
	up := regtest.New(t, regtest.Options{User: "robot", Secret: "s"})
	secret, corp, shown := regtest.NewImage("secret", regtest.Random("secret", 1000)), regtest.NewImage("corp", regtest.Random("corp", 1000)), regtest.NewImage("shown", regtest.Random("shown", 1000))
	up.Push("private/y", corp, "v1")
	up.Push("library/x", shown, "v1")
	m := start(t, "", "")
	rules := []string{
		"allow any to user:bob on apps/**",
		"allow pull to user:bob on docker.io/private/**",
		"allow push to user:eve on apps/secret", // may write there, and not read
		"allow pull push to user:eve on apps/eve",
		"allow pull to user:eve on **/x",
		"deny any on apps/**",
		"allow pull",
	}
	m.stop()
	if err := m.behind("", passwords, upstreamFor("docker.io", up, "credentials robot s"), site(rules...)); err != nil {
		t.Fatal(err)
	}
	m.pushes("bob", "apps/secret", "v1", secret)
	for path, image := range map[string]regtest.Image{"docker.io/private/y": corp, "docker.io/library/x": shown} {
		m.want(200, "GET", "/v2/"+path+"/manifests/v1", as("bob")...)
		for _, blob := range image.Blobs {
			m.want(200, "GET", "/v2/"+path+"/blobs/"+blob.Digest.String(), as("bob")...)
		}
	}
	eventually(t, "what is mirrored to be held", func() bool { return len(kept(m.dir, corp.Blobs[1].Digest))*len(kept(m.dir, shown.Blobs[1].Digest)) > 0 })
	// mount reports whether somebody gets a blob into a repository by a mount.
	mount := func(user, repository, query string, blob regtest.Content) bool {
		t.Helper()
		a := m.do("POST", "/v2/"+repository+"/blobs/uploads/?mount="+blob.Digest.String()+query, as(user)...)
		switch a.StatusCode {
		case http.StatusCreated:
			return true
		case http.StatusAccepted:
			m.want(204, "DELETE", a.Header.Get("Location"), as(user)...)
		default:
			t.Fatalf("mount of %s to %s as %s: status %d: %s", query, repository, user, a.StatusCode, a.body)
		}
		return false
	}
	// Without a source, any repository that the catalog knows will do.
	eventually(t, "the catalog to know", func() bool { return mount("bob", "apps/bob", "", secret.Blobs[0]) })
	for _, blob := range []regtest.Content{secret.Blobs[1], corp.Blobs[1]} {
		for _, query := range []string{"&from=apps/secret", "&from=docker.io/private/y", "&from=private/y", "&from=apps/none", ""} {
			if mount("eve", "apps/eve", query, blob) {
				t.Errorf("%q: eve has mounted what she may not pull", query)
			}
		}
		for _, method := range []string{"HEAD", "GET"} {
			m.want(404, method, "/v2/apps/eve/blobs/"+blob.Digest.String(), as("eve")...)
			m.want(403, method, "/v2/apps/secret/blobs/"+blob.Digest.String(), as("eve")...)
		}
	}
	// A manifest that names it does not make it hers.
	for _, blob := range secret.Blobs {
		m.want(404, "HEAD", "/v2/apps/eve/blobs/"+blob.Digest.String(), as("eve")...)
	}
	m.sends(404, "PUT", "/v2/apps/eve/manifests/v1", secret.Data, append(as("eve"), "Content-Type", secret.MediaType)...)

	if !mount("eve", "apps/eve", "&from=docker.io/library/x", shown.Blobs[1]) {
		t.Error("eve cannot mount what she may pull")
	}
	m.want(200, "HEAD", "/v2/apps/eve/blobs/"+shown.Blobs[1].Digest.String(), as("eve")...)
	if !mount("bob", "apps/bob", "&from=apps/secret", secret.Blobs[1]) || !mount("bob", "apps/bob", "&from=docker.io/private/y", corp.Blobs[1]) {
		t.Error("bob cannot mount what he may pull")
	}
}

// TestCVE_2026_45781: an error in the verification let the caller pass. Here one
// who cannot be identified may do nothing, not even what anyone may.
func TestCVE_2026_45781_FailOpen(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web")
	if err := m.behind("", "", "", site("identity {header.Remote-User}", "deny any to user:eve", "allow any to anyone")); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/apps/web/manifests/v1")
	m.want(200, "GET", "/v2/apps/web/manifests/v1", "Remote-User", strings.Repeat("x", 512))
	for _, name := range []string{strings.Repeat("x", 513), "eve\xff"} {
		for _, path := range reads("apps/web", image) {
			a := m.want(403, "GET", path, "Remote-User", name)
			if text := string(a.body); !strings.Contains(text, "cannot be found out who asks") || strings.Contains(text, name) {
				t.Errorf("%s: %s", path, text)
			}
		}
		for _, r := range append(writes("apps/web", image), deletes("apps/web", image)...) {
			m.want(403, r[0], r[1], "Remote-User", name)
		}
		if a := m.want(200, "GET", "/v2/_catalog", "Remote-User", name); string(a.body) != `{"repositories":[]}` {
			t.Errorf("catalog: %s", a.body)
		}
	}
	m.pull("apps/web", "v1", image)
}

// TestIdentityIsEscaped: a name does not write lines of its own into a log, or an
// answer.
func TestIdentityIsEscaped(t *testing.T) {
	image := regtest.NewImage("x")
	m := hosting(t, image, "apps/web")
	if err := m.behind("", "vars who \"eve\n\x1b[2Jroot\"", "", site("identity {vars.who}", "allow pull to user:bob")); err != nil {
		t.Fatal(err)
	}
	a := m.want(403, "GET", "/v2/apps/web/manifests/v1")
	if text := string(a.body); !strings.Contains(text, "allows eve??[2Jroot to pull") {
		t.Errorf("%q", text)
	}
}

// TestOneNameOneRule: whatever a client calls a repository, one rule is about it.
// Others forgot an alias, the default registry, or ?ns=.
func TestOneNameOneRule(t *testing.T) {
	up, other := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	for _, name := range []string{"library/nginx", "library/free"} {
		up.Push(name, image, "v1")
		other.Push(name, image, "v1")
	}
	app := upstreamFor("docker.io", up) + upstreamFor("registry.corp:5000", other, "path_name corp", "repository_prefix stored/corp")
	m := start(t, app, "access {\nallow pull on docker.io/library/free corp/library/free\ndeny pull on docker.io/library/nginx corp/library/nginx\nallow pull\n}")
	host := strings.TrimPrefix(m.URL, "http://")
	for name, want := range map[string]int{"nginx": 403, "free": 200} {
		for _, c := range []struct{ repository, ns string }{
			{name, ""},
			{"library/" + name, ""},
			{"docker.io/" + name, ""},
			{"docker.io/library/" + name, ""},
			{"index.docker.io/library/" + name, ""},
			{"registry-1.docker.io/" + name, ""},
			{name, "docker.io"},
			{"library/" + name, "docker.io"},
			{"library/" + name, "DOCKER.IO"},
			{"library/" + name, "docker.io:443"},
			{"library/" + name, "docker.io."},
			{"library/" + name, "index.docker.io"},
			{name, "registry-1.docker.io"},
			{"docker.io/library/" + name, "docker.io"},
			{"index.docker.io/library/" + name, "docker.io"},
			{"library/" + name, host}, // our own: says nothing
			{"corp/library/" + name, ""},
			{"library/" + name, "registry.corp:5000"},
			{"library/" + name, "REGISTRY.corp:5000"},
			{"corp/library/" + name, "registry.corp:5000"},
		} {
			for _, path := range reads(c.repository, image) {
				if c.ns != "" {
					path += "?ns=" + url.QueryEscape(c.ns)
				}
				if a := m.do("GET", path); a.StatusCode != want {
					t.Errorf("GET %s: status %d, want %d: %.200s", path, a.StatusCode, want, a.body)
				}
			}
		}
		// What is no name, or of no registry, reaches nothing.
		for _, c := range []struct {
			path string
			want int
		}{
			{"/v2/library/" + strings.ToUpper(name) + "/manifests/v1", 400},
			{"/v2/Docker.io/library/" + name + "/manifests/v1", 400},
			{"/v2/library//" + name + "/manifests/v1", 400},
			{"/v2/library/./" + name + "/manifests/v1", 400},
			{"/v2/library%2f" + name + "/manifests/v1", want}, // the same path
			{"/v2/registry.corp__5000/library/" + name + "/manifests/v1", 404},
			{"/v2/stored/corp/library/" + name + "/manifests/v1", 404},
		} {
			if a := m.do("GET", c.path); a.StatusCode != c.want && !(a.StatusCode >= 400 && c.want >= 400) {
				t.Errorf("GET %s: status %d, want %d: %.200s", c.path, a.StatusCode, c.want, a.body)
			}
		}
	}
	m.wantError(403, oci.CodeDenied, "GET", "/v2/nginx/manifests/v1", "docker.io/library/nginx:v1", "anonymous")
}

// TestRulesThatMeanNothing fail the load, from a Caddyfile and from JSON.
func TestRulesThatMeanNothing(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	m := start(t, "", "")
	app := upstreamFor("registry.corp:5000", up, "path_name corp")
	for _, c := range []struct{ site, want string }{
		{"access {\ndeny pull on library/nginx\nallow pull\n}", "access: rules[0]: on library/nginx: library is neither the path name of a registry nor hosted here"},
		{"access {\ndeny pull on nginx\nallow pull\n}", "nginx is neither"},
		{"access {\ndeny pull on docker.io/nginx\nallow pull\n}", "write docker.io/library/nginx"},
		{"access {\ndeny pull on docker.io/*\nallow pull\n}", "write docker.io/library/*"},
		{"access {\nallow pull\ndeny push on index.docker.io/library/**\n}", "access: rules[1]: on index.docker.io/library/**: index.docker.io is another name of docker.io; write docker.io/library/**"},
		{"access {\ndeny pull on registry.corp__5000/app\nallow pull\n}", "registry.corp__5000 is neither"},
		{"default off\nhosted apps/**\naccess {\nallow pull on team/**\n}", "team is neither"},
		{"access {\ndeny pull on docker.io/** corp/app */secret europe-docker.pkg.dev/x/y\nallow pull\n}", ""},
		{"default off\nhosted apps/** */web\naccess {\nallow pull on apps/a team/web\n}", ""},
	} {
		err := m.load(app, c.site)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: %v, want %q", c.site, err, c.want)
		}
	}
	for access, want := range map[string]string{
		`{}`:           "there is no rule",
		`{"rules":[]}`: "there is no rule",
		`{"rules":[{"effect":"permit","actions":["pull"]}]}`:                                                                            `effect "permit" is neither allow nor deny`,
		`{"rules":[{"effect":"allow","actions":[]}]}`:                                                                                   "no action",
		`{"rules":[{"effect":"allow","actions":["push"]}]}`:                                                                             "allow push needs `to`",
		`{"rules":[{"effect":"allow","actions":["pull"]},{"effect":"deny","actions":["pull"],"to":["user:a"]}]}`:                        "rules[1] never decides",
		`{"identity":"{env.USER}","rules":[{"effect":"allow","actions":["pull"]}]}`:                                                     "not one placeholder",
		`{"identity":"x{http.auth.user.id}","rules":[{"effect":"allow","actions":["pull"]}]}`:                                           "not one placeholder",
		`{"rules":[{"effect":"allow","actions":["any"],"to":["anyone"]}]}`:                                                              "",
		`{"identity":"{http.request.header.X}","rules":[{"effect":"deny","actions":["any"],"to":["net:private_ranges","user:a b,c"]}]}`: "",
	} {
		err := m.loadJSON(fmt.Appendf(nil, `{"admin":{"disabled":true},"apps":{"registry":{"storage":{"backend":"disk","directory":%q,"min_free":"1MB"}},"http":{"servers":{"s":{"listen":[%q],"automatic_https":{"disable":true},"routes":[{"handle":[{"handler":"registry_mirror","access":%s}]}]}}}}}`,
			m.dir, strings.TrimPrefix(m.URL, "http://"), access))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", access, err, want)
		}
	}
}

// TestRulesThatWarn at load, and those that do not.
func TestRulesThatWarn(t *testing.T) {
	m := start(t, "", "")
	const (
		open  = "registry_mirror lets everyone who reaches it pull"
		write = "access: a rule lets everyone who reaches this site write to it"
		mixed = "access: anyone may pull here, and other things need a name"
	)
	for _, c := range []struct {
		site string
		want []string
	}{
		{"", []string{open}},
		{site("allow pull"), []string{open}},
		{site("allow pull to authenticated"), nil},
		{site("allow pull to net:10.0.0.0/8", "allow push to user:ci"), nil},
		{site("deny pull", "allow push to user:ci"), nil},
		{site("allow pull", "allow push to user:ci"), []string{open, mixed}},
		{site("allow pull on apps/open/**", "allow pull to user:bob"), []string{open, mixed}},
		{site("allow push delete to anyone", "allow pull to user:bob"), []string{write, write}},
		{site("deny push delete", "allow any to anyone"), []string{open}},
		{site("allow pull to authenticated", "allow push delete to user:ci"), nil},
	} {
		m.logs = captureLogs(t)
		if err := m.load("", c.site); err != nil {
			t.Fatal(err)
		}
		var got []string
		m.logs.mu.Lock()
		for _, line := range m.logs.lines {
			for _, message := range []string{open, write, mixed} {
				if text, _ := line["msg"].(string); line["level"] == "warn" && strings.HasPrefix(text, message) {
					got = append(got, message)
				}
			}
		}
		m.logs.mu.Unlock()
		if len(got) != len(c.want) {
			t.Errorf("%q warns %q, want %q", c.site, got, c.want)
			continue
		}
		for _, want := range c.want {
			found := false
			for _, message := range got {
				found = found || message == want
			}
			if !found {
				t.Errorf("%q warns %q, want %q", c.site, got, c.want)
			}
		}
	}
}
