package storagetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// A Place is the distant place of one subtest, which is empty at first. Its keys are
// those of the store.
type Place struct {
	// Open opens a store on the place that has dir for what is near. Stores with
	// different directories are different machines.
	Open func(dir string) (storage.Store, error)

	// Read, Size (-1 if there is nothing) and Keys look at what is there. Write and
	// Remove change it as somebody else would, behind the store's back.
	Read   func(key string) ([]byte, bool)
	Size   func(key string) int64
	Keys   func(prefix string) []string
	Write  func(key string, data []byte)
	Remove func(key string)

	// Down makes the place unreachable until Up.
	Down, Up func()

	// Brief leaves out what takes long by its nature.
	Brief bool

	// What follows may be nil where it cannot be had; what needs it is left out then.

	// Hold lets nothing that is written be answered until release is called. held
	// waits until something is waiting.
	Hold func() (held, release func())
	// Lag makes listings stay as they are until caughtUp is called.
	Lag func() (caughtUp func())
}

// TestDistant runs the suite of stores for which Distant is not nil, beside Test.
// place makes a place.
func TestDistant(t *testing.T, place func(t *testing.T) Place) {
	for _, c := range []struct {
		name string
		run  func(d *distant)
	}{
		{"NearAndFar", testNearAndFar},
		{"SpansFromAfar", testSpansFromAfar},
		{"SyncTakesThere", testSyncTakesThere},
		{"DurableIsThere", testDurableIsThere},
		{"PutFileTakesThere", testPutFileTakesThere},
		{"DeleteTakesAway", testDeleteTakesAway},
		{"DropKeepsPending", testDropKeepsPending},
		{"Distrust", testDistrust},
		{"Local", testLocal},
		{"Uploads", testUploads},
		{"ForeignTree", testForeignTree},
		{"Relist", testRelist},
		{"Restart", testRestart},
		{"RestartWithout", testRestartWithout},
		{"Unreachable", testUnreachable},
		{"UnreachableAtFirst", testUnreachableAtFirst},
		{"LastStateWins", testLastStateWins},
		{"DeleteDuringUpload", testDeleteDuringUpload},
		{"ReplaceDuringUpload", testReplaceDuringUpload},
		{"SyncEnds", testSyncEnds},
		{"LaggingListings", testLaggingListings},
		{"Presign", testPresign},
		{"TwoMachines", testTwoMachines},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // most of it waits
			d := &distant{T: t, Place: place(t), dir: filepath.Join(t.TempDir(), "near")}
			c.run(d)
			d.close()
		})
	}
}

// distant is one subtest, with the store that it has open.
type distant struct {
	*testing.T
	Place
	dir   string
	store storage.Store
}

var ctx = context.Background()

// open opens a store on the place, or what is open already.
func (d *distant) open() storage.Store {
	d.Helper()
	if d.store == nil {
		d.store = d.openAt(d.dir)
	}
	return d.store
}

func (d *distant) openAt(dir string) storage.Store {
	d.Helper()
	s, err := d.Place.Open(dir)
	if err != nil {
		d.Fatalf("Open: %v", err)
	}
	if s.Distant() == nil {
		d.Fatal("Distant is nil")
	}
	return s
}

// listed is open, once it knows what is at the place.
func (d *distant) listed() storage.Store {
	d.Helper()
	s := d.open()
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.Distant().Listed(within); err != nil {
		d.Fatalf("Listed: %v", err)
	}
	return s
}

func (d *distant) close() {
	d.Helper()
	if d.store == nil {
		return
	}
	s := d.store
	d.store = nil
	if err := s.Close(); err != nil {
		d.Errorf("Close: %v", err)
	}
}

// anew is listed, after what was open has been closed.
func (d *distant) anew() storage.Store {
	d.Helper()
	d.close()
	return d.listed()
}

// other is the directory of another machine.
func (d *distant) other() string { return filepath.Join(d.TempDir(), "other") }

// eventually waits for what takes the store some time by its nature.
func (d *distant) eventually(what string, ok func() error) {
	d.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	late := time.After(90 * time.Second)
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			d.Fatalf("waited in vain for %s: %v", what, err)
		}
	}
}

func (d *distant) sync(keys ...string) {
	d.Helper()
	if err := d.store.Sync(ctx, keys...); err != nil {
		d.Fatalf("Sync: %v", err)
	}
}

