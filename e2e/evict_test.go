//go:build e2e

package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestSmallDisk: herds that pull more than there is room for get everything,
// the budget is kept, and what is pinned or was pulled last is still there when
// the upstream is not.
func TestSmallDisk(t *testing.T) {
	const images, mib = 10, 16
	upstream := startRegistry(t, workDir(t), "")
	var pulled []*image
	for i := range images {
		img := newImageOf(t, fmt.Sprint("small disk ", i), mib)
		upstream.push(t, fmt.Sprint("library/img", i), img)
		pulled = append(pulled, img)
	}
	for _, kind := range []string{"ext4", "tmpfs"} {
		for _, budget := range []string{"min_free 30%", "max_size 80MiB"} {
			t.Run(kind+"/"+budget, func(t *testing.T) {
				v := newVolume(t, kind, 160)
				counted := startCounter(t, upstream.addr)
				s := setup{addr: regtest.FreeAddress(t), admin: regtest.FreeAddress(t), store: v.dir + "/registry", storage: budget, registry: dockerHub(counted.addr)}
				if budget != "min_free 30%" {
					s.storage += "\n min_free 1%"
				}
				m := startMirror(t, s)
				pullImage(t, m.addr, 0, pulled[0])
				eventually(t, 20*time.Second, "the catalog to be complete", func() bool { return keptBy(t, s).Catalog == "ready" })
				registryCommand(t, s, "pin", "img0:latest")

				herd := func(t *testing.T) {
					for client := range 3 {
						t.Run(fmt.Sprint("client ", client), func(t *testing.T) {
							t.Parallel()
							for i := range images {
								n := (i*(client+1) + client) % images
								pullImage(t, m.addr, n, pulled[n])
							}
						})
					}
				}
				t.Run("herd", herd)
				m.kill()
				m = startMirror(t, s)
				t.Run("after kill -9", herd)

				// The last ones, which must be held then.
				for _, n := range []int{7, 8} {
					pullImage(t, m.addr, n, pulled[n])
				}
				eventually(t, 30*time.Second, "the budget to be kept", func() bool {
					used, free := v.used(t, s.store)
					if budget == "min_free 30%" {
						return free >= 30
					}
					return used <= 80<<20
				})
				if status := keptBy(t, s); status.Evicted.Blobs == 0 {
					t.Errorf("nothing has been evicted: %+v", status)
				}
				// A pull that found no room was passed through, and the next keeps it.
				for _, n := range []int{7, 8} {
					pullImage(t, m.addr, n, pulled[n])
				}
				eventually(t, 20*time.Second, "the last image to be kept", func() bool {
					_, err := os.Stat(filepath.Join(s.store, "docker/registry/v2/blobs/sha256", pulled[8].big[7:9], pulled[8].big[7:], "data"))
					return err == nil
				})
				checkBlobs(t, s.store)
				counted.stop()
				pullImage(t, m.addr, 8, pulled[8])
				pullImage(t, m.addr, 0, pulled[0])
				m.stop(t)
				m = startMirror(t, s)
				pullImage(t, m.addr, 8, pulled[8])
				pullImage(t, m.addr, 0, pulled[0])
			})
		}
	}
}

func pullImage(t *testing.T, addr string, n int, img *image) {
	t.Helper()
	dir := workDir(t)
	run(t, bare(dir), tool(t, "crane"), "pull", "--insecure", "--format=oci", fmt.Sprintf("%s/library/img%d:latest", addr, n), dir+"/out")
	checkLayout(t, dir+"/out", img.all())
	os.RemoveAll(dir + "/out")
}

// used is what a directory takes, and how much of the volume is free for
// everyone, in percent.
func (v *volume) used(t *testing.T, dir string) (bytes int64, percent float64) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil // evicted meanwhile
		}
		if info, err := entry.Info(); err == nil {
			bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	var stat syscall.Statfs_t
	if err := syscall.Statfs(v.dir, &stat); err != nil {
		t.Fatal(err)
	}
	return bytes, 100 * float64(stat.Bavail) / float64(stat.Blocks)
}

// checkBlobs hashes everything that a store has.
func checkBlobs(t *testing.T, store string) {
	t.Helper()
	n := 0
	for _, path := range must(filepath.Glob(filepath.Join(store, "docker/registry/v2/blobs/sha256/*/*/data"))) {
		f, err := os.Open(path)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		f.Close()
		if got, want := fmt.Sprintf("%x", h.Sum(nil)), filepath.Base(filepath.Dir(path)); err != nil || got != want {
			t.Errorf("the store has %s under %s, %v", got, want, err)
		}
		n++
	}
	if n == 0 {
		t.Error("the store is empty")
	}
}

// TestUsage: what the mirror says that its content takes is what the filesystem
// says, small and large images together.
func TestUsage(t *testing.T) {
	upstream := startRegistry(t, workDir(t), "")
	v := newVolume(t, "ext4", 512)
	s := setup{admin: regtest.FreeAddress(t), store: v.dir + "/registry", storage: "min_free 10%", registry: dockerHub(upstream.addr)}
	m := startMirror(t, s)
	for i := range 12 {
		img := newImageOf(t, fmt.Sprint("usage ", i), 1+i%5)
		upstream.push(t, fmt.Sprint("library/img", i), img)
		pullImage(t, m.addr, i, img)
	}
	eventually(t, 20*time.Second, "the catalog to say what the filesystem says", func() bool {
		used, _ := v.used(t, s.store+"/docker")
		records, _ := v.used(t, s.store+"/mirror/records")
		said := keptBy(t, s).Usage.Allocated
		t.Logf("%d bytes, and the filesystem says %d", said, used+records)
		return said*100 >= (used+records)*99 && said*100 <= (used+records)*101
	})
}

// kept is what `caddy registry status` says.
type kept struct {
	Catalog string
	Usage   struct{ Allocated int64 }
	Evicted struct{ Roots, Blobs, Bytes int64 }
}

func keptBy(t *testing.T, s setup) (status kept) {
	t.Helper()
	if err := json.Unmarshal([]byte(registryCommand(t, s, "status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	return status
}

// registryCommand runs `caddy registry` against a mirror.
func registryCommand(t *testing.T, s setup, args ...string) string {
	t.Helper()
	return strings.TrimSpace(run(t, bare(workDir(t)), caddyBin, append([]string{"registry", "--address", s.admin}, args...)...))
}
