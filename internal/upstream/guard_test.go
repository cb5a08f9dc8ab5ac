package upstream

import (
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/caddy-registry/mirror/internal/oci"
)

func mustURL(t testing.TB, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func noProxy(*http.Request) (*url.URL, error) { return nil, nil }

// fakeDNS answers every lookup of this process from a table. A name that is
// not in it does not exist. No packet leaves.
func fakeDNS(t *testing.T, table map[string]string) {
	old := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = old })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go answerDNS(theirs, table)
		return ours, nil
	}}
}

func answerDNS(conn net.Conn, table map[string]string) {
	defer conn.Close()
	for {
		var length uint16 // as over TCP
		if binary.Read(conn, binary.BigEndian, &length) != nil {
			return
		}
		packet := make([]byte, length)
		var m dnsmessage.Message
		if _, err := io.ReadFull(conn, packet); err != nil || m.Unpack(packet) != nil || len(m.Questions) == 0 {
			return
		}
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		q := m.Questions[0]
		ip, err := netip.ParseAddr(table[strings.TrimSuffix(q.Name.String(), ".")])
		header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
		switch {
		case err != nil:
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA && ip.Is4():
			m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: ip.As4()}}}
		case q.Type == dnsmessage.TypeAAAA && ip.Is6():
			m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}}}
		}
		reply, err := m.Pack()
		if err != nil {
			return
		}
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}

var (
	publicAddrs = []string{
		"1.1.1.1", "8.8.8.8", "104.18.121.25", "172.15.255.255", "172.32.0.0", "192.167.255.255", "100.63.255.255", "100.128.0.0",
		"169.253.255.255", "169.255.0.0", "198.17.255.255", "198.20.0.0", "126.255.255.255", "223.255.255.255", "11.0.0.0",
		"2606:4700:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8",
	}
	privateAddrs = []string{
		"0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "127.0.0.1", "127.255.255.254", "172.16.0.1", "172.31.255.255", "192.168.0.1",
		"169.254.169.254", "169.254.170.2", // metadata
		"100.64.0.1", "100.100.100.200", "100.127.255.255", // carrier-grade NAT, Alibaba's metadata
		"192.0.0.192", // Oracle's
		"198.18.0.1", "198.19.255.255", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
		"::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
		"::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:100.64.0.1", "::ffff:0.0.0.0", // mapped
		"::127.0.0.1", "::10.0.0.1", // compatible
		"64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::a00:1", // NAT64
		"2001:0:7f00:1::", "2002:7f00:1::", "2002:a9fe:a9fe::1", // Teredo, 6to4
	}
)

func TestGuardAddresses(t *testing.T) {
	g := &guard{base: mustURL(t, "https://registry.example/v2")}
	open := &guard{base: g.base, allowPrivate: true}
	for _, s := range publicAddrs {
		if err := g.checkAddr(netip.MustParseAddr(s)); err != nil {
			t.Errorf("%s: %v", s, err)
		}
		if err := g.control("tcp", netip.AddrPortFrom(netip.MustParseAddr(s), 443).String(), nil); err != nil {
			t.Errorf("dialling %s: %v", s, err)
		}
	}
	for _, s := range privateAddrs {
		ip := netip.MustParseAddr(s)
		if err := g.checkAddr(ip); !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %v, want it refused", s, err)
		}
		if err := g.control("tcp", netip.AddrPortFrom(ip, 443).String(), nil); !errors.Is(err, ErrGuard) {
			t.Errorf("dialling %s: %v, want it refused", s, err)
		}
		if err := open.checkAddr(ip); err != nil {
			t.Errorf("allow_private, %s: %v", s, err)
		}
	}
	for _, s := range []string{"", "localhost:443", "10.0.0.1", "/run/docker.sock"} {
		if err := open.control("tcp", s, nil); !errors.Is(err, ErrGuard) {
			t.Errorf("dialling %q: %v, want it refused", s, err)
		}
	}
}

