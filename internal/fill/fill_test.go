package fill_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

const mib = 1 << 20

// TestManyReaders: a thousand readers at random offsets share one fetch and
// one file.
func TestManyReaders(t *testing.T) {
	x := newTable(t)
	data, d := random(6 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{})}
	var wg sync.WaitGroup
	for i := range 1000 {
		f := x.join(t, d, len(data), fmt.Sprint("repository", i%7), src)
		offset := rand.IntN(len(data))
		length := rand.IntN(len(data)-offset)/64 + 1
		if i%10 == 0 {
			offset, length = 0, len(data)
		}
		wg.Go(func() {
			defer f.Release()
			got, err := read(t, f, offset, length, i%10 == 0)
			if err != nil {
				t.Error(err)
			} else if !bytes.Equal(got, data[offset:offset+length]) {
				t.Errorf("wrong bytes at %d", offset)
			}
		})
	}
	files := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return 0
		}
		n := 0
		for _, e := range entries {
			target, _ := os.Readlink("/proc/self/fd/" + e.Name())
			if strings.HasPrefix(target, filepath.Join(x.dir, "mirror/spool")) && !strings.HasSuffix(target, ".ledger") {
				n++
			}
		}
		return n
	}
	eventually(t, "the spool to be opened", func() bool { return files() == 1 })
	close(src.gate)
	wg.Wait()
	if src.sent.Load() != int64(len(data)) {
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
	data, d := random(2*mib + 100)
	wrong := slices.Clone(data)
	wrong[5] ^= 1
	src := &source{name: "a", data: wrong, gate: make(chan struct{}), gateAt: fill.Segment}
	f := x.join(t, d, len(data), "r", src)
	defer f.Release()
	if got, err := read(t, f, 0, 50, false); err != nil || !bytes.Equal(got, wrong[:50]) {
		t.Errorf("a part: %v", err)
	}
	last := len(data) - 100
	close(src.gate)
	// Everything but a hole in the middle.
	if _, err := read(t, f, last, 100, false); err != nil {
		t.Fatal(err)
	}
	rest := f.NewReader(t.Context(), int64(last), 100, true)
	defer rest.Close()
	whole := f.NewReader(t.Context(), 0, int64(len(data)), true)
	defer whole.Close()
	got, err := io.ReadAll(whole)
	if !errors.Is(err, fill.ErrDigest) || len(got) > last {
		t.Errorf("wrong content: %d bytes, %v", len(got), err)
	}
	if n, err := rest.Read(make([]byte, 100)); n > 0 || !errors.Is(err, fill.ErrDigest) {
		t.Errorf("the rest of wrong content: %d bytes, %v", n, err)
	}
	if _, err := x.store.Stat(t.Context(), layout.Blob(d)); err == nil {
		t.Error("wrong content was stored")
	}
	eventually(t, "the source to be blamed", func() bool { return src.blamed.Load() == 1 })
	// The next one starts anew, and not from the files.
	b := &source{name: "b", data: data}
	g := x.join(t, d, len(data), "r", b)
	defer g.Release()
	if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) || b.sent.Load() != int64(len(data)) {
		t.Errorf("after a failure: %v, %d bytes fetched", err, b.sent.Load())
	}
}

