package hosted_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/layout"
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
	// With a body that breaks off the client goes, too.
	ctx, gone := context.WithCancel(t.Context())
	broken := io.MultiReader(bytes.NewReader(data[60_000:70_000]), reader(func([]byte) (int, error) {
		gone()
		return 0, io.ErrUnexpectedEOF
	}))
	if _, err := b.find(id).Append(ctx, hosted.Body{Reader: broken, At: 60_000, Length: 40_000}); !errors.Is(err, hosted.ErrLength) {
		t.Errorf("a body that is cut: %v", err)
	}
	a.append(a.find(id), hosted.Body{Reader: bytes.NewReader(data[70_000:80_000]), At: 70_000, Length: 10_000}, 80_000)
	// What comes with a request to finish has come when it is finished.
	if _, err := b.find(id).Finish(t.Context(), digest.FromBytes(data), cut(data[80_000:90_000], 20_000)); !errors.Is(err, hosted.ErrLength) {
		t.Errorf("an end that is cut: %v", err)
	}
	info, err := os.Stat(b.spool(id))
	if u := b.find(id); err != nil || u.Offset() != 80_000 || b.Partial() != 10_000 || info.Size() != 70_000 {
		t.Errorf("then it ends at %d, %d bytes are partial, and the file ends at %d: %v", u.Offset(), b.Partial(), info.Size(), err)
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
			b := &host{t: t, dir: t.TempDir(), far: f, logs: zap.New(core)}
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

// TestSharedUploadStoreFails: an upload survives that its blob could not be stored,
// though the store has taken the file.
func TestSharedUploadStoreFails(t *testing.T) {
	f, hosts := pair(t)
	a, b := hosts[0], hosts[1]
	data := random(12, 100_000)
	d := digest.FromBytes(data)
	id := a.begin("").ID()
	a.append(a.find(id), body(data[:90_000]), 90_000)
	healthy := a.store.Store
	a.store.Store = &refusing{Store: healthy}
	for range 2 {
		if _, err := a.find(id).Finish(t.Context(), d, body(data[90_000:])); !errors.Is(err, storage.ErrUnavailable) {
			t.Fatalf("the store is down: %v", err)
		}
		if u := a.find(id); u.Offset() != 90_000 {
			t.Errorf("it ends at %d", u.Offset())
		}
	}
	// The blob is there, and nobody has it: what is stored now takes its place.
	if err := f.Store.Delete(t.Context(), layout.Blob(d)); err != nil {
		t.Fatal(err)
	}
	a.store.Store = healthy
	if _, err := a.find(id).Finish(t.Context(), d, body(data[90_000:])); err != nil {
		t.Fatal(err)
	}
	b.has("apps/web", d, data)
	late(time.Hour, a, b)
	nothing(t, f, a, b)
}

var errDown = fmt.Errorf("%w: for a while", storage.ErrUnavailable)

// refusing takes files and cannot store them durably.
type refusing struct{ storage.Store }

func (r *refusing) Sync(context.Context, ...string) error { return errDown }

// TestSharedUploadNoPiece: what cannot be put away has not come, and takes no room.
func TestSharedUploadNoPiece(t *testing.T) {
	f := newFar(t)
	h := f.join(t)
	data := random(15, 100_000)
	u := h.begin("")
	h.append(u, body(data[:40_000]), 40_000)
	in := h.spool(u.ID() + ".piece")
	if err := os.MkdirAll(filepath.Join(in, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if end, err := u.Append(t.Context(), body(data[40_000:])); err == nil || end != 40_000 {
		t.Errorf("there is no place for a piece: %v, and it ends at %d", err, end)
	}
	if err := os.RemoveAll(in); err != nil {
		t.Fatal(err)
	}
	h.store.most.Store(100_000) // for what comes, and not for a piece of it besides
	if end, err := u.Append(t.Context(), body(data[40_000:])); !errors.Is(err, storage.ErrFull) || end != 40_000 {
		t.Errorf("there is no room for a piece: %v, and it ends at %d", err, end)
	}
	if h.store.reserved.Load() != 0 || h.Partial() != 40_000 {
		t.Errorf("%d bytes are set aside, and %d partial", h.store.reserved.Load(), h.Partial())
	}
	h.store.most.Store(0)
	d := digest.FromBytes(data)
	if _, err := u.Finish(t.Context(), d, body(data[40_000:])); err != nil {
		t.Fatal(err)
	}
	h.has("apps/web", d, data)
	nothing(t, f, h)
}

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
	b.again(&allowance{limit: 1 << 20})
	b.store.most.Store(50_000)
	if _, err := b.find(id).Finish(t.Context(), digest.FromBytes(data), hosted.Body{}); !errors.Is(err, storage.ErrFull) {
		t.Errorf("beyond what the store has room for: %v", err)
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

// hanging is a store whose lists hang until nobody waits for them any more.
type hanging struct {
	storage.Store
	dir    string
	listed chan struct{} // gets a value when one begins, and one when it ends
	ends   chan struct{} // ends one
}

func (s *hanging) Distant() storage.Distant     { return &node{far: &far{secret: []byte("of all")}} }
func (s *hanging) Spool(string) (string, error) { return s.dir, nil }

func (s *hanging) List(ctx context.Context, _ string, _ bool) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		s.listed <- struct{}{}
		select {
		case <-s.ends:
		case <-ctx.Done():
			yield(storage.Info{}, ctx.Err())
		}
		s.listed <- struct{}{}
	}
}

// TestSharedUploadsAreSwept: the distant place is looked at again and again, and not
// any more when the registry has been closed.
func TestSharedUploadsAreSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &hanging{dir: t.TempDir(), listed: make(chan struct{}, 2), ends: make(chan struct{})}
		h := hosted.New(hosted.Parts{Store: s, Log: zap.NewNop()})
		for range 3 {
			<-s.listed
			s.ends <- struct{}{}
			<-s.listed
		}
		<-s.listed
		h.Close()
		select {
		case <-s.listed:
		default:
			t.Error("it is closed, and still looks")
		}
		<-time.After(24 * time.Hour)
		if len(s.listed) > 0 {
			t.Error("it has looked again")
		}
	})
}