func TestGuardTrustNetworks(t *testing.T) {
	g := &guard{base: mustURL(t, "https://registry.example/v2"), trustNetworks: []netip.Prefix{
		netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd12::/32"),
	}}
	for s, want := range map[string]bool{
		"10.1.2.3": true, "::ffff:10.1.2.3": true, "fd12::1": true, "8.8.8.8": true,
		"10.2.0.1": false, "192.168.0.1": false, "fd13::1": false, "127.0.0.1": false, "169.254.169.254": false, "64:ff9b::a01:203": false,
	} {
		if err := g.checkAddr(netip.MustParseAddr(s)); (err == nil) != want {
			t.Errorf("%s: %v, want allowed: %v", s, err, want)
		}
	}
}

func TestGuardCheck(t *testing.T) {
	fakeDNS(t, map[string]string{
		"cdn.example":      "104.18.121.25",
		"inside.example":   "10.1.2.3",
		"loop.example":     "127.0.0.1",
		"mapped.example":   "::ffff:10.1.2.3",
		"nat64.example":    "64:ff9b::a9fe:a9fe",
		"metadata.example": "169.254.169.254",
		"trusted.example":  "10.9.0.1",
	})
	public := &guard{base: mustURL(t, "https://registry.example/v2"), trustNetworks: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}}
	private := &guard{base: mustURL(t, "https://registry.corp:5000/v2"), allowPrivate: true}
	plain := &guard{base: mustURL(t, "http://registry.corp:5000/v2")}
	plainPrivate := &guard{base: mustURL(t, "http://registry.corp:5000/v2"), allowPrivate: true}
	loopback := &guard{base: mustURL(t, "http://127.0.0.1:5000/v2")}
	for _, c := range []struct {
		why     string
		guard   *guard
		target  string
		proxied bool
		allowed bool
	}{
		{"https", public, "https://cdn.example/x?sig=1", false, true},
		{"https with a port", public, "https://cdn.example:8443/x", false, true},
		{"http", public, "http://cdn.example/x", false, false},
		{"http on port 443", public, "http://cdn.example:443/x", false, false},
		{"another scheme", public, "ftp://cdn.example/x", false, false},
		{"a file", public, "file:///etc/passwd", false, false},
		{"no scheme", public, "//cdn.example/x", false, false},
		{"user information", public, "https://user:pw@cdn.example/x", false, false},
		{"no host", public, "https:///x", false, false},
		{"only a port", public, "https://:443/x", false, false},

		{"the endpoint itself", public, "https://registry.example/token", false, true},
		{"itself with its port", public, "https://registry.example:443/token", false, true},
		{"itself in upper case", public, "https://REGISTRY.example/token", false, true},
		{"itself without tls", public, "http://registry.example/token", false, false},
		{"itself on a plain port", loopback, "http://127.0.0.1:5000/x", false, true},
		{"another port there", loopback, "http://127.0.0.1:5001/x", false, false},
		{"the same port with tls", loopback, "https://127.0.0.1:5000/x", false, false},
		{"another loopback address", loopback, "http://127.0.0.2:5000/x", false, false},

		{"http needs both: plain endpoint", plain, "http://cdn.example/x", false, false},
		{"http needs both: allow_private", private, "http://cdn.example/x", false, false},
		{"http has both", plainPrivate, "http://cdn.example/x", false, true},
		{"http has both, private", plainPrivate, "http://10.1.2.3/x", false, true},
		{"from plain to tls", plain, "https://cdn.example/x", false, true},

		{"a public address", public, "https://104.18.121.25/x", false, true},
		{"a private address", public, "https://10.1.2.3/x", false, false},
		{"a private address, allow_private", private, "https://10.1.2.3/x", false, true},
		{"a trusted address", public, "https://10.9.2.3/x", false, true},
		{"metadata", public, "https://169.254.169.254/latest", false, false},
		{"loopback v6", public, "https://[::1]:8443/x", false, false},
		{"mapped", public, "https://[::ffff:10.1.2.3]/x", false, false},
		{"with a zone", public, "https://[fe80::1%25eth0]/x", false, false},

		// A proxy dials for us.
		{"proxied", public, "https://cdn.example/x", true, true},
		{"proxied http", public, "http://cdn.example/x", true, false},
		{"proxied address", public, "https://10.1.2.3/x", true, false},
		{"proxied trusted address", public, "https://10.9.2.3/x", true, true},
		{"proxied name that is inside", public, "https://inside.example/x", true, false},
		{"proxied name of loopback", public, "https://loop.example/x", true, false},
		{"proxied name of metadata", public, "https://metadata.example/x", true, false},
		{"proxied name of a mapped address", public, "https://mapped.example/x", true, false},
		{"proxied name behind NAT64", public, "https://nat64.example/x", true, false},
		{"proxied name in a trusted network", public, "https://trusted.example/x", true, true},
		{"proxied name that only the proxy knows", public, "https://unknown.example/x", true, true},
		{"proxied name that is inside, allow_private", private, "https://inside.example/x", true, true},
		{"proxied localhost", public, "https://localhost/x", true, false},
		{"proxied localhost, allow_private", private, "https://localhost/x", true, true},
		{"proxied single label", public, "https://vault/x", true, false},
		{"proxied single label with a dot", public, "https://vault./x", true, false},
		{"proxied .internal", public, "https://metadata.google.internal/x", true, false},
		{"proxied .local in upper case", public, "https://nas.LOCAL/x", true, false},
		{"proxied .corp", public, "https://db.corp./x", true, false},
		{"proxied .lan", public, "https://a.lan/x", true, false},
		{"proxied .home.arpa", public, "https://a.home.arpa/x", true, false},
		{"proxied, only ends alike", public, "https://cdn.example.mylocal/x", true, true},
		// What inet_aton takes for an address, as many proxies do.
		{"proxied number", public, "https://2130706433/x", true, false},
		{"proxied short address", public, "https://127.1/x", true, false},
		{"proxied octal address", public, "https://0177.0.0.1/x", true, false},
		{"proxied hexadecimal address", public, "https://0x7f.0.0.1/x", true, false},
		{"proxied address with a dot", public, "https://169.254.169.254./x", true, false},
		{"proxied endpoint itself", public, "https://registry.example/x", true, true},
	} {
		err := c.guard.check(t.Context(), mustURL(t, c.target), c.proxied)
		if (err == nil) != c.allowed {
			t.Errorf("%s: %s: %v, want allowed: %v", c.why, c.target, err, c.allowed)
		}
		if err != nil && !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %s: %v does not wrap ErrGuard", c.why, c.target, err)
		}
	}
}

