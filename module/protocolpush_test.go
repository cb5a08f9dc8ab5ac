package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestProtocolRefusedManifests: what is not taken in, with what the client is told.
// Nothing of it is there afterwards.
func TestProtocolRefusedManifests(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	base := regtest.NewImage("base", regtest.Random("layer", 100))
	for _, blob := range base.Blobs {
		p.blob(blob.Data)
	}
	config, layer := base.Blobs[0].Descriptor(), base.Blobs[1].Descriptor()
	elsewhere := regtest.Random("elsewhere", 100)
	pusher{m, "apps/other"}.blob(elsewhere.Data)
	image := func(edits ...any) string {
		manifest := map[string]any{"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "config": config, "layers": []any{layer}}
		for i := 0; i < len(edits); i += 2 {
			if edits[i+1] == nil {
				delete(manifest, edits[i].(string))
			} else {
				manifest[edits[i].(string)] = edits[i+1]
			}
		}
		text, err := json.Marshal(manifest)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	other := func(d v1.Descriptor, edit func(*v1.Descriptor)) v1.Descriptor {
		edit(&d)
		return d
	}
	const typed = "\x00" // the type that the body says
	for name, c := range map[string]struct {
		body string
		kind string // Content-Type; "": none
		ref  string // "": a tag
		code string
		says string
	}{
		"nothing":                  {"", typed, "", oci.CodeManifestInvalid, "not a manifest"},
		"no JSON":                  {"blablabla", v1.MediaTypeImageManifest, "", oci.CodeManifestInvalid, "not a manifest"},
		"half":                     {image()[:40], v1.MediaTypeImageManifest, "", oci.CodeManifestInvalid, "not a manifest"},
		"a list":                   {"[]", v1.MediaTypeImageManifest, "", oci.CodeManifestInvalid, "not a manifest"},
		"an empty object":          {"{}", v1.MediaTypeImageManifest, "", oci.CodeManifestInvalid, "neither manifests, config nor layers"},
		"another type":             {image(), v1.MediaTypeImageIndex, "", oci.CodeManifestInvalid, "Content-Type says"},
		"another type, parameters": {image(), oci.MediaTypeDockerManifest + "; charset=utf-8", "", oci.CodeManifestInvalid, "Content-Type says"},
		"a form":                   {image(), "application/x-www-form-urlencoded", "", oci.CodeManifestInvalid, "Content-Type says"},
		"no type, an index's":      {image("mediaType", nil), v1.MediaTypeImageIndex, "", oci.CodeManifestInvalid, "Content-Type says"},
		"an unknown type":          {image("mediaType", "application/vnd.example"), "application/vnd.example", "", oci.CodeManifestInvalid, "no type of manifest"},
		"schema 1":                 {`{"schemaVersion":1,"name":"x","tag":"y","fsLayers":[],"history":[]}`, oci.MediaTypeDockerSchema1, "", oci.CodeManifestInvalid, "schema 1"},
		"schema 1, signed":         {`{"schemaVersion":1,"name":"x","tag":"y","fsLayers":[],"history":[],"signatures":[{}]}`, oci.MediaTypeDockerSchema1Signed, "", oci.CodeManifestInvalid, "schema 1"},
		"schema 1 as well":         {image("fsLayers", []any{}), typed, "", oci.CodeManifestInvalid, "ambiguous"},
		"an index as well":         {image("manifests", []any{config}), typed, "", oci.CodeManifestInvalid, "ambiguous"},
		"an empty index as well":   {image("manifests", []any{}), typed, "", oci.CodeManifestInvalid, "ambiguous"},
		"an index with layers":     {`{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[],"layers":[]}`, typed, "", oci.CodeManifestInvalid, "ambiguous"},
		"an index with blobs":      {`{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[],"blobs":[]}`, typed, "", oci.CodeManifestInvalid, "ambiguous"},
		"layers twice":             {`{"layers":[],` + image()[1:], typed, "", oci.CodeManifestInvalid, "twice"},
		"layers twice by case":     {`{"LAYERS":[],` + image()[1:], typed, "", oci.CodeManifestInvalid, "twice"},
		"layers twice by folding":  {`{"layerſ":[],` + image()[1:], typed, "", oci.CodeManifestInvalid, "twice"},
		"a layer's digest twice":   {strings.Replace(image(), `"layers":[{`, `"layers":[{"digest":"`+elsewhere.Digest.String()+`",`, 1), typed, "", oci.CodeManifestInvalid, "twice"},
		"the same by case":         {strings.Replace(image(), `"layers":[{`, `"layers":[{"Digest":"`+elsewhere.Digest.String()+`",`, 1), typed, "", oci.CodeManifestInvalid, "twice"},
		"an annotation twice":      {`{"annotations":{"a":"1","a":"2"},` + image()[1:], typed, "", oci.CodeManifestInvalid, "twice"},
		"no config":                {image("config", nil), typed, "", oci.CodeManifestInvalid, "config"},
		"a config without digest":  {image("config", map[string]any{"size": 1}), typed, "", oci.CodeManifestInvalid, "digest"},
		"a layer of md5":           {image("layers", []any{other(layer, func(d *v1.Descriptor) { d.Digest = "md5:" + digest.Digest(strings.Repeat("a", 32)) })}), typed, "", oci.CodeManifestInvalid, "md5"},
		"a layer below zero":       {image("layers", []any{other(layer, func(d *v1.Descriptor) { d.Size = -1 })}), typed, "", oci.CodeManifestInvalid, "-1 bytes"},
		"a layer of another size":  {image("layers", []any{other(layer, func(d *v1.Descriptor) { d.Size++ })}), typed, "", oci.CodeManifestInvalid, "101 bytes"},
		"a subject that is no one": {image("subject", map[string]any{"digest": "sha256:x\r\nX: y"}), typed, "", oci.CodeManifestInvalid, "digest"},
		"annotations of numbers":   {image("annotations", map[string]any{"a": 1}), typed, "", oci.CodeManifestInvalid, "not a manifest"},
		"a missing layer":          {image("layers", []any{layer, elsewhere.Descriptor()}), typed, "", oci.CodeManifestBlobUnknown, elsewhere.Digest.String()},
		"a missing config":         {image("config", elsewhere.Descriptor()), typed, "", oci.CodeManifestBlobUnknown, elsewhere.Digest.String()},
		"a digest of other bytes":  {image(), typed, digest.FromString("x").String(), oci.CodeDigestInvalid, "digest"},
		"a sha512 of other bytes":  {image(), typed, digest.SHA512.FromString("x").String(), oci.CodeDigestInvalid, "digest"},
		"space after its digest":   {image() + "  ", typed, digest.FromString(image()).String(), oci.CodeDigestInvalid, "digest"},
		"no digest":                {image(), typed, "sha256:baddigeststring", oci.CodeManifestInvalid, "digest"},
		"a digest of capitals":     {image(), typed, strings.ToUpper(digest.FromString(image()).Encoded())[:0] + "sha256:" + strings.Repeat("A", 64), oci.CodeManifestInvalid, "digest"},
		"no tag":                   {image(), typed, ".INVALID_MANIFEST_NAME", oci.CodeTagInvalid, "tag"},
		"a long tag":               {image(), typed, strings.Repeat("t", 129), oci.CodeTagInvalid, "tag"},
	} {
		t.Run(name, func(t *testing.T) {
			m.t = t
			ref, kind := c.ref, c.kind
			if ref == "" {
				ref = "v1"
			}
			if kind == typed {
				var says struct{ MediaType string }
				json.Unmarshal([]byte(c.body), &says)
				kind = says.MediaType
			}
			status := 400
			if c.code == oci.CodeManifestBlobUnknown {
				status = 404
			}
			m.refused(status, c.code, "PUT", p.path("manifests", url.PathEscape(ref)), []byte(c.body), c.says, "Content-Type", kind)
			if tags, _ := p.tags(""); len(tags) != 0 {
				t.Errorf("tags %q", tags)
			}
			m.sends(404, "HEAD", p.path("manifests", digest.FromString(c.body).String()), nil)
		})
	}
	m.t = t
	// With nothing wrong it is taken in, whatever stands behind the type, and under
	// no type at all; and once more.
	for i, kind := range []string{v1.MediaTypeImageManifest + "; charset=utf-8", v1.MediaTypeImageManifest + ";", strings.ToUpper(v1.MediaTypeImageManifest), "", v1.MediaTypeImageManifest} {
		var header []string
		if kind != "" {
			header = []string{"Content-Type", kind}
		}
		m.sends(201, "PUT", p.path("manifests", fmt.Sprint("v", i)), []byte(image()), header...)
	}
	// Annotations have a case; and what a later version has is nobody's business.
	m.sends(201, "PUT", p.path("manifests", "v5"), []byte(image("annotations", map[string]string{"a": "1", "A": "2"}, "later", []any{json.RawMessage("1e999"), map[string]any{"x": nil}})), "Content-Type", v1.MediaTypeImageManifest)
	if tags, _ := p.tags(""); len(tags) != 6 {
		t.Errorf("tags %q", tags)
	}
}

// TestProtocolManifestSize: a manifest of just the size that is allowed comes back
// as it was; one that is larger is refused, unread if it says so.
func TestProtocolManifestSize(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	p.image(image, "v1")
	padded := func(n int) []byte {
		return append(bytes.Clone(image.Data), bytes.Repeat([]byte(" "), n-len(image.Data))...)
	}
	largest := regtest.Blob(image.MediaType, padded(4<<20))
	p.put("large", largest)
	p.put(largest.Digest.String(), largest)
	m.refused(413, oci.CodeSizeInvalid, "PUT", p.path("manifests", "larger"), padded(4<<20+1), "max_manifest_size", "Content-Type", image.MediaType)
	if tags, _ := p.tags(""); !slices.Equal(tags, []string{"large", "v1"}) {
		t.Errorf("tags %q", tags)
	}
}

// TestProtocolTagParameters: one push by digest sets many tags.
func TestProtocolTagParameters(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image, other := regtest.NewImage("x"), regtest.NewImage("y")
	p.image(other, "t1")
	p.blob(image.Blobs[0].Data)
	var query, want []string
	for i := range 10 {
		want = append(want, fmt.Sprint("t", i))
		query = append(query, fmt.Sprint("tag=t", i))
	}
	a := p.put(image.Digest.String()+"?x=y&"+strings.Join(query, "&")+"&tag=t3", image.Content)
	if got := a.Header.Values("OCI-Tag"); !slices.Equal(got, want) {
		t.Errorf("OCI-Tag %q, want %q", got, want)
	}
	if got, _ := p.tags(""); !slices.Equal(got, want) {
		t.Errorf("tags %q, want %q", got, want)
	}
	for _, tag := range want {
		p.pull(p.repository, tag, image)
	}
	if a := p.put(image.Digest.String(), image.Content); a.Header["Oci-Tag"] != nil {
		t.Errorf("OCI-Tag %q without any", a.Header.Values("OCI-Tag"))
	}
	// Under a tag the parameter means nothing, and says so by being left out.
	if a := p.put("alone?tag=ignored", image.Content); a.Header["Oci-Tag"] != nil {
		t.Errorf("OCI-Tag %q for a push by tag", a.Header.Values("OCI-Tag"))
	}
	var many []string
	for i := range 51 {
		many = append(many, fmt.Sprint("tag=many-", i))
	}
	for _, c := range []struct {
		query  string
		status int
		says   string
	}{
		{"tag=", 400, "is not a tag"},
		{"tag=.x", 400, "is not a tag"},
		{"tag=good&tag=a%2Fb", 400, "is not a tag"},
		{"tag=good&tag=%zz", 400, "is not a tag"},
		{strings.Join(many, "&"), 414, "50 tags"},
	} {
		m.refused(c.status, oci.CodeTagInvalid, "PUT", p.path("manifests", image.Digest.String()+"?"+c.query), image.Data, c.says, "Content-Type", image.MediaType)
	}
	if got, _ := p.tags(""); !slices.Equal(got, append([]string{"alone"}, want...)) {
		t.Errorf("tags %q", got)
	}
	if a := p.put(image.Digest.String()+"?"+strings.Join(many[:50], "&"), image.Content); len(a.Header.Values("OCI-Tag")) != 50 {
		t.Errorf("%d tags", len(a.Header.Values("OCI-Tag")))
	}
}

// TestProtocolTagList: the pages of a list of tags.
func TestProtocolTagList(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	m.refused(404, oci.CodeNameUnknown, "GET", p.path("tags", "list"), nil, "apps/web")
	image := regtest.NewImage("x")
	p.image(image)
	if tags, _ := p.tags(""); len(tags) != 0 {
		t.Errorf("tags %q of what has none", tags)
	}
	// As sort.Strings has them.
	all := []string{"1.10", "1.9", "A", "Z", "_x", "a", "latest", "v1", "v1.0", "v10"}
	for _, tag := range slices.Backward(all) {
		p.put(tag, image.Content)
	}
	for _, c := range []struct {
		query string
		want  []string
		pages int
	}{
		{"", all, 1},
		{"?n=10", all, 1},
		{"?n=100", all, 1},
		{"?n=1000000000", all, 1},
		{"?n=9", all, 2},
		{"?n=5", all, 2},
		{"?n=3", all, 4},
		{"?n=1", all, 10},
		{"?n=0", nil, 1},
		{"?n=0&last=A", nil, 1},
		{"?last=A", all[3:], 1},
		{"?last=B", all[3:], 1},
		{"?last=", all, 1},
		{"?last=zzz", nil, 1},
		{"?last=v10", nil, 1},
		{"?last=%FF", nil, 1},
		{"?n=2&last=Z", all[4:], 3},
	} {
		if got, pages := p.tags(c.query); !slices.Equal(got, c.want) || pages != c.pages {
			t.Errorf("%s: %q on %d pages, want %q on %d", c.query, got, pages, c.want, c.pages)
		}
	}
	for query, status := range map[string]int{"?n=99999999999999999999": 400, "?n=-1": 400, "?n=1.5": 400, "?n=x": 400} {
		m.refused(status, oci.CodePageInvalid, "GET", p.path("tags", "list"+query), nil, "n=")
	}
	// A tag that goes is on no page from that moment on, and its name still says
	// where to go on.
	p.sends(202, "DELETE", p.path("manifests", "a"), nil)
	if got, _ := p.tags("?n=2&last=a"); !slices.Equal(got, all[6:]) {
		t.Errorf("after a tag that is gone: %q", got)
	}
	p.sends(202, "DELETE", p.path("manifests", image.Digest.String()), nil)
	if got, _ := p.tags(""); len(got) != 0 {
		t.Errorf("of a manifest that is gone: %q", got)
	}
	a := p.sends(200, "HEAD", p.path("tags", "list"), nil)
	if len(a.body) != 0 || a.Header.Get("Content-Type") != "application/json" {
		t.Errorf("HEAD: %q %v", a.body, a.Header)
	}
}

// TestProtocolReferrerPages: a list that does not fit one answer comes on several,
// each once, in one order, filtered or not.
func TestProtocolReferrerPages(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	p.image(image, "v1")
	subject := image.Descriptor()
	layer := regtest.Random("layer", 10)
	var want []v1.Descriptor
	for i := range 7 {
		kind := []string{"application/vnd.a", "application/vnd.b"}[i%2]
		long := artifact(kind, &subject, map[string]string{"n": fmt.Sprint(i), "long": "<&>" + strings.Repeat("x", 1_500_000)}, layer)
		p.image(long)
		d := long.Descriptor()
		d.ArtifactType, d.Annotations = kind, map[string]string{"n": fmt.Sprint(i), "long": "<&>" + strings.Repeat("x", 1_500_000)}
		want = append(want, d)
	}
	slices.SortFunc(want, func(a, b v1.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	found, pages := p.referrers(subject.Digest, "")
	if plain(found) != plain(want) || pages != 4 {
		t.Errorf("%d referrers on %d pages", len(found), pages)
	}
	of := slices.DeleteFunc(slices.Clone(want), func(d v1.Descriptor) bool { return d.ArtifactType != "application/vnd.a" })
	found, pages = p.referrers(subject.Digest, "?artifactType=application/vnd.a")
	if plain(found) != plain(of) || pages != 2 {
		t.Errorf("%d referrers of one type on %d pages", len(found), pages)
	}
	for query, n := range map[string]int{
		"?artifactType=application/vnd.a&artifactType=application/vnd.b": 7,
		"?artifactType=application/vnd.c":                                0,
		"?artifactType=":                                                 7,
		"?last=" + want[2].Digest.String():                               4,
		"?last=" + want[6].Digest.String():                               0,
		"?last=sha512:" + strings.Repeat("0", 128):                       0,
	} {
		found, _ := p.referrers(subject.Digest, query)
		if len(found) != n {
			t.Errorf("%s: %d, want %d", query, len(found), n)
		}
	}
	m.refused(400, oci.CodePageInvalid, "GET", p.path("referrers", subject.Digest.String()+"?last=x"), nil, "last=x")
	// The one a page ended at may go meanwhile.
	first := p.sends(200, "GET", p.path("referrers", subject.Digest.String()), nil)
	var page v1.Index
	if err := json.Unmarshal(first.body, &page); err != nil {
		t.Fatal(err)
	}
	p.sends(202, "DELETE", p.path("manifests", page.Manifests[len(page.Manifests)-1].Digest.String()), nil)
	second := p.sends(200, "GET", nextOf(first), nil)
	var next v1.Index
	if err := json.Unmarshal(second.body, &next); err != nil || next.Manifests[0].Digest != want[len(page.Manifests)].Digest {
		t.Errorf("the next page begins at %s: %v", next.Manifests[0].Digest, err)
	}
	// Annotations that are longer than a page once they are written again are left
	// out, and said to be.
	huge := artifact("application/vnd.huge", &subject, map[string]string{"long": "LONG"}, layer)
	huge.Content = regtest.Blob(huge.MediaType, bytes.Replace(huge.Data, []byte("LONG"), bytes.Repeat([]byte("\u2028"), 1_000_000), 1))
	p.image(huge)
	a := p.sends(200, "GET", p.path("referrers", subject.Digest.String()+"?artifactType=application/vnd.huge"), nil)
	if found, _ := p.referrers(subject.Digest, "?artifactType=application/vnd.huge"); len(found) != 1 || found[0].Digest != huge.Digest || found[0].Annotations != nil {
		t.Errorf("%d referrers", len(found))
	}
	if !strings.Contains(a.Header.Get("Warning"), "left out") {
		t.Errorf("%v", a.Header)
	}
	// What JSON need not escape is not made longer.
	angles := artifact("application/vnd.angles", &subject, map[string]string{"long": "LONG"}, layer)
	angles.Content = regtest.Blob(angles.MediaType, bytes.Replace(angles.Data, []byte("LONG"), bytes.Repeat([]byte("<"), 1_000_000), 1))
	p.image(angles)
	if found, _ := p.referrers(subject.Digest, "?artifactType=application/vnd.angles"); len(found) != 1 || len(found[0].Annotations["long"]) != 1_000_000 {
		t.Errorf("%d referrers", len(found))
	}
}

// TestProtocolFallbackTag takes in what clients have written where there was no API
// for referrers, and is not confused by tags that only look like it.
func TestProtocolFallbackTag(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	p.image(image, "v1")
	subject, layer := image.Descriptor(), regtest.Random("layer", 10)
	listed := artifact("application/vnd.a", &subject, nil, layer)
	silent := artifact("application/vnd.b", nil, nil, layer) // names no subject itself
	of := regtest.NewImage("another").Descriptor()
	another := artifact("application/vnd.c", &of, nil, layer)
	never := artifact("application/vnd.d", &subject, nil, layer) // is not there
	signature := artifact("application/vnd.e", nil, nil, layer)
	for _, image := range []regtest.Image{listed, silent, another} {
		p.image(image)
	}
	tag := oci.FallbackTag(subject.Digest)
	for _, end := range []string{".sig", ".att", ".sbom"} {
		p.image(signature, tag+end)
	}
	p.put(tag, regtest.NewIndex(listed, silent, another, never).Content)
	digests := func() (all []digest.Digest) {
		found, _ := p.referrers(subject.Digest, "")
		for _, d := range found {
			all = append(all, d.Digest)
		}
		return all
	}
	want := []digest.Digest{listed.Digest, silent.Digest}
	slices.Sort(want)
	if got := digests(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	p.sends(202, "DELETE", p.path("manifests", silent.Digest.String()), nil)
	if got := digests(); !slices.Equal(got, []digest.Digest{listed.Digest}) {
		t.Errorf("%q after one was deleted", got)
	}
	p.sends(202, "DELETE", p.path("manifests", listed.Digest.String()), nil)
	if got := digests(); len(got) != 0 {
		t.Errorf("%q after all were deleted", got)
	}
	p.image(silent)
	if got := digests(); !slices.Equal(got, []digest.Digest{silent.Digest}) {
		t.Errorf("%q after one is back", got)
	}
	p.sends(202, "DELETE", p.path("manifests", tag), nil)
	if got := digests(); len(got) != 0 {
		t.Errorf("%q without the tag", got)
	}
}
