package s3

import (
	"bytes"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// A queue is the order in which pending values are uploaded: as they came, but that
// what is no blob waits for the blobs that came before it, which it may speak of. At
// first it also waits until it is known of every near blob whether the bucket has it.
//
// While S3 does not answer it stands still, longer each time, and goes on as soon as
// anybody has had an answer.
type queue struct {
	mu     sync.Mutex
	blobs  *list.List // of *job, in the order of seq
	others *list.List
	jobs   map[string]*list.Element
	seq    uint64
	pause  time.Duration // how long it stands still after the next failure
	until  time.Time     // it stands still
	heard  uint64        // counts the answers of S3
	held   hold          // why what is no blob is not taken yet; 0: it is
	wake   chan struct{}
}

// A hold is a reason why it is not known of every near blob whether the bucket has it.
type hold uint8

const (
	unmet    hold = 1 << iota // S3 has not been asked who has used the bucket since
	unproven                  // the index does not tell
)

// A job is one pending value.
type job struct {
	key   string
	blob  bool
	seq   uint64
	taken bool
	heard uint64    // the queue's, when it was taken
	after time.Time // not before
	since time.Time // it is pending, in this process
}

const (
	workers           = 2
	maxUploads        = 8 // for those who wait
	shortPause        = time.Second
	longPause         = time.Minute
	retryAfterFailure = time.Minute // of a value that S3 refuses, while it takes others
	retryTaken        = time.Second
	maxScan           = 1000
)

func newQueue() *queue {
	return &queue{blobs: list.New(), others: list.New(), jobs: map[string]*list.Element{}, held: unmet | unproven, wake: make(chan struct{}, workers)}
}

func (q *queue) list(blob bool) *list.List {
	if blob {
		return q.blobs
	}
	return q.others
}

func (q *queue) rouse() {
	for range workers {
		select {
		case q.wake <- struct{}{}:
		default:
			return
		}
	}
}

// release ends a hold. With the last, what is no blob may go, behind the blobs there are
// by then.
func (q *queue) release(h hold) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.held == 0 {
		return
	}
	if q.held &^= h; q.held != 0 {
		return
	}
	for e := q.others.Front(); e != nil; e = e.Next() {
		q.seq++
		e.Value.(*job).seq = q.seq
	}
	q.rouse()
}

// holds reports whether what is no blob is not taken yet.
func (q *queue) holds() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.held != 0
}

// add puts a value at the end. One that is in the queue stays where it is, and is
// another from now on.
func (q *queue) add(key string, blob bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e := q.jobs[key]; e != nil {
		e.Value.(*job).after = time.Time{}
		q.rouse()
		return
	}
	q.seq++
	q.jobs[key] = q.list(blob).PushBack(&job{key: key, blob: blob, seq: q.seq, since: time.Now()})
	q.rouse()
}

// oldest is about since when a value has been in the queue; zero: none is. What S3
// refuses is at the back.
func (q *queue) oldest() (since time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, e := range []*list.Element{q.blobs.Front(), q.blobs.Back(), q.others.Front(), q.others.Back()} {
		if e != nil && (since.IsZero() || e.Value.(*job).since.Before(since)) {
			since = e.Value.(*job).since
		}
	}
	return since
}

func (q *queue) remove(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e := q.jobs[key]; e != nil {
		q.list(e.Value.(*job).blob).Remove(e)
		delete(q.jobs, key)
		q.rouse() // others may have waited for it
	}
}

// retry has a value tried at once.
func (q *queue) retry(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e := q.jobs[key]; e != nil {
		e.Value.(*job).after = time.Time{}
		q.rouse()
	}
}

