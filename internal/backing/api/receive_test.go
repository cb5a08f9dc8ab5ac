package api_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/oci"
)

// form is a form with fields in that order; the one of name file is a file.
func form(fields ...[2]string) (body []byte, mediaType string) {
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for _, f := range fields {
		if f[0] == "file" {
			part, _ := w.CreateFormFile("file", "disk.img")
			io.WriteString(part, f[1])
		} else {
			w.WriteField(f[0], f[1])
		}
	}
	w.Close()
	return b.Bytes(), w.FormDataContentType()
}

func (s *server) post(fields ...[2]string) answer {
	s.t.Helper()
	body, mediaType := form(fields...)
	return s.ask("POST", "/v1/backing-images", body, "Content-Type", mediaType)
}

func permutations(fields [][2]string) (all [][][2]string) {
	if len(fields) == 0 {
		return [][][2]string{nil}
	}
	for i := range fields {
		rest := append(append([][2]string{}, fields[:i]...), fields[i+1:]...)
		for _, p := range permutations(rest) {
			all = append(all, append([][2]string{fields[i]}, p...))
		}
	}
	return all
}

func TestFormInAnyOrder(t *testing.T) {
	s := open(t)
	for i, fields := range permutations([][2]string{{"name", ""}, {"version", "2026-03"}, {"sha512", ""}, {"file", ""}}) {
		data := disk(fmt.Sprint(i), 40)
		name := fmt.Sprintf("image-%d", i)
		for j := range fields {
			switch fields[j][0] {
			case "name":
				fields[j][1] = name
			case "sha512":
				fields[j][1] = sum512(data)
			case "file":
				fields[j][1] = string(data)
			}
		}
		a := s.post(fields...)
		a.is(t, http.StatusCreated)
		v := s.want(http.StatusOK, "GET", a.location(t, "Location"), nil).version(t)
		if v.Name != name || v.Version != "2026-03" || v.State != backing.Ready {
			t.Errorf("%v: %+v", fields, v)
		}
		s.wantFile(v, data)
	}
}

func TestFormsThatAreRefused(t *testing.T) {
	s := serve(t, api.Site{APIToken: secret, MaxImage: 64 << 10})
	s.bearer = secret
	file := [2]string{"file", string(disk("f", 8))}
	for what, c := range map[string]struct {
		fields [][2]string
		status int
		code   backing.Code
	}{
		"no file":      {[][2]string{{"name", "x"}}, 400, backing.Malformed},
		"no name":      {[][2]string{file}, 400, backing.Malformed},
		"two files":    {[][2]string{{"name", "x"}, file, file}, 400, backing.Malformed},
		"two names":    {[][2]string{{"name", "x"}, {"name", "y"}, file}, 400, backing.Malformed},
		"bad name":     {[][2]string{{"name", "X/y"}, file}, 400, backing.Malformed},
		"bad version":  {[][2]string{{"name", "x"}, file, {"version", "a b"}}, 400, backing.Malformed},
		"bad checksum": {[][2]string{file, {"name", "x"}, {"sha512", "12"}}, 400, backing.Malformed},
		"other field":  {[][2]string{file, {"name", "x"}, {"colour", "red"}}, 400, backing.Malformed},
		"wrong sum":    {[][2]string{file, {"name", "x"}, {"sha256", sum256(nil)}}, 422, backing.ChecksumMismatch},
		"long field":   {[][2]string{{"name", strings.Repeat("x", 70<<10)}, file}, 413, backing.TooLarge},
		"large file":   {[][2]string{{"name", "x"}, {"file", string(disk("large", 129))}}, 413, backing.TooLarge},
	} {
		t.Run(what, func(t *testing.T) { s.post(c.fields...).refused(t, c.status, c.code) })
	}
	// A form that breaks off is no image.
	body, mediaType := form([2]string{"name", "x"}, file)
	for _, n := range []int{len(body) - 3, len(body) / 2, 60} {
		s.ask("POST", "/v1/backing-images", body[:n], "Content-Type", mediaType).refused(t, 400, backing.Malformed)
	}
	s.want(http.StatusNotFound, "GET", "/v1/backing-images/x", nil)
	s.ask("POST", "/v1/backing-images", []byte("x"), "Content-Type", "text/plain").refused(t, 415, "unsupported_media_type")
	s.ask("POST", "/v1/backing-images", []byte("x")).refused(t, 415, "unsupported_media_type")
}

