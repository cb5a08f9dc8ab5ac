package module_test

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

func TestPull(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewIndex(
		regtest.NewImage("amd64", regtest.Random("base", 3<<20), regtest.Random("app", 100)),
		regtest.NewImage("arm64", regtest.Random("arm", 1<<20)),
	)
	up.Push("library/web", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")

	m.pull("library/web", "latest", image)
	m.pull("library/web", "latest", image)                      // warm
	m.pull("web", image.Digest.String(), image)                 // library/ is understood
	m.pull("docker.io/library/web", "latest", image)            // by path
	m.pull("index.docker.io/web", image.Digest.String(), image) // by an alias

	for _, child := range image.Children {
		for _, blob := range child.Blobs {
			if sent := up.Sent(blob.Digest); sent != int64(len(blob.Data)) {
				t.Errorf("%d bytes of a blob of %d were fetched", sent, len(blob.Data))
			}
		}
	}
	if n := up.Count("GET", "/manifests/"); n != 3 {
		t.Errorf("%d manifests were fetched, want each of 3 once", n)
	}
	if n := len(up.Requests(func(r regtest.Request) bool { return r.Server == "token" })); n != 1 {
		t.Errorf("%d tokens were asked for one repository", n)
	}

	// One info line for each fill.
	filled := m.logs.with("filled")
	if len(filled) != 5 {
		t.Errorf("%d lines about fills, want 5", len(filled))
	}
	for _, line := range filled {
		for _, field := range []string{"reference", "endpoint", "bytes", "seconds", "mb_per_s"} {
			if line[field] == nil || line[field] == "" {
				t.Errorf("a fill's line lacks %s: %v", field, line)
			}
		}
	}

	up.Down()
	m.pull("library/web", "latest", image)
	m.pull("web", image.Digest.String(), image)
}

// TestRestartOffline finds everything again from the store alone.
func TestRestartOffline(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewIndex(regtest.NewImage("a", regtest.Random("a", 200_000)))
	up.Push("library/web", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	m.pull("library/web", "latest", image)
	m.stop()
	up.Down()
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	layer := image.Children[0].Blobs[1]
	// A blob before any manifest: its link proves that it belongs here.
	m.want(200, "GET", "/v2/library/web/blobs/"+layer.Digest.String())
	m.want(200, "HEAD", "/v2/library/web/blobs/"+layer.Digest.String())
	m.pull("library/web", "latest", image)
	m.pull("library/web", image.Digest.String(), image)
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/other/manifests/latest", "docker.io/library/other:latest", up.URL)
}

// TestTreeIsRegistry2s checks the very files.
func TestTreeIsRegistry2s(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("a", regtest.Random("a", 5000))
	up.Push("library/web", image, "v1")
	m := start(t, upstreamFor("docker.io", up, `repository_prefix ""`), "")
	m.pull("library/web", "v1", image)
	root := filepath.Join(m.dir, "docker/registry/v2")
	hex := func(c regtest.Content) string { return c.Digest.Encoded() }
	want := map[string]string{
		"repositories/library/web/_manifests/tags/v1/current/link":                                 image.Digest.String(),
		"repositories/library/web/_manifests/tags/v1/index/sha256/" + hex(image.Content) + "/link": image.Digest.String(),
		"repositories/library/web/_manifests/revisions/sha256/" + hex(image.Content) + "/link":     image.Digest.String(),
		"blobs/sha256/" + hex(image.Content)[:2] + "/" + hex(image.Content) + "/data":              string(image.Data),
	}
	for _, blob := range image.Blobs {
		want["repositories/library/web/_layers/sha256/"+hex(blob)+"/link"] = blob.Digest.String()
		want["blobs/sha256/"+hex(blob)[:2]+"/"+hex(blob)+"/data"] = string(blob.Data)
	}
	eventually(t, "links after the last byte", func() bool {
		for path := range want {
			if _, err := os.Stat(filepath.Join(root, path)); err != nil {
				return false
			}
		}
		return true
	})
	found := 0
	err := filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		found++
		name, _ := filepath.Rel(root, path)
		data, err := os.ReadFile(path)
		if expected, ok := want[name]; !ok || string(data) != expected {
			t.Errorf("%s: not expected, or not with this content", name)
		}
		return err
	})
	if err != nil || found != len(want) {
		t.Errorf("%d files, want %d: %v", found, len(want), err)
	}
	var record struct{ Class, Upstream, Prefix string }
	data, err := os.ReadFile(filepath.Join(m.dir, "mirror/records/repositories/library/web/_record.json"))
	if err != nil || json.Unmarshal(data, &record) != nil || record.Class != "mirrored" || record.Upstream != "docker.io" || record.Prefix != "" {
		t.Errorf("record %s: %v", data, err)
	}
}

