package s3

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

// listing is the making of the index.
type listing struct {
	slot chan struct{} // holds a value while the bucket is being listed
	want chan struct{} // holds a value when it should be

	// mu is held while it changes whether the bucket is shared, or the index complete.
	mu      sync.Mutex
	changed chan struct{} // closed when one of them has; guarded by mu
}

const (
	pageSize   = 500
	sweepAge   = 24 * time.Hour // of an upload in parts that nobody claims
	firstRetry = time.Second
	// maxListings is after how many failed listings nobody waits for one any more.
	maxListings = 5
)

// change wakes those who wait in Listed. The caller holds mu.
func (l *listing) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *listing) ask() {
	select {
	case l.want <- struct{}{}:
	default:
	}
}

// Listed implements storage.Distant. A shared bucket is listed by List each time, so
// there is nothing to wait for.
func (s *store) Listed(ctx context.Context) error {
	for {
		s.listing.mu.Lock()
		changed := s.listing.changed
		s.listing.mu.Unlock()
		if s.index.complete.Load() || s.owner.shared.Load() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ctx.Done():
			return fmt.Errorf("s3 storage: %w: the store is being closed", storage.ErrUnavailable)
		}
	}
}

// Relist implements storage.Distant.
func (s *store) Relist(ctx context.Context) error {
	select {
	case s.listing.slot <- struct{}{}:
		defer func() { <-s.listing.slot }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := s.relist(ctx); !errors.Is(err, errOvertaken) {
			return err
		}
	}
}

// errOvertaken is why a listing begins again: since it began, it has turned out that
// what the index says is not to be believed.
var errOvertaken = errors.New("another epoch has begun")

func (s *store) relist(ctx context.Context) error {
	epoch, err := s.index.begin()
	if err != nil {
		return err
	}
	if err := s.listAll(ctx, epoch); err != nil {
		return err
	}
	if err := s.sweepIndex(ctx, epoch); err != nil {
		return err
	}
	err = func() error {
		s.listing.mu.Lock()
		defer s.listing.mu.Unlock()
		if s.index.epoch.Load() != epoch {
			return errOvertaken
		}
		if s.owner.shared.Load() && !s.owner.suspect.Load() {
			return nil
		}
		defer s.listing.change()
		return s.index.setComplete(true)
	}()
	if err != nil {
		return err
	}
	return s.prove(ctx)
}

// listAll takes the whole listing into the index.
func (s *store) listAll(ctx context.Context, epoch uint64) error {
	var page []object
	take := func() error {
		doubt, err := s.index.listed(epoch, page, s.now())
		page = page[:0]
		failpoint.Hit("s3.listed")
		if err != nil {
			return err
		}
		return s.askAll(ctx, doubt)
	}
	for o, err := range s.bucket.list(ctx, "", true) {
		if err != nil {
			s.said(err)
			return err
		}
		// Directories that somebody's console has made are no values.
		if k, err := kindOf(o.key); err != nil || k == local || k == upload {
			continue
		}
		if page = append(page, o); len(page) == pageSize {
			if err := take(); err != nil {
				return err
			}
		}
	}
	s.said(nil)
	return take()
}

// askAll asks for keys one by one.
func (s *store) askAll(ctx context.Context, keys []string) error {
	for _, key := range keys {
		k, err := kindOf(key)
		if err != nil {
			continue
		}
		_, _, version := s.look(key, k)
		if _, err := s.ask(ctx, key, version); err != nil && !absent(err) {
			return err
		}
	}
	return nil
}

// sweepIndex removes what the listing has not shown.
func (s *store) sweepIndex(ctx context.Context, epoch uint64) error {
	for from := []byte{}; from != nil; {
		ask, missing, next, err := s.index.unlisted(from, pageSize, s.now())
		if err == nil {
			err = s.askAll(ctx, ask)
		}
		if err == nil {
			err = s.index.drop(epoch, missing)
		}
		if err != nil {
			return err
		}
		from = next
	}
	return nil
}

// prove finds out which near blobs the bucket lacks, now that it is known what it has.
// If that is not known, they are asked for one by one before they are uploaded.
func (s *store) prove(ctx context.Context) error {
	for info, err := range s.near.List(ctx, "docker/registry/v2/blobs/", true) {
		if err != nil {
			return err
		}
		if isBlob(info.Key) {
			s.compare(ctx, info, true)
		}
	}
	s.queue.release(unmet | unproven)
	return nil
}

