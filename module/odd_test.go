package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// serveContent answers as a registry without any rules would.
func serveContent(w http.ResponseWriter, r *http.Request, image regtest.Image) {
	send := func(c regtest.Content) {
		w.Header().Set("Content-Type", c.MediaType)
		w.Header().Set("Docker-Content-Digest", c.Digest.String())
		w.Header().Set("Content-Length", strconv.Itoa(len(c.Data)))
		if r.Method == http.MethodGet {
			w.Write(c.Data)
		}
	}
	if strings.Contains(r.URL.Path, "/manifests/") {
		send(image.Content)
		return
	}
	for _, blob := range image.Blobs {
		if strings.HasSuffix(r.URL.Path, blob.Digest.String()) {
			send(blob)
			return
		}
	}
	w.WriteHeader(http.StatusNotFound)
}

// TestPrivateNeedsProof: only an anonymous answer that shows the content opens
// a repository. Whatever else an upstream says to nobody does not.
func TestPrivateNeedsProof(t *testing.T) {
	image := regtest.NewImage("secret", regtest.Random("secret", 10_000))
	for name, anonymous := range map[string]http.HandlerFunc{
		"HEAD is not known, GET is refused": func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
		"bad request": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadRequest) },
		"gone":        func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusGone) },
		"a login page": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Content-Length", "22")
			io.WriteString(w, "<html>please log in...")
		},
		"a redirect to one": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/login" {
				http.Redirect(w, r, "/login", http.StatusFound)
				return
			}
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>please log in")
		},
		"a token server that sends a page": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/page",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
		"a token server that sends none": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		},
	} {
		t.Run(name, func(t *testing.T) {
			up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _, known := r.BasicAuth()
				switch {
				case r.URL.Path == "/page":
					io.WriteString(w, "<html>")
				case r.URL.Path == "/token" && known:
					io.WriteString(w, `{"token":"good"}`)
				case r.URL.Path == "/token":
					io.WriteString(w, `{"message":"log in first"}`)
				case known || r.Header.Get("Authorization") == "Bearer good":
					serveContent(w, r, image)
				default:
					anonymous(w, r)
				}
			}))
			defer up.Close()
			m := start(t, fmt.Sprintf("upstream corp.test {\n origin %s\n allow_private\n credentials u s\n}", up.URL), "default corp.test")
			for _, path := range []string{"/manifests/latest", "/manifests/" + image.Digest.String(), "/blobs/" + image.Blobs[1].Digest.String(), "/tags/list"} {
				if a := m.do("GET", "/v2/team/secret"+path); a.StatusCode != http.StatusForbidden {
					t.Errorf("%s: %d with %d bytes", path, a.StatusCode, len(a.body))
				}
			}
			if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":[]}` {
				t.Errorf("the catalog shows %s", a.body)
			}
		})
	}
}

// TestPrivateIsNotListed: what nobody has looked at is not shown either.
func TestPrivateIsNotListed(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	up.Push("library/y", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	m.pull("library/x", "latest", image)
	if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":["docker.io/library/x"]}` {
		t.Errorf("without credentials: %s", a.body)
	}
	if err := m.load(upstreamFor("docker.io", up, "credentials u s"), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/y", "latest", image)
	if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":["docker.io/library/y"]}` {
		t.Errorf("with credentials: %s", a.body)
	}
}

// TestBadEndpoint: whatever an endpoint does to a blob, the origin has it.
func TestBadEndpoint(t *testing.T) {
	for _, size := range []int{400_000, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { testBadEndpoint(t, regtest.Random("x", size)) })
	}
}

func testBadEndpoint(t *testing.T, layer regtest.Content) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		tries  int // until it is found out
	}{
		"another length": {func(w http.ResponseWriter, r *http.Request) { w.Write(layer.Data[:100]) }, 1},
		"a web page":     {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, 1},
		"nothing after its header": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(layer.Data)))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, 1},
		"no answer": {func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 1},
		"wrong bytes, and then a cut": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(layer.Data)))
			w.Write(make([]byte, 200_000))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			origin := regtest.New(t, regtest.Options{})
			image := regtest.NewImage("x", layer)
			origin.Push("library/x", image, "latest")
			near := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if !strings.Contains(r.URL.Path, layer.Digest.String()) {
					w.WriteHeader(http.StatusNotFound)
					return
				}
				c.answer(w, r)
			}))
			defer near.Close()
			m := start(t, fmt.Sprintf("upstream docker.io {\n endpoint %s\n origin %s\n allow_private\n timeouts 1s 300ms 300ms\n}", near.URL, origin.URL), "")
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			for try := 1; ; try++ {
				resp, err := m.send("GET", "/v2/library/x/blobs/"+layer.Digest.String())
				var body []byte
				if err == nil {
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if err == nil && resp.StatusCode == 200 {
					if !bytes.Equal(body, layer.Data) {
						t.Error("wrong bytes arrived complete")
					}
					break
				}
				if try == c.tries {
					t.Fatalf("try %d: %v", try, err)
				}
			}
		})
	}
}

