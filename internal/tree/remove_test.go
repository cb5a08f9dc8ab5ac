package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
)

func (b *bench) ok(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) wantWarm(repository string, d digest.Digest, want bool) {
	b.t.Helper()
	b.settle()
	if _, ok := b.Warm(repository, d, time.Time{}); ok != want {
		b.t.Errorf("%s@%s is warm: %v, want %v", repository, d, ok, want)
	}
}

// wantFiles checks that these are all the files and directories below one.
func (b *bench) wantFiles(below string, want ...string) {
	b.t.Helper()
	var got []string
	root := filepath.Join(b.dir, below)
	filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && path != root {
			name, _ := filepath.Rel(root, path)
			if entry.IsDir() {
				name += "/"
			}
			got = append(got, name)
		}
		return nil
	})
	if !slices.Equal(got, want) {
		b.t.Errorf("below %s there is %q, want %q", below, got, want)
	}
}

func TestRemoveTag(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	body := image(digest.FromString("config"))
	one, two, long := b.put("r", body), b.put("r", index()), digest.SHA512.FromString(body)
	_, err := b.PutManifest(ctx, "r", long, []byte(body), nil)
	b.ok(err)
	for _, tag := range []string{"moved", "other"} {
		b.ok(b.SetTag(ctx, "r", tag, one, time.Now(), nil))
		b.ok(b.SetTag(ctx, "r", tag, two, time.Now(), nil))
	}
	b.ok(b.SetTag(ctx, "r", "long", long, time.Now(), nil))
	b.told.take()

	b.ok(b.RemoveTag(ctx, "r", "moved", one, nil)) // what it meant before
	b.ok(b.RemoveTag(ctx, "r", "long", two, nil))
	b.wantTold()
	if d, err := b.Tag(ctx, "r", "moved"); err != nil || d != two {
		t.Errorf("the tag means %s, %v", d, err)
	}
	b.ok(b.RemoveTag(ctx, "r", "moved", two, nil))
	b.ok(b.RemoveTag(ctx, "r", "long", one, nil)) // by its sha256
	b.wantTold("untagged r moved", "untagged r long")
	for range 2 {
		for _, tag := range []string{"moved", "long"} {
			if d, err := b.Tag(ctx, "r", tag); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the tag means %s, %v", d, err)
			}
			if r, err := b.TagRecord(ctx, "r", tag); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the tag's record is %+v, %v", r, err)
			}
		}
		if tags, err := b.Tags(ctx, "r"); err != nil || !slices.Equal(tags, []string{"other"}) {
			t.Errorf("tags %q, %v", tags, err)
		}
		b.wantFiles("mirror/records/repositories/r/_tags", "other.json")
		b.wantManifest("r", two, index())
		b.restart()
	}
	// It may come again, as new.
	b.ok(b.SetTag(ctx, "r", "moved", one, time.Now(), nil))
	if r, err := b.TagRecord(ctx, "r", "moved"); err != nil || !r.Moved.IsZero() {
		t.Errorf("%+v, %v", r, err)
	}
	b.ok(b.RemoveTag(ctx, "r", "never was", one, nil))
}

func TestRemoveManifest(t *testing.T) {
	for _, by := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		t.Run(by.String(), func(t *testing.T) {
			b := newBench(t)
			ctx := t.Context()
			only, shared, child := digest.FromString("only"), digest.FromString("shared"), digest.FromString("child")
			body, list := image(only, shared), index(child)
			for _, repository := range []string{"r", "s"} {
				for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
					_, err := b.PutManifest(ctx, repository, algorithm.FromString(body), []byte(body), nil)
					b.ok(err)
				}
				b.put(repository, image(shared))
				b.put(repository, list)
			}
			b.wantMember("r", only, true)
			b.wantMember("r", digest.FromString("never was"), false)
			b.told.take()
			b.ok(b.RemoveManifest(ctx, "r", by.FromString(body), nil))
			b.wantTold("unmanifested r " + short(digest.FromString(body)))
			for range 2 {
				for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
					b.wantWarm("r", algorithm.FromString(body), false)
					b.wantNoManifest("r", algorithm.FromString(body))
					b.wantManifest("s", algorithm.FromString(body), body)
				}
				b.wantMember("r", only, false)
				b.wantMember("r", shared, true)
				b.wantMember("r", child, true)
				b.wantMember("s", only, true)
				b.restart()
			}
			b.ok(b.RemoveManifest(ctx, "r", digest.FromString(list), nil))
			b.wantMember("r", child, false)
			b.ok(b.RemoveManifest(ctx, "r", by.FromString("never was"), nil))
			b.put("r", body) // pulled again
			b.wantManifest("r", digest.FromString(body), body)
			b.wantMember("r", only, true)
		})
	}
}

