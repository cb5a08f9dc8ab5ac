package tree

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

func TestBlobs(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	info, err := b.StatBlob(t.Context(), d)
	if err != nil || info.Size != 10 {
		t.Errorf("StatBlob: %+v, %v", info, err)
	}
	r, info, err := b.OpenBlob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if data, err := io.ReadAll(r); err != nil || !bytes.Equal(data, []byte("some bytes")) || info.Size != 10 {
		t.Errorf("OpenBlob: %q, %+v, %v", data, info, err)
	}
	absent := digest.FromString("absent")
	if _, err := b.StatBlob(t.Context(), absent); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("StatBlob of nothing: %v", err)
	}
	if _, _, err := b.OpenBlob(t.Context(), absent); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenBlob of nothing: %v", err)
	}
}

// A doubting store doubts the blobs it is told to. Its reader of one calls read
// before each piece, if that is set.
type doubting struct {
	storage.Store
	read    func() error
	vouched chan string // holds the keys vouched for

	mu       sync.Mutex
	doubtful map[string]bool
}

func (b *bench) doubt(blobs ...digest.Digest) *doubting {
	s := &doubting{Store: b.store, vouched: make(chan string, 100), doubtful: map[string]bool{}}
	for _, d := range blobs {
		s.doubtful[layout.Blob(d)] = true
	}
	b.Tree = New(s, b.told.note)
	return s
}

// stall holds each read back until gate is closed, and tells of it before.
func (s *doubting) stall() (reading, gate chan struct{}) {
	reading, gate = make(chan struct{}, 100), make(chan struct{})
	s.read = func() error {
		reading <- struct{}{}
		<-gate
		return nil
	}
	return reading, gate
}

func (s *doubting) doubts(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.doubtful[key]
}

func (s *doubting) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, info, err := s.Store.Open(ctx, key, offset, length)
	if info.Doubtful = s.doubts(key); err == nil && info.Doubtful && s.read != nil {
		r = hookedReader{r, s.read}
	}
	return r, info, err
}

func (s *doubting) Stat(ctx context.Context, key string) (storage.Info, error) {
	info, err := s.Store.Stat(ctx, key)
	info.Doubtful = s.doubts(key)
	return info, err
}

func (s *doubting) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	s.mu.Lock()
	delete(s.doubtful, key)
	s.mu.Unlock()
	return s.Store.Put(ctx, key, data, d)
}

func (s *doubting) Vouch(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.doubtful, key)
	s.vouched <- key
	return nil
}

type hookedReader struct {
	io.ReadCloser
	read func() error
}

func (r hookedReader) Read(p []byte) (int, error) {
	if err := r.read(); err != nil {
		return 0, err
	}
	return r.ReadCloser.Read(p)
}

// opens opens a blob and wants its bytes.
func (b *bench) opens(d digest.Digest, want string) {
	b.t.Helper()
	r, _, err := b.OpenBlob(b.t.Context(), d)
	if err != nil {
		b.t.Errorf("OpenBlob %s: %v", d, err)
		return
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != want {
		b.t.Errorf("OpenBlob %s: %q, %v; want %q", d, got, err, want)
	}
}

func wantDamaged(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, ErrDamaged) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v; want ErrDamaged, which is absence", what, err)
	}
}

// arrive waits for what another goroutine sends.
func arrive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(time.Minute):
		t.Fatalf("%s does not come", what)
		panic("unreachable")
	}
}

