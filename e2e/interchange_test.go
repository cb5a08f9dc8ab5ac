//go:build e2e

package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestInterchange: the directory belongs to neither the mirror nor registry:2.
// What either has written, the other serves.
func TestInterchange(t *testing.T) {
	img := newImage(t, "interchange")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)

	t.Run("mirror to registry", func(t *testing.T) {
		dir := workDir(t)
		m := startMirror(t, setup{store: dir, registry: dockerHub(upstream.addr, `repository_prefix ""`)})
		skopeoCopy(t, m.addr+"/library/hello:latest", img)
		skopeoCopy(t, m.addr+"/library/hello@"+img.digest, img)
		m.stop(t)

		r := startRegistry(t, dir, "")
		skopeoCopy(t, r.addr+"/library/hello:latest", img)
		skopeoCopy(t, r.addr+"/library/hello@"+img.digest, img)
		if tags := listTags(t, r.addr, "library/hello"); !slices.Equal(tags, []string{"latest"}) {
			t.Errorf("registry:2 lists the tags %q", tags)
		}
	})

	t.Run("proxy to mirror", func(t *testing.T) {
		dir := workDir(t)
		r := startRegistry(t, dir, "http://"+upstream.addr)
		skopeoCopy(t, r.addr+"/library/hello:latest", img)
		// As a proxy, registry:2 answers first and stores later.
		layers := filepath.Join(dir, "docker/registry/v2/repositories/library/hello/_layers/sha256")
		for digest := range img.blobs {
			link := filepath.Join(layers, strings.TrimPrefix(digest, "sha256:"), "link")
			eventually(t, 20*time.Second, "registry:2 to store "+digest, func() bool {
				_, err := os.Stat(link)
				return err == nil
			})
		}
		r.stop(t)

		m := startMirror(t, setup{store: dir, registry: dockerHub(deadAddr, `repository_prefix ""`)})
		skopeoCopy(t, m.addr+"/library/hello:latest", img)
		skopeoCopy(t, m.addr+"/library/hello@"+img.digest, img)
		skopeoCopy(t, m.addr+"/docker.io/library/hello:latest", img)
		if tags := listTags(t, m.addr, "library/hello"); !slices.Equal(tags, []string{"latest"}) {
			t.Errorf("the mirror lists the tags %q", tags)
		}
	})

	t.Run("pushed to mirror", func(t *testing.T) {
		dir := workDir(t)
		r := startRegistry(t, dir, "")
		r.push(t, "apps/web", img)
		r.stop(t)

		m := startMirror(t, setup{store: dir, site: "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"})
		skopeoCopy(t, m.addr+"/apps/web:latest", img)
		skopeoCopy(t, m.addr+"/apps/web@"+img.digest, img)
		if tags := listTags(t, m.addr, "apps/web"); !slices.Equal(tags, []string{"latest"}) {
			t.Errorf("the mirror lists the tags %q", tags)
		}
		wantStatus(t, m.addr, "/v2/library/hello/manifests/latest", http.StatusNotFound)
	})
}

// TestPushedInterchange: what is pushed to one is at home in the other, and a
// repository goes on where the other has left it.
func TestPushedInterchange(t *testing.T) {
	first, second := newImageOf(t, "first", 2), newImageOf(t, "second", 1)
	site := setup{site: "default off\nhosted apps/**\naccess {\n allow any to anyone\n}"}

	t.Run("mirror to registry", func(t *testing.T) {
		site := site
		site.store = workDir(t)
		m := startMirror(t, site)
		here := &shop{addr: m.addr}
		pushIndex(t, m.addr+"/apps/web:1", first)
		pushIndex(t, m.addr+"/apps/web:2", second)
		pushIndex(t, m.addr+"/apps/web:moved", first)
		pushIndex(t, m.addr+"/apps/web:moved", second)
		pushIndex(t, m.addr+"/apps/web:gone", first)
		here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/gone")
		pushIndex(t, m.addr+"/apps/deleted:1", first)
		here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/deleted/manifests/"+first.digest)
		m.stop(t)

		// Whoever serves it next finds this.
		check := func(t *testing.T, s *shop) {
			t.Helper()
			s.holds(t, "apps/web", "1", first.digest)
			s.holds(t, "apps/web", first.digest, first.digest)
			s.holds(t, "apps/web", "2", second.digest)
			s.holds(t, "apps/web", "moved", second.digest)
			if tags := listTags(t, s.addr, "apps/web"); !slices.Equal(slices.Sorted(slices.Values(tags)), []string{"1", "2", "moved"}) {
				t.Errorf("the tags of apps/web are %q", tags)
			}
			s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/gone")
			s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/deleted/manifests/1")
			s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/deleted/manifests/"+first.digest)
		}
		r := startRegistry(t, site.store, "")
		check(t, &shop{addr: r.addr})
		r.stop(t)
		run(t, bare(workDir(t)), tool(t, "docker-registry"), "garbage-collect", r.config)
		r = startRegistry(t, site.store, "")
		check(t, &shop{addr: r.addr})
		pushIndex(t, r.addr+"/apps/web:3", first)
		r.stop(t)

		m = startMirror(t, site)
		there := &shop{addr: m.addr}
		there.holds(t, "apps/web", "3", first.digest)
		there.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/3")
		check(t, there)
	})

	t.Run("registry to mirror", func(t *testing.T) {
		site := site
		site.store = workDir(t)
		r := startRegistry(t, site.store, "")
		push := dockerOf(t, first)
		digest := push(r.addr, "1")
		push(r.addr, "2")
		pushIndex(t, r.addr+"/apps/web:3", second)
		r.stop(t)

		m := startMirror(t, site)
		here := &shop{addr: m.addr}
		here.holds(t, "apps/web", "1", digest)
		here.holds(t, "apps/web", "3", second.digest)
		here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/1")
		here.holds(t, "apps/web", "2", digest)
		here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/"+second.digest)
		here.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/3")
		// docker finds its layers there, and pushes nothing again.
		if got := push(m.addr, "4"); got != digest {
			t.Errorf("docker has pushed %s, not %s", got, digest)
		}
		m.stop(t)

		r = startRegistry(t, site.store, "")
		there := &shop{addr: r.addr}
		there.holds(t, "apps/web", "2", digest)
		there.holds(t, "apps/web", "4", digest)
		if tags := listTags(t, r.addr, "apps/web"); !slices.Equal(slices.Sorted(slices.Values(tags)), []string{"2", "4"}) {
			t.Errorf("registry:2 lists the tags %q", tags)
		}
		there.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/1")
		there.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/"+second.digest)
	})
}

// pushIndex pushes an image by a name that ends in its tag.
func pushIndex(t *testing.T, reference string, img *image) {
	t.Helper()
	ref, err := name.NewTag(reference, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, img.index, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func listTags(t *testing.T, addr, repository string) []string {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/v2/" + repository + "/tags/list")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list struct{ Tags []string }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("tags/list of %s: %s, %v", repository, resp.Status, err)
	}
	return list.Tags
}
