package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestTruncatedInStore: a blob whose file has become short is never answered
// short, whole or in part; it is fetched again and kept.
func TestTruncatedInStore(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	layer := regtest.Random("layer", 3<<20)
	image := regtest.NewImage("x", layer)
	up.Push("library/x", image, "latest")
	configured := upstreamFor("docker.io", up, "tag_ttl 1h")
	m := start(t, configured, "")
	path := "/v2/library/x/blobs/" + layer.Digest.String()
	file := ""
	damage := func(size int64) {
		t.Helper()
		eventually(t, "the layer to be kept", func() bool {
			files := kept(m.dir, layer.Digest)
			if len(files) == 0 || len(spooled(m.dir)) > 0 {
				return false
			}
			file = files[0]
			info, err := os.Stat(file)
			return err == nil && info.Size() == int64(len(layer.Data))
		})
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
	}
	m.pull("library/x", "latest", image)
	for _, size := range []int64{2 << 20, 1, 0} {
		damage(size)
		if a := m.want(200, "GET", path); !bytes.Equal(a.body, layer.Data) || a.err != nil {
			t.Errorf("cut to %d: %d bytes, %v", size, len(a.body), a.err)
		}
		damage(size)
		if a := m.want(206, "GET", path, "Range", "bytes=2097150-2097160"); !bytes.Equal(a.body, layer.Data[2097150:2097161]) || a.err != nil {
			t.Errorf("cut to %d: %d bytes of a range, %v", size, len(a.body), a.err)
		}
		if a := m.want(200, "HEAD", path); a.ContentLength != int64(len(layer.Data)) {
			t.Errorf("cut to %d: HEAD tells of %d bytes", size, a.ContentLength)
		}
		m.pull("library/x", "latest", image)
	}
	damage(1000)
	m.stop()
	if err := m.load(configured, ""); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	damage(int64(len(layer.Data))) // not at all
	up.Down()
	m.pull("library/x", "latest", image)
}

// subscribe loads a configuration in which the recorder is told of events.
func (m *mirror) subscribe(app string, events ...string) {
	m.t.Helper()
	m.subscribeAt("", app, events...)
}

func (m *mirror) subscribeAt(site, app string, events ...string) {
	m.t.Helper()
	adapted, err := m.adapt(app, site)
	if err != nil {
		m.t.Fatal(err)
	}
	var config map[string]map[string]any
	if err := json.Unmarshal(adapted, &config); err != nil {
		m.t.Fatal(err)
	}
	config["apps"]["events"] = map[string]any{"subscriptions": []any{map[string]any{
		"events": events, "handlers": []any{map[string]any{"handler": "recorder"}},
	}}}
	if adapted, err = json.Marshal(config); err != nil {
		m.t.Fatal(err)
	}
	if err := m.loadJSON(adapted); err != nil {
		m.t.Fatal(err)
	}
}

// event waits for one.
func (m *mirror) event(name string) caddy.Event {
	m.t.Helper()
	select {
	case e := <-recorded:
		if e.Name() != name {
			m.t.Fatalf("event %s, %v; want %s", e.Name(), e.Data, name)
		}
		return e
	case <-time.After(time.Minute):
		m.t.Fatalf("no event %s", name)
	}
	panic("not reached")
}

// TestStoreEvents: Caddy's event handlers are told of what was evicted, of what
// was healed, and of what cannot be.
func TestStoreEvents(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image, other := layered("a"), layered("b")
	up.Push("library/x", image, "latest")
	up.Push("library/y", other, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	load := func(max string) {
		t.Helper()
		m.subscribe(fmt.Sprintf("storage disk %s {\n min_free 1MB\n max_size %s\n}\nscrub off\n", m.dir, max)+upstreamFor("docker.io", up), "evicted", "healed", "damaged")
	}
	load("off")
	m.pull("library/x", "latest", image)
	m.pull("library/y", "latest", other)
	m.complete()
	layer := image.Blobs[1]
	damage := func() {
		t.Helper()
		files := kept(m.dir, layer.Digest)
		if len(files) != 1 {
			t.Fatalf("kept: %q", files)
		}
		if err := os.WriteFile(files[0], make([]byte, len(layer.Data)), 0o640); err != nil {
			t.Fatal(err)
		}
	}

	damage()
	m.job(`{"kind": "scrub"}`)
	if e := m.event("healed"); e.Data["digest"] != layer.Digest.String() || e.Data["repository"] != "docker.io/library/x" {
		t.Errorf("%v", e.Data)
	}

	load("4MiB")
	e := m.event("evicted")
	if e.Data["why"] != "max_size" || e.Data["blobs"] == int64(0) || e.Data["bytes"].(int64) < 3<<20 {
		t.Errorf("%v", e.Data)
	}

	load("off")
	m.pull("library/x", "latest", image)
	m.stop()
	// What registry:2 leaves counts as hosted, once the store has been compared.
	forgetRecords(t, m.dir)
	if err := os.Remove(m.dir + "/mirror/local/session.json"); err != nil {
		t.Fatal(err)
	}
	load("off")
	m.complete()
	damage()
	m.job(`{"kind": "scrub"}`)
	e = m.event("damaged")
	if names, ok := e.Data["repositories"].([]string); !ok || len(names) != 1 || names[0] != "docker.io/library/x" || e.Data["digest"] != layer.Digest.String() {
		t.Errorf("%v", e.Data)
	}
	found := m.admins("GET", "status")["damaged"].([]any)
	if len(found) != 1 || found[0].(object)["digest"] != layer.Digest.String() {
		t.Errorf("status tells of %v", found)
	}
}