func TestPut(t *testing.T) {
	s := open(t)
	data := disk("put", 100)
	a := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/content?tag=latest&labels=os%3Ddebian&sha256="+sum256(data), data)
	if got := a.location(t, "Location"); got != s.url+"/v1/backing-images/debian/versions/v1" {
		t.Errorf("Location: %s", got)
	}
	s.wantFile(a.version(t), data)
	// The same bytes are the version that there is.
	if v := s.want(http.StatusOK, "PUT", "/v1/backing-images/debian/content", data).version(t); v.Version != "v1" {
		t.Errorf("%+v", v)
	}
	v := s.want(http.StatusCreated, "PUT", "/v1/backing-images/debian/versions/nightly/content", disk("other", 3)).version(t)
	if v.Version != "nightly" {
		t.Errorf("%+v", v)
	}
	for _, c := range []struct {
		path, header, value string
		status              int
		code                backing.Code
	}{
		{"debian/content?colour=red", "", "", 400, backing.Malformed},
		{"debian/content?tag=a&tag=b", "", "", 400, backing.Malformed},
		{"debian/content?sha512=12", "", "", 400, backing.Malformed},
		{"debian/content?decompress=rar", "", "", 400, backing.Malformed},
		{"debian/content", "Content-Range", "bytes 0-1/4", 400, backing.Malformed},
		{"debian/content", "Content-Encoding", "gzip", 415, "unsupported_media_type"},
		{"Debian/content", "", "", 400, backing.Malformed},
		{"debian/versions/-x/content", "", "", 400, backing.Malformed},
	} {
		var header []string
		if c.header != "" {
			header = []string{c.header, c.value}
		}
		s.ask("PUT", "/v1/backing-images/"+c.path, data, header...).refused(t, c.status, c.code)
	}
}

// TestRespondAsync: who prefers it is answered once everything has come, and a job makes
// the version.
func TestRespondAsync(t *testing.T) {
	s := open(t)
	data := disk("later", 3000)
	body, mediaType := form([2]string{"file", string(data)}, [2]string{"tag", "posted"}, [2]string{"name", "debian"})
	for tag, a := range map[string]answer{
		"put":    s.ask("PUT", "/v1/backing-images/debian/content?tag=put", data, "Prefer", "wait=5, Respond-Async; x=1"),
		"posted": s.ask("POST", "/v1/backing-images", body, "Content-Type", mediaType, "Prefer", "respond-async"),
	} {
		a.is(t, http.StatusAccepted)
		if a.Header.Get("Preference-Applied") != "respond-async" {
			t.Errorf("%s: %v", tag, a.Header)
		}
		job := s.ends(a.location(t, "Location"))
		if job.State != backing.Succeeded || job.Kind != "upload" || job.Version != "v1" {
			t.Errorf("%s: %+v", tag, job)
		}
		s.want(http.StatusOK, "GET", "/v1/backing-images/debian/tags/"+tag, nil)
		s.wantFile(s.want(http.StatusOK, "GET", "/v1/backing-images/debian/versions/v1", nil).version(t), data)
	}
	s.ask("PUT", "/v1/backing-images/debian/versions/put/content", data, "Prefer", "respond-async").refused(t, 409, backing.VersionConflict)
	a := s.ask("PUT", "/v1/backing-images/debian/content?sha256="+sum256(data), data[:512], "Prefer", "respond-async")
	a.is(t, http.StatusAccepted)
	if job := s.ends(a.location(t, "Location")); job.State != backing.JobFailed || job.Code != backing.ChecksumMismatch {
		t.Errorf("%+v", job)
	}
	// What is not asked for is not done.
	s.ask("PUT", "/v1/backing-images/debian/content", data, "Prefer", "return=minimal, respond-async-not").is(t, http.StatusOK)
}

// TestNothingIsReadBeforeTheChecks: a client that waits for 100 Continue hears why
// its file is not wanted, and has sent nothing.
func TestNothingIsReadBeforeTheChecks(t *testing.T) {
	s := serve(t, api.Site{APIToken: secret, MaxImage: 1 << 20})
	front, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		request string
		status  int
	}{
		{"PUT /images/v1/backing-images/x/content HTTP/1.1\r\nContent-Length: 512\r\n", 401},
		{"PUT /images/v1/backing-images/x/content HTTP/1.1\r\nAuthorization: Bearer " + secret + "\r\nContent-Length: 10485760\r\n", 413},
		{"POST /images/v1/backing-images HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n", 401},
		{"POST /images/v1/backing-images HTTP/1.1\r\nAuthorization: Bearer " + secret + "\r\nContent-Type: application/json\r\nContent-Length: 10485760\r\n", 413},
		{"POST /images/v1/uploads HTTP/1.1\r\nTus-Resumable: 1.0.0\r\nUpload-Length: 512\r\nUpload-Metadata: name eA==\r\nContent-Type: application/offset+octet-stream\r\nContent-Length: 512\r\n", 401},
		{"POST /images/v1/uploads HTTP/1.1\r\nAuthorization: Bearer " + secret + "\r\nTus-Resumable: 1.0.0\r\nUpload-Length: 10485760\r\nUpload-Metadata: name eA==\r\nContent-Type: application/offset+octet-stream\r\nContent-Length: 512\r\n", 413},
	} {
		conn, err := net.Dial("tcp", front.Host)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, c.request+"Host: x\r\nExpect: 100-continue\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", c.request, err)
		}
		if resp.StatusCode != c.status {
			t.Errorf("%q: %d, want %d", c.request, resp.StatusCode, c.status)
		}
		conn.Close()
	}
}

