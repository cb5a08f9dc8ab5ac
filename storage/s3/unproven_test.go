package s3

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// loseIndex removes what a closed store knows of its bucket.
func loseIndex(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, filepath.FromSlash(ownDir), "index.db")); err != nil {
		t.Fatal(err)
	}
}

// TestLinksWaitForTheListing: after the index is lost, what speaks of blobs is not in
// the bucket before it is known which of them are, unless somebody waits for it.
func TestLinksWaitForTheListing(t *testing.T) {
	for name, refused := range map[string]bool{"listed": false, "refused": true} {
		t.Run(name, func(t *testing.T) {
			d := newDouble(t, s3double.Options{}, nil)
			dir := t.TempDir()
			s := listedAt(t, d, dir)
			d.Down()
			var blobs []string
			for _, name := range []string{"first", "second", "third"} {
				key, data := blobOf(name, 10_000)
				mustPut(t, s, key, data, storage.Lazy)
				blobs = append(blobs, key)
			}
			mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
			closed(t, s)
			loseIndex(t, dir)
			d.Up(t)
			d.Forget()

			let := make(chan struct{})
			fault := s3double.Fault{Op: s3double.ListObjectsV2, Hold: let}
			if refused {
				fault.Status, fault.Code = 403, "AccessDenied"
			}
			end := d.Strike(fault)
			st, err := d.open(dir)
			if err != nil {
				t.Fatal(err)
			}
			s = st.(*store)
			defer closed(t, s)
			d.Await(t, "a listing", func(calls []s3double.Call) bool {
				return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Op == s3double.ListObjectsV2 && c.Held })
			})
			// What somebody waits for does not wait for the listing.
			pushed, data := blobOf("pushed", 1000)
			mustPut(t, s, pushed, data, storage.Durable)
			mustPut(t, s, linkOf("b"), []byte("sha256:y"), storage.Durable)
			wantValue(t, s, linkOf("a"), []byte("sha256:x"))
			if _, there := d.Read(linkOf("a")); there {
				t.Error("a link was uploaded before its blobs are known to be there")
			}
			close(let)
			if !refused {
				end()
			}
			uploaded(t, s)
			var puts []string
			for _, call := range d.Calls() {
				if call.Op == s3double.PutObject && slices.Contains(append(blobs, linkOf("a")), call.Key) {
					puts = append(puts, call.Key)
				}
			}
			if len(puts) != 4 || puts[3] != linkOf("a") {
				t.Errorf("S3 was sent %q", puts)
			}
		})
	}
}

// TestNearWithoutIndex: a store that knows nothing of its bucket, and cannot ask, has
// the blobs that are near and what is pending.
func TestNearWithoutIndex(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	key, data := blobOf("both", 10_000)
	mustPut(t, s, key, data, storage.Durable)
	mustPut(t, s, linkOf("far"), []byte("sha256:x"), storage.Durable)
	d.Down()
	mustPut(t, s, linkOf("pending"), []byte("sha256:y"), storage.Lazy)
	closed(t, s)
	loseIndex(t, dir)
	st, err := d.open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s = st.(*store)
	defer closed(t, s)
	if info, err := s.Stat(t.Context(), key); err != nil || info.Size != int64(len(data)) {
		t.Errorf("Stat: %+v, %v", info, err)
	}
	if !isNear(t, s, key) {
		t.Error("a near blob cannot be opened")
	}
	wantValue(t, s, key, data)
	wantValue(t, s, linkOf("pending"), []byte("sha256:y"))
	if _, err := s.Get(t.Context(), linkOf("far"), 100); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("of what is only in the bucket: %v", err)
	}
	d.Up(t)
}

// TestPresignUnproven: no URL is made of an object that is not what is near.
func TestPresignUnproven(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	good, data := blobOf("good", 10_000)
	short, more := blobOf("short", 10_000)
	mustPut(t, s, good, data, storage.Durable)
	mustPut(t, s, short, more, storage.Durable)
	closed(t, s)
	d.Write(short, more[:9000])
	loseIndex(t, dir)
	let := make(chan struct{})
	defer close(let)
	end := d.Strike(s3double.Fault{Op: s3double.ListObjectsV2, Hold: let})
	defer end()
	st, err := d.open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s = st.(*store)
	defer closed(t, s)
	if _, err := s.Presign(t.Context(), "GET", good, time.Minute); err != nil {
		t.Errorf("Presign: %v", err)
	}
	if _, err := s.Presign(t.Context(), "GET", short, time.Minute); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Presign of an object that was cut short: %v", err)
	}
}

// TestOddETags: what was put here is not read again because its ETag is no MD5 sum.
func TestOddETags(t *testing.T) {
	d := newDouble(t, s3double.Options{Quirks: s3double.Quirks{OddETags: true}}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Durable)
	if err := s.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.Forget()
	wantValue(t, s, linkOf("a"), []byte("sha256:x"))
	if calls := contentCalls(d); len(calls) > 0 {
		t.Errorf("S3 was asked for %q", calls)
	}
}
