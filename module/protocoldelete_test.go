package module_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// twoSites loads a configuration with a second site on the same store, and returns
// it. The first hosts what the second does.
func (m *mirror) twoSites() *mirror {
	m.t.Helper()
	second := &mirror{t: m.t, URL: "http://" + regtest.FreeAddress(m.t), dir: m.dir}
	adapted, err := adapt(fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n grace_period 10s\n log {\n output regtest\n level debug\n }\n registry {\n storage disk %s {\n min_free 1MB\n }\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}",
		m.dir, m.URL, hostedSite, second.URL, hostedSite))
	if err == nil {
		err = m.loadJSON(adapted)
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return second
}

// cataloged reports whether the catalog names a repository.
func (m *mirror) cataloged(repository string) bool {
	m.t.Helper()
	var list struct{ Repositories []string }
	if err := json.Unmarshal(m.sends(200, "GET", "/v2/_catalog", nil).body, &list); err != nil {
		m.t.Fatal(err)
	}
	return slices.Contains(list.Repositories, repository)
}

// TestProtocolDelete: what goes with what, and what stays; and that every site of
// the store knows in the same moment, though all of it was in memory.
func TestProtocolDelete(t *testing.T) {
	m := start(t, "", hostedSite)
	second := m.twoSites()
	sites := []pusher{{m, "apps/web"}, {second, "apps/web"}}
	p, copied := sites[0], pusher{m, "apps/copy"}
	image, keeps := regtest.NewImage("x", regtest.Random("x", 2000)), regtest.NewImage("y", regtest.Random("y", 2000))
	index := regtest.NewIndex(image, keeps)
	sha512 := digest.SHA512.FromBytes(image.Data).String()
	for _, p := range []pusher{p, copied} {
		p.image(index, "list")
		p.put("v1", image.Content)
		p.put("v2", image.Content)
		p.put(sha512+"?tag=v3", image.Content)
		p.put("kept", keeps.Content)
	}
	warm := func() {
		for _, p := range sites {
			for _, ref := range []string{"list", "v1", "v2", "kept", image.Digest.String(), sha512} {
				p.try("GET", p.path("manifests", ref), nil)
			}
			for _, blob := range image.Blobs {
				p.try("GET", p.path("blobs", blob.Digest.String()), nil)
			}
		}
	}
	wantTags := func(want ...string) {
		t.Helper()
		for _, p := range sites {
			if got, _ := p.tags(""); !slices.Equal(got, want) {
				t.Errorf("tags %q, want %q", got, want)
			}
		}
	}
	wantGone := func(paths ...string) {
		t.Helper()
		for _, p := range sites {
			for _, path := range paths {
				p.sends(404, "HEAD", path, nil)
				p.sends(404, "GET", path, nil)
			}
		}
	}

	warm()
	a := p.sends(202, "DELETE", p.path("manifests", "v2"), nil)
	if len(a.body) != 0 || a.Header.Get("Content-Length") != "0" {
		t.Errorf("%q %v", a.body, a.Header)
	}
	wantGone(p.path("manifests", "v2"))
	wantTags("kept", "list", "v1", "v3")
	p.pull(p.repository, image.Digest.String(), image)

	// What a manifest names stays; its tags by any digest go with it.
	for _, blob := range image.Blobs {
		m.refused(405, oci.CodeUnsupported, "DELETE", p.path("blobs", blob.Digest.String()), nil, "manifest")
	}
	warm()
	p.sends(202, "DELETE", p.path("manifests", image.Digest.String()), nil)
	wantGone(p.path("manifests", "v1"), p.path("manifests", "v3"), p.path("manifests", image.Digest.String()), p.path("manifests", sha512))
	wantTags("kept", "list")
	if a := p.sends(200, "GET", p.path("manifests", "list"), nil); !bytes.Equal(a.body, index.Data) {
		t.Errorf("the index that names it: %s", a.body)
	}

	for _, blob := range image.Blobs {
		p.sends(200, "GET", p.path("blobs", blob.Digest.String()), nil)
		p.sends(202, "DELETE", p.path("blobs", blob.Digest.String()), nil)
		wantGone(p.path("blobs", blob.Digest.String()))
	}
	p.pull(p.repository, "kept", keeps)
	for _, ref := range []string{"v1", "v2", "v3", "list", image.Digest.String()} {
		if ref == "v3" {
			continue
		}
		want := image
		if ref == "list" {
			want = index
		}
		copied.pull(copied.repository, ref, want) // another repository's
	}

	// Nothing of it comes back by itself; by a push it does, for which what is held
	// for another repository will not do.
	sites[1].mirror = m.twoSites()
	wantGone(p.path("manifests", "v1"), p.path("manifests", image.Digest.String()), p.path("blobs", image.Blobs[0].Digest.String()))
	m.refused(404, oci.CodeManifestBlobUnknown, "PUT", p.path("manifests", "v1"), image.Data, "pushed", "Content-Type", image.MediaType)
	p.image(image, "v1")
	p.pull(p.repository, "list", index)

	for _, ref := range []string{"v1", "kept", "list"} {
		p.sends(202, "DELETE", p.path("manifests", ref), nil)
	}
	wantTags()
	if !m.cataloged("apps/web") {
		t.Error("a repository with manifests is not listed")
	}
	for _, d := range []digest.Digest{image.Digest, keeps.Digest, index.Digest} {
		p.sends(202, "DELETE", p.path("manifests", d.String()), nil)
	}
	if m.cataloged("apps/web") || !m.cataloged("apps/copy") {
		t.Error("the catalog lists what is gone, or not what is there")
	}
}

