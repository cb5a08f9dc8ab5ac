// Package upstream is one registry as a client sees it: endpoints asked in
// order, tokens, redirects, limits and health. What it returns is verified
// where it can be, and what it fails with is an *[Error] that names the hop.
// It decides nothing about caching.
package upstream

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// An Upstream is one registry.
type Upstream struct {
	name      string
	endpoints []ranked // in the order of asking
	anonymous *Upstream
	pause     time.Duration
	release   func()
}

type ranked struct {
	*endpoint
	pull, resolve bool
}

// need is what a call wants of an endpoint.
type need int

const (
	toPull need = iota
	toResolve
)

func (r ranked) can(n need) bool {
	if n == toResolve {
		return r.resolve
	}
	return r.pull
}

// A Pool keeps endpoints alive while any configuration names them, so that a
// reload loses no token, connection or memory of a limit.
type Pool struct {
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Pause is about how long a call waits before it asks again, for the first
	// time; 0: 100 ms.
	Pause time.Duration

	mu        sync.Mutex
	endpoints map[string]*pooled
}

type pooled struct {
	*endpoint
	users map[string]int // how many that are open have it, by their name
}

// Open returns the registry of the given name with the given endpoints, the
// origin last. The caller closes it.
func (p *Pool) Open(name string, endpoints []Endpoint) (*Upstream, error) {
	u, err := p.open(name, endpoints)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(endpoints, func(e Endpoint) bool { return e.Credentials != (Credentials{}) }) {
		bare := slices.Clone(endpoints)
		for i := range bare {
			bare[i].Credentials = Credentials{}
		}
		if u.anonymous, err = p.open(name, bare); err != nil {
			u.Close()
			return nil, err
		}
	}
	return u, nil
}

func (p *Pool) open(name string, endpoints []Endpoint) (*Upstream, error) {
	now := p.Now
	if now == nil {
		now = time.Now
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.endpoints == nil {
		p.endpoints = map[string]*pooled{}
	}
	u := &Upstream{name: name, pause: cmp.Or(p.Pause, 100*time.Millisecond)}
	var ids []string
	u.release = sync.OnceFunc(func() { p.put(name, ids) })
	for _, cfg := range endpoints {
		id := cfg.id()
		held := p.endpoints[id]
		if held == nil {
			e, err := newEndpoint(cfg, now)
			if err != nil {
				p.mu.Unlock()
				u.release()
				p.mu.Lock()
				return nil, err
			}
			held = &pooled{e, map[string]int{}}
			p.endpoints[id] = held
		}
		held.users[name]++
		ids = append(ids, id)
		u.endpoints = append(u.endpoints, ranked{held.endpoint, cfg.Pull, cfg.Resolve})
	}
	return u, nil
}

func (p *Pool) put(name string, ids []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range ids {
		held := p.endpoints[id]
		if held.users[name]--; held.users[name] == 0 {
			delete(held.users, name)
		}
		if len(held.users) == 0 {
			delete(p.endpoints, id)
			held.transports.retire()
		}
	}
}

// Close says that this configuration of the upstream is not used any more.
// Requests under way go on.
func (u *Upstream) Close() {
	u.release()
	if u.anonymous != nil {
		u.anonymous.Close()
	}
}

// Anonymous is the same upstream asked by nobody in particular, or nil where no
// endpoint is asked with credentials anyway.
func (u *Upstream) Anonymous() *Upstream { return u.anonymous }

// rounds is how often a call goes over all endpoints while they fail in
// passing.
const rounds = 3

// each tries the endpoints in order until one does the operation. Only the
// last one's word counts for what does not exist or is denied: a mirror that
// lacks something is no authority on it. op is given a context with its share
// of the time that is left, so that one silent endpoint cannot use it all up.
func (u *Upstream) each(ctx context.Context, n need, op func(ctx context.Context, e *endpoint, last bool) error) error {
	var able []*endpoint
	for _, e := range u.endpoints {
		if e.can(n) {
			able = append(able, e.endpoint)
		}
	}
	var failure *Error
	for i, e := range able {
		share, cancel := withShare(ctx, len(able)-i)
		err := op(share, e, i == len(able)-1)
		cancel()
		if err == nil {
			return nil
		}
		if !errors.As(err, &failure) {
			failure = &Error{Kind: Unavailable, Endpoint: e.name, Err: err}
		}
		failure.Upstream = u.name
		if ctx.Err() != nil || failure.Kind == NotFound && e.origin {
			break
		}
	}
	if failure == nil {
		failure = &Error{Kind: Unavailable, Upstream: u.name, Endpoint: "none", Reason: "no endpoint is configured for this; an origin or an endpoint with the capability is needed"}
	}
	return failure
}

func withShare(ctx context.Context, among int) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok || among < 2 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, time.Until(deadline)/time.Duration(among), ErrSlow)
}

// ask persists if it must, and otherwise tries once: who has something to answer
// with does not wait.
func (u *Upstream) ask(ctx context.Context, n need, must bool, op func(ctx context.Context, e *endpoint, last bool) error) error {
	if must {
		return u.persist(ctx, n, op)
	}
	return u.each(ctx, n, op)
}

// persist repeats each with pauses while the failure may pass and there is
// time.
func (u *Upstream) persist(ctx context.Context, n need, op func(ctx context.Context, e *endpoint, last bool) error) error {
	pause := u.pause
	for round := 1; ; round++ {
		err := u.each(ctx, n, op)
		if err == nil || round == rounds || ctx.Err() != nil {
			return err
		}
		after, worthwhile := err.(*Error).Retry()
		if !worthwhile || errors.Is(err, errOpen) {
			return err
		}
		wait := max(after, pause/2+rand.N(pause))
		pause *= 3
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
	}
}
