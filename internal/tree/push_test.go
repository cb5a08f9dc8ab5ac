package tree

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
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// A ledger is a store that knows what would not survive a loss of power, and which
// value that has been promised is at stake for a new one.
type ledger struct {
	storage.Store
	mu      sync.Mutex
	lazy    map[string]bool // what has been put or deleted and not been synced
	promise map[string]bool // what has been synced
	files   map[string]bool // what has been put as a file, which was synced before
	atStake []string
	early   []string // links to what is not synced
	syncs   int
	hold    func(keys []string) // called by Sync before it does anything
}

func (b *bench) ledger() *ledger {
	l := &ledger{Store: b.store, lazy: map[string]bool{}, promise: map[string]bool{}, files: map[string]bool{}}
	b.Tree.store = l
	return l
}

func (l *ledger) put(key string, d storage.Durability) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d == storage.Lazy && l.promise[key] {
		l.atStake = append(l.atStake, key)
	}
	l.lazy[key] = d == storage.Lazy
	l.promise[key] = d == storage.Durable
}

func (l *ledger) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	l.put(key, d)
	if strings.Contains(key, "/_layers/") && !strings.Contains(key, "/mirrored/") {
		l.mu.Lock()
		if to := layout.Blob(digest.Digest(data)); l.lazy[to] && !l.files[to] {
			l.early = append(l.early, key)
		}
		l.mu.Unlock()
	}
	return l.Store.Put(ctx, key, data, d)
}

func (l *ledger) PutFile(ctx context.Context, key, path string, d storage.Durability) error {
	l.put(key, d)
	l.files[key] = true
	return l.Store.PutFile(ctx, key, path, d)
}

func (l *ledger) Delete(ctx context.Context, key string) error {
	l.mu.Lock()
	l.promise[key] = false
	l.lazy[key] = strings.HasSuffix(key, "/current/link") || strings.Contains(key, "/revisions/") || strings.Contains(key, "/_layers/")
	l.mu.Unlock()
	return l.Store.Delete(ctx, key)
}

func (l *ledger) Sync(ctx context.Context, keys ...string) error {
	if l.hold != nil {
		l.hold(keys)
	}
	l.mu.Lock()
	l.syncs++
	for _, key := range keys {
		l.lazy[key], l.promise[key] = false, true
	}
	l.mu.Unlock()
	return l.Store.Sync(ctx, keys...)
}

// lasts checks that everything written so far survives, after so many syncs.
func (l *ledger) lasts(t *testing.T, what string, syncs int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, lazy := range l.lazy {
		if lazy {
			t.Errorf("%s: %s is not synced", what, key)
		}
	}
	if len(l.atStake) > 0 {
		t.Errorf("%s: what was promised is at stake: %q", what, l.atStake)
	}
	if len(l.early) > 0 {
		t.Errorf("%s: links to bytes that are not synced: %q", what, l.early)
	}
	if l.syncs != syncs {
		t.Errorf("%s: %d syncs", what, l.syncs)
	}
	l.syncs, l.atStake, l.early = 0, nil, nil
}

func writeFile(path, data string) error { return os.WriteFile(path, []byte(data), 0o600) }

// upload is a file as an upload leaves it.
func (b *bench) upload(data string) string {
	b.t.Helper()
	dir, err := b.store.Spool("uploads")
	b.ok(err)
	path := filepath.Join(dir, digest.FromString(data).Encoded())
	b.ok(writeFile(path, data))
	return path
}

func (b *bench) push(repository, data string) digest.Digest {
	b.t.Helper()
	d := digest.FromString(data)
	b.ok(b.PutBlob(b.t.Context(), repository, []digest.Digest{d}, b.upload(data), int64(len(data))))
	return d
}

var anything = func(*oci.Manifest) error { return nil }

