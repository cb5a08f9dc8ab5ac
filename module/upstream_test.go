package module_test

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

func basic(user, secret string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+secret))
}

// TestCredentials: they go to the token server, and to nobody else.
func TestCredentials(t *testing.T) {
	t.Setenv("TEST_SECRET", "s3cret")
	up := regtest.New(t, regtest.Options{User: "robot", Secret: "s3cret"})
	image := regtest.NewImage("x", regtest.Random("x", 10_000))
	up.Push("library/x", image, "latest")
	up.Push("private/y", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "credentials robot {env.TEST_SECRET}"), "")
	m.pull("library/x", "latest", image)
	for _, r := range up.Requests(func(r regtest.Request) bool { return r.Authorization != "" }) {
		switch {
		case r.Server == "cdn":
			t.Errorf("the CDN was given %q", r.Authorization)
		case r.Server == "registry" && !strings.HasPrefix(r.Authorization, "Bearer token-"):
			t.Errorf("the registry was given %q", r.Authorization)
		case r.Server == "token" && r.Authorization != basic("robot", "s3cret"):
			t.Errorf("the token server was given %q", r.Authorization)
		}
	}
	// What only the mirror may read is not opened to everyone.
	for _, method := range []string{"GET", "HEAD"} {
		m.wantError(403, oci.CodeDenied, method, "/v2/private/y/manifests/latest", "credentials")
		m.wantError(403, oci.CodeDenied, method, "/v2/private/y/manifests/"+image.Digest.String())
		m.wantError(403, oci.CodeDenied, method, "/v2/private/y/blobs/"+image.Blobs[1].Digest.String())
	}
	m.wantError(403, oci.CodeDenied, "GET", "/v2/private/y/tags/list")
	m.wantError(403, oci.CodeDenied, "GET", "/v2/private/y/referrers/"+image.Digest.String())
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/x/manifests/none")
	m.pull("library/x", "latest", image) // a name that does not exist proves nothing

	// The verdict is kept for times when nobody can be asked.
	m.stop()
	up.Down()
	if err := m.load(upstreamFor("docker.io", up, "credentials robot {env.TEST_SECRET}"), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	m.wantError(403, oci.CodeDenied, "GET", "/v2/private/y/manifests/latest")
	m.wantError(403, oci.CodeDenied, "GET", "/v2/unknown/z/manifests/latest", "private")

	// One that is not set fails the load and is named, and its value is not.
	err := m.load(upstreamFor("docker.io", up, "credentials robot {env.SURELY_NOT_SET}"), "")
	if err == nil || !strings.Contains(err.Error(), "upstreams[0].credentials.secret") || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("an unset secret: %v", err)
	}
}

func TestRefusedCredentials(t *testing.T) {
	up := regtest.New(t, regtest.Options{User: "robot", Secret: "right"})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "credentials robot right", "tag_ttl 0"), "")
	m.pull("library/x", "latest", image)
	if err := m.load(upstreamFor("docker.io", up, "credentials robot wrong", "tag_ttl 0"), ""); err != nil {
		t.Fatal(err)
	}
	// An expired credential does not darken what is held.
	if a := m.want(200, "GET", "/v2/library/x/manifests/latest"); !strings.Contains(a.Header.Get("Warning"), "credentials") {
		t.Errorf("warning %q", a.Header.Get("Warning"))
	}
	up.Push("library/new", image, "latest")
	m.wantError(403, oci.CodeDenied, "GET", "/v2/library/new/manifests/latest", "credentials")
	// And the token server is not hammered with it.
	up.Forget()
	for range 5 {
		m.want(200, "GET", "/v2/library/x/manifests/latest")
	}
	refused := up.Requests(func(r regtest.Request) bool { return r.Server == "token" && r.Authorization == basic("robot", "wrong") })
	if len(refused) > 0 {
		t.Errorf("refused credentials were shown %d times more", len(refused))
	}
}

