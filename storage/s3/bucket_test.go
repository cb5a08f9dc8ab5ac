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
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// settingsOf are those of a client of a double.
func settingsOf(s *s3double.Server) settings {
	return settings{
		Endpoint: s.URL, Bucket: s3double.Bucket, PathStyle: true,
		AccessKey: s3double.Key, SecretKey: s3double.Secret,
		PutLimit: 64 << 20, PartSize: 16 << 20, MaxParts: 10_000,
	}
}

func connect(t *testing.T, s settings) *bucket {
	t.Helper()
	b, err := newBucket(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	return b
}

// content is n bytes, and their sha256.
func content(n int) ([]byte, string) {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(data)
	sum := sha256.Sum256(data)
	return data, hex.EncodeToString(sum[:])
}

func readAll(t *testing.T, b *bucket, key string, offset, length int64) ([]byte, object, error) {
	t.Helper()
	r, o, err := b.get(context.Background(), key, offset, length)
	if err != nil {
		return nil, o, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	return data, o, err
}

func TestObjects(t *testing.T) {
	for _, prefix := range []string{"", "some/registry"} {
		t.Run("prefix="+prefix, func(t *testing.T) {
			ctx := context.Background()
			double := s3double.New(t, s3double.Options{})
			s := settingsOf(double)
			s.Prefix = prefix
			b := connect(t, s)
			data, sum := content(10_000)
			const key = "docker/registry/v2/some+odd key%41/ä"
			if _, err := b.put(ctx, key, bytes.NewReader(data), int64(len(data)), sum); err != nil {
				t.Fatal(err)
			}
			if got, _ := double.Read(strings.TrimPrefix(prefix+"/"+key, "/")); !bytes.Equal(got, data) {
				t.Errorf("%d bytes arrived, of %d", len(got), len(data))
			}
			o, err := b.head(ctx, key)
			if err != nil || o.key != key || o.size != 10_000 || o.etag == "" || time.Since(o.modified) > time.Hour {
				t.Errorf("head: %+v, %v", o, err)
			}
			for _, c := range []struct{ offset, length, want int64 }{
				{0, -1, 10_000}, {0, 10_000, 10_000}, {0, 1, 1}, {9_999, 1, 1}, {9_999, -1, 1}, {5_000, 100, 100}, {10_000, -1, 0}, {10_000, 0, 0}, {0, 0, 0},
			} {
				got, of, err := readAll(t, b, key, c.offset, c.length)
				if err != nil || of.size != o.size || of.etag != o.etag || !bytes.Equal(got, data[c.offset:c.offset+c.want]) {
					t.Errorf("%d bytes from %d: %d bytes of %+v, %v", c.length, c.offset, len(got), of, err)
				}
			}
			for _, c := range [][2]int64{{10_001, -1}, {9_999, 2}, {0, 10_001}, {10_000, 1}, {-1, 2}, {10_001, 0}} {
				if got, _, err := readAll(t, b, key, c[0], c[1]); err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrUnavailable) {
					t.Errorf("%d bytes from %d: %d bytes, %v; want an error", c[1], c[0], len(got), err)
				}
			}
			if err := b.putBytes(ctx, key, nil); err != nil {
				t.Fatal(err)
			}
			if got, o, err := readAll(t, b, key, 0, -1); err != nil || len(got) != 0 || o.size != 0 {
				t.Errorf("an empty object: %d bytes of %+v, %v", len(got), o, err)
			}
			for range 2 {
				if err := b.delete(ctx, key); err != nil {
					t.Errorf("delete: %v", err)
				}
			}
			_, _, got := readAll(t, b, key, 5, -1)
			_, head := b.head(ctx, key)
			for _, err := range []error{got, head} {
				if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, storage.ErrUnavailable) {
					t.Errorf("an absent object: %v", err)
				}
			}
		})
	}
}

