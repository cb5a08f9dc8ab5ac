package module_test

import (
	"bytes"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

// onBucket starts a process on a bucket, with a cache of its own. It dies at a
// failpoint if one is named.
func onBucket(t *testing.T, s *s3double.Server, dir, dies string) *mirror {
	t.Helper()
	return childOf(t, dir, func(url string) string {
		return fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage s3 %s {\n endpoint %s\n credentials %s %s\n secret known-to-all-of-them\n cache %s\n }\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}",
			s3double.Bucket, s.URL, s3double.Key, s3double.Secret, dir, url, openToAll)
	}, dies)
}

// uploads are the keys of what has come of uploads.
func uploads(s *s3double.Server) []string { return s.Keys("mirror/uploads/") }

// nothingOf checks that nothing is left of any upload.
func nothingOf(t *testing.T, s *s3double.Server) {
	t.Helper()
	if left := uploads(s); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// sees waits until a blob that was pushed to another process is seen, and checks it.
func (u uploader) sees(d digest.Digest, data []byte) {
	u.t.Helper()
	eventually(u.t, "the blob to be seen", func() bool {
		return u.ask("HEAD", "blobs/"+d.String(), nil).StatusCode == http.StatusOK
	})
	u.keeps(d, data)
}

// TestPushAlternates: the requests of a push come to two processes in turn, as behind
// a balancer, and each serves then what was pushed.
func TestPushAlternates(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	a, b := uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}, uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}
	turn := 0
	next := func() uploader {
		turn++
		return []uploader{a, b}[turn%2]
	}
	for _, size := range []int{0, 1, 100_000, 1_500_000} {
		for _, chunk := range []int{size + 1, size/2 + 1, size/7 + 1} {
			data := regtest.Random(fmt.Sprint("alternates", size, chunk), size).Data
			d := digest.FromBytes(data)
			at := next().begin()
			for end := 0; end < size; end = min(end+chunk, size) {
				next().at(next().says("204", "GET", at, nil), end)
				to := min(end+chunk, size)
				wrong := next().says("416 BLOB_UPLOAD_INVALID", "PATCH", at, strings.NewReader("wrong"), "Content-Range", fmt.Sprintf("%d-%d", end+1, end+5))
				a.at(wrong, end)
				part := next().says("202", "PATCH", at, bytes.NewReader(data[end:to]), "Content-Range", fmt.Sprintf("%d-%d", end, to-1))
				a.at(part, to)
			}
			turn += size % 2
			next().says("201", "PUT", finish(at, d), nil)
			for _, u := range []uploader{a, b} {
				u.sees(d, data)
				u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
			}
			nothingOf(t, s)
		}
	}
	at := a.begin()
	b.says("202", "PATCH", at, strings.NewReader("abc"))
	a.says("204", "DELETE", at, nil)
	b.says("404 BLOB_UPLOAD_UNKNOWN", "PATCH", at, strings.NewReader("def"))
	nothingOf(t, s)

	image := regtest.NewImage("alternates", regtest.Random("layer", 300_000))
	pusher{a.mirror, "apps/web"}.image(image, "v1")
	for _, tag := range []string{"v2", "v1"} { // one that was not there, and one that was
		eventually(t, tag+" to be seen", func() bool {
			return check(b.ask("GET", "manifests/v1", nil), image.Content) == nil
		})
		image = regtest.NewImage("alternates "+tag, regtest.Random("layer", 300_000))
		pusher{a.mirror, "apps/web"}.image(image, "v1")
	}
}

// TestPushOutage: a bucket that cannot be reached in the middle of a push is told of
// as such, loses nothing that was acknowledged, and the push can be gone on with.
func TestPushOutage(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	a, b := uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}, uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}
	data := regtest.Random("outage", 900_000).Data
	d := digest.FromBytes(data)
	at := a.begin()
	a.at(a.says("202", "PATCH", at, bytes.NewReader(data[:300_000])), 300_000)
	s.Down()
	a.says("503 UNAVAILABLE", "PATCH", at, bytes.NewReader(data[300_000:600_000]))
	b.says("503 UNAVAILABLE", "PATCH", at, bytes.NewReader(data[300_000:600_000]))
	a.says("503 UNAVAILABLE", "PUT", finish(at, d), bytes.NewReader(data[300_000:]))
	a.says("503 UNAVAILABLE", "POST", "blobs/uploads/", nil)
	s.Up(t)
	back := func(u uploader, end int) {
		t.Helper()
		var found *answer
		eventually(t, "the bucket to be asked again", func() bool {
			found = u.ask("GET", at, nil)
			return found.StatusCode == http.StatusNoContent
		})
		u.at(found, end)
	}
	back(b, 300_000)
	b.at(b.says("202", "PATCH", at, bytes.NewReader(data[300_000:600_000])), 600_000)
	back(a, 600_000)

	// The bytes of a piece come, and the state does not.
	end := s.Strike(s3double.Fault{Op: s3double.PutObject, Key: "/state", Status: 503, Code: "SlowDown"})
	a.says("503 UNAVAILABLE", "PATCH", at, bytes.NewReader(data[600_000:700_000]))
	end()
	back(b, 600_000)
	back(a, 600_000)
	a.at(a.says("202", "PATCH", at, bytes.NewReader(data[600_000:700_000])), 700_000)

	// What is fetched is cut, and gone on with.
	s.Forget()
	s.Strike(s3double.Fault{Op: s3double.GetObject, Key: "/" + path.Base(at) + "/300000.", Cut: true, At: 100_000, Count: 1})
	a.says("201", "PUT", finish(at, d), bytes.NewReader(data[700_000:]))
	gets := 0
	for _, call := range s.Calls() {
		if call.Op == s3double.GetObject && strings.Contains(call.Key, "/300000.") {
			gets++
		}
		if call.Op == s3double.GetObject && strings.Contains(call.Key, "/0.") {
			t.Error("what came here was fetched")
		}
	}
	if gets != 2 {
		t.Errorf("it was fetched by %d requests", gets)
	}
	for _, u := range []uploader{a, b} {
		u.sees(d, data)
	}
}

