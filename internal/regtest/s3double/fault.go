package s3double

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// Quirks are what a place does otherwise, always.
type Quirks struct {
	// MaxParts refuses parts with larger numbers.
	MaxParts int
	// EqualParts refuses to complete an upload whose parts, but the last, are not
	// of one length, as R2 does.
	EqualParts bool
	// NoListParts refuses to list parts. ShortParts ends that listing at so many
	// parts as if there were no more. EndlessParts says each time that there are
	// more, and not after which.
	NoListParts, EndlessParts bool
	ShortParts                int
	// V1Only refuses list-type=2.
	V1Only bool
	// StuckToken sends the first page of a listing again and again.
	StuckToken bool
	// Unordered lists keys in an order that is not that of their bytes.
	Unordered bool
	// LaggingList makes listings of objects stay as they are until CatchUp.
	LaggingList bool
	// VirtualOnly refuses a bucket in the path.
	VirtualOnly bool
	// AcceptEncoding stands in the place of that header when the signature is
	// checked, as where a proxy changes it.
	AcceptEncoding string
	// Skew is how far its clock is ahead.
	Skew time.Duration
	// OddETags gives objects ETags that look like MD5 sums and are none, as where they
	// are encrypted with keys of AWS's KMS.
	OddETags bool
}

func (q Quirks) odd(sum []byte) []byte {
	if !q.OddETags {
		return sum
	}
	sum = slices.Clone(sum)
	slices.Reverse(sum)
	return sum
}

// Set changes the quirks.
func (s *Server) Set(change func(*Quirks)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.quirks)
	s.lag(s.quirks.LaggingList)
}

// A Fault spoils answers to requests that are signed well.
type Fault struct {
	// Op is the operation it spoils, "" any. Key is a part of its key.
	Op, Key string
	// Spare is how many such requests are spared before the first, and Every, if it
	// is above 1, strikes only one in so many of those after that. Count is how
	// often it strikes; 0: always.
	Spare, Every, Count int

	// Status and Code are what is answered, with that Retry-After if it is set. The
	// body of the request is read. 200 is answered with an error in the body.
	Status           int
	Code, RetryAfter string
	// Did does nevertheless what was asked for.
	Did bool

	// Cut breaks the connection. An operation that reads is cut after At bytes of
	// the body of the answer; one that writes, before it is done, after At bytes of
	// the request's body, or with Did when it is done, after At bytes of the
	// answer's. 0 is before anything is answered, below 0 after one half of the
	// answer.
	Cut bool
	At  int64

	// Wrong turns over a bit of the answer's body, at At; below 0: in its middle.
	Wrong bool

	// Hold waits for the channel to be closed, when the request has been read and
	// done, before anything is answered. See [Call].Held.
	Hold <-chan struct{}

	// Tick lets Chunk bytes through for each value it yields, and all when it is
	// closed: of the request's body where there is one, else of the answer's.
	Tick  <-chan struct{}
	Chunk int

	seen, struck int
}

// answers reports a fault in whose answer there is something of what was asked for.
func (f *Fault) answers() bool {
	return f.Status == 0 && !f.Cut
}

func (f *Fault) at(size int64) int64 {
	if f.At < 0 {
		return size / 2
	}
	return min(f.At, size)
}

// Strike adds a fault. What is returned takes it away again. The first of several
// that fit strikes.
func (s *Server) Strike(f Fault) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fault := &f
	s.faults = append(s.faults, fault)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.faults = slices.DeleteFunc(s.faults, func(other *Fault) bool { return other == fault })
	}
}

// strike is the fault that spoils a call; one that spoils nothing if there is none.
func (s *Server) strike(call *Call) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.Op != "" && f.Op != call.Op || !strings.Contains(call.Key, f.Key) || f.Count > 0 && f.struck == f.Count {
			continue
		}
		f.seen++
		if n := f.seen - f.Spare - 1; n < 0 || f.Every > 1 && n%f.Every != 0 {
			continue
		}
		f.struck++
		call.Struck = true
		struck := *f
		switch call.Op {
		case GetObject, HeadObject, ListObjects, ListObjectsV2, ListParts, ListMultipartUploads:
			struck.Did = struck.Did || struck.Cut
		}
		return &struck
	}
	return &Fault{}
}

// wrong turns over a bit.
type wrong struct {
	io.Reader
	at int64 // how many bytes are before it
}

func (w *wrong) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if w.at >= 0 && w.at < int64(n) {
		p[w.at] ^= 1
	}
	w.at -= int64(n)
	return n, err
}

// ticking lets bytes through as a test says.
type ticking struct {
	io.ReadCloser
	fault *Fault
	ctx   context.Context
}

func (r *ticking) Read(p []byte) (int, error) {
	select {
	case <-r.fault.Tick:
	case <-r.ctx.Done():
		return 0, r.ctx.Err()
	}
	return r.ReadCloser.Read(p[:min(len(p), max(r.fault.Chunk, 1))])
}

// A Call is one request as it arrived, and what has come of it so far.
type Call struct {
	Op           string // "" for what is not implemented
	Method       string
	Bucket, Key  string
	Virtual      bool // the bucket was in the host
	Range        string
	Upload       string
	Part         int
	Query        url.Values
	Header       http.Header
	Received     int64 // of its body
	Status       int   // 0 until it is answered, or if it is not
	Sent         int64 // of the answer's body
	Held, Struck bool

	number int
}

func (s *Server) arrives(call *Call) Quirks {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, call)
	call.number = len(s.calls)
	s.busy++
	s.signal()
	return s.quirks
}

// note changes a call.
func (s *Server) note(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.signal()
}

func (s *Server) signal() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Calls are the requests so far, in the order in which they arrived. What a client
// has had an answer to is there.
func (s *Server) Calls() []Call {
	calls, _ := s.snapshot()
	return calls
}

func (s *Server) snapshot() ([]Call, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := make([]Call, len(s.calls))
	for i, call := range s.calls {
		calls[i] = *call
	}
	return calls, s.changed
}

// Count is how many of the calls were of one of the operations, or of any if none is
// named.
func (s *Server) Count(ops ...string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, call := range s.calls {
		if len(ops) == 0 || slices.Contains(ops, call.Op) {
			n++
		}
	}
	return n
}

// Forget makes the calls begin anew. Those under way are forgotten, too.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}

// Await waits until the calls are as the test wants them, for two minutes at most.
func (s *Server) Await(t testing.TB, what string, ok func(calls []Call) bool) {
	t.Helper()
	end := time.After(2 * time.Minute)
	for {
		calls, changed := s.snapshot()
		if ok(calls) {
			return
		}
		select {
		case <-changed:
		case <-end:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
