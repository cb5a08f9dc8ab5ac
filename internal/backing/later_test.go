package backing_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/failpoint"
)

// sent is an upload of which everything has come, and that is hashed later.
func (s *shelf) sent(data []byte) *backing.Upload {
	s.t.Helper()
	u, err := s.Receive(s.t.Context(), backing.Draft{}, -1)
	if err != nil {
		s.t.Fatal(err)
	}
	u.HashLater()
	if _, err := u.Append(s.t.Context(), body(data)); err != nil {
		s.t.Fatal(err)
	}
	return u
}

// later has a version made by a job.
func (s *shelf) later(d backing.Draft, data []byte) backing.Job {
	s.t.Helper()
	j, err := s.sent(data).FinishLater(s.t.Context(), d)
	if err != nil {
		s.t.Fatal(err)
	}
	return j
}

func TestFinishLater(t *testing.T) {
	s := newShelf(t)
	d := backing.Draft{Name: "a", Tags: []string{"stable"}}
	j := s.later(d, rawDisk(1))
	if j.Kind != "upload" || j.State != backing.Running || j.Name != "a" || j.Version != "v1" || j.Progress.Received != 4096 || j.Progress.Total != 4096 {
		t.Errorf("%+v", j)
	}
	if j = s.ends(j.ID); j.State != backing.Succeeded || j.Version != "v1" {
		t.Fatalf("%+v", j)
	}
	v := s.version("a", "stable")
	s.reads(v, rawDisk(1))
	if v.Source.Type != "upload" {
		t.Errorf("%+v", v.Source)
	}
	// The same bytes are the version that there is.
	if j = s.ends(s.later(d, rawDisk(1)).ID); j.State != backing.Succeeded || j.Version != "v1" {
		t.Errorf("%+v", j)
	}
	for name, c := range map[string]struct {
		d    backing.Draft
		code backing.Code
	}{
		"other bytes":  {backing.Draft{Name: "a", Version: "v1"}, backing.VersionConflict},
		"checksum":     {backing.Draft{Name: "a", SHA256: v.Digests.SHA256}, backing.ChecksumMismatch},
		"no such name": {backing.Draft{Name: "A"}, backing.Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			u := s.sent(rawDisk(2))
			j, err := u.FinishLater(t.Context(), c.d)
			if c.code == backing.Malformed {
				is(t, err, c.code)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if j = s.ends(j.ID); j.State != backing.JobFailed || j.Code != c.code {
				t.Errorf("%+v", j)
			}
			_, err = s.Upload(t.Context(), u.ID())
			is(t, err, backing.NotFound)
		})
	}
}

// TestFinishLaterSurvives: what the store could not take before the process ended, the
// next one stores, unless the machine has stopped in between.
func TestFinishLaterSurvives(t *testing.T) {
	for name, c := range map[string]struct {
		decompress string
		lost       bool
	}{
		"as it came": {},
		"unpacked":   {decompress: "auto"},
		"no blob":    {lost: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t)
			sent := rawDisk(1)
			if c.decompress != "" {
				var b bytes.Buffer
				w, _ := zstd.NewWriter(&b)
				w.Write(sent)
				w.Close()
				sent = b.Bytes()
			}
			s.down.Store(true)
			j, err := s.sent(sent).FinishLater(t.Context(), backing.Draft{Name: "a", Decompress: c.decompress, SHA256: digest.SHA256.FromBytes(sent)})
			if err != nil {
				t.Fatal(err)
			}
			for is, err := range s.WatchJob(t.Context(), j.ID) {
				if err != nil || is.State != backing.Running {
					t.Fatalf("%+v: %v", is, err)
				}
				if !is.Retry.IsZero() {
					break
				}
			}
			s.stop()
			if c.lost {
				for _, name := range s.left("") {
					if data, err := os.ReadFile(name); err == nil && bytes.Equal(data, rawDisk(1)) {
						os.Remove(name)
					}
				}
			}
			s.down.Store(false)
			s.start()
			j = s.ends(j.ID)
			if c.lost {
				if j.State != backing.JobFailed || j.Code != backing.NotFound {
					t.Errorf("%+v", j)
				}
				return
			}
			if j.State != backing.Succeeded {
				t.Fatalf("%+v", j)
			}
			s.reads(s.version("a", "v1"), rawDisk(1))
			if left := s.left("mirror/local/backing-images/uploads"); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// TestKilledLater is the process that TestKillLater starts, which dies.
func TestKilledLater(t *testing.T) {
	dir, point := os.Getenv(killDir), os.Getenv(killPoint)
	if dir == "" {
		return
	}
	s := &shelf{t: t, dir: dir, set: backing.Settings{Prefix: "images"}}
	s.start()
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	j := s.later(backing.Draft{Name: "a", Tags: []string{"stable"}}, rawDisk(1))
	t.Fatalf("%s was not reached: %+v", point, s.ends(j.ID))
}

// TestKillLater: what has been accepted becomes a version, wherever the process dies.
func TestKillLater(t *testing.T) {
	for _, point := range []string{"receive.checked", "backing.blob", "backing.manifest", "backing.tag", "backing.record"} {
		t.Run(point, func(t *testing.T) {
			s := &shelf{t: t, dir: t.TempDir(), set: backing.Settings{Prefix: "images"}}
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledLater$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+s.dir, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			s.start()
			defer s.stop()
			jobs, err := s.Jobs(t.Context())
			if err != nil || len(jobs) != 1 {
				t.Fatalf("%+v, %v", jobs, err)
			}
			if j := s.ends(jobs[0].ID); j.State != backing.Succeeded {
				t.Fatalf("%+v", j)
			}
			s.reads(s.version("a", "stable"), rawDisk(1))
		})
	}
}
