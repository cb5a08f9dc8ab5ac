package fill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
)

// stream is what a reader goes on with when the disk takes no more: a part of
// the content from the sources, for it alone. For a proven reader it begins
// where the digest has come to, hashes on from there, and keeps back the last
// segment until the digest is right.
type stream struct {
	tap    tap
	fill   *Fill
	start  int64  // of the reader
	at     int64  // of the reader; what is before is hashed only
	end    int64  // of the reader
	sum    *proof // nil: unproven
	tail   []byte // what is left of the last segment, once it is proven
	closed context.CancelFunc
}

// pass returns the reader's own stream.
func (r *Reader) pass() *stream {
	if r.own != nil {
		return r.own
	}
	f := r.fill
	ctx, cancel := context.WithCancel(r.ctx)
	s := &stream{fill: f, start: r.start, at: r.offset, end: r.end, closed: cancel}
	s.tap = tap{fill: f, ctx: ctx, pos: r.offset, end: r.end}
	if r.proven {
		f.mu.Lock()
		s.sum = f.reached.clone()
		f.mu.Unlock()
		s.tap.pos, s.tap.end = s.sum.at, f.key.size
	}
	r.own = s
	return s
}

func (s *stream) close() {
	s.tap.Close()
	s.closed()
}

// ready waits until the sources have begun to answer.
func (s *stream) ready(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.closed)()
	if s.tap.stream != nil || s.tap.pos >= s.tap.end {
		return nil
	}
	return s.tap.open()
}

func (s *stream) Read(p []byte) (int, error) {
	if s.sum == nil {
		return s.tap.Read(p)
	}
	last := (s.fill.key.size - 1) / s.fill.segment * s.fill.segment
	for s.at < min(s.end, last) {
		n, err := s.tap.Read(p[:min(int64(len(p)), last-s.tap.pos)])
		s.sum.Write(p[:n])
		begin := s.tap.pos - int64(n)
		if skipped := min(s.at-begin, int64(n)); skipped > 0 {
			if err := s.compare(begin, p[:skipped]); err != nil {
				return 0, s.wrong(err)
			}
			n = copy(p, p[skipped:n])
		}
		n = int(min(int64(n), s.end-s.at))
		s.at += int64(n)
		if n > 0 || err != nil {
			return n, err
		}
	}
	if s.at >= s.end {
		return 0, io.EOF
	}
	if s.tail == nil {
		if err := s.prove(last); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.tail)
	s.tail = s.tail[n:]
	s.at += int64(n)
	return n, nil
}

// compare says whether what the reader has had from the spool is what is being
// hashed now.
func (s *stream) compare(begin int64, p []byte) error {
	if begin+int64(len(p)) <= s.start {
		return nil
	}
	if begin < s.start {
		p, begin = p[s.start-begin:], s.start
	}
	had := make([]byte, len(p))
	if _, err := s.fill.spool.ReadAt(had, begin); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	if !bytes.Equal(had, p) {
		return fmt.Errorf("%w: sources deliver different bytes at %d", ErrDigest, begin)
	}
	return nil
}

// prove reads on to the end and compares the digest.
func (s *stream) prove(last int64) error {
	if s.tap.pos < last { // the reader begins in the last segment
		if _, err := io.CopyN(s.sum, &s.tap, last-s.tap.pos); err != nil {
			return err
		}
	}
	tail := make([]byte, s.tap.end-last)
	if _, err := io.ReadFull(&s.tap, tail); err != nil {
		return err
	}
	s.sum.Write(tail)
	s.tap.Close()
	f := s.fill
	f.mu.Lock()
	from := f.from
	f.mu.Unlock()
	if _, err := s.sum.check(f.key.digest, from); err != nil {
		return s.wrong(err)
	}
	s.tail = tail[s.at-last : s.end-last]
	return nil
}

// wrong ends the fill: what it has in the spool, or some source, is not the
// content.
func (s *stream) wrong(err error) error {
	if errors.Is(err, ErrDigest) {
		s.fill.fail(err)
	}
	return err
}
