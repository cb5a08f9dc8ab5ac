package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/storage"
)

// store implements storage.Store on a directory. Every write goes to a file of
// its own in mirror/temp or mirror/spool, which lie on the same filesystem, and
// is then renamed to its place; so a kill at any moment leaves old or new.
type store struct {
	root     string
	temp     string
	now      func() time.Time
	hold     *hold
	settings atomic.Pointer[settings]

	// pruning is held by whoever removes empty directories, and shared by those
	// who make directories until there is something in them.
	pruning sync.RWMutex

	mu       sync.Mutex
	reserved uint64 // set aside and not yet used
}

func tempDir(root string) string  { return filepath.Join(root, "mirror", "temp") }
func spoolDir(root string) string { return filepath.Join(root, "mirror", "spool") }

func open(root string, s settings, h host) (*store, error) {
	st := &store{root: root, temp: tempDir(root), now: h.now}
	st.settings.Store(&s)
	for _, dir := range []string{st.temp, spoolDir(root)} {
		if err := st.mkdir(dir); err != nil {
			return nil, fmt.Errorf("disk storage: %w; make %s writable for the user that runs this process, or name another directory with `storage disk <directory>`", err, root)
		}
	}
	var err error
	st.hold, err = acquire(filepath.Join(root, "mirror", "lock"), s.fileMode, func() (*group, error) {
		last, err := arrived(root) // sweeping makes it later
		if err == nil {
			err = sweep(root)
		}
		if err != nil {
			return nil, err
		}
		return newGroup(root, s.fileMode, h, last)
	})
	if err != nil {
		return nil, fmt.Errorf("disk storage %s: %w", root, err)
	}
	return st, nil
}

// sweep removes what an earlier process left half written. Spools are their
// owners', but for those of earlier versions, which began with the number of a
// process. The lock guarantees that nobody else is writing.
func sweep(root string) error {
	remove := func(dir string, ours func(name string) bool) error {
		left, err := os.ReadDir(dir)
		for _, entry := range left {
			if err == nil && ours(entry.Name()) {
				err = os.RemoveAll(filepath.Join(dir, entry.Name()))
			}
		}
		if err != nil {
			return fmt.Errorf("sweeping what an earlier process left: %w", err)
		}
		return nil
	}
	if err := remove(tempDir(root), func(string) bool { return true }); err != nil {
		return err
	}
	return remove(spoolDir(root), func(name string) bool { return '0' <= name[0] && name[0] <= '9' })
}

func (s *store) Close() error {
	if err := s.hold.release(); err != nil {
		return fmt.Errorf("disk storage %s: %w", s.root, err)
	}
	return nil
}

// Distant implements storage.Store: all values are local files.
func (s *store) Distant() storage.Distant { return nil }

func (s *store) Spool(name string) (string, error) {
	if err := storage.CheckKey(name); err != nil || strings.Contains(name, "/") || !isLetter(name[0]) {
		return "", fmt.Errorf("disk storage: %.200q does not name a spool", name)
	}
	dir := filepath.Join(spoolDir(s.root), name)
	if err := s.mkdir(dir); err != nil {
		return "", fmt.Errorf("disk storage: making a spool: %w", err)
	}
	return dir, nil
}

func isLetter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }

// describe is what is known of the value of a key.
func (s *store) describe(key string, stat fs.FileInfo) storage.Info {
	return storage.Info{
		Key:      key,
		Size:     stat.Size(),
		ModTime:  stat.ModTime(),
		Doubtful: s.hold.group.doubt.Load().has(stat.ModTime()),
	}
}

func (s *store) path(key string) (string, error) {
	if err := storage.CheckKey(key); err != nil {
		return "", err
	}
	return filepath.Join(s.root, filepath.FromSlash(key)), nil
}

