package module_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// hostedSite is a site that hosts apps/** and lets anyone do anything.
const hostedSite = "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"

// A pusher is a client of one hosted repository.
type pusher struct {
	*mirror
	repository string
}

// path is below the repository's.
func (p pusher) path(parts ...string) string {
	return "/v2/" + p.repository + "/" + strings.Join(parts, "/")
}

// try sends a request with a body to a path or to a Location, and reads the
// answer. A nil body is none.
func (m *mirror) try(method, to string, body []byte, header ...string) (*answer, error) {
	base, err := url.Parse(m.URL)
	if err != nil {
		return nil, err
	}
	at, err := base.Parse(to)
	if err != nil {
		return nil, err
	}
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequest(method, at.String(), reader)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := m.roundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	a := &answer{Response: resp}
	a.body, a.err = io.ReadAll(resp.Body)
	return a, nil
}

// sends is try, and checks the status.
func (m *mirror) sends(status int, method, to string, body []byte, header ...string) *answer {
	m.t.Helper()
	a, err := m.try(method, to, body, header...)
	if err != nil {
		m.t.Fatalf("%s %s: %v", method, to, err)
	}
	if a.StatusCode != status || a.err != nil {
		m.t.Fatalf("%s %.200s %q: status %d, want %d: %.300q, %v", method, to, header, a.StatusCode, status, a.body, a.err)
	}
	return a
}

// refused is sends, and checks the code of the error, and what it says.
func (m *mirror) refused(status int, code, method, to string, body []byte, says string, header ...string) *answer {
	m.t.Helper()
	a := m.sends(status, method, to, body, header...)
	var reply struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(a.body, &reply); err != nil || len(reply.Errors) != 1 || a.Header.Get("Content-Type") != "application/json" {
		m.t.Fatalf("%s %s: %s %v: %v", method, to, a.body, a.Header, err)
	}
	if e := reply.Errors[0]; e.Code != code || !strings.Contains(e.Message, says) {
		m.t.Errorf("%s %.200s: %s, %q; want %s and %q", method, to, e.Code, e.Message, code, says)
	}
	return a
}

// blob pushes bytes by POST and PUT, as most clients do.
func (p pusher) blob(data []byte) digest.Digest { return p.blobAs(digest.FromBytes(data), data) }

// blobAs does so with a digest of any algorithm.
func (p pusher) blobAs(d digest.Digest, data []byte) digest.Digest {
	p.t.Helper()
	begun := p.sends(202, "POST", p.path("blobs", "uploads", ""), nil)
	p.sends(201, "PUT", withQuery(begun.Header.Get("Location"), "digest", d.String()), append([]byte{}, data...), "Content-Type", "application/octet-stream")
	return d
}

// withQuery adds a parameter to a Location, and keeps those it has.
func withQuery(location, key, value string) string {
	separator := "?"
	if strings.Contains(location, "?") {
		separator = "&"
	}
	return location + separator + key + "=" + url.QueryEscape(value)
}

// put pushes a manifest, whose answer is checked as conformance suites do.
func (p pusher) put(ref string, manifest regtest.Content) *answer {
	p.t.Helper()
	a := p.sends(201, "PUT", p.path("manifests", ref), manifest.Data, "Content-Type", manifest.MediaType)
	d := manifest.Digest
	if strings.HasPrefix(ref, "sha") && strings.Contains(ref, ":") {
		d, _, _ = cutQuery(ref)
	}
	if got := a.Header.Get("Docker-Content-Digest"); got != string(d) {
		p.t.Errorf("%s: Docker-Content-Digest %q, want %s", ref, got, d)
	}
	var subject struct{ Subject v1.Descriptor }
	if err := json.Unmarshal(manifest.Data, &subject); err != nil || a.Header.Get("OCI-Subject") != string(subject.Subject.Digest) {
		p.t.Errorf("%s: OCI-Subject %q, want %q: %v", ref, a.Header.Get("OCI-Subject"), subject.Subject.Digest, err)
	}
	got := p.sends(200, "GET", a.Header.Get("Location"), nil)
	manifest.Digest = d
	if err := check(got, manifest); err != nil {
		p.t.Errorf("%s: at its Location %s: %v", ref, a.Header.Get("Location"), err)
	}
	return a
}

func cutQuery(ref string) (digest.Digest, string, bool) {
	d, query, ok := strings.Cut(ref, "?")
	return digest.Digest(d), query, ok
}

// image pushes an image or an index with all that belongs to it, and lets tags
// mean it.
func (p pusher) image(image regtest.Image, tags ...string) {
	p.t.Helper()
	for _, blob := range image.Blobs {
		p.blob(blob.Data)
	}
	for _, child := range image.Children {
		p.image(child)
	}
	if len(tags) == 0 {
		p.put(image.Digest.String(), image.Content)
	}
	for _, tag := range tags {
		p.put(tag, image.Content)
	}
}

// tags are those of the list, over all its pages.
func (p pusher) tags(query string) (all []string, pages int) {
	p.t.Helper()
	for to := p.path("tags", "list") + query; to != ""; pages++ {
		a := p.sends(200, "GET", to, nil)
		var list struct {
			Name string
			Tags []string
		}
		if err := json.Unmarshal(a.body, &list); err != nil || list.Tags == nil || list.Name != p.repository {
			p.t.Fatalf("%s: %.300s: %v", to, a.body, err)
		}
		all, to = append(all, list.Tags...), nextOf(a)
	}
	return all, pages
}

// referrers are those of all pages. Each page is an index that clients read.
func (p pusher) referrers(subject digest.Digest, query string) (all []v1.Descriptor, pages int) {
	p.t.Helper()
	for to := p.path("referrers", subject.String()) + query; to != ""; pages++ {
		a := p.sends(200, "GET", to, nil)
		var index v1.Index
		if err := json.Unmarshal(a.body, &index); err != nil || index.Manifests == nil || index.SchemaVersion != 2 ||
			index.MediaType != v1.MediaTypeImageIndex || a.Header.Get("Content-Type") != v1.MediaTypeImageIndex || len(a.body) > 4<<20 {
			p.t.Fatalf("%s: %d bytes, %.300s %v: %v", to, len(a.body), a.body, a.Header, err)
		}
		all, to = append(all, index.Manifests...), nextOf(a)
	}
	return all, pages
}

// nextOf is where the next page is; "": nowhere.
func nextOf(a *answer) string {
	link := a.Header.Get("Link")
	if link == "" {
		return ""
	}
	target, rel, ok := strings.Cut(strings.TrimPrefix(link, "<"), ">")
	if !ok || rel != `; rel="next"` {
		return "/not-a-link/" + link
	}
	return target
}

// artifact is a manifest with one layer, as oras pushes it.
func artifact(kind string, subject *v1.Descriptor, annotations map[string]string, layer regtest.Content) regtest.Image {
	empty := regtest.Blob("application/vnd.oci.empty.v1+json", []byte("{}"))
	manifest := map[string]any{
		"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "config": empty.Descriptor(), "layers": []v1.Descriptor{layer.Descriptor()},
	}
	if kind != "" {
		manifest["artifactType"] = kind
	}
	if subject != nil {
		manifest["subject"] = subject
	}
	if annotations != nil {
		manifest["annotations"] = annotations
	}
	return regtest.Image{Content: regtest.JSON(v1.MediaTypeImageManifest, manifest), Blobs: []regtest.Content{empty, layer}}
}

// renamed is content under a digest of another algorithm.
func renamed(c regtest.Content, algorithm digest.Algorithm) regtest.Content {
	c.Digest = algorithm.FromBytes(c.Data)
	return c
}
