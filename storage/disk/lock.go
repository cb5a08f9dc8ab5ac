package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/caddy-registry/mirror/storage"
)

// A lock keeps other processes out of a directory. The kernel drops it when
// the process dies, however it dies.
//
// Within one process it is shared: after a reload that goes away from a
// directory and a second one that comes back to it, the first store may still
// be serving its last readers.
type lock struct {
	path string
	file *os.File
	refs int
}

var (
	locksMu sync.Mutex
	locks   = map[string]*lock{}
)

// acquire takes the lock, and reports whether this process did not have it
// before.
func acquire(path string, mode fs.FileMode) (*lock, bool, error) {
	locksMu.Lock()
	defer locksMu.Unlock()
	if l := locks[path]; l != nil {
		l.refs++
		return l, false, nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, mode)
	if err != nil {
		return nil, false, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			holder, _ := io.ReadAll(io.LimitReader(f, 32))
			return nil, false, fmt.Errorf("%w (process %s); stop it, or give this one a directory of its own", storage.ErrLocked, strings.TrimSpace(string(holder)))
		}
		return nil, false, fmt.Errorf("locking %s: %w; the directory must lie on a filesystem with locks", path, err)
	}
	if err := f.Truncate(0); err == nil {
		fmt.Fprintln(f, os.Getpid())
	}
	l := &lock{path: path, file: f, refs: 1}
	locks[path] = l
	return l, true, nil
}

func (l *lock) release() {
	locksMu.Lock()
	defer locksMu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(locks, l.path)
		l.file.Close()
	}
}
