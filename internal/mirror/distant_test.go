package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// distantBench is a bench on a store whose distant place is in memory.
func distantBench(t *testing.T) (*bench, *storagetest.Double) {
	t.Helper()
	b := newBench(t, regtest.Options{}, func(u *Upstream) { u.Connections = 2 })
	b.close()
	store := storagetest.NewDouble(disktest.Open(t, b.dir))
	b.store = store
	b.start()
	return b, store
}

// anew forgets what is in memory.
func (b *bench) anew() {
	b.mirror.Close()
	b.tree.Close()
	b.mirror = nil
	b.start()
}

// within are the keys that are near below a prefix.
func (b *bench) within(store *storagetest.Double, prefix string) (keys []string) {
	b.t.Helper()
	for info, err := range store.Store.List(b.t.Context(), prefix, true) {
		if err != nil {
			b.t.Fatal(err)
		}
		keys = append(keys, info.Key)
	}
	return keys
}

// TestStoreCannotSay: a mirrored image is served while nobody can say what the store
// has, and nothing is put where something else may be. When the store is back it is
// stored as ever.
func TestStoreCannotSay(t *testing.T) {
	b, store := distantBench(t)
	store.Blank()
	store.Down(true)
	image := regtest.NewImage("app", regtest.Random("small", 1000), regtest.Random("large", 3<<20))
	b.registry.Push("org/app", image, "v1")
	pull := func() {
		t.Helper()
		b.wantStatus(http.StatusOK, "HEAD", "org/app/manifests/v1")
		b.wantManifest("org/app/manifests/v1", image)
		b.wantManifest("org/app/manifests/"+image.Digest.String(), image)
		for _, blob := range image.Blobs {
			path := "org/app/blobs/" + blob.Digest.String()
			b.wantStatus(http.StatusOK, "HEAD", path)
			if w := b.ask("GET", path); w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), blob.Data) {
				t.Errorf("%s: %d, %d bytes", path, w.Code, w.Body.Len())
			}
		}
		b.wantStatus(http.StatusOK, "GET", "org/app/tags/list")
		b.wantStatus(http.StatusOK, "GET", "org/app/referrers/"+image.Digest.String())
	}
	pull()
	b.mirror.Close()
	b.tree.Close()
	for _, prefix := range []string{layout.Repositories, layout.Records} {
		if keys := b.within(store, prefix); len(keys) > 0 {
			t.Errorf("there is %q", keys)
		}
	}
	store.Down(false)
	b.mirror = nil
	b.start()
	pull()
	b.eventually("everything to be stored", func() bool {
		for _, blob := range image.Blobs {
			if store.Placed(layout.LayerLink("reg.example/org/app", blob.Digest)) == nil {
				return false
			}
		}
		return store.Placed(layout.TagLink("reg.example/org/app", "v1")) != nil
	})
}

// TestStoreSaysLater: a repository of which nobody could say what it is turns out to be
// hosted. What has been fetched for it meanwhile is not put into it.
func TestStoreSaysLater(t *testing.T) {
	b, store := distantBench(t)
	store.Blank()
	record, err := json.Marshal(tree.Record{Schema: 1, Class: tree.Hosted, Created: time.Unix(1, 0)})
	if err != nil {
		t.Fatal(err)
	}
	store.Place(layout.Record("reg.example/org/app"), record)
	store.Down(true)
	layer := regtest.Random("layer", 3<<20)
	image := regtest.NewImage("app", layer)
	b.registry.Push("org/app", image, "v1")
	b.wantManifest("org/app/manifests/v1", image)
	// The bucket comes back while the blob is on its way.
	until := make(chan struct{})
	b.registry.Fail(regtest.Fault{Method: "GET", Path: layer.Digest.String(), Hold: until, At: 1})
	done := make(chan *httptest.ResponseRecorder)
	go func() { done <- b.ask("GET", "org/app/blobs/"+layer.Digest.String()) }()
	b.eventually("the upstream to be asked", func() bool { return b.registry.Sent(layer.Digest) > 1 })
	store.Down(false)
	b.registry.Heal()
	close(until)
	if w := <-done; w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), layer.Data) {
		t.Errorf("%d, %d bytes: %.300q", w.Code, w.Body.Len(), w.Body)
	}
	b.eventually("the blob to be stored", func() bool { return store.Placed(layout.Blob(layer.Digest)) != nil })
	b.wantStatus(http.StatusNotFound, "GET", "org/app/manifests/v1")
	b.mirror.Close()
	if keys := b.within(store, layout.Repositories); len(keys) > 0 {
		t.Errorf("there is %q", keys)
	}
	if err := b.mirror.link(t.Context(), "reg.example/org/app", layer.Digest, layer.Digest); err == nil || errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("it is linked: %v", err)
	}
	b.tree.Close()
	b.mirror = nil
	b.start()
}

