package longhorn

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/regtest"
	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

func client(t *testing.T, address, token string) *Client {
	t.Helper()
	c, err := New(address, token)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"http://longhorn-backend.longhorn-system:9500": "http://longhorn-backend.longhorn-system:9500/v1",
		"http://longhorn-frontend.longhorn-system/":    "http://longhorn-frontend.longhorn-system/v1",
		"http://h:1/v1":  "http://h:1/v1",
		"http://h:1/v1/": "http://h:1/v1",
		"https://rancher.test/k8s/clusters/c-1/proxy/":   "https://rancher.test/k8s/clusters/c-1/proxy/v1",
		"https://r.test/api/v1/services/http:l:80/proxy": "https://r.test/api/v1/services/http:l:80/proxy/v1",
	} {
		if c := client(t, address, ""); c.base != want {
			t.Errorf("%s: %s, want %s", address, c.base, want)
		}
	}
	for _, address := range []string{"", "longhorn:9500", "ftp://h", "http://", "http://u:p@h", "http://h?x=1", "http://h#x"} {
		if _, err := New(address, ""); err == nil || strings.Contains(err.Error(), ":p@") {
			t.Errorf("%q: %v", address, err)
		}
	}
	for token, want := range map[string]string{"": "", "token-a:b": "Bearer token-a:b", "Basic eDp5": "Basic eDp5", "Bearer x": "Bearer x"} {
		if c := client(t, "http://h", token); c.auth != want {
			t.Errorf("%q: %q", token, c.auth)
		}
	}
}

// TestErrors: what Longhorn says is told apart from what somebody before it says, and
// from that nothing can be heard of it.
func TestErrors(t *testing.T) {
	sums := strings.Repeat("ab", 64)
	for _, profile := range fake.Profiles {
		m := fake.New(t, fake.Options{Profile: profile})
		c := client(t, m.URL, "")
		ctx := t.Context()
		in := Input{Name: "x1", SourceType: "upload", ExpectedChecksum: sums}
		if err := c.Reach(ctx); err != nil {
			t.Fatal(err)
		}
		if all, err := c.Images(ctx); err != nil || len(all) != 0 {
			t.Error(all, err)
		}
		if _, err := c.Image(ctx, "x1"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", profile, err)
		}
		if err := c.Delete(ctx, "x1"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", profile, err)
		}
		if made, err := c.Create(ctx, in); err != nil || made.Name != "x1" || made.UUID != "" || len(made.Files) != 0 ||
			(made.MinNumberOfCopies == nil) != (profile == fake.V1_4) {
			t.Errorf("%s: %+v, %v", profile, made, err)
		}
		if _, err := c.Create(ctx, in); !errors.Is(err, ErrExists) {
			t.Errorf("%s: %v", profile, err)
		}
		in.Name, in.ExpectedChecksum = "x2", "abc"
		if _, err := c.Create(ctx, in); !errors.Is(err, ErrRefused) || err.Error() != "Longhorn refuses: invalid checksum abc" {
			t.Errorf("%s: %v", profile, err)
		}
		m.SetVolume("v", "x1")
		if err := c.Delete(ctx, "x1"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "replicas using it") {
			t.Errorf("%s: %v", profile, err)
		}
		if err := c.Upload(ctx, "x1", 512, bytes.NewReader(make([]byte, 512))); !errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v", profile, err) // it is not pending
		}
	}
	for _, f := range []fake.Fault{
		{Status: 502, Body: "<html>Bad Gateway"}, {Status: 404, Body: "<html>not found"}, {Status: 404, Body: `{"message":"not found"}`},
		{Status: 200, Body: "<html>Log in"}, {Status: 200, Body: "{}"}, {Status: 302}, {Status: 401}, {Status: 403}, {Status: 200, Body: `{"data":null,"type":"collection"}`},
		{Status: 200, Body: `{"data":` + strings.Repeat(" ", maxAnswer) + `[]}`}, {Lose: true},
	} {
		m := fake.New(t, fake.Options{})
		m.Break(f)
		c := client(t, m.URL, "")
		_, all := c.Images(t.Context())
		_, one := c.Image(t.Context(), "x1")
		_, made := c.Create(t.Context(), Input{Name: "x1", SourceType: "upload"})
		for _, err := range []error{all, one, made} {
			if !errors.Is(err, ErrAway) || len(err.Error()) > 2000 {
				t.Errorf("%d %.40s: %.200v", f.Status, f.Body, err)
			}
		}
	}
}

