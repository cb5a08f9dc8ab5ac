package notify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

// A Webhook is where events are sent.
type Webhook struct {
	// Name is the webhook's own, and that of its queue: letters, digits, "-",
	// "_" and ".", of which the first is a letter or a digit.
	Name string
	URL  string
	// Header is sent with each event.
	Header http.Header
	// Timeout is how long one attempt may take.
	Timeout time.Duration
	// Threshold is how many attempts in a row may fail; from then on there is
	// one each Backoff, until one does not fail.
	Threshold int
	Backoff   time.Duration
	// Events of these actions or media types are not sent.
	IgnoreActions    []Action
	IgnoreMediaTypes []string
}

func (w *Webhook) wants(e *Event) bool {
	return !slices.Contains(w.IgnoreActions, e.Action) && !slices.Contains(w.IgnoreMediaTypes, e.MediaType)
}

const (
	// syncDelay is how long an event may wait to be on the disk.
	syncDelay = time.Second
	// leftFor is how long the queue is kept of a webhook that is not configured
	// any more; sweepEvery is how often that is looked after.
	leftFor    = 7 * 24 * time.Hour
	sweepEvery = time.Hour

	// endGrace is how long an attempt under way may take when the webhook or the
	// process ends: what has been taken is not to be sent again.
	endGrace = time.Second

	maxAnswer = 4 << 10 // bytes of an answer that are read, so that its connection is used again
)

// A Sender delivers events to webhooks, to each in their order and one at a
// time. What is not delivered waits on the disk, for the next process too. It
// outlives configurations.
type Sender struct {
	dir    string
	log    *zap.Logger
	now    func() time.Time
	pause  func(ctx context.Context, d time.Duration, early <-chan struct{})
	client *http.Client
	source source
	most   int // events that wait for one webhook

	setting   sync.Mutex       // one Set at a time, or Close
	closed    bool             // guarded by setting
	hooks     map[string]*hook // guarded by setting
	listening atomic.Pointer[[]*hook]

	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	written chan struct{} // holds a value when something is to be synced
}

// A hook is a webhook that is configured.
type hook struct {
	name   string
	queue  *queue
	set    atomic.Pointer[Webhook]
	change chan struct{}      // holds a value when set has changed
	cancel context.CancelFunc // lets an attempt under way go on
	abort  context.CancelFunc
	ended  chan struct{}

	delivered, failed, dropped atomic.Int64
	full                       atomic.Bool            // and it was said
	trouble                    atomic.Pointer[string] // why the last attempt failed
}

// New returns a sender whose queues are in a directory that is its alone. It
// does nothing before Set.
func New(dir string, log *zap.Logger) *Sender {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxResponseHeaderBytes = 64 << 10
	host, _ := os.Hostname()
	s := &Sender{
		dir: dir, log: log, now: time.Now, pause: pause,
		client: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		source: source{Addr: host, InstanceID: NewID()},
		most:   maxPending,
		hooks:  map[string]*hook{}, written: make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.keep)
	return s
}

// pause waits, until it is too early or too late to.
func pause(ctx context.Context, d time.Duration, early <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-early:
	case <-ctx.Done():
	}
}

