package retain

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// flip turns one bit of a stored blob.
func (b *kept) flip(d digest.Digest) {
	b.t.Helper()
	path := b.path(layout.Blob(d))
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	data[len(data)/2] ^= 4
	info, err := os.Stat(path)
	if err == nil {
		err = os.WriteFile(path, data, 0o644)
	}
	if err == nil { // as a disk does it, of which no file's time tells
		err = os.Chtimes(path, info.ModTime(), info.ModTime())
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *kept) truncate(d digest.Digest) {
	b.t.Helper()
	if err := os.Truncate(b.path(layout.Blob(d)), 3); err != nil {
		b.t.Fatal(err)
	}
}

// upstream heals from what it has.
type upstream struct {
	b       *kept
	mu      sync.Mutex
	has     map[digest.Digest][]byte
	asked   []string
	running atomic.Int64
	most    atomic.Int64
	gate    chan struct{} // none is answered before it is closed
}

func (u *upstream) heal(ctx context.Context, repository string, d digest.Digest, _ int64) error {
	now := u.running.Add(1)
	defer u.running.Add(-1)
	for most := u.most.Load(); now > most && !u.most.CompareAndSwap(most, now); most = u.most.Load() {
	}
	if u.gate != nil {
		<-u.gate
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked = append(u.asked, repository+"@"+d.String())
	data, ok := u.has[d]
	if !ok {
		return errors.New("the upstream is away")
	}
	if err := u.b.store.Put(ctx, layout.Blob(d), data, storage.Lazy); err != nil {
		return err
	}
	return u.b.tree.LinkBlob(ctx, repository, d, d)
}

// has gives an upstream content.
func (u *upstream) gets(data []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.has == nil {
		u.has = map[digest.Digest][]byte{}
	}
	u.has[digest.FromBytes(data)] = data
}

func (b *kept) event(name string) map[string]any {
	b.t.Helper()
	for {
		select {
		case e := <-b.events:
			if e["event"] == name {
				return e
			}
		default:
			return nil
		}
	}
}

// What the disk has spoilt is found: what can be fetched again is, and what
// cannot is left where it is, loudly.
func TestScrub(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(*kept, digest.Digest){"flipped bit": (*kept).flip, "truncated": (*kept).truncate} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := keep(t)
			up := &upstream{b: b}
			b.ready()
			b.hooks.Heal = up.heal
			b.populate()
			mirrored, hosted, shared := digest.FromBytes(content(2, 100)), digest.FromBytes(content(7, 80)), digest.FromBytes(content(1, 5000))
			unrecorded := digest.FromBytes(content(8, 90))
			b.done(b.Reindex())
			for _, d := range []digest.Digest{mirrored, hosted, shared, unrecorded} {
				harm(b, d)
			}
			spoilt, err := os.ReadFile(b.path(layout.Blob(hosted)))
			if err != nil {
				t.Fatal(err)
			}
			up.gets(content(2, 100))
			up.gets(content(1, 5000)) // nobody asks: it is a hosted repository's, too

			j := b.done(b.ScrubNow())
			slices.Sort(j.Found)
			want := []string{mirrored.String(), hosted.String(), shared.String(), unrecorded.String()}
			slices.Sort(want)
			if !slices.Equal(j.Found, want) || j.Removed != 1 || j.Healed != 1 || j.Done < j.Total/2 || j.Total == 0 {
				t.Errorf("job is %+v, want %q", j, want)
			}
			if !b.holds(content(2, 100)) || !slices.Equal(up.asked, []string{"ghcr.io/org/tool@" + mirrored.String()}) {
				t.Errorf("not healed; asked for %q", up.asked)
			}
			if e := b.event("damaged"); e == nil {
				t.Error("no event")
			}
			if got, err := os.ReadFile(b.path(layout.Blob(hosted))); err != nil || string(got) != string(spoilt) {
				t.Errorf("a hosted blob was touched: %v", err)
			}
			status, err := b.Status(t.Context())
			if err != nil || len(status.Damaged) != 3 || status.LastScrub.IsZero() {
				t.Fatalf("status: %+v, %v", status, err)
			}
			for _, d := range status.Damaged {
				if d.Digest == hosted && !slices.Equal(d.Repositories, []string{"apps/web"}) || d.Found.IsZero() {
					t.Errorf("damage: %+v", d)
				}
				if d.Digest == unrecorded && !slices.Equal(d.Repositories, []string{"old/registry"}) {
					t.Errorf("damage: %+v", d)
				}
			}
			loud := b.logged.FilterLevelExact(zap.ErrorLevel).Len()
			if loud != 3 {
				t.Errorf("%d errors are logged", loud)
			}

			// Told of once a day; and no more once it is right.
			for b.event("damaged") != nil {
			}
			b.clock.pass(time.Hour)
			b.done(b.ScrubNow())
			if e := b.event("damaged"); e != nil {
				t.Errorf("told of again: %v", e)
			}
			b.behind(layout.Blob(hosted), content(7, 80))
			b.behind(layout.Blob(shared), content(1, 5000))
			b.clock.pass(24 * time.Hour)
			b.done(b.ScrubNow())
			if e := b.event("damaged"); e == nil || e["digest"] != unrecorded.String() {
				t.Errorf("not told of after a day: %v", e)
			}
			if e := b.event("damaged"); e != nil {
				t.Errorf("told of though it is right: %v", e)
			}
			if status, err := b.Status(t.Context()); err != nil || len(status.Damaged) != 1 {
				t.Errorf("status: %+v, %v", status, err)
			}
		})
	}
}

