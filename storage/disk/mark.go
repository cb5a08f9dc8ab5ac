package disk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// markMargin is how much older than its last write a file's time may be: the
// kernel's clock for files lags, and some filesystems keep even seconds.
const markMargin = 2 * time.Second

// A mark says which lazy writes have reached the disk. It lies at mirror/synced
// in the store.
type mark struct {
	// Boot is storage.Boot of the process that wrote the mark.
	Boot string `json:"boot"`
	// Time is when the last sync began: it has taken along every value whose
	// bytes were written by then.
	Time time.Time `json:"time"`
	// Clean says that the store was closed, and nothing was written after Time.
	Clean bool `json:"clean"`
	// Doubt is nil if no loss of power has been met yet.
	Doubt *interval `json:"doubt,omitempty"`
}

// An interval is when doubtful values were written: later than From, and not
// later than To.
type interval struct {
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
}

func (i *interval) has(t time.Time) bool {
	return i != nil && t.After(i.From) && !t.After(i.To)
}

// join returns the shortest interval that covers i, which may be nil, and the
// one given.
func (i *interval) join(from, to time.Time) *interval {
	if !to.After(from) {
		return i
	}
	if i != nil {
		if i.From.Before(from) {
			from = i.From
		}
		if i.To.After(to) {
			to = i.To
		}
	}
	return &interval{from, to}
}

func markPath(root string) string { return filepath.Join(root, "mirror", "synced") }

func readMark(root string) (mark, error) {
	data, err := os.ReadFile(markPath(root))
	if err != nil {
		return mark{}, err
	}
	var m mark
	if err := json.Unmarshal(data, &m); err != nil {
		return mark{}, err
	}
	if m.Time.IsZero() {
		return mark{}, errors.New("no time")
	}
	return m, nil
}

// write replaces the mark; when it returns nil, the new one survives a loss of
// power.
func (m mark) write(root string, mode fs.FileMode) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	temp := filepath.Join(tempDir(root), "synced")
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(temp, markPath(root))
	}
	if err != nil {
		os.Remove(temp)
		return err
	}
	return syncPath(filepath.Join(root, "mirror"))
}

// arrived is when the last value came into the store, as far as the disk knows:
// each is renamed out of one of these directories, which changes their time.
// Unlike the clock it is right on a machine that was started without one.
func arrived(root string) (time.Time, error) {
	var last time.Time
	at := func(dir string) error {
		info, err := os.Stat(dir)
		if err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
		return err
	}
	spools, err := os.ReadDir(spoolDir(root))
	if err != nil {
		return last, fmt.Errorf("looking for the last write: %w", err)
	}
	for _, spool := range spools {
		if err := at(filepath.Join(spoolDir(root), spool.Name())); err != nil {
			return last, err
		}
	}
	return last, at(tempDir(root))
}
