package s3

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// abandon leaves a store as a killed process does, and returns a copy of its
// directory, since this process holds the lock of the old one for a moment longer.
func abandon(t *testing.T, s *store) (dir string) {
	t.Helper()
	s.cancel()
	s.work.Wait()
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(s.root)); err != nil {
		t.Fatal(err)
	}
	openedMu.Lock()
	delete(opened, s.root)
	openedMu.Unlock()
	s.index.db.Close()
	if err := s.near.Close(); err != nil {
		t.Fatal(err)
	}
	s.bucket.close()
	if err := os.RemoveAll(s.root); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestModel does at random what may be done, and what may happen, and holds the store
// to a map.
func TestModel(t *testing.T) {
	for seed := range 4 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { model(t, uint64(seed)) })
	}
}

func model(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 7))
	d := newDouble(t, s3double.Options{Page: 3}, func(s *S3) { s.CacheSize = "64MiB" })
	ctx := context.Background()
	dir := t.TempDir()
	s := listedAt(t, d, dir)

	var keys []string
	blobs := map[string][]byte{}
	for i := range 6 {
		key, data := blobOf(fmt.Sprint("blob", i), 100+3000*i)
		blobs[key] = data
		keys = append(keys, key)
	}
	for i := range 8 {
		keys = append(keys, linkOf(fmt.Sprint(i)))
	}
	keys = append(keys, "mirror/records/one.json", "mirror/records/repositories/large.json")
	values := map[string]string{}
	// unsure are keys whose deletion failed: it may have been done, or not.
	unsure := map[string]bool{}
	var log []string
	fail := func(format string, args ...any) {
		t.Helper()
		for _, line := range log[max(0, len(log)-40):] {
			t.Log(line)
		}
		t.Fatalf(format, args...)
	}
	note := func(format string, args ...any) { log = append(log, fmt.Sprintf(format, args...)) }
	verify := func(key string) {
		t.Helper()
		data, err := s.Get(ctx, key, 1<<20)
		want, ok := values[key]
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, storage.ErrUnavailable):
			fail("Get %s: %v", key, err)
		case errors.Is(err, storage.ErrUnavailable):
			return
		case unsure[key] && (err != nil || string(data) == want):
			delete(unsure, key)
			if err != nil {
				delete(values, key)
			}
		case ok && err != nil || !ok && err == nil || string(data) != want:
			fail("%s is %.30q of %d bytes, %v; want %.30q of %d, %v", key, data, len(data), err, want, len(want), ok)
		}
		info, err := s.Stat(ctx, key)
		want, ok = values[key]
		if errors.Is(err, storage.ErrUnavailable) {
			return
		}
		if (err == nil) != ok || ok && info.Size != int64(len(want)) {
			fail("Stat %s: %+v, %v; want %d bytes, %v", key, info, err, len(want), ok)
		}
	}
	list := func() {
		t.Helper()
		got := map[string]bool{}
		for info, err := range s.List(ctx, "", true) {
			if errors.Is(err, storage.ErrUnavailable) {
				return
			}
			if err != nil {
				fail("List: %v", err)
			}
			if got[info.Key] {
				fail("List yields %s twice", info.Key)
			}
			got[info.Key] = true
			if value, ok := values[info.Key]; ok && info.Size != int64(len(value)) {
				fail("List says %s has %d bytes, and not %d", info.Key, info.Size, len(value))
			}
		}
		for key := range unsure {
			delete(got, key)
		}
		want := map[string]bool{}
		for key := range values {
			if !unsure[key] {
				want[key] = true
			}
		}
		if !maps.Equal(got, want) {
			fail("List: %v\nwant %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
	}

	var ends []func()
	for i := range 300 {
		key := keys[random.IntN(len(keys))]
		switch n := random.IntN(100); {
		case n < 35:
			value := fmt.Sprintf("sha256:%03d", random.IntN(4))
			if data, ok := blobs[key]; ok {
				value = string(data)
			} else if filepath.Base(key) == "large.json" {
				value = string(make([]byte, maxInline+1)) + value
			}
			durability := storage.Lazy
			if random.IntN(6) == 0 {
				durability = storage.Durable
			}
			err := s.Put(ctx, key, []byte(value), durability)
			note("%d: put %s %.20q %v: %v", i, key, value[max(0, len(value)-12):], durability, err)
			if err != nil && !errors.Is(err, storage.ErrUnavailable) {
				fail("Put: %v", err)
			}
			// One that could not be made durable is there all the same.
			values[key] = value
			delete(unsure, key)
		case n < 50:
			err := s.Delete(ctx, key)
			note("%d: delete %s: %v", i, key, err)
			switch {
			case err == nil:
				delete(values, key)
				delete(unsure, key)
			case !errors.Is(err, storage.ErrUnavailable):
				fail("Delete: %v", err)
			default:
				unsure[key] = values[key] != ""
			}
		case n < 70:
			verify(key)
		case n < 76:
			list()
		case n < 82:
			some := []string{key, keys[random.IntN(len(keys))], keys[random.IntN(len(keys))]}
			err := s.Sync(ctx, some...)
			note("%d: sync %v: %v", i, some, err)
			if err != nil && !errors.Is(err, storage.ErrUnavailable) {
				fail("Sync: %v", err)
			}
			for _, key := range some {
				if got, ok := d.Read(key); err == nil && !unsure[key] && (string(got) != values[key] || ok != (values[key] != "")) {
					fail("after Sync the bucket has %.30q, %v under %s; want %.30q", got, ok, key, values[key])
				}
			}
		case n < 84:
			note("%d: drop %s: %v", i, key, s.Drop(key))
		case n < 86:
			if _, ok := blobs[key]; ok {
				note("%d: distrust %s", i, key)
				s.Distrust(key)
			}
		case n < 88:
			err := s.Relist(ctx)
			note("%d: relist: %v", i, err)
			if err != nil && !errors.Is(err, storage.ErrUnavailable) {
				fail("Relist: %v", err)
			}
		case n < 90:
			note("%d: calls fail", i)
			ends = append(ends, d.Strike(s3double.Fault{Every: 3, Count: 4, Status: 500, Code: "InternalError", Did: random.IntN(2) == 0}))
		case n < 92:
			note("%d: answers are lost", i)
			ends = append(ends, d.Strike(s3double.Fault{Every: 2, Count: 4, Cut: true, Did: random.IntN(2) == 0}))
		case n < 94:
			lag := random.IntN(2) == 0
			note("%d: listings lag: %v", i, lag)
			d.Set(func(q *s3double.Quirks) { q.LaggingList = lag })
		case n < 97:
			note("%d: restart", i)
			dir := s.root
			closed(t, s)
			s = listedAt(t, d, dir)
		default:
			dir := abandon(t, s)
			lost := random.IntN(3) == 0
			note("%d: kill; the index is lost: %v", i, lost)
			if lost {
				// Without it there is only what is listed.
				d.Set(func(q *s3double.Quirks) { q.LaggingList = false })
				os.Remove(filepath.Join(dir, "mirror", "s3", "index.json"))
			}
			s = listedAt(t, d, dir)
		}
	}
	for _, end := range ends {
		end()
	}
	d.Set(func(q *s3double.Quirks) { q.LaggingList = false })
	// S3 may be left alone for a moment, after the last faults.
	eventually(t, "a Sync", func() error { return s.Sync(ctx, keys...) })
	for key := range unsure {
		eventually(t, "a Get", func() error {
			_, err := s.Get(ctx, key, 1<<20)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		verify(key)
	}
	for _, key := range keys {
		verify(key)
	}
	list()
	for _, key := range keys {
		if got, ok := d.Read(key); string(got) != values[key] || ok != (values[key] != "") {
			fail("the bucket has %.30q, %v under %s; want %.30q", got, ok, key, values[key])
		}
	}
	uploaded(t, s)
	closed(t, s)
}

// TestMany has several use one store, each with keys of its own, while it is listed
// anew, and copies go.
func TestMany(t *testing.T) {
	d := newDouble(t, s3double.Options{Page: 50}, nil)
	s := listedAt(t, d, t.TempDir())
	ctx := context.Background()
	d.Strike(s3double.Fault{Op: s3double.PutObject, Every: 11, Status: 503, Code: "SlowDown"})
	stop := make(chan struct{})
	var users, keeper sync.WaitGroup
	for user := range 6 {
		users.Go(func() {
			random := rand.New(rand.NewPCG(uint64(user), 3))
			key, data := blobOf(fmt.Sprint("blob", user), 5000)
			link := linkOf(fmt.Sprint(user))
			for i := range 60 {
				value := fmt.Sprintf("sha256:%d", i)
				if err := s.Put(ctx, key, data, storage.Lazy); err != nil {
					t.Error(err)
				}
				if err := s.Put(ctx, link, []byte(value), storage.Lazy); err != nil {
					t.Error(err)
				}
				wantValue(t, s, link, []byte(value))
				if random.IntN(3) == 0 {
					if err := s.Sync(ctx, link, key); err != nil {
						t.Error(err)
					}
					if got, _ := d.Read(link); string(got) != value {
						t.Errorf("the bucket has %q after Sync, want %q", got, value)
					}
				}
				wantValue(t, s, key, data)
				for _, key := range []string{key, link} {
					if random.IntN(2) == 0 {
						if err := s.Delete(ctx, key); err != nil {
							t.Error(err)
						}
						wantNothing(t, s, key)
					}
				}
			}
		})
	}
	keeper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.Relist(ctx); err != nil {
				t.Error(err)
			}
			s.evict(1 << 20)
			for _, err := range s.List(ctx, "docker/", true) {
				if err != nil {
					t.Error(err)
				}
			}
		}
	})
	users.Wait()
	close(stop)
	keeper.Wait()
	uploaded(t, s)
	for i := range s.stripes {
		if left := s.stripes[i].states; len(left) > 0 {
			t.Errorf("states are left: %v", left)
		}
	}
	if b := s.Backlog(); b.PendingBytes != 0 {
		t.Errorf("%d bytes are pending of nothing", b.PendingBytes)
	}
	// What is counted is what is there.
	var near int64
	for info, err := range s.near.List(ctx, "docker/", true) {
		if err != nil {
			t.Fatal(err)
		}
		near += occupied(info.Size)
	}
	if b := s.Backlog(); b.NearBytes != near {
		t.Errorf("%d bytes are counted near, and there are %d", b.NearBytes, near)
	}
	closed(t, s)
}
