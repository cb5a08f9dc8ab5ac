package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// The tests in this file and in those that begin with protocol go through what
// the distribution specification says of a registry, and through all that the two
// conformance suites check, against what is hosted here.

// TestProtocolMethods: what every path answers, and what it does not.
func TestProtocolMethods(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	p.image(image, "v1")
	for _, c := range []struct {
		path  string
		allow string
	}{
		{"/v2/", "GET, HEAD"},
		{"/v2/_catalog", "GET, HEAD"},
		{p.path("tags", "list"), "GET, HEAD"},
		{p.path("referrers", image.Digest.String()), "GET, HEAD"},
		{p.path("manifests", "v1"), "GET, HEAD, PUT, DELETE"},
		{p.path("manifests", image.Digest.String()), "GET, HEAD, PUT, DELETE"},
		{p.path("blobs", image.Blobs[0].Digest.String()), "GET, HEAD, DELETE"},
		{p.path("blobs", "uploads", ""), "POST"},
		{p.path("blobs", "uploads"), "POST"},
		{p.path("blobs", "uploads", "x"), "GET, HEAD, PATCH, PUT, DELETE"},
		{p.path("nothing", "here"), "GET, HEAD"},
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} {
			if slices.Contains(strings.Split(c.allow, ", "), method) {
				continue
			}
			a := m.sends(405, method, c.path, nil)
			if got := a.Header.Get("Allow"); got != c.allow {
				t.Errorf("%s %s: Allow %q, want %q", method, c.path, got, c.allow)
			}
			if a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
				t.Errorf("%s %s: no Docker-Distribution-Api-Version", method, c.path)
			}
			if method != "HEAD" && !bytes.Contains(a.body, []byte(`"UNSUPPORTED"`)) {
				t.Errorf("%s %s: %s", method, c.path, a.body)
			}
		}
	}
	// Nothing of it has changed anything.
	p.pull("apps/web", "v1", image)
	for _, method := range []string{"GET", "HEAD"} {
		a := m.sends(200, method, "/v2/", nil)
		if a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" || a.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s /v2/: %v", method, a.Header)
		}
	}
}

// TestProtocolAbsent: what is not there, in a repository and in none.
func TestProtocolAbsent(t *testing.T) {
	m := start(t, "", hostedSite)
	pusher{m, "apps/web"}.image(regtest.NewImage("x"), "v1")
	none := regtest.Random("none", 10)
	for _, repository := range []string{"apps/web", "apps/none"} {
		p := pusher{m, repository}
		for _, c := range []struct {
			methods string
			path    string
			status  int
			code    string
		}{
			{"GET HEAD DELETE", p.path("manifests", "none"), 404, oci.CodeManifestUnknown},
			{"GET HEAD DELETE", p.path("manifests", none.Digest.String()), 404, oci.CodeManifestUnknown},
			{"GET HEAD DELETE", p.path("manifests", renamed(none, digest.SHA512).Digest.String()), 404, oci.CodeManifestUnknown},
			{"GET HEAD DELETE", p.path("blobs", none.Digest.String()), 404, oci.CodeBlobUnknown},
			{"GET HEAD DELETE", p.path("blobs", renamed(none, digest.SHA512).Digest.String()), 404, oci.CodeBlobUnknown},
			// What cannot be a tag is not there; what cannot be a digest is wrong.
			{"GET HEAD DELETE", p.path("manifests", ".INVALID_MANIFEST_NAME"), 404, oci.CodeManifestUnknown},
			{"GET HEAD DELETE", p.path("manifests", "sha256:totallywrong"), 400, oci.CodeManifestInvalid},
			{"GET HEAD DELETE", p.path("manifests", "sha256:"+strings.Repeat("A", 64)), 400, oci.CodeManifestInvalid},
			{"GET HEAD DELETE", p.path("manifests", "md5:"+strings.Repeat("a", 32)), 400, oci.CodeManifestInvalid},
			{"GET HEAD DELETE", p.path("blobs", "sha256:totallywrong"), 400, oci.CodeDigestInvalid},
			{"GET HEAD DELETE", p.path("blobs", "v1"), 400, oci.CodeDigestInvalid},
			{"GET HEAD", p.path("referrers", "sha256:totallywrong"), 400, oci.CodeManifestInvalid},
			{"GET HEAD", p.path("referrers", "v1"), 400, oci.CodeManifestInvalid},
			{"GET HEAD", p.path("nothing", "here"), 404, oci.CodeUnsupported},
			{"GET HEAD", "/v2/Apps/web/tags/list", 400, oci.CodeNameInvalid},
			{"GET HEAD", "/v2/other/web/tags/list", 404, oci.CodeNameUnknown},
			{"GET HEAD", p.path("tags", "list?n=x"), 400, oci.CodePageInvalid},
			{"GET HEAD", p.path("tags", "list?n=-1"), 400, oci.CodePageInvalid},
		} {
			for method := range strings.FieldsSeq(c.methods) {
				if method == "HEAD" {
					if a := m.sends(c.status, method, c.path, nil); len(a.body) > 0 || a.Header.Get("Content-Type") != "application/json" {
						t.Errorf("HEAD %s: %v", c.path, a.Header)
					}
					continue
				}
				m.refused(c.status, c.code, method, c.path, nil, "")
			}
		}
		// Of what could be there, the API for referrers never says 404.
		for _, d := range []digest.Digest{none.Digest, digest.SHA512.FromString("none")} {
			if found, pages := p.referrers(d, ""); len(found) != 0 || pages != 1 {
				t.Errorf("%s: %v on %d pages", d, found, pages)
			}
		}
	}
	m.refused(404, oci.CodeNameUnknown, "GET", "/v2/apps/none/tags/list", nil, "apps/none")
}

