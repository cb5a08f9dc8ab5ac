package hosted_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/storage"
)

// pair starts two processes on one distant place.
func pair(t *testing.T) (*far, [2]*host) {
	f := newFar(t)
	return f, [2]*host{f.join(t), f.join(t)}
}

// nothing checks that nothing is left of any upload.
func nothing(t *testing.T, f *far, hosts ...*host) {
	t.Helper()
	if left := f.uploads(t); len(left) > 0 {
		t.Errorf("left at the distant place: %q", left)
	}
	for i, h := range hosts {
		h.SweepDistant(t.Context())
		if left := h.files(); len(left) > 0 || h.Partial() != 0 || h.store.reserved.Load() != 0 {
			t.Errorf("left at %d: %q, %d partial, %d reserved", i, left, h.Partial(), h.store.reserved.Load())
		}
	}
}

// late gives processes a clock that is so much ahead.
func late(d time.Duration, hosts ...*host) {
	for _, h := range hosts {
		h.At(func() time.Time { return time.Now().Add(d) })
	}
}

// TestSharedUploadAlternates: each request may come to another process, and each
// finds what came to the other one. Whoever has bytes does not fetch them.
func TestSharedUploadAlternates(t *testing.T) {
	data := random(1, 1_000_000)
	for _, c := range []struct {
		hint, asked digest.Algorithm
		cuts        []int // where one request ends
		last        int   // who finishes
	}{
		{"", digest.SHA256, []int{0, 1, 100_000, 100_000, 700_000}, 0},
		{"", digest.SHA256, []int{0, 1, 100_000, 700_000}, 1},
		{digest.SHA512, digest.SHA512, []int{300_000, 400_000, 1_000_000}, 0},
		{"", digest.SHA512, []int{300_000, 1_000_000}, 1},
		{digest.SHA384, digest.SHA256, []int{300_000, 1_000_000}, 1},
		{"", digest.SHA256, nil, 1},
	} {
		t.Run(fmt.Sprintf("%s for %s after %d at %d", c.hint, c.asked, len(c.cuts), c.last), func(t *testing.T) {
			f, hosts := pair(t)
			id, came := hosts[0].begin(c.hint).ID(), 0
			var of [2]int64 // bytes that came to each
			for i, end := range c.cuts {
				h := hosts[(i+1)%2]
				u := h.find(id)
				h.append(u, hosted.Body{Reader: bytes.NewReader(data[came:end]), At: int64(came), Length: int64(end - came)}, int64(end))
				of[(i+1)%2] += int64(end - came)
				came = end
				for j, h := range hosts {
					u := h.find(id)
					if err := u.Look(t.Context()); err != nil || u.Offset() != int64(end) {
						t.Fatalf("it ends at %d, want %d: %v", u.Offset(), end, err)
					}
					if h.Partial() != of[j] {
						t.Errorf("%d bytes are partial at %d, want %d", h.Partial(), j, of[j])
					}
				}
			}
			f.forget()
			d, h := c.asked.FromBytes(data), hosts[c.last]
			size, err := h.find(id).Finish(t.Context(), d, body(data[came:]))
			if err != nil || size != int64(len(data)) {
				t.Fatal(size, err)
			}
			for _, h := range hosts {
				h.has("apps/web", d, data)
				h.has("apps/web", digest.FromBytes(data), data)
				if _, err := h.Upload(t.Context(), "apps/web", id); err == nil {
					err = h.find(id).Look(t.Context())
					if !errors.Is(err, hosted.ErrNoUpload) {
						t.Errorf("a finished upload: %v", err)
					}
				}
			}
			if fetched, others := f.asked("open"), of[1-c.last]; (len(fetched) > 0) != (others > 0) || len(fetched) > len(c.cuts)/2+1 {
				t.Errorf("fetched %q, and %d bytes had come elsewhere", fetched, others)
			}
			late(time.Hour, hosts[:]...)
			nothing(t, f, hosts[:]...)
		})
	}
}

