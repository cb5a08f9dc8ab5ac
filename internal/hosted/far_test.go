package hosted_test

import (
	"context"
	"io"
	"iter"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

// A far is a distant place that several processes share.
type far struct {
	storage.Store
	secret []byte

	mu    sync.Mutex
	calls []string // of uploads: what was asked for, and for which key
	fault fault
}

// A fault may fail a call before it has had its effect, or after it.
type fault func(after bool, call string) error

func newFar(t *testing.T) *far {
	f := farIn(t, t.TempDir())
	t.Cleanup(func() { f.Close() })
	return f
}

func farIn(t *testing.T, dir string) *far {
	return &far{Store: disktest.Open(t, dir), secret: []byte("of all")}
}

func (f *far) fails(by fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = by
}

// asked are the calls so far of which each begins with a prefix.
func (f *far) asked(prefix string) (calls []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, call := range f.calls {
		if strings.HasPrefix(call, prefix) {
			calls = append(calls, call)
		}
	}
	return calls
}

func (f *far) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = nil
}

// do makes a call, which may fail.
func (f *far) do(ctx context.Context, call, key string, do func() error) error {
	if !strings.HasPrefix(key, storage.Uploads) {
		return do()
	}
	call += " " + strings.TrimPrefix(key, storage.Uploads)
	f.mu.Lock()
	f.calls = append(f.calls, call)
	fault := f.fault
	f.mu.Unlock()
	if fault != nil {
		if err := fault(false, call); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err := do()
	if fault != nil && err == nil {
		err = fault(true, call)
	}
	return err
}

// uploads are the keys of what has come of uploads.
func (f *far) uploads(t *testing.T) (keys []string) {
	t.Helper()
	for info, err := range f.Store.List(context.Background(), storage.Uploads, true) {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, strings.TrimPrefix(info.Key, storage.Uploads))
	}
	slices.Sort(keys)
	return keys
}

// pieces are those of an upload.
func (f *far) pieces(t *testing.T, id string) (keys []string) {
	t.Helper()
	for _, key := range f.uploads(t) {
		if strings.HasPrefix(key, id) && !strings.HasSuffix(key, "/state") {
			keys = append(keys, key)
		}
	}
	return keys
}

func (f *far) edit(t *testing.T, key string, change func([]byte) []byte) {
	t.Helper()
	value, err := f.Store.Get(t.Context(), storage.Uploads+key, 10<<20)
	if err == nil {
		err = f.Store.Put(t.Context(), storage.Uploads+key, change(value), storage.Durable)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A node is a store that has its values in a far, and its spools near.
type node struct {
	storage.Store // near
	far           *far
}

func (n *node) Open(ctx context.Context, key string, offset, length int64) (r io.ReadCloser, info storage.Info, err error) {
	err = n.far.do(ctx, "open", key, func() error {
		r, info, err = n.far.Open(ctx, key, offset, length)
		return err
	})
	return r, info, err
}

func (n *node) Get(ctx context.Context, key string, limit int64) (value []byte, err error) {
	err = n.far.do(ctx, "get", key, func() error {
		value, err = n.far.Get(ctx, key, limit)
		return err
	})
	return value, err
}

func (n *node) Stat(ctx context.Context, key string) (storage.Info, error) {
	return n.far.Stat(ctx, key)
}

func (n *node) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	return n.far.do(ctx, "put", key, func() error { return n.far.Put(ctx, key, data, d) })
}

func (n *node) PutFile(ctx context.Context, key, path string, d storage.Durability) error {
	return n.far.do(ctx, "file", key, func() error {
		// The bytes go there: that the file is written to later does not matter.
		data, err := os.ReadFile(path)
		if err == nil {
			err = n.far.Put(ctx, key, data, d)
		}
		if err == nil {
			err = os.Remove(path)
		}
		return err
	})
}

func (n *node) Sync(ctx context.Context, keys ...string) error { return n.far.Sync(ctx, keys...) }

func (n *node) Delete(ctx context.Context, key string) error {
	return n.far.do(ctx, "delete", key, func() error { return n.far.Delete(ctx, key) })
}

func (n *node) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	return n.far.List(ctx, prefix, deep)
}

func (n *node) Vouch(ctx context.Context, key string) error { return n.far.Vouch(ctx, key) }

func (n *node) Distant() storage.Distant { return n }

func (n *node) OpenNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	return n.Open(ctx, key, 0, -1)
}

func (n *node) Drop(string) bool             { return false }
func (n *node) Distrust(string)              {}
func (n *node) Shared() bool                 { return true }
func (n *node) Listed(context.Context) error { return nil }
func (n *node) Relist(context.Context) error { return nil }
func (n *node) Secret() []byte               { return n.far.secret }
func (n *node) Presign(context.Context, string, string, time.Duration) (string, error) {
	return "", storage.ErrUnavailable
}

// join starts a process that shares what is far.
func (f *far) join(t *testing.T) *host {
	h := &host{t: t, dir: t.TempDir(), far: f}
	h.start()
	t.Cleanup(h.stop)
	return h
}

// near opens the host's store.
func (h *host) near() storage.Store {
	near := disktest.Open(h.t, h.dir)
	if h.far == nil {
		return near
	}
	return &node{Store: near, far: h.far}
}

func (h *host) logger() *zap.Logger {
	if h.logs == nil {
		return zap.NewNop()
	}
	return h.logs
}
