package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestTagFreshness follows a tag through what can happen to it.
func TestTagFreshness(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	first, second := regtest.NewImage("first", regtest.Random("1", 1000)), regtest.NewImage("second", regtest.Random("2", 1000))
	up.Push("library/t", first, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 1h"), "")
	path := "/v2/library/t/manifests/latest"
	cache := func(a *answer) string {
		t.Helper()
		return a.Header.Get("Cache-Status")
	}
	m.pull("library/t", "latest", first)

	// Fresh: nobody is asked, though the tag has moved.
	up.Push("library/t", second, "latest")
	up.Forget()
	if a := m.want(200, "GET", path); a.Header.Get("Docker-Content-Digest") != first.Digest.String() || cache(a) != "registry; hit" {
		t.Errorf("within tag_ttl: %v", a.Header)
	}
	if n := up.Count("HEAD", "") + up.Count("GET", ""); n != 0 {
		t.Errorf("%d requests within tag_ttl", n)
	}

	// Stale: one HEAD tells that it has moved, and the new one is fetched.
	if err := m.load(upstreamFor("docker.io", up, "tag_ttl 0"), ""); err != nil {
		t.Fatal(err)
	}
	if a := m.want(200, "GET", path); a.Header.Get("Docker-Content-Digest") != second.Digest.String() {
		t.Error("a moved tag was not followed")
	}
	if heads, gets := up.Count("HEAD", "/manifests/latest"), up.Count("GET", "/manifests/"); heads != 1 || gets != 1 {
		t.Errorf("%d HEADs and %d GETs to follow a tag, want 1 and 1", heads, gets)
	}
	up.Forget()
	if a := m.want(200, "GET", path); !strings.Contains(cache(a), "fwd=stale") {
		t.Errorf("confirmed by the upstream: %s", cache(a))
	}
	if n := up.Count("GET", "/manifests/"); n != 0 {
		t.Errorf("%d GETs to confirm a tag", n)
	}

	// Whatever an upstream that fails says, what is held is served.
	for _, fault := range []regtest.Fault{
		{Status: 500}, {Status: 429}, {Status: 401}, {Status: 403},
		{Status: 200, Body: "<html>log in to the hotel's network</html>"},
	} {
		fault.Path = "/manifests/"
		up.Fail(fault)
		a := m.want(200, "GET", path)
		if a.Header.Get("Docker-Content-Digest") != second.Digest.String() || !strings.HasPrefix(a.Header.Get("Warning"), `299 - "`) || !strings.Contains(cache(a), "hit") {
			t.Errorf("upstream says %d: %v", fault.Status, a.Header)
		}
		m.want(200, "HEAD", path)
		up.Heal()
	}
	// A limit that was set holds for a while, so start over with another.
	m.stop()
	if err := m.load(upstreamFor("docker.io", up, "tag_ttl 0"), ""); err != nil {
		t.Fatal(err)
	}
	up.Down()
	if a := m.want(200, "GET", path); a.Header.Get("Warning") == "" {
		t.Error("served without a warning while the upstream is down")
	}
	up.Up()

	// Only the origin's 404 takes a tag away.
	up.DeleteTag("library/t", "latest")
	m.wantError(404, oci.CodeManifestUnknown, "GET", path, "docker.io/library/t:latest", up.URL)
	m.want(200, "GET", "/v2/library/t/manifests/"+second.Digest.String())
	up.Push("library/t", first, "latest")
	if a := m.want(200, "GET", path); a.Header.Get("Docker-Content-Digest") != first.Digest.String() {
		t.Error("a tag that came back was not found")
	}
}

// TestHeadThenDigest is how containerd and Docker pull: the tag is never
// fetched by name, and is to be found offline all the same.
func TestHeadThenDigest(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "v1", "v2")
	m := start(t, upstreamFor("docker.io", up), "")
	m.want(200, "HEAD", "/v2/library/x/manifests/v1")
	m.pull("library/x", image.Digest.String(), image)
	m.want(200, "HEAD", "/v2/library/x/manifests/v2") // after the manifest
	up.Down()
	m.stop()
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "v1", image)
	m.pull("library/x", "v2", image)
}

