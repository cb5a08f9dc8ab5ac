package notify

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A sink is a webhook's other end.
type sink struct {
	t testing.TB
	*httptest.Server

	mu       sync.Mutex
	answer   func(attempt int, tag string) int // 0: hangs until the client gives up
	attempts []string                          // tags
	taken    []string                          // those answered with 2xx
	ids      map[string]bool                   // of events taken
	requests []*http.Request
	bodies   []string
	changed  chan struct{}
}

func newSink(t testing.TB) *sink {
	k := &sink{t: t, ids: map[string]bool{}, changed: make(chan struct{}), answer: func(int, string) int { return http.StatusOK }}
	k.Server = httptest.NewServer(k)
	t.Cleanup(k.Close)
	return k
}

func (k *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var sent struct{ Events []record }
	if err := json.Unmarshal(body, &sent); err != nil || len(sent.Events) != 1 {
		k.t.Errorf("%d events in %s, %v", len(sent.Events), body, err)
		return
	}
	tag := sent.Events[0].Target.Tag
	k.mu.Lock()
	status := k.answer(len(k.attempts), tag)
	k.attempts = append(k.attempts, tag)
	k.requests, k.bodies = append(k.requests, r), append(k.bodies, string(body))
	if status/100 == 2 {
		k.taken = append(k.taken, tag)
		k.ids[sent.Events[0].ID] = true
	}
	close(k.changed)
	k.changed = make(chan struct{})
	k.mu.Unlock()
	if status == 0 {
		<-r.Context().Done()
		return
	}
	if status/100 == 3 {
		w.Header().Set("Location", "/elsewhere")
	}
	w.WriteHeader(status)
}

func (k *sink) answers(status int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.answer = func(int, string) int { return status }
}

// until waits until something holds of the sink.
func (k *sink) until(what string, holds func() bool) {
	k.t.Helper()
	late := time.After(time.Minute)
	for {
		k.mu.Lock()
		done, changed := holds(), k.changed
		k.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-late:
			k.t.Fatalf("waited a minute for %s: %d attempts, taken %q", what, len(k.attempts), k.taken)
		}
	}
}

// takes waits until the events of exactly these tags have been taken, in order.
func (k *sink) takes(tags ...string) {
	k.t.Helper()
	k.until(fmt.Sprintf("%d events", len(tags)), func() bool { return len(k.taken) >= len(tags) })
	k.mu.Lock()
	defer k.mu.Unlock()
	if !slices.Equal(k.taken, tags) {
		k.t.Fatalf("taken %q; want %q", k.taken, tags)
	}
}

// tried waits for so many attempts.
func (k *sink) tried(n int) {
	k.t.Helper()
	k.until(fmt.Sprintf("%d attempts", n), func() bool { return len(k.attempts) >= n })
}

// A clock goes on when somebody rests, and is let go on.
type clock struct {
	t      testing.TB
	mu     sync.Mutex
	now    time.Time
	paused chan time.Duration
	resume chan struct{}
}

func (c *clock) time() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *clock) pause(ctx context.Context, d time.Duration, early <-chan struct{}) {
	select {
	case c.paused <- d:
	case <-ctx.Done():
		return
	}
	select {
	case <-c.resume:
		c.add(d)
	case <-early:
	case <-ctx.Done():
	}
}

// rests waits until somebody does.
func (c *clock) rests() time.Duration {
	c.t.Helper()
	select {
	case d := <-c.paused:
		return d
	case <-time.After(time.Minute):
		c.t.Fatal("nobody rests")
	}
	panic("not reached")
}

// A tested sender, with what it logs.
type tested struct {
	*Sender
	t     testing.TB
	clock *clock
	logs  *observer.ObservedLogs
	n     int
}

// open returns a sender on a directory, until the end of the test.
func open(t testing.TB, dir string) *tested {
	core, logs := observer.New(zapcore.DebugLevel)
	s := &tested{
		Sender: New(dir, zap.New(core)), t: t, logs: logs,
		clock: &clock{t: t, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), paused: make(chan time.Duration), resume: make(chan struct{})},
	}
	s.Sender.pause, s.Sender.now = s.clock.pause, s.clock.time
	t.Cleanup(s.Close)
	return s
}

// push tells of the next push; its tag is its number.
func (s *tested) push() {
	s.n++
	s.tell(Event{Action: Push, Tag: fmt.Sprint(s.n)})
}

func (s *tested) tell(e Event) {
	e.At, e.Repository = s.clock.time(), "apps/web"
	s.Notify(e)
}

// tags are the numbers of pushes, from one to another.
func tags(from, to int) (tags []string) {
	for n := from; n <= to; n++ {
		tags = append(tags, fmt.Sprint(n))
	}
	return tags
}

func (k *sink) hook(name string) Webhook { return hookAt(name, k.URL) }

func hookAt(name, url string) Webhook {
	return Webhook{Name: name, URL: url + "/events", Timeout: 30 * time.Second, Threshold: 3, Backoff: 10 * time.Second}
}

// settled waits until nothing is pending for the only webhook.
func (s *tested) settled() Status {
	s.t.Helper()
	for late := time.After(time.Minute); ; {
		all := s.Status()
		if len(all) == 1 && all[0].Pending == 0 {
			return all[0]
		}
		select {
		case <-late:
			s.t.Fatalf("still pending: %+v", all)
		case <-time.After(time.Millisecond):
		}
	}
}