func TestWhoMayWrite(t *testing.T) {
	to := func(who string) []access.Who {
		w, err := access.ParseWho(who)
		if err != nil {
			t.Fatal(err)
		}
		return []access.Who{w}
	}
	alice := access.Rules{{Allow: true, Actions: access.Any, To: to("user:alice")}, {Allow: true, Actions: access.Pull}}
	closed := access.Rules{{Allow: true, Actions: access.Any, To: to("user:alice")}}
	data := disk("who", 2)
	for what, c := range map[string]struct {
		site         api.Site
		user, bearer string
		read, write  int
	}{
		"nobody has said":        {api.Site{}, "", "", 404, 403},
		"a name is not enough":   {api.Site{}, "token", "", 404, 403},
		"no token":               {api.Site{APIToken: secret}, "", "", 404, 401},
		"another token":          {api.Site{APIToken: secret}, "", secret + "x", 404, 401},
		"a name, and no token":   {api.Site{APIToken: secret}, "token", "", 404, 403},
		"the token":              {api.Site{APIToken: secret}, "", secret, 404, 201},
		"rules":                  {api.Site{Rules: alice}, "alice", "", 404, 201},
		"rules, somebody else":   {api.Site{Rules: alice}, "bob", "", 404, 403},
		"rules, anonymous":       {api.Site{Rules: alice}, "", "", 404, 403},
		"rules, token unnamed":   {api.Site{Rules: alice, APIToken: secret}, "", secret, 404, 403},
		"rules, no token":        {api.Site{Rules: alice, APIToken: secret}, "", "", 404, 401},
		"private, anonymous":     {api.Site{Rules: closed, APIToken: secret}, "", "", 401, 401},
		"private, somebody else": {api.Site{Rules: closed}, "bob", "", 403, 403},
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t, c.site)
			s.bearer = c.bearer
			read := s.ask("GET", "/v1/backing-images/x", nil, "X-User", c.user)
			read.is(t, c.read)
			write := s.ask("PUT", "/v1/backing-images/x/content", data, "X-User", c.user)
			write.is(t, c.write)
			body, mediaType := form([2]string{"file", string(data)}, [2]string{"name", "y"})
			s.ask("POST", "/v1/backing-images", body, "Content-Type", mediaType, "X-User", c.user).is(t, c.write)
			if asks := write.Header.Get("Www-Authenticate") != ""; asks != (c.write == 401) {
				t.Errorf("WWW-Authenticate: %q", write.Header.Get("Www-Authenticate"))
			}
		})
	}
}

// TestRulesOnOneImage: whoever may write one image writes no other, by whichever way.
func TestRulesOnOneImage(t *testing.T) {
	who, err := access.ParseWho("user:token")
	if err != nil {
		t.Fatal(err)
	}
	mine, err := oci.ParsePattern("mine")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, api.Site{APIToken: secret, Rules: access.Rules{{Allow: true, Actions: access.Any, To: []access.Who{who}, On: []oci.Pattern{mine}}, {Allow: true, Actions: access.Pull}}})
	s.bearer = secret
	data := disk("mine", 2)
	file, other := [2]string{"file", string(data)}, [2]string{"name", "other"}
	s.post(file, [2]string{"name", "mine"}).is(t, http.StatusCreated)
	s.post(file, other).refused(t, 403, "denied")
	s.post(other, file).refused(t, 403, "denied")
	s.ask("PUT", "/v1/backing-images/other/content", data).refused(t, 403, "denied")
	s.ask("POST", "/v1/backing-images", `{"name":"other","source":{"type":"url","url":"http://x"}}`).refused(t, 403, "denied")
	s.tus("POST", "/v1/uploads", nil, "Upload-Length", "512", "Upload-Metadata", metadata("name", "other")).refused(t, 403, "denied")
	s.want(http.StatusNotFound, "GET", "/v1/backing-images/other", nil)
}

// ends waits for the end of a job.
func (s *server) ends(job string) backing.Job {
	s.t.Helper()
	for {
		var j backing.Job
		if err := json.Unmarshal(s.want(http.StatusOK, "GET", job, nil).body, &j); err != nil {
			s.t.Fatal(err)
		}
		if j.State != backing.Running {
			return j
		}
	}
}
