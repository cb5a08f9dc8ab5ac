package module_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

// A bucketed mirror keeps what it has in a bucket.
type bucketed struct {
	*mirror
	*s3double.Server
	app, site string
}

// startS3 runs Caddy on an empty bucket.
func startS3(t *testing.T, app, site string) *bucketed {
	t.Helper()
	s := s3double.New(t, s3double.Options{})
	b := &bucketed{Server: s, site: site}
	dir := t.TempDir()
	b.app = fmt.Sprintf("storage s3 %s {\n endpoint %s\n credentials %s %s\n cache %s 1GiB\n}\n%s", s3double.Bucket, s.URL, s3double.Key, s3double.Secret, dir, app)
	b.mirror = &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: dir, logs: captureLogs(t)}
	if err := b.load(b.app, site); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.stop)
	return b
}

// uploaded waits until blobs are in the bucket, and what speaks of them: the cache has
// no file any more of what is small and has been uploaded.
func (b *bucketed) uploaded(blobs ...regtest.Content) {
	b.t.Helper()
	b.Await(b.t, "uploads", func([]s3double.Call) bool {
		for _, blob := range blobs {
			if _, ok := b.Read(layout.Blob(blob.Digest)); !ok {
				return false
			}
		}
		return true
	})
	eventually(b.t, "links and records to be uploaded", func() bool {
		files := 0
		for _, dir := range []string{"/docker/registry/v2/repositories", "/mirror/records"} {
			filepath.WalkDir(b.dir+dir, func(_ string, entry fs.DirEntry, err error) error {
				if err == nil && entry.Type().IsRegular() {
					files++
				}
				return nil
			})
		}
		return files == 0
	})
}

// cold starts the mirror again, without its disk.
func (b *bucketed) cold() {
	b.t.Helper()
	if err := caddy.Stop(); err != nil {
		b.t.Fatal(err)
	}
	client.CloseIdleConnections()
	unlocked(b.t, b.dir)
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, entry := range entries {
		if err := os.RemoveAll(b.dir + "/" + entry.Name()); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := b.load(b.app, b.site); err != nil {
		b.t.Fatal(err)
	}
}

// gets are the reads of a blob.
func (b *bucketed) gets(d digest.Digest) (calls []s3double.Call) {
	for _, call := range b.Calls() {
		if call.Op == s3double.GetObject && call.Key == layout.Blob(d) {
			calls = append(calls, call)
		}
	}
	return calls
}

func (b *bucketed) blob(repository string, blob regtest.Content) {
	b.t.Helper()
	a := b.want(http.StatusOK, http.MethodGet, "/v2/"+repository+"/blobs/"+blob.Digest.String())
	if !bytes.Equal(a.body, blob.Data) {
		b.t.Errorf("%s: %d bytes that are not the %d expected", blob.Digest, len(a.body), len(blob.Data))
	}
}

const mib = 1 << 20

// newBucketed is one that has pulled an image, which is in the bucket.
func newBucketed(t *testing.T, site string, layers ...regtest.Content) (*bucketed, *regtest.Registry, regtest.Image) {
	t.Helper()
	registry := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("app", layers...)
	registry.Push("org/app", image, "v1")
	b := startS3(t, upstreamFor("registry.test", registry), site)
	b.pull("registry.test/org/app", "v1", image)
	b.uploaded(append(image.Blobs, image.Content)...)
	return b, registry, image
}

// TestS3Cold: what is in the bucket is read from it by one request each, and then it
// is near; the upstream is not asked.
func TestS3Cold(t *testing.T) {
	large, small, lazy := regtest.Random("large", 20*mib+5), regtest.Random("small", 100_000), regtest.Random("lazy", 20*mib)
	b, registry, image := newBucketed(t, "default off", large, small, lazy)
	b.cold()
	registry.Down()
	b.Server.Forget()
	path := func(blob regtest.Content) string { return "/v2/registry.test/org/app/blobs/" + blob.Digest.String() }
	if a := b.want(http.StatusOK, http.MethodHead, path(large)); a.ContentLength != int64(len(large.Data)) {
		t.Errorf("HEAD says %d bytes", a.ContentLength)
	}
	a := b.want(http.StatusPartialContent, http.MethodGet, path(lazy), "Range", fmt.Sprintf("bytes=%d-%d", 10*mib, 10*mib+999))
	if !bytes.Equal(a.body, lazy.Data[10*mib:][:1000]) {
		t.Error("a part is wrong")
	}
	a = b.want(http.StatusPartialContent, http.MethodGet, path(lazy), "Range", "bytes=-70000")
	if !bytes.Equal(a.body, lazy.Data[len(lazy.Data)-70_000:]) {
		t.Error("the end is wrong")
	}
	for _, call := range b.gets(lazy.Digest) {
		if call.Range == "" || call.Sent > mib {
			t.Errorf("a part asks for %q, and gets %d bytes", call.Range, call.Sent)
		}
	}
	for range 2 {
		for _, blob := range []regtest.Content{large, small, image.Blobs[0]} {
			b.blob("registry.test/org/app", blob)
			if calls := b.gets(blob.Digest); len(calls) != 1 {
				t.Errorf("%d bytes: read %d times", len(blob.Data), len(calls))
			}
		}
	}
	b.blob("registry.test/org/app", lazy)
}

// TestS3Herd: many who want what is not near cost one request.
func TestS3Herd(t *testing.T) {
	large := regtest.Random("herd", 20*mib+7)
	b, registry, _ := newBucketed(t, "default off", large)
	b.cold()
	registry.Down()
	b.Server.Forget()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			a := b.do(http.MethodGet, "/v2/registry.test/org/app/blobs/"+large.Digest.String())
			if a.StatusCode != http.StatusOK || !bytes.Equal(a.body, large.Data) {
				t.Errorf("status %d, %d bytes, %v", a.StatusCode, len(a.body), a.err)
			}
		})
	}
	wg.Wait()
	if calls := b.gets(large.Digest); len(calls) != 1 {
		t.Errorf("read %d times: %+v", len(calls), calls)
	}
}

