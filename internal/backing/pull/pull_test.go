package pull_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/backing/pull"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mib = 1 << 20

func random(seed byte, n int) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// unkind is a server of one file, with faults.
type unkind struct {
	*httptest.Server
	data []byte
	etag string
	// before, which may be nil, may answer in place of the file.
	before func(w http.ResponseWriter, r *http.Request) (answered bool)
	noETag bool
	modify string              // Last-Modified
	ranges bool                // it knows them
	cut    func(n int64) int64 // how many of n bytes to send before the connection is lost; nil: all
	sent   atomic.Int64        // bytes
	most   atomic.Int64        // requests at once
	under  atomic.Int64
	mu     sync.Mutex
	asked  []*http.Request
}

func serve(t *testing.T, data []byte, change func(*unkind)) *unkind {
	u := &unkind{data: data, etag: `"one"`, ranges: true}
	if change != nil {
		change(u)
	}
	u.Server = httptest.NewServer(u)
	t.Cleanup(u.Server.Close)
	return u
}

func (u *unkind) requests() []*http.Request {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]*http.Request(nil), u.asked...)
}

func (u *unkind) change(data []byte, etag string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.data, u.etag = data, etag
}

func (u *unkind) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := u.under.Add(1)
	// Before the last byte goes out: whoever has that may ask again at once.
	answered := sync.OnceFunc(func() { u.under.Add(-1) })
	defer answered()
	for {
		most := u.most.Load()
		if n <= most || u.most.CompareAndSwap(most, n) {
			break
		}
	}
	u.mu.Lock()
	u.asked = append(u.asked, r.Clone(context.Background()))
	data, etag := u.data, u.etag
	u.mu.Unlock()
	if u.before != nil && u.before(w, r) {
		return
	}
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	if !u.noETag {
		w.Header().Set("ETag", etag)
	}
	if u.modify != "" {
		w.Header().Set("Last-Modified", u.modify)
	}
	from, to := int64(0), int64(len(data))
	if value := r.Header.Get("Range"); value != "" && u.ranges {
		if bound := r.Header.Get("If-Range"); bound == "" || bound == etag || bound == u.modify {
			var last int64
			if _, err := fmt.Sscanf(value, "bytes=%d-%d", &from, &last); err != nil {
				panic(err)
			}
			to = min(to, last+1)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
		}
	}
	w.Header().Set("Content-Length", fmt.Sprint(to-from))
	if w.Header().Get("Content-Range") != "" {
		w.WriteHeader(http.StatusPartialContent)
	}
	if r.Method == http.MethodHead {
		return // the answer goes out after that
	}
	n = to - from
	if u.cut != nil {
		n = min(n, u.cut(n))
	}
	answered()
	sent, _ := w.Write(data[from : from+n])
	u.sent.Add(int64(sent))
	if from+n < to {
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

func newTable(t *testing.T, dir string) *fill.Table {
	store := disktest.Open(t, dir)
	table := fill.NewTable(store, nil, nil, nil)
	t.Cleanup(func() {
		table.Close()
		store.Close()
	})
	return table
}

func open(t *testing.T, r pull.Request) *pull.Content {
	t.Helper()
	r.AllowPrivate = true
	c, err := pull.Open(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// fetch pulls content, and returns its bytes.
func fetch(ctx context.Context, table *fill.Table, c *pull.Content, progress func(int64)) (got []byte, err error) {
	err = table.Pull(ctx, fill.Want{Name: c.Name, Size: c.Size, Sources: c.Sources, Connections: 4, Take: func(_ context.Context, f fill.File) error {
		if got, err = os.ReadFile(f.Path); err == nil && digest.FromBytes(got) != f.SHA256 {
			err = errors.New("the file is not what is said")
		}
		return err
	}}, progress)
	return got, err
}

// TestPull: a file comes whole from every kind of honest server.
func TestPull(t *testing.T) {
	data := random(1, 5*mib+123)
	for name, change := range map[string]func(*unkind){
		"kind":            nil,
		"without ranges":  func(u *unkind) { u.ranges = false },
		"without ETag":    func(u *unkind) { u.noETag, u.modify = true, "Mon, 02 Jan 2006 15:04:05 GMT" },
		"without either":  func(u *unkind) { u.noETag = true },
		"with a weak one": func(u *unkind) { u.etag = `W/"one"` },
		"without HEAD": func(u *unkind) {
			u.before = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodHead {
					w.WriteHeader(http.StatusForbidden)
				}
				return r.Method == http.MethodHead
			}
		},
		"refusing ranges": func(u *unkind) {
			u.before = func(w http.ResponseWriter, r *http.Request) bool {
				refuses := r.Header.Get("Range") != "" || r.Method == http.MethodHead
				if refuses {
					w.WriteHeader(http.StatusNotImplemented)
				}
				return refuses
			}
		},
		"cut": func(u *unkind) {
			cuts := rand.New(rand.NewPCG(1, 2))
			left := 40
			u.cut = func(n int64) int64 {
				u.mu.Lock()
				defer u.mu.Unlock()
				if left--; left < 0 || n < 2 {
					return n
				}
				return 1 + cuts.Int64N(n)
			}
		},
		"now and then busy": func(u *unkind) {
			var n atomic.Int64
			u.before = func(w http.ResponseWriter, r *http.Request) bool {
				busy := r.Method == http.MethodGet && n.Add(1)%3 == 1
				if busy {
					w.Header().Set("Retry-After", "0")
					w.WriteHeader(http.StatusServiceUnavailable)
				}
				return busy
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := serve(t, data, change)
			table := newTable(t, t.TempDir())
			c := open(t, pull.Request{URLs: []string{u.URL + "/images/ubuntu.img?x=y"}})
			if c.Size != int64(len(data)) || c.File != "ubuntu.img" || len(c.Sources) != 1 || len(c.Refused) > 0 {
				t.Errorf("it is %+v", c)
			}
			again := open(t, pull.Request{URLs: []string{u.URL + "/images/ubuntu.img?x=y"}})
			if same := again.Name == c.Name; same != (name != "without either") {
				t.Errorf("it has the same name twice: %v", same)
			}
			got, err := fetch(t.Context(), table, c, nil)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%d bytes of %d came: %v", len(got), len(data), err)
			}
			if n := u.most.Load(); n > 4 {
				t.Errorf("%d requests at once", n)
			}
			for _, r := range u.requests() {
				if r.Header.Get("Accept-Encoding") != "identity" {
					t.Errorf("%s asks for %q", r.Method, r.Header.Get("Accept-Encoding"))
				}
				bound := r.Header.Get("If-Range")
				if name == "kind" && r.Header.Get("Range") != "" && bound != `"one"` || strings.HasPrefix(bound, "W/") {
					t.Errorf("a range is bound to %q", bound)
				}
			}
		})
	}
}

// TestChanged: what has become another file is not put together with what there was,
// and goes by another name.
func TestChanged(t *testing.T) {
	data, other := random(2, 8*mib), random(3, 8*mib)
	for _, ranges := range []bool{true, false} {
		t.Run(fmt.Sprint(ranges), func(t *testing.T) {
			var u *unkind
			var cut atomic.Bool
			u = serve(t, data, func(u *unkind) {
				u.ranges = ranges
				u.cut = func(n int64) int64 {
					if n > 1 && cut.CompareAndSwap(false, true) {
						u.change(other, `"two"`)
						return n / 2
					}
					return n
				}
			})
			table := newTable(t, t.TempDir())
			request := pull.Request{URLs: []string{u.URL + "/x.img"}}
			c := open(t, request)
			if _, err := fetch(t.Context(), table, c, nil); !errors.Is(err, pull.ErrChanged) {
				t.Fatalf("want changed: %v", err)
			}
			next := open(t, request)
			if next.Name == c.Name {
				t.Error("it has the same name")
			}
			if got, err := fetch(t.Context(), table, next, nil); err != nil || !bytes.Equal(got, other) {
				t.Errorf("%d bytes: %v", len(got), err)
			}
		})
	}
}

// TestRefused: what is no file is refused with a reason, and nothing that was asked with
// is in it.
func TestRefused(t *testing.T) {
	data := random(4, 1000)
	answer := func(status int, header ...string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(status)
			w.Write(data)
			return true
		}
	}
	for name, c := range map[string]struct {
		before func(http.ResponseWriter, *http.Request) bool
		says   string
		is     error
	}{
		"web page": {answer(200, "Content-Type", "text/html; charset=utf-8"), "the server sent a web page", pull.ErrWebPage},
		"404":      {answer(404), "404 Not Found", nil},
		"403":      {answer(403), "credentials", nil},
		"503":      {answer(503), "503", nil},
		"empty":    {func(w http.ResponseWriter, r *http.Request) bool { return true }, "empty", nil},
		"loop": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/again?sesame", 302)
			return true
		}, "more than 10 times", nil},
		"link-local": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://169.254.169.254/sesame", 302)
			return true
		}, "169.254.169.254", upstream.ErrGuard},
		"not http": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "file:///etc/sesame", 302)
			return true
		}, "no address of http", nil},
		"no size": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Type", "application/octet-stream")
			http.NewResponseController(w).Flush()
			w.Write(data)
			return true
		}, "does not say how large", pull.ErrNoSize},
		"gzip": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			z.Write(data)
			z.Close()
			return true
		}, "Content-Encoding", nil},
	} {
		t.Run(name, func(t *testing.T) {
			u := serve(t, data, func(u *unkind) { u.before = c.before })
			at := strings.Replace(u.URL, "http://", "http://sesame:sesame@", 1)
			_, err := pull.Open(t.Context(), pull.Request{URLs: []string{at + "/x.img?key=sesame"}, Headers: map[string]string{"X-Key": "sesame"}, AllowPrivate: true})
			if err == nil || !strings.Contains(err.Error(), c.says) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("want %q: %v", c.says, err)
			}
			if strings.Contains(fmt.Sprint(err), "sesame") {
				t.Errorf("it tells a secret: %v", err)
			}
		})
	}
}

