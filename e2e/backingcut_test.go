//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// cut sends what follows an offset, as if it would send all of it, and is gone after
// n bytes; before, if the request before has brought more since the offset was asked for,
// so that this one is refused.
func (u *tusUpload) cut(t *testing.T, offset, n, size int, data []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", u.b.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PATCH %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: %d\r\nContent-Type: application/offset+octet-stream\r\nContent-Length: %d\r\n\r\n",
		u.location, u.b.addr, backingToken, offset, size-offset)
	conn.Write(data[offset : offset+n])
}

// TestBackingCut: an upload that is cut a hundred times, anywhere, becomes what its
// client meant.
func TestBackingCut(t *testing.T) {
	const size, cuts = 16 << 20, 100
	b := startBackingImages(t, backingSetup{})
	data := regtest.Random("cut", size).Data
	u := b.tus(t, "cut", size)
	random := rand.New(rand.NewPCG(8, 100))
	places := make([]int, cuts)
	for i := range places {
		places[i] = random.IntN(size)
	}
	slices.Sort(places)
	at := 0
	for _, place := range places {
		n := max(0, place-at)
		u.cut(t, at, n, size, data)
		now := at
		eventually(t, time.Minute, "what has been sent", func() bool {
			now = u.offset(t)
			return now > at || n == 0
		})
		if now < at || now > max(at, place) {
			t.Fatalf("%d bytes were there, %d have been sent, and now it ends at %d", at, place, now)
		}
		at = now
	}
	if v := u.finish(t, "cut", data); v.Digests != digestsOf(data) {
		t.Errorf("it has become %+v", v.Digests)
	}
	if v, _ := b.version(t, "cut", "v1"); v.Size != size {
		t.Errorf("it has %d bytes", v.Size)
	}
}

// TestBackingKillUpload: what the server has acknowledged it has, whatever becomes of
// the process.
func TestBackingKillUpload(t *testing.T) {
	const size = 32 << 20
	b := startBackingImages(t, backingSetup{})
	data := regtest.Random("kill", size).Data
	u := b.tus(t, "kill", size)
	const acknowledged = 10<<20 + 7
	if _, err := u.patch(t.Context(), 0, bytes.NewReader(data[:acknowledged]), acknowledged); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	failed := make(chan error, 1)
	go func() {
		_, err := u.patch(t.Context(), acknowledged, r, size-acknowledged)
		failed <- err
	}()
	// More than the sockets between them hold: it is being read.
	if _, err := w.Write(data[acknowledged : 24<<20]); err != nil {
		t.Fatal(err)
	}
	b.kill()
	w.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-failed; err == nil {
		t.Fatal("the request succeeded")
	}

	b = b.restart(t)
	u.b = b
	if at := u.offset(t); at < acknowledged || at > 24<<20 {
		t.Errorf("it goes on at %d", at)
	}
	if _, known := b.version(t, "kill", "v1"); known {
		t.Error("half an image is a version")
	}
	if v := u.finish(t, "kill", data); v.Digests != digestsOf(data) {
		t.Errorf("it has become %+v", v.Digests)
	}
}

// A slowSource serves a file, and stops when it has sent so much of it.
type slowSource struct {
	*httptest.Server
	sent   atomic.Int64
	stop   int64
	goOn   chan struct{}
	mu     sync.Mutex
	ranges []string // of the requests
}

func startSlowSource(t *testing.T, data []byte, stop int64) *slowSource {
	t.Helper()
	s := &slowSource{stop: stop, goOn: make(chan struct{})}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		if r.Method == http.MethodGet {
			s.ranges = append(s.ranges, r.Header.Get("Range"))
		}
		s.mu.Unlock()
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(stopping{w, r.Context(), s}, r, "image.raw", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(s.Close)
	return s
}

type stopping struct {
	http.ResponseWriter
	ctx context.Context
	s   *slowSource
}

func (w stopping) Write(p []byte) (int, error) {
	if w.s.sent.Add(int64(len(p))) > w.s.stop {
		if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
			return 0, err
		}
		select {
		case <-w.s.goOn:
		case <-w.ctx.Done():
			return 0, w.ctx.Err()
		}
	}
	return w.ResponseWriter.Write(p)
}

// TestBackingKillPull: a process that is killed in the middle of a pull from a URL goes
// on with it when it is started again.
func TestBackingKillPull(t *testing.T) {
	const size = 64 << 20
	data := regtest.Random("pulled", size).Data
	source := startSlowSource(t, data, size/2)
	b := startBackingImages(t, backingSetup{})
	ask := fmt.Sprintf(`{"name":"pulled","source":{"type":"url","url":%q}}`, source.URL+"/image.raw")
	status, _, text, err := b.do(t.Context(), http.MethodPost, "/v1/backing-images", strings.NewReader(ask), int64(len(ask)), "Content-Type", "application/json")
	if err != nil || status != http.StatusAccepted {
		t.Fatalf("%d %s %v", status, text, err)
	}
	eventually(t, time.Minute, "half of the image", func() bool {
		v, known := b.version(t, "pulled", "v1")
		return known && v.Progress != nil && v.Progress.Received >= size/4
	})
	b.kill()
	close(source.goOn)
	b = b.restart(t)
	var v backing.Version
	eventually(t, 2*time.Minute, "the rest of the image", func() bool {
		v, _ = b.version(t, "pulled", "v1")
		if v.State == backing.Failed {
			t.Fatal(v.Error)
		}
		return v.State == backing.Ready
	})
	if v.Digests != digestsOf(data) {
		t.Errorf("it has become %+v", v.Digests)
	}
	file := filepath.Join(workDir(t), "got")
	b.download(t, v, file)
	if digests(t, file) != v.Digests {
		t.Error("other bytes came back")
	}
	source.mu.Lock()
	defer source.mu.Unlock()
	if last := source.ranges[len(source.ranges)-1]; last == "" || strings.HasPrefix(last, "bytes=0-") {
		t.Errorf("it began anew: %q", source.ranges)
	}
}

// TestBackingReload: a download that is under way ends whole, however often the
// configuration changes: Longhorn would begin it anew.
func TestBackingReload(t *testing.T) {
	const size = 1 << 30
	b := startBackingImages(t, backingSetup{})
	file := filepath.Join(workDir(t), "large.raw")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	v := b.add(t, "large", file)
	resp, err := http.Get(v.URLs.File)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	sum := sha256.New()
	if _, err := io.CopyN(sum, resp.Body, 10<<20); err != nil {
		t.Fatal(err)
	}
	for i, images := range []string{"longhorn_compat warn", "longhorn_compat off"} {
		changed := b.setup
		changed.images = images
		config := writeFile(t, filepath.Join(workDir(t), "Caddyfile"), changed.caddyfile())
		run(t, bare(workDir(t)), caddyBin, "reload", "--config", config, "--adapter", "caddyfile", "--address", b.admin)
		if again, known := b.version(t, "large", v.Version); !known || again.Digests != v.Digests {
			t.Errorf("after reload %d it is %+v", i, again)
		}
		if _, err := io.CopyN(sum, resp.Body, 100<<20); err != nil {
			t.Fatalf("after reload %d: %v", i, err)
		}
	}
	rest, err := io.Copy(sum, resp.Body)
	if err != nil || rest != size-210<<20 {
		t.Fatalf("the rest is %d bytes, %v", rest, err)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != v.Digests.SHA256.String() {
		t.Errorf("it has become %s", got)
	}
}