// A kind is a kind of data that the conformance suites push, pull and delete.
type kind struct {
	name   string
	blobs  []regtest.Content
	images []regtest.Content // manifests in the order in which they are pushed
	tags   map[string]int    // which of them a tag means
	absent []regtest.Content // blobs that are not there
}

// kinds are all that the suites have, each once.
func kinds() []kind {
	layer := func(name string) regtest.Content { return regtest.Random(name, 300) }
	of := func(name string, image regtest.Image) kind {
		return kind{name: name, blobs: image.Blobs, images: []regtest.Content{image.Content}, tags: map[string]int{name: 0}}
	}
	index := func(name string, extra map[string]any, images ...regtest.Image) kind {
		k := kind{name: name}
		list := map[string]any{"schemaVersion": 2, "mediaType": v1.MediaTypeImageIndex}
		manifests := []v1.Descriptor{}
		for _, image := range images {
			k.blobs = append(k.blobs, image.Blobs...)
			for _, child := range image.Children {
				k.blobs = append(k.blobs, child.Blobs...)
				k.images = append(k.images, child.Content)
			}
			k.images = append(k.images, image.Content)
			manifests = append(manifests, image.Descriptor())
		}
		list["manifests"] = manifests
		maps.Copy(list, extra)
		k.images = append(k.images, regtest.JSON(v1.MediaTypeImageIndex, list))
		k.tags = map[string]int{name: len(k.images) - 1}
		return k
	}
	// edited is an image whose manifest is changed.
	edited := func(image regtest.Image, edit func(manifest map[string]any)) regtest.Image {
		var manifest map[string]any
		if err := json.Unmarshal(image.Data, &manifest); err != nil {
			panic(err)
		}
		edit(manifest)
		image.Content = regtest.JSON(image.MediaType, manifest)
		return image
	}
	amd, arm := regtest.NewImage("amd", layer("amd")), regtest.NewImage("arm", layer("arm"))

	kinds := []kind{
		of("image", regtest.NewImage("image", layer("1"), layer("2"))),
		of("no-layers", edited(regtest.NewImage("no layers"), func(m map[string]any) { m["layers"] = []any{} })),
		of("no-media-type", edited(regtest.NewImage("no type", layer("no type")), func(m map[string]any) { delete(m, "mediaType") })),
		of("custom-fields", edited(regtest.NewImage("custom", layer("custom")), func(m map[string]any) {
			m["org.example.custom"] = "<&>"
			m["config"].(map[string]any)["newUnspecifiedField"] = "aGVsbG8="
		})),
		of("docker", func() regtest.Image {
			image := edited(regtest.NewImage("docker", layer("docker")), func(m map[string]any) { m["mediaType"] = oci.MediaTypeDockerManifest })
			image.MediaType = oci.MediaTypeDockerManifest
			return image
		}()),
		of("large-manifest", edited(regtest.NewImage("large", layer("large")), func(m map[string]any) {
			annotations := map[string]string{}
			for i := range 390 {
				annotations[fmt.Sprint("large-annotation-", i)] = strings.Repeat("A", 10_000)
			}
			m["annotations"] = annotations
		})),
		of("artifact", artifact("application/vnd.example.artifact", nil, nil, layer("artifact"))),
		of("artifact-without-layers", artifact("application/vnd.example.artifact", nil, nil, regtest.Blob("application/vnd.oci.empty.v1+json", []byte("{}")))),
		index("index", nil, amd, arm),
		index("custom-index", map[string]any{"org.example.custom": []any{1, nil}}, amd, arm),
		index("artifact-index", map[string]any{"artifactType": "application/vnd.example.artifact"}, amd, arm),
		index("empty-index", nil),
		index("nested-index", nil, regtest.NewIndex(amd, arm), regtest.NewIndex(arm)),
	}
	data := regtest.NewImage("data", layer("data"))
	kinds = append(kinds, of("data-field", edited(data, func(m map[string]any) {
		m["config"].(map[string]any)["data"] = data.Blobs[0].Data
	})))

	subject := amd.Descriptor()
	referrers := of("subject", amd)
	for i, image := range []regtest.Image{
		artifact("", &subject, nil, layer("r0")),
		artifact("application/vnd.example.sbom", &subject, map[string]string{"org.example.n": "<1>"}, layer("r1")),
		artifact("application/vnd.example.signature", &subject, map[string]string{"org.example.n": "2"}, layer("r2")),
	} {
		referrers.blobs = append(referrers.blobs, image.Blobs...)
		referrers.images = append(referrers.images, image.Content)
		referrers.tags[fmt.Sprint("referrer-", i)] = i + 1
	}
	kinds = append(kinds, referrers, index("subject-index", map[string]any{"subject": subject, "annotations": map[string]string{"a": "b"}}, arm))
	missing := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("missing content"), Size: 123}
	kinds = append(kinds, of("missing-subject", artifact("application/vnd.example.sbom", &missing, map[string]string{"a": "b"}, layer("missing"))))

	foreign := regtest.NewImage("foreign", layer("foreign"))
	away := func(name, mediaType string, urls ...string) v1.Descriptor {
		return v1.Descriptor{MediaType: mediaType, Digest: digest.FromString(name), Size: 123456, URLs: urls}
	}
	kinds = append(kinds, of("nondistributable", edited(foreign, func(m map[string]any) {
		m["layers"] = append([]any{
			away("1", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "https://store.example.com/1"),
			away("2", "application/vnd.oci.image.layer.nondistributable.v1.tar", "https://store.example.com/2"),
			away("3", "application/vnd.oci.image.layer.nondistributable.v1.tar"),
			away("4", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "https://store.example.com/4"),
			away("5", v1.MediaTypeImageLayerGzip, "https://store.example.com/5"),
		}, m["layers"].([]any)...)
	})))
	sparse := index("sparse-index", nil, amd, arm)
	sparse.images = slices.DeleteFunc(sparse.images, func(c regtest.Content) bool { return c.Digest == arm.Digest })
	sparse.tags["sparse-index"] = 1
	return append(kinds, sparse)
}