func TestHerd(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewIndex(regtest.NewImage("herd", regtest.Random("big", 5<<20), regtest.Random("small", 10_000)))
	up.Push("library/herd", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if err := m.tryPull("library/herd", "latest", image); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, blob := range image.Children[0].Blobs {
		if sent := up.Sent(blob.Digest); sent != int64(len(blob.Data)) {
			t.Errorf("%d bytes of a blob of %d were fetched", sent, len(blob.Data))
		}
	}
	if n := up.Count("GET", "/manifests/"); n != 2 {
		t.Errorf("%d manifest requests for 2 manifests", n)
	}
}

// TestEveryRequesterLeaves: whoever asked first, and everyone after him, hangs
// up, and the fill goes on to its end.
func TestEveryRequesterLeaves(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("left", regtest.Random("left", 4<<20))
	up.Push("library/left", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	layer := image.Blobs[1]
	hold := make(chan struct{})
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: 3 << 20})
	path := "/v2/library/left/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/left/manifests/latest")
	for range 5 {
		resp := m.open("GET", path)
		if _, err := io.ReadFull(resp.Body, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	close(hold)
	eventually(t, "the fill to end with nobody reading", func() bool { return len(m.logs.with("filled")) == 1 })
	up.Forget()
	a := m.want(200, "GET", path)
	if !bytes.Equal(a.body, layer.Data) {
		t.Error("wrong bytes")
	}
	if sent := up.Sent(layer.Digest); sent != 0 {
		t.Errorf("%d bytes were fetched again", sent)
	}
}

// TestLateReader attaches to a fill that is half done, at several offsets.
func TestLateReader(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("late", regtest.Random("late", 4<<20))
	up.Push("library/late", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	layer := image.Blobs[1]
	size := int64(len(layer.Data))
	hold := make(chan struct{})
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: size / 2})
	path := "/v2/library/late/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/late/manifests/latest")
	first := m.open("GET", path)
	defer first.Body.Close()
	begin := make([]byte, size/4)
	if _, err := io.ReadFull(first.Body, begin); err != nil {
		t.Fatal(err)
	}
	// What is there is given at once, though the upstream stands still.
	a := m.want(206, "GET", path, "Range", "bytes=1000000-1000999")
	if !bytes.Equal(a.body, layer.Data[1_000_000:1_001_000]) {
		t.Error("wrong bytes of a range behind the writer")
	}
	// What is not there is waited for.
	type result struct {
		name string
		got  *answer
		want []byte
	}
	results := make(chan result)
	for name, c := range map[string]struct {
		header string
		want   []byte
	}{
		"across the writer": {fmt.Sprintf("bytes=%d-%d", size/2-10, size/2+9), layer.Data[size/2-10 : size/2+10]},
		"ahead":             {fmt.Sprintf("bytes=%d-%d", size-200, size-101), layer.Data[size-200 : size-100]},
		"open":              {fmt.Sprintf("bytes=%d-", size/4), layer.Data[size/4:]},
		"suffix":            {"bytes=-5", layer.Data[size-5:]},
		"whole by range":    {"bytes=0-", layer.Data},
	} {
		go func() { results <- result{name, m.do("GET", path, "Range", c.header), c.want} }()
	}
	close(hold)
	for range 5 {
		r := <-results
		if r.got.StatusCode != 206 || r.got.err != nil || !bytes.Equal(r.got.body, r.want) {
			t.Errorf("%s: status %d, %d bytes of %d, %v", r.name, r.got.StatusCode, len(r.got.body), len(r.want), r.got.err)
		}
	}
	rest, err := io.ReadAll(first.Body)
	if err != nil || !bytes.Equal(append(begin, rest...), layer.Data) {
		t.Errorf("the first reader got %d bytes, %v", len(begin)+len(rest), err)
	}
	if sent := up.Sent(layer.Digest); sent != size {
		t.Errorf("%d bytes of %d were fetched", sent, size)
	}
}

