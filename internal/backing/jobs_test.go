package backing_test

import (
	"encoding/binary"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
)

// TestCompat: what Longhorn cannot use is taken where the configuration says so, and
// tells why; what is dangerous is never taken.
func TestCompat(t *testing.T) {
	backed := make([]byte, 1<<16) // qcow2, version 3, with the name of another file
	copy(backed, "QFI\xfb")
	for at, v := range map[int]uint32{4: 3, 12: 0x70, 16: 4, 20: 16, 100: 104} {
		binary.BigEndian.PutUint32(backed[at:], v)
	}
	copy(backed[0x70:], "base")
	for compat, taken := range map[backing.Compat]bool{backing.Enforce: false, backing.Warn: true, backing.Off: true} {
		t.Run(string(compat), func(t *testing.T) {
			s := newShelf(t)
			s.set.Compat = compat
			s.Set(s.set)
			odd := append(rawDisk(1), 1)
			v, created, err := s.upload(backing.Draft{Name: "a"}, odd)
			if !taken {
				is(t, err, backing.NotAligned)
			} else if err != nil || !created || v.Probe.Longhorn.Compatible || len(v.Probe.Longhorn.Problems) == 0 {
				t.Errorf("%+v, %v", v, err)
			} else {
				s.reads(v, odd)
			}
			_, _, err = s.upload(backing.Draft{Name: "b"}, backed)
			is(t, err, backing.BackingFile)
		})
	}
}

// TestPullGivesUp: a pull whose source fails is tried again for a day, and later each
// time; a job that has ended is told of for a day.
func TestPullGivesUp(t *testing.T) {
	var later atomic.Int64
	s := newShelf(t)
	s.stop()
	s.now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	s.start()
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer server.Close()
	j, err := s.Pull(t.Context(), backing.Draft{Name: "a"}, backing.Source{URL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	var waits []time.Duration
	for is, err := range s.WatchJob(t.Context(), j.ID) {
		if err != nil {
			t.Fatal(err)
		}
		if is.Retry.IsZero() {
			continue
		}
		if is.Error == "" {
			t.Errorf("nobody is told why: %+v", is)
		}
		if wait := is.Retry.Sub(j.Created); len(waits) == 0 || wait > waits[len(waits)-1] {
			waits = append(waits, wait)
		}
		if len(waits) == 2 {
			later.Store(int64(25 * time.Hour))
		}
	}
	end, err := s.Job(t.Context(), j.ID)
	if err != nil || end.State != backing.JobFailed || end.Code != backing.UpstreamError || len(waits) < 2 || asked.Load() < 3 {
		t.Errorf("%+v, %v; after %v, asked %d times", end, err, waits, asked.Load())
	}
	if waits[1]-waits[0] < 2*time.Second { // behind the first, and twice as long
		t.Errorf("it is tried again after %v", waits)
	}
	s.restart()
	if _, err := s.Job(t.Context(), j.ID); err != nil {
		t.Error(err)
	}
	later.Add(int64(25 * time.Hour))
	s.restart()
	for {
		_, err := s.Job(t.Context(), j.ID)
		if err != nil {
			is(t, err, backing.NotFound)
			break
		}
	}
	if left := s.left("mirror/local/backing-images/jobs"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
