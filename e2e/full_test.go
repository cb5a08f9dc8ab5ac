//go:build e2e

package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
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
		run(t, env, tool(t, "mount"), "-t", "tmpfs", "-o", fmt.Sprintf("size=%dM,nr_inodes=%d", mib, mib*64), "e2e", v.dir)
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

// crowd takes all inodes there are.
func (v *volume) crowd(t *testing.T) {
	t.Helper()
	if err := os.Mkdir(v.ballast, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(v.ballast, fmt.Sprint(i)))
		if errors.Is(err, syscall.ENOSPC) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
}

// clear makes room again.
func (v *volume) clear(t *testing.T) {
	t.Helper()
	if err := os.RemoveAll(v.ballast); err != nil {
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
	data := must(io.ReadAll(must(img.layer.Compressed())))

	for _, kind := range []string{"ext4", "tmpfs"} {
		for _, minFree := range []string{"0%", "10%"} {
			for _, when := range []string{"24 MiB left", "nothing left", "no inodes left", "in the middle"} {
				t.Run(kind+"/"+minFree+"/"+when, func(t *testing.T) {
					v := newVolume(t, kind, 96)
					counted := startCounter(t, upstream.addr)
					s := setup{store: v.dir + "/registry", storage: "min_free " + minFree, registry: dockerHub(counted.addr)}
					m := startMirror(t, s)
					url := "http://" + m.addr + "/v2/library/hello/blobs/" + img.big

					var begun []*slowReader
					reason := "min_free " + minFree
					goOn := func() {}
					switch when {
					case "24 MiB left":
						v.leave(t, 24<<20)
					case "nothing left":
						v.fill(t)
					case "no inodes left":
						reason = "no space left on device"
						v.crowd(t)
					case "in the middle":
						reason = "no space left on device"
						var held <-chan struct{}
						held, goOn = counted.hold(t, img.big, img.bigSize/2)
						// The first has read nothing yet, the last 7 MiB, and all
						// stay there until the disk is full.
						for i := range int64(8) {
							begun = append(begun, startSlowReader(t, url, i<<20))
						}
						select {
						case <-held:
						case <-time.After(20 * time.Second):
							t.Fatal("the mirror does not ask for the big layer")
						}
						v.fill(t)
					}
					t.Run("pulls", func(t *testing.T) { // ends when all have ended
						for i := range 8 {
							t.Run(fmt.Sprint("crane ", i), func(t *testing.T) {
								t.Parallel()
								pullWithCrane(t, m.addr, img, ":latest")
							})
						}
						for i, r := range begun {
							t.Run(fmt.Sprint(i, " MiB read"), func(t *testing.T) {
								t.Parallel()
								r.finish(t, img.big)
							})
						}
						t.Run("containerd-2.4", func(t *testing.T) {
							t.Parallel()
							pullInParallel(t, m.addr, img, ":latest", 8<<20, 3)
						})
						t.Run("lazy", func(t *testing.T) {
							t.Parallel()
							l := &lazyReader{url, data}
							for _, pieces := range l.some(t.Name(), 20) {
								if err := l.read(pieces...); err != nil {
									t.Error(err)
								}
							}
						})
						goOn()
					})
					eventually(t, 20*time.Second, "the mirror to say why it keeps nothing", func() bool {
						// The first thing that found no room is told of, and it may be
						// smaller than the big layer.
						return m.said("disk trouble", reason) || m.said("disk trouble", "no space left on device")
					})
					kept := filepath.Join(m.store, "docker/registry/v2/blobs/sha256", img.big[7:9], img.big[7:], "data")
					if _, err := os.Stat(kept); err == nil {
						t.Error("the big layer has found room; this proves nothing")
					}
					pullWithCrane(t, m.addr, img, ":latest")
					m.stop(t)
					m = startMirror(t, s)
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

// A slowReader is a client in the middle of a blob.
type slowReader struct {
	resp *http.Response
	sum  hash.Hash
}

// startSlowReader asks for a blob and reads so much of it.
func startSlowReader(t *testing.T, url string, bytes int64) *slowReader {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	r := &slowReader{resp, sha256.New()}
	if _, err := io.CopyN(r.sum, resp.Body, bytes); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	return r
}

// finish reads the rest.
func (r *slowReader) finish(t *testing.T, digest string) {
	t.Helper()
	if _, err := io.Copy(r.sum, r.resp.Body); err != nil {
		t.Errorf("the transfer broke: %v", err)
	}
	if got := fmt.Sprintf("sha256:%x", r.sum.Sum(nil)); got != digest {
		t.Errorf("the blob has the digest %s, not %s", got, digest)
	}
}

// TestDiskFullCredentials: that it cannot be written down does not make an
// image private.
func TestDiskFullCredentials(t *testing.T) {
	img := newImage(t, "public")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	v := newVolume(t, "tmpfs", 96)
	m := startMirror(t, setup{store: v.dir + "/registry", storage: "min_free 10%", registry: dockerHub(upstream.addr, "credentials user secret")})
	v.fill(t)
	pullWithCrane(t, m.addr, img, ":latest")
	v.clear(t)
	pullWithCrane(t, m.addr, img, ":latest")
}
