package s3

import (
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// cutPut puts a link that S3 does not say it has, and deletes it. It returns what the
// server does late.
func cutPut(t *testing.T, d *double, s *store, name string) (late func()) {
	t.Helper()
	end := d.Strike(s3double.Fault{Op: s3double.PutObject, Key: name, Status: 403, Code: "SignatureDoesNotMatch"})
	defer end()
	if err := s.Put(t.Context(), linkOf(name), []byte("sha256:1"), storage.Durable); !errors.Is(err, storage.ErrUnavailable) {
		t.Fatalf("Put: %v", err)
	}
	if err := s.Delete(t.Context(), linkOf(name)); err != nil {
		t.Fatal(err)
	}
	return func() { d.Write(linkOf(name), []byte("sha256:1")) }
}

// TestLatePut: what was being stored when the call was cut, and was deleted then, is not
// in the bucket for ever, whenever the server gets to it. What others may have put is.
func TestLatePut(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	s := still(t, d, dir, c)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	deletions := func(name string) (n int) {
		for _, call := range contentCalls(d, s3double.DeleteObject) {
			if call == s3double.DeleteObject+" "+linkOf(name) {
				n++
			}
		}
		return n
	}
	want := func(when, name string, there bool, times int) {
		t.Helper()
		if _, is := d.Read(linkOf(name)); is != there {
			t.Errorf("%s: the bucket has %s: %v", when, name, is)
		}
		if n := deletions(name); n != times {
			t.Errorf("%s: %s has been deleted %d times, want %d", when, name, n, times)
		}
	}

	late := cutPut(t, d, s, "a")
	mustPut(t, s, linkOf("b"), []byte("sha256:1"), storage.Durable)
	if err := s.Delete(t.Context(), linkOf("b")); err != nil {
		t.Fatal(err)
	}
	cutPut(t, d, s, "c")
	late()
	c.pass(settle - time.Second)
	s.deleteAgain(t.Context())
	want("too early", "a", true, 1)
	closed(t, s)

	// The next process knows of it.
	s = still(t, d, dir, c)
	mustPut(t, s, linkOf("c"), []byte("sha256:2"), storage.Durable)
	c.pass(time.Second)
	end := d.Strike(s3double.Fault{Op: s3double.DeleteObject, Status: 403, Code: "AccessDenied"})
	s.deleteAgain(t.Context())
	want("when it is refused", "a", true, 2)
	end()
	s.deleteAgain(t.Context())
	want("in time", "a", false, 3)
	want("of what was answered", "b", false, 1)
	want("of what was put anew", "c", true, 1)
	wantNothing(t, s, linkOf("a"))
	c.pass(settle)
	s.deleteAgain(t.Context())
	want("later", "a", false, 3)

	// Another process may have put it.
	cutPut(t, d, s, "d")
	other := still(t, d, t.TempDir(), c)
	beat(t, s)
	mustPut(t, other, linkOf("d"), []byte("sha256:3"), storage.Durable)
	c.pass(settle)
	s.deleteAgain(t.Context())
	want("beside another", "d", true, 1)
	if err := s.removeLate(t.Context(), linkOf("d")); err != nil {
		t.Fatal(err)
	}
	want("beside another, found before", "d", true, 1)
	closed(t, other)
	for range missedRead {
		beat(t, s)
	}
	wantShared(t, "alone again", s, false)
	if err := s.removeLate(t.Context(), linkOf("d")); err != nil {
		t.Fatal(err)
	}
	s.deleteAgain(t.Context())
	want("after another", "d", true, 1)
	mustPut(t, s, linkOf("f"), []byte("sha256:1"), storage.Durable)
	if err := s.removeLate(t.Context(), linkOf("f")); err != nil {
		t.Fatal(err)
	}
	want("what has come since it was found", "f", true, 0)
	late = cutPut(t, d, s, "e")
	late()
	closed(t, s)
	other = still(t, d, t.TempDir(), c)
	closed(t, other)
	s = still(t, d, dir, c)
	c.pass(settle)
	if err := s.removeLate(t.Context(), linkOf("e")); err != nil {
		t.Fatal(err)
	}
	if again, err := s.index.forget(s.now()); err != nil || len(again) > 0 {
		t.Errorf("%q are kept in mind, %v", again, err)
	}
	want("another was there in between", "e", true, 1)
	closed(t, s)
}

// TestCloseTellsWhatWaits: nobody takes a bucket for whole that is not.
func TestCloseTellsWhatWaits(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	for _, waits := range []bool{false, true} {
		s := still(t, d, t.TempDir(), &clock{now: time.Now()})
		if err := s.Listed(t.Context()); err != nil {
			t.Fatal(err)
		}
		core, logged := observer.New(zap.WarnLevel)
		s.log = zap.New(core)
		end := func() {}
		if waits {
			end = d.Strike(s3double.Fault{Op: s3double.PutObject, Key: "docker/", Status: 403, Code: "SignatureDoesNotMatch"})
		}
		mustPut(t, s, linkOf("a"), []byte("sha256:1"), storage.Lazy)
		if !waits {
			uploaded(t, s)
		}
		closed(t, s)
		end()
		told := logged.FilterMessageSnippet("not in the bucket yet").All()
		if len(told) != map[bool]int{true: 1}[waits] || waits && told[0].ContextMap()["values"] != int64(1) {
			t.Errorf("with something that waits, %v: %v", waits, told)
		}
	}
}
