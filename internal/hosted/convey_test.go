package hosted_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/hosted"
)

// Whatever of a large request a state speaks of is in the file and in both hashes,
// though they take what comes at the same time: a process that finds what any moment has
// left goes on from it to the right digests.
func TestConveyNotes(t *testing.T) {
	h, data := newHost(t), random(41, 6<<20+12_345)
	h.Every(1 << 20)
	u := h.receive()
	var left []string // stores as a process that died would have left them
	failpoint.Set(func(name string) {
		if name != "upload.state" {
			return
		}
		dir := t.TempDir()
		to := filepath.Join(dir, "mirror/spool/uploads")
		if err := os.MkdirAll(to, 0o700); err != nil {
			t.Error(err)
		}
		for _, file := range h.files() {
			text, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(filepath.Join(to, filepath.Base(file)), text, 0o600)
			}
			if err != nil {
				t.Error(err)
			}
		}
		left = append(left, dir)
	})
	t.Cleanup(func() { failpoint.Set(nil) })
	h.append(u, body(data), int64(len(data)))
	failpoint.Set(nil)
	if len(left) < 6 {
		t.Fatalf("it was noted %d times", len(left))
	}
	for _, dir := range left {
		other := &host{t: t, dir: dir}
		other.start()
		u := other.received(u.ID())
		at := u.Offset()
		other.append(u, body(data[at:]), int64(len(data)))
		if _, err := u.Keep(t.Context(), "images/one", is(data)); err != nil {
			t.Errorf("from %d on: %v", at, err)
		}
		other.stop()
	}
}

// A body that breaks, and room that ends, in the middle of a large request leave what
// has been written, hashed.
func TestConveyEnds(t *testing.T) {
	data := random(42, 5<<20)
	broken := errors.New("the line is cut")
	for name, half := range map[string]func(h *host, u *hosted.Upload){
		"cut": func(h *host, u *hosted.Upload) {
			cut := io.MultiReader(bytes.NewReader(data[:2<<20+77]), failing{err: broken})
			if end, err := u.Append(t.Context(), streamed(cut)); !errors.Is(err, broken) || end != 2<<20+77 {
				t.Errorf("it ends at %d: %v", end, err)
			}
		},
		"full": func(h *host, u *hosted.Upload) {
			h.store.most.Store(4 << 20)
			if end, err := u.Append(t.Context(), streamed(bytes.NewReader(data))); err == nil || end == 0 || end > 4<<20 {
				t.Errorf("it ends at %d: %v", end, err)
			}
			h.store.most.Store(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
				u := h.receive()
				if algorithm == digest.SHA256 { // one hash
					u = h.begin(algorithm)
				}
				half(h, u)
				if at := u.Offset(); algorithm == digest.SHA256 {
					if _, err := u.Finish(t.Context(), digest.FromBytes(data), body(data[at:])); err != nil {
						t.Error(err)
					}
				} else {
					h.append(u, body(data[at:]), int64(len(data)))
					if _, err := u.Keep(t.Context(), "images/one", is(data)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}
