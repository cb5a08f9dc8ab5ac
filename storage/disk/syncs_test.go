package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// watch lets f see every file and directory before it is synced, as a path below
// the root. An error of f is that of the sync.
func (m *machine) watch(f func(path string, file *os.File) error) {
	m.fsync = func(file *os.File) error {
		path, err := filepath.Rel(m.dir, file.Name())
		if err == nil {
			err = f(path, file)
		}
		if err != nil {
			return err
		}
		return file.Sync()
	}
}

// record collects what is synced. Files on their way in go by one name.
func (m *machine) record() (take func() []string) {
	var mu sync.Mutex
	var synced []string
	m.watch(func(path string, _ *os.File) error {
		if strings.HasPrefix(path, "mirror/") {
			path = "temp"
		}
		mu.Lock()
		defer mu.Unlock()
		synced = append(synced, path)
		return nil
	})
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		got := synced
		synced = nil
		return got
	}
}

func (m *machine) lazily(keys ...string) {
	m.t.Helper()
	for _, key := range keys {
		if err := m.Put(m.t.Context(), key, []byte(key), storage.Lazy); err != nil {
			m.t.Fatal(err)
		}
	}
}

func (m *machine) bring(keys ...string) {
	m.t.Helper()
	if err := m.Sync(m.t.Context(), keys...); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) remove(keys ...string) {
	m.t.Helper()
	for _, key := range keys {
		if err := m.Delete(m.t.Context(), key); err != nil {
			m.t.Fatal(err)
		}
	}
}

// TestSync: files, their directories, and those above that are not known to be on
// the disk, each once.
func TestSync(t *testing.T) {
	m := newMachine(t)
	take := m.record()
	want := func(what string, paths ...string) {
		t.Helper()
		got := take()
		slices.Sort(got)
		slices.Sort(paths)
		if !slices.Equal(got, paths) {
			t.Errorf("%s: %q were synced, want %q", what, got, paths)
		}
	}
	m.lazily("v/a/x", "v/a/y")
	want("lazy")
	m.bring("v/a/x", "v/a/y")
	want("first", "v/a/x", "v/a/y", "v/a", "v", ".")
	m.bring("v/a/x")
	want("again", "v/a/x", "v/a")
	m.lazily("v/b/c/x")
	m.bring("v/b/c/x", "v/a/x")
	want("beside", "v/b/c/x", "v/a/x", "v/b/c", "v/b", "v", "v/a")
	m.lazily("v/b/c/y")
	m.bring("v/b/c/y")
	want("known", "v/b/c/y", "v/b/c")
	m.remove("v/b/c/x", "v/b/c/y") // and its directory
	m.bring("v/b/c/x")
	want("removed", "v")
	m.bring("v/a/none", "v/a/x/below")
	want("absent", "v/a")
	m.lazily("v/b/c/x")
	m.bring("v/b/c/x")
	want("made again", "v/b/c/x", "v/b/c", "v/b", "v")
	m.lazily("w")
	m.bring("w")
	want("at the top", "w", ".")
	if err := m.Put(t.Context(), "v/d/x", nil, storage.Durable); err != nil {
		t.Fatal(err)
	}
	if got := take(); len(got) != 3 || got[0] != "temp" || !slices.Contains(got, "v/d") || !slices.Contains(got, "v") {
		t.Errorf("a durable Put synced %q", got)
	}
	// What an earlier process has made may not be on the disk.
	m.stop()
	m.open()
	m.bring("v/a/x")
	want("by the next process", "v/a/x", "v/a", "v", ".")
}

