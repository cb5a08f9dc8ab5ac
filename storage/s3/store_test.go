package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
	"github.com/opencontainers/go-digest"
)

// blobOf is a blob of n bytes that a name stands for, and its key.
func blobOf(name string, n int) (key string, data []byte) {
	data = bytes.Repeat([]byte(name+" "), n/(len(name)+1)+1)[:n]
	return layout.Blob(digest.FromBytes(data)), data
}

func linkOf(name string) string {
	return "docker/registry/v2/repositories/some/where/_layers/sha256/" + name + "/link"
}

// content calls are those that are not of the owner's mark.
func contentCalls(d *double, ops ...string) (calls []string) {
	for _, call := range d.Calls() {
		// A new store sweeps once what was begun in parts and left.
		if call.Key != ownerKey && call.Op != s3double.ListMultipartUploads && (len(ops) == 0 || slices.Contains(ops, call.Op)) {
			calls = append(calls, call.Op+" "+call.Key)
		}
	}
	return calls
}

// uploaded waits until nothing is pending.
func uploaded(t *testing.T, s *store) {
	t.Helper()
	eventually(t, "the end of uploads", func() error {
		if b := s.Backlog(); b.Pending > 0 {
			return fmt.Errorf("%d values are pending: %v", b.Pending, b.Err)
		}
		return nil
	})
}

func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(90 * time.Second)
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("waited in vain for %s: %v", what, err)
		}
	}
}

func mustPut(t *testing.T, s storage.Store, key string, data []byte, d storage.Durability) {
	t.Helper()
	if err := s.Put(context.Background(), key, data, d); err != nil {
		t.Fatalf("Put %s: %v", key, err)
	}
}

func wantValue(t *testing.T, s storage.Store, key string, want []byte) {
	t.Helper()
	got, err := s.Get(context.Background(), key, 64<<20)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("Get %s: %.60q, %v; want %.60q", key, got, err, want)
	}
}

func wantNothing(t *testing.T, s storage.Store, key string) {
	t.Helper()
	if _, err := s.Stat(context.Background(), key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stat %s: %v, want fs.ErrNotExist", key, err)
	}
}

func isNear(t *testing.T, s storage.Store, key string) bool {
	t.Helper()
	r, _, err := s.Distant().OpenNear(context.Background(), key)
	if err != nil {
		if !errors.Is(err, storage.ErrDistant) {
			t.Errorf("OpenNear %s: %v", key, err)
		}
		return false
	}
	r.Close()
	return true
}

// listedAt opens a store that the test closes itself, once it knows the bucket.
func listedAt(t *testing.T, d *double, dir string) *store {
	t.Helper()
	s, err := d.open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Distant().Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s.(*store)
}

