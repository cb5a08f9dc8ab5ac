//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// A midPull is a mirror whose upstream has stopped in the middle of the big
// layer, which skopeo is pulling.
type midPull struct {
	*mirror
	setup   setup
	img     *image
	counted *counter
	goOn    func() // lets the upstream go on
	client  *process
	out     string // where skopeo writes
}

func startMidPull(t *testing.T) *midPull {
	t.Helper()
	p := &midPull{img: newImage(t, t.Name())}
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", p.img)
	p.counted = startCounter(t, upstream.addr)
	var held <-chan struct{}
	held, p.goOn = p.counted.hold(t, p.img.big, p.img.bigSize/2)
	p.setup = setup{
		addr: regtest.FreeAddress(t), admin: regtest.FreeAddress(t), store: workDir(t),
		options: "grace_period 30s", registry: dockerHub(p.counted.addr),
	}
	p.mirror = startMirror(t, p.setup)

	dir := workDir(t)
	p.out = dir + "/out"
	p.client = start(t, bare(dir), tool(t, "skopeo"), "--registries-conf", registriesConf(t, dir, p.addr), "--insecure-policy",
		"copy", "docker://docker.io/library/hello", "oci:"+p.out+":latest")
	select {
	case <-held:
	case <-p.client.done:
		t.Fatalf("skopeo ended early: %s", p.client.tail())
	case <-time.After(20 * time.Second):
		t.Fatal("the mirror does not ask for the big layer")
	}
	return p
}

// finish lets the pull go on, and checks it.
func (p *midPull) finish(t *testing.T) {
	t.Helper()
	if p.client.ended() {
		t.Fatalf("the pull broke: %s", p.client.tail())
	}
	p.goOn()
	if err := p.client.wait(t, time.Minute); err != nil {
		t.Fatalf("the pull failed: %v\n%s", err, p.client.tail())
	}
	checkLayout(t, p.out, p.img.amd64)
	p.counted.fetchedOnce(t, p.img, p.img.amd64)
}

func (p *midPull) caddy(t *testing.T, command, config string, more ...string) error {
	t.Helper()
	_, err := try(t, bare(workDir(t)), caddyBin, append([]string{command, "--config", config, "--adapter", "caddyfile"}, more...)...)
	return err
}

// spooled are the files of the spool.
func (p *midPull) spooled(t *testing.T) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(filepath.Join(p.store, "mirror/spool"), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestReload: a reload in the middle of a pull disturbs nothing, and neither
// does one that is rejected, nor `caddy validate` beside it.
func TestReload(t *testing.T) {
	p := startMidPull(t)
	spooled := p.spooled(t)
	if len(spooled) == 0 {
		t.Fatal("half of the big layer is here, and the spool is empty")
	}
	if err := p.caddy(t, "validate", p.config); err != nil {
		t.Error(err)
	}

	changed := p.setup
	changed.registry = dockerHub(p.counted.addr, "timeouts 5s 20s 30s")
	file := writeFile(t, filepath.Join(workDir(t), "Caddyfile"), changed.caddyfile())
	if err := p.caddy(t, "reload", file, "--address", p.setup.admin); err != nil {
		t.Error(err)
	}

	bad := p.setup
	bad.registry = dockerHub(p.counted.addr, "credentials user {env.NOT_SET_ANYWHERE}")
	file = writeFile(t, filepath.Join(workDir(t), "Caddyfile"), bad.caddyfile())
	if err := p.caddy(t, "reload", file, "--address", p.setup.admin); err == nil {
		t.Error("a configuration with a credential that is not set was accepted")
	}

	for _, file := range spooled {
		// Smaller layers may have been on their way, and are done by now.
		big := strings.Contains(file, strings.TrimPrefix(p.img.big, "sha256:")[:16])
		if _, err := os.Stat(file); big && err != nil {
			t.Errorf("the spool has lost a file: %v", err)
		}
	}
	p.finish(t)
	pullWithSkopeo(t, p.addr, p.img, ":latest")
}

// TestKill: what a mirror leaves behind that is killed in the middle of a pull
// does no harm, and does not stay.
func TestKill(t *testing.T) {
	p := startMidPull(t)
	spooled := p.spooled(t)
	if len(spooled) == 0 {
		t.Fatal("half of the big layer is here, and the spool is empty")
	}
	p.kill()
	if err := p.client.wait(t, time.Minute); err == nil {
		t.Error("skopeo believes that it has the image")
	}
	p.goOn()

	m := startMirror(t, p.setup)
	pullWithSkopeo(t, m.addr, p.img, ":latest")
	for _, file := range spooled {
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s is still there", strings.TrimPrefix(file, p.store))
		}
	}
	p.counted.stop()
	pullWithSkopeo(t, m.addr, p.img, ":latest")
}

