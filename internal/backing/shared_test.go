package backing_test

import (
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// common is a store that others write to as well, whose values are all near.
type common struct{ storage.Store }

func (c common) Distant() storage.Distant { return everything{nil, c.Store} }

type everything struct {
	storage.Distant
	store storage.Store
}

func (e everything) OpenNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	return e.store.Open(ctx, key, 0, -1)
}
func (everything) Drop(string) bool             { return false }
func (everything) Distrust(string)              {}
func (everything) Shared() bool                 { return true }
func (everything) Listed(context.Context) error { return nil }
func (everything) Relist(context.Context) error { return nil }
func (everything) Secret() []byte               { return nil }

// beside is another process on the store of a.
func beside(t *testing.T, a *shelf) *backing.Library {
	store := common{a.store}
	trees := tree.New(store, nil)
	uploads := hosted.New(hosted.Parts{Store: store, Tree: trees, Log: zap.NewNop()})
	b := backing.New(backing.Parts{Store: store, Tree: trees, Hosted: uploads, Fills: a.fills, Log: zap.NewNop()})
	var ticks atomic.Int64
	b.Clock(func() time.Time { return when.Add(time.Duration(ticks.Add(1)) * time.Minute) })
	b.Set(a.set)
	t.Cleanup(func() {
		b.Close()
		uploads.Close()
		trees.Close()
	})
	return b
}

// TestSharedBusy: what is being changed, and may wait for a bucket, keeps nobody from
// what others have changed elsewhere.
func TestSharedBusy(t *testing.T) {
	a := newShelf(t)
	b := beside(t, a)
	a.add(backing.Draft{Name: "a"}, rawDisk(1))
	reached, release := make(chan struct{}), make(chan struct{})
	failpoint.Set(func(name string) {
		if name == "backing.manifest" {
			close(reached)
			<-release
		}
	})
	ended := make(chan error)
	go func() {
		u, err := b.Receive(t.Context(), backing.Draft{}, -1)
		if err == nil {
			if _, err = u.Append(t.Context(), body(rawDisk(2))); err == nil {
				_, _, err = u.Finish(t.Context(), backing.Draft{Name: "a"})
			}
		}
		ended <- err
	}()
	<-reached
	failpoint.Set(nil)
	a.add(backing.Draft{Name: "b"}, rawDisk(3))
	if _, err := b.Version(t.Context(), "b", "v1"); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if _, err := b.Version(t.Context(), "a", "v2"); err != nil {
		t.Error(err)
	}
}

// What one process changes another sees.
func TestShared(t *testing.T) {
	a := newShelf(t)
	b := beside(t, a)
	if _, err := b.Image(t.Context(), "a"); err == nil {
		t.Fatal("there is an image")
	}
	v := a.add(backing.Draft{Name: "a", Tags: []string{"stable"}}, rawDisk(1))
	if got, err := b.Version(t.Context(), "a", "stable"); err != nil || got.Digests != v.Digests {
		t.Fatal(got, err)
	}
	// It changes what the other has written, not what it has read before.
	if _, err := a.Edit(t.Context(), "a", "", backing.Edit{Labels: map[string]string{"x": "y"}}); err != nil {
		t.Fatal(err)
	}
	i, err := b.Edit(t.Context(), "a", "", backing.Edit{Labels: map[string]string{"z": "y"}})
	if err != nil || i.Labels["x"] != "y" || i.Labels["z"] != "y" {
		t.Errorf("%v %v", i.Labels, err)
	}
	if err := b.Delete(t.Context(), "a", "", "", false); err != nil {
		t.Fatal(err)
	}
}
