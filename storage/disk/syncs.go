package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/errgroup"
)

const (
	maxSyncs = 32     // files and directories that are synced at once
	maxKnown = 20_000 // directories remembered as on the disk, about 6 MiB when full
)

// syncs brings single values to the disk: their bytes, the directory each lies in,
// and the directories above it as far as they may be new. Files are synced by each
// who asks; directories once for all who ask at the same time.
//
// These are the races it is made for.
//
// A directory is being synced when somebody comes who has renamed a file into it.
// That sync may have begun before his rename, so it is worth nothing to him: he
// waits for the next one, which begins when this one has ended, with all who come
// until then. So each waits for two at most, whoever else comes. One that fails
// fails all who have waited for it, and nobody else: those behind it renamed after
// it had begun, and theirs will tell of them.
//
// A directory is known to be on the disk when its parent has been synced while it
// was there. It may be removed as empty and made again in between, and then the new
// one is not on the disk. So whoever removes one forgets it and counts that, before
// anybody may make it again; and who has synced a parent remembers the directory
// only if nothing has been counted since before he saw a file in it.
//
// A file or directory is gone when its turn comes. It has been deleted since, and
// whoever wants that on the disk syncs the key himself: then the nearest directory
// that is left is synced.
//
// A file is replaced when its turn comes: the new one is synced, which is what the
// key means by then.
type syncs struct {
	root  string
	fsync func(*os.File) error
	slots chan struct{} // holds a value for each sync under way

	mu       sync.Mutex
	rounds   map[string]*rounds           // by directory; guarded by mu
	known    *lru.Cache[string, struct{}] // directories whose entries are on the disk; added to under mu
	removals uint64                       // of directories; guarded by mu
}

// rounds are the syncs of one directory: the one that is running, and the one
// after it, if somebody waits for it.
type rounds struct{ running, next *round }

// A round is one sync of a directory.
type round struct {
	waiting int // who waits for it; guarded by syncs.mu
	done    chan struct{}
	err     error // set before done is closed
}

func newSyncs(root string, fsync func(*os.File) error) *syncs {
	known, _ := lru.New[string, struct{}](maxKnown) // it fails only for a size below 1
	return &syncs{root: root, fsync: fsync, slots: make(chan struct{}, maxSyncs), known: known, rounds: map[string]*rounds{}}
}

// pruned says that a directory has been removed. The caller keeps everybody from
// making it again until it returns.
func (s *syncs) pruned(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removals++
	s.known.Remove(dir)
}

// values syncs what lies at the paths, and their absence where nothing does.
func (s *syncs) values(paths []string) error { return s.all(paths, true) }

// entries does so where the bytes are on the disk already.
func (s *syncs) entries(path string) error { return s.all([]string{path}, false) }

func (s *syncs) all(paths []string, bytes bool) error {
	s.mu.Lock()
	since := s.removals
	s.mu.Unlock()
	var tasks errgroup.Group
	tasks.SetLimit(maxSyncs)
	dirs := map[string]bool{}  // to be synced
	fresh := map[string]bool{} // whose entries are on the disk then
	for _, path := range paths {
		_, err := os.Lstat(path)
		if gone(err) {
			dirs[s.left(filepath.Dir(path))] = true
			continue
		}
		if err != nil {
			return err
		}
		if bytes {
			tasks.Go(func() error { return ifThere(s.path(path)) })
		}
		dir := filepath.Dir(path)
		dirs[dir] = true
		for ; dir != s.root && !s.known.Contains(dir) && !fresh[dir]; dir = filepath.Dir(dir) {
			fresh[dir] = true
			dirs[filepath.Dir(dir)] = true
		}
	}
	for dir := range dirs {
		tasks.Go(func() error { return ifThere(s.dir(dir)) })
	}
	if err := tasks.Wait(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for dir := range fresh {
		if s.removals == since {
			s.known.Add(dir, struct{}{})
		}
	}
	return nil
}

// left is the nearest directory that is there.
func (s *syncs) left(dir string) string {
	for dir != s.root {
		if info, err := os.Lstat(dir); !gone(err) && (err != nil || info.IsDir()) {
			break
		}
		dir = filepath.Dir(dir)
	}
	return dir
}

// gone reports whether there is certainly nothing at a path.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

func ifThere(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// path syncs a file or directory by its path.
func (s *syncs) path(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.file(f)
}

// file syncs an open file. It waits for its turn.
func (s *syncs) file(f *os.File) error {
	s.slots <- struct{}{}
	defer func() { <-s.slots }()
	return s.fsync(f)
}

// dir syncs a directory, or waits for the end of a sync of it that has begun since.
func (s *syncs) dir(path string) error {
	mine := &round{waiting: 1, done: make(chan struct{})}
	s.mu.Lock()
	r := s.rounds[path]
	var before *round
	switch {
	case r == nil:
		s.rounds[path] = &rounds{running: mine}
	case r.next == nil:
		before, r.next = r.running, mine
	default:
		next := r.next
		next.waiting++
		s.mu.Unlock()
		<-next.done
		return next.err
	}
	s.mu.Unlock()
	if before != nil {
		<-before.done
	}
	mine.err = s.path(path)
	s.mu.Lock()
	if r := s.rounds[path]; r.next != nil {
		r.running, r.next = r.next, nil
	} else {
		delete(s.rounds, path)
	}
	s.mu.Unlock()
	close(mine.done)
	return mine.err
}