// absent gives ENOTDIR, which is what a key below a value yields, the meaning
// it has in the contract.
func absent(err error) error {
	if errors.Is(err, syscall.ENOTDIR) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (s *store) Open(_ context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	path, err := s.path(key)
	if err != nil {
		return nil, storage.Info{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, storage.Info{}, absent(err)
	}
	stat, err := f.Stat()
	if err == nil && stat.IsDir() {
		err = &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	if err != nil {
		f.Close()
		return nil, storage.Info{}, err
	}
	info := s.describe(key, stat)
	if offset < 0 || offset > info.Size || length > info.Size-offset {
		f.Close()
		return nil, storage.Info{}, fmt.Errorf("disk storage: %d bytes from %d do not lie inside the %d of %s", length, offset, info.Size, key)
	}
	if length >= 0 {
		return struct {
			io.Reader
			io.Closer
		}{io.NewSectionReader(f, offset, length), f}, info, nil
	}
	if offset > 0 {
		if _, err := f.Seek(offset, io.SeekStart); err != nil {
			f.Close()
			return nil, storage.Info{}, err
		}
	}
	return f, info, nil
}

func (s *store) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	r, info, err := s.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if info.Size > limit {
		return nil, fmt.Errorf("disk storage: %s has %d bytes, %w (%d)", key, info.Size, storage.ErrTooLarge, limit)
	}
	data := make([]byte, info.Size)
	_, err = io.ReadFull(r, data)
	return data, err
}

func (s *store) Stat(_ context.Context, key string) (storage.Info, error) {
	path, err := s.path(key)
	if err != nil {
		return storage.Info{}, err
	}
	stat, err := os.Stat(path)
	if err != nil {
		return storage.Info{}, absent(err)
	}
	if stat.IsDir() {
		return storage.Info{}, &fs.PathError{Op: "stat", Path: path, Err: fs.ErrNotExist}
	}
	return s.describe(key, stat), nil
}

func (s *store) Put(_ context.Context, key string, data []byte, d storage.Durability) error {
	path, err := s.path(key)
	if err != nil {
		return err
	}
	temp := filepath.Join(s.temp, "put-"+strconv.FormatUint(rand.Uint64(), 36))
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, s.settings.Load().fileMode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && d == storage.Durable {
		err = s.hold.group.syncs.file(f)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = s.move(temp, path, d)
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}

func (s *store) PutFile(ctx context.Context, key, path string, d storage.Durability) error {
	target, err := s.path(key)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, s.settings.Load().fileMode); err != nil {
		return err
	}
	if d == storage.Durable {
		if err := s.hold.group.syncs.path(path); err != nil {
			return err
		}
	}
	err = s.move(path, target, d)
	if errors.Is(err, syscall.EXDEV) {
		return s.copyIn(ctx, target, path, d)
	}
	return err
}

// copyIn takes a file from another filesystem.
func (s *store) copyIn(_ context.Context, target, path string, d storage.Durability) error {
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	temp := filepath.Join(s.temp, "put-"+strconv.FormatUint(rand.Uint64(), 36))
	to, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, s.settings.Load().fileMode)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err == nil && d == storage.Durable {
		err = s.hold.group.syncs.file(to)
	}
	if closeErr := to.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = s.move(temp, target, d)
	}
	if err != nil {
		os.Remove(temp)
		return err
	}
	return os.Remove(path)
}

// move renames a finished file to its place, making the directories above it. The
// bytes of a durable one are on the disk already: whatever it replaces is lost only
// for a whole one.
func (s *store) move(from, to string, d storage.Durability) error {
	err := os.Rename(from, to)
	if errors.Is(err, fs.ErrNotExist) {
		if _, lost := os.Lstat(from); lost != nil {
			return err
		}
		err = s.moveBelow(filepath.Dir(to), from, to)
	}
	if err != nil {
		return err
	}
	if d == storage.Durable {
		return s.synced(s.hold.group.syncs.entries(to))
	}
	s.hold.group.wrote()
	return nil
}

// moveBelow is move where a directory is missing.
func (s *store) moveBelow(dir, from, to string) error {
	err := func() error {
		s.pruning.RLock()
		defer s.pruning.RUnlock()
		if err := s.mkdir(dir); err != nil {
			return err
		}
		return os.Rename(from, to)
	}()
	if err != nil {
		s.prune(dir)
	}
	return err
}

// Sync implements storage.Store.
func (s *store) Sync(_ context.Context, keys ...string) error {
	paths := make([]string, len(keys))
	for i, key := range keys {
		var err error
		if paths[i], err = s.path(key); err != nil {
			return err
		}
	}
	return s.synced(s.hold.group.syncs.values(paths))
}

// synced takes note of a sync that has failed.
func (s *store) synced(err error) error {
	if err != nil {
		s.hold.group.lost()
		return fmt.Errorf("disk storage: bringing values to the disk: %w", err)
	}
	return nil
}

func (s *store) mkdir(dir string) error {
	return os.MkdirAll(dir, s.settings.Load().dirMode)
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	err = f.Sync()
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return err
}

func (s *store) Delete(_ context.Context, key string) error {
	path, err := s.path(key)
	if err != nil {
		return err
	}
	// Unlink rather than os.Remove, which would also take an empty directory.
	err = syscall.Unlink(path)
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EISDIR) {
		return nil
	}
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	s.prune(filepath.Dir(path))
	return nil
}