// TestSources, with content that goes through memory and content that goes
// through the spool.
func TestSources(t *testing.T) {
	for _, size := range []int{300_000, 3*mib + 77} {
		data, d := random(size)
		for name, c := range map[string]struct {
			sources []*source
			lie     int // the size promised, if not the true one
			fails   error
			fetched int // over all sources; 0: do not mind
		}{
			"one":                        {sources: []*source{{data: data}}, fetched: size},
			"no size said":               {sources: []*source{{data: data, silent: true}}, fetched: size},
			"no spans":                   {sources: []*source{{data: data, noSpans: true}}, fetched: size},
			"cut and resumed":            {sources: []*source{{data: data, cut: 100_000}}, fetched: size},
			"cut and no spans":           {sources: []*source{{data: data, cut: 100_000, noSpans: true}}, fetched: size + 100_000},
			"cut, and the next goes on":  {sources: []*source{{data: data, cut: 100_000}, {data: data}}, fetched: size},
			"the first has it not":       {sources: []*source{{err: permanent{errors.New("404")}}, {data: data}}, fetched: size},
			"the first has another size": {sources: []*source{{data: data[:100]}, {data: data}}, fetched: size},
			"more than it says":          {sources: []*source{{data: append(slices.Clone(data), 1), size: int64(size)}}},
			"nobody has it":              {sources: []*source{{err: permanent{os.ErrNotExist}}}, fails: os.ErrNotExist},
			"a lie about the size":       {sources: []*source{{data: data}}, lie: 5, fails: fill.ErrSize},
		} {
			t.Run(fmt.Sprint(size, " ", name), func(t *testing.T) {
				x := newTable(t)
				x.parks = c.fails != nil
				promise := size
				if c.lie != 0 {
					promise = c.lie
				}
				var sources []fill.Source
				for i, s := range c.sources {
					s.name = fmt.Sprint("source", i)
					sources = append(sources, s)
				}
				f := x.join(t, d, promise, "r", sources...)
				defer f.Release()
				got, err := read(t, f, 0, promise, true)
				if c.fails != nil {
					if !errors.Is(err, c.fails) {
						t.Errorf("%v, want %v", err, c.fails)
					}
				} else if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				var fetched int64
				for _, s := range c.sources {
					fetched += s.sent.Load()
				}
				if c.fetched > 0 && fetched > int64(c.fetched) {
					t.Errorf("%d bytes were fetched, want %d", fetched, c.fetched)
				}
				if _, err := x.store.Stat(t.Context(), layout.Blob(d)); c.fails != nil && err == nil {
					t.Error("it was stored")
				}
			})
		}
	}
}

// TestWrongInMemory: nobody has seen a byte of small content that turns out
// wrong, so the next source is asked and nobody hears of it.
func TestWrongInMemory(t *testing.T) {
	x := newTable(t)
	data, d := random(50_000)
	wrong := slices.Clone(data)
	wrong[7] ^= 1
	bad, good := &source{name: "bad", data: wrong}, &source{name: "good", data: data}
	f := x.join(t, d, len(data), "r", bad, good)
	defer f.Release()
	if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	if bad.blamed.Load() != 1 || good.blamed.Load() != 0 {
		t.Error("the wrong one was blamed")
	}
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
	f := x.join(t, d, len(data), "late", src)
	defer f.Release()
	if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if src.opened.Load() != 0 {
		t.Error("what is held was fetched")
	}
	eventually(t, "the late repository to be linked", func() bool { return x.linked("late", d) })
}

// TestJoinWhileCommitting: who joins while links are being written is linked.
func TestJoinWhileCommitting(t *testing.T) {
	for _, size := range []int{100_000, 2 * mib} {
		x := newTable(t)
		data, d := random(size)
		stored, joined := make(chan struct{}), make(chan struct{})
		failpoint.Set(func(name string) {
			if name == "fill.stored" {
				close(stored)
				<-joined
			}
		})
		f := x.join(t, d, size, "first", &source{name: "a", data: data})
		if _, err := read(t, f, 0, size, true); err != nil {
			t.Error(err)
		}
		<-stored
		g := x.join(t, d, size, "second", &source{name: "b", err: errors.New("not to be asked")})
		close(joined)
		if got, err := read(t, g, 0, size, true); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		eventually(t, "both to be linked", func() bool { return x.linked("first", d) && x.linked("second", d) })
		failpoint.Set(nil)
		f.Release()
		g.Release()
	}
}

