//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The sizes of an eStargz file and its reader.
const (
	footerSize = 51
	tocSize    = 200_000
	chunkSize  = 50_000
)

// A lazyReader reads a layer as the stargz snapshotter does: parts of it, by
// requests for many ranges at once.
type lazyReader struct {
	url  string
	data []byte // what it should get
}

// A piece is the bytes of a content from first to last.
type piece struct{ first, last int64 }

func (p piece) String() string { return fmt.Sprintf("%d-%d", p.first, p.last) }

// read asks for pieces by one request, and checks all of the answer.
func (l *lazyReader) read(pieces ...piece) error {
	var list []string
	for _, p := range pieces {
		list = append(list, p.String())
	}
	req, err := http.NewRequest(http.MethodGet, l.url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", "bytes="+strings.Join(list, ","))
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return fmt.Errorf("%s: %s, not 206", req.Header.Get("Range"), resp.Status)
	}
	check := func(p piece, contentRange string, body io.Reader) error {
		if want := fmt.Sprintf("bytes %v/%d", p, len(l.data)); contentRange != want {
			return fmt.Errorf("%v: Content-Range %q, not %q", p, contentRange, want)
		}
		got, err := io.ReadAll(body)
		if err != nil {
			return fmt.Errorf("%v: %w", p, err)
		}
		if !bytes.Equal(got, l.data[p.first:p.last+1]) {
			return fmt.Errorf("%v: wrong bytes, %d of them", p, len(got))
		}
		return nil
	}
	if len(pieces) == 1 {
		return check(pieces[0], resp.Header.Get("Content-Range"), resp.Body)
	}
	kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/byteranges" {
		return fmt.Errorf("Content-Type %q, %v", resp.Header.Get("Content-Type"), err)
	}
	parts := multipart.NewReader(resp.Body, params["boundary"])
	for _, p := range pieces {
		part, err := parts.NextRawPart()
		if err != nil {
			return fmt.Errorf("%v: %w", p, err)
		}
		if err := check(p, part.Header.Get("Content-Range"), part); err != nil {
			return err
		}
	}
	if _, err := parts.NextRawPart(); err != io.EOF {
		return fmt.Errorf("after the last part: %v", err)
	}
	return nil
}

// chunks are pieces of 50,000 bytes, neighbours in one.
func (l *lazyReader) chunks(numbers []int) []piece {
	var pieces []piece
	for _, n := range slices.Sorted(slices.Values(numbers)) {
		p := piece{int64(n) * chunkSize, min(int64(n+1)*chunkSize, int64(len(l.data))) - 1}
		if last := len(pieces) - 1; last >= 0 && pieces[last].last+1 == p.first {
			pieces[last].last = p.last
		} else {
			pieces = append(pieces, p)
		}
	}
	return pieces
}

// count is how many chunks there are.
func (l *lazyReader) count() int { return (len(l.data) + chunkSize - 1) / chunkSize }

// some are a number of requests for chunks here and there.
func (l *lazyReader) some(seed string, requests int) [][]piece {
	random := rand.New(rand.NewChaCha8(sha256.Sum256([]byte(seed))))
	var list [][]piece
	for range requests {
		var numbers []int
		for range 2 + random.IntN(9) {
			numbers = append(numbers, random.IntN(l.count()))
		}
		slices.Sort(numbers)
		list = append(list, l.chunks(slices.Compact(numbers)))
	}
	return list
}

// TestLazy: a reader of eStargz gets what it asks for, and only that is
// fetched: a segment for a probe, a segment for a footer. Once it has fetched
// the rest in the background, every byte has come from upstream once.
func TestLazy(t *testing.T) {
	img := newImageOf(t, "lazy", 32)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	counted := startCounter(t, upstream.addr)
	m := startMirror(t, setup{registry: dockerHub(counted.addr)})
	l := &lazyReader{
		url:  "http://" + m.addr + "/v2/library/hello/blobs/" + img.big,
		data: must(io.ReadAll(must(img.layer.Compressed()))),
	}
	size := int64(len(l.data))

	// fetched checks how much a request has made the mirror fetch, once the
	// mirror has put the layer away.
	const segment = 64 << 10
	putAway := 0
	fetched := func(atMost int64) {
		t.Helper()
		eventually(t, 20*time.Second, "the layer to be put away", func() bool {
			return strings.Count(m.output(), `"msg":"fill put away"`) > putAway
		})
		putAway++
		if n := counted.fetched(img.big); n == 0 || n > atMost {
			t.Errorf("%d bytes came from upstream, not at most %d", n, atMost)
		}
	}
	read := func(pieces ...piece) {
		t.Helper()
		if err := l.read(pieces...); err != nil {
			t.Error(err)
		}
	}

	wantStatus(t, m.addr, "/v2/library/hello/manifests/latest", http.StatusOK)
	wantStatus(t, m.addr, "/v2/library/hello/manifests/"+img.child, http.StatusOK)
	read(piece{0, 1})
	fetched(segment)
	read(piece{size - footerSize, size - 1})
	fetched(2 * segment)
	read(piece{size - footerSize - tocSize, size - footerSize - 1})
	fetched(2*segment + tocSize + segment)

	// What a container needs to start: here and there, several at once, and
	// the same now and then.
	count := l.count()
	jobs := l.some("lazy", 60)
	before := len(jobs)
	// The rest: all chunks in their order, some at a time.
	for n := 0; n < count; n += 40 {
		var numbers []int
		for i := n; i < min(n+40, count); i++ {
			if i%7 != 3 { // which are read beforehand
				numbers = append(numbers, i)
			}
		}
		jobs = append(jobs, l.chunks(numbers))
	}
	for n := 3; n < count; n += 7 {
		jobs[before/2] = append(jobs[before/2], l.chunks([]int{n})...)
	}
	queue := make(chan []piece)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for pieces := range queue {
				read(pieces...)
				read(piece{0, 1}) // the probe that comes every minute
			}
		})
	}
	for _, pieces := range jobs {
		queue <- pieces
	}
	close(queue)
	wg.Wait()
	if n := counted.fetched(img.big); n != size {
		t.Errorf("%d of %d bytes came from upstream", n, size)
	}

	counted.stop()
	resp, err := http.Get(l.url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, l.data) {
		t.Errorf("the whole layer: %d bytes, %v", len(got), err)
	}
}
