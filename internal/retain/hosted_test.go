package retain

import (
	"errors"
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// promised tells a client that a blob is there, as a HEAD does.
func (b *kept) promised(repository string, data []byte) error {
	b.t.Helper()
	d := digest.FromBytes(data)
	m, ok, err := b.tree.Member(b.t.Context(), repository, d)
	if err != nil || !ok {
		return errors.Join(err, fs.ErrNotExist)
	}
	return b.tree.Promise(b.t.Context(), repository, d, m, b.clock.time())
}

// deleted removes a manifest as a client does.
func (b *kept) deleted(repository string, d digest.Digest) {
	b.t.Helper()
	if _, err := b.tree.DeleteManifest(b.t.Context(), repository, d, nil); err != nil {
		b.t.Fatal(err)
	}
}

// has is what a push checks: that the blobs are there.
func (b *kept) has(repository string) func(*oci.Manifest) error {
	return func(m *oci.Manifest) error {
		for _, blob := range m.Blobs {
			known, ok, err := b.tree.Member(b.t.Context(), repository, blob.Digest)
			if err == nil && !ok {
				err = fs.ErrNotExist
			}
			if err == nil {
				_, err = b.tree.StatBlob(b.t.Context(), known.Canonical)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// What was deleted from a hosted repository, and what was pushed there and never
// named, gives its space back once it is a day old; what was pushed or asked for
// lately stays, and so does what is in a repository that nobody has recorded.
func TestGCHosted(t *testing.T) {
	t.Parallel()
	b := keep(t, withGrace)
	b.repository("apps/web", "")
	base, config, layer := content(40, 3000), content(41, 100), content(42, 400)
	gone := b.pull("apps/web", "old", config, base, layer)
	b.pull("apps/web", "new", content(43, 100), base)
	unnamed, theirs, asked, mounted := content(44, 500), content(45, 500), content(46, 500), content(47, 500)
	b.blob("apps/web", unnamed)
	b.blob("theirs/web", theirs)
	b.blob("apps/web", asked)
	b.blob("apps/web", mounted)
	b.flush()
	b.clock.pass(2 * day)
	b.deleted("apps/web", gone)
	young := content(48, 500)
	b.blob("apps/web", young)
	if err := b.promised("apps/web", asked); err != nil {
		t.Fatal(err)
	}
	b.repository("apps/other", "")
	if _, err := b.tree.Mount(t.Context(), "apps/other", "apps/web", digest.FromBytes(mounted)); err != nil {
		t.Fatal(err)
	}
	b.flush()

	var want []string
	for _, data := range [][]byte{config, layer, unnamed} {
		d := digest.FromBytes(data).String()
		want = append(want, d, "apps/web@"+d)
	}
	want = append(want, gone.String())
	slices.Sort(want)
	before := b.stored()
	dry := b.done(b.GC(true))
	if slices.Sort(dry.Found); !slices.Equal(dry.Found, want) {
		t.Errorf("would remove %q,\nwant %q", dry.Found, want)
	}
	if after := b.stored(); !slices.Equal(after, before) {
		t.Errorf("a dry run has left\n%q, there were\n%q", after, before)
	}
	real := b.done(b.GC(false))
	if slices.Sort(real.Found); !slices.Equal(real.Found, want) || real.Bytes != dry.Bytes {
		t.Errorf("removed %q,\nwant %q; %d bytes, %d in the dry run", real.Found, want, real.Bytes, dry.Bytes)
	}
	for name, data := range map[string][]byte{"base": base, "theirs": theirs, "asked": asked, "mounted": mounted, "young": young} {
		if !b.holds(data) {
			t.Errorf("%s is gone", name)
		}
	}
	b.agrees(b.ready())

	b.clock.pass(day + time.Minute)
	b.done(b.GC(false))
	for name, data := range map[string][]byte{"asked": asked, "mounted": mounted, "young": young} {
		if b.holds(data) {
			t.Errorf("%s is still there", name)
		}
	}
	if !b.holds(base) || !b.holds(theirs) {
		t.Error("too much is gone")
	}
	b.agrees(b.ready())
}

// Who has been told that a blob is there has a day to name it, though the process
// was killed before that was written down.
func TestGCHostedPromiseOutlivesKill(t *testing.T) {
	t.Parallel()
	b := keep(t, withGrace, func(b *kept) { b.paces.batch = time.Hour })
	b.repository("apps/web", "")
	data := content(1, 500)
	b.blob("apps/web", data)
	b.flush()
	b.clock.pass(3 * day)
	if err := b.promised("apps/web", data); err != nil {
		t.Fatal(err)
	}
	b.kill()
	b.start()
	b.ready()
	b.clock.pass(day - time.Minute)
	b.restart() // in good order: that does not make it known
	b.ready()
	if j := b.done(b.GC(false)); !b.holds(data) || j.Removed != 0 {
		t.Errorf("removed %q", j.Found)
	}
	b.clock.pass(2 * time.Minute)
	b.done(b.GC(false))
	if b.holds(data) {
		t.Error("it is still there")
	}
}

// So it is when there were too many changes to note, and the reading was dropped.
func TestGCHostedPromiseDropped(t *testing.T) {
	t.Parallel()
	b := keep(t, withGrace, func(b *kept) { b.paces.batch, b.paces.noted = time.Hour, 4 })
	b.repository("apps/web", "")
	b.flush()
	data := content(1, 500)
	b.blob("apps/web", data)
	b.flush()
	b.clock.pass(3 * day)
	b.blob("apps/web", content(2, 10))
	b.blob("apps/web", content(3, 10))
	if err := b.promised("apps/web", data); err != nil {
		t.Fatal(err)
	}
	b.restart() // which does not forget it
	b.ready()
	b.done(b.GC(false))
	if !b.holds(data) {
		t.Error("it is gone")
	}
	b.clock.pass(day + 2*time.Second)
	b.done(b.GC(false))
	if b.holds(data) {
		t.Error("it is still there")
	}
}

// Who asks for a blob while it is about to be collected keeps it, or is told that
// it is gone.
func TestGCHostedAskedMeanwhile(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/web", "")
	first, second := content(1, 500), content(2, 500) // in the order in which they go
	b.blob("apps/web", first)
	b.flush()
	b.blob("apps/web", second)
	b.flush()
	b.stop()
	late := make(chan error, 1)
	b.beginOn(slow{b.disk(), func(key string) {
		if key != layout.LayerLink("apps/web", digest.FromBytes(first)) {
			return
		}
		// It goes for certain now, and whoever asks is not to be told otherwise. This
		// one has found it already.
		known, ok, err := b.tree.Member(t.Context(), "apps/web", digest.FromBytes(first))
		if err != nil || !ok {
			t.Errorf("member: %v, %v", ok, err)
		}
		go func() {
			late <- b.tree.Promise(t.Context(), "apps/web", digest.FromBytes(first), known, b.clock.time())
		}()
		m, ok, err := b.tree.Member(t.Context(), "apps/web", digest.FromBytes(second))
		if err != nil || !ok {
			t.Errorf("member: %v, %v", ok, err)
		}
		b.tree.AskedBlob("apps/web", m, b.clock.time())
	}})
	b.clock.pass(time.Hour)
	b.ready()
	// Both are known, so that nobody has to look for them.
	for _, data := range [][]byte{first, second} {
		if _, ok, err := b.tree.Member(t.Context(), "apps/web", digest.FromBytes(data)); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	j := b.done(b.GC(false))
	if err := <-late; !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a blob that is being removed: %v", err)
	}
	if b.holds(first) || !b.holds(second) {
		t.Errorf("job is %+v", j)
	}
	b.agrees(b.ready())
}

// Who names a blob while it is about to be collected keeps it, or finds that it is
// gone.
func TestGCHostedNamedMeanwhile(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/web", "")
	both := [][]byte{content(1, 500), content(2, 500)}
	for _, data := range both {
		b.blob("apps/web", data)
		b.flush()
	}
	b.stop()
	named := make(chan error, 2)
	push := func(data []byte) {
		body := image("m", nil, data)
		_, err := b.tree.PutManifest(t.Context(), "apps/web", digest.FromBytes(body), body, b.has("apps/web"))
		named <- err
	}
	b.beginOn(slow{b.disk(), func(key string) {
		if key == layout.LayerLink("apps/web", digest.FromBytes(both[0])) {
			go push(both[0])
			go push(both[1])
		}
	}})
	b.clock.pass(time.Hour)
	b.ready()
	b.done(b.GC(false))
	for range both {
		<-named
	}
	b.done(b.GC(false))
	for _, data := range both {
		d := digest.FromBytes(image("m", nil, data))
		_, err := b.store.Stat(t.Context(), layout.RevisionLink("apps/web", d))
		if whole := b.holds(data); (err == nil) != whole {
			t.Errorf("the manifest is there: %v; its blob is: %v", err == nil, whole)
		}
	}
	b.agrees(b.ready())
}

// An emptied repository is forgotten, and is the same when it comes again.
func TestGCForgetsEmptiedHosted(t *testing.T) {
	t.Parallel()
	b := keep(t)
	for _, name := range []string{"apps/emptied", "apps/pinned", "apps/pushed"} {
		b.repository(name, "")
		b.deleted(name, b.pull(name, "v1", content(1, 100)))
	}
	if err := b.tree.Pin(t.Context(), "apps/pinned", reference(t, "v1"), b.clock.time()); err != nil {
		t.Fatal(err)
	}
	b.flush()
	b.clock.pass(time.Hour)
	b.settings.Grace = time.Minute
	b.Set(b.settings)
	b.blob("apps/pushed", content(2, 100)) // and its manifest is on the way
	j := b.done(b.GC(false))
	if !slices.Contains(j.Found, "apps/emptied") || slices.Contains(j.Found, "apps/pinned") || slices.Contains(j.Found, "apps/pushed") {
		t.Errorf("removed %q", j.Found)
	}
	if b.exists(layout.Record("apps/emptied")) || !b.exists(layout.Record("apps/pinned")) || !b.exists(layout.Record("apps/pushed")) {
		t.Error("the wrong records are there")
	}
	b.agrees(b.ready())
	if err := b.tree.Forget(t.Context(), "apps/pushed"); err == nil || !b.holds(content(2, 100)) {
		t.Errorf("what is being pushed is forgotten: %v", err)
	}

	// Whoever was about to push did so to a hosted one.
	record, err := b.tree.Claim(t.Context(), "apps/emptied", tree.Record{Class: tree.Mirrored, Upstream: "docker.io", Created: b.clock.time()})
	if err != nil || record.Class != tree.Hosted {
		t.Errorf("recorded again as %s, %v", record.Class, err)
	}
	b.blob("apps/emptied", content(3, 100))
	if record, err := b.tree.Record(t.Context(), "apps/emptied"); err != nil || record.Class != tree.Hosted {
		t.Errorf("it is %s, %v", record.Class, err)
	}
	b.agrees(b.ready())
}