// syncAtLast is sync after the place was down: a store may leave it alone for a while.
func (d *distant) syncAtLast(keys ...string) {
	d.Helper()
	d.eventually("a Sync", func() error {
		err := d.store.Sync(ctx, keys...)
		if err != nil && !errors.Is(err, storage.ErrUnavailable) {
			d.Fatalf("Sync: %v", err)
		}
		return err
	})
}

// there holds the place to having a value, or nothing if want is nil.
func (d *distant) there(what, key string, want []byte) {
	d.Helper()
	got, ok := d.Read(key)
	switch {
	case want == nil && ok:
		d.Errorf("%s: %s is at the place", what, key)
	case want != nil && !ok:
		d.Errorf("%s: %s is not at the place", what, key)
	case !bytes.Equal(got, want):
		d.Errorf("%s: the place has other bytes, %d and not %d, under %s", what, len(got), len(want), key)
	}
}

// has holds the store to having a value.
func (d *distant) has(what, key string, want []byte) {
	d.Helper()
	got, err := d.store.Get(ctx, key, 64<<20)
	if err != nil || !bytes.Equal(got, want) {
		d.Errorf("%s: Get %s: %d bytes and not %d, %v", what, key, len(got), len(want), err)
	}
	info, err := d.store.Stat(ctx, key)
	if err != nil || info.Size != int64(len(want)) || info.Key != key || info.ModTime.IsZero() {
		d.Errorf("%s: Stat %s: %+v, %v", what, key, info, err)
	}
	r, info, err := d.store.Open(ctx, key, 0, -1)
	if err != nil {
		d.Errorf("%s: Open %s: %v", what, key, err)
		return
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) || info.Size != int64(len(want)) {
		d.Errorf("%s: Open %s: %d bytes and not %d, %+v, %v", what, key, len(got), len(want), info, err)
	}
}

// hasNot holds the store to knowing that there is nothing.
func (d *distant) hasNot(what, key string) {
	d.Helper()
	_, err := d.store.Stat(ctx, key)
	wantAbsent(d.T, what+": Stat "+key, err)
	_, err = d.store.Get(ctx, key, 1<<20)
	wantAbsent(d.T, what+": Get "+key, err)
	_, _, err = d.store.Open(ctx, key, 0, -1)
	wantAbsent(d.T, what+": Open "+key, err)
	r, _, err := d.store.Distant().OpenNear(ctx, key)
	if err == nil {
		r.Close()
	}
	wantAbsent(d.T, what+": OpenNear "+key, err)
	if errors.Is(err, storage.ErrDistant) {
		d.Errorf("%s: %s is absent and distant: %v", what, key, err)
	}
}

// keys is a listing.
func (d *distant) keys(prefix string, deep bool) []string {
	d.Helper()
	var keys []string
	for info, err := range d.store.List(ctx, prefix, deep) {
		if err != nil {
			d.Fatalf("List %s: %v", prefix, err)
		}
		keys = append(keys, info.Key)
	}
	slices.Sort(keys)
	return keys
}

func (d *distant) lists(what, prefix string, deep bool, want ...string) {
	d.Helper()
	if got := d.keys(prefix, deep); !slices.Equal(got, want) {
		d.Errorf("%s: List(%s, %v) is %q, want %q", what, prefix, deep, got, want)
	}
}

// blob is n bytes that a name stands for, and their key.
func blob(name string, n int) (key string, data []byte) {
	data = make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(data)
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	return "docker/registry/v2/blobs/sha256/" + digest[:2] + "/" + digest + "/data", data
}

// links lie here.
const links = "docker/registry/v2/repositories/some/where/_layers/sha256/"

func link(name string) string { return links + name + "/link" }

func (d *distant) put(key string, data []byte) {
	d.Helper()
	put(d.T, d.store, key, string(data))
}

// near reads what is near of a value.
func (d *distant) near(key string) ([]byte, storage.Info, error) {
	d.Helper()
	r, info, err := d.store.Distant().OpenNear(ctx, key)
	if err != nil {
		return nil, info, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		d.Errorf("reading what is near of %s: %v", key, err)
	}
	return data, info, nil
}

// drop makes a blob that is at the place far.
func (d *distant) drop(key string) {
	d.Helper()
	d.store.Distant().Drop(key)
	if _, _, err := d.near(key); !errors.Is(err, storage.ErrDistant) {
		d.Fatalf("OpenNear after Drop: %v", err)
	}
}

