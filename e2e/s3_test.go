//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// openSite lets anybody do anything with apps/**.
const openSite = "default off\nhosted apps/**\naccess {\n allow any to anyone\n}"

// settled waits until all of an image is in the bucket, as a repository's latest.
func (s *s3Server) settled(t *testing.T, repository string, img *image) {
	t.Helper()
	root := "docker/registry/v2/repositories/" + repository
	want := []string{root + "/_manifests/tags/latest/current/link"}
	for _, digest := range img.all() {
		want = append(want, blobKey(digest), root+"/_layers/sha256/"+strings.TrimPrefix(digest, "sha256:")+"/link")
	}
	for _, m := range append(must(img.index.IndexManifest()).Manifests, v1.Descriptor{Digest: must(img.index.Digest())}) {
		want = append(want, blobKey(m.Digest.String()), root+"/_manifests/revisions/sha256/"+m.Digest.Hex+"/link")
	}
	var missing []string
	defer func() {
		if len(missing) > 0 {
			t.Logf("the bucket lacks %q", missing)
		}
	}()
	eventually(t, time.Minute, repository+" to be in the bucket", func() bool {
		held := map[string]bool{}
		for _, key := range s.keys(t, "docker/") {
			held[key] = true
		}
		missing = slices.DeleteFunc(slices.Clone(want), func(key string) bool { return held[key] })
		return len(missing) == 0
	})
}

// readBlob reads a blob as any client would, and checks it.
func readBlob(t *testing.T, addr, repository, digest string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/v2/"+repository+"/blobs/"+digest, nil)
	if err != nil {
		t.Error(err)
		return
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Error(err)
		return
	}
	defer resp.Body.Close()
	h := sha256.New()
	n, err := io.Copy(h, resp.Body)
	if got := fmt.Sprintf("sha256:%x", h.Sum(nil)); err != nil || resp.StatusCode != http.StatusOK || got != digest {
		t.Errorf("blob %s: %s, %d bytes with the digest %s: %v", digest, resp.Status, n, got, err)
	}
}

// TestS3Clients: what was pulled once is pulled from the bucket by a mirror that
// has nothing near and no upstream any more, then again from its cache. Each blob is
// read from the bucket once, and nothing is listed but at the start.
func TestS3Clients(t *testing.T) {
	img := newImage(t, "in a bucket")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)

	for _, server := range []struct {
		kind    string
		clients []string
	}{
		{"versitygw", []string{"docker", "containerd-2.4", "podman", "skopeo", "crane"}},
		{"minio", []string{"containerd-1.6", "buildah"}},
	} {
		t.Run(server.kind, func(t *testing.T) {
			s := startS3(t, server.kind)
			counted := startCounter(t, upstream.addr)
			mirrorOf := func(addr, cache string) *mirror {
				return startMirror(t, setup{backend: s.store(cache), registry: dockerHub(addr) + deadRegistry(addr)})
			}
			m := mirrorOf(counted.addr, workDir(t))
			pullWithSkopeoPrefix(t, m.addr, img, ":latest")
			s.settled(t, "docker.io/library/hello", img)
			counted.fetchedOnce(t, img, img.all())
			for _, digest := range img.all() {
				if calls := s.calls.ofKey(blobKey(digest)); calls["PutObject"] != 1 || len(calls) != 1 {
					t.Errorf("for storing blob %s of %d bytes S3 was asked %v", digest, img.blobs[digest], calls)
				}
			}
			m.stop(t)

			for _, c := range clients {
				if !slices.Contains(server.clients, c.name) {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					s.calls.forget()
					m := mirrorOf(deadAddr, workDir(t))
					c.pull(t, m.addr, img, ":latest")
					c.pull(t, m.addr, img, ":latest")
					want := img.amd64
					if c.all {
						want = img.all()
					}
					for _, digest := range want {
						calls := s.calls.ofKey(blobKey(digest))
						if calls["HeadObject"] == 1 { // before the bucket has been listed
							delete(calls, "HeadObject")
						}
						if calls["GetObject"] != 1 || len(calls) != 1 {
							t.Errorf("for reading blob %s of %d bytes S3 was asked %v", digest, img.blobs[digest], calls)
						}
					}
					if n := s.calls.count("ListObjects"); n > 1 {
						t.Errorf("%d lists of a small bucket", n)
					}
					t.Logf("S3 was asked %s", s.calls.all())
					m.stop(t)
				})
			}
		})
	}
}