// TestListingIsNoVerdict: asking what there is does not make a public
// repository private.
func TestListingIsNoVerdict(t *testing.T) {
	up := regtest.New(t, regtest.Options{User: "robot", Secret: "s"})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	for _, first := range []string{"/tags/list", "/referrers/" + image.Blobs[0].Digest.String(), "/manifests/none", "/blobs/" + image.Digest.String()} {
		m := start(t, upstreamFor("docker.io", up, "credentials robot s"), "")
		m.do("GET", "/v2/library/x"+first)
		m.pull("library/x", "latest", image)
		m.stop()
	}
}

func TestBasicUpstream(t *testing.T) {
	up := regtest.New(t, regtest.Options{Basic: true, User: "AWS", Secret: "x"})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("team/x", image, "latest")
	// Only its credentials can read it, so only its owner may.
	m := start(t, upstreamFor("ecr.test", up, "credentials AWS x"), "default ecr.test")
	m.wantError(403, oci.CodeDenied, "GET", "/v2/team/x/manifests/latest")
}

// TestRealm: a registry that names somebody else's token server is not given
// the credentials meant for it (CVE-2026-33540).
func TestRealm(t *testing.T) {
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Errorf("somebody else's realm was given %q", r.Header.Get("Authorization"))
		}
		io.WriteString(w, `{"token":"stolen"}`)
	}))
	defer thief.Close()
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(thief.URL, "http://"))
	up := regtest.New(t, regtest.Options{Realm: "http://localhost:" + port + "/token"})
	up.Push("library/x", regtest.NewImage("x"), "latest")
	m := start(t, upstreamFor("docker.io", up, "credentials robot secret"), "")
	m.wantError(403, oci.CodeDenied, "GET", "/v2/library/x/manifests/latest")
	// Without allow_private even a token without credentials is not asked there.
	if err := m.load(fmt.Sprintf("upstream docker.io {\n origin %s\n}", up.URL), ""); err != nil {
		t.Fatal(err)
	}
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/manifests/latest", "refused")
}

// TestRedirectGuard: a registry cannot send the mirror into its own network.
func TestRedirectGuard(t *testing.T) {
	var reached atomic.Int64
	inside := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	defer inside.Close()
	layer := regtest.Random("x", 1000)
	up := regtest.New(t, regtest.Options{NoToken: true})
	up.Push("library/x", regtest.NewImage("x", layer), "latest")
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(inside.URL, "http://"))
	for _, location := range []string{inside.URL, "https://127.0.0.1:" + port, "https://localhost:" + port, "https://[::1]:" + port, "https://169.254.169.254/", "ftp://example.com/", "file:///etc/passwd"} {
		t.Run(location, func(t *testing.T) {
			m := start(t, fmt.Sprintf("upstream docker.io {\n origin %s\n timeouts 2s 2s 2s\n}", redirecting(t, up, location)), "")
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/blobs/"+layer.Digest.String(), "refused")
		})
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("%d requests went inside", n)
	}
}

// redirecting passes requests on to a registry, and sends blobs elsewhere.
func redirecting(t *testing.T, up *regtest.Registry, location string) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") && r.Method == "GET" {
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return
		}
		passOn(w, r, up.URL)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// passOn answers with what another server says.
func passOn(w http.ResponseWriter, r *http.Request, base string) {
	req, err := http.NewRequest(r.Method, base+r.URL.Path, nil)
	if err != nil {
		panic(err)
	}
	req.Header = r.Header
	resp, err := client.Do(req)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for key, values := range resp.Header {
		w.Header()[key] = values
	}
	w.WriteHeader(resp.StatusCode)
	io.Copy(w, resp.Body)
}

// TestEgressProxy: everything goes through the proxy that is configured, and
// the guard looks at where the proxy is sent.
func TestEgressProxy(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true})
	layer := regtest.Random("x", 1000)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	var asked atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Host != "registry.test" {
			t.Errorf("the proxy was sent to %s", r.URL)
		}
		if strings.Contains(r.URL.Path, "/blobs/") && r.URL.Query().Get("sig") == "" && r.Method == "GET" {
			w.Header().Set("Location", "https://10.1.2.3/blob")
			w.WriteHeader(http.StatusTemporaryRedirect)
			return
		}
		passOn(w, r, up.URL)
	}))
	defer proxy.Close()
	t.Setenv("TEST_PROXY", proxy.URL)
	m := start(t, "upstream registry.test {\n origin http://registry.test\n network_proxy url {env.TEST_PROXY}\n}", "default registry.test")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	if asked.Load() == 0 {
		t.Error("the proxy was not asked")
	}
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/blobs/"+layer.Digest.String(), "not a public address")
}

