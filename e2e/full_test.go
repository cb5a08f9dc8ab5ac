//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A volume is a small filesystem of its own.
type volume struct {
	dir     string
	ballast string // the file that takes its room
}

// newVolume mounts a filesystem of so many MiB, until the test ends.
func newVolume(t *testing.T, kind string, mib int64) *volume {
	t.Helper()
	dir := workDir(t)
	v := &volume{dir: dir + "/mnt", ballast: dir + "/mnt/ballast"}
	if err := os.Mkdir(v.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	env := bare(dir)
	switch kind {
	case "tmpfs":
		run(t, env, tool(t, "mount"), "-t", "tmpfs", "-o", fmt.Sprintf("size=%dM", mib), "e2e", v.dir)
	case "ext4":
		image := writeFile(t, dir+"/image", "")
		if err := os.Truncate(image, mib<<20); err != nil {
			t.Fatal(err)
		}
		run(t, env, tool(t, "mkfs.ext4"), "-q", image)
		run(t, env, tool(t, "mount"), "-o", "loop", image, v.dir)
	}
	return v
}

// leave takes all room but so many bytes.
func (v *volume) leave(t *testing.T, bytes int64) {
	t.Helper()
	f, err := os.Create(v.ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var stat syscall.Statfs_t
	if err := syscall.Statfs(v.dir, &stat); err != nil {
		t.Fatal(err)
	}
	free := int64(stat.Bavail)*stat.Bsize - bytes
	for run := make([]byte, 1<<20); free > 0; {
		n, err := f.Write(run[:min(int64(len(run)), free)])
		if free -= int64(n); err != nil {
			t.Fatal(err)
		}
	}
}

// fill takes all room there is, root's own included.
func (v *volume) fill(t *testing.T) {
	t.Helper()
	f, err := os.Create(v.ballast)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for run := make([]byte, 1<<20); len(run) > 0; {
		if _, err := f.Write(run); errors.Is(err, syscall.ENOSPC) {
			run = run[:len(run)/2]
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// clear makes room again.
func (v *volume) clear(t *testing.T) {
	t.Helper()
	if err := os.Remove(v.ballast); err != nil {
		t.Fatal(err)
	}
}

// TestDiskFull: where the disk cannot take a layer, or turns out in the middle
// of it to be full, all the clients that are pulling get it nevertheless. Once
// there is room, it is kept.
func TestDiskFull(t *testing.T) {
	img := newImageOf(t, "full", 32)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)

	for _, kind := range []string{"ext4", "tmpfs"} {
		for _, minFree := range []string{"min_free 0%", ""} {
			for _, full := range []string{"before", "in the middle"} {
				t.Run(kind+"/"+minFree+"/"+full, func(t *testing.T) {
					v := newVolume(t, kind, 96)
					counted := startCounter(t, upstream.addr)
					m := startMirror(t, setup{store: v.dir + "/registry", storage: minFree, registry: dockerHub(counted.addr)})
					together := func() {
						t.Run("pulls", func(t *testing.T) { // ends when all have ended
							for i := range 8 {
								t.Run(fmt.Sprint(i), func(t *testing.T) {
									t.Parallel()
									pullWithCrane(t, m.addr, img, ":latest")
								})
							}
						})
					}

					reason := "no space left on device"
					if full == "before" {
						reason = "keeps"
						v.leave(t, 24<<20)
						together()
					} else {
						held, goOn := counted.hold(t, img.big, img.bigSize/2)
						filled := make(chan struct{})
						go func() {
							defer close(filled)
							defer goOn()
							select {
							case <-held:
							case <-time.After(time.Minute):
								t.Error("the mirror does not ask for the big layer")
								return
							}
							v.fill(t)
						}()
						together()
						<-filled
					}
					eventually(t, 20*time.Second, "the mirror to say why it keeps nothing", func() bool {
						return strings.Contains(m.output(), "passed through: ") && strings.Contains(m.output(), reason)
					})
					if held := filepath.Join(m.store, "docker/registry/v2/blobs/sha256", img.big[7:9], img.big[7:], "data"); exists(held) {
						t.Errorf("%s has found room; this proves nothing", held)
					}
					pullWithCrane(t, m.addr, img, ":latest")

					v.clear(t)
					pullWithCrane(t, m.addr, img, ":latest")
					eventually(t, 20*time.Second, "the big layer to be kept", func() bool { return m.said("filled", img.big) })
					counted.stop()
					pullWithCrane(t, m.addr, img, ":latest")
				})
			}
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
