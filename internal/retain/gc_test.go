package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

func withGrace(b *kept) { b.settings.Grace = day }

// exists reports whether there is something at a key, or below it.
func (b *kept) exists(key string) bool {
	b.t.Helper()
	_, err := os.Stat(b.path(key))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.t.Fatal(err)
	}
	return err == nil
}

// What nothing refers to goes once it is a day old; nothing else does. A dry run
// says the same and changes nothing (peers §2, 22 and 26).
func TestGC(t *testing.T) {
	t.Parallel()
	b := keep(t, withGrace)
	b.ready()
	b.populate()
	lone := digest.FromBytes(content(9, 1000))
	// A link that no manifest names: in a mirrored repository, and in others.
	loose := content(30, 500)
	d := digest.FromBytes(loose)
	b.blob("ghcr.io/org/tool", loose)
	kept := content(31, 500)
	b.blob("theirs/web", kept) // which nobody has recorded
	b.blob("ghcr.io/org/tool", kept)
	b.repository("docker.io/library/empty", "docker.io")
	b.repository("docker.io/library/pinned", "docker.io")
	if err := b.tree.Pin(t.Context(), "docker.io/library/pinned", reference(t, "x"), b.clock.time()); err != nil {
		t.Fatal(err)
	}
	b.flush()
	b.clock.pass(day - time.Minute)
	if j := b.done(b.GC(false)); j.Removed != 0 || j.Bytes != 0 || len(j.Found) != 0 {
		t.Errorf("removed before a day had passed: %+v", j)
	}

	b.clock.pass(2 * time.Minute)
	young := b.blobAlone(content(32, 700))
	before := b.stored()
	want := []string{
		lone.String(), d.String(),
		"ghcr.io/org/tool@" + d.String(),
		"ghcr.io/org/tool@" + digest.FromBytes(kept).String(),
		"docker.io/library/empty",
	}
	slices.Sort(want)
	check := func(j Job) {
		t.Helper()
		slices.Sort(j.Found)
		if !slices.Equal(j.Found, want) || j.Removed != int64(len(want)) || j.Bytes != 1500 || j.Kind != "gc" {
			t.Errorf("job is %+v,\nwant %q", j, want)
		}
	}
	dry := b.done(b.GC(true))
	check(dry)
	if after := b.stored(); !slices.Equal(after, before) {
		t.Errorf("a dry run has left\n%q, there were\n%q", after, before)
	}
	if status, err := b.Status(t.Context()); err != nil || status.LastGC == nil || status.LastGC.ID == dry.ID {
		t.Errorf("status: %+v, %v", status, err)
	}
	real := b.done(b.GC(false))
	check(real)
	for data, stays := range map[string]bool{string(content(9, 1000)): false, string(loose): false, string(kept): true, string(content(32, 700)): true, string(content(1, 5000)): true} {
		if b.holds([]byte(data)) != stays {
			t.Errorf("%d bytes are held: %v", len(data), !stays)
		}
	}
	if b.exists(layout.LayerLink("ghcr.io/org/tool", d)) || !b.exists(layout.LayerLink("theirs/web", digest.FromBytes(kept))) {
		t.Error("the wrong links are there")
	}
	if b.exists(layout.Record("docker.io/library/empty")) || !b.exists(layout.Record("docker.io/library/pinned")) || !b.exists(layout.Record("apps/web")) {
		t.Error("the wrong records are there")
	}
	b.agrees(b.ready())
	if status, err := b.Status(t.Context()); err != nil || status.LastGC == nil || status.LastGC.ID != real.ID {
		t.Errorf("status: %+v, %v", status, err)
	}
	// Nothing is left for a second one, but what has grown old.
	b.clock.pass(day + time.Minute)
	if j := b.done(b.GC(false)); !slices.Equal(j.Found, []string{young.String()}) {
		t.Errorf("found %q", j.Found)
	}
}

// What was to be deleted at the next gc is deleted though the process, its
// catalog and its configuration are others by then (peers §2, 22).
func TestPeers22SurvivesRestart(t *testing.T) {
	t.Parallel()
	b := keep(t, withGrace)
	b.ready()
	b.blobAlone(content(1, 100))
	b.restart()
	b.ready()
	b.clock.pass(day + time.Minute)
	b.Set(Settings{Grace: day, MaxSize: 1 << 40})
	b.done(b.GC(false))
	if b.holds(content(1, 100)) {
		t.Error("it is still there")
	}
}

