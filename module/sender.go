package module

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/internal/section"
)

// sender lets sections of files be sent by the kernel over plain HTTP/1.1.
// Caddy limits how much is written under one deadline, by an io.LimitedReader
// around what it is given, and net/http looks behind one such reader only. So a
// section goes as it is where Caddy limits, and behind a limit of our own where
// `write_idle` is off and Caddy does not.
//
// What is written under one deadline is 64 KiB unless `write_max_chunk` says
// otherwise, and has to be written within `write_idle`. That many calls are what
// sendfile costs, so it is raised to maxChunk. A client that would have kept up
// with the smaller one is not cut: when a deadline passes, and some bytes have
// gone since the last, there is another.
type sender struct {
	http.ResponseWriter
	ctx    context.Context
	idle   *caddyhttp.IdleTimeoutWriter // nil: Caddy sets no limit
	plain  bool                         // HTTP/1.1 without TLS
	begun  bool                         // some of a section is out
	led    bool                         // the lead is out
	direct bool                         // the connection has asked for a descriptor
	left   bool                         // the client went away before it had everything
	late   bool                         // it took nothing for too long
}

const (
	// maxChunk is how much is sent under one deadline, in bytes.
	maxChunk = 1 << 20
	// lead is how much of an answer goes before the rest is sent by the kernel:
	// enough for net/http, which holds back the header until it has seen some
	// of the body, as other handlers may.
	lead = 2 << 10
	// small is how much is as well copied, along with the header, and few how
	// much is at any time.
	small, few = 32 << 10, 8 << 10
)

var smallBuffers = sync.Pool{New: func() any { return new([small]byte) }}

func newSender(w http.ResponseWriter, r *http.Request) *sender {
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	return &sender{ResponseWriter: w, ctx: r.Context(), idle: idle, plain: r.ProtoMajor == 1 && r.TLS == nil}
}

// Unwrap is for http.ResponseController.
func (s *sender) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *sender) Write(p []byte) (int, error) {
	n, err := s.ResponseWriter.Write(p)
	if err != nil {
		s.late = errors.Is(err, os.ErrDeadlineExceeded)
		s.left = !s.late
	}
	return n, err
}

// hungUp reports whether an answer is not complete because the client went away
// by itself. A write fails before net/http has noticed that, and ends the
// request's context for a deadline, too.
func (s *sender) hungUp() bool { return !s.late && (s.left || s.ctx.Err() != nil) }

// ReadFrom copies, so that it shows which side has failed.
func (s *sender) ReadFrom(r io.Reader) (int64, error) {
	buffer := smallBuffers.Get().(*[small]byte)
	defer smallBuffers.Put(buffer)
	return io.CopyBuffer(struct{ io.Writer }{s}, struct{ io.Reader }{r}, buffer[:])
}

// WriteSection implements [section.Writer].
func (s *sender) WriteSection(r *section.Reader) (total int64, err error) {
	for {
		left, err := r.Left()
		if err != nil || left <= 0 {
			return total, err
		}
		n, err := s.write(r, left)
		total += n
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF // the file is shorter than it was
		}
		if err == nil {
			continue
		}
		// net/http ends the context when it could not write all of what it had
		// in a buffer: then there is no going on.
		// None of these errors is a file's.
		late := errors.Is(err, os.ErrDeadlineExceeded)
		if n == 0 || !s.direct || !late || s.ctx.Err() != nil {
			s.late = late
			s.left = s.left || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
			return total, err
		}
		if err := r.Rewind(left - n); err != nil {
			return total, err
		}
	}
}

// write sends some of a section, at least one byte unless it fails.
func (s *sender) write(r *section.Reader, left int64) (int64, error) {
	to, ok := s.ResponseWriter.(io.ReaderFrom)
	defer func() { s.begun = true }()
	if !ok || !s.plain || left <= few || left <= small && !s.begun {
		if err := r.Hold(left); err != nil {
			return 0, err
		}
		buffer := smallBuffers.Get().(*[small]byte)
		defer smallBuffers.Put(buffer)
		return io.CopyBuffer(struct{ io.Writer }{s}, struct{ io.Reader }{r}, buffer[:])
	}
	if s.idle == nil {
		if err := r.Lend(0); err != nil {
			return 0, err
		}
		return to.ReadFrom(io.LimitReader(r, left))
	}
	chunk := int64(s.idle.MaxChunk)
	if chunk <= 0 {
		chunk = caddyhttp.DefaultMaxWriteChunk
	}
	if !s.led && !(r.Last() && left <= chunk) {
		// Whether it is a connection from which the kernel sends shows only
		// now. On another one a deadline that has passed is final, and to send
		// more under one would cut slow clients.
		if err := r.Hold(lead); err != nil {
			return 0, err
		}
		n, err := s.limited(to, r, 2*lead)
		s.led, s.direct = true, r.Asked()
		return n, err
	}
	if s.direct {
		chunk = max(chunk, maxChunk)
	}
	chunk = min(chunk, left)
	if err := r.Lend(chunk); err != nil {
		return 0, err
	}
	return s.limited(to, r, chunk)
}

// limited sends what a section gives, so many bytes under one deadline.
func (s *sender) limited(to io.ReaderFrom, r *section.Reader, chunk int64) (int64, error) {
	was := s.idle.MaxChunk
	s.idle.MaxChunk = int(chunk)
	defer func() { s.idle.MaxChunk = was }()
	return to.ReadFrom(r)
}
