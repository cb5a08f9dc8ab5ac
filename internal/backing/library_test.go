package backing_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

var when = time.Unix(1_700_000_000, 0)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shelf is a process with a library.
type shelf struct {
	*backing.Library
	t      *testing.T
	dir    string
	store  storage.Store
	tree   *tree.Tree
	hosted *hosted.Registry
	fills  *fill.Table
	open   bool
	set    backing.Settings
	down   atomic.Bool // no record of a version can be written
	full   atomic.Bool // the budget has no room
	now    func() time.Time
}

// broken is a store that sometimes takes no record of a version.
type broken struct {
	storage.Store
	down *atomic.Bool
}

func (b broken) Put(ctx context.Context, key string, data []byte, d storage.Durability) error {
	if b.down.Load() && strings.Contains(key, "/versions/") {
		return storage.ErrUnavailable
	}
	return b.Store.Put(ctx, key, data, d)
}

// One that the store could not take is finished again, and nothing is seen of it before.
func TestFinishAgain(t *testing.T) {
	s := newShelf(t)
	u, err := s.Receive(t.Context(), backing.Draft{}, -1)
	if err != nil {
		t.Fatal(err)
	}
	u.Append(t.Context(), body(rawDisk(1)))
	s.down.Store(true)
	for range 2 {
		if _, _, err := u.Finish(t.Context(), backing.Draft{Name: "a", Tags: []string{"x"}}); !errors.Is(err, storage.ErrUnavailable) {
			t.Fatal(err)
		}
		if s.tagged("a", "x") != "" || s.tagged("a", "v1") != "" || len(s.left("mirror/local/backing-images/intents")) > 0 {
			t.Error("something is left")
		}
		if u, err = s.Upload(t.Context(), u.ID()); err != nil {
			t.Fatal(err)
		}
	}
	s.down.Store(false)
	v, created, err := u.Finish(t.Context(), backing.Draft{Name: "a", Tags: []string{"x"}})
	if err != nil || !created {
		t.Fatal(err)
	}
	s.reads(v, rawDisk(1))
	_, err = s.Upload(t.Context(), u.ID())
	is(t, err, backing.NotFound)
}

func newShelf(t *testing.T) *shelf {
	s := &shelf{t: t, dir: t.TempDir(), set: backing.Settings{Prefix: "images", Compat: backing.Enforce, Pull: backing.PullSettings{
		AllowPrivate: true, Proxy: func(*http.Request) (*url.URL, error) { return nil, nil },
	}}}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *shelf) start() {
	s.t.Helper()
	store := broken{disktest.Open(s.t, s.dir), &s.down}
	s.store, s.open = store, true
	s.tree = tree.New(store, nil)
	s.hosted = hosted.New(hosted.Parts{Store: store, Tree: s.tree, Log: zap.NewNop(), Quota: func(context.Context, string, int64) (func(), error) {
		if s.full.Load() {
			return nil, fmt.Errorf("images/** has no room: %w", hosted.ErrQuota)
		}
		return func() {}, nil
	}})
	s.fills = fill.NewTable(store, s.tree.LinkBlob, nil, nil)
	s.Library = backing.New(backing.Parts{Store: store, Tree: s.tree, Hosted: s.hosted, Fills: s.fills, Log: zap.NewNop()})
	if s.now != nil {
		s.Clock(s.now)
	}
	s.Set(s.set)
}

func (s *shelf) stop() {
	if s.open {
		s.open = false
		s.Close()
		s.fills.Close()
		s.hosted.Close()
		s.tree.Close()
		s.store.Close()
	}
}

func (s *shelf) restart() {
	s.t.Helper()
	s.stop()
	s.start()
}

// disk is a raw disk that no other seed makes.
func rawDisk(seed byte) []byte { return bytes.Repeat([]byte{seed, 1, 2, 3}, 1024) }