// TestS3Push: real clients push, each blob is put once, and what they have
// pushed is whole for a mirror that has nothing near.
func TestS3Push(t *testing.T) {
	img := newImageOf(t, "push into a bucket", 6)
	for _, server := range []struct {
		kind   string
		push   map[string]func(t *testing.T, s *shop, img *image)
		pushed []string
	}{
		{"versitygw", map[string]func(t *testing.T, s *shop, img *image){
			"docker": pushWithDocker, "containerd-2.4": pushWithContainerd2, "podman": pushWithPodman,
		}, []string{"docker:1", "containerd2:latest", "podman:1"}},
		{"minio", map[string]func(t *testing.T, s *shop, img *image){
			"skopeo": pushWithSkopeo, "docker-29": pushWithDocker29,
		}, []string{"docker29:1"}},
	} {
		t.Run(server.kind, func(t *testing.T) {
			s := startS3(t, server.kind)
			site := setup{
				backend: s.store(workDir(t)),
				server:  "basic_auth {\n alice " + hashed + "\n}",
				site:    "default off\nhosted apps/**\naccess {\n allow any to authenticated\n}",
			}
			m := startMirror(t, site)
			shop := &shop{addr: m.addr, user: "alice", password: password}
			for name, push := range server.push {
				t.Run(name, func(t *testing.T) { push(t, shop, img) })
			}
			for _, digest := range img.amd64 {
				if calls := s.calls.ofKey(blobKey(digest)); calls["PutObject"] > 1 || calls["HeadObject"] > 1 {
					t.Errorf("for blob %s S3 was asked %v", digest, calls)
				}
			}
			if n := s.calls.count("ListObjects"); n > 1 {
				t.Errorf("%d lists of an empty bucket", n)
			}
			t.Logf("S3 was asked %s", s.calls.all())
			m.stop(t)

			site.backend = s.store(workDir(t))
			m = startMirror(t, site)
			shop.addr = m.addr
			for _, name := range server.pushed {
				name, tag, _ := strings.Cut("apps/"+name, ":")
				resp := shop.ask(t, http.MethodHead, "/v2/"+name+"/manifests/"+tag)
				resp.Body.Close()
				shop.holds(t, name, tag, resp.Header.Get("Docker-Content-Digest"))
			}
		})
	}
}

// noise is a reproducible stream that nothing can compress, and its digest.
func noise(seed string, size int64) (open func() io.Reader, digest string) {
	open = func() io.Reader {
		return io.LimitReader(rand.NewChaCha8(sha256.Sum256([]byte(seed))), size)
	}
	h := sha256.New()
	must(io.Copy(h, open()))
	return open, fmt.Sprintf("sha256:%x", h.Sum(nil))
}

// An upload is a push of one blob, as a client sees it. Each step may go to another
// address.
type upload struct {
	repository string
	location   *url.URL
}

func (u *upload) do(t *testing.T, method, addr string, body io.Reader, header http.Header) (*http.Response, error) {
	target := "http://" + addr + "/v2/" + u.repository + "/blobs/uploads/"
	if u.location != nil {
		target = "http://" + addr + u.location.RequestURI()
	}
	req, err := http.NewRequestWithContext(t.Context(), method, target, body)
	if err != nil {
		return nil, err
	}
	for field, values := range header {
		req.Header[field] = values
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(text))
	if location := resp.Header.Get("Location"); location != "" && resp.StatusCode == http.StatusAccepted {
		u.location = must(url.Parse(location))
	}
	return resp, err
}

func (u *upload) wants(t *testing.T, status int, method, addr string, body io.Reader, header http.Header) *http.Response {
	t.Helper()
	resp, err := u.do(t, method, addr, body, header)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	if resp.StatusCode != status {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s: %s, not %d: %s", method, resp.Status, status, text)
	}
	return resp
}

// close asks for the blob to be what its digest says.
func (u *upload) close(digest string) *upload {
	q := u.location.Query()
	q.Set("digest", digest)
	location := *u.location
	location.RawQuery = q.Encode()
	return &upload{repository: u.repository, location: &location}
}

