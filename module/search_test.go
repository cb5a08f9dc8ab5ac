package module_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// found is what docker search and podman search read of an answer.
type found struct {
	NumResults int    `json:"num_results"`
	NumPages   int    `json:"num_pages"`
	Query      string `json:"query"`
	Results    []struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		StarCount   int    `json:"star_count"`
		IsOfficial  bool   `json:"is_official"`
		IsAutomated bool   `json:"is_automated"`
	} `json:"results"`
}

func (f found) names() (names []string) {
	for _, r := range f.Results {
		names = append(names, r.Name)
	}
	return names
}

func (m *mirror) search(query string, header ...string) (f found) {
	m.t.Helper()
	a := m.want(200, "GET", "/v1/search?"+query, header...)
	if err := json.Unmarshal(a.body, &f); err != nil || a.Header.Get("Content-Type") != "application/json" || strings.Contains(string(a.body), "null") {
		m.t.Fatalf("%s: %s %v: %v", query, a.body, a.Header, err)
	}
	return f
}

// TestSearch: what is held is found by its name, best first, under the names by
// which it can be pulled here; with the catalog and without.
func TestSearch(t *testing.T) {
	up, other := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	for _, name := range []string{"library/nginx", "library/redis", "bitnami/nginx", "nginxinc/nginx-unprivileged"} {
		up.Push(name, image, "latest")
	}
	other.Push("team/my-nginx", image, "latest")
	for name, options := range map[string]string{"names as stored": "", "as registry:2 stores them": "repository_prefix \"\"\n"} {
		t.Run(name, func(t *testing.T) {
			opens = make(chan struct{})
			file, _ := catalogFile(t)
			m := startAdmin(t, "")
			if err := m.load("catalog slow "+file+"\n"+upstreamFor("docker.io", up, options)+upstreamFor("quay.io", other), hookedSite); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"library/nginx", "library/redis", "bitnami/nginx", "nginxinc/nginx-unprivileged", "quay.io/team/my-nginx"} {
				m.pull(name, "latest", image)
			}
			pusher{m, "apps/nginx"}.image(image, "v1")
			check := func(how string) {
				t.Helper()
				for query, want := range map[string]string{
					"q=nginx&n=25":            "docker.io/library/nginx apps/nginx docker.io/bitnami/nginx docker.io/nginxinc/nginx-unprivileged quay.io/team/my-nginx",
					"q=NGINX&n=2":             "docker.io/library/nginx apps/nginx",
					"q=nginx&n=2&page=2":      "docker.io/bitnami/nginx docker.io/nginxinc/nginx-unprivileged",
					"q=nginx&n=2&page=4":      "",
					"q=apps/nginx":            "apps/nginx",
					"q=docker.io/library/red": "docker.io/library/redis",
					"q=my-":                   "quay.io/team/my-nginx",
					"q=none":                  "",
					"q=%25":                   "",
					"q=":                      "apps/nginx docker.io/bitnami/nginx docker.io/library/nginx docker.io/library/redis docker.io/nginxinc/nginx-unprivileged quay.io/team/my-nginx",
					"q=redis&n=0":             "docker.io/library/redis",
				} {
					if got := strings.Join(m.search(query).names(), " "); got != want {
						t.Errorf("%s, %s: %q; want %q", how, query, got, want)
					}
				}
			}
			check("without the catalog")
			close(opens)
			m.complete()
			check("with the catalog")

			f := m.search("q=nginx&n=2")
			if f.NumResults != 5 || f.NumPages != 3 || f.Query != "nginx" {
				t.Errorf("%+v", f)
			}
			if r := f.Results[0]; !r.IsOfficial || r.IsAutomated || r.StarCount != 0 || r.Description != "mirrored from docker.io" {
				t.Errorf("%+v", r)
			}
			if r := f.Results[1]; r.IsOfficial || r.Description != "hosted here" {
				t.Errorf("%+v", r)
			}
			// What is found can be pulled as it is called.
			for _, name := range m.search("q=").names() {
				m.want(200, "GET", "/v2/"+name+"/tags/list")
			}
		})
	}
}

