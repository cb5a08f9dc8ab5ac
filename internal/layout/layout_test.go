package layout

import (
	_ "crypto/sha512" // the program has it from net/http
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

const (
	hex256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	hex512 = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce" +
		"47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"
	d256 = digest.Digest("sha256:" + hex256)
	d512 = digest.Digest("sha512:" + hex512)
)

// The keys are those of distribution, registry/storage/paths.go: a tree that
// registry:2 wrote must be found, and what is written must be found by it.
func TestKeys(t *testing.T) {
	for _, c := range []struct{ name, got, want string }{
		{"blob", Blob(d256), "docker/registry/v2/blobs/sha256/e3/" + hex256 + "/data"},
		{"layer", LayerLink("library/nginx", d256), "docker/registry/v2/repositories/library/nginx/_layers/sha256/" + hex256 + "/link"},
		{"layer by sha512", LayerLink("library/nginx", d512), "docker/registry/v2/repositories/library/nginx/_layers/sha512/" + hex512 + "/link"},
		{"revisions", Revisions("a"), "docker/registry/v2/repositories/a/_manifests/revisions/"},
		{"revision", RevisionLink("a/b/c", d256), "docker/registry/v2/repositories/a/b/c/_manifests/revisions/sha256/" + hex256 + "/link"},
		{"revision by sha512", RevisionLink("a", d512), "docker/registry/v2/repositories/a/_manifests/revisions/sha512/" + hex512 + "/link"},
		{"tags", Tags("a/b"), "docker/registry/v2/repositories/a/b/_manifests/tags/"},
		{"tag", TagLink("a/b", "v1.0"), "docker/registry/v2/repositories/a/b/_manifests/tags/v1.0/current/link"},
		{"tag index", TagIndexLink("a/b", "v1.0", d256), "docker/registry/v2/repositories/a/b/_manifests/tags/v1.0/index/sha256/" + hex256 + "/link"},
		{"layers", Layers("a/b"), "docker/registry/v2/repositories/a/b/_layers/"},
		{"manifests", Manifests("a/b"), "docker/registry/v2/repositories/a/b/_manifests/"},
		{"what a tag has meant", TagIndex("a/b", "v1.0"), "docker/registry/v2/repositories/a/b/_manifests/tags/v1.0/index/"},
		{"repositories", Repositories, "docker/registry/v2/repositories/"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %s\nwant %s", c.name, c.got, c.want)
		}
	}
}

// Ours lies beside registry:2's tree, never inside.
func TestRecord(t *testing.T) {
	key := Record("docker.io/library/nginx")
	if strings.HasPrefix(key, "docker/") || !strings.HasPrefix(key, "mirror/records/") {
		t.Errorf("a record lies at %s", key)
	}
	if Record("a") == Record("a/b") || strings.HasPrefix(Record("a/b"), Record("a")+"/") {
		t.Errorf("the records of a and a/b collide: %s, %s", Record("a"), Record("a/b"))
	}
}

func TestDigestOf(t *testing.T) {
	for _, d := range []digest.Digest{d256, d512} {
		for _, key := range []string{RevisionLink("a/b", d), LayerLink("a", d), TagIndexLink("a", "x", d), d.Algorithm().String() + "/" + d.Encoded() + "/link"} {
			if got, ok := DigestOf(key); !ok || got != d {
				t.Errorf("DigestOf(%s) = %q, %v", key, got, ok)
			}
		}
	}
	for _, key := range []string{
		"", "link", "sha256/link", hex256 + "/link", "/" + hex256 + "/link",
		TagLink("a", "x"), Blob(d256), Record("a"),
		RevisionLink("a", d256) + "/", RevisionLink("a", d256) + ".tmp",
		Revisions("a") + "sha256/" + hex256[1:] + "/link",
		Revisions("a") + "sha256/" + strings.ToUpper(hex256) + "/link",
		Revisions("a") + "sha512/" + hex256 + "/link",
		Revisions("a") + "md5/d41d8cd98f00b204e9800998ecf8427e/link",
		Revisions("a") + "sha256/" + hex256 + "/data",
	} {
		if got, ok := DigestOf(key); ok {
			t.Errorf("DigestOf(%q) = %q, want none", key, got)
		}
	}
}

func TestPins(t *testing.T) {
	keys := map[string]bool{}
	for _, c := range []struct {
		repository, tag string
		d               digest.Digest
	}{
		{"a", "v1", ""}, {"a/b", "v1", ""}, {"a", "", d256}, {"a/b/c", "", d512},
		{"a", "sha256-" + hex256, ""}, {"a", "x.json", ""}, {"tags", "manifests", ""},
	} {
		key := Pin(c.repository, c.tag, c.d)
		if keys[key] || strings.Contains(key, ":") || !strings.HasPrefix(key, Pins(c.repository)) || !strings.HasPrefix(key, "mirror/records/") {
			t.Errorf("the pin of %+v lies at %s", c, key)
		}
		keys[key] = true
		if repository, tag, d, ok := PinOf(key); !ok || repository != c.repository || tag != c.tag || d != c.d {
			t.Errorf("PinOf(%s) = %q, %q, %q, %v", key, repository, tag, d, ok)
		}
	}
	for _, key := range []string{
		"", Record("a"), TagRecord("a", "v1"), Pins(""), Pins("a"), Pins("a") + "_tags/.json", Pins("a") + "_tags/v1",
		Pins("a") + "_tags/v1/x.json", Pins("a") + "_manifests/sha256/" + hex256, Pins("a") + "_manifests/sha256/ab.json",
		Pins("a") + "v1.json", Pins("") + "_tags/v1.json",
	} {
		if repository, tag, d, ok := PinOf(key); ok {
			t.Errorf("PinOf(%s) = %q, %q, %q", key, repository, tag, d)
		}
	}
}