// TestLieSpoilsNobodyElse: fills are keyed by digest and size.
func TestLieSpoilsNobodyElse(t *testing.T) {
	x := newTable(t)
	data, d := random(2 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{})}
	honest := x.join(t, d, len(data), "honest", src)
	defer honest.Release()
	lie := x.join(t, d, 7, "liar", &source{name: "b", data: data})
	defer lie.Release()
	if _, err := read(t, lie, 0, 7, true); !errors.Is(err, fill.ErrSize) {
		t.Errorf("a lie about the size: %v", err)
	}
	close(src.gate)
	if got, err := read(t, honest, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestSHA512(t *testing.T) {
	for _, size := range []int{200_000, 2 * mib} {
		x := newTable(t)
		data, canonical := random(size)
		d := digest.SHA512.FromBytes(data)
		f := x.join(t, d, size, "r", &source{name: "a", data: data})
		if got, err := read(t, f, 0, size, true); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		eventually(t, "the link", func() bool { return x.linked("r", d) })
		if info, err := x.store.Stat(t.Context(), layout.Blob(canonical)); err != nil || info.Size != int64(size) {
			t.Errorf("it does not lie under its sha256: %v", err)
		}
		f.Release()
	}
}

// TestEveryWaiterHears: an error reaches all who wait, and a caller's context
// ends only his own waiting.
func TestEveryWaiterHears(t *testing.T) {
	for _, size := range []int{10, 2 * mib} {
		x := newTable(t)
		_, d := random(size)
		hole := &source{name: "b", err: permanent{os.ErrPermission}}
		var wg sync.WaitGroup
		for i := range 50 {
			f := x.join(t, d, size, "r", hole)
			ctx, cancel := context.WithCancel(t.Context())
			if i%5 == 0 {
				cancel()
			}
			wg.Go(func() {
				defer cancel()
				defer f.Release()
				r := f.NewReader(ctx, 0, int64(size), true)
				defer r.Close()
				err := r.Ready(ctx)
				if i%5 == 0 && !errors.Is(err, context.Canceled) && !errors.Is(err, os.ErrPermission) || i%5 != 0 && !errors.Is(err, os.ErrPermission) {
					t.Errorf("waiter %d: %v", i, err)
				}
			})
		}
		wg.Wait()
	}
}

// TestTrouble: who cannot wait any longer hears what the trouble is.
func TestTrouble(t *testing.T) {
	x := newTable(t)
	x.parks = true
	_, d := random(2 * mib)
	src := &source{name: "a", err: errors.New("the cable is cut")}
	f := x.join(t, d, 2*mib, "r", src)
	defer f.Release()
	ctx, cancel := context.WithCancelCause(t.Context())
	r := f.NewReader(t.Context(), 0, 2*mib, true)
	defer r.Close()
	waited := make(chan error)
	go func() { waited <- r.Ready(ctx) }()
	eventually(t, "the source to be asked", func() bool { return src.opened.Load() > 1 })
	cancel(os.ErrDeadlineExceeded)
	if err := <-waited; !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "the cable is cut") {
		t.Errorf("got %v", err)
	}
}

// TestClose ends fills that stand still, keeps what they have, and refuses new
// ones.
func TestClose(t *testing.T) {
	dir := t.TempDir()
	x := openTable(t, dir)
	x.parks = true
	data, d := random(4 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: mib}
	f := x.join(t, d, len(data), "r", src)
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	if _, err := io.ReadFull(r, make([]byte, mib)); err != nil {
		t.Fatal(err)
	}
	x.close()
	if _, err := io.ReadAll(r); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("a reader at the end: %v", err)
	}
	r.Close()
	f.Release()
	if _, err := x.Join(fill.Want{Digest: d, Size: 4 * mib, Repository: "r", Sources: []fill.Source{src}}); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("a joiner after the end: %v", err)
	}
	if ended := x.summaries(); len(ended) != 1 || !errors.Is(ended[0].Err, fill.ErrClosed) {
		t.Errorf("reported: %+v", ended)
	}

	y := openTable(t, dir)
	again := &source{name: "a", data: data}
	g := y.join(t, d, len(data), "r", again)
	defer g.Release()
	if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	if sent := src.sent.Load() + again.sent.Load(); sent > int64(len(data)) {
		t.Errorf("%d bytes were fetched of %d", sent, len(data))
	}
}

