package s3

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// operation is what a request is for; calls are counted by it.
type operation int

const (
	opGet operation = iota
	opHead
	opPut
	opDelete
	opList
	opCreate
	opPart
	opComplete
	opAbort
	opUploads
	operations
)

// kinds is how operations are named in counts and messages, and how long the answer
// to one may take. Servers write the bytes to their disks before they answer, and
// some copy all parts together.
var kinds = [operations]struct {
	name, doing string
	answer      time.Duration
}{
	opGet:      {"get", "reading", 15 * time.Second},
	opHead:     {"head", "looking for", 15 * time.Second},
	opPut:      {"put", "storing", time.Minute},
	opDelete:   {"delete", "deleting", 15 * time.Second},
	opList:     {"list", "listing", 30 * time.Second},
	opCreate:   {"create", "beginning to store", 15 * time.Second},
	opPart:     {"part", "storing a part of", time.Minute},
	opComplete: {"complete", "completing", 10 * time.Minute},
	opAbort:    {"abort", "giving up storing", 15 * time.Second},
	opUploads:  {"uploads", "listing the uploads of", 30 * time.Second},
}

const (
	attempts    = 5
	firstWait   = 200 * time.Millisecond // doubled with each attempt, and half of it random
	longestWait = 5 * time.Second
	obeyed      = 10 * time.Second // the longest Retry-After that is kept to
	patience    = 10 * time.Second // of whoever reads; no attempt begins later
	putPatience = 2 * time.Minute  // of whoever writes
	stall       = 30 * time.Second // between two bytes
	unanswered  = 5 * time.Second  // a caller who has gone after this was not answered

	worthAsking   = 8 << 20  // bytes of a body that is not sent again unasked
	longestAnswer = 16 << 20 // but for an object; a page of a listing has a thousand keys
)

// called is how many requests have been sent, by operation.
func (b *bucket) called() map[string]int64 { return tally(&b.counts) }

// failures is how many of them got no answer, or one that means to try again.
func (b *bucket) failures() map[string]int64 { return tally(&b.failed) }

func tally(counts *[operations]atomic.Int64) map[string]int64 {
	byName := map[string]int64{}
	for o, kind := range kinds {
		byName[kind.name] = counts[o].Load()
	}
	return byName
}

// call tries an operation until it succeeds, fails for good, or has been tried often
// enough. landed, if there is one, is asked before another attempt whether one that
// was not answered has done its work all the same.
func (b *bucket) call(ctx context.Context, o operation, key string, send func(context.Context, *s3.Client) error, landed func(context.Context) bool) error {
	began := time.Now()
	limit := patience
	if o == opPut || o == opPart || o == opComplete {
		limit = putPatience
	}
	var last *fault
	denied := false
	for attempt := 1; ; attempt++ {
		if err := context.Cause(ctx); err != nil {
			return b.ended(ctx, o, key, last)
		}
		if !b.breaker.allow(time.Now()) {
			if last != nil {
				return last
			}
			return b.refused(o, key)
		}
		r := b.remote.Load()
		sent := time.Now()
		err := send(context.WithValue(ctx, operationKey{}, o), r.client)
		if err == nil {
			b.breaker.answered()
			return nil
		}
		if ctx.Err() != nil {
			// Sending a body may take its time.
			if limit == patience && time.Since(sent) >= unanswered {
				b.breaker.failed(time.Now())
			}
			return b.ended(ctx, o, key, last)
		}
		last = b.fault(r, o, key, err)
		again := last.again
		switch {
		case !denied && last.raced(o):
			b.failed[o].Add(1)
			denied, again = true, true
		case last.unavailable():
			b.failed[o].Add(1)
			b.breaker.failed(time.Now())
		case last.status != 0:
			b.breaker.answered()
		}
		if !again || attempt == attempts || last.unavailable() && b.breaker.open() {
			return last
		}
		if last.expired {
			r.refresh()
		}
		wait := firstWait << (attempt - 1)
		wait = min(wait, longestWait)
		wait = max(wait/2+rand.N(wait/2), min(last.after, obeyed))
		if time.Since(began)+wait > limit {
			return last
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return b.ended(ctx, o, key, last)
		}
		if landed != nil && last.unsure && landed(ctx) {
			return nil
		}
	}
}

// breaker keeps calls from a server that has not answered several times in a row.
// While it is open one call is let through each time its pause is over, however long
// that call takes, and the pause doubles until one is answered.
type breaker struct {
	mu    sync.Mutex
	fails int
	until time.Time
	pause time.Duration
}

const (
	tooMany      = 5
	firstPause   = time.Second
	longestPause = 30 * time.Second
)

func (b *breaker) allow(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pause == 0 {
		return true
	}
	if now.Before(b.until) {
		return false
	}
	b.pause = min(2*b.pause, longestPause)
	b.until = now.Add(b.pause)
	return true
}

func (b *breaker) answered() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fails, b.pause = 0, 0
}

func (b *breaker) failed(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fails++; b.fails >= tooMany && b.pause == 0 {
		b.pause = firstPause
		b.until = now.Add(b.pause)
	}
}

// open reports whether calls are kept back.
func (b *breaker) open() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pause > 0
}

func newTransport() *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true) // one body does not hold up another
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		ExpectContinueTimeout:  time.Second,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		WriteBufferSize:        64 << 10,
		ReadBufferSize:         64 << 10,
		DisableCompression:     true,
		Protocols:              protocols,
	}
}

type operationKey struct{}

var errStalled = errors.New("nothing came for too long")

// patient waits for an answer, and for the next bytes of a body, but not for ever.
type patient struct {
	next http.RoundTripper
	sent func(operation)
}

func (p *patient) RoundTrip(req *http.Request) (*http.Response, error) {
	o, _ := req.Context().Value(operationKey{}).(operation)
	p.sent(o)
	ctx, cancel := context.WithCancelCause(req.Context())
	wait := kinds[o].answer
	timer := time.AfterFunc(wait, func() { cancel(errStalled) })
	req = req.WithContext(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &watched{ReadCloser: req.Body, before: func() { timer.Reset(wait) }}
	}
	resp, err := p.next.RoundTrip(req)
	timer.Stop()
	if err != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			err = errStalled
		}
		cancel(nil)
		return nil, err
	}
	if o != opGet || resp.StatusCode >= 300 {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{&io.LimitedReader{R: resp.Body, N: longestAnswer}, resp.Body}
	}
	resp.Body = &watched{
		ReadCloser: resp.Body,
		before:     func() { timer.Reset(stall) },
		after: func(err error) error {
			timer.Stop()
			if err != nil && err != io.EOF && errors.Is(context.Cause(ctx), errStalled) {
				return errStalled
			}
			return err
		},
		closed: func() { timer.Stop(); cancel(nil) },
	}
	return resp, nil
}

func (p *patient) CloseIdleConnections() {
	if next, ok := p.next.(interface{ CloseIdleConnections() }); ok {
		next.CloseIdleConnections()
	}
}

// watched tells when a body is being read.
type watched struct {
	io.ReadCloser
	before func()
	after  func(error) error
	closed func()
}

func (w *watched) Read(p []byte) (int, error) {
	w.before()
	n, err := w.ReadCloser.Read(p)
	if w.after != nil {
		err = w.after(err)
	}
	return n, err
}

func (w *watched) Close() error {
	err := w.ReadCloser.Close()
	if w.closed != nil {
		w.closed()
	}
	return err
}