// next takes the value whose turn it is, or says how long there is none.
func (q *queue) next(now time.Time) (key string, wait time.Duration, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	wait = time.Hour
	if d := q.until.Sub(now); d > 0 {
		return "", d, false
	}
	scan := func(l *list.List, before uint64) bool {
		n := 0
		for e := l.Front(); e != nil && n < maxScan; e = e.Next() {
			n++
			j := e.Value.(*job)
			if j.seq >= before {
				return false
			}
			if j.taken {
				continue
			}
			if d := j.after.Sub(now); d > 0 {
				wait = min(wait, d)
				continue
			}
			j.taken, j.heard = true, q.heard
			key = j.key
			return true
		}
		return false
	}
	if scan(q.blobs, ^uint64(0)) {
		return key, 0, true
	}
	if q.held != 0 {
		return "", wait, false
	}
	first := ^uint64(0)
	if e := q.blobs.Front(); e != nil {
		first = e.Value.(*job).seq
	}
	return key, wait, scan(q.others, first)
}

// back gives back what was taken. A value that failed, though S3 has answered others
// meanwhile, goes to the end: it must not hold up those that wait for it.
func (q *queue) back(key string, err error, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.jobs[key]
	if e != nil {
		e.Value.(*job).taken = false
	}
	switch {
	case err == nil:
		if e != nil { // put anew meanwhile
			q.rouse()
		}
	case errors.Is(err, errTaken), errors.Is(err, errVoid):
		if e != nil {
			e.Value.(*job).after = now.Add(retryTaken)
		}
	case errors.Is(err, storage.ErrUnavailable) && (e == nil || e.Value.(*job).heard == q.heard):
		q.pause = min(max(2*q.pause, shortPause), longPause)
		q.until = now.Add(q.pause)
	case e != nil:
		j := e.Value.(*job)
		j.after = now.Add(retryAfterFailure)
		q.seq++
		j.seq = q.seq
		q.list(j.blob).MoveToBack(e)
	}
}

// answered says that S3 does.
func (q *queue) answered() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.heard++
	if q.pause > 0 {
		q.pause, q.until = 0, time.Time{}
		q.rouse()
	}
}

// carry is what each worker does until Close.
func (s *store) carry() {
	for s.ctx.Err() == nil {
		key, wait, ok := s.queue.next(s.now())
		if !ok {
			timer := time.NewTimer(wait)
			select {
			case <-s.queue.wake:
			case <-timer.C:
			case <-s.ctx.Done():
			}
			timer.Stop()
			continue
		}
		err := s.upload(key, true)
		if s.ctx.Err() == nil {
			if err != nil && !errors.Is(err, storage.ErrUnavailable) && !errors.Is(err, errVoid) && !errors.Is(err, errTaken) {
				s.trouble.met(err, s.now())
				s.log.Warn("a value could not be brought to the bucket, and is tried again", zap.String("key", key), zap.Error(err))
			}
			s.queue.back(key, err, s.now())
		}
	}
}

// errTaken is why a worker does not upload a value: somebody who waits for it does.
var errTaken = errors.New("somebody is at it")

// errDoubtful is why a value is not uploaded that a loss of power may have damaged.
var errDoubtful = errors.New("a loss of power may have damaged it, and nobody has read it since")

// upload brings a value to the bucket, if it is pending. behind says that nobody
// waits for it.
func (s *store) upload(key string, behind bool) error {
	ctx := s.ctx
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch st := p.states[key]; {
	case st == nil:
		return nil
	case behind && st.slot != nil:
		return errTaken
	}
	st, err := s.take(ctx, p, key, false)
	if err != nil {
		return err
	}
	defer s.give(p, key)
	if !st.pending {
		return nil
	}
	gen, wasTried := st.gen, st.tried
	st.tried = true
	wanted, yield := context.WithCancel(ctx)
	defer yield()
	if st.yield = yield; st.deletes > 0 {
		yield()
	}
	p.mu.Unlock()
	failpoint.Hit("s3.uploading")
	e, began, err := s.send(ctx, wanted, key)
	failpoint.Hit("s3.uploaded")
	p.mu.Lock()
	if !began && !wasTried {
		st.tried = false
	}
	switch {
	case errors.Is(err, errVanished):
		s.log.Error("what was to be uploaded is lost", zap.String("key", key), zap.Error(err))
		if st.gen == gen {
			s.arrived(p, key)
		}
		if behind {
			return nil
		}
		return err
	case errors.Is(err, errDoubtful):
		if behind {
			return err
		}
		return nil // it survives a loss of power as what it is
	case err != nil:
		return err
	}
	e.put = s.now().UTC()
	if err := s.index.set(key, e); err != nil {
		return err
	}
	failpoint.Hit("s3.indexed")
	s.distrusted.Remove(key)
	if s.owner.shared.Load() {
		s.asked.Add(key, s.now())
	}
	if st.gen != gen {
		return nil
	}
	if isBlob(key) {
		s.index.note(key, e.size, s.now())
	} else if err := s.remove(ctx, key); err != nil {
		return err
	}
	s.arrived(p, key)
	return nil
}

