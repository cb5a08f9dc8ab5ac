package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
)

// A Validator is what tells one state of a resource from another (RFC 9110, 8.8).
type Validator struct {
	ETag     string    // strong, with its quotes
	Modified time.Time // zero: nobody says, and conditions by date do not hold
}

// Unchanged reports whether a GET or HEAD is answered by 304: If-None-Match names
// the tag, or where there is none, If-Modified-Since is no earlier than the date.
func (v Validator) Unchanged(r *http.Request) bool {
	if values := r.Header["If-None-Match"]; len(values) > 0 {
		return Matches(values, v.ETag)
	}
	since := r.Header.Get("If-Modified-Since")
	if since == "" || v.Modified.IsZero() {
		return false
	}
	at, err := http.ParseTime(since)
	return err == nil && v.Modified.Unix() <= at.Unix()
}

// current reports whether the ranges of a request hold: it has no If-Range, or one
// that is the tag, or the very date.
func (v Validator) current(ifRange string) bool {
	if ifRange == "" || ifRange == v.ETag {
		return true
	}
	if v.Modified.IsZero() {
		return false
	}
	at, err := http.ParseTime(ifRange)
	return err == nil && v.Modified.Unix() == at.Unix()
}

// Matches reports whether an If-None-Match header names the tag.
func Matches(values []string, etag string) bool {
	for _, value := range values {
		for item := range strings.SplitSeq(value, ",") {
			if item = strings.TrimPrefix(strings.TrimSpace(item), "W/"); item == etag || item == "*" {
				return true
			}
		}
	}
	return false
}

// An Answer is what a GET is sent of a content.
type Answer struct {
	w         http.ResponseWriter
	r         *http.Request
	content   Content
	validator Validator
	spans     []oci.Span
	// length is that of all spans; below 0: they are one, and everything.
	length  int64
	proven  bool
	sending context.Context
	stop    context.CancelFunc
}

// Choose finds out which part of a content a GET asks for. The error is
// [oci.ErrRange], with which a Content-Range header has been set, or
// [oci.ErrTooManyRanges].
func Choose(w http.ResponseWriter, r *http.Request, c Content, v Validator) (Answer, error) {
	size := c.Size()
	var ranges oci.RangeRequest
	if v.current(r.Header.Get("If-Range")) {
		var err error
		ranges, err = oci.ParseRange(r.Header.Get("Range"), size)
		if errors.Is(err, oci.ErrRange) {
			w.Header().Set("Content-Range", "bytes */"+strconv.FormatInt(size, 10))
		}
		if err != nil {
			return Answer{}, err
		}
	}
	// Whoever asked for the rest, or for everything, could take it for the
	// whole. A bounded part or an archive's end is not.
	spans, proven := ranges.Spans, ranges.Open
	var sum int64
	for _, span := range spans {
		sum += span.Length
	}
	if len(spans) == 0 || len(spans) > 1 && sum > size {
		// More than everything in parts is answered with everything.
		spans, sum = []oci.Span{{Length: size}}, -1
	}
	return Answer{w: w, r: r, content: c, validator: v, spans: spans, length: sum, proven: proven || sum == size || sum < 0}, nil
}

// Whole reports whether the answer is everything, with status 200.
func (a *Answer) Whole() bool { return a.length < 0 }

// Prepare waits until there is something to send, or certainly will not be; ctx
// bounds the waiting. [Answer.End] must be called after it.
func (a *Answer) Prepare(ctx context.Context) error {
	a.sending, a.stop = context.WithCancel(a.r.Context())
	return a.content.Prepare(ctx, a.sending, a.spans, a.proven)
}

// End ends what is read for the answer.
func (a *Answer) End() { a.stop() }

// Send sends the answer, whose headers but those of its length and part have been
// set. abort says that its header is out and its body cannot be completed: the
// connection must be broken, so that the client sees it. Without it, an error means
// that nothing has been sent.
func (a *Answer) Send() (abort bool, err error) {
	size := a.content.Size()
	switch {
	case a.length < 0:
		return a.send(size, http.StatusOK)
	case len(a.spans) == 1:
		a.w.Header().Set("Content-Range", a.spans[0].ContentRange(size))
		return a.send(a.spans[0].Length, http.StatusPartialContent)
	}
	parts := &parts{content: a.content, spans: a.spans}
	defer func() {
		a.stop()
		if err = parts.end(); errors.Is(err, context.Canceled) {
			err = nil // it was we who stopped, since nobody takes more
		}
		abort = err != nil
	}()
	http.ServeContent(a.w, a.r, "", a.validator.Modified, parts)
	return false, nil
}

// send sends one span. The length is declared beforehand, always; a body that
// cannot be completed breaks the connection and is never ended short.
func (a *Answer) send(length int64, status int) (abort bool, err error) {
	reader, err := a.content.Reader(0)
	if err != nil {
		return false, err
	}
	a.w.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	a.w.WriteHeader(status)
	n, err := io.Copy(a.w, reader)
	if err == nil && n != length {
		err = fmt.Errorf("%d of %d bytes sent: %w", n, length, io.ErrUnexpectedEOF)
	}
	return err != nil, err
}

// parts is the spans of a content, as http.ServeContent comes to them: it
// seeks to the beginning of one after another. It does so in a goroutine of its
// own, for which it does not wait when the client is gone.
type parts struct {
	content Content
	spans   []oci.Span

	mu     sync.Mutex
	next   int
	offset int64
	reader io.Reader
	err    error // the first failure
}

// end waits for a Read under way, whose context has ended, and lets every later
// one fail. It returns the first failure.
func (p *parts) end() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.err
	p.err = errEnded
	return err
}

var errEnded = errors.New("the answer has ended")

func (p *parts) Seek(offset int64, whence int) (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += p.offset
	case io.SeekEnd:
		offset += p.content.Size()
	}
	p.offset, p.reader = offset, nil
	return offset, nil
}

func (p *parts) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reader == nil && p.err == nil {
		if p.next == len(p.spans) || p.spans[p.next].Offset != p.offset {
			p.err = fmt.Errorf("no part was prepared at %d", p.offset)
		} else {
			p.reader, p.err = p.content.Reader(p.next)
			p.next++
		}
	}
	if p.err != nil {
		return 0, p.err
	}
	n, err := p.reader.Read(b)
	p.offset += int64(n)
	if span := p.spans[p.next-1]; err == io.EOF && p.offset < span.Offset+span.Length {
		err = fmt.Errorf("a part ends %d bytes short: %w", span.Offset+span.Length-p.offset, io.ErrUnexpectedEOF)
	}
	if err != nil && err != io.EOF {
		p.err = err
	}
	return n, err
}
