package retain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a time that goes on when it is told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) time() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// kept is a store that is kept, on a disk, with a catalog in a file.
type kept struct {
	t     *testing.T
	dir   string
	clock *clock
	store storage.Store
	tree  *tree.Tree
	*Keeper

	paces    paces
	settings Settings
	// catalog opens it in place of the file, if it is not nil.
	catalog func(context.Context) (*catalog.Catalog, error)
	partial func() int64
	alone   func(repository string) (done func())
	wrap    func(storage.Store) storage.Store
	events  chan map[string]any
	logged  *observer.ObservedLogs
	open    bool
}

// hasty are paces with which a test does not wait for the journal.
var hasty = paces{look: time.Millisecond, noted: 50_000, batch: time.Millisecond, giveUp: time.Minute, reopen: time.Millisecond, finish: time.Minute, room: time.Minute, gift: time.Minute}

func keep(t *testing.T, change ...func(*kept)) *kept {
	t.Helper()
	b := &kept{t: t, dir: t.TempDir(), clock: &clock{now: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}, paces: hasty, events: make(chan map[string]any, 100)}
	for _, f := range change {
		f(b)
	}
	b.start()
	t.Cleanup(b.stop)
	if b.catalog == nil {
		// What the first comparison tells of would count as read at that time.
		b.ready()
	}
	return b
}

// roomy is a store whose disk has room, whatever else is on the machine's.
type roomy struct{ storage.Store }

func (roomy) Free() (free, keep int64, err error) { return 1 << 50, 0, nil }

func (roomy) Reserve(n int64) (storage.Reservation, error) {
	if n > 1<<50 {
		return nil, fmt.Errorf("%w: min_free", storage.ErrFull)
	}
	return room{}, nil
}

type room struct{}

func (room) Use(int64) {}
func (room) Release()  {}

func (b *kept) start() {
	b.t.Helper()
	b.store = disktest.Open(b.t, filepath.Join(b.dir, "store"))
	seen := storage.Store(roomy{b.store})
	if b.wrap != nil {
		seen = b.wrap(seen)
	}
	core, logged := observer.New(zap.InfoLevel)
	b.logged = logged
	b.Keeper = New(seen, zap.New(core))
	b.Keeper.now, b.Keeper.paces = b.clock.time, b.paces
	b.tree = tree.New(seen, func(c tree.Change) {
		if !c.At.IsZero() {
			c.At = b.clock.time()
		}
		b.Note(c)
	})
	if b.settings.Emit == nil {
		b.settings.Emit = func(event string, data map[string]any) {
			data["event"] = event
			select {
			case b.events <- data:
			default:
			}
		}
	}
	b.Set(b.settings)
	open := b.catalog
	if open == nil {
		open = b.file
	}
	b.Begin(b.tree, Hooks{Catalog: open, Partial: b.partial, Alone: b.alone})
	b.open = true
}

// file opens the catalog in its file.
func (b *kept) file(ctx context.Context) (*catalog.Catalog, error) {
	db, err := (&sqlite.SQLite{File: filepath.Join(b.dir, "catalog.db")}).Open(ctx, "store")
	if err != nil {
		return nil, err
	}
	return catalog.Open(ctx, db, "sqlite", "store")
}

// later opens the catalog in its file once it may.
func later(b *kept, may chan struct{}) func(context.Context) (*catalog.Catalog, error) {
	return func(ctx context.Context) (*catalog.Catalog, error) {
		select {
		case <-may:
			return b.file(ctx)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// stop is an orderly end of the process.
func (b *kept) stop() {
	if !b.open {
		return
	}
	b.open = false
	b.Stop()
	b.tree.Close()
	b.Keeper.Close()
	if err := b.store.Close(); err != nil {
		b.t.Error(err)
	}
}

// kill is an end of the process in which what is noted and not written is lost.
func (b *kept) kill() {
	b.Keeper.paces.finish = 0
	b.stop()
}

func (b *kept) restart() {
	b.t.Helper()
	b.stop()
	b.start()
}

// ready waits until the catalog is complete.
func (b *kept) ready() *catalog.Catalog {
	b.t.Helper()
	var c *catalog.Catalog
	eventually(b.t, "the catalog to be complete", func() (err error) {
		c, err = b.mayDelete()
		return err
	})
	return c
}

func (b *kept) flush() {
	b.t.Helper()
	eventually(b.t, "the catalog to be there", func() error { return b.Flush(b.t.Context()) })
}

// eventually waits until there is no error.
func eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s: %v", what, err)
		}
		<-tick.C
	}
}

