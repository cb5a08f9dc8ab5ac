package retain

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

const day = 24 * time.Hour

// askManifest is a client's request for a manifest by its digest.
func (b *kept) askManifest(repository string, d digest.Digest) {
	b.t.Helper()
	if _, err := b.tree.Manifest(b.t.Context(), repository, d); err != nil {
		b.t.Fatal(err)
	}
	b.Note(tree.Change{Kind: tree.Read, Repository: repository, Canonical: d, At: b.clock.time()})
}

func (b *kept) member(repository string, data []byte) bool {
	b.t.Helper()
	_, ok, err := b.tree.Member(b.t.Context(), repository, digest.FromBytes(data))
	if err != nil {
		b.t.Fatal(err)
	}
	return ok
}

// TestSharedLayer: a layer that expires in one repository stays for another in
// which it is live.
func TestSharedLayer(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.Limits = map[string]Limit{"docker.io": {TTL: 7 * day}} })
	b.repository("docker.io/old", "docker.io")
	b.repository("docker.io/live", "docker.io")
	shared, own := content(1, 5000), content(2, 5000)
	b.pull("docker.io/old", "v1", shared, own)
	b.clock.pass(5 * day)
	b.pull("docker.io/live", "v1", shared)
	b.clock.pass(3 * day)
	b.relieved()
	if b.means("docker.io/old", "v1") != "" || b.holds(own) {
		t.Error("it has not expired")
	}
	if b.member("docker.io/old", shared) {
		t.Error("an expired repository still has the layer")
	}
	if b.means("docker.io/live", "v1") == "" || !b.holds(shared) || !b.member("docker.io/live", shared) {
		t.Error("the live one has lost its layer")
	}
	b.agrees(b.ready())
	b.clock.pass(5 * day)
	b.relieved()
	if b.holds(shared) {
		t.Error("nobody needs it any more")
	}
	b.agrees(b.ready())
}

// TestIndexBeforeChildren: an index is kept by what is read of it, and takes what
// has come of it along.
func TestIndexBeforeChildren(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.Limits = map[string]Limit{"docker.io": {TTL: 7 * day}} })
	b.repository("docker.io/a", "docker.io")
	layer := content(1, 5000)
	child, never := image("amd64", nil, layer), image("arm64", nil, content(2, 5000))
	i := b.manifest("docker.io/a", index(child, never))
	b.tag("docker.io/a", "latest", i)
	b.relieved()
	d := b.manifest("docker.io/a", child)
	b.askManifest("docker.io/a", d)
	b.blob("docker.io/a", layer)
	b.relieved()
	for range 3 {
		b.clock.pass(5 * day)
		b.askManifest("docker.io/a", d)
		b.relieved()
		if b.means("docker.io/a", "latest") != i || !b.holds(layer) {
			t.Fatal("what is read by digest was evicted")
		}
	}
	b.clock.pass(8 * day)
	b.relieved()
	if b.means("docker.io/a", "latest") != "" || b.holds(layer) || b.holds(child) || b.holds(index(child, never)) {
		t.Error("something stays behind")
	}
	b.agrees(b.ready())
}

// TestDigestOnly: manifests that nobody has tagged are kept as long as somebody
// pulls them by their digest.
func TestDigestOnly(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.Limits = map[string]Limit{"docker.io": {TTL: 7 * day}} })
	b.repository("docker.io/a", "docker.io")
	live := b.pull("docker.io/a", "", content(1, 5000))
	b.pull("docker.io/a", "", content(2, 5000))
	for range 3 {
		b.clock.pass(3 * day)
		b.askManifest("docker.io/a", live)
		b.relieved()
	}
	if !b.holds(content(1, 5000)) || b.holds(content(2, 5000)) {
		t.Error("not the one that is unread was evicted")
	}
	if _, err := b.tree.Manifest(t.Context(), "docker.io/a", live); err != nil {
		t.Error(err)
	}
	b.agrees(b.ready())
}

// TestTTLAcrossRestart: a ttl holds for what was pulled before it was written
// down, and forgets nothing when it is taken away.
func TestTTLAcrossRestart(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "old", content(1, 5000))
	b.clock.pass(5 * day)
	b.pull("docker.io/a", "new", content(2, 5000))
	b.ready()
	b.settings.Limits = map[string]Limit{"docker.io": {TTL: 30 * day}}
	b.restart()
	b.relieved()
	if b.means("docker.io/a", "old") == "" {
		t.Error("evicted too early")
	}
	b.settings.Limits = nil
	b.restart()
	b.clock.pass(60 * day)
	b.relieved()
	if b.means("docker.io/a", "old") == "" {
		t.Error("evicted without a ttl")
	}
	b.read("docker.io/a", "new")
	b.settings.Limits = map[string]Limit{"docker.io": {TTL: day}}
	b.restart()
	b.relieved()
	if b.means("docker.io/a", "old") != "" || b.means("docker.io/a", "new") == "" {
		t.Error("the ttl of the new configuration does not hold")
	}
}

