package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// newDistantTable is a table on a store whose distant place is in memory.
func newDistantTable(t *testing.T) (*table, *storagetest.Double) {
	dir := t.TempDir()
	store := storagetest.NewDouble(disktest.Open(t, dir))
	x := makeTable(t, dir, store)
	// Windows of 1 MiB, so that a few MiB are many.
	fill.Tune(x.Table, fill.Segment, mib, mib, mib, mib)
	return x, store
}

// gets are the spans that were asked of the distant place.
func gets(store *storagetest.Double, d digest.Digest) []storagetest.Asked {
	return store.Asks("get", layout.Blob(d))
}

func whole(t *testing.T, f *fill.Fill, data []byte) {
	t.Helper()
	if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
	}
}

// TestStoredWhole: a herd on content that is at the distant place costs one request,
// whatever its size, and then it is near.
func TestStoredWhole(t *testing.T) {
	for _, size := range []int{1000, mib, 9*mib + 77} {
		x, store := newDistantTable(t)
		data, d := random(size)
		store.Place(layout.Blob(d), data)
		up := &source{name: "up", data: data}
		var wg sync.WaitGroup
		for range 32 {
			f := x.join(t, d, size, "r", x.Stored(layout.Blob(d), false), up)
			wg.Go(func() {
				defer f.Release()
				whole(t, f, data)
			})
		}
		wg.Wait()
		eventually(t, "the commit", func() bool { return x.linked("r", d) })
		if asked := gets(store, d); len(asked) != 1 || asked[0].Offset != 0 || asked[0].Length >= 0 && asked[0].Length != int64(size) {
			t.Errorf("%d bytes: asked for %v", size, asked)
		}
		if n := up.opened.Load(); n > 0 {
			t.Errorf("%d bytes: the upstream was asked %d times", size, n)
		}
		r, _, err := store.OpenNear(t.Context(), layout.Blob(d))
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if len(store.Asks("put", "")) > 0 {
			t.Errorf("%d bytes: what is there was put there again", size)
		}
		f := x.join(t, d, size, "s", up)
		whole(t, f, data)
		f.Release()
		if n := len(gets(store, d)); n != 1 {
			t.Errorf("%d bytes: asked %d times, though it is near", size, n)
		}
	}
}

