package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

func provisioned(t *testing.T, d *Disk) *Disk {
	t.Helper()
	if d.MinFree == "" {
		d.MinFree = "1MB"
	}
	if err := d.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestStore(t *testing.T) {
	storagetest.Test(t, func(t *testing.T) storage.Store {
		s, err := provisioned(t, &Disk{Directory: filepath.Join(t.TempDir(), "made", "on", "use")}).Open(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if s.Distant() != nil {
			t.Error("a disk is distant")
		}
		return s
	})
}

func TestProvisionTouchesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	provisioned(t, &Disk{Directory: dir})
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Provision made the directory: %v", err)
	}
}

func TestBadSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		disk Disk
		want string
	}{
		{Disk{Directory: file}, "is a file"},
		{Disk{Directory: filepath.Join(file, "below")}, "directory"},
		{Disk{Directory: "{env.SURELY_NOT_SET_ANYWHERE}"}, "directory"},
		{Disk{MinFree: "lots"}, "min_free"},
		{Disk{MinFree: "100%"}, "min_free"},
		{Disk{MinFree: "-1%"}, "min_free"},
		{Disk{FileMode: "9"}, "file_mode"},
		{Disk{DirectoryMode: "0550"}, "owner"},
	} {
		if err := c.disk.Provision(caddy.Context{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want an error about %s", c.disk, err, c.want)
		}
	}
}

func TestLinksHaveOneIdentity(t *testing.T) {
	real := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	a := provisioned(t, &Disk{Directory: filepath.Join(real, "new")})
	b := provisioned(t, &Disk{Directory: filepath.Join(link, "new")})
	if a.Identity() != b.Identity() {
		t.Errorf("%q and %q", a.Identity(), b.Identity())
	}
}

func TestModes(t *testing.T) {
	d := provisioned(t, &Disk{Directory: filepath.Join(t.TempDir(), "s"), FileMode: "0600", DirectoryMode: "0700"})
	s, err := d.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	check := func(key string, file, dir fs.FileMode) {
		t.Helper()
		if err := s.Put(context.Background(), key, nil, storage.Lazy); err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]fs.FileMode{key: file, filepath.Dir(key): dir} {
			info, err := os.Stat(filepath.Join(d.Directory, path))
			if err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: mode %v, %v; want %v", path, info.Mode().Perm(), err, want)
			}
		}
	}
	check("a/b", 0o600, 0o700)
	// A later configuration takes effect in the open store.
	if err := provisioned(t, &Disk{Directory: d.Directory, FileMode: "0640", DirectoryMode: "0750"}).Configure(s); err != nil {
		t.Fatal(err)
	}
	check("c/d", 0o640, 0o750)
}

func TestMinFreeCountsReservations(t *testing.T) {
	d := provisioned(t, &Disk{Directory: t.TempDir(), MinFree: "99.99%"})
	s, err := d.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Reserve(1); !errors.Is(err, storage.ErrFull) || !strings.Contains(err.Error(), "min_free 99.99%") {
		t.Errorf("got %v, want ErrFull naming the option", err)
	}
	if err := provisioned(t, &Disk{Directory: d.Directory, MinFree: "0%"}).Configure(s); err != nil {
		t.Fatal(err)
	}
	// Half of what is free fits once; the second half of a little more does
	// not until the first is released.
	half := int64(1)
	for {
		r, err := s.Reserve(half * 2)
		if err != nil {
			break
		}
		r.Release()
		half *= 2
	}
	first, err := s.Reserve(half)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(half); !errors.Is(err, storage.ErrFull) {
		t.Errorf("what is reserved was given away again: %v", err)
	}
	first.Use(half / 2)
	first.Release()
	again, err := s.Reserve(half)
	if err != nil {
		t.Errorf("what was released is not free: %v", err)
	} else {
		again.Release()
	}
}

// TestOneProcess starts this test again as a process that holds the store.
func TestOneProcess(t *testing.T) {
	if dir := os.Getenv("HOLD_STORE"); dir != "" {
		s, err := provisioned(t, &Disk{Directory: dir}).Open(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		spool, err := s.Spool("parts")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{
			filepath.Join(spool, "part"),
			filepath.Join(dir, "mirror", "temp", "half-written"),
			filepath.Join(dir, "mirror", "spool", "4711-123", "of-an-earlier-version"),
		} {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		os.Stdout.WriteString("holding\n")
		os.Stdin.Read(make([]byte, 1)) // until killed
		return
	}
	d := provisioned(t, &Disk{Directory: t.TempDir()})
	child := exec.Command(os.Args[0], "-test.run=^TestOneProcess$")
	child.Env = append(os.Environ(), "HOLD_STORE="+d.Directory)
	child.Stdin = blockingStdin(t)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(context.Background()); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a second process: %v, want ErrLocked", err)
	}
	child.Process.Kill()
	child.Wait()

	s, err := d.Open(context.Background())
	if err != nil {
		t.Fatalf("after the first was killed: %v", err)
	}
	second, err := d.Open(context.Background())
	if err != nil {
		t.Fatalf("twice in one process: %v", err)
	}
	for pattern, want := range map[string]int{"temp/*": 0, "spool/*": 1, "spool/parts/*": 1} {
		left, err := filepath.Glob(filepath.Join(d.Directory, "mirror", pattern))
		if err != nil || len(left) != want {
			t.Errorf("the killed process has left %q, %v; want %d %s", left, err, want, pattern)
		}
	}
	for _, s := range []storage.Store{s, second} {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(d.Directory, "mirror", "temp")); err != nil || len(left) > 0 {
		t.Errorf("left after Close: %v, %v", left, err)
	}
}

func blockingStdin(t *testing.T) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r
}
