package module_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// fetched checks that hardly more than a blob was fetched of it.
func fetched(t *testing.T, most float64, layer regtest.Content, from ...*regtest.Registry) {
	t.Helper()
	var sent int64
	for _, up := range from {
		sent += up.Sent(layer.Digest)
	}
	if share := float64(sent) / float64(len(layer.Data)); share < 1 || share > most {
		t.Errorf("%d bytes of %d were fetched, %.3f of it", sent, len(layer.Data), share)
	}
}

// herd lets n clients get a blob at once.
func (m *mirror) herd(n int, path string, layer regtest.Content) (wait func()) {
	layer.MediaType = "application/octet-stream"
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			resp, err := m.send("GET", path)
			if err != nil {
				m.t.Error(err)
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err := check(&answer{resp, body, err}, layer); err != nil {
				m.t.Error(err)
			}
		})
	}
	return all.Wait
}

// TestAbort: everyone leaves a blob. Where little of it is there, it is put away
// and gone on with later; otherwise it is finished.
func TestAbort(t *testing.T) {
	const size = 24 << 20
	for _, c := range []struct {
		percent     int64
		connections string
		rate        int64
	}{
		{10, "", 800_000},
		{10, "connections 1", 3_200_000},
		{90, "", 0},
		{90, "connections 1", 0},
	} {
		t.Run(fmt.Sprint(c.percent, c.connections), func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			layer := regtest.Random("x", size)
			image := regtest.NewImage("x", layer)
			up.Push("library/x", image, "latest")
			m := start(t, upstreamFor("docker.io", up, c.connections), "")
			path := "/v2/library/x/blobs/" + layer.Digest.String()
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			hold := make(chan struct{})
			if c.percent < 50 {
				up.Fail(regtest.Fault{Path: layer.Digest.String(), Rate: c.rate})
			} else {
				up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: size * 95 / 100})
			}
			resp := m.open("GET", path)
			if c.percent < 50 {
				eventually(t, "some of the blob to be sent", func() bool { return up.Sending(layer.Digest) >= size*c.percent/100 })
			} else if begin, err := io.ReadAll(io.LimitReader(resp.Body, size*c.percent/100)); err != nil || !bytes.Equal(begin, layer.Data[:len(begin)]) {
				t.Errorf("%d bytes, or wrong ones: %v", len(begin), err)
			}
			resp.Body.Close()
			if c.percent < 50 {
				eventually(t, "the fill to be put away", func() bool { return len(m.logs.with("fill put away")) == 1 })
				if sent := up.Sent(layer.Digest); sent >= size/2 {
					t.Errorf("%d bytes were fetched, most of them for nobody", sent)
				}
				if n := len(m.logs.with("filled")); n != 0 {
					t.Error("it was finished")
				}
				up.Heal()
			} else {
				// Long after it would have been put away.
				time.AfterFunc(2500*time.Millisecond, func() { close(hold) })
				eventually(t, "the fill to be finished", func() bool { return len(m.logs.with("filled")) == 1 })
				if n := len(m.logs.with("fill put away")); n != 0 {
					t.Error("it was put away")
				}
				up.Down()
			}
			a := m.want(200, "GET", path)
			if !bytes.Equal(a.body, layer.Data) {
				t.Error("wrong bytes")
			}
			fetched(t, 1.02, layer, up)
			eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
		})
	}
}

