package hosted_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

func (h *host) receive() *hosted.Upload {
	h.t.Helper()
	u, err := h.Receive(h.t.Context(), "images/_")
	if err != nil {
		h.t.Fatal(err)
	}
	return u
}

func (h *host) received(id string) *hosted.Upload {
	h.t.Helper()
	u, err := h.Received(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return u
}

// is checks that a file is what was sent.
func is(data []byte) func(fill.File) error {
	return func(f fill.File) error {
		got, err := os.ReadFile(f.Path)
		want := fill.File{Path: f.Path, Size: int64(len(data)), SHA256: digest.SHA256.FromBytes(data), SHA512: digest.SHA512.FromBytes(data)}
		switch {
		case err != nil:
			return err
		case f != want:
			return fmt.Errorf("%+v, want %+v", f, want)
		case string(got) != string(data):
			return errors.New("the file has other bytes")
		}
		return nil
	}
}

// What is received is kept on this machine, also where other uploads are shared, and
// goes on in later processes with both digests.
func TestReceiveSurvives(t *testing.T) {
	for name, newHost := range map[string]func(*testing.T) *host{
		"alone":        newHost,
		"hashed later": newHost,
		"shared":       func(t *testing.T) *host { return newFar(t).join(t) },
	} {
		for _, size := range []int{0, 1, 3 << 20} {
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				h, data := newHost(t), random(31, size)
				first := h.receive()
				if name == "hashed later" {
					first.HashLater()
				}
				id := first.ID()
				if h.far != nil {
					if in := h.far.uploads(t); len(in) > 0 {
						t.Fatalf("in the bucket: %q", in)
					}
				}
				half := int64(size / 2)
				h.append(h.received(id), body(data[:half]), half)
				h.restart()
				u := h.received(id)
				if u.Offset() != half {
					t.Fatalf("it ends at %d, want %d", u.Offset(), half)
				}
				if left := time.Until(u.Expires()); left > hosted.UploadLife || left < hosted.UploadLife-time.Hour {
					t.Errorf("it is kept for %v", left)
				}
				h.append(u, streamed(strings.NewReader(string(data[half:]))), int64(size))
				h.restart()
				file, err := h.received(id).Keep(t.Context(), "images/one", is(data))
				if err != nil {
					t.Fatal(err)
				}
				if file.Path != "" || file.Size != int64(size) || file.SHA512 != digest.SHA512.FromBytes(data) {
					t.Errorf("it says %+v", file)
				}
				h.has("images/one", file.SHA256, data)
				if left := h.files(); len(left) > 0 || h.Partial() != 0 || h.store.reserved.Load() != 0 {
					t.Errorf("left: %q, %d partial, %d reserved", left, h.Partial(), h.store.reserved.Load())
				}
				if _, err := h.Received(t.Context(), id); !errors.Is(err, hosted.ErrNoUpload) {
					t.Errorf("one that is kept: %v", err)
				}
			})
		}
	}
}

// TestHashLater: nobody knows what bytes were that are not hashed yet, once the machine
// has stopped; and the hashes of a Keep that has failed are those of the next.
func TestHashLater(t *testing.T) {
	for _, same := range []bool{true, false} {
		h, data := newHost(t), random(33, 3<<20)
		u := h.receive()
		u.HashLater()
		h.append(u, body(data), int64(len(data)))
		h.stop()
		if !same {
			name := h.spool(u.ID() + ".state")
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			edited := strings.Replace(string(text[9:]), `"boot":"`, `"boot":"another`, 1)
			os.WriteFile(name, fmt.Appendf(nil, "%08x %s", crc32.Checksum([]byte(edited), crc32.MakeTable(crc32.Castagnoli)), edited), 0o600)
		}
		h.start()
		again := errors.New("not now")
		_, err := h.received(u.ID()).Keep(t.Context(), "images/one", func(fill.File) error { return again })
		if !same {
			if left := h.files(); !errors.Is(err, hosted.ErrNoUpload) || len(left) > 0 {
				t.Errorf("another boot: %v; left: %q", err, left)
			}
			continue
		}
		if !errors.Is(err, again) {
			t.Fatal(err)
		}
		file, err := h.received(u.ID()).Keep(t.Context(), "images/one", is(data))
		if err != nil {
			t.Fatal(err)
		}
		h.has("images/one", file.SHA256, data)
	}
}

