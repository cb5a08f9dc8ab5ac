package api_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/api"
)

// metadata is an Upload-Metadata header.
func metadata(pairs ...string) string {
	var all []string
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, pairs[i]+" "+base64.StdEncoding.EncodeToString([]byte(pairs[i+1])))
	}
	return strings.Join(all, ",")
}

// tus sends a request of the protocol.
func (s *server) tus(method, path string, body []byte, header ...string) answer {
	s.t.Helper()
	var b any
	if body != nil {
		b, header = body, append([]string{"Content-Type", "application/offset+octet-stream"}, header...)
	}
	return s.ask(method, path, b, append([]string{"Tus-Resumable", "1.0.0"}, header...)...)
}

// begin begins an upload, and returns its address.
func (s *server) begin(size int, pairs ...string) string {
	s.t.Helper()
	a := s.tus("POST", "/v1/uploads", nil, "Upload-Length", strconv.Itoa(size), "Upload-Metadata", metadata(pairs...))
	a.is(s.t, http.StatusCreated)
	if _, err := http.ParseTime(a.Header.Get("Upload-Expires")); err != nil {
		s.t.Errorf("Upload-Expires: %v", err)
	}
	return a.location(s.t, "Location")
}

func (s *server) offset(upload string) int {
	s.t.Helper()
	a := s.tus("HEAD", upload, nil)
	a.is(s.t, http.StatusOK)
	n, err := strconv.Atoi(a.Header.Get("Upload-Offset"))
	if err != nil || a.Header.Get("Cache-Control") != "no-store" {
		s.t.Fatalf("%v, %v", a.Header, err)
	}
	return n
}