func TestGuardRealm(t *testing.T) {
	for _, c := range []struct {
		base, realm string
		allowed     bool // with credentials
	}{
		{"https://ghcr.io/v2", "https://ghcr.io/token", true},
		{"https://GHCR.io/v2", "https://ghcr.IO/token", true},
		{"https://registry.corp:5000/v2", "https://registry.corp:5001/token", true},
		{"https://registry-1.docker.io/v2", "https://auth.docker.io/token", true},
		{"https://docker.elastic.co/v2", "https://docker-auth.elastic.co/auth", true},
		{"https://registry.gitlab.com/v2", "https://gitlab.com/jwt/auth", true},
		{"https://lscr.io/v2", "https://ghcr.io/token", true},
		{"https://dhi.io/v2", "https://auth.docker.io/token", true},
		{"https://registry.foo.co.uk/v2", "https://auth.foo.co.uk/token", true},
		{"https://127.0.0.1:5000/v2", "https://127.0.0.1:5001/token", true},
		{"http://localhost:5000/v2", "http://localhost:5001/token", true},

		{"https://registry-1.docker.io/v2", "https://evil.example/token", false},
		{"https://registry-1.docker.io/v2", "https://auth.docker.io.evil.example/token", false},
		{"https://registry-1.docker.io/v2", "https://evildocker.io/token", false},
		{"https://ghcr.io/v2", "https://lscr.io/token", false}, // one way only
		{"https://lscr.io/v2", "https://auth.docker.io/token", false},
		{"https://quay.io/v2", "https://ghcr.io/token", false},
		{"https://foo.co.uk/v2", "https://bar.co.uk/token", false},
		{"https://foo.github.io/v2", "https://bar.github.io/token", false},
		{"https://foo.s3.amazonaws.com/v2", "https://bar.s3.amazonaws.com/token", false},
		{"https://10.0.0.1/v2", "https://10.0.0.2/token", false},
		{"https://1.2.3.4/v2", "https://9.9.3.4/token", false},
		{"https://registry/v2", "https://auth/token", false},
		{"https://[2001:db8::1]/v2", "https://[2001:db8::2]/token", false},
		{"https://a.corp/v2", "https://corp/token", false},
	} {
		g := &guard{base: mustURL(t, c.base)}
		err := g.checkRealm(mustURL(t, c.realm), true)
		if (err == nil) != c.allowed {
			t.Errorf("%s names the realm %s: %v, want allowed: %v", c.base, c.realm, err, c.allowed)
		}
		if err != nil && !errors.Is(err, ErrGuard) {
			t.Errorf("%v does not wrap ErrGuard", err)
		}
		if err := g.checkRealm(mustURL(t, c.realm), false); err != nil {
			t.Errorf("%s names the realm %s, without credentials: %v", c.base, c.realm, err)
		}
	}
}