// TestDeleteAnsweredUnread: a body means nothing to a DELETE, and nobody waits for it.
func TestDeleteAnsweredUnread(t *testing.T) {
	m := start(t, "", openToAll)
	image := regtest.NewImage("x")
	pusher{m, "apps/web"}.image(image, "v1")
	u := uploader{m, "apps/web"}
	for _, c := range []struct {
		path string
		want int
	}{{u.begin(), 204}, {"manifests/v1", 202}, {"manifests/" + image.Digest.String(), 202}, {"manifests/none", 404}} {
		conn := u.raw("DELETE", c.path, nil, "Content-Length", "40000000")
		if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != c.want {
			t.Errorf("%s: %v, %v, want %d", c.path, resp, err, c.want)
		}
	}
}

// TestImmutableTags: a tag that fits a pattern means for ever what it meant first.
func TestImmutableTags(t *testing.T) {
	m := start(t, "hosted apps/** {\n immutable v* *-final\n}", hostedSite)
	p := pusher{m, "apps/web"}
	image, other := regtest.NewImage("x"), regtest.NewImage("y")
	p.image(image, "v1", "x-final", "latest")
	p.image(other, "latest")
	for _, ref := range []string{"v1", "x-final", other.Digest.String() + "?tag=free&tag=v1"} {
		m.refused(403, oci.CodeDenied, "PUT", p.path("manifests", ref), other.Data, "push another tag", "Content-Type", other.MediaType)
	}
	third := regtest.NewImage("z")
	p.blob(third.Blobs[0].Data)
	m.refused(403, oci.CodeDenied, "PUT", p.path("manifests", "v1"), third.Data, "immutable", "Content-Type", third.MediaType)
	m.sends(404, "HEAD", p.path("manifests", third.Digest.String()), nil) // not even stored
	for _, ref := range []string{"v1", "x-final", image.Digest.String()} {
		m.refused(403, oci.CodeDenied, "DELETE", p.path("manifests", ref), nil, "the mirror's configuration")
	}
	// The same again is no change, whatever digest names it.
	p.put("v1", image.Content)
	p.put(digest.SHA512.FromBytes(image.Data).String()+"?tag=v1", image.Content)
	p.put("v1", image.Content)
	m.refused(403, oci.CodeDenied, "DELETE", p.path("manifests", digest.SHA512.FromBytes(image.Data).String()), nil, "immutable")
	p.pull(p.repository, "v1", image)
	p.pull(p.repository, "latest", other)
	p.sends(202, "DELETE", p.path("manifests", "latest"), nil)
	p.sends(202, "DELETE", p.path("manifests", other.Digest.String()), nil)
	if got, _ := p.tags(""); !slices.Equal(got, []string{"v1", "x-final"}) {
		t.Errorf("tags %q", got)
	}
}