// compare finds out what a near blob is. listed says that the bucket has been listed
// before. If it has not, the blob may remain undecided.
func (s *store) compare(ctx context.Context, info storage.Info, listed bool) (undecided bool) {
	p := s.stripe(info.Key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if st := p.states[info.Key]; st != nil { // somebody is at it
		return false
	}
	e, f := s.believe(info.Key, blob)
	switch {
	case f == unknown && !e.is(unsure) && !listed:
		return true
	case f == present && e.size == info.Size:
		if !s.index.knows(info.Key) {
			s.index.note(info.Key, info.Size, info.ModTime)
		}
	case f == present && info.Doubtful:
		s.remove(ctx, info.Key)
	default:
		if now, err := s.near.Stat(ctx, info.Key); err == nil {
			s.await(p, info.Key, blob, now.Size).tried = true
		}
	}
	return false
}

// survey looks at all that is near, when the store is opened. As long as it is not
// known which blobs the bucket lacks, nothing that may speak of them is uploaded unless
// somebody waits for it: a loss of this disk would leave links to nothing.
func (s *store) survey(ctx context.Context) error {
	undecided := false
	for info, err := range s.near.List(ctx, "", true) {
		if err != nil {
			return err
		}
		k, err := kindOf(info.Key)
		if err != nil || k == local || k == upload {
			continue
		}
		s.budget.holds(occupied(info.Size))
		if k == blob {
			undecided = s.compare(ctx, info, false) || undecided
			continue
		}
		p := s.stripe(info.Key)
		p.mu.Lock()
		s.await(p, info.Key, k, info.Size).tried = true
		p.mu.Unlock()
	}
	if !undecided {
		s.queue.release(unproven)
	}
	return nil
}

// forgetLocal removes what was noted of this machine's use of the store.
func (s *store) forgetLocal(ctx context.Context) error {
	var keys []string
	for info, err := range s.near.List(ctx, storage.Local, true) {
		if err != nil {
			return err
		}
		keys = append(keys, info.Key)
	}
	for _, key := range keys {
		if err := s.near.Delete(ctx, key); err != nil {
			return err
		}
	}
	return s.near.Sync(ctx, keys...)
}

// lists lists the bucket whenever it should be, until Close. Since a listing may lag
// behind what others have put there shortly before, it lists a second time when what
// the first may have missed must have turned up.
func (s *store) lists() {
	s.tidyLedgers(s.ctx)
	var second <-chan time.Time
	stop := func() {}
	defer func() { stop() }()
	for {
		first := true
		select {
		case <-s.ctx.Done():
			return
		case <-s.listing.want:
		case <-second:
			first = false
		}
		stop()
		second, stop = nil, func() {}
		tries := 0
		for wait := firstRetry; s.ctx.Err() == nil; wait = min(2*wait, longPause) {
			tries++
			err := s.Relist(s.ctx)
			if err == nil {
				s.sweepUploads(s.ctx)
				if first {
					second, stop = s.ticker(settle)
				}
				break
			}
			if s.ctx.Err() == nil {
				// It may never succeed, also where S3 answers all else; blobs are asked
				// for one by one then, and go before what is held.
				if (!outage(err) || tries >= maxListings) && s.queue.holds() {
					s.prove(s.ctx)
				}
				s.log.Warn("listing the bucket has failed, and is tried again", zap.Error(err))
			}
			timer := time.NewTimer(wait)
			select {
			case <-s.ctx.Done():
			case <-timer.C:
			}
			timer.Stop()
		}
	}
}

// List implements storage.Store.
func (s *store) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		dir := strings.TrimSuffix(prefix, "/")
		if prefix != "" && (dir == prefix || storage.CheckKey(dir) != nil) {
			yield(storage.Info{}, fmt.Errorf("s3 storage: %.200q is not a prefix to list", prefix))
			return
		}
		w := &walk{store: s, ctx: ctx, prefix: prefix, deep: deep, yield: yield, dirs: map[string]bool{}, seen: map[uint64]struct{}{}}
		if err := w.run(); err != nil && !errors.Is(err, errEnough) {
			yield(storage.Info{}, err)
		}
	}
}

// A walk is one listing.
type walk struct {
	store  *store
	ctx    context.Context
	prefix string
	deep   bool
	yield  func(storage.Info, error) bool
	dirs   map[string]bool
	seen   map[uint64]struct{} // hashes of keys that were yielded, and may turn up again
}

