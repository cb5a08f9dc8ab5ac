package s3

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// A line is a queue whose values are known already, and a time.
type line struct {
	*queue
	t   *testing.T
	now time.Time
}

func newLine(t *testing.T) *line {
	l := &line{newQueue(), t, time.Now()}
	l.release(unmet | unproven)
	return l
}

// takes takes a value, and fails if it is another's turn.
func (l *line) takes(want string) {
	l.t.Helper()
	if key, wait, ok := l.next(l.now); !ok || key != want {
		l.t.Fatalf("the next is %q (%v, in %v), want %s", key, ok, wait, want)
	}
}

func (l *line) waits(want time.Duration) {
	l.t.Helper()
	if key, wait, ok := l.next(l.now); ok || wait != want {
		l.t.Fatalf("the next is %q (%v), in %v, want none for %v", key, ok, wait, want)
	}
}

func (l *line) gives(key string, err error) { l.back(key, err, l.now) }

var errRefused = errors.New("refused")

var errAway = fmt.Errorf("%w: no answer", storage.ErrUnavailable)

// TestQueuePauses: while S3 does not answer nothing is sent, for longer each time, and
// one answer ends that.
func TestQueuePauses(t *testing.T) {
	l := newLine(t)
	l.add("blob", true)
	for want := shortPause; want < 4*longPause; want *= 2 {
		l.takes("blob")
		l.gives("blob", errAway)
		l.waits(min(want, longPause))
		l.now = l.now.Add(min(want, longPause))
	}
	l.takes("blob")
	l.gives("blob", errAway)
	l.answered()
	l.takes("blob")
	l.gives("blob", errAway)
	l.waits(shortPause)
}

// TestQueuePassesBy: what fails while S3 answers others holds up nothing that came after
// it, be it a blob or what waits for one.
func TestQueuePassesBy(t *testing.T) {
	for _, err := range []error{errRefused, errAway} {
		l := newLine(t)
		l.add("bad", true)
		l.add("link", false)
		l.add("good", true)
		l.takes("bad")
		l.takes("good")
		l.answered()
		l.gives("bad", err)
		l.takes("link")
		l.gives("good", nil)
		l.remove("good")
		l.gives("link", nil)
		l.remove("link")
		l.waits(retryAfterFailure)
		l.now = l.now.Add(retryAfterFailure)
		l.takes("bad")
		l.gives("bad", errTaken)
		l.waits(retryTaken)
		l.add("bad", true)
		l.takes("bad")
	}
}

// TestQueueOrder: what is no blob waits for the blobs that came before it, and for those
// alone; at first for all.
func TestQueueOrder(t *testing.T) {
	l := &line{newQueue(), t, time.Now()}
	l.add("link", false)
	l.waits(time.Hour)
	l.add("blob", true)
	l.release(unproven)
	if !l.holds() {
		t.Error("nothing is held, though not all is known")
	}
	l.takes("blob")
	l.release(unmet)
	l.waits(time.Hour)
	l.add("later", true)
	l.gives("blob", nil)
	l.remove("blob")
	l.takes("later")
	l.takes("link")
	l.release(unmet) // again, to no effect
	l.waits(time.Hour)
}

// TestTrustedAnew: bytes that were found wrong are right once they have been stored again.
func TestTrustedAnew(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("blob", 1000)
	s.Distrust(key) // which has no entry
	mustPut(t, s, key, data, storage.Durable)
	if _, err := s.Presign(t.Context(), "GET", key, time.Minute); err != nil {
		t.Errorf("Presign: %v", err)
	}
	d.Forget()
	mustPut(t, s, key, data, storage.Durable)
	if calls := contentCalls(d); len(calls) > 0 {
		t.Errorf("what the bucket has is sent again: %q", calls)
	}
}

// TestCutObjects: what the bucket has under a blob's key, but not as long, is replaced,
// whether that is known or asked for.
func TestCutObjects(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	known, data := blobOf("known", 1000)
	d.Write(known, data[:500])
	c := &clock{now: time.Now()}
	s := still(t, d, t.TempDir(), c)
	defer closed(t, s)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, known, data, storage.Durable)
	d.whole(t, known, data)
	other := still(t, d, t.TempDir(), c)
	defer closed(t, other)
	asked, data := blobOf("asked", 1000)
	d.Write(asked, data[:500])
	mustPut(t, other, asked, data, storage.Durable)
	d.whole(t, asked, data)
}

// syncing tells what has been synced.
type syncing struct {
	storage.Store
	keys []string
}

func (s *syncing) Sync(ctx context.Context, keys ...string) error {
	s.keys = append(s.keys, keys...)
	return s.Store.Sync(ctx, keys...)
}

// TestSyncedNear: a near file that is gone stays so over a loss of power, when that has been
// told to be durable: it would be taken for newer than the bucket's. With push_ack local
// what is near is all there is.
func TestSyncedNear(t *testing.T) {
	key, data := blobOf("blob", 1000)
	for _, near := range []bool{false, true} {
		d := newDouble(t, s3double.Options{}, func(s *S3) {
			if near {
				s.PushAck = "local"
			}
		})
		s := still(t, d, t.TempDir(), &clock{now: time.Now()})
		if err := s.Listed(t.Context()); err != nil {
			t.Fatal(err)
		}
		synced := &syncing{Store: s.near}
		s.listing.slot <- struct{}{} // nobody looks at what is near meanwhile
		s.near = synced
		<-s.listing.slot
		mustPut(t, s, linkOf("a"), []byte("sha256:1"), storage.Durable)
		mustPut(t, s, key, data, storage.Durable)
		if !slices.Contains(synced.keys, linkOf("a")) || near && !slices.Contains(synced.keys, key) {
			t.Errorf("push_ack local is %v: synced %q", near, synced.keys)
		}
		uploaded(t, s)
		closed(t, s)
	}
}