// TestRangesCold: parts of a blob that nobody has fetched, as lazy and parallel
// clients ask for them. No byte of it is fetched twice.
func TestRangesCold(t *testing.T) {
	const size, segment = 32 << 20, 64 << 10
	for _, kind := range []string{"redirect", "direct"} {
		t.Run(kind, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{NoRedirect: kind == "direct", Latency: time.Millisecond})
			layer := regtest.Random("x", size)
			up.Push("library/x", regtest.NewImage("x", layer), "latest")
			m := start(t, upstreamFor("docker.io", up), "")
			path := "/v2/library/x/blobs/" + layer.Digest.String()
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			part := func(header string, from, to int) {
				t.Helper()
				a := m.want(206, "GET", path, "Range", header)
				if got, want := a.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", from, to-1, size); got != want {
					t.Errorf("%s: Content-Range %q, want %q", header, got, want)
				}
				if a.ContentLength != int64(to-from) || !bytes.Equal(a.body, layer.Data[from:to]) {
					t.Errorf("%s: wrong bytes", header)
				}
			}
			away := 0
			paused := func() {
				t.Helper()
				away++
				eventually(t, "the fill to be put away", func() bool { return len(m.logs.with("fill put away")) >= away })
				away = len(m.logs.with("fill put away"))
			}
			most := func(what string, before, segments int64) {
				t.Helper()
				if sent := up.Sent(layer.Digest) - before; sent > segments*segment {
					t.Errorf("%s: %d bytes were fetched, more than %d segments", what, sent, segments)
				}
			}

			// Probes.
			for header, span := range map[string][2]int{
				"bytes=0-1":                  {0, 2},
				"bytes=-47":                  {size - 47, size},
				"bytes=9000000-9000000":      {9_000_000, 9_000_001},
				"bytes=20000000-20050000":    {20_000_000, 20_050_001},
				"bytes=33554400-33554432":    {33_554_400, size}, // regctl's end
				"bytes=16777210-16777219":    {16_777_210, 16_777_220},
				"bytes=33554431-99999999999": {size - 1, size},
			} {
				before := up.Sent(layer.Digest)
				part(header, span[0], span[1])
				most(header, before, 2)
			}
			paused()
			probed := up.Sent(layer.Digest)
			most("probes, later", 0, 7*2)
			part("bytes=0-1", 0, 2)
			part("bytes=-47", size-47, size)
			most("probes, again", probed, 0) // from the files

			// An eStargz-like reader: the footer, and then chunks.
			before := up.Sent(layer.Digest)
			const chunk = 50_000
			for i := range 20 {
				from := 1_000_000 + i*chunk
				part(fmt.Sprintf("bytes=%d-%d", from, from+chunk-1), from, from+chunk)
			}
			most("chunks one after another", before, 20*chunk/segment+2)
			before = up.Sent(layer.Digest)
			var ranges []string
			var spans [][2]int
			for i := range 20 {
				from := 3_000_000 + i*3*chunk
				ranges = append(ranges, fmt.Sprintf("%d-%d", from, from+chunk-1))
				spans = append(spans, [2]int{from, from + chunk})
			}
			checkParts(t, m.want(206, "GET", path, "Range", "bytes="+strings.Join(ranges, ",")), layer.Data, spans...)
			most("20 chunks at once", before, 40)
			paused()
			most("20 chunks at once, later", before, 40)
			if n := len(m.logs.with("filled")); n != 0 {
				t.Fatal("the blob was fetched")
			}

			// containerd's concurrent_layer_fetch_buffer: each begins somewhere and
			// is left after its share.
			var all sync.WaitGroup
			for i := range 3 {
				all.Go(func() {
					from := i * 8 << 20
					resp, err := m.send("GET", path, "Range", fmt.Sprintf("bytes=%d-", from))
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					if got, want := resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", from, size-1, size); resp.StatusCode != 206 || got != want {
						t.Errorf("status %d, Content-Range %q, want %q", resp.StatusCode, got, want)
					}
					body := make([]byte, 8<<20)
					if _, err := io.ReadFull(resp.Body, body); err != nil || !bytes.Equal(body, layer.Data[from:from+8<<20]) {
						t.Errorf("from %d: wrong bytes, or %v", from, err)
					}
				})
			}
			all.Wait()
			part(fmt.Sprintf("bytes=%d-", 24<<20), 24<<20, size)

			// Everything, by whoever wants it.
			a := m.want(200, "GET", path)
			if !bytes.Equal(a.body, layer.Data) {
				t.Error("wrong bytes")
			}
			fetched(t, 1.02, layer, up)
			up.Down()
			part("bytes=-47", size-47, size)
			eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
		})
	}
}

