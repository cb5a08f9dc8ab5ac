package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

func testUploads(d *distant) {
	s := d.listed()
	state, part := storage.Uploads+"uuid/state", storage.Uploads+"uuid/0"
	path := filepath.Join(spool(d.T, s, "parts"), "file")
	data := bytes.Repeat([]byte("part"), 100_000)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		d.Fatal(err)
	}
	if err := s.PutFile(ctx, part, path, storage.Lazy); err != nil {
		d.Fatal(err)
	}
	d.there("after PutFile", part, data)
	d.put(state, []byte("one"))
	d.there("after Put", state, []byte("one"))
	if _, _, err := d.near(part); !errors.Is(err, storage.ErrDistant) {
		d.Errorf("OpenNear of what is not kept near: %v", err)
	}
	d.has("uploads", part, data)
	d.has("uploads", state, []byte("one"))
	d.lists("uploads", storage.Uploads, true, part, state)
	d.lists("uploads", storage.Uploads, false, storage.Uploads+"uuid/")

	// Another process goes on with it.
	d.Write(state, []byte("two"))
	d.Write(storage.Uploads+"uuid/400000", []byte("more"))
	d.has("written by another", state, []byte("two"))
	d.lists("written by another", storage.Uploads+"uuid/", false, part, storage.Uploads+"uuid/400000", state)
	d.Remove(part)
	if _, err := s.Stat(ctx, part); !errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Stat of what another has removed: %v", err)
	}
	d.sync(state)
	if err := s.Delete(ctx, state); err != nil {
		d.Fatal(err)
	}
	d.there("after Delete", state, nil)
	if _, err := s.Get(ctx, state, 10); !errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Get after Delete: %v", err)
	}

	d.Down()
	for what, err := range map[string]error{
		"Put":    s.Put(ctx, state, nil, storage.Lazy),
		"Delete": s.Delete(ctx, storage.Uploads+"uuid/400000"),
	} {
		if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
			d.Errorf("%s while the place is down: %v", what, err)
		}
	}
	_, err := s.Get(ctx, state, 10)
	if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Get while the place is down: %v", err)
	}
	d.Up()
}

// testForeignTree opens a store on what somebody else has written.
func testForeignTree(d *distant) {
	key, data := blob("foreign", 100_000)
	d.Write(key, data)
	d.Write(link("a"), []byte("sha256:x"))
	d.Write(links+"odd name +%/link", []byte("sha256:y"))
	s := d.open()
	d.has("at once", key, data)
	d.has("at once", link("a"), []byte("sha256:x"))
	none, _ := blob("none", 10)
	d.hasNot("at once", none)
	d.lists("at once", links, true, link("a"), links+"odd name +%/link")
	d.listed()
	d.has("listed", key, data)
	d.has("listed", links+"odd name +%/link", []byte("sha256:y"))
	d.hasNot("listed", none)
	d.lists("listed", links, true, link("a"), links+"odd name +%/link")
	d.lists("listed", links, false, links+"a/", links+"odd name +%/")
	if err := s.Delete(ctx, link("a")); err != nil {
		d.Fatal(err)
	}
	d.sync(link("a"))
	d.there("after Delete", link("a"), nil)
	d.put(links+"odd name +%/link", []byte("sha256:z"))
	d.sync(links + "odd name +%/link")
	d.there("after Put", links+"odd name +%/link", []byte("sha256:z"))
}

func testRelist(d *distant) {
	s := d.listed()
	key, data := blob("old", 1000)
	d.put(key, data)
	d.put(link("old"), []byte("sha256:x"))
	d.put(link("kept"), []byte("sha256:x"))
	d.sync(key, link("old"), link("kept"))
	s.Distant().Drop(key)
	d.Remove(key)
	d.Remove(link("old"))
	newer, more := blob("new", 2000)
	d.Write(newer, more)
	d.Write(link("kept"), []byte("sha256:changed"))
	if err := s.Distant().Relist(ctx); err != nil {
		d.Fatalf("Relist: %v", err)
	}
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.Distant().Listed(within); err != nil {
		d.Fatalf("Listed: %v", err)
	}
	d.hasNot("after Relist", key)
	d.hasNot("after Relist", link("old"))
	d.has("after Relist", newer, more)
	d.has("after Relist", link("kept"), []byte("sha256:changed"))
	d.lists("after Relist", "docker/", true, newer, link("kept"))
}

