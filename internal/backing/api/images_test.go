package api_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/oci"
)

func TestPathsAndMethods(t *testing.T) {
	s := open(t)
	if a := s.want(http.StatusOK, "GET", "/health", nil); strings.TrimSpace(string(a.body)) != `{"status":"ok"}` {
		t.Errorf("%s", a.body)
	}
	if a := s.want(http.StatusOK, "GET", "/ready", nil); !strings.Contains(string(a.body), `"name":"store","ok":true`) {
		t.Errorf("%s", a.body)
	}
	for path, allow := range map[string]string{
		"/health":                                   "GET, HEAD",
		"/v1/backing-images":                        "GET, HEAD, POST",
		"/v1/backing-images/x":                      "DELETE, GET, HEAD, PATCH",
		"/v1/backing-images/x/content":              "PUT",
		"/v1/backing-images/x/versions/v1":          "DELETE, GET, HEAD",
		"/v1/backing-images/x/tags/a":               "DELETE, GET, HEAD, PUT",
		"/v1/backing-images/x/tokens":               "GET, HEAD, POST",
		"/v1/files/" + sum512(nil) + "/x.img":       "GET, HEAD",
		"/v1/files/t/secret/" + sum512(nil) + "/x.": "GET, HEAD",
		"/v1/jobs/1":                                "DELETE, GET, HEAD",
		"/v1/uploads":                               "OPTIONS, POST",
		"/v1/uploads/1":                             "DELETE, HEAD, OPTIONS, PATCH",
	} {
		a := s.ask("TRACE", path, nil)
		a.refused(t, 405, "method_not_allowed")
		if a.Header.Get("Allow") != allow {
			t.Errorf("%s: Allow: %s, want %s", path, a.Header.Get("Allow"), allow)
		}
	}
	for _, path := range []string{"/v1", "/v1/", "/v1/nothing", "/v1/backing-images/", "/v1/backing-images/x/y", "/v1/backing-images/X", "/v1/backing-images/a%2Fb", "/v1/files/1", "/v1/backing-images/x/versions/a%20b"} {
		s.ask("GET", path, nil).refused(t, 404, backing.NotFound)
	}
	s.ask("GET", "/v1/backing-images?label="+strings.Repeat("x", 5000), nil).refused(t, 400, backing.Malformed)
}

func TestImages(t *testing.T) {
	s := open(t)
	for i := range 3 {
		s.want(http.StatusCreated, "PUT", "/v1/backing-images/image-"+strconv.Itoa(i)+"/content", disk(strconv.Itoa(i), 2))
	}
	type page struct {
		Items []backing.Image
		Next  *string
	}
	var names []string
	for cursor := "?limit=2"; cursor != ""; {
		var p page
		s.want(http.StatusOK, "GET", "/v1/backing-images"+cursor, nil).json(t, &p)
		for _, i := range p.Items {
			names = append(names, i.Name)
		}
		if cursor = ""; p.Next != nil {
			cursor = "?limit=2&cursor=" + *p.Next
		}
	}
	if strings.Join(names, " ") != "image-0 image-1 image-2" {
		t.Errorf("%q", names)
	}
	for _, query := range []string{"limit=0", "limit=1001", "limit=x", "cursor=A", "colour=red", "limit=1&limit=2", "%zz"} {
		s.ask("GET", "/v1/backing-images?"+query, nil).refused(t, 400, backing.Malformed)
	}
	const path = "/v1/backing-images/image-0"
	tag := s.want(http.StatusOK, "GET", path, nil).Header.Get("Etag")
	s.want(http.StatusNotModified, "GET", path, nil, "If-None-Match", tag)
	edited := s.want(http.StatusOK, "PATCH", path, `{"labels":{"os":"debian"},"protected":true}`, "If-Match", tag)
	if edited.Header.Get("Etag") == tag {
		t.Error("the ETag is what it was")
	}
	s.ask("PATCH", path, `{"protected":false}`, "If-Match", tag).refused(t, 412, backing.PreconditionFail)
	s.ask("PATCH", path, `{"protected":false}`, "If-Match", "junk").refused(t, 400, backing.Malformed)
	var i backing.Image
	s.want(http.StatusOK, "GET", path, nil).json(t, &i)
	if !i.Protected || i.Labels["os"] != "debian" || len(i.Versions) != 1 {
		t.Errorf("%+v", i)
	}
	var problem struct{ Blockers []backing.Blocker }
	a := s.ask("DELETE", path, nil)
	a.refused(t, 409, backing.InUse)
	if a.json(t, &problem); len(problem.Blockers) == 0 {
		t.Errorf("%s", a.body)
	}
	s.want(http.StatusOK, "PATCH", path, `{"protected":false}`, "Content-Type", "application/merge-patch+json")
	for body, says := range map[string]string{`{"colour":"red"}`: `"colour"`, `{"protected":"yes"}`: "protected", `{} {}`: "", `{`: ""} {
		a := s.ask("PATCH", path, body)
		a.refused(t, 400, backing.Malformed)
		if !strings.Contains(string(a.body), strings.ReplaceAll(says, `"`, `\"`)) {
			t.Errorf("%s: %s", body, a.body)
		}
	}
	s.ask("PATCH", path, `{"labels":{"x":"`+strings.Repeat("y", 1<<20)+`"}}`).refused(t, 413, backing.TooLarge)
	s.ask("PATCH", path, []byte(`{}`)).refused(t, 415, "unsupported_media_type")
	s.want(http.StatusOK, "PUT", path+"/tags/stable", `{"version":"v1"}`)
	s.ask("PUT", path+"/tags/stable", `{"version":"v9"}`).refused(t, 404, backing.NotFound)
	s.ask("PUT", path+"/tags/stable", `{"version":""}`).refused(t, 400, backing.Malformed)
	if v := s.want(http.StatusOK, "GET", path+"/versions/stable", nil).version(t); v.Version != "v1" {
		t.Errorf("%+v", v)
	}
	s.want(http.StatusNoContent, "DELETE", path+"/tags/stable", nil)
	s.ask("GET", path+"/tags/stable", nil).refused(t, 404, backing.NotFound)
	s.ask("DELETE", path+"?unregister=perhaps", nil).refused(t, 400, backing.Malformed)
	s.want(http.StatusNoContent, "DELETE", path, nil)
	s.ask("GET", path, nil).refused(t, 404, backing.NotFound)
	s.want(http.StatusNotFound, "HEAD", path, nil)
}

