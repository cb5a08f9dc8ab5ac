package oci

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	digestA = digest.FromString("a")
	digestB = digest.FromString("b")
	digestC = digest.FromString("c")
)

// desc is a descriptor in JSON.
func desc(mediaType string, d digest.Digest, more string) string {
	return `{"mediaType":"` + mediaType + `","digest":"` + d.String() + `","size":7` + more + `}`
}

const (
	typeConfig = "application/vnd.oci.image.config.v1+json"
	typeLayer  = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// imageConfig is a config blob as builders write it. It has a field called
// config, and is no manifest.
const imageConfig = `{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"],"Cmd":["/bin/sh"]},` +
	`"rootfs":{"type":"layers","diff_ids":["sha256:` + hex256 + `"]},"history":[{"created_by":"x"}]}`

type manifestCase struct {
	name      string
	body      string
	mediaType string // "": refused
	artifact  string
	blobs     []digest.Digest
	children  []digest.Digest
	subject   digest.Digest
}

func manifestCases() []manifestCase {
	config, layer := desc(typeConfig, digestA, ""), desc(typeLayer, digestB, "")
	child := desc(v1.MediaTypeImageManifest, digestC, `,"platform":{"architecture":"amd64","os":"linux"}`)
	image := `"schemaVersion":2,"config":` + config + `,"layers":[` + layer + `]`
	fsLayers := `"schemaVersion":1,"name":"x","tag":"y","fsLayers":[{"blobSum":"` + digestA.String() + `"},{"blobSum":"` + digestB.String() + `"}]`
	both, onlyC := []digest.Digest{digestA, digestB}, []digest.Digest{digestC}
	return []manifestCase{
		// By field.
		{"oci manifest", `{"mediaType":"` + v1.MediaTypeImageManifest + `",` + image + `}`, v1.MediaTypeImageManifest, typeConfig, both, nil, ""},
		{"docker manifest", `{"mediaType":"` + MediaTypeDockerManifest + `",` + image + `}`, MediaTypeDockerManifest, typeConfig, both, nil, ""},
		{"oci index", `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[` + child + `]}`, v1.MediaTypeImageIndex, "", nil, onlyC, ""},
		{"docker list", `{"schemaVersion":2,"mediaType":"` + MediaTypeDockerList + `","manifests":[` + child + `]}`, MediaTypeDockerList, "", nil, onlyC, ""},
		{"schema 1", `{"mediaType":"` + MediaTypeDockerSchema1 + `",` + fsLayers + `}`, MediaTypeDockerSchema1, "", both, nil, ""},
		{"schema 1, signed", `{"mediaType":"` + MediaTypeDockerSchema1 + `",` + fsLayers + `,"signatures":[{}]}`, MediaTypeDockerSchema1Signed, "", both, nil, ""},
		{"artifact", `{"mediaType":"` + MediaTypeOCIArtifact + `","artifactType":"application/x","blobs":[` + layer + `],"subject":` + desc(v1.MediaTypeImageManifest, digestC, "") + `}`,
			MediaTypeOCIArtifact, "application/x", []digest.Digest{digestB}, nil, digestC},
		{"unknown type", `{"mediaType":"application/vnd.new+json","layers":[` + layer + `]}`, "application/vnd.new+json", "", []digest.Digest{digestB}, nil, ""},

		// By structure.
		{"oci manifest without field", `{` + image + `}`, v1.MediaTypeImageManifest, typeConfig, both, nil, ""},
		{"oci index without field", `{"schemaVersion":2,"manifests":[` + child + `]}`, v1.MediaTypeImageIndex, "", nil, onlyC, ""},
		{"empty index", `{"schemaVersion":2,"manifests":[]}`, v1.MediaTypeImageIndex, "", nil, nil, ""},
		{"empty index with field", `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[]}`, v1.MediaTypeImageIndex, "", nil, nil, ""},
		{"schema 1 without field", `{` + fsLayers + `}`, MediaTypeDockerSchema1, "", both, nil, ""},
		{"signed schema 1 without field", `{` + fsLayers + `,"signatures":[{}]}`, MediaTypeDockerSchema1Signed, "", both, nil, ""},
		{"no layers", `{"schemaVersion":2,"config":` + config + `,"layers":[]}`, v1.MediaTypeImageManifest, typeConfig, []digest.Digest{digestA}, nil, ""},

		{"nested index", `{"schemaVersion":2,"manifests":[` + desc(v1.MediaTypeImageIndex, digestC, "") + `,` + desc(MediaTypeDockerList, digestA, "") + `]}`,
			v1.MediaTypeImageIndex, "", nil, []digest.Digest{digestC, digestA}, ""},
		{"artifact type of its own", `{"artifactType":"application/x",` + image + `}`, v1.MediaTypeImageManifest, "application/x", both, nil, ""},
		{"artifact type of an index", `{"schemaVersion":2,"artifactType":"application/x","manifests":[]}`, v1.MediaTypeImageIndex, "application/x", nil, nil, ""},
		{"subject", `{` + image + `,"subject":` + desc(v1.MediaTypeImageManifest, digestC, "") + `}`, v1.MediaTypeImageManifest, typeConfig, both, nil, digestC},
		{"unknown fields", `{` + image + `,"org.example":{"x":[1,2,null]}}`, v1.MediaTypeImageManifest, typeConfig, both, nil, ""},

		// Foreign layers lie in no registry; only their kind with urls.
		{"foreign layer of docker", `{"schemaVersion":2,"config":` + config + `,"layers":[` + desc("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", digestC, `,"urls":["https://x.example"]`) + `,` + layer + `]}`,
			v1.MediaTypeImageManifest, typeConfig, both, nil, ""},
		{"foreign layer of oci", `{"schemaVersion":2,"config":` + config + `,"layers":[` + desc(v1.MediaTypeImageLayerNonDistributableGzip, digestC, `,"urls":["https://x.example"]`) + `,` + layer + `]}`, //nolint:staticcheck // still met
			v1.MediaTypeImageManifest, typeConfig, both, nil, ""},
		{"pushed foreign layer", `{"schemaVersion":2,"config":` + config + `,"layers":[` + desc("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", digestC, "") + `]}`,
			v1.MediaTypeImageManifest, typeConfig, []digest.Digest{digestA, digestC}, nil, ""},
		{"ordinary layer with urls", `{"schemaVersion":2,"config":` + config + `,"layers":[` + desc(typeLayer, digestB, `,"urls":["https://x.example"]`) + `]}`,
			v1.MediaTypeImageManifest, typeConfig, both, nil, ""},

		// Descriptors that cannot be asked for.
		{"bad digests", `{"schemaVersion":2,"config":` + config + `,"layers":[{"digest":"sha256:zz","size":1},{"digest":"../../x","size":1},{"digest":"` + digestC.String() + `","size":-5}]}`,
			v1.MediaTypeImageManifest, typeConfig, []digest.Digest{digestA}, nil, ""},

		// Both at once (CVE-2021-41190).
		{"index and layers", `{"schemaVersion":2,"manifests":[` + child + `],"layers":[` + layer + `]}`, "", "", nil, nil, ""},
		{"index and config", `{"schemaVersion":2,"manifests":[` + child + `],"config":` + config + `}`, "", "", nil, nil, ""},
		{"index and schema 1", `{"manifests":[` + child + `],` + fsLayers + `}`, "", "", nil, nil, ""},
		{"index and image, with a field", `{"mediaType":"` + v1.MediaTypeImageIndex + `",` + image + `,"manifests":[]}`, "", "", nil, nil, ""},
		{"field says image, structure index", `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageManifest + `","manifests":[` + child + `]}`, "", "", nil, nil, ""},
		{"field says index, structure image", `{"mediaType":"` + v1.MediaTypeImageIndex + `",` + image + `}`, "", "", nil, nil, ""},
		{"field says list, structure image", `{"mediaType":"` + MediaTypeDockerList + `",` + image + `}`, "", "", nil, nil, ""},

		// Not manifests.
		{"nothing", ``, "", "", nil, nil, ""},
		{"empty object", `{}`, "", "", nil, nil, ""},
		{"null", `null`, "", "", nil, nil, ""},
		{"list", `[]`, "", "", nil, nil, ""},
		{"string", `"x"`, "", "", nil, nil, ""},
		{"html", `<html><body>log in</body></html>`, "", "", nil, nil, ""},
		{"cut off", `{` + image, "", "", nil, nil, ""},
		{"two", `{` + image + `}{}`, "", "", nil, nil, ""},
		{"wrong types", `{"schemaVersion":2,"layers":{"a":1}}`, "", "", nil, nil, ""},
		{"an error body", `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, "", "", nil, nil, ""},
		{"a token", `{"token":"x","expires_in":300}`, "", "", nil, nil, ""},
		{"an image's config", imageConfig, "", "", nil, nil, ""},
	}
}

func digests(list []v1.Descriptor) []digest.Digest {
	var out []digest.Digest
	for _, d := range list {
		out = append(out, d.Digest)
	}
	return out
}

func TestParseManifest(t *testing.T) {
	for _, c := range manifestCases() {
		t.Run(c.name, func(t *testing.T) {
			m, err := ParseManifest([]byte(c.body))
			if c.mediaType == "" {
				if err == nil {
					t.Fatalf("taken for %s: %s", m.MediaType, c.body)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.MediaType != c.mediaType || m.ArtifactType != c.artifact {
				t.Errorf("type %q, artifact type %q; want %q, %q", m.MediaType, m.ArtifactType, c.mediaType, c.artifact)
			}
			if got := digests(m.Blobs); !slices.Equal(got, c.blobs) {
				t.Errorf("blobs %v, want %v", got, c.blobs)
			}
			if got := digests(m.Children); !slices.Equal(got, c.children) {
				t.Errorf("children %v, want %v", got, c.children)
			}
			switch {
			case m.Subject == nil && c.subject != "", m.Subject != nil && m.Subject.Digest != c.subject:
				t.Errorf("subject %v, want %s", m.Subject, c.subject)
			}
		})
	}
}

func TestParseManifestKeepsWhatDescribes(t *testing.T) {
	m, err := ParseManifest([]byte(`{"schemaVersion":2,"annotations":{"a":"b"},"config":` + desc(typeConfig, digestA, "") + `}`))
	if err != nil {
		t.Fatal(err)
	}
	if m.Annotations["a"] != "b" || len(m.Annotations) != 1 {
		t.Errorf("annotations %v", m.Annotations)
	}
	if len(m.Blobs) != 1 || m.Blobs[0].Size != 7 || m.Blobs[0].MediaType != typeConfig {
		t.Errorf("blobs %+v", m.Blobs)
	}
	// Schema 1 says no sizes.
	m, err = ParseManifest([]byte(`{"schemaVersion":1,"fsLayers":[{"blobSum":"` + digestA.String() + `"}]}`))
	if err != nil || len(m.Blobs) != 1 || m.Blobs[0].Size != -1 {
		t.Errorf("schema 1: %+v, %v", m, err)
	}
}

func TestManifestTypesAreAllAskedFor(t *testing.T) {
	for _, want := range []string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex, MediaTypeDockerManifest, MediaTypeDockerList} {
		if !slices.Contains(ManifestTypes, want) {
			t.Errorf("%s is missing", want)
		}
	}
	// Where a registry has both, what is first in the list is preferred.
	if i := slices.Index(ManifestTypes, MediaTypeDockerSchema1); i >= 0 && i < slices.Index(ManifestTypes, MediaTypeDockerList) {
		t.Error("schema 1 comes before what replaced it")
	}
}

func FuzzParseManifest(f *testing.F) {
	for _, c := range manifestCases() {
		f.Add([]byte(c.body))
	}
	f.Add([]byte(strings.Repeat("[", 20000)))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := ParseManifest(body)
		if err != nil {
			if m != nil {
				t.Error("a manifest together with an error")
			}
			return
		}
		if m.MediaType == "" {
			t.Errorf("no media type: %s", body)
		}
		again, err := ParseManifest(body)
		if err != nil || again.MediaType != m.MediaType {
			t.Errorf("not a pure function of the bytes: %s", body)
		}
		if len(m.Children) > 0 && len(m.Blobs) > 0 {
			// An artifact manifest's blobs are no image's.
			var raw map[string]json.RawMessage
			if json.Unmarshal(body, &raw) == nil && raw["layers"] != nil && string(raw["layers"]) != "null" && raw["manifests"] != nil && string(raw["manifests"]) != "null" {
				t.Errorf("an index and an image: %s", body)
			}
		}
		for _, d := range append(m.Blobs, m.Children...) {
			if _, err := ParseDigest(d.Digest.String()); err != nil || d.Size < -1 {
				t.Errorf("descriptor %+v", d)
			}
		}
	})
}