// TestNonsense: a request that makes none is refused before anything is asked.
func TestNonsense(t *testing.T) {
	for name, r := range map[string]pull.Request{
		"none":      {},
		"scheme":    {URLs: []string{"ftp://sesame@example.test/sesame"}},
		"no host":   {URLs: []string{"https:///sesame"}},
		"control":   {URLs: []string{"https://example.test/sesame\n"}},
		"escape":    {URLs: []string{"https://u:sesame@example.test/%zz"}},
		"long":      {URLs: []string{"https://example.test/" + strings.Repeat("x", 9000)}},
		"CA":        {URLs: []string{"https://example.test/"}, CA: "sesame"},
		"header":    {URLs: []string{"https://example.test/"}, Headers: map[string]string{"X-A": "sesame\r\nX-B: c"}},
		"ours":      {URLs: []string{"https://example.test/"}, Headers: map[string]string{"accept-encoding": "gzip"}},
		"token":     {URLs: []string{"https://example.test/"}, Token: "sesame\n"},
		"too large": {URLs: []string{"https://example.test/"}, Headers: map[string]string{"X-A": strings.Repeat("x", 20_000)}},
		"many":      {URLs: make([]string, 17)},
	} {
		c, err := pull.Open(t.Context(), r)
		if err == nil {
			c.Close()
		}
		if err == nil || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPrivate: addresses that are not public are refused unless they are allowed, by
// number and by name; those of the link always, and behind a proxy as well.
func TestPrivate(t *testing.T) {
	u := serve(t, random(5, 1000), nil)
	named := strings.Replace(u.URL, "127.0.0.1", "localhost", 1)
	proxy := func(*http.Request) (*url.URL, error) { return url.Parse(u.URL) }
	for name, r := range map[string]pull.Request{
		"loopback":         {URLs: []string{u.URL}},
		"a name":           {URLs: []string{named}},
		"behind a proxy":   {URLs: []string{"http://127.0.0.1:1/x"}, Proxy: proxy},
		"a name behind it": {URLs: []string{"http://registry.internal/x"}, Proxy: proxy},
		"metadata":         {URLs: []string{"http://169.254.169.254/latest"}, AllowPrivate: true},
		"mapped":           {URLs: []string{"http://[::ffff:169.254.169.254]/latest"}, AllowPrivate: true},
		"NAT64":            {URLs: []string{"http://[64:ff9b::a9fe:a9fe]/latest"}, AllowPrivate: true},
		"link-local":       {URLs: []string{"http://[fe80::1]/"}, AllowPrivate: true},
		"AWS":              {URLs: []string{"http://[fd00:ec2::254]/"}, AllowPrivate: true},
		"metadata behind":  {URLs: []string{"http://169.254.169.254/latest"}, AllowPrivate: true, Proxy: proxy},
		"in disguise":      {URLs: []string{"http://0x7f.1/latest"}, AllowPrivate: true},
	} {
		c, err := pull.Open(t.Context(), r)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, upstream.ErrGuard) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(u.requests()); n > 0 {
		t.Errorf("it was asked %d times", n)
	}
	open(t, pull.Request{URLs: []string{named}})
	open(t, pull.Request{URLs: []string{"http://192.168.0.1/x"}, Proxy: proxy})
}

// TestSecrets go to the host that they are meant for, whatever it redirects to, which
// is asked again when its address has expired.
func TestSecrets(t *testing.T) {
	data := random(6, 20*mib)
	for name, r := range map[string]pull.Request{
		"Basic":      {User: "ann", Password: "sesame"},
		"Bearer":     {Token: "sesame"},
		"header":     {Headers: map[string]string{"X-Key": "sesame", "Authorization": "Custom sesame"}},
		"in the URL": {},
	} {
		t.Run(name, func(t *testing.T) {
			var signed atomic.Int64
			valid := func() string { return fmt.Sprint("/file?signed=", signed.Load()) }
			var gets atomic.Int64
			cdn := serve(t, data, func(u *unkind) {
				u.before = func(w http.ResponseWriter, r *http.Request) bool {
					if r.Header.Get("Authorization") != "" || r.Header.Get("X-Key") != "" {
						t.Error("another host was told the secret")
					}
					if r.Method == http.MethodGet && gets.Add(1) == 2 {
						signed.Add(1) // addresses given so far have expired
					}
					expired := r.URL.String() != valid()
					if expired {
						w.WriteHeader(http.StatusForbidden)
					}
					return expired
				}
			})
			var asked atomic.Int64
			origin := serve(t, nil, func(u *unkind) {
				u.before = func(w http.ResponseWriter, r *http.Request) bool {
					asked.Add(1)
					user, password, _ := r.BasicAuth()
					ok := user == "ann" && password == "sesame" || r.Header.Get("Authorization") == "Bearer sesame" ||
						r.Header.Get("Authorization") == "Custom sesame" && r.Header.Get("X-Key") == "sesame"
					if !ok {
						w.WriteHeader(http.StatusUnauthorized)
					} else {
						http.Redirect(w, r, cdn.URL+valid(), http.StatusTemporaryRedirect)
					}
					return true
				}
			})
			r.URLs = []string{origin.URL + "/x.img"}
			if name == "in the URL" {
				r.URLs[0] = strings.Replace(r.URLs[0], "http://", "http://ann:sesame@", 1)
			}
			c := open(t, r)
			if strings.Contains(c.Name, "sesame") {
				t.Errorf("the name is %q", c.Name)
			}
			got, err := fetch(t.Context(), newTable(t, t.TempDir()), c, nil)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes: %v", len(got), err)
			}
			if n := asked.Load(); n < 2 || n > 10 {
				t.Errorf("the origin was asked %d times", n)
			}
		})
	}
}

// TestMirrors: one goes on where another fails, if it has as many bytes.
func TestMirrors(t *testing.T) {
	data := random(7, 4*mib)
	var down atomic.Bool
	first := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			if down.Load() {
				w.WriteHeader(http.StatusNotFound)
			}
			return down.Load()
		}
		u.cut = func(n int64) int64 { down.Store(true); return n / 2 }
	})
	second := serve(t, data, func(u *unkind) { u.etag = `"other"` })
	short := serve(t, data[1:], nil)
	gone := serve(t, nil, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusGone); return true }
	})
	r := pull.Request{Proven: true, URLs: []string{gone.URL, first.URL, short.URL, second.URL}}
	c := open(t, r)
	if len(c.Sources) != 2 || len(c.Refused) != 2 || c.ETag != `"one"` || !strings.Contains(c.Refused[1].Error(), "4194303 bytes") {
		t.Fatalf("it is %+v", c)
	}
	got, err := fetch(t.Context(), newTable(t, t.TempDir()), c, nil)
	if err != nil || !bytes.Equal(got, data) || second.sent.Load() == 0 {
		t.Errorf("%d bytes, %d of them from the second: %v", len(got), second.sent.Load(), err)
	}
	down.Store(false)
	r.Proven = false
	if c := open(t, r); len(c.Sources) != 1 || len(c.Refused) != 3 {
		t.Errorf("without a checksum: %+v", c)
	}
}