// TestEndpoints: mirrors of an upstream are asked first, and are no authority.
func TestEndpoints(t *testing.T) {
	origin := regtest.New(t, regtest.Options{})
	near := regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true})
	image := regtest.NewImage("x", regtest.Random("x", 100_000))
	only := regtest.NewImage("only", regtest.Random("only", 1000))
	origin.Push("library/x", image, "latest")
	origin.Push("library/only", only, "latest")
	near.Push("hub/library/x", image, "latest")
	block := func(endpoint string) string {
		return fmt.Sprintf("upstream docker.io {\n endpoint %s/v2/hub %s\n origin %s\n allow_private\n tag_ttl 0\n}\n", near.URL, endpoint, origin.URL)
	}
	m := start(t, block(""), "")
	m.pull("library/x", "latest", image)
	if n := origin.Count("GET", ""); n != 0 {
		t.Errorf("%d requests to the origin for what the endpoint has", n)
	}
	// It lacks something: its 404, 401, 403, 5xx and web pages are passed over.
	m.pull("library/only", "latest", only)
	for i, fault := range []regtest.Fault{
		{Status: 401}, {Status: 403}, {Status: 404}, {Status: 500}, {Status: 502},
		{Status: 200, Body: "<html>please log in</html>"},
	} {
		fault.Path = "/manifests/"
		near.Fail(fault)
		origin.Push("library/next", regtest.NewImage(fmt.Sprint("next", i)), "latest")
		m.pull("library/next", "latest", regtest.NewImage(fmt.Sprint("next", i)))
		near.Heal()
	}
	near.Down()
	origin.Push("library/down", image, "latest")
	m.pull("library/down", "latest", image)
	near.Up()
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/none/manifests/latest", origin.URL)

	// One that only pulls is not asked what a tag means.
	if err := m.load(block("{\n capabilities pull\n}"), ""); err != nil {
		t.Fatal(err)
	}
	near.Forget()
	m.want(200, "HEAD", "/v2/library/x/manifests/latest")
	m.want(200, "GET", "/v2/library/x/tags/list")
	if n := near.Count("HEAD", "/manifests/latest") + near.Count("GET", "/tags/"); n != 0 {
		t.Errorf("an endpoint for pulling was asked %d times what tags there are", n)
	}

	// Without an origin the last endpoint's word counts.
	if err := m.load(fmt.Sprintf("upstream docker.io {\n endpoint %s/v2/hub\n origin off\n}", near.URL), ""); err != nil {
		t.Fatal(err)
	}
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/none/manifests/latest")
}

// TestEndpointWithWrongBytes is passed over the next time.
func TestEndpointWithWrongBytes(t *testing.T) {
	origin, near := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true})
	layer := regtest.Random("x", 200_000)
	image := regtest.NewImage("x", layer)
	origin.Push("library/x", image, "latest")
	near.Push("library/x", image, "latest")
	near.Fail(regtest.Fault{Path: "/blobs/" + layer.Digest.String(), Corrupt: 0.5})
	m := start(t, fmt.Sprintf("upstream docker.io {\n endpoint %s\n origin %s\n allow_private\n}", near.URL, origin.URL), "")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	if resp, err := m.send("GET", "/v2/library/x/blobs/"+layer.Digest.String()); err == nil {
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && resp.StatusCode == 200 && !bytes.Equal(body, layer.Data) {
			t.Error("wrong bytes arrived complete")
		}
	}
	m.pull("library/x", "latest", image)
}