// TestNotFound: what Longhorn does not find is the image only where it says so.
func TestNotFound(t *testing.T) {
	for message, absent := range map[string]bool{
		`failed to get backing image x1: backingimages.longhorn.io \"x1\" not found`: true,
		`failed to get node n1: nodes.longhorn.io \"n1\" not found`:                  false,
	} {
		m := fake.New(t, fake.Options{})
		m.Break(fake.Fault{Status: 500, Body: `{"type":"error","status":500,"message":"` + message + `"}`})
		if _, err := client(t, m.URL, "").Image(t.Context(), "x1"); errors.Is(err, ErrNotFound) != absent || err == nil {
			t.Errorf("%s: %v", message, err)
		}
	}
}

// TestHang: a manager that says nothing does not hold anybody.
func TestHang(t *testing.T) {
	m := fake.New(t, fake.Options{})
	m.Break(fake.Fault{Hang: true})
	c := client(t, m.URL, "")
	c.timeout, c.stall = 50*time.Millisecond, 50*time.Millisecond
	if err := c.Reach(t.Context()); !errors.Is(err, ErrAway) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	// Nothing takes the body of this: what is sent ends when buffers are full.
	err := c.Upload(t.Context(), "x1", 1<<30, io.LimitReader(zeros{}, 1<<30))
	if !errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "takes no more bytes") {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestUpload: one part named chunk, its length known before.
func TestUpload(t *testing.T) {
	data := regtest.Random("x", 1<<20).Data
	m := fake.New(t, fake.Options{})
	c := client(t, m.URL, "")
	if _, err := c.Create(t.Context(), Input{Name: "x1", SourceType: "upload"}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(60 * time.Second)
	for {
		image, err := c.Image(t.Context(), "x1")
		if err != nil || time.Now().After(deadline) {
			t.Fatal(image, err)
		}
		if fmt.Sprint(image.Files) == "map[00000000-0000-4000-8000-000000000001:{pending 0 }]" {
			break
		}
	}
	if err := c.Upload(t.Context(), "x1", int64(len(data)), bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	if got, _, _, ok := m.Content("x1"); !ok || !bytes.Equal(got, data) {
		t.Error("Longhorn has something else")
	}

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil || n != r.ContentLength || n <= int64(len(data)) || r.URL.RawQuery != "action=upload&size=1048576" {
			t.Errorf("%d of %d, %v, %s", n, r.ContentLength, err, r.URL)
		}
	}))
	defer server.Close()
	c = client(t, server.URL, "")
	if err := c.Upload(t.Context(), "x1", int64(len(data)), bytes.NewReader(data)); err != nil {
		t.Error(err)
	}
}

// TestRedirect: a token goes nowhere but where it was meant for.
func TestRedirect(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("%s was followed to, with %q", r.URL, r.Header.Get("Authorization"))
	}))
	defer other.Close()
	server := httptest.NewServer(http.RedirectHandler(other.URL+"/v1/backingimages", http.StatusTemporaryRedirect))
	defer server.Close()
	c := client(t, server.URL, "secret")
	if _, err := c.Images(t.Context()); !errors.Is(err, ErrAway) {
		t.Error(err)
	}
}

func TestMain(m *testing.M) {
	// A server that closes a connection after a request it has not read waits a while.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}
