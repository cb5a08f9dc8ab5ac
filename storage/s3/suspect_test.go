package s3

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// TestSuspect: a mark that a killed process has left turns nothing down that can be
// answered without S3, while S3 is down; that of a process that lives does.
func TestSuspect(t *testing.T) {
	for name, lives := range map[string]bool{"killed": false, "alive": true} {
		t.Run(name, func(t *testing.T) {
			d := newDouble(t, s3double.Options{}, func(s *S3) { s.PushAck = "local" })
			c := &clock{now: time.Now()}
			a := still(t, d, t.TempDir(), c)
			if err := a.Listed(t.Context()); err != nil {
				t.Fatal(err)
			}
			key, data := blobOf("blob", 1000)
			mustPut(t, a, key, data, storage.Lazy)
			mustPut(t, a, linkOf("a"), []byte("sha256:1"), storage.Lazy)
			uploaded(t, a)
			if lives {
				defer closed(t, a)
			} else {
				abandon(t, a)
			}

			b := still(t, d, t.TempDir(), c)
			defer closed(t, b)
			wantShared(t, "at once", b, true)
			if err := b.Relist(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantValue(t, b, linkOf("a"), []byte("sha256:1"))
			if lives {
				beat(t, a, b)
			}
			c.pass(anew)
			d.Down()
			value, err := b.Get(t.Context(), linkOf("a"), 100)
			if lives {
				if !errors.Is(err, storage.ErrUnavailable) {
					t.Errorf("with another that lives: %q, %v", value, err)
				}
				d.Up(t)
				b.bucket.breaker.answered()
				return
			}
			if string(value) != "sha256:1" || err != nil {
				t.Errorf("of a link: %q, %v", value, err)
			}
			if _, err := b.Stat(t.Context(), key); err != nil {
				t.Errorf("of a blob: %v", err)
			}
			wantNothing(t, b, linkOf("b"))
			listed := 0
			for _, err := range b.List(t.Context(), "docker/", true) {
				if err != nil {
					t.Error(err)
				}
				listed++
			}
			if listed != 2 {
				t.Errorf("%d values are listed", listed)
			}
			pushed, data := blobOf("pushed", 1000)
			mustPut(t, b, pushed, data, storage.Durable)
			mustPut(t, b, linkOf("b"), []byte("sha256:2"), storage.Durable)
			wantShared(t, "while S3 is down", b, true)

			// S3 answers again, and is asked.
			d.Up(t)
			d.Write(linkOf("a"), []byte("sha256:3"))
			b.bucket.breaker.answered()
			c.pass(anew)
			wantValue(t, b, linkOf("a"), []byte("sha256:3"))
			c.pass(deadAfter)
			beat(t, b)
			wantShared(t, "half a minute later", b, false)
		})
	}
}

// TestUnprovenBesideAnother: beside the mark of another what is pending is uploaded, in
// its order, whatever becomes of the other.
func TestUnprovenBesideAnother(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	a := still(t, d, dir, c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.Down()
	key, data := blobOf("blob", 1000)
	mustPut(t, a, key, data, storage.Lazy)
	mustPut(t, a, linkOf("a"), []byte("sha256:1"), storage.Lazy)
	dir = abandon(t, a)
	d.Up(t)
	// It has come and is killed, and has not written last for all that is known.
	m, _ := d.Read(ownerKey)
	d.Write(ownerKey, []byte(strings.Replace(string(m), `{"owners":{`, `{"owners":{"another":{"beat":7},`, 1)))
	d.Forget()
	a = still(t, d, dir, c)
	defer closed(t, a)
	wantShared(t, "beside the other", a, true)
	uploaded(t, a)
	var puts []string
	for _, call := range contentCalls(d, s3double.PutObject) {
		puts = append(puts, strings.TrimPrefix(call, "PutObject "))
	}
	if !slices.Equal(puts, []string{key, linkOf("a")}) {
		t.Errorf("S3 was sent %q", puts)
	}
}

// TestLinksWaitForTheMarks: what was believed while S3 could not be asked may not be so:
// links wait until it is known which blobs another has taken away.
func TestLinksWaitForTheMarks(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	a := still(t, d, dir, c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, data := blobOf("blob", 1000)
	mustPut(t, a, key, data, storage.Durable)
	closed(t, a)
	for _, meanwhile := range []bool{true, false} {
		link := linkOf(fmt.Sprint(meanwhile))
		if meanwhile {
			d.Remove(key)
			d.Write(ownerKey, []byte(`{"last":"another"}`))
		}
		d.Down()
		a = still(t, d, dir, c)
		mustPut(t, a, link, []byte("sha256:1"), storage.Lazy)
		d.Up(t)
		d.Forget()
		eventually(t, "an upload", func() error { // which wakes the others
			return a.Put(t.Context(), linkOf("waited for"), fmt.Append(nil, time.Now()), storage.Durable)
		})
		eventually(t, "a beat", func() error { return a.beatOnce(t.Context()) })
		uploaded(t, a)
		var puts []string
		for _, call := range contentCalls(d, s3double.PutObject) {
			if call = strings.TrimPrefix(call, "PutObject "); call == key || call == link {
				puts = append(puts, call)
			}
		}
		want := []string{link}
		if meanwhile {
			want = []string{key, link}
		}
		if !slices.Equal(puts, want) {
			t.Errorf("meanwhile %v: S3 was sent %q", meanwhile, puts)
		}
		closed(t, a)
	}
}

// TestLeaving: who leaves takes its mark away, also that of an earlier process which was
// killed, and does not say that it was the last to write when it was not.
func TestLeaving(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	a := still(t, d, dir, c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir = abandon(t, a)
	d.Down()
	a = still(t, d, dir, c) // it cannot leave a mark
	d.Up(t)
	eventually(t, "an answer", func() error {
		m, err := a.readMarks(t.Context())
		if err == nil && len(m.Owners) != 1 {
			t.Fatalf("the marks are %+v", m)
		}
		return err
	})
	closed(t, a)
	b := still(t, d, t.TempDir(), c)
	wantShared(t, "after the first has gone", b, false)
	if err := b.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	closed(t, b)

	a = still(t, d, dir, c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	b = still(t, d, t.TempDir(), c)
	mustPut(t, b, linkOf("b"), []byte("sha256:1"), storage.Durable)
	closed(t, b)
	closed(t, a)
	a = still(t, d, dir, c)
	defer closed(t, a)
	wantValue(t, a, linkOf("b"), []byte("sha256:1"))
}
