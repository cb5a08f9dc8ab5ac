package module_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
)

// TestRegressions is what other mirrors have lost users by, one subtest each. The
// rest of that list has tests elsewhere:
//
//   - shared layer expiring in one repository while live in another:
//     retain.TestSharedLayer, retain.TestPeers21SharedLayerStays
//   - index pulled before children, and what is kept of it:
//     retain.TestIndexBeforeChildren
//   - digest-only pulls, and eviction: retain.TestDigestOnly
//   - restart in mid-fill: TestStopInMidFill, TestKillInMidFill
//   - TTL changed across restart: retain.TestTTLAcrossRestart
//   - leader of a fill that is too small to be seen: fill.TestEveryWaiterHears
//   - client leaves at 90 %: TestAbort
//   - upstream deletes a tag: TestTagFreshness, TestOnMissing, mirror.TestFreshness
//   - catalog wiped: TestCatalogLost, retain.TestCatalogWiped
//   - poisoned realm: TestRealm, upstream.TestGuardRealm
//   - cross-host redirect with Authorization: TestCredentials,
//     upstream.TestRedirectDropsCredentials
func TestRegressions(t *testing.T) {
	t.Run("index pulled before children", indexBeforeChildren)
	t.Run("digest-only pulls followed by GC", digestOnlyGC)
	t.Run("leader fails with 50 followers", leaderFails)
	t.Run("upstream 429", func(t *testing.T) {
		t.Run("on HEAD", func(t *testing.T) {
			limited(t, regtest.Options{}, regtest.Fault{Method: "HEAD", Path: "/manifests/"})
		})
		t.Run("on token", func(t *testing.T) { limited(t, regtest.Options{}, regtest.Fault{Path: "/token"}) })
		t.Run("on blob", func(t *testing.T) { limited(t, regtest.Options{NoRedirect: true}, regtest.Fault{Path: "/blobs/"}) })
		t.Run("on blob, by the CDN", func(t *testing.T) { limited(t, regtest.Options{}, regtest.Fault{Path: "/blobs/"}) })
	})
	t.Run("101 GiB layer", func(t *testing.T) {
		t.Run("kept", hugeLayer)
		t.Run("no room", hugeLayerPassed)
	})
	t.Run("disk full at 99 %", fullAt99)
}