func TestOddUpstreams(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 50_000))
	for name, opts := range map[string]regtest.Options{
		"no digest header": {NoDigestHeader: true},
		"no ranges":        {IgnoreRange: true},
		"no redirect":      {NoRedirect: true},
		"no token":         {NoToken: true},
		"short tokens":     {TokenLife: 1},
	} {
		t.Run(name, func(t *testing.T) {
			up := regtest.New(t, opts)
			up.Push("library/x", image, "latest")
			m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
			if opts.TokenLife == 1 {
				// A token that has ended when it arrives cannot work; it must
				// not go round in circles either.
				m.want(404, "GET", "/v2/library/x/manifests/latest")
				if n := len(up.Requests(func(regtest.Request) bool { return true })); n > 20 {
					t.Errorf("%d requests", n)
				}
				return
			}
			m.want(200, "HEAD", "/v2/library/x/manifests/latest")
			m.pull("library/x", "latest", image)
			m.pull("library/x", "latest", image)
		})
	}
}

// TestBreaker: a dead upstream is left alone, and found again at once by
// whoever has nothing else.
func TestBreaker(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	m.pull("library/x", "latest", image)
	up.Fail(regtest.Fault{Path: "/v2/", Status: 503})
	for range 10 {
		m.want(200, "GET", "/v2/library/x/manifests/latest")
	}
	up.Forget()
	for range 10 {
		if a := m.want(200, "GET", "/v2/library/x/manifests/latest"); !strings.Contains(a.Header.Get("Warning"), "left alone") {
			t.Errorf("warning: %q", a.Header.Get("Warning"))
		}
	}
	if n := len(up.Requests(func(regtest.Request) bool { return true })); n != 0 {
		t.Errorf("%d requests to a dead upstream for what is held", n)
	}
	up.Heal()
	up.Push("library/new", image, "latest")
	m.pull("library/new", "latest", image)
}

// TestCertificates: an upstream's certificate is checked, against the system's
// authorities and those that are configured.
func TestCertificates(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { passOn(w, r, up.URL) }))
	defer secure.Close()
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	block := func(options string) string {
		return fmt.Sprintf("upstream docker.io {\n origin %s\n %s\n}", secure.URL, options)
	}
	m := start(t, block(""), "")
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/manifests/latest", "certificate")
	if err := m.load(block("ca "+ca), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	if err := m.load(block("tls_insecure_skip_verify"), ""); err != nil {
		t.Fatal(err)
	}
	up.Push("library/y", image, "latest")
	m.pull("library/y", "latest", image)
	if n := len(m.logs.with("certificates of this upstream are not verified, so anyone on the way can change what tags mean")); n != 1 {
		t.Errorf("%d warnings about it", n)
	}
	broken := filepath.Join(t.TempDir(), "broken.pem")
	if err := os.WriteFile(broken, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.load(block("ca "+broken), ""); err == nil || !strings.Contains(err.Error(), "no certificate in PEM") {
		t.Errorf("a CA file with nothing in it: %v", err)
	}
}

// TestTimeouts: an upstream that stands still is given up as configured, and
// asked for the rest.
func TestTimeouts(t *testing.T) {
	for _, size := range []int{1 << 20, 3 << 20} {
		up := regtest.New(t, regtest.Options{})
		layer := regtest.Random("x", size)
		image := regtest.NewImage("x", layer)
		up.Push("library/x", image, "latest")
		m := start(t, upstreamFor("docker.io", up, "timeouts 1s 200ms 200ms"), "")
		m.want(200, "GET", "/v2/library/x/manifests/latest")
		hold := make(chan struct{})
		defer close(hold)
		up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Count: 1})
		m.pull("library/x", "latest", image)
		eventually(t, "the stalled request to end", func() bool { return up.Sent(layer.Digest) >= int64(size) })
		if sent := up.Sent(layer.Digest); sent > int64(size)+100_000 {
			t.Errorf("%d bytes of %d were fetched after a stall", sent, size)
		}
		up.FailSlowly("", "/manifests/", hold)
		m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/manifests/other", "timeout")
		m.stop()
	}
}

