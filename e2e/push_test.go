//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/caddy-registry/mirror/internal/regtest"
)

var stock = flag.Bool("stock", false, "push to a registry:2, to see that the tests of pushes ask for nothing strange")

// A shop is a registry that people push to.
type shop struct {
	addr     string
	user     string // empty: nobody has to log in
	password string
	stock    bool // a registry:2; it has no search, no referrers, no deletion of tags
}

// hashed is what both Caddy and registry:2 know of the password, made cheaply.
const (
	password = "sesame-42"
	hashed   = "$2b$04$oiB2cMPp9Dcen.0mjHz2FOR/MTIoQ177aD/bTuxVK3OCT96CS.McO"
)

// startShop starts a site for hosted images; with a user, for that one only.
func startShop(t *testing.T, user string) *shop {
	t.Helper()
	s := &shop{user: user, password: password, stock: *stock}
	if s.stock {
		var auth []string
		if user != "" {
			auth = []string{"auth: {htpasswd: {realm: shop, path: " + writeFile(t, filepath.Join(workDir(t), "htpasswd"), user+":"+hashed+"\n") + "}}"}
		}
		s.addr = startRegistry(t, workDir(t), "", auth...).addr
		return s
	}
	config := setup{site: "default off\nhosted apps/**\naccess {\n allow any to anyone\n}"}
	if user != "" {
		config.server = "basic_auth {\n " + user + " " + hashed + "\n}"
		config.site = "default off\nhosted apps/**\naccess {\n allow any to authenticated\n}"
	}
	s.addr = startMirror(t, config).addr
	return s
}

// TestPush: every client logs in, pushes, pushes again what is there, pulls what
// it has pushed, and does whatever else it can do to a registry. What it pushed
// is then read by its digest, to the last byte.
func TestPush(t *testing.T) {
	img := newImageOf(t, "push", 6)
	s := startShop(t, "alice")
	for _, client := range []struct {
		name string
		push func(t *testing.T, s *shop, img *image)
	}{
		{"docker", pushWithDocker},
		{"docker-29", pushWithDocker29},
		{"containerd-1.6", pushWithContainerd},
		{"containerd-2.4", pushWithContainerd2},
		{"podman", pushWithPodman},
		{"buildah", pushWithBuildah},
		{"skopeo", pushWithSkopeo},
		{"crane", pushWithCrane},
		{"regctl", pushWithRegctl},
		{"oras-go", pushWithOras},
		{"helm", pushWithHelm},
		{"cosign", pushWithCosign},
	} {
		t.Run(client.name, func(t *testing.T) { client.push(t, s, img) })
	}
}

// TestPushWithoutLogin: a site whose rules let anyone push needs no login.
func TestPushWithoutLogin(t *testing.T) {
	img := newImageOf(t, "open", 1)
	s := startShop(t, "")
	t.Run("docker", func(t *testing.T) { pushWithDocker(t, s, img) })
	t.Run("podman", func(t *testing.T) { pushWithPodman(t, s, img) })
	t.Run("crane", func(t *testing.T) { pushWithCrane(t, s, img) })
}

