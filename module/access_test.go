package module_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// behind loads a configuration with options of Caddy beside its own, and with
// directives before the mirror in its site.
func (m *mirror) behind(options, directives, app, site string) error {
	m.t.Helper()
	adapted, err := adapt(fmt.Sprintf(`{
		admin off
		auto_https off
		persist_config off
		grace_period 10s
		%s
		log {
			output regtest
			level debug
		}
		registry {
			storage disk %s {
				min_free 1MB
			}
			%s
		}
	}
	%s {
		%s
		registry_mirror {
			%s
		}
	}`, options, m.dir, app, m.URL, directives, site))
	if err != nil {
		return err
	}
	return m.loadJSON(adapted)
}

// hosting is a mirror that is not running, in whose store an image lies in
// repositories of its own, as registry:2 would have left it.
func hosting(t testing.TB, image regtest.Image, names ...string) *mirror {
	t.Helper()
	up := regtest.New(t, regtest.Options{})
	m := start(t, upstreamFor("docker.io", up, `repository_prefix ""`), "")
	for _, name := range names {
		up.Push(name, image, "v1")
		m.pull(name, "v1", image)
	}
	m.stop()
	forgetRecords(t, m.dir)
	return m
}

// passwords has bob and eve log in with "secret".
const passwords = `basic_auth {
	bob $2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW
	eve $2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW
}`

func site(rules ...string) string {
	return "default off\nhosted apps/**\naccess {\n" + strings.Join(rules, "\n") + "\n}"
}

// reads are the paths under which something of a repository is read.
func reads(repository string, image regtest.Image) []string {
	base := "/v2/" + repository
	return []string{
		base + "/manifests/v1",
		base + "/manifests/" + image.Digest.String(),
		base + "/blobs/" + image.Blobs[0].Digest.String(),
		base + "/blobs/" + image.Blobs[1].Digest.String(),
		base + "/tags/list",
		base + "/referrers/" + image.Digest.String(),
	}
}

// as is the Authorization header of somebody; "" is nobody.
func as(user string) []string {
	if user == "" {
		return nil
	}
	return []string{"Authorization", basic(user, "secret")}
}

// TestBasicAuth: what clients look for before and after a login.
func TestBasicAuth(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web")
	if err := m.behind("", passwords, "", site("allow pull to user:bob")); err != nil {
		t.Fatal(err)
	}
	challenged := func(path string, header ...string) {
		t.Helper()
		a := m.want(401, "GET", path, header...)
		if got := a.Header.Values("Www-Authenticate"); len(got) != 1 || !strings.HasPrefix(got[0], `Basic realm="`) {
			t.Errorf("%s: challenged by %q", path, got)
		}
	}
	for _, path := range append(reads("apps/web", image), "/v2/", "/v2/_catalog") {
		challenged(path)
		challenged(path, "Authorization", basic("bob", "wrong"))
		challenged(path, "Authorization", "Basic Og==") // podman without a login
		challenged(path, "Authorization", "Bearer x")
	}
	if a := m.want(200, "GET", "/v2/", as("bob")...); string(a.body) != "{}" || a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
		t.Errorf("ping: %q, %v", a.body, a.Header)
	}
	for _, path := range reads("apps/web", image) {
		a := m.want(200, "GET", path, as("bob")...)
		if control := a.Header.Get("Cache-Control"); !strings.Contains(control, "private") {
			t.Errorf("%s: Cache-Control %q would have it kept for everyone", path, control)
		}
		m.want(200, "HEAD", path, as("bob")...)
		m.want(403, "HEAD", path, as("eve")...)
		a = m.want(403, "GET", path, as("eve")...)
		if text := string(a.body); !strings.Contains(text, oci.CodeDenied) || !strings.Contains(text, "no rule of this site allows eve to pull from it") {
			t.Errorf("%s: %s", path, text)
		}
		if a.Header.Get("Www-Authenticate") != "" {
			t.Errorf("%s: a 403 that challenges", path)
		}
	}
}