// A manifest that begins to name what is being collected keeps it. Whoever
// pushes or pulls need not wait for a gc (peers §2, 26 and 27).
func TestPeers26GCBesideWriters(t *testing.T) {
	t.Parallel()
	b := keep(t) // no grace: everything that nothing refers to goes
	b.ready()
	b.repository("docker.io/busy", "docker.io")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for writer := range 2 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				body := image("m", nil, content(writer, 10+i%3))
				d := digest.FromBytes(body)
				if _, err := b.tree.PutManifest(t.Context(), "docker.io/busy", d, body, nil); err != nil {
					t.Error(err)
					return
				}
				if data, err := b.store.Get(t.Context(), layout.Blob(d), 1<<20); err != nil || digest.FromBytes(data) != d {
					t.Errorf("what was stored is gone: %v", err)
					return
				}
				if err := b.tree.RemoveManifest(t.Context(), "docker.io/busy", d, nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	b.clock.pass(time.Hour)
	for range 5 {
		b.clock.pass(time.Minute)
		b.done(b.GC(false))
	}
	cancel()
	wg.Wait()
	b.agrees(b.ready())
}

// Who begins to name a blob while it is about to be collected keeps it (peers §2,
// 26).
func TestPeers26NamedMeanwhile(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	both := [][]byte{content(1, 100), content(2, 100)}
	slices.SortFunc(both, func(x, y []byte) int {
		return strings.Compare(string(digest.FromBytes(x)), string(digest.FromBytes(y)))
	})
	for _, data := range both {
		b.blobAlone(data)
	}
	b.stop()
	// They go in the order of their digests. Three name the second as the first
	// goes, in case one of them has the first one's lock.
	named := make(chan error, 3)
	b.beginOn(slow{b.disk(), func(key string) {
		if key != layout.Blob(digest.FromBytes(both[0])) {
			return
		}
		for i := range 3 {
			go func() {
				body := image(fmt.Sprint(i), nil, both[1])
				_, err := b.tree.PutManifest(context.Background(), "docker.io/a", digest.FromBytes(body), body, nil)
				named <- err
			}()
		}
		if err := <-named; err != nil {
			t.Error(err)
		}
	}})
	b.clock.pass(time.Hour)
	b.ready()
	j := b.done(b.GC(false))
	for range 2 {
		if err := <-named; err != nil {
			t.Error(err)
		}
	}
	if b.holds(both[0]) || !b.holds(both[1]) || j.Removed != 1 {
		t.Errorf("job is %+v", j)
	}
	b.agrees(b.ready())
}

// slow is a store in which what holds up one call is up to the test.
type slow struct {
	storage.Store
	deleting func(key string)
}

func (s slow) Delete(ctx context.Context, key string) error {
	s.deleting(key)
	return s.Store.Delete(ctx, key)
}

// There is one gc at a time, and nothing else waits for it: no lock is held on
// the whole store (peers §2, 27).
func TestPeers27OneGCAndNoLock(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	lone := b.blobAlone(content(1, 100))
	b.stop()
	reached, gate := make(chan struct{}), make(chan struct{})
	b.beginOn(slow{b.disk(), func(key string) {
		if key == layout.Blob(lone) {
			close(reached)
			<-gate
		}
	}})
	b.clock.pass(time.Hour)
	b.ready()
	first, err := b.GC(false)
	if err != nil {
		t.Fatal(err)
	}
	<-reached
	second, err := b.GC(true)
	if err != nil || second.ID != first.ID {
		t.Errorf("a second one: %+v, %v", second, err)
	}
	b.repository("docker.io/other", "docker.io")
	b.pull("docker.io/other", "x", content(2, 100), content(3, 100))
	if !b.holds(content(3, 100)) {
		t.Error("nothing could be stored")
	}
	close(gate)
	if j := b.done(first, nil); j.Removed != 1 {
		t.Errorf("job is %+v", j)
	}
}

// once is a schedule of one time.
type once struct {
	mu   sync.Mutex
	told bool
}

func (s *once) Next(now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.told {
		return now.Add(1000 * time.Hour)
	}
	s.told = true
	return now
}

func TestGCScheduled(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.blobAlone(content(1, 100))
	b.flush()
	b.clock.pass(time.Hour)
	b.Set(Settings{GC: &once{}})
	eventually(t, "a scheduled gc", until(func() bool {
		return slices.ContainsFunc(b.Jobs(), func(j Job) bool { return j.Kind == "gc" && !j.Ended.IsZero() })
	}))
	if b.holds(content(1, 100)) {
		t.Error("it is still there")
	}
}

// Without a catalog, or with one that is not complete, nothing is deleted.
func TestGCWithoutCatalog(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.blobAlone(content(1, 100))
	b.stop()
	b.catalog = nil
	b.start()
	b.ready()
	b.Keeper.dismiss(nil, errors.New("broken"))
	if j := b.ended(b.GC(false)); j.Error == "" || j.Removed != 0 {
		t.Errorf("job is %+v", j)
	}
	if !b.holds(content(1, 100)) {
		t.Error("it is gone")
	}
}

// However many there are, all go.
func TestGCManyBlobs(t *testing.T) {
	t.Parallel()
	const blobs = 2*gcBatch + 50
	b := keep(t)
	b.ready()
	for i := range blobs {
		b.blobAlone([]byte(fmt.Sprintf("%04d", i)))
	}
	b.flush()
	b.clock.pass(time.Hour)
	j := b.done(b.GC(false))
	if len(j.Found) != blobs || j.Removed != blobs || j.Bytes != 4*blobs {
		t.Errorf("%d of %d found, %d bytes", len(j.Found), j.Removed, j.Bytes)
	}
	left, err := filepath.Glob(b.path("docker/registry/v2/blobs/sha256/*/*/data"))
	if err != nil || len(left) != 0 {
		t.Errorf("%d are left, %v", len(left), err)
	}
}