// TestBudgetAcrossRestart: so does a budget.
func TestBudgetAcrossRestart(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	for i := range 10 {
		b.pull("docker.io/a", fmt.Sprint("v", i), content(i, 100_000))
		b.clock.pass(time.Hour)
	}
	b.read("docker.io/a", "v0")
	b.clock.pass(time.Hour)
	b.ready()
	b.settings.MaxSize = 700_000
	b.restart()
	b.relieved()
	var left []string
	for i := range 10 {
		if b.means("docker.io/a", fmt.Sprint("v", i)) != "" {
			left = append(left, fmt.Sprint("v", i))
		}
	}
	// Each takes 160 kB on the disk.
	if got := strings.Join(left, " "); got != "v0 v8 v9" {
		t.Errorf("left: %s", got)
	}
	if n, _ := b.used(); n > 700_000/100*lowWater {
		t.Errorf("%d are used", n)
	}
	// And while it is running.
	b.Set(Settings{MaxSize: 300_000})
	b.relieved()
	if n, _ := b.used(); n > 300_000/100*lowWater {
		t.Errorf("%d are used", n)
	}
	if b.means("docker.io/a", "v0") == "" {
		t.Error("not the coldest were evicted")
	}
	b.agrees(b.ready())
}

// TestNeverEvicted: hosted, unrecorded and pinned content stays whatever the
// budget.
func TestNeverEvicted(t *testing.T) {
	b := keep(t)
	b.repository("apps/web", "")
	b.repository("docker.io/a", "docker.io")
	b.pull("apps/web", "v1", content(1, 5000))
	b.pull("registry2/has", "v1", content(2, 5000))
	b.pull("docker.io/a", "pinned", content(3, 5000), content(4, 5000))
	by := b.pull("docker.io/a", "", content(5, 5000))
	b.pull("docker.io/a", "loose", content(6, 5000), content(4, 5000), content(1, 5000))
	for _, reference := range []string{"pinned", by.String()} {
		ref, err := oci.ParseReference(reference)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.tree.Pin(t.Context(), "docker.io/a", ref, b.clock.time()); err != nil {
			t.Fatal(err)
		}
	}
	b.clock.pass(365 * day)
	b.Set(Settings{MaxSize: 1, Limits: map[string]Limit{"docker.io": {TTL: time.Hour, MaxSize: 1}}})
	b.relieved()
	for i := 1; i <= 5; i++ {
		if !b.holds(content(i, 5000)) {
			t.Errorf("content %d was evicted", i)
		}
	}
	if b.means("docker.io/a", "loose") != "" || b.holds(content(6, 5000)) {
		t.Error("nothing was evicted")
	}
	b.agrees(b.ready())
	// Until it is unpinned.
	ref, _ := oci.ParseReference("pinned")
	if _, err := b.tree.Unpin(t.Context(), "docker.io/a", ref); err != nil {
		t.Fatal(err)
	}
	b.relieved()
	if b.means("docker.io/a", "pinned") != "" || b.holds(content(3, 5000)) {
		t.Error("what is pinned no more stays")
	}
}

// TestLargerThanBudget: an image that is larger than its budget loses layers, and
// not its manifest.
func TestLargerThanBudget(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, content(i, 100_000))
	}
	d := b.pull("docker.io/a", "v1", layers...)
	b.clock.pass(day)
	b.Set(Settings{MaxSize: 500_000})
	b.relieved()
	if b.means("docker.io/a", "v1") != d || !b.holds(image("v1", nil, layers...)) {
		t.Error("the manifest was evicted")
	}
	held := 0
	for _, l := range layers {
		if b.holds(l) {
			held++
		}
	}
	if held == 0 || held > 4 {
		t.Errorf("%d of 10 layers are held", held)
	}
	b.agrees(b.ready())
}

// TestPulledNow: an image that does not fit beside what is older is not taken
// away under the client that pulls it.
func TestPulledNow(t *testing.T) {
	b := keep(t, func(b *kept) { b.settings.MaxSize = 500_000 })
	b.repository("docker.io/a", "docker.io")
	b.ready()
	b.pull("docker.io/a", "old", content(100, 300_000))
	b.clock.pass(day)
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, content(i, 100_000))
	}
	d := b.manifest("docker.io/a", image("v1", nil, layers...))
	b.tag("docker.io/a", "v1", d)
	b.flush() // what is no blob counts from then on
	for _, l := range layers {
		if !b.blob("docker.io/a", l) {
			t.Error("no room for a layer")
		}
		if b.means("docker.io/a", "v1") != d || !b.holds(image("v1", nil, layers...)) {
			t.Fatal("the manifest was evicted")
		}
		b.flush() // or what has just come may count twice
		if n, _ := b.used(); n > 500_000 {
			t.Errorf("%d are used", n)
		}
	}
	b.relieved()
	if b.means("docker.io/a", "old") != "" {
		t.Error("the older one is still there")
	}
	b.agrees(b.ready())
}

