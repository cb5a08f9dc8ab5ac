// Package storagetest holds the one suite that every [storage.Store] passes.
package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-registry/mirror/storage"
)

// Test runs the suite. open returns an empty store, which the suite closes.
func Test(t *testing.T, open func(t *testing.T) storage.Store) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s storage.Store)
	}{
		{"Absent", testAbsent},
		{"PutGetOpen", testPutGetOpen},
		{"Spans", testSpans},
		{"Limit", testLimit},
		{"Replace", testReplace},
		{"Spool", testSpool},
		{"PutFile", testPutFile},
		{"Vouch", testVouch},
		{"Sync", testSync},
		{"SyncBesideDelete", testSyncBesideDelete},
		{"OpenSurvivesDelete", testOpenSurvivesDelete},
		{"List", testList},
		{"BadKeys", testBadKeys},
		{"ConcurrentPuts", testConcurrentPuts},
		{"EmptyDirectories", testEmptyDirectories},
		{"PutBesideDelete", testPutBesideDelete},
		{"Reserve", testReserve},
		{"Prefixes", testPrefixes},
		{"Files", testFiles},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t)
			defer func() {
				if err := s.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}()
			c.run(t, s)
		})
	}
}

func put(t *testing.T, s storage.Store, key, value string) {
	t.Helper()
	if err := s.Put(context.Background(), key, []byte(value), storage.Lazy); err != nil {
		t.Fatalf("Put %s: %v", key, err)
	}
}

func get(t *testing.T, s storage.Store, key string) string {
	t.Helper()
	data, err := s.Get(context.Background(), key, 1<<20)
	if err != nil {
		t.Fatalf("Get %s: %v", key, err)
	}
	return string(data)
}

func wantAbsent(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: got %v, want fs.ErrNotExist", what, err)
	}
}

func testAbsent(t *testing.T, s storage.Store) {
	ctx := context.Background()
	put(t, s, "dir/value", "x")
	for _, key := range []string{"none", "dir", "dir/none", "dir/none/deeper", "dir/value/below"} {
		_, err := s.Stat(ctx, key)
		wantAbsent(t, "Stat "+key, err)
		_, err = s.Get(ctx, key, 10)
		wantAbsent(t, "Get "+key, err)
		_, _, err = s.Open(ctx, key, 0, -1)
		wantAbsent(t, "Open "+key, err)
		if err := s.Delete(ctx, key); err != nil {
			t.Errorf("Delete of absent %s: %v", key, err)
		}
	}
	if got := get(t, s, "dir/value"); got != "x" {
		t.Errorf("dir/value is %q after deleting its neighbours", got)
	}
}

func testPutGetOpen(t *testing.T, s storage.Store) {
	ctx := context.Background()
	for _, d := range []storage.Durability{storage.Lazy, storage.Durable} {
		for _, value := range []string{"", "a", strings.Repeat("0123456789", 100_000)} {
			key := fmt.Sprintf("deep/er/%d/%d", d, len(value))
			if err := s.Put(ctx, key, []byte(value), d); err != nil {
				t.Fatal(err)
			}
			if got := get(t, s, key); got != value {
				t.Errorf("%s: got %d bytes back, want %d", key, len(got), len(value))
			}
			info, err := s.Stat(ctx, key)
			if err != nil || info.Size != int64(len(value)) || info.Key != key || info.ModTime.IsZero() {
				t.Errorf("Stat %s: %+v, %v", key, info, err)
			}
			if err := s.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
			_, err = s.Stat(ctx, key)
			wantAbsent(t, "Stat after Delete", err)
		}
	}
}

func testSpans(t *testing.T, s storage.Store) {
	ctx := context.Background()
	put(t, s, "v", "0123456789")
	for _, c := range []struct {
		offset, length int64
		want           string
		bad            bool
	}{
		{0, -1, "0123456789", false},
		{4, -1, "456789", false},
		{10, -1, "", false},
		{0, 10, "0123456789", false},
		{3, 4, "3456", false},
		{9, 1, "9", false},
		{5, 0, "", false},
		{11, -1, "", true},
		{8, 3, "", true},
		{-1, 3, "", true},
	} {
		r, info, err := s.Open(ctx, "v", c.offset, c.length)
		if c.bad {
			if err == nil {
				r.Close()
				t.Errorf("Open(%d, %d) succeeded", c.offset, c.length)
			} else if errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Open(%d, %d): a bad span is not an absent key", c.offset, c.length)
			}
			continue
		}
		if err != nil {
			t.Errorf("Open(%d, %d): %v", c.offset, c.length, err)
			continue
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil || string(got) != c.want || info.Size != 10 {
			t.Errorf("Open(%d, %d) = %q of %d, %v; want %q", c.offset, c.length, got, info.Size, err, c.want)
		}
	}
}

