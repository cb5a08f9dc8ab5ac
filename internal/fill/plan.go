package fill

import (
	"math/bits"
	"slices"
	"time"
)

// progress is how far larger content has come, and who is fetching what.
// Fill.mu guards it.
//
// What is fetched next is decided here, by two quotas of as many spans as the
// fill has connections:
//
//   - for parts: what a bounded reader has asked for, and what an open-ended
//     one will read within the next 8 MiB. Of all these, what its reader is
//     nearest to comes first: a reader that waits is at distance 0.
//   - for the whole: the first segment that is missing, while a reader of the
//     whole or an open-ended one is there, or the fill is to be finished. Their
//     number begins at 1, and grows while spans take long to come: an upstream
//     that is fast needs no second connection. Unless a reader of the whole is
//     there, this is background. While the store is to be asked, there is one, and
//     it goes on at its end: see the package comment.
type progress struct {
	size       int64
	segment    int64
	window     int64
	have       bitmap // segments in the spool
	claimed    bitmap // segments being fetched
	got        int64  // bytes of the former
	prefix     int64  // segments from the beginning without a hole
	sums       []uint32
	fresh      []int64        // segments that are not in the ledger yet
	parts      map[int64]part // segments that a span has left half way
	spans      []*span
	sequential *span // of a source that delivers no spans: the only one
	width      int   // spans of the whole at once
	readers    []*Reader
	finishing  bool
	settled    bool   // there was nothing to fetch, and nothing has changed
	full       error  // why the spool takes no more
	trouble    error  // why the content cannot be had
	reached    *proof // the digest along the prefix, in passing; not changed any more
}

// span is segments on their way.
type span struct {
	first, end int64 // segments
	whole      bool  // counts as one for the whole
	steady     bool  // goes on at its end
	background bool
	cancel     func(error)
	part                     // how far it has come
	hurry      chan struct{} // Span.Hurry of one in the background
	ramp       time.Time     // when, if it has not ended, another is begun
}

// part is how far a segment has come that is not whole. Readers may have had
// that much of it, so it is never fetched again: from another source it could
// be something else.
type part struct {
	pos int64  // of the next byte in the content
	sum uint32 // CRC-32C of the segment up to there
}

func (p *progress) begin(size int64, l limits, connections int) {
	p.size, p.segment = size, l.segment
	n := p.segments()
	p.have, p.claimed = make(bitmap, (n+63)/64), make(bitmap, (n+63)/64)
	p.sums, p.parts = make([]uint32, n), map[int64]part{}
	window := max(l.window[0], min(l.window[1], size/int64(connections)))
	p.window = (window + p.segment - 1) / p.segment // in segments
}

func (p *progress) segments() int64 { return (p.size + p.segment - 1) / p.segment }

// length is that of one segment.
func (p *progress) length(i int64) int64 { return min(p.segment, p.size-i*p.segment) }

// arrived notes a segment that is in the spool.
func (p *progress) arrived(i int64, sum uint32) {
	p.have.set(i)
	delete(p.parts, i)
	p.sums[i] = sum
	p.got += p.length(i)
	for n := p.segments(); p.prefix < n && p.have.get(p.prefix); {
		p.prefix++
	}
}

// contiguous is where the first hole begins, in bytes.
func (p *progress) contiguous() int64 {
	if part, ok := p.parts[p.prefix]; ok {
		return part.pos
	}
	return min(p.prefix*p.segment, p.size)
}

// last is where the last segment begins, in bytes.
func (p *progress) last() int64 { return (p.size - 1) / p.segment * p.segment }

// maxRun bounds what a reader is given at once.
const maxRun = 1 << 20

// readable returns how far there are bytes without a hole from offset, or
// about maxRun.
func (p *progress) readable(offset int64) int64 {
	at := offset
	for at < p.size && at-offset < maxRun {
		i := at / p.segment
		if p.have.get(i) {
			at = min((i+1)*p.segment, p.size)
			continue
		}
		at = max(at, p.parts[i].pos)
		for _, s := range p.spans {
			if s.pos/p.segment == i {
				at = max(at, s.pos)
			}
		}
		break
	}
	return at
}

// next decides what to fetch, or returns nil.
func (p *progress) next(connections int, ahead int64, finish, steady bool) *span {
	if p.sequential != nil || p.settled {
		return nil
	}
	parts, wholes, most := 0, 0, min(p.width, connections)
	for _, s := range p.spans {
		if s.whole {
			wholes++
		} else {
			parts++
		}
		steady = steady || s.steady
	}
	if steady {
		most = 1
	}
	reading, all := false, p.all(finish) // somebody reads, or wants, the whole
	best, end, distance := int64(-1), int64(0), int64(0)
	for _, r := range p.readers {
		if r.proven && r.start == 0 {
			reading = true
			continue
		}
		from, to := r.wants(ahead)
		from, to = from/p.segment, (to+p.segment-1)/p.segment
		i := p.missing(from, to)
		if i < to && (best < 0 || i-from < distance) {
			best, end, distance = i, to, i-from
		}
	}
	if best >= 0 && parts < connections {
		return p.claim(best, end)
	}
	if all && wholes < most {
		if n := p.segments(); p.missing(p.prefix, n) < n {
			s := p.claim(p.missing(p.prefix, n), n)
			s.whole, s.steady = true, steady
			for _, r := range p.readers { // parts that had no room among the parts
				from, to := r.wants(ahead)
				reading = reading || s.first*p.segment < to && s.end*p.segment > from
			}
			if !reading {
				s.background, s.hurry = true, make(chan struct{})
			}
			return s
		}
	}
	p.settled = best < 0 && (!all || p.missing(p.prefix, p.segments()) == p.segments())
	return nil
}