func body(data []byte) hosted.Body {
	return hosted.Body{Reader: bytes.NewReader(data), At: -1, Length: int64(len(data))}
}

func (s *shelf) upload(d backing.Draft, data []byte) (backing.Version, bool, error) {
	u, err := s.Receive(s.t.Context(), backing.Draft{}, -1)
	if err != nil {
		return backing.Version{}, false, err
	}
	if _, err := u.Append(s.t.Context(), body(data)); err != nil {
		return backing.Version{}, false, err
	}
	return u.Finish(s.t.Context(), d)
}

func (s *shelf) add(d backing.Draft, data []byte) backing.Version {
	s.t.Helper()
	v, created, err := s.upload(d, data)
	if err != nil || !created {
		s.t.Fatal(created, err)
	}
	s.reads(v, data)
	return v
}

func (s *shelf) reads(v backing.Version, data []byte) {
	s.t.Helper()
	found, err := s.Open(s.t.Context(), v)
	if err != nil {
		s.t.Fatal(err)
	}
	defer found.Close()
	var r io.Reader
	if err = found.Prepare(s.t.Context(), s.t.Context(), []oci.Span{{Length: v.Size}}, true); err == nil {
		r, err = found.Reader(0)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		s.t.Fatalf("%d bytes that are not those: %v", len(got), err)
	}
	file, err := s.File(s.t.Context(), v.Digests.SHA512, v.URLs.File[strings.LastIndex(v.URLs.File, "/")+1:])
	if err != nil || file.Version != v.Version || file.Name != v.Name {
		s.t.Fatalf("%+v: %v", file, err)
	}
}

func (s *shelf) version(name, reference string) backing.Version {
	s.t.Helper()
	v, err := s.Version(s.t.Context(), name, reference)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// tagged is what a tag of the repository means.
func (s *shelf) tagged(name, tag string) digest.Digest {
	d, err := s.tree.Tag(s.t.Context(), "images/"+name, tag)
	if err != nil {
		return ""
	}
	return d
}

func is(t *testing.T, err error, code backing.Code) *backing.Error {
	t.Helper()
	var told *backing.Error
	if !errors.As(err, &told) || told.Code != code {
		t.Fatalf("want %s: %v", code, err)
	}
	return told
}

// left are the files of a directory of the store.
func (s *shelf) left(dir string) []string {
	var names []string
	filepath.WalkDir(filepath.Join(s.dir, dir), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return nil
	})
	return names
}

