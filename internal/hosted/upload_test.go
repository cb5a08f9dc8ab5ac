package hosted_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a registry on a store, with what it has set aside.
type host struct {
	*hosted.Registry
	t     testing.TB
	tree  *tree.Tree
	store *counted
	dir   string
	open  bool
	room  func(int64) bool // makes room; nil: nobody does
	far   *far             // where its values are; nil: in dir
	logs  *zap.Logger      // nil: nothing is logged
}

// counted is a store that knows what is set aside, and may take no more.
type counted struct {
	storage.Store
	most     atomic.Int64 // 0: as much as the disk has
	reserved atomic.Int64
	asked    atomic.Int64       // calls
	full     func(n int64) bool // says that there is no room; nil: there is
}

func (c *counted) Reserve(n int64) (storage.Reservation, error) {
	c.asked.Add(1)
	if most := c.most.Load(); most > 0 && c.reserved.Load()+n > most || c.full != nil && c.full(n) {
		return nil, storage.ErrFull
	}
	r, err := c.Store.Reserve(n)
	if err != nil {
		return nil, err
	}
	c.reserved.Add(n)
	return &counting{Reservation: r, store: c, n: n}, nil
}

type counting struct {
	storage.Reservation
	store *counted
	n     int64
}

func (c *counting) Release() {
	c.Reservation.Release()
	c.store.reserved.Add(-c.n)
	c.n = 0
}

func newHost(t *testing.T) *host {
	h := &host{t: t, dir: t.TempDir()}
	h.start()
	t.Cleanup(h.stop)
	return h
}

func (h *host) start() {
	h.t.Helper()
	h.store = &counted{Store: h.near()}
	h.tree = tree.New(h.store, nil)
	h.Registry = hosted.New(hosted.Parts{Store: h.store, Tree: h.tree, Log: h.logger(), Room: func(_ context.Context, n int64) bool {
		return h.room != nil && h.room(n)
	}})
	h.open = true
}

func (h *host) stop() {
	if h.open {
		h.open = false
		h.Registry.Close()
		h.tree.Close()
		h.store.Close()
	}
}

func (h *host) restart() {
	h.t.Helper()
	h.stop()
	h.start()
}

// files are what uploads have in the store.
func (h *host) files() []string {
	names, _ := filepath.Glob(filepath.Join(h.dir, "mirror/spool/uploads/*"))
	return names
}

func (h *host) spool(name string) string { return filepath.Join(h.dir, "mirror/spool/uploads", name) }

func (h *host) begin(algorithm digest.Algorithm) *hosted.Upload {
	h.t.Helper()
	u, err := h.Begin(h.t.Context(), "apps/web", algorithm)
	if err != nil {
		h.t.Fatal(err)
	}
	return u
}

func (h *host) find(id string) *hosted.Upload {
	h.t.Helper()
	u, err := h.Upload(h.t.Context(), "apps/web", id)
	if err != nil {
		h.t.Fatal(err)
	}
	return u
}

// has checks that a repository has a blob, and its bytes.
func (h *host) has(repository string, d digest.Digest, want []byte) {
	h.t.Helper()
	m, ok, err := h.tree.Member(h.t.Context(), repository, d)
	if !ok || err != nil {
		h.t.Fatalf("%s does not have %s: %v", repository, d, err)
	}
	r, _, err := h.tree.OpenBlob(h.t.Context(), m.Canonical)
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
		h.t.Fatalf("%d bytes of %s are not those uploaded: %v", len(got), d, err)
	}
}

func random(seed uint64, n int) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(data)
	return data
}

func body(data []byte) hosted.Body {
	return hosted.Body{Reader: bytes.NewReader(data), At: -1, Length: int64(len(data))}
}

// streamed is a body of which nobody knows how long it is.
func streamed(r io.Reader) hosted.Body { return hosted.Body{Reader: r, At: -1, Length: -1} }

