package fill

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

// ErrRefused is wrapped by the error of a [Want.Take] that does not want the file, and
// never will: it is not kept for others.
var ErrRefused = errors.New("refused")

// progressEvery is how often whoever pulls is told how far it has come.
const progressEvery = time.Second / 4

// A taker is one Pull, waiting for its turn to take the file.
type taker struct {
	ctx  context.Context
	take func(context.Context, File) error
	done chan error // has room for one
}

// Pull fetches content for whoever calls it, who takes the whole file by Want.Take:
// nothing is stored or linked. It fetches as if somebody waited for every byte, and
// returns when Take has returned, with its error. progress, which may be nil, is told
// how many bytes there are, a few times a second.
//
// When ctx ends, so does the fetching; the files stay for a week, and the next Pull of
// the same, in this process or a later one, goes on from there. So they do when Take
// fails, unless it refuses, and when there is no more room: then the error is a
// storage.ErrFull.
//
// Pulls of the same content at once share one fetch. Take is called for each of them,
// one after the other; those that come after one that has taken the file get a File
// without a Path, whose bytes are where the other has put them. Take gets such a File,
// too, if the process ended before it was known that the file had been taken. Where it
// does not find the bytes, it says so by an fs.ErrNotExist; then they are fetched
// again, at once or by the next Pull.
func (t *Table) Pull(ctx context.Context, want Want, progress func(received int64)) error {
	if want.Take == nil {
		return errors.New("fill: nobody takes what is to be pulled")
	}
	if want.Digest == "" && want.Name == "" {
		return errors.New("fill: what is to be pulled has neither a digest nor a name")
	}
	if want.Digest != "" {
		if err := want.Digest.Validate(); err != nil || want.Digest.Algorithm() == digest.SHA384 {
			return fmt.Errorf("fill: %.200q is no digest to pull by; give a sha256 or a sha512", string(want.Digest))
		}
	}
	if progress == nil {
		progress = func(int64) {}
	}
	tk := &taker{ctx: ctx, take: want.Take, done: make(chan error, 1)}
	f, err := t.join(want, tk)
	if err != nil {
		return err
	}
	defer f.Release()
	r := f.NewReader(ctx, 0, want.Size, true) // it never reads: it wants
	defer r.Close()
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	told := int64(-1)
	tell := func() {
		if got := f.received(); got != told {
			told = got
			progress(got)
		}
	}
	for {
		tell()
		select {
		case <-tick.C:
		case err := <-tk.done:
			tell()
			return err
		case <-f.gone:
			select {
			case err := <-tk.done:
				tell()
				return err
			default:
				return f.ended
			}
		case <-ctx.Done():
			if f.withdraw(tk) {
				return context.Cause(ctx)
			}
			return <-tk.done // Take has been told by its ctx
		}
	}
}

// received is how many bytes of larger content there are.
func (f *Fill) received() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state == joined { // run may be reading what an earlier fill has left
		return 0
	}
	return f.got
}

// withdraw takes a taker back whose turn has not come. It reports whether that is so,
// or the fill has ended without it.
func (f *Fill) withdraw(tk *taker) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, other := range f.takers {
		if other == tk {
			f.takers = append(f.takers[:i:i], f.takers[i+1:]...)
			return true
		}
	}
	return false
}

// nextTaker takes the one whose turn it is. When there is none, the fill leaves the
// table, in one step.
func (f *Fill) nextTaker(taken bool) *taker {
	f.table.mu.Lock()
	defer f.table.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.takers) > 0 {
		tk := f.takers[0]
		f.takers = f.takers[1:]
		return tk
	}
	f.table.remove(f)
	f.state = committed
	if !taken {
		f.state, f.err = paused, ErrPaused
	}
	f.wake()
	return nil
}

