package upstream

import (
	"fmt"
	"maps"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/caddy-registry/mirror/internal/fill"
)

// rangeError is wrapped by the error of a request that might have gone well
// without its Range.
type rangeError struct {
	size int64 // of the whole content, as far as the answer says, or -1
}

func (rangeError) Error() string { return "to a request for a range" }

// cannotHold reports that the content ends before the span begins, so that
// there is nothing to gain without a Range either.
func (r rangeError) cannotHold(span fill.Span) bool { return r.size >= 0 && r.size <= span.Offset }

// rangeRefused is what an error answer says of the Range in its request, or
// nil: many servers that do not know ranges fail in one of these ways.
func rangeRefused(resp *http.Response) error {
	if resp.Request.Header.Get("Range") == "" {
		return nil
	}
	switch resp.StatusCode {
	case http.StatusRequestedRangeNotSatisfiable:
		size, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes */")
		if n, err := strconv.ParseInt(size, 10, 64); ok && err == nil && n >= 0 {
			return rangeError{n}
		}
	case http.StatusBadRequest, http.StatusNotImplemented:
	default:
		return nil
	}
	return rangeError{-1}
}

// ranged is the call with the Range of a span, unless that is all there is.
func (c call) ranged(span fill.Span) call {
	var value string
	switch {
	case span.Length >= 0:
		value = fmt.Sprintf("bytes=%d-%d", span.Offset, span.Offset+span.Length-1)
	case span.Offset > 0:
		value = fmt.Sprintf("bytes=%d-", span.Offset)
	default:
		return c
	}
	header := http.Header{"Range": {value}}
	maps.Copy(header, c.header)
	c.header = header
	return c
}

// accept makes a stream of an answer to a request for a span, and closes what
// does not fit.
func (e *endpoint) accept(resp *http.Response, span fill.Span) (*fill.Stream, error) {
	d := &delivery{endpoint: e, body: resp.Body.(*body), left: -1}
	stream := &fill.Stream{ReadCloser: d, From: e.name}
	failure := &Error{Kind: Invalid, Endpoint: e.name, Origin: e.origin, Status: resp.StatusCode}
	if coding := resp.Header.Get("Content-Encoding"); coding != "" && !strings.EqualFold(coding, "identity") {
		failure.Reason = "it encodes the blob as " + coding
	} else if resp.StatusCode == http.StatusPartialContent {
		start, end, size, ok := contentRange(resp.Header)
		stream.Offset, stream.Size = start, size
		d.left = end + 1 - start
		if !ok || start > span.Offset || end < span.Offset ||
			span.Length >= 0 && end >= span.Offset+span.Length ||
			resp.ContentLength >= 0 && resp.ContentLength != d.left {
			failure.Reason = "its Content-Range does not fit what was asked for"
			if !ok {
				size = -1
			}
			if resp.Request.Header.Get("Range") != "" {
				failure.Err = rangeError{size}
			}
		}
	} else {
		stream.Size, stream.Whole = resp.ContentLength, true
		if webPage(resp.Header) {
			failure.Reason = "it sends a web page instead of the blob"
		}
	}
	if failure.Reason != "" {
		resp.Body.Close()
		return nil, failure
	}
	return stream, nil
}

// webPage reports what a captive portal or a login page sends.
func webPage(header http.Header) bool {
	return strings.HasPrefix(header.Get("Content-Type"), "text/html")
}

// contentRange reads "bytes 100-199/500". The size is -1 where it is "*". It
// is not ok for the parts of a multipart answer.
func contentRange(header http.Header) (start, end, size int64, ok bool) {
	value, ok := strings.CutPrefix(header.Get("Content-Range"), "bytes ")
	if !ok || strings.HasPrefix(header.Get("Content-Type"), "multipart/") {
		return 0, 0, 0, false
	}
	span, total, ok := strings.Cut(value, "/")
	from, to, ok2 := strings.Cut(span, "-")
	start, err := strconv.ParseInt(from, 10, 64)
	end, err2 := strconv.ParseInt(to, 10, 64)
	if !ok || !ok2 || err != nil || err2 != nil || start < 0 || end < start || end == math.MaxInt64 {
		return 0, 0, 0, false
	}
	if total == "*" {
		return start, end, -1, true
	}
	size, err = strconv.ParseInt(total, 10, 64)
	if err != nil || size <= end {
		return 0, 0, 0, false
	}
	return start, end, size, true
}
