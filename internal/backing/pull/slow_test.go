package pull_test

import (
	"bytes"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing/pull"
)

// TestStall: a server that sends nothing any more is asked again.
func TestStall(t *testing.T) {
	data := random(8, 2*mib)
	over := make(chan struct{})
	var stalled atomic.Bool
	u := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !stalled.CompareAndSwap(false, true) {
				return false
			}
			w.Header().Set("ETag", u.etag)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", mib-1, len(data)))
			w.Header().Set("Content-Length", fmt.Sprint(mib))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(data[:1000])
			http.NewResponseController(w).Flush()
			<-over
			return true
		}
	})
	t.Cleanup(func() { close(over) })
	c := open(t, pull.Request{URLs: []string{u.URL}, Stall: 200 * time.Millisecond})
	got, err := fetch(t.Context(), newTable(t, t.TempDir()), c, nil)
	if err != nil || !bytes.Equal(got, data) || !stalled.Load() {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}

// TestTrickle: a server that sends a little now and then is given up like one that sends
// nothing.
func TestTrickle(t *testing.T) {
	data := random(8, 2*mib)
	over := make(chan struct{})
	var slow atomic.Bool
	u := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !slow.CompareAndSwap(false, true) {
				return false
			}
			w.Header().Set("ETag", u.etag)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", mib-1, len(data)))
			w.Header().Set("Content-Length", fmt.Sprint(mib))
			w.WriteHeader(http.StatusPartialContent)
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for at := range mib {
				select {
				case <-tick.C:
				case <-r.Context().Done():
					return true
				case <-over:
					return true
				}
				w.Write(data[at : at+1])
				http.NewResponseController(w).Flush()
			}
			return true
		}
	})
	t.Cleanup(func() { close(over) })
	c := open(t, pull.Request{URLs: []string{u.URL}, Stall: 200 * time.Millisecond})
	got, err := fetch(t.Context(), newTable(t, t.TempDir()), c, nil)
	if err != nil || !bytes.Equal(got, data) || !slow.Load() {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}