// After a loss of power that left nothing to go by, everything is doubtful.
func TestLossOfPower(t *testing.T) {
	b := newBench(t)
	whole, zeros, short := b.blob("some bytes"), b.blob("more bytes"), b.blob("less bytes")
	b.Tree.Close()
	b.store.Close()
	b.write(layout.Blob(zeros), make([]byte, 10))
	b.write(layout.Blob(short), nil)
	b.write("mirror/synced", nil)
	b.open()
	for _, d := range []digest.Digest{whole, zeros, short} {
		if info, err := b.StatBlob(t.Context(), d); err != nil || !info.Doubtful {
			t.Errorf("StatBlob before it is hashed: %+v, %v", info, err)
		}
	}
	b.opens(whole, "some bytes")
	if info, err := b.StatBlob(t.Context(), whole); err != nil || info.Doubtful {
		t.Errorf("StatBlob once it is hashed: %+v, %v", info, err)
	}
	for _, d := range []digest.Digest{zeros, short} {
		wantDamaged(t, "OpenBlob", third(b.OpenBlob(t.Context(), d)))
		if _, err := os.Stat(b.file(layout.Blob(d))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the damaged bytes are still there: %v", err)
		}
	}
	b.blob("more bytes") // fetched again
	b.opens(zeros, "more bytes")
	b.restart()
	b.opens(whole, "some bytes")
	b.opens(zeros, "more bytes")
}

func TestDoubtfulBlobIsHashedOnce(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	store := b.doubt(d)
	reading, gate := store.stall()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { b.opens(d, "some bytes") })
	}
	arrive(t, "the hashing", reading)
	// One who does not want to wait, and does not end it for the others.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := third(b.OpenBlob(ctx, d)); !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	close(gate)
	wg.Wait()
	b.opens(d, "some bytes")
	// 10 bytes and the end are two pieces.
	if n := len(reading) + 1; n != 2 || len(store.vouched) != 1 {
		t.Errorf("%d pieces read, vouched %d times", n, len(store.vouched))
	}
}

func TestHashingOutlivesWhoWaited(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	store := b.doubt(d)
	reading, gate := store.stall()
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() { left <- third(b.OpenBlob(ctx, d)) }()
	arrive(t, "the hashing", reading)
	cancel()
	if err := arrive(t, "who left", left); !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	close(gate)
	if key := arrive(t, "the end of the hashing", store.vouched); key != layout.Blob(d) {
		t.Errorf("vouched for %s", key)
	}
}

func TestTwoAreHashedAtOnce(t *testing.T) {
	b := newBench(t)
	var blobs []digest.Digest
	for _, data := range []string{"a", "b", "c", "d", "e"} {
		blobs = append(blobs, b.blob(data))
	}
	store := b.doubt(blobs...)
	reading, next := make(chan struct{}, 100), make(chan struct{})
	var mu sync.Mutex
	now, most := 0, 0
	store.read = func() error {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		reading <- struct{}{}
		<-next
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	}
	var wg sync.WaitGroup
	for i, d := range blobs {
		wg.Go(func() { b.opens(d, string(rune('a'+i))) })
	}
	for range 2 {
		arrive(t, "the hashing", reading)
	}
	close(next)
	wg.Wait()
	if most != 2 {
		t.Errorf("%d at once, want 2", most)
	}
}

// A disk that cannot be read proves nothing against the bytes.
func TestHashingThatFails(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	store := b.doubt(d)
	store.read = func() error { return errBroken }
	if err := third(b.OpenBlob(t.Context(), d)); !errors.Is(err, errBroken) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want the store's own error", err)
	}
	store.read = nil
	b.opens(d, "some bytes")
}

func TestReplacedWhileHashed(t *testing.T) {
	b := newBench(t)
	d := b.blob("some bytes")
	b.write(layout.Blob(d), []byte("wrong ones"))
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(b.file(layout.Blob(d)), long, long); err != nil {
		t.Fatal(err)
	}
	store := b.doubt(d)
	var once sync.Once
	store.read = func() error {
		once.Do(func() {
			if err := store.Put(t.Context(), layout.Blob(d), []byte("some bytes"), storage.Durable); err != nil {
				t.Error(err)
			}
		})
		return nil
	}
	b.opens(d, "some bytes")
	b.holds(layout.Blob(d), "some bytes")
}

