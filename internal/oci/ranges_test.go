package oci

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParseRange(t *testing.T) {
	one := func(offset, length int64) RangeRequest { return RangeRequest{Spans: []Span{{offset, length}}} }
	open := func(offset, length int64) RangeRequest {
		return RangeRequest{Spans: []Span{{offset, length}}, Open: true}
	}
	suffix := func(offset, length int64) RangeRequest {
		return RangeRequest{Spans: []Span{{offset, length}}}
	}
	many := func(spans ...Span) RangeRequest { return RangeRequest{Spans: spans} }
	for _, c := range []struct {
		header string
		size   int64
		want   RangeRequest
		err    error
	}{
		// The conformance suite's.
		{"bytes=500-1499", 2000, one(500, 1000), nil},
		{"bytes=500-", 2000, open(500, 1500), nil},
		{"bytes=-500", 2000, suffix(1500, 500), nil},
		{"bytes=500-1499", 1000, one(500, 500), nil},
		{"bytes=500-0", 2000, RangeRequest{}, ErrRange},
		{"bytes=2000-2001", 2000, RangeRequest{}, ErrRange},
		{"bytes=2000-", 2000, RangeRequest{}, ErrRange},

		{"", 2000, RangeRequest{}, nil},
		{"bytes=0-0", 2000, one(0, 1), nil},
		{"bytes=0-", 2000, open(0, 2000), nil},
		{"bytes=1999-1999", 2000, one(1999, 1), nil},
		{"bytes=0-1999", 2000, one(0, 2000), nil},
		{"bytes=0-2000", 2000, one(0, 2000), nil}, // regctl's one past the end
		{"bytes=-2000", 2000, suffix(0, 2000), nil},
		{"bytes=-5000", 2000, suffix(0, 2000), nil},
		{"bytes=-0", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-9223372036854775807", 2000, one(0, 2000), nil},
		{"bytes=9223372036854775807-", 2000, RangeRequest{}, ErrRange},
		{"bytes=-9223372036854775807", 2000, suffix(0, 2000), nil},

		// Other units are ignored, and so is a list of nothing.
		{"items=0-1", 2000, RangeRequest{}, nil},
		{"bytes", 2000, RangeRequest{}, nil},
		{"seconds=1-2", 0, RangeRequest{}, nil},
		{"bytes=", 2000, RangeRequest{}, nil},
		{"bytes=,", 2000, RangeRequest{}, nil},

		// Many.
		{"bytes=0-1,10-19", 2000, many(Span{0, 2}, Span{10, 10}), nil},
		{"bytes= 0-1 , 10-19 ", 2000, many(Span{0, 2}, Span{10, 10}), nil},
		{"bytes=0-1,-5", 2000, many(Span{0, 2}, Span{1995, 5}), nil},
		{"bytes=0-1,1990-", 2000, many(Span{0, 2}, Span{1990, 10}), nil},
		{"bytes=0-1,5000-6000,10-19", 2000, many(Span{0, 2}, Span{10, 10}), nil},
		{"bytes=5000-6000,7000-", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-1,,10-19", 2000, many(Span{0, 2}, Span{10, 10}), nil},
		// What is left of a list is one range, and neither open nor a suffix.
		{"bytes=0-1,5000-", 2000, one(0, 2), nil},
		{"bytes=0-1,-0", 2000, one(0, 2), nil},
		{"bytes=5000-6000,-5", 2000, suffix(1995, 5), nil},
		{"bytes=5000-6000,1990-", 2000, open(1990, 10), nil},

		// An empty blob has no byte that could be sent as 206, and some clients
		// put a range on every request.
		{"", 0, RangeRequest{}, nil},
		{"bytes=0-", 0, RangeRequest{}, nil},
		{"bytes=0-0", 0, RangeRequest{}, nil},
		{"bytes=-500", 0, RangeRequest{}, nil},

		// Not ranges.
		{"bytes=-", 2000, RangeRequest{}, ErrRange},
		{"bytes=5", 2000, RangeRequest{}, ErrRange},
		{"bytes=a-b", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-b", 2000, RangeRequest{}, ErrRange},
		{"bytes=+0-5", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-+5", 2000, RangeRequest{}, ErrRange},
		{"bytes=--5", 2000, RangeRequest{}, ErrRange},
		{"bytes=0--0", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-1-2", 2000, RangeRequest{}, ErrRange},
		{"bytes=0x0-5", 2000, RangeRequest{}, ErrRange},
		{"bytes=0-1,junk", 2000, RangeRequest{}, ErrRange},
		{"bytes=99999999999999999999-", 2000, RangeRequest{}, ErrRange},
	} {
		got, err := ParseRange(c.header, c.size)
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("ParseRange(%q, %d): error %v, want %v", c.header, c.size, err, c.err)
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("ParseRange(%q, %d) = %+v, want %+v", c.header, c.size, got, c.want)
		}
	}
}

func TestParseRangeBoundsTheirNumber(t *testing.T) {
	list := func(n int) string { return "bytes=" + strings.TrimSuffix(strings.Repeat("0-0,", n), ",") }
	got, err := ParseRange(list(MaxRanges), 10)
	if err != nil || len(got.Spans) != MaxRanges {
		t.Errorf("%d ranges: %d spans, %v", MaxRanges, len(got.Spans), err)
	}
	// 400, not 416: lazy pullers then ask for fewer.
	if _, err := ParseRange(list(MaxRanges+1), 10); !errors.Is(err, ErrTooManyRanges) || errors.Is(err, ErrRange) {
		t.Errorf("%d ranges: %v, want ErrTooManyRanges", MaxRanges+1, err)
	}
}

func TestContentRange(t *testing.T) {
	if got, want := (Span{500, 1000}).ContentRange(2000), "bytes 500-1499/2000"; got != want {
		t.Errorf("ContentRange = %q, want %q", got, want)
	}
	if got, want := (Span{0, 1}).ContentRange(1), "bytes 0-0/1"; got != want {
		t.Errorf("ContentRange = %q, want %q", got, want)
	}
}

func FuzzParseRange(f *testing.F) {
	for _, header := range []string{
		"", "bytes=500-1499", "bytes=500-", "bytes=-500", "bytes=500-0", "bytes=0-0,-0", "bytes=0-1,10-19",
		"bytes=--0", "bytes=0--0", "bytes=+1-2", "items=0-1", "bytes=-", "bytes=,", "bytes=0-9223372036854775807",
		"bytes=9223372036854775807-9223372036854775807", "bytes=0-1,5000-", "bytes=\t1-\t2",
	} {
		for _, size := range []int64{0, 1, 2000, 1<<63 - 1} {
			f.Add(header, size)
		}
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size < 0 {
			return
		}
		got, err := ParseRange(header, size)
		if err != nil {
			if !errors.Is(err, ErrRange) && !errors.Is(err, ErrTooManyRanges) {
				t.Errorf("ParseRange(%q, %d): %v", header, size, err)
			}
			if len(got.Spans) > 0 && errors.Is(err, ErrRange) {
				t.Errorf("ParseRange(%q, %d) = %+v together with %v", header, size, got, err)
			}
			return
		}
		for _, s := range got.Spans {
			if s.Offset < 0 || s.Length <= 0 || s.Offset >= size || s.Length > size-s.Offset {
				t.Errorf("ParseRange(%q, %d): span %+v lies outside", header, size, s)
			}
			if got.Open && s.Offset+s.Length != size {
				t.Errorf("ParseRange(%q, %d) = %+v: open or suffix, and does not reach the end", header, size, got)
			}
		}
		if len(got.Spans) > MaxRanges {
			t.Errorf("%d spans", len(got.Spans))
		}
		if got.Open && len(got.Spans) != 1 {
			t.Errorf("ParseRange(%q, %d) = %+v", header, size, got)
		}
		if len(got.Spans) > 0 && strings.ContainsAny(header, "+") || strings.Contains(header, "--") && len(got.Spans) > 0 {
			t.Errorf("ParseRange(%q, %d) = %+v: a sign is no digit", header, size, got)
		}
	})
}