// TestSharedUploadRules: what is refused at one process is what is refused at all.
func TestSharedUploadRules(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(2, 100_000)
	id := a.begin("").ID()
	a.append(a.find(id), body(data[:60_000]), 60_000)
	for _, at := range []int64{0, 59_999, 60_001} {
		u := b.find(id)
		if end, err := u.Append(t.Context(), hosted.Body{Reader: bytes.NewReader(data), At: at, Length: 1}); !errors.Is(err, hosted.ErrOffset) || end != 60_000 {
			t.Errorf("at %d: %v, and it ends at %d", at, err, end)
		}
	}
	if _, err := b.find(id).Append(t.Context(), cut(data[60_000:70_000], 40_000)); !errors.Is(err, hosted.ErrLength) {
		t.Errorf("a body that is cut: %v", err)
	}
	a.append(a.find(id), hosted.Body{Reader: bytes.NewReader(data[70_000:80_000]), At: 70_000, Length: 10_000}, 80_000)
	// What comes with a request to finish has come when it is finished.
	if _, err := b.find(id).Finish(t.Context(), digest.FromBytes(data), cut(data[80_000:90_000], 20_000)); !errors.Is(err, hosted.ErrLength) {
		t.Errorf("an end that is cut: %v", err)
	}
	if u := b.find(id); u.Offset() != 80_000 || b.Partial() != 10_000 {
		t.Errorf("then it ends at %d, and %d bytes are partial", u.Offset(), b.Partial())
	}
	for _, h := range hosts {
		if _, err := h.Upload(t.Context(), "apps/other", id); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("another repository's upload: %v", err)
		}
	}
	if _, err := f.join(t).Upload(t.Context(), "apps/other", id); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("another repository's upload: %v", err)
	}
	if _, err := b.find(id).Finish(t.Context(), digest.FromBytes(data), body(data[80_001:])); !errors.Is(err, hosted.ErrDigest) {
		t.Errorf("wrong bytes: %v", err)
	}
	if err := a.find(id).Look(t.Context()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after wrong bytes: %v", err)
	}
	if _, ok, _ := a.tree.Member(t.Context(), "apps/web", digest.FromBytes(data)); ok {
		t.Error("wrong bytes are linked")
	}
	nothing(t, f, hosts[:]...)

	u := a.begin("")
	a.append(u, body(data), int64(len(data)))
	b.find(u.ID())
	if err := b.find(u.ID()).Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(t.Context(), body(data)); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after it was cancelled: %v", err)
	}
	if _, err := b.Upload(t.Context(), "apps/web", u.ID()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after it was cancelled: %v", err)
	}
	for _, empty := range []hosted.Body{{}, streamed(bytes.NewReader(nil))} {
		if size, err := b.find(a.begin("").ID()).Finish(t.Context(), digest.FromBytes(nil), empty); err != nil || size != 0 {
			t.Errorf("an empty blob: %d, %v", size, err)
		}
		a.has("apps/web", digest.FromBytes(nil), nil)
	}
	late(time.Hour, a, b)
	nothing(t, f, hosts[:]...)
}

// TestSharedUploadRestart: a process has nothing of an upload after a restart, and
// goes on all the same.
func TestSharedUploadRestart(t *testing.T) {
	f := newFar(t)
	h := f.join(t)
	data := random(3, 500_000)
	id := h.begin("").ID()
	for at := 0; at < len(data); at += 100_000 {
		h.append(h.find(id), body(data[at:at+100_000]), int64(at+100_000))
		h.restart()
		if left := h.files(); len(left) > 0 || h.Partial() != 0 {
			t.Errorf("left: %q, %d partial", left, h.Partial())
		}
	}
	d := digest.FromBytes(data)
	if _, err := h.find(id).Finish(t.Context(), d, hosted.Body{}); err != nil {
		t.Fatal(err)
	}
	h.has("apps/web", d, data)
	nothing(t, f, h)
}

// TestSharedUploadLarge: what a large request brings is put away while it comes, so
// that the death of a process loses little of it; of one that brings a whole blob,
// nothing is.
func TestSharedUploadLarge(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(4, 5_000_000)
	a.Every(1_000_000)
	id := a.begin("").ID()
	first := newStuck(data[:4_000_000])
	ended := make(chan error, 1)
	go func() {
		_, err := a.find(id).Append(context.Background(), first.body(0, int64(len(data))))
		ended <- err
	}()
	<-first.waiting
	u := b.find(id)
	if u.Offset() < 1_000_000 || u.Offset() > 4_000_000 || len(f.pieces(t, id)) < 1 {
		t.Errorf("while it comes it ends at %d, in %q", u.Offset(), f.pieces(t, id))
	}
	first.interrupt()
	if err := <-ended; err == nil {
		t.Error("it was not cut")
	}
	if err := u.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.find(id).Look(t.Context()); err != nil || u.Offset() != 4_000_000 || len(f.pieces(t, id)) < 3 {
		t.Errorf("afterwards it ends at %d, in %q: %v", u.Offset(), f.pieces(t, id), err)
	}
	b.append(u, streamed(bytes.NewReader(data[4_000_000:])), 5_000_000)
	d := digest.FromBytes(data)
	if _, err := a.find(id).Finish(t.Context(), d, hosted.Body{}); err != nil {
		t.Fatal(err)
	}
	a.has("apps/web", d, data)

	f.forget()
	whole := random(5, 5_000_000)
	if _, err := a.begin("").Finish(t.Context(), digest.FromBytes(whole), body(whole)); err != nil {
		t.Fatal(err)
	}
	if put := f.asked("file"); len(put) > 0 {
		t.Errorf("of a blob that came as a whole, put were %q", put)
	}
	f.forget()
	if _, err := a.Push(t.Context(), "apps/web", d, body(data)); err != nil {
		t.Fatal(err)
	}
	if asked := f.asked(""); len(asked) > 0 {
		t.Errorf("for a blob that came at once: %q", asked)
	}
	late(time.Hour, a, b)
	nothing(t, f, hosts[:]...)
}