func TestRanges(t *testing.T) {
	for _, size := range []int{300_000, 3_000_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { testRanges(t, size) })
	}
}

func testRanges(t *testing.T, size int) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("ranges", size)
	image := regtest.NewImage("ranges", layer)
	up.Push("library/ranges", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	path := "/v2/library/ranges/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/ranges/manifests/latest")
	for _, temperature := range []string{"cold", "warm"} {
		for _, c := range []struct {
			header   string
			from, to int
		}{
			{"bytes=0-1", 0, 2},
			{"bytes=500-1499", 500, 1500},
			{fmt.Sprintf("bytes=%d-", size-1000), size - 1000, size},
			{"bytes=0-", 0, size},
			{"bytes=-500", size - 500, size},
			{"bytes=-9000000", 0, size},
			{fmt.Sprintf("bytes=%d-%d", size-1, size), size - 1, size}, // regctl's end
			{"bytes=100-9999999", 100, size},
		} {
			a := m.want(206, "GET", path, "Range", c.header)
			if got, want := a.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", c.from, c.to-1, size); got != want {
				t.Errorf("%s %s: Content-Range %q, want %q", temperature, c.header, got, want)
			}
			if !bytes.Equal(a.body, layer.Data[c.from:c.to]) {
				t.Errorf("%s %s: wrong bytes", temperature, c.header)
			}
			if a.Header.Get("Accept-Ranges") != "bytes" {
				t.Errorf("%s %s: no Accept-Ranges", temperature, c.header)
			}
		}
		for _, header := range []string{"bytes=500-0", fmt.Sprintf("bytes=%d-", size), fmt.Sprintf("bytes=%d-%d", size, size+100_000), "bytes=x-", "bytes=-0"} {
			a := m.want(416, "GET", path, "Range", header)
			if got, want := a.Header.Get("Content-Range"), fmt.Sprintf("bytes */%d", size); got != want {
				t.Errorf("%s: Content-Range %q", header, got)
			}
		}
		m.want(200, "GET", path, "Range", "lines=1-2")
		m.want(200, "GET", path, "Range", "bytes=0-1", "If-Range", `"sha256:other"`)
		m.want(206, "GET", path, "Range", "bytes=0-1", "If-Range", `"`+layer.Digest.String()+`"`)
		m.want(304, "GET", path, "If-None-Match", `"x", W/"`+layer.Digest.String()+`"`)
		m.want(400, "GET", path, "Range", "bytes=0-0"+strings.Repeat(",0-0", 1024))

		a := m.want(206, "GET", path, "Range", "bytes=0-9,100000-100099,-7")
		checkParts(t, a, layer.Data, [2]int{0, 10}, [2]int{100_000, 100_100}, [2]int{size - 7, size})
	}
	if sent := up.Sent(layer.Digest); sent != int64(size) {
		t.Errorf("%d bytes of %d were fetched", sent, size)
	}
}