// TestTwoHosts: one host, where everyone logs in, is pushed to; another, without
// a login, serves the same images. People are told why they may not push.
func TestTwoHosts(t *testing.T) {
	img := newImageOf(t, "two hosts", 1)
	open := regtest.FreeAddress(t)
	m := startMirror(t, setup{
		server: "basic_auth {\n alice " + hashed + "\n bob " + hashed + "\n}",
		site:   "default off\nhosted apps/**\naccess {\n allow any to user:alice\n allow pull to authenticated\n}",
		sites:  fmt.Sprintf("http://%s {\n bind 127.0.0.1\n registry_mirror {\n default off\n hosted apps/**\n access {\n allow pull to anyone\n }\n }\n}\n", open),
	})
	docker := startDocker(t, deadAddr)
	do := doing(t, docker)
	archive := filepath.Join(workDir(t), "hello.tar")
	writeArchive(t, archive, img)
	do("load", "-i", archive)
	here, there := m.addr+"/apps/web:1", open+"/apps/web:1"
	do("tag", "hello:latest", here)
	do("tag", "hello:latest", there)
	refused := func(name, who string) {
		t.Helper()
		want := "denied: apps/web:1: no rule of this site allows " + who + " to push to it"
		if out, err := docker("push", name); err == nil {
			t.Errorf("%s has pushed: %s", who, out)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("what %s is told lacks %q: %v", who, want, err)
		}
	}
	do("login", "-u", "alice", "-p", password, m.addr)
	digest := saidDigest.FindString(do("push", here))
	refused(there, "anonymous")
	do("login", "-u", "bob", "-p", password, m.addr)
	refused(here, "bob")
	for _, name := range []string{here, there, open + "/apps/web@" + digest} {
		do("rmi", "-f", img.config)
		do("pull", name)
		checkSaid(t, img, do("run", "--rm", "--network", "none", name))
	}
	(&shop{addr: open}).holds(t, "apps/web", "1", digest)
	dir := workDir(t)
	if _, err := tryPodman(t, dir, deadAddr, "pull", "--tls-verify=false", "--signature-policy", anySignature(t, dir), there); err != nil {
		t.Error(err)
	}
}

// ask sends a request as the shop's user.
func (s *shop) ask(t *testing.T, method, path string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", strings.Join([]string{string(types.OCIImageIndex), string(types.OCIManifestSchema1),
		string(types.DockerManifestList), string(types.DockerManifestSchema2)}, ", "))
	if s.user != "" {
		req.SetBasicAuth(s.user, s.password)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// answers checks a status.
func (s *shop) answers(t *testing.T, status int, method, path string) {
	t.Helper()
	resp := s.ask(t, method, path)
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != status {
		t.Errorf("%s %s: %s, not %d: %s", method, path, resp.Status, status, body)
	}
}

// holds checks every byte of what a reference means, which is to have the
// digest; and returns the digests of its blobs.
func (s *shop) holds(t *testing.T, repository, reference, digest string) []string {
	t.Helper()
	var blobs []string
	body := s.read(t, "/v2/"+repository+"/manifests/"+reference, digest)
	var m struct {
		Config    *v1.Descriptor
		Layers    []v1.Descriptor
		Manifests []v1.Descriptor
	}
	if err := json.Unmarshal(body, &m); err != nil {
		t.Fatalf("%s:%s: %v", repository, reference, err)
	}
	for _, child := range m.Manifests {
		blobs = append(blobs, s.holds(t, repository, child.Digest.String(), child.Digest.String())...)
	}
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, blob := range m.Layers {
		s.read(t, "/v2/"+repository+"/blobs/"+blob.Digest.String(), blob.Digest.String())
		blobs = append(blobs, blob.Digest.String())
	}
	return blobs
}

func (s *shop) read(t *testing.T, path, digest string) []byte {
	t.Helper()
	resp := s.ask(t, http.MethodGet, path)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v: %.200s", path, resp.Status, err, body)
	}
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(body)); got != digest {
		t.Errorf("GET %s: what came has the digest %s, not %s", path, got, digest)
	}
	return body
}

// writeLayout writes an image as an OCI layout, tagged latest.
func writeLayout(t *testing.T, dir string, img *image) {
	t.Helper()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendIndex(img.index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"})); err != nil {
		t.Fatal(err)
	}
}

// writeArchive writes the linux/amd64 half of an image as `docker save` would,
// as hello:latest.
func writeArchive(t *testing.T, file string, img *image) {
	t.Helper()
	child := must(img.index.Image(must(v1.NewHash(img.child))))
	if err := tarball.WriteToFile(file, must(name.NewTag("hello:latest")), child); err != nil {
		t.Fatal(err)
	}
}

var saidDigest = regexp.MustCompile(`sha256:[0-9a-f]{64}`)