// TestAheadFromStore: layers that will be asked for soon come from the store if it has
// them.
func TestAheadFromStore(t *testing.T) {
	b, store := distantBench(t)
	layers := []regtest.Content{regtest.Random("0", 2<<20), regtest.Random("1", 2<<20), regtest.Random("2", 2<<20), regtest.Random("3", 2<<20)}
	first, second := regtest.NewImage("first", layers...), regtest.NewImage("second", layers...)
	b.registry.Push("org/app", first, "v1")
	b.registry.Push("org/app", second, "v2")
	b.wantManifest("org/app/manifests/v1", first)
	for _, blob := range first.Blobs {
		b.wantStatus(http.StatusOK, "GET", "org/app/blobs/"+blob.Digest.String())
		b.eventually("its link", func() bool { return store.Placed(layout.LayerLink("reg.example/org/app", blob.Digest)) != nil })
	}
	for _, layer := range layers {
		if !store.Drop(layout.Blob(layer.Digest)) {
			t.Fatal("it is not near")
		}
	}
	b.anew()
	b.registry.Forget()
	b.wantManifest("org/app/manifests/v2", second)
	b.wantStatus(http.StatusOK, "GET", "org/app/blobs/"+layers[0].Digest.String())
	for _, layer := range layers[1:3] {
		b.eventually("the next layers", func() bool { return len(store.Asks("get", layout.Blob(layer.Digest))) == 1 })
	}
	for i, layer := range layers {
		if n := b.registry.Count("GET", layer.Digest.String()); n > 0 {
			t.Errorf("the upstream was asked %d times for layer %d", n, i)
		}
	}
}

// TestStoreLength: what has another length at the distant place than its manifest says
// is not asked for there.
func TestStoreLength(t *testing.T) {
	b, store := distantBench(t)
	layer := regtest.Random("layer", 2<<20)
	image := regtest.NewImage("app", layer)
	b.registry.Push("org/app", image, "v1")
	key := layout.Blob(layer.Digest)
	store.Place(key, layer.Data[:1<<20])
	b.wantManifest("org/app/manifests/v1", image)
	if w := b.ask("GET", "org/app/blobs/"+layer.Digest.String()); w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), layer.Data) {
		t.Errorf("%d, %d bytes", w.Code, w.Body.Len())
	}
	b.eventually("the bucket to be put right", func() bool { return bytes.Equal(store.Placed(key), layer.Data) })
}