// TestSharedUploadWithoutSecret: where there is none, uploads are as on a disk.
func TestSharedUploadWithoutSecret(t *testing.T) {
	f := newFar(t)
	f.secret = nil
	h := f.join(t)
	data := random(6, 100_000)
	id := h.begin("").ID()
	h.append(h.find(id), body(data[:50_000]), 50_000)
	h.restart()
	d := digest.FromBytes(data)
	if _, err := h.find(id).Finish(t.Context(), d, body(data[50_000:])); err != nil {
		t.Fatal(err)
	}
	h.SweepDistant(t.Context())
	h.has("apps/web", d, data)
	if asked := f.asked(""); len(asked) > 0 {
		t.Errorf("asked: %q", asked)
	}
}

// TestSharedUploadForged: what the secret has not signed is no upload.
func TestSharedUploadForged(t *testing.T) {
	data := random(7, 10_000)
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 1; return b }
	}
	for name, forge := range map[string]func(f *far, id, other string){
		"another secret": func(f *far, _, _ string) { f.secret = []byte("of some") },
		"signature":      func(f *far, id, _ string) { f.edit(t, id+"/state", flip(3)) },
		"no signature":   func(f *far, id, _ string) { f.edit(t, id+"/state", func(b []byte) []byte { return b[65:] }) },
		"text":           func(f *far, id, _ string) { f.edit(t, id+"/state", flip(-3)) },
		"nothing":        func(f *far, id, _ string) { f.edit(t, id+"/state", func([]byte) []byte { return nil }) },
		"half":           func(f *far, id, _ string) { f.edit(t, id+"/state", func(b []byte) []byte { return b[:len(b)/2] }) },
		"large":          func(f *far, id, _ string) { f.edit(t, id+"/state", func([]byte) []byte { return make([]byte, 2<<20) }) },
		"another's": func(f *far, id, other string) {
			state, err := f.Store.Get(t.Context(), storage.Uploads+other+"/state", 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			f.edit(t, id+"/state", func([]byte) []byte { return state })
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFar(t)
			a := f.join(t)
			u, other := a.begin(""), a.begin("")
			a.append(u, body(data), int64(len(data)))
			forge(f, u.ID(), other.ID())
			core, logs := observer.New(zapcore.WarnLevel)
			b := &host{t: t, dir: t.TempDir(), far: f, log: zap.New(core)}
			b.start()
			defer b.stop()
			for range 3 {
				if _, err := b.Upload(t.Context(), "apps/web", u.ID()); !errors.Is(err, hosted.ErrNoUpload) {
					t.Errorf("want no such upload: %v", err)
				}
			}
			if told := logs.Len(); told != 1 && name != "large" {
				t.Errorf("it was told %d times: %v", told, logs.All())
			}
			if name == "another secret" {
				return // whoever began it has its own
			}
			if _, err := a.find(u.ID()).Append(t.Context(), body(data)); !errors.Is(err, hosted.ErrNoUpload) {
				t.Errorf("whoever began it goes on: %v", err)
			}
		})
	}
}