// complete is a check that wants all blobs of a manifest.
func (b *bench) complete(repository string) func(*oci.Manifest) error {
	return func(m *oci.Manifest) error {
		for _, blob := range m.Blobs {
			known, ok, err := b.Member(b.t.Context(), repository, blob.Digest)
			if err == nil && ok {
				_, err = b.StatBlob(b.t.Context(), known.Canonical)
			}
			if err != nil {
				return err
			}
			if !ok {
				return fmt.Errorf("%s is missing: %w", blob.Digest, fs.ErrNotExist)
			}
		}
		return nil
	}
}

func (b *bench) pushManifest(repository, body string) digest.Digest {
	b.t.Helper()
	d := digest.FromString(body)
	b.ok(second(b.PutManifest(b.t.Context(), repository, d, []byte(body), b.complete(repository))))
	return d
}

func (b *bench) wantTag(repository, tag string, want digest.Digest) {
	b.t.Helper()
	got, err := b.Tag(b.t.Context(), repository, tag)
	if want == "" && !errors.Is(err, fs.ErrNotExist) || want != "" && (err != nil || got != want) {
		b.t.Errorf("%s:%s means %s, %v; want %q", repository, tag, got, err, want)
	}
}

// TestPush: what is pushed is there under every digest, and survives with one sync
// for each operation.
func TestPush(t *testing.T) {
	b := newBench(t)
	ctx, data := t.Context(), "some layer."
	d, long := digest.FromString(data), digest.SHA512.FromString(data)
	path := b.upload(data)
	b.ok(b.Host(ctx, "r"))
	b.ok(b.Host(ctx, "s"))
	b.told.take()
	l := b.ledger()
	for range 2 { // and pushed again
		b.ok(b.PutBlob(ctx, "r", []digest.Digest{d, long}, path, int64(len(data))))
		l.lasts(t, "blob", 1)
		b.wantTold("linked r "+short(d)+" "+short(long), "hashed "+short(d))
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the upload is still there: %v", err)
		}
		b.holds(layout.Blob(d), data)
		b.holds(layout.LayerLink("r", d), d.String())
		b.holds(layout.LayerLink("r", long), d.String())
		for _, name := range []digest.Digest{d, long} {
			if m := b.wantMember("r", name, true); m.Canonical != d || !m.Linked {
				t.Errorf("%+v", m)
			}
			b.wantMember("s", name, false)
		}
		b.write(layout.Blob(d), []byte("wrong bytes")) // which a push puts right
		path = b.upload(data)
	}
	b.ok(b.PutBlob(ctx, "r", []digest.Digest{d}, path, int64(len(data))))
	l.lasts(t, "blob", 1)

	for _, name := range []digest.Digest{d, long} {
		size, err := b.Mount(ctx, "s", "r", name)
		if err != nil || size != int64(len(data)) {
			t.Errorf("mounted %d bytes, %v", size, err)
		}
		l.lasts(t, "mount", 2)
		b.wantMember("s", name, true)
	}

	// What a mirrored repository has need not be on the disk yet.
	lazy := digest.FromString("mirrored")
	b.ok(b.PutRecord(ctx, "mirrored", Record{Class: Mirrored}))
	b.ok(l.Put(ctx, layout.Blob(lazy), []byte("mirrored"), storage.Lazy))
	b.ok(b.LinkBlob(ctx, "mirrored", lazy, lazy))
	if l.syncs != 0 {
		t.Error("what is mirrored is synced")
	}
	clear(l.lazy)
	l.lazy[layout.Blob(lazy)] = true
	b.ok(second(b.Mount(ctx, "s", "mirrored", lazy)))
	l.lasts(t, "mount of what is mirrored", 2)

	first, next := image(d), image(d, d)
	one, two := digest.FromString(first), digest.FromString(next)
	b.told.take()
	for _, name := range []digest.Digest{one, digest.SHA512.FromString(first), one} {
		b.ok(second(b.PutManifest(ctx, "r", name, []byte(first), b.complete("r"))))
		l.lasts(t, "manifest", 1)
		b.wantManifest("r", name, first)
		b.wantNoManifest("s", name)
	}
	b.write(layout.Blob(one), []byte("wrong"))
	b.pushManifest("r", first)
	l.lasts(t, "manifest put right", 1)
	b.holds(layout.Blob(one), first)
	b.pushManifest("r", next)
	l.lasts(t, "second manifest", 1)
	b.holds(layout.RevisionLink("r", two), two.String())

	for _, means := range []digest.Digest{one, one, two, one, digest.SHA512.FromString(first)} {
		b.ok(b.SetTag(ctx, "r", "v1", means, time.Now(), nil))
		l.lasts(t, "tag", 1)
		b.wantTag("r", "v1", means)
		b.holds(layout.TagIndexLink("r", "v1", means), means.String())
	}
	b.restart()
	for _, name := range []digest.Digest{d, long} {
		b.wantMember("r", name, true)
	}
	b.wantManifest("r", one, first)
	for _, repository := range []string{"r", "s"} {
		if r, err := b.Record(ctx, repository); err != nil || r.Class != Hosted || r.Created.IsZero() {
			t.Errorf("the record of %s is %+v, %v", repository, r, err)
		}
	}
}

