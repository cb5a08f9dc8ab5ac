package upstream

import (
	"container/list"
	"context"
	"sync"
)

// places are what bounds the streams of one endpoint. Each is held by one
// stream. Whoever finds none waits in line behind those of his own class, and
// the background behind the whole foreground. The background never has more
// than half of the places, so that the foreground need not wait for it to end.
type places struct {
	limit int

	mu         sync.Mutex
	taken      int
	background int       // of those taken
	waiting    list.List // of chan struct{}, closed with the place given
	behind     list.List // the same of the background
}

// take waits for a place, and reports whether it is one of the background's. Who
// waits in the background joins the foreground's line when hurry, which may be
// nil, is closed. The error is the cause of the context's end.
func (p *places) take(ctx context.Context, background bool, hurry <-chan struct{}) (bool, error) {
	p.mu.Lock()
	if p.room(background) {
		p.seat(background)
		p.mu.Unlock()
		return background, nil
	}
	line := &p.waiting
	if background {
		line = &p.behind
	}
	ready := make(chan struct{})
	at := line.PushBack(ready)
	p.mu.Unlock()
	select {
	case <-ready:
		return background, nil
	case <-hurry:
		p.mu.Lock()
		select {
		case <-ready: // given in the same moment
			p.mu.Unlock()
			return background, nil
		default:
			line.Remove(at)
		}
		p.mu.Unlock()
		return p.take(ctx, false, nil)
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-ready: // given in the same moment
		p.pass(background)
	default:
		line.Remove(at)
	}
	return background, context.Cause(ctx)
}

// give returns a place.
func (p *places) give(background bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pass(background)
}

// pass hands a place that was taken to whoever is next. p.mu is held.
func (p *places) pass(background bool) {
	p.taken--
	if background {
		p.background--
	}
	switch {
	case p.waiting.Len() > 0:
		p.seat(false)
		close(p.waiting.Remove(p.waiting.Front()).(chan struct{}))
	case p.behind.Len() > 0 && p.room(true):
		p.seat(true)
		close(p.behind.Remove(p.behind.Front()).(chan struct{}))
	}
}

// room reports a place that may be taken. While it does, nobody of that class
// waits, and in the background's case nobody at all. p.mu is held.
func (p *places) room(background bool) bool {
	return p.taken < p.limit && (!background || p.background < p.limit/2)
}

// seat counts a place as taken. p.mu is held.
func (p *places) seat(background bool) {
	p.taken++
	if background {
		p.background++
	}
}
