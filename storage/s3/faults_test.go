package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// noise is a blob of n bytes that a name stands for, and its key.
func noise(name string, n int) (key string, data []byte) {
	data = make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(data)
	sum := sha256.Sum256(data)
	return keyOfSum(sum[:]), data
}

func keyOfSum(sum []byte) string {
	digest := hex.EncodeToString(sum)
	return "docker/registry/v2/blobs/sha256/" + digest[:2] + "/" + digest + "/data"
}

// spooled is a file of the store's that holds data.
func spooled(t *testing.T, s storage.Store, data []byte) (path string) {
	t.Helper()
	dir, err := s.Spool("fills")
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.CreateTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(data); err != nil {
		t.Fatal(err)
	}
	return file.Name()
}

// whole holds the bucket to having a blob, and to having nothing else of it.
func (d *double) whole(t *testing.T, key string, data []byte) {
	t.Helper()
	if got, _ := d.Read(key); !bytes.Equal(got, data) {
		t.Errorf("the bucket has %d bytes, and not the %d that were put", len(got), len(data))
	}
	if left := d.Uploads(); len(left) > 0 {
		t.Errorf("uploads are left: %q", left)
	}
}

// syncs syncs until it does not fail because S3 is left alone for a while.
func syncs(t *testing.T, s storage.Store, key string) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		err := s.Sync(context.Background(), key)
		switch {
		case err == nil:
			return
		case !errors.Is(err, storage.ErrUnavailable):
			t.Fatalf("Sync: %v", err)
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("Sync: %v", err)
		}
	}
}

// TestCompletion: an upload in parts ends well, whatever becomes of the answer to its
// last call, and no part is sent twice.
func TestCompletion(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault s3double.Fault
	}{
		{"an error with 200", s3double.Fault{Status: 200, Code: "InternalError"}},
		{"an error with 200, and it is done", s3double.Fault{Status: 200, Code: "InternalError", Did: true}},
		{"500", s3double.Fault{Status: 500, Code: "InternalError"}},
		{"500, and it is done", s3double.Fault{Status: 500, Code: "InternalError", Did: true}},
		{"SlowDown", s3double.Fault{Status: 503, Code: "SlowDown", RetryAfter: "0"}},
		{"no answer", s3double.Fault{Cut: true}},
		{"no answer, and it is done", s3double.Fault{Cut: true, Did: true}},
		{"half an answer, and it is done", s3double.Fault{Cut: true, Did: true, At: -1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			d := newDouble(t, s3double.Options{}, nil)
			s := d.openedAt(t, t.TempDir())
			key, data := noise(c.name, 11<<20)
			c.fault.Op, c.fault.Count = s3double.CompleteMultipartUpload, 1
			d.Strike(c.fault)
			if err := s.PutFile(t.Context(), key, spooled(t, s, data), storage.Durable); err != nil {
				t.Fatal(err)
			}
			d.whole(t, key, data)
			if n, parts := d.Count(s3double.CreateMultipartUpload), d.Count(s3double.UploadPart); n != 1 || parts != 3 {
				t.Errorf("%d uploads of %d parts", n, parts)
			}
		})
	}
}

