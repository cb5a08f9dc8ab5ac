package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// A source is one URL, as it was when it was probed.
type source struct {
	client *client
	url    *url.URL // without user information and fragment
	name   string   // for people
	host   string
	secret http.Header // goes to host only
	is     facts

	mu     sync.Mutex
	target *url.URL // where it redirected to; nil: nobody knows
}

// facts are what is known of a file.
type facts struct {
	size     int64 // -1: unknown
	etag     string
	modified string
	file     string
}

// failure is why a source did not deliver, in the words of fill.Source.
type failure struct {
	source string // empty: it is said elsewhere
	err    error
	after  time.Duration
	again  bool // it may deliver when it is asked again
	final  bool // nor need others be asked
}

func (f *failure) Error() string {
	if f.source == "" {
		return f.err.Error()
	}
	return f.source + ": " + f.err.Error()
}

func (f *failure) Unwrap() error                { return f.err }
func (f *failure) Retry() (time.Duration, bool) { return f.after, f.again }
func (f *failure) Final() bool                  { return f.final }

func (s *source) failed(again bool, format string, args ...any) *failure {
	return &failure{source: s.name, err: fmt.Errorf(format, args...), again: again}
}

// probe finds out what there is. Not everybody answers HEAD (presigned addresses are
// for one method), or knows ranges; and what is no good in one way of asking may be so
// in the next.
func (s *source) probe(ctx context.Context) error {
	defer hosts.take(ctx, s.host)()
	var err error
	for _, ask := range []struct {
		method string
		header http.Header
	}{
		{http.MethodHead, nil},
		{http.MethodGet, http.Header{"Range": {"bytes=0-0"}}},
		{http.MethodGet, nil},
	} {
		var found facts
		if found, err = s.ask(ctx, ask.method, ask.header); err == nil {
			s.is = found
			return nil
		}
		if ctx.Err() != nil || errors.Is(err, upstream.ErrGuard) {
			break
		}
	}
	return err
}

func (s *source) ask(ctx context.Context, method string, header http.Header) (facts, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	resp, err := s.send(ctx, method, header)
	if err != nil {
		return facts{}, err
	}
	resp.Body.Close()
	if err := s.fits(resp); err != nil {
		return facts{}, err
	}
	found := s.facts(resp)
	switch {
	case found.size < 0:
		err = s.failed(false, "%w", ErrNoSize)
	case found.size == 0:
		err = s.failed(false, "the file is empty")
	default:
		return found, nil
	}
	return facts{}, err
}

// fits says why an answer is no file.
func (s *source) fits(resp *http.Response) error {
	switch coding := resp.Header.Get("Content-Encoding"); {
	case !isFile(resp):
		return s.status(resp)
	case coding != "" && !strings.EqualFold(coding, "identity"):
		return s.failed(false, "the server sends the file with Content-Encoding %.20q, though it was asked not to; its size and digest would be others", coding)
	case isWebPage(resp.Header):
		return s.failed(false, "%w", ErrWebPage)
	}
	return nil
}

func isWebPage(header http.Header) bool {
	t, _, _ := strings.Cut(strings.ToLower(header.Get("Content-Type")), ";")
	t = strings.TrimSpace(t)
	return t == "text/html" || t == "application/xhtml+xml"
}

// status is what a status means that is not of success.
func (s *source) status(resp *http.Response) *failure {
	says := "the server answers " + strconv.Itoa(resp.StatusCode)
	if text := http.StatusText(resp.StatusCode); text != "" {
		says += " " + text
	}
	switch status := resp.StatusCode; {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return s.failed(false, "%s; check the credentials, and whether the address has expired", says)
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, status == http.StatusTooEarly, status >= 500 && status != http.StatusNotImplemented:
		f := s.failed(true, "%s", says)
		f.after = retryAfter(resp.Header)
		return f
	}
	return s.failed(false, "%s", says)
}

// retryAfter reads the header of RFC 9110, section 10.2.3.
func retryAfter(header http.Header) time.Duration {
	value := header.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return min(time.Duration(seconds)*time.Second, maxAfter)
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, min(time.Until(at), maxAfter))
	}
	return 0
}

// facts are what an answer says of the file.
func (s *source) facts(resp *http.Response) facts {
	f := facts{size: resp.ContentLength, etag: resp.Header.Get("ETag"), file: fileName(resp.Header, s.url)}
	if resp.StatusCode == http.StatusPartialContent {
		_, _, f.size, _ = contentRange(resp.Header)
	}
	if modified := resp.Header.Get("Last-Modified"); modified != "" {
		if _, err := http.ParseTime(modified); err == nil {
			f.modified = modified
		}
	}
	return f
}

