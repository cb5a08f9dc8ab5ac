package retain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// bucket is a store as if it were a distant one. What lies near besides is wrong.
type bucket struct {
	storage.Store

	mu        sync.Mutex
	shared    bool
	away      time.Time // since when it does not answer; zero: it does
	listing   chan struct{}
	waits     chan struct{} // takes a value when somebody waits for listing
	relisted  int
	near      map[string][]byte
	distrusts []string
	full      bool // what is near
	cut       int  // bytes after which a reader fails
	opened    []int64
}

func (b *bucket) Distant() storage.Distant { return b }

// change changes what the store says.
func (b *bucket) change(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

func (b *bucket) trouble() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.away.IsZero() {
		return nil
	}
	return fmt.Errorf("bucket: %w: 503", storage.ErrUnavailable)
}

func (b *bucket) Shared() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.shared
}

func (b *bucket) Listed(ctx context.Context) error {
	b.mu.Lock()
	listing := b.listing
	b.mu.Unlock()
	if listing != nil {
		signal(b.waits)
		select {
		case <-listing:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return b.trouble()
}

func (b *bucket) Relist(context.Context) error {
	b.change(func() { b.relisted++ })
	return b.trouble()
}

func (b *bucket) Drop(key string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.near[key]
	delete(b.near, key)
	return ok
}

func (b *bucket) Distrust(key string) { b.change(func() { b.distrusts = append(b.distrusts, key) }) }

func (*bucket) Secret() []byte { return nil }

func (*bucket) Presign(context.Context, string, string, time.Duration) (string, error) {
	return "", fs.ErrNotExist
}

func (b *bucket) OpenNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	info, err := b.Store.Stat(ctx, key)
	b.mu.Lock()
	defer b.mu.Unlock()
	near, ok := b.near[key]
	if err == nil && !ok {
		err = storage.ErrDistant
	}
	if err != nil {
		return nil, info, err
	}
	return io.NopCloser(bytes.NewReader(near)), info, nil
}

func (b *bucket) Backlog() storage.Backlog {
	backlog := storage.Backlog{Listed: true}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shared {
		backlog.Shared, backlog.Others = true, []string{"b on host2"}
	}
	if !b.away.IsZero() {
		backlog.Err, backlog.Since = errors.New("503"), b.away
	}
	return backlog
}

// flaky fails after some bytes.
type flaky struct {
	io.ReadCloser
	left int
}

func (f *flaky) Read(p []byte) (int, error) {
	if f.left == 0 {
		return 0, errors.New("connection reset")
	}
	n, err := f.ReadCloser.Read(p[:min(len(p), f.left)])
	f.left -= n
	return n, err
}

func (b *bucket) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	if err := b.trouble(); err != nil && !strings.HasPrefix(key, storage.Local) {
		return nil, storage.Info{}, err
	}
	r, info, err := b.Store.Open(ctx, key, offset, length)
	b.mu.Lock()
	defer b.mu.Unlock()
	if near, ok := b.near[key]; ok && err == nil {
		r.Close()
		return io.NopCloser(bytes.NewReader(near[offset:])), info, nil
	}
	b.opened = append(b.opened, offset)
	if b.cut > 0 && err == nil {
		r = &flaky{r, b.cut}
	}
	return r, info, err
}

func (b *bucket) Delete(ctx context.Context, key string) error {
	if err := b.trouble(); err != nil {
		return err
	}
	return b.Store.Delete(ctx, key)
}

func (b *bucket) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	if err := b.trouble(); err != nil {
		return func(yield func(storage.Info, error) bool) { yield(storage.Info{}, err) }
	}
	return b.Store.List(ctx, prefix, deep)
}

func (b *bucket) Reserve(n int64) (storage.Reservation, error) {
	b.mu.Lock()
	full := b.full
	b.mu.Unlock()
	if full {
		return nil, fmt.Errorf("%w near", storage.ErrFull)
	}
	return b.Store.Reserve(n)
}

// Free is of what is near: there is none.
func (*bucket) Free() (free, keep int64, err error) { return 0, 1 << 40, nil }

// keepAfar keeps a distant store.
func keepAfar(t *testing.T, change ...func(*kept)) (*kept, *bucket) {
	t.Helper()
	var afar *bucket
	b := keep(t, append(change, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store {
			afar = &bucket{Store: s, near: map[string][]byte{}}
			return afar
		}
	})...)
	return b, afar
}

