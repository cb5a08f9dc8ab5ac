package backing

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Reach is whether a Longhorn answers.
type Reach struct {
	Cluster string
	Err     error // nil: it does
}

var errNoAnswer = errors.New("Longhorn has not answered yet")

// reachWait is how long whoever wants to know waits for a new answer: less than those
// who ask whether a process is ready have patience for.
const reachWait = 500 * time.Millisecond

// reach is what is known of a Longhorn.
type reach struct {
	mu     sync.Mutex
	err    error
	at     time.Time     // of the answer; zero: there is none
	asking chan struct{} // closed with the answer; nil: nobody asks
}

// Reach tells of every Longhorn that is configured, by their names, whether it answers.
// One is asked at most every ten seconds, and one that is slow is not waited for: what
// it said before is told then.
func (l *Library) Reach(ctx context.Context) []Reach {
	ctx, cancel := context.WithTimeout(ctx, reachWait)
	defer cancel()
	r := l.registrar
	r.mu.Lock()
	var all []*cluster
	for _, c := range r.clusters {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *cluster) int { return strings.Compare(a.Name, b.Name) })
	var asking []chan struct{}
	for _, c := range all {
		asking = append(asking, r.ask(c))
	}
	r.mu.Unlock()
	told := make([]Reach, len(all))
	for i, c := range all {
		if asking[i] != nil {
			select {
			case <-asking[i]:
			case <-ctx.Done():
			}
		}
		c.reach.mu.Lock()
		told[i] = Reach{c.Name, c.reach.err}
		if c.reach.at.IsZero() {
			told[i].Err = errNoAnswer
		}
		c.reach.mu.Unlock()
	}
	return told
}

// ask has a cluster asked unless its answer is new, and returns what is closed then.
// The caller holds r.mu, so that close does not come between.
func (r *registrar) ask(c *cluster) chan struct{} {
	c.reach.mu.Lock()
	defer c.reach.mu.Unlock()
	if c.reach.asking != nil || r.ctx.Err() != nil || !c.reach.at.IsZero() && time.Since(c.reach.at) < r.pace.reach {
		return c.reach.asking
	}
	done := make(chan struct{})
	c.reach.asking = done
	r.working.Go(func() {
		err := c.client.Reach(r.ctx)
		c.reach.mu.Lock()
		defer c.reach.mu.Unlock()
		switch {
		case r.ctx.Err() != nil:
		case err != nil && c.reach.err == nil:
			r.log.Warn("Longhorn does not answer", zap.String("longhorn", c.Name), zap.Error(err))
		case err == nil && c.reach.err != nil:
			r.log.Info("Longhorn answers again", zap.String("longhorn", c.Name))
		}
		c.reach.err, c.reach.at, c.reach.asking = err, time.Now(), nil
		close(done)
	})
	return done
}
