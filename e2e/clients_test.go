//go:build e2e

package e2e

import "testing"

// A client pulls an image through a mirror and checks all that it got. It
// begins with nothing, and believes the true registry to be at deadAddr.
type client struct {
	name string
	pull func(t *testing.T, mirror string, img *image, ref string)
	all  bool // it fetches every platform, not only linux/amd64
}

var clients = []client{
	{name: "docker", pull: pullWithDocker},
	{name: "containerd-1.6", pull: pullWithContainerd},
	{name: "containerd-2.4", pull: pullWithContainerd2},
	{name: "podman", pull: pullWithPodman},
	{name: "podman-prefix", pull: pullWithPodmanPrefix},
	{name: "skopeo", pull: pullWithSkopeo},
	{name: "skopeo-prefix", pull: pullWithSkopeoPrefix, all: true},
	{name: "buildah", pull: pullWithBuildah},
	{name: "crane", pull: pullWithCrane, all: true},
	{name: "regctl", pull: pullWithRegctl, all: true},
}

// TestClients: every client pulls by tag and by digest what the mirror does
// not have, then what it has, then with the upstream gone; and of every blob
// the upstream is asked once.
func TestClients(t *testing.T) {
	img := newImage(t, "clients")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)

	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			for _, by := range []string{"tag", "digest"} {
				t.Run(by, func(t *testing.T) {
					ref := ":latest"
					if by == "digest" {
						ref = "@" + img.digest
					}
					counted := startCounter(t, upstream.addr)
					m := startMirror(t, setup{registry: dockerHub(counted.addr) + deadRegistry(counted.addr)})
					pull := func(t *testing.T) { c.pull(t, m.addr, img, ref) }

					t.Run("cold", pull)
					t.Run("warm", pull)
					counted.stop()
					t.Run("offline", pull)

					want := img.amd64
					if c.all {
						want = img.all()
					}
					counted.fetchedOnce(t, img, want)
				})
			}
		})
	}
}

// TestClientsTogether: all clients at once, and still every blob is fetched
// once.
func TestClientsTogether(t *testing.T) {
	img := newImage(t, "together")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	counted := startCounter(t, upstream.addr)
	m := startMirror(t, setup{registry: dockerHub(counted.addr) + deadRegistry(counted.addr)})

	t.Run("all", func(t *testing.T) { // ends when all have ended
		for _, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.pull(t, m.addr, img, ":latest")
			})
		}
	})
	counted.fetchedOnce(t, img, img.all())
}

// deadRegistry makes a registry of the address that clients believe in:
// regctl's ?ns= is the address, not the name.
func deadRegistry(addr string) string {
	return "upstream " + deadAddr + " {\n origin http://" + addr + "\n tag_ttl 0s\n}\n"
}