// Set replaces the webhooks. One of the same name goes on with what waits for
// it; of one that is gone it is kept for a week.
func (s *Sender) Set(webhooks []Webhook) {
	s.setting.Lock()
	defer s.setting.Unlock()
	if s.closed {
		return
	}
	var listening []*hook
	hooks := map[string]*hook{}
	for i := range webhooks {
		w := &webhooks[i]
		h := s.hooks[w.Name]
		if h != nil {
			delete(s.hooks, w.Name)
			h.set.Store(w)
			signal(h.change)
		} else {
			var err error
			if h, err = s.begin(w); err != nil {
				s.log.Error("the queue of a webhook cannot be opened, and nothing is sent to it until the configuration is loaded again", zap.String("webhook", w.Name), zap.Error(err))
				continue
			}
		}
		hooks[w.Name] = h
		listening = append(listening, h)
	}
	over := slices.Collect(maps.Values(s.hooks))
	s.hooks = hooks
	s.listening.Store(&listening)
	s.end(over...)
	s.sweep()
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// begin opens the queue of a webhook and sends what waits.
func (s *Sender) begin(w *Webhook) (*hook, error) {
	dir := filepath.Join(s.dir, w.Name)
	queue, lost, err := openQueue(dir, s.most)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(filepath.Join(dir, left)); err != nil && !errors.Is(err, os.ErrNotExist) {
		queue.close()
		return nil, err
	}
	if lost > 0 {
		s.log.Warn("events for a webhook were damaged and are lost", zap.String("webhook", w.Name), zap.Int("events", lost))
	}
	h := &hook{name: w.Name, queue: queue, change: make(chan struct{}, 1), ended: make(chan struct{})}
	h.set.Store(w)
	h.dropped.Store(int64(lost))
	attempt, abort := context.WithCancel(context.Background())
	ctx, cancel := context.WithCancel(s.ctx)
	h.cancel, h.abort = cancel, abort
	go func() {
		defer close(h.ended)
		s.deliver(ctx, attempt, h)
	}()
	return h, nil
}

// end stops sending. What waits stays.
func (s *Sender) end(hooks ...*hook) {
	for _, h := range hooks {
		h.cancel()
		defer time.AfterFunc(endGrace, h.abort).Stop()
	}
	for _, h := range hooks {
		<-h.ended
		h.abort()
		if err := h.queue.close(); err != nil {
			s.log.Error("closing the queue of a webhook", zap.String("webhook", h.name), zap.Error(err))
		}
	}
}

// Wants reports whether any webhook is sent events of an action.
func (s *Sender) Wants(a Action) bool {
	list := s.listening.Load()
	return list != nil && slices.ContainsFunc(*list, func(h *hook) bool { return !slices.Contains(h.set.Load().IgnoreActions, a) })
}

// Notify queues an event for the webhooks that want it. When it returns, the end
// of the process does not lose the event; a loss of power within the next second
// may.
func (s *Sender) Notify(e Event) {
	list := s.listening.Load()
	if list == nil || len(*list) == 0 {
		return
	}
	var text []byte
	for _, h := range *list {
		if !h.set.Load().wants(&e) {
			continue
		}
		if text == nil {
			var err error
			if text, err = encode(e, s.source); err != nil {
				s.log.Error("an event cannot be written", zap.Error(err))
				return
			}
		}
		switch dropped, err := h.queue.add(text); {
		case errors.Is(err, errQueueClosed): // it is configured no more
		case err != nil:
			h.dropped.Add(1)
			if !h.full.Swap(true) {
				s.log.Error("an event for a webhook cannot be stored, and is lost", zap.String("webhook", h.name), zap.Error(err))
			}
		case dropped > 0:
			h.dropped.Add(int64(dropped))
			if !h.full.Swap(true) {
				s.log.Warn("the queue of a webhook is full; the oldest events are dropped until it takes them again", zap.String("webhook", h.name))
			}
		}
	}
	signal(s.written)
}

// deliver sends what waits for a webhook, until ctx ends; an attempt, until that
// does.
func (s *Sender) deliver(ctx, attempt context.Context, h *hook) {
	failures := 0
	for ctx.Err() == nil {
		event, lost, err := h.queue.first()
		h.dropped.Add(int64(lost))
		if event == nil && err == nil {
			h.full.Store(false)
			select {
			case <-h.queue.ready:
				continue
			case <-ctx.Done():
				return
			}
		}
		w := h.set.Load()
		if err == nil {
			if err = s.post(attempt, w, event); err == nil {
				failpoint.Hit("webhook.taken")
				h.queue.done()
				signal(s.written)
				h.delivered.Add(1)
				h.trouble.Store(nil)
				if failures >= w.Threshold {
					s.log.Info("a webhook takes events again", zap.String("webhook", h.name))
				}
				failures = 0
				continue
			}
			h.queue.again()
			if ctx.Err() != nil {
				return
			}
		}
		h.failed.Add(1)
		said := err.Error()
		h.trouble.Store(&said)
		if failures++; failures < w.Threshold {
			continue
		}
		if failures == w.Threshold {
			s.log.Warn("a webhook does not take events; they wait for it", zap.String("webhook", h.name), zap.Int("failures", failures), zap.Duration("again_in", w.Backoff), zap.Error(err))
		}
		s.pause(ctx, w.Backoff, h.change)
	}
}

// post makes one attempt. Its error does not tell the URL, which may have a
// secret in it.
func (s *Sender) post(ctx context.Context, w *Webhook, event []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, w.Timeout, fmt.Errorf("no answer within %v", w.Timeout))
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, bytes.NewReader(envelope(event)))
	if err != nil {
		return errors.New("the URL cannot be used")
	}
	for field, values := range w.Header {
		r.Header[field] = values
	}
	r.Header.Set("Content-Type", mediaType)
	resp, err := s.client.Do(r)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if of, ok := errors.AsType[*url.Error](err); ok {
			err = of.Err
		}
		return err
	}
	defer resp.Body.Close()
	io.CopyN(io.Discard, resp.Body, maxAnswer)
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("it answers %d", resp.StatusCode)
	}
	return nil
}