// A trap is a server of the machine's own network. It counts connections.
type trap struct {
	*httptest.Server
	conns, hits atomic.Int32
}

func newTrap(t *testing.T, tls bool) *trap {
	tr := &trap{}
	tr.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tr.hits.Add(1)
		w.Write([]byte("secret"))
	}))
	tr.Config.ErrorLog = log.New(io.Discard, "", 0)
	tr.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			tr.conns.Add(1)
		}
	}
	if tls {
		tr.StartTLS()
	} else {
		tr.Start()
	}
	t.Cleanup(tr.Close)
	return tr
}

func (tr *trap) port() string { return mustPort(tr.Listener.Addr().String()) }

func mustPort(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func (tr *trap) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tr.Certificate().Raw})
}

func testEndpoint(t *testing.T, cfg Endpoint) *endpoint {
	t.Helper()
	if cfg.Proxy == nil {
		cfg.Proxy = noProxy
	}
	cfg.Timeouts = Timeouts{Connect: 10 * time.Second, Header: 10 * time.Second, Stall: 10 * time.Second}
	e, err := newEndpoint(cfg, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.transports.retire)
	return e
}

func TestRoundTripRefusesDerivedPrivate(t *testing.T) {
	safe, plain := newTrap(t, true), newTrap(t, false)
	fakeDNS(t, map[string]string{"example.com": "127.0.0.1", "loop6.example": "::1"})
	for _, c := range []struct {
		why, base, target string
		trusted           string
		allowPrivate      bool
		reached           bool
	}{
		{"an address", "https://registry.example", safe.URL, "", false, false},
		{"a plain address", "https://registry.example", plain.URL, "", false, false},
		{"a plain address, plain endpoint", "http://registry.example", plain.URL, "", false, false},
		{"a name, looked at when dialled", "https://registry.example", "https://example.com:" + safe.port(), "", false, false},
		{"a name of ::1", "https://registry.example", "https://loop6.example:" + safe.port(), "", false, false},
		{"another port of the endpoint's host", "https://127.0.0.1:1", safe.URL, "", false, false},

		{"trusted network", "https://registry.example", safe.URL, "127.0.0.0/8", false, true},
		{"allow_private", "https://registry.example", safe.URL, "", true, true},
		{"allow_private, by name", "https://registry.example", "https://example.com:" + safe.port(), "", true, true},
		{"allow_private, plain", "http://registry.example", plain.URL, "", true, true},
		{"the endpoint itself", safe.URL, safe.URL + "/v2/", "", false, true},
		{"the plain endpoint itself", plain.URL, plain.URL + "/v2/", "", false, true},
	} {
		cfg := Endpoint{URL: mustURL(t, c.base), CA: [][]byte{safe.pem()}, AllowPrivate: c.allowPrivate}
		if c.trusted != "" {
			cfg.TrustNetworks = []netip.Prefix{netip.MustParsePrefix(c.trusted)}
		}
		e := testEndpoint(t, cfg)
		before := safe.conns.Load() + plain.conns.Load()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.target, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := e.transports.roundTrip(req)
		reached := safe.conns.Load()+plain.conns.Load() != before
		if c.reached {
			if err != nil || resp.StatusCode != http.StatusOK || !reached {
				t.Errorf("%s: %s: %v, reached: %v", c.why, c.target, err, reached)
			}
			if err == nil {
				resp.Body.Close()
			}
			continue
		}
		if err == nil {
			resp.Body.Close()
		}
		if !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %s: %v, want it refused", c.why, c.target, err)
		}
		if reached {
			t.Errorf("%s: %s was dialled", c.why, c.target)
		}
	}
}