// vouch vouches for a link or a record that a loss of power may have damaged, if it says
// what one says: damage leaves something that is cut, or nothing.
func (s *store) vouch(ctx context.Context, key string, info storage.Info) error {
	if info.Size > maxInline {
		return errDoubtful
	}
	data, err := s.near.Get(ctx, key, maxInline)
	if err != nil {
		return err
	}
	_, isLink := layout.DigestOf(key)
	switch d := digest.Digest(data); {
	case (isLink || strings.HasSuffix(key, "/current/link")) && d.Validate() == nil:
	case strings.HasSuffix(key, ".json") && json.Valid(data):
	default:
		return errDoubtful
	}
	return s.near.Vouch(ctx, key)
}

// errVanished is why a pending value is not uploaded of which there is no near file.
var errVanished = errors.New("it has vanished from the cache directory")

// send sends the near file of a key, and returns the entry for it. began says that the
// bucket may have it, or a part of it, though it failed. wanted ends when the value is to
// be deleted.
func (s *store) send(ctx, wanted context.Context, key string) (e entry, began bool, err error) {
	info, err := s.near.Stat(ctx, key)
	if absent(err) {
		return e, false, errVanished
	}
	if err != nil {
		return e, false, err
	}
	e = entry{size: info.Size, modified: info.ModTime.UTC()}
	path := filepath.Join(s.root, filepath.FromSlash(key))
	d, ok := layout.BlobOf(key)
	if !ok {
		if info.Doubtful {
			if err := s.vouch(ctx, key, info); err != nil {
				return e, false, err
			}
		}
		return s.sendOther(ctx, wanted, key, path, e)
	}
	hash := d.Encoded()
	if d.Algorithm() != "sha256" || info.Doubtful {
		if hash, err = hashFile(path); err != nil {
			return e, false, err
		}
		switch {
		case d.Algorithm() == "sha256" && hash != d.Encoded():
			return e, false, fmt.Errorf("a loss of power has damaged what is in the cache directory under %s", key)
		case d.Algorithm() != "sha256" && info.Doubtful:
			return e, false, errDoubtful
		case info.Doubtful:
			if err := s.near.Vouch(ctx, key); err != nil {
				return e, false, err
			}
		}
	}
	if there, err := s.thereAlready(ctx, key, info.Size); err != nil || there.size >= 0 {
		if err == nil {
			s.forgo(ctx, key) // what is left is swept
		}
		if there.modified.IsZero() {
			there.modified = e.modified
		}
		return there, false, err
	}
	return e, true, s.sendFile(ctx, wanted, key, path, info.Size, hash)
}

// thereAlready asks for a blob of which it is not known whether the bucket has it. The
// size of what it returns is -1 if the blob has to be sent.
func (s *store) thereAlready(ctx context.Context, key string, size int64) (entry, error) {
	none := entry{size: -1}
	if _, wrong := s.distrusted.Peek(key); wrong {
		return none, nil
	}
	e, f := s.believe(key, blob)
	switch {
	case e.is(distrusted) || f == missing:
		return none, nil
	case f == present && e.size == size:
		return e, nil
	case f == present:
		return none, nil
	}
	o, err := s.bucket.head(ctx, key)
	s.said(err)
	if absent(err) || err == nil && o.size != size {
		return none, nil
	}
	return entry{size: o.size, etag: o.etag, modified: o.modified}, err
}

