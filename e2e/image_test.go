//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// An image is an index of two platforms, of which linux/amd64 can be run.
type image struct {
	index   v1.ImageIndex
	digest  string // of the index
	child   string // the digest of linux/amd64
	config  string // of linux/amd64
	big     string // its largest layer
	bigSize int64
	layer   v1.Layer         // the same
	amd64   []string         // its blobs
	blobs   map[string]int64 // those of both platforms, with their sizes
	payload string           // the sha256 of /data/blob
	says    string           // what it prints when it runs
}

// newImage makes an image whose content depends on its name.
func newImage(t *testing.T, name string) *image { return newImageOf(t, name, 24) }

// newImageOf makes one whose largest layer has so many MiB.
func newImageOf(t *testing.T, name string, mib int) *image {
	t.Helper()
	hello, err := os.ReadFile(helloBin)
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, mib<<20)
	rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(payload)
	img := &image{blobs: map[string]int64{}, payload: fmt.Sprintf("%x", sha256.Sum256(payload))}
	img.says = name + " " + img.payload

	greeting := layer(t, "etc/greeting", 0o644, []byte(name))
	big := layer(t, "data/blob", 0o644, payload)
	img.layer = big
	amd64 := platform(t, "amd64", layer(t, "hello", 0o755, hello), big, greeting)
	arm64 := platform(t, "arm64", layer(t, "hello", 0o755, payload[:1<<20]), greeting)
	img.index = mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: amd64, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm64, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}})

	img.digest = must(img.index.Digest()).String()
	img.child = must(amd64.Digest()).String()
	img.config = must(amd64.ConfigName()).String()
	img.big = must(big.Digest()).String()
	img.bigSize = must(big.Size())
	for _, child := range []v1.Image{amd64, arm64} {
		manifest := must(child.Manifest())
		for _, blob := range append(manifest.Layers, manifest.Config) {
			img.blobs[blob.Digest.String()] = blob.Size
			if child == amd64 {
				img.amd64 = append(img.amd64, blob.Digest.String())
			}
		}
	}
	return img
}

// all are the blobs of both platforms.
func (img *image) all() []string {
	var digests []string
	for digest := range img.blobs {
		digests = append(digests, digest)
	}
	return digests
}

func platform(t *testing.T, arch string, layers ...v1.Layer) v1.Image {
	t.Helper()
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(base, layers...)
	if err != nil {
		t.Fatal(err)
	}
	config := must(img.ConfigFile()).DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Config.Entrypoint = []string{"/hello"}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// layer is a layer of one file.
func layer(t *testing.T, path string, mode int64, data []byte) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if dir := filepath.Dir(path); dir != "." {
		must(0, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}))
	}
	must(0, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(data))}))
	must(w.Write(data))
	must(0, w.Close())
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	l, err := tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// must is for what cannot fail on content made here.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// checkLayout checks an OCI layout on disk: every blob against its name, and
// that those of want are there.
func checkLayout(t *testing.T, dir string, want []string) {
	t.Helper()
	found := map[string]bool{}
	folder := filepath.Join(dir, "blobs/sha256")
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		found["sha256:"+entry.Name()] = true
		if got := fileDigest(t, filepath.Join(folder, entry.Name())); got != entry.Name() {
			t.Errorf("blob %s has the digest %s", entry.Name(), got)
		}
	}
	for _, digest := range want {
		if !found[digest] {
			t.Errorf("blob %s is missing", digest)
		}
	}
}

func fileDigest(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}
