package s3

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
)

// What a process that a test starts of itself is told: the double, the cache
// directory, and at which failpoint it dies, as "name#n" for the nth time.
const (
	childURL  = "S3_TEST_CHILD_URL"
	childDir  = "S3_TEST_CHILD_DIR"
	childDies = "S3_TEST_CHILD_DIES"
)

// A step is one call of a store.
type step struct {
	do         string // put, durable, delete, sync
	key, value string
	keys       []string
}

// history is what the child does.
func history() []step {
	big, data := blobOf("big", 11<<20)
	small, few := blobOf("small", 1000)
	a, b, c := linkOf("a"), linkOf("b"), linkOf("c")
	return []step{
		{do: "put", key: big, value: string(data)},
		{do: "put", key: a, value: "sha256:1"},
		{do: "sync", keys: []string{a, big}},
		{do: "durable", key: a, value: "sha256:2"},
		{do: "put", key: b, value: "sha256:1"},
		{do: "delete", key: a},
		{do: "put", key: small, value: string(few)},
		{do: "delete", key: small},
		{do: "durable", key: c, value: "sha256:1"},
		{do: "put", key: a, value: "sha256:3"},
		{do: "delete", key: big},
		{do: "sync", keys: []string{a, b, c, big}},
		{do: "durable", key: c, value: "sha256:2"},
	}
}

// runChild takes the steps one after the other, and says after each that it is done.
func runChild(t *testing.T) {
	name, nth, _ := strings.Cut(os.Getenv(childDies), "#")
	var hits atomic.Int64
	failpoint.Set(func(hit string) {
		if hit == name && fmt.Sprint(hits.Add(1)) == nth {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	d := &double{&s3double.Server{URL: os.Getenv(childURL)}, "", nil}
	s := listedAt(t, d, os.Getenv(childDir))
	ctx := context.Background()
	for i, step := range history() {
		var err error
		switch step.do {
		case "put":
			err = s.Put(ctx, step.key, []byte(step.value), storage.Lazy)
		case "durable":
			err = s.Put(ctx, step.key, []byte(step.value), storage.Durable)
		case "delete":
			err = s.Delete(ctx, step.key)
		case "sync":
			err = s.Sync(ctx, step.keys...)
		}
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		fmt.Println("done", i)
	}
	closed(t, s)
	fmt.Println("lived")
}

// TestKills kills a process at each step of its commits, and looks at what the next
// one has.
func TestKills(t *testing.T) {
	if os.Getenv(childURL) != "" {
		runChild(t)
		return
	}
	for _, dies := range []string{
		"s3.put.near#1", "s3.put.near#3", "s3.put.near#6",
		"s3.uploading#1", "s3.uploading#2", "s3.uploading#3", "s3.uploading#5",
		"s3.created#1", "s3.part#2", "s3.part#3",
		"s3.uploaded#1", "s3.uploaded#2", "s3.uploaded#3", "s3.uploaded#5",
		"s3.indexed#1", "s3.indexed#2", "s3.indexed#3", "s3.indexed#5",
		"s3.deleting#1", "s3.deleting#2", "s3.deleted#1", "s3.deleted#2",
		"s3.listed#1",
	} {
		t.Run(dies, func(t *testing.T) {
			d := newDouble(t, s3double.Options{}, nil)
			dir := t.TempDir()
			child := exec.Command(os.Args[0], "-test.run=^TestKills$")
			child.Env = append(os.Environ(), childURL+"="+d.URL, childDir+"="+dir, childDies+"="+dies)
			out, err := child.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			done := 0
			var said []string
			for lines := bufio.NewScanner(out); lines.Scan(); {
				if lines.Text() == fmt.Sprint("done ", done) {
					done++
				}
				said = append(said, lines.Text())
			}
			child.Wait()
			if state, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || state.Signal() != syscall.SIGKILL {
				t.Fatalf("the child was not killed: %v\n%s", child.ProcessState, strings.Join(said, "\n"))
			}
			survived(t, d, dir, done)
		})
	}
}

// survived looks at the store after the first steps were done, and perhaps the next.
func survived(t *testing.T, d *double, dir string, done int) {
	t.Helper()
	steps := history()
	allowed := map[string][]string{} // "" is nothing
	for i, step := range steps[:min(done+1, len(steps))] {
		var value string
		switch step.do {
		case "sync":
			continue
		case "put", "durable":
			value = step.value
		}
		if before := allowed[step.key]; i == done {
			if before == nil {
				before = []string{""}
			}
			allowed[step.key] = append(slices.Clone(before), value)
		} else {
			allowed[step.key] = []string{value}
		}
	}
	s := listedAt(t, d, dir)
	found := map[string]string{}
	for key, values := range allowed {
		got, err := s.Get(context.Background(), key, 64<<20)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Get %s: %v", key, err)
		}
		if !slices.Contains(values, string(got)) {
			t.Errorf("%s is %.20q of %d bytes after %d steps", key, got, len(got), done)
		}
		if err == nil {
			found[key] = string(got)
		}
	}
	listed := func(s storage.Store) map[string]bool {
		keys := map[string]bool{}
		for info, err := range s.List(context.Background(), "docker/", true) {
			if err != nil {
				t.Fatal(err)
			}
			keys[info.Key] = true
		}
		return keys
	}
	check := func(s storage.Store, when string) {
		t.Helper()
		keys := listed(s)
		if len(keys) != len(found) {
			t.Errorf("%s: %d values are listed, and there are %d", when, len(keys), len(found))
		}
		for key, value := range found {
			if !keys[key] {
				t.Errorf("%s: %s is not listed", when, key)
			}
			wantValue(t, s, key, []byte(value))
		}
	}
	check(s, "after the kill")
	uploaded(t, s)
	for key, value := range found {
		if got, _ := d.Read(key); !bytes.Equal(got, []byte(value)) {
			t.Errorf("the bucket has %.20q of %d bytes under %s", got, len(got), key)
		}
	}
	if left := d.Uploads(); len(left) > 0 {
		t.Errorf("uploads in parts are left: %v", left)
	}
	closed(t, s)
	// A machine that has nothing but the bucket finds the same there.
	s = listedAt(t, d, t.TempDir())
	check(s, "elsewhere")
	closed(t, s)
}
