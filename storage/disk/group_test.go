package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

// A machine runs one process after the other on a directory. It has a clock, a
// boot and timers that a test moves.
type machine struct {
	t   *testing.T
	dir string
	*store

	mu     sync.Mutex
	boot   string
	clock  time.Time
	timers map[*time.Duration]func()
	syncs  int
	broken error // of every sync
	fsync  func(*os.File) error
}

func newMachine(t *testing.T) *machine {
	m := &machine{t: t, dir: t.TempDir(), boot: "first", clock: time.Now(), timers: map[*time.Duration]func(){}, fsync: (*os.File).Sync}
	m.open()
	t.Cleanup(func() {
		m.broken = nil
		m.store.Close()
	})
	return m
}

func (m *machine) open() {
	m.t.Helper()
	s, err := open(m.dir, provisioned(m.t, &Disk{Directory: m.dir}).settings, host{
		boot: m.boot,
		now: func() time.Time {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.clock
		},
		after: func(d time.Duration, f func()) func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.timers[&d] = f
			return func() bool {
				m.mu.Lock()
				defer m.mu.Unlock()
				_, pending := m.timers[&d]
				delete(m.timers, &d)
				return pending
			}
		},
		sync: func(dir *os.File) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.syncs++
			if m.broken != nil {
				return m.broken
			}
			return syncfs(dir)
		},
		fsync: func(f *os.File) error { return m.fsync(f) },
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.store = s
}

// kill ends the process as kill -9 does: the kernel drops the lock.
func (m *machine) kill() {
	holdsMu.Lock()
	defer holdsMu.Unlock()
	delete(holds, m.hold.path)
	m.hold.lock.Close()
	m.hold.group.dir.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.timers)
}

// stop ends the process in good order.
func (m *machine) stop() {
	m.t.Helper()
	if err := m.store.Close(); err != nil {
		m.t.Fatal(err)
	}
}

// pass moves the clock. Timers are only fired by fire.
func (m *machine) pass(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clock = m.clock.Add(d)
}

// fire lets the time of every timer come, and reports how many there were.
func (m *machine) fire() int {
	m.mu.Lock()
	fired := m.timers
	m.timers = map[*time.Duration]func(){}
	m.mu.Unlock()
	for d, f := range fired {
		if *d != 30*time.Second {
			m.t.Errorf("a timer of %v", *d)
		}
		f()
	}
	return len(fired)
}

// write writes a value lazily, some time before or after now.
func (m *machine) write(key string, ago time.Duration) {
	m.t.Helper()
	if err := m.Put(m.t.Context(), key, []byte(key), storage.Lazy); err != nil {
		m.t.Fatal(err)
	}
	at := m.clock.Add(ago)
	if err := os.Chtimes(filepath.Join(m.dir, key), at, at); err != nil {
		m.t.Fatal(err)
	}
}