// checkParts checks an answer to a request for several ranges of some data.
func checkParts(t *testing.T, a *answer, data []byte, spans ...[2]int) {
	t.Helper()
	kind, params, err := mime.ParseMediaType(a.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/byteranges" {
		t.Fatalf("multi-range: %q, %v", a.Header.Get("Content-Type"), err)
	}
	parts := multipart.NewReader(bytes.NewReader(a.body), params["boundary"])
	for _, span := range spans {
		part, err := parts.NextPart()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(part)
		if err != nil || !bytes.Equal(got, data[span[0]:span[1]]) {
			t.Errorf("a part of %d bytes, want %d, %v", len(got), span[1]-span[0], err)
		}
		if got, want := part.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", span[0], span[1]-1, len(data)); got != want {
			t.Errorf("a part's Content-Range is %q, want %q", got, want)
		}
	}
	if _, err := parts.NextPart(); err != io.EOF {
		t.Errorf("after the last part: %v", err)
	}
}

// TestCorrupt: wrong bytes never arrive complete and are never kept.
func TestCorrupt(t *testing.T) {
	for _, size := range []int{1000, 64 << 10, 1 << 20, 3 << 20} {
		up := regtest.New(t, regtest.Options{})
		layer := regtest.Random("corrupt", size)
		image := regtest.NewImage("corrupt", layer)
		up.Push("library/corrupt", image, "latest")
		m := start(t, upstreamFor("docker.io", up), "")
		path := "/v2/library/corrupt/blobs/" + layer.Digest.String()
		m.want(200, "GET", "/v2/library/corrupt/manifests/latest")
		for _, header := range []string{"", "bytes=0-", "bytes=10-", fmt.Sprintf("bytes=0-%d", size-1)} {
			up.Fail(regtest.Fault{Path: layer.Digest.String(), Corrupt: 0.3}) // always: Go's client asks again when it got nothing
			resp, err := m.send("GET", path, "Range", header)
			if err == nil { // else broken before the first byte
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode < 300 && err == nil {
					t.Errorf("%d bytes, range %q: wrong bytes arrived complete", size, header)
				}
			}
			up.Heal()
		}
		if kept := kept(m.dir, layer.Digest); len(kept) > 0 {
			t.Errorf("kept: %q", kept)
		}
		eventually(t, "nothing to be left in the spool", func() bool { return len(spooled(m.dir)) == 0 })
		m.pull("library/corrupt", "latest", image)
		m.stop()
	}
}

// TestCuts: the upstream breaks off several times, and neither the client nor
// the bytes fetched show it.
func TestCuts(t *testing.T) {
	for _, kind := range []string{"ranges", "no ranges"} {
		t.Run(kind, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{IgnoreRange: kind == "no ranges"})
			layer := regtest.Random("cut", 2<<20)
			up.Push("library/cut", regtest.NewImage("cut", layer), "latest")
			m := start(t, upstreamFor("docker.io", up), "")
			m.want(200, "GET", "/v2/library/cut/manifests/latest")
			up.Fail(regtest.Fault{Path: layer.Digest.String(), Cut: 0.5, Count: 2})
			a := m.want(200, "GET", "/v2/library/cut/blobs/"+layer.Digest.String())
			if !bytes.Equal(a.body, layer.Data) {
				t.Error("wrong bytes")
			}
			sent, size := up.Sent(layer.Digest), int64(len(layer.Data))
			if kind == "ranges" && sent != size || kind != "ranges" && sent != 2*size {
				t.Errorf("%d bytes of %d were fetched", sent, size)
			}
		})
	}
}

// TestPassingFaults: what fails once upstream is not the client's problem.
func TestPassingFaults(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	for i, fault := range []regtest.Fault{
		{Path: "/blobs/", Status: 500, Count: 1},
		{Path: "/blobs/", Status: 503, Count: 1},
		{Path: "/blobs/", Status: 429, Header: http.Header{"Retry-After": {"0"}}, Count: 1},
		{Path: "/blobs/", Status: 403, Count: 1}, // a presigned address that has ended
		{Path: "/manifests/", Status: 500, Count: 1},
		{Path: "/manifests/", Status: 503, Count: 2},
		{Path: "/manifests/", Status: 429, Header: http.Header{"Retry-After": {"0"}}, Count: 1},
		{Path: "/token", Status: 503, Count: 1},
	} {
		t.Run(fmt.Sprint(i, fault.Path, fault.Status), func(t *testing.T) {
			image := regtest.NewImage(fmt.Sprint(i), regtest.Random(fmt.Sprint(i), 100_000), regtest.Random(fmt.Sprint("large", i), 2<<20))
			up.Push("library/fault", image, fmt.Sprint(i))
			m := start(t, upstreamFor("docker.io", up), "")
			up.Fail(fault)
			m.pull("library/fault", fmt.Sprint(i), image)
			up.Heal()
		})
	}
}

