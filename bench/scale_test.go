//go:build bench

// Package bench measures what the project says of itself. It is no part of the
// tests: figures depend on the machine, and none of them makes a test fail.
// `make bench` runs it.
package bench

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/catalog/catalogtest"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage/catalog/sqlite"
)

var manifests = flag.Int("manifests", 1_000_000, "how many there are, with five links each")

// evicted is how many blobs are, which have real files.
const evicted = 100_000

// A mirror is the product at work, as a process of its own.
type mirror struct {
	cmd   *exec.Cmd
	addr  string
	admin string
	dir   string
}

// start runs a mirror of an upstream on a directory and a catalog, until the
// test ends. It returns when the first pull is served, and how long that took
// from the start of the process.
func start(t *testing.T, binary, dir, catalog, storage string, upstream *regtest.Registry, pull string) (*mirror, time.Duration) {
	t.Helper()
	m := &mirror{addr: regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: dir}
	config := filepath.Join(t.TempDir(), "Caddyfile")
	text := fmt.Sprintf(`{
	admin %s
	auto_https off
	persist_config off
	registry {
		storage disk %s {
			%s
		}
		catalog sqlite %s
		scrub off
		upstream docker.io {
			origin %s
			allow_private
		}
	}
}
http://%s {
	registry_mirror
}
`, m.admin, dir, storage, catalog, upstream.URL, m.addr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	m.cmd = exec.Command(binary, "run", "--config", config, "--adapter", "caddyfile")
	m.cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir())
	var said bytes.Buffer
	m.cmd.Stderr = &said
	begun := time.Now()
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop := func() {
		once.Do(func() {
			m.cmd.Process.Signal(os.Interrupt)
			m.cmd.Wait()
		})
	}
	t.Cleanup(stop)
	for {
		if _, err := m.get(pull); err == nil {
			return m, time.Since(begun)
		}
		if time.Since(begun) > time.Minute {
			t.Fatalf("the mirror serves nothing: %s", said.String())
		}
		select {
		case <-t.Context().Done():
			t.Fatal("the test ended")
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (m *mirror) stop() {
	m.cmd.Process.Signal(os.Interrupt)
	m.cmd.Wait()
}

// client keeps as many connections as are used at once.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

func (m *mirror) get(path string) (time.Duration, error) {
	begun := time.Now()
	resp, err := client.Get("http://" + m.addr + path)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("%s: %s", path, resp.Status)
	}
	return time.Since(begun), nil
}

// ask puts a question to the admin API.
func (m *mirror) ask(method, path string, body, answer any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(method, "http://"+m.admin+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	return json.NewDecoder(resp.Body).Decode(answer)
}

// complete waits until the catalog has everything: one that is closed before is
// compared with the store at the next start.
func (m *mirror) complete(t *testing.T) {
	t.Helper()
	for {
		var status struct{ Complete time.Time }
		if err := m.ask(http.MethodGet, "/registry/status", nil, &status); err != nil {
			t.Fatal(err)
		}
		if !status.Complete.IsZero() {
			return
		}
		select {
		case <-t.Context().Done():
			t.Fatal("the test ended")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// cpu is what the process has used.
func (m *mirror) cpu(t *testing.T) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// warm asks for manifests for a while over 32 connections, and returns the CPU
// time of one request.
func (m *mirror) warm(t *testing.T, path string, for_ time.Duration) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), for_)
	defer cancel()
	counts := make([]int, 32)
	before := m.cpu(t)
	var wg sync.WaitGroup
	for i := range counts {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := m.get(path); err != nil {
					t.Error(err)
					return
				}
				counts[i]++
			}
		})
	}
	wg.Wait()
	n := 0
	for _, c := range counts {
		n += c
	}
	return (m.cpu(t) - before) / time.Duration(max(n, 1))
}

func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "caddy")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "nobadger,nomysql,nopgx", "-o", binary, "../xcaddy")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}