// TestSourceFailover: the first of two addresses dies in the middle of a blob,
// and the other goes on there.
func TestSourceFailover(t *testing.T) {
	const size = 24 << 20
	layer := regtest.Random("x", size)
	image := regtest.NewImage("x", layer)
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	both := func(t *testing.T, rate int64) (m *mirror, near, origin *regtest.Registry) {
		near, origin = regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true, Rate: rate}), regtest.New(t, regtest.Options{})
		near.Push("library/x", image, "latest")
		origin.Push("library/x", image, "latest")
		m = start(t, fmt.Sprintf("upstream docker.io {\n endpoint %s\n origin %s\n allow_private\n}", near.URL, origin.URL), "")
		m.want(200, "GET", "/v2/library/x/manifests/latest")
		return m, near, origin
	}
	t.Run("dies", func(t *testing.T) {
		m, near, origin := both(t, 4<<20)
		wait := m.herd(3, path, layer)
		eventually(t, "some of the blob to be sent", func() bool { return near.Sending(layer.Digest) >= size*4/10 })
		near.Down()
		wait()
		fetched(t, 1.02, layer, near, origin)
		if origin.Sent(layer.Digest) == 0 {
			t.Error("the origin was not asked")
		}
	})
	t.Run("is cut, and refuses", func(t *testing.T) {
		m, near, origin := both(t, 8<<20)
		wait := m.herd(1, path, layer)
		eventually(t, "some of the blob to be sent", func() bool { return near.Sending(layer.Digest) >= size/10 })
		near.Fail(regtest.Fault{Path: layer.Digest.String(), Status: 503, Body: "no"})
		wait()
		fetched(t, 1.02, layer, near, origin)
	})
	t.Run("corrupts", func(t *testing.T) {
		m, near, origin := both(t, 0)
		near.Fail(regtest.Fault{Path: layer.Digest.String(), Corrupt: 1, Offset: size * 6 / 10})
		resp := m.open("GET", path)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && resp.StatusCode == 200 && !bytes.Equal(body, layer.Data) {
			t.Error("wrong bytes arrived complete")
		}
		if err != nil && len(body) > size*6/10 && int64(len(body)) >= size {
			t.Error("wrong bytes arrived complete, and then the connection broke")
		}
		near.Forget()
		m.herd(3, path, layer)()
		if n := len(near.Fetches(layer.Digest)); n != 0 {
			t.Errorf("the one that delivered wrong bytes was asked again, %d times", n)
		}
		if sent := origin.Sent(layer.Digest); sent != size {
			t.Errorf("%d bytes came from the origin", sent)
		}
		eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
	})
}

// TestFullDiskHerd: there is no room for a blob, and everyone gets it all the
// same.
func TestFullDiskHerd(t *testing.T) {
	for _, clients := range []int{16, 40} {
		t.Run(fmt.Sprint(clients), func(t *testing.T) {
			up := regtest.New(t, regtest.Options{Rate: 16 << 20})
			layer := regtest.Random("x", 6<<20)
			image := regtest.NewImage("x", layer)
			up.Push("library/x", image, "latest")
			m := start(t, "", "")
			if err := m.load("storage disk "+m.dir+" {\n min_free 99.99%\n}\n"+upstreamFor("docker.io", up), ""); err != nil {
				t.Fatal(err)
			}
			path := "/v2/library/x/blobs/" + layer.Digest.String()
			m.want(200, "GET", "/v2/library/x/manifests/latest")
			wait := m.herd(clients, path, layer)
			for range 5 {
				if a := m.want(200, "HEAD", path); a.ContentLength != int64(len(layer.Data)) {
					t.Errorf("HEAD says %d bytes", a.ContentLength)
				}
				m.want(200, "HEAD", "/v2/library/x/manifests/latest")
			}
			for range 5 { // with the herd, and after it
				a := m.want(206, "GET", path, "Range", "bytes=5000000-5000099")
				if !bytes.Equal(a.body, layer.Data[5_000_000:5_000_100]) {
					t.Error("wrong bytes of a range")
				}
			}
			wait()
			eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
			if files := kept(m.dir, layer.Digest); len(files) > 0 {
				t.Errorf("kept: %q", files)
			}
			eventually(t, "a line about it", func() bool { return len(m.logs.with("disk trouble")) > 0 })
			if lines := m.logs.with("disk trouble"); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "min_free") {
				t.Errorf("%d lines: %v", len(lines), lines)
			}
			if lines := append(m.logs.with("upstream trouble"), m.logs.with("answer broken off")...); len(lines) != 0 {
				t.Errorf("%v", lines)
			}
			// With room again, it is kept.
			if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
				t.Fatal(err)
			}
			m.pull("library/x", "latest", image)
			up.Down()
			m.pull("library/x", "latest", image)
		})
	}
}

