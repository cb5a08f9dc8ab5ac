package oci

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// MaxRanges bounds the parts of one multi-range request. containers/storage
// asks for at most 1,024.
const MaxRanges = 1024

// ErrRange is returned for a range that the content cannot satisfy, which is
// a 416 and not a 404.
var ErrRange = errors.New("range not satisfiable")

// ErrTooManyRanges is returned for more than MaxRanges. Lazy pullers ask for
// fewer when told 400.
var ErrTooManyRanges = fmt.Errorf("more than %d ranges", MaxRanges)

// A Span is a part of some content: Length bytes from Offset.
type Span struct{ Offset, Length int64 }

// ContentRange is the value of the header that goes with the span.
func (s Span) ContentRange(size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", s.Offset, s.Offset+s.Length-1, size)
}

// A RangeRequest is a Range header taken apart against a size.
type RangeRequest struct {
	Spans []Span // none: the whole content, status 200
	// Open marks a single range without an end: whoever asks wants the rest.
	Open bool
}

// ParseRange reads a Range header for content of the given size. A unit other
// than bytes is ignored, as RFC 9110 asks, and so is any range of empty content:
// some clients put one on every request. An end beyond the content is
// clamped: regctl asks for one byte too many.
func ParseRange(header string, size int64) (RangeRequest, error) {
	var req RangeRequest
	list, ok := strings.CutPrefix(header, "bytes=")
	if !ok {
		return req, nil
	}
	if strings.Count(list, ",") >= MaxRanges {
		return req, ErrTooManyRanges
	}
	unsatisfied := false
	for item := range strings.SplitSeq(list, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		from, to, ok := strings.Cut(item, "-")
		if !ok {
			return RangeRequest{}, ErrRange
		}
		from, to = strings.TrimSpace(from), strings.TrimSpace(to)
		var span Span
		open := false
		switch {
		case from == "":
			n, err := parseOffset(to)
			if err != nil {
				return RangeRequest{}, err
			}
			n = min(n, size)
			span = Span{size - n, n}
		case to == "":
			start, err := parseOffset(from)
			if err != nil {
				return RangeRequest{}, err
			}
			span = Span{start, size - start}
			open = true
		default:
			start, err := parseOffset(from)
			if err != nil {
				return RangeRequest{}, err
			}
			end, err := parseOffset(to)
			if err != nil || end < start {
				return RangeRequest{}, ErrRange
			}
			span = Span{start, min(end, size-1) - start + 1}
		}
		if span.Length <= 0 {
			unsatisfied = true
			continue
		}
		req.Spans = append(req.Spans, span)
		req.Open = open
	}
	if len(req.Spans) == 0 && unsatisfied && size > 0 {
		return RangeRequest{}, ErrRange
	}
	if len(req.Spans) != 1 {
		req.Open = false
	}
	return req, nil
}

func parseOffset(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || s[0] == '+' || s[0] == '-' {
		return 0, ErrRange
	}
	return n, nil
}
