package clients_test

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/clients"
)

var (
	layer    = strings.Repeat("layer", 1000)
	manifest = fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":%q,"size":%d}]}`,
		digest.FromString("{}"), digest.FromString(layer), len(layer))
	index = fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"unknown","architecture":"unknown"}},{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"linux","architecture":"s390x"}}]}`,
		digest.FromString("attestation"), 11, digest.FromString(manifest), len(manifest))
)

var containerd, _ = clients.Find("containerd")

// serve answers as a mirror does that has one image.
func serve(w http.ResponseWriter, r *http.Request) {
	content := map[string]string{
		"manifests/latest": index, "manifests/" + digest.FromString(index).String(): index,
		"manifests/" + digest.FromString(manifest).String(): manifest, "blobs/" + digest.FromString(layer).String(): layer,
	}
	if r.URL.Path == "/v2/" {
		return
	}
	text, ok := content[strings.TrimPrefix(r.URL.Path, "/v2/library/x/")]
	if !ok || r.URL.Query().Get("ns") != "docker.io" {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"docker.io has no such tag"}]}`)
		return
	}
	w.Header().Set("Docker-Content-Digest", digest.FromString(text).String())
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(text))
}

func image(t *testing.T, s string) clients.Image {
	t.Helper()
	is, err := clients.ParseImage(s)
	if err != nil {
		t.Fatal(err)
	}
	return is
}

func TestCheck(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(serve))
	defer server.Close()
	var told []string
	for _, name := range []string{"docker.io/library/x", "docker.io/library/x:latest", "docker.io/library/x@" + digest.FromString(manifest).String()} {
		told = nil
		err := clients.Check(t.Context(), containerd, clients.Mirror{URL: server.URL, Every: true}, image(t, name), func(is string) { told = append(told, is) })
		if err != nil || len(told) < 5 || !strings.Contains(told[len(told)-2], "from byte 2500 on") || !strings.Contains(told[len(told)-1], "5000 bytes") {
			t.Errorf("%s: %q, %v", name, told, err)
		}
	}
	for _, bad := range []string{"", "alpine", "library/alpine", "docker.io/A", "docker.io/a:" + strings.Repeat("x", 200), "docker.io/a@sha256:1"} {
		if is, err := clients.ParseImage(bad); err == nil {
			t.Errorf("%q: %v", bad, is)
		}
	}
}

// TestCheckFinds: what is wrong is said, with what to do.
func TestCheckFinds(t *testing.T) {
	gone := httptest.NewServer(nil)
	gone.Close()
	secure, plain := httptest.NewTLSServer(http.HandlerFunc(serve)), httptest.NewServer(http.HandlerFunc(serve))
	defer secure.Close()
	defer plain.Close()
	for want, at := range map[string]clients.Mirror{
		"is the mirror running":              {Every: true, URL: gone.URL},
		"mend DNS":                           {Every: true, URL: "http://no.such.host.invalid"},
		"give the authority by --ca":         {Every: true, URL: secure.URL},
		"certificate is for another name":    {Every: true, URL: strings.Replace(secure.URL, "127.0.0.1", "localhost", 1), CA: authority(t, secure)},
		"has no certificate":                 {Every: true, URL: secure.URL, CA: os.DevNull},
		"has no TLS: write http://127.0.0.1": {Every: true, URL: strings.Replace(plain.URL, "http:", "https:", 1)},
	} {
		if err := clients.Check(t.Context(), containerd, at, image(t, "docker.io/library/x"), func(string) {}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if err := clients.Check(t.Context(), containerd, clients.Mirror{Every: true, URL: secure.URL, CA: authority(t, secure)}, image(t, "docker.io/library/x"), func(string) {}); err != nil {
		t.Error(err)
	}
	for want, spoil := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"asks for credentials":      status("/v2/", http.StatusUnauthorized),
		"does not pass /v2/ on":     status("/v2/", http.StatusNotFound),
		"404 Not Found: MANIFEST_U": func(w http.ResponseWriter, r *http.Request) bool { r.URL.RawQuery = ""; return false },
		"Docker-Content-Digest or": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodHead {
				w.Header().Set("Content-Length", "10")
				return true
			}
			return false
		},
		"drops Range": func(w http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false },
		"changes it":  headed("Range", func(r *http.Request) { r.Header.Set("Range", "bytes=2501-") }),
		"leave /v2/ as it is": func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Encoding", "br")
			return false
		},
		"the layer sha256:":     status("/v2/library/x/blobs/"+digest.FromString(layer).String(), http.StatusBadGateway),
		"manifest sha256:":      written("/v2/library/x/manifests/"+digest.FromString(manifest).String(), strings.Repeat("x", len(manifest))),
		"has other bytes":       written("/v2/library/x/blobs/"+digest.FromString(layer).String(), strings.Repeat("x", len(layer))),
		"caches ranges wrongly": ranged(strings.Repeat("x", len(layer)-len(layer)/2)),
		"was cut after":         ranged("x"),
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !spoil(w, r) {
				serve(w, r)
			}
		}))
		if err := clients.Check(t.Context(), containerd, clients.Mirror{URL: server.URL, Every: true}, image(t, "docker.io/library/x"), func(string) {}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		server.Close()
	}
}

// authority is a file with the certificate of a server.
func authority(t *testing.T, s *httptest.Server) string {
	name := filepath.Join(t.TempDir(), "ca.pem")
	put(t, name, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	return name
}

func status(path string, code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == path {
			w.WriteHeader(code)
		}
		return r.URL.Path == path
	}
}

func headed(name string, do func(*http.Request)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get(name) != "" {
			do(r)
		}
		return false
	}
}

// written answers a path with other bytes, but for a range of them.
func written(path, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != path || r.Header.Get("Range") != "" {
			return false
		}
		fmt.Fprint(w, body)
		return true
	}
}

// ranged answers a range with other bytes.
func ranged(body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") == "" {
			return false
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", len(layer)/2, len(layer)-1, len(layer)))
		w.WriteHeader(http.StatusPartialContent)
		fmt.Fprint(w, body)
		return true
	}
}
