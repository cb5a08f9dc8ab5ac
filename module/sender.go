package module

import (
	"io"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/internal/fill"
)

// sender lets sections of files be sent by the kernel. Caddy limits how much is
// written under one deadline, by an io.LimitedReader around what it is given,
// and net/http looks behind one such reader only. So a section goes as it is
// where Caddy limits, and behind a limit of our own where `write_idle` is off
// and Caddy does not.
type sender struct {
	http.ResponseWriter
	chunk int64 // 0: Caddy sets no limit
}

func newSender(w http.ResponseWriter, r *http.Request) sender {
	s := sender{ResponseWriter: w}
	if _, idle := caddyhttp.IdleTimeoutsFromContext(r.Context()); idle != nil {
		s.chunk = caddyhttp.DefaultMaxWriteChunk
		if idle.MaxChunk > 0 {
			s.chunk = int64(idle.MaxChunk)
		}
	}
	return s
}

// Unwrap is for http.ResponseController.
func (s sender) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// ReadFrom keeps sendfile for whole files.
func (s sender) ReadFrom(r io.Reader) (int64, error) { return io.Copy(s.ResponseWriter, r) }

// WriteSection implements [fill.SectionWriter].
func (s sender) WriteSection(section *fill.Section) (int64, error) {
	section.Chunk = s.chunk
	if s.chunk > 0 {
		return io.Copy(s.ResponseWriter, section)
	}
	left, err := section.Left()
	if err != nil {
		return 0, err
	}
	return io.Copy(s.ResponseWriter, io.LimitReader(section, left))
}
