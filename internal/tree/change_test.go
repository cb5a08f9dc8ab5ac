package tree

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// told keeps what a tree tells of.
type told struct {
	mu      sync.Mutex
	changes []Change
	hook    func(Change) // called besides, unless it is nil
}

func (t *told) note(c Change) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes = append(t.changes, c)
	if t.hook != nil {
		t.hook(c)
	}
}

// take returns what has been told of since the last time.
func (t *told) take() []Change {
	t.mu.Lock()
	defer t.mu.Unlock()
	changes := t.changes
	t.changes = nil
	return changes
}

var kinds = map[ChangeKind]string{
	Recorded: "recorded", Manifested: "manifested", Linked: "linked", Tagged: "tagged", Read: "read", ReadBlob: "read blob",
	Pinned: "pinned", Unpinned: "unpinned", Stored: "stored", Hashed: "hashed",
	Untagged: "untagged", Unmanifested: "unmanifested", Unlinked: "unlinked", Removed: "removed", Forgotten: "forgotten",
}

// wantTold checks what has been told of since the last time. Each is the kind and,
// where it has them, repository, tag, canonical and other digest, in short.
func (b *bench) wantTold(want ...string) []Change {
	b.t.Helper()
	changes := b.told.take()
	var got []string
	for _, c := range changes {
		words := []string{kinds[c.Kind]}
		for _, word := range []string{c.Repository, c.Tag, short(c.Canonical), short(c.Digest)} {
			if word != "" {
				words = append(words, word)
			}
		}
		got = append(got, strings.Join(words, " "))
	}
	if !slices.Equal(got, want) {
		b.t.Errorf("told\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
	return changes
}

func short(d digest.Digest) string {
	if d == "" {
		return ""
	}
	return d.Algorithm().String() + d.Encoded()[:8]
}

func TestTold(t *testing.T) {
	b := newBench(t)
	ctx, at := t.Context(), time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	b.Tree.now = func() time.Time { return at }
	if err := b.PutRecord(ctx, "r", Record{Class: Mirrored, Upstream: "docker.io"}); err != nil {
		t.Fatal(err)
	}
	if c := b.wantTold("recorded r"); c[0].Record.Upstream != "docker.io" || c[0].Record.Class != Mirrored {
		t.Errorf("%+v", c[0].Record)
	}

	layer := b.layer("r", "a layer")
	if c := b.wantTold("linked r " + short(layer)); c[0].Size != 7 || !c[0].At.Equal(at) {
		t.Errorf("%+v", c[0])
	}
	long := digest.SHA512.FromString("a layer")
	if err := b.LinkBlob(ctx, "s", long, layer); err != nil {
		t.Fatal(err)
	}
	b.wantTold("linked s " + short(layer) + " " + short(long))

	body := image(digest.FromString("config"), layer)
	one := b.put("r", body)
	if c := b.wantTold("manifested r " + short(one)); c[0].Size != int64(len(body)) || !c[0].At.Equal(at) || c[0].Manifest == nil || c[0].Manifest.Blobs[1].Digest != layer {
		t.Errorf("%+v", c[0])
	}
	other := digest.SHA512.FromString(body)
	if _, err := b.PutManifest(ctx, "s", other, []byte(body), nil); err != nil {
		t.Fatal(err)
	}
	b.wantTold("manifested s " + short(one) + " " + short(other))
	list := b.put("t", index(one))
	b.wantTold("manifested t " + short(list))
	b.wantManifest("t", one, body)
	b.wantTold("manifested t " + short(one))
	b.wantManifest("t", one, body)
	b.wantTold()

	for _, tag := range []struct {
		repository string
		d          digest.Digest
		want       []string
	}{
		{"r", one, []string{"tagged r v1 " + short(one)}},
		{"r", one, nil},
		{"r", list, []string{"tagged r v1 " + short(list)}},
		{"s", other, []string{"tagged s v1 " + short(one) + " " + short(other)}},
	} {
		if err := b.SetTag(ctx, tag.repository, "v1", tag.d, at, nil); err != nil {
			t.Fatal(err)
		}
		if c := b.wantTold(tag.want...); len(c) > 0 && !c[0].At.Equal(at) {
			t.Errorf("%+v", c[0])
		}
	}

	for _, remove := range []struct {
		do   func() error
		want string
	}{
		{func() error { return b.RemoveTag(ctx, "r", "v1", list, nil) }, "untagged r v1"},
		{func() error { return b.RemoveManifest(ctx, "r", one, nil) }, "unmanifested r " + short(one)},
		{func() error { return b.RemoveManifest(ctx, "s", other, nil) }, "unmanifested s " + short(one)},
		{func() error { return b.Unlink(ctx, "r", layer, nil) }, "unlinked r " + short(layer)},
		{func() error { return b.Unlink(ctx, "s", long, nil) }, "unlinked s " + short(layer)},
		{func() error { _, err := b.RemoveBlob(ctx, layer, nil); return err }, "removed " + short(layer)},
		{func() error { return b.Forget(ctx, "r") }, "forgotten r"},
	} {
		if err := remove.do(); err != nil {
			t.Errorf("%s: %v", remove.want, err)
		}
		b.wantTold(remove.want)
	}
}

// TestToldInTime: of what is put, before anything of it is there, and of what is
// removed, after nothing of it is.
func TestToldInTime(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	layer := b.blob("a layer")
	one := digest.FromString(image(layer, layer))
	n := 0
	b.told.hook = func(c Change) {
		n++
		gone := one
		if c.Kind == Removed {
			gone = c.Canonical
		}
		for _, key := range map[ChangeKind][]string{
			Recorded:     {layout.Record("r")},
			Manifested:   {layout.Blob(one), layout.RevisionLink("r", one)},
			Linked:       {layout.LayerLink("r", layer)},
			Tagged:       {layout.TagLink("r", "v1"), layout.TagIndexLink("r", "v1", one)},
			Pinned:       {layout.Pin("r", "v1", "")},
			Unpinned:     {layout.Pin("r", "v1", "")},
			Untagged:     {layout.TagLink("r", "v1")},
			Unmanifested: {layout.RevisionLink("r", one)},
			Unlinked:     {layout.LayerLink("r", layer)},
			Removed:      {layout.Blob(gone)},
			Forgotten:    {layout.Record("r")},
		}[c.Kind] {
			if _, err := b.store.Stat(ctx, key); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is told of while there is %s", kinds[c.Kind], key)
			}
		}
	}
	if err := b.PutRecord(ctx, "r", Record{Class: Mirrored}); err != nil {
		t.Fatal(err)
	}
	b.put("r", image(layer, layer))
	b.layer("r", "a layer")
	for _, step := range []func() error{
		func() error { return b.SetTag(ctx, "r", "v1", one, time.Now(), nil) },
		func() error { return b.Pin(ctx, "r", oci.Reference{Tag: "v1"}, time.Now()) },
		func() error { return second(b.Unpin(ctx, "r", oci.Reference{Tag: "v1"})) },
		func() error { return b.RemoveTag(ctx, "r", "v1", one, nil) },
		func() error { return b.RemoveManifest(ctx, "r", one, nil) },
		func() error { return b.Unlink(ctx, "r", layer, nil) },
		func() error { return second(b.RemoveBlob(ctx, layer, nil)) },
		func() error { return second(b.RemoveBlob(ctx, one, nil)) },
		func() error { return b.Forget(ctx, "r") },
	} {
		if err := step(); err != nil {
			t.Error(err)
		}
	}
	if n != 12 {
		t.Errorf("told of %d changes", n)
	}
}

// full is a store whose Put fails when fails says so.
type full struct {
	storage.Store
	fails func(key string) bool
}

func (f full) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	if f.fails(key) {
		return errBroken
	}
	return f.Store.Put(ctx, key, data, d)
}

