package fill_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/storage"
)

// named is content whose digest nobody knows.
func named(data []byte, take func(context.Context, fill.File) error, sources ...fill.Source) fill.Want {
	return fill.Want{Name: "https://example.test/image \"1\"", Size: int64(len(data)), Take: take, Sources: sources, Connections: 4}
}

// shelf takes files.
type shelf struct {
	t    *testing.T
	dir  string
	data []byte // what they must be

	mu    sync.Mutex
	files []fill.File // as they came
}

func newShelf(t *testing.T, data []byte) *shelf { return &shelf{t: t, dir: t.TempDir(), data: data} }

func (s *shelf) take(_ context.Context, f fill.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = append(s.files, f)
	want := fill.File{Path: f.Path, Size: int64(len(s.data)), SHA256: digest.SHA256.FromBytes(s.data), SHA512: digest.SHA512.FromBytes(s.data)}
	if f != want {
		return fmt.Errorf("got %+v, want %+v", f, want)
	}
	if f.Path == "" {
		return nil
	}
	got, err := os.ReadFile(f.Path)
	if err != nil || !bytes.Equal(got, s.data) {
		return fmt.Errorf("%d bytes that are not the content: %w", len(got), err)
	}
	return os.Rename(f.Path, filepath.Join(s.dir, "taken"))
}

func (s *shelf) taken() []fill.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]fill.File(nil), s.files...)
}

// TestPull: the whole comes as a file, however small, and with both digests. Nothing
// is stored or linked.
func TestPull(t *testing.T) {
	for _, size := range []int{0, 1, 1000, mib, 3*mib + 1} {
		data, d := random(size)
		for _, by := range []digest.Digest{"", d, digest.SHA512.FromBytes(data)} {
			t.Run(fmt.Sprint(size, " ", by), func(t *testing.T) {
				x, shelf := newTable(t), newShelf(t, data)
				want := named(data, shelf.take, &source{name: "a", data: data, noSpans: size%2 == 1})
				if want.Digest = by; by != "" {
					want.Name = ""
				}
				last := int64(-1)
				if err := x.Pull(t.Context(), want, func(n int64) {
					if n <= last || n > int64(size) {
						t.Errorf("%d of %d bytes after %d", n, size, last)
					}
					last = n
				}); err != nil {
					t.Fatal(err)
				}
				if last != int64(size) {
					t.Errorf("it was told of %d bytes of %d", last, size)
				}
				if files := shelf.taken(); len(files) != 1 || files[0].Path == "" {
					t.Errorf("taken: %+v", files)
				}
				if len(x.summaries()) > 0 || len(x.links) > 0 {
					t.Error("it was reported or linked")
				}
				for info, err := range x.store.List(t.Context(), "", true) {
					if err != nil || !strings.HasPrefix(info.Key, "mirror/") {
						t.Errorf("in the store: %s, %v", info.Key, err)
					}
				}
			})
		}
	}
}

// TestPullAsksForSense: what cannot be pulled is not begun.
func TestPullAsksForSense(t *testing.T) {
	x := newTable(t)
	take := func(context.Context, fill.File) error { t.Error("it was taken"); return nil }
	for what, want := range map[string]fill.Want{
		"nobody takes": {Name: "n"},
		"no identity":  {Take: take},
		"sha384":       {Take: take, Digest: digest.SHA384.FromString("")},
		"no digest":    {Take: take, Digest: "sha256:x"},
		"too large":    {Take: take, Name: "n", Size: 1<<40 + 1},
	} {
		if err := x.Pull(t.Context(), want, nil); err == nil {
			t.Errorf("%s: it was pulled", what)
		}
	}
	if _, err := x.Join(fill.Want{Name: "n"}); err == nil {
		t.Error("a name was joined")
	}
	if err := x.Fetch(t.Context(), fill.Want{Digest: digest.FromString(""), Take: take}); err == nil {
		t.Error("what is taken was fetched")
	}
}