// TestPartsAreKept: when the last call fails again and again, the parts stay, also
// through a restart, and when the upload itself is gone it begins anew.
func TestPartsAreKept(t *testing.T) {
	for _, expired := range []bool{false, true} {
		t.Run(fmt.Sprintf("expired=%v", expired), func(t *testing.T) {
			t.Parallel()
			d := newDouble(t, s3double.Options{}, nil)
			dir := t.TempDir()
			s, err := d.open(dir)
			if err != nil {
				t.Fatal(err)
			}
			key, data := noise("kept", 11<<20)
			end := d.Strike(s3double.Fault{Op: s3double.CompleteMultipartUpload, Status: 503, Code: "SlowDown"})
			if err := s.PutFile(t.Context(), key, spooled(t, s, data), storage.Durable); !errors.Is(err, storage.ErrUnavailable) {
				t.Errorf("PutFile: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			end()
			uploads, parts := 1, 3
			if expired {
				d.Expire()
				uploads, parts = 2, 6
			}
			s = d.openedAt(t, dir)
			syncs(t, s, key)
			d.whole(t, key, data)
			if n := d.Count(s3double.CreateMultipartUpload); n != uploads {
				t.Errorf("%d uploads were begun, want %d", n, uploads)
			}
			if n := d.Count(s3double.UploadPart); n != parts {
				t.Errorf("%d parts were sent, want %d", n, parts)
			}
		})
	}
}

// TestDownInMidUpload: whoever waits for an upload is told when S3 goes away, and the
// parts that are there are not sent again when it is back.
func TestDownInMidUpload(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := d.openedAt(t, t.TempDir())
	key, data := noise("down", 31<<20) // 7 parts, of which 3 at once
	hold := make(chan struct{})
	defer close(hold)
	end := d.Strike(s3double.Fault{Op: s3double.UploadPart, Spare: 3, Hold: hold})
	done := make(chan error, 1)
	go func() { done <- s.PutFile(t.Context(), key, spooled(t, s, data), storage.Durable) }()
	d.Await(t, "parts that are held, and nothing else under way", func(calls []s3double.Call) bool {
		held := 0
		for _, call := range calls {
			if call.Held {
				held++
			}
		}
		return held == 3
	})
	d.Down()
	if err := <-done; !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("PutFile: %v", err)
	}
	if got, err := s.Get(t.Context(), key, 64<<20); err == nil && !bytes.Equal(got, data) || err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after a PutFile that failed, Get: %d bytes, %v", len(got), err)
	}
	end()
	d.Forget()
	d.Up(t)
	syncs(t, s, key)
	d.whole(t, key, data)
	var sent []int
	for _, call := range d.Calls() {
		if call.Op == s3double.UploadPart {
			sent = append(sent, call.Part)
		}
	}
	if slices.Sort(sent); len(sent) != 4 || d.Count(s3double.CreateMultipartUpload) != 0 {
		t.Errorf("parts %v were sent when it was back, and %d uploads begun", sent, d.Count(s3double.CreateMultipartUpload))
	}
}

const (
	uploaderURL = "S3_UPLOADER_URL"
	uploaderDir = "S3_UPLOADER_DIR"
)

// TestUploader is a process that dies in the middle of an upload in parts. It
// does nothing when it is run as a test.
func TestUploader(t *testing.T) {
	url := os.Getenv(uploaderURL)
	if url == "" {
		return
	}
	d := &double{&s3double.Server{URL: url}, "", nil}
	s, err := d.open(os.Getenv(uploaderDir))
	if err != nil {
		t.Fatal(err)
	}
	parts := make(chan struct{}, 100)
	failpoint.Set(func(name string) {
		if name != "s3.part" {
			return
		}
		if parts <- struct{}{}; len(parts) == 4 {
			self, _ := os.FindProcess(os.Getpid())
			self.Kill()
			select {}
		}
	})
	key, data := noise("killed", 26<<20)
	t.Fatal(s.PutFile(context.Background(), key, spooled(t, s, data), storage.Durable))
}

// TestKilledInMidUpload: another process goes on where the first one died.
func TestKilledInMidUpload(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := filepath.Join(t.TempDir(), "near")
	cmd := exec.Command(os.Args[0], "-test.run=^TestUploader$")
	cmd.Env = append(os.Environ(), uploaderURL+"="+d.URL, uploaderDir+"="+dir)
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the child was not killed: %v\n%s", err, out)
	}
	key, data := noise("killed", 26<<20)
	if d.Size(key) != -1 {
		t.Fatal("it had been stored")
	}
	// What the ledger has is not sent again.
	ledgers, _ := filepath.Glob(filepath.Join(dir, filepath.FromSlash(ownDir), "parts", "*.json"))
	if len(ledgers) != 1 {
		t.Fatalf("the ledgers are %q", ledgers)
	}
	var page ledgerPage
	text, err := os.ReadFile(ledgers[0])
	if err == nil {
		err = json.Unmarshal(text, &page)
	}
	if err != nil {
		t.Fatal(err)
	}
	var missing []int
	for i, etag := range page.Parts.ETags {
		if etag == "" {
			missing = append(missing, i+1)
		}
	}
	if n := len(page.Parts.ETags); n != 6 || len(missing) == 6 || len(missing) == 0 {
		t.Fatalf("of %d parts %v were not sent", n, missing)
	}
	d.Forget()
	s := d.openedAt(t, dir)
	syncs(t, s, key)
	d.whole(t, key, data)
	var sent []int
	for _, call := range d.Calls() {
		if call.Op == s3double.UploadPart {
			sent = append(sent, call.Part)
		}
	}
	slices.Sort(sent)
	if !slices.Equal(sent, missing) {
		t.Errorf("parts %v were sent, and %v were missing", sent, missing)
	}
	if n := d.Count(s3double.CreateMultipartUpload); n != 0 {
		t.Errorf("%d uploads were begun anew", n)
	}
}

