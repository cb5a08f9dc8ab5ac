//go:build e2e

package e2e

import (
	"io"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestDockerHub: three lines of Caddyfile mirror Docker Hub as it is: real
// names over TLS through an egress proxy, tokens, a CDN, a rate limit.
func TestDockerHub(t *testing.T) {
	upstream := startRegistry(t, workDir(t), "")
	hello, other := newImage(t, "hello"), newImage(t, "other")
	upstream.push(t, "library/hello", hello)
	upstream.push(t, "library/other", other)
	upstream.push(t, "library/third", other)
	hub := startFakeHub(t, upstream.addr)

	home, addr := workDir(t), regtest.FreeAddress(t)
	config := writeFile(t, filepath.Join(home, "Caddyfile"), "http://"+addr+" {\n\tregistry_mirror\n}\n")
	env := bare(home, "CADDY_ADMIN="+regtest.FreeAddress(t),
		"HTTPS_PROXY=http://"+hub.addr, "NO_PROXY=127.0.0.1,localhost", "SSL_CERT_FILE="+hub.ca)
	run := func(t *testing.T) *process {
		p := start(t, env, caddyBin, "run", "--config", config, "--adapter", "caddyfile")
		p.untilReady(t, answers(addr))
		return p
	}
	caddy := run(t)

	t.Run("pull", func(t *testing.T) {
		pullWithSkopeo(t, addr, hello, ":latest")
		pullWithContainerd(t, addr, hello, ":latest")
		skopeoCopy(t, addr+"/docker.io/library/hello@"+hello.digest, hello)
	})
	t.Run("tokens", func(t *testing.T) {
		hub.mu.Lock()
		defer hub.mu.Unlock()
		for scope, n := range hub.tokenRequests {
			if scope != "" && n != 1 {
				t.Errorf("%d tokens were asked for scope %q; one is good for 300 s", n, scope)
			}
		}
		if hub.tokenRequests["repository:library/hello:pull"] == 0 {
			t.Error("no token was asked for library/hello")
		}
		if hub.cdnRequests < len(hello.blobs) {
			t.Errorf("the CDN had %d requests for %d blobs", hub.cdnRequests, len(hello.blobs))
		}
	})
	t.Run("limited", func(t *testing.T) {
		// A restart forgets when tags were checked, so that they are checked
		// again, which the limit forbids.
		caddy.stop(t)
		hub.leave(0)
		run(t)
		pullWithSkopeo(t, addr, hello, ":latest")
		pullWithDocker(t, addr, hello, ":latest")
		skopeoCopy(t, addr+"/docker.io/library/hello@"+hello.digest, hello)
		wantStatus(t, addr, "/v2/library/other/manifests/latest", http.StatusServiceUnavailable)
		wantStatus(t, addr, "/v2/library/other/manifests/"+other.digest, http.StatusServiceUnavailable)
		hub.mu.Lock()
		defer hub.mu.Unlock()
		if hub.limited == 0 {
			t.Error("the hub was not asked; this proves nothing")
		}
	})
	t.Run("frugal", func(t *testing.T) {
		hub.leave(3) // an index and two manifests
		run(t)
		skopeoCopy(t, addr+"/library/third:latest", other)
	})

	hub.mu.Lock()
	defer hub.mu.Unlock()
	for _, fault := range hub.faults {
		t.Error(fault)
	}
}

// wantStatus asks for a manifest as clients do.
func wantStatus(t *testing.T, addr, path string, status int) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", string(types.OCIImageIndex)+", "+string(types.OCIManifestSchema1))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != status {
		t.Errorf("GET %s: %s, not %d: %s", path, resp.Status, status, body)
	}
}
