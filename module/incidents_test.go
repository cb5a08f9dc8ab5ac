package module_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// The tests of this file are named after what has happened to other registries, and
// concern what is pushed and deleted. Those about who may do what are in
// incidentsaccess_test.go.

// TestCVE_2023_2253: a listing set aside memory for as many entries as a client
// asked for.
func TestCVE_2023_2253_EntriesAskedFor(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	p.image(regtest.NewImage("x"), "v1")
	for _, path := range []string{"/v2/_catalog?n=", p.path("tags", "list?n=")} {
		for _, n := range []string{"2000000000", "9223372036854775807"} {
			p.sends(200, "GET", path+"1", nil)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			a := p.sends(200, "GET", path+n, nil)
			runtime.ReadMemStats(&after)
			if took := after.TotalAlloc - before.TotalAlloc; took > 64<<20 {
				t.Errorf("%s%s took %d bytes", path, n, took)
			}
			if !bytes.Contains(a.body, []byte("v1")) && !bytes.Contains(a.body, []byte("apps/web")) {
				t.Errorf("%s%s: %s", path, n, a.body)
			}
		}
		m.refused(400, oci.CodePageInvalid, "GET", path+strings.Repeat("9", 1000), nil, "n=")
	}
}

// TestCVE_2026_35172: a cache of descriptors brought back blobs that had been
// deleted. Here another repository that has the same bytes keeps them in memory.
func TestCVE_2026_35172_DeletedAndCached(t *testing.T) {
	m := start(t, "", hostedSite)
	p, other := pusher{m, "apps/web"}, pusher{m, "apps/other"}
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	for _, p := range []pusher{p, other} {
		p.image(image, "v1")
		p.put(image.Digest.String(), image.Content)
		p.pull(p.repository, "v1", image)
		p.pull(p.repository, image.Digest.String(), image)
	}
	paths := func(p pusher) (all []string) {
		for _, ref := range []string{"v1", image.Digest.String()} {
			all = append(all, p.path("manifests", ref))
		}
		for _, blob := range image.Blobs {
			all = append(all, p.path("blobs", blob.Digest.String()))
		}
		return all
	}
	for i, path := range paths(p) {
		p.sends(202, "DELETE", path, nil)
		for range 3 {
			for j, path := range paths(p) {
				status := 200
				if j <= i {
					status = 404
				}
				p.sends(status, "HEAD", path, nil)
				p.sends(status, "GET", path, nil)
				if j > 1 {
					p.sends(max(status, 206), "GET", path, nil, "Range", "bytes=0-0")
				}
				other.sends(200, "GET", paths(other)[j], nil)
			}
		}
	}
}

// TestCVE_2026_41888: the switch against deleting was looked at by one route, and
// not by the one that deletes tags.
func TestCVE_2026_41888_DeleteOff(t *testing.T) {
	m := start(t, "hosted apps/locked/** {\n delete off\n}", hostedSite)
	p, open := pusher{m, "apps/locked/web"}, pusher{m, "apps/web"}
	image := regtest.NewImage("x", regtest.Random("x", 1000))
	loose := regtest.Random("loose", 10)
	for _, p := range []pusher{p, open} {
		p.image(image, "v1")
		p.blob(loose.Data)
	}
	none := digest.FromString("none").String()
	for _, path := range []string{
		p.path("manifests", "v1"), p.path("manifests", image.Digest.String()), p.path("manifests", "none"), p.path("manifests", none),
		p.path("blobs", loose.Digest.String()), p.path("blobs", image.Blobs[0].Digest.String()), p.path("blobs", none),
	} {
		m.refused(405, oci.CodeUnsupported, "DELETE", path, nil, "delete off")
	}
	p.pull(p.repository, "v1", image)
	p.sends(200, "GET", p.path("blobs", loose.Digest.String()), nil)
	// To cancel an upload is not to delete something.
	p.sends(204, "DELETE", p.begin(""), nil)
	for _, path := range []string{open.path("manifests", "v1"), open.path("manifests", image.Digest.String()), open.path("blobs", loose.Digest.String())} {
		p.sends(202, "DELETE", path, nil)
	}
}

