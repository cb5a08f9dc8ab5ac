//go:build e2e

package e2e

import (
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
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The names that Docker Hub goes by.
const (
	hubHost  = "registry-1.docker.io"
	authHost = "auth.docker.io"
	cdnHost  = "production.cloudflare.docker.com"
)

// A fakeHub is Docker Hub on loopback: an egress proxy that ends TLS itself,
// with a CA of its own, for Hub's names. It lets nothing through to anywhere
// else. It wants tokens, sends blob requests to a CDN that refuses
// credentials, and limits how many manifests one may get.
type fakeHub struct {
	addr string
	ca   string // file of its CA's certificate

	registry *httputil.ReverseProxy // what Hub has
	conns    chan net.Conn          // whose CONNECT has been answered
	closed   chan struct{}

	mu            sync.Mutex
	tokens        map[string]string // issued, with their scopes
	tokenRequests map[string]int    // by scope
	cdnRequests   int
	limit         int // manifest GETs that are left; below 0 is no limit
	limited       int // requests answered 429
	faults        []string
}

func startFakeHub(t *testing.T, registry string) *fakeHub {
	t.Helper()
	h := &fakeHub{
		registry: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry}),
		conns:    make(chan net.Conn), closed: make(chan struct{}),
		tokens: map[string]string{}, tokenRequests: map[string]int{}, limit: -1,
	}
	ca, key := newCA(t)
	h.ca = writeFile(t, filepath.Join(workDir(t), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})))

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = ln.Addr().String()
	outer := &http.Server{Handler: http.HandlerFunc(h.connect)}
	inner := &http.Server{
		Handler: http.HandlerFunc(h.serve),
		TLSConfig: &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return issue(ca, key, hello.ServerName)
		}},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go outer.Serve(ln)
	go inner.ServeTLS(h, "", "")
	t.Cleanup(func() {
		outer.Close()
		inner.Close()
	})
	return h
}

// connect is the outside: a proxy that knows three names.
func (h *fakeHub) connect(w http.ResponseWriter, r *http.Request) {
	switch r.Host {
	case hubHost + ":443", authHost + ":443", cdnHost + ":443":
	default:
		h.fault("asked for %s %s", r.Method, r.Host)
		http.Error(w, "no such host", http.StatusBadGateway)
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		h.fault("%v", err)
		return
	}
	io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	select {
	case h.conns <- conn:
	case <-h.closed:
		conn.Close()
	}
}

// Accept, Close and Addr make the hub the listener of its inside.
func (h *fakeHub) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *fakeHub) Close() error {
	close(h.closed)
	return nil
}

func (h *fakeHub) Addr() net.Addr { return &net.TCPAddr{} }

// serve is the inside.
func (h *fakeHub) serve(w http.ResponseWriter, r *http.Request) {
	switch r.Host {
	case authHost:
		h.token(w, r)
	case cdnHost:
		h.cdn(w, r)
	case hubHost:
		h.hub(w, r)
	default:
		h.fault("%s asked for as %s", r.URL, r.Host)
		http.NotFound(w, r)
	}
}

func (h *fakeHub) token(w http.ResponseWriter, r *http.Request) {
	scope := r.URL.Query().Get("scope")
	h.mu.Lock()
	h.tokenRequests[scope]++
	token := fmt.Sprintf("token-%d-%s", len(h.tokens), rand.Text())
	h.tokens[token] = scope
	h.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 300})
}

func (h *fakeHub) cdn(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.cdnRequests++
	h.mu.Unlock()
	if r.Header.Get("Authorization") != "" {
		h.fault("the CDN got an Authorization header")
		http.Error(w, "only one auth mechanism allowed", http.StatusBadRequest)
		return
	}
	if r.URL.Query().Get("signature") != "good" {
		h.fault("the CDN was asked without its signature: %s", r.URL)
		http.Error(w, "access denied", http.StatusForbidden)
		return
	}
	r.URL.RawQuery = ""
	h.registry.ServeHTTP(w, r)
}

func (h *fakeHub) hub(w http.ResponseWriter, r *http.Request) {
	repository := ""
	for _, part := range []string{"/manifests/", "/blobs/", "/tags/", "/referrers/"} {
		if name, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), part); ok {
			repository = name
		}
	}
	if !h.mayPull(r, repository) {
		challenge := `Bearer realm="https://` + authHost + `/token",service="registry.docker.io"`
		if repository != "" {
			challenge += `,scope="repository:` + repository + `:pull"`
		}
		w.Header().Set("Www-Authenticate", challenge)
		ociError(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}
	if strings.Contains(r.URL.Path, "/manifests/") && !h.within(w, r) {
		ociError(w, http.StatusTooManyRequests, "TOOMANYREQUESTS")
		return
	}
	if r.Method == http.MethodGet && blobPath.MatchString(r.URL.Path) {
		w.Header().Set("Location", "https://"+cdnHost+r.URL.Path+"?signature=good")
		w.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	h.registry.ServeHTTP(w, r)
}

// mayPull checks the request's token: one that was issued, for this.
func (h *fakeHub) mayPull(r *http.Request, repository string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	scope, issued := h.tokens[token]
	return ok && issued && (repository == "" || scope == "repository:"+repository+":pull")
}

// within counts a GET of a manifest against the limit. Past it, everyone is
// refused everything.
func (h *fakeHub) within(w http.ResponseWriter, r *http.Request) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.limit < 0 {
		return true
	}
	w.Header().Set("Ratelimit-Limit", "100;w=21600")
	w.Header().Set("Ratelimit-Remaining", fmt.Sprintf("%d;w=21600", h.limit))
	if h.limit == 0 {
		h.limited++
		return false
	}
	if r.Method == http.MethodGet {
		h.limit--
	}
	return true
}

// leave sets how many manifests may still be got.
func (h *fakeHub) leave(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.limit = n
}

// fault notes what must not happen.
func (h *fakeHub) fault(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, fmt.Sprintf(format, args...))
}

func ociError(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"says the fake hub"}]}`, code)
}

func newCA(t *testing.T) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fake hub"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	return must(x509.ParseCertificate(der)), key
}

// issue makes a certificate for a name, with the CA's own key.
func issue(ca *x509.Certificate, key *ecdsa.PrivateKey, host string) (*tls.Certificate, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der, ca.Raw}, PrivateKey: key}, nil
}
