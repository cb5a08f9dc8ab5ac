package s3

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// TestLateAnswers: an answer that S3 gave before a deletion, and that comes after it,
// is not believed.
func TestLateAnswers(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	let := make(chan struct{})
	// The index is not complete, so that S3 is asked.
	end := d.Strike(s3double.Fault{Op: s3double.ListObjectsV2, Hold: let})
	key, data := blobOf("blob", 1000)
	d.Write(linkOf("a"), []byte("sha256:x"))
	d.Write(key, data)
	st, err := d.open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := st.(*store)
	late := make(chan struct{})
	endLate := d.Strike(s3double.Fault{Op: s3double.GetObject, Key: "docker/", Hold: late})
	var readers sync.WaitGroup
	for _, key := range []string{linkOf("a"), key} {
		readers.Go(func() {
			if _, err := s.Get(t.Context(), key, 1<<20); err != nil {
				t.Errorf("Get: %v", err)
			}
		})
	}
	d.Await(t, "two answers that are held", func(calls []s3double.Call) bool {
		held := 0
		for _, call := range calls {
			if call.Op == s3double.GetObject && call.Held {
				held++
			}
		}
		return held == 2
	})
	for _, key := range []string{linkOf("a"), key} {
		if err := s.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	endLate()
	close(late)
	readers.Wait()
	for _, key := range []string{linkOf("a"), key} {
		wantNothing(t, s, key)
		if isThere := func() bool { _, err := s.near.Stat(t.Context(), key); return err == nil }(); isThere {
			t.Errorf("%s is near after its deletion", key)
		}
	}
	end()
	close(let)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{linkOf("a"), key} {
		wantNothing(t, s, key)
	}
	closed(t, s)
}

// TestDeletionWaits: an upload that S3 has been sent is not followed by the value.
func TestDeletionWaits(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("blob", 1000)
	let := make(chan struct{})
	end := d.Strike(s3double.Fault{Op: s3double.PutObject, Hold: let, Key: "docker/"})
	mustPut(t, s, key, data, storage.Lazy)
	d.Await(t, "an upload", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Held })
	})
	// Who waits for it gives up, and so does who deletes.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Sync(gone, key); !errors.Is(err, context.Canceled) {
		t.Errorf("Sync: %v", err)
	}
	if err := s.Delete(gone, key); !errors.Is(err, context.Canceled) {
		t.Errorf("Delete: %v", err)
	}
	wantValue(t, s, key, data)
	deleted := make(chan error, 1)
	go func() { deleted <- s.Delete(context.Background(), key) }()
	eventually(t, "a deletion that waits", func() error {
		if !awaitsDeletion(s, key) {
			return errors.New("it does not")
		}
		return nil
	})
	end()
	close(let)
	if err := <-deleted; err != nil {
		t.Error(err)
	}
	wantNothing(t, s, key)
	if calls := contentCalls(d); !slices.Equal(calls[len(calls)-2:], []string{"PutObject " + key, "DeleteObject " + key}) {
		t.Errorf("S3 was asked for %q", calls)
	}
	if _, ok := d.Read(key); ok {
		t.Error("the bucket has it")
	}
}

// awaitsDeletion reports whether somebody waits for the slot of a key to delete it.
func awaitsDeletion(s *store, key string) bool {
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.states[key]
	return st != nil && st.deletes > 0
}

