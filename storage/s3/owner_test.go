package s3

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// A clock moves when it is told to.
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

// still opens a store whose marks are left by the test, by a clock of the test.
func still(t *testing.T, d *double, dir string, c *clock) *store {
	t.Helper()
	config, err := d.backend(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBucket(t.Context(), config.settings)
	if err != nil {
		t.Fatal(err)
	}
	s, err := openWith(t.Context(), config.near, b, config.settings, c.time,
		func(time.Duration) (<-chan time.Time, func()) { return nil, func() {} })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func beat(t *testing.T, stores ...*store) {
	t.Helper()
	for _, s := range stores {
		if err := s.beatOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func wantShared(t *testing.T, when string, s *store, want bool) {
	t.Helper()
	if s.Shared() != want {
		t.Errorf("%s: shared is %v", when, !want)
	}
}

func TestOwners(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	a := still(t, d, t.TempDir(), c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, data := blobOf("blob", 1000)
	mustPut(t, a, key, data, storage.Durable)
	mustPut(t, a, linkOf("a"), []byte("sha256:1"), storage.Durable)
	wantShared(t, "alone", a, false)

	b := still(t, d, t.TempDir(), c)
	wantShared(t, "the second, at once", b, true)
	wantShared(t, "the first, before its next beat", a, false)
	beat(t, a)
	wantShared(t, "the first", a, true)

	// What is new elsewhere is seen after two seconds, and asked for once in them.
	wantValue(t, b, linkOf("a"), []byte("sha256:1"))
	wantNothing(t, b, linkOf("b"))
	mustPut(t, a, linkOf("a"), []byte("sha256:2"), storage.Durable)
	mustPut(t, a, linkOf("b"), []byte("sha256:3"), storage.Durable)
	d.Forget()
	wantValue(t, b, linkOf("a"), []byte("sha256:1"))
	wantNothing(t, b, linkOf("b"))
	if calls := contentCalls(d); len(calls) > 0 {
		t.Errorf("within two seconds S3 was asked for %q", calls)
	}
	c.pass(anew)
	wantValue(t, b, linkOf("a"), []byte("sha256:2"))
	wantValue(t, b, linkOf("b"), []byte("sha256:3"))
	if err := a.Delete(t.Context(), linkOf("b")); err != nil {
		t.Fatal(err)
	}
	c.pass(anew)
	wantNothing(t, b, linkOf("b"))

	// A blob that has been seen stays what it is.
	wantValue(t, b, key, data)
	b.Drop(key)
	c.pass(anew)
	d.Forget()
	if _, err := b.Stat(t.Context(), key); err != nil {
		t.Error(err)
	}
	mustPut(t, b, key, data, storage.Durable)
	if calls := contentCalls(d); len(calls) > 0 {
		t.Errorf("for a blob that was seen S3 was asked for %q", calls)
	}

	// A mark that was overwritten is not gone.
	m, err := a.readMarks(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	delete(m.Owners, a.owner.node)
	if err := a.writeMarks(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	beat(t, b)
	wantShared(t, "without a mark", b, true)
	beat(t, a, b)
	wantShared(t, "with it again", b, true)

	// One that died is there until its beat has not changed for half a minute.
	mustPut(t, a, linkOf("last"), []byte("sha256:4"), storage.Durable)
	wantNothing(t, b, linkOf("other"))
	abandon(t, a)
	for range 5 {
		c.pass(beatEvery)
		beat(t, b)
		wantShared(t, "not dead yet", b, true)
	}
	c.pass(beatEvery)
	beat(t, b)
	wantShared(t, "dead", b, false)
	if err := b.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.Forget()
	wantValue(t, b, linkOf("last"), []byte("sha256:4"))
	wantNothing(t, b, linkOf("other"))
	wantNothing(t, b, linkOf("b"))
	if calls := contentCalls(d, s3double.HeadObject); len(calls) > 0 {
		t.Errorf("alone, S3 was asked for %q", calls)
	}

	// One that is closed takes its mark away.
	dir := t.TempDir()
	e := still(t, d, dir, c)
	beat(t, b)
	wantShared(t, "another", b, true)
	closed(t, e)
	for range missedRead - 1 {
		beat(t, b)
		wantShared(t, "closed lately", b, true)
	}
	beat(t, b)
	wantShared(t, "closed", b, false)
	if m, err := b.readMarks(t.Context()); err != nil || len(m.Owners) != 1 {
		t.Errorf("the marks are %+v, %v", m, err)
	}
	closed(t, b)
}

// TestCopiedDirectory: two with one name are two.
func TestCopiedDirectory(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	first := t.TempDir()
	a := still(t, d, first, c)
	second := t.TempDir()
	node := filepath.FromSlash(ownDir + "/node")
	name, err := os.ReadFile(filepath.Join(first, node))
	if err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(second, filepath.FromSlash(ownDir)), 0o700)
	if err := os.WriteFile(filepath.Join(second, node), name, 0o600); err != nil {
		t.Fatal(err)
	}
	b := still(t, d, second, c)
	beat(t, a, b)
	wantShared(t, "the first", a, true)
	wantShared(t, "the second", b, true)
	closed(t, a)
	closed(t, b)
}

// TestUnreachableOwner: one who could not look at the marks when it was opened looks
// as soon as it can.
func TestUnreachableOwner(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	a := still(t, d, dir, c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, linkOf("a"), []byte("sha256:1"), storage.Durable)
	closed(t, a)

	d.Write(linkOf("a"), []byte("sha256:2"))
	d.Write(linkOf("b"), []byte("sha256:2"))
	d.Write(ownerKey, []byte(`{"owners":{},"last":"another"}`))
	d.Down()
	a = still(t, d, dir, c)
	wantValue(t, a, linkOf("a"), []byte("sha256:1")) // for all that it can know
	wantNothing(t, a, linkOf("b"))
	d.Up(t)
	eventually(t, "a beat", func() error { return a.beatOnce(context.Background()) })
	wantValue(t, a, linkOf("a"), []byte("sha256:2"))
	wantValue(t, a, linkOf("b"), []byte("sha256:2"))
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantValue(t, a, linkOf("b"), []byte("sha256:2"))
	closed(t, a)
}

// TestOwnerMeanwhile: of one who comes and goes while the store cannot look, it hears
// as of any other.
func TestOwnerMeanwhile(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	a := still(t, d, t.TempDir(), c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, linkOf("moved"), []byte("sha256:1"), storage.Durable)
	mustPut(t, a, linkOf("deleted"), []byte("sha256:1"), storage.Durable)

	// Here a's beats come to nothing, for longer than it takes to be held for dead.
	b := still(t, d, t.TempDir(), c)
	for range 7 {
		c.pass(beatEvery)
		beat(t, b)
	}
	wantShared(t, "the second, when the first is silent", b, false)
	mustPut(t, b, linkOf("moved"), []byte("sha256:2"), storage.Durable)
	if err := b.Delete(t.Context(), linkOf("deleted")); err != nil {
		t.Fatal(err)
	}
	closed(t, b)

	beat(t, a)
	wantShared(t, "after the second has gone", a, true)
	wantValue(t, a, linkOf("moved"), []byte("sha256:2"))
	wantNothing(t, a, linkOf("deleted"))
	for range missedRead {
		beat(t, a)
	}
	wantShared(t, "later", a, false)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantValue(t, a, linkOf("moved"), []byte("sha256:2"))
	wantNothing(t, a, linkOf("deleted"))
	closed(t, a)
}

// TestPutAgain: that a value is in the bucket already is not taken from the index
// while another may have taken it away.
func TestPutAgain(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	a := still(t, d, t.TempDir(), c)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, data := linkOf("a"), []byte("sha256:1")
	mustPut(t, a, key, data, storage.Durable)
	d.Forget()
	mustPut(t, a, key, data, storage.Durable)
	if calls := contentCalls(d); len(calls) > 0 {
		t.Errorf("alone, S3 was asked for %q", calls)
	}

	b := still(t, d, t.TempDir(), c)
	beat(t, a)
	mustPut(t, a, key, data, storage.Durable)
	if err := b.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, key, data, storage.Durable)
	c.pass(anew)
	wantValue(t, a, key, data)
	wantValue(t, b, key, data)
	closed(t, b)
	closed(t, a)
}

// TestHopeless: what does not change by itself fails the start, and says what to do.
func TestHopeless(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	for _, c := range []struct {
		status     int
		code, says string
	}{
		{404, "NoSuchBucket", "correct its name"},
		{404, "XAdminUserNotFound", "check the credentials"},
		{403, "SignatureDoesNotMatch", "check the credentials"},
		{400, "AuthorizationHeaderMalformed", "correct the endpoint or the region"},
		{301, "PermanentRedirect", "correct the endpoint or the region"},
		{308, "", "correct the endpoint or the region"},
		{400, "InvalidBucketName", "correct its name"},
		{400, "InvalidToken", "check the credentials"},
		{403, "AccessDenied", "check the credentials"},
	} {
		end := d.Strike(s3double.Fault{Status: c.status, Code: c.code})
		s, err := d.open(t.TempDir())
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want something of %q", c.code, err, c.says)
		}
		end()
	}
}

// TestReload: settings that S3 refuses are not taken; that it is down is no matter.
func TestReload(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	defer closed(t, s)
	reload := func(change func(*S3)) error {
		t.Helper()
		d.change = change
		defer func() { d.change = nil }()
		config, err := d.backend(dir)
		if err != nil {
			t.Fatal(err)
		}
		return config.Configure(s)
	}
	mustPut(t, s, linkOf("a"), []byte("sha256:1"), storage.Durable)
	for name, change := range map[string]func(*S3){
		"a wrong secret": func(s *S3) { s.Credentials.Secret = "wrong" },
		"a wrong key":    func(s *S3) { s.Credentials.Key = "wrong" },
	} {
		if err := reload(change); err == nil || !strings.Contains(err.Error(), "check the credentials") || strings.Contains(err.Error(), "wrong") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := reload(func(s *S3) { s.Region = "elsewhere-1" }); err == nil || !strings.Contains(err.Error(), "region") {
		t.Errorf("a wrong region: %v", err)
	}
	mustPut(t, s, linkOf("b"), []byte("sha256:1"), storage.Durable) // with those it had
	d.Down()
	if err := reload(func(s *S3) { s.Credentials.Secret, s.CacheSize = "wrong", "1GiB" }); err != nil {
		t.Errorf("while S3 is down: %v", err)
	}
	d.Up(t)
	if err := reload(nil); err != nil {
		t.Errorf("with the right ones: %v", err)
	}
	mustPut(t, s, linkOf("c"), []byte("sha256:1"), storage.Durable)
	d.Strike(s3double.Fault{Op: s3double.GetObject, Key: ownerKey, Status: 403, Code: "AccessDenied"})
	if err := reload(func(s *S3) { s.CacheSize = "2GiB" }); err != nil {
		t.Errorf("with the same credentials, which are refused by now: %v", err)
	}
}

// TestSharedListing: while the bucket is shared it is listed each time, and what the
// store has done itself is seen whatever the listing lags.
func TestSharedListing(t *testing.T) {
	d := newDouble(t, s3double.Options{Page: 2}, nil)
	c := &clock{now: time.Now()}
	a, b := still(t, d, t.TempDir(), c), still(t, d, t.TempDir(), c)
	beat(t, a)
	wantShared(t, "the first", a, true)
	const links = "docker/registry/v2/repositories/some/where/_layers/sha256/"
	lists := func(when string, s *store, want ...string) {
		t.Helper()
		var deep, shallow, wantDeep, wantShallow []string
		for info, err := range s.List(t.Context(), links, true) {
			if err != nil {
				t.Fatal(err)
			}
			deep = append(deep, info.Key)
		}
		for info, err := range s.List(t.Context(), links, false) {
			if err != nil {
				t.Fatal(err)
			}
			shallow = append(shallow, info.Key)
		}
		for _, name := range want {
			wantDeep = append(wantDeep, linkOf(name))
			wantShallow = append(wantShallow, links+name+"/")
		}
		slices.Sort(deep)
		slices.Sort(shallow)
		if !slices.Equal(deep, wantDeep) || !slices.Equal(shallow, wantShallow) {
			t.Errorf("%s: %q and %q, want %q", when, deep, shallow, want)
		}
	}
	for _, name := range []string{"1", "2", "3"} {
		mustPut(t, a, linkOf(name), []byte("sha256:x"), storage.Durable)
	}
	d.Forget()
	lists("the first", a, "1", "2", "3")
	lists("the first again", a, "1", "2", "3")
	if n := d.Count(s3double.ListObjectsV2); n > 6 { // two listings, in pages of two
		t.Errorf("S3 was asked for %d pages", n)
	}
	lists("the second", b, "1", "2", "3")
	d.Set(func(q *s3double.Quirks) { q.LaggingList = true })
	if err := a.Delete(t.Context(), linkOf("1")); err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, linkOf("4"), []byte("sha256:x"), storage.Durable)
	lists("lagging", a, "2", "3", "4")
	// What the other has put back is there.
	mustPut(t, b, linkOf("1"), []byte("sha256:y"), storage.Durable)
	mustPut(t, b, linkOf("0"), []byte("sha256:y"), storage.Durable)
	d.CatchUp()
	lists("put back lately", a, "2", "3", "4")
	c.pass(anew)
	lists("put back", a, "0", "1", "2", "3", "4")
	let := make(chan struct{})
	d.Strike(s3double.Fault{Op: s3double.PutObject, Hold: let, Key: links})
	mustPut(t, a, linkOf("5"), []byte("sha256:x"), storage.Lazy)
	mustPut(t, a, linkOf("2"), []byte("sha256:z"), storage.Lazy)
	lists("pending", a, "0", "1", "2", "3", "4", "5")
	close(let)
	uploaded(t, a)
	lists("uploaded", a, "0", "1", "2", "3", "4", "5")
	closed(t, a)
	closed(t, b)
}

// TestNewcomer: another owner is seen between two beats, and looking for one leaves no
// mark.
func TestNewcomer(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	a := still(t, d, t.TempDir(), c)
	defer closed(t, a)
	beat(t, a)
	was, _ := d.Read(ownerKey)
	if a.newcomer(t.Context()) {
		t.Error("somebody is seen who is not there")
	}
	if is, _ := d.Read(ownerKey); string(is) != string(was) {
		t.Errorf("looking has changed the marks: %s, %s", was, is)
	}
	b := still(t, d, t.TempDir(), c)
	beat(t, b)
	if !a.newcomer(t.Context()) {
		t.Error("a newcomer is not seen")
	}
	beat(t, a)
	if a.newcomer(t.Context()) || !a.Shared() {
		t.Error("a newcomer stays one")
	}
	closed(t, b)
}

// TestOwnerGone: what another has changed is not believed from the moment on in which it
// counts as gone, and it is noticed when it has come and gone once more.
func TestOwnerGone(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	a := still(t, d, t.TempDir(), c)
	defer closed(t, a)
	if err := a.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustPut(t, a, linkOf("a"), []byte("sha256:1"), storage.Durable)
	dir := t.TempDir()
	b := still(t, d, dir, c)
	beat(t, a)
	mustPut(t, b, linkOf("a"), []byte("sha256:2"), storage.Durable)
	if err := a.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A process that follows this one while S3 is silent would believe it.
	if a.index.complete.Load() {
		t.Error("a listing beside another is taken for complete")
	}
	closed(t, b)
	a.listing.slot <- struct{}{} // the bucket is not listed yet
	for range missedRead {
		beat(t, a)
	}
	wantShared(t, "when the other has gone", a, false)
	wantValue(t, a, linkOf("a"), []byte("sha256:2"))
	<-a.listing.slot

	closed(t, still(t, d, dir, c))
	beat(t, a)
	wantShared(t, "when the other was there again", a, true)
}

// TestOwnerBeforeAndAfter: another that was the last before this one began, and has come
// and gone since, is noticed.
func TestOwnerBeforeAndAfter(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	c := &clock{now: time.Now()}
	dir := t.TempDir()
	closed(t, still(t, d, dir, c))
	a := still(t, d, t.TempDir(), c)
	defer closed(t, a)
	wantShared(t, "after the other", a, false)
	closed(t, still(t, d, dir, c))
	beat(t, a)
	wantShared(t, "when the other was there again", a, true)
}
