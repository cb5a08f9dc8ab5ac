//go:build bench

package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/caddy-registry/mirror/internal/regtest"
)

var (
	rounds     = flag.Int("rounds", 5, "how often each kind of push is measured")
	largeLayer = flag.Int64("large", 1<<30, "bytes of the one large layer that is pushed")
)

// A kind of push is images that are pushed at once.
type kind struct {
	name   string
	unit   string // what is counted: MB or blobs
	images int
	layers func(image int) []int64 // their sizes
}

var kinds = []kind{
	{"one large layer", "MB", 1, func(int) []int64 { return []int64{*largeLayer} }},
	{"200 small layers", "blobs", 1, func(int) []int64 {
		sizes := make([]int64, 200)
		for i := range sizes {
			sizes[i] = int64(4+60*i/len(sizes)) << 10
		}
		return sizes
	}},
	{"32 parallel pushers", "MB", 32, func(image int) []int64 {
		return []int64{int64(1+image%4) << 20, 2 << 20, 256 << 10}
	}},
}

// A form is how a client sends a blob.
type form struct {
	name string
	send func(c *pushClient, ctx context.Context, repository string, b blob) error
}

var forms = []form{
	{"POST PATCH PUT", (*pushClient).streamed}, // docker, podman, crane
	{"POST PUT", (*pushClient).whole},          // containerd, regctl, oras
}

// TestPush: how fast pushes are taken in, beside a registry:2 if one is
// installed. Of each kind and form both begin with an empty store on the same
// disk, and take turns; each round pushes what neither has.
func TestPush(t *testing.T) {
	caddy := build(t)
	stock, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Log("there is no docker-registry in PATH: only the mirror is measured")
	}
	for _, k := range kinds {
		for _, f := range forms {
			t.Run(k.name+", "+f.name, func(t *testing.T) {
				servers := []*pushServer{startPushMirror(t, caddy)}
				if stock != "" {
					servers = append(servers, startStock(t, stock))
				}
				for round := range *rounds {
					images := k.make(round)
					for i := range servers {
						servers[(i+round)%len(servers)].measure(t, k, f, images)
					}
				}
				for _, s := range servers {
					t.Logf("%-10s median %6.1f %s/s, rounds %.1f; peak RSS of the rounds %d MiB", s.name, median(s.rates), k.unit, s.rates, s.peaks)
				}
				if len(servers) == 2 {
					t.Logf("%.2f times registry:2", median(servers[0].rates)/median(servers[1].rates))
				}
			})
		}
	}
}

// A blob is random bytes, the same again and again, after eight that make it
// different from all others.
type blob struct {
	head   uint64
	size   int64
	digest digest.Digest
}

var block = regtest.Random("pushed", 4<<20).Data

func newBlob(head uint64, size int64) blob {
	b := blob{head: head, size: size}
	d, err := digest.FromReader(b.open())
	if err != nil {
		panic(err)
	}
	b.digest = d
	return b
}

func (b blob) open() io.Reader {
	return io.LimitReader(io.MultiReader(bytes.NewReader(binary.BigEndian.AppendUint64(nil, b.head)), &cycle{}), b.size)
}

type cycle struct{ at int }

func (c *cycle) Read(p []byte) (int, error) {
	n := copy(p, block[c.at:])
	c.at = (c.at + n) % len(block)
	return n, nil
}

// A pushedImage is what is pushed to a repository of its own.
type pushedImage struct {
	repository string
	layers     []blob
	config     []byte
	manifest   []byte
}

// make makes the images of a round.
func (k kind) make(round int) []pushedImage {
	images := make([]pushedImage, k.images)
	for i := range images {
		img := pushedImage{
			repository: fmt.Sprintf("apps/round%d/image%d", round, i),
			config:     fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","author":"%d %d"}`, round, i),
		}
		m := v1.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: v1.MediaTypeImageManifest,
			Config:    v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(img.config), Size: int64(len(img.config))},
		}
		for j, size := range k.layers(i) {
			b := newBlob(uint64(round)<<32|uint64(i)<<16|uint64(j), size)
			img.layers = append(img.layers, b)
			m.Layers = append(m.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: b.digest, Size: b.size})
		}
		img.manifest, _ = json.Marshal(m)
		images[i] = img
	}
	return images
}

// A pushServer is a registry to push to, as a process of its own.
type pushServer struct {
	name  string
	addr  string
	pid   int
	rates []float64 // of each round
	peaks []int64   // of each round: the most memory that the process had, MiB
}

// startPushMirror runs the product with an empty store.
func startPushMirror(t *testing.T, caddy string) *pushServer {
	t.Helper()
	s := &pushServer{name: "mirror", addr: regtest.FreeAddress(t)}
	// The filesystem need not have a tenth free: registry:2 does not look.
	s.run(t, "Caddyfile", fmt.Sprintf(`{
	admin off
	registry {
		storage disk %s {
			min_free 1%%
		}
	}
}
http://%s {
	registry_mirror {
		default off
		hosted apps/**
		access {
			allow any to anyone
		}
	}
}
`, t.TempDir(), s.addr), caddy, "run", "--adapter", "caddyfile", "--config")
	return s
}