// TestSyncTooLate: a sync that began before a value was there is worth nothing to
// it. All who come during one share the next.
func TestSyncTooLate(t *testing.T) {
	m := newMachine(t)
	m.lazily("v/a", "v/b", "v/c")
	m.bring("v/a", "v/b", "v/c")
	begun, goOn := make(chan struct{}), make(chan struct{})
	var syncs atomic.Int64
	m.watch(func(path string, _ *os.File) error {
		if path == "v" && syncs.Add(1) <= 2 {
			begun <- struct{}{}
			<-goOn
		}
		return nil
	})
	ended := make(chan string)
	sync := func(key string) {
		if err := m.Sync(t.Context(), key); err != nil {
			t.Error(err)
		}
		ended <- key
	}
	go sync("v/a")
	<-begun
	const late = 5
	for range late {
		go sync("v/b")
	}
	// All of them wait for the next one, which has not begun.
	waiting := func() bool {
		s := m.hold.group.syncs
		s.mu.Lock()
		defer s.mu.Unlock()
		r := s.rounds[filepath.Join(m.dir, "v")]
		return r.next != nil && r.next.waiting == late
	}
	for until := time.Now().Add(time.Minute); !waiting(); {
		if time.Now().After(until) {
			t.Fatal("they do not wait")
		}
	}
	goOn <- struct{}{}
	if first := <-ended; first != "v/a" {
		t.Errorf("%s was first", first)
	}
	<-begun
	select {
	case key := <-ended:
		t.Errorf("%s was done before it was synced", key)
	case <-time.After(20 * time.Millisecond):
	}
	goOn <- struct{}{}
	for range late {
		<-ended
	}
	if n := syncs.Load(); n != 2 {
		t.Errorf("%d syncs of the directory, want 2", n)
	}
	if n := len(m.hold.group.syncs.rounds); n != 0 {
		t.Errorf("%d rounds are left", n)
	}
}

// TestSyncOfWhatIsMadeAgain: while a directory's parent is being synced, the
// directory is removed and made again. The new one is not on the disk.
func TestSyncOfWhatIsMadeAgain(t *testing.T) {
	m := newMachine(t)
	m.lazily("v/keep", "v/dir/a")
	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	m.watch(func(path string, _ *os.File) error {
		if path == "v" {
			once.Do(func() {
				begun <- struct{}{}
				<-goOn
			})
		}
		return nil
	})
	done := make(chan error)
	go func() { done <- m.Sync(t.Context(), "v/dir/a") }()
	<-begun
	m.remove("v/dir/a")
	m.lazily("v/dir/b")
	close(goOn)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	take := m.record()
	m.bring("v/dir/b")
	if got := take(); !slices.Contains(got, "v") {
		t.Errorf("the new directory counts as on the disk: only %q were synced", got)
	}
}

// TestSyncFails: a sync that fails fails all who wait for it, and what it may have
// lost is doubtful after a loss of power.
func TestSyncFails(t *testing.T) {
	broken := errors.New("broken")
	for _, at := range []string{"v/a", "v", "."} {
		t.Run(at, func(t *testing.T) {
			m := newMachine(t)
			m.lazily("v/a")
			var fails atomic.Bool
			m.watch(func(path string, _ *os.File) error {
				if path == at && fails.Load() {
					return broken
				}
				return nil
			})
			fails.Store(true)
			m.pass(time.Minute)
			if err := m.Sync(t.Context(), "v/a"); !errors.Is(err, broken) {
				t.Fatalf("got %v", err)
			}
			if at != "v/a" {
				if err := m.Put(t.Context(), "v/b", nil, storage.Durable); !errors.Is(err, broken) {
					t.Fatalf("a durable Put: %v", err)
				}
			}
			fails.Store(false)
			m.bring("v/a") // the kernel takes it for written
			m.stop()
			m.boot = "second"
			m.open()
			if info, err := m.Stat(t.Context(), "v/a"); err != nil || !info.Doubtful {
				t.Errorf("%+v, %v; want it doubtful", info, err)
			}
		})
	}
	t.Run("shared", func(t *testing.T) {
		m := newMachine(t)
		m.lazily("v/a")
		m.bring("v/a")
		begun, goOn := make(chan struct{}), make(chan struct{})
		var syncs atomic.Int64
		m.watch(func(path string, _ *os.File) error {
			if path != "v" {
				return nil
			}
			switch syncs.Add(1) {
			case 1:
				begun <- struct{}{}
				<-goOn
			case 2:
				return broken
			}
			return nil
		})
		first, next := make(chan error), make(chan error)
		go func() { first <- m.Sync(t.Context(), "v/a") }()
		<-begun
		const late = 3
		for range late {
			go func() { next <- m.Sync(t.Context(), "v/a") }()
		}
		for until := time.Now().Add(time.Minute); ; {
			s := m.hold.group.syncs
			s.mu.Lock()
			r := s.rounds[filepath.Join(m.dir, "v")]
			all := r.next != nil && r.next.waiting == late
			s.mu.Unlock()
			if all {
				break
			}
			if time.Now().After(until) {
				t.Fatal("they do not wait")
			}
		}
		close(goOn)
		if err := <-first; err != nil {
			t.Errorf("the first: %v", err)
		}
		for range late {
			if err := <-next; !errors.Is(err, broken) {
				t.Errorf("one who waited: %v", err)
			}
		}
	})
}

