package mirror

import (
	"context"
	"errors"
	"io/fs"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

// overtaken is a store in which, between a request's finding that something is
// absent and its acting upon that, another request runs to its end.
type overtaken struct {
	storage.Store
	by atomic.Pointer[func(key string)]
}

func (o *overtaken) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	data, err := o.Store.Get(ctx, key, limit)
	if errors.Is(err, fs.ErrNotExist) && strings.Contains(key, "_manifests") {
		if other := o.by.Swap(nil); other != nil {
			(*other)(key)
		}
	}
	return data, err
}

// TestOvertaken: a request that finds nothing held, and is overtaken by one
// that fetches it, does not fetch it again.
func TestOvertaken(t *testing.T) {
	image := regtest.NewImage("overtaken", regtest.Random("overtaken", 1000))
	for name, ref := range map[string]oci.Reference{
		"tag":    {Tag: "v1"},
		"digest": {Digest: image.Digest},
	} {
		t.Run(name, func(t *testing.T) {
			registry := regtest.New(t, regtest.Options{})
			registry.Push("team/app", image, "v1")
			address, err := url.Parse(registry.URL)
			if err != nil {
				t.Fatal(err)
			}
			var pool upstream.Pool
			client, err := pool.Open("reg.example", []upstream.Endpoint{{URL: address, Origin: true, Pull: true, Resolve: true, AllowPrivate: true}})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			store := &overtaken{Store: disktest.Open(t, t.TempDir())}
			defer store.Close()
			held := tree.New(store, nil)
			defer held.Close()
			m := New(Parts{Store: store, Tree: held, Log: zap.NewNop()})
			defer m.Close()
			target := Target{
				Upstream:   &Upstream{Name: "reg.example", Prefix: "reg.example", TagTTL: time.Minute, Client: client},
				Name:       "team/app",
				Repository: "reg.example/team/app",
			}
			pull := func() {
				answer, err := m.manifest(t.Context(), target, ref, false, false)
				if err != nil || string(answer.held.Body) != string(image.Data) {
					t.Errorf("wrong answer: %v", err)
				}
			}
			happened := false
			other := func(string) { happened = true; pull() }
			store.by.Store(&other)
			pull()
			if n := registry.Count("GET", "/manifests/"); n != 1 || !happened {
				t.Errorf("%d requests for one manifest", n)
			}
		})
	}
}