// TestReloadInMidHerd: nobody of a herd notices that the configuration changes.
func TestReloadInMidHerd(t *testing.T) {
	up := regtest.New(t, regtest.Options{Rate: 4 << 20})
	layer := regtest.Random("x", 24<<20)
	up.Push("library/x", regtest.NewImage("x", layer), "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	waits := []func(){m.herd(16, path, layer)}
	for i := range int64(3) {
		eventually(t, "some of the blob to be sent", func() bool {
			return up.Sending(layer.Digest) >= int64(len(layer.Data))*(i+1)/5
		})
		if err := m.load(upstreamFor("docker.io", up, fmt.Sprintf("connections %d", i+2)), ""); err != nil {
			t.Fatal(err)
		}
		waits = append(waits, m.herd(2, path, layer)) // joins
	}
	for _, wait := range waits {
		wait()
	}
	fetched(t, 1.02, layer, up)
}

// TestStopInMidFill: a stop puts a fill that nobody reads away at once, and the
// next start goes on from there.
func TestStopInMidFill(t *testing.T) {
	up := regtest.New(t, regtest.Options{Rate: 2 << 20})
	layer := regtest.Random("x", 24<<20)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up), "")
	for i := range 3 {
		m.want(200, "GET", "/v2/library/x/manifests/latest")
		resp := m.open("GET", "/v2/library/x/blobs/"+layer.Digest.String())
		eventually(t, "some of the blob to be sent", func() bool {
			return up.Sending(layer.Digest) >= int64(len(layer.Data)*(i+1)/6)
		})
		resp.Body.Close()
		m.stop()
		if lines := m.logs.with("fill put away"); len(lines) != i+1 || lines[i]["reason"] != "the store is being closed" {
			t.Errorf("fills put away: %v", lines)
		}
		if files := spooled(m.dir); len(files) != 2 {
			t.Errorf("in the spool: %q", files)
		}
		if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
			t.Fatal(err)
		}
	}
	m.pull("library/x", "latest", image)
	fetched(t, 1.05, layer, up)
	eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
}

// TestStopInMidPull: a pull that takes longer than the grace is broken off with
// the process, and the next one goes on from there.
func TestStopInMidPull(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", 24<<20)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Rate: 300_000})
	dir := t.TempDir()
	m := child(t, dir, up.URL, "")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	got := make(chan *answer)
	go func() { got <- m.do("GET", "/v2/library/x/blobs/"+layer.Digest.String()) }()
	eventually(t, "some of the blob to be sent", func() bool { return up.Sending(layer.Digest) >= 4<<20 })
	m.process.Signal(syscall.SIGTERM)
	if a := <-got; a.err == nil || !bytes.HasPrefix(layer.Data, a.body) {
		t.Errorf("of a part of a blob %d bytes arrived, or wrong ones: %v", len(a.body), a.err)
	}
	m.dead()
	up.Heal()
	m = child(t, dir, up.URL, "")
	m.pull("library/x", "latest", image)
	fetched(t, 1.05, layer, up)
	eventually(t, "nothing to be left over", func() bool { return len(spooled(dir)) == 0 })
}

