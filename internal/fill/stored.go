package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

const (
	// storeHurry is how long a store has to begin while there are other sources.
	storeHurry = 5 * time.Second
	// storeStall is how long a stream of it may bring nothing.
	storeStall = 30 * time.Second
	// storePause is how long others are preferred to a store that was too slow.
	storePause = 30 * time.Second
	// maxMisled is how many values are remembered that the store delivered wrong.
	maxMisled = 1_000
)

// stored is a source that reads a value of the table's store.
type stored struct {
	table *Table
	key   string
	alone bool
}

// Stored is a source of content whose bytes lie at the distant place of the table's
// store. Alone says that there is no other: it is then asked however slow it is, and
// again when it has delivered wrong bytes. Equal arguments give equal sources.
//
// What is read to the end of the content is asked of it at once, and not in windows:
// a store at a distance counts requests.
func (t *Table) Stored(key string, alone bool) Source { return stored{t, key, alone} }

// storedError is why a store did not deliver.
type storedError struct {
	error
	after time.Duration
	again bool
}

func (e *storedError) Unwrap() error                { return e.error }
func (e *storedError) Retry() (time.Duration, bool) { return e.after, e.again }

var (
	errSlowStore = fmt.Errorf("%w: it has not begun to answer for %v", storage.ErrUnavailable, storeHurry)
	errStalled   = fmt.Errorf("%w: nothing has come for %v", storage.ErrUnavailable, storeStall)
)

// Open reads a span. What is near of it may be read too: it has come since.
func (s stored) Open(ctx context.Context, span Span) (*Stream, error) {
	if !s.alone && s.table.misled.Contains(s.key) {
		return nil, &storedError{error: errors.New("the store has delivered wrong bytes for this")}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	hurry := func() bool { return true }
	if !s.alone {
		hurry = time.AfterFunc(storeHurry, func() { cancel(errSlowStore) }).Stop
	}
	r, info, err := s.table.store.Open(ctx, s.key, span.Offset, span.Length)
	hurry()
	if err == nil && info.Doubtful {
		r.Close()
		err = errors.New("what the store has may have been damaged by a loss of power")
	}
	if err != nil {
		var after time.Duration
		if errors.Is(context.Cause(ctx), errSlowStore) {
			err, after = errSlowStore, storePause
		}
		cancel(nil)
		return nil, &storedError{fmt.Errorf("the store: %w", err), after, errors.Is(err, storage.ErrUnavailable)}
	}
	d := &storedStream{r: r, ctx: ctx, cancel: cancel, alone: s.alone}
	d.stall = time.AfterFunc(storeStall, func() { cancel(errStalled) })
	d.stall.Stop()
	return &Stream{ReadCloser: d, Offset: span.Offset, Size: info.Size, From: "the store"}, nil
}

// Blame lets go of what is near, which may have been it. Otherwise it was the
// distant bytes, and what is stored next takes their place.
func (s stored) Blame(error) {
	distant := s.table.store.Distant()
	if distant == nil || distant.Drop(s.key) {
		return
	}
	distant.Distrust(s.key)
	s.table.misled.Add(s.key, struct{}{})
}

// storedStream is a value that is being read. It fails when nothing comes.
type storedStream struct {
	r      io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	stall  *time.Timer
	alone  bool
}

func (d *storedStream) Read(p []byte) (int, error) {
	d.stall.Reset(storeStall)
	n, err := d.r.Read(p)
	d.stall.Stop()
	if err != nil && errors.Is(context.Cause(d.ctx), errStalled) {
		stalled := &storedError{error: errStalled, again: true}
		if !d.alone {
			stalled.after = storePause
		}
		err = stalled
	}
	return n, err
}

func (d *storedStream) Close() error {
	d.stall.Stop()
	err := d.r.Close()
	d.cancel(nil)
	return err
}

// isStored reports whether it is the store that is asked.
func (e *entry) isStored() bool {
	_, ok := e.source.(stored)
	return ok
}

// given reports whether a store that nobody can take the place of is given up: it has
// tried for itself by now, and nobody has had any of its bytes. So its client hears at
// once that it is to come again.
func (e *entry) given(err error) bool {
	s, ok := e.source.(stored)
	return ok && s.alone && !e.delivered && errors.Is(err, storage.ErrUnavailable)
}

// steady reports whether the store would be asked now.
func (r *roster) steady(now time.Time) bool {
	e, _, _ := r.pick(now)
	return e != nil && e.isStored()
}

// vouched reports whether the store would be asked now, and says that the content
// has the promised size.
func (f *Fill) vouched() bool {
	f.mu.Lock()
	e, _, _ := f.sources.pick(time.Now())
	f.mu.Unlock()
	if e == nil || !e.isStored() {
		return false
	}
	info, err := f.table.store.Stat(f.ctx, e.source.(stored).key)
	return err == nil && info.Size == f.key.size
}

// openNear opens a value of the store unless that would take a network.
func (t *Table) openNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	if distant := t.store.Distant(); distant != nil {
		return distant.OpenNear(ctx, key)
	}
	return t.store.Open(ctx, key, 0, -1)
}