// TestSlowCheck: a client does not wait long for the check of what is held.
func TestSlowCheck(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	m.pull("library/x", "latest", image)
	hold := make(chan struct{})
	defer close(hold)
	up.FailSlowly("", "/manifests/", hold)
	a := m.want(200, "GET", "/v2/library/x/manifests/latest")
	if a.Header.Get("Warning") == "" {
		t.Error("no warning though the check did not end")
	}
}

func TestCodes(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	unknown := regtest.Random("nobody has it", 10).Digest.String()

	a := m.want(200, "GET", "/v2/")
	if string(a.body) != "{}" || a.Header.Get("Content-Type") != "application/json" || a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
		t.Errorf("ping: %s %v", a.body, a.Header)
	}
	m.want(200, "GET", "/v2")
	m.want(200, "HEAD", "/v2/")
	for _, path := range []string{"/", "/v1/", "/v1/jobs", "/v2x/", "/metrics"} {
		if a := m.want(418, "GET", path); string(a.body) != "not the mirror" {
			t.Errorf("%s did not reach the next handler", path)
		}
	}

	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/none/manifests/latest", "docker.io/library/none:latest", "404")
	m.wantError(404, oci.CodeManifestUnknown, "HEAD", "/v2/library/none/manifests/latest")
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/x/manifests/none")
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/x/manifests/"+unknown)
	m.wantError(404, oci.CodeBlobUnknown, "GET", "/v2/library/x/blobs/"+unknown, up.URL)
	m.wantError(404, oci.CodeBlobUnknown, "HEAD", "/v2/library/x/blobs/"+unknown)
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/library/none/tags/list")
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/library/x/manifests/latest?ns=unknown.example", "unknown.example", "upstream unknown.example")
	m.wantError(400, oci.CodeNameInvalid, "GET", "/v2/library/UPPER/manifests/latest")
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/library/x/manifests/-bad")
	m.wantError(400, oci.CodeManifestInvalid, "GET", "/v2/library/x/manifests/sha256:bad")
	m.wantError(400, oci.CodeDigestInvalid, "GET", "/v2/library/x/blobs/sha256:bad")
	m.wantError(400, oci.CodeDigestInvalid, "GET", "/v2/library/x/blobs/latest")
	m.wantError(404, oci.CodeUnsupported, "GET", "/v2/library/x/unknown/thing")
	m.wantError(400, oci.CodePageInvalid, "GET", "/v2/library/x/tags/list?n=-1")
	m.wantError(400, oci.CodePageInvalid, "GET", "/v2/_catalog?n=many")
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		a := m.wantError(405, oci.CodeUnsupported, method, "/v2/library/x/blobs/uploads/", "GET and HEAD")
		if a.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("Allow: %q", a.Header.Get("Allow"))
		}
		m.wantError(405, oci.CodeUnsupported, method, "/v2/library/x/manifests/latest")
	}
	m.want(200, "GET", "/v2/library/x/manifests/latest")

	up.Down()
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/none/manifests/other", "upstream docker.io ("+up.URL+")", "connection refused")
	m.wantError(503, oci.CodeUnavailable, "HEAD", "/v2/library/none/manifests/other")
	up.Up()
	up.Fail(regtest.Fault{Path: "/manifests/", Status: 429, Header: http.Header{"Retry-After": {"60"}}})
	a = m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/none/manifests/other", "credentials")
	if a.Header.Get("Retry-After") != "60" {
		t.Errorf("Retry-After: %q", a.Header.Get("Retry-After"))
	}
	// It is obeyed: nobody is asked until then.
	up.Heal()
	up.Forget()
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/none/manifests/other")
	if n := len(up.Requests(func(regtest.Request) bool { return true })); n != 0 {
		t.Errorf("%d requests to an upstream that asked to be left alone", n)
	}
	m.want(200, "GET", "/v2/library/x/manifests/"+image.Digest.String()) // held
}