// TestScale: a store of a million manifests and five million links, of which
// only what is evicted has files.
func TestScale(t *testing.T) {
	binary := build(t)
	upstream := regtest.New(t, regtest.Options{NoToken: true, NoRedirect: true})
	image := regtest.NewImage("warm", regtest.Random("warm layer", 1<<20))
	upstream.Push("library/warm", image, "latest")
	const path = "/v2/library/warm/manifests/latest"

	empty := t.TempDir()
	small, _ := start(t, binary, empty, filepath.Join(t.TempDir(), "catalog.db"), "min_free 1%", upstream, path)

	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "catalog.db")
	begun := time.Now()
	shape := catalogtest.Shape{Manifests: *manifests, Links: 5 * *manifests}
	allocated, cold := fill(t, dir, file, shape)
	t.Logf("making the catalog: %s, %d MiB", time.Since(begun).Round(time.Second), size(t, file)>>20)
	large, first := start(t, binary, dir, file, "min_free 1%", upstream, path)
	t.Logf("first pull served %s after the start of the process", first.Round(time.Millisecond))
	large.complete(t)
	large.stop()
	large, first = start(t, binary, dir, file, "min_free 1%", upstream, path)
	t.Logf("and again, all of it in the page cache: %s", first.Round(time.Millisecond))

	var cpuSmall, cpuLarge []time.Duration
	for range 5 {
		cpuSmall = append(cpuSmall, small.warm(t, path, 3*time.Second))
		cpuLarge = append(cpuLarge, large.warm(t, path, 3*time.Second))
	}
	t.Logf("CPU of a warm manifest: %s with an empty catalog, %s with the large one (%.2f x)", median(cpuSmall), median(cpuLarge), float64(median(cpuLarge))/float64(median(cpuSmall)))
	small.stop()

	pages(t, large, shape)
	large.complete(t)
	large.stop()

	over := "min_free 1%\n max_size " + strconv.FormatInt(allocated*100/96, 10)
	large, _ = start(t, binary, dir, file, over, upstream, path)
	evict(t, large, upstream, cold)
}

// pages lists repositories and tags from the admin API, and repositories from
// the registry API.
func pages(t *testing.T, m *mirror, shape catalogtest.Shape) {
	middle := shape.Repository(shape.Repositories() / 2)
	for _, path := range []string{
		"/registry/repositories?n=100",
		"/registry/repositories?n=100&after=" + middle,
		"/registry/repositories?n=100&containing=77",
		"/registry/tags?n=100&repository=" + middle,
		"/registry/usage",
		"/registry/status",
	} {
		var taken []time.Duration
		for range 20 {
			begun := time.Now()
			var answer json.RawMessage
			if err := m.ask(http.MethodGet, path, nil, &answer); err != nil {
				t.Errorf("%s: %v", path, err)
				break
			}
			taken = append(taken, time.Since(begun))
		}
		if len(taken) > 0 {
			t.Logf("page %s: %s, the slowest %s", path, median(taken).Round(10*time.Microsecond), slices.Max(taken).Round(10*time.Microsecond))
		}
	}
	var taken []time.Duration
	for range 20 {
		took, err := m.get("/v2/_catalog?n=100&last=" + middle)
		if err != nil {
			t.Error(err)
			return
		}
		taken = append(taken, took)
	}
	t.Logf("page /v2/_catalog: %s, the slowest %s", median(taken).Round(10*time.Microsecond), slices.Max(taken).Round(10*time.Microsecond))
}

// pullEvery is how often something is pulled while there is eviction: both cores
// of a small machine are not busy with it.
const pullEvery = 50 * time.Millisecond