// TestRemoveDamagedManifest: it cannot be read any more what it names.
func TestRemoveDamagedManifest(t *testing.T) {
	b := newBench(t)
	b.Heat(0)
	blob := digest.FromString("blob")
	d := b.put("r", image(blob))
	b.settle()
	b.write(layout.Blob(d), nil)
	b.ok(b.RemoveManifest(t.Context(), "r", d, nil))
	b.wantMember("r", blob, false)
}

// TestRemoveRemembered: of a manifest that there was no room for.
func TestRemoveRemembered(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("blob"))
	for _, d := range []digest.Digest{digest.FromString(body), digest.SHA512.FromString(body)} {
		_, err := b.Remember("r", d, []byte(body))
		b.ok(err)
		b.wantWarm("r", d, true)
		b.ok(b.RemoveManifest(t.Context(), "r", d, nil))
		b.wantWarm("r", d, false)
		b.wantMember("r", digest.FromString("blob"), false)
	}
}

func TestUnlink(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	named, other := b.layer("r", "named by a manifest"), b.layer("r", "by none")
	b.layer("s", "by none")
	long := digest.SHA512.FromString("by none")
	b.ok(b.LinkBlob(ctx, "r", long, other))
	b.put("r", image(digest.FromString("config"), named))
	b.opens(other, "by none")
	b.settle()
	if _, ok := b.WarmBlob("r", other, time.Time{}); !ok {
		t.Error("it is not warm")
	}
	b.ok(b.Unlink(ctx, "r", long, nil))
	b.ok(b.Unlink(ctx, "r", named, nil))
	b.ok(b.Unlink(ctx, "r", digest.FromString("never was"), nil))
	for range 2 {
		for _, d := range []digest.Digest{other, long} {
			if _, ok := b.WarmBlob("r", d, time.Time{}); ok {
				t.Error("it is warm")
			}
			b.wantMember("r", d, false)
		}
		if m := b.wantMember("r", named, true); m.Linked {
			t.Errorf("%+v", m)
		}
		b.wantMember("s", other, true)
		b.opens(other, "by none")
		b.wantFiles("docker/registry/v2/repositories/r/_layers")
		b.restart()
	}
}

func TestRemoveBlob(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	d := b.layer("r", "a layer")
	b.opens(d, "a layer")
	reader, _, err := b.store.Open(ctx, layout.Blob(d), 0, -1)
	b.ok(err)
	defer reader.Close()
	b.told.take()
	for _, c := range []struct {
		needed  func() (bool, error)
		err     error
		removed bool
	}{
		{func() (bool, error) { return true, nil }, nil, false},
		{func() (bool, error) { return false, errBroken }, errBroken, false},
		{func() (bool, error) { return false, nil }, nil, true},
		{nil, nil, false}, // it is gone
	} {
		if removed, err := b.RemoveBlob(ctx, d, c.needed); removed != c.removed || !errors.Is(err, c.err) {
			t.Errorf("RemoveBlob: %v, %v; want %v, %v", removed, err, c.removed, c.err)
		}
		_, statErr := b.StatBlob(ctx, d)
		if gone := errors.Is(statErr, fs.ErrNotExist); gone != (c.err == nil && (c.removed || c.needed == nil)) {
			t.Errorf("StatBlob: %v", statErr)
		}
	}
	b.wantTold("removed "+short(d), "removed "+short(d))
	if err := third(b.OpenBlob(ctx, d)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OpenBlob: %v", err)
	}
	if got, err := io.ReadAll(reader); err != nil || string(got) != "a layer" {
		t.Errorf("who had it open reads %q, %v", got, err)
	}
	b.wantFiles("docker/registry/v2/blobs")
	if err := b.LinkBlob(ctx, "s", d, d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("LinkBlob of what is gone: %v", err)
	}
	b.wantMember("s", d, false)
	b.wantTold()
	b.layer("r", "a layer")
	b.opens(d, "a layer")
}