// TestHostedAway: what is hosted, and only at a distant place that does not answer, is a
// 503; and what is wrong there is not found.
func TestHostedAway(t *testing.T) {
	b, store := distantBench(t)
	b.mirror.patience = time.Minute
	layer := regtest.Random("layer", 2<<20)
	wrong := bytes.Clone(layer.Data[:1000])
	small := regtest.Random("small", 1000)
	site := Target{Name: "apps/web", Repository: "apps/web"}
	for _, blob := range []regtest.Content{layer, small} {
		store.Place(layout.LayerLink("apps/web", blob.Digest), []byte(blob.Digest))
	}
	store.Place(layout.Blob(layer.Digest), layer.Data)
	store.Place(layout.Blob(small.Digest), wrong)
	get := func(blob regtest.Content) (*oci.Error, []byte) {
		t.Helper()
		ctx, cancel := context.WithTimeoutCause(t.Context(), b.mirror.patience, errNoAnswer)
		defer cancel()
		content, _, err := b.mirror.blob(ctx, site, blob.Digest)
		if err == nil {
			defer content.Close()
			err = content.Prepare(ctx, t.Context(), []oci.Span{{Length: content.Size()}}, true)
			err = b.mirror.lost(site, blob.Digest, err)
		}
		if err != nil {
			return refusal(err, oci.KindBlob, b.agent, ""), nil
		}
		r, err := content.Reader(0)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return nil, data
	}
	store.Trouble(func(a storagetest.Asked) error {
		if a.Key == layout.Blob(layer.Digest) {
			return fmt.Errorf("%w: down", storage.ErrUnavailable)
		}
		return nil
	})
	if e, _ := get(layer); e == nil || e.Status != http.StatusServiceUnavailable || e.RetryAfter == 0 || strings.Contains(e.Message, "upstream") {
		t.Errorf("%+v", e)
	}
	b.agent = "containers/5.36"
	if e, _ := get(layer); e == nil || e.Status != http.StatusTooManyRequests || e.RetryAfter == 0 {
		t.Errorf("%+v", e)
	}
	if asked := store.Asks("get", layout.Blob(layer.Digest)); len(asked) != 2 {
		t.Errorf("for two answers it was asked %d times", len(asked))
	}
	store.Down(false)
	if e, data := get(layer); e != nil || !bytes.Equal(data, layer.Data) {
		t.Errorf("%+v, %d bytes", e, len(data))
	}
	if e, _ := get(small); e == nil || e.Status != http.StatusNotFound || !strings.Contains(e.Message, "damaged") {
		t.Errorf("%+v", e)
	}
	// The fill of what is hosted links nothing: it may have been deleted meanwhile.
	b.eventually("it to be near", func() bool {
		return len(b.within(store, layout.Blob(layer.Digest)[:len(layout.Blob(layer.Digest))-len("data")])) > 0
	})
	if keys := b.within(store, layout.Repositories); len(keys) > 0 {
		t.Errorf("there is %q", keys)
	}
}

// TestStoreSilent: a store that takes questions and does not answer them keeps nobody
// from what its upstream has.
func TestStoreSilent(t *testing.T) {
	b, store := distantBench(t)
	image := regtest.NewImage("app", regtest.Random("layer", 1000))
	b.registry.Push("org/app", image, "v1")
	const repository = "reg.example/org/app"
	manifest := image.Digest
	for key, value := range map[string]string{
		layout.Record(repository):                 `{"schema":1,"class":"mirrored","upstream":"reg.example"}`,
		layout.TagLink(repository, "v1"):          manifest.String(),
		layout.RevisionLink(repository, manifest): manifest.String(),
		layout.Blob(manifest):                     string(image.Data),
	} {
		store.Place(key, []byte(value))
	}
	store.Deliver(func(ctx context.Context, _ string, _ int64) (int64, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	})
	b.mirror.hurry = time.Millisecond
	b.wantManifest("org/app/manifests/v1", image)
	b.wantManifest("org/app/manifests/"+manifest.String(), image)
	if put := store.Asks("put", ""); len(put) > 0 {
		t.Errorf("put were %v", put)
	}
	err := b.mirror.admit(t.Context(), Target{Name: "app", Repository: repository})
	if e := refusal(err, oci.KindManifest, "", ""); err == nil || e.Status != http.StatusServiceUnavailable || e.RetryAfter == 0 {
		t.Errorf("%v: %+v", err, e)
	}
	if err := b.mirror.claim(t.Context(), Target{Upstream: b.upstream, Name: "org/app", Repository: repository}); !errors.Is(err, errUnclaimed) {
		t.Errorf("claimed: %v", err)
	}
	// What it does answer counts at once: what an outage lets pass is to be stored.
	store.Deliver(nil)
	b.mirror.silent.Store(time.Now().UnixNano())
	if err := b.mirror.claim(t.Context(), Target{Upstream: b.upstream, Name: "org/app", Repository: repository}); err != nil {
		t.Errorf("not claimed: %v", err)
	}
}