// indexBeforeChildren: an index is stored and served though none of its children
// is there, and they come one by one.
func indexBeforeChildren(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	here, elsewhere := regtest.NewImage("amd64", regtest.Random("a", 5000)), regtest.NewImage("arm64", regtest.Random("b", 5000))
	index := regtest.NewIndex(here, elsewhere)
	up.Push("library/x", index, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 1h"), "")
	restart := func() {
		t.Helper()
		m.stop()
		if err := m.load(upstreamFor("docker.io", up, "tag_ttl 1h"), ""); err != nil {
			t.Fatal(err)
		}
	}
	alone := index
	alone.Children = nil
	m.pull("library/x", "latest", alone)
	if n := up.Count("GET", "/manifests/"); n != 1 {
		t.Errorf("%d manifests were fetched for one", n)
	}

	up.Down()
	restart()
	for range 2 {
		m.pull("library/x", "latest", alone)
		m.pull("library/x", index.Digest.String(), alone)
	}
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/manifests/"+here.Digest.String())

	up.Up()
	restart()
	m.pull("library/x", here.Digest.String(), here)
	up.Down()
	restart()
	alone.Children = []regtest.Image{here}
	m.pull("library/x", "latest", alone)
	m.wantError(503, oci.CodeUnavailable, "GET", "/v2/library/x/manifests/"+elsewhere.Digest.String())

	up.Up()
	restart()
	m.pull("library/x", "latest", index)
}

// digestOnlyGC: images pulled by digest alone are no garbage, however they are
// named upstream.
func digestOnlyGC(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	tagged, bare := regtest.NewImage("tagged", regtest.Random("t", 5000)), regtest.NewImage("bare", regtest.Random("b", 5000))
	index := regtest.NewIndex(regtest.NewImage("child", regtest.Random("c", 5000)))
	never := regtest.NewImage("never", regtest.Random("n", 5000))
	for _, image := range []regtest.Image{tagged, bare, index, never} {
		up.Push("library/x", image, "latest")
	}
	up.Push("library/x", tagged, "v1")
	options := "gc @yearly 1ns\n" + upstreamFor("docker.io", up)
	m := startAdmin(t, options)
	m.want(200, "HEAD", "/v2/library/x/manifests/v1") // as a kubelet does
	all := []regtest.Image{tagged, bare, index}
	for _, image := range all {
		m.pull("library/x", image.Digest.String(), image)
	}
	garbage := never.Blobs[1]
	m.want(200, "GET", "/v2/library/x/blobs/"+garbage.Digest.String())
	m.complete()
	up.Down()
	for range 2 {
		eventually(t, "what nobody names to be deleted", func() bool { // once it is a second old
			m.job(`{"kind": "gc"}`)
			return len(kept(m.dir, garbage.Digest)) == 0
		})
		for _, image := range all {
			m.pull("library/x", image.Digest.String(), image)
		}
		m.pull("library/x", "v1", tagged)
		m.stop()
		if err := m.load(options, ""); err != nil {
			t.Fatal(err)
		}
	}
	m.job(`{"kind": "gc"}`)
	for _, image := range all {
		m.pull("library/x", image.Digest.String(), image)
	}
}

// leaderFails: what one client began to fetch, and fifty follow, cannot be had.
// Every one of them hears, and nobody takes what there is for the whole.
func leaderFails(t *testing.T) {
	const size = 4 << 20
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", size)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "connections 1"), "")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	hold := make(chan struct{})
	defer close(hold)
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: size / 2})
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	followers := make([]*http.Response, 51)
	for i := range followers {
		followers[i] = m.open("GET", path)
		defer followers[i].Body.Close()
		if begin, err := io.ReadAll(io.LimitReader(followers[i].Body, 1000)); err != nil || !bytes.Equal(begin, layer.Data[:1000]) {
			t.Fatalf("follower %d: %d bytes, or wrong ones: %v", i, len(begin), err)
		}
	}

	up.Down() // breaks off what is held
	up.Heal()
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Status: 404})
	up.Up()
	var all sync.WaitGroup
	for i, resp := range followers {
		all.Go(func() {
			rest, err := io.ReadAll(resp.Body)
			if err == nil || len(rest) >= size-1000 || !bytes.HasPrefix(layer.Data[1000:], rest) {
				t.Errorf("follower %d: %d bytes, or wrong ones, and %v", i, len(rest), err)
			}
		})
	}
	all.Wait()
	if n := len(up.Fetches(layer.Digest)); n > 10 {
		t.Errorf("the upstream was asked %d times", n)
	}
	if files := kept(m.dir, layer.Digest); len(files) > 0 {
		t.Errorf("kept: %q", files)
	}
	m.wantError(404, oci.CodeBlobUnknown, "GET", path)

	up.Heal()
	m.stop() // what is not there is remembered for a while
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
}