// all reports whether somebody wants the whole.
func (p *progress) all(finish bool) bool {
	return finish || p.finishing || slices.ContainsFunc(p.readers, func(r *Reader) bool { return r.proven })
}

// has reports whether every segment that bytes lie in is there.
func (p *progress) has(from, to int64) bool {
	for i := from / p.segment; i*p.segment < to; i++ {
		if !p.have.get(i) {
			return false
		}
	}
	return true
}

// lacking tells what a span is to do with the next n bytes it has been given:
// write that many of them, or skip that many, since a span that brings
// everything meets what is there. What is there may have been read.
func (p *progress) lacking(s *span, at, n int64) (m int64, skip bool) {
	if p.sequential != s {
		return n, false
	}
	i := at / p.segment
	n = min(n, (i+1)*p.segment-at)
	if p.have.get(i) {
		return n, true
	}
	part, ok := p.parts[i]
	switch {
	case ok && at < part.pos:
		return min(n, part.pos-at), true
	case ok && at == part.pos:
		s.part = part
	}
	return n, false
}

// wants is what a reader will read next: an open-ended one as far as it is
// fetched ahead.
func (r *Reader) wants(ahead int64) (from, to int64) {
	if r.proven {
		return r.at, min(r.end, r.at+ahead)
	}
	return r.at, r.end
}

// hurry lets background spans that a reader has come to wait for go on in the
// foreground.
func (p *progress) hurry(r *Reader) {
	from, to := r.at, r.end
	if r.proven && r.start == 0 {
		from = 0
	}
	for _, s := range p.spans {
		if s.background && s.first*p.segment < to && s.end*p.segment > from {
			s.background = false
			close(s.hurry)
		}
	}
}

// claim takes the segments from first that are missing, up to end or a window.
func (p *progress) claim(first, end int64) *span {
	s := &span{first: first, end: first + 1, part: part{pos: first * p.segment}}
	if part, ok := p.parts[first]; ok {
		s.part = part
	}
	p.claimed.set(first)
	p.reach(s, min(end, first+p.window))
	p.spans = append(p.spans, s)
	return s
}

// reach lets a span claim what is missing at its end, up to a segment.
func (p *progress) reach(s *span, end int64) {
	for s.end < end && p.lone(s.end) {
		p.claimed.set(s.end)
		s.end++
	}
}

// lone reports whether nothing of a segment is there or on its way.
func (p *progress) lone(i int64) bool {
	_, begun := p.parts[i]
	return !begun && p.missing(i, i+1) == i
}

// extend lets a steady span claim its next window, but no more than it has asked
// for, if somebody wants the whole. It reports whether there is something in it.
func (p *progress) extend(s *span, finish bool, asked int64) bool {
	if p.sequential != nil || !p.all(finish) {
		return false
	}
	end := s.end
	p.reach(s, min((asked+p.segment-1)/p.segment, end+p.window))
	return s.end > end
}

// rest is where a request for all that follows a span ends, in bytes.
func (p *progress) rest(s *span) int64 {
	end := s.end
	for n := p.segments(); end < n && p.lone(end); {
		end++
	}
	return min(end*p.segment, p.size)
}

// leave notes where a span has left its last segment.
func (p *progress) leave(s *span) {
	if i := s.pos / p.segment; s.pos > i*p.segment && s.pos < p.size && s.pos > p.parts[i].pos && !p.have.get(i) {
		p.parts[i] = s.part
	}
}

// drop ends a span.
func (p *progress) drop(s *span) {
	p.leave(s)
	for i := s.first; i < s.end; i++ {
		p.claimed.clear(i)
	}
	for i, other := range p.spans {
		if other == s {
			p.spans = append(p.spans[:i:i], p.spans[i+1:]...)
			break
		}
	}
	if p.sequential == s {
		p.sequential = nil
	}
	p.settled = false
}

// missing returns the first segment in [from, to) that is neither there nor on
// its way, or to.
func (p *progress) missing(from, to int64) int64 {
	for i := from; i < to; {
		word := ^(p.have[i/64] | p.claimed[i/64]) >> (i % 64)
		if word != 0 {
			return min(i+int64(bits.TrailingZeros64(word)), to)
		}
		i = (i/64 + 1) * 64
	}
	return to
}

// bitmap is one bit for each segment.
type bitmap []uint64

func (b bitmap) get(i int64) bool { return b[i/64]&(1<<(i%64)) != 0 }
func (b bitmap) set(i int64)      { b[i/64] |= 1 << (i % 64) }
func (b bitmap) clear(i int64)    { b[i/64] &^= 1 << (i % 64) }
