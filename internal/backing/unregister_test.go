package backing

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing/longhorn"
	"github.com/caddy-registry/mirror/internal/layout"
	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
	"github.com/caddy-registry/mirror/storage"
)

// TestForget: a registration with a cluster that is not configured any more can be
// removed here, and Longhorn is not asked.
func TestForget(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	r.register(RegistrationOptions{})
	r.until(InLonghorn)
	if err := r.set(Settings{Prefix: "p"}); err != nil {
		t.Fatal(err)
	}
	p := place{r.v.Name, r.v.Version, "default"}
	if err := r.unregister(t.Context(), r.v, "default"); codeOf(err) != LonghornAway || !strings.Contains(err.Error(), "forget") {
		t.Errorf("what cannot be asked: %v", err)
	}
	if err := r.disown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if err := r.disown(t.Context(), p); codeOf(err) != NotFound {
		t.Errorf("twice: %v", err)
	}
	if blockers, err := r.blockers(t.Context(), []Version{r.v}); err != nil || len(blockers) != 0 || len(r.of(r.v.Name, r.v.Version)) != 0 {
		t.Errorf("%v %v", blockers, err)
	}
	if len(m.Names()) != 1 || len(m.Requests("DELETE", "")) != 0 {
		t.Errorf("Longhorn has %q", m.Names())
	}
}

// TestHolders: what has our bytes or our address under another name keeps them, too.
func TestHolders(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	r.v.Tags = []string{"stable"}
	client := longhornClient(t, m.URL)
	sum := r.v.Digests.SHA512.Encoded()
	for name, in := range map[string]longhorn.Input{
		"by-file":   {Parameters: map[string]string{"url": "http://old.test/v1/files/t/secret/" + sum + "/x.img"}},
		"by-people": {Parameters: map[string]string{"url": "http://old.test/v1/backing-images/" + r.v.Name + "/download?version=stable"}},
		"by-sum":    {Parameters: map[string]string{"url": "http://elsewhere.test/v1/files/x"}, ExpectedChecksum: sum},
		"by-latest": {Parameters: map[string]string{"url": "http://old.test/v1/backing-images/" + r.v.Name + "/download"}},
		"by-none":   {Parameters: map[string]string{"url": "http://old.test/v1/backing-images/" + r.v.Name + "/download?version=v9"}},
	} {
		in.Name, in.SourceType = name, "download"
		if _, err := client.Create(t.Context(), in); err != nil {
			t.Fatal(err)
		}
	}
	m.SetVolume("pvc-1", "by-sum")
	m.SetVolume("pvc-2", "another")
	blockers, err := r.blockers(t.Context(), []Version{r.v})
	if got := fmt.Sprint(blockers); err != nil || got != "[{backing-image by-file default} {backing-image by-latest default} {backing-image by-people default} {volume pvc-1 default}]" {
		t.Error(got, err)
	}
	m.Stop()
	if _, err := r.blockers(t.Context(), []Version{r.v}); codeOf(err) != LonghornAway || !strings.Contains(err.Error(), "take it out of the configuration and forget") {
		t.Error(err)
	}
}

// TestUploadsAtOnce: no more uploads are begun than may be at once, and the others follow.
func TestUploadsAtOnce(t *testing.T) {
	m := fake.New(t, fake.Options{})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	for range maxSending {
		r.uploads <- struct{}{}
	}
	r.register(RegistrationOptions{Mode: PushUpload})
	deadline := time.Now().Add(time.Minute)
	for !strings.Contains(r.of(r.v.Name, r.v.Version)[0].Message, "others") {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", r.of(r.v.Name, r.v.Version))
		}
	}
	for range maxSending {
		<-r.uploads
	}
	r.until(InLonghorn)
}

// TestRevokedToken: one that opens nothing any more is in no new address, and who would
// revoke one that Longhorn has is told.
func TestRevokedToken(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage)
	made := 0
	r.token = func(_ context.Context, _, _, old string) (string, error) {
		if old != "" && old != "token1" {
			return old, nil
		}
		made++
		return fmt.Sprintf("token%d", made), nil
	}
	public, _ := url.Parse("http://images.test")
	r.set(Settings{Prefix: "p", PublicURL: public, Private: true, Clusters: []Cluster{{Name: "default", URL: m.URL}}})
	r.register(RegistrationOptions{})
	second := r.v
	second.Version = "v2"
	if told, err := r.registrar.register(t.Context(), second, RegistrationOptions{Name: "second"}); err != nil || !strings.Contains(told.URL, "/t/token2/") {
		t.Error(told, err)
	}
	if by := r.with(r.v.Name, "token1"); len(by) != 1 || by[0].Cluster != "default" {
		t.Error(by)
	}
	if by := r.with(r.v.Name, "token3"); len(by) != 0 {
		t.Error(by)
	}
}

// distant is a store that another process writes to, too.
type distant struct {
	storage.Store
}

type written struct{ storage.Distant }

func (written) Shared() bool             { return true }
func (distant) Distant() storage.Distant { return written{} }

// TestRemovedElsewhere: a registration that another process has removed does not come back.
func TestRemovedElsewhere(t *testing.T) {
	store := distant{openStore(t, t.TempDir())}
	r := newTestRegistrar(t, store, testVersion(diskImage), diskImage)
	p := place{r.v.Name, r.v.Version, "default"}
	record := registration{Schema: 1, Image: p.image, Version: p.version, Cluster: p.cluster, Name: "x"}
	if err := r.write(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	key := layout.ImageRegistration(p.image, p.version, p.cluster)
	if err := store.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := r.write(t.Context(), record); codeOf(err) != NotFound {
		t.Error(err)
	}
	if _, err := store.Get(t.Context(), key, maxRegistration); err == nil || len(r.of(p.image, p.version)) != 0 {
		t.Errorf("it is back: %v", err)
	}
}