// limited: an upstream asks, at one kind of request, to be left alone. What is
// held is served, nothing else is said not to exist, and it is left alone.
func limited(t *testing.T, kind regtest.Options, fault regtest.Fault) {
	fault.Status, fault.Header = 429, http.Header{"Retry-After": {"600"}}
	up := regtest.New(t, kind)
	held, half, none := regtest.NewImage("held", regtest.Random("h", 5000)), regtest.NewImage("half", regtest.Random("2", 2<<20)), regtest.NewImage("none")
	up.Push("library/held", held, "latest")
	up.Push("library/half", half, "latest")
	up.Push("library/none", none, "latest")
	options := upstreamFor("docker.io", up, "tag_ttl 0")
	m := start(t, options, "")
	m.pull("library/held", "latest", held)
	m.want(200, "GET", "/v2/library/half/manifests/latest")
	restart := func() {
		t.Helper()
		m.stop() // and with it the tokens it had
		if err := m.load(options, ""); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	up.Fail(fault)
	method, path := "HEAD", "/v2/library/none/manifests/latest"
	if fault.Path == "/blobs/" {
		method, path = "GET", "/v2/library/half/blobs/"+half.Blobs[1].Digest.String()
	}
	if a := m.wantError(503, oci.CodeUnavailable, method, path); a.Header.Get("Retry-After") != "600" {
		t.Errorf("Retry-After %q", a.Header.Get("Retry-After"))
	}

	up.Forget()
	warned := fault.Path != "/blobs/" || kind.NoRedirect // a CDN is not the registry
	for range 3 {
		if a := m.want(200, "HEAD", "/v2/library/held/manifests/latest"); (a.Header.Get("Warning") != "") != warned {
			t.Errorf("warning %q", a.Header.Get("Warning"))
		}
		m.pull("library/held", "latest", held)
		m.pull("library/held", held.Digest.String(), held)
		m.want(200, "HEAD", "/v2/library/half/blobs/"+half.Blobs[1].Digest.String())
		if warned {
			m.wantError(503, oci.CodeUnavailable, method, path)
		}
	}
	if again := up.Requests(func(r regtest.Request) bool { return r.Status == 429 }); len(again) > 0 {
		t.Errorf("it was asked %d times more: %v", len(again), again)
	}

	up.Heal()
	restart()
	m.pull("library/half", "latest", half)
	m.pull("library/none", "latest", none)
}

const hugeSize = 101 << 30

// huge is an upstream of an image whose layer is nowhere: its bytes are made up
// from their offsets. What lies between held and 1 GiB does not come.
type huge struct {
	image      regtest.Image
	layer      digest.Digest
	url        string
	held, made atomic.Int64 // bytes
}

func newHuge(t *testing.T) *huge {
	h := &huge{layer: digest.FromString("a layer of 101 GiB")}
	h.held.Store(12 << 20)
	config := regtest.JSON(v1.MediaTypeImageConfig, map[string]string{"architecture": "amd64", "os": "linux"})
	h.image.Content = regtest.JSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: config.Descriptor(),
		Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayerGzip, Digest: h.layer, Size: hugeSize}},
	})
	h.image.Blobs = []regtest.Content{config}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, h.layer.String()) {
			serveContent(w, r, h.image)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, &hugeReader{huge: h, gone: r.Context().Done()})
	}))
	t.Cleanup(s.Close)
	h.url = s.URL
	return h
}

// invent makes the bytes at an offset up: all 64 bits of it count.
func invent(p []byte, at int64) {
	for i := range p {
		p[i] = byte(uint64(at+int64(i)) * 0x9e3779b97f4a7c15 >> 56)
	}
}

type hugeReader struct {
	*huge
	at   int64
	gone <-chan struct{}
}

func (r *hugeReader) Seek(offset int64, whence int) (int64, error) {
	r.at = offset
	if whence == io.SeekEnd {
		r.at += hugeSize
	}
	return r.at, nil
}

func (r *hugeReader) Read(p []byte) (int, error) {
	switch held := r.held.Load(); {
	case r.at >= hugeSize:
		return 0, io.EOF
	case r.at < held:
		p = p[:min(int64(len(p)), held-r.at)]
	case r.at < 1<<30:
		<-r.gone
		return 0, context.Canceled
	default:
		p = p[:min(int64(len(p)), hugeSize-r.at)]
	}
	invent(p, r.at)
	r.at += int64(len(p))
	r.made.Add(int64(len(p)))
	return len(p), nil
}

// begin reads the first n bytes of the layer, and hangs up.
func (h *huge) begin(m *mirror, n int) {
	m.t.Helper()
	resp := m.open("GET", h.path())
	defer resp.Body.Close()
	if resp.StatusCode != 200 || resp.ContentLength != hugeSize {
		m.t.Errorf("status %d, %d bytes", resp.StatusCode, resp.ContentLength)
	}
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := 0; at < n; at += len(got) {
		if _, err := io.ReadFull(resp.Body, got); err != nil {
			m.t.Fatalf("after %d bytes: %v", at, err)
		}
		if invent(want, int64(at)); !bytes.Equal(got, want) {
			m.t.Fatalf("wrong bytes from %d", at)
		}
	}
}