// TestMinFree: what would leave too little is passed through and not kept.
func TestMinFree(t *testing.T) {
	for _, size := range []int{1000, 3 << 20} {
		up := regtest.New(t, regtest.Options{})
		layer := regtest.Random("x", size)
		image := regtest.NewImage("x", layer)
		up.Push("library/x", image, "latest")
		m := start(t, "", "")
		block := "storage disk " + m.dir + " {\n min_free 99.99%\n}\n" + upstreamFor("docker.io", up)
		if err := m.load(block, ""); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			m.pull("library/x", "latest", image)
		}
		eventually(t, "a line about it", func() bool { return len(m.logs.with("disk trouble")) > 0 })
		failed := m.logs.with("disk trouble")
		if len(failed) == 0 || !strings.Contains(fmt.Sprint(failed[0]["error"]), "min_free 99.99%") {
			t.Errorf("the log does not name the option: %v", failed)
		}
		if kept := kept(m.dir, layer.Digest); len(kept) > 0 {
			t.Errorf("kept: %q", kept)
		}
		eventually(t, "nothing to be left in the spool", func() bool { return len(spooled(m.dir)) == 0 })
		m.stop()
	}
}

func TestTags(t *testing.T) {
	up := regtest.New(t, regtest.Options{PageSize: 3})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "a", "b", "c", "d", "e", "f", "g")
	up.Push("library/x", image, "cc")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 1h"), "")
	m.pull("library/x", "cc", image)
	m.pull("library/x", "b", image)
	up.DeleteTag("library/x", "cc") // held, and gone upstream

	list := func(query string) (tags []string, next string) {
		t.Helper()
		a := m.want(200, "GET", "/v2/library/x/tags/list"+query)
		var reply struct {
			Name string
			Tags []string
		}
		if err := json.Unmarshal(a.body, &reply); err != nil || reply.Name != "library/x" || reply.Tags == nil {
			t.Fatalf("%s: %v", a.body, err)
		}
		base, _ := url.Parse(m.URL + "/v2/library/x/tags/list")
		if link := oci.NextLink(a.Header, base); link != nil {
			if link.Path != base.Path {
				t.Errorf("Link leads to %s", link)
			}
			next = "?" + link.RawQuery
		}
		return reply.Tags, next
	}
	for _, query := range []string{"", "?n=2", "?n=100"} {
		var all []string
		for next := query; ; {
			tags, following := list(next)
			all = append(all, tags...)
			if following == "" {
				break
			}
			next = following
		}
		if want := strings.Fields("a b c cc d e f g"); !reflect.DeepEqual(all, want) {
			t.Errorf("tags%s: %q, want %q", query, all, want)
		}
	}
	if tags, next := list("?n=0"); len(tags) != 0 || next != "" {
		t.Errorf("n=0: %q, next %q", tags, next)
	}
	if tags, _ := list("?last=e"); !reflect.DeepEqual(tags, []string{"f", "g"}) {
		t.Errorf("last=e: %q", tags)
	}
	up.Down()
	if tags, _ := list(""); !reflect.DeepEqual(tags, []string{"b", "cc"}) {
		t.Errorf("offline: %q", tags)
	}
}