func TestUploadBecomesVersion(t *testing.T) {
	s := newShelf(t)
	one, two := rawDisk(1), rawDisk(2)
	v := s.add(backing.Draft{Name: "ubuntu-24.04", Tags: []string{"stable"}, Labels: map[string]string{"os": "linux"}}, one)
	if v.Version != "v1" || v.State != backing.Ready || v.Format != "raw" || v.Size != 4096 ||
		v.Digests.SHA256 != digest.SHA256.FromBytes(one) || v.Digests.SHA512 != digest.SHA512.FromBytes(one) ||
		v.Labels["os"] != "linux" || len(v.Tags) != 1 || v.URLs.File != "/v1/files/"+digest.SHA512.FromBytes(one).Encoded()+"/ubuntu-24.04-v1.img" {
		t.Errorf("%+v", v)
	}
	if again, created, err := s.upload(backing.Draft{Name: "ubuntu-24.04", Tags: []string{"same"}}, one); err != nil || created || again.Version != "v1" || len(again.Tags) != 2 {
		t.Errorf("identical bytes: %+v, %v, %v", again, created, err)
	}
	s.add(backing.Draft{Name: "ubuntu-24.04", Version: "2026"}, two)
	_, _, err := s.upload(backing.Draft{Name: "ubuntu-24.04", Version: "2026"}, rawDisk(3))
	is(t, err, backing.VersionConflict)
	_, _, err = s.upload(backing.Draft{Name: "ubuntu-24.04", Version: "stable"}, rawDisk(3))
	is(t, err, backing.VersionConflict)
	for range 2 {
		if v := s.version("ubuntu-24.04", ""); v.Version != "2026" {
			t.Errorf("the last is %s", v.Version)
		}
		for _, reference := range []string{"v1", "stable", digest.SHA512.FromBytes(one).String(), digest.SHA256.FromBytes(one).String()} {
			s.reads(s.version("ubuntu-24.04", reference), one)
		}
		m, err := s.tree.Tagged(t.Context(), "images/ubuntu-24.04", "stable")
		if err != nil || !strings.Contains(string(m.Body), `"ubuntu-24.04-v1.img"`) || m.Digest != s.tagged("ubuntu-24.04", "v1") {
			t.Errorf("its manifest: %v", err)
		}
		s.restart()
	}
	if left := append(s.left("mirror/local/backing-images"), s.left("mirror/spool/uploads")...); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestRefused(t *testing.T) {
	s := newShelf(t)
	s.set.MaxImage = 8192
	s.Set(s.set)
	pack := func(n int) []byte {
		var b bytes.Buffer
		w, _ := zstd.NewWriter(&b)
		w.Write(make([]byte, n))
		w.Close()
		return b.Bytes()
	}
	qcow := make([]byte, 4096) // version 3, clusters of 64 KiB, and the name of another file
	copy(qcow, "QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x70\x00\x00\x00\x04\x00\x00\x00\x10")
	qcow[103], qcow[99] = 104, 4
	copy(qcow[0x70:], "base")
	for name, c := range map[string]struct {
		d    backing.Draft
		data []byte
		code backing.Code
	}{
		"checksum":   {backing.Draft{Name: "a", SHA256: digest.FromString("other")}, rawDisk(1), backing.ChecksumMismatch},
		"sha512":     {backing.Draft{Name: "a", SHA512: digest.SHA512.FromString("other")}, rawDisk(1), backing.ChecksumMismatch},
		"aligned":    {backing.Draft{Name: "a"}, []byte("short"), backing.NotAligned},
		"compressed": {backing.Draft{Name: "a"}, pack(4096), backing.Unsupported},
		"backed":     {backing.Draft{Name: "a"}, qcow, backing.BackingFile},
		"bomb":       {backing.Draft{Name: "a", Decompress: "auto"}, pack(8193), backing.TooLarge},
		"damaged":    {backing.Draft{Name: "a", Decompress: "zst"}, pack(4096)[:8], backing.Unsupported},
		"large":      {backing.Draft{Name: "a"}, make([]byte, 8193), backing.TooLarge},
		"name":       {backing.Draft{Name: "A"}, rawDisk(1), backing.Malformed},
		"long":       {backing.Draft{Name: strings.Repeat("a", 64)}, rawDisk(1), backing.Malformed},
		"label":      {backing.Draft{Name: "a", Labels: map[string]string{"a": strings.Repeat("a", 257)}}, rawDisk(1), backing.Malformed},
		"tag":        {backing.Draft{Name: "a", Tags: []string{"-"}}, rawDisk(1), backing.Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := s.upload(c.d, c.data)
			is(t, err, c.code)
			if u, err := s.Receive(t.Context(), backing.Draft{}, -1); err != nil {
				t.Error(err)
			} else if _, err := u.Append(t.Context(), hosted.Body{Reader: bytes.NewReader(make([]byte, 8193)), At: -1, Length: -1}); err == nil {
				t.Error("more than max_image came")
			}
			if _, err := s.Image(t.Context(), "a"); err == nil {
				t.Error("there is an image")
			}
		})
	}
	s.set.MaxImage = 0
	s.Set(s.set)
	data := bytes.Repeat([]byte{0}, 1<<20)
	v := s.add(backing.Draft{Name: "a"}, data)
	if again, created, err := s.upload(backing.Draft{Name: "a", Decompress: "auto", SHA256: digest.FromBytes(pack(1 << 20))}, pack(1<<20)); err != nil || created || again.Version != v.Version {
		t.Errorf("unpacked: %+v %v", again, err)
	}
	if again, created, err := s.upload(backing.Draft{Name: "b", Decompress: "auto"}, pack(1<<20)); err != nil || !created || again.Digests != v.Digests {
		t.Errorf("unpacked: %+v %v", again, err)
	}
}