// offer lets everybody who pulls have the whole file, which is gone from its place
// where that is empty. It reports whether somebody has taken it, and whether it is of
// no use to anybody else. The error is an fs.ErrNotExist if it is to be fetched again,
// since it is gone and the first who was asked does not find it.
func (f *Fill) offer(file File, fetched bool) (taken, unwanted bool, err error) {
	path := file.Path
	failed := false
	for {
		tk := f.nextTaker(taken)
		if tk == nil {
			break
		}
		if _, err := os.Lstat(path); err != nil {
			file.Path = ""
		}
		err = f.turn(tk, file)
		switch {
		case err == nil:
			taken = true
			failpoint.Hit("fill.taken")
		case errors.Is(err, ErrRefused):
			unwanted = true
		case !fetched && !taken && errors.Is(err, fs.ErrNotExist):
			f.mu.Lock()
			f.takers = slices.Insert(f.takers, 0, tk)
			f.mu.Unlock()
			return false, false, err
		default:
			failed = true
		}
		tk.done <- err
	}
	switch {
	case taken:
		return true, true, nil
	case err == nil:
		err = ErrPaused // they have all left
	}
	return false, unwanted && !failed, err
}

// turn has one take the file.
func (f *Fill) turn(tk *taker, file File) error {
	ctx, cancel := context.WithCancelCause(tk.ctx)
	defer cancel(nil)
	defer context.AfterFunc(f.table.ctx, func() { cancel(ErrClosed) })()
	return tk.take(ctx, file)
}

// pull is the life of a fill whose content is taken.
func (f *Fill) pull() error {
	if f.table.broken != nil {
		return f.table.broken
	}
	name := filepath.Join(f.table.spool, f.key.name())
	if file, ok := f.departed(name); ok {
		_, unwanted, err := f.offer(file, false)
		if unwanted || errors.Is(err, fs.ErrNotExist) {
			os.Remove(name + ledgerSuffix)
		}
		if !errors.Is(err, fs.ErrNotExist) || f.over() {
			return err
		}
	}
	return f.fetchLarge()
}

// over reports whether the fill has left the table.
func (f *Fill) over() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state > verified
}

// hand lets the file in the spool be taken.
func (f *Fill) hand(s *spool, file File) error {
	s.settle()
	// If somebody takes the file, and nobody gets to say so, what it was is known.
	err := errors.Join(s.append(line{Segments: s.pending, SHA256: file.SHA256, SHA512: file.SHA512}), s.ledger.Sync())
	if err != nil {
		err = &diskError{err}
		f.fail(err)
		f.park(s)
		return err
	}
	s.pending = s.pending[:0]
	f.release(s.data)
	file.Path = s.path
	_, unwanted, err := f.offer(file, true)
	if unwanted {
		s.remove()
	} else {
		f.park(s)
	}
	return err
}

// departed looks for the traces of a file that was whole and is gone: a ledger that
// says what it was, and no file.
func (f *Fill) departed(name string) (File, bool) {
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return File{}, false
	}
	info, err := os.Stat(name + ledgerSuffix)
	if err != nil || info.Size() > maxLedger {
		return File{}, false
	}
	text, err := os.ReadFile(name + ledgerSuffix)
	if err != nil {
		return File{}, false
	}
	file := File{Size: f.key.size}
	first, rest, n := readLine(text)
	if n == 0 || first.Version != ledgerVersion || first.Digest != f.key.digest || first.Size != f.key.size {
		return File{}, false
	}
	for n > 0 {
		var l line
		if l, rest, n = readLine(rest); n > 0 && l.SHA256 != "" {
			file.SHA256, file.SHA512 = l.SHA256, l.SHA512
		}
		if len(l.Lost) > 0 {
			file.SHA256 = ""
		}
	}
	return file, file.SHA256 != ""
}

// taken is the part of a key that tells content that is taken from what is stored.
func (w Want) taken() string {
	switch {
	case w.Take == nil:
		return ""
	case w.Name == "":
		return "digest"
	}
	// What somebody's name for it is, may be an address with secrets in it, and
	// becomes the name of a file.
	sum := sha256.Sum256([]byte(w.Name))
	return hex.EncodeToString(sum[:])
}
