package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// pushedTypes are the manifests that are taken in. Every client can tell them
// apart by their bytes.
var pushedTypes = []string{
	v1.MediaTypeImageManifest,
	v1.MediaTypeImageIndex,
	MediaTypeDockerManifest,
	MediaTypeDockerList,
	MediaTypeOCIArtifact,
}

// ParsePushed reads a manifest that somebody wants to store here, and says which
// blobs it cannot do without: its config and its layers, less those that may not
// be distributed or that say where else they are.
//
// It refuses more than [ParseManifest], which must put up with what other
// registries have: bytes of which two clients could read different things, and
// whatever nobody could pull.
func ParsePushed(body []byte) (m *Manifest, required []v1.Descriptor, err error) {
	if m, err = ParseManifest(body); err != nil {
		return nil, nil, err
	}
	switch m.MediaType {
	case MediaTypeDockerSchema1, MediaTypeDockerSchema1Signed:
		return nil, nil, errors.New("schema 1 manifests are not taken in: no current client can pull them; push with Docker 1.10 or newer")
	}
	if !slices.Contains(pushedTypes, m.MediaType) {
		return nil, nil, fmt.Errorf("%.100q is no type of manifest that is taken in", m.MediaType)
	}
	if err := onceEach(body); err != nil {
		return nil, nil, err
	}
	var raw struct {
		Config    *v1.Descriptor    `json:"config"`
		Layers    []v1.Descriptor   `json:"layers"`
		Blobs     []v1.Descriptor   `json:"blobs"`
		Manifests []v1.Descriptor   `json:"manifests"`
		FSLayers  []json.RawMessage `json:"fsLayers"`
		Subject   *v1.Descriptor    `json:"subject"`
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, nil, fmt.Errorf("not a manifest: %w", err)
	}
	if raw.FSLayers != nil {
		return nil, nil, errors.New("ambiguous manifest: both of schema 1 and of another type")
	}
	// What a type does not have, one client would leave out and another would not.
	switch index := m.MediaType == v1.MediaTypeImageIndex || m.MediaType == MediaTypeDockerList; {
	case index && (raw.Config != nil || raw.Layers != nil || raw.Blobs != nil):
		return nil, nil, errors.New("ambiguous manifest: an index with a config or layers (CVE-2021-41190)")
	case !index && raw.Manifests != nil:
		return nil, nil, errors.New("ambiguous manifest: an image with manifests (CVE-2021-41190)")
	case !index && m.MediaType != MediaTypeOCIArtifact && raw.Config == nil:
		return nil, nil, errors.New("an image manifest has a config, and this one has none")
	}
	if raw.Config != nil {
		required = append(required, *raw.Config)
	}
	all := slices.Concat(required, raw.Layers, raw.Blobs, raw.Manifests)
	if raw.Subject != nil {
		all = append(all, *raw.Subject)
	}
	for _, d := range all {
		if _, err := ParseDigest(d.Digest.String()); err != nil {
			return nil, nil, fmt.Errorf("a descriptor cannot be followed: %w", err)
		}
		if d.Size < 0 {
			return nil, nil, fmt.Errorf("the descriptor of %s says it has %d bytes", d.Digest, d.Size)
		}
	}
	for _, d := range slices.Concat(raw.Layers, raw.Blobs) {
		if len(d.URLs) == 0 && !strings.Contains(d.MediaType, ".foreign.") && !strings.Contains(d.MediaType, ".nondistributable.") {
			required = append(required, d)
		}
	}
	return m, required, nil
}

// onceEach refuses an object with a key that is there twice, in whatever case: of
// two clients one would go by the first, and another by the last. It looks at
// descriptors, too; the keys of annotations are anybody's, and have a case.
func onceEach(body []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber() // whatever numbers there are in what nobody here reads
	return onceIn(decoder, false)
}

// onceIn does so for the value that is next. Its depth has been limited before, by
// json.Unmarshal.
func onceIn(decoder *json.Decoder, cased bool) error {
	token, err := decoder.Token()
	if err != nil {
		return err
	}
	delim, ok := token.(json.Delim)
	if !ok {
		return nil
	}
	seen := map[string]bool{}
	for decoder.More() {
		inside := cased
		if delim == '{' {
			key, err := decoder.Token()
			if err != nil {
				return err
			}
			name := fmt.Sprint(key)
			inside = cased || strings.EqualFold(name, "annotations")
			if !cased {
				name = strings.Map(folded, name)
			}
			if seen[name] {
				return fmt.Errorf("ambiguous manifest: it has %.50q twice", name)
			}
			seen[name] = true
		}
		if err := onceIn(decoder, inside); err != nil {
			return err
		}
	}
	_, err = decoder.Token()
	return err
}

// folded is one of all the letters that encoding/json takes for the same.
func folded(r rune) rune {
	for {
		next := unicode.SimpleFold(r)
		if next <= r {
			return next
		}
		r = next
	}
}