func testRestart(d *distant) {
	d.listed()
	far, farData := blob("far", 50_000)
	gone, goneData := blob("gone", 1000)
	d.put(far, farData)
	d.put(gone, goneData)
	d.put(link("replaced"), []byte("sha256:old"))
	d.sync(far, gone, link("replaced"))
	d.store.Distant().Drop(far)

	d.Down()
	key, data := blob("pending", 100_000)
	d.put(key, data)
	d.put(link("pending"), []byte("sha256:x"))
	d.put(link("replaced"), []byte("sha256:new"))
	d.close()
	d.open()
	d.has("down", key, data)
	d.has("down", link("pending"), []byte("sha256:x"))
	d.has("down", link("replaced"), []byte("sha256:new"))
	d.Up()
	d.syncAtLast(key, link("pending"), link("replaced"))
	d.there("after a restart", key, data)
	d.there("after a restart", link("pending"), []byte("sha256:x"))
	d.there("after a restart", link("replaced"), []byte("sha256:new"))
	d.listed()
	d.has("after a restart", far, farData)
	d.lists("after a restart", links, true, link("pending"), link("replaced"))

	// All of it without a Sync: what is pending is taken there behind.
	d.put(link("behind"), []byte("sha256:x"))
	d.eventually("what is taken there behind", func() error {
		if _, ok := d.Read(link("behind")); !ok {
			return errors.New("it is not there")
		}
		return nil
	})
}

// testRestartWithout loses what is near.
func testRestartWithout(d *distant) {
	d.listed()
	key, data := blob("kept", 100_000)
	d.put(key, data)
	d.put(link("kept"), []byte("sha256:x"))
	d.sync(key, link("kept"))
	d.close()
	if err := os.RemoveAll(d.dir); err != nil {
		d.Fatal(err)
	}
	d.open()
	d.has("at once", key, data)
	d.listed()
	d.has("listed", link("kept"), []byte("sha256:x"))
	d.lists("listed", "docker/", true, key, link("kept"))
}

// unavailable holds an error to saying that the store could not say.
func (d *distant) unavailable(what string, err error) {
	d.Helper()
	if !errors.Is(err, storage.ErrUnavailable) || errors.Is(err, fs.ErrNotExist) {
		d.Errorf("%s: %v, want ErrUnavailable", what, err)
	}
}

