package regtest

import (
	"crypto/sha256"
	"encoding/json"
	"math/rand/v2"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Content is bytes with the names a registry gives them.
type Content struct {
	MediaType string
	Digest    digest.Digest
	Data      []byte
}

// Descriptor points to the content.
func (c Content) Descriptor() v1.Descriptor {
	return v1.Descriptor{MediaType: c.MediaType, Digest: c.Digest, Size: int64(len(c.Data))}
}

// Blob is content of arbitrary bytes.
func Blob(mediaType string, data []byte) Content {
	return Content{MediaType: mediaType, Digest: digest.FromBytes(data), Data: data}
}

// Random is a layer of n bytes that depend on the name alone.
func Random(name string, n int) Content {
	data := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(data)
	return Blob(v1.MediaTypeImageLayerGzip, data)
}

// JSON is content that is a document.
func JSON(mediaType string, document any) Content {
	data, err := json.Marshal(document)
	if err != nil {
		panic(err)
	}
	return Blob(mediaType, data)
}

// An Image is a manifest with what it names.
type Image struct {
	Content
	Blobs    []Content // config first
	Children []Image
}

// NewImage makes an OCI image out of layers. The name makes its config unique.
func NewImage(name string, layers ...Content) Image {
	config := JSON(v1.MediaTypeImageConfig, map[string]any{"author": name, "architecture": "amd64", "os": "linux"})
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: config.Descriptor()}
	image := Image{Blobs: append([]Content{config}, layers...)}
	for _, layer := range layers {
		manifest.Layers = append(manifest.Layers, layer.Descriptor())
	}
	image.Content = JSON(v1.MediaTypeImageManifest, manifest)
	return image
}

// NewIndex makes an index of images, the first for amd64 and the others for
// made-up architectures.
func NewIndex(images ...Image) Image {
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for i, image := range images {
		d := image.Descriptor()
		d.Platform = &v1.Platform{OS: "linux", Architecture: []string{"amd64", "arm64", "riscv64", "s390x"}[i%4]}
		index.Manifests = append(index.Manifests, d)
	}
	return Image{Content: JSON(v1.MediaTypeImageIndex, index), Children: images}
}