func testNearAndFar(d *distant) {
	s := d.listed()
	key, data := blob("near", 100_000)
	d.hasNot("before", key)
	d.put(key, data)
	got, info, err := d.near(key)
	if err != nil || !bytes.Equal(got, data) || info.Size != int64(len(data)) {
		d.Errorf("what was just put is not near: %d bytes, %+v, %v", len(got), info, err)
	}
	d.sync(key)
	d.drop(key)
	if s.Distant().Drop(key) {
		d.Error("a second Drop found something")
	}
	_, info, err = d.near(key)
	if !errors.Is(err, storage.ErrDistant) || errors.Is(err, fs.ErrNotExist) {
		d.Errorf("OpenNear of what is far: %v", err)
	}
	if info.Key != key || info.Size != int64(len(data)) || info.Doubtful {
		d.Errorf("what is known of it: %+v", info)
	}
	d.has("far", key, data)

	// The fill of a far blob ends in a Put that keeps it near.
	d.store.Distant().Drop(key)
	d.put(key, data)
	if got, _, err := d.near(key); err != nil || !bytes.Equal(got, data) {
		d.Errorf("a far blob that was put is not near: %d bytes, %v", len(got), err)
	}
	if !s.Distant().Drop(key) {
		d.Error("what is near of a blob that is there cannot be dropped")
	}
}

func testSpansFromAfar(d *distant) {
	s := d.listed()
	key, data := blob("spans", 70_000)
	d.put(key, data)
	d.sync(key)
	d.drop(key)
	size := int64(len(data))
	for _, c := range []struct {
		offset, length int64
		bad            bool
	}{
		{0, -1, false}, {4, -1, false}, {size, -1, false}, {0, size, false}, {3, 60_000, false}, {size - 1, 1, false},
		{5, 0, false}, {size, 0, false}, {size + 1, -1, true}, {size - 2, 3, true}, {-1, 3, true}, {size + 1, 0, true},
	} {
		d.store.Distant().Drop(key)
		r, info, err := s.Open(ctx, key, c.offset, c.length)
		if c.bad {
			if err == nil {
				r.Close()
				d.Errorf("Open(%d, %d) succeeded", c.offset, c.length)
			} else if errors.Is(err, fs.ErrNotExist) {
				d.Errorf("Open(%d, %d): a bad span is not an absent key: %v", c.offset, c.length, err)
			}
			continue
		}
		if err != nil {
			d.Errorf("Open(%d, %d): %v", c.offset, c.length, err)
			continue
		}
		end := size
		if c.length >= 0 {
			end = c.offset + c.length
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || !bytes.Equal(got, data[c.offset:end]) || info.Size != size {
			d.Errorf("Open(%d, %d): %d bytes, %+v, %v", c.offset, c.length, len(got), info, err)
		}
	}
	d.store.Distant().Drop(key)
	if _, err := s.Get(ctx, key, size-1); !errors.Is(err, storage.ErrTooLarge) {
		d.Errorf("Get over the limit: %v", err)
	}
	if err := s.Vouch(ctx, key); err != nil {
		d.Errorf("Vouch of what is far: %v", err)
	}
}

func testSyncTakesThere(d *distant) {
	d.listed()
	big, data := blob("sync", 2<<20)
	small, few := blob("small", 10)
	d.put(big, data)
	d.put(small, few)
	d.put(link("a"), []byte("one"))
	d.put(link("empty"), nil)
	d.sync(big, small, link("a"), link("empty"), link("none"))
	d.there("after Sync", big, data)
	d.there("after Sync", small, few)
	d.there("after Sync", link("a"), []byte("one"))
	d.there("after Sync", link("empty"), []byte{})
	d.put(link("a"), []byte("two"))
	d.sync(link("a"))
	d.there("after replacing", link("a"), []byte("two"))
	d.has("after Sync", big, data)
	d.has("after Sync", small, few)
	d.has("after Sync", link("a"), []byte("two"))
	d.has("after Sync", link("empty"), []byte{})
}

func testDurableIsThere(d *distant) {
	s := d.listed()
	key, data := blob("durable", 100_000)
	for key, data := range map[string][]byte{key: data, link("a"): []byte("sha256:x")} {
		if err := s.Put(ctx, key, data, storage.Durable); err != nil {
			d.Fatal(err)
		}
		d.there("after Put", key, data)
	}
	if err := s.Put(ctx, link("a"), []byte("sha256:y"), storage.Durable); err != nil {
		d.Fatal(err)
	}
	d.there("after replacing", link("a"), []byte("sha256:y"))
}

func testPutFileTakesThere(d *distant) {
	s := d.listed()
	dir := spool(d.T, s, "fills")
	// Larger than what is stored in one call.
	for i, n := range []int{1000, 12<<20 + 1} {
		for _, durability := range []storage.Durability{storage.Lazy, storage.Durable} {
			key, data := blob(fmt.Sprint(i, durability), n)
			path := filepath.Join(dir, "file")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				d.Fatal(err)
			}
			if err := s.PutFile(ctx, key, path, durability); err != nil {
				d.Fatal(err)
			}
			if durability == storage.Lazy {
				d.sync(key)
			}
			if size := d.Size(key); size != int64(n) {
				d.Errorf("after PutFile the place has %d bytes, want %d", size, n)
			}
			d.there("after PutFile", key, data)
			d.drop(key)
			d.has("after PutFile", key, data)
		}
	}
}