var errEnough = errors.New("whoever lists has seen enough")

// show yields a value, or the directory it is in.
func (w *walk) show(info storage.Info) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	rest := info.Key[len(w.prefix):]
	if slash := strings.IndexByte(rest, '/'); !w.deep && slash >= 0 {
		dir := info.Key[:len(w.prefix)+slash+1]
		return w.folder(dir)
	}
	if !w.yield(info, nil) {
		return errEnough
	}
	return nil
}

// folder yields a directory, once.
func (w *walk) folder(dir string) error {
	if w.dirs[dir] {
		return nil
	}
	w.dirs[dir] = true
	if !w.yield(storage.Info{Key: dir}, nil) {
		return errEnough
	}
	return nil
}

func (w *walk) hash(key string) uint64 { return maphash.String(w.store.seed, key) }

func (w *walk) has(key string) bool {
	_, ok := w.seen[w.hash(key)]
	return ok
}

// first shows a value that may turn up again.
func (w *walk) first(info storage.Info) error {
	if w.has(info.Key) {
		return nil
	}
	w.seen[w.hash(info.Key)] = struct{}{}
	return w.show(info)
}

// below reports whether a listing of one prefix shows something of another.
func below(inner, outer string) bool { return strings.HasPrefix(inner, outer) }

func (w *walk) run() error {
	s := w.store
	switch {
	case below(w.prefix, storage.Local):
		return w.near(w.prefix, func(kind) bool { return true })
	case below(w.prefix, storage.Uploads):
		return w.uploads(w.prefix)
	}
	if below(storage.Local, w.prefix) {
		if err := w.near(storage.Local, func(k kind) bool { return k == local }); err != nil {
			return err
		}
	}
	if below(storage.Uploads, w.prefix) {
		if err := w.uploads(storage.Uploads); err != nil {
			return err
		}
	}
	if s.index.complete.Load() && !s.contested() {
		return w.index()
	}
	return w.bucket()
}

func (o object) info() storage.Info {
	return storage.Info{Key: o.key, Size: o.size, ModTime: o.modified}
}

// near shows what is near below a prefix.
func (w *walk) near(prefix string, want func(kind) bool) error {
	for info, err := range w.store.near.List(w.ctx, prefix, true) {
		if err != nil {
			return err
		}
		k, err := kindOf(info.Key)
		if err != nil || !want(k) {
			continue
		}
		if info.Doubtful && k == blob && w.store.dispensable(info.Key) {
			info.Doubtful = false // it is read from the bucket
		}
		if err := w.first(info); err != nil {
			return err
		}
	}
	return nil
}

// A trace is what was done here to an upload, which a listing may not show yet.
type trace struct {
	at   time.Time
	size int64 // -1: it was deleted
}

// trace takes note of an upload that was put, or with a size of -1 deleted.
func (s *store) trace(key string, size int64) { s.traces.Add(key, trace{s.now(), size}) }

// uploads shows the uploads below a prefix. There are few.
func (w *walk) uploads(prefix string) error {
	s := w.store
	gone := map[string]bool{}
	for _, key := range s.traces.Keys() {
		done, ok := s.traces.Peek(key)
		if !ok || !strings.HasPrefix(key, prefix) || s.now().Sub(done.at) >= settle {
			continue
		}
		if done.size < 0 {
			gone[key] = true
			continue
		}
		if err := w.first(storage.Info{Key: key, Size: done.size, ModTime: done.at}); err != nil {
			return err
		}
	}
	return w.far(prefix, true, func(o object) error {
		if gone[o.key] || w.has(o.key) {
			return nil
		}
		return w.show(o.info())
	})
}

// far yields what the bucket has.
func (w *walk) far(prefix string, deep bool, show func(object) error) error {
	for o, err := range w.store.bucket.list(w.ctx, prefix, deep) {
		if err != nil {
			w.store.said(err)
			return err
		}
		if err := show(o); err != nil {
			return err
		}
	}
	w.store.said(nil)
	return nil
}