// changed reports an answer that is of another file than there was.
func (s *source) changed(resp *http.Response) bool {
	now := s.facts(resp)
	switch {
	case s.is.etag != "" && now.etag != "":
		return now.etag != s.is.etag
	case s.is.modified != "" && now.modified != "":
		return now.modified != s.is.modified
	}
	return false
}

// validator is what a range can be bound to: RFC 9110, section 13.1.5, wants a strong
// one.
func (s *source) validator() string {
	if s.is.etag != "" && !strings.HasPrefix(s.is.etag, "W/") {
		return s.is.etag
	}
	return s.is.modified
}

// Open asks for a span. A server that does not know ranges sends the whole.
func (s *source) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	give := hosts.take(ctx, s.host)
	if ctx.Err() != nil {
		give()
		return nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	free := func() {
		cancel(nil)
		give()
	}
	stream, err := s.open(ctx, span, free, cancel)
	if err != nil {
		free()
		return nil, err
	}
	return stream, nil
}

func (s *source) open(ctx context.Context, span fill.Span, free func(), cancel context.CancelCauseFunc) (*fill.Stream, error) {
	header := http.Header{}
	if span.Length < 0 {
		span.Length = s.is.size - span.Offset
	}
	if span.Offset > 0 || span.Length < s.is.size {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", span.Offset, span.Offset+span.Length-1))
		if v := s.validator(); v != "" {
			header.Set("If-Range", v)
		}
	}
	resp, err := s.send(ctx, http.MethodGet, header)
	if err == nil && header.Get("Range") != "" && rangeRefused(resp.StatusCode) {
		resp.Body.Close()
		resp, err = s.send(ctx, http.MethodGet, nil)
	}
	if err != nil {
		return nil, err
	}
	d := &delivery{source: s, body: resp.Body, ctx: ctx, cancel: cancel, free: free, left: -1}
	stream := &fill.Stream{ReadCloser: d, Size: -1, From: s.name}
	if err := s.accept(resp, span, stream, d); err != nil {
		resp.Body.Close()
		return nil, err
	}
	d.stall = time.AfterFunc(s.client.stall, func() { cancel(errStall) })
	d.stall.Stop()
	return stream, nil
}

// rangeRefused reports how servers fail that do not know ranges.
func rangeRefused(status int) bool {
	switch status {
	case http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest, http.StatusNotImplemented:
		return true
	}
	return false
}

// accept judges an answer to a request for a span.
func (s *source) accept(resp *http.Response, span fill.Span, stream *fill.Stream, d *delivery) error {
	if resp.StatusCode == http.StatusPreconditionFailed {
		return s.hasChanged()
	}
	if err := s.fits(resp); err != nil {
		return err
	}
	if s.changed(resp) {
		return s.hasChanged()
	}
	if resp.StatusCode == http.StatusOK {
		stream.Whole, stream.Size = true, resp.ContentLength
		if stream.Size >= 0 && stream.Size != s.is.size {
			return s.hasChanged()
		}
		return nil
	}
	start, end, size, ok := contentRange(resp.Header)
	if ok && size >= 0 && size != s.is.size {
		return s.hasChanged()
	}
	d.left = end + 1 - start
	if !ok || start > span.Offset || end < span.Offset || end >= span.Offset+span.Length ||
		resp.ContentLength >= 0 && resp.ContentLength != d.left {
		return s.failed(true, "the Content-Range of the answer does not fit what was asked for")
	}
	stream.Offset, stream.Size = start, size
	return nil
}

func (s *source) hasChanged() error {
	return &failure{source: s.name, err: ErrChanged, final: true}
}

// contentRange reads "bytes 100-199/500". The size is -1 where it is "*". It is not ok
// for the parts of a multipart answer.
func contentRange(header http.Header) (start, end, size int64, ok bool) {
	size = -1
	value, ok := strings.CutPrefix(header.Get("Content-Range"), "bytes ")
	span, total, found := strings.Cut(value, "/")
	first, last, both := strings.Cut(span, "-")
	if !ok || !found || !both || strings.HasPrefix(header.Get("Content-Type"), "multipart/byteranges") {
		return 0, 0, -1, false
	}
	start, wrong := strconv.ParseInt(first, 10, 64)
	end, alsoWrong := strconv.ParseInt(last, 10, 64)
	if wrong != nil || alsoWrong != nil || start < 0 || end < start {
		return 0, 0, -1, false
	}
	if total != "*" {
		if size, wrong = strconv.ParseInt(total, 10, 64); wrong != nil || size <= end {
			return 0, 0, -1, false
		}
	}
	return start, end, size, true
}