// Uploads of one name at the same time get versions of their own, or one the conflict.
func TestUploadsAtOnce(t *testing.T) {
	s := newShelf(t)
	for _, fixed := range []string{"", "release"} {
		var wait sync.WaitGroup
		var mu sync.Mutex
		got, conflicts := map[string]byte{}, 0
		for n := range byte(8) {
			wait.Go(func() {
				v, _, err := s.upload(backing.Draft{Name: "a" + fixed, Version: fixed, Tags: []string{"newest"}}, rawDisk(n))
				mu.Lock()
				defer mu.Unlock()
				var told *backing.Error
				switch {
				case err == nil:
					if _, twice := got[v.Version]; twice {
						t.Errorf("%s twice", v.Version)
					}
					got[v.Version] = n
				case fixed != "" && errors.As(err, &told) && told.Code == backing.VersionConflict:
					conflicts++
				default:
					t.Error(err)
				}
			})
		}
		wait.Wait()
		if fixed == "" && len(got) != 8 || fixed != "" && (len(got) != 1 || conflicts != 7) {
			t.Errorf("%v, %d conflicts", got, conflicts)
		}
		for v, n := range got {
			s.reads(s.version("a"+fixed, v), rawDisk(n))
		}
	}
}

func TestTags(t *testing.T) {
	s := newShelf(t)
	for n := range byte(3) {
		s.add(backing.Draft{Name: "a"}, rawDisk(n))
	}
	i, _ := s.Image(t.Context(), "a")
	if _, err := s.SetTag(t.Context(), "a", "latest", "v1", i.Revision); err != nil {
		t.Fatal(err)
	}
	_, err := s.SetTag(t.Context(), "a", "latest", "v2", i.Revision)
	is(t, err, backing.PreconditionFail)
	if v := s.version("a", ""); v.Version != "v1" {
		t.Errorf("latest is %s", v.Version)
	}
	_, err = s.SetTag(t.Context(), "a", "v2", "v1", "")
	is(t, err, backing.VersionConflict)
	for n := range 110 {
		if _, err := s.SetTag(t.Context(), "a", "latest", fmt.Sprintf("v%d", n%2+2), ""); err != nil {
			t.Fatal(err)
		}
	}
	s.restart()
	i, err = s.Image(t.Context(), "a")
	if tag := i.Tags["latest"]; err != nil || tag.Version != "v3" || len(tag.History) != 100 || tag.History[0].Version != "v2" {
		t.Errorf("%d %v", len(tag.History), err)
	}
	if s.tagged("a", "latest") != s.tagged("a", "v3") {
		t.Error("the repository's tag is another")
	}
	is(t, s.RemoveTag(t.Context(), "a", "latest", "other"), backing.PreconditionFail)
	if err := s.RemoveTag(t.Context(), "a", "latest", i.Revision); err != nil || s.tagged("a", "latest") != "" {
		t.Errorf("%v", err)
	}
	is(t, s.RemoveTag(t.Context(), "a", "latest", ""), backing.NotFound)
}