// TestBrokenPut: where the connection breaks, the store looks whether the bytes have
// come before it sends them again.
func TestBrokenPut(t *testing.T) {
	for _, did := range []bool{true, false} {
		d := newDouble(t, s3double.Options{}, func(s *S3) { s.PutLimit = "64MiB" })
		s := d.openedAt(t, t.TempDir())
		key, data := noise("broken", 9<<20)
		d.Strike(s3double.Fault{Op: s3double.PutObject, Key: key, Count: 1, Cut: true, Did: did, At: 1 << 20})
		if err := s.PutFile(t.Context(), key, spooled(t, s, data), storage.Durable); err != nil {
			t.Fatal(err)
		}
		d.whole(t, key, data)
		var ops []string
		for _, call := range d.Calls() {
			if call.Key == key {
				ops = append(ops, call.Op)
			}
		}
		want := []string{"PutObject", "HeadObject"}
		if !did {
			want = append(want, "PutObject")
		}
		if !slices.Equal(ops, want) {
			t.Errorf("stored at first: %v; calls: %q", did, ops)
		}
	}
}

// TestCutGets: what is cut is asked for again, or is an error; never is it the end.
func TestCutGets(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := d.openedAt(t, t.TempDir())
	key, data := noise("cut", 300_000)
	if err := s.Put(t.Context(), key, data, storage.Durable); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1, -1, 298_000} {
		s.Distant().Drop(key)
		d.Strike(s3double.Fault{Op: s3double.GetObject, Count: 1, Cut: true, At: at})
		if got, err := s.Get(t.Context(), key, 1<<20); err != nil || !bytes.Equal(got, data) {
			t.Errorf("Get, cut once at %d: %d bytes, %v", at, len(got), err)
		}
		s.Distant().Drop(key)
		end := d.Strike(s3double.Fault{Op: s3double.GetObject, Cut: true, At: at})
		for _, offset := range []int64{0, 1000} {
			r, _, err := s.Open(t.Context(), key, offset, -1)
			if err == nil {
				var got []byte
				got, err = io.ReadAll(r)
				r.Close()
				if !bytes.HasPrefix(data[offset:], got) {
					t.Errorf("Open from %d, cut at %d: wrong bytes", offset, at)
				}
			}
			if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Open from %d, cut at %d: %v", offset, at, err)
			}
		}
		end()
		// The next call may be kept back for a while.
		syncs(t, s, key)
		eventually(t, "the bytes", func() error {
			got, err := s.Get(t.Context(), key, 1<<20)
			if err == nil && !bytes.Equal(got, data) {
				t.Fatalf("Get: %d other bytes", len(got))
			}
			return err
		})
	}
}

// TestWrongBytes: bytes that are not what their key says are not kept near, and an
// object that has been found wrong is replaced.
func TestWrongBytes(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := d.openedAt(t, t.TempDir())
	key, data := noise("wrong", 100_000)
	if err := s.Put(t.Context(), key, data, storage.Durable); err != nil {
		t.Fatal(err)
	}
	s.Distant().Drop(key)
	end := d.Strike(s3double.Fault{Op: s3double.GetObject, Wrong: true, At: -1})
	if _, err := s.Get(t.Context(), key, 1<<20); err != nil {
		t.Fatal(err)
	}
	end()
	if r, _, err := s.Distant().OpenNear(t.Context(), key); err == nil {
		r.Close()
		t.Error("wrong bytes are near")
	}
	if got, err := s.Get(t.Context(), key, 1<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("Get: %d bytes, %v", len(got), err)
	}
	s.Distant().Drop(key)
	d.Spoil(key)
	s.Distant().Distrust(key)
	if err := s.Put(t.Context(), key, data, storage.Durable); err != nil {
		t.Fatal(err)
	}
	d.whole(t, key, data)
}