func (h *huge) path() string { return "/v2/library/huge/blobs/" + h.layer.String() }

// part gets n bytes from an offset.
func (h *huge) part(m *mirror, at, n int64, header string) {
	m.t.Helper()
	a := m.want(206, "GET", h.path(), "Range", header)
	want := make([]byte, n)
	if invent(want, at); !bytes.Equal(a.body, want) {
		m.t.Errorf("%s: %d bytes, or wrong ones", header, len(a.body))
	}
	if got, want := a.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", at, at+n-1, int64(hugeSize)); got != want {
		m.t.Errorf("%s: Content-Range %s, want %s", header, got, want)
	}
}

// parts gets some bytes at either end, in the middle, and where numbers of 32
// bits end. It returns how many.
func (h *huge) parts(m *mirror) (sum int64) {
	m.t.Helper()
	const n = 300_000
	for _, at := range []int64{0, 2<<30 - n/2, 4<<30 - n/2, hugeSize / 2, 100<<30 - 1, hugeSize - n} {
		h.part(m, at, n, fmt.Sprintf("bytes=%d-%d", at, at+n-1))
		sum += n
	}
	h.part(m, hugeSize-1000, 1000, "bytes=-1000") // is there already
	a := m.want(416, "GET", h.path(), "Range", fmt.Sprintf("bytes=%d-", int64(hugeSize)))
	if got, want := a.Header.Get("Content-Range"), fmt.Sprintf("bytes */%d", int64(hugeSize)); got != want {
		m.t.Errorf("Content-Range %s, want %s", got, want)
	}
	return sum
}

// roomy is a store on a disk that says it has room for everything.
type roomy struct{ disk.Disk }

type roomyStore struct{ storage.Store }

type room struct{}

func init() { caddy.RegisterModule(new(roomy)) }

func (*roomy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "registry.storage.roomy", New: func() caddy.Module { return new(roomy) }}
}

func (r *roomy) Identity() string { return "roomy:" + r.Directory }

func (r *roomy) Open(ctx context.Context) (storage.Store, error) {
	s, err := r.Disk.Open(ctx)
	if err != nil {
		return nil, err
	}
	return roomyStore{s}, nil
}

func (r *roomy) Configure(s storage.Store) error { return r.Disk.Configure(s.(roomyStore).Store) }

func (roomyStore) Reserve(int64) (storage.Reservation, error) { return room{}, nil }

func (room) Use(int64) {}
func (room) Release()  {}

// hugeLayer: of a layer that would not fit the disk, nor the memory, only what is
// asked for is fetched and kept.
func hugeLayer(t *testing.T) {
	h := newHuge(t)
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	load := func() {
		t.Helper()
		if err := m.load(fmt.Sprintf("storage roomy %s\nupstream docker.io {\n origin %s\n allow_private\n}", m.dir, h.url), ""); err != nil {
			t.Fatal(err)
		}
	}
	load()
	t.Cleanup(m.stop)
	if a := m.want(200, "HEAD", "/v2/library/other/blobs/"+h.layer.String()); a.ContentLength != hugeSize {
		t.Errorf("HEAD says %d bytes, with no manifest", a.ContentLength)
	}
	m.pull("library/huge", "latest", h.image)
	if a := m.want(200, "HEAD", h.path()); a.ContentLength != hugeSize {
		t.Errorf("HEAD says %d bytes", a.ContentLength)
	}
	if n := h.made.Load(); n != 0 {
		t.Errorf("%d bytes were fetched for HEAD", n)
	}

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const slack = 2 << 20 // parts are fetched by segments
	asked := h.parts(m)
	if n := h.made.Load(); n < asked || n > asked+slack {
		t.Errorf("%d bytes were fetched for parts of %d", n, asked)
	}
	h.begin(m, 8<<20)
	eventually(t, "the fill to be put away", func() bool { return len(m.logs.with("fill put away")) == 1 })
	if n := h.made.Load(); n < 8<<20+asked || n > h.held.Load()+asked+slack {
		t.Errorf("%d bytes were fetched", n)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
		t.Errorf("%d bytes of memory were allocated for it", n)
	}

	data := filepath.Join(m.dir, "mirror/spool/fills", fmt.Sprintf("sha256-%s-%d", h.layer.Encoded(), int64(hugeSize)))
	sparse := func() {
		t.Helper()
		info, err := os.Stat(data)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() != hugeSize {
			t.Errorf("%d bytes in the spool", info.Size())
		}
		if n := info.Sys().(*syscall.Stat_t).Blocks * 512; n > h.held.Load()+asked+slack {
			t.Errorf("%d bytes of the disk are taken", n)
		}
		ledger, err := os.ReadFile(data + ".ledger")
		if err != nil || !strings.Contains(string(ledger), fmt.Sprintf(`"size":%d,`, int64(hugeSize))) {
			t.Errorf("the ledger begins %.200q, %v", ledger, err)
		}
	}
	sparse()

	// All of this is found again.
	m.stop()
	h.made.Store(0)
	h.held.Store(14 << 20) // it goes on once the upstream does
	load()
	m.want(200, "GET", "/v2/library/huge/manifests/latest")
	h.parts(m)
	h.begin(m, 8<<20)
	m.stop()
	if n := h.made.Load(); n > 2<<20+slack {
		t.Errorf("%d bytes were fetched, with what was there", n)
	}
	sparse()
	load()
}

