package retain

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

const killDir, killPoint = "RETAIN_TEST_DIR", "RETAIN_TEST_POINT"

var killOld, killShared = content(1, 5000), content(2, 5000)

// TestKilled is the process that TestKillInRemoval starts: it evicts an image and
// dies in between.
func TestKilled(t *testing.T) {
	dir, point := os.Getenv(killDir), os.Getenv(killPoint)
	if dir == "" {
		return
	}
	b := keep(t, func(b *kept) { b.dir = dir })
	b.repository("docker.io/old", "docker.io")
	b.repository("docker.io/live", "docker.io")
	b.repository("apps/web", "")
	b.ready()
	for _, old := range []string{"v1", "v2"} { // a tag that has meant two
		b.pull("docker.io/old", old, killOld, killShared)
	}
	b.tag("docker.io/old", "v1", b.means("docker.io/old", "v2"))
	b.pull("docker.io/live", "v1", killShared)
	b.pull("apps/web", "v1", killShared, content(3, 5000))
	b.clock.pass(30 * day)
	b.read("docker.io/live", "v1")
	b.flush()
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	b.Set(Settings{Limits: map[string]Limit{"docker.io": {TTL: day}}})
	b.relieved()
	t.Fatalf("%s was not reached", point)
}

// TestKillInRemoval: a process that dies between two steps of a removal leaves
// nothing that is wrong, and what it leaves behind goes.
func TestKillInRemoval(t *testing.T) {
	for _, point := range []string{"evict.untagged", "evict.unindexed", "evict.unmanifested", "evict.unlinked", "evict.removed"} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+dir, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			b := keep(t, func(b *kept) {
				b.dir = dir
				b.clock.now = b.clock.now.Add(30 * day)
			})
			b.agrees(b.ready())
			b.clock.pass(30 * day)
			b.read("docker.io/live", "v1")
			b.Set(Settings{Limits: map[string]Limit{"docker.io": {TTL: day}}})
			b.relieved()
			b.clock.pass(day)
			b.done(b.GC(false))
			if b.means("docker.io/old", "v1")+b.means("docker.io/old", "v2") != "" || b.holds(killOld) || b.holds(image("v2", nil, killOld, killShared)) {
				t.Error("something of the old image stays")
			}
			for repository, layers := range map[string][][]byte{"docker.io/live": {killShared}, "apps/web": {killShared, content(3, 5000)}} {
				if _, err := b.tree.Manifest(t.Context(), repository, b.means(repository, "v1")); err != nil {
					t.Errorf("%s: %v", repository, err)
				}
				for _, l := range layers {
					if !b.holds(l) || !b.member(repository, l) {
						t.Errorf("%s has lost a layer", repository)
					}
				}
			}
			b.agrees(b.ready())
		})
	}
}
