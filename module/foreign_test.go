package module_test

import (
	"os"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestPushedWhileStopped: registry:2 has pushed to the directory while Caddy was
// stopped; what it shares with a mirrored image is not deleted with that.
func TestPushedWhileStopped(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 5000))
	up.Push("library/x", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	m.pull("library/x", "latest", image)
	m.complete()
	m.stop()
	repositories := m.dir + "/docker/registry/v2/repositories/"
	if err := os.CopyFS(repositories+"apps/x", os.DirFS(repositories+"docker.io/library/x")); err != nil {
		t.Fatal(err)
	}
	if err := m.load(upstreamFor("docker.io", up), "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"); err != nil {
		t.Fatal(err)
	}
	m.complete()
	m.job(`{"kind": "purge", "pattern": "docker.io/**"}`)
	m.pull("apps/x", "latest", image)
}
