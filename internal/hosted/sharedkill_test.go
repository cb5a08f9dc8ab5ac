package hosted_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/hosted"
)

const killDir, killPoint, killUpload = "HOSTED_TEST_DIR", "HOSTED_TEST_POINT", "HOSTED_TEST_UPLOAD"

var killed = random(20, 100_000)

// TestSharedKilled is the process that TestSharedKill starts, which dies.
func TestSharedKilled(t *testing.T) {
	dir, point := os.Getenv(killDir), os.Getenv(killPoint)
	if dir == "" {
		return
	}
	far := farIn(t, filepath.Join(dir, "far"))
	h := &host{t: t, dir: filepath.Join(dir, "doomed"), far: far}
	h.start()
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	u := h.find(os.Getenv(killUpload))
	h.append(u, body(killed[40_000:80_000]), 80_000)
	_, err := u.Finish(t.Context(), digest.FromBytes(killed), body(killed[80_000:]))
	t.Fatalf("%s was not reached: %v", point, err)
}

// TestSharedKill: a process that dies between two steps loses nothing that it has
// acknowledged, and another one goes on with it.
func TestSharedKill(t *testing.T) {
	d := digest.FromBytes(killed)
	for point, end := range map[string]int{ // where the upload ends then; -1: there is none
		"upload.written":   40_000,
		"upload.piece":     40_000,
		"upload.state":     80_000,
		"upload.gathered":  80_000,
		"push.stored":      80_000,
		"push.linked":      80_000,
		"push.synced":      80_000,
		"upload.committed": 80_000,
		"upload.ended":     -1,
	} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			far := farIn(t, filepath.Join(dir, "far"))
			h := &host{t: t, dir: filepath.Join(dir, "other"), far: far}
			h.start()
			id := h.begin("").ID()
			h.append(h.find(id), body(killed[:40_000]), 40_000)
			h.stop()
			far.Close()

			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSharedKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+dir, killPoint+"="+point, killUpload+"="+id)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}

			far = farIn(t, filepath.Join(dir, "far"))
			h.far = far
			h.start()
			again := &host{t: t, dir: filepath.Join(dir, "doomed"), far: far}
			again.start()
			defer func() {
				again.stop()
				h.stop()
				far.Close()
			}()
			u, err := h.Upload(t.Context(), "apps/web", id)
			switch {
			case end < 0:
				if !errors.Is(err, hosted.ErrNoUpload) {
					t.Errorf("want no such upload: %v", err)
				}
				if left := far.pieces(t, id); len(left) != 2 {
					t.Errorf("left: %q", left)
				}
			case err != nil:
				t.Fatal(err)
			default:
				if u.Offset() != int64(end) {
					t.Errorf("it ends at %d, want %d", u.Offset(), end)
				}
				if point != "upload.written" && point != "upload.piece" {
					break
				}
				// The piece of the one that died is not taken for one of these.
				h.append(u, body(killed[40_000:60_000]), 60_000)
				end = 60_000
			}
			if end >= 0 {
				if _, err := again.find(id).Finish(t.Context(), d, body(killed[end:])); err != nil {
					t.Fatal(err)
				}
			}
			h.has("apps/web", d, killed)
			late(hosted.UploadLife+time.Hour, h, again)
			again.SweepDistant(t.Context())
			nothing(t, far, h, again)
		})
	}
}