// A platter is what a loss of power would leave: of each directory that was synced
// what was in it when that began, and which files were synced. It keeps all of them
// open, so that no number of an inode comes again.
type platter struct {
	mu    sync.Mutex
	dirs  map[uint64]map[string]uint64
	files map[uint64]bool
	open  []*os.File
}

func inode(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

func (p *platter) sync(f *os.File) error {
	mine, err := os.Open(f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		return nil // of nobody any more
	}
	if err != nil {
		return err
	}
	info, err := mine.Stat()
	if err != nil {
		return err
	}
	entries := map[string]uint64{}
	if info.IsDir() {
		list, _ := mine.ReadDir(-1)
		for _, entry := range list {
			if at, err := entry.Info(); err == nil {
				entries[entry.Name()] = inode(at)
			}
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open = append(p.open, mine)
	if info.IsDir() {
		p.dirs[inode(info)] = entries
	} else {
		p.files[inode(info)] = true
	}
	return nil
}

// has reports why a value would not be found, or "".
func (p *platter) has(root, key string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := root
	for _, name := range strings.Split(key, "/") {
		dir, err := os.Stat(at)
		if err != nil {
			return err.Error()
		}
		at = filepath.Join(at, name)
		entry, err := os.Stat(at)
		if err != nil {
			return err.Error()
		}
		if p.dirs[inode(dir)][name] != inode(entry) {
			return at + " is not in its directory"
		}
		if !entry.IsDir() && !p.files[inode(entry)] {
			return "the bytes of " + at
		}
	}
	return ""
}

// TestSyncIsOnTheDisk: whatever is put and deleted at once, what was synced is
// found by whoever reads the disk after a loss of power.
func TestSyncIsOnTheDisk(t *testing.T) {
	m := newMachine(t)
	p := &platter{dirs: map[uint64]map[string]uint64{}, files: map[uint64]bool{}}
	m.fsync = p.sync
	t.Cleanup(func() {
		for _, f := range p.open {
			f.Close()
		}
	})
	var wg sync.WaitGroup
	for g := range 6 {
		random := rand.New(rand.NewPCG(uint64(g), 7))
		wg.Go(func() {
			mine := map[string]bool{}
			for range 60 {
				key := fmt.Sprintf("v/%d/%d/%d", random.IntN(2), random.IntN(2), g)
				var err error
				switch random.IntN(5) {
				case 0:
					delete(mine, key)
					err = m.Delete(t.Context(), key)
				case 1:
					mine[key] = true
					if err = m.Put(t.Context(), key, []byte("x"), storage.Durable); err == nil {
						if why := p.has(m.dir, key); why != "" {
							t.Errorf("a durable %s would be lost: %s", key, why)
						}
					}
				default:
					mine[key] = true
					if err = m.Put(t.Context(), key, []byte("x"), storage.Lazy); err != nil {
						break
					}
					keys := slices.Collect(maps.Keys(mine))
					if err = m.Sync(t.Context(), keys...); err != nil {
						break
					}
					for _, key := range keys {
						if why := p.has(m.dir, key); why != "" {
							t.Errorf("%s would be lost: %s", key, why)
						}
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkSync is 32 pushers of small blobs, each with its link.
func BenchmarkSync(b *testing.B) {
	s, err := (&Disk{Directory: b.TempDir(), settings: settings{minFree: minFree{}, fileMode: 0o640, dirMode: 0o750}}).Open(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := make([]byte, 16<<10)
	var n atomic.Int64
	b.SetParallelism(max(1, 32/runtime.GOMAXPROCS(0)))
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			i := n.Add(1)
			blob, link := fmt.Sprintf("blobs/%02x/%d/data", i%256, i), fmt.Sprintf("links/%d/link", i)
			err := s.Put(b.Context(), blob, data, storage.Lazy)
			if err == nil {
				err = s.Put(b.Context(), link, data[:71], storage.Lazy)
			}
			if err == nil {
				err = s.Sync(b.Context(), blob, link)
			}
			if err != nil {
				b.Error(err)
			}
		}
	})
}
