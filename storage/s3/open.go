package s3

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	lru "github.com/hashicorp/golang-lru/v2"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
)

const (
	tidyEvery = 10 * time.Second
	firstCall = 10 * time.Second // how long an S3 that hangs holds up a start
	greeting  = 5 * time.Second  // and a reload
	maxAsked  = 20_000
	maxWrong  = 10_000
)

var (
	openedMu sync.Mutex // held through the first open and the last close of a cache directory
	opened   = map[string]*store{}
)

// open opens the store over a bucket whose near tier lies where near says. The bucket
// is the store's from then on, unless it fails.
//
// Within one process a cache directory is shared: after a reload that goes away from
// it and a second one that comes back, the first may still be serving its last readers.
func open(ctx context.Context, near *disk.Disk, b *bucket, settings settings) (*store, error) {
	openedMu.Lock()
	defer openedMu.Unlock()
	if s := opened[near.Directory]; s != nil {
		if s.identity != identity(settings) {
			return nil, fmt.Errorf("s3 storage: the cache directory %s is in use for another bucket, %s: %w; give each its own", near.Directory, s.identity, storage.ErrLocked)
		}
		s.refs++
		b.close()
		return s, nil
	}
	s, err := openWith(ctx, near, b, settings, time.Now, tick)
	if err != nil {
		return nil, err
	}
	opened[near.Directory] = s
	return s, nil
}

func tick(every time.Duration) (<-chan time.Time, func()) {
	t := time.NewTicker(every)
	return t.C, t.Stop
}

// identity names a bucket, and nothing of how it is used.
func identity(s settings) string {
	at := s.Endpoint
	if at == "" {
		at = "aws:" + s.Region
	}
	return strings.Join([]string{at, s.Bucket, s.Prefix}, " ")
}

// configure has the store use other settings from now on. If S3 refuses them, it fails
// and keeps to those it has.
func (s *store) configure(to settings) error {
	r, err := s.bucket.prepare(s.ctx, to)
	if err != nil {
		return err
	}
	if was := s.settings.Load(); was.AccessKey != to.AccessKey || was.SecretKey != to.SecretKey || was.Region != to.Region || was.PathStyle != to.PathStyle {
		if err := s.bucket.refusal(s.ctx, r); err != nil {
			return err
		}
		s.queue.answered()
	}
	s.bucket.remote.Store(r)
	s.settings.Store(&to)
	s.budget.mu.Lock()
	s.budget.limit = to.CacheSize
	s.budget.mu.Unlock()
	s.budget.full()
	return nil
}

func openWith(ctx context.Context, near *disk.Disk, b *bucket, settings settings, now func() time.Time, ticker func(time.Duration) (<-chan time.Time, func())) (_ *store, err error) {
	s := &store{
		bucket: b, root: near.Directory, identity: identity(settings), now: now, ticker: ticker, refs: 1,
		log: caddy.Log().Named("registry.storage.s3"), seed: maphash.MakeSeed(), queue: newQueue(),
		uploads: make(chan struct{}, maxUploads),
	}
	s.settings.Store(&settings)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.budget.limit, s.budget.over = settings.CacheSize, make(chan struct{}, 1)
	s.listing = listing{slot: make(chan struct{}, 1), want: make(chan struct{}, 1), changed: make(chan struct{})}
	s.asked, _ = lru.New[string, time.Time](maxAsked) // it fails only for a size below 1
	s.memos, _ = lru.New[string, memo](maxMemos)
	s.traces, _ = lru.New[string, trace](maxAsked)
	s.distrusted, _ = lru.New[string, struct{}](maxWrong)
	for i := range s.stripes {
		s.stripes[i].states = map[string]*state{}
	}
	if s.near, err = near.Open(ctx); err != nil {
		return nil, fmt.Errorf("s3 storage: opening the cache: %w", err)
	}
	defer func() {
		if err != nil {
			s.cancel()
			err = errors.Join(err, s.near.Close())
		}
	}()
	own := filepath.Join(s.root, filepath.FromSlash(ownDir))
	if err := os.MkdirAll(s.ledgers(), 0o750); err != nil {
		return nil, fmt.Errorf("s3 storage: %w", err)
	}
	if err := s.sweepLedgers(); err != nil {
		return nil, fmt.Errorf("s3 storage: %w", err)
	}
	if s.owner.node, err = nodeName(own); err != nil {
		return nil, fmt.Errorf("s3 storage: naming the cache directory: %w", err)
	}
	s.owner.host, _ = os.Hostname()
	s.owner.others = map[string]*sighting{}
	var fresh bool
	if s.index, fresh, err = openIndex(own, s.identity, storage.Boot()); err != nil {
		return nil, fmt.Errorf("s3 storage: opening the index in %s: %w", own, err)
	}
	defer func() {
		if err != nil {
			s.index.db.Close()
		}
	}()
	if fresh {
		if err := s.forgetLocal(ctx); err != nil {
			return nil, err
		}
	}
	first, cancel := context.WithTimeout(ctx, firstCall)
	defer cancel()
	if err := s.beatOnce(first); err != nil {
		if h := hopeless(err); h != nil {
			return nil, h
		}
		if !errors.Is(err, storage.ErrUnavailable) && first.Err() == nil {
			return nil, err
		}
		s.log.Warn("the bucket cannot be reached: what is near is served, and what is new waits", zap.Error(err))
	}
	if err := s.survey(ctx); err != nil {
		return nil, fmt.Errorf("s3 storage: looking at what is near: %w", err)
	}
	if !s.index.complete.Load() || s.owner.met.Load() && s.queue.holds() {
		s.listing.ask()
	}
	for _, work := range []func(){s.carry, s.carry, s.lists, s.beats, s.tidy} {
		s.work.Go(work)
	}
	return s, nil
}

