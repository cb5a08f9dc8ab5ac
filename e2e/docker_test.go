//go:build e2e

package e2e

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pullWithDocker starts a Docker daemon whose registry-mirrors name the
// mirror, pulls from "Docker Hub", and runs the image.
func pullWithDocker(t *testing.T, mirror string, img *image, ref string) {
	docker := startDocker(t, mirror)
	do := func(args ...string) string {
		t.Helper()
		out, err := docker(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	name := "hello" + ref
	do("pull", name)
	if got := strings.TrimSpace(do("image", "inspect", "--format", "{{.Id}}", name)); got != img.config {
		t.Errorf("docker has image %s, not %s", got, img.config)
	}
	checkSaid(t, img, do("run", "--rm", "--network", "none", name))
}

// startDocker starts a daemon with nothing in it, and returns what runs the
// docker command.
func startDocker(t *testing.T, mirror string) func(args ...string) (string, error) {
	t.Helper()
	return startDockerd(t, tool(t, "dockerd"), systemPath, mirror, map[string]any{"storage-driver": "overlay2"})
}

// startDocker29 starts the daemon that install.sh has built. It keeps images in
// containerd's content store, as Docker does by itself today.
func startDocker29(t *testing.T) func(args ...string) (string, error) {
	t.Helper()
	cache := filepath.Join(checkout, ".cache")
	binary := filepath.Join(cache, "docker29/dockerd")
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v: run e2e/install.sh", err)
	}
	return startDockerd(t, binary, cache+"/containerd2:"+systemPath, "", map[string]any{
		"storage-driver": "overlayfs",
		"features":       map[string]bool{"containerd-snapshotter": true},
	})
}

// startDockerd starts a daemon that uses a mirror, unless that is empty.
func startDockerd(t *testing.T, binary, path, mirror string, settings map[string]any) func(args ...string) (string, error) {
	t.Helper()
	dir := workDir(t)
	all := map[string]any{
		"hosts":     []string{"unix://" + dir + "/sock"},
		"data-root": dir + "/root",
		"exec-root": dir + "/exec",
		"pidfile":   dir + "/pid",
		// No network for containers: it would need the machine's firewall.
		"bridge": "none", "iptables": false, "ip6tables": false, "ip-forward": false, "ip-masq": false, "userland-proxy": false,
		// A mirror that fails should fail the test, not be asked for a minute.
		"max-download-attempts": 2,
	}
	maps.Copy(all, settings)
	config, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	// The true Hub is out of reach; loopback is not.
	env := bare(dir, "PATH="+path, "HTTPS_PROXY=http://"+deadAddr, "NO_PROXY=127.0.0.0/8")
	file := writeFile(t, dir+"/client/etc/docker/daemon.json", string(config))
	if mirror != "" {
		clientConfig(t, dir, "docker", mirror)
	}
	daemon := start(t, env, binary, "--config-file", file)
	docker := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "DOCKER_HOST=unix://"+dir+"/sock"), tool(t, "docker"), args...)
	}
	daemon.untilReady(t, func() bool { _, err := docker("version"); return err == nil })
	return docker
}
