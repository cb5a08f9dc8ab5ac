package api_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/base64"
	"io"
	"net/http"
	"path"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// file is the address of a version's file.
func file(v backing.Version) string {
	return "/v1/files/" + v.Digests.SHA512.Encoded() + "/" + path.Base(v.URLs.File)
}

func TestFile(t *testing.T) {
	s := open(t)
	data := disk("file", 1000)
	v := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/content", data).version(t)
	sum := sha512.Sum512(data)
	head := s.want(http.StatusOK, "HEAD", file(v), nil)
	whole := s.want(http.StatusOK, "GET", file(v), nil, "Accept-Encoding", "gzip")
	for name, want := range map[string]string{
		"Content-Length": "512000", "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "Content-Encoding": "",
		"Etag":          `"sha512-` + sum512(data) + `"`,
		"Cache-Control": "public, max-age=31536000, immutable, no-transform",
	} {
		if head.Header.Get(name) != want || whole.Header.Get(name) != want {
			t.Errorf("%s: %q and %q, want %q", name, head.Header.Get(name), whole.Header.Get(name), want)
		}
	}
	if repr := whole.Header.Get("Repr-Digest"); !strings.Contains(repr, "sha-512=:"+base64.StdEncoding.EncodeToString(sum[:])+":") || !strings.Contains(repr, "sha-256=:") || repr != head.Header.Get("Repr-Digest") {
		t.Errorf("Repr-Digest: %q", repr)
	}
	modified := whole.Header.Get("Last-Modified")
	if _, err := http.ParseTime(modified); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(whole.body, data) {
		t.Error("other bytes")
	}
	for _, c := range []struct {
		header []string
		status int
		body   []byte
	}{
		{[]string{"Range", "bytes=512-1023"}, 206, data[512:1024]},
		{[]string{"Range", "bytes=-512"}, 206, data[len(data)-512:]},
		{[]string{"Range", "bytes=1000-", "If-Range", modified}, 206, data[1000:]},
		{[]string{"Range", "bytes=1000-", "If-Range", `"other"`}, 200, data},
		{[]string{"If-None-Match", whole.Header.Get("Etag")}, 304, nil},
		{[]string{"If-Modified-Since", modified}, 304, nil},
	} {
		if a := s.ask("GET", file(v), nil, c.header...); a.StatusCode != c.status || !bytes.Equal(a.body, c.body) {
			t.Errorf("%q: %d, %d bytes", c.header, a.StatusCode, len(a.body))
		}
	}
	s.ask("GET", file(v), nil, "Range", "bytes=512000-").refused(t, 416, "range_not_satisfiable")
	parts := s.want(http.StatusPartialContent, "GET", file(v), nil, "Range", "bytes=0-1,512-515")
	if !bytes.Contains(parts.body, data[512:516]) {
		t.Errorf("%q", parts.body)
	}
	human := s.want(http.StatusOK, "GET", "/v1/backing-images/debian/download", nil)
	if human.location(t, "Content-Location") != s.url+file(v) || human.Header.Get("Cache-Control") != "public, no-cache, no-transform" ||
		human.Header.Get("Content-Disposition") != `attachment; filename="`+path.Base(v.URLs.File)+`"` {
		t.Errorf("%v", human.Header)
	}
	for _, wrong := range []string{"/v1/files/12/x.img", "/v1/files/" + sum512(nil) + "/" + path.Base(file(v)), path.Dir(file(v)) + "/other.img"} {
		s.ask("GET", wrong, nil).refused(t, 404, backing.NotFound)
	}
	s.want(http.StatusNotFound, "GET", "/v1/backing-images/debian/download?version=v9", nil)
}