// A manifest that is wrong is none, and is fetched again as it is pulled; nobody
// asks for it as a blob.
func TestScrubManifest(t *testing.T) {
	t.Parallel()
	b := keep(t)
	up := &upstream{b: b}
	b.ready()
	b.hooks.Heal = up.heal
	b.repository("docker.io/a", "docker.io")
	d := b.pull("docker.io/a", "x", content(1, 10), content(2, 20))
	b.flush()
	b.flip(d)
	if j := b.done(b.ScrubNow()); j.Removed != 1 || !slices.Equal(j.Found, []string{d.String()}) {
		t.Errorf("job is %+v", j)
	}
	if _, err := b.tree.Manifest(t.Context(), "docker.io/a", d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("manifest: %v", err)
	}
	if len(up.asked) != 0 {
		t.Errorf("asked for %q", up.asked)
	}
	b.pull("docker.io/a", "x", content(1, 10), content(2, 20))
	if m, err := b.tree.Manifest(t.Context(), "docker.io/a", d); err != nil || m.Digest != d {
		t.Errorf("manifest: %v, %v", m, err)
	}
	b.agrees(b.ready())
}

// What could not be fetched again is not there any more, and is tried again.
func TestScrubHealsLater(t *testing.T) {
	t.Parallel()
	b := keep(t)
	up := &upstream{b: b, gate: make(chan struct{})}
	b.ready()
	b.hooks.Heal = up.heal
	b.repository("docker.io/a", "docker.io")
	var all [][]byte
	for i := range 6 {
		all = append(all, content(i, 50+i))
	}
	b.pull("docker.io/a", "x", all...)
	b.flush()
	for _, data := range all {
		b.flip(digest.FromBytes(data))
	}
	begun, err := b.ScrubNow()
	eventually(t, "two to be fetched, and the third to wait", until(func() bool {
		now, _ := b.Job(begun.ID)
		return now.Removed == 3 && up.running.Load() == 2
	}))
	close(up.gate)
	if j := b.done(begun, err); j.Removed != 6 || j.Healed != 0 {
		t.Errorf("job is %+v", j)
	}
	if b.holds(all[0]) || b.exists(layout.Blob(digest.FromBytes(all[0]))) {
		t.Error("spoilt bytes are still there")
	}
	if most := up.most.Load(); most > 2 {
		t.Errorf("%d were fetched at once", most)
	}
	for _, data := range all[1:] {
		up.gets(data)
	}
	b.blob("docker.io/a", all[0]) // pulled meanwhile
	up.mu.Lock()
	up.asked = nil
	up.mu.Unlock()
	if j := b.done(b.ScrubNow()); j.Healed != 5 {
		t.Errorf("job is %+v", j)
	}
	for _, data := range all {
		if !b.holds(data) {
			t.Error("not healed")
		}
	}
	if slices.Contains(up.asked, "docker.io/a@"+digest.FromBytes(all[0]).String()) {
		t.Error("fetched though it was there")
	}
	b.agrees(b.ready())
}

// Behind everything else, each blob is read, and then none for a week.
func TestScrubInBackground(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.populate()
	b.done(b.Reindex())
	read := func(at time.Time) func() error {
		return func() error {
			if err := b.Flush(t.Context()); err != nil {
				return err
			}
			left, err := b.ready().Unhashed(t.Context(), at, 10)
			if err == nil && len(left) > 0 {
				err = errNotYet
			}
			return err
		}
	}
	if read(b.clock.time())() == nil {
		t.Fatal("all has been read though scrub is off")
	}
	s := b.settings
	s.Scrub = 1 << 40
	b.Set(s)
	eventually(t, "everything to be read", read(b.clock.time()))
	eventually(t, "the cycle to end", until(func() bool { return !b.damage.lastScrub().IsZero() }))
	first := b.damage.lastScrub()

	b.clock.pass(6 * day)
	b.damage.rouse()
	b.restart()
	b.ready()
	s.Scrub = 1 << 40
	b.Set(s)
	eventually(t, "the cycle to end", until(func() bool { return !b.damage.lastScrub().IsZero() }))
	if read(b.clock.time())() == nil {
		t.Error("read again before a week had passed")
	}
	if first.IsZero() {
		t.Error("no time of the first")
	}
	b.clock.pass(2 * day)
	b.damage.rouse()
	eventually(t, "everything to be read again", read(b.clock.time().Add(-time.Second)))
}

// doubtful is a store that doubts one blob until it is vouched for.
type doubtful struct {
	storage.Store
	key     string
	mu      sync.Mutex
	opened  []string
	vouched bool
	opening func(key string) // may be nil
}

