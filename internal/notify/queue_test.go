package notify

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestQueue compares a queue with a list: whatever is done, and however often it
// is opened again, what was not taken comes in order.
func TestQueue(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 0))
		dir := t.TempDir()
		most := 5 + random.IntN(400)
		q, _, err := openQueue(dir, most)
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		sending, n := false, 0
		for range 2_000 {
			switch what := random.IntN(20); {
			case what < 9:
				n++
				// Long ones, so that there are many files.
				event := fmt.Sprintf("%d %s", n, strings.Repeat("x", random.IntN(20_000)))
				dropped, err := q.add([]byte(event))
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, event)
				lost := max(len(want)-most, 0)
				if dropped != lost {
					t.Fatalf("dropped %d; want %d", dropped, lost)
				}
				want, sending = want[lost:], sending && lost == 0
			case what < 17:
				event, _, err := q.first()
				if err != nil || event == nil != (len(want) == 0) || event != nil && string(event) != want[0] {
					t.Fatalf("seed %d: the first is %.20s, %v; of %d", seed, event, err, len(want))
				}
				sending = event != nil
			case what < 18 && sending:
				q.again()
				sending = false
			case what < 19:
				q.done()
				if sending {
					want, sending = want[1:], false
				}
			case what == 19 && random.IntN(10) == 0 && !sending:
				if random.IntN(2) == 0 { // otherwise as a process that was killed
					q.close()
				}
				old := q
				var damaged int
				if q, damaged, err = openQueue(dir, most); err != nil || damaged > 0 {
					t.Fatal(damaged, err)
				}
				old.close()
			}
			if events, bytes := q.pending(); events != len(want) || bytes < int64(events) {
				t.Fatalf("seed %d: %d are pending, %d bytes; want %d", seed, events, bytes, len(want))
			}
		}
		if sending {
			q.again()
		}
		for _, event := range want {
			if got, _, err := q.first(); err != nil || string(got) != event {
				t.Fatalf("%.20s, %v; want %.20s", got, err, event)
			}
			q.done()
		}
		if files := filesOf(t, dir); len(files) > 1 {
			t.Errorf("files that nobody needs stay: %q", files)
		}
		if err := q.close(); err != nil {
			t.Error(err)
		}
	}
}

func filesOf(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"+events))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	return files
}