// TestTagsWithoutPaging: a registry that sends everything each time does not
// send clients round in circles.
func TestTagsWithoutPaging(t *testing.T) {
	up := regtest.New(t, regtest.Options{NoPaging: true})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "t0", "t1", "t2", "t3", "t4", "t5", "t6", "t7")
	m := start(t, upstreamFor("docker.io", up), "")
	var all []string
	next := "/v2/library/x/tags/list?n=3"
	for page := 0; next != ""; page++ {
		if page > 3 {
			t.Fatalf("there is no end: %q", all)
		}
		a := m.want(200, "GET", next)
		var reply struct{ Tags []string }
		if err := json.Unmarshal(a.body, &reply); err != nil || len(reply.Tags) > 3 {
			t.Fatalf("%s: %v", a.body, err)
		}
		all, next = append(all, reply.Tags...), ""
		base, _ := url.Parse(m.URL + "/v2/library/x/tags/list")
		if link := oci.NextLink(a.Header, base); link != nil {
			next = link.RequestURI()
		}
	}
	if want := strings.Fields("t0 t1 t2 t3 t4 t5 t6 t7"); !reflect.DeepEqual(all, want) {
		t.Errorf("%q", all)
	}
}

// TestTellsOnce: an upstream's trouble is in the log, and does not fill it.
func TestTellsOnce(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	m.pull("library/x", "latest", image)
	m.want(404, "GET", "/v2/library/x/manifests/none") // no trouble
	if n := len(m.logs.with("upstream trouble")); n != 0 {
		t.Errorf("%d lines about a tag that does not exist", n)
	}
	up.Down()
	for range 3 {
		m.want(200, "GET", "/v2/library/x/manifests/latest")
		m.want(503, "GET", "/v2/library/other/manifests/latest")
	}
	lines := m.logs.with("upstream trouble")
	if len(lines) != 1 || lines[0]["upstream"] != "docker.io" || !strings.Contains(fmt.Sprint(lines[0]["error"]), "connection refused") {
		t.Errorf("%v", lines)
	}
}

func TestReferrers(t *testing.T) {
	for _, api := range []bool{true, false} {
		up := regtest.New(t, regtest.Options{PageSize: 1, NoReferrers: !api})
		subject := regtest.NewImage("subject")
		up.Push("library/x", subject, "latest")
		var list v1.Index
		list.SchemaVersion, list.MediaType = 2, v1.MediaTypeImageIndex
		for i, kind := range []string{"a/sbom", "a/signature", "a/sbom"} {
			config := regtest.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
			d, c := subject.Descriptor(), config.Descriptor()
			artifact := regtest.Image{Blobs: []regtest.Content{config}, Content: regtest.JSON(v1.MediaTypeImageManifest, map[string]any{
				"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "artifactType": kind, "config": c, "layers": []any{}, "subject": d,
				"annotations": map[string]string{"n": fmt.Sprint(i)},
			})}
			up.Push("library/x", artifact)
			entry := artifact.Descriptor()
			entry.ArtifactType, entry.Annotations = kind, map[string]string{"n": fmt.Sprint(i)}
			list.Manifests = append(list.Manifests, entry)
		}
		if !api {
			up.Push("library/x", regtest.Image{Content: regtest.JSON(v1.MediaTypeImageIndex, list)}, oci.FallbackTag(subject.Digest))
		}
		m := startAdmin(t, upstreamFor("docker.io", up))
		ask := func(digest, query string) (v1.Index, http.Header) {
			t.Helper()
			a := m.want(200, "GET", "/v2/library/x/referrers/"+digest+query)
			var index v1.Index
			if err := json.Unmarshal(a.body, &index); err != nil || index.Manifests == nil || a.Header.Get("Content-Type") != v1.MediaTypeImageIndex {
				t.Fatalf("%s %v: %v", a.body, a.Header, err)
			}
			return index, a.Header
		}
		if index, _ := ask(subject.Digest.String(), ""); len(index.Manifests) != 3 || index.Manifests[0].Annotations["n"] == "" {
			t.Errorf("api=%v: %+v", api, index.Manifests)
		}
		index, header := ask(subject.Digest.String(), "?artifactType=a/sbom&artifactType=other")
		if len(index.Manifests) != 2 || header.Get("OCI-Filters-Applied") != "artifactType" {
			t.Errorf("api=%v, filtered: %+v %v", api, index.Manifests, header)
		}
		if index, _ := ask(regtest.Random("none", 1).Digest.String(), ""); len(index.Manifests) != 0 {
			t.Errorf("of nothing: %+v", index.Manifests)
		}
		m.wantError(400, oci.CodeManifestInvalid, "GET", "/v2/library/x/referrers/sha256:bad")
		// Offline there is what is held.
		m.want(200, "GET", "/v2/library/x/manifests/"+list.Manifests[1].Digest.String())
		up.Down()
		m.complete() // so that it is the catalog that knows
		if index, _ := ask(subject.Digest.String(), ""); len(index.Manifests) != 1 || index.Manifests[0].Digest != list.Manifests[1].Digest || index.Manifests[0].ArtifactType != "a/signature" {
			t.Errorf("api=%v, offline: %+v", api, index.Manifests)
		}
		m.stop()
	}
}