// TestPartsGiveWay: a deletion does not wait for parts that are on their way, and
// nothing is left of them. Who wants the value nevertheless gets it to the bucket.
func TestPartsGiveWay(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("large", 31<<20)
	let := make(chan struct{})
	defer close(let)
	end := d.Strike(s3double.Fault{Op: s3double.UploadPart, Hold: let})
	held := func() {
		t.Helper()
		d.Await(t, "parts on their way", func(calls []s3double.Call) bool {
			n := 0
			for _, call := range calls {
				if call.Held {
					n++
				}
			}
			return n == partsAtOnce
		})
	}
	mustPut(t, s, key, data, storage.Lazy)
	held()
	soon, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Delete(soon, key); err != nil {
		t.Fatalf("Delete: %v", err)
	}
	wantNothing(t, s, key)
	uploaded(t, s)
	if left := d.Uploads(); len(left) > 0 {
		t.Errorf("uploads are left: %v", left)
	}
	if n := d.Count(s3double.CompleteMultipartUpload); n > 0 {
		t.Error("what was to be deleted was completed")
	}
	d.Forget()
	mustPut(t, s, key, data, storage.Lazy)
	held()
	gone, give := context.WithCancel(t.Context())
	give()
	if err := s.Delete(gone, key); !errors.Is(err, context.Canceled) {
		t.Errorf("Delete: %v", err)
	}
	end()
	uploaded(t, s)
	if got, _ := d.Read(key); !bytes.Equal(got, data) {
		t.Errorf("the bucket has %d bytes", len(got))
	}
}

// TestPutDuringDeletion: what is put while S3 deletes stays.
func TestPutDuringDeletion(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("blob", 1000)
	for key, values := range map[string][2][]byte{key: {data, data}, linkOf("a"): {[]byte("sha256:x"), []byte("sha256:y")}} {
		mustPut(t, s, key, values[0], storage.Durable)
		let := make(chan struct{})
		end := d.Strike(s3double.Fault{Op: s3double.DeleteObject, Key: key, Hold: let})
		deleted := make(chan error, 1)
		go func() { deleted <- s.Delete(context.Background(), key) }()
		d.Await(t, "a deletion", func(calls []s3double.Call) bool {
			return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Held && c.Key == key })
		})
		mustPut(t, s, key, values[1], storage.Lazy)
		end()
		close(let)
		if err := <-deleted; err != nil {
			t.Fatal(err)
		}
		wantValue(t, s, key, values[1])
		if err := s.Sync(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if got, _ := d.Read(key); !bytes.Equal(got, values[1]) {
			t.Errorf("the bucket has %.20q under %s", got, key)
		}
	}
}

// TestDeletionGoesOn: a deletion that S3 has been asked for does not end with who
// wanted it, or it could come behind a later Put.
func TestDeletionGoesOn(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("blob", 1000)
	mustPut(t, s, key, data, storage.Durable)
	let := make(chan struct{})
	end := d.Strike(s3double.Fault{Op: s3double.DeleteObject, Key: key, Hold: let})
	ctx, cancel := context.WithCancel(t.Context())
	deleted := make(chan error, 1)
	go func() { deleted <- s.Delete(ctx, key) }()
	d.Await(t, "a deletion", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Held && c.Key == key })
	})
	cancel()
	put := make(chan error, 1)
	go func() { put <- s.Put(t.Context(), key, data, storage.Durable) }()
	end()
	close(let)
	if err := <-deleted; err != nil {
		t.Errorf("the deletion ended early: %v", err)
	}
	if err := <-put; err != nil {
		t.Error(err)
	}
	if _, there := d.Read(key); !there {
		t.Error("what was put afterwards is gone")
	}
}

// TestPutDuringUpload: what is put while an older value is on its way follows it.
func TestPutDuringUpload(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, let := linkOf("a"), make(chan struct{})
	end := d.Strike(s3double.Fault{Op: s3double.PutObject, Key: key, Hold: let})
	mustPut(t, s, key, []byte("sha256:1"), storage.Lazy)
	d.Await(t, "an upload", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Held })
	})
	mustPut(t, s, key, []byte("sha256:2"), storage.Lazy)
	end()
	close(let)
	uploaded(t, s)
	wantValue(t, s, key, []byte("sha256:2"))
	if got, _ := d.Read(key); string(got) != "sha256:2" {
		t.Errorf("the bucket has %q", got)
	}
}
