package hosted_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/storage"
)

// allowance is a quota that counts what has been granted and not given back.
type allowance struct {
	mu    sync.Mutex
	limit int64
	out   int64
	asked int
}

func (a *allowance) ask(_ context.Context, _ string, n int64) (func(), error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if n > a.limit-a.out {
		return nil, storage.ErrFull
	}
	a.out += n
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.out -= n
	}, nil
}

func (a *allowance) is(t *testing.T, least, most int64) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.out < least || a.out > most {
		t.Errorf("%d bytes are granted, want %d to %d", a.out, least, most)
	}
}

// again begins a registry that asks a quota, as another process would.
func (h *host) again(a *allowance) {
	h.t.Helper()
	h.stop()
	h.start()
	h.Registry.Close()
	h.Registry = hosted.New(hosted.Parts{Store: h.store, Tree: h.tree, Log: zap.NewNop(), Quota: a.ask})
}

// What an upload has brought counts until it ends, in whatever way, and so it does
// in the next process once it is gone on with. What does not fit is not read.
func TestUploadAsksQuota(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 10 << 20}
	h.again(a)
	data := random(1, 8<<20)
	u := h.begin("")
	a.is(t, 0, 0)
	for i := range int64(4) {
		h.append(u, body(data[i<<20:][:1<<20]), (i+1)<<20)
		a.is(t, (i+1)<<20, 10<<20)
	}
	if a.asked > 4 {
		t.Errorf("asked %d times for 4 pieces", a.asked)
	}
	read := false
	refused := hosted.Body{Reader: readFunc(func(p []byte) (int, error) { read = true; return 0, errors.New("read") }), At: -1, Length: 7 << 20}
	if _, err := u.Append(t.Context(), refused); !errors.Is(err, storage.ErrFull) || read {
		t.Errorf("11 of 10 MiB: %v, read: %v", err, read)
	}
	id := u.ID()
	a = &allowance{limit: 10 << 20}
	h.again(a)
	u = h.find(id)
	h.append(u, body(data[4<<20:][:1<<20]), 5<<20)
	a.is(t, 5<<20, 10<<20)
	// As much as there is room for, though it would rather have more.
	a.mu.Lock()
	a.limit = a.out + 3<<20
	a.mu.Unlock()
	if _, err := u.Finish(t.Context(), digest.FromBytes(data), body(data[5<<20:])); err != nil {
		t.Fatal(err)
	}
	a.is(t, 0, 0)

	u = h.begin("")
	h.append(u, streamed(bytes.NewReader(data[:100])), 100)
	a.is(t, 100, 10<<20)
	if err := u.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.is(t, 0, 0)
	other := random(2, 1<<20)
	if _, err := h.Push(t.Context(), "apps/web", digest.FromBytes(data), body(other)); !errors.Is(err, hosted.ErrDigest) {
		t.Errorf("the error is %v", err)
	}
	a.is(t, 0, 0)
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// A body that does not say how long it is may be as long as there is room: what is
// set aside ahead of it is not what it takes.
func TestStreamFillsQuota(t *testing.T) {
	for _, c := range []struct{ limit, comes int64 }{
		{100 << 10, 100 << 10}, // less than is set aside at first
		{10 << 20, 10 << 20},   // and less than later
	} {
		h, a := newHost(t), &allowance{limit: c.limit}
		h.again(a)
		data := random(1, int(c.comes)+1)
		u := h.begin("")
		h.append(u, streamed(bytes.NewReader(data[:c.comes])), c.comes)
		a.is(t, c.comes, c.limit)
		if _, err := u.Append(t.Context(), streamed(bytes.NewReader(data[c.comes:]))); !errors.Is(err, storage.ErrFull) {
			t.Errorf("a byte more than the %d there is room for: %v", c.limit, err)
		}
	}
}

// So do manifests, and mounts from where another quota counts.
func TestManifestAndMountAskQuota(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 1 << 20}
	h.again(a)
	data := random(1, 1000)
	d := digest.FromBytes(data)
	if _, err := h.Push(t.Context(), "libs/web", d, body(data)); err != nil {
		t.Fatal(err)
	}
	var settings hosted.Settings
	for _, s := range []string{"apps/**", "libs/**"} {
		pattern, err := oci.ParsePattern(s)
		if err != nil {
			t.Fatal(err)
		}
		settings.Options = append(settings.Options, hosted.Options{Pattern: pattern, Sparse: true})
	}
	h.Set(settings)
	a.limit = 999
	if _, err := h.Mount(t.Context(), "apps/web", "libs/web", d); !errors.Is(err, storage.ErrFull) {
		t.Errorf("a mount from another pattern: %v", err)
	}
	if _, err := h.Mount(t.Context(), "libs/other", "libs/web", d); err != nil {
		t.Errorf("a mount within the pattern: %v", err)
	}
	manifest := regtest.NewImage(strings.Repeat("x", 10), regtest.Random("x", 10)).Content
	a.limit = int64(len(manifest.Data)) - 1
	push := hosted.Push{Repository: "apps/web", Tags: []string{"v1"}, Body: manifest.Data}
	if _, err := h.PutManifest(t.Context(), push); !errors.Is(err, storage.ErrFull) {
		t.Errorf("a manifest: %v", err)
	}
	if _, err := h.tree.Tag(t.Context(), "apps/web", "v1"); err == nil {
		t.Error("it has been tagged")
	}
	a.limit++
	if _, err := h.PutManifest(t.Context(), push); err != nil {
		t.Error(err)
	}
	a.is(t, 0, 0)
}