// TestRemovedFromMemory: ristretto makes a value visible some time after it was
// set, and may drop it; but it is not there after it was removed, not even if it
// was read before.
func TestRemovedFromMemory(t *testing.T) {
	b := newBench(t)
	w := &warm{body: []byte("bytes")}
	for i := range 300 {
		d := digest.FromString(fmt.Sprint("blob ", i))
		since := b.hot.since(d)
		b.hot.add(d, w, since)
		b.hot.remove(d)
		b.hot.add(d, w, since)
		b.settle()
		if _, ok := b.hot.get(d); ok {
			t.Fatal("it is in memory")
		}
	}
}

func TestForget(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	record := Record{Class: Mirrored, Upstream: "docker.io"}
	for _, repository := range []string{"a", "a/b"} {
		b.ok(b.PutRecord(ctx, repository, record))
		d := b.put(repository, index())
		b.layer(repository, "a layer")
		b.ok(b.SetTag(ctx, repository, "v1", digest.FromString("before"), time.Now(), nil))
		b.ok(b.SetTag(ctx, repository, "v1", d, time.Now(), nil))
	}
	b.ok(b.Pin(ctx, "a", oci.Reference{Tag: "v1"}, time.Now()))
	b.told.take()
	if err := b.Forget(ctx, "a"); err == nil {
		t.Error("a repository with a manifest was forgotten")
	}
	b.wantTold()
	b.ok(b.RemoveManifest(ctx, "a", digest.FromString(index()), nil))
	b.told.take()
	b.ok(b.Forget(ctx, "a"))
	b.wantTold("untagged a v1", "forgotten a", "pinned a v1")
	for range 2 {
		if _, err := b.Record(ctx, "a"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("its record: %v", err)
		}
		b.wantMember("a", digest.FromString("a layer"), false)
		if r, err := b.Record(ctx, "a/b"); err != nil || r.Upstream != "docker.io" {
			t.Errorf("the record of another: %+v, %v", r, err)
		}
		b.wantManifest("a/b", digest.FromString(index()), index())
		var names []string
		for name := range b.Repositories(ctx) {
			names = append(names, name)
		}
		if !slices.Equal(names, []string{"a/b"}) {
			t.Errorf("repositories %q", names)
		}
		entries, err := os.ReadDir(b.file(layout.Repositories + "a"))
		if err != nil || len(entries) != 1 {
			t.Errorf("left of it: %v, %v", entries, err)
		}
		for pin := range b.Pins(ctx, "a") {
			names = append(names, pin.Reference)
		}
		if len(names) != 2 {
			t.Error("the pin is gone")
		}
		b.restart()
	}

	// What is hosted, and what nobody has recorded, may be in the middle of a push.
	b.ok(b.PutRecord(ctx, "hosted", Record{Class: Hosted}))
	for _, repository := range []string{"hosted", "unrecorded"} {
		b.layer(repository, "a layer")
		b.told.take()
		if err := b.Forget(ctx, repository); err == nil {
			t.Errorf("%s was forgotten", repository)
		}
		b.wantTold()
		b.wantMember(repository, digest.FromString("a layer"), true)
	}
}

