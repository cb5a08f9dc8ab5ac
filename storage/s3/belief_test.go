package s3

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// TestBelief: when the index is believed, and when the bucket is listed.
func TestBelief(t *testing.T) {
	type world struct {
		d   *double
		dir string
	}
	card := func(w world, change func(map[string]any)) {
		path := filepath.Join(w.dir, "mirror", "s3", "index.json")
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var fields map[string]any
		if err := json.Unmarshal(data, &fields); err != nil {
			t.Fatal(err)
		}
		change(fields)
		data, _ = json.Marshal(fields)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(w world)
		lists bool
	}{
		{"closed", func(world) {}, false},
		{"closed before another boot", func(w world) { card(w, func(f map[string]any) { f["boot"] = "another" }) }, false},
		{"killed", func(w world) { card(w, func(f map[string]any) { f["clean"] = false }) }, false},
		{"lost power", func(w world) { card(w, func(f map[string]any) { f["clean"], f["boot"] = false, "another" }) }, true},
		{"another schema", func(w world) { card(w, func(f map[string]any) { f["schema"] = 99 }) }, true},
		{"another bucket", func(w world) { card(w, func(f map[string]any) { f["bucket"] = "http://else bucket" }) }, true},
		{"no card", func(w world) { os.Remove(filepath.Join(w.dir, "mirror", "s3", "index.json")) }, true},
		{"no index", func(w world) { os.Remove(filepath.Join(w.dir, "mirror", "s3", "index.db")) }, true},
		{"a damaged index", func(w world) {
			os.WriteFile(filepath.Join(w.dir, "mirror", "s3", "index.db"), bytes.Repeat([]byte("x"), 100_000), 0o600)
		}, true},
		{"another wrote", func(w world) { w.d.Write(ownerKey, []byte(`{"last":"another"}`)) }, true},
		{"no marks", func(w world) { w.d.Remove(ownerKey) }, true},
		{"damaged marks", func(w world) { w.d.Write(ownerKey, []byte(`{`)) }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := world{newDouble(t, s3double.Options{}, nil), t.TempDir()}
			s := listedAt(t, w.d, w.dir)
			key, data := blobOf("far", 1000)
			mustPut(t, s, key, data, storage.Lazy)
			mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
			mustPut(t, s, linkOf("kept"), []byte("sha256:z"), storage.Lazy)
			mustPut(t, s, layout.Session, []byte("{}"), storage.Durable)
			uploaded(t, s)
			s.Drop(key)
			closed(t, s)
			// Somebody else changes a value. Who believes the index does not see it.
			w.d.Write(linkOf("a"), []byte("sha256:y"))
			w.d.Write(linkOf("b"), []byte("sha256:y"))
			c.spoil(w)
			w.d.Forget()
			s = listedAt(t, w.d, w.dir)
			defer closed(t, s)
			if lists := w.d.Count(s3double.ListObjectsV2) > 0; lists != c.lists {
				t.Errorf("the bucket was listed: %v", lists)
			}
			want := "sha256:x"
			if c.lists {
				want = "sha256:y"
				wantValue(t, s, linkOf("b"), []byte("sha256:y"))
			} else {
				wantNothing(t, s, linkOf("b"))
			}
			wantValue(t, s, linkOf("a"), []byte(want))
			wantValue(t, s, linkOf("kept"), []byte("sha256:z"))
			wantValue(t, s, key, data)
			// What this process knew of the store is as old as the index.
			if _, err := s.Stat(context.Background(), layout.Session); (err == nil) == c.lists {
				t.Errorf("the session: %v", err)
			}
		})
	}
}

