package fill_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// table is a table on a store, with what it has linked and reported.
type table struct {
	*fill.Table
	store storage.Store
	dir   string

	mu    sync.Mutex
	links map[string]digest.Digest // repository@asked → canonical
	ended []fill.Summary
}

func newTable(t *testing.T) *table {
	t.Helper()
	dir := t.TempDir()
	store := disktest.Open(t, dir)
	x := &table{store: store, dir: dir, links: map[string]digest.Digest{}}
	x.Table = fill.NewTable(store, func(_ context.Context, repository string, asked, canonical digest.Digest) error {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.links[repository+"@"+asked.String()] = canonical
		return nil
	}, func(s fill.Summary) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.ended = append(x.ended, s)
	})
	t.Cleanup(func() {
		x.Table.Close()
		if left, _ := filepath.Glob(filepath.Join(dir, "mirror/spool/*/*")); len(left) > 0 {
			t.Errorf("left in the spool: %q", left)
		}
		store.Close()
	})
	return x
}

func (x *table) linked(repository string, d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.links[repository+"@"+d.String()]
	return ok
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// source delivers content, with faults.
type source struct {
	name     string
	data     []byte
	err      error         // of Open
	size     int64         // said; 0: the true one
	noSize   bool          // says nothing
	noRange  bool          // starts at 0 whatever is asked
	cut      int64         // breaks off here, the first time
	gate     chan struct{} // a byte from half on waits for it
	opened   atomic.Int64
	sent     atomic.Int64
	blamed   atomic.Int64
	cutsLeft atomic.Int64
}

func (s *source) Blame(error) { s.blamed.Add(1) }

func (s *source) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	s.opened.Add(1)
	if s.err != nil {
		return nil, s.err
	}
	offset := span.Offset
	if s.noRange {
		offset = 0
	}
	stream := &fill.Stream{
		ReadCloser: io.NopCloser(&stream{ctx: ctx, source: s, offset: offset}),
		Offset:     offset, Size: int64(len(s.data)), From: s.name,
	}
	if s.size != 0 {
		stream.Size = s.size
	}
	if s.noSize {
		stream.Size = -1
	}
	return stream, nil
}

type stream struct {
	ctx    context.Context
	source *source
	offset int64
}

func (s *stream) Read(p []byte) (int, error) {
	src := s.source
	if src.cut > 0 && s.offset >= src.cut && src.cutsLeft.Add(-1) >= 0 {
		return 0, errors.New("connection reset")
	}
	if src.gate != nil && s.offset >= int64(len(src.data)/2) {
		select {
		case <-src.gate:
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	rest := src.data[s.offset:]
	if len(rest) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), len(rest), 10_000)
	if src.cut > s.offset {
		n = min(n, int(src.cut-s.offset))
	}
	if half := int64(len(src.data) / 2); src.gate != nil && s.offset < half {
		n = min(n, int(half-s.offset))
	}
	copy(p, rest[:n])
	s.offset += int64(n)
	src.sent.Add(int64(n))
	return n, nil
}

// permanent is an error that says that asking again is of no use.
type permanent struct{ error }

func (p permanent) Unwrap() error              { return p.error }
func (permanent) Retry() (time.Duration, bool) { return 0, false }

func random(n int) ([]byte, digest.Digest) {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	return data, digest.FromBytes(data)
}

func read(t *testing.T, f *fill.Fill) ([]byte, error) {
	t.Helper()
	size, err := f.Size(t.Context())
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = f.NewReader(t.Context(), 0, size, true).WriteTo(&b)
	return b.Bytes(), err
}