// TestParts: a small range fetches its segments, and nothing else, however
// long the content is and however long one waits.
func TestParts(t *testing.T) {
	x := newTable(t)
	x.parks = true
	data, d := random(64 * mib)
	src := &source{name: "a", data: data}
	f := x.join(t, d, len(data), "r", src)
	for _, c := range []struct{ offset, length, fetches int }{
		{0, 2, fill.Segment},
		{len(data) - 47, 47, fill.Segment},
		{5 * mib, 50_000, fill.Segment},
		{5*mib + 50_000, 50_000, fill.Segment}, // the rest of it is there
		{5*mib + 10_000, 90_000, 0},
	} {
		before := src.sent.Load()
		got, err := read(t, f, c.offset, c.length, false)
		if err != nil || !bytes.Equal(got, data[c.offset:c.offset+c.length]) {
			t.Errorf("%d bytes from %d: %v", c.length, c.offset, err)
		}
		// The rest of a segment may still be coming.
		eventually(t, "the segment", func() bool { return src.sent.Load()-before >= int64(c.fetches) })
		if n := src.sent.Load() - before; n != int64(c.fetches) {
			t.Errorf("%d bytes from %d: %d were fetched, want %d", c.length, c.offset, n, c.fetches)
		}
	}
	f.Release()
	eventually(t, "the fill to be put away", func() bool { return len(x.summaries()) == 1 })
	if s := x.summaries()[0]; !errors.Is(s.Err, fill.ErrPaused) || s.Fetched != 4*fill.Segment {
		t.Errorf("ended: %+v", s)
	}
}

// TestOpenEnded: who asks for the rest gets 8 MiB ahead of what it reads, and
// everything else comes when there is nothing better to do.
func TestOpenEnded(t *testing.T) {
	x := newTable(t)
	data, d := random(40 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{})}
	f := x.join(t, d, len(data), "r", src)
	defer f.Release()
	from := 20 * mib
	r := f.NewReader(t.Context(), int64(from), int64(len(data)-from), true)
	defer r.Close()
	ahead := func() (foreground, background []fill.Span) {
		for _, s := range src.spans() {
			if s.Background {
				background = append(background, s)
			} else {
				foreground = append(foreground, s)
			}
		}
		return
	}
	eventually(t, "what is ahead, and one of the holes, to be asked for", func() bool {
		fore, back := ahead()
		return len(fore) == 1 && fore[0] == (fill.Span{Offset: int64(from), Length: 8 * mib}) && len(back) == 1 && back[0].Offset == 0
	})
	close(src.gate)
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data[from:]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if src.sent.Load() != int64(len(data)) {
		t.Errorf("%d bytes were fetched of %d", src.sent.Load(), len(data))
	}
}

// TestLeaving: with nobody left a fill that is not half done is put away, and
// goes on from there; one that is is finished.
func TestLeaving(t *testing.T) {
	// leave reads up to where the source holds its bytes back, and leaves.
	leave := func(t *testing.T, x *table, data []byte, d digest.Digest, at int64) *source {
		src := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: at}
		f := x.join(t, d, len(data), "r", src)
		r := f.NewReader(t.Context(), 0, int64(len(data)), true)
		if _, err := io.ReadFull(r, make([]byte, at)); err != nil {
			t.Fatal(err)
		}
		r.Close()
		f.Release()
		return src
	}
	data, d := random(40 * mib)
	t.Run("early", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			x := newTable(t)
			src := leave(t, x, data, d, 4*mib)
			eventually(t, "the fill to be put away", func() bool { return len(x.summaries()) == 1 })
			if len(x.spooled()) != 2 {
				t.Errorf("in the spool: %q", x.spooled())
			}
			again := &source{name: "a", data: data}
			g := x.join(t, d, len(data), "r", again)
			defer g.Release()
			if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
				t.Error(err)
			}
			// Of each connection, part of a segment.
			if sent := src.sent.Load() + again.sent.Load(); sent > int64(len(data)+4*fill.Segment) {
				t.Errorf("%d bytes were fetched of %d", sent, len(data))
			}
		})
	})
	t.Run("late", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			x := newTable(t)
			src := leave(t, x, data, d, 36*mib)
			wait(t.Context(), 3*fill.Linger(x.Table))
			close(src.gate)
			eventually(t, "the fill to be finished", func() bool { return x.linked("r", d) })
		})
	})
	t.Run("after a part", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			x := newTable(t)
			x.parks = true
			f := x.join(t, d, len(data), "r", &source{name: "a", data: data})
			if _, err := read(t, f, mib, 100, false); err != nil {
				t.Fatal(err)
			}
			wait(t.Context(), time.Minute) // nothing is to be done any more
			left := time.Now()
			f.Release()
			eventually(t, "the fill to be put away", func() bool { return len(x.summaries()) == 1 })
			if after := time.Since(left); after < fill.Linger(x.Table) || after > fill.Linger(x.Table)+time.Second {
				t.Errorf("it was put away after %v", after)
			}
		})
	})
}