// TestProtocolKinds pushes, lists, describes, pulls, finds and deletes every kind
// of data, under sha256 and under sha512, into a repository that is empty and that
// stays while the others come and go.
func TestProtocolKinds(t *testing.T) {
	m := start(t, "", hostedSite)
	for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		for _, k := range kinds() {
			t.Run(fmt.Sprint(k.name, " ", algorithm), func(t *testing.T) {
				m.t = t
				k.through(pusher{m, "apps/suite"}, algorithm)
			})
		}
	}
	m.t = t
	if tags, _ := (pusher{m, "apps/suite"}).tags(""); len(tags) != 0 {
		t.Errorf("left over: %q", tags)
	}
}

func (k kind) through(p pusher, algorithm digest.Algorithm) {
	t := p.t
	for _, blob := range k.blobs {
		p.blobAs(algorithm.FromBytes(blob.Data), blob.Data)
	}
	if algorithm != digest.Canonical {
		// Manifests name their blobs by sha256.
		for _, blob := range k.blobs {
			p.blob(blob.Data)
		}
	}
	for _, image := range k.images {
		p.put(algorithm.FromBytes(image.Data).String(), image)
	}
	for tag, i := range k.tags {
		if algorithm == digest.Canonical {
			p.put(tag, k.images[i])
			continue
		}
		// Only a parameter says that a tag is to mean a manifest by sha512.
		a := p.put(algorithm.FromBytes(k.images[i].Data).String()+"?tag="+tag, k.images[i])
		if got := a.Header.Values("OCI-Tag"); !slices.Equal(got, []string{tag}) {
			t.Errorf("OCI-Tag %q, want %s", got, tag)
		}
	}
	tags, _ := p.tags("")
	if want := slices.Sorted(maps.Keys(k.tags)); !slices.Equal(tags, want) {
		t.Errorf("tags %q, want %q", tags, want)
	}
	type held struct {
		path string
		regtest.Content
	}
	var all []held
	for tag, i := range k.tags {
		all = append(all, held{p.path("manifests", tag), renamed(k.images[i], algorithm)})
	}
	for _, image := range slices.Backward(k.images) {
		image = renamed(image, algorithm)
		all = append(all, held{p.path("manifests", image.Digest.String()), image})
	}
	for _, blob := range k.blobs {
		blob.MediaType = "application/octet-stream"
		for _, a := range []digest.Algorithm{algorithm, digest.Canonical} {
			blob := renamed(blob, a)
			all = append(all, held{p.path("blobs", blob.Digest.String()), blob})
		}
	}
	for _, h := range all {
		head := p.sends(200, "HEAD", h.path, nil)
		if len(head.body) != 0 {
			t.Errorf("HEAD %s has a body", h.path)
		}
		head.body = h.Data
		if err := check(head, h.Content); err != nil {
			t.Errorf("HEAD %s: %v", h.path, err)
		}
		if err := check(p.sends(200, "GET", h.path, nil, "Accept", v1.MediaTypeImageIndex, "Accept", v1.MediaTypeImageManifest), h.Content); err != nil {
			t.Errorf("GET %s: %v", h.path, err)
		}
		p.sends(304, "GET", h.path, nil, "If-None-Match", `"`+h.Digest.String()+`"`)
		p.sends(200, "GET", h.path, nil, "If-None-Match", `"`+digest.FromString("other").String()+`"`)
	}
	k.wantReferrers(p, k.images)
	gone := map[string]bool{}
	for _, h := range all {
		if !gone[h.path] {
			p.sends(202, "DELETE", h.path, nil)
		}
		p.sends(404, "HEAD", h.path, nil)
		p.sends(404, "GET", h.path, nil)
		p.sends(404, "DELETE", h.path, nil)
		gone[h.path] = true
		for _, other := range all { // the same content by another digest
			if strings.Contains(h.path, "/blobs/") && bytes.Equal(other.Data, h.Data) {
				gone[other.path] = true
			}
		}
	}
	k.wantReferrers(p, nil)
}