func closed(t *testing.T, s storage.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

// TestCosts counts what S3 is asked.
func TestCosts(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	ctx := context.Background()
	key, data := blobOf("layer", 100_000)
	manifest, few := blobOf("manifest", 1000)

	for _, c := range []struct {
		what string
		do   func()
		want []string
	}{
		{"absence", func() {
			wantNothing(t, s, key)
			wantNothing(t, s, linkOf("none"))
		}, nil},
		{"a blob and its link", func() {
			mustPut(t, s, key, data, storage.Lazy)
			mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
			uploaded(t, s)
		}, []string{"PutObject " + key, "PutObject " + linkOf("a")}},
		{"a push", func() {
			mustPut(t, s, manifest, few, storage.Lazy)
			mustPut(t, s, linkOf("b"), []byte("sha256:y"), storage.Lazy)
			if err := s.Sync(ctx, linkOf("b"), manifest, linkOf("a")); err != nil {
				t.Error(err)
			}
		}, []string{"PutObject " + manifest, "PutObject " + linkOf("b")}},
		{"the same again", func() {
			mustPut(t, s, manifest, few, storage.Durable)
			mustPut(t, s, linkOf("b"), []byte("sha256:y"), storage.Durable)
			mustPut(t, s, key, data, storage.Lazy)
		}, nil},
		{"warm", func() {
			if !isNear(t, s, key) || !isNear(t, s, manifest) {
				t.Error("what was put is not near")
			}
			wantValue(t, s, manifest, few)
			wantValue(t, s, linkOf("a"), []byte("sha256:x"))
			if _, err := s.Stat(ctx, key); err != nil {
				t.Error(err)
			}
			for _, err := range s.List(ctx, "docker/", true) {
				if err != nil {
					t.Error(err)
				}
			}
		}, nil},
		{"cold", func() {
			for _, key := range []string{key, manifest} {
				if !s.Drop(key) {
					t.Errorf("%s was not near", key)
				}
			}
			if isNear(t, s, key) {
				t.Error("what was dropped is near")
			}
			wantValue(t, s, manifest, few)
			wantValue(t, s, manifest, few)
			r, _, err := s.Open(ctx, key, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			r.Close()
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			mustPut(t, s, key, got, storage.Lazy) // as a fill does
			if !isNear(t, s, key) || !isNear(t, s, manifest) {
				t.Error("what was read is not near")
			}
		}, []string{"GetObject " + key, "GetObject " + manifest}},
		{"a restart", func() {
			closed(t, s)
			s = listedAt(t, d, dir)
			wantValue(t, s, linkOf("a"), []byte("sha256:x"))
			wantNothing(t, s, linkOf("none"))
			if !isNear(t, s, key) {
				t.Error("what was near is not")
			}
		}, nil},
	} {
		d.Forget()
		c.do()
		got := contentCalls(d)
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s cost %q, want %q", c.what, got, c.want)
		}
	}
	closed(t, s)
}

// TestLinksComeAfterBlobs: what speaks of a blob is not in the bucket before it.
func TestLinksComeAfterBlobs(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	var blobs []string
	d.Down()
	for i := range 20 {
		key, data := blobOf(fmt.Sprint("blob", i), 1000+i)
		mustPut(t, s, key, data, storage.Lazy)
		mustPut(t, s, linkOf(fmt.Sprint(i)), []byte(key), storage.Lazy)
		blobs = append(blobs, key)
	}
	d.Up(t)
	uploaded(t, s)
	at := map[string]int{}
	for i, call := range d.Calls() {
		if call.Op == s3double.PutObject && call.Status == 200 {
			at[call.Key] = i + 1
		}
	}
	for i, key := range blobs {
		if link := linkOf(fmt.Sprint(i)); at[key] == 0 || at[link] < at[key] {
			t.Errorf("blob %d came as number %d, its link as %d", i, at[key], at[link])
		}
	}
}

func TestEviction(t *testing.T) {
	d := newDouble(t, s3double.Options{}, func(s *S3) { s.CacheSize = "64MiB" })
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	const size = 4 << 20
	var keys []string
	for i := range 24 {
		key, data := blobOf(fmt.Sprint("blob", i), size)
		mustPut(t, s, key, data, storage.Lazy)
		if err := s.Sync(context.Background(), key); err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	eventually(t, "eviction", func() error {
		if b := s.Backlog(); b.NearBytes > b.CacheBytes {
			return fmt.Errorf("%d bytes of %d", b.NearBytes, b.CacheBytes)
		}
		return nil
	})
	near := 0
	for _, key := range keys {
		if isNear(t, s, key) {
			near++
		}
		if _, err := s.Stat(context.Background(), key); err != nil {
			t.Errorf("evicted from the store: %v", err)
		}
	}
	if near < 8 || near > 16 {
		t.Errorf("%d of %d blobs are near", near, len(keys))
	}

	// What is set aside takes the place of copies, but not of what is pending.
	r, err := s.Reserve(60 << 20)
	if err != nil {
		t.Fatalf("Reserve: %v", err)
	}
	if b := s.Backlog(); b.NearBytes > 4<<20 {
		t.Errorf("%d bytes are near beside what is set aside", b.NearBytes)
	}
	if r, err := s.Reserve(8 << 20); !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "cache") {
		if err == nil {
			r.Release()
		}
		t.Errorf("Reserve of more than there is: %v", err)
	}
	r.Release()
}

// TestFullDisk: whoever finds the disk of the cache full is told of options there are.
func TestFullDisk(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	backend, err := d.backend(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	backend.near.MinFree = "99.99%"
	if err := backend.near.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	s, err := backend.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	if _, err := s.Reserve(1); !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "cache") || strings.Contains(err.Error(), "min_free") {
		t.Errorf("Reserve where the disk is full: %v", err)
	}
}

// TestColdestGoFirst has a clock.
func TestColdestGoFirst(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	var keys []string
	for i := range 10 {
		key, data := blobOf(fmt.Sprint("blob", i), 4096)
		mustPut(t, s, key, data, storage.Lazy)
		keys = append(keys, key)
	}
	if err := s.Sync(context.Background(), keys...); err != nil {
		t.Fatal(err)
	}
	for i, key := range keys {
		// The first is the warmest, as if it had been pulled.
		s.index.note(key, 4096, time.Now().Add(time.Duration(-i)*time.Hour))
	}
	pending, data := blobOf("pending", 4096)
	d.Down()
	mustPut(t, s, pending, data, storage.Lazy)
	s.index.note(pending, 4096, time.Unix(0, 0))
	if freed := s.evict(3 * 4096); freed != 3*4096 {
		t.Errorf("%d bytes were freed", freed)
	}
	for i, key := range keys {
		if near := isNear(t, s, key); near != (i < 7) {
			t.Errorf("blob %d is near: %v", i, near)
		}
	}
	if !isNear(t, s, pending) {
		t.Error("what is pending was evicted")
	}
	d.Up(t)
}

func TestPendingTakesHalf(t *testing.T) {
	d := newDouble(t, s3double.Options{}, func(s *S3) { s.CacheSize = "64MiB" })
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	d.Down()
	var err error
	n := 0
	for ; n < 20 && err == nil; n++ {
		key, data := blobOf(fmt.Sprint("blob", n), 4<<20)
		err = s.Put(context.Background(), key, data, storage.Lazy)
	}
	if !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "cache") || n != 9 {
		t.Errorf("Put number %d: %v", n, err)
	}
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
	d.Up(t)
	uploaded(t, s)
	key, data := blobOf("after", 4<<20)
	mustPut(t, s, key, data, storage.Lazy)
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*S3)
		want   string
	}{
		{"no bucket", func(s *S3) { s.Bucket = "another" }, "has no bucket another"},
		{"wrong secret", func(s *S3) { s.Credentials.Secret = "wrong" }, "check the credentials"},
		{"wrong key", func(s *S3) { s.Credentials.Key = "wrong" }, "check the credentials"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDouble(t, s3double.Options{}, c.change)
			dir := t.TempDir()
			s, err := d.open(dir)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Open: %v, want something about %q", err, c.want)
			}
			// The directory is free.
			d.change = nil
			closed(t, listedAt(t, d, dir))
		})
	}
}