// leave lets a client leave a blob when a quarter of it is there, and no more
// is to come until the registry heals. One connection is enough.
func leave(t *testing.T, m *mirror, up *regtest.Registry, path string, layer regtest.Content) {
	t.Helper()
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	up.Fail(regtest.Fault{Path: layer.Digest.String(), Hold: hold, Offset: int64(len(layer.Data) * 3 / 10)})
	resp := m.open("GET", path)
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, int64(len(layer.Data)/4)); err != nil {
		t.Fatal(err)
	}
}

// TestFullDiskInMidBlob: there is no room for the rest of a blob. What is there
// is used, and not fetched again for it.
func TestFullDiskInMidBlob(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("x", 8<<20)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "connections 1"), "")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	leave(t, m, up, path, layer)
	eventually(t, "the fill to be put away", func() bool { return len(m.logs.with("fill put away")) == 1 })
	up.Heal()
	there := up.Sent(layer.Digest)
	if err := m.load("storage disk "+m.dir+" {\n min_free 99.99%\n}\n"+upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.herd(1, path, layer)()
	fetched(t, 1.05, layer, up)
	m.herd(8, path, layer)()
	if files := kept(m.dir, layer.Digest); len(files) > 0 {
		t.Errorf("kept: %q", files)
	}
	up.Forget()
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	if sent := up.Sent(layer.Digest); sent > int64(len(layer.Data))-there+1<<20 {
		t.Errorf("%d bytes were fetched, with %d there", sent, there)
	}
	eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
}

// TestDamagedSpool: something happens to the files of a fill that was put away.
// Wrong bytes never arrive complete, and the blob can be had afterwards.
func TestDamagedSpool(t *testing.T) {
	const size = 4 << 20
	damage := func(name string, at int64, p []byte) error {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt(p, at)
		return err
	}
	var spoils []damaged
	for name, spoil := range map[string]func(data string) error{
		"a byte":               func(data string) error { return damage(data, size/10, []byte("?!?!")) },
		"no data":              os.Remove,
		"short data":           func(data string) error { return os.Truncate(data, size/10) },
		"no ledger":            func(data string) error { return os.Remove(data + ".ledger") },
		"a byte of the ledger": func(data string) error { return damage(data+".ledger", 300, []byte("?")) },
		"half a line": func(data string) error {
			info, err := os.Stat(data + ".ledger")
			if err != nil {
				return err
			}
			return os.Truncate(data+".ledger", info.Size()-20)
		},
	} {
		spoils = append(spoils, damaged{name, spoil, regtest.Random(name, size)})
	}
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			m := start(t, upstreamFor("docker.io", up, "connections 1"), "")
			for _, d := range spoils {
				up.Push(d.repository(), regtest.NewImage(d.name, d.layer), "latest")
				m.want(200, "GET", "/v2/"+d.repository()+"/manifests/latest")
				leave(t, m, up, d.path(), d.layer)
			}
			if restart {
				m.stop()
			}
			eventually(t, "the fills to be put away", func() bool { return len(m.logs.with("fill put away")) == len(spoils) })
			up.Heal()
			for _, d := range spoils {
				data := filepath.Join(m.dir, "mirror/spool/fills", fmt.Sprintf("sha256-%s-%d", d.layer.Digest.Encoded(), size))
				if err := d.spoil(data); err != nil {
					t.Fatal(err)
				}
			}
			if restart {
				if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range spoils {
				if a := m.do("GET", d.path()); a.err == nil && a.StatusCode == 200 && !bytes.Equal(a.body, d.layer.Data) {
					t.Errorf("%s: wrong bytes arrived complete", d.name)
				}
				m.pull(d.repository(), "latest", regtest.NewImage(d.name, d.layer))
				if sent := up.Sent(d.layer.Digest); sent > size*14/10 {
					t.Errorf("%s: %d bytes of %d were fetched", d.name, sent, size)
				}
			}
			eventually(t, "nothing to be left over", func() bool { return len(spooled(m.dir)) == 0 })
		})
	}
}