// index shows what is pending, and then what the index has.
func (w *walk) index() error {
	s := w.store
	for _, key := range s.pendingBelow(w.prefix) {
		info, err := s.near.Stat(w.ctx, key)
		if absent(err) {
			continue // it has come to the bucket since, or been deleted
		}
		if err != nil {
			return err
		}
		if err := w.first(info); err != nil {
			return err
		}
	}
	for from := []byte(w.prefix); from != nil; {
		page, next, err := s.index.page(w.prefix, from, w.deep, pageSize)
		if err != nil {
			return err
		}
		for _, found := range page {
			if err := w.entry(found); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}

func (w *walk) entry(found named) error {
	s := w.store
	if strings.HasSuffix(found.key, "/") {
		return w.folder(found.key)
	}
	if w.has(found.key) {
		return nil
	}
	if found.is(unsure) || found.size < 0 {
		info, err := s.Stat(w.ctx, found.key)
		if absent(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return w.show(info)
	}
	return w.show(found.info(found.key))
}

// bucket shows what is near, what was put lately, and then what S3 lists, but for what
// was deleted lately.
func (w *walk) bucket() error {
	s := w.store
	if err := w.near(w.prefix, func(k kind) bool { return k == ordinary || k == blob }); err != nil {
		return err
	}
	for from := []byte(w.prefix); from != nil; {
		page, next, err := s.index.page(w.prefix, from, true, pageSize)
		if err != nil {
			return err
		}
		for _, found := range page {
			if found.put.IsZero() || s.now().Sub(found.put) >= settle {
				continue
			}
			info, err := s.Stat(w.ctx, found.key)
			if absent(err) {
				continue
			}
			if err == nil {
				err = w.first(info)
			}
			if err != nil {
				return err
			}
		}
		from = next
	}
	return w.lately(func(o object) error {
		if strings.HasSuffix(o.key, "/") {
			return w.directory(o.key)
		}
		if k, err := kindOf(o.key); err != nil || k == local || k == upload || w.has(o.key) {
			return nil
		}
		if s.index.lately(o.key, s.now()) {
			info, err := s.Stat(w.ctx, o.key)
			if absent(err) {
				return nil
			}
			if err != nil {
				return err
			}
			return w.show(info)
		}
		if e, ok := s.index.get(o.key); ok && same(o.key, e, o) {
			return w.show(e.info(o.key))
		}
		return w.show(o.info())
	})
}

// A memo is what S3 has listed below a prefix, while the bucket is shared. What has
// been done here since is known besides.
type memo struct {
	at      time.Time
	objects []object
}

const (
	maxMemos = 64
	maxMemo  = 1000 // objects of one
)

// lately yields what the bucket has, or had less than two seconds ago.
func (w *walk) lately(show func(object) error) error {
	s := w.store
	if !s.owner.shared.Load() {
		return w.far(w.prefix, w.deep, show)
	}
	key := fmt.Sprint(w.deep, w.prefix)
	if m, ok := s.memos.Get(key); ok && s.now().Sub(m.at) < anew {
		for _, o := range m.objects {
			if err := show(o); err != nil {
				return err
			}
		}
		return nil
	}
	m := memo{at: s.now()}
	err := w.far(w.prefix, w.deep, func(o object) error {
		if len(m.objects) <= maxMemo {
			m.objects = append(m.objects, o)
		}
		return show(o)
	})
	if err == nil && len(m.objects) <= maxMemo {
		s.memos.Add(key, m)
	}
	return err
}

// directory shows a directory that S3 tells of. What is in it may all have been
// deleted lately, or be the store's own.
func (w *walk) directory(dir string) error {
	if w.dirs[dir] || below(dir, storage.Local) || below(dir, storage.Uploads) || isOurs(strings.TrimSuffix(dir, "/")) {
		return nil
	}
	if !w.store.index.emptied(dir, w.store.now()) && dir != "mirror/" {
		return w.folder(dir)
	}
	inner := &walk{store: w.store, ctx: w.ctx, prefix: dir, deep: true, dirs: map[string]bool{}, seen: map[uint64]struct{}{},
		yield: func(storage.Info, error) bool { return false }}
	err := inner.run()
	if errors.Is(err, errEnough) {
		return w.folder(dir)
	}
	return err
}

// pendingBelow is a copy of what is pending now.
func (s *store) pendingBelow(prefix string) (keys []string) {
	for i := range s.stripes {
		p := &s.stripes[i]
		p.mu.Lock()
		for key, st := range p.states {
			if st.pending && strings.HasPrefix(key, prefix) {
				keys = append(keys, key)
			}
		}
		p.mu.Unlock()
	}
	return keys
}
