package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

const partedSize = 11<<20 + 7 // three parts of 5 MiB, the last shorter

// parted is a client that stores files in parts of 5 MiB, and a file of three.
func parted(t *testing.T, opts s3double.Options, change ...func(*settings)) (*s3double.Server, *bucket, *file) {
	t.Helper()
	double := s3double.New(t, opts)
	s := settingsOf(double)
	s.PutLimit, s.PartSize = smallestPart, smallestPart
	for _, f := range change {
		f(&s)
	}
	return double, connect(t, s), newFile(t, partedSize)
}

// A file is what is to be stored, and the ledger of how far that is.
type file struct {
	path, sum string
	data      []byte
	ledger    parts
	saved     int
	busy      atomic.Bool
	t         *testing.T
}

func newFile(t *testing.T, size int) *file {
	t.Helper()
	f := &file{path: filepath.Join(t.TempDir(), "file"), t: t}
	f.data, f.sum = content(size)
	if err := os.WriteFile(f.path, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *file) save(p parts) error {
	if f.busy.Swap(true) {
		f.t.Error("two calls save at once")
	}
	defer f.busy.Store(false)
	f.ledger = p
	f.saved++
	return nil
}

func (f *file) put(ctx context.Context, b *bucket) error {
	return b.putFile(ctx, ctx, "k", f.path, int64(len(f.data)), f.sum, f.ledger, f.save)
}

func (f *file) arrived(double *s3double.Server) {
	f.t.Helper()
	if got, _ := double.Read("k"); !bytes.Equal(got, f.data) {
		f.t.Errorf("%d bytes arrived, of %d", len(got), len(f.data))
	}
	if left := double.Uploads(); len(left) != 0 {
		f.t.Errorf("uploads are left: %v", left)
	}
}

// cost is how many requests there were, by operation.
func cost(t *testing.T, double *s3double.Server, want map[string]int) {
	t.Helper()
	total := 0
	for op, n := range want {
		if got := double.Count(op); got != n {
			t.Errorf("%d of %s, want %d", got, op, n)
		}
		total += n
	}
	if got := double.Count(); got != total {
		t.Errorf("%d requests, want %d", got, total)
	}
}

func TestParts(t *testing.T) {
	double, b, f := parted(t, s3double.Options{Quirks: s3double.Quirks{EqualParts: true, NoListParts: true}})
	if err := f.put(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	f.arrived(double)
	if f.saved != 4 || slices.Contains(f.ledger.ETags, "") || f.ledger.Upload == "" || f.ledger.Sum != f.sum || f.ledger.Size != 5<<20 {
		t.Errorf("saved %d times, and last %+v", f.saved, f.ledger)
	}
	cost(t, double, map[string]int{s3double.CreateMultipartUpload: 1, s3double.UploadPart: 3, s3double.CompleteMultipartUpload: 1, s3double.HeadObject: 1})
	for _, call := range double.Calls() {
		for name := range call.Header {
			if strings.Contains(strings.ToLower(name), "checksum") || name == "Content-Encoding" {
				t.Errorf("%s has a header %s", call.Op, name)
			}
		}
	}
}

func TestOneCallUpToTheLimit(t *testing.T) {
	double, b, f := parted(t, s3double.Options{}, func(s *settings) { s.PutLimit = partedSize })
	if err := f.put(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	f.arrived(double)
	cost(t, double, map[string]int{s3double.PutObject: 1})
	if f.saved != 0 {
		t.Errorf("saved %+v", f.ledger)
	}
}

func TestFewerLargerParts(t *testing.T) {
	double, b, f := parted(t, s3double.Options{Quirks: s3double.Quirks{EqualParts: true, MaxParts: 2}}, func(s *settings) { s.MaxParts = 2 })
	if err := f.put(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	f.arrived(double)
	cost(t, double, map[string]int{s3double.CreateMultipartUpload: 1, s3double.UploadPart: 2, s3double.CompleteMultipartUpload: 1, s3double.HeadObject: 1})
}

// TestTooManyParts has a server that takes fewer parts than it was said to: once the
// option says so, the file is begun anew.
func TestTooManyParts(t *testing.T) {
	ctx := context.Background()
	double, b, f := parted(t, s3double.Options{Quirks: s3double.Quirks{MaxParts: 2}})
	if err := f.put(ctx, b); err == nil || !strings.Contains(err.Error(), "lower max_parts") {
		t.Errorf("got %v", err)
	}
	s := b.remote.Load().settings
	s.MaxParts = 2
	if err := b.configure(ctx, s); err != nil {
		t.Fatal(err)
	}
	if err := f.put(ctx, b); err != nil {
		t.Fatal(err)
	}
	f.arrived(double)
}

func TestResume(t *testing.T) {
	ctx := context.Background()
	// interrupted has noted some parts, and then ended.
	interrupted := func(t *testing.T) (*s3double.Server, *bucket, *file, int) {
		double, b, f := parted(t, s3double.Options{})
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		err := b.putFile(ctx, ctx, "k", f.path, partedSize, f.sum, parts{}, func(p parts) error {
			f.save(p)
			if f.saved == 2 {
				cancel()
			}
			return nil
		})
		there := len(slices.DeleteFunc(slices.Clone(f.ledger.ETags), func(tag string) bool { return tag == "" }))
		if !errors.Is(err, context.Canceled) || there < 1 || there == 3 {
			t.Fatalf("%v, with %d parts noted", err, there)
		}
		for o := range b.counts {
			b.counts[o].Store(0)
		}
		return double, b, f, there
	}
	// sends has an upload be gone on with, and so many parts be sent. The server may
	// have seen more: those that were on their way when it ended.
	sends := func(t *testing.T, b *bucket, parts int) {
		t.Helper()
		if n := b.called(); n["create"] != 0 || n["part"] != int64(parts) || n["complete"] != 1 || n["head"] != 1 {
			t.Errorf("sent %v, want %d parts and an end", n, parts)
		}
	}
	t.Run("goes on", func(t *testing.T) {
		double, b, f, there := interrupted(t)
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		f.arrived(double)
		sends(t, b, 3-there)
	})
	t.Run("goes on with its own size of parts", func(t *testing.T) {
		double, b, f, there := interrupted(t)
		s := b.remote.Load().settings
		s.PartSize, s.PutLimit = 8<<20, 64<<20
		if err := b.configure(ctx, s); err != nil {
			t.Fatal(err)
		}
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		f.arrived(double)
		sends(t, b, 3-there)
	})
	t.Run("the upload has died", func(t *testing.T) {
		double, b, f, _ := interrupted(t)
		double.Expire()
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		f.arrived(double)
		if n := b.called()["create"]; n != 1 {
			t.Errorf("begun %d times", n)
		}
	})
	t.Run("it dies each time", func(t *testing.T) {
		double, b, f, _ := interrupted(t)
		double.Strike(s3double.Fault{Op: s3double.UploadPart, Status: 404, Code: "NoSuchUpload"})
		if err := f.put(ctx, b); !coded(err, "NoSuchUpload") {
			t.Errorf("got %v", err)
		}
		if n := b.called()["create"]; n != 1 {
			t.Errorf("begun %d times", n)
		}
	})
	t.Run("another file", func(t *testing.T) {
		double, b, f, _ := interrupted(t)
		other := newFile(t, partedSize+1)
		other.data = other.data[1:] // of the same length, and other in each part
		if err := os.WriteFile(other.path, other.data, 0o600); err != nil {
			t.Fatal(err)
		}
		other.sum, _ = hashed(ctx, bytes.NewReader(other.data))
		other.ledger = f.ledger
		if err := other.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		other.arrived(double)
	})
	t.Run("the file is short", func(t *testing.T) {
		_, b, f, _ := interrupted(t)
		if err := os.Truncate(f.path, 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := f.put(ctx, b); err == nil || !strings.Contains(err.Error(), "local file") {
			t.Errorf("got %v", err)
		}
		if n := b.called()["part"]; n != 0 {
			t.Errorf("%d parts are sent", n)
		}
	})
	t.Run("completed, and not noted", func(t *testing.T) {
		double, b, f := parted(t, s3double.Options{})
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		double.Forget()
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		f.arrived(double)
		cost(t, double, map[string]int{s3double.CompleteMultipartUpload: 1, s3double.HeadObject: 1})
	})
}

func TestSavingFails(t *testing.T) {
	double, b, f := parted(t, s3double.Options{})
	full := errors.New("disk full")
	err := b.putFile(context.Background(), context.Background(), "k", f.path, partedSize, f.sum, parts{}, func(p parts) error {
		if p.ETags[0] != "" {
			return full
		}
		return nil
	})
	if !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	if _, there := double.Read("k"); there {
		t.Error("it was completed")
	}
}

// TestComplete has the last request of an upload go wrong.
func TestComplete(t *testing.T) {
	ctx := context.Background()
	const complete = s3double.CompleteMultipartUpload
	older, _ := content(partedSize)
	older[5]++
	for _, c := range []struct {
		name           string
		fault          s3double.Fault
		older          bool // there is an object of this size already
		completes, ask int
		odd            bool // its ETags are no MD5 sums
	}{
		{"error with 200", s3double.Fault{Status: 200, Code: "InternalError"}, false, 2, 2, false},
		{"error with 200, done", s3double.Fault{Status: 200, Code: "InternalError", Did: true}, false, 1, 1, false},
		{"500", s3double.Fault{Status: 500, Code: "InternalError"}, false, 2, 2, false},
		{"500, done", s3double.Fault{Status: 500, Code: "InternalError", Did: true}, false, 1, 1, false},
		{"SlowDown", s3double.Fault{Status: 503, Code: "SlowDown"}, false, 2, 1, false},
		{"SlowDown, done", s3double.Fault{Status: 503, Code: "SlowDown", Did: true}, false, 2, 1, false},
		{"cut", s3double.Fault{Cut: true}, false, 2, 2, false},
		{"cut, done", s3double.Fault{Cut: true, Did: true}, false, 1, 1, false},
		{"cut in the answer", s3double.Fault{Cut: true, Did: true, At: -1}, false, 1, 1, false},
		{"500 over an older one", s3double.Fault{Status: 500, Code: "InternalError"}, true, 2, 2, false},
		{"cut over an older one", s3double.Fault{Cut: true}, true, 2, 2, false},
		{"500, done over an older one", s3double.Fault{Status: 500, Code: "InternalError", Did: true}, true, 1, 1, false},
		{"500, done, odd ETags", s3double.Fault{Status: 500, Code: "InternalError", Did: true}, false, 1, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			double, b, f := parted(t, s3double.Options{Quirks: s3double.Quirks{OddETags: c.odd}})
			if c.older {
				other := newFile(t, partedSize)
				other.data = older
				if err := os.WriteFile(other.path, older, 0o600); err != nil {
					t.Fatal(err)
				}
				other.sum, _ = hashed(ctx, bytes.NewReader(older))
				double.Set(func(q *s3double.Quirks) { q.Skew = -time.Minute })
				if err := other.put(ctx, b); err != nil {
					t.Fatal(err)
				}
				double.Set(func(q *s3double.Quirks) { q.Skew = 0 })
				double.Forget()
			}
			c.fault.Op, c.fault.Count = complete, 1
			double.Strike(c.fault)
			if err := f.put(ctx, b); err != nil {
				t.Fatal(err)
			}
			f.arrived(double)
			cost(t, double, map[string]int{s3double.CreateMultipartUpload: 1, s3double.UploadPart: 3, complete: c.completes, s3double.HeadObject: c.ask})
		})
	}
	t.Run("never", func(t *testing.T) {
		double, b, f := parted(t, s3double.Options{})
		end := double.Strike(s3double.Fault{Op: complete, Status: 503, Code: "SlowDown"})
		if err := f.put(ctx, b); !errors.Is(err, storage.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		end()
		double.Forget()
		b.breaker.answered()
		if err := f.put(ctx, b); err != nil {
			t.Fatal(err)
		}
		f.arrived(double)
		cost(t, double, map[string]int{complete: 1, s3double.HeadObject: 1})
	})
}

// TestForgottenParts has a server make an object of fewer parts than it was told.
func TestForgottenParts(t *testing.T) {
	direct := newTransport()
	t.Cleanup(direct.CloseIdleConnections)
	var double *s3double.Server
	double, b, f := parted(t, s3double.Options{}, func(s *settings) {
		s.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := direct.RoundTrip(r)
			if r.Method == "POST" && r.URL.Query().Has("uploadId") {
				double.Write("k", make([]byte, 10<<20))
			}
			return resp, err
		})
	})
	err := f.put(context.Background(), b)
	if err == nil || !strings.Contains(err.Error(), "made 10485760 bytes of 11534343 out of 3 parts") {
		t.Errorf("got %v", err)
	}
	if _, there := double.Read("k"); there {
		t.Error("what is wrong is still there")
	}
}

func TestSmallPartsRefused(t *testing.T) {
	_, b, f := parted(t, s3double.Options{MinPart: 6 << 20})
	if err := f.put(context.Background(), b); err == nil || !strings.Contains(err.Error(), "raise part_size") {
		t.Errorf("got %v", err)
	}
}

func TestLargeObjectRefused(t *testing.T) {
	_, b, f := parted(t, s3double.Options{PutLimit: 10 << 20}, func(s *settings) { s.PutLimit = 64 << 20 })
	if err := f.put(context.Background(), b); err == nil || !strings.Contains(err.Error(), "lower put_limit") {
		t.Errorf("got %v", err)
	}
}

// TestPartsAtOnce has several parts be on their way, and not all; and all stop when
// whoever waits goes.
func TestPartsAtOnce(t *testing.T) {
	direct := newTransport()
	t.Cleanup(direct.CloseIdleConnections)
	var now, most atomic.Int32
	double, b, f := parted(t, s3double.Options{}, func(s *settings) {
		s.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
			n := now.Add(1)
			defer now.Add(-1)
			for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
			}
			return direct.RoundTrip(r)
		})
	})
	f = newFile(t, 22<<20)
	hold := make(chan struct{})
	end := double.Strike(s3double.Fault{Op: s3double.UploadPart, Hold: hold})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.put(ctx, b) }()
	double.Await(t, "several parts", func([]s3double.Call) bool { return double.Count(s3double.UploadPart) == partsAtOnce })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(hold)
	end()
	if err := f.put(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	f.arrived(double)
	if n := most.Load(); n != partsAtOnce {
		t.Errorf("%d requests at once", n)
	}
}