// happens waits for an event.
func (b *kept) happens(name string) map[string]any {
	b.t.Helper()
	var found map[string]any
	eventually(b.t, "the event "+name, until(func() bool {
		found = b.event(name)
		return found != nil
	}))
	return found
}

// TestSharedStore: while another process uses the store nothing is deleted, and
// whoever wants that is told why. Afterwards nothing is that the other has need of.
func TestSharedStore(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, withGrace, func(b *kept) { b.settings.MaxSize = 1 << 20 })
	ctx := t.Context()
	b.ready()
	b.repository("docker.io/a", "docker.io")
	b.repository("apps/web", "")
	layer := content(1, 2000)
	b.pull("docker.io/a", "v1", layer)
	lone, useless := content(2, 3000), content(3, 4000)
	b.blobAlone(lone)
	b.blobAlone(useless)
	b.flush()
	b.clock.pass(2 * day)

	afar.change(func() { afar.shared = true })
	if e := b.happens("storage_shared"); e["shared"] != true || !slices.Equal(e["others"].([]string), []string{"b on host2"}) {
		t.Errorf("event: %v", e)
	}
	begin := map[string]func() (Job, error){
		"gc": func() (Job, error) { return b.GC(false) }, "dry gc": func() (Job, error) { return b.GC(true) },
		"retention": func() (Job, error) { return b.Retention(false) }, "purge": func() (Job, error) { return b.Purge("docker.io/**", false) },
	}
	for name, begin := range begin {
		if _, err := begin(); !errors.Is(err, ErrShared) || !strings.Contains(err.Error(), "b on host2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if status, err := b.Status(ctx); err != nil || status.Off == "" || status.Distant == nil || status.Complete.IsZero() {
		t.Errorf("status: %+v, %v", status, err)
	}
	b.Set(Settings{MaxSize: 1, Grace: day, Emit: b.settings.Emit})
	b.relieve(ctx, true)
	if b.Room(ctx, 1<<30) {
		t.Error("there is room")
	}
	if !b.holds(layer) || !b.holds(lone) {
		t.Error("something was deleted while another process uses the store")
	}
	b.Set(Settings{Grace: day, Emit: b.settings.Emit})
	b.done(b.Reindex()) // which deletes nothing
	afar.change(func() {
		if afar.relisted != 1 {
			t.Errorf("a reindex has listed the store %d times", afar.relisted)
		}
	})

	// The other process pushes an image of what nobody needed.
	other := tree.New(afar, nil)
	defer other.Close()
	d := digest.FromBytes(lone)
	if err := other.LinkBlob(ctx, "apps/web", d, d); err != nil {
		t.Fatal(err)
	}
	body := image("theirs", nil, lone)
	if _, err := other.PutManifest(ctx, "apps/web", digest.FromBytes(body), body, nil); err != nil {
		t.Fatal(err)
	}
	afar.change(func() { afar.shared = false })
	if e := b.happens("storage_shared"); e["shared"] != false {
		t.Errorf("event: %v", e)
	}
	if n := b.logged.FilterMessageSnippet("another process uses the store: gc").Len(); n != 1 {
		t.Errorf("said %d times that it is shared", n)
	}
	if known, err := b.ready().Names(ctx, "apps/web"); err != nil || !known.Manifests[digest.FromBytes(body)] {
		t.Errorf("the catalog counts as complete, and has %v of what was pushed meanwhile, %v", known, err)
	}
	b.clock.pass(2 * day)
	b.done(b.GC(false))
	if !b.holds(lone) || !b.holds(layer) {
		t.Error("what another process has pushed was deleted")
	}
	if b.holds(useless) {
		t.Error("what nobody needs is still there")
	}
}

// TestSharedAtClose: a catalog that was closed while another process used the store
// is not taken for complete.
func TestSharedAtClose(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t)
	b.ready()
	afar.change(func() { afar.shared = true })
	b.happens("storage_shared")
	b.stop()
	b.start()
	if !b.before.IsZero() {
		t.Errorf("the catalog counts as closed at %s", b.before)
	}
	b.stop()
	b.start() // alone
	b.ready()
	b.stop()
	b.start()
	if b.closed.IsZero() && b.wasNever() {
		t.Error("the catalog of a sole owner does not count as closed with everything")
	}
}

// wasNever reports that the last process has not closed the catalog as complete.
func (b *kept) wasNever() bool {
	b.journal.mu.Lock()
	defer b.journal.mu.Unlock()
	return b.before.IsZero() && !b.journal.closed && b.journal.complete.IsZero()
}

