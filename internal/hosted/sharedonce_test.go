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

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/storage"
)

// TestSharedUploadTakenHere: within a process, requests take an upload over from each
// other as they do where no other process can.
func TestSharedUploadTakenHere(t *testing.T) {
	join := func(t *testing.T) *host { return newFar(t).join(t) }
	takenOver(t, join)
	takenByMany(t, join)
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

// TestSharedUploadUnavailable: whichever call fails, before or after it has had its
// effect, the client is told so, can go on, and gets what it sent.
func TestSharedUploadUnavailable(t *testing.T) {
	data := random(11, 100_000)
	const chunk = 40_000
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
					_, err := u.Append(t.Context(), hosted.Body{Reader: bytes.NewReader(data[at : at+chunk]), At: at, Length: chunk})
					if ok(err) {
						at += chunk
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