// TestPerHost: however many pull from a host, it has no more than four requests.
func TestPerHost(t *testing.T) {
	data := random(9, 4*mib)
	fifth := make(chan struct{})
	five := sync.OnceFunc(func() { close(fifth) })
	var under atomic.Int64
	u := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			if under.Add(1) == 5 {
				five()
			}
			timer := time.NewTimer(100 * time.Millisecond) // for a fifth one to come
			defer timer.Stop()
			select {
			case <-fifth:
			case <-timer.C:
			}
			under.Add(-1)
			return false
		}
	})
	table := newTable(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c, err := pull.Open(t.Context(), pull.Request{URLs: []string{fmt.Sprint(u.URL, "/", i)}, AllowPrivate: true})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if got, err := fetch(t.Context(), table, c, nil); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes: %v", len(got), err)
			}
		})
	}
	wg.Wait()
	if n := u.most.Load(); n > 4 {
		t.Errorf("%d requests at once", n)
	}
}

// TestCA: a certificate of one's own is trusted where it is given.
func TestCA(t *testing.T) {
	data := random(10, 1000)
	u := &unkind{data: data, etag: `"one"`, ranges: true}
	u.Server = httptest.NewUnstartedServer(u)
	u.Server.Config.ErrorLog = nil
	u.StartTLS()
	t.Cleanup(u.Server.Close)
	r := pull.Request{URLs: []string{u.URL}, AllowPrivate: true}
	if _, err := pull.Open(t.Context(), r); err == nil {
		t.Error("a strange certificate is trusted")
	}
	r.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.Certificate().Raw}))
	got, err := fetch(t.Context(), newTable(t, t.TempDir()), open(t, r), nil)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	plain := serve(t, data, nil)
	down := &unkind{before: func(w http.ResponseWriter, r *http.Request) bool { http.Redirect(w, r, plain.URL, 302); return true }}
	down.Server = httptest.NewTLSServer(down)
	t.Cleanup(down.Server.Close)
	r.URLs = []string{down.URL}
	if _, err := pull.Open(t.Context(), r); err == nil || !strings.Contains(err.Error(), "from https to http") {
		t.Errorf("down to http: %v", err)
	}
}

