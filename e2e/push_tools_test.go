//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func pushWithCrane(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	crane := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir), tool(t, "crane"), args...)
	}
	do := doing(t, crane)
	repository := s.addr + "/apps/crane"
	writeLayout(t, dir+"/layout", img)
	if s.user != "" {
		if out, err := crane("push", "--index", dir+"/layout", repository+":1"); err == nil {
			t.Errorf("a push without a login: %s", out)
		}
		do("auth", "login", s.addr, "-u", s.user, "-p", s.password)
	}
	// The layout has one entry, which is the index.
	do("push", dir+"/layout", repository+":1")
	do("push", dir+"/layout", repository+":1")
	do("copy", repository+":1", repository+"/other:1")
	do("tag", repository+":1", "2")
	s.holds(t, "apps/crane", "1", img.digest)
	s.holds(t, "apps/crane", "2", img.digest)
	s.holds(t, "apps/crane/other", "1", img.digest)
	do("validate", "--remote", repository+":2")
	do("pull", "--format=oci", repository+"@"+img.digest, dir+"/out")
	checkLayout(t, dir+"/out", append(img.all(), img.digest))

	if tags := slices.Sorted(strings.FieldsSeq(do("ls", repository))); !slices.Equal(tags, []string{"1", "2"}) {
		t.Errorf("ls: %q", tags)
	}
	repositories := strings.Fields(do("catalog", s.addr))
	for _, name := range []string{"apps/crane", "apps/crane/other"} {
		if !slices.Contains(repositories, name) {
			t.Errorf("catalog: %q", repositories)
		}
	}
	if !s.stock {
		do("delete", repository+":1")
		s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/crane/manifests/1")
		s.holds(t, "apps/crane", "2", img.digest)
	}
	do("delete", repository+"@"+img.digest)
	s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/crane/manifests/"+img.digest)
	if out, err := crane("digest", repository+":2"); err == nil {
		t.Errorf("a tag outlives its manifest: %s", out)
	}
	s.holds(t, "apps/crane/other", "1", img.digest)
}

func pushWithRegctl(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	regctl := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "REGCTL_CONFIG="+dir+"/regctl.json"), tool(t, "regctl"), args...)
	}
	do := doing(t, regctl)
	repository := s.addr + "/apps/regctl"
	do("registry", "set", "--skip-check", "--tls", "disabled", s.addr)
	writeLayout(t, dir+"/layout", img)
	source := "ocidir://" + dir + "/layout:latest"
	if out, err := regctl("image", "copy", source, repository+":1"); err == nil {
		t.Errorf("a copy without a login: %s", out)
	}
	do("registry", "login", "-u", s.user, "-p", s.password, s.addr)
	do("image", "copy", source, repository+":1")
	do("image", "copy", source, repository+":1")
	do("image", "copy", repository+":1", repository+"/other:1")
	do("image", "copy", repository+":1", repository+":2")
	s.holds(t, "apps/regctl", "1", img.digest)
	s.holds(t, "apps/regctl/other", "1", img.digest)
	do("image", "copy", repository+"@"+img.digest, "ocidir://"+dir+"/out:latest")
	checkLayout(t, dir+"/out", append(img.all(), img.digest))

	do("tag", "delete", repository+":2")
	if tags := slices.Sorted(strings.FieldsSeq(do("tag", "ls", repository))); !slices.Equal(tags, []string{"1"}) {
		t.Errorf("tag ls: %q", tags)
	}
	s.holds(t, "apps/regctl", "1", img.digest)

	note := writeFile(t, dir+"/note", "what is said of the image")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("what is said of the image")))
	subject := repository + ":1"
	do("artifact", "put", "--artifact-type", "application/vnd.example.note", "--subject", subject, "--file", note)
	do("artifact", "put", "--artifact-type", "application/vnd.example.other", "--subject", subject, "--file", note)
	listed := do("artifact", "list", "--filter-artifact-type", "application/vnd.example.note", "--format", "{{range .Descriptors}}{{println .ArtifactType}}{{end}}", subject)
	if types := strings.Fields(listed); !slices.Equal(types, []string{"application/vnd.example.note"}) {
		t.Errorf("artifact list: %q", types)
	}
	if got := do("artifact", "get", "--subject", subject, "--filter-artifact-type", "application/vnd.example.note"); got != "what is said of the image" {
		t.Errorf("artifact get: %q", got)
	}
	if !s.stock {
		s.refers(t, "apps/regctl", img.digest, "application/vnd.example.note", "application/vnd.example.other")
		// The registry keeps the list; the client has not made a tag for it.
		if tags := slices.Sorted(strings.FieldsSeq(do("tag", "ls", repository))); !slices.Equal(tags, []string{"1"}) {
			t.Errorf("tag ls: %q", tags)
		}
	}

	// A blob that no manifest names can be put, read and deleted.
	loose := writeFile(t, dir+"/loose", "a blob that no manifest names")
	looseDigest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("a blob that no manifest names")))
	put := func(file string) {
		t.Helper()
		if _, err := feed(t, must(os.ReadFile(file)), bare(dir, "REGCTL_CONFIG="+dir+"/regctl.json"), tool(t, "regctl"), "blob", "put", repository); err != nil {
			t.Fatal(err)
		}
	}
	put(loose)
	do("blob", "head", repository, looseDigest)
	if got := do("blob", "get", repository, looseDigest); got != "a blob that no manifest names" {
		t.Errorf("blob get: %q", got)
	}
	do("blob", "delete", repository, looseDigest)
	s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/regctl/blobs/"+looseDigest)
	put(loose)
	s.answers(t, http.StatusOK, http.MethodHead, "/v2/apps/regctl/blobs/"+looseDigest)
	s.answers(t, http.StatusOK, http.MethodHead, "/v2/apps/regctl/blobs/"+digest)

	do("manifest", "delete", repository+"@"+img.digest)
	s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/regctl/manifests/"+img.digest)
	s.holds(t, "apps/regctl/other", "1", img.digest)
}

