package module_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// startAdmin is start with the admin API at an address of its own.
func startAdmin(t *testing.T, app string, site ...string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	if err := m.load(app, strings.Join(site, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	t.Cleanup(func() {
		// Caddy's Stop leaves the admin API to answer.
		if err := m.loadJSON([]byte(`{"admin": {"disabled": true}}`)); err != nil {
			t.Error(err)
		}
	})
	return m
}

// post sends a body to the admin API.
func (m *mirror) post(path, body string) *answer {
	m.t.Helper()
	return m.ask(func() (*http.Response, error) {
		return client.Post("http://"+m.admin+path, "application/json", strings.NewReader(body))
	})
}

// ask asks the admin API.
func (m *mirror) ask(request func() (*http.Response, error)) *answer {
	m.t.Helper()
	for {
		resp, err := request()
		if err == nil {
			defer resp.Body.Close()
			read, err := io.ReadAll(resp.Body)
			return &answer{resp, read, err}
		}
		// As in send.
		if time.Since(m.loaded) > time.Second || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			m.t.Error(err)
			return &answer{Response: new(http.Response), err: err}
		}
	}
}

type refreshed struct {
	Reference      string
	Digest, Before digest.Digest
	Changed        bool
}

func (m *mirror) wantRefreshed(reference string, want refreshed) {
	m.t.Helper()
	a := m.post("/registry/refresh", fmt.Sprintf(`{"reference": %q}`, reference))
	var got refreshed
	decoder := json.NewDecoder(bytes.NewReader(a.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&got); err != nil || a.StatusCode != 200 || got != want || a.Header.Get("Content-Type") != "application/json" {
		m.t.Errorf("%s: %d %s, want %+v", reference, a.StatusCode, a.body, want)
	}
}

// wantRefusal posts, and checks the status and parts of the sentence.
func (m *mirror) wantRefusal(status int, body string, says ...string) {
	m.t.Helper()
	checkRefusal(m.t, m.post("/registry/refresh", body), status, says...)
}

func checkRefusal(t testing.TB, a *answer, status int, says ...string) {
	t.Helper()
	var reply struct{ Error string }
	if err := json.Unmarshal(a.body, &reply); err != nil || a.StatusCode != status {
		t.Errorf("%d %s, want %d: %v", a.StatusCode, a.body, status, err)
	}
	for _, part := range says {
		if !strings.Contains(reply.Error, part) {
			t.Errorf("%q does not mention %q", reply.Error, part)
		}
	}
}

const referenceX = "docker.io/library/x:latest"

func TestAdminRefresh(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one, two := regtest.NewImage("one"), regtest.NewImage("two")
	up.Push("library/x", one, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 1h"))
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.wantRefreshed("x", refreshed{Reference: referenceX, Digest: one.Digest, Before: one.Digest})
	up.Push("library/x", two, "latest")
	m.pull("library/x", "latest", one)
	m.wantRefreshed("docker.io/x:latest", refreshed{referenceX, two.Digest, one.Digest, true})
	m.pull("library/x", "latest", two)
	up.Push("org/y", two, "1")
	m.wantRefreshed("org/y:1", refreshed{"docker.io/org/y:1", two.Digest, "", true})

	m.wantRefusal(404, `{"reference": "org/none:1"}`, "docker.io/org/none:1", up.URL)
	m.wantRefusal(404, `{"reference": "evil.example/x"}`, "add `upstream evil.example`")
	m.wantRefusal(400, `{"reference": "X"}`, "X")
	m.wantRefusal(400, `{"reference": "x@`+one.Digest.String()+`"}`, "docker.io/library/x@"+one.Digest.String(), "digest")
	up.Down()
	m.wantRefusal(503, `{"reference": "x"}`, referenceX, up.URL, "refused")
	m.pull("library/x", "latest", two)
}

func TestAdminBadRequests(t *testing.T) {
	m := startAdmin(t, "")
	for body, says := range map[string]string{
		"":                           "EOF",
		"x":                          "invalid character",
		"[]":                         "array",
		"{}":                         "empty",
		`{"reference": ""}`:          "empty",
		`{"reference": 1}`:           "number",
		`{"reference": "x", "y": 1}`: "unknown field",
		`{"reference": "x"} {}`:      "more",
		`{"reference": "x"`:          "EOF",
	} {
		m.wantRefusal(400, body, says)
	}
	m.wantRefusal(413, `{"reference": "`+strings.Repeat("x", 5000)+`"}`, "4096")
	m.wantRefusal(413, `{"reference": "x"}`+strings.Repeat(" ", 5000), "4096")
	for _, method := range []string{"GET", "HEAD", "PUT", "DELETE"} {
		req, err := http.NewRequest(method, "http://"+m.admin+"/registry/refresh", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if method != "HEAD" {
			checkRefusal(t, &answer{resp, body, err}, 405, method, "POST")
		}
		if resp.StatusCode != 405 || resp.Header.Get("Allow") != "POST" {
			t.Errorf("%s: %d, Allow %q", method, resp.StatusCode, resp.Header.Get("Allow"))
		}
	}
}

// TestAdminReloads: the configuration that serves is the one that answers.
func TestAdminReloads(t *testing.T) {
	up, other := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	one, two := regtest.NewImage("one"), regtest.NewImage("two")
	up.Push("library/x", one, "latest")
	other.Push("library/x", two, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	m.wantRefreshed("x", refreshed{referenceX, one.Digest, "", true})

	// Accepted.
	if err := m.load(upstreamFor("docker.io", up, "tag_ttl 5m"), ""); err != nil {
		t.Fatal(err)
	}
	m.wantRefreshed("x", refreshed{referenceX, one.Digest, one.Digest, false})

	// Rejected before its app is made, and while apps start, this app before
	// the failing one or after it: Caddy starts them in any order.
	occupied, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	fails, err := m.adapt(upstreamFor("docker.io", other), "")
	if err != nil {
		t.Fatal(err)
	}
	fails = bytes.Replace(fails, []byte(`"listen":["`), []byte(`"listen":["`+occupied.Addr().String()+`","`), 1)
	for range 8 {
		if err := m.load(upstreamFor("docker.io", other, "credentials a {env.SURELY_NOT_SET}"), ""); err == nil {
			t.Fatal("loaded with a secret that is not set")
		}
		m.wantRefreshed("x", refreshed{referenceX, one.Digest, one.Digest, false})
		if err := m.loadJSON(fails); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Fatalf("loaded with an address in use: %v", err)
		}
		m.wantRefreshed("x", refreshed{referenceX, one.Digest, one.Digest, false})
	}

	// Another store.
	old := m.dir
	m.dir = t.TempDir()
	if err := m.load(upstreamFor("docker.io", other), ""); err != nil {
		t.Fatal(err)
	}
	m.wantRefreshed("x", refreshed{referenceX, two.Digest, "", true})
	unlocked(t, old)

	// None of ours.
	if err := m.loadJSON(fmt.Appendf(nil, `{"admin": {"listen": %q, "config": {"persist": false}}}`, m.admin)); err != nil {
		t.Fatal(err)
	}
	m.wantRefusal(503, `{"reference": "x"}`, "no configuration with the registry app is running")
	if err := m.load(upstreamFor("docker.io", other), ""); err != nil {
		t.Fatal(err)
	}
	m.wantRefreshed("x", refreshed{referenceX, two.Digest, two.Digest, false})
}

// TestAdminReloadInMidRefresh: the store of a refresh under way stays open.
func TestAdminReloadInMidRefresh(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one := regtest.NewImage("one")
	up.Push("library/x", one, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	hold := make(chan struct{})
	up.FailSlowly("", "/manifests/", hold)
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.wantRefreshed("x", refreshed{referenceX, one.Digest, "", true})
	}()
	eventually(t, "the upstream to be asked", func() bool { return up.Connections("registry") > 0 })
	old := m.dir
	second := *m
	second.dir = t.TempDir()
	if err := second.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Error(err)
	}
	close(hold)
	<-done
	m.dir = second.dir
	unlocked(t, old)
}
