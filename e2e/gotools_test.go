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
	run(t, bare(dir), tool(t, "crane"), "pull", "--format=oci", name, dir+"/out")
	checkLayout(t, dir+"/out", append(img.all(), img.digest))
}

func pullWithRegctl(t *testing.T, mirror string, img *image, ref string) {
	dir := workDir(t)
	config, err := json.Marshal(map[string]any{"hosts": map[string]any{
		"docker.io": map[string]any{"tls": "disabled", "hostname": deadAddr, "mirrors": []string{mirror}},
		mirror:      map[string]any{"tls": "disabled", "hostname": mirror},
	}})
	if err != nil {
		t.Fatal(err)
	}
	env := bare(dir, "REGCTL_CONFIG="+writeFile(t, dir+"/config.json", string(config)))
	run(t, env, tool(t, "regctl"), "image", "copy", "docker.io/library/hello"+ref, "ocidir://"+dir+"/out:latest")
	checkLayout(t, dir+"/out", append(img.all(), img.digest))
}