// evict pulls small images that are not held while 100,000 blobs are evicted.
func evict(t *testing.T, m *mirror, upstream *regtest.Registry, blobs []digest.Digest) {
	var cold []time.Duration
	begun := time.Now()
	var status struct {
		Evicted struct{ Images, Blobs, Bytes int64 }
	}
	tick := time.NewTicker(pullEvery)
	defer tick.Stop()
	for i := 0; ; i++ {
		<-tick.C
		name := fmt.Sprint("library/cold", i)
		image := regtest.NewImage(name, regtest.Random(name, 64<<10))
		upstream.Push(name, image, "latest")
		took, err := m.get("/v2/" + name + "/manifests/latest")
		if err != nil {
			t.Fatal(err)
		}
		for _, blob := range image.Blobs {
			n, err := m.get("/v2/" + name + "/blobs/" + blob.Digest.String())
			if err != nil {
				t.Fatal(err)
			}
			cold = append(cold, n)
		}
		cold = append(cold, took)
		if i%20 > 0 {
			continue
		}
		if err := m.ask(http.MethodGet, "/registry/status", nil, &status); err != nil {
			t.Fatal(err)
		}
		if status.Evicted.Blobs >= int64(len(blobs)) || time.Since(begun) > 10*time.Minute {
			break
		}
	}
	took := time.Since(begun)
	slices.Sort(cold)
	t.Logf("evicted %d blobs of %d roots in %s, %.0f a second; meanwhile %d requests for what was not held: median %s, p99 %s, the slowest %s",
		status.Evicted.Blobs, status.Evicted.Images, took.Round(time.Second), float64(status.Evicted.Blobs)/took.Seconds(), len(cold),
		median(cold).Round(10*time.Microsecond), cold[len(cold)*99/100].Round(10*time.Microsecond), cold[len(cold)-1].Round(10*time.Microsecond))
	left := 0
	for _, d := range blobs {
		if _, err := os.Stat(filepath.Join(m.dir, layout.Blob(d))); err == nil {
			left++
		}
	}
	t.Logf("%d of the %d coldest blobs still have their files", left, len(blobs))
}

func median[T cmp.Ordered](of []T) T {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

func size(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// fill makes the catalog of a store that has nothing but the blobs that are
// evicted first, and notes in the store that it is the right one. It returns
// what the whole store would take.
func fill(t *testing.T, dir, file string, shape catalogtest.Shape) (allocated int64, cold []digest.Digest) {
	t.Helper()
	ctx := t.Context()
	store := "disk:" + dir
	backend := &sqlite.SQLite{File: file}
	if err := catalogtest.Fill(ctx, backend, store, shape); err != nil {
		t.Fatal(err)
	}
	// What goes first is found out by removing it from a copy.
	copied := filepath.Join(t.TempDir(), "copy.db")
	data, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(copied, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	backend = &sqlite.SQLite{File: copied}
	db, err := backend.Open(ctx, store)
	if err != nil {
		t.Fatal(err)
	}
	c, err := catalog.Open(ctx, db, backend.Dialect(), store)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	usage, err := c.Usage(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	for len(cold) < evicted {
		roots, err := c.Coldest(ctx, "", time.Time{}, 64)
		if err != nil || len(roots) == 0 {
			t.Fatal(err, len(roots))
		}
		var changes []tree.Change
		for _, root := range roots {
			removal, err := c.Removal(ctx, root)
			if err != nil {
				t.Fatal(err)
			}
			if root.Tag != "" {
				changes = append(changes, tree.Change{Kind: tree.Untagged, Repository: root.Repository, Tag: root.Tag})
			}
			for _, d := range removal.Manifests {
				changes = append(changes, tree.Change{Kind: tree.Unmanifested, Repository: root.Repository, Canonical: d})
			}
			for _, d := range removal.Links {
				changes = append(changes, tree.Change{Kind: tree.Unlinked, Repository: root.Repository, Canonical: d})
			}
			for _, d := range removal.Blobs {
				changes = append(changes, tree.Change{Kind: tree.Removed, Canonical: d})
				// Manifests without bytes: wrong ones would be looked into.
				if !slices.Contains(removal.Manifests, d) {
					cold = append(cold, d)
				}
			}
		}
		if err := c.Apply(ctx, changes); err != nil {
			t.Fatal(err)
		}
	}
	content := bytes.Repeat([]byte("cold"), 1<<10)
	for _, d := range cold {
		path := filepath.Join(dir, layout.Blob(d))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	session := filepath.Join(dir, layout.Session)
	if err := os.MkdirAll(filepath.Dir(session), 0o755); err != nil {
		t.Fatal(err)
	}
	note := fmt.Sprintf(`{"schema":1,"closed":%q}`, time.Unix(catalogtest.Epoch, 0).UTC().Format(time.RFC3339))
	if err := os.WriteFile(session, []byte(note), 0o644); err != nil {
		t.Fatal(err)
	}
	return usage.Allocated, cold
}