// TestSharedUntilLooked: nothing is deleted between the end of another process and when
// the keeper has heard of it.
func TestSharedUntilLooked(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, func(b *kept) { b.paces.look = time.Hour })
	b.ready()
	afar.change(func() { afar.shared = true })
	if _, err := b.GC(false); !errors.Is(err, ErrShared) {
		t.Errorf("before the keeper has looked: %v", err)
	}
	b.look()
	if e := b.happens("storage_shared"); e["shared"] != true {
		t.Errorf("event: %v", e)
	}
	afar.change(func() { afar.shared = false })
	if _, err := b.GC(false); !errors.Is(err, ErrShared) {
		t.Errorf("afterwards, and before the keeper has looked: %v", err)
	}
	b.look()
	b.ready()
	b.done(b.GC(false))
	if e := b.happens("storage_shared"); e["shared"] != false {
		t.Errorf("event: %v", e)
	}
	before := b.logged.Len()
	b.look()
	if told := b.logged.All()[before:]; len(told) > 0 {
		t.Errorf("nothing has changed, and it tells %v", told)
	}
}

// TestSharedAtTheBeginning: another process that ends before the keeper has looked for the
// first time has ended, as later ones have.
func TestSharedAtTheBeginning(t *testing.T) {
	t.Parallel()
	var afar *bucket
	shared := false
	b := keep(t, func(b *kept) {
		b.paces.look = time.Hour
		b.wrap = func(s storage.Store) storage.Store {
			afar = &bucket{Store: s, near: map[string][]byte{}, shared: shared}
			return afar
		}
	})
	shared = true
	b.restart()
	afar.change(func() { afar.shared = false })
	b.look()
	b.ready()
	b.done(b.GC(false))
	doubts := func() uint64 {
		b.journal.mu.Lock()
		defer b.journal.mu.Unlock()
		return uint64(b.journal.doubts)
	}
	before := doubts()
	b.look()
	if doubts() > before {
		t.Error("the catalog is held to be wrong again")
	}
}

// TestNothingAfar: nobody looks again and again at a store that is on a local disk.
func TestNothingAfar(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.watchAfar(t.Context()) // returns
}

// TestSharedPromises: what another process may have told a client to be there is kept
// for as long as that client may take.
func TestSharedPromises(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, withGrace, func(b *kept) { b.paces.look = time.Hour })
	ctx := t.Context()
	b.ready()
	b.repository("apps/web", "")
	d := b.blobAlone(content(1, 2000))
	if err := b.tree.LinkBlob(ctx, "apps/web", d, d); err != nil {
		t.Fatal(err)
	}
	b.flush()
	afar.change(func() { afar.shared = true })
	b.look()
	b.clock.pass(10 * day)
	afar.change(func() { afar.shared = false })
	b.look()
	b.ready()
	link := layout.LayerLink("apps/web", d)
	if b.done(b.GC(false)); !b.exists(link) {
		t.Error("what may have been promised just now is gone")
	}
	b.clock.pass(2 * day)
	if b.done(b.GC(false)); b.exists(link) {
		t.Error("what nobody has named since is still there")
	}
}

// TestOutage: an outage is told once, and again when it lasts; its end is told once,
// and so is the next one.
func TestOutage(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, func(b *kept) { b.paces.look = time.Hour })
	b.ready()
	tells := func(want string) {
		t.Helper()
		before := b.logged.Len()
		b.look()
		b.look()
		var said []string
		for _, entry := range b.logged.All()[before:] {
			said = append(said, entry.Message[:len("the store can")+3])
		}
		if got := strings.Join(said, ", "); got != want {
			t.Errorf("it said %q, want %q", got, want)
		}
	}
	tells("")
	afar.change(func() { afar.away = b.clock.time() })
	tells("")
	b.clock.pass(outageLeast)
	tells("the store cannot")
	b.clock.pass(outageAgain - time.Second)
	tells("")
	b.clock.pass(time.Second)
	tells("the store cannot")
	afar.change(func() { afar.away = time.Time{} })
	tells("the store can be")
	afar.change(func() { afar.away = b.clock.time() })
	b.clock.pass(outageLeast)
	tells("the store cannot")
}