func TestHeadFetchesNothing(t *testing.T) {
	for _, redirect := range []bool{true, false} {
		up := regtest.New(t, regtest.Options{NoRedirect: !redirect})
		layer := regtest.Random("head", 500_000)
		image := regtest.NewImage("head", layer)
		up.Push("library/head", image, "latest")
		m := start(t, upstreamFor("docker.io", up), "")
		for range 2 {
			a := m.want(200, "HEAD", "/v2/library/head/manifests/latest")
			if a.Header.Get("Docker-Content-Digest") != image.Digest.String() || a.Header.Get("Content-Type") != image.MediaType || a.ContentLength != int64(len(image.Data)) || len(a.body) > 0 {
				t.Errorf("HEAD of a manifest: %v", a.Header)
			}
			a = m.want(200, "HEAD", "/v2/library/head/manifests/"+image.Digest.String())
			if a.ContentLength != int64(len(image.Data)) {
				t.Errorf("HEAD by digest: %v", a.Header)
			}
			a = m.want(200, "HEAD", "/v2/library/head/blobs/"+layer.Digest.String())
			if a.ContentLength != 500_000 || a.Header.Get("Docker-Content-Digest") != layer.Digest.String() {
				t.Errorf("HEAD of a blob: %v", a.Header)
			}
		}
		if n := up.Count("GET", "/manifests/"); n > 0 {
			t.Errorf("%d manifests were fetched", n)
		}
		if sent := up.Sent(layer.Digest); sent > 1 {
			t.Errorf("%d bytes of the blob were fetched", sent)
		}
		// From here on the manifest that names the blob is enough.
		m.want(200, "GET", "/v2/library/head/manifests/latest")
		up.Forget()
		m.want(200, "HEAD", "/v2/library/head/blobs/"+image.Blobs[0].Digest.String())
		if n := len(up.Requests(func(regtest.Request) bool { return true })); n != 0 {
			t.Errorf("%d requests for a HEAD that the manifest answers", n)
		}
		m.stop()
	}
}