// TestConnections: four times as many blobs come from one address at once.
func TestConnections(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	const layers = 8
	for name, c := range map[string]struct {
		option string
		most   int
	}{
		"default": {"", layers},
		"one":     {"connections 1", 4},
	} {
		t.Run(name, func(t *testing.T) {
			m := start(t, upstreamFor("docker.io", up, c.option), "")
			var contents []regtest.Content
			for i := range layers {
				contents = append(contents, regtest.Random(fmt.Sprint(t.Name(), i), 20_000))
			}
			up.Push("library/x", regtest.NewImage(name, contents...), "latest")
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			up.Forget()
			hold := make(chan struct{})
			up.Fail(regtest.Fault{Path: "/blobs/", Method: "GET", Hold: hold})
			var all sync.WaitGroup
			for _, layer := range contents {
				all.Go(func() {
					if a := m.do("GET", "/v2/library/x/blobs/"+layer.Digest.String()); !bytes.Equal(a.body, layer.Data) {
						t.Errorf("status %d, %v: %d bytes, or the wrong ones", a.StatusCode, a.err, len(a.body))
					}
				})
			}
			eventually(t, "all places to be taken", func() bool { return up.MostBlobs() == c.most })
			up.Heal()
			close(hold)
			all.Wait()
			if n := up.MostBlobs(); n != c.most {
				t.Errorf("%d blobs at once, want %d", n, c.most)
			}
		})
	}
}

// TestMinSpeed: a fetch leaves an address that is too slow for the next, and
// brings along what it has.
func TestMinSpeed(t *testing.T) {
	near, origin := regtest.New(t, regtest.Options{NoToken: true, Rate: 1_000_000}), regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x", regtest.Random("x", 500_000))
	layer := image.Blobs[1]
	for _, r := range []*regtest.Registry{near, origin} {
		r.Push("library/x", image, "latest")
	}
	block := func(option string) string {
		return fmt.Sprintf("upstream docker.io {\n endpoint %s\n origin %s\n allow_private\n %s\n}", near.URL, origin.URL, option)
	}
	for _, c := range []struct {
		option string
		leaves bool
	}{
		{"min_speed off", false},
		{"", false}, // 64KiB 30s
		{"min_speed 100MiB 100ms", true},
	} {
		t.Run(c.option, func(t *testing.T) {
			near.Forget()
			origin.Forget()
			m := start(t, block(c.option), "")
			m.pull("library/x", "latest", image)
			sent, rest := near.Sent(layer.Digest), origin.Sent(layer.Digest)
			if c.leaves && (rest == 0 || rest == int64(len(layer.Data))) || !c.leaves && (rest != 0 || sent != int64(len(layer.Data))) {
				t.Errorf("%d bytes came from the slow one, %d from the other", sent, rest)
			}
		})
	}
	// The last may be as slow as it is.
	m := start(t, fmt.Sprintf("upstream docker.io {\n origin %s\n allow_private\n min_speed 100MiB 100ms\n}", near.URL), "")
	m.pull("library/x", "latest", image)
}

// TestBadLimits: what a Caddyfile would not let pass does not load from JSON
// either.
func TestBadLimits(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	m := start(t, upstreamFor("docker.io", up), "")
	adapted, err := m.adapt(upstreamFor("docker.io", up, "connections 3"), "")
	if err != nil {
		t.Fatal(err)
	}
	for bad, says := range map[string]string{
		`"connections":65`:                        "connections: 65 is not from 1 to 64",
		`"connections":-1`:                        "connections: -1 is not from 1 to 64",
		`"min_speed":{"rate":"fast"}`:             `min_speed: "fast" is neither`,
		`"min_speed":{"over":"30s"}`:              `min_speed: "" is neither`,
		`"min_speed":{"rate":"1MB","over":"-1s"}`: "min_speed: the time cannot be negative",
		`"min_speed":{"rate":"off","over":"1s"}`:  "min_speed: off has no time",
		`"min_speed":{"rate":"99EB"}`:             `min_speed: "99EB" is neither`,
	} {
		err := m.loadJSON(bytes.Replace(adapted, []byte(`"connections":3`), []byte(bad), 1))
		if err == nil || !strings.Contains(err.Error(), "upstreams[0]") || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
