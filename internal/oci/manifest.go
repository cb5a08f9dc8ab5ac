package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxManifestSize is the largest manifest taken from an upstream, and from a
// client unless the configuration says otherwise, in bytes: 4 MiB, what the spec
// asks registries to support and about what containerd is willing to read.
const MaxManifestSize = 4 << 20

// MaxStoredManifest is the largest manifest that is stored and served, in bytes:
// what is pushed may be as large if a configuration says so.
const MaxStoredManifest = 32 << 20

// A Manifest is what this program reads of a manifest's bytes, of whatever
// type. The bytes themselves are what is stored and served; they are never
// written again from this.
type Manifest struct {
	// MediaType is a pure function of the bytes: their mediaType field, else
	// what their structure says. Upstreams' Content-Type headers are not
	// trusted for it, because several send text/plain or octet-stream.
	MediaType    string
	ArtifactType string
	Annotations  map[string]string
	Subject      *v1.Descriptor
	// Blobs are the config and layers, less foreign layers, which no registry
	// holds.
	Blobs []v1.Descriptor
	// Foreign are those foreign layers. Whoever has pushed one here all the same
	// wants it kept.
	Foreign []v1.Descriptor
	// Children are the manifests of an index.
	Children []v1.Descriptor
}

// ParseManifest reads a manifest of any known type. It refuses what is not a
// JSON object, and bytes that claim to be an index and an image at once
// (CVE-2021-41190), because two clients would run different things from one
// digest.
func ParseManifest(body []byte) (*Manifest, error) {
	var raw struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		ArtifactType  string            `json:"artifactType"`
		Annotations   map[string]string `json:"annotations"`
		Subject       *v1.Descriptor    `json:"subject"`
		Config        *v1.Descriptor    `json:"config"`
		Layers        []v1.Descriptor   `json:"layers"`
		Blobs         []v1.Descriptor   `json:"blobs"`
		Manifests     *[]v1.Descriptor  `json:"manifests"`
		FSLayers      []struct {
			BlobSum digest.Digest `json:"blobSum"`
		} `json:"fsLayers"`
		Signatures json.RawMessage `json:"signatures"`
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, fmt.Errorf("not a manifest: %w", err)
	}
	image := raw.Config != nil || raw.Layers != nil || raw.FSLayers != nil
	index := raw.Manifests != nil
	switch raw.MediaType {
	case v1.MediaTypeImageManifest, MediaTypeDockerManifest:
		image = true
	case v1.MediaTypeImageIndex, MediaTypeDockerList:
		index = true
	}
	if image && index {
		return nil, errors.New("ambiguous manifest: both an index and an image (CVE-2021-41190)")
	}
	m := &Manifest{
		MediaType:    raw.MediaType,
		ArtifactType: raw.ArtifactType,
		Annotations:  raw.Annotations,
		Subject:      raw.Subject,
	}
	if m.MediaType == "" {
		switch {
		case raw.Manifests != nil:
			m.MediaType = v1.MediaTypeImageIndex
		case raw.SchemaVersion == 1 && raw.Signatures != nil:
			m.MediaType = MediaTypeDockerSchema1Signed
		case raw.SchemaVersion == 1:
			m.MediaType = MediaTypeDockerSchema1
		case raw.Config != nil && raw.Config.Digest != "" || raw.Layers != nil: // an image's config has a config, too
			m.MediaType = v1.MediaTypeImageManifest
		default:
			return nil, errors.New("not a manifest: no mediaType, and neither manifests, config nor layers")
		}
	} else if m.MediaType == MediaTypeDockerSchema1 && raw.Signatures != nil {
		m.MediaType = MediaTypeDockerSchema1Signed
	}
	if raw.Config != nil {
		if m.ArtifactType == "" && raw.Manifests == nil {
			m.ArtifactType = raw.Config.MediaType
		}
		m.Blobs = append(m.Blobs, *raw.Config)
	}
	for _, layer := range append(raw.Layers, raw.Blobs...) {
		if foreign(layer) {
			m.Foreign = append(m.Foreign, layer)
		} else {
			m.Blobs = append(m.Blobs, layer)
		}
	}
	for _, layer := range raw.FSLayers {
		m.Blobs = append(m.Blobs, v1.Descriptor{Digest: layer.BlobSum, Size: -1})
	}
	if raw.Manifests != nil {
		m.Children = *raw.Manifests
	}
	m.Blobs, m.Foreign, m.Children = valid(m.Blobs), valid(m.Foreign), valid(m.Children)
	return m, nil
}

// foreign reports a layer that lives outside registries. Its urls are never
// followed (CVE-2020-15157).
func foreign(d v1.Descriptor) bool {
	return len(d.URLs) > 0 && (strings.Contains(d.MediaType, ".foreign.") || strings.Contains(d.MediaType, ".nondistributable."))
}

// valid drops descriptors that cannot be asked for.
func valid(descriptors []v1.Descriptor) []v1.Descriptor {
	var out []v1.Descriptor
	for _, d := range descriptors {
		if _, err := ParseDigest(d.Digest.String()); err == nil && d.Size >= -1 {
			out = append(out, d)
		}
	}
	return out
}