// cut is a body that ends early.
func cut(data []byte, length int) hosted.Body {
	return hosted.Body{Reader: io.MultiReader(bytes.NewReader(data), failing{io.ErrUnexpectedEOF}), At: -1, Length: int64(length)}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func (h *host) append(u *hosted.Upload, b hosted.Body, want int64) {
	h.t.Helper()
	if end, err := u.Append(h.t.Context(), b); err != nil || end != want || u.Offset() != want {
		h.t.Fatalf("it ends at %d, want %d: %v", end, want, err)
	}
}

// TestUploadSurvives: an upload goes on in later processes, whatever digest it
// is to have, and nothing is left of it when it is finished.
func TestUploadSurvives(t *testing.T) {
	data := random(1, 5<<20)
	for _, c := range []struct{ hint, asked digest.Algorithm }{
		{"", digest.SHA256}, {digest.SHA256, digest.SHA256}, {digest.SHA512, digest.SHA512}, {"", digest.SHA512}, {digest.SHA384, digest.SHA384}, {digest.SHA512, digest.SHA256},
	} {
		t.Run(fmt.Sprintf("%s for %s", c.hint, c.asked), func(t *testing.T) {
			h := newHost(t)
			id := h.begin(c.hint).ID()
			offset := int64(0)
			for _, n := range []int64{0, 1, 100_000, 1 << 20, 2 << 20} {
				h.restart()
				u := h.find(id)
				if u.Offset() != offset {
					t.Fatalf("it ends at %d, want %d", u.Offset(), offset)
				}
				if h.Partial() != offset {
					t.Fatalf("%d bytes are partial, want %d", h.Partial(), offset)
				}
				h.append(u, body(data[offset:offset+n]), offset+n)
				offset += n
			}
			h.restart()
			d := c.asked.FromBytes(data)
			size, err := h.find(id).Finish(t.Context(), d, body(data[offset:]))
			if err != nil || size != int64(len(data)) {
				t.Fatal(size, err)
			}
			h.has("apps/web", d, data)
			h.has("apps/web", digest.FromBytes(data), data)
			if left := h.files(); len(left) > 0 || h.Partial() != 0 || h.store.reserved.Load() != 0 {
				t.Errorf("left: %q, %d partial, %d reserved", left, h.Partial(), h.store.reserved.Load())
			}
			if _, err := h.Upload(t.Context(), "apps/web", id); !errors.Is(err, hosted.ErrNoUpload) {
				t.Errorf("a finished upload: %v", err)
			}
		})
	}
}

// TestUploadDamaged: what an earlier process has left is gone on with only as far
// as it can be relied on.
func TestUploadDamaged(t *testing.T) {
	data := random(2, 200_000)
	const came = 150_000
	state := func(change func([]byte) []byte) func(h *host, id string) {
		return func(h *host, id string) {
			name := h.spool(id + ".state")
			text, err := os.ReadFile(name)
			if err == nil {
				err = os.WriteFile(name, change(text), 0o600)
			}
			if err != nil {
				h.t.Fatal(err)
			}
		}
	}
	// edit changes the state and its checksum.
	edit := func(from, to string) func(h *host, id string) {
		return state(func(text []byte) []byte {
			edited := strings.Replace(string(text[9:]), from, to, 1)
			if edited == string(text[9:]) {
				t.Fatalf("there is no %s in %s", from, text)
			}
			return fmt.Appendf(nil, "%08x %s", crc32.Checksum([]byte(edited), crc32.MakeTable(crc32.Castagnoli)), edited)
		})
	}
	flip := func(h *host, id string) {
		bytes, err := os.ReadFile(h.spool(id))
		if err != nil {
			h.t.Fatal(err)
		}
		bytes[came/2] ^= 1
		os.WriteFile(h.spool(id), bytes, 0o600)
	}
	otherBoot := edit(`"boot":"`, `"boot":"another`)
	for name, c := range map[string]struct {
		do   func(h *host, id string)
		gone bool
	}{
		"nothing":         {do: func(*host, string) {}},
		"more came":       {do: func(h *host, id string) { appendTo(h.t, h.spool(id), data[came:came+10_000]) }},
		"too much came":   {do: func(h *host, id string) { appendTo(h.t, h.spool(id), make([]byte, 100_000)) }},
		"other came":      {do: func(h *host, id string) { appendTo(h.t, h.spool(id), []byte("rubbish")) }},
		"half a state":    {do: func(h *host, id string) { os.WriteFile(h.spool(id+".state.new"), []byte("0123"), 0o600) }},
		"another boot":    {do: otherBoot},
		"lost with power": {do: func(h *host, id string) { otherBoot(h, id); flip(h, id) }, gone: true},
		"short":           {do: func(h *host, id string) { os.Truncate(h.spool(id), came-1) }, gone: true},
		"no data":         {do: func(h *host, id string) { os.Remove(h.spool(id)) }, gone: true},
		"no state":        {do: func(h *host, id string) { os.Remove(h.spool(id + ".state")) }, gone: true},
		"empty state":     {do: state(func([]byte) []byte { return nil }), gone: true},
		"torn state":      {do: state(func(b []byte) []byte { return b[:len(b)/2] }), gone: true},
		"spoilt state":    {do: state(func(b []byte) []byte { b[len(b)/2] ^= 1; return b }), gone: true},
		"newer state":     {do: edit(`"schema":1`, `"schema":2`), gone: true},
		"no hash":         {do: edit(`"sha256":"`, `"sha256":"AAAA`), gone: true},
		"odd algorithm":   {do: edit(`"offset"`, `"algorithm":"md5","offset"`), gone: true},
		"other name":      {do: edit(`apps/web`, `apps/wob`), gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			u := h.begin("")
			h.append(u, body(data[:came]), came)
			h.stop()
			c.do(h, u.ID())
			h.start()
			later, err := h.Upload(t.Context(), "apps/web", u.ID())
			if err == nil {
				_, err = later.Append(t.Context(), hosted.Body{Reader: bytes.NewReader(data[came : came+1]), At: came, Length: 1})
			}
			if c.gone {
				if !errors.Is(err, hosted.ErrNoUpload) {
					t.Errorf("want no such upload: %v", err)
				}
				if left := h.files(); len(left) > 0 && name != "other name" {
					t.Errorf("left: %q", left)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			d := digest.FromBytes(data)
			if _, err := later.Finish(t.Context(), d, body(data[came+1:])); err != nil {
				t.Fatal(err)
			}
			h.has("apps/web", d, data)
			if left := h.files(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

func appendTo(t testing.TB, name string, data []byte) {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Write(data)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestUploadRules: what is refused, and that nothing of it is stored.
func TestUploadRules(t *testing.T) {
	h := newHost(t)
	data := random(3, 100_000)
	d := digest.FromBytes(data)
	u := h.begin("")
	h.append(u, body(data[:60_000]), 60_000)
	h.Set(hosted.Settings{MaxBlob: 100_000})

	read := false
	watched := func(at, length int64) hosted.Body {
		return hosted.Body{Reader: reader(func(p []byte) (int, error) { read = true; return 0, io.EOF }), At: at, Length: length}
	}
	for name, c := range map[string]struct {
		body hosted.Body
		want error
	}{
		"too early": {watched(59_999, 10), hosted.ErrOffset},
		"too late":  {watched(60_001, 10), hosted.ErrOffset},
		"too large": {watched(60_000, 40_001), hosted.ErrTooLarge},
	} {
		if end, err := u.Append(t.Context(), c.body); !errors.Is(err, c.want) || end != 60_000 {
			t.Errorf("%s: %v, and it ends at %d", name, err, end)
		}
		if _, err := u.Finish(t.Context(), d, c.body); !errors.Is(err, c.want) {
			t.Errorf("%s to finish: %v", name, err)
		}
	}
	if read {
		t.Error("a body that is refused was read")
	}
	if _, err := u.Append(t.Context(), cut(data[60_000:70_000], 20_000)); !errors.Is(err, hosted.ErrLength) || u.Offset() != 70_000 {
		t.Errorf("a short body: %v, and it ends at %d", err, u.Offset())
	}
	long := hosted.Body{Reader: bytes.NewReader(data[70_000:90_000]), At: 70_000, Length: 10_000}
	if _, err := u.Append(t.Context(), long); !errors.Is(err, hosted.ErrLength) || u.Offset() != 80_000 {
		t.Errorf("a long body: %v, and it ends at %d", err, u.Offset())
	}
	if _, err := u.Append(t.Context(), streamed(bytes.NewReader(make([]byte, 20_001)))); !errors.Is(err, hosted.ErrTooLarge) {
		t.Errorf("a stream that is too large: %v", err)
	}

	if _, err := h.Upload(t.Context(), "apps/other", u.ID()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("another repository's upload: %v", err)
	}
	for _, id := range []string{"", "x", "../" + u.ID()[3:], u.ID() + "0", strings.ToUpper(u.ID()), "../../../../etc/passwd", u.ID()[:31] + "/"} {
		if _, err := h.Upload(t.Context(), "apps/web", id); !errors.Is(err, hosted.ErrNoUpload) {
			t.Errorf("%q: %v", id, err)
		}
	}

	u = h.begin("")
	if _, err := u.Finish(t.Context(), d, body(data[1:])); !errors.Is(err, hosted.ErrDigest) {
		t.Errorf("wrong bytes: %v", err)
	}
	if _, err := h.Push(t.Context(), "apps/web", d, body(data[1:])); !errors.Is(err, hosted.ErrDigest) {
		t.Errorf("wrong bytes at once: %v", err)
	}
	if _, err := u.Append(t.Context(), body(data)); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after wrong bytes: %v", err)
	}
	if _, ok, _ := h.tree.Member(t.Context(), "apps/web", d); ok {
		t.Error("wrong bytes are linked")
	}
	if _, err := h.tree.StatBlob(t.Context(), digest.FromBytes(data[1:])); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("wrong bytes are stored: %v", err)
	}
	if _, err := h.Begin(t.Context(), "apps/web", "md5"); !errors.Is(err, hosted.ErrAlgorithm) {
		t.Errorf("md5: %v", err)
	}
	for _, empty := range []hosted.Body{{}, body(nil), streamed(bytes.NewReader(nil))} {
		if size, err := h.begin("").Finish(t.Context(), digest.FromBytes(nil), empty); err != nil || size != 0 {
			t.Errorf("an empty blob: %d, %v", size, err)
		}
		h.has("apps/web", digest.FromBytes(nil), nil)
	}
	if size, err := h.Push(t.Context(), "apps/web", digest.SHA512.FromBytes(nil), body(nil)); err != nil || size != 0 {
		t.Errorf("an empty blob at once: %d, %v", size, err)
	}
}

type reader func([]byte) (int, error)

func (r reader) Read(p []byte) (int, error) { return r(p) }

// TestUploadExpires: an upload is gone a day after its last byte, in this process
// and in a later one, and not before.
func TestUploadExpires(t *testing.T) {
	h := newHost(t)
	now := time.Now()
	clock := func() time.Time { return now }
	h.At(clock)
	old := h.begin("")
	h.append(old, body([]byte("abc")), 3)
	busy := h.begin("")
	now = now.Add(hosted.UploadLife - time.Minute)
	h.append(busy, body([]byte("abcd")), 4)
	h.Sweep()
	h.find(old.ID())
	now = now.Add(time.Minute)
	h.Sweep()
	if _, err := h.Upload(t.Context(), "apps/web", old.ID()); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("after a day: %v", err)
	}
	if _, err := old.Append(t.Context(), body([]byte("d"))); !errors.Is(err, hosted.ErrNoUpload) {
		t.Errorf("one that has expired grows: %v", err)
	}
	h.find(busy.ID())
	if h.Partial() != 4 {
		t.Errorf("%d bytes are partial", h.Partial())
	}
	h.stop()
	for _, suffix := range []string{"", ".state"} {
		yesterday := time.Now().Add(-hosted.UploadLife)
		if err := os.Chtimes(h.spool(busy.ID()+suffix), yesterday, yesterday); err != nil {
			t.Fatal(err)
		}
	}
	h.start()
	if left := h.files(); len(left) > 0 || h.Partial() != 0 {
		t.Errorf("left: %q, %d partial", left, h.Partial())
	}
}

// stuck is a body of which no more comes until somebody interrupts it.
type stuck struct {
	data    *bytes.Reader
	waiting chan struct{} // closed when it has given what it has
	over    chan struct{}
	once    sync.Once
	end     sync.Once
}

func newStuck(data []byte) *stuck {
	return &stuck{data: bytes.NewReader(data), waiting: make(chan struct{}), over: make(chan struct{})}
}

func (s *stuck) Read(p []byte) (int, error) {
	if n, _ := s.data.Read(p); n > 0 {
		return n, nil
	}
	s.once.Do(func() { close(s.waiting) })
	<-s.over
	return 0, os.ErrDeadlineExceeded
}

func (s *stuck) interrupt() { s.end.Do(func() { close(s.over) }) }

func (s *stuck) body(at, length int64) hosted.Body {
	return hosted.Body{Reader: s, At: at, Length: length, Interrupt: s.interrupt}
}

// TestUploadTakenOver: a client that has lost its connection goes on though the
// first one is still being read.
func TestUploadTakenOver(t *testing.T) { takenOver(t, newHost) }

func takenOver(t *testing.T, newHost func(*testing.T) *host) {
	for _, came := range []int{0, 1, 70_000, 1_000_000, 2_500_000} {
		t.Run(fmt.Sprint(came), func(t *testing.T) {
			h := newHost(t)
			data := random(4, 3<<20)
			d := digest.FromBytes(data)
			u := h.begin("")
			first := newStuck(data[:came])
			ended := make(chan error, 1)
			go func() {
				_, err := u.Append(context.Background(), first.body(0, int64(len(data))))
				ended <- err
			}()
			<-first.waiting
			// It begins where the client believes, and that is not known yet.
			end, err := u.Append(t.Context(), hosted.Body{Reader: strings.NewReader(""), At: -1, Length: 0})
			if err != nil || end != int64(came) {
				t.Fatalf("it ends at %d: %v", end, err)
			}
			if err := <-ended; !errors.Is(err, hosted.ErrTaken) {
				t.Errorf("the one before: %v", err)
			}
			if _, err := h.find(u.ID()).Finish(t.Context(), d, body(data[came:])); err != nil {
				t.Fatal(err)
			}
			h.has("apps/web", d, data)
		})
	}
}

// TestUploadTakenByMany: of many that write at once each finds the bytes of those
// before it whole, and the blob is right in the end.
func TestUploadTakenByMany(t *testing.T) { takenByMany(t, newHost) }

func takenByMany(t *testing.T, newHost func(*testing.T) *host) {
	h := newHost(t)
	data := random(5, 1<<20)
	u := h.begin("")
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for {
				offset := u.Offset()
				if offset == int64(len(data)) {
					return
				}
				n := min(int64(1+i)*7_000, int64(len(data))-offset)
				s := newStuck(data[offset : offset+n])
				_, err := u.Append(t.Context(), s.body(offset, int64(len(data))-offset))
				if err != nil && !errors.Is(err, hosted.ErrTaken) && !errors.Is(err, hosted.ErrOffset) {
					t.Error(err)
					return
				}
			}
		})
		all.Go(func() {
			for u.Offset() < int64(len(data)) {
				if _, err := u.Append(t.Context(), body(nil)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	d := digest.FromBytes(data)
	if _, err := u.Finish(t.Context(), d, hosted.Body{}); err != nil {
		t.Fatal(err)
	}
	h.has("apps/web", d, data)
}

// TestUploadBudget: what is announced is set aside before it is read, and what is
// not in steps; what has come counts.
func TestUploadBudget(t *testing.T) {
	h := newHost(t)
	u := h.begin("")
	h.store.most.Store(1 << 20)
	read := false
	announced := hosted.Body{Reader: reader(func([]byte) (int, error) { read = true; return 0, io.EOF }), At: -1, Length: 1<<20 + 1}
	if _, err := u.Append(t.Context(), announced); !errors.Is(err, storage.ErrFull) || read {
		t.Errorf("more than there is room for: %v, read %v", err, read)
	}
	asked := int64(0)
	h.room = func(n int64) bool {
		asked = n
		h.store.most.Store(2 << 20)
		return true
	}
	s := newStuck(random(6, 100_000))
	ended := make(chan error, 1)
	go func() {
		_, err := u.Append(context.Background(), s.body(0, 1<<20+1))
		ended <- err
	}()
	<-s.waiting
	if asked != 1<<20+1 {
		t.Errorf("room for %d bytes was asked for", asked)
	}
	if got := h.store.reserved.Load(); got != 1<<20+1 || h.Partial() != 0 {
		t.Errorf("meanwhile %d bytes are set aside, and %d partial", got, h.Partial())
	}
	s.interrupt()
	if err := <-ended; err == nil {
		t.Error("it was not cut")
	}
	if got := h.store.reserved.Load(); got != 0 || h.Partial() != 100_000 {
		t.Errorf("afterwards %d bytes are set aside, and %d partial", got, h.Partial())
	}

	// A stream gets as much as there is.
	h.room = nil
	h.store.most.Store(10 << 20)
	if _, err := u.Append(t.Context(), streamed(io.LimitReader(zeros{}, 30<<20))); !errors.Is(err, storage.ErrFull) {
		t.Errorf("a stream beyond what there is room for: %v", err)
	}
	if end := u.Offset(); end < 4<<20 || end > 11<<20 || h.Partial() != end {
		t.Errorf("%d bytes of it came, and %d are partial", end, h.Partial())
	}
	h.store.most.Store(0)
	before := u.Offset()
	h.append(u, streamed(io.LimitReader(zeros{}, 5<<20)), before+5<<20)
	if err := u.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := h.files(); len(left) > 0 || h.Partial() != 0 || h.store.reserved.Load() != 0 {
		t.Errorf("left: %q, %d partial, %d reserved", left, h.Partial(), h.store.reserved.Load())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestUploadDiskFull: a disk without room is told of as such, and the upload can
// be gone on with once there is some.
func TestUploadDiskFull(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Log("there is no device that is always full here")
		return
	}
	h := newHost(t)
	data := random(7, 2<<20)
	u := h.begin("")
	if err := os.Symlink("/dev/full", h.spool(u.ID())); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(t.Context(), body(data)); !errors.Is(err, storage.ErrFull) || u.Offset() != 0 {
		t.Fatalf("a full disk: %v, and it ends at %d", err, u.Offset())
	}
	if err := os.Remove(h.spool(u.ID())); err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(data)
	if _, err := u.Finish(t.Context(), d, body(data)); err != nil {
		t.Fatal(err)
	}
	h.has("apps/web", d, data)
}

// TestManyUploads: a thousand at once take no more memory than their buffers.
func TestManyUploads(t *testing.T) {
	h := newHost(t)
	const n, chunk = 1_000, 40_000
	data := random(8, chunk)
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var all sync.WaitGroup
	var bodies []*stuck
	var uploads []*hosted.Upload
	for range n {
		u, s := h.begin(""), newStuck(data)
		bodies, uploads = append(bodies, s), append(uploads, u)
		all.Go(func() {
			if _, err := u.Append(context.Background(), s.body(0, 100_000)); err == nil {
				t.Error("it was not cut")
			}
		})
	}
	for _, s := range bodies {
		<-s.waiting
	}
	runtime.GC()
	runtime.ReadMemStats(&during)
	if grown := int64(during.HeapAlloc) - int64(before.HeapAlloc); grown > 80<<20 {
		t.Errorf("%d MiB", grown>>20)
	} else {
		t.Logf("%d MiB", grown>>20)
	}
	for _, s := range bodies {
		s.interrupt()
	}
	all.Wait()
	for _, u := range uploads {
		if u.Offset() != chunk {
			t.Errorf("one ends at %d", u.Offset())
		}
	}
	if h.Partial() != n*chunk {
		t.Errorf("%d bytes are partial", h.Partial())
	}
}

// TestTooManyUploads: there is an end to them.
func TestTooManyUploads(t *testing.T) {
	h := newHost(t)
	for range hosted.MaxUploads {
		h.begin("")
	}
	if _, err := h.Begin(t.Context(), "apps/web", ""); !errors.Is(err, hosted.ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
}
