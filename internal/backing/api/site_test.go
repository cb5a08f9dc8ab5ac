package api_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// secret is the token of a site that has one.
const secret = "s3cret-of-the-site"

// server is the API over HTTP, below a prefix that it does not know of.
type server struct {
	t    *testing.T
	url  string
	site api.Site
	// bearer is sent with every request, unless it is empty.
	bearer string
	// handler is what url answers with.
	handler http.Handler
}

// serve starts one on an empty store.
func serve(t *testing.T, site api.Site) *server {
	return serveFrom(t, disktest.Open(t, t.TempDir()), site)
}

func serveFrom(t *testing.T, store storage.Store, site api.Site) *server {
	t.Helper()
	tr := tree.New(store, nil)
	registry := hosted.New(hosted.Parts{Store: store, Tree: tr, Log: zap.NewNop()})
	fills := fill.NewTable(store, func(context.Context, string, digest.Digest, digest.Digest) error { return nil }, func(fill.Summary) {}, nil)
	library := backing.New(backing.Parts{Store: store, Tree: tr, Hosted: registry, Fills: fills, Log: zap.NewNop()})
	library.Set(backing.Settings{Prefix: "backing-images", Compat: backing.Off, MaxImage: site.MaxImage, Pull: backing.PullSettings{AllowPrivate: true}})
	a, err := api.New(api.Parts{Library: library, Log: zap.NewNop(), Ready: func(context.Context) []api.Check {
		return []api.Check{{Name: "store", OK: true}}
	}})
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, site: site}
	s.handler = http.StripPrefix("/images", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		report := a.ServeHTTP(w, r, &s.site, access.Caller{Identity: r.Header.Get("X-User")})
		if report.Abort {
			panic(http.ErrAbortHandler)
		}
	}))
	front := httptest.NewServer(s.handler)
	s.url = front.URL + "/images"
	t.Cleanup(func() {
		front.Close()
		http.DefaultClient.CloseIdleConnections()
		library.Close()
		fills.Close()
		registry.Close()
		tr.Close()
		store.Close()
	})
	return s
}

// open is a site on which whoever has the token may do everything, and sends it.
func open(t *testing.T) *server {
	s := serve(t, api.Site{APIToken: secret})
	s.bearer = secret
	return s
}

type answer struct {
	*http.Response
	body []byte
}

// ask sends a request. A body that is a string is JSON.
func (s *server) ask(method, path string, body any, header ...string) answer {
	s.t.Helper()
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(body)
		header = append([]string{"Content-Type", "application/json"}, header...)
	case []byte:
		reader = bytes.NewReader(body)
	case io.Reader:
		reader = body
	}
	if !strings.HasPrefix(path, "http") {
		path = s.url + path
	}
	r, err := http.NewRequestWithContext(s.t.Context(), method, path, reader)
	if err != nil {
		s.t.Fatal(err)
	}
	if s.bearer != "" {
		r.Header.Set("Authorization", "Bearer "+s.bearer)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{resp, all}
}

// want asks, and fails unless the status is the given one.
func (s *server) want(status int, method, path string, body any, header ...string) answer {
	s.t.Helper()
	a := s.ask(method, path, body, header...)
	a.is(s.t, status)
	return a
}

func (a answer) is(t *testing.T, status int) {
	t.Helper()
	if a.StatusCode != status {
		t.Fatalf("%s %s: %d, want %d: %s", a.Request.Method, a.Request.URL.Path, a.StatusCode, status, a.body)
	}
}

// location is where a header points, from where the request went.
func (a answer) location(t *testing.T, header string) string {
	t.Helper()
	to, err := a.Request.URL.Parse(a.Header.Get(header))
	if err != nil || a.Header.Get(header) == "" {
		t.Fatalf("%s: %q, %v", header, a.Header.Get(header), err)
	}
	return to.String()
}

// refused fails unless the answer is a problem with a status and a code.
func (a answer) refused(t *testing.T, status int, code backing.Code) {
	t.Helper()
	a.is(t, status)
	var problem struct {
		Title, Detail string
		Status        int
		Code          backing.Code
	}
	if a.Request.Method == http.MethodHead {
		return
	}
	if err := json.Unmarshal(a.body, &problem); err != nil || a.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("%s %s: %s %q: %v", a.Request.Method, a.Request.URL.Path, a.Header.Get("Content-Type"), a.body, err)
	}
	if problem.Code != code || problem.Status != status || problem.Title == "" || problem.Detail == "" {
		t.Errorf("%s %s: %+v, want %d %s", a.Request.Method, a.Request.URL.Path, problem, status, code)
	}
}

func (a answer) json(t *testing.T, into any) {
	t.Helper()
	if err := json.Unmarshal(a.body, into); err != nil {
		t.Fatalf("%s: %v", a.body, err)
	}
}

func (a answer) version(t *testing.T) (v backing.Version) {
	t.Helper()
	a.json(t, &v)
	return v
}

// disk is a raw image with the length of so many sectors, of its own bytes.
func disk(seed string, sectors int) []byte {
	source := rand.NewChaCha8(sha256.Sum256([]byte(seed)))
	data := make([]byte, sectors*512)
	source.Read(data)
	return data
}

func sum512(data []byte) string { return fmt.Sprintf("%x", sha512.Sum512(data)) }
func sum256(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }

// wantFile fails unless the file of a version is data.
func (s *server) wantFile(v backing.Version, data []byte) {
	s.t.Helper()
	if v.Digests.SHA512.Encoded() != sum512(data) || v.Digests.SHA256.Encoded() != sum256(data) || v.Size != int64(len(data)) {
		s.t.Errorf("%+v", v)
	}
	a := s.want(http.StatusOK, "GET", "/v1/backing-images/"+v.Name+"/download?version="+v.Version, nil)
	if !bytes.Equal(a.body, data) {
		s.t.Errorf("%s %s has %d bytes, and not the %d that were sent", v.Name, v.Version, len(a.body), len(data))
	}
}