// keep syncs what was written, and removes what has been left for too long.
func (s *Sender) keep() {
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for {
		select {
		case <-s.written:
			pause(s.ctx, syncDelay, nil)
			s.sync()
		case <-sweep.C:
			s.setting.Lock()
			if !s.closed {
				s.sweep()
			}
			s.setting.Unlock()
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *Sender) sync() {
	list := s.listening.Load()
	if list == nil {
		return
	}
	for _, h := range *list {
		if err := h.queue.sync(); err != nil {
			s.log.Error("events for a webhook may not survive a loss of power", zap.String("webhook", h.name), zap.Error(err))
		}
	}
}

// left is the file that says since when a webhook is not configured.
const left = "left"

// sweep removes the queues of webhooks that have not been configured for long.
// It is called with setting held.
func (s *Sender) sweep() {
	list, err := os.ReadDir(s.dir)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			s.log.Warn("looking for queues of webhooks", zap.Error(err))
		}
		return
	}
	for _, dir := range list {
		if s.hooks[dir.Name()] != nil {
			continue
		}
		mark := filepath.Join(s.dir, dir.Name(), left)
		text, err := os.ReadFile(mark)
		since, wrong := time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
		switch {
		case errors.Is(err, os.ErrNotExist), err == nil && wrong != nil:
			err = os.WriteFile(mark, []byte(s.now().UTC().Format(time.RFC3339)+"\n"), 0o640)
		case err == nil && s.now().Sub(since) > leftFor:
			err = os.RemoveAll(filepath.Join(s.dir, dir.Name()))
			s.log.Info("events for a webhook that is configured no more were removed", zap.String("webhook", dir.Name()))
		}
		if err != nil {
			s.log.Warn("the queue of a webhook that is configured no more", zap.String("webhook", dir.Name()), zap.Error(err))
		}
	}
}

// Close ends every attempt. What waits stays for the next process.
func (s *Sender) Close() {
	s.setting.Lock()
	hooks := slices.Collect(maps.Values(s.hooks))
	s.closed, s.hooks = true, nil
	s.setting.Unlock()
	s.listening.Store(nil)
	s.cancel()
	s.wg.Wait()
	s.end(hooks...)
	s.client.CloseIdleConnections()
}

// Status is how a webhook does. Counts are since it was configured in this
// process.
type Status struct {
	Name      string
	Pending   int
	Bytes     int64 // of what is pending
	Delivered int64
	Failed    int64  // attempts
	Dropped   int64  // events that were lost: the queue was full, or damaged
	Trouble   string // why the last attempt failed; empty: it has not
}

// Status is how every webhook does that is configured, in the order of their
// configuration.
func (s *Sender) Status() (all []Status) {
	list := s.listening.Load()
	if list == nil {
		return nil
	}
	for _, h := range *list {
		status := Status{Name: h.name, Delivered: h.delivered.Load(), Failed: h.failed.Load(), Dropped: h.dropped.Load()}
		status.Pending, status.Bytes = h.queue.pending()
		if trouble := h.trouble.Load(); trouble != nil {
			status.Trouble = *trouble
		}
		all = append(all, status)
	}
	return all
}
