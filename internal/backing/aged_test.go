package backing_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// Where others write, what was read is too old at any moment, also while an image is
// being changed.
func TestSharedAges(t *testing.T) {
	a := newShelf(t)
	store := common{a.store}
	trees := tree.New(store, nil)
	uploads := hosted.New(hosted.Parts{Store: store, Tree: trees, Log: zap.NewNop()})
	b := backing.New(backing.Parts{Store: store, Tree: trees, Hosted: uploads, Fills: a.fills, Log: zap.NewNop()})
	var ticks atomic.Int64
	b.Clock(func() time.Time { return when.Add(time.Duration(ticks.Add(1)) * time.Minute) })
	b.Set(a.set)
	t.Cleanup(func() {
		b.Close()
		uploads.Close()
		trees.Close()
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // it waits for itself otherwise
	defer cancel()
	v := a.add(backing.Draft{Name: "a"}, rawDisk(1))
	if tag, err := b.SetTag(ctx, "a", "stable", v.Version, ""); err != nil || tag.Version != v.Version {
		t.Fatal(tag, err)
	}
	u, err := b.Receive(ctx, backing.Draft{Name: "a"}, -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(ctx, body(rawDisk(2))); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { // the commit takes no heed of who gives up
		got, _, err := u.Finish(ctx, backing.Draft{Name: "a", Tags: []string{"next"}})
		if err == nil && (got.Version != "v2" || got.State != backing.Ready) {
			err = fmt.Errorf("%+v", got)
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-ctx.Done():
		panic("the upload waits for itself")
	}
	if err := b.RemoveTag(ctx, "a", "next", ""); err != nil {
		t.Fatal(err)
	}
	if err := b.Delete(ctx, "a", "v2", "", false); err != nil {
		t.Fatal(err)
	}
}

// A pull that a budget has no room for ends, and says so.
func TestPullQuota(t *testing.T) {
	s := newShelf(t)
	s.full.Store(true)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", when, bytes.NewReader(rawDisk(1)))
	}))
	defer server.Close()
	j, err := s.Pull(t.Context(), backing.Draft{Name: "a"}, backing.Source{URL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	for is, err := range s.WatchJob(t.Context(), j.ID) {
		switch {
		case err != nil:
			t.Fatal(err)
		case is.State == backing.Running && !is.Retry.IsZero():
			t.Fatalf("it is tried again: %+v", is)
		case is.State != backing.Running && (is.State != backing.JobFailed || is.Code != backing.QuotaExceeded):
			t.Fatalf("%+v", is)
		}
	}
	s.full.Store(false)
	if j, err = s.Pull(t.Context(), backing.Draft{Name: "a"}, backing.Source{URL: server.URL}); err != nil {
		t.Fatal(err)
	}
	if end := s.ends(j.ID); end.State != backing.Succeeded {
		t.Fatalf("%+v", end)
	}
}

// There are never more jobs than may be, however many ask at once.
func TestQueue(t *testing.T) {
	s := newShelf(t)
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer server.Close()
	defer s.stop()
	defer close(release)
	var begun, busy atomic.Int64
	var group sync.WaitGroup
	for n := range backing.MaxQueued + 20 {
		group.Go(func() {
			_, err := s.Pull(t.Context(), backing.Draft{Name: fmt.Sprint("i", n)}, backing.Source{URL: server.URL})
			if err == nil {
				begun.Add(1)
			} else if backing.Known(err) != nil && backing.Known(err).Code == backing.Busy {
				busy.Add(1)
			}
		})
	}
	group.Wait()
	if begun.Load() != backing.MaxQueued || busy.Load() != 20 {
		t.Errorf("%d begun, %d busy", begun.Load(), busy.Load())
	}
}

// What is served wrong is looked at again, and what merely cannot be had is not.
func TestSuspect(t *testing.T) {
	var told []digest.Digest
	l := backing.New(backing.Parts{Suspect: func(d digest.Digest) { told = append(told, d) }})
	v := backing.Version{Digests: backing.Digests{SHA256: digest.FromString("x")}}
	for _, err := range []error{nil, storage.ErrUnavailable, fmt.Errorf("read: %w", fill.ErrDigest)} {
		l.Failed(v, err)
	}
	if len(told) != 1 || told[0] != v.Digests.SHA256 {
		t.Error(told)
	}
}
