package backing_test

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/failpoint"
)

const killDir, killPoint = "BACKING_TEST_DIR", "BACKING_TEST_POINT"

// kills are the points at which a process may die, and whether the version that it
// was making, or deleting, is there afterwards.
var kills = map[string]struct{ deleting, there bool }{
	"backing.blob":       {false, false},
	"backing.manifest":   {false, false},
	"backing.tag":        {false, false},
	"backing.record":     {false, true},
	"backing.deleting":   {true, false},
	"backing.untagged":   {true, false},
	"backing.unmanifest": {true, false},
	"backing.unrecord":   {true, false},
}

// TestKilled is the process that TestKill starts, which dies.
func TestKilled(t *testing.T) {
	dir, point := os.Getenv(killDir), os.Getenv(killPoint)
	if dir == "" {
		return
	}
	s := &shelf{t: t, dir: dir, set: backing.Settings{Prefix: "images"}}
	s.start()
	s.add(backing.Draft{Name: "a", Tags: []string{"stable"}}, rawDisk(1))
	die := func() {
		failpoint.Set(func(name string) {
			if name == point {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
	}
	if !kills[point].deleting {
		die()
		_, _, err := s.upload(backing.Draft{Name: "a", Tags: []string{"stable", "new"}, Labels: map[string]string{"x": "y"}}, rawDisk(2))
		t.Fatalf("%s was not reached: %v", point, err)
	}
	s.add(backing.Draft{Name: "a"}, rawDisk(2))
	die()
	t.Fatalf("%s was not reached: %v", point, s.Delete(t.Context(), "a", "v2", "", false))
}

// TestKill: a process that dies between two steps leaves a version whole or none, and
// who does it again gets it done.
func TestKill(t *testing.T) {
	for point, c := range kills {
		t.Run(point, func(t *testing.T) {
			s := &shelf{t: t, dir: t.TempDir(), set: backing.Settings{Prefix: "images"}}
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+s.dir, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			s.start()
			defer s.stop()
			if c.deleting {
				// It goes on behind whoever starts, until the record is gone.
				for {
					var told *backing.Error
					if _, err := s.Version(t.Context(), "a", "v2"); errors.As(err, &told) && told.Code == backing.NotFound {
						break
					} else if err != nil {
						t.Fatal(err)
					}
				}
			}
			i, err := s.Image(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			s.reads(s.version("a", "v1"), rawDisk(1))
			stable, versions := "v1", 1
			if c.there {
				stable, versions = "v2", 2
				s.reads(s.version("a", "v2"), rawDisk(2))
				if i.Labels["x"] != "y" || i.Tags["new"].Version != "v2" {
					t.Errorf("it is half of itself: %+v", i)
				}
			} else if s.tagged("a", "v2") != "" || s.tagged("a", "new") != "" || len(i.Labels) > 0 {
				t.Errorf("something is left: %+v", i)
			}
			if s.version("a", "stable").Version != stable || s.tagged("a", "stable") != s.tagged("a", stable) {
				t.Errorf("the tag means %s", s.version("a", "stable").Version)
			}
			manifests := 0
			for _, err := range s.tree.ListManifests(t.Context(), "images/a") {
				if err != nil {
					t.Fatal(err)
				}
				manifests++
			}
			if len(i.Versions) != versions || manifests != versions {
				t.Errorf("%d versions, %d manifests; want %d", len(i.Versions), manifests, versions)
			}
			if left := s.left("mirror/local/backing-images/intents"); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			v, _, err := s.upload(backing.Draft{Name: "a", Tags: []string{"stable", "new"}}, rawDisk(2))
			if err != nil || v.State != backing.Ready || len(v.Tags) != 2 {
				t.Fatalf("%+v, %v", v, err)
			}
			s.reads(v, rawDisk(2))
		})
	}
}