func TestTus(t *testing.T) {
	s := serve(t, api.Site{APIToken: secret, MaxImage: 1 << 20})
	options := s.want(http.StatusOK, "OPTIONS", "/v1/uploads", nil)
	for name, want := range map[string]string{"Tus-Version": "1.0.0", "Tus-Max-Size": "1048576", "Tus-Extension": "creation,creation-with-upload,termination,expiration", "Access-Control-Allow-Origin": ""} {
		if got := options.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	s.tus("POST", "/v1/uploads", nil, "Upload-Length", "512", "Upload-Metadata", metadata("name", "x")).refused(t, 401, "unauthorized")
	s.bearer = secret
	data := disk("tus", 200)
	upload := s.begin(len(data), "name", "debian", "version", "12", "tag", "latest", "filename", "debian.img")
	if !strings.HasPrefix(upload, s.url+"/v1/uploads/") {
		t.Errorf("Location: %s", upload)
	}
	if n := s.offset(upload); n != 0 {
		t.Errorf("offset %d", n)
	}
	a := s.tus("PATCH", upload, data[:1000], "Upload-Offset", "0")
	a.is(t, http.StatusNoContent)
	if a.Header.Get("Upload-Offset") != "1000" || a.Header.Get("Upload-Expires") == "" || s.offset(upload) != 1000 {
		t.Errorf("%v", a.Header)
	}
	s.bearer = ""
	for _, method := range []string{"HEAD", "PATCH", "DELETE"} {
		s.tus(method, upload, nil, "Upload-Offset", "1000").refused(t, 401, "unauthorized")
	}
	s.bearer = secret
	s.tus("PATCH", upload, data[:1], "Upload-Offset", "0").refused(t, 409, "offset_conflict")
	s.tus("PATCH", upload, append(data, 1), "Upload-Offset", "1000").refused(t, 413, backing.TooLarge)
	s.ask("PATCH", upload, data[1000:], "Tus-Resumable", "1.0.0", "Upload-Offset", "1000", "Content-Type", "text/plain").refused(t, 415, "unsupported_media_type")
	old := s.ask("PATCH", upload, data[1000:], "Upload-Offset", "1000", "Content-Type", "application/offset+octet-stream")
	old.refused(t, 412, "tus_version")
	if old.Header.Get("Tus-Version") != "1.0.0" {
		t.Errorf("%v", old.Header)
	}
	s.ask("GET", upload, nil).refused(t, 405, "method_not_allowed")
	a = s.tus("PATCH", upload, data[1000:], "Upload-Offset", "1000")
	a.is(t, http.StatusNoContent)
	version := a.location(t, "Backing-Image-Location")
	if version != s.url+"/v1/backing-images/debian/versions/12" {
		t.Errorf("Backing-Image-Location: %s", version)
	}
	s.wantFile(s.want(http.StatusOK, "GET", version, nil).version(t), data)
	s.want(http.StatusOK, "GET", "/v1/backing-images/debian/tags/latest", nil)
	// Whoever has missed that answer learns the same.
	a = s.tus("HEAD", upload, nil)
	a.is(t, http.StatusOK)
	if a.Header.Get("Upload-Offset") != strconv.Itoa(len(data)) || a.location(t, "Backing-Image-Location") != version {
		t.Errorf("%v", a.Header)
	}
	s.tus("PATCH", upload, nil, "Upload-Offset", strconv.Itoa(len(data))).is(t, http.StatusNoContent)
	s.bearer = ""
	s.tus("HEAD", upload, nil).refused(t, 401, "unauthorized")
}

func TestTusWithTheFirstBytes(t *testing.T) {
	s := open(t)
	data := disk("at once", 10)
	for _, path := range []string{"/v1/uploads", "/v1/uploads/"} {
		a := s.tus("POST", path, data, "Upload-Length", strconv.Itoa(len(data)), "Upload-Metadata", metadata("name", "debian"))
		a.is(t, http.StatusCreated)
		if to := a.location(t, "Backing-Image-Location"); to != s.url+"/v1/backing-images/debian/versions/v1" {
			t.Errorf("%s: %s", path, to)
		}
		if to := a.location(t, "Location"); !strings.HasPrefix(to, s.url+"/v1/uploads/") {
			t.Errorf("%s: %s", path, to)
		}
	}
}

func TestTusIsRefused(t *testing.T) {
	s := serve(t, api.Site{APIToken: secret, MaxImage: 1 << 20})
	s.bearer = secret
	for what, c := range map[string]struct {
		length, metadata string
		status           int
		code             backing.Code
	}{
		"no name":    {"512", "", 400, backing.Malformed},
		"bad name":   {"512", metadata("name", "X"), 400, backing.Malformed},
		"field":      {"512", metadata("name", "x", "colour", "red"), 400, backing.Malformed},
		"no length":  {"", metadata("name", "x"), 400, backing.Malformed},
		"length":     {"-1", metadata("name", "x"), 400, backing.Malformed},
		"large":      {"1048577", metadata("name", "x"), 413, backing.TooLarge},
		"long field": {"512", metadata("name", strings.Repeat("x", 20<<10)), 400, backing.Malformed},
	} {
		t.Run(what, func(t *testing.T) {
			s.tus("POST", "/v1/uploads", nil, "Upload-Length", c.length, "Upload-Metadata", c.metadata).refused(t, c.status, c.code)
		})
	}
	// What the gate refuses is gone.
	data := disk("refused", 3)
	upload := s.begin(len(data), "name", "x", "sha512", sum512(nil))
	s.tus("PATCH", upload, data, "Upload-Offset", "0").refused(t, 422, backing.ChecksumMismatch)
	s.tus("HEAD", upload, nil).refused(t, 404, backing.NotFound)
	// So is what the client ends.
	upload = s.begin(len(data), "name", "x")
	s.tus("DELETE", upload, nil).is(t, http.StatusNoContent)
	for _, method := range []string{"HEAD", "PATCH", "DELETE"} {
		s.tus(method, upload, nil, "Upload-Offset", "0").refused(t, 404, backing.NotFound)
	}
	s.want(http.StatusNotFound, "GET", "/v1/backing-images/x", nil)
}

// TestTusIsCut: an upload whose connection breaks anywhere goes on from there.
func TestTusIsCut(t *testing.T) {
	s := open(t)
	front, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 5 {
		data := disk(fmt.Sprint("cut", round), 2000)
		upload := s.begin(len(data), "name", "cut", "sha512", sum512(data))
		for cut := 0; ; cut++ {
			at := s.offset(upload)
			if at == len(data) {
				break
			}
			if cut == 20 { // enough of it: the rest at once
				s.tus("PATCH", upload, data[at:], "Upload-Offset", strconv.Itoa(at)).is(t, http.StatusNoContent)
				continue
			}
			conn, err := net.Dial("tcp", front.Host)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nTus-Resumable: 1.0.0\r\nContent-Type: application/offset+octet-stream\r\nUpload-Offset: %d\r\nContent-Length: %d\r\n\r\n",
				strings.TrimPrefix(upload, "http://"+front.Host), secret, at, len(data)-at)
			conn.Write(data[at : at+random.IntN(min(100_000, len(data)-at))])
			// The server has read it all before it says that there is not more of it.
			conn.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, conn)
			conn.Close()
		}
		v := s.want(http.StatusOK, "GET", s.tus("HEAD", upload, nil).location(t, "Backing-Image-Location"), nil).version(t)
		if got := s.want(http.StatusOK, "GET", file(v), nil).body; !bytes.Equal(got, data) {
			t.Errorf("round %d: %d bytes, and not those that were sent", round, len(got))
		}
	}
}

// TestTusEndsWhatIsLost: where an upload ends stays as a client is told, though the
// request that it has lost is still there, and has more to say.
func TestTusEndsWhatIsLost(t *testing.T) {
	s := open(t)
	front, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	data := disk("lost", 2000)
	upload := s.begin(len(data), "name", "lost", "sha512", sum512(data))
	conn, err := net.Dial("tcp", front.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nAuthorization: Bearer %s\r\nTus-Resumable: 1.0.0\r\nContent-Type: application/offset+octet-stream\r\nUpload-Offset: 0\r\nContent-Length: %d\r\n\r\n",
		strings.TrimPrefix(upload, "http://"+front.Host), secret, len(data))
	// Which is said once the upload is that request's to write.
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "100") {
		t.Fatalf("%q, %v", line, err)
	}
	conn.Write(data[:300_000])
	at := s.offset(upload)
	conn.Write(data[300_000:600_000])
	s.tus("PATCH", upload, data[at:], "Upload-Offset", strconv.Itoa(at)).is(t, http.StatusNoContent)
	v := s.want(http.StatusOK, "GET", s.tus("HEAD", upload, nil).location(t, "Backing-Image-Location"), nil).version(t)
	if got := s.want(http.StatusOK, "GET", file(v), nil).body; !bytes.Equal(got, data) {
		t.Errorf("%d bytes, and not those that were sent", len(got))
	}
}