func TestCloseEndsHashing(t *testing.T) {
	b := newBench(t)
	blobs := []digest.Digest{b.blob("a"), b.blob("b"), b.blob("c")} // one must wait for its turn
	store := b.doubt(blobs...)
	reading, closed := make(chan struct{}, 100), make(chan struct{})
	store.read = func() error {
		reading <- struct{}{}
		<-closed
		return nil
	}
	ended := make(chan error, len(blobs))
	for _, d := range blobs {
		go func() { ended <- third(b.OpenBlob(t.Context(), d)) }()
	}
	for range 2 {
		arrive(t, "the hashing", reading)
	}
	go func() {
		// The one that waits for its turn ends at once.
		ended <- <-ended
		close(closed)
	}()
	b.Tree.Close()
	for range blobs {
		if err := arrive(t, "the end", ended); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	}
	if err := third(b.OpenBlob(t.Context(), blobs[0])); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
	if len(store.vouched) > 0 {
		t.Error("vouched for what was not read")
	}
	for i, d := range blobs {
		b.holds(layout.Blob(d), string(rune('a'+i)))
	}
}

func third[A, B any](_ A, _ B, err error) error { return err }

// TestLostRecord: the record of a mirrored repository is not synced at once,
// and may be empty after a loss of power. Then it counts as absent.
func TestLostRecord(t *testing.T) {
	b := newBench(t)
	s := b.doubt()
	s.doubtful[layout.Record("lost")] = true
	for _, left := range []string{"", "\x00\x00\x00"} {
		b.write(layout.Record("lost"), []byte(left))
		s.doubtful[layout.Record("lost")] = true
		if _, err := b.Record(t.Context(), "lost"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", left, err)
		}
	}
}

func TestProve(t *testing.T) {
	b := newBench(t)
	right, wrong, large := b.blob("some bytes"), b.blob("more bytes"), b.blob(string(make([]byte, maxHot+1)))
	b.write(layout.Blob(wrong), []byte("rotten byt"))
	b.write(layout.Blob(large), make([]byte, maxHot))
	for range 2 {
		if err := b.Prove(t.Context(), right); err != nil {
			t.Error(err)
		}
	}
	b.wantTold("hashed "+short(right), "hashed "+short(right))
	for _, d := range []digest.Digest{wrong, large} {
		wantDamaged(t, "Prove", b.Prove(t.Context(), d))
		b.wantTold("removed " + short(d))
		if err := b.Prove(t.Context(), d); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
			t.Errorf("Prove of nothing: %v", err)
		}
	}
	b.blob("more bytes") // fetched again
	if err := b.Prove(t.Context(), wrong); err != nil {
		t.Error(err)
	}
}

// TestWrongStays: bytes that nobody may be able to fetch again are not served, not
// deleted, and not hashed again for every client.
func TestWrongStays(t *testing.T) {
	b := newBench(t)
	hosted, mirrored, right := b.blob("some bytes"), b.blob("more bytes"), b.blob("less bytes")
	for _, d := range []digest.Digest{hosted, mirrored} {
		b.write(layout.Blob(d), []byte("rotten byt"))
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(b.file(layout.Blob(d)), long, long); err != nil {
			t.Fatal(err)
		}
	}
	store := b.doubt(hosted, mirrored, right)
	read := 0
	store.read = func() error { read++; return nil }
	var suspects []digest.Digest
	b.Guard(func(_ context.Context, d digest.Digest) (bool, error) {
		return false, map[digest.Digest]error{hosted: errBroken}[d]
	}, func(d digest.Digest) { suspects = append(suspects, d) })
	for range 3 {
		wantDamaged(t, "OpenBlob", third(b.OpenBlob(t.Context(), hosted)))
	}
	if read != 2 { // the bytes and their end
		t.Errorf("%d pieces read", read)
	}
	b.holds(layout.Blob(hosted), "rotten byt")
	if !slices.Equal(suspects, []digest.Digest{hosted}) {
		t.Errorf("suspected: %v", suspects)
	}
	wantDamaged(t, "OpenBlob", third(b.OpenBlob(t.Context(), mirrored)))
	if _, err := os.Stat(b.file(layout.Blob(mirrored))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what can be fetched again stays: %v", err)
	}
	b.opens(right, "less bytes")
	// Whoever pushes it again has put it right.
	b.write(layout.Blob(hosted), []byte("some bytes"))
	b.opens(hosted, "some bytes")
}