// TestForwardAuth: the identity is a header that an authenticator gives, and not
// one that a client sends.
func TestForwardAuth(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web")
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch user, secret, ok := r.BasicAuth(); {
		case !ok: // lets pass, and knows nobody
		case secret != "secret":
			w.Header().Set("Www-Authenticate", `Basic realm="sso"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			w.Header().Set("Remote-User", user)
		}
	}))
	defer auth.Close()
	if err := m.behind("", "forward_auth "+auth.URL+" {\n uri /check\n copy_headers Remote-User\n}", "", site("identity {header.Remote-User}", "allow pull to user:bob")); err != nil {
		t.Fatal(err)
	}
	for _, path := range reads("apps/web", image) {
		m.want(200, "GET", path, as("bob")...)
		m.want(403, "GET", path, as("eve")...)
		m.want(403, "GET", path)
		m.want(403, "GET", path, "Remote-User", "bob")
		m.want(403, "GET", path, append(as("eve"), "Remote-User", "bob")...)
		m.want(401, "GET", path, "Authorization", basic("bob", "wrong"))
	}
}

// TestClientCertificate: the identity is what a verified certificate says, and
// who shows none has none, whatever Caddy makes of a certificate that is not
// there.
func TestClientCertificate(t *testing.T) {
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	m := hosting(t, image, "apps/web")
	// Caddy wants the name that is asked for to be that of the handshake.
	addr := strings.TrimPrefix(m.URL, "http://")
	_, port, _ := strings.Cut(addr, ":")
	m.URL = "https://mirror.test:" + port
	ca := newCA(t)
	server := ca.issue(t, "server", "mirror.test")
	dir := t.TempDir()
	files := map[string]string{"ca.pem": ca.pem(), "server.pem": server.pem(), "server.key": server.keyPEM(t)}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bob, eve, stranger := ca.issue(t, "bob", "bob.example"), ca.issue(t, "eve", ""), newCA(t).issue(t, "bob", "bob.example")
	directives := fmt.Sprintf("bind 127.0.0.1\ntls %[1]s/server.pem %[1]s/server.key {\n client_auth {\n mode verify_if_given\n trust_pool file %[1]s/ca.pem\n }\n}", dir)
	// status is what somebody with a certificate gets; 0: no connection.
	status := func(cert *certificate) int {
		t.Helper()
		roots := x509.NewCertPool()
		roots.AddCert(ca.cert)
		config := &tls.Config{RootCAs: roots}
		if cert != nil {
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: [][]byte{cert.cert.Raw}, PrivateKey: cert.key}, nil
			}
		}
		transport := &http.Transport{TLSClientConfig: config, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}}
		defer transport.CloseIdleConnections()
		resp, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Get(m.URL + "/v2/apps/web/manifests/v1")
		if err != nil {
			return 0
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	for _, c := range []struct {
		identity, who  string
		bob, eve, none int
	}{
		{"{tls_client_subject}", "user:CN=bob", 200, 403, 403},
		{"{tls_client_subject}", "authenticated", 200, 200, 403},
		{"{http.request.tls.client.san.dns_names.0}", "user:bob.example", 200, 403, 403},
		{"{http.request.tls.client.san.dns_names.0}", "authenticated", 200, 403, 403},
		// Caddy says "<nil>", the hash of nothing and "[]" where there is none.
		{"{tls_client_serial}", "authenticated", 200, 200, 403},
		{"{tls_client_fingerprint}", "authenticated", 200, 200, 403},
		{"{http.request.tls.Client.Fingerprint}", "authenticated", 200, 200, 403},
		{"{http.request.tls.client.issuer}", "authenticated", 200, 200, 403},
		{"{http.request.tls.client.san.dns_names}", "anyone", 403, 403, 200}, // a list is no name
	} {
		t.Run(c.identity+" "+c.who, func(t *testing.T) {
			m.stop() // a reload would reset connections to its old socket
			if err := m.behind("", directives, "", site("identity "+c.identity, "allow pull to "+c.who)); err != nil {
				t.Fatal(err)
			}
			if b, e, n, s := status(bob), status(eve), status(nil), status(stranger); b != c.bob || e != c.eve || n != c.none || s != 0 {
				t.Errorf("bob %d, eve %d, nobody %d, a stranger %d; want %d, %d, %d and no connection", b, e, n, s, c.bob, c.eve, c.none)
			}
		})
	}
}

// A certificate has its key.
type certificate struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T) *certificate { return newCertificate(t, nil, "CA", "") }

func (c *certificate) issue(t *testing.T, name, dns string) *certificate {
	return newCertificate(t, c, name, dns)
}

func newCertificate(t *testing.T, by *certificate, name, dns string) *certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if dns != "" {
		template.DNSNames = []string{dns}
	}
	parent, signer := template, key
	if by == nil {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.ExtKeyUsage = nil
	} else {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &certificate{cert, key}
}

func (c *certificate) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
}

func (c *certificate) keyPEM(t *testing.T) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(c.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}

// TestIdentityUnset: a placeholder that nobody sets is nobody, and an empty Basic
// is too.
func TestIdentityUnset(t *testing.T) {
	image := regtest.NewImage("x")
	m := hosting(t, image, "apps/web")
	for _, identity := range []string{"", "identity {http.auth.user.id}", "identity {http.request.nothing.such}", "identity {http.vars.none}", "identity {header.Remote-User}", "identity {tls_client_serial}"} {
		if err := m.behind("", "", "", site(identity, "deny pull to authenticated", "allow pull")); err != nil {
			t.Fatal(err)
		}
		m.want(200, "GET", "/v2/apps/web/manifests/v1")
		m.want(200, "GET", "/v2/apps/web/manifests/v1", "Authorization", "Basic Og==")
		m.want(200, "GET", "/v2/apps/web/manifests/v1", "Authorization", basic("bob", "secret")) // whom nothing has asked
	}
}

// TestListingsShowWhatMayBePulled, by anyone who asks.
func TestListingsShowWhatMayBePulled(t *testing.T) {
	image := regtest.NewImage("x")
	m := hosting(t, image, "apps/open", "apps/bob/a", "apps/bob/b", "apps/eve")
	if err := m.behind("", passwords, "", site("allow pull to user:bob on apps/bob/**", "allow pull to user:eve on apps/eve", "allow pull on apps/open")); err != nil {
		t.Fatal(err)
	}
	for user, want := range map[string][]string{
		"bob": {"apps/bob/a", "apps/bob/b", "apps/open"},
		"eve": {"apps/eve", "apps/open"},
	} {
		var reply struct{ Repositories []string }
		if a := m.want(200, "GET", "/v2/_catalog", as(user)...); json.Unmarshal(a.body, &reply) != nil || !slices.Equal(reply.Repositories, want) {
			t.Errorf("%s sees %s, want %q", user, a.body, want)
		}
		// Page by page, none of them empty for what is hidden.
		var paged []string
		for last := ""; len(paged) < len(want); last = paged[len(paged)-1] {
			a := m.want(200, "GET", "/v2/_catalog?n=1&last="+last, as(user)...)
			if json.Unmarshal(a.body, &reply) != nil || len(reply.Repositories) != 1 {
				t.Fatalf("%s sees a page of %s after %q", user, a.body, last)
			}
			paged = append(paged, reply.Repositories...)
		}
		if !slices.Equal(paged, want) {
			t.Errorf("%s sees %q page by page, want %q", user, paged, want)
		}
	}
}

// TestPrivateOpened: what only the mirror's credentials can read is for those whom
// a rule names it to, and nobody asks upstream whether everyone may read it.
func TestPrivateOpened(t *testing.T) {
	up := regtest.New(t, regtest.Options{User: "robot", Secret: "s"})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "v1")
	up.Push("private/y", image, "v1")
	up.Push("private/z", image, "v1")
	m := start(t, "", "")
	rules := "access {\nallow pull to user:bob on docker.io/private/y\nallow pull to authenticated\nallow pull to net:127.0.0.1 on **\n}"
	app := upstreamFor("docker.io", up, "credentials robot s")
	if err := m.behind("", passwords, app, rules); err != nil {
		t.Fatal(err)
	}
	catalog := func(user string, want ...string) {
		t.Helper()
		var reply struct{ Repositories []string }
		if a := m.want(200, "GET", "/v2/_catalog", as(user)...); json.Unmarshal(a.body, &reply) != nil || !slices.Equal(reply.Repositories, want) {
			t.Errorf("%s sees %s, want %q", user, a.body, want)
		}
	}
	for range 2 { // the second time from memory
		for _, path := range reads("private/y", image) {
			m.want(403, "GET", path, as("eve")...)
			m.want(200, "GET", path, as("bob")...)
			m.want(200, "HEAD", path, as("bob")...)
			m.want(403, "HEAD", path, as("eve")...)
		}
		for _, path := range reads("private/z", image) {
			m.want(403, "GET", path, as("bob")...)
		}
		for _, path := range reads("library/x", image) {
			m.want(200, "GET", path, as("eve")...)
		}
	}
	catalog("bob", "docker.io/library/x", "docker.io/private/y")
	catalog("eve", "docker.io/library/x")
	up.Forget()
	m.want(200, "GET", "/v2/private/y/tags/list", as("bob")...)
	if anonymous := up.Requests(func(r regtest.Request) bool { return r.Server == "token" && r.Authorization == "" }); len(anonymous) > 0 {
		t.Errorf("%d anonymous probes", len(anonymous))
	}
	// Nobody has ever asked for it, and it is as closed when nobody can be asked.
	up.Down()
	m.want(403, "GET", "/v2/private/never/manifests/v1", as("bob")...)
	m.want(200, "GET", "/v2/private/y/manifests/"+image.Digest.String(), as("bob")...)
	m.want(403, "GET", "/v2/private/y/manifests/"+image.Digest.String(), as("eve")...)
}

// TestNetworks: an address is that of the connection, and what a header says only
// behind a proxy that Caddy trusts.
func TestNetworks(t *testing.T) {
	image := regtest.NewImage("x")
	m := hosting(t, image, "apps/web")
	const path = "/v2/apps/web/manifests/v1"
	const proxy = "servers {\n trusted_proxies static 127.0.0.1/32\n trusted_proxies_strict\n}"
	for _, c := range []struct {
		options, rule, forwarded string
		want                     int
	}{
		{"", "allow pull to net:127.0.0.1", "", 200},
		{"", "allow pull to net:127.0.0.1", "192.0.2.1", 200},
		{"", "allow pull to net:192.0.2.0/24", "192.0.2.1", 403},
		{"", "allow pull to net:private_ranges", "", 200},
		{"", "allow pull to net:10.0.0.0/8", "", 403},
		{proxy, "allow pull to net:192.0.2.0/24", "192.0.2.1", 200},
		{proxy, "allow pull to net:192.0.2.0/24", "192.0.2.1, 198.51.100.1", 403}, // written by the client
		{proxy, "allow pull to net:127.0.0.1", "192.0.2.1", 403},
		{proxy, "allow pull to net:127.0.0.1", "", 200},
		{proxy, "deny pull to net:192.0.2.0/24\nallow pull", "192.0.2.1", 403},
	} {
		if err := m.behind(c.options, "", "", site(c.rule)); err != nil {
			t.Fatal(err)
		}
		var header []string
		if c.forwarded != "" {
			header = []string{"X-Forwarded-For", c.forwarded}
		}
		if a := m.do("GET", path, header...); a.StatusCode != c.want {
			t.Errorf("%q, %q for %q: status %d, want %d", c.options, c.rule, c.forwarded, a.StatusCode, c.want)
		}
	}
}

// TestPrivateRanges are Caddy's.
func TestPrivateRanges(t *testing.T) {
	who, err := access.ParseWho("net:private_ranges")
	if err != nil {
		t.Fatal(err)
	}
	rules := access.Rules{{Allow: true, Actions: access.Pull, To: []access.Who{who}}}
	var ranges []netip.Prefix
	addrs := []netip.Addr{netip.MustParseAddr("169.254.0.1"), netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("192.0.2.1")}
	for _, text := range caddyhttp.PrivateRangesCIDR() {
		prefix, err := caddyhttp.CIDRExpressionToPrefix(text)
		if err != nil {
			t.Fatal(err)
		}
		ranges = append(ranges, prefix)
		first := prefix.Masked().Addr()
		bytes := first.AsSlice()
		for i := prefix.Bits(); i < len(bytes)*8; i++ {
			bytes[i/8] |= 0x80 >> (i % 8)
		}
		last, _ := netip.AddrFromSlice(bytes)
		addrs = append(addrs, first.Prev(), first, last, last.Next())
	}
	for _, addr := range addrs {
		want := slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(addr) })
		if got := rules.Decide(access.Caller{Addr: addr}, access.Pull, "apps/web", true).Allowed; got != want {
			t.Errorf("%s is private: %v, want %v as Caddy has it", addr, got, want)
		}
	}
}