func (s *store) sendOther(ctx, wanted context.Context, key, path string, e entry) (entry, bool, error) {
	if e.size > maxInline {
		hash, err := hashFile(path)
		if err != nil {
			return e, false, err
		}
		return e, true, s.sendFile(ctx, wanted, key, path, e.size, hash)
	}
	data, err := s.near.Get(ctx, key, maxInline)
	if err != nil {
		return e, false, err
	}
	e.data, e.size = data, int64(len(data))
	e.flags |= held
	// If it is not told, the value is read once more when it has been listed.
	e.etag, err = s.bucket.put(ctx, key, bytes.NewReader(data), e.size, sum(data))
	s.said(err)
	return e, true, err
}

// sendFile sends a file, going on where an earlier try has ended.
func (s *store) sendFile(ctx, wanted context.Context, key, path string, size int64, hash string) error {
	l := s.ledger(key)
	err := s.bucket.putFile(ctx, wanted, key, path, size, hash, l.read(), func(p parts) error {
		err := l.write(p)
		failpoint.Hit("s3.part")
		return err
	})
	s.said(err)
	if err == nil {
		l.remove()
	}
	return err
}

// errVoid is why an upload in parts ends before its last step: the value is to be
// deleted. Parts that S3 gets later are those of an upload that is given up. Once it has
// been asked to make them one it is too late for that. Nor is a call ended in which a
// value is sent whole: S3 may have it and store it after the deletion.
var errVoid = errors.New("it is to be deleted")

// Sync implements storage.Store.
func (s *store) Sync(ctx context.Context, keys ...string) error {
	var blobs, others, near []string
	for _, key := range keys {
		k, err := kindOf(key)
		if err != nil {
			return err
		}
		switch k {
		case blob:
			blobs = append(blobs, key)
		case ordinary:
			others = append(others, key)
			near = append(near, key)
		case local:
			near = append(near, key)
		}
	}
	if s.settings.Load().PushLocal {
		return s.near.Sync(ctx, append(blobs, near...)...)
	}
	for _, group := range [][]string{blobs, others} {
		if err := s.syncAll(ctx, group); err != nil {
			return fmt.Errorf("s3 storage: bringing values to the bucket: %w", err)
		}
	}
	// Near files that are gone must not be back after a loss of power: they would
	// be taken for newer than what the bucket has.
	for _, key := range blobs {
		if _, f, _ := s.look(key, blob); f != present {
			near = append(near, key)
		}
	}
	if len(near) == 0 {
		return nil
	}
	return s.near.Sync(ctx, near...)
}

// syncAll uploads what is pending under the keys, several at once.
func (s *store) syncAll(ctx context.Context, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	turns := make(chan struct{}, maxUploads)
	for _, key := range keys {
		if !s.outstanding(key) {
			continue
		}
		select {
		case turns <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-turns }()
			if err := s.sync(ctx, key); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// outstanding reports whether a key has to be uploaded, and sees to it that it can.
func (s *store) outstanding(key string) bool {
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending(key) {
		return true
	}
	if !isBlob(key) {
		return false
	}
	if _, f := s.believe(key, blob); f == present {
		return false
	}
	info, err := s.near.Stat(s.ctx, key)
	if err != nil {
		return false
	}
	s.await(p, key, blob, info.Size).tried = true
	return true
}

// sync uploads what is pending under a key now. The upload goes on when nobody waits
// for it any more: one that is given up may still come to the bucket, after whatever
// else has been done with the key since.
func (s *store) sync(ctx context.Context, key string) error {
	select {
	case s.uploads <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	s.work.Go(func() {
		defer func() { <-s.uploads }()
		err := errVoid
		for errors.Is(err, errVoid) && s.ctx.Err() == nil { // the deletion may have failed
			err = s.upload(key, false)
		}
		if s.ctx.Err() != nil {
			err = fmt.Errorf("%w: the store is being closed", storage.ErrUnavailable)
		}
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