func testUnreachable(d *distant) {
	s := d.listed()
	far, farData := blob("far", 100_000)
	near, nearData := blob("near", 100_000)
	none, noneData := blob("none", 1000)
	d.put(far, farData)
	d.put(near, nearData)
	d.put(link("a"), []byte("sha256:x"))
	d.sync(far, near, link("a"))
	s.Distant().Drop(far)
	wasNear := func() bool { _, _, err := d.near(near); return err == nil }()

	d.Down()
	if wasNear {
		d.has("down", near, nearData)
	}
	_, _, err := d.near(far)
	if !errors.Is(err, storage.ErrDistant) {
		d.Errorf("OpenNear: %v", err)
	}
	_, err = s.Get(ctx, far, 1<<20)
	d.unavailable("Get", err)
	r, _, err := s.Open(ctx, far, 10, 100)
	if err == nil {
		// It may find out as late as that.
		_, err = io.ReadAll(r)
		r.Close()
	}
	d.unavailable("Open", err)
	if _, err := s.Stat(ctx, far); errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Stat of what is there: %v", err)
	}
	if _, err := s.Get(ctx, link("a"), 100); errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Get of a link that is there: %v", err)
	}

	// What is put lazily is taken, and whoever wants it to be there is told.
	d.put(none, noneData)
	d.put(link("b"), []byte("sha256:y"))
	d.has("put while it is down", none, noneData)
	d.has("put while it is down", link("b"), []byte("sha256:y"))
	d.unavailable("Sync", s.Sync(ctx, none))
	d.unavailable("Put Durable", s.Put(ctx, link("c"), []byte("sha256:z"), storage.Durable))
	if _, err := s.Stat(ctx, link("c")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Stat after a Put that failed: %v", err)
	}
	deleted := s.Delete(ctx, link("a"))
	if deleted != nil {
		d.unavailable("Delete", deleted)
	}
	within, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d.unavailable("Relist", s.Distant().Relist(within))

	d.Up()
	d.eventually("a Delete", func() error { return s.Delete(ctx, link("a")) })
	d.syncAtLast(none, link("a"), link("b"))
	d.there("after Up", none, noneData)
	d.there("after Up", link("b"), []byte("sha256:y"))
	d.there("after Up", link("a"), nil)
	d.has("after Up", far, farData)
	d.hasNot("after Up", link("a"))
}

// testUnreachableAtFirst opens a store that knows nothing of a place that is down.
func testUnreachableAtFirst(d *distant) {
	key, data := blob("there", 1000)
	d.Write(key, data)
	d.Write(link("a"), []byte("sha256:x"))
	d.Down()
	s, err := d.Place.Open(d.dir)
	if err != nil {
		d.unavailable("Open", err)
	} else {
		d.store = s
		_, err := s.Stat(ctx, key)
		d.unavailable("Stat", err)
		_, err = s.Get(ctx, link("a"), 100)
		d.unavailable("Get", err)
		_, _, err = d.near(key)
		if errors.Is(err, fs.ErrNotExist) || !errors.Is(err, storage.ErrDistant) && !errors.Is(err, storage.ErrUnavailable) {
			d.Errorf("OpenNear: %v", err)
		}
		err = nil
		for _, failed := range s.List(ctx, links, true) {
			err = failed
		}
		d.unavailable("List", err)
		mine, some := blob("mine", 1000)
		d.put(mine, some)
		d.has("put while it is down", mine, some)
		within, cancel := context.WithCancel(ctx)
		cancel()
		if err := s.Distant().Listed(within); err == nil {
			d.Error("it knows all keys, and has asked for none")
		}
	}
	d.Up()
	d.eventually("a Get", func() error {
		if d.store == nil {
			if d.store, err = d.Place.Open(d.dir); err != nil {
				return err
			}
		}
		_, err := d.store.Get(ctx, key, 1<<20)
		return err
	})
	d.listed()
	d.has("after Up", key, data)
	d.has("after Up", link("a"), []byte("sha256:x"))
}

// testLastStateWins puts and deletes one key again and again, while it is taken there.
func testLastStateWins(d *distant) {
	s := d.listed()
	key, data := blob("restless", 10_000)
	for _, end := range []string{"put", "deleted"} {
		for i := range 40 {
			d.put(key, data)
			d.put(link("a"), fmt.Append(nil, "sha256:", i))
			d.has("put", link("a"), fmt.Append(nil, "sha256:", i))
			if i%4 == 3 {
				d.sync(key, link("a"))
			}
			if i == 39 && end == "put" {
				break
			}
			for _, key := range []string{key, link("a")} {
				if err := s.Delete(ctx, key); err != nil {
					d.Fatal(err)
				}
				d.hasNot("deleted", key)
			}
		}
		d.sync(key, link("a"))
		if end == "deleted" {
			d.there("deleted", key, nil)
			d.there("deleted", link("a"), nil)
			continue
		}
		d.there("put", key, data)
		d.there("put", link("a"), []byte("sha256:39"))
	}
	d.anew()
	d.hasNot("after a restart", key)
	d.hasNot("after a restart", link("a"))
}