// TestToldOfFailures: what has been told of and then could not be written is taken
// back, unless it was there before.
func TestToldOfFailures(t *testing.T) {
	b := newBench(t)
	ctx, at := t.Context(), time.Now()
	layer, body, other := b.blob("a layer"), image(digest.FromString("config")), index()
	one, two := digest.FromString(body), b.put("r", other)
	b.told.take()
	var broken string
	b.Tree.store = full{b.store, func(key string) bool { return strings.Contains(key, broken) }}
	fails := func(at string, do func() error, want ...string) {
		t.Helper()
		broken = at
		if err := do(); !errors.Is(err, errBroken) {
			t.Errorf("%v, want the store's own error", err)
		}
		b.wantTold(want...)
	}
	put := func(body string) func() error {
		return func() error { return second(b.PutManifest(ctx, "r", digest.FromString(body), []byte(body), nil)) }
	}
	link := func() error { return b.LinkBlob(ctx, "r", layer, layer) }
	tag := func(d digest.Digest) func() error {
		return func() error { return b.SetTag(ctx, "r", "v1", d, at, nil) }
	}
	record := func(upstream string) func() error {
		return func() error { return b.PutRecord(ctx, "r", Record{Class: Mirrored, Upstream: upstream}) }
	}
	pin := func() error { return b.Pin(ctx, "r", oci.Reference{Tag: "v1"}, at) }

	fails("/blobs/", put(body), "manifested r "+short(one), "unmanifested r "+short(one), "removed "+short(one))
	fails("/revisions/", put(body), "manifested r "+short(one), "unmanifested r "+short(one))
	// What is there and whole is not written again.
	b.ok(b.store.Put(ctx, layout.Blob(two), []byte("damaged"), storage.Lazy))
	fails("/blobs/", put(other), "manifested r "+short(two))
	b.ok(b.store.Put(ctx, layout.Blob(two), []byte(other), storage.Lazy))
	fails("/_layers/", link, "linked r "+short(layer), "unlinked r "+short(layer))
	fails("/pins/", pin, "pinned r v1", "unpinned r v1")
	fails("/index/", tag(two), "tagged r v1 "+short(two), "untagged r v1")
	fails("/current/", tag(two), "tagged r v1 "+short(two), "untagged r v1")
	if c := fail(b, &broken, "_record", record("a")); len(c) != 2 || c[1].Record.Class != Hosted {
		t.Errorf("%+v", c)
	}

	broken = "nothing"
	for _, do := range []func() error{put(body), link, tag(one), record("a"), pin} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	b.told.take()
	fails("/revisions/", put(body), "manifested r "+short(one))
	fails("/_layers/", link, "linked r "+short(layer))
	fails("/_tags/", tag(two), "tagged r v1 "+short(two), "tagged r v1 "+short(one))
	fails("/current/", tag(two), "tagged r v1 "+short(two), "tagged r v1 "+short(one))
	fails("/pins/", pin, "pinned r v1")
	if c := fail(b, &broken, "_record", record("b")); len(c) != 2 || c[0].Record.Upstream != "b" || c[1].Record.Upstream != "a" {
		t.Errorf("%+v", c)
	}
}