// TestUpstreamBudget: each upstream has its own, and what two share counts in
// both.
func TestUpstreamBudget(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	b.repository("ghcr.io/a", "ghcr.io")
	shared := content(99, 100_000)
	b.pull("ghcr.io/a", "v", shared)
	b.clock.pass(time.Hour)
	for i := range 5 {
		b.pull("docker.io/a", fmt.Sprint("v", i), content(i, 100_000), shared)
		b.clock.pass(time.Hour)
	}
	b.Set(Settings{Limits: map[string]Limit{"docker.io": {MaxSize: 500_000}, "ghcr.io": {MaxSize: 1_000_000}}})
	b.relieved()
	c := b.ready()
	usage, err := c.Usage(t.Context(), "docker.io")
	if err != nil || usage.Allocated > 450_000 || usage.Allocated < 200_000 {
		t.Errorf("%+v, %v", usage, err)
	}
	if b.means("docker.io/a", "v0") != "" || b.means("docker.io/a", "v4") == "" {
		t.Error("not the coldest were evicted")
	}
	if b.means("ghcr.io/a", "v") == "" || !b.holds(shared) {
		t.Error("another upstream's image was evicted")
	}
	b.Set(Settings{Limits: map[string]Limit{"docker.io": {MaxSize: 1}}})
	b.relieved()
	if !b.holds(shared) || !b.member("ghcr.io/a", shared) {
		t.Error("what another upstream has was deleted")
	}
	b.agrees(c)
}

// measured is a disk of a given size.
type measured struct {
	storage.Store
	size, keep int64
	used       func() int64
}

func (m *measured) Free() (free, keep int64, err error) { return m.size - m.used(), m.keep, nil }

func (m *measured) Reserve(n int64) (storage.Reservation, error) {
	if m.size-m.used()-n < m.keep {
		return nil, fmt.Errorf("%w: min_free", storage.ErrFull)
	}
	return m.Store.Reserve(n)
}

// TestMinFree: what an operator wants kept free is, and a bit more; who needs
// room gets it.
func TestMinFree(t *testing.T) {
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store {
			return &measured{Store: s, size: 2_000_000, keep: 1_000_000, used: func() int64 { return blobBytes(b) }}
		}
	})
	b.repository("docker.io/a", "docker.io")
	b.ready()
	for i := range 20 {
		if !b.blob("docker.io/a", content(i, 100_000)) {
			t.Errorf("no room for %d", i)
		}
		b.pull("docker.io/a", fmt.Sprint("v", i), content(i, 100_000))
		b.clock.pass(time.Hour)
		if n := blobBytes(b); n > 1_000_000 {
			t.Errorf("%d are used", n)
		}
	}
	b.relieved()
	if n := blobBytes(b); n > 950_000 || n < 500_000 {
		t.Errorf("%d are used", n)
	}
	if b.means("docker.io/a", "v19") == "" {
		t.Error("not the coldest were evicted")
	}
	if n := b.logged.FilterField(zap.String("why", "min_free")).Len(); n == 0 {
		t.Error("nothing was said")
	}
	b.agrees(b.ready())
}

// blobBytes is what the blobs in a store take.
func blobBytes(b *kept) (n int64) {
	for info, err := range b.store.List(context.Background(), "docker/registry/v2/blobs/", true) {
		if err != nil {
			b.t.Error(err)
			return n
		}
		n += info.Size
	}
	return n
}

// TestNothingBeforeComplete: nothing is evicted as long as something may be
// missing from the catalog.
func TestNothingBeforeComplete(t *testing.T) {
	opening := make(chan struct{})
	b := keep(t, func(b *kept) {
		b.catalog = later(b, opening)
		b.settings.MaxSize = 1
	})
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "v1", content(1, 5000))
	b.clock.pass(day)
	b.relieve(t.Context(), true)
	if !b.holds(content(1, 5000)) {
		t.Error("something was evicted")
	}
	close(opening)
	b.relieved()
	if b.holds(content(1, 5000)) {
		t.Error("nothing was evicted")
	}
}