func testDeleteTakesAway(d *distant) {
	s := d.listed()
	key, data := blob("delete", 100_000)
	for _, far := range []bool{false, true} {
		for key, data := range map[string][]byte{key: data, link("a"): []byte("sha256:x")} {
			d.put(key, data)
			d.sync(key)
			if far {
				s.Distant().Drop(key)
			}
			if err := s.Delete(ctx, key); err != nil {
				d.Fatal(err)
			}
			d.hasNot("after Delete", key)
			d.sync(key)
			d.there("after Delete and Sync", key, nil)
		}
	}
	d.lists("after Delete", "docker/", true)
	d.anew()
	d.hasNot("after a restart", key)
	d.hasNot("after a restart", link("a"))
}

func testDropKeepsPending(d *distant) {
	s := d.listed()
	key, data := blob("pending", 100_000)
	d.Down()
	d.put(key, data)
	d.put(link("a"), []byte("sha256:x"))
	if s.Distant().Drop(key) || s.Distant().Drop(link("a")) {
		d.Error("Drop took what is nowhere else")
	}
	d.has("after Drop", key, data)
	d.has("after Drop", link("a"), []byte("sha256:x"))
	d.Up()
	d.syncAtLast(key, link("a"))
	d.there("after Sync", key, data)
}

func testDistrust(d *distant) {
	s := d.listed()
	for _, gone := range []bool{false, true} {
		key, data := blob(fmt.Sprint("distrust", gone), 100_000)
		d.put(key, data)
		d.sync(key)
		wrong := slices.Clone(data)
		wrong[len(wrong)/2] ^= 1
		d.Write(key, wrong)
		d.drop(key)
		s.Distant().Distrust(key)
		if gone {
			d.anew()
			s = d.store
			s.Distant().Distrust(key)
		}
		d.put(key, data)
		d.sync(key)
		d.there("after Distrust", key, data)
		d.has("after Distrust", key, data)
		d.drop(key)
		d.has("after Distrust, from afar", key, data)
	}
	// Of what is absent it says nothing.
	none, data := blob("none", 10)
	s.Distant().Distrust(none)
	d.hasNot("after Distrust", none)
	d.put(none, data)
	d.sync(none)
	d.there("after Distrust", none, data)
}

func testLocal(d *distant) {
	s := d.listed()
	key := storage.Local + "some/thing"
	d.put(key, []byte("mine"))
	d.sync(key)
	d.Down()
	if err := s.Put(ctx, key, []byte("still mine"), storage.Durable); err != nil {
		d.Errorf("Put while the place is down: %v", err)
	}
	d.sync(key)
	d.has("local", key, []byte("still mine"))
	d.lists("local", storage.Local, true, key)
	d.Up()
	d.anew()
	d.has("after a restart", key, []byte("still mine"))
	if keys := d.Keys(storage.Local); len(keys) != 0 {
		d.Errorf("at the place: %q", keys)
	}
	there := d.openAt(d.other())
	if _, err := there.Stat(ctx, key); !errors.Is(err, fs.ErrNotExist) {
		d.Errorf("another machine sees it: %v", err)
	}
	if err := there.Close(); err != nil {
		d.Error(err)
	}
	if err := d.store.Delete(ctx, key); err != nil {
		d.Error(err)
	}
	d.hasNot("after Delete", key)
	d.lists("after Delete", storage.Local, true)
}