// A client's upload cannot be kept, and a client does not find what is received.
func TestReceiveIsApart(t *testing.T) {
	h := newHost(t)
	for range 2 {
		received, pushed := h.receive(), h.begin("")
		if _, err := h.Upload(t.Context(), "images/_", received.ID()); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("a client finds what is received: %v", err)
		}
		if _, err := h.Received(t.Context(), pushed.ID()); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("a client's upload is taken for received: %v", err)
		}
		if _, err := h.Received(t.Context(), "../"+received.ID()); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("a strange name: %v", err)
		}
		if _, err := pushed.Keep(t.Context(), "images/one", func(fill.File) error { return nil }); err == nil {
			t.Error("a client's upload was kept")
		}
		h.restart()
	}
}

// What is refused is gone; what could not be judged, or had no room, stays.
func TestReceiveRefused(t *testing.T) {
	h, a := newHost(t), &allowance{limit: 10 << 20}
	h.again(a)
	data := random(32, 1<<20)
	u := h.receive()
	h.append(u, body(data), 1<<20)
	down := errors.New("the probe is down")
	for range 2 {
		if _, err := u.Keep(t.Context(), "images/one", func(fill.File) error { return down }); !errors.Is(err, down) {
			t.Fatalf("want %v: %v", down, err)
		}
		a = &allowance{limit: 10 << 20} // the next process knows of nothing that was granted
		h.again(a)
		u = h.received(u.ID())
	}
	a.limit = 1<<20 - 1
	checked := false
	_, err := u.Keep(t.Context(), "images/one", func(fill.File) error { checked = true; return nil })
	if !errors.Is(err, storage.ErrFull) || checked {
		t.Fatalf("beyond the quota: %v, checked: %v", err, checked)
	}
	a.limit = 10 << 20
	refused := func(f fill.File) error { return fmt.Errorf("%w: it is HTML", hosted.ErrRefused) }
	if _, err := u.Keep(t.Context(), "images/one", refused); !errors.Is(err, hosted.ErrRefused) {
		t.Fatalf("want refused: %v", err)
	}
	if _, err := h.Received(t.Context(), u.ID()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("one that is refused: %v", err)
	}
	if left := h.files(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	a.is(t, 0, 0)
	if _, ok, err := h.tree.Member(t.Context(), "images/one", digest.FromBytes(data)); ok || err != nil {
		t.Errorf("it was stored: %v", err)
	}
}

// What has come counts where it goes: the quota of that repository is asked, unless it
// is the same.
func TestReceiveMoves(t *testing.T) {
	pattern, err := oci.ParsePattern("images/**")
	if err != nil {
		t.Fatal(err)
	}
	for _, together := range []bool{false, true} {
		h, data := newHost(t), random(37, 1000)
		out := map[string]int64{}
		h.Registry.Close()
		h.Registry = hosted.New(hosted.Parts{Store: h.store, Tree: h.tree, Log: h.logger(), Quota: func(_ context.Context, repository string, n int64) (func(), error) {
			if repository == "images/full" {
				return nil, storage.ErrFull
			}
			out[repository] += n
			return func() { out[repository] -= n }, nil
		}})
		if together {
			h.Set(hosted.Settings{Options: []hosted.Options{{Pattern: pattern}}})
		}
		u := h.receive()
		h.append(u, body(data), 1000)
		_, err := u.Keep(t.Context(), "images/one", func(fill.File) error {
			if a, b := out["images/_"], out["images/one"]; a+b != 1000 || (a == 1000) != together {
				t.Errorf("together: %v; granted are %v", together, out)
			}
			return errors.New("the probe is down")
		})
		if err == nil || out["images/_"]+out["images/one"] != 1000 {
			t.Errorf("together: %v; granted are %v: %v", together, out, err)
		}
		if _, err := u.Keep(t.Context(), "images/full", is(data)); errors.Is(err, storage.ErrFull) == together {
			t.Errorf("together: %v; a full one: %v", together, err)
		}
	}
}

// Two who keep one upload: the second finds none. Nobody writes during the check.
func TestReceiveKeptTwice(t *testing.T) {
	h, data := newHost(t), random(33, 100_000)
	u := h.receive()
	h.append(u, body(data), 100_000)
	second, written := make(chan error, 1), make(chan error, 1)
	_, err := u.Keep(t.Context(), "images/one", func(f fill.File) error {
		soon, cancel := context.WithCancel(t.Context())
		cancel()
		go func() {
			_, err := u.Append(soon, body(data))
			written <- err
		}()
		if err := <-written; !errors.Is(err, context.Canceled) {
			t.Errorf("somebody wrote while it was checked: %v", err)
		}
		go func() {
			_, err := u.Keep(t.Context(), "images/two", func(fill.File) error { return nil })
			second <- err
		}()
		return is(data)(f)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-second; !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("want no such upload: %v", err)
	}
	h.has("images/one", digest.FromBytes(data), data)
}

// What is received expires as any upload does, and is as large as a blob may be.
func TestReceiveBounds(t *testing.T) {
	h := newHost(t)
	h.Set(hosted.Settings{MaxBlob: 1000})
	u := h.receive()
	if _, err := u.Append(t.Context(), body(random(34, 1001))); !errors.Is(err, hosted.ErrTooLarge) {
		t.Errorf("more than max_blob_size: %v", err)
	}
	h.append(u, body(random(34, 1000)), 1000)
	late(hosted.UploadLife-time.Minute, h)
	h.Sweep()
	h.received(u.ID())
	late(hosted.UploadLife+time.Minute, h)
	h.Sweep()
	if _, err := h.Received(t.Context(), u.ID()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after a day: %v", err)
	}
	if left := h.files(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// Where the bytes are stored and only their link is not, the next Keep links them,
// and does not check what has left its file.
func TestReceiveUnavailable(t *testing.T) {
	h, data := newHost(t), random(35, 200_000)
	u := h.receive()
	h.append(u, body(data), 200_000)
	healthy := h.store.Store
	h.store.Store = &unlinking{healthy}
	if _, err := u.Keep(t.Context(), "images/one", is(data)); !errors.Is(err, storage.ErrUnavailable) {
		t.Fatalf("the store is down: %v", err)
	}
	h.store.Store = healthy
	file, err := h.received(u.ID()).Keep(t.Context(), "images/one", func(fill.File) error {
		t.Error("it was checked again")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	h.has("images/one", file.SHA256, data)
}

// unlinking takes files, and no links to them.
type unlinking struct{ storage.Store }

func (u *unlinking) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	if strings.Contains(key, "/_layers/") {
		return errDown
	}
	return u.Store.Put(ctx, key, data, d)
}

const receiveDir, receivePoint, receiveUpload = "HOSTED_TEST_RECEIVE", "HOSTED_TEST_RECEIVE_POINT", "HOSTED_TEST_RECEIVE_ID"

// TestReceiveKilled is the process that TestReceiveKill starts, which dies.
func TestReceiveKilled(t *testing.T) {
	dir, point := os.Getenv(receiveDir), os.Getenv(receivePoint)
	if dir == "" {
		return
	}
	h := &host{t: t, dir: dir}
	h.start()
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	u := h.received(os.Getenv(receiveUpload))
	h.append(u, body(killed[40_000:]), int64(len(killed)))
	_, err := u.Keep(t.Context(), "images/one", is(killed))
	t.Fatalf("%s was not reached: %v", point, err)
}

// TestReceiveKill: a process that dies loses nothing that was acknowledged, until the
// blob has taken the file.
func TestReceiveKill(t *testing.T) {
	for point, end := range map[string]int{ // where the upload ends then; -1: there is none
		"upload.written":  40_000,
		"upload.state":    len(killed),
		"receive.checked": len(killed),
		"push.stored":     -1,
		"push.synced":     -1,
	} {
		t.Run(point, func(t *testing.T) {
			h := &host{t: t, dir: filepath.Join(t.TempDir(), "store")}
			h.start()
			id := h.receive().ID()
			h.append(h.received(id), body(killed[:40_000]), 40_000)
			h.stop()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestReceiveKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), receiveDir+"="+h.dir, receivePoint+"="+point, receiveUpload+"="+id)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			h.start()
			defer h.stop()
			u, err := h.Received(t.Context(), id)
			if end < 0 {
				if !errors.Is(err, hosted.ErrNoUpload) {
					t.Fatalf("want no such upload: %v", err)
				}
				return
			}
			if err != nil || u.Offset() != int64(end) {
				t.Fatalf("it ends at %d, want %d: %v", u.Offset(), end, err)
			}
			h.append(u, body(killed[end:]), int64(len(killed)))
			file, err := u.Keep(t.Context(), "images/one", is(killed))
			if err != nil {
				t.Fatal(err)
			}
			h.has("images/one", file.SHA256, killed)
		})
	}
}

// What a closed repository refuses to clients its owner may.
func TestClosedToPush(t *testing.T) {
	h := newHost(t)
	begun := h.begin("")
	data := random(36, 1000)
	d := digest.FromBytes(data)
	if _, err := h.Push(t.Context(), "other", d, body(data)); err != nil {
		t.Fatal(err)
	}
	pattern, err := oci.ParsePattern("apps/**")
	if err != nil {
		t.Fatal(err)
	}
	h.Set(hosted.Settings{Options: []hosted.Options{{Pattern: pattern, Closed: "images are made by their own API"}}})
	manifest := hosted.Push{Repository: "apps/web", Tags: []string{"v1"}, Body: []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)}
	md := digest.FromBytes(manifest.Body)
	owner := h.Owner()
	if _, err := owner.PutManifest(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func() error{
		"begin":  func() error { _, err := h.Begin(t.Context(), "apps/web", ""); return err },
		"go on":  func() error { _, err := h.Upload(t.Context(), "apps/web", begun.ID()); return err },
		"push":   func() error { _, err := h.Push(t.Context(), "apps/web", d, body(data)); return err },
		"mount":  func() error { _, err := h.Mount(t.Context(), "apps/web", "other", d); return err },
		"tag":    func() error { _, err := h.PutManifest(t.Context(), manifest); return err },
		"untag":  func() error { _, err := h.DeleteTag(t.Context(), "apps/web", "v1"); return err },
		"delete": func() error { _, err := h.DeleteManifest(t.Context(), "apps/web", md); return err },
		"blob":   func() error { return h.DeleteBlob(t.Context(), "apps/web", d) },
	} {
		if err := change(); !errors.Is(err, hosted.ErrClosedToPush) || !strings.Contains(fmt.Sprint(err), "images are made by their own API") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if was, err := h.tree.Tag(t.Context(), "apps/web", "v1"); err != nil || was != md {
		t.Errorf("the tag means %s: %v", was, err)
	}
	if _, err := h.Mount(t.Context(), "third", "other", d); err != nil {
		t.Errorf("another repository: %v", err)
	}
	if _, err := owner.DeleteTag(t.Context(), "apps/web", "v1"); err != nil {
		t.Error(err)
	}
	if _, err := owner.DeleteManifest(t.Context(), "apps/web", md); err != nil {
		t.Error(err)
	}
	u := h.receive()
	h.append(u, body(data), 1000)
	if _, err := u.Keep(t.Context(), "apps/web", is(data)); err != nil {
		t.Error(err)
	}
}