func TestDelete(t *testing.T) {
	s := newShelf(t)
	s.add(backing.Draft{Name: "a", Tags: []string{"stable"}}, rawDisk(1))
	two := s.add(backing.Draft{Name: "a"}, rawDisk(2))
	told := is(t, s.Delete(t.Context(), "a", "v1", "", false), backing.InUse)
	if len(told.Blockers) != 1 || told.Blockers[0] != (backing.Blocker{Kind: "tag", Name: "stable"}) {
		t.Errorf("%+v", told.Blockers)
	}
	yes, no := true, false
	if _, err := s.Edit(t.Context(), "a", "", backing.Edit{Protected: &yes}); err != nil {
		t.Fatal(err)
	}
	is(t, s.Delete(t.Context(), "a", "v2", "", false), backing.InUse)
	i, err := s.Edit(t.Context(), "a", "", backing.Edit{Protected: &no})
	if err != nil {
		t.Fatal(err)
	}
	is(t, s.Delete(t.Context(), "a", "v2", "other", false), backing.PreconditionFail)
	if err := s.Delete(t.Context(), "a", "v2", i.Revision, false); err != nil {
		t.Fatal(err)
	}
	if s.tagged("a", "v2") != "" {
		t.Error("it has its tag")
	}
	if _, err := s.File(t.Context(), two.Digests.SHA512, "a-v2.img"); err == nil {
		t.Error("its file can be had")
	}
	s.restart()
	if v := s.add(backing.Draft{Name: "a"}, rawDisk(2)); v.Version != "v3" {
		t.Errorf("the name %s was given before", v.Version)
	}
	if err := s.Delete(t.Context(), "a", "", "", false); err != nil {
		t.Fatal(err)
	}
	s.restart()
	if images, _, err := s.Images(t.Context(), backing.Query{}); err != nil || len(images) > 0 {
		t.Errorf("%+v, %v", images, err)
	}
	if left := s.left("mirror/records/backing-images"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestEditAndTokens(t *testing.T) {
	s := newShelf(t)
	s.add(backing.Draft{Name: "a", Labels: map[string]string{"os": "bsd", "x": "y"}}, rawDisk(1))
	s.add(backing.Draft{Name: "b"}, rawDisk(1))
	i, err := s.Edit(t.Context(), "a", "", backing.Edit{Labels: map[string]string{"x": "", "z": "1"}})
	if err != nil || len(i.Labels) != 2 || i.Labels["z"] != "1" {
		t.Fatal(i.Labels, err)
	}
	token, err := s.AddToken(t.Context(), "a", "for Longhorn", "me")
	if err != nil || len(token.Token) != 43 {
		t.Fatal(token, err)
	}
	// Whoever changes the image on condition does not see its tokens.
	if now, err := s.Image(t.Context(), "a"); err != nil || now.Revision != i.Revision {
		t.Error(now.Revision, i.Revision, err)
	}
	s.restart()
	if name, err := s.Token(t.Context(), token.Token); err != nil || name != "a" {
		t.Error(name, err)
	}
	if all, err := s.Tokens(t.Context(), "a"); err != nil || len(all) != 1 || all[0].Token != "" || all[0].Note != "for Longhorn" {
		t.Error(all, err)
	}
	for label, want := range map[string]int{"": 2, "os": 1, "os=bsd": 1, "os=x": 0} {
		if images, _, err := s.Images(t.Context(), backing.Query{Label: label}); err != nil || len(images) != want {
			t.Error(label, images, err)
		}
	}
	if images, next, err := s.Images(t.Context(), backing.Query{Limit: 1}); err != nil || next != "a" || len(images) != 1 {
		t.Error(next, err)
	}
	if err := s.RemoveToken(t.Context(), "a", token.ID, false); err != nil {
		t.Fatal(err)
	}
	_, err = s.Token(t.Context(), token.Token)
	is(t, err, backing.NotFound)
}

// A record that another program wrote, or that is damaged, is told of and left alone.
func TestForeignRecords(t *testing.T) {
	s := newShelf(t)
	for _, name := range []string{"newer", "damaged", "whole", "bytes"} {
		s.add(backing.Draft{Name: name}, rawDisk(name[0]))
	}
	put := func(key, text string) {
		if err := s.store.Put(t.Context(), key, []byte(text), storage.Durable); err != nil {
			t.Fatal(err)
		}
	}
	put(layout.Image("newer"), `{"schema":2,"name":"newer"}`)
	put(layout.ImageVersion("damaged", "v1"), `{`)
	gone := s.version("bytes", "")
	if err := s.store.Delete(t.Context(), layout.Blob(gone.Digests.SHA256)); err != nil {
		t.Fatal(err)
	}
	s.restart()
	if i, err := s.Image(t.Context(), "newer"); err != nil || i.Error == "" {
		t.Errorf("%+v, %v", i, err)
	}
	_, err := s.Edit(t.Context(), "newer", "", backing.Edit{Labels: map[string]string{"a": "b"}})
	is(t, err, backing.Exists)
	_, _, err = s.upload(backing.Draft{Name: "newer"}, rawDisk(9))
	is(t, err, backing.Exists)
	if v := s.version("damaged", "v1"); v.State != backing.Failed || v.Error == "" {
		t.Errorf("%+v", v)
	}
	_, _, err = s.upload(backing.Draft{Name: "damaged", Version: "v1"}, rawDisk(9))
	is(t, err, backing.VersionConflict)
	if v := s.version("bytes", "v1"); v.State != backing.Failed || v.Error == "" {
		t.Errorf("%+v", v)
	}
	if v, _, err := s.upload(backing.Draft{Name: "bytes"}, rawDisk('b')); err != nil || v.Version != "v1" || v.State != backing.Ready {
		t.Errorf("uploaded again: %+v, %v", v, err)
	}
	s.reads(s.version("bytes", "v1"), rawDisk('b'))
	if data, err := s.store.Get(t.Context(), layout.Image("newer"), 1000); err != nil || string(data) != `{"schema":2,"name":"newer"}` {
		t.Errorf("%s %v", data, err)
	}
	if data, err := s.store.Get(t.Context(), layout.ImageVersion("damaged", "v1"), 1000); err != nil || string(data) != `{` {
		t.Errorf("%s %v", data, err)
	}
}

// An upload goes on in the next process, with its draft.
func TestUploadSurvives(t *testing.T) {
	s := newShelf(t)
	data := rawDisk(5)
	u, err := s.Receive(t.Context(), backing.Draft{Name: "a", Labels: map[string]string{"a": "b"}}, 4096)
	if err != nil {
		t.Fatal(err)
	}
	u.Append(t.Context(), body(data[:1000]))
	s.restart()
	id := u.ID()
	if u, err = s.Upload(t.Context(), id); err != nil || u.Offset() != 1000 || u.Size() != 4096 || u.Draft().Labels["a"] != "b" {
		t.Fatal(err)
	}
	_, _, err = u.Finish(t.Context(), u.Draft())
	is(t, err, backing.Malformed)
	if _, err := u.Append(t.Context(), body(make([]byte, 4000))); err == nil {
		t.Error("more than was announced")
	}
	u.Append(t.Context(), body(data[1000:]))
	if v, _, err := u.Finish(t.Context(), u.Draft()); err != nil || v.Labels["a"] != "b" {
		t.Fatal(v, err)
	}
	_, err = s.Upload(t.Context(), id)
	is(t, err, backing.NotFound)
}

func (s *shelf) ends(id string) backing.Job {
	s.t.Helper()
	var last backing.Job
	for j, err := range s.WatchJob(s.t.Context(), id) {
		if err != nil {
			s.t.Fatal(err)
		}
		last = j
	}
	return last
}

func TestPull(t *testing.T) {
	s := newShelf(t)
	data := bytes.Repeat(rawDisk(7), 512)
	var b bytes.Buffer
	w, _ := zstd.NewWriter(&b)
	w.Write(data)
	w.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Key") != "hidden" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		send := data
		if strings.HasSuffix(r.URL.Path, ".zst") {
			send = b.Bytes()
		}
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "", when, bytes.NewReader(send))
	}))
	defer server.Close()
	from := backing.Source{URL: server.URL + "/disk?sig=hidden", Headers: map[string]string{"X-Key": "hidden"}}
	j, err := s.Pull(t.Context(), backing.Draft{Name: "a", Tags: []string{"latest"}}, from)
	if err != nil {
		t.Fatal(err)
	}
	if end := s.ends(j.ID); end.State != backing.Succeeded || end.Progress.Received != int64(len(data)) {
		t.Fatalf("%+v", end)
	}
	s.reads(s.version("a", "latest"), data)
	from.URL = server.URL + "/disk.zst"
	if j, err = s.Pull(t.Context(), backing.Draft{Name: "b", Decompress: "auto"}, from); err != nil {
		t.Fatal(err)
	}
	if end := s.ends(j.ID); end.State != backing.Succeeded {
		t.Fatalf("%+v", end)
	}
	s.reads(s.version("b", "v1"), data)
	for name, c := range map[string]struct {
		d    backing.Draft
		s    backing.Source
		code backing.Code
	}{
		"forbidden": {backing.Draft{Name: "c"}, backing.Source{URL: server.URL + "/disk"}, backing.UpstreamError},
		"checksum":  {backing.Draft{Name: "c", SHA512: digest.SHA512.FromString("x")}, from, backing.ChecksumMismatch},
		"refused":   {backing.Draft{Name: "c"}, from, backing.Unsupported},
	} {
		if j, err = s.Pull(t.Context(), c.d, c.s); err != nil {
			t.Fatal(err)
		}
		if end := s.ends(j.ID); end.State != backing.JobFailed || end.Code != c.code {
			t.Errorf("%s: %+v", name, end)
		}
	}
	s.restart()
	tick := time.NewTicker(10 * time.Millisecond) // jobs are read behind whoever asks
	defer tick.Stop()
	for {
		jobs, err := s.Jobs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(jobs) == 5 {
			break
		}
		<-tick.C
	}
	for _, file := range append(s.left("mirror/records"), s.left("mirror/local/backing-images")...) {
		if text, err := os.ReadFile(file); err != nil || strings.Contains(string(text), "hidden") {
			t.Errorf("a secret is in %s: %v", file, err)
		}
	}
}