// TestSearchMany: however much is asked for, no more than 100 results come.
func TestSearchMany(t *testing.T) {
	m := start(t, "", hookedSite)
	const index = "application/vnd.oci.image.index.v1+json"
	var pushes sync.WaitGroup
	for i := range 120 {
		pushes.Go(func() {
			a, err := m.try("PUT", fmt.Sprintf("/v2/apps/r%03d/manifests/v1", i), []byte(`{"schemaVersion":2,"mediaType":"`+index+`","manifests":[]}`), "Content-Type", index)
			if err != nil || a.StatusCode != 201 {
				t.Error(a, err)
			}
		})
	}
	pushes.Wait()
	var all []string
	for page := 1; page <= 3; page++ {
		f := m.search(fmt.Sprint("q=r&n=100000&page=", page))
		if len(f.Results) > 100 || f.NumResults != 120 || f.NumPages != 2 {
			t.Errorf("%d results of %d, %d pages", len(f.Results), f.NumResults, f.NumPages)
		}
		all = append(all, f.names()...)
	}
	if len(all) != 120 || !slices.IsSorted(all) {
		t.Errorf("%q", all)
	}
	if n := len(m.search("q=r").Results); n != 25 {
		t.Errorf("%d results where nobody says how many", n)
	}
}

// TestSearchAccess: a caller finds what it may pull.
func TestSearchAccess(t *testing.T) {
	m := start(t, "", hookedSite)
	for _, name := range []string{"apps/open", "apps/closed"} {
		pusher{m, name}.image(regtest.NewImage(name), "v1")
	}
	if err := m.load("", "default off\nhosted apps/**\naccess {\nidentity {http.request.header.X-User}\nallow any to user:alice\nallow pull to anyone on apps/open\n}"); err != nil {
		t.Fatal(err)
	}
	for user, want := range map[string]string{"": "apps/open", "bob": "apps/open", "alice": "apps/closed apps/open"} {
		if got := strings.Join(m.search("q=apps", "X-User", user).names(), " "); got != want {
			t.Errorf("%q finds %q; want %q", user, got, want)
		}
	}
	if err := m.load("", "default off\nhosted apps/**"); err != nil {
		t.Fatal(err)
	}
	if f := m.search("q=apps"); f.NumResults != 0 || len(f.Results) != 0 {
		t.Errorf("without rules: %+v", f)
	}
}

// TestFirstAPI: what docker search asks before it searches, what else of the
// first API is not there, and why.
func TestFirstAPI(t *testing.T) {
	m := start(t, "", "")
	a := m.want(200, "GET", "/v1/_ping")
	var standalone struct{ Standalone bool }
	if err := json.Unmarshal(a.body, &standalone); err != nil || !standalone.Standalone || a.Header.Get("X-Docker-Registry-Standalone") != "true" || a.Header.Get("Content-Type") != "application/json" {
		t.Errorf("ping: %s %v: %v", a.body, a.Header, err)
	}
	for _, path := range []string{"/v1/repositories/library/nginx/images", "/v1/images/0a1b/ancestry", "/v1/users/", "/v1/repositories"} {
		for _, method := range []string{"GET", "PUT", "POST"} {
			m.refused(404, oci.CodeUnsupported, method, path, nil, "use Docker 1.6 or a later one")
		}
	}
	m.refused(405, oci.CodeUnsupported, "POST", "/v1/search", nil, "POST")
	for _, query := range []string{"n=-1", "n=x", "page=-1", "page=1e9", "n=99999999999999999999", "q=" + url.QueryEscape(strings.Repeat("x", 300))} {
		m.refused(400, oci.CodePageInvalid, "GET", "/v1/search?"+query, nil, "")
	}
	if f := m.search("q=nginx"); f.NumResults != 0 || f.Results == nil {
		t.Errorf("%+v", f)
	}
}
