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

// A hold is this process's hold on a directory. It keeps other processes out;
// the kernel drops it when the process dies, however it dies.
//
// Within one process it is shared: after a reload that goes away from a
// directory and a second one that comes back to it, the first store may still
// be serving its last readers.
type hold struct {
	path  string
	lock  *os.File
	group *group
	refs  int // guarded by holdsMu
}

var (
	holdsMu sync.Mutex // held through the first open and the last close of a directory
	holds   = map[string]*hold{}
)

// acquire takes hold of the directory whose lock is at path. If this process
// has not had it before, start is called to make it ready.
func acquire(path string, mode fs.FileMode, start func() (*group, error)) (*hold, error) {
	holdsMu.Lock()
	defer holdsMu.Unlock()
	if h := holds[path]; h != nil {
		h.refs++
		return h, nil
	}
	f, err := lock(path, mode)
	if err != nil {
		return nil, err
	}
	g, err := start()
	if err != nil {
		f.Close()
		return nil, err
	}
	h := &hold{path: path, lock: f, group: g, refs: 1}
	holds[path] = h
	return h, nil
}

func lock(path string, mode fs.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, mode)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			holder, _ := io.ReadAll(io.LimitReader(f, 32))
			return nil, fmt.Errorf("%w (process %s); stop it, or give this one a directory of its own", storage.ErrLocked, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("locking %s: %w; the directory must lie on a filesystem with locks", path, err)
	}
	if err := f.Truncate(0); err == nil {
		fmt.Fprintln(f, os.Getpid())
	}
	return f, nil
}

// release lets go. The last to do so brings everything to the disk first.
func (h *hold) release() error {
	holdsMu.Lock()
	defer holdsMu.Unlock()
	if h.refs--; h.refs > 0 {
		return nil
	}
	delete(holds, h.path)
	return errors.Join(h.group.close(), h.lock.Close())
}