// wantReferrers finds the manifests that are there by their subjects.
func (k kind) wantReferrers(p pusher, there []regtest.Content) {
	t := p.t
	t.Helper()
	want := map[digest.Digest][]v1.Descriptor{}
	for _, image := range k.images {
		var manifest struct {
			ArtifactType string
			Config       v1.Descriptor
			Subject      *v1.Descriptor
			Annotations  map[string]string
		}
		if err := json.Unmarshal(image.Data, &manifest); err != nil {
			t.Fatal(err)
		}
		if manifest.Subject == nil {
			continue
		}
		subject := manifest.Subject.Digest
		want[subject] = append(want[subject], v1.Descriptor{})[:len(want[subject])]
		if !slices.ContainsFunc(there, func(c regtest.Content) bool { return c.Digest == image.Digest }) {
			continue
		}
		d := image.Descriptor()
		d.ArtifactType, d.Annotations = manifest.ArtifactType, manifest.Annotations
		if d.ArtifactType == "" && image.MediaType != v1.MediaTypeImageIndex {
			d.ArtifactType = manifest.Config.MediaType
		}
		want[subject] = append(want[subject], d)
	}
	for subject, referrers := range want {
		slices.SortFunc(referrers, func(a, b v1.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
		found, _ := p.referrers(subject, "")
		if got, want := plain(found), plain(referrers); got != want {
			t.Errorf("referrers of %s:\n%s, want\n%s", subject, got, want)
		}
		for _, one := range referrers {
			kind := one.ArtifactType
			if kind == "" {
				continue
			}
			alike := slices.DeleteFunc(slices.Clone(referrers), func(d v1.Descriptor) bool { return d.ArtifactType != kind })
			for _, written := range []string{kind, url.QueryEscape(kind)} {
				found, _ := p.referrers(subject, "?artifactType="+written)
				if got, want := plain(found), plain(alike); got != want {
					t.Errorf("referrers of %s with %s:\n%s, want\n%s", subject, written, got, want)
				}
			}
			a := p.sends(200, "GET", p.path("referrers", subject.String()+"?artifactType="+kind), nil)
			if a.Header.Get("OCI-Filters-Applied") != "artifactType" {
				t.Errorf("%v", a.Header)
			}
		}
	}
}

func plain(descriptors []v1.Descriptor) string {
	text, _ := json.Marshal(append([]v1.Descriptor{}, descriptors...))
	return string(text)
}