// TestLossOfPower: what the near tier doubts.
func TestLossOfPower(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	dir := t.TempDir()
	s := listedAt(t, d, dir)
	both, data := blobOf("both", 10_000)
	mustPut(t, s, both, data, storage.Lazy)
	mustPut(t, s, linkOf("far"), []byte("sha256:x"), storage.Lazy)
	uploaded(t, s)
	d.Down()
	good, goodData := blobOf("good", 10_000)
	bad, badData := blobOf("bad", 10_000)
	mustPut(t, s, good, goodData, storage.Lazy)
	mustPut(t, s, bad, badData, storage.Lazy)
	mustPut(t, s, linkOf("pending"), []byte("sha256:y"), storage.Lazy)
	whole := layout.TagLink("apps/web", "whole")
	mustPut(t, s, whole, []byte(digest.FromString("whole")), storage.Lazy)
	closed(t, s)
	d.Up(t)

	for _, key := range []string{both, bad} {
		if err := os.WriteFile(filepath.Join(dir, key), bytes.Repeat([]byte{0}, 10_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, change := range map[string]func(map[string]any){
		"mirror/s3/index.json": func(f map[string]any) { f["clean"], f["boot"] = false, "another" },
		"mirror/synced":        func(f map[string]any) { f["clean"], f["boot"], f["time"] = false, "another", time.Unix(0, 0) },
	} {
		path = filepath.Join(dir, path)
		var fields map[string]any
		data, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(data, &fields)
		}
		if err != nil {
			t.Fatal(err)
		}
		change(fields)
		data, _ = json.Marshal(fields)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = listedAt(t, d, dir)
	defer closed(t, s)

	// A damaged copy of what the bucket has is no matter.
	wantValue(t, s, both, data)
	if info, err := s.Stat(context.Background(), both); err != nil || info.Doubtful {
		t.Errorf("of what the bucket has: %+v, %v", info, err)
	}
	// What has come through is uploaded; what has not is not.
	eventually(t, "the upload", func() error {
		for _, key := range []string{good, whole} {
			if _, ok := d.Read(key); !ok {
				return fmt.Errorf("%s is not there", key)
			}
		}
		return nil
	})
	for _, key := range []string{bad, linkOf("pending")} {
		info, err := s.Stat(context.Background(), key)
		if err != nil || !info.Doubtful {
			t.Errorf("%s: %+v, %v; want it in doubt", key, info, err)
		}
		if _, ok := d.Read(key); ok {
			t.Errorf("%s was uploaded", key)
		}
	}
	if err := s.Sync(context.Background(), bad); err == nil {
		t.Error("Sync of a damaged blob succeeded")
	}
	// Until somebody vouches for it, or replaces it.
	if err := s.Vouch(context.Background(), linkOf("pending")); err != nil {
		t.Error(err)
	}
	mustPut(t, s, bad, badData, storage.Lazy)
	uploaded(t, s)
	if got, _ := d.Read(linkOf("pending")); string(got) != "sha256:y" {
		t.Errorf("the link is %q", got)
	}
	wantValue(t, s, bad, badData)
}

// TestOvertaken: a listing that was begun before the index was disbelieved does not
// end that.
func TestOvertaken(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	d.Write(linkOf("old"), []byte("sha256:x"))
	let := make(chan struct{})
	d.Strike(s3double.Fault{Op: s3double.ListObjectsV2, Count: 1, Hold: let})
	st, err := d.open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := st.(*store)
	defer closed(t, s)
	d.Await(t, "a listing", func(calls []s3double.Call) bool { return calls[len(calls)-1].Held })
	d.Write(linkOf("new"), []byte("sha256:y"))
	if err := s.disbelieve(); err != nil {
		t.Fatal(err)
	}
	close(let)
	if err := s.Listed(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantValue(t, s, linkOf("new"), []byte("sha256:y"))
	wantValue(t, s, linkOf("old"), []byte("sha256:x"))
}

// TestOneThatFails: a blob that S3 does not take does not hold up others.
func TestOneThatFails(t *testing.T) {
	d := newDouble(t, s3double.Options{}, nil)
	s := listedAt(t, d, t.TempDir())
	defer closed(t, s)
	bad, data := blobOf("bad", 1000)
	let := make(chan struct{})
	d.Strike(s3double.Fault{Op: s3double.PutObject, Key: bad, Count: 1, Hold: let, Status: 400, Code: "InvalidRequest"})
	end := d.Strike(s3double.Fault{Op: s3double.PutObject, Key: bad, Status: 400, Code: "InvalidRequest"})
	mustPut(t, s, bad, data, storage.Lazy)
	mustPut(t, s, linkOf("a"), []byte("sha256:x"), storage.Lazy)
	close(let)
	eventually(t, "the link", func() error {
		if _, ok := d.Read(linkOf("a")); !ok {
			return errors.New("it is not there")
		}
		// The store hears of it a little later.
		if b := s.Backlog(); b.Pending != 1 {
			return fmt.Errorf("%d values are pending", b.Pending)
		}
		return nil
	})
	wantValue(t, s, bad, data)
	end()
	if err := s.Sync(t.Context(), bad); err != nil {
		t.Error(err)
	}
}