// wantDoubtful asks Stat, Open and List which values are doubtful.
func (m *machine) wantDoubtful(want ...string) {
	m.t.Helper()
	got := []string{}
	for info, err := range m.List(m.t.Context(), "v/", true) {
		if err != nil {
			m.t.Fatal(err)
		}
		stat, err := m.Stat(m.t.Context(), info.Key)
		if err != nil {
			m.t.Fatal(err)
		}
		r, opened, err := m.Open(m.t.Context(), info.Key, 0, -1)
		if err != nil {
			m.t.Fatal(err)
		}
		r.Close()
		if stat != info || opened != info {
			m.t.Errorf("List says %+v, Stat %+v, Open %+v", info, stat, opened)
		}
		if info.Doubtful {
			got = append(got, info.Key)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		m.t.Errorf("doubtful are %q, want %q", got, want)
	}
}

// lose writes one value of each age, loses power, and starts again.
func (m *machine) lose() {
	m.t.Helper()
	m.write("v/old", -time.Hour)
	m.write("v/margin", -time.Second)
	m.write("v/new", 10*time.Second)
	m.pass(20 * time.Second)
	m.kill()
	m.boot = "second"
	m.open()
	m.write("v/later", time.Minute)
}

func TestLossOfPower(t *testing.T) {
	m := newMachine(t)
	m.lose()
	m.wantDoubtful("v/margin", "v/new")
}

func TestLossOfPowerAfterSync(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", 0)
	m.pass(30 * time.Second)
	m.fire()
	m.write("v/b", 10*time.Second)
	m.pass(20 * time.Second)
	m.kill()
	m.boot = "second"
	m.open()
	m.wantDoubtful("v/b")
}

func TestStopIsNoLossOfPower(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", 0)
	m.pass(time.Hour)
	m.stop()
	if m.syncs != 1 {
		t.Errorf("%d syncs, want 1", m.syncs)
	}
	m.boot = "second"
	m.open()
	m.wantDoubtful()
	m.stop()
	if m.syncs != 1 {
		t.Error("synced though nothing was written")
	}
	m.boot = "third"
	m.open()
	m.wantDoubtful()
	m.write("v/b", time.Second)
	m.pass(time.Minute)
	m.kill() // the mark no longer says that all is well
	m.boot = "fourth"
	m.open()
	m.wantDoubtful("v/b")
}

func TestKillIsNoLossOfPower(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", time.Second)
	m.pass(time.Minute)
	m.kill()
	m.open()
	m.wantDoubtful()
	m.pass(time.Minute)
	m.kill() // neither of the two has synced
	m.boot = "second"
	m.open()
	m.wantDoubtful("v/a")
}

// What a killed process wrote is synced by the next, though it writes nothing.
func TestKilledIsSynced(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", time.Second)
	m.pass(time.Minute)
	m.kill()
	m.open()
	if m.fire() != 1 {
		t.Fatal("no timer")
	}
	m.kill()
	m.boot = "second"
	m.open()
	m.wantDoubtful()
}

func TestUnknownBoot(t *testing.T) {
	m := newMachine(t)
	m.stop()
	m.boot = ""
	m.open()
	m.write("v/a", time.Second)
	m.pass(time.Minute)
	m.stop()
	m.open()
	m.wantDoubtful()
	m.write("v/b", time.Second)
	m.pass(time.Minute)
	m.kill()
	m.open()
	m.wantDoubtful("v/b")
}

func TestVouch(t *testing.T) {
	m := newMachine(t)
	m.lose()
	for _, key := range []string{"v/new", "v/old"} {
		before, _ := m.Stat(t.Context(), key)
		if err := m.Vouch(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if after, _ := m.Stat(t.Context(), key); !before.Doubtful && after != before {
			t.Errorf("vouching for what was not in doubt changed %+v to %+v", before, after)
		}
	}
	m.wantDoubtful("v/margin")
	m.write("v/margin", time.Minute) // written again
	m.wantDoubtful()
	m.pass(time.Hour)
	m.stop()
	m.boot = "third"
	m.open()
	m.wantDoubtful()
}

func TestDoubtStays(t *testing.T) {
	m := newMachine(t)
	m.lose()
	for range 2 {
		m.pass(time.Hour)
		m.kill()
		m.open()
		m.wantDoubtful("v/margin", "v/new")
		m.stop()
		m.boot += "+"
		m.open()
		m.wantDoubtful("v/margin", "v/new")
	}
	m.write("v/third", time.Second)
	m.pass(time.Minute)
	m.kill()
	m.boot = "third"
	m.open()
	// Later lies between the two.
	m.wantDoubtful("v/later", "v/margin", "v/new", "v/third")
}

func TestDamagedMark(t *testing.T) {
	for name, damage := range map[string][]byte{"empty": {}, "zeros": make([]byte, 100), "half": []byte(`{"boot":"first","ti`), "no time": []byte(`{"clean":true}`)} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.write("v/a", 0)
			m.write("v/b", -1000*time.Hour)
			m.pass(time.Minute)
			m.stop()
			if err := os.WriteFile(markPath(m.dir), damage, 0o600); err != nil {
				t.Fatal(err)
			}
			m.open()
			m.write("v/c", time.Minute)
			m.wantDoubtful("v/a", "v/b")
			m.stop()
			m.open()
			m.wantDoubtful("v/a", "v/b")
		})
	}
}

// A directory of registry:2, or of a version that synced everything.
func TestNoMark(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", 0)
	m.pass(time.Hour)
	m.stop()
	if err := os.Remove(markPath(m.dir)); err != nil {
		t.Fatal(err)
	}
	m.open()
	m.wantDoubtful()
	m.write("v/b", time.Minute)
	m.pass(time.Hour)
	m.kill()
	m.boot = "second"
	m.open()
	m.wantDoubtful("v/b")
}