// TestTold: an eviction is one line and, once a minute, one event.
func TestTold(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	for round := range 3 {
		for i := range 10 {
			b.pull("docker.io/a", fmt.Sprint("v", i), content(10*round+i, 100_000))
		}
		b.clock.pass(day)
		b.Set(Settings{MaxSize: 1, Emit: b.settings.Emit})
		b.relieved()
		b.Set(Settings{Emit: b.settings.Emit})
		eventually(t, "the line", until(func() bool { return b.logged.FilterMessage("evicted").Len() == round+1 }))
		b.clock.pass(day)
	}
	line := b.logged.FilterMessage("evicted").All()[0].ContextMap()
	if line["roots"] != int64(10) || line["blobs"] != int64(20) || line["bytes"].(int64) < 1_000_000 || line["why"] != "max_size" {
		t.Errorf("%v", line)
	}
	event := <-b.events
	if event["event"] != "evicted" || event["roots"] != int64(10) {
		t.Errorf("%v", event)
	}
	if len(b.events) > 0 {
		t.Errorf("another event: %v", <-b.events)
	}
	if s, err := b.Status(t.Context()); err != nil || s.Evicted.Roots != 30 || s.Catalog != "ready" || s.Complete.IsZero() {
		t.Errorf("%+v, %v", s, err)
	}
}

// gated is a store in which the deletion of blobs waits.
type gated struct {
	storage.Store
	deleting, proceed chan struct{}
	once              sync.Once
	on                atomic.Bool
}

func (g *gated) Delete(ctx context.Context, key string) error {
	if g.on.Load() && strings.HasSuffix(key, "/data") {
		g.once.Do(func() { close(g.deleting) })
		<-g.proceed
	}
	return g.Store.Delete(ctx, key)
}

// TestPullsGoOn: a pull waits for no eviction, even if the disk takes its time to
// delete something.
func TestPullsGoOn(t *testing.T) {
	g := &gated{deleting: make(chan struct{}), proceed: make(chan struct{})}
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store { g.Store = s; return g }
	})
	b.repository("docker.io/a", "docker.io")
	b.pull("docker.io/a", "old", content(1, 100_000))
	b.clock.pass(day)
	b.ready()
	b.flush()
	g.on.Store(true)
	b.Set(Settings{MaxSize: 50_000})
	<-g.deleting
	b.Set(Settings{MaxSize: 5_000_000})
	// Locks are fewer than digests: one in a thousand waits for another's.
	var pulls sync.WaitGroup
	var done atomic.Int64
	for i := range 20 {
		pulls.Go(func() {
			d := b.pull("docker.io/a", fmt.Sprint("v", i), content(2+i, 1000))
			b.askManifest("docker.io/a", d)
			b.read("docker.io/a", fmt.Sprint("v", i))
			done.Add(1)
		})
	}
	eventually(t, "most pulls to end while a blob is being deleted", until(func() bool { return done.Load() >= 15 }))
	if err := b.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	close(g.proceed)
	pulls.Wait()
	b.relieved()
	if b.holds(content(1, 100_000)) {
		t.Error("the old one is still there")
	}
	b.agrees(b.ready())
}

// TestPulledAgain: what is pulled again while it is being evicted is whole
// afterwards.
func TestPulledAgain(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	layers := [][]byte{content(1, 1000), content(2, 1000)}
	for round := range 30 {
		d := b.pull("docker.io/a", "v1", layers...)
		b.clock.pass(day)
		b.ready()
		b.flush()
		var wg sync.WaitGroup
		wg.Go(func() {
			b.Set(Settings{MaxSize: 1})
			b.relieve(t.Context(), false)
			b.Set(Settings{})
		})
		var pulled bool
		wg.Go(func() {
			ctx := t.Context()
			body := image("v1", nil, layers...)
			_, err := b.tree.PutManifest(ctx, "docker.io/a", d, body, nil)
			if err == nil {
				err = b.tree.SetTag(ctx, "docker.io/a", "v1", d, b.clock.time(), nil)
			}
			for _, l := range layers {
				if err != nil {
					break
				}
				if err = b.store.Put(ctx, layout.Blob(digest.FromBytes(l)), l, storage.Lazy); err == nil {
					err = b.tree.LinkBlob(ctx, "docker.io/a", digest.FromBytes(l), digest.FromBytes(l))
				}
			}
			pulled = err == nil // a blob may go between Put and LinkBlob
		})
		wg.Wait()
		b.flush()
		for _, l := range layers {
			if pulled && b.member("docker.io/a", l) && b.means("docker.io/a", "v1") == d && !b.holds(l) {
				// Evicted by itself, as of an image that is in use: it is
				// fetched again. But then no link says that it is there.
				if _, err := b.store.Get(t.Context(), layout.LayerLink("docker.io/a", digest.FromBytes(l)), 1000); err == nil {
					t.Errorf("round %d: a link to nothing", round)
				}
			}
		}
		b.agrees(b.ready())
	}
}