func TestCatalog(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	other := regtest.New(t, regtest.Options{})
	m := start(t, upstreamFor("docker.io", up)+upstreamFor("registry.test:5000", other, "repository_prefix elsewhere/kept"), "")
	for _, name := range []string{"library/b", "library/a", "org/deep/er"} {
		up.Push(name, image, "latest")
		m.pull(name, "latest", image)
	}
	other.Push("x", image, "latest")
	m.pull("registry.test__5000/x", "latest", image)
	want := []string{"docker.io/library/a", "docker.io/library/b", "docker.io/org/deep/er", "registry.test__5000/x"}
	var got []string
	next := "/v2/_catalog?n=3"
	for pages := 0; next != ""; pages++ {
		a := m.want(200, "GET", next)
		var reply struct{ Repositories []string }
		if err := json.Unmarshal(a.body, &reply); err != nil || len(reply.Repositories) > 3 {
			t.Fatalf("%s: %v", a.body, err)
		}
		got, next = append(got, reply.Repositories...), ""
		base, _ := url.Parse(m.URL + "/v2/_catalog")
		if link := oci.NextLink(a.Header, base); link != nil {
			next = link.RequestURI()
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("catalog %q, want %q", got, want)
	}
	for _, name := range got { // every name listed can be pulled
		m.want(200, "GET", "/v2/"+name+"/manifests/latest")
	}
	if err := m.load(upstreamFor("docker.io", up)+upstreamFor("registry.test:5000", other, "repository_prefix elsewhere/kept"), "default registry.test:5000\nupstreams registry.test:5000"); err != nil {
		t.Fatal(err)
	}
	if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":["registry.test__5000/x"]}` {
		t.Errorf("a narrowed site lists %s", a.body)
	}
}

// TestNamespaces asks for one name at several registries.
func TestNamespaces(t *testing.T) {
	hub, corp := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	ofHub, ofCorp := regtest.NewImage("hub", regtest.Random("h", 1000)), regtest.NewImage("corp", regtest.Random("c", 1000))
	hub.Push("library/app", ofHub, "latest")
	corp.Push("library/app", ofCorp, "latest")
	m := start(t, upstreamFor("docker.io", hub)+upstreamFor("registry.corp:5000", corp), "")
	for path, want := range map[string]regtest.Image{
		"/v2/library/app/manifests/latest":                                                             ofHub,
		"/v2/library/app/manifests/latest?ns=docker.io":                                                ofHub,
		"/v2/library/app/manifests/latest?ns=registry.corp:5000":                                       ofCorp,
		"/v2/library/app/manifests/latest?ns=REGISTRY.corp%3A5000":                                     ofCorp,
		"/v2/registry.corp__5000/library/app/manifests/latest":                                         ofCorp,
		"/v2/registry.corp__5000/library/app/manifests/latest?ns=registry.corp:5000":                   ofCorp,
		"/v2/library/app/manifests/latest?ns=" + url.QueryEscape(strings.TrimPrefix(m.URL, "http://")): ofHub,
	} {
		a := m.want(200, "GET", path)
		if a.Header.Get("Docker-Content-Digest") != want.Digest.String() {
			t.Errorf("%s: the other registry's image", path)
		}
		ns, _ := url.Parse(path)
		if got := a.Header.Get("OCI-Namespace"); strings.Contains(path, "ns=docker.io") && got != ns.Query().Get("ns") {
			t.Errorf("%s: OCI-Namespace %q", path, got)
		}
	}
	// A registry nobody configured is not asked.
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/library/app/manifests/latest?ns=127.0.0.1:1")
}