// Close implements storage.Store. What is pending stays so.
func (s *store) Close() error {
	openedMu.Lock()
	defer openedMu.Unlock()
	if s.refs--; s.refs > 0 {
		return nil
	}
	if opened[s.root] == s {
		delete(opened, s.root)
	}
	s.cancel()
	s.work.Wait()
	if b := s.Backlog(); b.Pending > 0 {
		s.log.Warn("values are not in the bucket yet: they stay in the cache directory, and are uploaded when the store is opened again",
			zap.Int64("values", b.Pending), zap.Int64("bytes", b.PendingBytes), zap.String("cache", s.root))
	}
	s.leave()
	err := errors.Join(s.index.close(), s.near.Close())
	s.bucket.close()
	if err != nil {
		return fmt.Errorf("s3 storage: %w", err)
	}
	return nil
}

// Distant implements storage.Store.
func (s *store) Distant() storage.Distant { return s }

// Shared implements storage.Distant.
func (s *store) Shared() bool { return s.owner.shared.Load() }

// Secret implements storage.Distant.
func (s *store) Secret() []byte { return s.settings.Load().Secret }

// Presign implements storage.Distant.
func (s *store) Presign(ctx context.Context, method, key string, life time.Duration) (string, error) {
	k, err := kindOf(key)
	if err != nil {
		return "", err
	}
	if k == local {
		return "", notThere("presign", key)
	}
	if k != upload {
		e, f, version := s.look(key, k)
		_, wrong := s.distrusted.Peek(key)
		switch {
		case f == pending, f == missing, wrong, e.is(distrusted):
			return "", notThere("presign", key)
		case f == unknown:
			e, err := s.ask(ctx, key, version)
			if err != nil {
				return "", err
			}
			// What is near is what is asked for, and is on its way if that differs.
			if info, err := s.near.Stat(ctx, key); err == nil && !info.Doubtful && info.Size != e.size {
				return "", notThere("presign", key)
			}
		}
	}
	if s.bucket.breaker.open() {
		return "", fmt.Errorf("presigning %s: %w: it has not answered lately", key, storage.ErrUnavailable)
	}
	return s.bucket.presign(ctx, method, key, life)
}

// trouble is what is wrong with the bucket.
type trouble struct {
	mu    sync.Mutex
	err   error
	since time.Time // of the first failure after the last success
}

// said takes note of how a call to S3 has ended.
func (s *store) said(err error) {
	switch {
	case err == nil || absent(err):
		s.queue.answered()
		s.trouble.mu.Lock()
		s.trouble.err, s.trouble.since = nil, time.Time{}
		s.trouble.mu.Unlock()
	case errors.Is(err, storage.ErrUnavailable):
		s.trouble.met(err, s.now())
	}
}

func (t *trouble) met(err error, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.since.IsZero() {
		t.since = now
	}
	t.err = err
}

// Backlog implements storage.Backlogged.
func (s *store) Backlog() storage.Backlog {
	s.budget.mu.Lock()
	b := storage.Backlog{Pending: s.budget.waiting, PendingBytes: s.budget.pending, NearBytes: s.budget.near, CacheBytes: s.budget.limit}
	s.budget.mu.Unlock()
	b.Oldest = s.queue.oldest()
	b.Calls, b.Failed = s.bucket.called(), s.bucket.failures()
	b.Others = s.owner.names()
	b.Listed = s.index.complete.Load()
	b.Shared = s.owner.shared.Load()
	s.trouble.mu.Lock()
	b.Err, b.Since = s.trouble.err, s.trouble.since
	s.trouble.mu.Unlock()
	return b
}

var (
	_ storage.Store      = (*store)(nil)
	_ storage.Distant    = (*store)(nil)
	_ storage.Backlogged = (*store)(nil)
)
