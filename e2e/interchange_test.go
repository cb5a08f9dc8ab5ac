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