// TestSharedUploadSpoilt: pieces that are not what was put are never stored as a
// blob.
func TestSharedUploadSpoilt(t *testing.T) {
	data := random(8, 300_000)
	for name, spoil := range map[string]func(f *far, key string){
		"wrong": func(f *far, key string) { f.edit(t, key, func(b []byte) []byte { b[7] ^= 1; return b }) },
		"short": func(f *far, key string) { f.edit(t, key, func(b []byte) []byte { return b[1:] }) },
		"long":  func(f *far, key string) { f.edit(t, key, func(b []byte) []byte { return append(b, 0) }) },
		"gone":  func(f *far, key string) { f.Store.Delete(t.Context(), storage.Uploads+key) },
	} {
		t.Run(name, func(t *testing.T) {
			f, hosts := pair(t)
			a, b := hosts[0], hosts[1]
			id := a.begin("").ID()
			a.append(a.find(id), body(data[:100_000]), 100_000)
			b.append(b.find(id), body(data[100_000:200_000]), 200_000)
			spoil(f, f.pieces(t, id)[0])
			d := digest.FromBytes(data)
			if _, err := b.find(id).Finish(t.Context(), d, body(data[200_000:])); !errors.Is(err, hosted.ErrNoUpload) {
				t.Errorf("spoilt bytes: %v", err)
			}
			if _, ok, _ := a.tree.Member(t.Context(), "apps/web", d); ok {
				t.Error("spoilt bytes are linked")
			}
			late(time.Hour, a, b)
			nothing(t, f, a, b)
		})
	}
}

// TestSharedUploadTakenOver: a request that hangs at one process does not keep a
// client from going on at another, and cannot undo what came there.
func TestSharedUploadTakenOver(t *testing.T) {
	for _, came := range []int{0, 10_000, 150_000} {
		t.Run(fmt.Sprint(came), func(t *testing.T) {
			f, hosts := pair(t)
			a, b := hosts[0], hosts[1]
			data := random(9, 300_000)
			id := a.begin("").ID()
			a.append(a.find(id), body(data[:100_000]), 100_000)
			hung := newStuck(data[100_000 : 100_000+came])
			ended := make(chan error, 1)
			u := a.find(id)
			go func() {
				_, err := u.Append(context.Background(), hung.body(100_000, 200_000))
				ended <- err
			}()
			<-hung.waiting
			b.append(b.find(id), body(data[100_000:120_000]), 120_000)
			hung.interrupt()
			if err := <-ended; err == nil || came > 0 && !errors.Is(err, hosted.ErrTaken) && !errors.Is(err, io.ErrUnexpectedEOF) && u.Offset() != 120_000 {
				t.Errorf("the one that hung: %v, and it ends at %d", err, u.Offset())
			}
			a.append(a.find(id), body(data[120_000:250_000]), 250_000)
			d := digest.FromBytes(data)
			if _, err := b.find(id).Finish(t.Context(), d, body(data[250_000:])); err != nil {
				t.Fatal(err)
			}
			a.has("apps/web", d, data)
			late(time.Hour, a, b)
			a.SweepDistant(t.Context())
			nothing(t, f, a, b)
		})
	}
}

