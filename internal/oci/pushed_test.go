package oci

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestParsePushedRequires: what a manifest cannot do without.
func TestParsePushedRequires(t *testing.T) {
	descriptor := func(mediaType, name, more string) string {
		return `{"mediaType":"` + mediaType + `","digest":"` + digest.FromString(name).String() + `","size":1` + more + `}`
	}
	config := `"config":` + descriptor(v1.MediaTypeImageConfig, "config", "")
	layers := []string{
		descriptor(v1.MediaTypeImageLayerGzip, "layer", ""),
		descriptor(v1.MediaTypeImageLayerGzip, "away", `,"urls":["https://x.example/"]`),
		descriptor(v1.MediaTypeImageLayerGzip, "nowhere", `,"urls":[]`),
		descriptor("application/vnd.oci.image.layer.nondistributable.v1.tar", "theirs", ""),
		descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign", ""),
	}
	child := `"manifests":[` + descriptor(v1.MediaTypeImageManifest, "child", "") + `]`
	for name, c := range map[string]struct {
		body string
		want string
	}{
		"image":    {`{"schemaVersion":2,` + config + `,"layers":[` + strings.Join(layers, ",") + `]}`, "config layer nowhere"},
		"nothing":  {`{"schemaVersion":2,` + config + `,"layers":[]}`, "config"},
		"artifact": {`{"mediaType":"` + MediaTypeOCIArtifact + `","blobs":[` + layers[0] + `]}`, "layer"},
		"index":    {`{"schemaVersion":2,` + child + `}`, ""},
		"subject":  {`{"schemaVersion":2,` + config + `,"layers":[],"subject":` + descriptor(v1.MediaTypeImageManifest, "subject", "") + `}`, "config"},
	} {
		_, required, err := ParsePushed([]byte(c.body))
		var want, got []digest.Digest
		for name := range strings.FieldsSeq(c.want) {
			want = append(want, digest.FromString(name))
		}
		for _, d := range required {
			got = append(got, d.Digest)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, want)
		}
	}
}

func FuzzParsePushed(f *testing.F) {
	for _, c := range manifestCases() {
		f.Add([]byte(c.body))
	}
	f.Add([]byte(`{"layers":[],"LAYERS":[]}`))
	f.Add([]byte(`{"mediaType":"` + MediaTypeOCIArtifact + `","blobs":[{"digest":"sha256:x"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, required, err := ParsePushed(body)
		if err != nil {
			if m != nil || required != nil {
				t.Error("a manifest together with an error")
			}
			return
		}
		// Whatever is taken in can be read again, and nothing of it was left out.
		read, err := ParseManifest(body)
		if err != nil || read.MediaType != m.MediaType || !slices.Contains(pushedTypes, m.MediaType) {
			t.Errorf("%s: %v", body, err)
		}
		for _, d := range required {
			if _, err := ParseDigest(d.Digest.String()); err != nil || !slices.ContainsFunc(m.Blobs, func(b v1.Descriptor) bool { return b.Digest == d.Digest }) {
				t.Errorf("%s requires %s", body, d.Digest)
			}
		}
		var keys map[string]json.RawMessage
		if json.Unmarshal(body, &keys) != nil {
			t.Errorf("%s is no object", body)
		}
	})
}