// TestOutageMet: where a store does not say how it stands, whoever meets an outage tells
// of it, and nobody of its end.
func TestOutageMet(t *testing.T) {
	t.Parallel()
	var afar *bucket
	b := keep(t, withGrace, func(b *kept) {
		b.paces.look = time.Hour
		b.wrap = func(s storage.Store) storage.Store {
			afar = &bucket{Store: s, near: map[string][]byte{}}
			return silent{afar, afar}
		}
	})
	b.ready()
	if _, ok := b.Backlog(); ok {
		t.Fatal("it says how it stands")
	}
	b.blobAlone(content(1, 2000))
	b.flush()
	b.clock.pass(2 * day)
	afar.change(func() { afar.away = b.clock.time() })
	for range 2 {
		j, err := b.GC(false)
		if j = b.ended(j, err); !strings.Contains(j.Error, storage.ErrUnavailable.Error()) {
			t.Errorf("gc: %+v", j)
		}
		b.look()
	}
	if n := b.logged.FilterMessageSnippet("cannot be reached").FilterLevelExact(zap.WarnLevel).Len(); n != 1 {
		t.Errorf("told %d times", n)
	}
	if b.unreachable(errors.New("damaged")) {
		t.Error("anything counts as an outage")
	}
}

// silent is a distant store that does not say how it stands.
type silent struct {
	storage.Store
	afar *bucket
}

func (s silent) Distant() storage.Distant { return s.afar }

// TestListed: the catalog is compared with what is in a distant store once that is
// known, and nothing is deleted before.
func TestListed(t *testing.T) {
	t.Parallel()
	listing, waits := make(chan struct{}), make(chan struct{}, 1)
	b := keep(t, withGrace, func(b *kept) {
		b.catalog = b.file // so that keep does not wait
		b.wrap = func(s storage.Store) storage.Store {
			return &bucket{Store: s, near: map[string][]byte{}, listing: listing, waits: waits}
		}
	})
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "v1", content(1, 2000))
	b.flush()
	select {
	case <-waits:
	case <-time.After(30 * time.Second):
		t.Fatal("nobody waits for the store to be listed")
	}
	if _, err := b.mayDelete(); err == nil {
		t.Error("something may be deleted before the store is listed")
	}
	if b.pull("docker.io/a", "v2", content(2, 2000)); b.means("docker.io/a", "v2") == "" {
		t.Error("pulls do not go on")
	}
	close(listing)
	b.ready()
}

// TestUnavailable: while a distant store cannot be reached nothing is deleted, and
// that is told once; it goes on afterwards.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, withGrace)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	layer, lone := content(1, 2000), content(2, 3000)
	b.pull("docker.io/a", "v1", layer)
	b.blobAlone(lone)
	b.flush()
	b.clock.pass(2 * day)
	afar.change(func() { afar.away = b.clock.time() })
	// It may be back in a moment.
	if j, err := b.GC(false); !strings.Contains(b.ended(j, err).Error, storage.ErrUnavailable.Error()) || b.event("storage_unavailable") != nil {
		t.Error("gc goes on, or tells of an outage at once")
	}
	b.clock.pass(time.Minute)
	b.happens("storage_unavailable")
	for name, begin := range map[string]func() (Job, error){"gc": func() (Job, error) { return b.GC(false) }, "scrub": b.ScrubNow} {
		j, err := begin()
		if j = b.ended(j, err); !strings.Contains(j.Error, storage.ErrUnavailable.Error()) {
			t.Errorf("%s: %+v", name, j)
		}
	}
	b.Set(Settings{MaxSize: 1, Grace: day, Emit: b.settings.Emit})
	b.relieve(t.Context(), false)
	b.Set(Settings{Grace: day, Emit: b.settings.Emit})
	if n := b.logged.FilterLevelExact(zap.WarnLevel).FilterMessageSnippet("cannot be reached").Len(); n != 1 {
		t.Errorf("told %d times", n)
	}
	for _, entry := range b.logged.FilterLevelExact(zap.WarnLevel).All() {
		if !strings.Contains(entry.Message, "cannot be reached") && !strings.Contains(entry.Message, "compared") {
			t.Errorf("warned: %s", entry.Message)
		}
	}
	if b.event("damaged") != nil || len(b.damage.list()) > 0 || len(b.damage.since(time.Time{})) > 0 {
		t.Error("a blob counts as damaged")
	}
	afar.change(func() { afar.away = time.Time{} })
	b.happens("storage_available")
	if !b.holds(layer) || !b.holds(lone) {
		t.Fatal("something was deleted")
	}
	b.ready()
	b.done(b.GC(false))
	if b.holds(lone) || !b.holds(layer) {
		t.Error("nothing is deleted afterwards, or too much")
	}
}