// TestS3Parts: a layer that is as many of the smallest parts as a provider may allow is
// streamed in, as docker does it, in as many calls as it has parts and four more. It is
// read by a mirror that has nothing near, and by a registry:2.
func TestS3Parts(t *testing.T) {
	s := startS3(t, "minio")
	parts := []string{"put_limit 5MiB", "part_size 5MiB", "max_parts 200"}
	m := startMirror(t, setup{backend: s.store(workDir(t), parts...), site: openSite})
	const size = 200 * 5 << 20
	open, digest := noise("parts", size)
	u := &upload{repository: "apps/large"}
	u.wants(t, http.StatusAccepted, http.MethodPost, m.addr, nil, nil)
	u.wants(t, http.StatusAccepted, http.MethodPatch, m.addr, open(), http.Header{"Content-Type": {"application/octet-stream"}})
	u.close(digest).wants(t, http.StatusCreated, http.MethodPut, m.addr, nil, nil)

	calls := s.calls.ofKey(blobKey(digest))
	all := 0
	for _, n := range calls {
		all += n
	}
	if calls["UploadPart"] != 200 || all > 204 {
		t.Errorf("S3 was asked %v", calls)
	}
	m.stop(t)

	s.calls.forget()
	m = startMirror(t, setup{backend: s.store(workDir(t), parts...), site: openSite})
	resp, err := http.Get("http://" + m.addr + "/v2/apps/large/blobs/" + digest)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	h := sha256.New()
	if n, err := io.Copy(h, resp.Body); err != nil || n != size || fmt.Sprintf("sha256:%x", h.Sum(nil)) != digest {
		t.Errorf("%d bytes came, with the digest sha256:%x: %v", n, h.Sum(nil), err)
	}
	calls = s.calls.ofKey(blobKey(digest))
	if calls["HeadObject"] == 1 { // before the bucket has been listed
		delete(calls, "HeadObject")
	}
	if calls["GetObject"] != 1 || len(calls) != 1 {
		t.Errorf("for reading the blob S3 was asked %v", calls)
	}
	m.stop(t)

	r := startRegistryS3(t, s)
	resp, err = http.Head("http://" + r.addr + "/v2/apps/large/blobs/" + digest)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.ContentLength != size {
		t.Errorf("registry:2 answers %s, and %d bytes", resp.Status, resp.ContentLength)
	}
}

