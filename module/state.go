package module

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
)

// states are what outlives a reload, by the identity of their store.
var states = caddy.NewUsagePool()

// A state is everything that belongs to one store: the open store, the fills
// into it, and what is known of upstreams. It is closed when no configuration
// names it and no request uses it any more.
type state struct {
	identity  string
	backend   storage.Backend // the first to name the store; it opens it
	endpoints upstream.Pool
	core      *logCore
	log       *zap.Logger

	// users are the requests under way, and one for the pool. At 0 it is
	// over, and stays so.
	users  atomic.Int64
	closed chan struct{} // when it is over and everything is closed

	opening sync.Mutex
	store   storage.Store // guarded by opening
	tree    *tree.Tree    // guarded by opening
	tuned   tuning        // guarded by opening
	before  tuning        // guarded by opening: what tuned has replaced, until that has ended
	mirror  atomic.Pointer[mirror.Mirror]
}

// useState takes a reference to the state of a store.
func useState(backend storage.Backend, log *zap.Logger) (*state, error) {
	identity := backend.Identity()
	value, _, err := states.LoadOrNew(identity, func() (caddy.Destructor, error) {
		core := &logCore{current: new(atomic.Pointer[zap.Logger])}
		core.current.Store(log)
		s := &state{identity: identity, backend: backend, core: core, log: zap.New(core).Named("registry"), closed: make(chan struct{})}
		s.users.Store(1)
		return s, nil
	})
	if err != nil {
		return nil, err
	}
	return value.(*state), nil
}

// unuse gives the reference back.
func (s *state) unuse() error {
	_, err := states.Delete(s.identity)
	return err
}

// enter keeps the state open for a request. It fails when the state is over.
func (s *state) enter() bool {
	for {
		n := s.users.Load()
		if n == 0 {
			return false
		}
		if s.users.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// leave ends what enter began.
func (s *state) leave() {
	if s.users.Add(-1) == 0 {
		go s.close()
	}
}

// exitPatience is how long the end of the process waits for a state to be
// closed in good order.
const exitPatience = 5 * time.Second

// Destruct drops the pool's reference. It does not wait, since it runs in the
// middle of a reload while requests may still be reading; unless the process
// is ending, when nothing would finish behind it.
func (s *state) Destruct() error {
	s.leave()
	if caddy.Exiting() {
		select {
		case <-s.closed:
		case <-time.After(exitPatience):
			s.log.Warn("ending with requests or fills under way; the next start goes on from what they had", zap.String("store", s.identity))
		}
	}
	return nil
}

func (s *state) close() {
	defer close(s.closed)
	s.opening.Lock()
	defer s.opening.Unlock()
	if m := s.mirror.Load(); m != nil {
		m.Close()
		s.tree.Close()
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("closing the store", zap.String("store", s.identity), zap.Error(err))
		}
	}
}

// open returns the mirror, opening the store on first use.
func (s *state) open(ctx context.Context) (*mirror.Mirror, error) {
	if m := s.mirror.Load(); m != nil {
		return m, nil
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	if m := s.mirror.Load(); m != nil {
		return m, nil
	}
	if s.users.Load() == 0 {
		return nil, errClosed
	}
	store, err := s.backend.Open(ctx)
	if err != nil {
		return nil, err
	}
	s.store = store
	s.tree = tree.New(store, nil)
	m := mirror.New(mirror.Parts{Store: store, Tree: s.tree, Log: s.log})
	s.mirror.Store(m)
	return m, nil
}

var errClosed = errors.New("the store is being closed; try again")

// tuning is what a configuration changes in a state that is open.
type tuning struct {
	backend storage.Backend // nil: none yet
	log     *zap.Logger
	mirror  mirror.Settings
}

// tune gives the state the settings of a configuration that starts, and keeps
// those it had until one of the two configurations has ended.
func (s *state) tune(to tuning) error {
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.store == nil {
		return fmt.Errorf("%s is not open", s.identity)
	}
	if err := to.backend.Configure(s.store); err != nil {
		return err
	}
	s.before, s.tuned = s.tuned, to
	s.core.current.Store(to.log)
	s.mirror.Load().Set(to.mirror)
	return nil
}

// untune is for a configuration that ends: if its settings are the latest, it
// puts back those that they replaced. Settings hold their whole configuration,
// with its secrets, so those that nobody can want back are forgotten.
func (s *state) untune(ends storage.Backend) {
	s.opening.Lock()
	defer s.opening.Unlock()
	before := s.before
	if before.backend == ends {
		s.before = tuning{}
	}
	if s.tuned.backend != ends || before.backend == nil || s.store == nil {
		return
	}
	s.before = tuning{}
	if err := before.backend.Configure(s.store); err != nil {
		s.log.Error("putting settings back", zap.String("store", s.identity), zap.Error(err))
		return
	}
	s.tuned = before
	s.core.current.Store(before.log)
	s.mirror.Load().Set(before.mirror)
}
