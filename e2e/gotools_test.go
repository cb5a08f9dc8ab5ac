//go:build e2e

package e2e

import (
	"encoding/json"
	"strings"
	"testing"
)

// pullWithCrane asks the mirror by its own name: crane knows no mirrors.
func pullWithCrane(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	name := mirror + "/library/hello" + ref
	if got := strings.TrimSpace(run(t, bare(dir), tool(t, "crane"), "digest", name)); got != img.digest {
		t.Errorf("crane says the digest is %s, not %s", got, img.digest)
	}
	if err := tryCrane(t, dir, mirror, ref); err != nil {
		t.Fatal(err)
	}
	checkLayout(t, dir+"/out", append(img.all(), img.digest))
}

func tryCrane(t *testing.T, dir, mirror, ref string) error {
	t.Helper()
	_, err := try(t, bare(dir), tool(t, "crane"), "pull", "--format=oci", mirror+"/library/hello"+ref, dir+"/out")
	return err
}

func pullWithRegctl(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	run(t, regctlEnv(t, dir, mirror), tool(t, "regctl"), "image", "copy", "docker.io/library/hello"+ref, "ocidir://"+dir+"/out:latest")
	checkLayout(t, dir+"/out", append(img.all(), img.digest))
}

// regctlEnv makes an address the mirror of docker.io.
func regctlEnv(t *testing.T, dir, mirror string) []string {
	t.Helper()
	config, err := json.Marshal(map[string]any{"hosts": map[string]any{
		"docker.io": map[string]any{"tls": "disabled", "hostname": deadAddr, "mirrors": []string{mirror}},
		mirror:      map[string]any{"tls": "disabled", "hostname": mirror},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return bare(dir, "REGCTL_CONFIG="+writeFile(t, dir+"/config.json", string(config)))
}