var errNotYet = errors.New("not yet")

// until makes a condition of a bool.
func until(holds func() bool) func() error {
	return func() error {
		if holds() {
			return nil
		}
		return errNotYet
	}
}

// content is n bytes that are the same for one seed.
func content(seed, n int) []byte {
	data := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	source.Read(data)
	return data
}

func describe(mediaType string, data []byte) v1.Descriptor {
	return v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// image is a manifest with its layers; the first is its config.
func image(annotation string, subject *v1.Descriptor, layers ...[]byte) []byte {
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: describe(v1.MediaTypeImageConfig, layers[0]), Subject: subject, Annotations: map[string]string{"a": annotation}}
	m.SchemaVersion = 2
	for _, l := range layers[1:] {
		m.Layers = append(m.Layers, describe(v1.MediaTypeImageLayer, l))
	}
	body, _ := json.Marshal(m)
	return body
}

func index(children ...[]byte) []byte {
	m := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{}}
	m.SchemaVersion = 2
	for _, c := range children {
		m.Manifests = append(m.Manifests, describe(v1.MediaTypeImageManifest, c))
	}
	body, _ := json.Marshal(m)
	return body
}

// repository records one of an upstream, or with "" a hosted one.
func (b *kept) repository(name, upstream string) {
	b.t.Helper()
	r := tree.Record{Class: tree.Mirrored, Upstream: upstream, Created: b.clock.time()}
	if upstream == "" {
		r.Class = tree.Hosted
	}
	if err := b.tree.PutRecord(b.t.Context(), name, r); err != nil {
		b.t.Fatal(err)
	}
}

func (b *kept) manifest(repository string, body []byte) digest.Digest {
	b.t.Helper()
	d := digest.FromBytes(body)
	if _, err := b.tree.PutManifest(b.t.Context(), repository, d, body, nil); err != nil {
		b.t.Fatal(err)
	}
	return d
}

// blob stores one as a fill does, if there is room.
func (b *kept) blob(repository string, data []byte) bool {
	b.t.Helper()
	ctx, d, size := b.t.Context(), digest.FromBytes(data), int64(len(data))
	if _, err := b.store.Stat(ctx, layout.Blob(d)); err != nil {
		store := b.Store()
		r, err := store.Reserve(size)
		if errors.Is(err, storage.ErrFull) && b.Room(ctx, size) {
			r, err = store.Reserve(size)
		}
		if errors.Is(err, storage.ErrFull) {
			return false
		}
		if err != nil {
			b.t.Fatal(err)
		}
		defer r.Release()
		if err := store.Put(ctx, layout.Blob(d), data, storage.Lazy); err != nil {
			b.t.Fatal(err)
		}
		r.Use(size)
	}
	if err := b.tree.LinkBlob(ctx, repository, d, d); err != nil {
		b.t.Fatal(err)
	}
	return true
}

func (b *kept) tag(repository, tag string, d digest.Digest) {
	b.t.Helper()
	if err := b.tree.SetTag(b.t.Context(), repository, tag, d, b.clock.time(), nil); err != nil {
		b.t.Fatal(err)
	}
	b.read(repository, tag)
}

// read is a client's request for a tag.
func (b *kept) read(repository, tag string) {
	b.tree.Asked(repository, tag, new(tree.LastRead), b.clock.time())
}

// pull stores an image and its layers under a tag, or with "" under none.
func (b *kept) pull(repository, tag string, layers ...[]byte) digest.Digest {
	b.t.Helper()
	d := b.manifest(repository, image(tag, nil, layers...))
	if tag != "" {
		b.tag(repository, tag, d)
	}
	for _, l := range layers {
		b.blob(repository, l)
	}
	return d
}

func (b *kept) holds(data []byte) bool {
	got, err := b.store.Get(b.t.Context(), layout.Blob(digest.FromBytes(data)), 64<<20)
	return err == nil && bytes.Equal(got, data)
}

func (b *kept) means(repository, tag string) digest.Digest {
	d, _ := b.tree.Tag(b.t.Context(), repository, tag)
	return d
}

// relieved lets the keeper do now what it would do within a minute.
func (b *kept) relieved() {
	b.t.Helper()
	b.ready()
	b.flush()
	b.relieve(b.t.Context(), true)
	b.flush()
}