type damaged struct {
	name  string
	spoil func(data string) error
	layer regtest.Content
}

func (d damaged) repository() string { return "damaged/" + strings.ReplaceAll(d.name, " ", "-") }
func (d damaged) path() string {
	return "/v2/" + d.repository() + "/blobs/" + d.layer.Digest.String()
}

// TestPullAhead: the first layer that is asked for brings the next, as many as
// there are connections.
func TestPullAhead(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layers := []regtest.Content{
		regtest.Random("0", 10_000), regtest.Random("1", 2<<20), regtest.Random("2", 20_000),
		regtest.Random("3", 3<<20), regtest.Random("4", 10_000),
	}
	image := regtest.NewImage("x", layers...)
	up.Push("library/x", image, "latest")
	m := start(t, upstreamFor("docker.io", up, "connections 2"), "")
	m.want(200, "GET", "/v2/library/x/manifests/latest")
	m.want(206, "GET", "/v2/library/x/blobs/"+layers[1].Digest.String(), "Range", "bytes=0-1")
	m.want(200, "HEAD", "/v2/library/x/blobs/"+layers[0].Digest.String())
	m.want(200, "GET", "/v2/library/x/blobs/"+layers[1].Digest.String())
	eventually(t, "three layers to be there", func() bool { return len(m.logs.with("filled")) == 3 })
	for i, want := range []bool{false, true, true, true, false} {
		sent := up.Sent(layers[i].Digest)
		if want && sent != int64(len(layers[i].Data)) || !want && sent != 0 {
			t.Errorf("layer %d: %d bytes of %d were fetched", i, sent, len(layers[i].Data))
		}
	}
	m.pull("library/x", "latest", image)
	for i, layer := range layers {
		if sent := up.Sent(layer.Digest); sent != int64(len(layer.Data)) {
			t.Errorf("layer %d: %d bytes of %d were fetched", i, sent, len(layer.Data))
		}
	}
}

// TestSections: a live fill is sent by the kernel, with Caddy's limit on how much
// is written at once and without it, to readers at any offset, and nobody gets
// a byte that has not arrived.
func TestSections(t *testing.T) {
	for name, idle := range map[string]string{"limited": "", "unlimited": `"write_idle_timeout": -1,`} {
		t.Run(name, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{Rate: 20 << 20})
			layer := regtest.Random("sections", 6<<20+12345)
			image := regtest.NewImage("sections", layer)
			up.Push("library/sections", image, "latest")
			m := start(t, upstreamFor("docker.io", up), "")
			adapted, err := m.adapt(upstreamFor("docker.io", up), "")
			if err != nil {
				t.Fatal(err)
			}
			adapted = bytes.Replace(adapted, []byte(`"listen":`), []byte(idle+`"listen":`), 1)
			if err := m.loadJSON(adapted); err != nil {
				t.Fatal(err)
			}
			m.want(200, "GET", "/v2/library/sections/manifests/latest")
			path := "/v2/library/sections/blobs/" + layer.Digest.String()
			var wg sync.WaitGroup
			for i := range 12 {
				wg.Go(func() {
					from := i * 400_001
					to := len(layer.Data)
					header := fmt.Sprintf("bytes=%d-", from)
					if i%3 == 2 {
						to = from + 300_007
						header += fmt.Sprint(to - 1)
					}
					a := m.want(206, "GET", path, "Range", header)
					if !bytes.Equal(a.body, layer.Data[from:to]) {
						t.Errorf("%s: wrong bytes, %d of %d", header, len(a.body), to-from)
					}
				})
			}
			wg.Wait()
			if sent := up.Sent(layer.Digest); sent != int64(len(layer.Data)) {
				t.Errorf("%d bytes were fetched", sent)
			}
		})
	}
}