// TestClocks: the clock of this machine is wrong.
func TestClocks(t *testing.T) {
	for _, skew := range []time.Duration{-time.Hour, time.Hour} {
		d := newDouble(t, s3double.Options{Quirks: s3double.Quirks{Skew: skew}}, nil)
		s := d.openedAt(t, t.TempDir())
		key, data := noise("clock", 1000)
		if err := s.Put(t.Context(), key, data, storage.Durable); err != nil {
			t.Errorf("the clocks are %s apart: %v", skew, err)
		}
		d.whole(t, key, data)
	}
}

// TestRefused: what is refused is not absent, and not stored.
func TestRefused(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := d.openedAt(t, t.TempDir())
	key, data := noise("refused", 1000)
	if err := s.Put(t.Context(), key, data, storage.Durable); err != nil {
		t.Fatal(err)
	}
	for _, fault := range []s3double.Fault{
		{Status: 403, Code: "AccessDenied"}, {Status: 403, Code: "RequestTimeTooSkewed"}, {Status: 404, Code: "NoSuchBucket"},
		{Status: 403, Code: "InvalidAccessKeyId"}, {Status: 429, Code: "TooManyRequests"}, {Status: 307, Code: "TemporaryRedirect"},
	} {
		s.Distant().Drop(key)
		end := d.Strike(fault)
		_, err := s.Get(t.Context(), key, 1<<20)
		if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Get, %s: %v", fault.Code, err)
		}
		err = s.Put(t.Context(), "mirror/some/record", []byte(fault.Code), storage.Durable)
		if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Put, %s: %v", fault.Code, err)
		}
		if err != nil && (strings.Contains(err.Error(), s3double.Secret) || strings.Contains(err.Error(), "Signature=")) {
			t.Errorf("the error tells secrets: %v", err)
		}
		end()
		syncs(t, s, "mirror/some/record")
		if got, _ := d.Read("mirror/some/record"); string(got) != fault.Code {
			t.Errorf("after %s the bucket has %q", fault.Code, got)
		}
	}
}

// TestListingFails: without a listing the store asks for each key, and says what to
// do.
func TestListingFails(t *testing.T) {
	for _, quirks := range []s3double.Quirks{{StuckToken: true}, {V1Only: true}} {
		d := newDouble(t, s3double.Options{Quirks: quirks, Page: 2}, nil)
		key, data := noise("unlisted", 1000)
		d.Write(key, data)
		for i := range 5 {
			d.Write(fmt.Sprintf("docker/registry/v2/repositories/a/_layers/sha256/%d/link", i), nil)
		}
		s, err := d.open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if err := s.Distant().Relist(t.Context()); err == nil || !strings.Contains(err.Error(), "list v1") {
			t.Errorf("%+v: Relist: %v", quirks, err)
		}
		if got, err := s.Get(t.Context(), key, 1<<20); err != nil || !bytes.Equal(got, data) {
			t.Errorf("Get: %d bytes, %v", len(got), err)
		}
		if _, err := s.Stat(t.Context(), key[:len(key)-5]+"/none"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Stat of nothing: %v", err)
		}
		if err := s.Put(t.Context(), "mirror/some/record", []byte("x"), storage.Durable); err != nil {
			t.Errorf("Put: %v", err)
		}
	}
}