func TestPushAckLocal(t *testing.T) {
	d := newDouble(t, s3double.Options{}, func(s *S3) { s.PushAck = "local" })
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	key, data := blobOf("pushed", 10_000)
	d.Down()
	mustPut(t, s, key, data, storage.Lazy)
	if err := s.Sync(context.Background(), key, linkOf("none")); err != nil {
		t.Errorf("Sync: %v", err)
	}
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Durable)
	closed(t, s)
	d.Up(t)
	s = listedAt(t, d, dir)
	defer closed(t, s)
	uploaded(t, s)
	if got, _ := d.Read(key); !bytes.Equal(got, data) {
		t.Error("it has not come to the bucket")
	}
}

// TestPartsGoOn: an upload in parts that was interrupted is gone on with, or aborted.
func TestPartsGoOn(t *testing.T) {
	for name, lost := range map[string]bool{"": false, "without the index": true} {
		t.Run(name, func(t *testing.T) { testPartsGoOn(t, lost) })
	}
}

func testPartsGoOn(t *testing.T, lost bool) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	key, data := blobOf("large", 21<<20)
	other, more := blobOf("other", 11<<20)
	// The third part of each does not come through.
	end := d.Strike(s3double.Fault{Op: s3double.UploadPart, Spare: 4, Status: 503, Code: "SlowDown"})
	mustPut(t, s, key, data, storage.Lazy)
	mustPut(t, s, other, more, storage.Lazy)
	eventually(t, "two uploads that were begun", func() error {
		files, _ := os.ReadDir(s.ledgers())
		if n := len(files); n < 2 {
			return fmt.Errorf("%d ledgers", n)
		}
		return nil
	})
	d.Await(t, "a part that is refused", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Struck && c.Status == 503 })
	})
	closed(t, s)
	if lost {
		loseIndex(t, dir)
	}
	end()
	d.Forget()
	s = listedAt(t, d, dir)
	defer closed(t, s)
	if err := s.Delete(context.Background(), other); err != nil {
		t.Fatal(err)
	}
	// Without the index it is found out after the listing what has to be uploaded.
	eventually(t, "the end of both", func() error {
		if got, _ := d.Read(key); !bytes.Equal(got, data) {
			return errors.New("the bucket has other bytes")
		}
		if files, _ := os.ReadDir(s.ledgers()); len(files) > 0 {
			return fmt.Errorf("%d ledgers are left", len(files))
		}
		return nil
	})
	wantNothing(t, s, other)
	if n := d.Count(s3double.CreateMultipartUpload); n > 0 {
		t.Errorf("%d uploads were begun anew", n)
	}
	if left := d.Uploads(); len(left) > 0 {
		t.Errorf("uploads in parts are left: %v", left)
	}
}