// prune removes a directory and those above it as far as they are empty. One that
// was left by a process that died in between goes when something in it is deleted
// again. The kernel knows whether a directory is empty; that nobody has just made
// it to put something there, pruning tells.
func (s *store) prune(dir string) {
	s.pruning.Lock()
	defer s.pruning.Unlock()
	for ; dir != s.root && syscall.Rmdir(dir) == nil; dir = filepath.Dir(dir) {
		s.hold.group.syncs.pruned(dir)
	}
}

// Vouch moves the value's time out of the interval of doubt.
func (s *store) Vouch(ctx context.Context, key string) error {
	info, err := s.Stat(ctx, key)
	if err != nil || !info.Doubtful {
		return err
	}
	path, err := s.path(key)
	if err != nil {
		return err
	}
	at := s.now()
	// The clock may have been ahead when the interval was made, or be behind.
	if to := s.hold.group.doubt.Load().To; !at.After(to) {
		at = to.Add(time.Second)
	}
	return absent(os.Chtimes(path, time.Time{}, at))
}

func (s *store) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		dir := strings.TrimSuffix(prefix, "/")
		if prefix != "" && (dir == prefix || storage.CheckKey(dir) != nil) {
			yield(storage.Info{}, fmt.Errorf("disk storage: %.200q is not a prefix to list", prefix))
			return
		}
		s.list(ctx, dir, deep, yield)
	}
}

// list reports whether to go on.
func (s *store) list(ctx context.Context, dir string, deep bool, yield func(storage.Info, error) bool) bool {
	if err := ctx.Err(); err != nil {
		yield(storage.Info{}, err)
		return false
	}
	f, err := os.Open(filepath.Join(s.root, filepath.FromSlash(dir)))
	if err != nil {
		if errors.Is(absent(err), fs.ErrNotExist) {
			return true
		}
		yield(storage.Info{}, err)
		return false
	}
	defer f.Close()
	for {
		entries, err := f.ReadDir(1024)
		for _, entry := range entries {
			key := entry.Name()
			if dir != "" {
				key = dir + "/" + key
			}
			if entry.IsDir() {
				if deep && !s.list(ctx, key, deep, yield) || !deep && !yield(storage.Info{Key: key + "/"}, nil) {
					return false
				}
				continue
			}
			if !entry.Type().IsRegular() {
				continue
			}
			stat, err := entry.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed since
			}
			if err != nil {
				yield(storage.Info{}, err)
				return false
			}
			if !yield(s.describe(key, stat), nil) {
				return false
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(absent(err), fs.ErrNotExist) {
			return true
		}
		if err != nil {
			yield(storage.Info{}, err)
			return false
		}
	}
}

// space is that of the filesystem, in bytes.
func (s *store) space() (total, free uint64, err error) {
	var fsStat syscall.Statfs_t
	if err := syscall.Statfs(s.root, &fsStat); err != nil {
		return 0, 0, fmt.Errorf("disk storage: asking for the free space of %s: %w", s.root, err)
	}
	unit := uint64(fsStat.Bsize)
	return fsStat.Blocks * unit, fsStat.Bavail * unit, nil
}

// Free implements storage.Measured.
func (s *store) Free() (free, keep int64, err error) {
	total, available, err := s.space()
	if err != nil {
		return 0, 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(available) - int64(s.reserved), int64(s.settings.Load().minFree.of(total)), nil
}

func (s *store) Reserve(n int64) (storage.Reservation, error) {
	total, free, err := s.space()
	if err != nil {
		return nil, err
	}
	limit := s.settings.Load().minFree
	s.mu.Lock()
	defer s.mu.Unlock()
	if need := limit.of(total) + s.reserved + uint64(n); need < uint64(n) || need > free {
		return nil, fmt.Errorf("disk storage: %w for %s: %s has %s free, and min_free %s keeps %s; free some space or lower min_free",
			storage.ErrFull, humanize.IBytes(uint64(n)), s.root, humanize.IBytes(free), limit.text, humanize.IBytes(limit.of(total)))
	}
	s.reserved += uint64(n)
	return &reservation{store: s, left: uint64(n)}, nil
}

type reservation struct {
	store *store
	left  uint64 // guarded by store.mu
}

func (r *reservation) Use(n int64) {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	used := min(uint64(n), r.left)
	r.left -= used
	r.store.reserved -= used
}

func (r *reservation) Release() {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.reserved -= r.left
	r.left = 0
}
