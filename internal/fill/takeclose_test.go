package fill_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/fill"
)

// TestPullClosed: who is taking a file when the store is closed is told so, and the file
// is there for the next process.
func TestPullClosed(t *testing.T) {
	x := newTable(t)
	data, _ := random(2 * mib)
	a := &source{name: "a", data: data}
	taking, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- x.Pull(t.Context(), named(data, func(ctx context.Context, _ fill.File) error {
			close(taking)
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(20 * time.Second):
				return errors.New("nobody has said that the store is being closed")
			}
		}, a), nil)
	}()
	<-taking
	x.close()
	if err := <-ended; !errors.Is(err, fill.ErrClosed) {
		t.Errorf("want closed: %v", err)
	}
	x = openTable(t, x.dir)
	if err := x.Pull(t.Context(), named(data, newShelf(t, data).take, a), nil); err != nil || a.sent.Load() != 2*mib {
		t.Errorf("%v; %d bytes were sent", err, a.sent.Load())
	}
}

// TestPullBesideReaders: a blob that is read and pulled at once is two fills, of which
// each does with its bytes what it is for.
func TestPullBesideReaders(t *testing.T) {
	x := newTable(t)
	data, d := random(3 * mib)
	shelf := newShelf(t, data)
	src := &source{name: "a", data: data}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			want := named(data, shelf.take, src)
			want.Name, want.Digest = "", d
			if err := x.Pull(t.Context(), want, nil); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			f := x.join(t, d, len(data), "r", src)
			defer f.Release()
			if got, err := read(t, f, 0, len(data), true); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes: %v", len(got), err)
			}
		})
	}
	wg.Wait()
	eventually(t, "the blob to be linked", func() bool { return x.linked("r", d) })
	if files := shelf.taken(); len(files) != 2 || files[0].Path == "" || files[1].Path != "" {
		t.Errorf("taken: %+v", files)
	}
}