func (s *doubtful) describe(info storage.Info) storage.Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	info.Doubtful = info.Doubtful || info.Key == s.key && !s.vouched
	return info
}

func (s *doubtful) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	if s.opening != nil {
		s.opening(key)
	}
	r, info, err := s.Store.Open(ctx, key, offset, length)
	if strings.Contains(key, "/blobs/") {
		s.mu.Lock()
		s.opened = append(s.opened, key)
		s.mu.Unlock()
	}
	return r, s.describe(info), err
}

func (s *doubtful) Stat(ctx context.Context, key string) (storage.Info, error) {
	info, err := s.Store.Stat(ctx, key)
	return s.describe(info), err
}

func (s *doubtful) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	return func(yield func(storage.Info, error) bool) {
		for info, err := range s.Store.List(ctx, prefix, deep) {
			if !yield(s.describe(info), err) {
				return
			}
		}
	}
}

func (s *doubtful) Vouch(ctx context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key == s.key {
		s.vouched = true
	}
	return s.Store.Vouch(ctx, key)
}

// What a loss of power may have damaged is read first, and vouched for.
func TestScrubReadsDoubtfulFirst(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	for i := range 20 {
		b.blob("docker.io/a", content(i, 1000+i))
	}
	last := digest.FromBytes(content(7, 1007))
	b.kill()
	s := &doubtful{Store: b.disk(), key: layout.Blob(last)}
	if err := os.Remove(b.dir + "/catalog.db"); err != nil { // so that it is compared
		t.Fatal(err)
	}
	b.beginOn(s)
	b.ready()
	s.mu.Lock()
	s.opened = nil
	s.mu.Unlock()
	b.Set(Settings{Scrub: 1 << 40})
	eventually(t, "the doubtful blob to be vouched for", until(func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.vouched
	}))
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.opened) == 0 || s.opened[0] != s.key {
		t.Errorf("read were %q", s.opened)
	}
}

// A blob that was found to be wrong as it was served is looked at though scrub
// is off.
func TestSuspect(t *testing.T) {
	t.Parallel()
	b := keep(t)
	up := &upstream{b: b}
	up.gets(content(2, 100))
	b.ready()
	b.hooks.Heal = up.heal
	b.populate()
	b.flush()
	d := digest.FromBytes(content(2, 100))
	b.flip(d)
	b.Suspect(d)
	eventually(t, "it to be healed", until(func() bool { return b.holds(content(2, 100)) }))
	eventually(t, "an event", until(func() bool { return b.event("healed") != nil }))
}

// It reads no faster than it may, without bursts.
func TestScrubPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := New(nil, zap.NewNop())
		k.Set(Settings{Scrub: 1 << 20})
		s := &scrubber{Keeper: k}
		began := time.Now()
		for range 40 {
			if err := s.paced(t.Context(), 256<<10); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("10 MiB at 1 MiB/s took %v", took)
		}
		// What it did not use is lost.
		timer := time.NewTimer(time.Minute)
		<-timer.C
		began = time.Now()
		for range 4 {
			if err := s.paced(t.Context(), 256<<10); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("1 MiB took %v after a rest", took)
		}
		k.Set(Settings{})
		if err := s.paced(t.Context(), 1); !errors.Is(err, errScrubOff) {
			t.Errorf("off: %v", err)
		}
	})
}

// A scrub in the middle of a blob ends with the keeper.
func TestScrubEndsAtOnce(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	b.blob("docker.io/a", content(1, 1<<20))
	b.stop()
	reading := make(chan struct{})
	var once sync.Once
	b.beginOn(&doubtful{Store: b.disk(), opening: func(key string) {
		if strings.Contains(key, "/blobs/") {
			once.Do(func() { close(reading) })
		}
	}})
	b.ready()
	b.Set(Settings{Scrub: 1}) // twelve days for this one
	<-reading
	b.stop()
}

// A blob that the disk does not give is no reason to delete it, nor to stop.
type unreadable struct {
	storage.Store
	key string
}

func (s unreadable) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, info, err := s.Store.Open(ctx, key, offset, length)
	if err == nil && key == s.key {
		r.Close()
		return nil, info, errors.New("input/output error")
	}
	return r, info, err
}

func TestScrubUnreadable(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	for i := range 100 {
		b.blob("docker.io/a", content(i, 100+i))
	}
	d := digest.FromBytes(content(1, 101))
	b.stop()
	b.beginOn(unreadable{b.disk(), layout.Blob(d)})
	c := b.ready()
	b.clock.pass(time.Hour)
	if j := b.done(b.ScrubNow()); j.Removed != 0 {
		t.Errorf("job is %+v", j)
	}
	if !b.exists(layout.Blob(d)) {
		t.Error("it has been deleted")
	}
	b.flush()
	left, err := c.Unhashed(t.Context(), b.clock.time(), 10)
	if err != nil || len(left) != 1 || left[0].Digest != d {
		t.Errorf("not read: %v, %v", left, err)
	}
	if n := b.logged.FilterMessageSnippet("could not be read").Len(); n != 1 {
		t.Errorf("%d warnings", n)
	}
}