// TestHosted serves what lies in the store and belongs to no upstream.
func TestHosted(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewIndex(regtest.NewImage("x", regtest.Random("x", 1000)))
	up.Push("apps/web", image, "v1", "v2")
	// What registry:2 would have written, written by a mirror of it.
	m := start(t, upstreamFor("docker.io", up, `repository_prefix ""`), "")
	m.pull("apps/web", "v1", image)
	m.pull("apps/web", "v2", image)
	m.stop()
	forgetRecords(t, m.dir)
	up.Down()
	if err := m.load("", "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"); err != nil {
		t.Fatal(err)
	}
	m.pull("apps/web", "v1", image)
	m.pull("apps/web", image.Digest.String(), image)
	m.want(200, "HEAD", "/v2/apps/web/blobs/"+image.Children[0].Blobs[1].Digest.String())
	if a := m.want(200, "GET", "/v2/apps/web/tags/list"); string(a.body) != `{"name":"apps/web","tags":["v1","v2"]}` {
		t.Errorf("tags: %s", a.body)
	}
	if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":["apps/web"]}` {
		t.Errorf("catalog: %s", a.body)
	}
	m.wantError(404, oci.CodeManifestUnknown, "GET", "/v2/apps/web/manifests/none", "hosted")
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/apps/none/tags/list")
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/other/web/manifests/v1")
	m.wantError(400, oci.CodeManifestInvalid, "PUT", "/v2/apps/web/manifests/v1")
}

// TestClassIsForEver: a record outweighs any later configuration.
func TestClassIsForEver(t *testing.T) {
	up, other := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x")
	up.Push("apps/web", image, "v1")
	other.Push("apps/web", image, "v1")
	m := start(t, upstreamFor("docker.io", up, `repository_prefix ""`), "")
	m.pull("apps/web", "v1", image)
	if err := m.load("", "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"); err != nil {
		t.Fatal(err)
	}
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/apps/web/manifests/v1", "mirror of docker.io")
	// Nor is it shown, or mounted from, as what it is not.
	if a := m.want(200, "GET", "/v2/_catalog"); string(a.body) != `{"repositories":[]}` {
		t.Errorf("catalog: %s", a.body)
	}
	m.want(202, "POST", "/v2/apps/mine/blobs/uploads/?mount="+image.Blobs[0].Digest.String()+"&from=apps/web")
	if err := m.load(upstreamFor("other.test", other, `repository_prefix ""`), "default other.test"); err != nil {
		t.Fatal(err)
	}
	m.wantError(404, oci.CodeNameUnknown, "GET", "/v2/apps/web/manifests/v1", "mirror of docker.io", "other.test")
}

// TestOnMissing: what becomes of a tag that its origin has no more, and that a
// refresh says so either way.
func TestOnMissing(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprint("keep ", keep), func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			image := regtest.NewImage("x")
			up.Push("library/x", image, "latest")
			policy := "on_missing follow"
			if keep {
				policy = "on_missing keep"
			}
			m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 0", policy))
			m.pull("library/x", "latest", image)
			up.DeleteTag("library/x", "latest")
			const path = "/v2/library/x/manifests/latest"
			for range 2 {
				m.wantRefusal(404, `{"reference": "x"}`, referenceX, up.URL)
				if !keep {
					m.want(404, "GET", path)
					continue
				}
				a := m.want(200, "GET", path)
				if !bytes.Equal(a.body, image.Data) || !strings.HasPrefix(a.Header.Get("Warning"), "299 - ") {
					t.Errorf("%q, %v", a.body, a.Header)
				}
			}
		})
	}
}