func TestRead(t *testing.T) {
	ctx := context.Background()
	double := s3double.New(t, s3double.Options{})
	b := connect(t, settingsOf(double))
	data, _ := content(1000)
	double.Write("k", data)
	if got, o, err := b.read(ctx, "k", 1000); err != nil || !bytes.Equal(got, data) || o.size != 1000 {
		t.Errorf("%d bytes of %+v, %v", len(got), o, err)
	}
	if _, _, err := b.read(ctx, "k", 999); !errors.Is(err, storage.ErrTooLarge) {
		t.Errorf("beyond the limit: %v", err)
	}
	double.Strike(s3double.Fault{Op: s3double.GetObject, Cut: true, At: 500, Count: 1})
	if got, _, err := b.read(ctx, "k", 1000); err != nil || !bytes.Equal(got, data) {
		t.Errorf("after a cut: %d bytes, %v", len(got), err)
	}
	double.Strike(s3double.Fault{Op: s3double.GetObject, Cut: true, At: 500})
	if got, _, err := b.read(ctx, "k", 1000); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("cut each time: %d bytes, %v", len(got), err)
	}
}

// TestCalls has each operation cost one request.
func TestCalls(t *testing.T) {
	ctx := context.Background()
	double := s3double.New(t, s3double.Options{})
	b := connect(t, settingsOf(double))
	data, sum := content(9 << 20) // enough to be asked for before it is sent
	if _, err := b.put(ctx, "k", bytes.NewReader(data), int64(len(data)), sum); err != nil {
		t.Fatal(err)
	}
	readAll(t, b, "k", 0, -1)
	readAll(t, b, "k", 5, 10)
	b.head(ctx, "k")
	for range b.list(ctx, "", true) {
	}
	if _, err := b.presign(ctx, "GET", "k", time.Minute); err != nil {
		t.Fatal(err)
	}
	b.delete(ctx, "k")
	want := map[string]int64{"put": 1, "get": 2, "head": 1, "list": 1, "delete": 1}
	got := b.called()
	maps.DeleteFunc(got, func(_ string, n int64) bool { return n == 0 })
	if !maps.Equal(got, want) || double.Count() != 6 {
		t.Errorf("counted %v, and %d arrived; want %v", got, double.Count(), want)
	}
	for _, call := range double.Calls() {
		if value, ok := call.Header["Accept-Encoding"]; ok {
			t.Errorf("%s has Accept-Encoding %q", call.Op, value)
		}
		if call.Op == s3double.PutObject && call.Header.Get("X-Amz-Content-Sha256") != sum {
			t.Errorf("%s is signed as %s", call.Op, call.Header.Get("X-Amz-Content-Sha256"))
		}
		for name := range call.Header {
			if strings.Contains(strings.ToLower(name), "checksum") || name == "X-Amz-Trailer" || name == "Content-Encoding" {
				t.Errorf("%s has a header %s", call.Op, name)
			}
		}
	}
}