func TestPartsNeedNoMemory(t *testing.T) {
	b, err := newBucket(context.Background(), settings{
		Endpoint: "https://s3.test", Bucket: "bucket", PathStyle: true, AccessKey: "k", SecretKey: "s",
		PutLimit: 5 << 20, PartSize: 16 << 20, MaxParts: 10_000,
		transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			if r.Body != nil {
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
			}
			switch {
			case r.Method == "POST" && r.URL.Query().Has("uploads"):
				return says(r, 200, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
			case r.Method == "POST":
				return says(r, 200, "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")
			case r.Method == "HEAD":
				return says(r, 200, "", "Content-Length", "268435456")
			}
			return says(r, 200, "", "ETag", `"e"`)
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "sparse")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 256<<20); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := b.putFile(context.Background(), context.Background(), "k", path, 256<<20, "sum", parts{}, func(parts) error { return nil }); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("%d bytes for 16 parts of 16 MiB", used)
	}
}

func TestHashingEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := hashed(ctx, bytes.NewReader(make([]byte, 100))); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestAbort(t *testing.T) {
	ctx := context.Background()
	double, b, _ := parted(t, s3double.Options{})
	upload, _, err := b.create(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.abort(ctx, "k", parts{Upload: upload}); err != nil {
			t.Error(err)
		}
	}
	if left := double.Uploads(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if err := b.abort(ctx, "k", parts{}); err != nil {
		t.Error(err)
	}
}

func TestSweepUploads(t *testing.T) {
	ctx := context.Background()
	double, b, _ := parted(t, s3double.Options{Page: 2}, func(s *settings) { s.Prefix = "p" })
	var ids []string
	begin := func(key string) string {
		id, _, err := b.create(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
		return id
	}
	for range 5 {
		begin("docker/registry/v2/blobs/sha256/aa/data")
		begin("mirror/uploads/x")
	}
	ours := begin("docker/registry/v2/blobs/sha256/bb/data")
	theirs := begin("docker/registry/v2/repositories/r/_uploads/u/data")
	b.prefix = ""
	beside := begin("mirror/uploads/x") // of somebody else in the bucket
	b.prefix = "p/"
	claimed := func(key, upload string) bool {
		if (upload == ours) != (key == "docker/registry/v2/blobs/sha256/bb/data") {
			t.Errorf("asked for %s of %s", upload, key)
		}
		return upload == ours
	}
	if n, err := b.sweepUploads(ctx, 24*time.Hour, claimed); n != 0 || err != nil {
		t.Errorf("%d young ones are swept, %v", n, err)
	}
	if n, err := b.sweepUploads(ctx, -time.Hour, claimed); n != 10 || err != nil {
		t.Errorf("%d are swept, %v", n, err)
	}
	var left []string
	for _, of := range double.Uploads() {
		left = append(left, of...)
	}
	slices.Sort(left)
	want := []string{ours, theirs, beside}
	slices.Sort(want)
	if !slices.Equal(left, want) {
		t.Errorf("left: %q, want %q of %q", left, want, ids)
	}
	double.Strike(s3double.Fault{Op: s3double.ListMultipartUploads, Status: 501, Code: "NotImplemented"})
	if n, err := b.sweepUploads(ctx, -time.Hour, claimed); n != 0 || err != nil {
		t.Errorf("where uploads cannot be listed: %d, %v", n, err)
	}
}

// TestPartsOfAClosedStore: what is given up because everything ends is not taken for
// what a deletion gives up, which is begun again.
func TestPartsOfAClosedStore(t *testing.T) {
	_, b, f := parted(t, s3double.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.putFile(ctx, ctx, "k", f.path, partedSize, f.sum, f.ledger, f.save); !errors.Is(err, context.Canceled) || errors.Is(err, errVoid) {
		t.Errorf("putFile: %v", err)
	}
}