// TestQueueBytes: a queue takes no more of the disk than it may.
func TestQueueBytes(t *testing.T) {
	dir := t.TempDir()
	q, _, err := openQueue(dir, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	q.maxBytes = 5 << 20
	var n int
	for range 1_000 {
		dropped, err := q.add([]byte(strings.Repeat("x", 20_000)))
		if err != nil {
			t.Fatal(err)
		}
		n += dropped
	}
	var size int64
	for _, file := range filesOf(t, dir) {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > q.maxBytes+2*fileSize || size < q.maxBytes-fileSize {
		t.Errorf("%d bytes on the disk", size)
	}
	if events, _ := q.pending(); events+n != 1_000 || events < 200 {
		t.Errorf("%d wait and %d were dropped", events, n)
	}
}

// TestQueueDamaged: what a loss of power leaves is passed over, and what follows
// is not taken for delivered.
func TestQueueDamaged(t *testing.T) {
	for name, damage := range map[string]struct {
		do      func(file string, text []byte) error
		want    string
		damaged int
	}{
		"cut": {func(file string, text []byte) error { return os.WriteFile(file, text[:len(text)-3], 0o600) }, "2 3 new", 1},
		"zeroes": {func(file string, text []byte) error {
			return os.WriteFile(file, append(text[:len(text)-3], 0, 0, 0), 0o600)
		}, "2 3 new", 1},
		"a bit":   {func(file string, text []byte) error { text[len(text)/2] ^= 1; return os.WriteFile(file, text, 0o600) }, "2 4 new", 1},
		"empty":   {func(file string, text []byte) error { return os.WriteFile(file, nil, 0o600) }, "new", 0},
		"removed": {func(file string, text []byte) error { return os.Remove(file) }, "new", 0},
		"long": {func(file string, text []byte) error {
			return os.WriteFile(file, append(text, make([]byte, 3*maxLine)...), 0o600)
		}, "2 3 4 new", 3},
		"cursor": {func(file string, text []byte) error {
			return os.WriteFile(filepath.Join(filepath.Dir(file), "cursor"), []byte("not a cursor, but as long as one would be...\n"), 0o600)
		}, "1 2 3 4 new", 0},
		"cursor 0": {func(file string, text []byte) error {
			return os.Truncate(filepath.Join(filepath.Dir(file), "cursor"), 0)
		}, "1 2 3 4 new", 0},
		"nothing": {func(file string, text []byte) error { return nil }, "2 3 4 new", 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			q, _, err := openQueue(dir, 100)
			if err != nil {
				t.Fatal(err)
			}
			for n := range 4 {
				if _, err := q.add(fmt.Append(nil, n+1)); err != nil {
					t.Fatal(err)
				}
			}
			q.first()
			q.done()
			if err := q.close(); err != nil {
				t.Fatal(err)
			}
			file := filesOf(t, dir)[0]
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// The third of four lines is where the middle is.
			if err := damage.do(file, text); err != nil {
				t.Fatal(err)
			}
			q, damaged, err := openQueue(dir, 100)
			if err != nil || damaged != damage.damaged {
				t.Fatalf("%d damaged, %v; want %d", damaged, err, damage.damaged)
			}
			if _, err := q.add([]byte("new")); err != nil {
				t.Fatal(err)
			}
			if err := q.close(); err != nil {
				t.Fatal(err)
			}
			if q, _, err = openQueue(dir, 100); err != nil {
				t.Fatal(err)
			}
			var got []string
			for {
				event, _, err := q.first()
				if err != nil {
					t.Fatal(err)
				}
				if event == nil {
					break
				}
				got = append(got, string(event))
				q.done()
			}
			if strings.Join(got, " ") != damage.want {
				t.Errorf("%q come; want %s", got, damage.want)
			}
			if err := q.close(); err != nil {
				t.Fatal(err)
			}
			if q, _, err = openQueue(dir, 100); err != nil {
				t.Fatal(err)
			}
			if event, _, err := q.first(); event != nil || err != nil {
				t.Errorf("%s comes again, %v", event, err)
			}
			q.close()
		})
	}
}

// TestQueueMeanwhile: what becomes unreadable while it waits is passed over.
func TestQueueMeanwhile(t *testing.T) {
	dir := t.TempDir()
	q, _, err := openQueue(dir, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	for range 3 {
		q.add([]byte(strings.Repeat("x", fileSize/32)))
	}
	if err := os.Truncate(filesOf(t, dir)[0], fileSize/32+100); err != nil {
		t.Fatal(err)
	}
	q.first()
	q.done()
	if event, lost, err := q.first(); event != nil || lost != 2 || err != nil {
		t.Errorf("%d bytes, %d lost, %v", len(event), lost, err)
	}
	if events, bytes := q.pending(); events != 0 || bytes != 0 {
		t.Errorf("%d pending, %d bytes", events, bytes)
	}
}

// TestQueueWriteFails: an event that could not be written down is not there, and
// takes none of the others with it.
func TestQueueWriteFails(t *testing.T) {
	q, _, err := openQueue(t.TempDir(), 100)
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	q.add([]byte("1"))
	q.out.Close()
	if _, err := q.add([]byte("2")); err == nil {
		t.Fatal("written into nothing")
	}
	if _, err := q.add([]byte("3")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1", "3", ""} {
		if event, lost, err := q.first(); string(event) != want || lost != 0 || err != nil {
			t.Errorf("%s, %v; want %s", event, err, want)
		}
		q.done()
	}
	if err := q.sync(); err == nil {
		t.Error("the file that fails was synced")
	}
}