// TestS3Together: two mirrors have one bucket and one secret. A push goes from
// one to the other at each request, both have what was pushed, a tag that moves at one
// moves at the other, and a push to both of what both do not have harms neither.
func TestS3Together(t *testing.T) {
	bothServers(t, func(t *testing.T, kind string) {
		s := startS3(t, kind)
		one := startMirror(t, setup{backend: s.store(workDir(t), "secret a-secret-of-the-two-mirrors"), site: openSite})
		two := startMirror(t, setup{backend: s.store(workDir(t), "secret a-secret-of-the-two-mirrors"), site: openSite})

		const size, chunk = 11<<20 + 7, 3 << 20
		open, digest := noise("together "+kind, size)
		blob := must(io.ReadAll(open()))
		u := &upload{repository: "apps/pushed"}
		at := []*mirror{two, one} // whose turn it is
		u.wants(t, http.StatusAccepted, http.MethodPost, one.addr, nil, nil)
		for offset := 0; offset < size; offset += chunk {
			end := min(offset+chunk, size)
			u.wants(t, http.StatusAccepted, http.MethodPatch, at[0].addr, bytes.NewReader(blob[offset:end]), http.Header{
				"Content-Type": {"application/octet-stream"}, "Content-Range": {fmt.Sprintf("%d-%d", offset, end-1)}})
			at[0], at[1] = at[1], at[0]
			resp := u.wants(t, http.StatusNoContent, http.MethodGet, at[0].addr, nil, nil)
			if got, want := resp.Header.Get("Range"), fmt.Sprintf("0-%d", end-1); got != want {
				t.Errorf("after a PATCH at one the other says %s, not %s", got, want)
			}
		}
		u.close(digest).wants(t, http.StatusCreated, http.MethodPut, at[0].addr, nil, nil)
		for _, m := range []*mirror{one, two} {
			eventually(t, time.Minute, "both mirrors to have the blob", func() bool {
				resp := must(http.Head("http://" + m.addr + "/v2/apps/pushed/blobs/" + digest))
				resp.Body.Close()
				return resp.StatusCode == http.StatusOK
			})
			readBlob(t, m.addr, "apps/pushed", digest)
		}
		if left := s.keys(t, "mirror/uploads/"); len(left) > 0 {
			t.Errorf("of the upload is left %q", left)
		}

		first, second := newImageOf(t, "first of two", 2), newImageOf(t, "second of two", 2)
		means := func(m *mirror, digest string) func() bool {
			return func() bool {
				resp := (&shop{addr: m.addr}).ask(t, http.MethodHead, "/v2/apps/web/manifests/1")
				resp.Body.Close()
				return resp.StatusCode == http.StatusOK && resp.Header.Get("Docker-Content-Digest") == digest
			}
		}
		moved := func(m, other *mirror, img *image) {
			t.Helper()
			pushIndex(t, m.addr+"/apps/web:1", img)
			began := time.Now()
			eventually(t, time.Minute, "a moved tag to be seen at the other mirror", means(other, img.digest))
			t.Logf("the moved tag was seen after %v", time.Since(began).Round(time.Millisecond))
			(&shop{addr: other.addr}).holds(t, "apps/web", "1", img.digest)
		}
		moved(one, two, first)
		moved(two, one, second)
		moved(one, two, first)
		(&shop{addr: two.addr}).answers(t, http.StatusAccepted, http.MethodDelete, "/v2/apps/web/manifests/1")
		eventually(t, time.Minute, "a deleted tag to be gone at the other mirror", func() bool {
			resp := (&shop{addr: one.addr}).ask(t, http.MethodHead, "/v2/apps/web/manifests/1")
			resp.Body.Close()
			return resp.StatusCode == http.StatusNotFound
		})

		var both sync.WaitGroup
		for _, m := range []*mirror{one, two} {
			both.Go(func() { pushIndex(t, m.addr+"/apps/both:1", second) })
		}
		both.Wait()
		for _, m := range []*mirror{one, two} {
			(&shop{addr: m.addr}).holds(t, "apps/both", "1", second.digest)
		}
	})
}

// TestS3OutageHerd: S3 ends in the middle of a blob that many clients are reading from the
// bucket. All of them get the rest from upstream; so does whoever comes then. When S3
// is back, the bucket gets what came meanwhile.
func TestS3OutageHerd(t *testing.T) {
	img, later := newImage(t, "herd"), newImageOf(t, "later", 4)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	upstream.push(t, "library/later", later)
	bothServers(t, func(t *testing.T, kind string) {
		s := startS3(t, kind)
		m := startMirror(t, setup{backend: s.store(workDir(t)), registry: dockerHub(upstream.addr)})
		pullWithSkopeoPrefix(t, m.addr, img, ":latest")
		s.settled(t, "docker.io/library/hello", img)
		m.stop(t)

		counted := startCounter(t, upstream.addr)
		m = startMirror(t, setup{backend: s.store(workDir(t)), registry: dockerHub(counted.addr)})
		wantStatus(t, m.addr, "/v2/library/hello/manifests/latest", http.StatusOK)
		held, release := s.calls.hold(t, "GetObject", blobKey(img.big), 0, 6<<20)
		var herd sync.WaitGroup
		for range 8 {
			herd.Go(func() { readBlob(t, m.addr, "library/hello", img.big) })
		}
		<-held
		s.kill()
		release()
		herd.Wait()
		if n := counted.fetched(img.big); n == 0 || n > img.bigSize-4<<20 {
			t.Errorf("of %d bytes %d came from upstream", img.bigSize, n)
		}
		skopeoCopy(t, m.addr+"/library/later:latest", later)
		skopeoCopy(t, m.addr+"/library/hello:latest", img)

		s.restart(t)
		s.settled(t, "docker.io/library/later", later)
	})
}

