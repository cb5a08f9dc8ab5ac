package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// interrupted is a store in which something happens before the first deletion of
// a key that ends like this.
type interrupted struct {
	storage.Store
	once   sync.Once
	suffix string
	before func(key string)
}

func (i *interrupted) Delete(ctx context.Context, key string) error {
	if strings.HasSuffix(key, i.suffix) {
		i.once.Do(func() { i.before(key) })
	}
	return i.Store.Delete(ctx, key)
}

// interrupt keeps a store in which something happens in the middle of a removal.
func interrupt(t *testing.T, suffix string, before func(b *kept, key string)) *kept {
	i := &interrupted{suffix: suffix}
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store { i.Store = s; return i }
	})
	i.before = func(key string) { before(b, key) }
	return b
}

// TestBackMeanwhile: what is pulled again, or pinned, while it is being removed
// stays, also when the catalog has it already.
func TestBackMeanwhile(t *testing.T) {
	body := image("v1", nil, content(1, 1000), content(2, 1000))
	d := digest.FromBytes(body)
	for name, c := range map[string]struct {
		comes  func(b *kept)
		remove func(b *kept)
	}{
		"pulled": {
			func(b *kept) { b.tag("docker.io/a", "v2", b.manifest("docker.io/a", body)) },
			func(b *kept) {
				b.Set(Settings{Limits: map[string]Limit{"docker.io": {TTL: time.Hour}}})
				b.relieved()
			},
		},
		"pulled in a purge": {
			func(b *kept) { b.tag("docker.io/a", "v2", b.manifest("docker.io/a", body)) },
			func(b *kept) { b.done(b.Purge("docker.io/a:v1", false)) },
		},
		"pinned": {
			func(b *kept) {
				ref := oci.Reference{Digest: d}
				if err := b.tree.Pin(b.t.Context(), "docker.io/a", ref, b.clock.time()); err != nil {
					b.t.Error(err)
				}
			},
			func(b *kept) {
				b.Set(Settings{Limits: map[string]Limit{"docker.io": {TTL: time.Hour}}})
				b.relieved()
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := interrupt(t, layout.TagLink("docker.io/a", "v1"), func(b *kept, _ string) {
				c.comes(b)
				b.flush()
				b.Set(Settings{})
			})
			b.repository("docker.io/a", "docker.io")
			b.pull("docker.io/a", "v1", content(1, 1000), content(2, 1000))
			b.clock.pass(day)
			b.ready()
			b.flush()
			c.remove(b)
			if b.means("docker.io/a", "v1") != "" {
				t.Error("nothing was removed")
			}
			if _, err := b.tree.Manifest(t.Context(), "docker.io/a", d); err != nil {
				t.Error(err)
			}
			for i := 1; i <= 2; i++ {
				if l := content(i, 1000); !b.holds(l) || !b.member("docker.io/a", l) {
					t.Errorf("layer %d is gone", i)
				}
			}
			b.agrees(b.ready())
		})
	}
}

// TestHostedMeanwhile: a layer that becomes a hosted repository's after it has been
// chosen for eviction is neither deleted nor taken from it.
func TestHostedMeanwhile(t *testing.T) {
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, content(i, 100_000))
	}
	gone := -1
	b := interrupt(t, "/link", func(b *kept, key string) {
		for i, l := range layers {
			if key == layout.LayerLink("docker.io/a", digest.FromBytes(l)) {
				gone = i // its lock is held
			} else {
				b.blob("apps/web", l)
			}
		}
		b.flush()
	})
	b.repository("docker.io/a", "docker.io")
	b.repository("apps/web", "")
	b.pull("docker.io/a", "v1", layers...)
	b.clock.pass(day)
	b.ready()
	b.flush()
	b.Set(Settings{MaxSize: 500_000}) // less than the image
	b.relieved()
	for i, l := range layers {
		if i != gone && (!b.holds(l) || !b.member("apps/web", l)) {
			t.Errorf("layer %d of the hosted repository is gone", i)
		}
	}
	if gone < 0 {
		t.Error("nothing was evicted")
	}
	b.agrees(b.ready())
}

// TestOtherSettings: eviction for a budget ends when that is taken back.
func TestOtherSettings(t *testing.T) {
	b := interrupt(t, "/current/link", func(b *kept, _ string) { b.Set(Settings{}) })
	b.repository("docker.io/a", "docker.io")
	for i := range 5 {
		b.pull("docker.io/a", fmt.Sprint("v", i), content(i, 1000))
	}
	b.clock.pass(day)
	b.ready()
	b.flush()
	b.Set(Settings{MaxSize: 20_000})
	b.relieved()
	if e := b.eviction.evicted(); e.Roots != 1 {
		t.Errorf("%d images were evicted", e.Roots)
	}
}

// looked is a disk on which something happens at the second look from now on.
type looked struct {
	*measured
	looks atomic.Int64
	then  func()
}

func (l *looked) Free() (free, keep int64, err error) {
	free, keep, err = l.measured.Free()
	if l.looks.Add(1) == 2 {
		l.then()
	}
	return free, keep, err
}