// Through a proxy, the proxy is dialled, wherever it is, and the target judged.
func TestRoundTripProxied(t *testing.T) {
	fakeDNS(t, map[string]string{"cdn.example": "104.18.121.25", "inside.example": "10.1.2.3"})
	var asked atomic.Int32
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.Error(w, "not today", http.StatusTeapot)
	}))
	defer proxy.Close()
	e := testEndpoint(t, Endpoint{URL: mustURL(t, "https://registry.example"), Proxy: http.ProxyURL(mustURL(t, proxy.URL))})
	for target, want := range map[string]int32{
		"https://cdn.example/x":      1,
		"https://registry.example/x": 1,
		"https://inside.example/x":   0,
		"https://10.1.2.3/x":         0,
		"https://vault/x":            0,
		"http://cdn.example/x":       0,
	} {
		asked.Store(0)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, target, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := e.transports.roundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		if got := asked.Load(); got != want {
			t.Errorf("%s: the proxy was asked %d times, want %d (%v)", target, got, want, err)
		}
		if want == 0 && !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %v, want it refused", target, err)
		}
	}
}

// A registry that redirects inside, and one that names a realm there.
func TestDerivedTargetsAreRefused(t *testing.T) {
	inside := newTrap(t, false)
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/v2/redirects/"):
			http.Redirect(w, r, inside.URL+"/latest/meta-data", http.StatusTemporaryRedirect)
		case strings.HasPrefix(r.URL.Path, "/v2/schemes/"):
			w.Header().Set("Location", "file:///etc/passwd")
			w.WriteHeader(http.StatusTemporaryRedirect)
		default:
			w.Header().Set("Www-Authenticate", `Bearer realm="`+inside.URL+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer registry.Close()
	for _, repository := range []string{"redirects/x", "schemes/x", "realm/x"} {
		var pool Pool
		u, err := pool.Open("test", []Endpoint{{
			URL: mustURL(t, registry.URL), Origin: true, Pull: true, Resolve: true, Proxy: noProxy, ProxyID: "none",
			Timeouts: Timeouts{Connect: 10 * time.Second, Header: 10 * time.Second, Stall: 10 * time.Second},
		}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = u.Manifest(t.Context(), repository, oci.Reference{Digest: digest.FromString("x")}, true)
		var refusal *Error
		if !errors.As(err, &refusal) || refusal.Kind != Refused || !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %v, want it refused", repository, err)
		}
		if _, worthwhile := refusal.Retry(); worthwhile {
			t.Errorf("%s: will be tried again", repository)
		}
		u.Close()
	}
	if n := inside.conns.Load(); n != 0 {
		t.Errorf("the machine's own network was reached %d times", n)
	}
}

// Credentials go to no other host and port, whoever sends us there.
func TestRedirectDropsCredentials(t *testing.T) {
	var leaked atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
			leaked.Add(1)
		}
		w.Write([]byte(`{"schemaVersion":2,"manifests":[]}`))
	}))
	defer other.Close()
	var authorized atomic.Int32
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, secret, ok := r.BasicAuth(); !ok || secret != "secret" {
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		authorized.Add(1)
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusFound)
	}))
	defer registry.Close()
	var pool Pool
	u, err := pool.Open("test", []Endpoint{{
		URL: mustURL(t, registry.URL), Origin: true, Pull: true, Resolve: true, Proxy: noProxy, ProxyID: "none", AllowPrivate: true,
		Credentials: Credentials{User: "user", Secret: "secret"},
		Timeouts:    Timeouts{Connect: 10 * time.Second, Header: 10 * time.Second, Stall: 10 * time.Second},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, err := u.Manifest(t.Context(), "a/b", oci.Reference{Tag: "latest"}, true); err != nil {
		t.Error(err)
	}
	if authorized.Load() == 0 || leaked.Load() != 0 {
		t.Errorf("authorized %d times, leaked %d times", authorized.Load(), leaked.Load())
	}
}

// The endpoint's certificate is checked for derived targets, too.
func TestGuardedChecksCertificates(t *testing.T) {
	safe := newTrap(t, true)
	e := testEndpoint(t, Endpoint{URL: mustURL(t, "https://registry.example"), AllowPrivate: true})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, safe.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := e.transports.roundTrip(req)
	if err == nil {
		resp.Body.Close()
	}
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) || safe.hits.Load() != 0 {
		t.Errorf("%v, %d requests", err, safe.hits.Load())
	}
}