func testDeleteDuringUpload(d *distant) {
	if d.Hold == nil {
		return
	}
	s := d.listed()
	held, release := d.Hold()
	key, data := blob("held", 100_000)
	d.put(key, data)
	held()
	deleted := make(chan error, 1)
	go func() { deleted <- s.Delete(ctx, key) }()
	// Whether it waits for the upload or not, it must end, and win.
	release()
	if err := <-deleted; err != nil {
		d.Fatalf("Delete: %v", err)
	}
	d.hasNot("after Delete", key)
	d.sync(key)
	d.there("after Delete", key, nil)
	d.put(key, data)
	d.sync(key)
	d.there("put again", key, data)
}

func testReplaceDuringUpload(d *distant) {
	if d.Hold == nil {
		return
	}
	d.listed()
	held, release := d.Hold()
	d.put(link("a"), []byte("sha256:old"))
	held()
	d.put(link("a"), []byte("sha256:new"))
	d.has("replaced", link("a"), []byte("sha256:new"))
	release()
	d.sync(link("a"))
	d.there("replaced", link("a"), []byte("sha256:new"))
	d.has("replaced", link("a"), []byte("sha256:new"))
	d.anew()
	d.has("after a restart", link("a"), []byte("sha256:new"))
}

// testSyncEnds holds a Sync to its context.
func testSyncEnds(d *distant) {
	if d.Hold == nil {
		return
	}
	s := d.listed()
	held, release := d.Hold()
	key, data := blob("held", 1000)
	d.put(key, data)
	held()
	within, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Sync(within, key) }()
	cancel()
	if err := <-done; err == nil || errors.Is(err, fs.ErrNotExist) {
		d.Errorf("Sync: %v", err)
	}
	d.has("after a Sync that was given up", key, data)
	release()
	d.sync(key)
	d.there("after Sync", key, data)
}

func testLaggingListings(d *distant) {
	if d.Lag == nil {
		return
	}
	caughtUp := d.Lag()
	s := d.listed()
	key, data := blob("unlisted", 1000)
	for range 2 {
		d.put(key, data)
		d.put(link("a"), []byte("sha256:x"))
		d.put(link("b"), []byte("sha256:x"))
		d.sync(key, link("a"), link("b"))
		d.lists("put", "docker/", true, key, link("a"), link("b"))
		d.lists("put", links, false, links+"a/", links+"b/")
		if err := s.Delete(ctx, link("b")); err != nil {
			d.Fatal(err)
		}
		d.sync(link("b"))
		d.lists("deleted", links, false, links+"a/")
		d.hasNot("deleted", link("b"))
		s.Distant().Drop(key)
		d.has("listed by nobody", key, data)
		s = d.anew()
		d.lists("after a restart", "docker/", true, key, link("a"))
		d.has("after a restart", key, data)
		d.hasNot("after a restart", link("b"))
		caughtUp()
	}
}

func testPresign(d *distant) {
	s := d.listed()
	key, data := blob("presigned", 100_000)
	presign := func(method, key string) (string, error) {
		return s.Distant().Presign(ctx, method, key, time.Minute)
	}
	_, err := presign(http.MethodGet, key)
	wantAbsent(d.T, "Presign of nothing", err)
	d.put(key, data)
	d.sync(key)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	// send asks as long as the place is out of order.
	send := func(req *http.Request) (res *http.Response) {
		d.eventually("an answer", func() (err error) {
			if res, err = client.Do(req); err == nil && res.StatusCode >= 500 {
				res.Body.Close()
				err = errors.New(res.Status)
			}
			return err
		})
		return res
	}
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		url, err := presign(method, key)
		if err != nil {
			d.Fatalf("Presign: %v", err)
		}
		req, _ := http.NewRequest(method, url, nil)
		if method == http.MethodGet {
			req.Header.Set("Range", "bytes=10-19")
		}
		res := send(req)
		got, err := io.ReadAll(res.Body)
		res.Body.Close()
		if method == http.MethodGet {
			if err != nil || res.StatusCode != http.StatusPartialContent || !bytes.Equal(got, data[10:20]) {
				d.Errorf("GET of a range: %d, %d bytes, %v", res.StatusCode, len(got), err)
			}
		} else if res.StatusCode != http.StatusOK || res.ContentLength != int64(len(data)) {
			d.Errorf("HEAD: %d, %d bytes", res.StatusCode, res.ContentLength)
		}
		// The other method is signed apart.
		req.Method = map[string]string{http.MethodGet: http.MethodHead, http.MethodHead: http.MethodGet}[method]
		res = send(req)
		res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			d.Errorf("%s with the URL for %s: %s", req.Method, method, res.Status)
		}
	}
	d.Down()
	pending, some := blob("pending", 1000)
	d.put(pending, some)
	_, err = presign(http.MethodGet, pending)
	wantAbsent(d.T, "Presign of what is not there yet", err)
	d.Up()
	d.syncAtLast(pending)
}