func TestAcceptEncodingIsNotSigned(t *testing.T) {
	double := s3double.New(t, s3double.Options{Quirks: s3double.Quirks{AcceptEncoding: "gzip,gzip(gfe)"}})
	double.Write("k", []byte("value"))
	b := connect(t, settingsOf(double))
	if got, _, err := b.read(context.Background(), "k", 10); err != nil || string(got) != "value" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWrongClock(t *testing.T) {
	double := s3double.New(t, s3double.Options{Quirks: s3double.Quirks{Skew: time.Hour}})
	double.Write("k", []byte("value"))
	b := connect(t, settingsOf(double))
	if got, _, err := b.read(context.Background(), "k", 10); err != nil || string(got) != "value" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestBucketInTheHost(t *testing.T) {
	double := s3double.New(t, s3double.Options{Domain: "s3.test", Quirks: s3double.Quirks{VirtualOnly: true}})
	double.Write("pre/k", []byte("value"))
	s := settingsOf(double)
	s.Endpoint, s.PathStyle, s.Prefix = "http://s3.test", false, "pre"
	direct := newTransport()
	s.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
		r.Host, r.URL.Host = r.URL.Host, double.Host
		return direct.RoundTrip(r)
	})
	t.Cleanup(direct.CloseIdleConnections)
	b := connect(t, s)
	if got, _, err := b.read(context.Background(), "k", 10); err != nil || string(got) != "value" {
		t.Errorf("%q, %v", got, err)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestList(t *testing.T) {
	for _, c := range []struct {
		name   string
		v1     bool
		quirks s3double.Quirks
	}{
		{"v2", false, s3double.Quirks{}},
		{"v1", true, s3double.Quirks{V1Only: true}},
		{"v2 in another order", false, s3double.Quirks{Unordered: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			double := s3double.New(t, s3double.Options{Page: 3, Quirks: c.quirks})
			s := settingsOf(double)
			s.ListV1, s.Prefix = c.v1, "p"
			b := connect(t, s)
			var want []string
			for i := range 10 {
				want = append(want, fmt.Sprintf("a/%d/x", i), fmt.Sprintf("a/v%d + %%41&<", i))
			}
			odd := []string{"a/w 1", "a/w 2", "a/w 3", "a/w 4", "a/w 5"} // whose encoding has another order
			want = append(want, "b/ä", "c")
			want = append(want, odd...)
			for _, key := range want {
				double.Write("p/"+key, []byte(key))
			}
			// What no store has written, and what is beside the prefix.
			for _, key := range []string{"p/a/dir/", "p/", "p//c", "p/./d", "px", "a/b"} {
				double.Write(key, []byte(key))
			}
			check := func(prefix string, deep bool, want []string) {
				t.Helper()
				var got []string
				for o, err := range b.list(context.Background(), prefix, deep) {
					if err != nil {
						t.Fatalf("list %q: %v", prefix, err)
					}
					if !strings.HasSuffix(o.key, "/") && (o.size != int64(len("p/"+o.key))-2 || o.etag == "" || o.modified.IsZero()) {
						t.Errorf("list %q: %+v", prefix, o)
					}
					got = append(got, o.key)
				}
				slices.Sort(got)
				slices.Sort(want)
				if !slices.Equal(got, want) {
					t.Errorf("list %q, deep %v:\n%q\nwant\n%q", prefix, deep, got, want)
				}
			}
			check("", true, slices.Clone(want))
			check("a/3/", true, []string{"a/3/x"})
			check("", false, []string{"a/", "b/", "c"})
			shallow := append(odd, "a/dir/")
			for i := range 10 {
				shallow = append(shallow, fmt.Sprintf("a/%d/", i), want[2*i+1])
			}
			check("a/", false, shallow)
			check("nothing/", true, nil)
		})
	}
}

// TestListEnds has listings end at a server whose listings do not.
func TestListEnds(t *testing.T) {
	for _, v1 := range []bool{false, true} {
		double := s3double.New(t, s3double.Options{Page: 2, Quirks: s3double.Quirks{StuckToken: true}})
		s := settingsOf(double)
		s.ListV1 = v1
		b := connect(t, s)
		for i := range 5 {
			double.Write(fmt.Sprint("k", i), nil)
		}
		var last error
		for _, err := range b.list(context.Background(), "", true) {
			last = err
		}
		if last == nil || !strings.Contains(last.Error(), "circles") {
			t.Errorf("v1 %v: %v", v1, last)
		}
		if n := double.Count(); n > 4 {
			t.Errorf("v1 %v: %d requests", v1, n)
		}
	}
	t.Run("circle", func(t *testing.T) {
		var p progress
		for i := 0; p.on(fmt.Sprint(min(i, 100+i%7))); i++ {
			if i > 1000 {
				t.Fatal("a circle of 7 is not found")
			}
		}
	})
	t.Run("no circle", func(t *testing.T) {
		var p progress
		for i := range 10_000 {
			if !p.on(fmt.Sprint(i)) {
				t.Fatalf("a circle is found at %d", i)
			}
		}
	})
}

// TestNoListing: a proxy's page is no empty bucket.
func TestNoListing(t *testing.T) {
	for _, answer := range []string{"", "<html></html>", "<html><body>it works</body></html>"} {
		for _, v1 := range []bool{false, true} {
			b := scripted(t, func(_ int, r *http.Request) (*http.Response, error) { return says(r, 200, answer) })
			s := b.remote.Load().settings
			s.ListV1 = v1
			if err := b.configure(context.Background(), s); err != nil {
				t.Fatal(err)
			}
			listed := 0
			var failed error
			for _, err := range b.list(context.Background(), "", true) {
				listed++
				failed = err
			}
			if listed != 1 || !errors.Is(failed, storage.ErrUnavailable) {
				t.Errorf("%q, v1 %v: %d, %v", answer, v1, listed, failed)
			}
		}
	}
}

func TestListStopsWhenNobodyWantsMore(t *testing.T) {
	double := s3double.New(t, s3double.Options{Page: 2})
	b := connect(t, settingsOf(double))
	for i := range 10 {
		double.Write(fmt.Sprint("k", i), nil)
	}
	for range b.list(context.Background(), "", true) {
		break
	}
	if n := double.Count(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

func TestPresign(t *testing.T) {
	ctx := context.Background()
	double := s3double.New(t, s3double.Options{})
	s := settingsOf(double)
	s.Prefix = "p"
	b := connect(t, s)
	double.Write("p/a key", []byte("0123456789"))
	client := &http.Client{Transport: newTransport()}
	defer client.CloseIdleConnections()
	ask := func(method, url, span string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequest(method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if span != "" {
			req.Header.Set("Range", span)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(got)
	}
	for method, want := range map[string]string{"GET": "0123456789", "HEAD": ""} {
		url, err := b.presign(ctx, method, "a key", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if resp, got := ask(method, url, ""); resp.StatusCode != 200 || got != want || resp.ContentLength != 10 || resp.Header.Get("Content-Type") != "application/octet-stream" {
			t.Errorf("%s: %s %q %v", method, resp.Status, got, resp.Header)
		}
		if resp, got := ask(method, url, "bytes=2-4"); resp.StatusCode != 206 || got != want[min(2, len(want)):min(5, len(want))] {
			t.Errorf("%s of a range: %s %q", method, resp.Status, got)
		}
		if resp, _ := ask("DELETE", url, ""); resp.StatusCode != 403 {
			t.Errorf("DELETE with the URL of %s: %s", method, resp.Status)
		}
		if strings.Contains(url, s3double.Secret) {
			t.Errorf("%s: the URL has the secret", method)
		}
	}
	if _, err := b.presign(ctx, "PUT", "k", time.Minute); err == nil {
		t.Error("a URL for PUT")
	}
	if n := b.called(); n["get"] != 0 || n["head"] != 0 {
		t.Errorf("making URLs took requests: %v", n)
	}
}

// TestConfigure has other settings be those of the next call.
func TestConfigure(t *testing.T) {
	ctx := context.Background()
	double := s3double.New(t, s3double.Options{})
	double.Write("k", []byte("value"))
	right := settingsOf(double)
	wrong := right
	wrong.SecretKey = "something-else"
	b := connect(t, wrong)
	if _, err := b.head(ctx, "k"); !errors.Is(err, storage.ErrUnavailable) {
		t.Errorf("with a wrong secret: %v", err)
	}
	if err := b.configure(ctx, right); err != nil {
		t.Fatal(err)
	}
	if _, err := b.head(ctx, "k"); err != nil {
		t.Errorf("with the right one: %v", err)
	}
}

// TestChain has credentials and region come from the environment.
func TestChain(t *testing.T) {
	double := s3double.New(t, s3double.Options{Region: "cn-north-1", Token: "session"})
	double.Write("k", []byte("value"))
	none := t.TempDir() + "/none"
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": s3double.Key, "AWS_SECRET_ACCESS_KEY": s3double.Secret, "AWS_SESSION_TOKEN": "session",
		"AWS_REGION": "eu-west-7", "AWS_CONFIG_FILE": none, "AWS_SHARED_CREDENTIALS_FILE": none, "AWS_EC2_METADATA_DISABLED": "true",
	} {
		t.Setenv(name, value)
	}
	s := settingsOf(double)
	s.AccessKey, s.SecretKey, s.Region = "", "", "cn-north-1"
	if got, _, err := connect(t, s).read(context.Background(), "k", 10); err != nil || string(got) != "value" {
		t.Errorf("%q, %v", got, err)
	}
	s.Endpoint, s.Region = "", ""
	s.transport = roundTripper(func(r *http.Request) (*http.Response, error) {
		return nil, errors.New("sent to " + r.URL.Host)
	})
	if _, err := connect(t, s).head(context.Background(), "k"); err == nil || !strings.Contains(err.Error(), "s3.eu-west-7.amazonaws.com") {
		t.Errorf("at AWS: %v", err)
	}
	t.Setenv("AWS_REGION", "")
	if _, err := newBucket(context.Background(), s); err == nil || !strings.Contains(err.Error(), "no region") {
		t.Errorf("without a region: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	s.Region = "eu-west-7"
	if _, err := connect(t, s).head(context.Background(), "k"); !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "no credentials") {
		t.Errorf("without credentials: %v", err)
	}
}