// A pull goes on in the next process, and can be cancelled.
func TestPullSurvives(t *testing.T) {
	s := newShelf(t)
	data, held, asked := rawDisk(8), make(chan struct{}), make(chan struct{}, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-held:
		case <-r.Context().Done():
			return
		}
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "", when, bytes.NewReader(data))
	}))
	defer server.Close()
	a, err := s.Pull(t.Context(), backing.Draft{Name: "a"}, backing.Source{URL: server.URL + "/disk"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Pull(t.Context(), backing.Draft{Name: "b"}, backing.Source{URL: server.URL + "/disk", Token: "hidden"})
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	if v := s.version("a", "v1"); v.State != backing.Fetching || v.Job != a.ID {
		t.Errorf("%+v", v)
	}
	told := is(t, s.Delete(t.Context(), "a", "v1", "", false), backing.InUse)
	if told.Blockers[0].Kind != "job" {
		t.Errorf("%+v", told.Blockers)
	}
	if err := s.CancelJob(t.Context(), b.ID); err != nil {
		t.Fatal(err)
	}
	if end := s.ends(b.ID); end.State != backing.Cancelled {
		t.Errorf("%+v", end)
	}
	s.restart()
	close(held)
	for {
		if _, err := s.Job(t.Context(), a.ID); err == nil {
			break
		}
		if t.Context().Err() != nil {
			t.Fatal("it is not there")
		}
		<-time.After(10 * time.Millisecond)
	}
	if end := s.ends(a.ID); end.State != backing.Succeeded {
		t.Fatalf("%+v", end)
	}
	s.reads(s.version("a", "v1"), data)
}