func pushWithDocker(t *testing.T, s *shop, img *image) {
	docker := startDocker(t, deadAddr)
	do := doing(t, docker)
	if s.user != "" {
		if out, err := docker("login", "-u", s.user, "-p", "wrong", s.addr); err == nil {
			t.Errorf("a login with a wrong password: %s", out)
		}
		if out, err := docker("push", s.addr+"/apps/docker:1"); err == nil {
			t.Errorf("a push without a login: %s", out)
		}
		do("login", "-u", s.user, "-p", s.password, s.addr)
	}
	archive := filepath.Join(workDir(t), "hello.tar")
	writeArchive(t, archive, img)
	do("load", "-i", archive)
	first, second := s.addr+"/apps/docker:1", s.addr+"/apps/docker/other:1"
	do("tag", "hello:latest", first)
	do("tag", "hello:latest", second)
	digest := saidDigest.FindString(do("push", first))
	s.holds(t, "apps/docker", "1", digest)
	if out := do("push", first); !strings.Contains(out, "Layer already exists") || strings.Contains(out, "Pushed") {
		t.Errorf("a second push says:\n%s", out)
	}
	if out := do("push", second); !strings.Contains(out, "Mounted from apps/docker") || strings.Contains(out, "Pushed") {
		t.Errorf("a push to another repository says:\n%s", out)
	}
	s.holds(t, "apps/docker/other", "1", digest)

	do("rmi", "-f", "hello:latest", first, second)
	for _, name := range []string{first, s.addr + "/apps/docker@" + digest, second} {
		do("pull", name)
		if got := strings.TrimSpace(do("image", "inspect", "--format", "{{.Id}}", name)); got != img.config {
			t.Errorf("docker has image %s as %s, not %s", got, name, img.config)
		}
		checkSaid(t, img, do("run", "--rm", "--network", "none", name))
		do("rmi", "-f", img.config)
	}
	if !s.stock {
		eventually(t, 20*time.Second, "docker search to find apps/docker", func() bool {
			return slices.Contains(strings.Fields(do("search", "--format", "{{.Name}}", s.addr+"/docker")), "apps/docker")
		})
	}
}