// TestListingsShowWhatMayBeRead: and nothing of the others.
func TestListingsShowWhatMayBeRead(t *testing.T) {
	var rules access.Rules
	add := func(who, on string, actions access.Action) {
		w, err := access.ParseWho(who)
		if err != nil {
			t.Fatal(err)
		}
		rule := access.Rule{Allow: true, Actions: actions, To: []access.Who{w}}
		if on != "" {
			p, err := oci.ParsePattern(on)
			if err != nil {
				t.Fatal(err)
			}
			rule.On = append(rule.On, p)
		}
		rules = append(rules, rule)
	}
	add("user:token", "", access.Any)
	add("anyone", "open-a", access.Pull)
	s := serve(t, api.Site{APIToken: secret, Rules: rules})
	s.bearer = secret
	for _, name := range []string{"open-a", "shut-b"} {
		s.want(http.StatusCreated, "PUT", "/v1/backing-images/"+name+"/content", disk(name, 1))
	}
	s.bearer = ""
	a := s.want(http.StatusOK, "GET", "/v1/backing-images", nil)
	if !strings.Contains(string(a.body), "open-a") || strings.Contains(string(a.body), "shut-b") {
		t.Errorf("%s", a.body)
	}
	s.want(http.StatusOK, "GET", "/v1/backing-images/open-a/download", nil)
	s.want(http.StatusUnauthorized, "GET", "/v1/backing-images/shut-b/download", nil)
}

func TestPullIsWatched(t *testing.T) {
	s := open(t)
	data := disk("pulled", 300)
	release := make(chan struct{})
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
			return
		}
		w.Header().Set("Etag", `"1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer source.Close()
	begin := func(name string) (job string) {
		a := s.want(http.StatusAccepted, "POST", "/v1/backing-images", `{"name":"`+name+`","source":{"type":"url","url":"`+source.URL+`/disk.img","checksum":"sha512:`+sum512(data)+`"}}`)
		return a.location(t, "Location")
	}
	job := begin("pulled")
	// A server whose answers have no time at all: events have a time of their own.
	hurried := httptest.NewUnstartedServer(s.handler)
	hurried.Config.WriteTimeout = 1
	hurried.Start()
	defer hurried.Close()
	r, err := http.NewRequestWithContext(t.Context(), "GET", hurried.URL+strings.TrimPrefix(job, strings.TrimSuffix(s.url, "/images"))+"?watch=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	var last backing.Job
	events := 0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		text, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if err := json.Unmarshal([]byte(text), &last); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if events++; events == 1 { // which came while nothing had happened
			if last.State != backing.Running {
				t.Errorf("%+v", last)
			}
			close(release)
		}
	}
	if last.State != backing.Succeeded || events < 2 {
		t.Fatalf("%d events, the last %+v", events, last)
	}
	s.wantFile(s.want(http.StatusOK, "GET", "/v1/backing-images/pulled/versions/"+last.Version, nil).version(t), data)
	if a := s.want(http.StatusOK, "GET", "/v1/jobs", nil); !strings.Contains(string(a.body), last.ID) {
		t.Errorf("%s", a.body)
	}
	s.ask("GET", "/v1/jobs/none?watch=1", nil).refused(t, 404, backing.NotFound)
	s.ask("GET", "/v1/jobs/none", nil).refused(t, 404, backing.NotFound)
	s.bearer = ""
	s.ask("DELETE", job, nil).refused(t, 401, "unauthorized")
	s.ask("POST", "/v1/backing-images", `{"name":"x","source":{"type":"url","url":"http://x"}}`).refused(t, 401, "unauthorized")
	s.bearer = secret
	for _, body := range []string{`{"name":"x"}`, `{"name":"x","source":{"type":"file","url":"x"}}`, `{"name":"X","source":{"type":"url","url":"http://x"}}`,
		`{"name":"x","source":{"type":"url","url":"http://x","checksum":"md5:1"}}`, `{"name":"x","source":{"type":"url","url":"http://x","colour":1}}`} {
		s.ask("POST", "/v1/backing-images", body).refused(t, 400, backing.Malformed)
	}
}