func fail(b *bench, broken *string, at string, do func() error) []Change {
	b.t.Helper()
	*broken = at
	if err := do(); !errors.Is(err, errBroken) {
		b.t.Errorf("%v, want the store's own error", err)
	}
	return b.told.take()
}

// TestReadsTold: once a minute for each thing in each repository.
func TestReadsTold(t *testing.T) {
	b := newBench(t)
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	config := b.layer("r", "a config too")
	body := image(config)
	one := b.put("r", body)
	long := digest.SHA512.FromString(body)
	for _, put := range []struct {
		repository string
		d          digest.Digest
	}{{"s", one}, {"r", long}} {
		if _, err := b.PutManifest(t.Context(), put.repository, put.d, []byte(body), nil); err != nil {
			t.Fatal(err)
		}
	}
	b.opens(config, "a config too")
	b.settle()
	b.told.take()
	var tag LastRead
	manifest := func(repository string, d digest.Digest) func() {
		return func() {
			if m, ok := b.Warm(repository, d, at); !ok || m.Digest != d || string(m.Body) != body {
				t.Errorf("%s@%s is not warm: %+v", repository, d, m)
			}
			b.AskedManifest(repository, d, at)
		}
	}
	reads := []func(){
		manifest("r", one), manifest("s", one), manifest("r", long),
		func() {
			if body, ok := b.WarmBlob("r", config, at); !ok || string(body) != "a config too" {
				t.Errorf("%q", body)
			}
			b.AskedBlob("r", b.wantMember("r", config, true), at)
		},
		func() { b.Asked("r", "v1", &tag, at) },
	}
	all := []string{
		"read r " + short(one), "read s " + short(one), "read r " + short(one) + " " + short(long),
		"read blob r " + short(config), "read r v1",
	}
	for _, step := range []struct {
		pass time.Duration
		want []string
	}{{0, all}, {0, nil}, {59 * time.Second, nil}, {time.Second, all}, {time.Second, nil}, {-time.Hour, all}, {time.Second, nil}} {
		at = at.Add(step.pass)
		for _, read := range reads {
			read()
		}
		for _, c := range b.wantTold(step.want...) {
			if !c.At.Equal(at) {
				t.Errorf("%+v, want it at %s", c, at)
			}
		}
	}
	// What no client has asked for.
	b.Warm("r", one, time.Time{})
	b.wantManifest("r", one, body)
	b.AskedManifest("t", one, at)
	b.AskedBlob("r", b.AddMember("r", digest.SHA512.FromString("somewhere"), 9), at)
	b.wantTold()
}

