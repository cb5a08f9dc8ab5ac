package pull

import (
	"context"
	"sync"
)

// perHost is how many requests the process has under way at one host and port, so that
// no number of jobs makes it a nuisance.
const perHost = 4

var hosts places

// places are what may be under way, by host and port.
type places struct {
	mu  sync.Mutex
	are map[string]*place
}

type place struct {
	free  chan struct{} // holds a value for each that is taken
	users int
}

// take waits for a place, or for the end of ctx, and returns how to give it back.
func (p *places) take(ctx context.Context, host string) (give func()) {
	p.mu.Lock()
	if p.are == nil {
		p.are = map[string]*place{}
	}
	at := p.are[host]
	if at == nil {
		at = &place{free: make(chan struct{}, perHost)}
		p.are[host] = at
	}
	at.users++
	p.mu.Unlock()
	taken := false
	select {
	case at.free <- struct{}{}:
		taken = true
	case <-ctx.Done():
	}
	return func() {
		if taken {
			<-at.free
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if at.users--; at.users == 0 {
			delete(p.are, host)
		}
	}
}