// TestKillFrugal: what had come when the mirror was killed is not fetched again.
func TestKillFrugal(t *testing.T) {
	img := newImageOf(t, "frugal", 40)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	for _, percent := range []int64{20, 50, 90} {
		t.Run(fmt.Sprintf("at %d %%", percent), func(t *testing.T) {
			counted := startCounter(t, upstream.addr)
			counted.slow(24 << 20) // or what is on its way is most of it
			s := setup{addr: regtest.FreeAddress(t), store: workDir(t), registry: dockerHub(counted.addr)}
			m := startMirror(t, s)
			dir := workDir(t)
			client := start(t, bare(dir), tool(t, "crane"), "pull", "--format=oci", m.addr+"/library/hello", dir+"/out")
			eventually(t, 30*time.Second, "part of the big layer", func() bool { return counted.fetched(img.big) >= img.bigSize*percent/100 })
			m.kill()
			if err := client.wait(t, time.Minute); err == nil {
				t.Error("crane believes that it has the image")
			}

			m = startMirror(t, s)
			pullWithCrane(t, m.addr, img, ":latest")
			counted.fetchedWithin(t, img, img.all(), 1.05)
			counted.stop()
			pullWithCrane(t, m.addr, img, ":latest")
		})
	}
}

// TestAbort: the fill of a client that has gone is put away, or finished if
// half of it is there, and the next client gets it without fetching anything
// twice.
func TestAbort(t *testing.T) {
	img := newImage(t, "abort")
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	for _, c := range []struct {
		percent int64
		outcome string
	}{{10, "fill put away"}, {90, "filled"}} {
		t.Run(fmt.Sprintf("at %d %%", c.percent), func(t *testing.T) {
			counted := startCounter(t, upstream.addr)
			held, goOn := counted.hold(t, img.big, img.bigSize*c.percent/100)
			m := startMirror(t, setup{registry: dockerHub(counted.addr)})
			dir := workDir(t)
			// Not an image: of that, one layer would be fetched ahead because of another.
			client := start(t, bare(dir), tool(t, "crane"), "blob", m.addr+"/library/hello@"+img.big)
			select {
			case <-held:
			case <-time.After(20 * time.Second):
				t.Fatal("the mirror does not ask for the big layer")
			}
			client.kill()
			if c.outcome == "filled" {
				goOn()
			}
			eventually(t, 20*time.Second, c.outcome, func() bool { return m.said(c.outcome, img.big) })
			goOn()
			pullWithCrane(t, m.addr, img, ":latest")
			counted.fetchedWithin(t, img, img.all(), 1.02)
			counted.stop()
			pullWithCrane(t, m.addr, img, ":latest")
		})
	}
}

// TestStop: a mirror that is asked to end lets a transfer finish within the
// grace period, and takes no new ones.
func TestStop(t *testing.T) {
	p := startMidPull(t)
	// A client of one request: skopeo wants another connection after this.
	resp, err := http.Get("http://" + p.addr + "/v2/library/hello/blobs/" + p.img.big)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()

	p.signal(t, syscall.SIGTERM)
	eventually(t, 10*time.Second, "the mirror to close its port", func() bool {
		conn, err := net.Dial("tcp", p.addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	if p.ended() {
		t.Fatalf("the mirror did not wait: %s", p.tail())
	}
	p.goOn()
	h := sha256.New()
	if _, err := io.Copy(h, resp.Body); err != nil {
		t.Fatalf("the transfer broke: %v", err)
	}
	if got := fmt.Sprintf("sha256:%x", h.Sum(nil)); got != p.img.big {
		t.Errorf("the blob has the digest %s, not %s", got, p.img.big)
	}
	if err := p.wait(t, 20*time.Second); err != nil {
		t.Errorf("the mirror ended: %v", err)
	}
	if left := p.spooled(t); len(left) > 0 {
		t.Errorf("left in the spool: %v", left)
	}
}
