//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// The family of github.com/containers/image: skopeo, podman and buildah. They
// use a mirror either by registries.conf or by its name before the image's.

// registriesConf makes an address the mirror of docker.io, and leaves no other way.
func registriesConf(t *testing.T, dir, mirror string) string {
	t.Helper()
	return clientConfig(t, dir, "podman", mirror, "--strict") + "/etc/containers/registries.conf.d/mirror.conf"
}

// clientConfig writes what the product says a client is to be set to, so that it uses an
// address for docker.io, and returns the directory below which that is.
func clientConfig(t *testing.T, dir, client, mirror string, more ...string) string {
	t.Helper()
	root := filepath.Join(dir, "client")
	run(t, bare(dir), caddyBin, append([]string{"registry", "client-config", client, "--mirror", "http://" + mirror, "--for", "docker.io", "--write", "--root", root}, more...)...)
	return root
}

// anySignature is the policy that Debian's packages leave to the user.
func anySignature(t *testing.T, dir string) string {
	t.Helper()
	return writeFile(t, filepath.Join(dir, "policy.json"), `{"default":[{"type":"insecureAcceptAnything"}]}`)
}

func pullWithSkopeo(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	if err := trySkopeo(t, dir, mirror, ref); err != nil {
		t.Fatal(err)
	}
	checkLayout(t, dir+"/out", img.amd64)
}

func trySkopeo(t *testing.T, dir, mirror, ref string) error {
	t.Helper()
	_, err := try(t, bare(dir), tool(t, "skopeo"), "--registries-conf", registriesConf(t, dir, mirror), "--insecure-policy",
		"copy", "docker://docker.io/library/hello"+ref, "oci:"+dir+"/out:latest")
	return err
}

func pullWithSkopeoPrefix(t *testing.T, mirror string, img *image, ref string) {
	skopeoCopy(t, mirror+"/docker.io/library/hello"+ref, img)
}

// skopeoCopy pulls all of an index from exactly where the name says.
func skopeoCopy(t *testing.T, from string, img *image) {
	t.Helper()
	dir := workDir(t)
	do := func(args ...string) string {
		t.Helper()
		conf := writeFile(t, filepath.Join(dir, "registries.conf"), "")
		return run(t, bare(dir), tool(t, "skopeo"), append([]string{"--registries-conf", conf, "--insecure-policy"}, args...)...)
	}
	do("copy", "--all", "--src-tls-verify=false", "docker://"+from, "oci:"+dir+"/out:latest")
	checkLayout(t, dir+"/out", img.all())
	// What it copies of an index it has written anew; this is what it got.
	raw := do("inspect", "--raw", "--tls-verify=false", "docker://"+from)
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(raw))); got != img.digest {
		t.Errorf("the index has the digest %s, not %s", got, img.digest)
	}
}

// pullWithContainersImage is skopeo as it would be with the library of today,
// which goes on after a cut.
func pullWithContainersImage(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	run(t, bare(dir), tool(t, "cimg"), registriesConf(t, dir, mirror), "docker://docker.io/library/hello"+ref, dir+"/out")
	checkLayout(t, dir+"/out", img.amd64)
}

func pullWithPodman(t *testing.T, mirror string, img *image, ref string) {
	podman(t, mirror, img, "docker.io/library/hello"+ref)
}

func pullWithPodmanPrefix(t *testing.T, mirror string, img *image, ref string) {
	podman(t, deadAddr, img, mirror+"/docker.io/library/hello"+ref)
}

func podman(t *testing.T, mirror string, img *image, name string) {
	t.Helper()
	dir := workDir(t)
	do := func(args ...string) string {
		t.Helper()
		out, err := tryPodman(t, dir, mirror, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	do("pull", "--tls-verify=false", "--signature-policy", anySignature(t, dir), name)
	if got := "sha256:" + strings.TrimSpace(do("image", "inspect", "--format", "{{.Id}}", name)); got != img.config {
		t.Errorf("podman has image %s, not %s", got, img.config)
	}
	// The limits that podman sets by itself need a capability that
	// containers, where CI runs, lack.
	checkSaid(t, img, do("run", "--rm", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", name))
}

// tryPodman runs podman on the images it has in dir.
func tryPodman(t *testing.T, dir, mirror string, args ...string) (string, error) {
	t.Helper()
	env := bare(dir, "CONTAINERS_REGISTRIES_CONF="+registriesConf(t, dir, mirror))
	return try(t, env, tool(t, "podman"), append([]string{
		"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs",
		// crun, podman's own choice, refuses hybrid cgroups.
		"--runtime", tool(t, "runc"), "--cgroup-manager", "cgroupfs", "--events-backend", "none"}, args...)...)
}

func pullWithBuildah(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	do := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(run(t, bare(dir), tool(t, "buildah"), append([]string{
			"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs", "--registries-conf", registriesConf(t, dir, mirror)}, args...)...))
	}
	container := do("from", "--quiet", "--signature-policy", anySignature(t, dir), "docker.io/library/hello"+ref)
	root := do("mount", container)
	if got := fileDigest(t, root+"/data/blob"); got != img.payload {
		t.Errorf("/data/blob has the digest %s, not %s", got, img.payload)
	}
	do("rm", container)
}

// checkSaid checks what the image printed.
func checkSaid(t *testing.T, img *image, said string) {
	t.Helper()
	if strings.TrimSpace(said) != img.says {
		t.Errorf("the container said %q, not %q", said, img.says)
	}
}