// TestPushRecords: the first push makes a repository hosted, durably; one that is
// mirrored takes none, and loses nothing.
func TestPushRecords(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.ok(b.PutRecord(ctx, "mirrored", Record{Class: Mirrored, Upstream: "docker.io"}))
	layer, body := b.layer("mirrored", "a layer"), index()
	d := b.put("mirrored", body)
	b.ok(b.SetTag(ctx, "mirrored", "v1", d, time.Now(), nil))
	b.push("hosted", "a layer")
	b.told.take()
	for name, do := range map[string]func(repository string) error{
		"blob":     func(r string) error { return b.PutBlob(ctx, r, []digest.Digest{layer}, b.upload("a layer"), 7) },
		"mount":    func(r string) error { return second(b.Mount(ctx, r, "hosted", layer)) },
		"manifest": func(r string) error { return second(b.PutManifest(ctx, r, d, []byte(body), anything)) },
	} {
		b.ok(do(name + "/new"))
		if r, err := b.Record(ctx, name+"/new"); err != nil || r.Class != Hosted {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		if c := b.told.take(); c[0].Kind != Recorded {
			t.Errorf("%s: told %+v first", name, c[0])
		}
		if err := do("mirrored"); !errors.Is(err, ErrMirrored) {
			t.Errorf("%s into a mirrored repository: %v", name, err)
		}
		b.wantTold()
	}
	for name, do := range map[string]func() error{
		"tag":      func() error { return second(b.DeleteTag(ctx, "mirrored", "v1", nil)) },
		"manifest": func() error { return second(b.DeleteManifest(ctx, "mirrored", d, nil)) },
		"blob":     func() error { return b.DeleteBlob(ctx, "mirrored", layer) },
	} {
		if err := do(); !errors.Is(err, ErrMirrored) {
			t.Errorf("deleting a mirrored %s: %v", name, err)
		}
	}
	b.wantTold()
	b.wantTag("mirrored", "v1", d)
	b.wantManifest("mirrored", d, body)
	b.wantMember("mirrored", layer, true)
	b.restart()
	if r, err := b.Record(ctx, "mirrored"); err != nil || r.Class != Mirrored || r.Upstream != "docker.io" {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestClaimedOnce: of two who say at once what a repository is, one is right.
func TestClaimedOnce(t *testing.T) {
	b := newBench(t)
	for i := range 30 {
		name := fmt.Sprintf("r%d", i)
		got := make(chan Class)
		for _, class := range []Class{Mirrored, Hosted, Mirrored, Hosted} {
			go func() {
				r, err := b.Claim(t.Context(), name, Record{Class: class})
				if err != nil {
					t.Error(err)
				}
				got <- r.Class
			}()
		}
		first := <-got
		for range 3 {
			if other := <-got; other != first {
				t.Errorf("%s is %s and %s", name, first, other)
			}
		}
		b.restart()
		if r, err := b.Record(t.Context(), name); err != nil || r.Class != first {
			t.Errorf("%+v, %v; want %s", r, err, first)
		}
	}
}

// TestMountOfNothing: what another repository does not have, or nobody, is not
// mounted, and leaves no trace.
func TestMountOfNothing(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	layer := b.push("other", "a layer")
	gone := b.push("r", "gone")
	b.ok(second(b.RemoveBlob(ctx, gone, nil)))
	b.told.take()
	for name, c := range map[string]struct {
		from string
		d    digest.Digest
	}{
		"no repository": {"none", layer},
		"no member":     {"r", layer},
		"no bytes":      {"r", gone},
		"no content":    {"other", digest.FromString("nobody's")},
	} {
		if _, err := b.Mount(ctx, "new", c.from, c.d); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
		b.wantMember("new", c.d, false)
	}
	b.wantTold()
	if _, err := b.Record(ctx, "new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it has a record: %v", err)
	}
	// A mirrored repository has what its manifests name, once that is held.
	b.ok(b.PutRecord(ctx, "mirrored", Record{Class: Mirrored}))
	b.put("mirrored", image(layer))
	if size, err := b.Mount(ctx, "new", "mirrored", layer); err != nil || size != 7 {
		t.Errorf("%d, %v", size, err)
	}
	b.wantMember("new", layer, true)
}

// TestNamingGivesNothing: who pushes a manifest that names another repository's
// content cannot read that (CVE-2024-39897).
func TestNamingGivesNothing(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	secret := b.push("private", "a secret")
	inner := b.pushManifest("private", image(secret))
	b.ok(second(b.PutManifest(ctx, "r", digest.FromString(image(secret, secret)), []byte(image(secret, secret)), anything)))
	b.ok(second(b.PutManifest(ctx, "r", digest.FromString(index(inner)), []byte(index(inner)), anything)))
	for range 2 {
		b.wantMember("r", secret, false)
		b.wantNoManifest("r", inner)
		if _, err := b.Mount(ctx, "s", "r", secret); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("mounted: %v", err)
		}
		if _, ok := b.WarmBlob("r", secret, time.Time{}); ok {
			t.Error("memory gives it")
		}
		b.wantMember("private", secret, true)
		b.restart()
	}
}

// TestChecked: a manifest that is refused leaves nothing behind, and one that was
// there already stays.
func TestChecked(t *testing.T) {
	b := newBench(t)
	ctx, refused := t.Context(), errors.New("refused")
	b.ok(b.Host(ctx, "r"))
	body := image(digest.FromString("not pushed"))
	d := digest.FromString(body)
	b.told.take()
	refuse := func(m *oci.Manifest) error {
		if len(m.Blobs) != 1 {
			t.Errorf("%+v is checked", m)
		}
		if c := b.told.take(); len(c) != 1 || c[0].Kind != Manifested {
			t.Errorf("told before the check: %+v", c)
		}
		return refused
	}
	if _, err := b.PutManifest(ctx, "r", d, []byte(body), refuse); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	b.wantTold("unmanifested r "+short(d), "removed "+short(d))
	b.wantNoManifest("r", d)
	b.wantFiles("docker/registry/v2")
	b.ok(second(b.PutManifest(ctx, "r", d, []byte(body), anything)))
	b.told.take()
	if _, err := b.PutManifest(ctx, "r", d, []byte(body), refuse); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	b.wantTold()
	b.wantManifest("r", d, body)
}

// TestLargeManifest: one that is larger than what an upstream may send.
func TestLargeManifest(t *testing.T) {
	b := newBench(t)
	body := index() + strings.Repeat(" ", 2*oci.MaxManifestSize)
	d := b.pushManifest("r", body)
	b.restart()
	b.wantManifest("r", d, body)
	b.told.take()
	b.ok(b.TellManifest(t.Context(), "r", d))
	if c := b.wantTold("manifested r " + short(d)); c[0].Manifest == nil {
		t.Error("what it names is not told")
	}
}

// TestSetTagChecks: a tag of a hosted repository means what is stored there, and
// moves only as permit allows.
func TestSetTagChecks(t *testing.T) {
	b := newBench(t)
	ctx, refused := t.Context(), errors.New("refused")
	d := b.pushManifest("r", index())
	elsewhere := b.pushManifest("s", index(d))
	b.told.take()
	for _, missing := range []digest.Digest{elsewhere, digest.FromString("nothing")} {
		if err := b.SetTag(ctx, "r", "v1", missing, time.Now(), nil); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("tagged what is missing: %v", err)
		}
		b.wantTold("tagged r v1 "+short(missing), "untagged r v1")
		b.wantTag("r", "v1", "")
	}
	var asked []digest.Digest
	permit := func(err error) func(digest.Digest) error {
		return func(before digest.Digest) error {
			asked = append(asked, before)
			return err
		}
	}
	if err := b.SetTag(ctx, "r", "v1", d, time.Now(), permit(refused)); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	b.wantTag("r", "v1", "")
	b.ok(b.SetTag(ctx, "r", "v1", d, time.Now(), permit(nil)))
	if err := b.SetTag(ctx, "r", "v1", d, time.Now(), permit(refused)); !errors.Is(err, refused) {
		t.Errorf("got %v", err)
	}
	if want := []digest.Digest{"", "", d}; !slices.Equal(asked, want) {
		t.Errorf("asked for %q, want %q", asked, want)
	}
	b.wantTag("r", "v1", d)
}