// startStock runs a registry:2 with an empty store, as its image configures it
// but without an access log, which the product does not write either.
func startStock(t *testing.T, binary string) *pushServer {
	t.Helper()
	s := &pushServer{name: "registry:2", addr: regtest.FreeAddress(t)}
	s.run(t, "config.yml", fmt.Sprintf(`version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  cache: {blobdescriptor: inmemory}
  filesystem: {rootdirectory: %s}
http:
  addr: %s
  headers: {X-Content-Type-Options: [nosniff]}
`, t.TempDir(), s.addr), binary, "serve")
	return s
}

// run starts the server until the test ends, with the file's name as its last
// argument, and waits until it answers.
func (s *pushServer) run(t *testing.T, name, config, binary string, args ...string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, append(args, file)...)
	cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+t.TempDir(), "XDG_CONFIG_HOME="+t.TempDir())
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	})
	late := time.After(time.Minute)
	for {
		resp, err := client.Get("http://" + s.addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return
		}
		select {
		case <-late:
			t.Fatalf("%s does not answer: %s", s.name, said.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// measure pushes the images of a round at once.
func (s *pushServer) measure(t *testing.T, k kind, f form, images []pushedImage) {
	t.Helper()
	// What the one before has left to be written is not this one's burden.
	syscall.Sync()
	// 5 makes VmHWM begin anew.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	c := newPushClient(s.addr)
	defer c.http.CloseIdleConnections()
	begun := time.Now()
	g, ctx := errgroup.WithContext(t.Context())
	for _, img := range images {
		g.Go(func() error { return c.push(ctx, f, img) })
	}
	if err := g.Wait(); err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	took := time.Since(begun).Seconds()

	var count float64
	for _, img := range images {
		for _, layer := range img.layers {
			if k.unit == "MB" {
				count += float64(layer.size) / 1e6
			} else {
				count++
			}
		}
	}
	s.rates = append(s.rates, count/took)
	s.peaks = append(s.peaks, s.peak(t)>>10)
}

// peak is the most memory that the process had since the round began, in KiB.
func (s *pushServer) peak(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(line)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib
}

// A pushClient pushes as real clients do, and does nothing else.
type pushClient struct {
	http *http.Client
	addr string
}

func newPushClient(addr string) *pushClient {
	return &pushClient{addr: addr, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}}
}

// push sends the layers, five at a time as docker does, and then the manifest.
func (c *pushClient) push(ctx context.Context, f form, img pushedImage) error {
	g, blobs := errgroup.WithContext(ctx)
	g.SetLimit(5)
	for _, layer := range img.layers {
		g.Go(func() error { return f.send(c, blobs, img.repository, layer) })
	}
	g.Go(func() error { return c.config(blobs, img) })
	if err := g.Wait(); err != nil {
		return err
	}
	_, err := c.do(ctx, http.MethodPut, "/v2/"+img.repository+"/manifests/latest", bytes.NewReader(img.manifest), int64(len(img.manifest)), v1.MediaTypeImageManifest, http.StatusCreated)
	return err
}

func (c *pushClient) config(ctx context.Context, img pushedImage) error {
	location, err := c.begin(ctx, img.repository)
	if err != nil {
		return err
	}
	return c.finish(ctx, location, digest.FromBytes(img.config), bytes.NewReader(img.config), int64(len(img.config)))
}

// streamed sends a blob of a length that it does not tell.
func (c *pushClient) streamed(ctx context.Context, repository string, b blob) error {
	location, err := c.begin(ctx, repository)
	if err != nil {
		return err
	}
	location, err = c.do(ctx, http.MethodPatch, location, b.open(), -1, "", http.StatusAccepted)
	if err != nil {
		return err
	}
	return c.finish(ctx, location, b.digest, nil, 0)
}

// whole sends a blob in one request.
func (c *pushClient) whole(ctx context.Context, repository string, b blob) error {
	location, err := c.begin(ctx, repository)
	if err != nil {
		return err
	}
	return c.finish(ctx, location, b.digest, b.open(), b.size)
}

func (c *pushClient) begin(ctx context.Context, repository string) (string, error) {
	return c.do(ctx, http.MethodPost, "/v2/"+repository+"/blobs/uploads/", nil, 0, "", http.StatusAccepted)
}

func (c *pushClient) finish(ctx context.Context, location string, d digest.Digest, body io.Reader, size int64) error {
	mark := "?"
	if strings.Contains(location, "?") {
		mark = "&"
	}
	_, err := c.do(ctx, http.MethodPut, location+mark+"digest="+url.QueryEscape(d.String()), body, size, "application/octet-stream", http.StatusCreated)
	return err
}

// do sends a request and returns where the answer leads.
func (c *pushClient) do(ctx context.Context, method, location string, body io.Reader, size int64, mediaType string, want int) (string, error) {
	if strings.HasPrefix(location, "/") {
		location = "http://" + c.addr + location
	}
	req, err := http.NewRequestWithContext(ctx, method, location, body)
	if err != nil {
		return "", err
	}
	req.ContentLength = size
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != want {
		return "", fmt.Errorf("%s %s: %s: %s", method, location, resp.Status, text)
	}
	return resp.Header.Get("Location"), nil
}