func (x *table) join(t *testing.T, d digest.Digest, size int64, repository string, s fill.Source) *fill.Fill {
	t.Helper()
	f, err := x.Join(fill.Want{Digest: d, Size: size, Repository: repository, Sources: []fill.Source{s}})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestManyReaders: a thousand readers at random offsets share one fetch and
// one file.
func TestManyReaders(t *testing.T) {
	x := newTable(t)
	data, d := random(1 << 20)
	src := &source{name: "a", data: data, gate: make(chan struct{})}
	var wg sync.WaitGroup
	for i := range 1000 {
		f := x.join(t, d, int64(len(data)), fmt.Sprint("repository", i%7), src)
		offset := rand.Int64N(int64(len(data)))
		length := rand.Int64N(int64(len(data))-offset) + 1
		wg.Go(func() {
			defer f.Release()
			var b bytes.Buffer
			if _, err := f.NewReader(t.Context(), offset, length, i%2 == 0).WriteTo(&b); err != nil {
				t.Error(err)
			} else if !bytes.Equal(b.Bytes(), data[offset:offset+length]) {
				t.Errorf("wrong bytes at %d", offset)
			}
		})
	}
	spool, err := x.store.Spool("fills")
	if err != nil {
		t.Fatal(err)
	}
	files := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return 0
		}
		n := 0
		for _, e := range entries {
			if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); filepath.Dir(target) == spool {
				n++
			}
		}
		return n
	}
	eventually(t, "the spool to be opened", func() bool { return files() == 1 })
	close(src.gate)
	wg.Wait()
	if src.opened.Load() != 1 || src.sent.Load() != int64(len(data)) {
		t.Errorf("opened %d times, %d bytes", src.opened.Load(), src.sent.Load())
	}
	for i := range 7 {
		eventually(t, "every repository to be linked", func() bool { return x.linked(fmt.Sprint("repository", i), d) })
	}
}

// TestWithheld: until the digest is proven, a reader of the whole lacks the
// last segment, and one of a part does not.
func TestWithheld(t *testing.T) {
	x := newTable(t)
	data, d := random(3*fill.Segment + 100)
	wrong := slices.Clone(data)
	wrong[5] ^= 1
	src := &source{name: "a", data: wrong}
	reached := make(chan struct{})
	proceed := make(chan struct{})
	// The end of the stream waits, with every byte delivered.
	ending := &slowEnd{source: src, reached: reached, proceed: proceed}
	f := x.join(t, d, int64(len(data)), "r", ending)
	defer f.Release()
	<-reached
	part := make([]byte, 50)
	if _, err := io.ReadFull(f.NewReader(t.Context(), int64(len(data))-50, 50, false), part); err != nil || !bytes.Equal(part, data[len(data)-50:]) {
		t.Errorf("the end of an archive: %v", err)
	}
	whole := f.NewReader(t.Context(), 0, int64(len(data)), true)
	got := make([]byte, 3*fill.Segment)
	if _, err := io.ReadFull(whole, got); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if n, err := f.NewReader(ctx, 3*fill.Segment, 100, true).Read(got); n > 0 || err == nil {
		t.Errorf("%d bytes of the last segment before it is proven, %v", n, err)
	}
	close(proceed)
	if _, err := whole.Read(got); !errors.Is(err, fill.ErrDigest) {
		t.Errorf("wrong content: %v", err)
	}
	if _, err := x.store.Stat(t.Context(), layout.Blob(d)); err == nil {
		t.Error("wrong content was stored")
	}
	if src.blamed.Load() != 1 {
		t.Errorf("the source was blamed %d times", src.blamed.Load())
	}
	// The next one starts anew.
	g := x.join(t, d, int64(len(data)), "r", &source{name: "b", data: data})
	defer g.Release()
	if got, err := read(t, g); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after a failure: %v", err)
	}
}

type slowEnd struct {
	*source
	reached, proceed chan struct{}
}