// TestPushCosts: what S3 is asked for pushes, so that nobody is surprised by a bill.
func TestPushCosts(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	u := uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}
	first := regtest.Random("first", 10_000).Data
	u.says("201", "POST", finish("blobs/uploads/", digest.FromBytes(first)), bytes.NewReader(first))
	asked := func(of func(key string) bool) (ops []string) {
		for _, call := range s.Calls() {
			if of(call.Key) {
				ops = append(ops, strings.TrimSuffix(call.Op, "Object"))
			}
		}
		return ops
	}
	session := func(key string) bool { return strings.HasPrefix(key, "mirror/uploads/") }

	whole := regtest.Random("whole", 200_000).Data
	s.Forget()
	u.says("201", "POST", finish("blobs/uploads/", digest.FromBytes(whole)), bytes.NewReader(whole))
	if got := asked(session); len(got) > 0 {
		t.Errorf("a blob by POST: %q", got)
	}

	put := regtest.Random("put", 200_000).Data
	s.Forget()
	u.says("201", "PUT", finish(u.begin(), digest.FromBytes(put)), bytes.NewReader(put))
	if got, want := asked(session), []string{"Put", "Get", "Delete"}; !slices.Equal(got, want) {
		t.Errorf("a blob by PUT: %q, want %q", got, want)
	}

	patched := regtest.Random("patched", 200_000).Data
	s.Forget()
	at := u.begin()
	u.says("202", "PATCH", at, bytes.NewReader(patched))
	u.says("201", "PUT", finish(at, digest.FromBytes(patched)), nil)
	if got, want := asked(session), []string{"Put", "Get", "Put", "Get", "Put", "Get", "Get", "Delete", "Delete"}; !slices.Equal(got, want) {
		t.Errorf("a blob by PATCH and PUT: %q, want %q", got, want)
	}
	nothingOf(t, s)
}

// TestPushKillOnBucket kills a process at each step of an upload that another one has
// begun. That one goes on with what was acknowledged.
func TestPushKillOnBucket(t *testing.T) {
	data := regtest.Random("kill on bucket", 1_200_000).Data
	d := digest.FromBytes(data)
	const third = 400_000
	for _, c := range []struct {
		at     string
		end    int  // where the upload ends afterwards; -1: there is none
		stored bool // the blob is there
		left   int  // objects that a sweep removes
	}{
		{"upload.written", third, false, 0},
		{"upload.piece", third, false, 1},
		{"upload.state", 2 * third, false, 0},
		{"upload.gathered", 2 * third, false, 0},
		{"push.stored", 2 * third, false, 0},
		{"push.linked", 2 * third, false, 0},
		{"push.synced", 2 * third, true, 0},
		{"upload.committed", 2 * third, true, 0},
		{"upload.ended", -1, true, 2},
	} {
		t.Run(c.at, func(t *testing.T) {
			s := s3double.New(t, s3double.Options{})
			a := uploader{onBucket(t, s, t.TempDir(), ""), "apps/web"}
			dir := t.TempDir()
			doomed := uploader{onBucket(t, s, dir, c.at), "apps/web"}
			at := a.begin()
			a.at(a.says("202", "PATCH", at, bytes.NewReader(data[:third])), third)
			for _, step := range []func() (*http.Response, error){
				func() (*http.Response, error) { return doomed.bring("PATCH", at, data[third:2*third]) },
				func() (*http.Response, error) { return doomed.bring("PUT", finish(at, d), data[2*third:]) },
			} {
				resp, err := step()
				if err != nil {
					break
				}
				resp.Body.Close()
			}
			doomed.dead()
			again := uploader{onBucket(t, s, dir, ""), "apps/web"}
			if c.stored {
				a.sees(d, data)
			}
			if c.end < 0 {
				a.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
			} else {
				again.at(again.says("204", "GET", at, nil), c.end)
				a.at(a.says("204", "GET", at, nil), c.end)
				a.says("201", "PUT", finish(at, d), bytes.NewReader(data[c.end:]))
			}
			for _, u := range []uploader{a, again} {
				u.sees(d, data)
			}
			if left := uploads(s); len(left) != c.left {
				t.Errorf("left: %q", left)
			}
		})
	}
}