// TestSecondListing: what others put there shortly before a listing that lags is not
// missed for long.
func TestSecondListing(t *testing.T) {
	d := newDouble(t, s3double.Options{Quirks: s3double.Quirks{LaggingList: true}}, nil)
	key, data := noise("missed", 1000)
	d.Write(key, data)
	config, err := d.backend(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBucket(t.Context(), config.settings)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan chan time.Time, 10)
	s, err := openWith(t.Context(), config.near, b, config.settings, time.Now, func(every time.Duration) (<-chan time.Time, func()) {
		tick := make(chan time.Time)
		if every == settle {
			waiting <- tick
		}
		return tick, func() {}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	var tick chan time.Time
	select {
	case tick = <-waiting:
	case <-time.After(time.Minute):
		t.Fatal("no second listing is waited for")
	}
	if err := s.Listed(t.Context()); err != nil {
		t.Error(err)
	}
	d.CatchUp()
	tick <- time.Now()
	eventually(t, "what the first listing missed", func() error {
		_, err := s.Stat(t.Context(), key)
		return err
	})
	if got, err := s.Get(t.Context(), key, 1<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("Get: %d bytes, %v", len(got), err)
	}
	if len(waiting) > 0 {
		t.Error("it goes on listing")
	}
}

// TestTwoHundredParts: where uploads have at most 200 parts, and a listing of parts
// that ends there without a word, a layer of more fails with a registry that goes on
// where the listing says, and does not with a store that has max_parts 200.
func TestTwoHundredParts(t *testing.T) {
	const ceiling, parts = 200, 203
	d := newDouble(t, s3double.Options{Quirks: s3double.Quirks{MaxParts: ceiling, ShortParts: ceiling}}, func(s *S3) { s.MaxParts = ceiling })
	t.Run("registry:2", func(t *testing.T) {
		// As its driver does, each PATCH finds its upload by listing what is there.
		d.Set(func(q *s3double.Quirks) { q.MaxParts = 0 })
		defer d.Set(func(q *s3double.Quirks) { q.MaxParts = ceiling })
		backend, err := d.backend(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		b, err := newBucket(t.Context(), backend.settings)
		if err != nil {
			t.Fatal(err)
		}
		defer b.close()
		client := b.remote.Load().client
		name := aws.String("docker/registry/v2/repositories/a/_uploads/uuid/data")
		begun, err := client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: &b.name, Key: name})
		if err != nil {
			t.Fatal(err)
		}
		for written := int64(0); ; {
			var found int64
			var number int32
			listed := s3.NewListPartsPaginator(client, &s3.ListPartsInput{Bucket: &b.name, Key: name, UploadId: begun.UploadId})
			for listed.HasMorePages() {
				page, err := listed.NextPage(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, part := range page.Parts {
					found, number = found+*part.Size, max(number, *part.PartNumber)
				}
			}
			if found != written {
				if written != ceiling+1 {
					t.Errorf("upload resumed at wrong offset: %d != %d", found, written)
				}
				return
			}
			if written > parts {
				t.Fatal("it goes on beyond 200 parts")
			}
			if _, err := client.UploadPart(t.Context(), &s3.UploadPartInput{
				Bucket: &b.name, Key: name, UploadId: begun.UploadId, PartNumber: aws.Int32(number + 1), Body: bytes.NewReader([]byte("x")),
			}); err != nil {
				t.Fatal(err)
			}
			written++
		}
	})
	d.Expire()
	d.Forget()

	// Zeros take room neither here nor there.
	const size = parts * 5 << 20
	s := d.openedAt(t, t.TempDir())
	path := spooled(t, s, nil)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.LimitReader(zeros{}, size)); err != nil {
		t.Fatal(err)
	}
	key := keyOfSum(hash.Sum(nil))
	if err := s.PutFile(t.Context(), key, path, storage.Durable); err != nil {
		t.Fatal(err)
	}
	if got := d.Size(key); got != size || len(d.Uploads()) > 0 {
		t.Errorf("the bucket has %d bytes, want %d; uploads left: %q", got, size, d.Uploads())
	}
	sent := d.Count(s3double.UploadPart)
	if sent < ceiling*4/5 || sent > ceiling || d.Count(s3double.ListParts) != 0 {
		t.Errorf("%d parts were sent, and listed %d times", sent, d.Count(s3double.ListParts))
	}
	calls := 0
	for _, call := range d.Calls() {
		if call.Key == key {
			calls++
		}
	}
	if calls > sent+3 {
		t.Errorf("%d calls for %d parts", calls, sent)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