// testTwoMachines has two stores write to one place.
func testTwoMachines(d *distant) {
	if d.Brief {
		return
	}
	a := d.listed()
	if a.Distant().Shared() {
		d.Error("shared with nobody")
	}
	key, data := blob("shared", 1000)
	d.put(key, data)
	d.put(link("a"), []byte("sha256:x"))
	d.sync(key, link("a"))

	two := &distant{T: d.T, Place: d.Place, dir: d.other()}
	b := two.open()
	defer two.close()
	two.eventually("the second to see the first", func() error {
		if !b.Distant().Shared() {
			return errors.New("it is not shared")
		}
		return nil
	})
	d.eventually("the first to see the second", func() error {
		if !a.Distant().Shared() {
			return errors.New("it is not shared")
		}
		return nil
	})
	two.has("written by the first", key, data)
	two.has("written by the first", link("a"), []byte("sha256:x"))

	two.put(link("a"), []byte("sha256:y"))
	two.put(link("b"), []byte("sha256:z"))
	other, more := blob("other", 2000)
	two.put(other, more)
	two.sync(link("a"), link("b"), other)
	d.eventually("what the second wrote", func() error {
		one, err := a.Get(ctx, link("a"), 100)
		if err == nil && string(one) != "sha256:y" {
			err = fmt.Errorf("it is %q", one)
		}
		if err == nil {
			_, err = a.Stat(ctx, link("b"))
		}
		if err == nil {
			_, err = a.Stat(ctx, other)
		}
		if err == nil && !slices.Contains(d.keys(links, true), link("b")) {
			err = errors.New("it is not listed")
		}
		return err
	})
	d.has("written by the second", other, more)
	if err := a.Delete(ctx, link("b")); err != nil {
		d.Fatal(err)
	}
	d.sync(link("b"))
	two.eventually("what the first deleted", func() error {
		if _, err := b.Stat(ctx, link("b")); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("Stat: %v", err)
		}
		return nil
	})

	// The first is alone again, and does not believe what it knew before.
	two.put(link("last"), []byte("sha256:w"))
	two.sync(link("last"))
	two.close()
	d.eventually("the first to be alone", func() error {
		if a.Distant().Shared() {
			return errors.New("it is shared")
		}
		return nil
	})
	d.eventually("what was written last", func() error {
		_, err := a.Get(ctx, link("last"), 100)
		return err
	})
	d.hasNot("deleted", link("b"))
	d.lists("alone", links, true, link("a"), link("last"))

	// Nor does one that was closed while another wrote.
	d.close()
	b = two.open()
	two.put(link("meanwhile"), []byte("sha256:v"))
	two.put(link("a"), []byte("sha256:u"))
	two.sync(link("meanwhile"), link("a"))
	two.close()
	d.open()
	d.has("written meanwhile", link("meanwhile"), []byte("sha256:v"))
	d.has("written meanwhile", link("a"), []byte("sha256:u"))
}