// TestCVE_2024_39897: what one repository had could be had from another, by HEAD
// and by mounting. Here, whoever may push to a repository of his own and knows the
// digests gets at nothing of another, by whatever he names; and neither does a
// restart, which reads anew what manifests name, give it to him.
func TestCVE_2024_39897_OthersContent(t *testing.T) {
	const app = "hosted apps/sparse {\n require_blobs off\n}"
	secret := regtest.NewIndex(regtest.NewImage("secret", regtest.Random("secret", 1000)))
	image := secret.Children[0]
	site := "default off\nhosted apps/** team/**\naccess {\ndeny pull on team/**\nallow any to anyone\n}"
	m := start(t, app, site)
	owner := pusher{m, "team/secret"}
	if err := m.load(app, strings.Replace(site, "deny pull on team/**\n", "", 1)); err != nil {
		t.Fatal(err)
	}
	owner.image(secret, "v1")
	if err := m.load(app, site); err != nil {
		t.Fatal(err)
	}
	for _, p := range []pusher{{m, "apps/web"}, {m, "apps/sparse"}} {
		named := regtest.NewIndex(secret, image)
		p.put("named", named.Content)
		if p.repository == "apps/sparse" {
			layers := regtest.NewImage("of others", append([]regtest.Content{image.Blobs[0]}, image.Blobs[1:]...)...)
			p.blob(layers.Blobs[0].Data)
			p.put("layers", layers.Content)
		} else {
			m.refused(404, oci.CodeManifestBlobUnknown, "PUT", p.path("manifests", "x"), image.Data, "pushed", "Content-Type", image.MediaType)
		}
		subject := artifact("application/vnd.x", new(v1.Descriptor), nil, regtest.Random("own", 10))
		p.image(artifact("application/vnd.x", ptr(secret.Descriptor()), nil, subject.Blobs[1]))
		for _, restarted := range []bool{false, true} {
			if restarted {
				m.stop()
				if err := m.load(app, site); err != nil {
					t.Fatal(err)
				}
			}
			for _, c := range []regtest.Content{secret.Content, image.Content} {
				for _, d := range []digest.Digest{c.Digest, digest.SHA512.FromBytes(c.Data)} {
					p.sends(404, "HEAD", p.path("manifests", d.String()), nil)
					p.sends(404, "GET", p.path("manifests", d.String()), nil)
					p.sends(404, "GET", p.path("blobs", d.String()), nil)
				}
			}
			for _, c := range append(image.Blobs[:len(image.Blobs):len(image.Blobs)], image.Content, secret.Content) {
				d := c.Digest.String()
				p.sends(404, "HEAD", p.path("blobs", d), nil)
				p.sends(404, "GET", p.path("blobs", d), nil)
				p.sends(404, "GET", p.path("blobs", d), nil, "Range", "bytes=0-0")
				for _, from := range []string{"&from=team/secret", "", "&from=" + p.repository, "&from=apps/sparse"} {
					// 202: it is for him to upload it.
					a := p.sends(202, "POST", p.path("blobs", "uploads", "")+"?mount="+d+from, nil)
					p.sends(204, "DELETE", p.located(a), nil)
				}
				m.sends(403, "GET", owner.path("blobs", d), nil)
			}
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestCVE_2026_31801: a user who could only create tags overwrote one, since
// whether it was there was looked at too early. Here one who pushes an immutable
// tag stops between the look and the writing while another sets it.
func TestCVE_2026_31801_TagCreatedMeanwhile(t *testing.T) {
	m := start(t, "hosted apps/** {\n immutable *\n}", hostedSite)
	p := pusher{m, "apps/web"}
	first, second := regtest.NewImage("first"), regtest.NewImage("second")
	for _, image := range []regtest.Image{first, second} {
		p.blob(image.Blobs[0].Data)
	}
	reached, goOn := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	failpoint.Set(func(name string) {
		if name == "push.tag" && once.CompareAndSwap(false, true) {
			close(reached)
			<-goOn
		}
	})
	t.Cleanup(func() { failpoint.Set(nil) })
	type result struct {
		*answer
		err error
	}
	slow := make(chan result, 1)
	go func() {
		a, err := m.try("PUT", p.path("manifests", "v1"), second.Data, "Content-Type", second.MediaType)
		slow <- result{a, err}
	}()
	select {
	case <-reached:
	case <-time.After(time.Minute):
		t.Fatal("the first push does not come to its tag")
	}
	p.put("v1", first.Content)
	close(goOn)
	r := <-slow
	if r.err != nil || r.StatusCode != 403 || !bytes.Contains(r.body, []byte(oci.CodeDenied)) {
		t.Errorf("%v, %v", r.answer, r.err)
	}
	p.pull(p.repository, "v1", first)
}

// TestCVE_2020_1702: manifests were read without a limit. One that says that it is
// too long is not read at all.
func TestCVE_2020_1702_ManifestWithoutEnd(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	for _, ask := range []struct{ header, says string }{
		{fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue\r\n", 4<<20+1), "HTTP/1.1 413"},
		{fmt.Sprintf("Content-Length: %d\r\nExpect: 100-continue\r\n", int64(1)<<60), "HTTP/1.1 413"},
		{"Content-Length: 2\r\nConnection: close\r\nExpect: 100-continue\r\n", "HTTP/1.1 100"},
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(m.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(time.Minute))
		fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\n%s\r\n", p.path("manifests", "v1"), strings.TrimPrefix(m.URL, "http://"), v1.MediaTypeImageManifest, ask.header)
		answer := bufio.NewReader(conn)
		line, err := answer.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, ask.says) {
			t.Errorf("%q: %q, %v", ask.header, line, err)
		}
		if strings.HasPrefix(line, "HTTP/1.1 100") {
			fmt.Fprint(conn, "{}")
		}
		if _, err := io.Copy(io.Discard, answer); err != nil {
			t.Errorf("%q: the connection is kept: %v", ask.header, err)
		}
		conn.Close()
	}
	// One that does not say is read up to one byte too much.
	body := new(spaces)
	req, err := http.NewRequest("PUT", m.URL+p.path("manifests", "endless"), body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n := body.n.Load(); resp.StatusCode != 413 || n > 16<<20 {
		t.Errorf("status %d after %d bytes", resp.StatusCode, n)
	}
}

// spaces is a body without end, and counts how many have been taken.
type spaces struct{ n atomic.Int64 }

func (s *spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	s.n.Add(int64(len(p)))
	return len(p), nil
}

// TestCVE_2021_41190: one digest was an index to one client and an image to
// another.
func TestCVE_2021_41190_TwoMeanings(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x", regtest.Random("x", 10))
	p.image(image, "v1")
	both := append(bytes.TrimSuffix(bytes.Clone(image.Data), []byte("}")), `,"manifests":[]}`...)
	untyped := bytes.Replace(both, []byte(`"mediaType":"`+v1.MediaTypeImageManifest+`",`), nil, 1)
	for _, body := range [][]byte{both, untyped} {
		for _, kind := range []string{v1.MediaTypeImageManifest, v1.MediaTypeImageIndex, ""} {
			m.refused(400, oci.CodeManifestInvalid, "PUT", p.path("manifests", "v2"), body, "", "Content-Type", kind)
		}
	}
	// The same bytes do not come under another type either.
	for _, kind := range []string{v1.MediaTypeImageIndex, oci.MediaTypeDockerManifest, "application/json"} {
		m.refused(400, oci.CodeManifestInvalid, "PUT", p.path("manifests", "v1"), image.Data, "Content-Type", "Content-Type", kind)
		if a := p.sends(200, "GET", p.path("manifests", "v1"), nil, "Accept", kind); a.Header.Get("Content-Type") != v1.MediaTypeImageManifest {
			t.Errorf("served as %s to who accepts %s", a.Header.Get("Content-Type"), kind)
		}
	}
}

// TestCVE_2020_15157: the addresses in layers were followed, with credentials. Here
// nobody follows them, neither when the manifest is pushed nor when it, or such a
// layer, is pulled.
func TestCVE_2020_15157_AddressesInLayers(t *testing.T) {
	var asked atomic.Int64
	away := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer away.Close()
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	p.blob(image.Blobs[0].Data)
	layer := regtest.Random("away", 10).Descriptor()
	for _, kind := range []string{v1.MediaTypeImageLayerGzip, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar"} {
		layer.MediaType, layer.URLs = kind, []string{away.URL + "/layer"}
		manifest := regtest.JSON(v1.MediaTypeImageManifest, map[string]any{
			"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "config": image.Blobs[0].Descriptor(), "layers": []any{layer},
		})
		p.put("v1", manifest)
		p.sends(404, "HEAD", p.path("blobs", layer.Digest.String()), nil)
		p.sends(404, "GET", p.path("blobs", layer.Digest.String()), nil)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests to where a layer says it is", n)
	}
}