// TestGone: who leaves while nothing answers does not wait.
func TestGone(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		conn, err := listener.Accept()
		cancel()
		if err == nil {
			io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
	if _, err := pull.Open(ctx, pull.Request{URLs: []string{"http://" + listener.Addr().String()}, AllowPrivate: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("want canceled: %v", err)
	}
}

const killDir, killURL = "PULL_TEST_DIR", "PULL_TEST_URL"

// TestKilled is the process that TestKill starts, which dies in the middle.
func TestKilled(t *testing.T) {
	dir := os.Getenv(killDir)
	if dir == "" {
		return
	}
	c := open(t, pull.Request{URLs: []string{os.Getenv(killURL)}})
	_, err := fetch(t.Context(), newTable(t, dir), c, func(n int64) {
		if n < 4*mib {
			return
		}
		// Before the kill, what has come is in the ledger within a quarter of a second.
		for {
			names, _ := filepath.Glob(filepath.Join(dir, "mirror/spool/fills/*.ledger"))
			if len(names) == 1 {
				if text, err := os.ReadFile(names[0]); err == nil && bytes.Count(text, []byte("],[")) > 32 {
					break
				}
			}
		}
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	})
	t.Fatalf("it came to its end: %v", err)
}

// TestKill: the next process goes on where one was killed.
func TestKill(t *testing.T) {
	data := random(11, 8*mib)
	var gate atomic.Bool
	gate.Store(true)
	over := make(chan struct{})
	u := serve(t, data, func(u *unkind) {
		u.before = func(w http.ResponseWriter, r *http.Request) bool {
			var from int64
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
			if r.Method == http.MethodGet && from >= 4*mib && gate.Load() {
				select {
				case <-over:
				case <-r.Context().Done():
				}
				return true
			}
			return false
		}
	})
	t.Cleanup(func() { close(over) })
	dir := t.TempDir()
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$", "-test.timeout=100s")
	child.Env = append(os.Environ(), killDir+"="+dir, killURL+"="+u.URL)
	said, err := child.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("it was not killed: %v\n%s", err, said)
	}
	gate.Store(false)
	before := u.sent.Load()
	got, err := fetch(t.Context(), newTable(t, dir), open(t, pull.Request{URLs: []string{u.URL}}), nil)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	if n := u.sent.Load() - before; n > 6*mib {
		t.Errorf("%d bytes were fetched again", n-4*mib)
	}
}