// refers checks the types of what refers to a manifest.
func (s *shop) refers(t *testing.T, repository, digest string, want ...string) {
	t.Helper()
	resp := s.ask(t, http.MethodGet, "/v2/"+repository+"/referrers/"+digest)
	defer resp.Body.Close()
	var list v1.IndexManifest
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("referrers: %s, %v", resp.Status, err)
	}
	var got []string
	for _, m := range list.Manifests {
		got = append(got, m.ArtifactType)
		s.holds(t, repository, m.Digest.String(), m.Digest.String())
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("to %s refer %q, not %q", digest, got, want)
	}
}

// pushWithOras attaches an artifact to an image, lists what refers to the image,
// and pulls it.
func pushWithOras(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	crane := doing(t, func(args ...string) (string, error) { return try(t, bare(dir), tool(t, "crane"), args...) })
	writeLayout(t, dir+"/layout", img)
	crane("auth", "login", s.addr, "-u", s.user, "-p", s.password)
	crane("push", dir+"/layout", s.addr+"/apps/oras:1")
	digest := strings.TrimSpace(run(t, bare(dir, "USERNAME="+s.user, "PASSWORD="+s.password), tool(t, "attach"), s.addr+"/apps/oras:1", "application/vnd.example.note", "attached by oras-go"))
	s.holds(t, "apps/oras", digest, digest)
	body := s.read(t, "/v2/apps/oras/manifests/"+digest, digest)
	var m v1.Manifest
	if err := json.Unmarshal(body, &m); err != nil || m.Subject == nil || m.Subject.Digest.String() != img.digest {
		t.Errorf("%v: the artifact has not the subject %s:\n%s", err, img.digest, body)
	}
	if !s.stock {
		s.refers(t, "apps/oras", img.digest, "application/vnd.example.note")
	}
}

func pushWithHelm(t *testing.T, s *shop, _ *image) {
	dir := workDir(t)
	helm := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "HELM_CACHE_HOME="+dir+"/c", "HELM_CONFIG_HOME="+dir+"/g", "HELM_DATA_HOME="+dir+"/d"), tool(t, "helm"), args...)
	}
	do := doing(t, helm)
	do("create", dir+"/web")
	do("package", "--version", "0.1.0", "--destination", dir, dir+"/web")
	chart, repository := dir+"/web-0.1.0.tgz", "oci://"+s.addr+"/apps/charts"
	if out, err := helm("push", "--plain-http", chart, repository); err == nil {
		t.Errorf("a push without a login: %s", out)
	}
	do("registry", "login", "--plain-http", "-u", s.user, "-p", s.password, s.addr)
	do("push", "--plain-http", chart, repository)
	do("push", "--plain-http", chart, repository)
	do("pull", "--plain-http", repository+"/web", "--version", "0.1.0", "--destination", filepath.Dir(writeFile(t, dir+"/pulled/.keep", "")))
	if got, want := fileDigest(t, dir+"/pulled/web-0.1.0.tgz"), fileDigest(t, chart); got != want {
		t.Errorf("the chart has the digest %s, not %s", got, want)
	}
	do("template", "--plain-http", "web", repository+"/web", "--version", "0.1.0")
}

func pushWithCosign(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	cosign := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "COSIGN_PASSWORD="), tool(t, "cosign"), args...)
	}
	do := doing(t, cosign)
	crane := doing(t, func(args ...string) (string, error) { return try(t, bare(dir), tool(t, "crane"), args...) })
	writeLayout(t, dir+"/layout", img)
	crane("auth", "login", s.addr, "-u", s.user, "-p", s.password)
	crane("push", dir+"/layout", s.addr+"/apps/cosign:1")
	do("generate-key-pair", "--output-key-prefix", dir+"/cosign")
	name := s.addr + "/apps/cosign@" + img.digest
	plain := []string{"--allow-http-registry", "--allow-insecure-registry"}
	verify := append([]string{"verify", "--key", dir + "/cosign.pub", "--insecure-ignore-tlog"}, plain...)
	if out, err := cosign(append(verify, name)...); err == nil {
		t.Errorf("what is not signed verifies: %s", out)
	}
	sign := append([]string{"sign", "--yes", "--key", dir + "/cosign.key", "--tlog-upload=false", "--use-signing-config=false", "--new-bundle-format=false"}, plain...)
	do(append(sign, name)...)
	if out := do(append(verify, name)...); !strings.Contains(out, img.digest) {
		t.Errorf("verify says %s", out)
	}
	do(append(verify, s.addr+"/apps/cosign:1")...)
	signature := strings.Replace(img.digest, ":", "-", 1) + ".sig"
	if tags := slices.Sorted(strings.FieldsSeq(crane("ls", s.addr+"/apps/cosign"))); !slices.Equal(tags, []string{"1", signature}) {
		t.Errorf("ls: %q", tags)
	}
}