// A machine whose clock is not kept starts in the past.
func TestClockBehind(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", -time.Second) // before the time of the directory it came from
	m.kill()
	m.boot = "second"
	m.pass(-1000 * time.Hour)
	m.open()
	m.wantDoubtful("v/a")
	if err := m.Vouch(t.Context(), "v/a"); err != nil {
		t.Fatal(err)
	}
	m.wantDoubtful()
}

func TestOneTimerForAll(t *testing.T) {
	m := newMachine(t)
	if n := m.fire(); n != 0 {
		t.Errorf("%d timers though nothing was written", n)
	}
	if err := m.Put(t.Context(), "v/durable", nil, storage.Durable); err != nil {
		t.Fatal(err)
	}
	if n := m.fire(); n != 0 {
		t.Errorf("%d timers after a durable write", n)
	}
	for range 3 {
		m.write("v/a", 0)
		spool, err := m.Spool("fills")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(spool, "b")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.PutFile(t.Context(), "v/b", path, storage.Lazy); err != nil {
			t.Fatal(err)
		}
		if n := m.fire(); n != 1 {
			t.Errorf("%d timers, want 1", n)
		}
	}
	if m.syncs != 3 {
		t.Errorf("%d syncs, want 3", m.syncs)
	}
}

func TestFailedSync(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", time.Second)
	m.write("v/old", -time.Hour)
	m.pass(30 * time.Second)
	m.broken = errors.New("input/output error")
	m.fire()
	m.wantDoubtful("v/a") // the next sync does not tell of it
	m.pass(30 * time.Second)
	m.broken = nil
	if n := m.fire(); n != 1 {
		t.Fatalf("%d timers after a failure, want 1", n)
	}
	m.wantDoubtful("v/a")
	m.write("v/b", time.Second)
	m.pass(30 * time.Second)
	m.broken = errors.New("input/output error")
	if err := m.store.Close(); !errors.Is(err, m.broken) {
		t.Errorf("Close: %v", err)
	}
	m.open()
	m.wantDoubtful("v/a", "v/b")
	m.broken = nil
}

// The mark must not be ahead of what it vouches for, whenever power is lost.
func TestMarkFollowsSync(t *testing.T) {
	m := newMachine(t)
	m.write("v/a", 0)
	m.pass(time.Minute)
	var steps []string
	var marks []mark
	failpoint.Set(func(name string) {
		at, err := readMark(m.dir)
		if err != nil {
			t.Error(err)
		}
		steps, marks = append(steps, name), append(marks, at)
	})
	defer failpoint.Set(nil)
	m.fire()
	m.stop()
	failpoint.Set(nil)
	if want := []string{"store.synced", "store.marked", "store.marked"}; !slices.Equal(steps, want) {
		t.Fatalf("steps %q, want %q", steps, want)
	}
	if !marks[0].Time.Before(m.clock) || !marks[1].Time.Equal(m.clock) || marks[1].Clean || !marks[2].Clean {
		t.Errorf("marks %+v at %v", marks, m.clock)
	}
	m.open()
}

func TestSyncAmongWrites(t *testing.T) {
	m := newMachine(t)
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			for j := range 30 {
				key := fmt.Sprintf("v/%d/%d", i, j)
				if err := m.Put(context.Background(), key, bytes.Repeat([]byte(key), 100), storage.Lazy); err != nil {
					t.Error(err)
				}
				if err := m.Vouch(context.Background(), key); err != nil {
					t.Error(err)
				}
			}
		})
	}
	written := make(chan struct{})
	go func() {
		writers.Wait()
		close(written)
	}()
	for done := false; !done; {
		select {
		case <-written:
			done = true
		default:
		}
		m.fire()
		m.pass(time.Millisecond)
	}
	m.pass(time.Minute)
	m.kill()
	m.boot = "second"
	m.open()
	m.pass(time.Minute)
	m.stop()
	m.boot = "third"
	m.open()
	for info, err := range m.List(t.Context(), "v/", true) {
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Vouch(t.Context(), info.Key); err != nil {
			t.Error(err)
		}
	}
	m.wantDoubtful()
}

// Two stores of one process share the hold; only the last to close says that
// all is well.
func TestCloseOfOneOfTwo(t *testing.T) {
	m := newMachine(t)
	first := m.store
	m.open()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	m.write("v/a", time.Second)
	m.pass(time.Minute)
	m.kill()
	m.boot = "second"
	m.open()
	m.wantDoubtful("v/a")
}