func testLimit(t *testing.T, s storage.Store) {
	put(t, s, "v", "0123456789")
	if _, err := s.Get(context.Background(), "v", 10); err != nil {
		t.Errorf("Get at the limit: %v", err)
	}
	if _, err := s.Get(context.Background(), "v", 9); !errors.Is(err, storage.ErrTooLarge) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get over the limit: %v", err)
	}
}

func testReplace(t *testing.T, s storage.Store) {
	put(t, s, "link", "old, and longer")
	r, _, err := s.Open(context.Background(), "link", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	put(t, s, "link", "new")
	if got := get(t, s, "link"); got != "new" {
		t.Errorf("got %q after replacing", got)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "old, and longer" {
		t.Errorf("a reader from before sees %q, %v", got, err)
	}
}

func spool(t *testing.T, s storage.Store, name string) string {
	t.Helper()
	dir, err := s.Spool(name)
	if err != nil {
		t.Fatalf("Spool %s: %v", name, err)
	}
	return dir
}

func testSpool(t *testing.T, s storage.Store) {
	file := filepath.Join(spool(t, s, "one"), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if other := spool(t, s, "two"); other == filepath.Dir(file) {
		t.Errorf("two names have one directory, %s", other)
	}
	if again := spool(t, s, "one"); again != filepath.Dir(file) {
		t.Errorf("one is %s, and was %s", again, filepath.Dir(file))
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("what was in the spool: %v", err)
	}
	for _, name := range []string{"", ".", "..", "a/b", "/a", "a/", "../a", "1", "4711-1", ".a", "nul\x00"} {
		if dir, err := s.Spool(name); err == nil {
			t.Errorf("Spool(%q) is %s", name, dir)
		}
	}
}

// testVouch cannot lose power. It holds a store to what is so without.
func testVouch(t *testing.T, s storage.Store) {
	ctx := context.Background()
	put(t, s, "dir/v", "0123456789")
	for range 2 {
		info, err := s.Stat(ctx, "dir/v")
		if err != nil || info.Doubtful {
			t.Errorf("Stat: %+v, %v", info, err)
		}
		r, info, err := s.Open(ctx, "dir/v", 0, -1)
		if err != nil || info.Doubtful {
			t.Fatalf("Open: %+v, %v", info, err)
		}
		r.Close()
		for info, err := range s.List(ctx, "dir/", true) {
			if err != nil || info.Doubtful {
				t.Errorf("List: %+v, %v", info, err)
			}
		}
		if err := s.Vouch(ctx, "dir/v"); err != nil {
			t.Errorf("Vouch: %v", err)
		}
		if got := get(t, s, "dir/v"); got != "0123456789" {
			t.Errorf("%q after Vouch", got)
		}
	}
	wantAbsent(t, "Vouch of nothing", s.Vouch(ctx, "dir/none"))
	wantAbsent(t, "Vouch of a directory", s.Vouch(ctx, "dir"))
}

func testSync(t *testing.T, s storage.Store) {
	ctx := context.Background()
	if err := s.Sync(ctx); err != nil {
		t.Errorf("Sync of nothing: %v", err)
	}
	keys := []string{"v", "dir/v", "dir/w", "dir/deep/er/v"}
	for range 2 {
		for _, key := range keys {
			put(t, s, key, key)
		}
		// Absence is no error, nor is syncing twice.
		all := append(keys, "dir/none", "none/at/all", "dir/v/below", "dir", "dir/v")
		for range 2 {
			if err := s.Sync(ctx, all...); err != nil {
				t.Fatalf("Sync: %v", err)
			}
		}
		for _, key := range keys {
			if got := get(t, s, key); got != key {
				t.Errorf("%s is %q after Sync", key, got)
			}
			if err := s.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Sync(ctx, keys...); err != nil {
			t.Fatalf("Sync after Delete: %v", err)
		}
		if top := shallow(t, s, ""); slices.Contains(top, "dir/") || slices.Contains(top, "v") {
			t.Errorf("Sync made something: %q", top)
		}
	}
}

// testSyncBesideDelete syncs values in directories that come and go.
func testSyncBesideDelete(t *testing.T, s storage.Store) {
	ctx := context.Background()
	var wg sync.WaitGroup
	for i := range 4 {
		key, other := fmt.Sprintf("one/way/down/%d/value", i), fmt.Sprintf("one/way/down/%d/value", (i+1)%4)
		wg.Go(func() {
			for range 50 {
				put(t, s, key, "x")
				if err := s.Sync(ctx, key, other); err != nil {
					t.Errorf("Sync beside Delete: %v", err)
					return
				}
				if _, err := s.Get(ctx, key, 10); err != nil {
					t.Errorf("Get after Sync: %v", err)
					return
				}
				if err := s.Delete(ctx, key); err != nil {
					t.Errorf("Delete: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func testPutFile(t *testing.T, s storage.Store) {
	ctx := context.Background()
	fills := spool(t, s, "fills")
	for _, dir := range []string{fills, t.TempDir()} {
		for _, d := range []storage.Durability{storage.Lazy, storage.Durable} {
			path := filepath.Join(dir, fmt.Sprint("file", d))
			content := bytes.Repeat([]byte("spooled "), 10_000)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := s.PutFile(ctx, "a/b/c", path, d); err != nil {
				t.Fatal(err)
			}
			if got := get(t, s, "a/b/c"); got != string(content) {
				t.Errorf("got %d bytes, want %d", len(got), len(content))
			}
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the file is still there: %v", err)
			}
		}
	}
	if err := s.PutFile(ctx, "a/b/d", filepath.Join(fills, "none"), storage.Lazy); err == nil {
		t.Error("PutFile of a file that does not exist succeeded")
	}
	_, err := s.Stat(ctx, "a/b/d")
	wantAbsent(t, "after a failed PutFile", err)
}

func testOpenSurvivesDelete(t *testing.T, s storage.Store) {
	ctx := context.Background()
	value := strings.Repeat("still here ", 50_000)
	put(t, s, "v", value)
	r, _, err := s.Open(ctx, "v", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := s.Delete(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != value {
		t.Errorf("read %d bytes of %d after Delete, %v", len(got), len(value), err)
	}
}

func testList(t *testing.T, s storage.Store) {
	for _, key := range []string{"a/1", "a/2", "a/b/3", "a/b/c/4", "a-b/5", "z"} {
		put(t, s, key, key)
	}
	for _, c := range []struct {
		prefix string
		deep   bool
		want   []string
	}{
		{"a/", true, []string{"a/1", "a/2", "a/b/3", "a/b/c/4"}},
		{"a/", false, []string{"a/1", "a/2", "a/b/"}},
		{"a/b/", false, []string{"a/b/3", "a/b/c/"}},
		{"none/", true, nil},
		{"none/", false, nil},
		{"z/", false, nil},
	} {
		var got []string
		for info, err := range s.List(context.Background(), c.prefix, c.deep) {
			if err != nil {
				t.Fatalf("List %s: %v", c.prefix, err)
			}
			if !strings.HasSuffix(info.Key, "/") && info.Size != int64(len(info.Key)) {
				t.Errorf("List says %s has %d bytes", info.Key, info.Size)
			}
			got = append(got, info.Key)
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("List(%q, deep=%v) = %q, want %q", c.prefix, c.deep, got, c.want)
		}
	}
	for range s.List(context.Background(), "a/", true) {
		break // an early end is no error
	}
	for _, err := range s.List(context.Background(), "a", false) {
		if err == nil {
			t.Error("a prefix without a slash was accepted")
		}
	}
}

func testBadKeys(t *testing.T, s storage.Store) {
	ctx := context.Background()
	for _, key := range []string{"", ".", "..", "/abs", "a//b", "a/../b", "../up", "a/", "a/./b", "nul\x00", strings.Repeat("k", 2000)} {
		if err := s.Put(ctx, key, nil, storage.Lazy); err == nil {
			t.Errorf("Put %.40q succeeded", key)
		}
		if _, err := s.Get(ctx, key, 10); err == nil {
			t.Errorf("Get %.40q succeeded", key)
		}
		if err := s.Delete(ctx, key); err == nil {
			t.Errorf("Delete %.40q succeeded", key)
		}
		if err := s.Vouch(ctx, key); err == nil {
			t.Errorf("Vouch %.40q succeeded", key)
		}
		if err := s.Sync(ctx, "good", key); err == nil {
			t.Errorf("Sync %.40q succeeded", key)
		}
	}
}

func testConcurrentPuts(t *testing.T, s storage.Store) {
	values := make([]string, 8)
	for i := range values {
		values[i] = strings.Repeat(fmt.Sprint(i), 100_000)
	}
	var wg sync.WaitGroup
	for _, v := range values {
		wg.Go(func() {
			for range 10 {
				if err := s.Put(context.Background(), "new/dir/same", []byte(v), storage.Lazy); err != nil {
					t.Error(err)
				}
				got, err := s.Get(context.Background(), "new/dir/same", 1<<20)
				if err != nil || !slices.Contains(values, string(got)) {
					t.Errorf("read a mixture of %d bytes, %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
}

func shallow(t *testing.T, s storage.Store, prefix string) (keys []string) {
	t.Helper()
	for info, err := range s.List(context.Background(), prefix, false) {
		if err != nil {
			t.Fatalf("List %s: %v", prefix, err)
		}
		keys = append(keys, info.Key)
	}
	slices.Sort(keys)
	return keys
}

func testEmptyDirectories(t *testing.T, s storage.Store) {
	ctx := context.Background()
	for _, key := range []string{"a/b/c/d", "a/b/e", "a/f"} {
		put(t, s, key, "x")
	}
	for _, step := range []struct {
		delete string
		below  map[string][]string
	}{
		{"a/b/none", map[string][]string{"a/": {"a/b/", "a/f"}, "a/b/": {"a/b/c/", "a/b/e"}}},
		{"a/b/c/d", map[string][]string{"a/": {"a/b/", "a/f"}, "a/b/": {"a/b/e"}, "a/b/c/": nil}},
		{"a/b/e", map[string][]string{"a/": {"a/f"}}},
	} {
		if err := s.Delete(ctx, step.delete); err != nil {
			t.Fatal(err)
		}
		for prefix, want := range step.below {
			if got := shallow(t, s, prefix); !slices.Equal(got, want) {
				t.Errorf("without %s there is %q below %s, want %q", step.delete, got, prefix, want)
			}
		}
	}
	if err := s.Delete(ctx, "a/f"); err != nil {
		t.Fatal(err)
	}
	if top := shallow(t, s, ""); slices.Contains(top, "a/") {
		t.Errorf("an empty directory is left: %q", top)
	}
	put(t, s, "a/b/c/d", "again")
	if got := get(t, s, "a/b/c/d"); got != "again" {
		t.Errorf("%q", got)
	}
}

// testPutBesideDelete puts values into directories that lose their last value at
// the same time.
func testPutBesideDelete(t *testing.T, s storage.Store) {
	ctx := context.Background()
	var wg sync.WaitGroup
	for i := range 4 {
		key := fmt.Sprintf("one/way/down/%d/value", i)
		durability := storage.Lazy
		if i == 0 {
			durability = storage.Durable
		}
		wg.Go(func() {
			for range 100 {
				if err := s.Put(ctx, key, []byte("x"), durability); err != nil {
					t.Errorf("Put beside Delete: %v", err)
					return
				}
				if _, err := s.Get(ctx, key, 10); err != nil {
					t.Errorf("Get after Put beside Delete: %v", err)
					return
				}
				if err := s.Delete(ctx, key); err != nil {
					t.Errorf("Delete: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	if top := shallow(t, s, ""); slices.Contains(top, "one/") {
		t.Errorf("an empty directory is left: %q", top)
	}
}

func testReserve(t *testing.T, s storage.Store) {
	r, err := s.Reserve(1 << 10)
	if err != nil {
		t.Fatal(err)
	}
	r.Use(1 << 9)
	r.Release()
	r.Release()
	if r, err := s.Reserve(1 << 60); err == nil {
		r.Release()
		t.Error("an exabyte was set aside")
	} else if !errors.Is(err, storage.ErrFull) {
		t.Errorf("want ErrFull, got %v", err)
	}
}

// testPrefixes holds keys with a meaning to behaving as others do. The listings of
// distant places may lag.
func testPrefixes(t *testing.T, s storage.Store) {
	ctx := context.Background()
	for _, prefix := range []string{storage.Local, storage.Uploads} {
		key := prefix + "some/value"
		wantAbsent(t, "Stat", func() error { _, err := s.Stat(ctx, key); return err }())
		for _, value := range []string{"one", "another"} {
			put(t, s, key, value)
			if got := get(t, s, key); got != value {
				t.Errorf("%s is %q, want %q", key, got, value)
			}
		}
		if err := s.Sync(ctx, key, prefix+"none"); err != nil {
			t.Errorf("Sync: %v", err)
		}
		if got := shallow(t, s, prefix); !slices.Equal(got, []string{prefix + "some/"}) && s.Distant() == nil {
			t.Errorf("below %s there is %q", prefix, got)
		}
		if err := s.Delete(ctx, key); err != nil {
			t.Errorf("Delete: %v", err)
		}
		_, err := s.Get(ctx, key, 10)
		wantAbsent(t, "Get after Delete", err)
		if got := shallow(t, s, prefix); got != nil && s.Distant() == nil {
			t.Errorf("after Delete there is %q below %s", got, prefix)
		}
	}
}

// testFiles holds a store to handing out files, which the kernel sends.
func testFiles(t *testing.T, s storage.Store) {
	ctx := context.Background()
	key, data := blob("file", 100_000)
	put(t, s, key, string(data))
	r, info, err := s.Open(ctx, key, 0, -1)
	if distant := s.Distant(); distant != nil {
		if err == nil {
			r.Close()
		}
		r, info, err = distant.OpenNear(ctx, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, ok := r.(*os.File); !ok {
		t.Errorf("what is near is read from a %T", r)
	}
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) || info.Size != int64(len(data)) {
		t.Errorf("%d bytes, %+v, %v", len(got), info, err)
	}
}