// TestHistory: what a tag has meant, the latest first.
func TestHistory(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	one, two, three := b.pushManifest("r", index()), b.pushManifest("r", index()+" "), b.pushManifest("r", index()+"  ")
	want := func(want ...digest.Digest) {
		t.Helper()
		events, err := b.History(ctx, "r", "v1")
		b.ok(err)
		var got []digest.Digest
		for i, e := range events {
			got = append(got, e.Digest)
			if i > 0 && e.Since.After(events[i-1].Since) {
				t.Errorf("not in order: %v", events)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("history %q, want %q", got, want)
		}
	}
	if _, err := b.History(ctx, "r", "v1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	at := time.Now().Add(-time.Hour)
	set := func(d digest.Digest) {
		b.ok(b.SetTag(ctx, "r", "v1", d, at, nil))
		for _, key := range []string{layout.TagLink("r", "v1"), layout.TagIndexLink("r", "v1", d)} {
			b.ok(os.Chtimes(b.file(key), at, at))
		}
		at = at.Add(time.Minute)
	}
	set(one)
	want(one)
	set(two)
	set(three)
	want(three, two, one)
	set(one)
	want(one, three, two)
	for i := range 11 * maxHistory {
		b.write(layout.TagIndexLink("r", "v1", digest.FromString(fmt.Sprint(i))), []byte("x"))
	}
	events, err := b.History(ctx, "r", "v1")
	if err != nil || len(events) != maxHistory || events[0].Digest != one {
		t.Errorf("%d events, %v", len(events), err)
	}
}

// whole checks that whatever can be seen of a repository can be had.
func (b *bench) whole(repository string) {
	b.t.Helper()
	ctx := b.t.Context()
	for tag, err := range b.ListTags(ctx, repository) {
		b.ok(err)
		if _, err := b.Manifest(ctx, repository, tag.Digest); err != nil {
			b.t.Errorf("%s:%s means %s: %v", repository, tag.Tag, tag.Digest, err)
		}
	}
	for manifest, err := range b.ListManifests(ctx, repository) {
		b.ok(err)
		m, err := b.Manifest(ctx, repository, manifest.Digest)
		if err != nil {
			b.t.Errorf("%s@%s: %v", repository, manifest.Digest, err)
			continue
		}
		for _, blob := range m.Blobs {
			b.wantMember(repository, blob.Digest, true)
		}
	}
	for link, err := range b.ListLinks(ctx, repository) {
		b.ok(err)
		r, _, err := b.OpenBlob(ctx, link.Digest)
		if err != nil {
			b.t.Errorf("%s is linked in %s: %v", link.Digest, repository, err)
			continue
		}
		got, err := digest.Canonical.FromReader(r)
		r.Close()
		if err != nil || got != link.Digest {
			b.t.Errorf("%s is linked in %s, and has the bytes of %s, %v", link.Digest, repository, got, err)
		}
	}
}