// TestS3OutagePush: S3 ends in the middle of a push. It is not confirmed, and goes
// on when S3 is back, without sending anything again.
func TestS3OutagePush(t *testing.T) {
	bothServers(t, func(t *testing.T, kind string) {
		s := startS3(t, kind)
		m := startMirror(t, setup{backend: s.store(workDir(t)), site: openSite})
		open, digest := noise("outage "+kind, 9<<20)
		u := &upload{repository: "apps/web"}
		u.wants(t, http.StatusAccepted, http.MethodPost, m.addr, nil, nil)
		u.wants(t, http.StatusAccepted, http.MethodPatch, m.addr, open(), http.Header{"Content-Type": {"application/octet-stream"}})
		held, release := s.calls.hold(t, "PutObject", blobKey(digest), 0, 1<<20)
		var resp *http.Response
		var err error
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			resp, err = u.close(digest).do(t, http.MethodPut, m.addr, nil, nil)
		}()
		<-held
		s.kill()
		release()
		if <-answered; err != nil || resp.StatusCode != http.StatusServiceUnavailable {
			t.Fatalf("a push while S3 is gone is answered %v, %v", resp, err)
		}
		(&shop{addr: m.addr}).answers(t, http.StatusNotFound, http.MethodHead, "/v2/apps/web/blobs/"+digest)

		s.restart(t)
		eventually(t, time.Minute, "the push to go on", func() bool {
			resp, err := u.close(digest).do(t, http.MethodPut, m.addr, nil, nil)
			return err == nil && resp.StatusCode == http.StatusCreated
		})
		readBlob(t, m.addr, "apps/web", digest)
		if !s.holdsBlobs(t, []string{digest}) {
			t.Error("the push is confirmed, and the bucket does not have it")
		}
	})
}

// TestS3Kill: a mirror that is killed in the middle of sending a blob in parts
// goes on with the parts that are missing, though S3 has never been asked which are.
func TestS3Kill(t *testing.T) {
	img := newImageOf(t, "killed", 64)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	bothServers(t, func(t *testing.T, kind string) {
		s := startS3(t, kind)
		site := setup{backend: s.store(workDir(t), "put_limit 5MiB", "part_size 5MiB"), registry: dockerHub(upstream.addr)}
		m := startMirror(t, site)
		held, release := s.calls.hold(t, "UploadPart", blobKey(img.big), 8, 1<<20)
		readBlob(t, m.addr, "library/hello", img.big)
		<-held
		m.signal(t, syscall.SIGKILL)
		m.wait(t, 20*time.Second)
		before := s.calls.ofKey(blobKey(img.big))["UploadPart"]
		release()

		m = startMirror(t, site)
		link := "docker/registry/v2/repositories/docker.io/library/hello/_layers/sha256/" + strings.TrimPrefix(img.big, "sha256:") + "/link"
		eventually(t, time.Minute, "the blob and its link to be in the bucket", func() bool {
			return s.holdsBlobs(t, []string{img.big}) && slices.Contains(s.keys(t, link), link)
		})
		calls := s.calls.ofKey(blobKey(img.big))
		parts := int((img.bigSize + 5<<20 - 1) / (5 << 20))
		t.Logf("%d parts, %d sent before the kill; S3 was asked %v", parts, before, calls)
		// Those in the middle of which it was killed are sent again.
		if again := calls["UploadPart"] - parts; again > 4 || calls["CreateMultipartUpload"] != 1 || calls["ListParts"] != 0 {
			t.Errorf("of %d parts %d were sent twice; S3 was asked %v", parts, again, calls)
		}
		m.stop(t)

		m = startMirror(t, setup{backend: s.store(workDir(t)), registry: dockerHub(deadAddr)})
		readBlob(t, m.addr, "library/hello", img.big)
	})
}

// TestS3Redirect: clients that are sent to the bucket for large blobs follow.
func TestS3Redirect(t *testing.T) {
	img := newImage(t, "redirected")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	s := startS3(t, "versitygw")
	m := startMirror(t, setup{backend: s.store(workDir(t)), registry: dockerHub(upstream.addr) + deadRegistry(upstream.addr), site: "redirect_to_storage 1MiB 127.0.0.0/8"})
	pullWithSkopeoPrefix(t, m.addr, img, ":latest")
	s.settled(t, "docker.io/library/hello", img)
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			s.calls.forget()
			c.pull(t, m.addr, img, ":latest")
			if s.calls.ofKey(blobKey(img.big))["GetObject"] == 0 {
				t.Errorf("nothing was read from the bucket; S3 was asked %s", s.calls.all())
			}
		})
	}
	if said := m.output(); strings.Contains(said, "X-Amz-Signature") {
		t.Error("a signed URL is in the log")
	}
}