// TestAhead: what will be asked for comes in the background, and is finished.
func TestAhead(t *testing.T) {
	x := newTable(t)
	for _, size := range []int{1000, 3 * mib} {
		data, d := random(size)
		src := &source{name: "a", data: data}
		x.Ahead(fill.Want{Digest: d, Size: int64(size), Repository: "r", Sources: []fill.Source{src}, Connections: 4})
		eventually(t, "it to be there", func() bool { return x.linked("r", d) })
		for _, s := range src.spans() {
			if !s.Background {
				t.Errorf("asked for %+v", s)
			}
		}
	}
}

// TestConnections: a source that is slow is asked for several spans at once,
// in their order; one that is fast is not.
func TestConnections(t *testing.T) {
	x := newTable(t)
	data, d := random(40 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 100}
	f := x.join(t, d, len(data), "r", src)
	defer f.Release()
	r := f.NewReader(t.Context(), 0, int64(len(data)), true)
	defer r.Close()
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(src.spans()); n != 1 {
		t.Errorf("%d spans at the beginning", n)
	}
	slow := time.AfterFunc(100*time.Millisecond, func() { close(src.gate) })
	defer slow.Stop()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	// Those that are begun together may be asked for in any order.
	spans := src.spans()
	slices.SortFunc(spans, func(a, b fill.Span) int { return int(a.Offset - b.Offset) })
	for i, s := range spans {
		if s.Offset != int64(i)*8*mib || s.Length != 8*mib {
			t.Errorf("span %d: %+v", i, s)
		}
	}
}

// TestDamagedSpool: what is found in the spool is hashed as it is served. If
// the disk has changed it, only that is fetched again, and no source is blamed.
func TestDamagedSpool(t *testing.T) {
	dir := t.TempDir()
	x := openTable(t, dir)
	x.parks = true
	data, d := random(8 * mib)
	src := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: mib}
	f := x.join(t, d, len(data), "r", src)
	if _, err := read(t, f, 0, mib, false); err != nil {
		t.Fatal(err)
	}
	x.close()
	f.Release()
	for _, name := range x.spooled() {
		if !strings.HasSuffix(name, ".ledger") {
			file, err := os.OpenFile(name, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := file.WriteAt([]byte("oops"), 3*fill.Segment); err != nil {
				t.Fatal(err)
			}
			file.Close()
		}
	}

	y := openTable(t, dir)
	again := &source{name: "a", data: data}
	g := y.join(t, d, len(data), "r", again)
	if _, err := read(t, g, 0, len(data), true); !errors.Is(err, fill.ErrSpool) {
		t.Errorf("a damaged spool: %v", err)
	}
	g.Release()
	again.sent.Store(0)
	g = y.join(t, d, len(data), "r", again)
	defer g.Release()
	if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after that: %v", err)
	}
	if n := again.sent.Load(); n != fill.Segment || again.blamed.Load() != 0 {
		t.Errorf("%d bytes were fetched again; blamed %d times", n, again.blamed.Load())
	}
}