// send asks where the URL leads, and follows redirects: first where they led the last
// time, and all the way again if that is of no use any more. An answer may be of any
// status but a redirect's.
func (s *source) send(ctx context.Context, method string, header http.Header) (*http.Response, error) {
	s.mu.Lock()
	target := s.target
	s.mu.Unlock()
	if target != nil {
		resp, err := s.once(ctx, method, target, header)
		if err == nil && isFile(resp) {
			return resp, nil
		}
		if err == nil {
			resp.Body.Close()
		}
		s.redirected(nil)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	at := s.url
	for range maxRedirects + 1 {
		resp, err := s.once(ctx, method, at, header)
		if err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if errors.Is(err, upstream.ErrGuard) {
				return nil, s.failed(false, "%w", err)
			}
			return nil, s.failed(true, "asking %s: %w", at.Host, err)
		}
		if !isRedirect(resp) {
			if at != s.url && isFile(resp) {
				s.redirected(at)
			}
			return resp, nil
		}
		resp.Body.Close() // unread: what it sends may never end, and nothing bounds that here
		next, err := at.Parse(resp.Header.Get("Location"))
		switch {
		case err != nil || next.Host == "" || next.Scheme != "http" && next.Scheme != "https" || len(resp.Header.Get("Location")) > maxURL:
			return nil, s.failed(false, "it redirects to no address of http or https")
		case at.Scheme == "https" && next.Scheme == "http":
			return nil, s.failed(false, "it redirects from https to http")
		}
		next.User, next.Fragment, next.RawFragment = nil, "", ""
		at = next
	}
	return nil, s.failed(false, "it redirects more than %d times", maxRedirects)
}

func isFile(resp *http.Response) bool {
	return resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent
}

func isRedirect(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// redirected remembers where the file was found.
func (s *source) redirected(target *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.target = target
}

// once sends one request. What is secret goes where it was meant for.
func (s *source) once(ctx context.Context, method string, at *url.URL, header http.Header) (*http.Response, error) {
	req := (&http.Request{Method: method, URL: at, Host: at.Host, Header: http.Header{}}).WithContext(ctx)
	if at.Scheme == s.url.Scheme && hostPort(at) == s.host {
		req.Header = s.secret.Clone()
	}
	for name, values := range header {
		req.Header[name] = values
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", userAgent)
	}
	req.Header.Set("Accept-Encoding", "identity")
	return s.client.roundTrip(req)
}

// Blame does nothing: the fill asks no more whoever delivered wrong bytes, and a source
// is of one pull.
func (s *source) Blame(error) {}

var (
	errStall = errors.New("nothing has come for too long")
	errSlow  = errors.New("too little comes")
)

// leastRun is how many bytes have to come in the time after which nothing is a stall: a
// server that trickles would keep others' pulls waiting for as long as it likes.
const leastRun = 64 << 10

// delivery is the body of an answer.
type delivery struct {
	source *source
	body   io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	stall  *time.Timer
	left   int64 // bytes to the end of the range; negative: no end is set
	free   func()

	came  int64 // in the time spent
	spent time.Duration
}

// Read ends with the range. It fails when nothing comes.
func (d *delivery) Read(p []byte) (int, error) {
	d.stall.Reset(d.source.client.stall)
	defer d.stall.Stop()
	if d.left == 0 {
		// Every byte is here. Reading to the end lets the connection be used again;
		// how it ends says nothing more.
		d.body.Read(make([]byte, 1))
		return 0, io.EOF
	}
	if d.left > 0 {
		p = p[:min(int64(len(p)), d.left)]
	}
	begun := time.Now()
	n, err := d.body.Read(p)
	if d.left > 0 {
		d.left -= int64(n)
	}
	// What whoever reads does in between is not the server's fault.
	d.came += int64(n)
	if d.spent += time.Since(begun); d.spent >= d.source.client.stall {
		if d.came < leastRun && err == nil && d.left != 0 {
			err = errSlow
		}
		d.came, d.spent = 0, 0
	}
	switch {
	case err == nil || err == io.EOF:
		return n, err
	case d.left == 0:
		return n, io.EOF
	case errors.Is(context.Cause(d.ctx), errStall):
		err = errStall
	}
	return n, &failure{err: err, again: true} // the fill says of whom
}

func (d *delivery) Close() error {
	d.stall.Stop()
	d.cancel(nil)
	err := d.body.Close()
	if d.free != nil {
		d.free()
		d.free = nil
	}
	return err
}