// TestStoredParts: readers of parts are not kept waiting by the one request for the
// whole, and ask for no more than they read.
func TestStoredParts(t *testing.T) {
	x, store := newDistantTable(t)
	const size = 16 * mib
	data, d := random(size)
	store.Place(layout.Blob(d), data)
	held := make(chan struct{})
	store.Deliver(func(ctx context.Context, _ string, at int64) (int64, error) {
		if at >= mib/2 && at < 8*mib {
			select {
			case <-held:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		return mib, nil
	})
	f := x.join(t, d, size, "r", x.Stored(layout.Blob(d), false))
	defer f.Release()
	r := f.NewReader(t.Context(), 0, size, true)
	defer r.Close()
	eventually(t, "the request for the whole", func() bool { return len(gets(store, d)) == 1 })
	if got, err := read(t, f, 12*mib+5, 100_000, false); err != nil || !bytes.Equal(got, data[12*mib+5:][:100_000]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	asked := gets(store, d)
	if len(asked) != 2 || asked[1].Length > 100_000+2*fill.Segment || asked[1].Offset < 12*mib {
		t.Errorf("asked for %v", asked)
	}
	close(held)
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	// The first, the part, and what comes after it.
	if asked := gets(store, d); len(asked) != 3 {
		t.Errorf("asked for %v", asked)
	}
}

// TestStoredCut: the next source goes on where the store was cut, and in windows.
func TestStoredCut(t *testing.T) {
	x, store := newDistantTable(t)
	const size, cut = 9 * mib, 3*mib + 12_345
	data, d := random(size)
	store.Place(layout.Blob(d), data)
	store.Deliver(func(_ context.Context, _ string, at int64) (int64, error) {
		if at < cut {
			return cut - at, nil
		}
		store.Down(true)
		return 0, io.ErrUnexpectedEOF
	})
	up := &source{name: "up", data: data}
	f := x.join(t, d, size, "r", x.Stored(layout.Blob(d), false), up)
	whole(t, f, data)
	f.Release()
	eventually(t, "the commit", func() bool { return x.linked("r", d) })
	for i, span := range up.spans() {
		if i == 0 && span.Offset != cut || span.Offset < cut || span.Length > mib {
			t.Errorf("span %d is %+v", i, span)
		}
	}
	if sent := up.sent.Load(); sent != size-cut {
		t.Errorf("%d bytes came from the upstream, want %d", sent, size-cut)
	}
}

// TestStoredDown: where the store cannot be reached, or has nothing, the next source
// is asked at once. Where there is none, its error says so: a store that cannot be
// reached is not asked again meanwhile, and nobody waits for it.
func TestStoredDown(t *testing.T) {
	for _, size := range []int{1000, 3 * mib} {
		data, d := random(size)
		x, store := newDistantTable(t)
		up := &source{name: "up", data: data}
		f := x.join(t, d, size, "none", x.Stored(layout.Blob(d), false), up)
		whole(t, f, data)
		f.Release()

		x, store = newDistantTable(t)
		store.Place(layout.Blob(d), data)
		store.Down(true)
		f = x.join(t, d, size, "down", x.Stored(layout.Blob(d), false), up)
		whole(t, f, data)
		f.Release()
		eventually(t, "the commit", func() bool { return x.linked("down", d) })

		for _, down := range []bool{false, true} {
			x, store = newDistantTable(t)
			store.Down(down)
			f = x.join(t, d, size, "alone", x.Stored(layout.Blob(d), true))
			if got, err := read(t, f, 0, size, true); len(got) > 0 || err == nil || errors.Is(err, storage.ErrUnavailable) != down {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			f.Release()
			if n := len(gets(store, d)); n != 1 {
				t.Errorf("it is down: %v, and was asked %d times", down, n)
			}
		}
	}
}

// TestStoredBack: a store that breaks off in the middle, and is down for a moment then,
// is waited for where nobody else has the rest.
func TestStoredBack(t *testing.T) {
	x, store := newDistantTable(t)
	const size, cut = 3 * mib, mib + 12_345
	data, d := random(size)
	store.Place(layout.Blob(d), data)
	refused := 0
	store.Deliver(func(_ context.Context, _ string, at int64) (int64, error) {
		if at < cut {
			return cut - at, nil
		}
		if refused == 0 {
			store.Trouble(func(storagetest.Asked) error {
				if refused++; refused > 2 {
					return nil
				}
				return storage.ErrUnavailable
			})
			return 0, io.ErrUnexpectedEOF
		}
		return size, nil
	})
	f := x.join(t, d, size, "r", x.Stored(layout.Blob(d), true))
	whole(t, f, data)
	f.Release()
	eventually(t, "the commit", func() bool { return x.linked("r", d) })
}

// TestStoredSlow: a store that does not begin, or stops in the middle, is given up for
// the next source, and if there is none it is waited for.
func TestStoredSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newModel(t, t.TempDir(), 1)
		m.store.m, m.store.room, m.healthy = m, 1<<40, true
		m.open()
		defer m.table.Close()
		m.distant = &modelDistant{modelSource: &modelSource{m: m, data: m.content, spans: true}}
		for _, stalls := range []time.Duration{time.Minute, 0} {
			m.distant.hangs, m.distant.stalls = time.Minute-stalls, stalls
			f, err := m.table.Join(fill.Want{Digest: m.digest, Size: int64(len(m.content)), Repository: "r", Anew: true, Sources: []fill.Source{
				m.table.Stored(layout.Blob(m.digest), false), &modelSource{m: m, data: m.content, spans: true},
			}})
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			whole(t, f, m.content)
			f.Release()
			if took := time.Since(began); took < 5*time.Second || took > 31*time.Second {
				t.Errorf("it took %v", took)
			}
			wait(t.Context(), time.Second) // for the commit
			m.mu.Lock()
			clear(m.store.values)
			m.mu.Unlock()
		}
		m.distant.hangs, m.distant.stalls = 10*time.Second, 0
		f, err := m.table.Join(fill.Want{
			Digest: m.digest, Size: int64(len(m.content)), Repository: "r", Anew: true,
			Sources: []fill.Source{m.table.Stored(layout.Blob(m.digest), true)},
		})
		if err != nil {
			t.Fatal(err)
		}
		whole(t, f, m.content)
		f.Release()
	})
}

// TestStoredWrong: what the store has wrong at the distant place is not asked for
// again, and what is stored in its place comes from the next source. What is near and
// wrong is let go of, and its distant bytes are asked for.
func TestStoredWrong(t *testing.T) {
	for _, size := range []int{1000, 3 * mib} {
		data, d := random(size)
		key := layout.Blob(d)
		bad := bytes.Clone(data)
		bad[size/2] ^= 1
		x, store := newDistantTable(t)
		store.Place(key, bad)
		up := &source{name: "up", data: data}
		for attempt := 0; ; attempt++ {
			f := x.join(t, d, size, "r", x.Stored(key, false), up)
			got, err := read(t, f, 0, size, true)
			f.Release()
			if err == nil && bytes.Equal(got, data) {
				break
			}
			if !errors.Is(err, fill.ErrDigest) || size <= mib || attempt == 1 {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
		}
		eventually(t, "the commit", func() bool { return x.linked("r", d) })
		if !bytes.Equal(store.Placed(key), data) {
			t.Error("the distant bytes are still wrong")
		}

		x, store = newDistantTable(t)
		store.Place(key, data)
		f := x.join(t, d, size, "r", x.Stored(key, true))
		whole(t, f, data)
		f.Release()
		eventually(t, "the commit", func() bool { return x.linked("r", d) })
		if err := store.Store.Put(t.Context(), key, data[:size-1], storage.Lazy); err != nil {
			t.Fatal(err)
		}
		f = x.join(t, d, size, "s", x.Stored(key, true))
		whole(t, f, data)
		f.Release()
		if store.Distrusted(key) {
			t.Error("the distant bytes are blamed for the near ones")
		}
	}
}

// TestStoredNearWrong: the distant bytes are not blamed for near ones that are wrong.
func TestStoredNearWrong(t *testing.T) {
	for _, size := range []int{1000, 3 * mib} {
		data, d := random(size)
		key := layout.Blob(d)
		x, store := newDistantTable(t)
		store.Place(key, data)
		bad := bytes.Clone(data)
		bad[size/2] ^= 1
		if err := store.Store.Put(t.Context(), key, bad, storage.Lazy); err != nil {
			t.Fatal(err)
		}
		// By another digest nobody looks what is near before.
		other := digest.SHA512.FromBytes(data)
		for attempt := 0; ; attempt++ {
			f := x.join(t, other, size, "r", x.Stored(key, true))
			got, err := read(t, f, 0, size, true)
			f.Release()
			if err == nil && bytes.Equal(got, data) {
				break
			}
			if !errors.Is(err, fill.ErrDigest) || attempt == 1 {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
		}
		if store.Distrusted(key) {
			t.Error("the distant bytes are blamed")
		}
	}
}

// TestStoredSteady: a slow store is not asked by several requests.
func TestStoredSteady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newModel(t, t.TempDir(), 1)
		m.store.m, m.store.room, m.healthy = m, 1<<40, true
		m.content = bytes.Repeat([]byte("0123456789abcdef"), 500)
		m.digest = digest.FromBytes(m.content)
		m.open()
		defer m.table.Close()
		fill.Tune(m.table, 16, 16, 64, 64, 64)
		m.distant = &modelDistant{modelSource: &modelSource{m: m, data: m.content, spans: true, slow: true}}
		f, err := m.table.Join(fill.Want{
			Digest: m.digest, Size: int64(len(m.content)), Repository: "r", Connections: 4,
			Sources: []fill.Source{m.table.Stored(layout.Blob(m.digest), false), &modelSource{m: m, data: m.content, spans: true}},
		})
		if err != nil {
			t.Fatal(err)
		}
		whole(t, f, m.content)
		f.Release()
		if m.distant.wholes != 1 || m.distant.parts != 0 {
			t.Errorf("asked %d times from the beginning and %d times from further on", m.distant.wholes, m.distant.parts)
		}
	})
}

