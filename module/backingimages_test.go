package module_test

import (
	"bufio"
	"bytes"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// imageToken is the api_token of the sites that tests make.
const imageToken = "let-me-write"

// startImages runs Caddy with the options of backing_images, a site of it with
// options, and a mirror on the same site.
func startImages(t *testing.T, app, site string) *mirror {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	if err := m.loadImages(app, site); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	return m
}

func (m *mirror) loadImages(app, site string) error {
	adapted, err := m.adaptImages("backing_images {\n"+app+"\n}", site, "")
	if err != nil {
		return err
	}
	return m.loadJSON(adapted)
}

func (m *mirror) adaptImages(app, site, more string) ([]byte, error) {
	admin := m.admin
	if admin == "" {
		admin = "off"
	}
	return adapt(fmt.Sprintf(`{
		admin %s
		auto_https off
		persist_config off
		grace_period 30s
		metrics
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
		log
		backing_images {
			%s
		}
		registry_mirror {
			default off
			hosted backing-images/**
			access {
				allow any to anyone
			}
		}
		metrics /metrics
		@rest not path /metrics
		respond @rest "neither" 418
	}
	%s`, admin, m.dir, app, m.URL, site, more))
}

// disk is a disk image of a size that Longhorn takes, whose bytes are told by a word.
func diskImage(word string, size int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("%-64.64s", word)), size/64)
}

// problemOf reads an error of the API.
func problemOf(t *testing.T, a *answer) (code, detail string) {
	t.Helper()
	var p struct{ Code, Detail string }
	if err := json.Unmarshal(a.body, &p); err != nil || a.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("status %d is no problem: %q: %.300q: %v", a.StatusCode, a.Header.Get("Content-Type"), a.body, err)
	}
	return p.Code, p.Detail
}

// form sends an image as curl -F does.
func (m *mirror) form(fields map[string]string, file []byte, header ...string) *answer {
	m.t.Helper()
	var body bytes.Buffer
	w := multipart.NewWriter(&body)
	for name, value := range fields {
		w.WriteField(name, value)
	}
	part, err := w.CreateFormFile("file", "ubuntu-20.04-base.img")
	if err != nil {
		m.t.Fatal(err)
	}
	part.Write(file)
	w.Close()
	return m.sendBody("POST", "/v1/backing-images", body.Bytes(), append(header, "Content-Type", w.FormDataContentType())...)
}

