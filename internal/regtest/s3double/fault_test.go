package s3double_test

import (
	"crypto/md5"
	"encoding/base64"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

func md5sum(data string) string {
	s := md5.Sum([]byte(data))
	return base64.StdEncoding.EncodeToString(s[:])
}

func TestStatusFaults(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	end := s.Strike(s3double.Fault{Op: s3double.PutObject, Key: "slow", Spare: 1, Count: 1, Status: 503, Code: "SlowDown", RetryAfter: "7"})
	c.want(200, "", "PUT", "/bucket/slow/a", "x")
	c.want(200, "", "PUT", "/bucket/other", "x")
	if res := c.want(503, "<Code>SlowDown</Code>", "PUT", "/bucket/slow/b", "x"); res.Header.Get("Retry-After") != "7" {
		t.Errorf("Retry-After is %q", res.Header.Get("Retry-After"))
	}
	if _, there := s.Read("slow/b"); there {
		t.Error("it was stored")
	}
	c.want(200, "", "PUT", "/bucket/slow/b", "x")
	end()

	end = s.Strike(s3double.Fault{Every: 3, Status: 500, Code: "InternalError"})
	var statuses []int
	for range 6 {
		statuses = append(statuses, c.do("GET", "/bucket/other", "").StatusCode)
	}
	if statuses[0] != 500 || statuses[1] != 200 || statuses[2] != 200 || statuses[3] != 500 || statuses[5] != 200 {
		t.Errorf("every third: %v", statuses)
	}
	end()

	// A fault does not hide a wrong signature.
	defer s.Strike(s3double.Fault{Status: 503, Code: "SlowDown"})()
	c.secret = "wrong"
	c.want(403, "SignatureDoesNotMatch", "GET", "/bucket/other", "")
}

func TestCompleteFaults(t *testing.T) {
	for _, f := range []struct {
		name  string
		fault s3double.Fault
		did   bool
	}{
		{"an error with 200", s3double.Fault{Status: 200, Code: "InternalError"}, false},
		{"an error with 200, and it is done", s3double.Fault{Status: 200, Code: "InternalError", Did: true}, true},
		{"500, and it is done", s3double.Fault{Status: 500, Code: "InternalError", Did: true}, true},
		{"no answer", s3double.Fault{Cut: true}, false},
		{"no answer, and it is done", s3double.Fault{Cut: true, Did: true}, true},
		{"half an answer, and it is done", s3double.Fault{Cut: true, Did: true, At: -1}, true},
	} {
		t.Run(f.name, func(t *testing.T) {
			s := s3double.New(t, s3double.Options{})
			c := newClient(t, s)
			id := c.begin("key")
			tag := c.part("key", id, 1, "x")
			f.fault.Op, f.fault.Count = s3double.CompleteMultipartUpload, 1
			s.Strike(f.fault)
			res, err := c.try("POST", "/bucket/key?uploadId="+id, completion(tag))
			switch {
			case f.fault.Cut && f.fault.At == 0:
				if err == nil {
					t.Errorf("answered: %d", res.StatusCode)
				}
			case f.fault.Cut:
				if err != nil || res.StatusCode != 200 || res.err == nil {
					t.Errorf("%v, %v", err, res.err)
				}
			case err != nil || res.StatusCode != f.fault.Status || !strings.Contains(res.body, "<Error><Code>InternalError"):
				t.Errorf("%d %s, %v", res.StatusCode, res.body, err)
			}
			if _, there := s.Read("key"); there != f.did {
				t.Errorf("stored: %v", there)
			}
			if n := len(s.Uploads()["key"]); (n == 0) != f.did {
				t.Errorf("%d uploads are left", n)
			}
		})
	}
}

func TestCutsAndWrongBytes(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	value := strings.Repeat("0123456789", 30_000)
	s.Write("key", []byte(value))

	s.Strike(s3double.Fault{Op: s3double.GetObject, Count: 1, Cut: true, At: 100_000})
	if res, err := c.try("GET", "/bucket/key", ""); err != nil || res.err == nil || res.body != value[:100_000] {
		t.Errorf("%d bytes, %v, %v", len(res.body), err, res.err)
	}
	s.Strike(s3double.Fault{Op: s3double.GetObject, Count: 1, Cut: true})
	if res, err := c.try("GET", "/bucket/key", ""); err == nil {
		t.Errorf("answered: %d", res.StatusCode)
	}
	s.Strike(s3double.Fault{Op: s3double.GetObject, Count: 1, Wrong: true, At: 70_000})
	if res := c.want(200, "", "GET", "/bucket/key", ""); res.body == value || res.body[:70_000] != value[:70_000] || res.body[70_001:] != value[70_001:] {
		t.Error("not one byte is wrong")
	}
	c.want(200, value, "GET", "/bucket/key", "")

	s.Strike(s3double.Fault{Op: s3double.PutObject, Count: 1, Cut: true, At: 10_000})
	if _, err := c.try("PUT", "/bucket/new", value); err == nil {
		t.Error("answered")
	}
	if s.Size("new") != -1 {
		t.Error("half a body was stored")
	}
	s.Strike(s3double.Fault{Op: s3double.PutObject, Count: 1, Cut: true, Did: true})
	if _, err := c.try("PUT", "/bucket/new", value); err == nil {
		t.Error("answered")
	}
	if data, _ := s.Read("new"); string(data) != value {
		t.Errorf("%d bytes are stored", len(data))
	}
}

func TestHold(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	release := make(chan struct{})
	s.Strike(s3double.Fault{Op: s3double.PutObject, Hold: release})
	done := make(chan error, 1)
	go func() {
		_, err := c.try("PUT", "/bucket/key", "x")
		done <- err
	}()
	s.Await(t, "a PUT that is held", func(calls []s3double.Call) bool { return len(calls) == 1 && calls[0].Held })
	select {
	case err := <-done:
		t.Errorf("answered: %v", err)
	default:
	}
	if data, _ := s.Read("key"); string(data) != "x" {
		t.Errorf("%q is stored", data)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestTicks(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	tick := make(chan struct{})
	end := s.Strike(s3double.Fault{Tick: tick, Chunk: 10})
	done := make(chan response, 1)
	go func() {
		res, _ := c.try("PUT", "/bucket/key", strings.Repeat("x", 100))
		done <- res
	}()
	tick <- struct{}{}
	tick <- struct{}{}
	s.Await(t, "20 bytes of the body", func(calls []s3double.Call) bool { return len(calls) == 1 && calls[0].Received == 20 })
	close(tick)
	if res := <-done; res.Response == nil || res.StatusCode != 200 {
		t.Errorf("%+v", res)
	}
	end()

	tick = make(chan struct{})
	s.Strike(s3double.Fault{Tick: tick, Chunk: 10})
	go func() {
		res, _ := c.try("GET", "/bucket/key", "")
		done <- res
	}()
	tick <- struct{}{}
	s.Await(t, "10 bytes of the answer", func(calls []s3double.Call) bool { return calls[1].Sent == 10 })
	close(tick)
	if res := <-done; len(res.body) != 100 {
		t.Errorf("%d bytes", len(res.body))
	}
}

func TestDown(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	s.Strike(s3double.Fault{Count: 1, Hold: make(chan struct{})})
	done := make(chan error, 1)
	go func() {
		_, err := c.try("PUT", "/bucket/key", "x")
		done <- err
	}()
	s.Await(t, "a call that is held", func(calls []s3double.Call) bool { return len(calls) == 1 && calls[0].Held })
	s.Down()
	if err := <-done; err == nil {
		t.Error("answered")
	}
	if _, err := c.try("GET", "/bucket/key", ""); err == nil {
		t.Error("answered")
	}
	s.Up(t)
	c.want(200, "x", "GET", "/bucket/key", "")
	if n := s.Count(); n != 2 {
		t.Errorf("%d calls", n)
	}
}

// TestUpWaitsForItsPort: another process may have been given the port meanwhile.
func TestUpWaitsForItsPort(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	s.Down()
	other, err := net.Listen("tcp", s.Host)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { other.Close() })
	s.Up(t)
	c.want(200, "", "PUT", "/bucket/key", "x")
}