// TestSharedUploadAtOnce: of requests that write at once at two processes, none
// undoes what another has been told has come.
func TestSharedUploadAtOnce(t *testing.T) {
	data := random(10, 300_000)
	d := digest.FromBytes(data)
	chunk := func(from, to int) hosted.Body {
		return hosted.Body{Reader: bytes.NewReader(data[from:to]), At: int64(from), Length: int64(to - from)}
	}
	// begun has 100,000 bytes at two processes that know of them.
	begun := func(t *testing.T) (f *far, a, b *host, u, v *hosted.Upload) {
		f, hosts := pair(t)
		a, b = hosts[0], hosts[1]
		u = a.begin("")
		a.append(u, chunk(0, 100_000), 100_000)
		v = b.find(u.ID())
		return f, a, b, u, v
	}
	finish := func(t *testing.T, f *far, h, other *host, u *hosted.Upload) {
		t.Helper()
		if _, err := h.find(u.ID()).Finish(t.Context(), d, chunk(int(u.Offset()), len(data))); err != nil {
			t.Fatal(err)
		}
		other.has("apps/web", d, data)
	}
	// between has something done in front of the next call that begins so.
	between := func(f *far, call string, do func()) {
		f.fails(func(after bool, c string) error {
			if !after && strings.HasPrefix(c, call) {
				f.fails(nil)
				do()
			}
			return nil
		})
	}

	t.Run("while a piece is put", func(t *testing.T) {
		f, a, b, u, v := begun(t)
		between(f, "file", func() { b.append(v, chunk(100_000, 110_000), 110_000) })
		if end, err := u.Append(t.Context(), chunk(100_000, 200_000)); !errors.Is(err, hosted.ErrTaken) || end != 110_000 {
			t.Errorf("the later one: %v, and it ends at %d", err, end)
		}
		finish(t, f, a, b, u)
		late(time.Hour, a, b)
		nothing(t, f, a, b)
	})
	t.Run("before the state", func(t *testing.T) {
		for _, first := range []int{110_000, 200_000, 250_000} {
			f, a, b, u, v := begun(t)
			between(f, "put", func() { b.append(v, chunk(100_000, first), int64(first)) })
			if end, err := u.Append(t.Context(), chunk(100_000, 200_000)); err != nil || end != 200_000 {
				t.Errorf("the later one: %v, and it ends at %d", err, end)
			}
			// Whoever asks now, what was acknowledged has come.
			for _, w := range []*hosted.Upload{v, u} {
				if err := w.Look(t.Context()); err != nil || w.Offset() < int64(max(first, 200_000)) && w == v {
					t.Errorf("after %d it ends at %d: %v", first, w.Offset(), err)
				}
			}
			finish(t, f, a, b, u)
			b.find(u.ID())
		}
	})
	t.Run("after the state", func(t *testing.T) {
		f, a, b, u, v := begun(t)
		ready, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
		between(f, "put", func() {
			close(ready)
			<-goOn
		})
		go func() {
			_, err := v.Append(context.Background(), chunk(100_000, 110_000))
			done <- err
		}()
		<-ready
		f.fails(func(after bool, c string) error {
			if after && strings.HasPrefix(c, "put") {
				f.fails(nil)
				close(goOn)
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			return nil
		})
		if end, err := u.Append(t.Context(), chunk(100_000, 200_000)); !errors.Is(err, hosted.ErrTaken) || end != 110_000 {
			t.Errorf("the one whose state was replaced: %v, and it ends at %d", err, end)
		}
		finish(t, f, a, b, u)
	})
	t.Run("finished meanwhile", func(t *testing.T) {
		f, a, b, u, v := begun(t)
		between(f, "file", func() { finish(t, f, b, a, v) })
		if _, err := u.Append(t.Context(), chunk(100_000, 200_000)); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("one that goes on: %v", err)
		}
		nothing(t, f, a, b)
	})
	t.Run("many", func(t *testing.T) {
		f, a, b, u, _ := begun(t)
		var all sync.WaitGroup
		for i := range 6 {
			h := []*host{a, b}[i%2]
			all.Go(func() {
				for {
					v, err := h.Upload(t.Context(), "apps/web", u.ID())
					if err == nil {
						err = v.Look(t.Context())
					}
					if err != nil {
						t.Error(err)
						return
					}
					at := v.Offset()
					if at == int64(len(data)) {
						return
					}
					n := min(int64(1+i)*5_000, int64(len(data))-at)
					_, err = v.Append(t.Context(), newStuck(data[at:at+n]).body(at, n))
					if err != nil && !errors.Is(err, hosted.ErrTaken) && !errors.Is(err, hosted.ErrOffset) {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		finish(t, f, a, b, u)
	})
}

var errDown = fmt.Errorf("%w: for a while", storage.ErrUnavailable)

// TestSharedUploadUnavailable: whichever call fails, before or after it has had its
// effect, the client is told so, can go on, and gets what it sent.
func TestSharedUploadUnavailable(t *testing.T) {
	data := random(11, 100_000)
	d := digest.FromBytes(data)
	for _, after := range []bool{false, true} {
		var failed atomic.Bool
		failed.Store(true)
		for n := int64(0); failed.Load(); n++ {
			failed.Store(false)
			t.Run(fmt.Sprint(n, after), func(t *testing.T) {
				f, hosts := pair(t)
				var calls atomic.Int64
				f.fails(func(is bool, call string) error {
					if is != after {
						return nil
					}
					if calls.Add(1) == n+1 {
						failed.Store(true)
						return fmt.Errorf("%s: %w", call, errDown)
					}
					return nil
				})
				ok := func(err error) bool {
					t.Helper()
					if err != nil && !errors.Is(err, storage.ErrUnavailable) {
						t.Fatal(err)
					}
					return err == nil
				}
				var u *hosted.Upload
				for u == nil {
					u, _ = hosts[0].Begin(t.Context(), "apps/web", "")
				}
				id, turn, at := u.ID(), 0, int64(0)
				next := func() *hosted.Upload {
					turn++
					for {
						u, err := hosts[turn%2].Upload(t.Context(), "apps/web", id)
						if ok(err) {
							return u
						}
					}
				}
				for at < 80_000 {
					u := next()
					_, err := u.Append(t.Context(), hosted.Body{Reader: bytes.NewReader(data[at : at+20_000]), At: at, Length: 20_000})
					if ok(err) {
						at += 20_000
						continue
					}
					for u = next(); !ok(u.Look(t.Context())); {
					}
					if u.Offset() < at {
						t.Fatalf("it ends at %d, and %d had come", u.Offset(), at)
					}
					at = u.Offset()
				}
				for {
					_, err := next().Finish(t.Context(), d, hosted.Body{Reader: bytes.NewReader(data[at:]), At: at, Length: int64(len(data)) - at})
					if ok(err) {
						break
					}
				}
				for _, h := range hosts {
					h.has("apps/web", d, data)
				}
				f.fails(nil)
				late(time.Hour, hosts[:]...)
				for _, h := range hosts {
					h.SweepDistant(t.Context())
				}
				late(hosted.UploadLife, hosts[:]...)
				hosts[0].SweepDistant(t.Context())
				nothing(t, f, hosts[:]...)
			})
		}
	}
}

// TestSharedUploadStoreFails: an upload survives that its blob could not be stored,
// though the store has taken the file.
func TestSharedUploadStoreFails(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(12, 100_000)
	d := digest.FromBytes(data)
	id := a.begin("").ID()
	a.append(a.find(id), body(data[:90_000]), 90_000)
	a.store.Store = &refusing{Store: a.store.Store}
	for range 2 {
		if _, err := a.find(id).Finish(t.Context(), d, body(data[90_000:])); !errors.Is(err, storage.ErrUnavailable) {
			t.Fatalf("the store is down: %v", err)
		}
		if u := a.find(id); u.Offset() != 90_000 {
			t.Errorf("it ends at %d", u.Offset())
		}
	}
	if _, err := b.find(id).Finish(t.Context(), d, body(data[90_000:])); err != nil {
		t.Fatal(err)
	}
	b.has("apps/web", d, data)
	late(time.Hour, a, b)
	nothing(t, f, a, b)
}

// refusing takes files and cannot store them durably.
type refusing struct{ storage.Store }

func (r *refusing) Sync(context.Context, ...string) error { return errDown }

// TestSharedUploadExpires: what nobody has gone on with for a day is removed by any
// process, whole or not, and nothing earlier.
func TestSharedUploadExpires(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(13, 10_000)
	u := a.begin("")
	a.append(u, body(data), int64(len(data)))
	lost := strings.Repeat("0123456789abcdef", 2)
	if err := f.Store.Put(t.Context(), storage.Uploads+lost+"/0.1", data, storage.Durable); err != nil {
		t.Fatal(err)
	}
	late(hosted.UploadLife-time.Minute, a, b)
	b.SweepDistant(t.Context())
	if left := f.uploads(t); len(left) != 3 {
		t.Errorf("before a day, left are %q", left)
	}
	b.find(u.ID())
	late(hosted.UploadLife+time.Minute, a, b)
	if _, err := f.join(t).Upload(t.Context(), "apps/web", u.ID()); err != nil {
		t.Errorf("by the clock of another it has not expired: %v", err)
	}
	if err := u.Look(t.Context()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after a day: %v", err)
	}
	b.SweepDistant(t.Context())
	nothing(t, f, a, b)
}

// TestSharedUploadQuota: whoever stores a blob has asked for all of it, and who
// gives up what an idle upload takes does not end it.
func TestSharedUploadQuota(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(14, 100_000)
	id := a.begin("").ID()
	a.append(a.find(id), body(data), int64(len(data)))
	b.again(&allowance{limit: 50_000})
	if _, err := b.find(id).Finish(t.Context(), digest.FromBytes(data), hosted.Body{}); !errors.Is(err, storage.ErrFull) {
		t.Errorf("beyond the quota: %v", err)
	}
	late(time.Hour, a)
	a.store.full = func(int64) bool { return len(a.files()) > 0 }
	if !a.Registry.Room(t.Context(), 1) || a.Partial() != 0 {
		t.Errorf("an idle upload makes no room: %d bytes are partial", a.Partial())
	}
	a.store.full = nil
	if _, err := a.find(id).Finish(t.Context(), digest.FromBytes(data), hosted.Body{}); err != nil {
		t.Fatal(err)
	}
	a.has("apps/web", digest.FromBytes(data), data)
	late(time.Hour, b)
	nothing(t, f, a, b)
}