// TestScrubNear: a near copy that is wrong is dropped, and is no damage; wrong bytes
// in the distant place are replaced without having been deleted.
func TestScrubNear(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t)
	up := &upstream{b: b}
	b.ready()
	b.hooks.Heal = func(ctx context.Context, repository string, d digest.Digest, size int64) error {
		if !b.exists(layout.Blob(d)) {
			t.Errorf("%s has been deleted", d)
		}
		return up.heal(ctx, repository, d, size)
	}
	b.populate()
	b.done(b.Reindex())
	mirrored, hosted := digest.FromBytes(content(2, 100)), digest.FromBytes(content(7, 80))
	up.gets(content(2, 100))
	b.flip(mirrored)
	afar.change(func() { afar.near[layout.Blob(hosted)] = bytes.Repeat([]byte("x"), 80) })
	j := b.done(b.ScrubNow())
	if j.Removed != 1 || j.Healed != 1 || !slices.Equal(j.Found, []string{mirrored.String()}) {
		t.Errorf("job: %+v", j)
	}
	afar.change(func() {
		if len(afar.near) > 0 {
			t.Error("a wrong near copy is still there")
		}
		if !slices.Equal(afar.distrusts, []string{layout.Blob(mirrored)}) {
			t.Errorf("distrusted: %q", afar.distrusts)
		}
	})
	if !b.holds(content(2, 100)) || b.event("damaged") != nil || len(b.damage.list()) > 0 {
		t.Error("not as it should be:", b.damage.list())
	}
	b.clock.pass(time.Hour)
	if j := b.done(b.ScrubNow()); j.Removed != 0 || len(j.Found) != 0 {
		t.Errorf("the next scrub: %+v", j)
	}
}

// TestScrubOnlyNear: unless it is asked for, the scrub reads nothing but what is near
// of a store at a distance, where each byte may cost money; and all of that.
func TestScrubOnlyNear(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		distant bool
		opened  int
	}{{false, 0}, {true, 1}} {
		b, afar := keepAfar(t)
		b.ready()
		b.repository("docker.io/a", "docker.io")
		b.pull("docker.io/a", "v1", content(1, 5000))
		b.flush()
		blob := digest.FromBytes(content(1, 5000))
		afar.change(func() { afar.opened = nil })
		b.settings.Scrub, b.settings.ScrubDistant = 1<<30, c.distant
		b.Set(b.settings)
		eventually(t, "all to be read", until(func() bool { return !b.damage.lastScrub().IsZero() }))
		afar.change(func() {
			if n := len(afar.opened); n < c.opened || c.opened == 0 && n > 0 {
				t.Errorf("with ScrubDistant %t: %d openings there", c.distant, n)
			}
			afar.near[layout.Blob(blob)] = bytes.Repeat([]byte("x"), 5000)
		})
		b.clock.pass(scrubAgain + time.Hour)
		b.damage.rouse()
		eventually(t, "the wrong near copy to be dropped", until(func() (dropped bool) {
			afar.change(func() { dropped = afar.near[layout.Blob(blob)] == nil })
			return dropped
		}))
	}
}

// TestScrubCut: a distant reader that is cut off goes on where it was.
func TestScrubCut(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "v1", content(1, 5000))
	b.flush()
	afar.change(func() { afar.cut, afar.opened = 2000, nil })
	j := b.done(b.ScrubNow())
	if j.Removed != 0 || len(j.Found) != 0 || len(b.damage.since(time.Time{})) > 0 {
		t.Errorf("job: %+v, bad: %v", j, b.damage.since(time.Time{}))
	}
	afar.change(func() {
		if !slices.Contains(afar.opened, 2000) || !slices.Contains(afar.opened, 4000) {
			t.Errorf("opened at %v", afar.opened)
		}
	})
}

// TestNearFull: where there is no room near a store nothing is evicted from it, and
// nobody waits for that.
func TestNearFull(t *testing.T) {
	t.Parallel()
	b, afar := keepAfar(t, func(b *kept) { b.settings.MaxSize = 1 << 20 })
	b.ready()
	b.repository("docker.io/a", "docker.io")
	layer := content(1, 2000)
	b.pull("docker.io/a", "v1", layer)
	b.flush()
	b.clock.pass(time.Hour)
	afar.change(func() { afar.full = true })
	patient, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	if b.Room(patient, 1000) || patient.Err() != nil { // whose patience is a minute here
		t.Error("there is room, or it was waited for: ", patient.Err())
	}
	b.relieved()
	if !b.holds(layer) {
		t.Error("something was evicted")
	}
	afar.change(func() { afar.full = false })
	b.Set(Settings{MaxSize: 1, Emit: b.settings.Emit})
	b.relieved()
	if b.holds(layer) {
		t.Error("nothing was evicted for max_size")
	}
}
