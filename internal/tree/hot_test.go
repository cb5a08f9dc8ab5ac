package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// settle waits until what was set in memory is visible, or dropped.
func (b *bench) settle() { b.Tree.hot.cache.Wait() }

// unreadable is a store that fails whatever is asked of it.
func (b *bench) unreadable() {
	b.Tree.store = failing{b.store}
}

func TestWarm(t *testing.T) {
	b := newBench(t)
	config := b.blob(`{"os":"linux"}`)
	body := image(config)
	d := b.put("r", body)
	other := b.put("s", index())
	b.opens(config, `{"os":"linux"}`)
	b.settle()
	b.unreadable()
	b.wantManifest("r", d, body)
	b.opens(config, `{"os":"linux"}`)
	if info, err := b.StatBlob(t.Context(), config); err != nil || info.Size != 14 {
		t.Errorf("%+v, %v", info, err)
	}
	// What one repository has made warm is not another's.
	if m, ok := b.Warm("s", d, time.Time{}); ok {
		t.Errorf("s has %s", m.Digest)
	}
	if _, ok := b.Warm("r", other, time.Time{}); ok {
		t.Error("r has what belongs to s")
	}
}

// TestHotDrops: ristretto may drop what it is given, at once or later, and
// nothing depends on it.
func TestHotDrops(t *testing.T) {
	b := newBench(t)
	b.Heat(0) // there is room for nothing
	config := b.blob("a config")
	body := image(config)
	d := b.put("r", body)
	for range 3 {
		b.wantManifest("r", d, body)
		b.opens(config, "a config")
		b.settle()
		if _, ok := b.Warm("r", d, time.Time{}); ok {
			t.Fatal("it is warm though there is no room")
		}
	}
	b.Heat(1 << 20)
	b.wantManifest("r", d, body)
	b.settle()
	if _, ok := b.Warm("r", d, time.Time{}); !ok {
		t.Error("it is not warm though there is room now")
	}
}

// warmed is how many values there are in memory.
func (b *bench) warmed() (n int) {
	b.settle()
	b.hot.cache.IterValues(func(*warm) (stop bool) {
		n++
		return false
	})
	return n
}

// TestHeatLess: what there is no room for any more goes though nothing comes.
func TestHeatLess(t *testing.T) {
	b := newBench(t)
	const size = 50_000
	var blobs []digest.Digest
	for i := range 200 {
		d := b.blob(fmt.Sprintf("%*d", size, i))
		b.opens(d, fmt.Sprintf("%*d", size, i))
		b.settle()
		blobs = append(blobs, d)
	}
	if n := b.warmed(); n != len(blobs) {
		t.Fatalf("%d in memory", n)
	}
	b.Heat(DefaultHot) // changes nothing
	b.Heat(2 * DefaultHot)
	if n := b.warmed(); n != len(blobs) {
		t.Errorf("%d in memory, with more room than before", n)
	}
	const less = 1 << 20
	b.Heat(less)
	if n := b.warmed(); n > less/size {
		t.Errorf("%d blobs of %d bytes in memory where %d bytes may be", n, size, less)
	}
	for i, d := range blobs {
		b.opens(d, fmt.Sprintf("%*d", size, i))
		b.settle()
	}
	if n := b.warmed(); n == 0 || n > less/size {
		t.Errorf("%d blobs of %d bytes in memory where %d bytes may be", n, size, less)
	}
}

// TestHeatMeanwhile: the size changes while content comes and is asked for.
func TestHeatMeanwhile(t *testing.T) {
	b := newBench(t)
	var blobs []digest.Digest
	for i := range 20 {
		blobs = append(blobs, b.blob(fmt.Sprintf("%50000d", i)))
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 200 {
				if g < 2 {
					b.Heat(int64(1+(i+g)%3) << 17)
					continue
				}
				content, _, err := b.OpenBlob(t.Context(), blobs[i%len(blobs)])
				if err != nil {
					t.Error(err)
					return
				}
				content.Close()
			}
		})
	}
	wg.Wait()
	b.Heat(0)
	if n := b.warmed(); n != 0 {
		t.Errorf("%d in memory without room", n)
	}
}

// TestHotIsHashed: a small blob is hashed when it comes into memory.
func TestHotIsHashed(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	b.write(layout.Blob(d), []byte("rotten byt"))
	if err := third(b.OpenBlob(t.Context(), d)); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
	b.blob("some bytes") // fetched again
	b.opens(d, "some bytes")
}

// TestLargeIsNotHot: what is large comes from the store, and can be sent by the
// kernel from there.
func TestLargeIsNotHot(t *testing.T) {
	b := newBench(t)
	large := make([]byte, maxHot+1)
	d := b.blob(string(large))
	b.opens(d, string(large))
	b.settle()
	if _, ok := b.hot.get(d); ok {
		t.Error("it is in memory")
	}
}

// TestManifestAndBlob: the same bytes are asked for as a blob and as a manifest.
func TestManifestAndBlob(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("config"))
	d := digest.FromString(body)
	b.blob(body)
	b.opens(d, body)
	b.settle()
	if _, ok := b.Warm("r", d, time.Time{}); ok {
		t.Error("a blob of nobody's is a manifest of r")
	}
	b.put("r", body)
	b.settle()
	b.opens(d, body)
	b.wantManifest("r", d, body)
}

// TestNoRecord: that there is none is remembered, until there is one.
func TestNoRecord(t *testing.T) {
	b := newBench(t)
	if _, err := b.Record(t.Context(), "r"); err == nil {
		t.Fatal("a record of nothing")
	}
	store := b.Tree.store
	b.unreadable()
	if _, err := b.Record(t.Context(), "r"); errors.Is(err, errBroken) {
		t.Error("the store was asked again")
	}
	b.Tree.store = store
	if err := b.PutRecord(t.Context(), "r", Record{Class: Mirrored}); err != nil {
		t.Fatal(err)
	}
	if r, err := b.Record(t.Context(), "r"); err != nil || r.Class != Mirrored {
		t.Errorf("%+v, %v", r, err)
	}
}

var _ io.ReadSeeker = inMemory{} // for ranges

// slow lets the reading of small values wait.
type slow struct {
	storage.Store
	reading chan struct{}
	goOn    chan struct{}
}

func (s *slow) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	if strings.Contains(key, "/revisions/") {
		s.reading <- struct{}{}
		<-s.goOn
	}
	return s.Store.Get(ctx, key, limit)
}

// TestCloseWaitsForScan: a repository is being read for somebody who has left.
func TestCloseWaitsForScan(t *testing.T) {
	b := newBench(t)
	b.put("r", image(digest.FromString("config")))
	b.restart()
	s := &slow{Store: b.store, reading: make(chan struct{}), goOn: make(chan struct{})}
	tree := New(s, nil)
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, _, err := tree.Member(ctx, "r", digest.FromString("a layer"))
		left <- err
	}()
	arrive(t, "the scan", s.reading)
	cancel()
	if err := arrive(t, "who left", left); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	closed := make(chan error)
	go func() {
		tree.Close()
		closed <- nil
	}()
	select {
	case <-closed:
		t.Error("closed while a repository is being read")
	case <-time.After(50 * time.Millisecond):
		close(s.goOn)
		arrive(t, "the end", closed)
	}
	if _, _, err := tree.Member(t.Context(), "s", digest.FromString("another")); err == nil {
		t.Error("read after the end")
	}
}