// doing is a program that may not fail.
func doing(t *testing.T, program func(args ...string) (string, error)) func(args ...string) string {
	return func(args ...string) string {
		t.Helper()
		out, err := program(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

// dockerOf starts a docker that has an image, and returns what pushes that as a tag of
// apps/web at an address, and says the digest that it has there.
func dockerOf(t *testing.T, img *image) func(addr, tag string) string {
	t.Helper()
	docker := doing(t, startDocker(t, deadAddr))
	archive := filepath.Join(workDir(t), "hello.tar")
	writeArchive(t, archive, img)
	docker("load", "-i", archive)
	return func(addr, tag string) string {
		t.Helper()
		name := addr + "/apps/web:" + tag
		docker("tag", "hello:latest", name)
		return saidDigest.FindString(docker("push", name))
	}
}

func pushWithDocker29(t *testing.T, s *shop, img *image) {
	do := doing(t, startDocker29(t))
	do("login", "-u", s.user, "-p", s.password, s.addr)
	archive := filepath.Join(workDir(t), "hello.tar")
	writeArchive(t, archive, img)
	do("load", "-i", archive)
	first, second := s.addr+"/apps/docker29:1", s.addr+"/apps/docker29/other:1"
	do("tag", "hello:latest", first)
	do("tag", "hello:latest", second)
	digest := saidDigest.FindString(do("push", first))
	s.holds(t, "apps/docker29", "1", digest)
	do("push", first)
	do("push", second)
	s.holds(t, "apps/docker29/other", "1", digest)

	do("rmi", "-f", "hello:latest", first, second)
	for _, name := range []string{first, s.addr + "/apps/docker29@" + digest} {
		do("pull", name)
		if got := strings.TrimSpace(do("image", "inspect", "--format", "{{.Id}}", name)); got != digest {
			t.Errorf("docker has image %s as %s, not %s", got, name, digest)
		}
		do("rmi", "-f", name)
	}
}

func pushWithContainerd(t *testing.T, s *shop, img *image) {
	pushContent(t, 2, "/usr/bin", s, img, "apps/containerd")
}

func pushWithContainerd2(t *testing.T, s *shop, img *image) {
	pushContent(t, 3, filepath.Join(checkout, ".cache/containerd2"), s, img, "apps/containerd2")
}

func pushContent(t *testing.T, configVersion int, bin string, s *shop, img *image, repository string) {
	t.Helper()
	ctr, _ := startContainerd(t, configVersion, "", bin, deadAddr)
	do := doing(t, ctr)
	dir := workDir(t)
	writeLayout(t, dir+"/layout", img)
	run(t, bare(dir), tool(t, "tar"), "-C", dir+"/layout", "-cf", dir+"/layout.tar", ".")
	name := s.addr + "/" + repository
	do("images", "import", "--base-name", name, "--all-platforms", dir+"/layout.tar")
	login := []string{"--plain-http", "--user", s.user + ":" + s.password}
	if out, err := ctr("images", "push", "--plain-http", "--user", s.user+":wrong", name+":latest"); err == nil {
		t.Errorf("a push with a wrong password: %s", out)
	}
	push := append([]string{"images", "push"}, login...)
	do(append(push, name+":latest")...)
	do(append(push, name+":latest")...)
	s.holds(t, repository, "latest", img.digest)

	do("images", "rm", "--sync", name+":latest")
	checkEmpty(t, do)
	pull := append([]string{"images", "pull", "--all-platforms"}, login...)
	do(append(pull, name+"@"+img.digest)...)
	checkContent(t, do, append(img.all(), img.digest))
	do("images", "rm", "--sync", name+"@"+img.digest)
	checkEmpty(t, do)
	do(append(pull, name+":latest")...)
	checkContent(t, do, append(img.all(), img.digest))
}

// checkEmpty checks that a containerd holds nothing, so that what it has next
// has come over the network.
func checkEmpty(t *testing.T, ctr func(args ...string) string) {
	t.Helper()
	if held := ctr("content", "ls", "--quiet"); strings.TrimSpace(held) != "" {
		t.Fatalf("containerd still holds\n%s", held)
	}
}

func pushWithPodman(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	do := doing(t, func(args ...string) (string, error) { return tryPodman(t, dir, deadAddr, args...) })
	if s.user != "" {
		if out, err := tryPodman(t, dir, deadAddr, "login", "--tls-verify=false", "-u", s.user, "-p", "wrong", s.addr); err == nil {
			t.Errorf("a login with a wrong password: %s", out)
		}
		do("login", "--tls-verify=false", "-u", s.user, "-p", s.password, s.addr)
	}
	writeLayout(t, dir+"/layout", img)
	policy := anySignature(t, dir)
	do("pull", "--signature-policy", policy, "oci:"+dir+"/layout:latest")
	first, second := s.addr+"/apps/podman:1", s.addr+"/apps/podman/other:1"
	digest := ""
	for _, name := range []string{first, first, second} {
		do("push", "--tls-verify=false", "--signature-policy", policy, "--digestfile", dir+"/digest", img.config, name)
		digest = strings.TrimSpace(string(must(os.ReadFile(dir + "/digest"))))
	}
	s.holds(t, "apps/podman", "1", digest)
	s.holds(t, "apps/podman/other", "1", digest)

	for _, name := range []string{first, s.addr + "/apps/podman@" + digest} {
		do("rmi", "-f", img.config)
		do("pull", "--tls-verify=false", "--signature-policy", policy, name)
		if got := "sha256:" + strings.TrimSpace(do("image", "inspect", "--format", "{{.Id}}", name)); got != img.config {
			t.Errorf("podman has image %s, not %s", got, img.config)
		}
	}
	// Where there is no search, podman looks through the catalog.
	eventually(t, 20*time.Second, "podman search to find apps/podman", func() bool {
		return slices.Contains(strings.Fields(do("search", "--tls-verify=false", "--format", "{{.Name}}", s.addr+"/podman")), s.addr+"/apps/podman")
	})
}

func pushWithBuildah(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	policy := anySignature(t, dir)
	buildah := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "REGISTRY_AUTH_FILE="+dir+"/auth.json"), tool(t, "buildah"), append([]string{
			"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs", "--registries-conf", registriesConf(t, dir, deadAddr)}, args...)...)
	}
	do := doing(t, buildah)
	name := s.addr + "/apps/buildah:1"
	do("login", "--tls-verify=false", "-u", s.user, "-p", s.password, s.addr)
	writeLayout(t, dir+"/layout", img)
	container := strings.TrimSpace(do("from", "--quiet", "--signature-policy", policy, "oci:"+dir+"/layout:latest"))
	do("config", "--label", "built=here", container)
	do("commit", "--quiet", "--signature-policy", policy, container, "built:1")
	do("rm", container)
	do("push", "--tls-verify=false", "--signature-policy", policy, "--digestfile", dir+"/digest", "built:1", "docker://"+name)
	digest := strings.TrimSpace(string(must(os.ReadFile(dir + "/digest"))))
	s.holds(t, "apps/buildah", "1", digest)

	do("rmi", "--all", "--force")
	container = strings.TrimSpace(do("from", "--quiet", "--tls-verify=false", "--signature-policy", policy, s.addr+"/apps/buildah@"+digest))
	root := strings.TrimSpace(do("mount", container))
	if got := fileDigest(t, root+"/data/blob"); got != img.payload {
		t.Errorf("/data/blob has the digest %s, not %s", got, img.payload)
	}
	do("rm", container)
}