// TestMovedTagWithoutManifest: a tag that means something that cannot be had
// goes on to mean what is held.
func TestMovedTagWithoutManifest(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true})
	first, second := regtest.NewImage("1"), regtest.NewImage("2")
	up.Push("library/x", first, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	m.pull("library/x", "latest", first)
	up.Push("library/x", second, "latest")
	up.Fail(regtest.Fault{Path: "/manifests/" + second.Digest.String(), Status: 404})
	a := m.want(200, "GET", "/v2/library/x/manifests/latest")
	if a.Header.Get("Docker-Content-Digest") != first.Digest.String() || !strings.Contains(a.Header.Get("Warning"), second.Digest.String()) {
		t.Errorf("%v", a.Header)
	}
}

// TestOnlyTheOriginTakesTagsAway: without an origin nobody can.
func TestOnlyTheOriginTakesTagsAway(t *testing.T) {
	near := regtest.New(t, regtest.Options{NoToken: true})
	image := regtest.NewImage("x")
	near.Push("library/x", image, "latest")
	m := start(t, fmt.Sprintf("upstream docker.io {\n endpoint %s\n origin off\n tag_ttl 0\n}", near.URL), "")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	near.DeleteTag("library/x", "latest")
	if a := m.want(200, "GET", "/v2/library/x/manifests/latest"); a.Header.Get("Warning") == "" {
		t.Error("no warning")
	}
}

// TestDamagedBlob: what a loss of power leaves of a file is fetched again.
func TestDamagedBlob(t *testing.T) {
	for _, c := range []struct {
		left int64
		size int
	}{{0, 300_000}, {1000, 300_000}, {0, 3 << 20}, {100_000, 3 << 20}} {
		up := regtest.New(t, regtest.Options{NoToken: true})
		image := regtest.NewImage("x", regtest.Random("x", c.size))
		up.Push("library/x", image, "latest")
		m := start(t, upstreamFor("docker.io", up), "")
		m.pull("library/x", "latest", image)
		m.stop()
		d := image.Blobs[1].Digest
		if err := os.Truncate(filepath.Join(m.dir, "docker/registry/v2/blobs/sha256", d.Encoded()[:2], d.Encoded(), "data"), c.left); err != nil {
			t.Fatal(err)
		}
		if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
			t.Fatal(err)
		}
		if a := m.want(200, "HEAD", "/v2/library/x/blobs/"+d.String()); a.ContentLength != int64(c.size) {
			t.Errorf("HEAD says %d bytes", a.ContentLength)
		}
		m.pull("library/x", "latest", image)
		up.Down()
		m.pull("library/x", "latest", image) // healed
		m.stop()
	}
}

// TestLostEnd: every byte came and only the end of the stream is missing.
func TestLostEnd(t *testing.T) {
	for _, size := range []int{300_000, 3 << 20} {
		image := regtest.NewImage("x", regtest.Random("x", size))
		layer := image.Blobs[1]
		up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, layer.Digest.String()) {
				serveContent(w, r, image)
				return
			}
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s", len(layer.Data), layer.Data)
		}))
		defer up.Close()
		m := start(t, fmt.Sprintf("upstream docker.io {\n origin %s\n}", up.URL), "")
		m.pull("library/x", "latest", image)
		m.stop()
	}
}

