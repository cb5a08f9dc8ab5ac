package module

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	database "github.com/caddy-registry/mirror/storage/catalog"
)

// inUse are the databases that states have open, by identity. Where two stores
// are given one file, the second waits for the first to be closed before it puts
// the file away: a reload has both for a while.
var inUse struct {
	sync.Mutex
	by map[string]*state
}

// claim has a database for a state alone, until the state is closed.
func (s *state) claim(ctx context.Context, identity string) error {
	for {
		inUse.Lock()
		other := inUse.by[identity]
		if other == nil || other == s {
			if inUse.by == nil {
				inUse.by = map[string]*state{}
			}
			inUse.by[identity] = s
			inUse.Unlock()
			return nil
		}
		inUse.Unlock()
		select {
		case <-other.closed:
		case <-ctx.Done():
			return fmt.Errorf("the store %s still uses %s: %w", other.identity, identity, context.Cause(ctx))
		}
	}
}

// disclaim gives up every database.
func (s *state) disclaim() {
	inUse.Lock()
	defer inUse.Unlock()
	for identity, by := range inUse.by {
		if by == s {
			delete(inUse.by, identity)
		}
	}
}

// openCatalog opens the catalog of the configuration that runs. One that is of
// no use is put away: it can be made again.
func (s *state) openCatalog(ctx context.Context) (*catalog.Catalog, error) {
	backend := *s.catalog.Load()
	if err := s.claim(ctx, backend.Identity(s.identity)); err != nil {
		return nil, err
	}
	c, err := s.tryCatalog(ctx, backend)
	if !errors.Is(err, database.ErrDamaged) && !errors.Is(err, catalog.ErrNewer) && !errors.Is(err, catalog.ErrOther) {
		return c, err
	}
	where, putErr := backend.Aside(ctx, s.identity)
	if putErr != nil {
		return nil, fmt.Errorf("the catalog is of no use (%w) and cannot be put away: %w", err, putErr)
	}
	s.log.Warn("the catalog was of no use and has been put away; it is made again from the store, and nothing is evicted until then",
		zap.String("store", s.identity), zap.String("aside", where), zap.Error(err))
	return s.tryCatalog(ctx, backend)
}

func (s *state) tryCatalog(ctx context.Context, backend database.Backend) (*catalog.Catalog, error) {
	db, err := backend.Open(ctx, s.identity)
	if err != nil {
		return nil, err
	}
	return catalog.Open(ctx, db, backend.Dialect(), s.identity)
}

// warnCatalog tells of a configuration that means another database than the one
// that is open.
func (s *state) warnCatalog(backend database.Backend) {
	wanted := backend.Identity(s.identity)
	inUse.Lock()
	defer inUse.Unlock()
	for identity, by := range inUse.by {
		if by == s && identity != wanted {
			s.log.Warn("another catalog takes effect when the store is next opened; restart Caddy for it",
				zap.String("store", s.identity), zap.String("catalog", identity), zap.String("wanted", wanted))
		}
	}
}