func TestPins(t *testing.T) {
	b := newBench(t)
	ctx, at := t.Context(), time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	one := digest.FromString("one")
	long := digest.SHA512.FromString(index())
	if _, err := b.PutManifest(ctx, "a", long, []byte(index()), nil); err != nil {
		t.Fatal(err)
	}
	b.told.take()
	unheld := digest.SHA512.FromString("two")
	for _, ref := range []oci.Reference{{Tag: "v1"}, {Digest: one}, {Digest: long}, {Digest: unheld}} {
		for _, repository := range []string{"a", "a/b"} {
			if err := b.Pin(ctx, repository, ref, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	b.wantTold("pinned a v1", "pinned a/b v1", "pinned a "+short(one), "pinned a/b "+short(one),
		"pinned a "+short(digest.FromString(index()))+" "+short(long), "pinned a/b "+short(long),
		"pinned a "+short(unheld), "pinned a/b "+short(unheld))
	pins := func(repository string) (found []string) {
		t.Helper()
		for pin, err := range b.Pins(ctx, repository) {
			if err != nil {
				t.Fatal(err)
			}
			if !pin.Since.Equal(at) {
				t.Errorf("%+v", pin)
			}
			found = append(found, pin.Repository+" "+pin.Reference)
		}
		slices.Sort(found)
		return found
	}
	wantPins := func(repository string, want ...string) {
		t.Helper()
		slices.Sort(want)
		if got := pins(repository); !slices.Equal(got, want) {
			t.Errorf("pins of %q: %q, want %q", repository, got, want)
		}
	}
	b.restart()
	of := func(repository string) []string {
		return []string{repository + " v1", repository + " " + one.String(), repository + " " + long.String(), repository + " " + unheld.String()}
	}
	wantPins("a", of("a")...)
	wantPins("a/b", of("a/b")...)
	wantPins("", append(of("a"), of("a/b")...)...)
	wantPins("b")
	for _, want := range []bool{true, false} {
		if was, err := b.Unpin(ctx, "a", oci.Reference{Digest: one}); err != nil || was != want {
			t.Errorf("Unpin: %v, %v, want %v", was, err, want)
		}
		b.wantTold("unpinned a " + short(one))
	}
	wantPins("a", slices.DeleteFunc(of("a"), func(s string) bool { return strings.HasSuffix(s, one.String()) })...)
	wantPins("a/b", of("a/b")...)

	// A pin is one though its record is damaged.
	at = at.Add(time.Hour)
	for pin := range b.Pins(ctx, "a/b") {
		ref, err := oci.ParseReference(pin.Reference)
		if err != nil {
			t.Fatal(err)
		}
		b.write(layout.Pin("a/b", ref.Tag, ref.Digest), []byte("\x00\x00"))
	}
	n := 0
	for pin, err := range b.Pins(ctx, "a/b") {
		if err != nil || pin.Repository != "a/b" || pin.Since.IsZero() || !slices.Contains(of("a/b"), "a/b "+pin.Reference) {
			t.Errorf("%+v, %v", pin, err)
		}
		n++
	}
	if n != 4 {
		t.Errorf("%d pins", n)
	}
	b.Tree.store = unlisted{b.store}
	for _, err := range b.Pins(ctx, "") {
		if !errors.Is(err, errBroken) {
			t.Errorf("%v, want the store's own error", err)
		}
	}
}

type unlisted struct{ storage.Store }

func (unlisted) List(context.Context, string, bool) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) { yield(storage.Info{}, errBroken) }
}