// TestUnknownSize: how long a blob is is asked for where no manifest tells. Where
// nobody does, it cannot be had.
func TestUnknownSize(t *testing.T) {
	layer := regtest.Random("x", 100_000)
	manifest := fmt.Sprintf(`{"schemaVersion":1,"mediaType":%q,"name":"x","tag":"l","fsLayers":[{"blobSum":%q}]}`, oci.MediaTypeDockerSchema1, layer.Digest)
	for name, c := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request)
		served bool
	}{
		"by HEAD": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "100000")
				return
			}
			w.(http.Flusher).Flush() // no Content-Length
			w.Write(layer.Data)
		}, true},
		"by GET alone": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			w.Header().Set("Content-Length", "100000")
			w.Write(layer.Data)
		}, true},
		"by ranges alone": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.(http.Flusher).Flush()
				return
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer.Data))
		}, true},
		"by nothing": {func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			w.Write(layer.Data)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.Contains(r.URL.Path, "/manifests/") {
					io.WriteString(w, manifest)
					return
				}
				c.answer(w, r)
			}))
			defer up.Close()
			m := start(t, fmt.Sprintf("upstream docker.io {\n origin %s\n}", up.URL), "")
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			path := "/v2/library/x/blobs/" + layer.Digest.String()
			if !c.served {
				m.wantError(503, oci.CodeUnavailable, "GET", path, "it does not say how long the blob is")
				return
			}
			for range 2 {
				if a := m.want(200, "GET", path); !bytes.Equal(a.body, layer.Data) {
					t.Error("wrong bytes")
				}
			}
		})
	}
}

func TestEmptyBlob(t *testing.T) {
	empty := regtest.Blob("application/octet-stream", nil)
	liar := regtest.Random("not empty", 10)
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, liar.Digest.String()) {
			w.Header().Set("Content-Length", "0")
			return
		}
		serveContent(w, r, regtest.NewImage("x", empty))
	}))
	defer up.Close()
	m := start(t, fmt.Sprintf("upstream docker.io {\n origin %s\n}", up.URL), "")
	for range 2 {
		m.pull("library/x", "latest", regtest.NewImage("x", empty))
		m.want(200, "GET", "/v2/library/x/blobs/"+empty.Digest.String(), "Range", "bytes=0-")
		m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/blobs/"+liar.Digest.String())
	}
}

// TestRejectedSettings: a configuration that fails after the store took its
// settings leaves none of them: how much stays free, what is in memory, and who
// is told of events are as before.
func TestRejectedSettings(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoToken: true})
	m := start(t, "", "")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	config := func(app string, subscribed bool, fails bool) []byte {
		t.Helper()
		adapted, err := m.adapt(app+upstreamFor("docker.io", up, "tag_ttl 0"), "")
		if err != nil {
			t.Fatal(err)
		}
		var cfg map[string]map[string]any
		if err := json.Unmarshal(adapted, &cfg); err != nil {
			t.Fatal(err)
		}
		if subscribed {
			cfg["apps"]["events"] = map[string]any{"subscriptions": []any{map[string]any{
				"events": []string{"upstream_down"}, "handlers": []any{map[string]any{"handler": "recorder"}},
			}}}
		}
		if fails {
			servers := cfg["apps"]["http"].(map[string]any)["servers"].(map[string]any)
			servers["other"] = map[string]any{"listen": []string{busy.Addr().String()}}
		}
		if adapted, err = json.Marshal(cfg); err != nil {
			t.Fatal(err)
		}
		return adapted
	}
	if err := m.loadJSON(config("", true, false)); err != nil {
		t.Fatal(err)
	}
	bad := config("storage disk "+m.dir+" {\n min_free 99.9%\n}\nhot_cache off\n", false, true)
	for i := range 10 { // Caddy starts apps in any order
		if err := m.loadJSON(bad); err == nil {
			t.Fatal("it was loaded")
		}
		image := regtest.NewImage(fmt.Sprint(i), regtest.Random(fmt.Sprint(i), 1000))
		up.Push("library/x", image, fmt.Sprint(i))
		m.pull("library/x", fmt.Sprint(i), image)
		for _, blob := range image.Blobs {
			eventually(t, "the blob to be held", func() bool { return len(kept(m.dir, blob.Digest)) == 1 && len(spooled(m.dir)) == 0 })
		}
		eventually(t, "the config to be in memory", func() bool {
			path := "/v2/library/x/blobs/" + image.Blobs[0].Digest.String()
			m.do("GET", path)
			show := m.hide()
			defer show()
			up.Fail(regtest.Fault{Path: path, Status: http.StatusNotFound})
			defer up.Heal()
			return m.do("GET", path).StatusCode == http.StatusOK
		})
	}
	if lines := m.logs.with("disk trouble"); len(lines) != 0 {
		t.Error(lines)
	}
	up.Down()
	defer up.Up()
	m.want(200, "GET", "/v2/library/x/manifests/0")
	select {
	case e := <-recorded:
		if e.Name() != "upstream_down" {
			t.Errorf("event %s", e.Name())
		}
	case <-time.After(time.Minute):
		t.Error("nobody was told that the upstream is down")
	}
}