// TestRoomAtTheEnd: who asks for room as an eviction ends is served by the next.
func TestRoomAtTheEnd(t *testing.T) {
	l := &looked{}
	l.looks.Store(1 << 32)
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store {
			l.measured = &measured{Store: s, size: 2_000_000, keep: 1_000_000, used: func() int64 { return blobBytes(b) }}
			return l
		}
	})
	asked := make(chan bool, 1)
	l.then = func() {
		go func() { asked <- b.Room(t.Context(), 500_000) }()
		eventually(t, "somebody to wait", until(func() bool { return b.eviction.waiting() > 0 }))
	}
	b.repository("docker.io/a", "docker.io")
	for i := range 8 {
		b.pull("docker.io/a", fmt.Sprint("v", i), content(i, 100_000))
	}
	b.clock.pass(day)
	b.ready()
	b.flush()
	b.eviction.running.Lock()
	l.looks.Store(0)
	b.eviction.running.Unlock()
	b.relieve(t.Context(), false)
	if !<-asked {
		t.Error("there is no room, though there are old images")
	}
}

// TestPartialAskedSeldom: what is partial is read from a directory now and then,
// and not for every reservation.
func TestPartialAskedSeldom(t *testing.T) {
	asked := 0
	b := keep(t, func(b *kept) {
		b.settings.MaxSize = 1000 * mib
		b.paces.partial = time.Hour
		b.partial = func() int64 { asked++; return mib }
	})
	b.Stop() // so that nobody else asks
	asked, b.account.asked = 0, time.Time{}
	reserve := func(used int64) {
		r, err := b.Store().Reserve(2 * mib)
		if err != nil {
			t.Fatal(err)
		}
		r.Use(used)
		r.Release()
	}
	for range 100 {
		reserve(0)
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	// What was used may be partial now.
	reserve(mib + 1)
	reserve(0)
	if asked != 2 {
		t.Errorf("asked %d times", asked)
	}
}

// TestPartialAskedBeforeRefusal: whoever has just given up a part of a blob for
// somebody who found no room makes room by that at once.
func TestPartialAskedBeforeRefusal(t *testing.T) {
	partial := int64(800 * mib)
	b := keep(t, func(b *kept) {
		b.settings.MaxSize = 1000 * mib
		b.paces.partial = time.Hour
		b.partial = func() int64 { return partial }
	})
	b.repository("docker.io/a", "docker.io")
	b.ready()
	b.flush()
	b.Stop()
	if _, err := b.Store().Reserve(300 * mib); !errors.Is(err, storage.ErrFull) {
		t.Fatalf("300 beside 800 of 1000 MiB: %v", err)
	}
	partial = 0
	r, err := b.Store().Reserve(300 * mib)
	if err != nil {
		t.Fatal(err)
	}
	r.Release()
}

// TestGCAfterDryRun: one that is to delete is not mistaken for a dry run that is
// under way.
func TestGCAfterDryRun(t *testing.T) {
	b := keep(t)
	b.ready()
	eventually(t, "the end of the comparison", until(func() bool { return !b.jobs.under(kindCompare) }))
	b.jobs.turn <- struct{}{}
	dry, err := b.GC(true)
	if err != nil {
		t.Fatal(err)
	}
	wet, err := b.GC(false)
	if err != nil || wet.DryRun || wet.ID == dry.ID {
		t.Errorf("%+v, %v", wet, err)
	}
	<-b.jobs.turn
	b.done(dry, nil)
	b.done(wet, nil)
}

// TestFoundAsItIsServed: damage that a client runs into is seen to as what the
// scrub finds, without a scrub; hosted bytes stay, and are not read again for
// every client.
func TestFoundAsItIsServed(t *testing.T) {
	b := keep(t)
	b.repository("docker.io/a", "docker.io")
	b.repository("apps/web", "")
	b.pull("docker.io/a", "v1", content(1, 1000))
	b.pull("apps/web", "v1", content(2, 1000))
	b.ready()
	b.flush()
	mirrored, hosted := digest.FromBytes(content(1, 1000)), digest.FromBytes(content(2, 1000))
	for _, d := range []digest.Digest{mirrored, hosted} {
		b.flip(d)
		for range 3 {
			if _, _, err := b.tree.OpenBlob(t.Context(), d); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v", err)
			}
			if err := b.tree.Prove(t.Context(), d); err == nil {
				t.Error("it is right")
			}
		}
	}
	eventually(t, "the damage to be told of", until(func() bool {
		s, err := b.Status(t.Context())
		return err == nil && len(s.Damaged) == 1 && s.Damaged[0].Digest == hosted
	}))
	if !b.exists(layout.Blob(hosted)) || b.exists(layout.Blob(mirrored)) {
		t.Error("the hosted blob is gone, or the mirrored one is not")
	}
	b.Suspect(hosted)
	if b.damage.waits() {
		t.Error("what is known to be damaged is read again")
	}
	b.clock.pass(2 * suspectAgain)
	b.Suspect(hosted)
	eventually(t, "it to be read again", until(func() bool { return !b.damage.waits() }))
}

// unwritable is a store that takes no note of who uses it.
type unwritable struct {
	storage.Store
	on bool
}

func (u *unwritable) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	if u.on && key == layout.Session {
		return errors.New("no space left on device")
	}
	return u.Store.Put(ctx, key, data, d)
}

// TestNoNote: what a process has said when it closed the catalog is not believed
// after another one that could not say that it has begun.
func TestNoNote(t *testing.T) {
	u := &unwritable{}
	b := keep(t, func(b *kept) {
		b.wrap = func(s storage.Store) storage.Store { u.Store = s; return u }
	})
	b.ready()
	b.restart()
	if b.ready(); !b.wasClosed() {
		t.Fatal("not believed after an orderly end")
	}
	u.on = true
	b.restart()
	if b.exists(layout.Session) {
		t.Error("the last one's note is still there")
	}
	u.on = false
}