func TestFileOfAPrivateSite(t *testing.T) {
	who, err := access.ParseWho("user:token")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, api.Site{APIToken: secret, Rules: access.Rules{{Allow: true, Actions: access.Any, To: []access.Who{who}}}})
	s.bearer = secret
	data := disk("private", 4)
	v := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/content", data).version(t)
	s.want(http.StatusCreated, "PUT", "/v1/backing-images/other/content", disk("o", 1))
	if got := s.want(http.StatusOK, "GET", file(v), nil).Header.Get("Cache-Control"); got != "private, max-age=31536000, immutable, no-transform" {
		t.Errorf("Cache-Control: %q", got)
	}
	var token, other backing.PathToken
	s.want(http.StatusCreated, "POST", "/v1/backing-images/debian/tokens", `{"note":"longhorn"}`).json(t, &token)
	s.want(http.StatusCreated, "POST", "/v1/backing-images/other/tokens", nil).json(t, &other)
	s.bearer = ""
	s.ask("GET", file(v), nil).refused(t, 401, "unauthorized")
	s.ask("POST", "/v1/backing-images/debian/tokens", nil).refused(t, 401, "unauthorized")
	with := func(token string) string { return "/v1/files/t/" + token + strings.TrimPrefix(file(v), "/v1/files") }
	a := s.want(http.StatusOK, "GET", with(token.Token), nil)
	if !bytes.Equal(a.body, data) || !strings.HasPrefix(a.Header.Get("Cache-Control"), "private, ") {
		t.Errorf("%v", a.Header)
	}
	s.want(http.StatusOK, "HEAD", with(token.Token), nil)
	s.ask("GET", with(other.Token), nil).refused(t, 404, backing.NotFound)
	s.ask("GET", with(token.Token+"x"), nil).refused(t, 404, backing.NotFound)
	s.bearer = secret
	s.want(http.StatusNoContent, "DELETE", "/v1/backing-images/debian/tokens/"+token.ID, nil)
	s.bearer = ""
	s.ask("GET", with(token.Token), nil).refused(t, 404, backing.NotFound)
}

// TestManyReadOneDistantFile: a file that only the bucket has is fetched from there
// once, however many ask for it, and some of them hang up.
func TestManyReadOneDistantFile(t *testing.T) {
	double := storagetest.NewDouble(disktest.Open(t, t.TempDir()))
	s := serveFrom(t, double, api.Site{APIToken: secret})
	s.bearer = secret
	data := disk("many", 8000)
	v := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/content", data).version(t)
	key := layout.Blob(v.Digests.SHA256)
	if double.Placed(key) == nil {
		double.Place(key, data)
	}
	if err := double.Store.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	s.want(http.StatusOK, "HEAD", file(v), nil)
	if asked := double.Asks("get", key); len(asked) != 0 {
		t.Errorf("HEAD asked the distant store: %v", asked)
	}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			resp, err := http.Get(s.url + file(v))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK || resp.ContentLength != int64(len(data)) {
				t.Errorf("%d, %d bytes", resp.StatusCode, resp.ContentLength)
			}
			if i%5 == 0 { // hangs up
				io.CopyN(io.Discard, resp.Body, 1000)
				return
			}
			if body, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(body, data) {
				t.Errorf("%d bytes, %v", len(body), err)
			}
		})
	}
	wg.Wait()
	if asked := double.Asks("get", key); len(asked) != 1 {
		t.Errorf("the distant store was asked %d times: %v", len(asked), asked)
	}
}

// TestADistantFileIsCut: where the store breaks off, so does the connection.
func TestADistantFileIsCut(t *testing.T) {
	double := storagetest.NewDouble(disktest.Open(t, t.TempDir()))
	s := serveFrom(t, double, api.Site{APIToken: secret})
	s.bearer = secret
	data := disk("cut", 8000)
	v := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/content", data).version(t)
	key := layout.Blob(v.Digests.SHA256)
	if err := double.Store.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	wrong := bytes.Clone(data)
	wrong[len(wrong)-1]++
	double.Place(key, wrong)
	resp, err := http.Get(s.url + file(v))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); resp.StatusCode == http.StatusOK && err == nil {
		t.Errorf("%d bytes, which are not the file's, as if they were", len(body))
	}
}
