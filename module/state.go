package module

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	images "github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/retain"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
	database "github.com/caddy-registry/mirror/storage/catalog"
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
	tuned   tuning        // guarded by opening
	before  tuning        // guarded by opening: what tuned has replaced, until that has ended
	works   atomic.Pointer[opened]

	// earlier is closed when the state is that had the store before.
	earlier <-chan struct{}
	// catalog and upstreams are those of the configuration that runs.
	catalog   atomic.Pointer[database.Backend]
	upstreams atomic.Pointer[mirror.Upstreams]
}

// opened is what works on a store that is open.
type opened struct {
	keeper *retain.Keeper
	tree   *tree.Tree
	hosted *hosted.Registry
	mirror *mirror.Mirror
	images *backing.Library
	api    *images.API // of images
	// hasImages says that the configuration that runs has backing images.
	hasImages atomic.Bool
	sender    *notify.Sender // to webhooks
}

// lasting has every state that is not closed, by the identity of its store. It
// is in the pool or serves its last requests: a reload that leaves a store and
// another one that comes back find the same state, for two of them would not
// know what the other one is about to need of what they delete.
var lasting struct {
	sync.Mutex
	states map[string]*state
}

// useState takes a reference to the state of a store.
func useState(backend storage.Backend, catalog database.Backend, log *zap.Logger) (*state, error) {
	identity := backend.Identity()
	value, _, err := states.LoadOrNew(identity, func() (caddy.Destructor, error) {
		lasting.Lock()
		defer lasting.Unlock()
		earlier := closedChannel
		if s := lasting.states[identity]; s != nil {
			if s.enter() {
				return s, nil
			}
			earlier = s.closed
		}
		core := &logCore{current: new(atomic.Pointer[zap.Logger])}
		core.current.Store(log)
		s := &state{identity: identity, backend: backend, core: core, log: zap.New(core).Named("registry"), closed: make(chan struct{}), earlier: earlier}
		s.catalog.Store(&catalog)
		s.users.Store(1)
		if lasting.states == nil {
			lasting.states = map[string]*state{}
		}
		lasting.states[identity] = s
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
	defer func() {
		s.disclaim()
		lasting.Lock()
		defer lasting.Unlock()
		if lasting.states[s.identity] == s {
			delete(lasting.states, s.identity)
		}
	}()
	s.opening.Lock()
	defer s.opening.Unlock()
	if o := s.works.Load(); o != nil {
		o.images.Close() // whose pulls the mirror's fills serve
		o.mirror.Close()
		o.hosted.Close()
		o.sender.Close()
		o.keeper.Stop()
		o.tree.Close() // which writes links behind, and tells of them
		o.keeper.Close()
	}
	if s.store != nil {
		if err := s.store.Close(); err != nil {
			s.log.Error("closing the store", zap.String("store", s.identity), zap.Error(err))
		}
	}
}

// open returns what works on the store, opening it on first use.
func (s *state) open(ctx context.Context) (*opened, error) {
	if o := s.works.Load(); o != nil {
		return o, nil
	}
	select {
	case <-s.earlier:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for those who had the store before: %w", context.Cause(ctx))
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	if o := s.works.Load(); o != nil {
		return o, nil
	}
	if s.users.Load() == 0 {
		return nil, errClosed
	}
	store, err := s.backend.Open(ctx)
	if err != nil {
		return nil, err
	}
	queues, err := store.Spool("webhooks")
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	s.store = store
	o := &opened{keeper: retain.New(store, s.log), sender: notify.New(queues, s.log)}
	var m atomic.Pointer[mirror.Mirror]
	o.tree = tree.New(o.keeper.Store(), func(c tree.Change) {
		o.keeper.Note(c)
		if m := m.Load(); m != nil {
			m.Note(c)
		}
	})
	o.hosted = hosted.New(hosted.Parts{Store: o.keeper.Store(), Tree: o.tree, Room: o.keeper.Room, Quota: o.keeper.Quota, Log: s.log})
	o.mirror = mirror.New(mirror.Parts{Store: o.keeper.Store(), Tree: o.tree, Hosted: o.hosted, Room: o.hosted.Room, Catalog: o.keeper.Listing, Suspect: o.keeper.Suspect, Log: s.log})
	m.Store(o.mirror)
	o.images = backing.New(backing.Parts{Store: o.keeper.Store(), Tree: o.tree, Hosted: o.hosted, Fills: o.mirror.Fills(), Suspect: o.keeper.Suspect, Log: s.log})
	if o.api, err = images.New(images.Parts{Library: o.images, Ready: o.ready, Log: s.log}); err != nil {
		return nil, err // it is of the program
	}
	o.keeper.Begin(o.tree, retain.Hooks{
		Catalog: s.openCatalog,
		Heal: func(ctx context.Context, repository string, d digest.Digest, size int64) error {
			return s.heal(ctx, o, repository, d, size)
		},
		Alone:   o.tree.Alone,
		Partial: func() int64 { return o.mirror.Partial() + o.hosted.Partial() },
	})
	s.works.Store(o)
	return o, nil
}

// heal fetches a mirrored blob again, from where its repository comes from by the
// configuration that runs.
func (s *state) heal(ctx context.Context, o *opened, repository string, d digest.Digest, size int64) error {
	ups := s.upstreams.Load()
	if ups == nil {
		return errors.New("no configuration has started yet")
	}
	record, err := o.tree.Record(ctx, repository)
	if err != nil {
		return err
	}
	target, ok := ups.Owner(repository, record)
	if !ok {
		return fmt.Errorf("%s is of no registry that is configured now", repository)
	}
	return o.mirror.Fetch(ctx, target, d, size)
}

// closedChannel is for what need not be waited for.
var closedChannel = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

var errClosed = errors.New("the store is being closed; try again")

// tuning is what a configuration changes in a state that is open.
type tuning struct {
	backend   storage.Backend // nil: none yet
	catalog   database.Backend
	log       *zap.Logger
	mirror    mirror.Settings
	hosted    hosted.Settings
	keep      retain.Settings
	backing   backing.Settings
	webhooks  []notify.Webhook
	emits     func(event string) bool // whether anybody is told of a Caddy event
	upstreams *mirror.Upstreams
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
	s.set(to)
	return nil
}

// set is called with opening held and the store open.
func (s *state) set(to tuning) {
	s.core.current.Store(to.log)
	s.catalog.Store(&to.catalog)
	s.upstreams.Store(to.upstreams)
	o := s.works.Load()
	o.sender.Set(to.webhooks)
	to.mirror.Notify, to.mirror.Pulls = o.told(to)
	o.mirror.Set(to.mirror)
	o.hosted.Set(to.hosted)
	o.keeper.Set(to.keep)
	o.images.Set(to.backing) // behind what it works with
	o.hasImages.Store(to.backing.Prefix != "")
	s.warnCatalog(to.catalog)
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
	s.set(before)
}