// TestGetKeepsWhatIsWhole: what is not what its key says does not come near.
func TestGetKeepsWhatIsWhole(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	good, data := blobOf("good", 1000)
	bad, _ := blobOf("bad", 1000)
	d.Write(good, data)
	d.Write(bad, data)
	s := d.openedAt(t, t.TempDir())
	wantValue(t, s, good, data)
	wantValue(t, s, bad, data)
	if !isNear(t, s, good) {
		t.Error("what was read is not near")
	}
	if isNear(t, s, bad) {
		t.Error("what is not what its key says is near")
	}
}

// TestModTime: the time of a value is that of its Put, wherever it lies.
func TestModTime(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	d.Down()
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
	before, err := s.Stat(context.Background(), linkOf("a"))
	if err != nil {
		t.Fatal(err)
	}
	d.Up(t)
	uploaded(t, s)
	for _, when := range []string{"uploaded", "after a restart"} {
		info, err := s.Stat(context.Background(), linkOf("a"))
		if err != nil || !info.ModTime.Equal(before.ModTime) {
			t.Errorf("%s: %v, %v; it was %v", when, info.ModTime, err, before.ModTime)
		}
		if err := s.Relist(context.Background()); err != nil {
			t.Fatal(err)
		}
		closed(t, s)
		s = listedAt(t, d, dir)
	}
	closed(t, s)
}

// TestOneDirectoryTwice: a reload comes back to a store that is still open.
func TestOneDirectoryTwice(t *testing.T) {
	d := newDouble(t, s3double.Options{Buckets: []string{s3double.Bucket, "second"}}, nil)
	dir := t.TempDir()
	first, second := listedAt(t, d, dir), listedAt(t, d, dir)
	mustPut(t, first, linkOf("a"), []byte("sha256:x"), storage.Lazy)
	closed(t, first)
	wantValue(t, second, linkOf("a"), []byte("sha256:x"))
	d.change = func(s *S3) { s.Bucket = "second" }
	if s, err := d.open(dir); !errors.Is(err, storage.ErrLocked) {
		if err == nil {
			s.Close()
		}
		t.Errorf("another bucket: %v, want ErrLocked", err)
	}
	closed(t, second)
}

// TestCloseDoesNotHang: what S3 does not answer does not hold up the end.
func TestCloseDoesNotHang(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	never := make(chan struct{})
	defer close(never)
	end := d.Strike(s3double.Fault{Hold: never})
	key, data := blobOf("held", 1000)
	mustPut(t, s, key, data, storage.Lazy)
	d.Await(t, "an upload", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Held && c.Key == key })
	})
	closed(t, s)
	end()
	s = listedAt(t, d, dir)
	wantValue(t, s, key, data)
	uploaded(t, s)
	closed(t, s)
}

func BenchmarkOpenNear(b *testing.B) {

	data := bytes.Repeat([]byte("x"), 100_000)
	h := sha256.Sum256(data)
	key := "docker/registry/v2/blobs/sha256/" + hex.EncodeToString(h[:1]) + "/" + hex.EncodeToString(h[:]) + "/data"
	d := &double{s3double.New(b, s3double.Options{}), "", nil}
	dir := b.TempDir()
	s, err := d.open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if err := s.Put(context.Background(), key, data, storage.Durable); err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(dir, key)
	b.Run("os", func(b *testing.B) {
		for b.Loop() {
			f, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
	b.Run("disk", func(b *testing.B) {
		for b.Loop() {
			f, _, err := s.(*store).near.Open(context.Background(), key, 0, -1)
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
	b.Run("store", func(b *testing.B) {
		for b.Loop() {
			f, _, err := s.Distant().OpenNear(context.Background(), key)
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
}
