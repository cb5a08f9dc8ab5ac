package module_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestBackingGC: what images need stays in the store, whatever is collected beside an
// upload; what was deleted goes. Bytes that the disk has damaged are found by the scrub,
// and come anew with the image.
func TestBackingGC(t *testing.T) {
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	adapted, err := m.adaptImages("gc off 1s\nbacking_images {\n}", "access {\nallow any to anyone\n}", "")
	if err == nil {
		err = m.loadJSON(adapted)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	t.Cleanup(func() {
		// Caddy's Stop leaves the admin API to answer.
		if err := m.loadJSON([]byte(`{"admin": {"disabled": true}}`)); err != nil {
			t.Error(err)
		}
	})
	send := func(method, path string, body []byte, header ...string) *answer {
		t.Helper()
		return m.ask(func() (*http.Response, error) {
			req, err := http.NewRequestWithContext(t.Context(), method, m.URL+path, bytes.NewReader(body))
			if err != nil {
				return nil, err
			}
			for i := 0; i < len(header); i += 2 {
				req.Header.Set(header[i], header[i+1])
			}
			return client.Do(req)
		})
	}
	stays, goes, comes := diskImage("stays", 1<<20), diskImage("goes", 1<<20), diskImage("comes", 1<<20)
	for name, data := range map[string][]byte{"stays": stays, "goes": goes} {
		if a := send("PUT", "/v1/backing-images/"+name+"/content", data); a.StatusCode != 201 {
			t.Fatalf("%d %s", a.StatusCode, a.body)
		}
	}
	a := send("POST", "/v1/uploads", nil, "Tus-Resumable", "1.0.0", "Upload-Length", fmt.Sprint(len(comes)), "Upload-Metadata", "name Y29tZXM=")
	upload := a.Header.Get("Location")
	upload = "/v1/uploads/" + upload[strings.LastIndexByte(upload, '/')+1:]
	part := func(data []byte, at int) *answer {
		return send("PATCH", upload, data, "Tus-Resumable", "1.0.0", "Upload-Offset", fmt.Sprint(at), "Content-Type", "application/offset+octet-stream")
	}
	if a := part(comes[:500_000], 0); a.StatusCode != 204 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	if a := send("DELETE", "/v1/backing-images/goes", nil); a.StatusCode != 204 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	blob := func(data []byte) []string { return kept(m.dir, digest.FromBytes(data)) }
	if len(blob(stays)) != 1 {
		t.Fatalf("the store has %q", blob(stays))
	}
	m.complete()
	eventually(t, "the space to be given back", func() bool {
		m.job(`{"kind": "gc"}`)
		return len(blob(goes)) == 0
	})
	for range 2 {
		m.job(`{"kind": "gc"}`)
	}
	if a := part(comes[500_000:], 500_000); a.StatusCode != 204 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	m.job(`{"kind": "gc"}`)
	for name, data := range map[string][]byte{"stays": stays, "comes": comes} {
		if a := m.want(200, "GET", "/v1/backing-images/"+name+"/download"); !bytes.Equal(a.body, data) {
			t.Errorf("%s has %d other bytes", name, len(a.body))
		}
	}
	m.want(404, "GET", "/v1/backing-images/goes/download")

	file := blob(stays)[0]
	damaged := bytes.Clone(stays)
	damaged[700_000] ^= 1
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(file, 0o600)
	if err := os.WriteFile(file, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Chtimes(file, info.ModTime(), info.ModTime())
	if job := m.job(`{"kind": "scrub"}`); !strings.Contains(fmt.Sprint(job["found"]), digest.FromBytes(stays).Encoded()[:12]) {
		t.Errorf("the scrub found %v", job)
	}
	if status := m.admins("GET", "status"); !strings.Contains(fmt.Sprint(status["damaged"]), digest.FromBytes(stays).String()) {
		t.Errorf("%v", status)
	}
	// Whoever has the file makes the image anew.
	if a := send("DELETE", "/v1/backing-images/stays", nil); a.StatusCode != 204 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	if a := send("PUT", "/v1/backing-images/stays/content", stays); a.StatusCode != 201 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	if a := m.want(200, "GET", "/v1/backing-images/stays/download"); !bytes.Equal(a.body, stays) {
		t.Error("it is not mended")
	}
	if left, err := filepath.Glob(filepath.Join(m.dir, "mirror", "local", "backing-images", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q %v", left, err)
	}
}