// TestStoredLeft: a fill goes on though everybody who asked has left, if half of it is
// there, and otherwise stops asking.
func TestStoredLeft(t *testing.T) {
	x, store := newDistantTable(t)
	x.parks = true
	const size = 8 * mib
	data, d := random(size)
	store.Place(layout.Blob(d), data)
	stop := int64(6 * mib)
	gate := make(chan struct{})
	store.Deliver(func(ctx context.Context, _ string, at int64) (int64, error) {
		if at < stop {
			return stop - at, nil
		}
		select {
		case <-gate:
			return mib, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var fills []*fill.Fill
	var wg sync.WaitGroup
	for range 8 {
		f := x.join(t, d, size, "r", x.Stored(layout.Blob(d), true))
		fills = append(fills, f)
		wg.Go(func() {
			r := f.NewReader(ctx, 0, size, true)
			defer f.Release()
			defer r.Close()
			io.CopyN(io.Discard, r, 6*mib)
			io.Copy(io.Discard, r)
		})
	}
	eventually(t, "most of it", func() bool { return fill.Hashed(fills[0]) >= 5*mib })
	cancel()
	wg.Wait()
	close(gate)
	eventually(t, "the commit", func() bool { return x.linked("r", d) })
	if n := len(gets(store, d)); n != 1 {
		t.Errorf("asked %d times", n)
	}
}
