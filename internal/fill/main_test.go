package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// table is a table on a store, with what it has linked and reported.
type table struct {
	*fill.Table
	store  storage.Store
	dir    string
	parks  bool // files may be left in the spool
	closed bool
	room   atomic.Pointer[func(context.Context, int64) bool] // nil: nobody makes any

	mu    sync.Mutex
	links map[string]digest.Digest // repository@asked → canonical
	ended []fill.Summary
}

func newTable(t *testing.T) *table { return openTable(t, t.TempDir()) }

func openTable(t *testing.T, dir string) *table {
	t.Helper()
	return makeTable(t, dir, &fillable{Store: disktest.Open(t, dir)})
}

func makeTable(t *testing.T, dir string, store storage.Store) *table {
	x := &table{store: store, dir: dir, links: map[string]digest.Digest{}}
	x.Table = fill.NewTable(x.store, func(_ context.Context, repository string, asked, canonical digest.Digest) error {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.links[repository+"@"+asked.String()] = canonical
		return nil
	}, func(s fill.Summary) {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.ended = append(x.ended, s)
	}, func(ctx context.Context, n int64) bool {
		if room := x.room.Load(); room != nil {
			return (*room)(ctx, n)
		}
		return false
	})
	t.Cleanup(func() {
		x.close()
		if left := x.spooled(); len(left) > 0 && !x.parks {
			t.Errorf("left in the spool: %q", left)
		}
	})
	return x
}

// fillable is a store that can be full.
type fillable struct {
	storage.Store
	full  atomic.Bool
	until func(n int64) bool // there is room for n bytes, if not nil
}

func (s *fillable) Reserve(n int64) (storage.Reservation, error) {
	if s.full.Load() && (s.until == nil || !s.until(n)) {
		return nil, storage.ErrFull
	}
	return s.Store.Reserve(n)
}

func (x *table) fill(full bool) { x.store.(*fillable).full.Store(full) }

// close is a stop of the process.
func (x *table) close() {
	if !x.closed {
		x.closed = true
		x.Table.Close()
		x.store.Close()
	}
}

// spooled are the files in the spool.
func (x *table) spooled() []string {
	names, _ := filepath.Glob(filepath.Join(x.dir, "mirror/spool/fills/*"))
	return names
}

func (x *table) linked(repository string, d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.links[repository+"@"+d.String()]
	return ok
}

// summaries are those of the fills that have ended.
func (x *table) summaries() []fill.Summary {
	x.mu.Lock()
	defer x.mu.Unlock()
	return append([]fill.Summary(nil), x.ended...)
}

func (x *table) join(t *testing.T, d digest.Digest, size int, repository string, sources ...fill.Source) *fill.Fill {
	t.Helper()
	f, err := x.Join(fill.Want{Digest: d, Size: int64(size), Repository: repository, Sources: sources, Connections: 4})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// read reads a span to its end.
func read(t *testing.T, f *fill.Fill, offset, length int, proven bool) ([]byte, error) {
	t.Helper()
	r := f.NewReader(t.Context(), int64(offset), int64(length), proven)
	defer r.Close()
	var b bytes.Buffer
	_, err := r.WriteTo(&b)
	return b.Bytes(), err
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

func random(n int) ([]byte, digest.Digest) {
	data := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	source.Read(data)
	return data, digest.FromBytes(data)
}

// source delivers content, with faults.
type source struct {
	name    string
	data    []byte
	err     error         // of Open
	size    int64         // said; 0: the true one
	silent  bool          // says no size
	noSpans bool          // begins at 0 and goes to the end
	cut     int64         // breaks off here, once
	gate    chan struct{} // a byte from gateAt on waits for it
	gateAt  int64

	opened atomic.Int64
	sent   atomic.Int64
	blamed atomic.Int64
	wascut atomic.Bool

	mu    sync.Mutex
	asked []fill.Span
}

func (s *source) Blame(error) { s.blamed.Add(1) }

func (s *source) spans() []fill.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]fill.Span(nil), s.asked...)
}

func (s *source) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	s.opened.Add(1)
	s.mu.Lock()
	s.asked = append(s.asked, span)
	s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	st := &fill.Stream{Offset: span.Offset, Size: int64(len(s.data)), From: s.name}
	end := min(span.Offset+span.Length, int64(len(s.data)))
	if s.noSpans {
		st.Offset, st.Whole, end = 0, true, int64(len(s.data))
	}
	if s.size != 0 {
		st.Size = s.size
		end = int64(len(s.data))
	}
	if s.silent {
		st.Size = -1
	}
	st.ReadCloser = io.NopCloser(&delivery{ctx: ctx, source: s, at: st.Offset, end: end})
	return st, nil
}

type delivery struct {
	ctx     context.Context
	source  *source
	at, end int64
}

func (d *delivery) Read(p []byte) (int, error) {
	s := d.source
	if err := d.ctx.Err(); err != nil {
		return 0, err
	}
	if s.cut > 0 && d.at == s.cut && s.wascut.CompareAndSwap(false, true) {
		return 0, errors.New("connection reset")
	}
	if s.gate != nil && d.at >= s.gateAt {
		select {
		case <-s.gate:
		case <-d.ctx.Done():
			return 0, d.ctx.Err()
		}
	}
	if d.at >= d.end {
		return 0, io.EOF
	}
	n := min(int64(len(p)), d.end-d.at, 10_000)
	for _, stop := range []int64{s.cut, s.gateAt} {
		if stop > d.at {
			n = min(n, stop-d.at)
		}
	}
	copy(p, s.data[d.at:][:n])
	d.at += n
	s.sent.Add(n)
	return int(n), nil
}

// permanent is an error that says that asking again is of no use.
type permanent struct{ error }

func (p permanent) Unwrap() error              { return p.error }
func (permanent) Retry() (time.Duration, bool) { return 0, false }