func (s *slowEnd) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	st, err := s.source.Open(ctx, span)
	if err == nil {
		inner := st.ReadCloser
		st.ReadCloser = io.NopCloser(readerFunc(func(p []byte) (int, error) {
			n, err := inner.Read(p)
			if err == io.EOF {
				close(s.reached)
				<-s.proceed
			}
			return n, err
		}))
	}
	return st, err
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestSources(t *testing.T) {
	data, d := random(300_000)
	size := int64(len(data))
	for name, c := range map[string]struct {
		sources []*source
		promise int64
		fails   error
		fetched int64 // over all sources; 0: do not mind
	}{
		"one":                        {sources: []*source{{data: data}}, promise: size, fetched: size},
		"size unknown beforehand":    {sources: []*source{{data: data}}, promise: -1, fetched: size},
		"size never said":            {sources: []*source{{data: data, noSize: true}}, promise: -1, fetched: size},
		"size promised, never said":  {sources: []*source{{data: data, noSize: true}}, promise: size, fetched: size},
		"cut and resumed":            {sources: []*source{{data: data, cut: 100_000}}, promise: size, fetched: size},
		"cut and no ranges":          {sources: []*source{{data: data, cut: 100_000, noRange: true}}, promise: size, fetched: size + 100_000},
		"cut, and the next goes on":  {sources: []*source{{data: data, cut: 100_000}, {data: data}}, promise: size, fetched: size},
		"the first has it not":       {sources: []*source{{err: permanent{errors.New("404")}}, {data: data}}, promise: size, fetched: size},
		"the first has another size": {sources: []*source{{data: data[:100]}, {data: data}}, promise: size, fetched: size},
		"nobody has it":              {sources: []*source{{err: permanent{os.ErrNotExist}}}, promise: size, fails: os.ErrNotExist},
		"a lie about the size":       {sources: []*source{{data: data}}, promise: 5, fails: fill.ErrSize},
		"more than it says":          {sources: []*source{{data: append(slices.Clone(data), 1), size: size}}, promise: size, fails: fill.ErrSize},
	} {
		t.Run(name, func(t *testing.T) {
			x := newTable(t)
			var fills []*fill.Fill
			gate := make(chan struct{})
			for i, s := range c.sources {
				s.name = fmt.Sprint("source", i)
				s.cutsLeft.Store(1)
				var src fill.Source = s
				if i == 0 { // the others join before it begins
					src = &gated{s, gate}
				}
				f := x.join(t, d, c.promise, fmt.Sprint("r", i), src)
				defer f.Release()
				fills = append(fills, f)
			}
			close(gate)
			var fetched int64
			for i, f := range fills {
				got, err := read(t, f)
				if c.fails != nil {
					if !errors.Is(err, c.fails) {
						t.Errorf("reader %d: %v, want %v", i, err, c.fails)
					}
				} else if err != nil || !bytes.Equal(got, data) {
					t.Errorf("reader %d: %d bytes, %v", i, len(got), err)
				}
			}
			for _, s := range c.sources {
				fetched += s.sent.Load()
			}
			if c.fetched > 0 && fetched > c.fetched {
				t.Errorf("%d bytes were fetched, want %d", fetched, c.fetched)
			}
			if _, err := x.store.Stat(t.Context(), layout.Blob(d)); c.fails != nil && err == nil {
				t.Error("it was stored")
			}
		})
	}
}

type gated struct {
	*source
	gate chan struct{}
}

func (g *gated) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	<-g.gate
	return g.source.Open(ctx, span)
}

// TestHeld: between a request's look into the store and its join a fill may
// have committed; the content is not fetched again.
func TestHeld(t *testing.T) {
	x := newTable(t)
	data, d := random(100_000)
	if err := x.store.Put(t.Context(), layout.Blob(d), data, storage.Lazy); err != nil {
		t.Fatal(err)
	}
	src := &source{name: "a", data: data}
	f := x.join(t, d, -1, "late", src)
	defer f.Release()
	if got, err := read(t, f); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if src.opened.Load() != 0 {
		t.Error("what is held was fetched")
	}
	eventually(t, "the late repository to be linked", func() bool { return x.linked("late", d) })
}

// TestJoinWhileCommitting: who joins while links are being written is linked.
func TestJoinWhileCommitting(t *testing.T) {
	x := newTable(t)
	data, d := random(100_000)
	stored, joined := make(chan struct{}), make(chan struct{})
	failpoint.Set(func(name string) {
		if name == "fill.stored" {
			close(stored)
			<-joined
		}
	})
	defer failpoint.Set(nil)
	f := x.join(t, d, -1, "first", &source{name: "a", data: data})
	defer f.Release()
	<-stored
	g := x.join(t, d, int64(len(data)), "second", &source{name: "b", err: errors.New("not to be asked")})
	defer g.Release()
	close(joined)
	if got, err := read(t, g); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	eventually(t, "both to be linked", func() bool { return x.linked("first", d) && x.linked("second", d) })
}

