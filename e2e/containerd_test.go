//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pullWithContainerd uses Debian's containerd.
func pullWithContainerd(t *testing.T, mirror string, img *image, ref string) {
	containerd(t, 2, "", "/usr/bin", mirror, img, ref)
}

// pullWithContainerd2 uses the containerd that install.sh has built.
func pullWithContainerd2(t *testing.T, mirror string, img *image, ref string) {
	containerd(t, 3, "", filepath.Join(checkout, ".cache/containerd2"), mirror, img, ref)
}

// pullInParallel uses the same containerd, told to fetch a layer in pieces of
// so many bytes, so many at once.
func pullInParallel(t *testing.T, mirror string, img *image, ref string, piece, connections int) {
	config := fmt.Sprintf(`[plugins."io.containerd.transfer.v1.local"]
  concurrent_layer_fetch_buffer = %d
  max_concurrent_downloads = %d
`, piece, connections)
	containerd(t, 3, config, filepath.Join(checkout, ".cache/containerd2"), mirror, img, ref)
}

// containerd pulls by `ctr`, which finds the mirror through hosts.toml and
// tells it the registry by ?ns=, and then runs the image.
func containerd(t *testing.T, configVersion int, config, bin, mirror string, img *image, ref string) {
	t.Helper()
	ctr, hosts := startContainerd(t, configVersion, config, bin, mirror)
	do := func(args ...string) string {
		t.Helper()
		out, err := ctr(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	name := "docker.io/library/hello" + ref
	do("images", "pull", "--hosts-dir", hosts, name)
	checkContent(t, do, append(img.amd64, img.digest))
	// runc knows the containers of all daemons by their names.
	checkSaid(t, img, do("run", "--rm", name, filepath.Base(strings.TrimSuffix(hosts, "/client/etc/containerd/certs.d"))))
}

// checkContent checks all that a containerd holds, and that what is wanted is
// there.
func checkContent(t *testing.T, ctr func(args ...string) string, want []string) {
	t.Helper()
	held := map[string]bool{}
	for _, digest := range strings.Fields(ctr("content", "ls", "--quiet")) {
		held[digest] = true
		if got := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(ctr("content", "get", digest)))); got != digest {
			t.Errorf("blob %s has the digest %s", digest, got)
		}
	}
	for _, digest := range want {
		if !held[digest] {
			t.Errorf("containerd lacks %s", digest)
		}
	}
}

// startContainerd starts a containerd with nothing in it, and returns what runs
// its `ctr`, and the directory of its hosts.toml.
func startContainerd(t *testing.T, configVersion int, config, bin, mirror string) (ctr func(args ...string) (string, error), hosts string) {
	t.Helper()
	for _, name := range []string{"containerd", "ctr"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Fatalf("%v: run e2e/install.sh", err)
		}
	}
	dir := workDir(t)
	env := bare(dir, "PATH="+bin+":"+systemPath)
	file := writeFile(t, dir+"/config.toml", fmt.Sprintf(`version = %d
root = "%s/root"
state = "%s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
  address = "%s/sock"
[ttrpc]
  address = "%s/ttrpc"
%s`, configVersion, dir, dir, dir, dir, config))
	hosts = clientConfig(t, dir, "containerd", mirror, "--strict") + "/etc/containerd/certs.d"
	daemon := start(t, env, filepath.Join(bin, "containerd"), "--config", file)
	ctr = func(args ...string) (string, error) {
		t.Helper()
		return try(t, env, filepath.Join(bin, "ctr"), append([]string{"--address", dir + "/sock"}, args...)...)
	}
	daemon.untilReady(t, func() bool { _, err := ctr("version"); return err == nil })
	return ctr, hosts
}
