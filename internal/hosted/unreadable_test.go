package hosted_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/storage"
)

// TestUploadUnreadable: that an earlier process's upload cannot be read now is no proof
// that it is lost.
func TestUploadUnreadable(t *testing.T) {
	data := random(23, 100_000)
	h := newHost(t)
	u := h.begin("")
	h.append(u, body(data[:60_000]), 60_000)
	h.restart()
	state, aside := h.spool(u.ID()+".state"), t.TempDir()+"/state"
	if err := errors.Join(os.Rename(state, aside), os.Mkdir(state, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Upload(t.Context(), "apps/web", u.ID()); err == nil || errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("want another error: %v", err)
	}
	if err := errors.Join(os.Remove(state), os.Rename(aside, state)); err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if _, err := h.find(u.ID()).Finish(t.Context(), d, body(data[60_000:])); err != nil {
		t.Fatal(err)
	}
	h.has("apps/web", d, data)
}

// TestSharedUploadUnreadable: what could not be fetched or read, for whatever reason,
// is no proof that it is lost: the upload can be gone on with.
func TestSharedUploadUnreadable(t *testing.T) {
	data := random(21, 300_000)
	d := digest.FromBytes(data)
	for name, c := range map[string]struct {
		// spoil is called when b has a piece, and before each call for one of a's.
		spoil func(b *host, id string, leave context.CancelFunc) error
		mend  func(b *host, id string)
		want  error
	}{
		"down":   {spoil: func(*host, string, context.CancelFunc) error { return errDown }, want: storage.ErrUnavailable},
		"broken": {spoil: func(*host, string, context.CancelFunc) error { return errors.New("it says 400") }},
		"left": {spoil: func(_ *host, _ string, leave context.CancelFunc) error {
			leave()
			return nil
		}, want: context.Canceled},
		"disk": {
			// Whatever is written goes to the file that has been opened.
			spoil: func(b *host, id string, _ context.CancelFunc) error {
				return errors.Join(os.Remove(b.spool(id)), os.Mkdir(b.spool(id), 0o700))
			},
			mend: func(b *host, id string) { os.Remove(b.spool(id)) },
		},
		"no file": {
			spoil: func(b *host, id string, _ context.CancelFunc) error { return os.Remove(b.spool(id)) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, hosts := pair(t)
			a, b := hosts[0], hosts[1]
			id := a.begin("").ID()
			a.append(a.find(id), body(data[:100_000]), 100_000)
			b.append(b.find(id), body(data[100_000:200_000]), 200_000)
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			f.fails(func(after bool, call string) error {
				if strings.HasPrefix(call, "open") && !after {
					return c.spoil(b, id, leave)
				}
				return nil
			})
			_, err := b.find(id).Finish(ctx, d, body(data[200_000:]))
			f.fails(nil)
			if err == nil || errors.Is(err, hosted.ErrNoUpload) || c.want != nil && !errors.Is(err, c.want) {
				t.Fatalf("want another error: %v", err)
			}
			if c.mend != nil {
				c.mend(b, id)
			}
			for _, h := range hosts {
				if u := h.find(id); u.Look(t.Context()) != nil || u.Offset() != 200_000 {
					t.Fatalf("it ends at %d, want 200000", u.Offset())
				}
			}
			if _, err := b.find(id).Finish(t.Context(), d, body(data[200_000:])); err != nil {
				t.Fatal(err)
			}
			a.has("apps/web", d, data)
			late(time.Hour, a, b)
			nothing(t, f, a, b)
		})
	}
}

// TestSharedUploadSpoiltHere: what is wrong in the file of one process is fetched
// from the distant place.
func TestSharedUploadSpoiltHere(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(22, 300_000)
	id := a.begin("").ID()
	a.append(a.find(id), body(data[:100_000]), 100_000)
	b.append(b.find(id), body(data[100_000:200_000]), 200_000)
	file, err := os.OpenFile(b.spool(id), os.O_WRONLY, 0)
	if err == nil {
		_, err = file.WriteAt([]byte("wrong"), 150_000)
		file.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if _, err := b.find(id).Finish(t.Context(), d, body(data[200_000:])); err != nil {
		t.Fatal(err)
	}
	a.has("apps/web", d, data)
	late(time.Hour, a, b)
	nothing(t, f, a, b)
}
