package s3

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// TestTidyingEndsNothingNew: whoever ends an upload that an earlier process has left
// does not end the next one of the key.
func TestTidyingEndsNothingNew(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("large", 11<<20)
	upload, begun, err := s.bucket.create(t.Context(), key)
	if err == nil {
		err = s.ledger(key).write(parts{Upload: upload, Begun: begun, Sum: "another", Size: smallestPart, ETags: make([]string, 3)})
	}
	if err != nil {
		t.Fatal(err)
	}
	d.Forget()
	abort, part := make(chan struct{}), make(chan struct{})
	defer d.Strike(s3double.Fault{Op: s3double.AbortMultipartUpload, Count: 1, Hold: abort})()
	defer d.Strike(s3double.Fault{Op: s3double.UploadPart, Hold: part})()
	tidied := make(chan map[string]bool)
	go func() { tidied <- s.tidyLedgers(t.Context()) }()
	held := func(op string) func([]s3double.Call) bool {
		return func(calls []s3double.Call) bool {
			return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Op == op && c.Held })
		}
	}
	d.Await(t, "the end of the old upload", held(s3double.AbortMultipartUpload))
	mustPut(t, s, key, data, storage.Lazy)
	// An upload that does not wait has a second to begin.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i := 0; i < 50 && d.Count(s3double.UploadPart) == 0; i++ {
		<-tick.C
	}
	close(abort)
	<-tidied
	d.Await(t, "a part", held(s3double.UploadPart))
	if p := s.ledger(key).read(); p.Upload == "" || !slices.Contains(d.Uploads()[key], p.Upload) {
		t.Errorf("the ledger says %+v; S3 has %v", p, d.Uploads())
	}
	close(part)
	uploaded(t, s)
	d.whole(t, key, data)
}

// TestLedgersBeingWritten: what is half written is left alone, but at the start.
func TestLedgersBeingWritten(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	half := filepath.Join(s.ledgers(), "x.json.new")
	if err := os.WriteFile(half, []byte(`{"key":`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.tidyLedgers(t.Context())
	if _, err := os.Stat(half); err != nil {
		t.Error("what somebody was writing was removed")
	}
	closed(t, s)
	closed(t, listedAt(t, d, dir))
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what a killed process was writing is still there: %v", err)
	}
}

// TestUnreadableIndex: what the index cannot tell is not taken for absent.
func TestUnreadableIndex(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Durable)
	err := s.index.update(func(tx *bolt.Tx) error { return tx.Bucket(entriesName).Put([]byte(linkOf("a")), []byte{0xff}) })
	if err != nil {
		t.Fatal(err)
	}
	wantValue(t, s, linkOf("a"), []byte("sha256:x"))
	d.Write(linkOf("b"), []byte("sha256:y"))
	closed(t, s)
	for _, key := range []string{linkOf("a"), linkOf("b")} {
		if _, err := s.Get(context.Background(), key, 100); errors.Is(err, fs.ErrNotExist) {
			t.Errorf("of %s, after the end: %v", key, err)
		}
	}
	s.bucket.close()
}

// TestDeleteWithoutAbort: a value can be deleted by who may not end its upload in parts.
func TestDeleteWithoutAbort(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("large", 1000)
	mustPut(t, s, key, data, storage.Durable)
	upload, begun, err := s.bucket.create(t.Context(), key)
	if err == nil {
		err = s.ledger(key).write(parts{Upload: upload, Begun: begun, Sum: "another", Size: smallestPart, ETags: make([]string, 3)})
	}
	if err != nil {
		t.Fatal(err)
	}
	defer d.Strike(s3double.Fault{Op: s3double.AbortMultipartUpload, Status: 403, Code: "AccessDenied"})()
	if err := s.Delete(t.Context(), key); err != nil {
		t.Errorf("Delete: %v", err)
	}
	if p := s.ledger(key).read(); p.Upload != "" {
		t.Errorf("the ledger says %+v", p)
	}
}

// begun is an upload in parts under a key, of which the ledger tells.
func begun(t *testing.T, s *store, key string) (upload string) {
	t.Helper()
	upload, at, err := s.bucket.create(t.Context(), key)
	if err == nil {
		err = s.ledger(key).write(parts{Upload: upload, Begun: at, Sum: "another", Size: smallestPart, ETags: make([]string, 3)})
	}
	if err != nil {
		t.Fatal(err)
	}
	return upload
}

// TestLedgerUntilAborted: as long as S3 does not answer, it is not forgotten what has to be
// ended there, and what is another key's is not taken for one's own.
func TestLedgerUntilAborted(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	key, data := blobOf("large", 1000)
	mustPut(t, s, key, data, storage.Durable)
	upload := begun(t, s, key)
	end := d.Strike(s3double.Fault{Op: s3double.AbortMultipartUpload, Status: 503, Code: "SlowDown"})
	if err := s.Delete(t.Context(), key); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("Delete: %v", err)
	}
	if p := s.ledger(key).read(); p.Upload != upload {
		t.Errorf("the ledger says %+v", p)
	}
	if p := (ledger{"another", s.ledger(key).path}).read(); p.Upload != "" {
		t.Errorf("it says %+v of another key", p)
	}
	end()
	if err := s.Delete(t.Context(), key); err != nil {
		t.Errorf("Delete: %v", err)
	}
	if left := d.Uploads(); len(left) > 0 {
		t.Errorf("uploads are left: %v", left)
	}
}

// TestNothingSweptOfOthers: what others have begun is not looked for while they are there.
func TestNothingSweptOfOthers(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	s := still(t, d, t.TempDir(), c)
	defer closed(t, s)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The sweep that follows the listing has ended.
	d.Await(t, "a sweep", func(calls []s3double.Call) bool {
		n := 0
		for _, call := range calls {
			if call.Op == s3double.ListMultipartUploads {
				n++
			}
		}
		return n == 2
	})
	other := still(t, d, t.TempDir(), c)
	defer closed(t, other)
	beat(t, s)
	wantShared(t, "beside another", s, true)
	before := d.Count(s3double.ListMultipartUploads)
	s.sweepUploads(t.Context())
	if n := d.Count(s3double.ListMultipartUploads); n > before {
		t.Errorf("it was looked for uploads %d times", n-before)
	}
}

// TestUnprovenIsGoneOnWith: an upload in parts is not ended as long as it may turn out that
// its blob has to be uploaded.
func TestUnprovenIsGoneOnWith(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	key, data := blobOf("large", 1000)
	mustPut(t, s, key, data, storage.Durable)
	closed(t, s)
	if err := os.Remove(s.index.cardPath()); err != nil {
		t.Fatal(err)
	}
	let := make(chan struct{})
	end := d.Strike(s3double.Fault{Op: s3double.ListObjectsV2, Hold: let})
	st, err := d.open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s = st.(*store)
	begun(t, s, key)
	if s.endIdle(t.Context(), key) {
		t.Error("it was ended while nobody knows whether it is needed")
	}
	end()
	close(let)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of what nobody needs", func() error {
		s.endIdle(t.Context(), key)
		if p := s.ledger(key).read(); p.Upload != "" {
			return fmt.Errorf("the ledger says %+v", p)
		}
		return nil
	})
	closed(t, s)
}
