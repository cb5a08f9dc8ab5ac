package fill_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

var defaultSchedules = 100_000

var (
	schedules = flag.Int("schedules", 0, "how many schedules TestModel runs; 0: 100,000, or less with the race detector")
	firstSeed = flag.Uint64("seed", 1, "the first schedule's")
)

// TestModel runs schedules of readers that come, read some part at some speed
// and leave, of some that pull and take the file, refuse it or fail to, of sources that are cut, slow, wrong, deaf to ranges or down, of a disk
// that fills up, and of restarts, each against what must always hold:
//
//   - what a reader gets is the content, unless it asked for a part only and
//     some source is wrong;
//   - who asked for the end of the content is told it only if everything is
//     right;
//   - with a source that works in the end, nobody is told an error;
//   - without faults no byte is sent twice;
//   - what is taken is the content, unless nobody knows its digest and some source is
//     wrong, and who pulls is told what its own Take said;
//   - what is stored is the content, and every repository that joined is linked
//     to it;
//   - nothing is left: no goroutine, no reservation, no file but for the next
//     one's use.
//
// Time is the bubble's, so waiting costs none. A failure names its seed: -seed
// repeats it, with -schedules 1.
func TestModel(t *testing.T) {
	const shards = 4
	count := uint64(*schedules)
	if count == 0 {
		count = uint64(defaultSchedules)
	}
	for shard := range shards {
		t.Run(fmt.Sprint(shard), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if memory, err := os.MkdirTemp("/dev/shm", "fill"); err == nil {
				dir = memory
				t.Cleanup(func() { os.RemoveAll(memory) })
			}
			for seed := *firstSeed + uint64(shard); seed < *firstSeed+count; seed += shards {
				synctest.Test(t, func(t *testing.T) { newModel(t, dir, seed).run() })
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// model is one schedule.
type model struct {
	t       *testing.T
	seed    uint64
	rand    *rand.Rand
	mu      sync.Mutex // of rand, among other things
	dir     string
	content []byte
	digest  digest.Digest
	store   *modelStore
	table   *fill.Table
	sources []fill.Source
	distant *modelDistant // has the content too, unless it is nil
	healthy bool          // a source works in the end
	wrong   bool          // a source delivers something else
	faults  bool          // anything at all goes wrong
	closes  bool          // the table is closed while readers are there
	crashed bool
	tuning  [5]int64
	boot    string
	links   map[string]bool
	joined  map[string]bool

	pulls     pulling
	byName    bool // who pulls does not know the digest
	elsewhere bool // the file has been taken
	consumed  int  // how often the content was of no use any more
}

func newModel(t *testing.T, dir string, seed uint64) *model {
	m := &model{t: t, seed: seed, rand: rand.New(rand.NewPCG(seed, 0)), dir: dir, boot: "boot", links: map[string]bool{}, joined: map[string]bool{}}
	m.content = make([]byte, m.n(700)+1)
	for i := range m.content {
		m.content[i] = byte(m.rand.Uint32())
	}
	m.digest = digest.FromBytes(m.content)
	if m.chance(8) {
		m.digest = digest.SHA512.FromBytes(m.content)
		m.faults = true // nobody here knows under what it is stored
	}
	segment := int64(m.n(40) + 8)
	m.tuning = [5]int64{segment, int64(m.n(100)), segment * int64(m.n(3)+1), segment * int64(m.n(6)+3), int64(m.n(200))}
	m.store = &modelStore{dir: dir, values: map[string][]byte{}, room: 1 << 40}
	if m.chance(8) {
		m.store.room = int64(m.n(len(m.content) * 3 / 2))
	}
	m.pulls, m.byName = pulling(m.n(4)), m.chance(2)
	if m.pulls == somePull {
		m.faults = true // they fetch it as well as those who read
	}
	for range m.n(3) + 1 {
		m.sources = append(m.sources, m.source())
	}
	if m.chance(2) {
		s := m.source()
		s.spans, s.silent = true, false
		m.distant = &modelDistant{modelSource: s}
	}
	return m
}

// n returns a number below n; chance is true once in n times.
func (m *model) n(n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rand.IntN(n)
}

func (m *model) chance(n int) bool { return m.n(n) == 0 }

// pause lasts at most so long, or until ctx ends.
func (m *model) pause(ctx context.Context, most time.Duration) {
	wait(ctx, time.Duration(m.n(int(most))))
}

// wait makes no timer for nothing: the race detector has crashed in one that was due
// in a bubble when it was made.
func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (m *model) open() {
	m.table = fill.NewTable(m.store, func(_ context.Context, repository string, asked, canonical digest.Digest) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if _, ok := m.store.values[layout.Blob(canonical)]; !ok {
			m.t.Errorf("%s is linked to what is not stored", repository)
		}
		m.links[repository] = true
		return nil
	}, nil, m.makeRoom)
	fill.Tune(m.table, m.tuning[0], m.tuning[1], m.tuning[2], m.tuning[3], m.tuning[4])
	fill.Boot(m.table, m.boot)
	if m.seed%2 == 0 {
		fill.Cores(m.table, 1) // writers hash, too
	} else {
		fill.Cores(m.table, 64)
	}
}

func (m *model) run() {
	m.store.m = m
	m.open()
	for range m.n(3) + 1 {
		m.round()
		if m.t.Failed() {
			break
		}
		switch m.n(3) {
		case 0: // a stop and a start
			m.table.Close()
			m.open()
		case 1: // a death
			m.crash()
		default:
			m.pause(m.t.Context(), 5*time.Second)
		}
	}
	m.table.Close()
	m.settled()
	if m.t.Failed() {
		m.t.Logf("seed %d", m.seed)
	}
}

// round lets some readers come and go.
func (m *model) round() {
	m.closes = m.chance(10)
	if m.chance(6) && m.pulls != allPull {
		m.table.Ahead(m.want(m.n(5)))
	}
	var wg sync.WaitGroup
	for range m.n(6) + 1 {
		late := time.Duration(m.n(int(3 * time.Second)))
		if m.chance(2) {
			late = 0
		}
		wg.Go(func() {
			wait(m.t.Context(), late)
			if m.pulls == allPull || m.pulls == somePull && m.chance(2) {
				m.puller()
			} else {
				m.reader()
			}
		})
	}
	if m.closes {
		m.pause(m.t.Context(), time.Second)
		m.table.Close()
	}
	wg.Wait()
	if m.closes {
		m.open()
	}
}

func (m *model) want(repository int) fill.Want {
	m.mu.Lock()
	defer m.mu.Unlock()
	sources := m.sources[m.rand.IntN(len(m.sources)):]
	if m.healthy {
		sources = m.sources // so that there is one that works
	}
	if m.distant != nil && (m.healthy || m.rand.IntN(2) == 0) {
		stored := m.table.Stored(layout.Blob(digest.FromBytes(m.content)), false)
		if m.rand.IntN(4) == 0 {
			sources = append(slices.Clone(sources), stored)
		} else {
			sources = append([]fill.Source{stored}, sources...)
		}
	}
	return fill.Want{
		Digest: m.digest, Size: int64(len(m.content)), Repository: fmt.Sprint("r", repository),
		Sources: sources, Connections: m.rand.IntN(5),
	}
}

func (m *model) reader() {
	repository := m.n(5)
	f, err := m.table.Join(m.want(repository))
	if err != nil {
		if !errors.Is(err, fill.ErrClosed) || !m.closes {
			m.t.Errorf("join: %v", err)
		}
		return
	}
	defer f.Release()
	size := len(m.content)
	offset, length, proven := 0, size, true
	switch m.n(4) {
	case 0, 1:
	case 2: // open-ended
		offset = m.n(size)
		length = size - offset
	case 3:
		offset = m.n(size)
		length = m.n(size-offset) + 1
		proven = false
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	leaves := m.chance(3)
	if leaves {
		after := time.Duration(m.n(int(2 * time.Second)))
		if m.chance(3) {
			after = 0
		}
		stop := time.AfterFunc(after, cancel)
		defer stop.Stop()
	}
	r := f.NewReader(ctx, int64(offset), int64(length), proven)
	defer r.Close()
	var got []byte
	if err = r.Ready(ctx); err == nil {
		buffer := make([]byte, m.n(100)+1)
		slow := m.chance(4)
		for err == nil {
			var n int
			n, err = r.Read(buffer)
			got = append(got, buffer[:n]...)
			if slow {
				m.pause(ctx, 50*time.Millisecond)
			}
		}
	}
	whole := bytes.Equal(got, m.content[offset:offset+length])
	switch {
	case err == io.EOF && len(got) != length:
		m.t.Errorf("%d bytes from %d ended after %d", length, offset, len(got))
	case err == io.EOF && !whole && (proven || !m.wrong):
		m.t.Errorf("%d bytes from %d: wrong content", length, offset)
	case err == io.EOF:
		m.mu.Lock()
		m.joined[fmt.Sprint("r", repository)] = m.joined[fmt.Sprint("r", repository)] || proven
		m.mu.Unlock()
	case errors.Is(err, context.Canceled) && leaves:
	case errors.Is(err, fill.ErrClosed) && m.closes:
	case m.wrong && errors.Is(err, fill.ErrDigest):
	case m.healthy && !m.wrong:
		m.t.Errorf("%d bytes from %d, at %d: %v, though there is a source that works", length, offset, len(got), err)
	}
	if !m.wrong && !bytes.HasPrefix(m.content[offset:], got) {
		m.t.Errorf("wrong bytes at %d", offset)
	}
}

// crash starts a new table on what the files of the old one were at some
// moment.
func (m *model) crash() {
	image := map[string][]byte{}
	dir := m.store.spool()
	names, err := os.ReadDir(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	// Ledgers first: they never speak of what is not written yet.
	for _, ledgers := range []bool{true, false} {
		for _, entry := range names {
			if strings.HasSuffix(entry.Name(), ".ledger") == ledgers {
				data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
				if err == nil {
					image[entry.Name()] = data
				} else if !errors.Is(err, fs.ErrNotExist) {
					m.t.Fatal(err)
				}
			}
		}
	}
	m.table.Close()
	if m.chance(2) { // not only the process, but the machine
		m.boot += "'"
		for name, data := range image {
			switch {
			case len(data) == 0 || m.chance(3):
			case m.chance(2):
				image[name] = data[:m.n(len(data))]
			default:
				from := m.n(len(data))
				clear(data[from : from+m.n(len(data)-from)])
			}
		}
	}
	os.RemoveAll(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		m.t.Fatal(err)
	}
	for name, data := range image {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	m.crashed, m.faults = true, true // what was not noted is fetched again
	m.open()
}

// settled checks what must hold in the end.
func (m *model) settled() {
	t := m.t
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.store.reserved != 0 {
		t.Errorf("%d bytes stay reserved", m.store.reserved)
	}
	key := layout.Blob(digest.FromBytes(m.content))
	for k, v := range m.store.values {
		if k != key || !bytes.Equal(v, m.content) {
			t.Errorf("wrong content is stored under %s", k)
		}
	}
	if m.store.values[key] != nil {
		for repository := range m.joined {
			if m.joined[repository] && !m.links[repository] && !m.store.full {
				t.Errorf("%s is not linked", repository)
			}
		}
	}
	var sent int
	for _, s := range m.sources {
		sent += s.(*modelSource).sent
	}
	if m.distant != nil {
		sent += m.distant.sent
		if !m.faults && !m.store.full && m.distant.wholes > 1+m.consumed && m.distant.parts == 0 {
			t.Errorf("the store was asked %d times for the whole", m.distant.wholes)
		}
	}
	if !m.faults && !m.store.full && sent > len(m.content)*(1+m.consumed) {
		t.Errorf("%d bytes were sent for a content of %d", sent, len(m.content))
	}
	if left, _ := os.ReadDir(m.store.spool()); len(left) > 4 || len(left) > 2 && m.pulls != somePull || len(left) > 0 && m.pulls < somePull && m.store.values[key] != nil && !m.store.full && !m.crashed && m.digest.Algorithm() == digest.SHA256 {
		t.Errorf("left in the spool: %v", left)
	}
	os.RemoveAll(m.store.spool())
}

// modelStore keeps values in memory.
type modelStore struct {
	storage.Store
	m        *model
	dir      string
	values   map[string][]byte
	room     int64
	reserved int64
	full     bool
}

func (s *modelStore) spool() string { return filepath.Join(s.dir, "fills") }

func (s *modelStore) Spool(name string) (string, error) {
	return s.spool(), os.MkdirAll(s.spool(), 0o700)
}

type modelValue struct{ *bytes.Reader }

func (modelValue) Close() error { return nil }

func (s *modelStore) near(key string) (io.ReadCloser, storage.Info, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	v, ok := s.values[key]
	if !ok {
		return nil, storage.Info{}, fs.ErrNotExist
	}
	return modelValue{bytes.NewReader(v)}, storage.Info{Size: int64(len(v))}, nil
}

func (s *modelStore) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, info, err := s.near(key)
	switch {
	case err != nil && s.m.distant != nil:
		return s.m.distant.read(ctx, offset, length)
	case err != nil || length < 0:
		return r, info, err
	}
	return io.NopCloser(io.NewSectionReader(r.(modelValue), offset, length)), info, nil
}

func (s *modelStore) Distant() storage.Distant {
	if s.m.distant == nil {
		return nil
	}
	return s.m.distant
}

// modelDistant is a distant place with the troubles of a source.
type modelDistant struct {
	storage.Distant
	*modelSource
	hangs, stalls time.Duration // before it begins, and before it delivers
	wholes, parts int           // requests from the beginning, and others
}

func (d *modelDistant) OpenNear(_ context.Context, key string) (io.ReadCloser, storage.Info, error) {
	r, info, err := d.m.store.near(key)
	if err != nil {
		return nil, storage.Info{Size: -1}, storage.ErrDistant
	}
	return r, info, nil
}

func (d *modelDistant) read(ctx context.Context, offset, length int64) (io.ReadCloser, storage.Info, error) {
	wait(ctx, d.hangs)
	stream, err := d.Open(ctx, fill.Span{Offset: offset, Length: length})
	switch {
	case errors.As(err, new(permanent)):
		return nil, storage.Info{}, fs.ErrNotExist
	case err != nil:
		return nil, storage.Info{}, fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if offset == 0 {
		d.wholes++
	} else {
		d.parts++
	}
	return modelStall{stream, ctx, d.stalls}, storage.Info{Size: int64(len(d.data))}, nil
}

type modelStall struct {
	io.ReadCloser
	ctx   context.Context
	stall time.Duration
}

func (s modelStall) Read(p []byte) (int, error) {
	wait(s.ctx, s.stall)
	return s.ReadCloser.Read(p)
}

func (d *modelDistant) Drop(string) bool { return false }

func (d *modelDistant) Distrust(string) { d.Blame(nil) }

func (s *modelStore) Put(ctx context.Context, key string, data []byte, _ storage.Durability) error {
	s.m.pause(ctx, time.Millisecond)
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.values[key] = bytes.Clone(data)
	return nil
}

func (s *modelStore) PutFile(ctx context.Context, key, path string, d storage.Durability) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	os.Remove(path)
	return s.Put(ctx, key, data, d)
}

type modelReservation struct {
	s    *modelStore
	left int64
}

func (s *modelStore) Reserve(n int64) (storage.Reservation, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.reserved+n > s.room {
		s.full = true
		return nil, fmt.Errorf("%w for %d bytes", storage.ErrFull, n)
	}
	s.reserved += n
	return &modelReservation{s, n}, nil
}

func (r *modelReservation) Use(n int64) {
	r.s.m.mu.Lock()
	defer r.s.m.mu.Unlock()
	n = min(n, r.left)
	r.left -= n
	r.s.reserved -= n
}

func (r *modelReservation) Release() {
	r.s.m.mu.Lock()
	defer r.s.m.mu.Unlock()
	r.s.reserved -= r.left
	r.left = 0
}

// makeRoom makes some, or enough, or none.
func (m *model) makeRoom(ctx context.Context, n int64) bool {
	m.pause(ctx, time.Millisecond)
	if m.chance(3) {
		return false
	}
	more := n * int64(m.n(3)) / 2
	m.mu.Lock()
	defer m.mu.Unlock()
	m.store.room += more
	return true
}

// modelSource is a source with its own troubles.
type modelSource struct {
	m       *model
	data    []byte
	spans   bool // it delivers spans
	silent  bool // it does not say how long the content is
	cuts    int  // streams are cut, this often
	refuses int  // it refuses, this often
	down    bool
	slow    bool
	sent    int
}

func (m *model) source() *modelSource {
	s := &modelSource{m: m, data: m.content, spans: !m.chance(5), silent: m.chance(5), slow: m.chance(3)}
	if m.chance(4) {
		s.cuts = m.n(4)
	}
	if m.chance(5) {
		s.refuses = m.n(3)
	}
	s.down = m.chance(6)
	if m.chance(12) {
		s.data = bytes.Clone(m.content)
		s.data[m.n(len(s.data))] ^= 0x55
		m.wrong, m.faults = true, true
	}
	if !s.down {
		m.healthy = true
	}
	if s.cuts > 0 || s.refuses > 0 || s.down || !s.spans {
		m.faults = true
	}
	return s
}

func (s *modelSource) Blame(error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if bytes.Equal(s.data, s.m.content) && !s.m.wrong {
		s.m.t.Error("an honest source is blamed")
	}
}

func (s *modelSource) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	s.m.pause(ctx, 20*time.Millisecond)
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if span.Offset < 0 || span.Length <= 0 || span.Offset+span.Length > int64(len(s.data)) {
		s.m.t.Errorf("asked for %d bytes from %d of %d", span.Length, span.Offset, len(s.data))
	}
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case s.down:
		return nil, permanent{errors.New("it is down")}
	case s.refuses > 0:
		s.refuses--
		return nil, errors.New("not now")
	}
	stream := &fill.Stream{Offset: span.Offset, Size: int64(len(s.data)), From: "model"}
	end := span.Offset + span.Length
	if !s.spans {
		stream.Offset, stream.Whole, end = 0, true, int64(len(s.data))
	}
	if s.silent {
		stream.Size = -1
	}
	stream.ReadCloser = &modelStream{source: s, ctx: ctx, at: stream.Offset, end: end}
	return stream, nil
}

type modelStream struct {
	source *modelSource
	ctx    context.Context
	at     int64
	end    int64
}

func (s *modelStream) Close() error { return nil }

func (s *modelStream) Read(p []byte) (int, error) {
	src, m := s.source, s.source.m
	if src.slow {
		m.pause(s.ctx, 30*time.Millisecond)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.ctx.Err() != nil {
		m.faults = true // what has come of a segment is fetched again
		return 0, s.ctx.Err()
	}
	if src.cuts > 0 && m.rand.IntN(6) == 0 {
		src.cuts--
		return 0, errors.New("connection reset")
	}
	if s.at == s.end {
		return 0, io.EOF
	}
	n := min(len(p), m.rand.IntN(60)+1, int(s.end-s.at))
	copy(p, src.data[s.at:][:n])
	s.at += int64(n)
	src.sent += n
	if s.at == s.end && m.rand.IntN(2) == 0 {
		return n, io.EOF
	}
	return n, nil
}