// TestLieSpoilsNobodyElse: fills are keyed by digest and size.
func TestLieSpoilsNobodyElse(t *testing.T) {
	x := newTable(t)
	data, d := random(100_000)
	src := &source{name: "a", data: data, gate: make(chan struct{})}
	honest := x.join(t, d, int64(len(data)), "honest", src)
	defer honest.Release()
	lie := x.join(t, d, 7, "liar", &source{name: "b", data: data})
	defer lie.Release()
	if _, err := read(t, lie); !errors.Is(err, fill.ErrSize) {
		t.Errorf("a lie about the size: %v", err)
	}
	close(src.gate)
	if got, err := read(t, honest); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestSHA512(t *testing.T) {
	x := newTable(t)
	data, canonical := random(200_000)
	sum := sha512.Sum512(data)
	d := digest.NewDigestFromBytes(digest.SHA512, sum[:])
	f := x.join(t, d, -1, "r", &source{name: "a", data: data})
	defer f.Release()
	if got, err := read(t, f); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	eventually(t, "the link", func() bool { return x.linked("r", d) })
	if info, err := x.store.Stat(t.Context(), layout.Blob(canonical)); err != nil || info.Size != int64(len(data)) {
		t.Errorf("it does not lie under its sha256: %v", err)
	}
}

// TestEveryWaiterHears: an error reaches all who wait, and a caller's context
// ends only his own waiting.
func TestEveryWaiterHears(t *testing.T) {
	x := newTable(t)
	_, d := random(10)
	gate := make(chan struct{})
	var impatient, patient sync.WaitGroup
	for i := range 50 {
		wg := &patient
		if i%5 == 0 {
			wg = &impatient
		}
		f := x.join(t, d, -1, "r", &gated{&source{name: "a", err: permanent{os.ErrPermission}}, gate})
		ctx, cancel := context.WithCancel(t.Context())
		if i%5 == 0 {
			cancel()
		}
		wg.Go(func() {
			defer cancel()
			defer f.Release()
			_, err := f.Size(ctx)
			if i%5 == 0 && !errors.Is(err, context.Canceled) || i%5 != 0 && !errors.Is(err, os.ErrPermission) {
				t.Errorf("waiter %d: %v", i, err)
			}
		})
	}
	impatient.Wait()
	close(gate)
	patient.Wait()
}

// TestTrouble: who cannot wait any longer hears what the trouble is.
func TestTrouble(t *testing.T) {
	x := newTable(t)
	_, d := random(10)
	src := &source{name: "a", err: errors.New("the cable is cut")}
	f := x.join(t, d, -1, "r", src)
	defer f.Release()
	ctx, cancel := context.WithCancelCause(t.Context())
	waited := make(chan error)
	go func() {
		_, err := f.Size(ctx)
		waited <- err
	}()
	eventually(t, "the source to be asked", func() bool { return src.opened.Load() > 1 })
	cancel(os.ErrDeadlineExceeded)
	if err := <-waited; !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "the cable is cut") {
		t.Errorf("got %v", err)
	}
}

// TestClose ends fills that stand still, and refuses new ones.
func TestClose(t *testing.T) {
	x := newTable(t)
	data, d := random(100_000)
	f := x.join(t, d, int64(len(data)), "r", &source{name: "a", data: data, gate: make(chan struct{})})
	defer f.Release()
	part := make([]byte, 100)
	if _, err := io.ReadFull(f.NewReader(t.Context(), 0, 100, false), part); err != nil {
		t.Fatal(err)
	}
	x.Table.Close()
	if _, err := read(t, f); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("a reader at the end: %v", err)
	}
	if _, err := x.Join(fill.Want{Digest: d, Size: -1, Repository: "r", Sources: []fill.Source{&source{}}}); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("a joiner after the end: %v", err)
	}
	if len(x.ended) != 1 || !errors.Is(x.ended[0].Err, fill.ErrClosed) {
		t.Errorf("reported: %+v", x.ended)
	}
}
