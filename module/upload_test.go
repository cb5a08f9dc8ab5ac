package module_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// openToAll is a site on which anyone may do anything with what is hosted.
const openToAll = "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"

// An uploader uploads to a repository.
type uploader struct {
	*mirror
	name string
}

// ask sends a request to a path of the repository, or to a Location. A body whose
// length http knows not is chunked.
func (u uploader) ask(method, to string, body io.Reader, header ...string) *answer {
	u.t.Helper()
	if !strings.HasPrefix(to, "/") {
		to = "/v2/" + u.name + "/" + to
	}
	req, err := http.NewRequest(method, u.URL+to, body)
	if err != nil {
		u.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	for err != nil && body == nil && time.Since(u.loaded) < 5*time.Second && errors.Is(err, syscall.ECONNRESET) { // see send
		resp, err = client.Do(req)
	}
	if err != nil {
		u.t.Fatalf("%s %s: %v", method, to, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return &answer{resp, got, err}
}

// says is ask, and checks status and, of an error, its code.
func (u uploader) says(status string, method, to string, body io.Reader, header ...string) *answer {
	u.t.Helper()
	a := u.ask(method, to, body, header...)
	want, code, _ := strings.Cut(status, " ")
	if fmt.Sprint(a.StatusCode) != want || !strings.Contains(string(a.body), code) {
		u.t.Fatalf("%s %s %q: %d %.300s, want %s", method, to, header, a.StatusCode, a.body, status)
	}
	return a
}

// at checks an answer that says where an upload is and ends, and returns where.
func (u uploader) at(a *answer, end int) string {
	u.t.Helper()
	location := a.Header.Get("Location")
	id := a.Header.Get("Docker-Upload-UUID")
	if location != "/v2/"+u.name+"/blobs/uploads/"+id || id == "" {
		u.t.Fatalf("Location %q of upload %q", location, id)
	}
	if got, want := a.Header.Get("Range"), fmt.Sprintf("0-%d", max(end-1, 0)); got != want {
		u.t.Fatalf("Range %q, want %q", got, want)
	}
	return location
}

// begin begins an upload.
func (u uploader) begin() string {
	u.t.Helper()
	return u.at(u.says("202", "POST", "blobs/uploads/", nil), 0)
}

// has checks an answer that says that a blob is there, and the blob.
func (u uploader) has(a *answer, d digest.Digest, data []byte) {
	u.t.Helper()
	if got := a.Header.Get("Location"); got != "/v2/"+u.name+"/blobs/"+d.String() || a.Header.Get("Docker-Content-Digest") != d.String() || len(a.body) != 0 {
		u.t.Errorf("Location %q, digest %q, body %q", got, a.Header.Get("Docker-Content-Digest"), a.body)
	}
	u.keeps(d, data)
	if left := spooled(u.dir); len(left) > 0 {
		u.t.Errorf("left: %q", left)
	}
}

func (u uploader) keeps(d digest.Digest, data []byte) {
	u.t.Helper()
	want := regtest.Content{MediaType: "application/octet-stream", Digest: d, Data: data}
	if err := check(u.ask("GET", "blobs/"+d.String(), nil), want); err != nil {
		u.t.Fatalf("%s: %v", d, err)
	}
	u.says("200", "HEAD", "blobs/"+d.String(), nil)
}

// lacks checks that nothing of a blob can be seen.
func (u uploader) lacks(d digest.Digest) {
	u.t.Helper()
	u.says("404 BLOB_UNKNOWN", "GET", "blobs/"+d.String(), nil)
	if files := kept(u.dir, d); len(files) > 0 {
		u.t.Errorf("kept: %q", files)
	}
}

func finish(location string, d digest.Digest) string {
	return location + "?digest=" + url.QueryEscape(d.String())
}

// chunked hides the length of a body.
func chunked(data []byte) io.Reader { return io.MultiReader(bytes.NewReader(data)) }

// TestUploadForms uploads as every client does.
func TestUploadForms(t *testing.T) {
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	whole := func(data []byte) io.Reader {
		if len(data) == 0 {
			return http.NoBody
		}
		return bytes.NewReader(data)
	}
	for name, do := range map[string]func(data []byte, d digest.Digest) *answer{
		"POST": func(data []byte, d digest.Digest) *answer {
			return u.says("201", "POST", finish("blobs/uploads/", d), whole(data))
		},
		"POST without a length": func(data []byte, d digest.Digest) *answer {
			return u.says("201", "POST", finish("blobs/uploads/", d), chunked(data))
		},
		"POST and PUT, as containerd": func(data []byte, d digest.Digest) *answer {
			return u.says("201", "PUT", finish(u.begin(), d), whole(data), "Content-Type", "application/octet-stream")
		},
		"POST of a digest, and PUT": func(data []byte, d digest.Digest) *answer {
			if len(data) == 0 {
				return u.says("201", "POST", finish("blobs/uploads/", d), nil)
			}
			at := u.at(u.says("202", "POST", finish("blobs/uploads/", d), nil), 0)
			return u.says("201", "PUT", finish(at, d), whole(data))
		},
		"PATCH chunked, as docker": func(data []byte, d digest.Digest) *answer {
			at := u.at(u.says("202", "PATCH", u.begin(), chunked(data)), len(data))
			return u.says("201", "PUT", finish(at, d), nil)
		},
		"PATCH, as skopeo": func(data []byte, d digest.Digest) *answer {
			at := u.at(u.says("202", "PATCH", u.begin(), whole(data)), len(data))
			return u.says("201", "PUT", finish(at, d), http.NoBody, "Content-Type", "application/octet-stream")
		},
		"chunks": func(data []byte, d digest.Digest) *answer {
			at := u.begin()
			for from, n := 0, len(data)/3+1; from < len(data); from += n {
				to := min(from+n, len(data))
				at = u.at(u.says("202", "PATCH", at, bytes.NewReader(data[from:to]), "Content-Range", fmt.Sprintf("%d-%d", from, to-1)), to)
				u.at(u.says("204", "GET", at, nil), to)
				u.at(u.says("204", "HEAD", at, nil), to)
			}
			return u.says("201", "PUT", finish(at, d), nil)
		},
		"chunks without lengths, the last one by PUT": func(data []byte, d digest.Digest) *answer {
			at, n := u.begin(), len(data)/3
			if n > 0 {
				u.at(u.says("202", "PATCH", at, chunked(data[:n]), "Content-Range", fmt.Sprintf("0-%d", n-1)), n)
				return u.says("201", "PUT", finish(at, d), chunked(data[n:]), "Content-Range", fmt.Sprintf("%d-%d", n, len(data)-1))
			}
			return u.says("201", "PUT", finish(at, d), chunked(data))
		},
		"with an algorithm": func(data []byte, d digest.Digest) *answer {
			at := u.at(u.says("202", "POST", "blobs/uploads/?digest-algorithm="+d.Algorithm().String(), nil), 0)
			return u.says("201", "PUT", finish(at, d), whole(data))
		},
	} {
		for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512, digest.SHA384} {
			for _, size := range []int{0, 1, 5_000, 300_000, 3_000_000} {
				data := regtest.Random(fmt.Sprint(name, algorithm, size), size).Data
				d := algorithm.FromBytes(data)
				if u.has(do(data, d), d, data); t.Failed() {
					t.Fatalf("%s of %d bytes, %s", name, size, algorithm)
				}
				// Under sha256 it is there, too, as registry:2 has it.
				u.keeps(digest.FromBytes(data), data)
				if files := kept(m.dir, digest.FromBytes(data)); len(files) != 1 {
					t.Errorf("%q", files)
				}
			}
		}
	}
}

// TestUploadRules: what is refused, how, and how the client can go on.
func TestUploadRules(t *testing.T) {
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	data := regtest.Random("rules", 300_000).Data
	d := digest.FromBytes(data)
	part := func(from, to int) (io.Reader, string, string) {
		return bytes.NewReader(data[from:to]), "Content-Range", fmt.Sprintf("%d-%d", from, to-1)
	}
	at := u.begin()
	refuse := func(status, method, to string, body io.Reader, end int, header ...string) {
		t.Helper()
		u.at(u.says(status, method, to, body, header...), end)
		u.at(u.says("204", "GET", at, nil), end)
	}
	body, name, value := part(100_000, 200_000)
	refuse("416 BLOB_UPLOAD_INVALID", "PATCH", at, body, 0, name, value)
	body, name, value = part(0, 100_000)
	u.at(u.says("202", "PATCH", at, body, name, value), 100_000)
	body, name, value = part(0, 100_000) // again
	refuse("416 BLOB_UPLOAD_INVALID", "PATCH", at, body, 100_000, name, value)
	body, name, value = part(200_000, 300_000)
	refuse("416 BLOB_UPLOAD_INVALID", "PUT", finish(at, d), body, 100_000, name, value)
	for _, odd := range []string{"", "x", "0", "-", "5-", "-5", "bytes 100000-199999/300000", "bytes=100000-199999", "100000-199999/*", "199999-100000", " 100000-199999x", "1e5-199999", "99999999999999999999-199999999999999999999", "100000-9223372036854775807", strings.Repeat("1", 1000) + "-1"} {
		body, name, _ = part(100_000, 200_000)
		refuse("400 BLOB_UPLOAD_INVALID", "PATCH", at, body, 100_000, name, odd)
	}
	body, name, value = part(100_000, 200_000)
	refuse("400 BLOB_UPLOAD_INVALID", "PATCH", at, body, 100_000, name, value, name, value)
	body, name, _ = part(100_000, 200_000)
	refuse("400 SIZE_INVALID", "PATCH", at, body, 100_000, name, "100000-199998")
	for _, digest := range []string{"", "sha256:", "sha256:baddigeststring", "md5:d41d8cd98f00b204e9800998ecf8427e", strings.ToUpper(d.String()), d.Encoded(), strings.Repeat("a", 5000)} {
		refuse("400 DIGEST_INVALID", "PUT", at+"?digest="+url.QueryEscape(digest), bytes.NewReader(data[100_000:]), 100_000)
	}
	refuse("400 DIGEST_INVALID", "PUT", at, bytes.NewReader(data[100_000:]), 100_000)
	// A chunk without a length that is not what its range says: what fits stays.
	body, name, value = part(100_000, 150_000)
	refuse("400 SIZE_INVALID", "PATCH", at, chunked(data[100_000:200_000]), 150_000, name, value)
	body, name, value = part(150_000, 300_000)
	refuse("400 SIZE_INVALID", "PATCH", at, chunked(data[150_000:200_000]), 200_000, name, value)
	u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", strings.Replace(at, "apps/web", "apps/other", 1), nil)
	u.says("404 BLOB_UPLOAD_UNKNOWN", "PATCH", strings.Replace(at, "apps/web", "apps/other", 1), bytes.NewReader(data))
	u.has(u.says("201", "PUT", finish(at, d), bytes.NewReader(data[200_000:]), "Content-Range", "200000-299999"), d, data)
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		u.says("404 BLOB_UPLOAD_UNKNOWN", method, finish(at, d), nil)
	}

	other := digest.FromBytes(data[1:])
	at = u.begin()
	u.says("400 DIGEST_INVALID", "PUT", finish(at, other), bytes.NewReader(data))
	u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
	u.says("400 DIGEST_INVALID", "POST", finish("blobs/uploads/", other), bytes.NewReader(data))
	u.says("400 DIGEST_INVALID", "POST", finish("blobs/uploads/", digest.SHA512.FromBytes(data[1:])), bytes.NewReader(data))
	u.says("400 DIGEST_INVALID", "POST", "blobs/uploads/?digest=sha256:x", bytes.NewReader(data))
	u.says("400 DIGEST_INVALID", "POST", "blobs/uploads/?digest-algorithm=md5", nil)
	u.lacks(other)

	at = u.begin()
	u.says("202", "PATCH", at, bytes.NewReader(data))
	u.says("204", "DELETE", at, nil)
	u.says("404 BLOB_UPLOAD_UNKNOWN", "DELETE", at, nil)
	for _, id := range []string{"x", "..", "%2e%2e", "0123456789abcdef0123456789abcdeF", strings.Repeat("0", 33), "0123456789abcdef0123456789abcd%2f"} {
		u.says("404", "GET", "blobs/uploads/"+id, nil)
	}
	u.says("405", "DELETE", "blobs/uploads/", nil)
	u.says("405", "POST", at, nil)
	if left := spooled(m.dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestUploadNamedAsWritten: the Location has the name that the client wrote.
func TestUploadNamedAsWritten(t *testing.T) {
	m := start(t, "", "hosted apps/**\nshadow_default\naccess {\nallow any to anyone\n}")
	u := uploader{m, "apps/blobs/uploads"}
	data := []byte("a repository may be called so")
	d := digest.FromBytes(data)
	host := strings.TrimPrefix(m.URL, "http://")
	at := u.at(u.says("202", "POST", "blobs/uploads/?ns="+url.QueryEscape(host), nil), 0)
	u.has(u.says("201", "PUT", finish(at, d)+"&ns="+url.QueryEscape(host), bytes.NewReader(data)), d, data)
	// What is mirrored is pushed to its registry, and not here.
	for _, to := range []string{"/v2/library/x/blobs/uploads/", "/v2/apps/web/blobs/uploads/?ns=docker.io", "/v2/docker.io/apps/web/blobs/uploads/"} {
		u.says("405 UNSUPPORTED", "POST", to, bytes.NewReader(data))
	}
}

// TestMount: a blob is taken over from a repository that has it and that the
// caller may pull from, and otherwise uploaded.
func TestMount(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image, other := regtest.NewImage("mirrored", regtest.Random("mirrored", 100_000)), regtest.NewImage("other", regtest.Random("other", 1000))
	up.Push("library/x", image, "latest")
	up.Push("library/x", other, "other")
	m := start(t, upstreamFor("docker.io", up), "")
	if err := m.load(upstreamFor("docker.io", up), "default off\nhosted apps/** secret/**\naccess {\nallow push to anyone\ndeny pull to anyone on secret/**\nallow pull to anyone\n}"); err != nil {
		t.Fatal(err)
	}
	data := regtest.Random("mounted", 200_000).Data
	d := digest.FromBytes(data)
	a, b, secret := uploader{m, "apps/a"}, uploader{m, "apps/b"}, uploader{m, "secret/x"}
	hidden := []byte("nobody may pull this")
	h := digest.FromBytes(hidden)
	a.has(a.says("201", "POST", finish("blobs/uploads/", d), bytes.NewReader(data)), d, data)
	secret.says("201", "POST", finish("blobs/uploads/", h), bytes.NewReader(hidden))
	mount := func(d digest.Digest, from string) string {
		to := "blobs/uploads/?mount=" + url.QueryEscape(d.String())
		if from != "" {
			to += "&from=" + url.QueryEscape(from)
		}
		return to
	}
	layer := image.Blobs[1]
	m.want(200, "GET", "/v2/docker.io/library/x/manifests/other")
	m.want(200, "GET", "/v2/docker.io/library/x/manifests/latest")
	m.want(200, "GET", "/v2/docker.io/library/x/blobs/"+layer.Digest.String())
	for what, to := range map[string]string{
		"no such repository":        mount(d, "apps/none"),
		"nothing of the kind":       mount(digest.FromString("x"), "apps/a"),
		"nothing anywhere":          mount(digest.FromString("x"), ""),
		"no digest":                 mount("sha256:x", "apps/a"),
		"no name":                   mount(d, "Apps/A"),
		"not to be pulled":          mount(h, "secret/x"),
		"not to be pulled, unnamed": mount(h, ""),
		"not held":                  mount(other.Blobs[1].Digest, "docker.io/library/x"),
		"out of the tree":           mount(d, "../a"),
	} {
		at := b.at(b.says("202", "POST", to, nil), 0)
		b.says("204", "DELETE", at, nil)
		if t.Failed() {
			t.Fatal(what)
		}
	}
	b.says("404", "GET", "blobs/"+h.String(), nil)
	b.has(b.says("201", "POST", mount(d, "apps/a"), nil), d, data)
	b.has(b.says("201", "POST", mount(d, "apps/b"), nil), d, data)
	b.has(b.says("201", "POST", mount(layer.Digest, "docker.io/library/x"), nil), layer.Digest, layer.Data)
	// Without from, once the catalog knows of it.
	c := uploader{m, "apps/c"}
	eventually(t, "a mount from anywhere", func() bool {
		a := c.ask("POST", mount(d, ""), nil)
		if a.StatusCode == 202 {
			c.says("204", "DELETE", c.at(a, 0), nil)
		}
		return a.StatusCode == 201
	})
	c.keeps(d, data)
	// What was mounted does not go with what it was mounted from.
	if err := os.RemoveAll(filepath.Join(m.dir, "docker/registry/v2/repositories/apps/a")); err != nil {
		t.Fatal(err)
	}
	b.keeps(d, data)
}

// TestUploadGoesOn: an upload goes on after a reload, a restart, at another site
// of the store, and by a second client.
func TestUploadGoesOn(t *testing.T) {
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	data := regtest.Random("on", 1_000_000).Data
	d := digest.FromBytes(data)
	at := u.at(u.says("202", "PATCH", u.begin(), bytes.NewReader(data[:100_000])), 100_000)

	// One request lasts over a reload.
	conn, answers := u.sending("PATCH", at, data[100_000:200_000], "Content-Range", "100000-299999", "Content-Length", "200000")
	if err := m.load("gc off\n", openToAll); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(data[200_000:300_000]); err != nil {
		t.Fatal(err)
	}
	if resp, err := http.ReadResponse(answers, nil); err != nil || resp.StatusCode != 202 {
		t.Fatalf("%v, %v", resp, err)
	}
	u.at(u.says("204", "GET", at, nil), 300_000)

	m.stop()
	if err := m.load("", openToAll); err != nil {
		t.Fatal(err)
	}
	u.at(u.says("204", "GET", at, nil), 300_000)
	u.at(u.says("202", "PATCH", at, bytes.NewReader(data[300_000:400_000])), 400_000)

	second := "http://" + regtest.FreeAddress(t)
	adapted, err := adapt(fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage disk %s {\n min_free 1MB\n }\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}", m.dir, m.URL, openToAll, second, openToAll))
	if err == nil {
		err = m.loadJSON(adapted)
	}
	if err != nil {
		t.Fatal(err)
	}
	there := uploader{&mirror{t: t, URL: second, dir: m.dir}, u.name}
	there.at(there.says("202", "PATCH", at, bytes.NewReader(data[400_000:500_000])), 500_000)
	u.has(u.says("201", "PUT", finish(at, d), bytes.NewReader(data[500_000:])), d, data)
	there.keeps(d, data)
}

// raw sends the head of a request, and so much of its body, over a connection of
// its own.
func (u uploader) raw(method, to string, body []byte, header ...string) net.Conn {
	u.t.Helper()
	host := strings.TrimPrefix(u.URL, "http://")
	conn, err := net.Dial("tcp", host)
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if !strings.HasPrefix(to, "/") {
		to = "/v2/" + u.name + "/" + to
	}
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\n", method, to, host)
	for i := 0; i < len(header); i += 2 {
		fmt.Fprintf(conn, "%s: %s\r\n", header[i], header[i+1])
	}
	if _, err := fmt.Fprintf(conn, "\r\n%s", body); err != nil {
		u.t.Fatal(err)
	}
	return conn
}

// sending is raw for a request whose body is being read: some of it is sent once
// the server has asked for it.
func (u uploader) sending(method, to string, body []byte, header ...string) (net.Conn, *bufio.Reader) {
	u.t.Helper()
	conn := u.raw(method, to, nil, append(header, "Expect", "100-continue")...)
	answers := bufio.NewReader(conn)
	for _, want := range []string{"HTTP/1.1 100 Continue\r\n", "\r\n"} {
		if line, err := answers.ReadString('\n'); err != nil || line != want {
			u.t.Fatalf("%q, %v", line, err)
		}
	}
	if _, err := conn.Write(body); err != nil {
		u.t.Fatal(err)
	}
	return conn, answers
}

// TestUploadCut: whatever step a client goes away in, nothing of it is seen, and
// what has come stays for it to go on.
func TestUploadCut(t *testing.T) {
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	for _, came := range []int{0, 5_000, 40_000, 700_000} {
		for i, end := range []func(net.Conn, *bufio.Reader){
			func(c net.Conn, _ *bufio.Reader) { c.Close() },
			func(c net.Conn, _ *bufio.Reader) { c.(*net.TCPConn).SetLinger(0); c.Close() },
			func(c net.Conn, answers *bufio.Reader) { // and waits for what is said
				c.(*net.TCPConn).CloseWrite()
				if resp, err := http.ReadResponse(answers, nil); err != nil || resp.StatusCode != 400 {
					t.Errorf("half a body: %v, %v", resp, err)
				}
			},
		} {
			for _, method := range []string{"POST", "PATCH", "PUT"} {
				data := regtest.Random(fmt.Sprint("cut", came, i, method), 1_500_000).Data
				d := digest.FromBytes(data)
				length := fmt.Sprint(len(data))
				if method == "POST" { // nobody can go on with it
					end(u.sending("POST", finish("blobs/uploads/", d), data[:came], "Content-Length", length))
					eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
					u.lacks(d)
					continue
				}
				at := u.begin()
				end(u.sending(method, finish(at, d), data[:came], "Content-Length", length))
				u.lacks(d)
				// This waits until the end has been noticed.
				a := u.says("202", "PATCH", at, http.NoBody)
				last := 0
				if _, err := fmt.Sscanf(a.Header.Get("Range"), "0-%d", &last); err != nil {
					t.Fatal(err)
				}
				if last > 0 {
					last++
				}
				if last > came || i == 2 && last != came {
					t.Fatalf("%d bytes came, and it ends at %d", came, last)
				}
				u.keepsOn(at, d, data, last)
			}
		}
	}
	eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
}

// keepsOn finishes an upload that ends at an offset.
func (u uploader) keepsOn(at string, d digest.Digest, data []byte, end int) {
	u.t.Helper()
	a := u.says("201", "PUT", finish(at, d), bytes.NewReader(data[end:]), "Content-Range", fmt.Sprintf("%d-%d", end, len(data)-1))
	if a.Header.Get("Docker-Content-Digest") != d.String() {
		u.t.Error(a.Header)
	}
	u.keeps(d, data)
}

// TestUploadTakenOver: a client whose connection hangs goes on over another.
func TestUploadTakenOver(t *testing.T) {
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	data := regtest.Random("taken", 2_000_000).Data
	for _, c := range []struct {
		method string
		came   int
	}{{"PATCH", 600_000}, {"PUT", 600_001}, {"PATCH", 0}} {
		data := data[:len(data)-c.came]
		d := digest.FromBytes(data)
		at := u.begin()
		_, answers := u.sending(c.method, finish(at, d), data[:c.came], "Content-Length", fmt.Sprint(len(data)))
		u.says("202", "PATCH", at, http.NoBody)
		// The first one is told so, if it listens.
		resp, err := http.ReadResponse(answers, nil)
		if err != nil || resp.StatusCode != 416 {
			t.Errorf("the one before: %v, %v", resp, err)
		}
		end := 0
		fmt.Sscanf(u.says("204", "GET", at, nil).Header.Get("Range"), "0-%d", &end)
		if end > 0 {
			end++
		}
		if end > c.came {
			t.Fatalf("it ends at %d", end)
		}
		u.keepsOn(at, d, data, end)
	}
	if left := spooled(m.dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestUploadRefusedUnread: what will not be taken is refused before it is sent,
// to those who wait for that, and to those who do not.
func TestUploadRefusedUnread(t *testing.T) {
	m := start(t, "", "")
	at := ""
	for _, c := range []struct{ name, app, site, status, code string }{
		{"no room", "storage disk DIR {\n min_free 99.99%\n}", openToAll, "507", "DENIED"},
		{"no budget", "storage disk DIR {\n min_free 1MB\n max_size 30MiB\n}", openToAll, "507", "DENIED"},
		{"too large", "storage disk DIR {\n min_free 1MB\n max_blob_size 30MiB\n}", openToAll, "413", "SIZE_INVALID"},
		{"not allowed", "", "default off\nhosted apps/**\naccess {\nallow pull to anyone\n}", "403", "DENIED"},
		{"not hosted", "", "default off", "404", "NAME_UNKNOWN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if at == "" {
				if err := m.load("", openToAll); err != nil {
					t.Fatal(err)
				}
				at = uploader{m, "apps/web"}.begin()
			}
			m.t = t
			m.stop() // a reload would reset connections
			if err := m.load(strings.ReplaceAll(c.app, "DIR", m.dir), c.site); err != nil {
				t.Fatal(err)
			}
			u := uploader{m, "apps/web"}
			if c.name == "no budget" { // which needs the catalog
				eventually(t, "the budget to be known", func() bool {
					conn := u.raw("PATCH", at, nil, "Content-Length", "40000000", "Expect", "100-continue")
					defer conn.Close()
					resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
					return err == nil && resp.StatusCode == 507
				})
			}
			d := digest.FromString("x")
			for _, to := range [][2]string{{"PATCH", at}, {"PUT", finish(at, d)}, {"POST", finish("blobs/uploads/", d)}} {
				conn := u.raw(to[0], to[1], nil, "Content-Length", "40000000", "Expect", "100-continue")
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil || fmt.Sprint(resp.StatusCode) != c.status {
					t.Errorf("%s that waits: %v, %v", to[0], resp, err)
				} else if body, _ := io.ReadAll(resp.Body); c.name == "no room" && (!bytes.Contains(body, []byte("lower min_free")) || bytes.Contains(body, []byte("max_size"))) {
					t.Errorf("no remedy, or a wrong one: %s", body)
				}
				// One who sends all the same gets an answer, or sees the
				// connection end: it does not hang.
				conn = u.raw(to[0], to[1], nil, "Content-Length", "40000000")
				sent := make(chan error, 1)
				go func() {
					_, err := io.Copy(conn, io.LimitReader(endless{}, 40_000_000))
					sent <- err
				}()
				resp, err = http.ReadResponse(bufio.NewReader(conn), nil)
				if err == nil {
					body, _ := io.ReadAll(resp.Body)
					if fmt.Sprint(resp.StatusCode) != c.status || !strings.Contains(string(body), c.code) {
						t.Errorf("%s: %d %s", to[0], resp.StatusCode, body)
					}
				} else if os.IsTimeout(err) {
					t.Errorf("%s: %v", to[0], err)
				}
				if err := <-sent; os.IsTimeout(err) {
					t.Errorf("%s: sending hangs: %v", to[0], err)
				}
			}
		})
	}
	m.t = t
	m.stop()
	if err := m.load("", openToAll); err != nil {
		t.Fatal(err)
	}
	u := uploader{m, "apps/web"}
	u.at(u.says("204", "GET", at, nil), 0)
	data := []byte("and the upload is as good as ever")
	u.has(u.says("201", "PUT", finish(at, digest.FromBytes(data)), bytes.NewReader(data)), digest.FromBytes(data), data)
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestUploadDiskFull: a disk that is full though nobody knew is told of, and the
// upload goes on when there is room.
func TestUploadDiskFull(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Log("there is no device that is always full here")
		return
	}
	m := start(t, "", openToAll)
	u := uploader{m, "apps/web"}
	data := regtest.Random("full", 2_000_000).Data
	d := digest.FromBytes(data)
	at := u.begin()
	file := filepath.Join(m.dir, "mirror/spool/uploads", filepath.Base(at))
	if err := os.Symlink("/dev/full", file); err != nil {
		t.Fatal(err)
	}
	u.says("507 DENIED", "PATCH", at, bytes.NewReader(data))
	u.lacks(d)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	u.at(u.says("204", "GET", at, nil), 0)
	u.has(u.says("201", "PUT", finish(at, d), bytes.NewReader(data)), d, data)
}

// TestRefusalReachesSender: a client that is sending its body finds the answer, whole,
// and the end of the connection behind it: not a reset, which may take the answer with
// it.
func TestRefusalReachesSender(t *testing.T) {
	m := start(t, "", "")
	m.stop()
	if err := m.load("storage disk "+m.dir+" {\n max_blob_size 1MiB\n}\nhosted apps/** {\n max_manifest_size 1MiB\n}", openToAll); err != nil {
		t.Fatal(err)
	}
	u := uploader{m, "apps/web"}
	at := u.begin()
	for _, c := range [][]string{
		{"PUT", "manifests/v1", "Content-Length", "40000000"},
		{"PATCH", at, "Content-Length", "40000000"},
		{"PUT", finish(at, digest.FromString("x")), "Content-Length", "40000000"},
		{"PUT", "manifests/v1", "Transfer-Encoding", "chunked"},
	} {
		conn := u.raw(c[0], c[1], nil, c[2:]...)
		body := bytes.Repeat([]byte("x"), 2_000_000)
		if c[2] == "Transfer-Encoding" {
			fmt.Fprintf(conn, "%x\r\n", len(body))
		}
		conn.Write(body) // as far as the server lets it
		answer, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 413 ") || !bytes.Contains(answer, []byte(`"SIZE_INVALID"`)) {
			t.Errorf("%q: %q, %v", c, answer, err)
		}
	}
}