// hugeLayerPassed: where there is no room for it, it is passed through.
func hugeLayerPassed(t *testing.T) {
	h := newHuge(t)
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	if err := m.load(fmt.Sprintf("storage disk %s {\n min_free 99.99%%\n}\nupstream docker.io {\n origin %s\n allow_private\n}", m.dir, h.url), ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.stop)
	m.pull("library/huge", "latest", h.image)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	h.parts(m)
	h.begin(m, 8<<20)
	eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 128<<20 {
		t.Errorf("%d bytes of memory were allocated for it", n)
	}
}

// fullAt99: the disk takes the last hundredth of a layer no more. Everyone gets
// it, and nothing but that hundredth is fetched again once there is room.
func fullAt99(t *testing.T) {
	// The limit holds for the whole process, and the file in which go test notes what
	// tests read may be larger than that. One that a test has begun has no such file.
	if os.Getenv("TEST_FULL") == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.v")
		cmd.Env = append(os.Environ(), "TEST_FULL=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()+" ") {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	const size, clients = 24 << 20, 8
	const fits = size * 99 / 100
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", size)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "connections 1"), "")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.want(200, "GET", "/v2/library/x/blobs/"+image.Blobs[0].Digest.String())

	room := fileLimit(t, fits)
	m.herd(clients, path, layer)()
	if sent, most := up.Sent(layer.Digest), int64(fits+clients*(size-fits+1<<20)); sent > most {
		t.Errorf("%d bytes of %d were fetched", sent, size)
	}
	if files := kept(m.dir, layer.Digest); len(files) > 0 {
		t.Errorf("kept: %q", files)
	}
	eventually(t, "a line about it", func() bool { return len(m.logs.with("disk trouble")) > 0 })
	if lines := m.logs.with("disk trouble"); len(lines) != 1 {
		t.Errorf("%d lines: %v", len(lines), lines)
	}
	room()

	up.Forget()
	m.herd(1, path, layer)()
	if sent := up.Sent(layer.Digest); sent < size-fits || sent > size-fits+1<<20 {
		t.Errorf("%d bytes were fetched again", sent)
	}
	eventually(t, "it to be kept", func() bool { return len(kept(m.dir, layer.Digest)) == 1 })
	up.Down()
	m.pull("library/x", "latest", image)
	eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
}

// fileLimit lets this process write no file beyond n bytes, until it is undone.
func fileLimit(t *testing.T, n uint64) (undo func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	undo = sync.OnceFunc(func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Error(err)
		}
		signal.Reset(syscall.SIGXFSZ)
	})
	t.Cleanup(undo)
	return undo
}