// TestRequireBlobsOff: what a manifest names may be missing; it does not become a
// part of the repository by being named.
func TestRequireBlobsOff(t *testing.T) {
	m := start(t, "hosted apps/sparse {\n require_blobs off\n}", hostedSite)
	p, other := pusher{m, "apps/sparse"}, pusher{m, "apps/other"}
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	other.image(image, "v1")
	p.put("v1", image.Content)
	for _, blob := range image.Blobs {
		p.sends(404, "HEAD", p.path("blobs", blob.Digest.String()), nil)
		p.sends(404, "GET", p.path("blobs", blob.Digest.String()), nil)
	}
	p.blob(image.Blobs[0].Data)
	p.sends(200, "GET", p.path("blobs", image.Blobs[0].Digest.String()), nil)
	wrong := bytes.Replace(image.Data, []byte(fmt.Sprintf(`"size":%d`, len(image.Blobs[0].Data))), []byte(`"size":1`), 1)
	m.refused(400, oci.CodeManifestInvalid, "PUT", p.path("manifests", "v2"), wrong, "bytes", "Content-Type", image.MediaType)
}

// TestMaxManifestSize: a larger manifest than the specification asks for comes back
// where it may be pushed, after a restart too.
func TestMaxManifestSize(t *testing.T) {
	const app = "hosted apps/large {\n max_manifest_size 8MiB\n}\nhosted apps/small {\n max_manifest_size 1KiB\n}"
	m := start(t, app, hostedSite)
	image := regtest.NewImage("x")
	padded := func(n int) regtest.Image {
		image := image
		image.Content = regtest.Blob(image.MediaType, append(bytes.Clone(image.Data), bytes.Repeat([]byte(" "), n-len(image.Data))...))
		return image
	}
	for repository, most := range map[string]int{"apps/large": 8 << 20, "apps/small": 1 << 10, "apps/any": 4 << 20} {
		p := pusher{m, repository}
		largest := padded(most)
		p.image(largest, "v1")
		m.refused(413, oci.CodeSizeInvalid, "PUT", p.path("manifests", "v2"), padded(most+1).Data, "max_manifest_size", "Content-Type", image.MediaType)
	}
	m.stop()
	if err := m.load(app, hostedSite); err != nil {
		t.Fatal(err)
	}
	m.pull("apps/large", "v1", padded(8<<20))
	if !m.cataloged("apps/large") {
		t.Error("it is not listed")
	}
	if got, _ := (pusher{m, "apps/large"}).tags(""); strings.Join(got, " ") != "v1" {
		t.Errorf("tags %q", got)
	}
}

// TestPushedForeignLayers: a layer that need not be here, and was pushed all the
// same, is kept as long as a manifest names it; and so is a blob that an index
// names, as caches of BuildKit do.
func TestPushedForeignLayers(t *testing.T) {
	m := startAdmin(t, "gc off 1s", hostedSite)
	p := pusher{m, "apps/web"}
	image, loose := regtest.NewImage("x"), regtest.Random("loose", 100)
	foreign, cached := regtest.Random("foreign", 100), regtest.Random("cached", 100)
	for _, blob := range []regtest.Content{image.Blobs[0], loose, foreign, cached} {
		p.blob(blob.Data)
	}
	layer := foreign.Descriptor()
	layer.MediaType, layer.URLs = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", []string{"https://away.example/layer"}
	p.put("v1", regtest.JSON(image.MediaType, map[string]any{
		"schemaVersion": 2, "mediaType": image.MediaType, "config": image.Blobs[0].Descriptor(), "layers": []any{layer},
	}))
	p.put("cache", regtest.NewIndex(regtest.Image{Content: cached}).Content)
	for _, blob := range []regtest.Content{foreign, cached} {
		m.refused(405, oci.CodeUnsupported, "DELETE", p.path("blobs", blob.Digest.String()), nil, "manifest")
	}
	m.complete()
	eventually(t, "what nobody names to be collected", func() bool {
		m.job(`{"kind": "gc"}`)
		a, err := m.try("HEAD", p.path("blobs", loose.Digest.String()), nil)
		return err == nil && a.StatusCode == 404
	})
	for _, blob := range []regtest.Content{foreign, cached, image.Blobs[0]} {
		p.sends(200, "GET", p.path("blobs", blob.Digest.String()), nil)
	}
}