// TestStoredAfterForget: somebody had seen that the repository is recorded, and
// stores something when it is not any more.
func TestStoredAfterForget(t *testing.T) {
	layer := digest.FromString("a layer")
	for name, store := range map[string]func(*bench) error{
		"manifest": func(b *bench) error {
			return second(b.PutManifest(b.t.Context(), "r", digest.FromString(index()), []byte(index()), nil))
		},
		"blob": func(b *bench) error { return b.LinkBlob(b.t.Context(), "r", layer, layer) },
		"tag":  func(b *bench) error { return b.SetTag(b.t.Context(), "r", "v1", layer, time.Now(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.blob("a layer")
			b.ok(b.PutRecord(t.Context(), "r", Record{Class: Mirrored, Upstream: "docker.io"}))
			b.ok(b.Forget(t.Context(), "r"))
			b.told.take()
			b.ok(store(b))
			if c := b.told.take(); len(c) != 2 || c[0].Kind != Recorded || c[0].Record.Upstream != "docker.io" {
				t.Errorf("told %+v", c)
			}
			b.restart()
			if r, err := b.Record(t.Context(), "r"); err != nil || r.Class != Mirrored || r.Upstream != "docker.io" {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// TestKilledWhileRemoving: a process dies after a step, and the next does it
// again.
func TestKilledWhileRemoving(t *testing.T) {
	body := image(digest.FromString("config"))
	d, layer := digest.FromString(body), digest.FromString("a layer")
	for point, step := range map[string]func(context.Context, *bench) error{
		"evict.untagged":     func(ctx context.Context, b *bench) error { return b.RemoveTag(ctx, "r", "v1", d, nil) },
		"evict.unindexed":    func(ctx context.Context, b *bench) error { return b.RemoveTag(ctx, "r", "v1", d, nil) },
		"evict.unmanifested": func(ctx context.Context, b *bench) error { return b.RemoveManifest(ctx, "r", d, nil) },
		"evict.unlinked":     func(ctx context.Context, b *bench) error { return b.Unlink(ctx, "r", layer, nil) },
		"evict.removed":      func(ctx context.Context, b *bench) error { return second(b.RemoveBlob(ctx, layer, nil)) },
		"evict.forgotten": func(ctx context.Context, b *bench) error {
			if err := b.RemoveManifest(ctx, "r", d, nil); err != nil {
				return err
			}
			return b.Forget(ctx, "r")
		},
	} {
		t.Run(point, func(t *testing.T) {
			b := newBench(t)
			ctx := t.Context()
			b.ok(b.PutRecord(ctx, "r", Record{Class: Mirrored}))
			b.put("r", body)
			b.layer("r", "a layer")
			b.ok(b.SetTag(ctx, "r", "v1", digest.FromString("before"), time.Now(), nil))
			b.ok(b.SetTag(ctx, "r", "v1", d, time.Now(), nil))
			killed := make(chan bool)
			failpoint.Set(func(name string) {
				if name == point {
					runtime.Goexit()
				}
			})
			go func() {
				defer close(killed)
				if err := step(ctx, b); err != nil {
					t.Error(err)
				}
				killed <- false
			}()
			_, survived := <-killed
			failpoint.Set(nil)
			if survived {
				t.Fatal("it did not come there")
			}
			b.restart()
			b.told.take()
			switch point {
			case "evict.forgotten": // the record was the last there was
				if err := b.Forget(ctx, "r"); err == nil {
					t.Error("forgotten twice")
				}
				b.wantFiles("docker/registry/v2/repositories")
				return
			default:
				b.ok(step(ctx, b))
			}
			if len(b.told.take()) == 0 {
				t.Error("nothing was told")
			}
			switch point {
			case "evict.untagged", "evict.unindexed":
				if tags, err := b.Tags(ctx, "r"); err != nil || len(tags) != 0 {
					t.Errorf("tags %q, %v", tags, err)
				}
				b.wantFiles("mirror/records/repositories/r", "_record.json")
			case "evict.unmanifested":
				b.wantNoManifest("r", d)
			case "evict.unlinked":
				b.wantMember("r", layer, false)
			case "evict.removed":
				if _, err := b.StatBlob(ctx, layer); !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
			}
		})
	}
}