// TestHugeLie: a manifest that promises more than there is costs no memory.
func TestHugeLie(t *testing.T) {
	x := newTable(t)
	_, d := random(10)
	if _, err := x.Join(fill.Want{Digest: d, Size: 9e18, Repository: "r"}); !errors.Is(err, fill.ErrTooLarge) {
		t.Errorf("more than any content: %v", err)
	}
	src := &source{name: "a", data: make([]byte, 10)}
	f := x.join(t, d, 1<<40, "r", src)
	defer f.Release()
	r := f.NewReader(t.Context(), 0, 100, false)
	defer r.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := r.Ready(t.Context()); !errors.Is(err, fill.ErrSize) {
		t.Errorf("a lie: %v", err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > mib {
		t.Errorf("%d bytes were allocated for it", n)
	}
}

// TestPassingAgrees: a reader of the rest has had bytes from the spool, and then
// the disk is full. What it goes on with proves the content; what it has had
// must have been the same.
func TestPassingAgrees(t *testing.T) {
	x := newTable(t)
	x.parks = true
	fill.Tune(x.Table, fill.Segment, mib, mib, mib, mib)
	data, d := random(4 * mib)
	wrong := slices.Clone(data)
	wrong[2*mib+mib/2] ^= 1
	a, b := &source{name: "a", data: wrong}, &source{name: "b", data: data}
	// There is room for what the reader is at, and for no more; that is found
	// out when it has had it.
	had := make(chan struct{})
	once := sync.OnceFunc(func() { close(had) })
	t.Cleanup(once)
	var parts atomic.Int64
	x.store.(*fillable).until = func(n int64) bool {
		if n == mib && parts.Add(1) == 1 {
			return true
		}
		<-had
		return false
	}
	x.fill(true)
	f := x.join(t, d, len(data), "r", a)
	r := f.NewReader(t.Context(), 2*mib, 2*mib, true)
	if _, err := io.ReadFull(r, make([]byte, mib-1)); err != nil {
		t.Fatal(err)
	}
	x.join(t, d, len(data), "r", b).Release()
	a.err = permanent{errors.New("gone")}
	once()
	got, err := io.ReadAll(r)
	if !errors.Is(err, fill.ErrDigest) {
		t.Errorf("%d more bytes, %v", len(got), err)
	}
	r.Close()
	f.Release()
	// The spool is gone, so the next one gets the right bytes.
	eventually(t, "the files to be removed", func() bool { return len(x.spooled()) == 0 })
	g := x.join(t, d, len(data), "r", b)
	defer g.Release()
	if got, err := read(t, g, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after that: %d bytes, %v", len(got), err)
	}
}

// TestBadSpoolIsNotKept: the only reader of a passing fill finds the content
// wrong and leaves at once.
func TestBadSpoolIsNotKept(t *testing.T) {
	x := newTable(t)
	x.parks = true
	fill.Tune(x.Table, fill.Segment, mib, mib, mib, mib)
	data, d := random(4 * mib)
	wrong := slices.Clone(data)
	wrong[100] ^= 1
	bad := &source{name: "bad", data: wrong, gate: make(chan struct{}), gateAt: mib}
	for range 20 {
		bad.gate = make(chan struct{})
		f := x.join(t, d, len(data), "r", bad)
		if _, err := read(t, f, 0, mib, false); err != nil {
			t.Fatal(err)
		}
		x.fill(true)
		close(bad.gate)
		if _, err := read(t, f, 0, len(data), true); !errors.Is(err, fill.ErrDigest) {
			t.Fatalf("wrong content: %v", err)
		}
		f.Release()
		good := x.join(t, d, len(data), "r", &source{name: "good", data: data})
		if got, err := read(t, good, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("after wrong content: %v", err)
		}
		good.Release()
		x.fill(false)
		eventually(t, "the files to be removed", func() bool { return len(x.spooled()) == 0 })
	}
}