// TestTypes: whatever upstreams have passes byte for byte.
func TestTypes(t *testing.T) {
	zstd := regtest.Blob("application/vnd.oci.image.layer.v1.tar+zstd", []byte("not really zstd"))
	config := regtest.JSON(v1.MediaTypeImageConfig, map[string]string{"a": "b"})
	describe := func(c regtest.Content) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, c.MediaType, c.Digest, len(c.Data))
	}
	wide := sha512.Sum512([]byte("wide"))
	wideBlob := regtest.Content{MediaType: v1.MediaTypeImageLayer, Digest: digest.Digest("sha512:" + hex.EncodeToString(wide[:])), Data: []byte("wide")}
	body := func(mediaType, text string) regtest.Content { return regtest.Blob(mediaType, []byte(text)) }
	docker := body(oci.MediaTypeDockerManifest, `{ "schemaVersion": 2,   "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": `+describe(config)+`, "layers": [ `+describe(zstd)+" ] }\n")
	wideManifest := body(v1.MediaTypeImageManifest, `{"schemaVersion":2,"config":`+describe(config)+`,"layers":[`+describe(wideBlob)+`],"x":"unknown fields stay"}`)
	sum := sha512.Sum512(wideManifest.Data)
	wideManifest.Digest = digest.Digest("sha512:" + hex.EncodeToString(sum[:]))
	cases := map[string]regtest.Image{
		"docker":   {Content: docker, Blobs: []regtest.Content{config, zstd}},
		"list":     {Content: body(oci.MediaTypeDockerList, `{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json","manifests":[`+describe(docker)+`]}`)},
		"no-type":  {Content: body(v1.MediaTypeImageManifest, `{"schemaVersion":2,"config":`+describe(config)+`,"layers":[]}`), Blobs: []regtest.Content{config}},
		"index":    {Content: body(v1.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[]}`)},
		"schema1":  {Content: body(oci.MediaTypeDockerSchema1Signed, `{"schemaVersion":1,"name":"library/types","tag":"schema1","fsLayers":[{"blobSum":"`+zstd.Digest.String()+`"}],"history":[],"signatures":[{"protected":"x"}]}`), Blobs: []regtest.Content{zstd}},
		"artifact": {Content: body(oci.MediaTypeOCIArtifact, `{"mediaType":"application/vnd.oci.artifact.manifest.v1+json","artifactType":"x/y","blobs":[`+describe(zstd)+`]}`), Blobs: []regtest.Content{zstd}},
		"sha512":   {Content: wideManifest, Blobs: []regtest.Content{config, wideBlob}},
		"empty":    {Content: body(v1.MediaTypeImageManifest, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":`+describe(body("application/vnd.oci.empty.v1+json", ""))+`,"layers":[]}`), Blobs: []regtest.Content{body("application/vnd.oci.empty.v1+json", "")}},
	}
	up := regtest.New(t, regtest.Options{})
	m := start(t, upstreamFor("docker.io", up), "")
	for tag, image := range cases {
		up.Push("library/types", image, tag)
	}
	for range 2 {
		for tag, image := range cases {
			m.pull("library/types", tag, image)
			m.pull("library/types", image.Digest.String(), image)
		}
		up.Down()
	}
}

func TestConditionalManifest(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("c")
	up.Push("library/c", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	for _, reference := range []string{"latest", image.Digest.String()} {
		a := m.want(304, "GET", "/v2/library/c/manifests/"+reference, "If-None-Match", `"`+image.Digest.String()+`"`)
		if len(a.body) > 0 {
			t.Error("a 304 with a body")
		}
		m.want(200, "GET", "/v2/library/c/manifests/"+reference, "If-None-Match", `"sha256:other"`)
		// A Range on a manifest is ignored.
		m.want(200, "GET", "/v2/library/c/manifests/"+reference, "Range", "bytes=0-1")
	}
}

// TestMembership: bytes that are held for one repository are not another's.
func TestMembership(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	secret := regtest.NewImage("secret", regtest.Random("secret", 10_000))
	shared := regtest.NewImage("shared", regtest.Random("secret", 10_000))
	up.Push("library/a", secret, "latest")
	up.Push("library/b", regtest.NewImage("b"), "latest")
	up.Push("library/c", shared, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	m.pull("library/a", "latest", secret)
	m.pull("library/b", "latest", regtest.NewImage("b"))
	layer := secret.Blobs[1].Digest.String()
	for _, method := range []string{"GET", "HEAD"} {
		m.wantError(404, oci.CodeBlobUnknown, method, "/v2/library/b/blobs/"+layer)
		m.wantError(404, oci.CodeManifestUnknown, method, "/v2/library/b/manifests/"+secret.Digest.String())
		m.wantError(404, oci.CodeManifestUnknown, method, "/v2/library/a/manifests/"+layer) // a layer is no manifest
	}
	// Where it does belong, it is not fetched again.
	m.pull("library/c", "latest", shared)
	if sent := up.Sent(secret.Blobs[1].Digest); sent != 10_000 {
		t.Errorf("%d bytes of a shared layer of 10000 were fetched", sent)
	}
}

func TestBlobBeforeManifest(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("first", 100_000)
	up.Push("library/first", regtest.NewImage("first", layer), "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	a := m.want(200, "GET", "/v2/library/first/blobs/"+layer.Digest.String())
	if !bytes.Equal(a.body, layer.Data) {
		t.Error("wrong bytes")
	}
}