// TestS3Cut: where the bucket breaks off, the upstream goes on.
func TestS3Cut(t *testing.T) {
	large := regtest.Random("cut", 20*mib)
	b, registry, _ := newBucketed(t, "default off", large)
	b.cold()
	before := registry.Sent(large.Digest)
	b.Strike(s3double.Fault{Op: s3double.GetObject, Key: large.Digest.Encoded() + "/data", Cut: true, At: 5 * mib, Count: 1})
	b.Strike(s3double.Fault{Op: s3double.GetObject, Key: large.Digest.Encoded() + "/data", Status: 503, Code: "SlowDown"})
	b.blob("registry.test/org/app", large)
	if sent := registry.Sent(large.Digest) - before; sent == 0 || sent > 15*mib {
		t.Errorf("the upstream has sent %d bytes", sent)
	}
}

// TestS3Wrong: what is wrong in the bucket is not served whole, and the upstream's
// bytes take its place.
func TestS3Wrong(t *testing.T) {
	large, small := regtest.Random("bad", 3*mib), regtest.Random("worse", 100_000)
	b, _, _ := newBucketed(t, "default off", large, small)
	b.cold()
	for _, blob := range []regtest.Content{large, small} {
		key := layout.Blob(blob.Digest)
		b.Spoil(key)
		eventually(t, "the right bytes", func() bool {
			a := b.do(http.MethodGet, "/v2/registry.test/org/app/blobs/"+blob.Digest.String())
			if a.err == nil && a.StatusCode == http.StatusOK && !bytes.Equal(a.body, blob.Data) {
				t.Fatalf("%d wrong bytes are served as if they were right", len(a.body))
			}
			return a.err == nil && bytes.Equal(a.body, blob.Data)
		})
		b.Await(t, "the bucket to be put right", func([]s3double.Call) bool {
			data, _ := b.Read(key)
			return bytes.Equal(data, blob.Data)
		})
	}
}

// TestS3Down: while the bucket cannot be reached, what is near is served, what is
// mirrored comes from the upstream, and what only the bucket has is a 503, as is a
// push. When it is back everything is as it was.
func TestS3Down(t *testing.T) {
	registry := regtest.New(t, regtest.Options{})
	near, far := regtest.NewImage("near", regtest.Random("near", 2*mib)), regtest.NewImage("far", regtest.Random("far", 2*mib))
	fresh := regtest.NewImage("fresh", regtest.Random("fresh", 2*mib))
	registry.Push("org/near", near, "v1")
	registry.Push("org/far", far, "v1")
	registry.Push("org/fresh", fresh, "v1")
	b := startS3(t, upstreamFor("registry.test", registry), hostedSite)
	p := pusher{b.mirror, "apps/web"}
	hosted := regtest.NewImage("hosted", regtest.Random("hosted", 2*mib))
	p.image(hosted, "v1")
	b.pull("registry.test/org/far", "v1", far)
	b.uploaded(append(far.Blobs, hosted.Blobs...)...)
	b.uploaded(far.Content)
	b.cold()
	b.pull("registry.test/org/near", "v1", near)
	b.uploaded(near.Blobs...)
	b.Server.Down()
	b.pull("registry.test/org/near", "v1", near)
	b.pull("registry.test/org/far", "v1", far) // which finds out that nobody answers
	b.pull("registry.test/org/fresh", "v1", fresh)
	b.wantError(http.StatusServiceUnavailable, "UNAVAILABLE", http.MethodGet, "/v2/apps/web/blobs/"+hosted.Blobs[1].Digest.String(), "cannot be reached")
	other := regtest.Random("other", 100_000)
	if a, err := b.try(http.MethodPost, p.path("blobs", "uploads")+"/?digest="+other.Digest.String(), other.Data); err != nil || a.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a push: %+v, %v", a, err)
	}
	if disk, far := len(b.logs.with("disk trouble")), len(b.logs.with("the store cannot be reached")); disk > 0 || far == 0 {
		t.Errorf("%d lines blame the disk, and %d the bucket", disk, far)
	}
	b.Server.Up(t)
	eventually(t, "the bucket to be back", func() bool {
		a, err := b.try(http.MethodPost, p.path("blobs", "uploads")+"/?digest="+other.Digest.String(), other.Data)
		return err == nil && a.StatusCode == http.StatusCreated
	})
	b.pull("apps/web", "v1", hosted)
	b.uploaded(append(fresh.Blobs, fresh.Content)...)
	b.cold()
	registry.Down()
	b.pull("registry.test/org/fresh", "v1", fresh)
}