// TestPullWrong: content of a wrong digest is never taken, and nothing of it is kept.
func TestPullWrong(t *testing.T) {
	x := newTable(t)
	data, d := random(3 * mib)
	bad := bytes.Clone(data)
	bad[mib] ^= 1
	src := &source{name: "a", data: bad}
	want := named(data, func(context.Context, fill.File) error { t.Error("it was taken"); return nil }, src)
	want.Digest = d
	if err := x.Pull(t.Context(), want, nil); !errors.Is(err, fill.ErrDigest) || src.blamed.Load() != 1 {
		t.Errorf("want a wrong digest: %v; blamed %d times", err, src.blamed.Load())
	}
	if left := x.spooled(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestPullPauses: who stops pulling has the fetching stop, however much has come, and
// the next one goes on, as does the next process.
func TestPullPauses(t *testing.T) {
	data, _ := random(8 * mib)
	for _, closes := range []bool{false, true} {
		t.Run(fmt.Sprint(closes), func(t *testing.T) {
			x, shelf := newTable(t), newShelf(t, data)
			a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 6 * mib}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			came := make(chan struct{})
			go func() {
				ended <- x.Pull(ctx, named(data, shelf.take, a), func(n int64) {
					if n == 6*mib {
						close(came)
					}
				})
			}()
			<-came
			if closes {
				x.close()
			} else {
				cancel()
			}
			want := context.Canceled
			if closes {
				want = fill.ErrClosed
			}
			if err := <-ended; !errors.Is(err, want) {
				t.Errorf("want %v: %v", want, err)
			}
			cancel()
			if closes {
				x = openTable(t, x.dir)
			}
			b := &source{name: "b", data: data}
			if !closes { // the fill waits for somebody to come back, and is still asking a
				close(a.gate)
			}
			if err := x.Pull(t.Context(), named(data, shelf.take, b), nil); err != nil {
				t.Fatal(err)
			}
			if n := a.sent.Load() + b.sent.Load(); n != int64(len(data)) {
				t.Errorf("%d bytes of %d were sent", n, len(data))
			}
		})
	}
}

// TestPullStops: what nobody pulls any more is put away though most of it is there.
func TestPullStops(t *testing.T) {
	x := newTable(t)
	x.parks = true
	data, _ := random(8 * mib)
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 6 * mib}
	ctx, cancel := context.WithCancel(t.Context())
	take := func(context.Context, fill.File) error { t.Error("it was taken"); return nil }
	err := x.Pull(ctx, named(data, take, a), func(n int64) {
		if n == 6*mib {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	eventually(t, "it to be put away", func() bool { return fill.Under(x.Table) == 0 })
	close(a.gate)
	if n := a.sent.Load(); n != 6*mib {
		t.Errorf("%d bytes were sent", n)
	}
}

// TestPullShared: pulls of the same share one fetch; each is asked, and those that come
// after one that has taken the file are told what it was. Of those asked the refusal
// of one is nobody else's.
func TestPullShared(t *testing.T) {
	x := newTable(t)
	data, _ := random(4 * mib)
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: mib}
	first, second := newShelf(t, data), newShelf(t, data)
	broken := errors.New("the probe is down")
	takes := []func(context.Context, fill.File) error{
		func(context.Context, fill.File) error { return fmt.Errorf("%w: it is HTML", fill.ErrRefused) },
		func(context.Context, fill.File) error { return broken },
		first.take,
		second.take,
	}
	want := []error{fill.ErrRefused, broken, nil, nil}
	var wg sync.WaitGroup
	for i, take := range takes {
		joined := make(chan struct{})
		wg.Go(func() {
			var once sync.Once
			if err := x.Pull(t.Context(), named(data, take, a), func(int64) { once.Do(func() { close(joined) }) }); !errors.Is(err, want[i]) {
				t.Errorf("%d: want %v: %v", i, want[i], err)
			}
		})
		<-joined
	}
	left, leave := context.WithCancel(t.Context())
	leave()
	if err := x.Pull(left, named(data, first.take, a), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("who has left: %v", err)
	}
	close(a.gate)
	wg.Wait()
	if n := a.sent.Load(); n != int64(len(data)) {
		t.Errorf("%d bytes of %d were sent", n, len(data))
	}
	if files := first.taken(); len(files) != 1 || files[0].Path == "" {
		t.Errorf("the first took %+v", files)
	}
	if files := second.taken(); len(files) != 1 || files[0].Path != "" {
		t.Errorf("the second was told of %+v", files)
	}
}

// TestPullNotTaken: a file that could not be taken is kept for the next, and one that
// is refused is not. The content as a blob of its own is another matter.
func TestPullNotTaken(t *testing.T) {
	x := newTable(t)
	data, d := random(2 * mib)
	src := &source{name: "a", data: data}
	broken := errors.New("the store is down")
	pull := func(take func(context.Context, fill.File) error) error {
		return x.Pull(t.Context(), named(data, take, src), nil)
	}
	for range 2 {
		if err := pull(func(context.Context, fill.File) error { return broken }); !errors.Is(err, broken) {
			t.Fatalf("want %v: %v", broken, err)
		}
	}
	if n := src.sent.Load(); n != 2*mib {
		t.Errorf("%d bytes were sent", n)
	}
	f := x.join(t, d, len(data), "r", src)
	if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	f.Release()
	eventually(t, "the blob to be linked", func() bool { return x.linked("r", d) })
	if err := pull(func(context.Context, fill.File) error { return fill.ErrRefused }); !errors.Is(err, fill.ErrRefused) {
		t.Fatalf("want refused: %v", err)
	}
	eventually(t, "its files to be put away", func() bool { return fill.Under(x.Table) == 0 }) // Pull returns with Take
	if left := x.spooled(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestPullFull: without room it fails, keeps what there is, and goes on when there is.
func TestPullFull(t *testing.T) {
	x := newTable(t)
	data, _ := random(8 * mib)
	shelf := newShelf(t, data)
	a := &source{name: "a", data: data, gate: make(chan struct{}), gateAt: 4 * mib}
	ctx, cancel := context.WithCancel(t.Context())
	if err := x.Pull(ctx, named(data, shelf.take, a), func(n int64) {
		if n == 4*mib {
			cancel()
		}
	}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "it to be put away", func() bool { return fill.Under(x.Table) == 0 })
	close(a.gate)
	x.fill(true)
	for range 2 {
		if err := x.Pull(t.Context(), named(data, shelf.take, a), nil); !errors.Is(err, storage.ErrFull) {
			t.Errorf("want a full disk: %v", err)
		}
	}
	x.fill(false)
	if err := x.Pull(t.Context(), named(data, shelf.take, a), nil); err != nil {
		t.Fatal(err)
	}
	if n := a.sent.Load(); n != 8*mib {
		t.Errorf("%d bytes were sent", n)
	}
}

// TestPullGone: a file that was taken, though nobody got to say so, is offered again by
// its digests, and fetched again only if nobody has its bytes.
func TestPullGone(t *testing.T) {
	x := newTable(t)
	data, _ := random(2 * mib)
	src := &source{name: "a", data: data}
	broken := errors.New("the link could not be written")
	moves := func(_ context.Context, f fill.File) error {
		if f.Path != "" {
			os.Remove(f.Path)
		}
		return broken
	}
	for range 2 {
		if err := x.Pull(t.Context(), named(data, moves, src), nil); !errors.Is(err, broken) {
			t.Fatalf("want %v: %v", broken, err)
		}
	}
	if n := src.sent.Load(); n != 2*mib {
		t.Fatalf("%d bytes were sent", n)
	}
	x.close()
	x = openTable(t, x.dir)
	shelf := newShelf(t, data)
	var asked atomic.Int64
	err := x.Pull(t.Context(), named(data, func(ctx context.Context, f fill.File) error {
		if asked.Add(1) == 1 {
			if f.Path != "" || f.SHA256 != digest.FromBytes(data) {
				t.Errorf("first it is offered as %+v", f)
			}
			return fmt.Errorf("the blob: %w", fs.ErrNotExist)
		}
		return shelf.take(ctx, f)
	}, src), nil)
	if err != nil || asked.Load() != 2 || src.sent.Load() != 4*mib {
		t.Errorf("%v; asked %d times, %d bytes were sent", err, asked.Load(), src.sent.Load())
	}
}

const pullDir, pullPoint = "FILL_TEST_DIR", "FILL_TEST_POINT"

// TestPullKilled is the process that TestPullKill starts, which dies.
func TestPullKilled(t *testing.T) {
	dir, point := os.Getenv(pullDir), os.Getenv(pullPoint)
	if dir == "" {
		return
	}
	x := openTable(t, dir)
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	data, _ := random(4 * mib)
	shelf := &shelf{t: t, dir: dir, data: data}
	src := &source{name: "a", data: data}
	if point == "half" {
		src.gate, src.gateAt = make(chan struct{}), 2*mib
	}
	err := x.Pull(t.Context(), named(data, shelf.take, src), func(n int64) {
		if n == 2*mib && point == "half" {
			eventually(t, "it to be in the ledger", func() bool {
				names, _ := filepath.Glob(filepath.Join(dir, "mirror/spool/fills/*.ledger"))
				text, err := os.ReadFile(names[0])
				return err == nil && bytes.Contains(text, []byte("[31,"))
			})
			failpoint.Hit("half")
		}
	})
	t.Fatalf("%s was not reached: %v", point, err)
}

// TestPullKill: a process dies; the next goes on, and fetches nothing twice.
func TestPullKill(t *testing.T) {
	data, _ := random(4 * mib)
	for point, rest := range map[string]int64{"half": 2 * mib, "fill.verified": 0, "fill.taken": 0} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPullKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), pullDir+"="+dir, pullPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			x := openTable(t, dir)
			shelf := &shelf{t: t, dir: dir, data: data}
			src := &source{name: "b", data: data}
			if err := x.Pull(t.Context(), named(data, shelf.take, src), nil); err != nil {
				t.Fatal(err)
			}
			if n := src.sent.Load(); n != rest {
				t.Errorf("%d bytes were sent, want %d", n, rest)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "taken")); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes were taken: %v", len(got), err)
			}
			if files := shelf.taken(); len(files) != 1 || (files[0].Path == "") != (point == "fill.taken") {
				t.Errorf("taken: %+v", files)
			}
		})
	}
}
