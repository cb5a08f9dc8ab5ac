package content_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/oci"
)

const text = "0123456789abcdefghij"

var validator = content.Validator{ETag: `"sha512-x"`, Modified: time.Date(2026, 3, 1, 12, 0, 0, 500, time.UTC)}

// broken ends early, and cannot be told so beforehand.
type broken struct{ *strings.Reader }

func (broken) Close() error { return nil }

// server answers with content from a file; below /short, with one that lacks its end.
func server(t *testing.T) *httptest.Server {
	name := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Etag", validator.ETag)
		if validator.Unchanged(r) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		var body io.ReadCloser
		body, err := os.Open(name)
		if err != nil {
			t.Error(err)
			return
		}
		if r.URL.Path == "/short" {
			body.Close()
			body = broken{strings.NewReader(text[:10])}
		}
		c := content.Held(body, int64(len(text)))
		defer c.Close()
		answer, err := content.Choose(w, r, c, validator)
		if err != nil {
			if !errors.Is(err, oci.ErrRange) {
				t.Error(err)
			}
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		defer answer.End()
		if err := answer.Prepare(r.Context()); err != nil {
			t.Error(err)
		}
		abort, err := answer.Send()
		if abort != (r.URL.Path == "/short") || abort != (err != nil) {
			t.Errorf("%s: %t, %v", r.URL.Path, abort, err)
		}
		if abort {
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func TestWhatARequestIsAnswered(t *testing.T) {
	s := server(t)
	const same, later, earlier = "Sun, 01 Mar 2026 12:00:00 GMT", "Sun, 01 Mar 2026 12:00:01 GMT", "Sun, 01 Mar 2026 11:59:59 GMT"
	for _, c := range []struct {
		header []string
		status int
		body   string
	}{
		{nil, 200, text},
		{[]string{"Range", "bytes=3-5"}, 206, "345"},
		{[]string{"Range", "bytes=15-"}, 206, "fghij"},
		{[]string{"Range", "bytes=-2"}, 206, "ij"},
		{[]string{"Range", "bytes=20-"}, 416, ""},
		{[]string{"Range", "bytes=0-1,0-18"}, 200, text},
		{[]string{"Range", "bytes=3-5", "If-Range", `"sha512-x"`}, 206, "345"},
		{[]string{"Range", "bytes=3-5", "If-Range", `W/"sha512-x"`}, 200, text},
		{[]string{"Range", "bytes=3-5", "If-Range", `"sha512-y"`}, 200, text},
		{[]string{"Range", "bytes=3-5", "If-Range", same}, 206, "345"},
		{[]string{"Range", "bytes=3-5", "If-Range", later}, 200, text},
		{[]string{"Range", "bytes=3-5", "If-Range", earlier}, 200, text},
		{[]string{"Range", "bytes=3-5", "If-Range", "yesterday"}, 200, text},
		{[]string{"If-None-Match", `"other", W/"sha512-x"`}, 304, ""},
		{[]string{"If-None-Match", "*"}, 304, ""},
		{[]string{"If-None-Match", `"other"`}, 200, text},
		{[]string{"If-None-Match", `"other"`, "If-Modified-Since", later}, 200, text}, // RFC 9110, 13.1.3
		{[]string{"If-Modified-Since", same}, 304, ""},
		{[]string{"If-Modified-Since", later}, 304, ""},
		{[]string{"If-Modified-Since", earlier}, 200, text},
		{[]string{"If-Modified-Since", "junk"}, 200, text},
	} {
		status, header, body := get(t, s.URL, c.header)
		if status != c.status || body != c.body {
			t.Errorf("%q: %d %q, want %d %q", c.header, status, body, c.status, c.body)
		}
		if status == 416 && header.Get("Content-Range") != "bytes */20" {
			t.Errorf("%q: Content-Range %q", c.header, header.Get("Content-Range"))
		}
	}
}

func TestPartsOfAContent(t *testing.T) {
	s := server(t)
	for _, ifRange := range []string{"", validator.ETag, "Sun, 01 Mar 2026 12:00:00 GMT"} {
		header := []string{"Range", "bytes=1-2,5-7"}
		if ifRange != "" {
			header = append(header, "If-Range", ifRange)
		}
		status, h, body := get(t, s.URL, header)
		if status != 206 || !strings.HasPrefix(h.Get("Content-Type"), "multipart/byteranges") ||
			!strings.Contains(body, "bytes 1-2/20\r\n") || !strings.Contains(body, "\r\n\r\n12\r\n") || !strings.Contains(body, "\r\n\r\n567\r\n") {
			t.Errorf("If-Range %q: %d %v %q", ifRange, status, h, body)
		}
	}
}

// A body that cannot be completed is not ended as if it were.
func TestWhatIsCutIsSeenToBeCut(t *testing.T) {
	s := server(t)
	for _, ranges := range []string{"", "bytes=5-15", "bytes=0-1,9-12"} {
		r, _ := http.NewRequest("GET", s.URL+"/short", nil)
		if ranges != "" {
			r.Header.Set("Range", ranges)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			continue // not even the header came, which is as good
		}
		if _, err := io.ReadAll(answer.Body); err == nil {
			t.Errorf("%q: the answer ended well", ranges)
		}
		answer.Body.Close()
	}
}

func get(t *testing.T, url string, header []string) (int, http.Header, string) {
	t.Helper()
	r, _ := http.NewRequest("GET", url, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, answer.Header, string(body)
}