// sendBody sends a request with a body.
func (m *mirror) sendBody(method, path string, body []byte, header ...string) *answer {
	m.t.Helper()
	req, err := http.NewRequest(method, m.URL+path, bytes.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := m.roundTrip(req)
	if err != nil {
		m.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	read, err := io.ReadAll(resp.Body)
	return &answer{resp, read, err}
}

var bearer = []string{"Authorization", "Bearer " + imageToken}

// put makes a version by PUT, and returns its answer.
func (m *mirror) put(name string, file []byte) map[string]any {
	m.t.Helper()
	a := m.sendBody("PUT", "/v1/backing-images/"+name+"/content", file, bearer...)
	if a.StatusCode != 201 {
		m.t.Fatalf("PUT: %d %s", a.StatusCode, a.body)
	}
	var v map[string]any
	if err := json.Unmarshal(a.body, &v); err != nil {
		m.t.Fatal(err)
	}
	return v
}

// TestBackingHealth: what answers, and what goes on to the next handler.
func TestBackingHealth(t *testing.T) {
	m := startImages(t, "", "")
	if a := m.want(200, "GET", "/health"); string(bytes.TrimSpace(a.body)) != `{"status":"ok"}` {
		t.Errorf("/health answers %q", a.body)
	}
	m.want(200, "GET", "/ready")
	m.want(404, "GET", "/v1/no-such-thing")
	for path, status := range map[string]int{"/": 418, "/healthy": 418, "/v2/": 200, "/v1": 404, "/v1/search?q=x": 200} {
		m.want(status, "GET", path)
	}
	if a := m.want(200, "GET", "/v1/backing-images"); !strings.HasPrefix(string(a.body), `{"items":[]`) {
		t.Errorf("no image: %s", a.body)
	}
}

// TestBackingImage: an image's life over HTTP.
func TestBackingImage(t *testing.T) {
	m := startImages(t, "public_url http://images.example:8080\nlonghorn_compat enforce", "api_token "+imageToken)
	file := diskImage("first", 1<<20)
	// As nobody; with the wrong token; and as it is.
	for _, header := range [][]string{nil, {"Authorization", "Bearer x"}} {
		if a := m.form(map[string]string{"name": "base-ubuntu-20.04"}, file, header...); a.StatusCode != 401 || a.Header.Get("WWW-Authenticate") == "" {
			t.Errorf("without the token: %d %s", a.StatusCode, a.body)
		}
	}
	a := m.form(map[string]string{"name": "base-ubuntu-20.04", "tag": "stable"}, file, bearer...)
	if a.StatusCode != 201 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	var v struct {
		Name, Version, State string
		Size                 int64
		Digests              struct{ SHA512 string }
		URLs                 struct{ File string }
		Tags                 []string
	}
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum512(file)
	if v.Version != "v1" || v.State != "ready" || v.Size != 1<<20 || !strings.HasSuffix(v.Digests.SHA512, hex.EncodeToString(sum[:])) || !strings.HasPrefix(v.URLs.File, "http://images.example:8080/v1/files/") {
		t.Errorf("%s", a.body)
	}
	// The same bytes are the same version.
	if a := m.form(map[string]string{"name": "base-ubuntu-20.04"}, file, bearer...); a.StatusCode != 200 || !bytes.Contains(a.body, []byte(`"version":"v1"`)) {
		t.Errorf("again: %d %s", a.StatusCode, a.body)
	}
	for _, path := range []string{"/v1/backing-images/base-ubuntu-20.04/download", "/v1/backing-images/base-ubuntu-20.04/download?version=stable", strings.TrimPrefix(v.URLs.File, "http://images.example:8080")} {
		a := m.want(200, "GET", path)
		if !bytes.Equal(a.body, file) || a.ContentLength != 1<<20 || a.Header.Get("Content-Encoding") != "" {
			t.Errorf("%s: %d bytes", path, len(a.body))
		}
		if a := m.want(206, "GET", path, "Range", "bytes=512-1023"); !bytes.Equal(a.body, file[512:1024]) {
			t.Errorf("%s: another range", path)
		}
		if a := m.want(200, "HEAD", path); a.ContentLength != 1<<20 {
			t.Errorf("HEAD %s: %d", path, a.ContentLength)
		}
	}
	// It is an artifact, which nobody changes by the registry API, whoever may push.
	a = m.want(200, "GET", "/v2/backing-images/base-ubuntu-20.04/manifests/stable", "Accept", "application/vnd.oci.image.manifest.v1+json")
	var manifest struct {
		ArtifactType string
		Layers       []struct{ Digest string }
	}
	if err := json.Unmarshal(a.body, &manifest); err != nil || manifest.ArtifactType == "" || len(manifest.Layers) != 1 {
		t.Fatalf("%s: %v", a.body, err)
	}
	if a := m.want(200, "GET", "/v2/backing-images/base-ubuntu-20.04/blobs/"+manifest.Layers[0].Digest); !bytes.Equal(a.body, file) {
		t.Error("another layer")
	}
	for _, try := range [][2]string{{"PUT", "/manifests/mine"}, {"DELETE", "/manifests/stable"}, {"POST", "/blobs/uploads/"}, {"DELETE", "/blobs/" + manifest.Layers[0].Digest}} {
		if a := m.sendBody(try[0], "/v2/backing-images/base-ubuntu-20.04"+try[1], a.body, "Content-Type", "application/vnd.oci.image.manifest.v1+json"); a.StatusCode != 403 || !bytes.Contains(a.body, []byte("image")) {
			t.Errorf("%s %s: %d %s", try[0], try[1], a.StatusCode, a.body)
		}
	}
	// What Longhorn cannot use is refused.
	if a := m.form(map[string]string{"name": "odd"}, file[:1000], bearer...); a.StatusCode != 422 {
		t.Errorf("1,000 bytes: %d %s", a.StatusCode, a.body)
	} else if code, _ := problemOf(t, a); code != "size_not_aligned" {
		t.Errorf("1,000 bytes: %s", code)
	}
	// A tag stands against its deletion.
	if a := m.sendBody("DELETE", "/v1/backing-images/base-ubuntu-20.04/versions/v1", nil, bearer...); a.StatusCode != 409 {
		t.Errorf("with a tag: %d %s", a.StatusCode, a.body)
	}
	m.sendBody("DELETE", "/v1/backing-images/base-ubuntu-20.04/tags/stable", nil, bearer...)
	if a := m.sendBody("DELETE", "/v1/backing-images/base-ubuntu-20.04/versions/v1", nil, bearer...); a.StatusCode != 204 {
		t.Errorf("without: %d %s", a.StatusCode, a.body)
	}
	m.want(404, "GET", "/v1/backing-images/base-ubuntu-20.04/download")
	m.want(404, "GET", "/v2/backing-images/base-ubuntu-20.04/manifests/v1")

	line := m.logged("/v1/backing-images/base-ubuntu-20.04/versions/v1")
	if line["registry_image"] != "base-ubuntu-20.04" || line["registry_version"] != "v1" || line["registry_error"] == nil {
		t.Errorf("the access log has %v", line)
	}
	for _, line := range m.logs.with("handled request") {
		if text := fmt.Sprint(line); strings.Contains(text, imageToken) {
			t.Errorf("the token is in the log: %s", text)
		}
	}
}

// logged is the first line of the access log for a path.
func (m *mirror) logged(path string) map[string]any {
	for _, line := range m.logs.with("handled request") {
		if request, _ := line["request"].(map[string]any); request["uri"] == path {
			return line
		}
	}
	m.t.Errorf("the access log has nothing of %s", path)
	return nil
}

// TestBackingRules: who may do what by an access block, with names less the prefix.
func TestBackingRules(t *testing.T) {
	m := startImages(t, "", "api_token "+imageToken+"\naccess {\nallow any to user:token on ours-a ours-b\nallow pull on ours-a\n}")
	file := diskImage("x", 1<<16)
	m.put("ours-a", file)
	if a := m.sendBody("PUT", "/v1/backing-images/theirs/content", file, bearer...); a.StatusCode != 403 {
		t.Errorf("another name: %d %s", a.StatusCode, a.body)
	}
	m.put("ours-b", file)
	m.want(200, "GET", "/v1/backing-images/ours-a/download")
	m.want(401, "GET", "/v1/backing-images/ours-b/download")
	m.want(200, "GET", "/v1/backing-images/ours-b/download", bearer...)
	if a := m.want(200, "GET", "/v1/backing-images"); !bytes.Contains(a.body, []byte("ours-a")) || bytes.Contains(a.body, []byte("ours-b")) {
		t.Errorf("the list has %s", a.body)
	}
}

// TestBackingPathToken: a token in a path opens one image, and is in no log.
func TestBackingPathToken(t *testing.T) {
	m := startImages(t, "", "api_token "+imageToken+"\naccess {\nallow any to user:token\n}")
	file := diskImage("x", 1<<16)
	m.put("private", file)
	a := m.sendBody("POST", "/v1/backing-images/private/tokens", []byte(`{"note":"lab"}`), append([]string{"Content-Type", "application/json"}, bearer...)...)
	var made struct{ Token string }
	if err := json.Unmarshal(a.body, &made); err != nil || made.Token == "" {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	sum := sha512.Sum512(file)
	path := "/" + hex.EncodeToString(sum[:]) + "/private-v1.img"
	m.want(401, "GET", "/v1/files"+path)
	if a := m.want(200, "GET", "/v1/files/t/"+made.Token+path); !bytes.Equal(a.body, file) {
		t.Error("other bytes")
	}
	m.want(404, "GET", "/v1/files/t/"+made.Token+"x"+path)
	m.logs.mu.Lock()
	defer m.logs.mu.Unlock()
	for _, line := range m.logs.lines {
		if text := fmt.Sprint(line); strings.Contains(text, made.Token) {
			t.Errorf("the token is in a log: %s", text)
		}
	}
}

// TestBackingNobody: without a rule and a token nobody writes, and is told what to
// configure.
func TestBackingNobody(t *testing.T) {
	m := startImages(t, "", "")
	a := m.form(map[string]string{"name": "x"}, diskImage("x", 512))
	if code, detail := problemOf(t, a); a.StatusCode != 403 || code != "denied" || !strings.Contains(detail, "api_token") {
		t.Errorf("%d %s %q", a.StatusCode, code, detail)
	}
}

// TestBackingMaxSize: a budget of all images, and of one.
func TestBackingMaxSize(t *testing.T) {
	m := startImages(t, "max_size 3MiB\nmax_image_size 2MiB", "api_token "+imageToken)
	// Until the first comparison has ended, nobody knows how much there is.
	eventually(t, "the catalog to be complete", func() bool { return len(m.logs.with("job ended")) > 0 })
	m.put("a", diskImage("a", 2<<20))
	if a := m.sendBody("PUT", "/v1/backing-images/b/content", diskImage("b", 2<<20), bearer...); a.StatusCode != 507 {
		t.Errorf("beyond the budget: %d %s", a.StatusCode, a.body)
	}
	m.put("a", diskImage("less", 1<<19))
	if a := m.sendBody("PUT", "/v1/backing-images/c/content", diskImage("c", 3<<20), bearer...); a.StatusCode != 413 {
		t.Errorf("too large: %d %s", a.StatusCode, a.body)
	}
}

// TestBackingConflicts: a prefix that means something else fails the load.
func TestBackingConflicts(t *testing.T) {
	m := startImages(t, "", "")
	for name, app := range map[string]string{
		"docker.io is the path name":   "backing_images {\nprefix docker.io\n}",
		"lies in hosted disks/**":      "hosted disks/** {\n}\nbacking_images {\nprefix disks/base\n}",
		"lies in hosted backing-image": "hosted backing-images/x {\n}",
		"no name of a repository":      "backing_images {\nprefix a//b\n}",
		"env.NO_SUCH":                  "backing_images {\npublic_url {env.NO_SUCH}\n}",
		"longhorn[0].token":            "backing_images {\nlonghorn a http://a:9500 {\ntoken {env.NO_SUCH}\n}\n}",
	} {
		adapted, err := m.adaptImages(app, "", "")
		if err == nil {
			err = m.loadJSON(adapted)
		}
		if err == nil || !strings.Contains(err.Error(), name) && name != "" {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := m.loadImages("", "api_token {env.NO_SUCH}"); err == nil || !strings.Contains(err.Error(), "api_token") {
		t.Errorf("api_token: %v", err)
	}
	// What has run goes on.
	m.want(200, "GET", "/health")
}

// begin begins an upload by tus, and returns its path.
func (m *mirror) begin(name string, size int) string {
	m.t.Helper()
	a := m.sendBody("POST", "/v1/uploads", nil, append([]string{"Tus-Resumable", "1.0.0", "Upload-Length", strconv.Itoa(size),
		"Upload-Metadata", "name " + base64.StdEncoding.EncodeToString([]byte(name))}, bearer...)...)
	if a.StatusCode != 201 {
		m.t.Fatalf("beginning an upload: %d %s", a.StatusCode, a.body)
	}
	at, err := a.Location()
	if err != nil {
		m.t.Fatal(err)
	}
	return at.EscapedPath()
}

// TestBackingReload: uploads and downloads under way, and a configuration that is
// refused meanwhile.
func TestBackingReload(t *testing.T) {
	m := startImages(t, "", "api_token "+imageToken)
	file := diskImage("kept", 8<<20)
	m.put("kept", file)

	// A download of which most has not been read, and an upload of which half is sent.
	down := m.open("GET", "/v1/backing-images/kept/download")
	defer down.Body.Close()
	first := make([]byte, 1000)
	if _, err := io.ReadFull(down.Body, first); err != nil {
		t.Fatal(err)
	}
	sent := diskImage("sent", 1<<20)
	path := m.begin("sent", len(sent))
	conn, err := net.Dial("tcp", strings.TrimPrefix(m.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nAuthorization: Bearer %s\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", path, strings.TrimPrefix(m.URL, "http://"), imageToken, len(sent))
	reader := bufio.NewReader(conn)
	// It is being read, and no connection that waits to be accepted.
	if line, err := reader.ReadString('\n'); err != nil || !strings.Contains(line, "100 Continue") {
		t.Fatalf("%q, %v", line, err)
	}
	if _, err := conn.Write(sent[:1<<19]); err != nil {
		t.Fatal(err)
	}

	reloaded := make(chan error, 2)
	go func() {
		reloaded <- m.loadImages("prefix docker.io", "") // refused
		reloaded <- m.loadImages("max_image_size 1GiB", "api_token "+imageToken)
	}()
	// The rest comes while the reload waits for it.
	rest, err := io.ReadAll(down.Body)
	if err != nil || !bytes.Equal(append(first, rest...), file) {
		t.Errorf("the download: %d bytes, %v", len(rest), err)
	}
	if err := <-reloaded; err == nil {
		t.Error("a prefix that is a registry's is taken")
	}
	if _, err := conn.Write(sent[1<<19:]); err != nil {
		t.Fatal(err)
	}
	answered, err := io.ReadAll(reader)
	if err != nil || !strings.Contains(string(answered), "HTTP/1.1 20") {
		t.Errorf("the upload: %s, %v", answered, err)
	}
	if err := <-reloaded; err != nil {
		t.Fatal(err)
	}
	if a := m.want(200, "GET", "/v1/backing-images/sent/download"); !bytes.Equal(a.body, sent) {
		t.Error("other bytes")
	}
	m.want(200, "GET", "/v1/backing-images/kept")

	// An upload that is cut goes on under another configuration.
	path = m.begin("cut", len(sent))
	half := m.sendBody("PATCH", path, sent[:1<<19], append([]string{"Tus-Resumable", "1.0.0", "Upload-Offset", "0", "Content-Type", "application/offset+octet-stream"}, bearer...)...)
	if half.StatusCode != 204 || half.Header.Get("Upload-Offset") != strconv.Itoa(1<<19) {
		t.Fatalf("half: %d %s %s", half.StatusCode, half.Header, half.body)
	}
	if err := m.loadImages("", "api_token "+imageToken); err != nil {
		t.Fatal(err)
	}
	head := m.sendBody("HEAD", path, nil, append([]string{"Tus-Resumable", "1.0.0"}, bearer...)...)
	if head.Header.Get("Upload-Offset") != strconv.Itoa(1<<19) {
		t.Errorf("after the reload: %d %s", head.StatusCode, head.Header)
	}
	if a := m.sendBody("PATCH", path, sent[1<<19:], append([]string{"Tus-Resumable", "1.0.0", "Upload-Offset", strconv.Itoa(1 << 19), "Content-Type", "application/offset+octet-stream"}, bearer...)...); a.StatusCode/100 != 2 {
		t.Errorf("the rest: %d %s", a.StatusCode, a.body)
	}
	if a := m.want(200, "GET", "/v1/backing-images/cut/download"); !bytes.Equal(a.body, sent) {
		t.Error("other bytes")
	}
}

// TestBackingTwoSites: two sites share a store, and each has its own rules.
func TestBackingTwoSites(t *testing.T) {
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	other := *m
	other.URL = "http://" + regtest.FreeAddress(t)
	adapted, err := m.adaptImages("", "api_token "+imageToken, other.URL+" {\nbacking_images {\naccess {\nallow pull on open\n}\n}\n}\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.loadJSON(adapted); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	file := diskImage("x", 1<<16)
	m.put("open", file)
	m.put("closed", file)
	if a := other.want(200, "GET", "/v1/backing-images/open/download"); !bytes.Equal(a.body, file) {
		t.Error("other bytes")
	}
	other.want(403, "GET", "/v1/backing-images/closed/download")
	if a := other.sendBody("PUT", "/v1/backing-images/open/content", file, bearer...); a.StatusCode != 403 {
		t.Errorf("the other site's token: %d", a.StatusCode)
	}
	// They are there for the next process, too.
	if err := m.loadJSON([]byte(`{"admin":{"disabled":true,"config":{"persist":false}}}`)); err != nil {
		t.Fatal(err)
	}
	unlocked(t, m.dir)
	if err := m.loadJSON(adapted); err != nil {
		t.Fatal(err)
	}
	if a := m.want(200, "GET", "/v1/backing-images/closed/download"); !bytes.Equal(a.body, file) {
		t.Error("other bytes")
	}
}

// TestBackingPull: a pull from a URL, and metrics.
func TestBackingPull(t *testing.T) {
	m := startImages(t, "allow_private", "api_token "+imageToken)
	file := diskImage("pulled", 3<<20)
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "x.img", time.Unix(0, 0), bytes.NewReader(file))
	}))
	defer source.Close()
	ask := fmt.Sprintf(`{"name":"pulled","tags":["latest"],"source":{"type":"url","url":%q}}`, source.URL+"/x.img")
	a := m.sendBody("POST", "/v1/backing-images", []byte(ask), append([]string{"Content-Type", "application/json"}, bearer...)...)
	if a.StatusCode != 202 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	eventually(t, "the pull to end", func() bool { return m.do("GET", "/v1/backing-images/pulled/download").StatusCode == 200 })
	if a := m.want(200, "GET", "/v1/backing-images/pulled/download"); !bytes.Equal(a.body, file) {
		t.Error("other bytes")
	}
	metrics := string(m.want(200, "GET", "/metrics").body)
	for _, series := range []string{"caddy_registry_backing_images{", "caddy_registry_backing_image_versions{", "caddy_registry_backing_image_bytes{", `state="succeeded"`} {
		if !strings.Contains(metrics, series) {
			t.Errorf("no %s in %s", series, metrics)
		}
	}
}

// imageFile is a disk image in a file.
func imageFile(t *testing.T, data []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestBackingReadyWithoutLonghorn: a Longhorn that is away is told of, and images are
// served all the same.
func TestBackingReadyWithoutLonghorn(t *testing.T) {
	m := startImages(t, "longhorn far http://"+regtest.FreeAddress(t), "")
	a := m.want(200, "GET", "/ready")
	if !bytes.Contains(a.body, []byte(`{"status":"ok"`)) || !bytes.Contains(a.body, []byte(`{"name":"longhorn far","ok":false,"warning":true,"message":`)) {
		t.Errorf("/ready answers %s", a.body)
	}
}