func pushWithSkopeo(t *testing.T, s *shop, img *image) {
	dir := workDir(t)
	conf := writeFile(t, filepath.Join(dir, "registries.conf"), "")
	skopeo := func(args ...string) (string, error) {
		t.Helper()
		return try(t, bare(dir, "REGISTRY_AUTH_FILE="+dir+"/auth.json"), tool(t, "skopeo"), append([]string{"--registries-conf", conf, "--insecure-policy"}, args...)...)
	}
	do := doing(t, skopeo)
	repository := "docker://" + s.addr + "/apps/skopeo"
	writeLayout(t, dir+"/layout", img)
	// What it copies of an index it has written anew, with a digest of its own;
	// with layers as podman has compressed them, if it remembers that those are in
	// the registry.
	copyAll := func(from, to string) string {
		t.Helper()
		do("copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", "--digestfile", dir+"/digest", from, to)
		return strings.TrimSpace(string(must(os.ReadFile(dir + "/digest"))))
	}
	if out, err := skopeo("copy", "--all", "--dest-tls-verify=false", "oci:"+dir+"/layout:latest", repository+":1"); err == nil {
		t.Errorf("a copy without a login: %s", out)
	}
	do("login", "--tls-verify=false", "-u", s.user, "-p", s.password, s.addr)
	digest := copyAll("oci:"+dir+"/layout:latest", repository+":1")
	blobs := s.holds(t, "apps/skopeo", "1", digest)
	s.holds(t, "apps/skopeo", "2", copyAll("oci:"+dir+"/layout:latest", repository+":2"))
	other := copyAll(repository+":1", repository+"/other:1")
	s.holds(t, "apps/skopeo/other", "1", other)
	copyAll(repository+"@"+digest, "oci:"+dir+"/out:latest")
	checkLayout(t, dir+"/out", blobs)

	var tags struct{ Tags []string }
	if err := json.Unmarshal([]byte(do("list-tags", "--tls-verify=false", repository)), &tags); err != nil || !slices.Equal(slices.Sorted(slices.Values(tags.Tags)), []string{"1", "2"}) {
		t.Errorf("list-tags: %q, %v", tags.Tags, err)
	}
	var inspected struct{ Digest string }
	if err := json.Unmarshal([]byte(do("inspect", "--tls-verify=false", repository+":1")), &inspected); err != nil || inspected.Digest != digest {
		t.Errorf("inspect: %+v, %v", inspected, err)
	}
	// It asks what the tag means, and deletes that.
	do("delete", "--tls-verify=false", repository+":1")
	s.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/skopeo/manifests/"+digest)
	if out, err := skopeo("inspect", "--tls-verify=false", repository+":1"); err == nil {
		t.Errorf("inspect of what is deleted: %s", out)
	}
	s.holds(t, "apps/skopeo/other", "1", other)
}
