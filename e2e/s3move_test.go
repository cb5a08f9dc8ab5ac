//go:build e2e

package e2e

import (
	"net/http"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// startRegistryS3 starts a registry:2 on the bucket, set up as people do it who
// run it in a container.
func startRegistryS3(t *testing.T, s *s3Server) *registry {
	t.Helper()
	r := &registry{addr: regtest.FreeAddress(t)}
	home := workDir(t)
	r.config = writeFile(t, filepath.Join(home, "config.yml"), `version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {delete: {enabled: true}, redirect: {disable: true}}
http: {addr: `+r.addr+`}
`)
	r.process = start(t, bare(home,
		"REGISTRY_STORAGE=s3",
		"REGISTRY_STORAGE_S3_ACCESSKEY="+s3Key,
		"REGISTRY_STORAGE_S3_SECRETKEY="+s3Secret,
		"REGISTRY_STORAGE_S3_BUCKET="+s3Bucket,
		"REGISTRY_STORAGE_S3_REGION="+s3Region,
		"REGISTRY_STORAGE_S3_REGIONENDPOINT=http://"+s.addr,
		"REGISTRY_STORAGE_S3_CHUNKSIZE=67108864",
		// What REGISTRY_STORAGE replaces.
		"REGISTRY_STORAGE_DELETE_ENABLED=true",
		"REGISTRY_STORAGE_REDIRECT_DISABLE=true",
	), tool(t, "docker-registry"), "serve", r.config)
	r.untilReady(t, answers(r.addr))
	return r
}

// TestS3Interchange: what registry:2 has put into a bucket the mirror serves, and
// goes on with, and the other way round.
func TestS3Interchange(t *testing.T) {
	first, second := newImageOf(t, "first", 2), newImageOf(t, "second", 1)

	bothServers(t, func(t *testing.T, kind string) {
		t.Run("registry to mirror", func(t *testing.T) {
			s := startS3(t, kind)
			r := startRegistryS3(t, s)
			push := dockerOf(t, first)
			digest := push(r.addr, "1")
			push(r.addr, "2")
			pushIndex(t, r.addr+"/apps/web:3", second)
			r.stop(t)

			m := startMirror(t, setup{backend: s.store(workDir(t)), site: openSite})
			here := &shop{addr: m.addr}
			here.holds(t, "apps/web", "1", digest)
			here.holds(t, "apps/web", "3", second.digest)
			here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/1")
			here.holds(t, "apps/web", "2", digest)
			here.answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/"+second.digest)
			here.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/3")
			if got := push(m.addr, "4"); got != digest {
				t.Errorf("docker has pushed %s, not %s", got, digest)
			}
			m.stop(t)

			r = startRegistryS3(t, s)
			there := &shop{addr: r.addr}
			there.holds(t, "apps/web", "2", digest)
			there.holds(t, "apps/web", "4", digest)
			if tags := listTags(t, r.addr, "apps/web"); !slices.Equal(slices.Sorted(slices.Values(tags)), []string{"2", "4"}) {
				t.Errorf("registry:2 lists the tags %q", tags)
			}
			there.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/1")
			there.answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/manifests/"+second.digest)
		})

		t.Run("mirror to registry", func(t *testing.T) {
			s := startS3(t, kind)
			m := startMirror(t, setup{backend: s.store(workDir(t)), site: openSite})
			pushIndex(t, m.addr+"/apps/web:1", first)
			pushIndex(t, m.addr+"/apps/web:moved", first)
			pushIndex(t, m.addr+"/apps/web:moved", second)
			m.stop(t)

			r := startRegistryS3(t, s)
			check := func(t *testing.T, s *shop) {
				t.Helper()
				s.holds(t, "apps/web", "1", first.digest)
				s.holds(t, "apps/web", first.digest, first.digest)
				s.holds(t, "apps/web", "moved", second.digest)
			}
			check(t, &shop{addr: r.addr})
			pushIndex(t, r.addr+"/apps/web:3", first)
			r.stop(t)

			m = startMirror(t, setup{backend: s.store(workDir(t)), site: openSite})
			check(t, &shop{addr: m.addr})
			(&shop{addr: m.addr}).holds(t, "apps/web", "3", first.digest)
			if tags := listTags(t, m.addr, "apps/web"); !slices.Equal(slices.Sorted(slices.Values(tags)), []string{"1", "3", "moved"}) {
				t.Errorf("the mirror lists the tags %q", tags)
			}
		})
	})
}

// TestS3Move: the directory of a mirror is copied into a bucket by plain means, and
// goes on there; and back into a directory.
func TestS3Move(t *testing.T) {
	img, pushed, later := newImage(t, "moved"), newImageOf(t, "pushed", 2), newImageOf(t, "later", 1)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	const both = "hosted apps/**\nshadow_default\naccess {\n allow any to anyone on apps/**\n allow pull\n}"
	dir := workDir(t)
	m := startMirror(t, setup{store: dir, registry: dockerHub(upstream.addr), site: both})
	pullWithSkopeoPrefix(t, m.addr, img, ":latest")
	pushIndex(t, m.addr+"/apps/web:1", pushed)
	m.stop(t)

	s := startS3(t, "versitygw")
	s.upload(t, dir, "docker")
	s.upload(t, dir, "mirror/records")
	m = startMirror(t, setup{backend: s.store(workDir(t)), registry: dockerHub(deadAddr), site: both})
	check := func(m *mirror) {
		t.Helper()
		skopeoCopy(t, m.addr+"/library/hello:latest", img)
		(&shop{addr: m.addr}).holds(t, "apps/web", "1", pushed.digest)
	}
	check(m)
	pushIndex(t, m.addr+"/apps/web:2", later)
	m.stop(t)

	dir = workDir(t)
	s.download(t, "docker/", dir)
	s.download(t, "mirror/records/", dir)
	m = startMirror(t, setup{store: dir, registry: dockerHub(deadAddr), site: both})
	check(m)
	(&shop{addr: m.addr}).holds(t, "apps/web", "2", later.digest)
}
