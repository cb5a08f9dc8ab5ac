package pull_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing/pull"
)

// TestRedirectStalls: nobody waits for the body of a redirect.
func TestRedirectStalls(t *testing.T) {
	data := random(12, 2*mib)
	over := make(chan struct{})
	u := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/from" {
				return false
			}
			if r.Method == http.MethodHead { // whose redirect has no body
				w.WriteHeader(http.StatusMethodNotAllowed)
				return true
			}
			w.Header().Set("Location", "/to")
			w.Header().Set("Content-Length", "1000")
			w.WriteHeader(http.StatusFound)
			http.NewResponseController(w).Flush()
			select {
			case <-over:
			case <-r.Context().Done():
			}
			return true
		}
	})
	t.Cleanup(func() { close(over) })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := pull.Open(ctx, pull.Request{URLs: []string{u.URL + "/from"}, AllowPrivate: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := fetch(ctx, newTable(t, t.TempDir()), c, nil)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}

// TestLies: what a server says that does not fit together becomes no file of other bytes,
// and a server that says so once is asked again.
func TestLies(t *testing.T) {
	data := random(13, 3*mib)
	span := func(r *http.Request) (from, to int64) {
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
			return 0, int64(len(data)) - 1
		}
		return from, to
	}
	part := func(w http.ResponseWriter, text string, length int64) {
		w.Header().Set("ETag", `"one"`)
		w.Header().Set("Content-Range", text)
		if length >= 0 {
			w.Header().Set("Content-Length", fmt.Sprint(length))
		}
		w.WriteHeader(http.StatusPartialContent)
	}
	for name, lie := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request)
		want   error // nil: it is pulled in the end
	}{
		"one further": {func(w http.ResponseWriter, r *http.Request) {
			from, to := span(r)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from+1, to, len(data)), to-from)
			w.Write(data[from+1 : to+1])
		}, nil},
		"one before": {func(w http.ResponseWriter, r *http.Request) { // of which the first is not wanted
			from, to := span(r)
			from = max(0, from-1)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from, to, len(data)), to+1-from)
			w.Write(data[from : to+1])
		}, nil},
		"more than was asked for": {func(w http.ResponseWriter, r *http.Request) {
			from, _ := span(r)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from, len(data), len(data)+1), int64(len(data))+1-from)
		}, pull.ErrChanged},
		"another total": {func(w http.ResponseWriter, r *http.Request) {
			from, to := span(r)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from, to, len(data)+7), to+1-from)
			w.Write(data[from : to+1])
		}, pull.ErrChanged},
		"another length": {func(w http.ResponseWriter, r *http.Request) {
			from, to := span(r)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from, to, len(data)), 10)
			w.Write(data[:10])
		}, nil},
		"nonsense": {func(w http.ResponseWriter, r *http.Request) { part(w, "bytes 9223372036854775807-1/*", -1) }, nil},
		"more bytes than it says": {func(w http.ResponseWriter, r *http.Request) {
			from, to := span(r)
			part(w, fmt.Sprintf("bytes %d-%d/%d", from, to, len(data)), -1)
			w.Write(data[from : to+1])
			w.Write(data[:1000])
		}, nil},
		"a weak validator that changes": {func(w http.ResponseWriter, r *http.Request) {
			from, to := span(r)
			w.Header().Set("ETag", `W/"one"`)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(bytes.Repeat([]byte{0}, int(to+1-from)))
		}, pull.ErrChanged},
		"a header without end": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", 1<<20))
			w.WriteHeader(http.StatusOK)
		}, nil},
		"redirects in a circle": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/x", http.StatusFound)
		}, errAny},
		"a body without end": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"one"`)
			w.WriteHeader(http.StatusOK)
			w.Write(data)
			for r.Context().Err() == nil {
				if _, err := w.Write(data[:1000]); err != nil {
					return
				}
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var lied atomic.Bool
			u := serve(t, data, func(u *unkind) {
				u.before = func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method == http.MethodHead || lie.want == nil && !lied.CompareAndSwap(false, true) {
						return false
					}
					lied.Store(true)
					lie.answer(w, r)
					return true
				}
			})
			c := open(t, pull.Request{URLs: []string{u.URL + "/x"}})
			got, err := fetch(t.Context(), newTable(t, t.TempDir()), c, nil)
			switch {
			case !lied.Load():
				t.Error("it was not asked")
			case lie.want == errAny && err != nil:
			case !errors.Is(err, lie.want):
				t.Errorf("want %v: %v", lie.want, err)
			case err == nil && !bytes.Equal(got, data):
				t.Errorf("%d bytes that are not the file", len(got))
			}
		})
	}
}

var errAny = errors.New("any")
