package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// hookedSite hosts apps/**, for everyone here; who that is stands in a header.
const hookedSite = "default docker.io\nshadow_default\nhosted apps/**\naccess {\nidentity {http.request.header.X-User}\nallow any to net:127.0.0.0/8\n}"

// A hook is what a webhook is told, an event a time.
type hook struct {
	*httptest.Server
	t    testing.TB
	told chan hookEvent
	seen map[string]bool // ids

	mu     sync.Mutex
	status int
	gate   chan struct{} // nothing is answered before it is closed; nil: at once
	header http.Header   // of the latest request
}

type hookEvent struct {
	ID     string
	Action string
	Target struct {
		MediaType, Repository, FromRepository, URL, Tag string
		Digest                                          digest.Digest
		Size, Length                                    int64
	}
	Request struct{ ID, Addr, Host, Method, UserAgent string }
	Actor   struct{ Name string }
}

// line is an event in one.
func (e hookEvent) line() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s:%s@%s %s", e.Actor.Name, e.Action, e.Target.Repository, e.Target.Tag, e.Target.Digest, e.Target.FromRepository))
}

func newHook(t testing.TB) *hook {
	h := &hook{t: t, told: make(chan hookEvent, 1_000), seen: map[string]bool{}, status: http.StatusNoContent}
	h.Server = httptest.NewServer(h)
	t.Cleanup(h.Close)
	return h
}

func (h *hook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	status, gate := h.status, h.gate
	h.header = r.Header
	h.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-h.t.Context().Done():
			return
		}
	}
	body, _ := io.ReadAll(r.Body)
	var sent struct{ Events []hookEvent }
	if err := json.Unmarshal(body, &sent); err != nil || len(sent.Events) != 1 || r.Header.Get("Content-Type") != "application/vnd.docker.distribution.events.v1+json" {
		h.t.Errorf("%s, %v: %v", body, r.Header, err)
	} else if status/100 == 2 {
		h.told <- sent.Events[0]
	}
	w.WriteHeader(status)
}

func (h *hook) answers(status int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status = status
}

func (h *hook) next() hookEvent {
	h.t.Helper()
	select {
	case e := <-h.told:
		return e
	case <-time.After(time.Minute):
		h.t.Fatal("nothing is told")
	}
	panic("not reached")
}

// tells waits for events, and compares them with their lines. One that comes again
// is passed over.
func (h *hook) tells(lines ...string) {
	h.t.Helper()
	for _, want := range lines {
		e := h.next()
		for h.seen[e.ID] {
			e = h.next()
		}
		h.seen[e.ID] = true
		if got := e.line(); got != want {
			h.t.Fatalf("told of %q; want %q", got, want)
		}
	}
}

// TestWebhook: whoever pushes, mounts, pulls or deletes what is hosted here is
// told of to the webhooks that want to know, and to nobody for what is mirrored.
func TestWebhook(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	mirrored := regtest.NewImage("mirrored")
	up.Push("library/x", mirrored, "latest")
	all, changes := newHook(t), newHook(t)
	t.Setenv("TEST_HOOK", "hush")
	m := start(t, fmt.Sprintf("webhook all %s/hook {\n header Authorization \"Bearer {env.TEST_HOOK}\"\n}\nwebhook changes %s {\n ignore actions pull\n ignore mediatypes application/octet-stream\n}\n%s",
		all.URL, changes.URL, upstreamFor("docker.io", up)), hookedSite)
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x", regtest.Random("x", 100_000))
	config, layer := image.Blobs[0].Digest, image.Blobs[1].Digest
	p.blob(image.Blobs[0].Data)
	p.blob(image.Blobs[1].Data)
	m.sends(201, "PUT", p.path("manifests", "v1"), image.Data, "Content-Type", image.MediaType, "X-User", "alice", "User-Agent", "crane/1")
	all.tells("push apps/web:@"+config.String(), "push apps/web:@"+layer.String())
	e := all.next()
	if want := fmt.Sprintf("alice push apps/web:v1@%s", image.Digest); e.line() != want {
		t.Errorf("%q; want %q", e.line(), want)
	}
	host := strings.TrimPrefix(m.URL, "http://")
	if e.Target.MediaType != image.MediaType || e.Target.Size != int64(len(image.Data)) || e.Target.Length != e.Target.Size ||
		e.Target.URL != m.URL+p.path("manifests", image.Digest.String()) ||
		e.Request.Host != host || e.Request.Addr != "127.0.0.1" || e.Request.Method != "PUT" || e.Request.UserAgent != "crane/1" || e.Request.ID == "" {
		t.Errorf("%+v", e)
	}
	if got := m.sends(200, "GET", e.Target.URL, nil); string(got.body) != string(image.Data) {
		t.Error("something else is at its URL")
	}
	all.mu.Lock()
	if got := all.header.Get("Authorization"); got != "Bearer hush" {
		t.Errorf("Authorization %q", got)
	}
	all.mu.Unlock()
	all.tells("pull apps/web:@" + image.Digest.String())

	m.sends(200, "HEAD", p.path("manifests", "v1"), nil)
	m.sends(404, "GET", p.path("manifests", "v2"), nil)
	m.sends(304, "GET", p.path("manifests", "v1"), nil, "If-None-Match", `"`+image.Digest.String()+`"`)
	m.sends(200, "GET", p.path("manifests", "v1"), nil, "X-User", "bob")
	m.sends(206, "GET", p.path("blobs", layer.String()), nil, "Range", "bytes=0-99", "X-User", "bob")
	m.sends(200, "GET", p.path("blobs", config.String()), nil)
	m.sends(200, "GET", p.path("blobs", config.String()), nil) // from memory
	m.sends(200, "HEAD", p.path("blobs", config.String()), nil)
	m.pull("library/x", "latest", mirrored)
	m.sends(201, "POST", "/v2/apps/other/blobs/uploads/?mount="+layer.String()+"&from=apps/web", nil, "X-User", "carol")
	m.sends(202, "DELETE", p.path("manifests", "v1"), nil, "X-User", "dave")
	m.sends(202, "DELETE", p.path("manifests", image.Digest.String()), nil)
	all.tells(
		"bob pull apps/web:v1@"+image.Digest.String(),
		"bob pull apps/web:@"+layer.String(),
		"pull apps/web:@"+config.String(),
		"pull apps/web:@"+config.String(),
		"carol mount apps/other:@"+layer.String()+" apps/web",
		"dave delete apps/web:v1@"+image.Digest.String(),
		"delete apps/web:@"+image.Digest.String(),
	)
	changes.tells(
		"alice push apps/web:v1@"+image.Digest.String(),
		"dave delete apps/web:v1@"+image.Digest.String(),
		"delete apps/web:@"+image.Digest.String(),
	)
}

// TestWebhookStatus: how webhooks do is in the metrics, in the API and in what
// the command prints.
func TestWebhookStatus(t *testing.T) {
	down, up := newHook(t), newHook(t)
	down.answers(503)
	m := startAdmin(t, "")
	if err := m.load(fmt.Sprintf("webhook down %s {\n threshold 1\n backoff 1h\n}\nwebhook up %s", down.URL, up.URL), hookedSite); err != nil {
		t.Fatal(err)
	}
	d := pusher{m, "apps/web"}.blob([]byte("x"))
	up.tells("push apps/web:@" + d.String())
	eventually(t, "an attempt to fail, and another one not", func() bool {
		var status struct {
			Webhooks []struct {
				Name, Trouble                       string
				Pending, Delivered, Failed, Dropped int
			}
		}
		a := m.adminDo("GET", "status")
		if err := json.Unmarshal(a.body, &status); err != nil || len(status.Webhooks) != 2 {
			t.Fatalf("%s, %v", a.body, err)
		}
		return fmt.Sprint(status.Webhooks) == "[{down it answers 503 1 0 1 0} {up  0 1 0 0}]"
	})
	a := m.ask(func() (*http.Response, error) { return client.Get("http://" + m.admin + "/metrics") })
	for _, want := range []string{
		`caddy_registry_webhook_pending{store="disk:%s",webhook="down"} 1`, `caddy_registry_webhook_failed_total{store="disk:%s",webhook="down"} 1`,
		`caddy_registry_webhook_delivered_total{store="disk:%s",webhook="up"} 1`, `caddy_registry_webhook_dropped_total{store="disk:%s",webhook="up"} 0`,
	} {
		if want = fmt.Sprintf(want, m.dir); !strings.Contains(string(a.body), want+"\n") {
			t.Errorf("no metric %s", want)
		}
	}
	if status, stdout, stderr := command(t, "registry", "status", "--address", m.admin); status != 0 || !strings.Contains(stdout, "WEBHOOK") || !strings.Contains(stdout, "it answers 503") {
		t.Errorf("%d: %s%s", status, stdout, stderr)
	}
}

// TestWebhookReload: what waits for a webhook goes where it is by the
// configuration that runs, and a configuration that fails changes nothing.
func TestWebhookReload(t *testing.T) {
	const secret = "surely-secret"
	t.Setenv("TEST_HOOK", secret)
	down, up := newHook(t), newHook(t)
	down.answers(500)
	m := start(t, fmt.Sprintf("webhook audit %s/{env.TEST_HOOK} {\n backoff 1h\n header X-Token {env.TEST_HOOK}\n}", down.URL), hookedSite)
	p := pusher{m, "apps/web"}
	first := p.blob([]byte("first"))
	eventually(t, "the trouble with the webhook to be logged", func() bool { return strings.Contains(m.logs.text(), "does not take events") })
	for app, path := range map[string]string{
		"webhook audit " + up.URL + "/{env.SURELY_NOT_SET}":                                                                              "webhooks[0].url",
		"webhook audit " + up.URL + " {\n header X-Token {env.SURELY_NOT_SET}\n}":                                                        "webhooks[0].headers.X-Token[0]",
		"webhook audit " + up.URL + " {\n header X-Token {file./surely/not/there}\n}":                                                    "webhooks[0].headers.X-Token[0]",
		"webhook audit {env.TEST_HOOK}":                                                                                                  "webhooks[0].url",
		"webhook a " + up.URL + "\n" + upstreamFor("docker.io", regtest.New(t, regtest.Options{}), "credentials a {env.SURELY_NOT_SET}"): "upstreams[0]",
	} {
		err := m.load(app, hookedSite)
		if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", app, err)
		}
	}
	second := p.blob([]byte("second"))
	if err := m.load("webhook audit "+up.URL, hookedSite); err != nil {
		t.Fatal(err)
	}
	up.tells("push apps/web:@"+first.String(), "push apps/web:@"+second.String())
	// Without it, and with it again in another process.
	if err := m.load("", hookedSite); err != nil {
		t.Fatal(err)
	}
	p.blob([]byte("third"))
	m.stop()
	if err := m.load("webhook audit "+up.URL, hookedSite); err != nil {
		t.Fatal(err)
	}
	up.tells("push apps/web:@" + p.blob([]byte("fourth")).String())
	if said := m.logs.text(); strings.Contains(said, secret) {
		t.Errorf("the secret was logged: %s", said)
	}
}

// TestWebhookRejected: a configuration that fails to start, whose webhooks may
// already have taken the place of those before, leaves them as they were.
func TestWebhookRejected(t *testing.T) {
	kept, never := newHook(t), newHook(t)
	m := start(t, "webhook audit "+kept.URL, hookedSite)
	occupied, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	fails, err := m.adapt("webhook audit "+never.URL+" {\n ignore actions push\n}\nwebhook other "+never.URL, hookedSite)
	if err != nil {
		t.Fatal(err)
	}
	fails = bytes.Replace(fails, []byte(`"listen":["`), []byte(`"listen":["`+occupied.Addr().String()+`","`), 1)
	for i := range 8 { // Caddy starts apps in any order
		if err := m.loadJSON(fails); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Fatalf("loaded with an address in use: %v", err)
		}
		kept.tells("push apps/web:@" + pusher{m, "apps/web"}.blob(fmt.Append(nil, i)).String())
	}
	if len(never.told) > 0 {
		t.Errorf("told of %q", (<-never.told).line())
	}
}

// TestWebhookKill: a push that was stored is told of though the mirror is killed
// at once, and what was told of when it is killed is told again, as the same.
func TestWebhookKill(t *testing.T) {
	h := newHook(t)
	t.Setenv(childConfig, strings.ReplaceAll(`{
		admin off
		auto_https off
		persist_config off
		registry {
			storage disk {$`+childDir+`} {
				min_free 1MB
			}
			webhook audit `+h.URL+` {
				timeout 1h
			}
		}
	}
	{$`+childURL+`} {
		registry_mirror {
			SITE
		}
	}`, "SITE", hookedSite))
	dir := t.TempDir()
	h.answers(503)
	doomed := child(t, dir, "", "webhook.queued#2")
	p := pusher{doomed, "apps/web"}
	p.blob([]byte("first"))
	begun := p.sends(202, "POST", p.path("blobs", "uploads", ""), nil)
	d := digest.FromString("second")
	if a, err := doomed.try("PUT", withQuery(begun.Header.Get("Location"), "digest", d.String()), []byte("second")); err == nil && a.err == nil {
		t.Errorf("the mirror was killed, and answers %d", a.StatusCode)
	}
	doomed.dead()

	h.answers(200)
	gate := make(chan struct{})
	h.mu.Lock()
	h.gate = gate
	h.mu.Unlock()
	doomed = child(t, dir, "", "webhook.taken#2")
	close(gate)
	doomed.dead()
	first, second := h.next(), h.next()
	if first.Target.Digest != digest.FromString("first") || second.Target.Digest != d {
		t.Errorf("told of %q and %q", first.line(), second.line())
	}
	p = pusher{child(t, dir, "", ""), "apps/web"}
	p.sends(200, "HEAD", p.path("blobs", d.String()), nil)
	if again := h.next(); again != second {
		t.Errorf("told again of %+v; want %+v", again, second)
	}
	h.seen[second.ID] = true
	h.tells("push apps/web:@" + p.blob([]byte("third")).String())
}

// TestPushEvents: Caddy's event handlers are told of what becomes of images.
func TestPushEvents(t *testing.T) {
	m := start(t, "", "")
	m.subscribeAt(hookedSite, "", "pushed", "pulled", "mounted", "deleted")
	p := pusher{m, "apps/web"}
	image := regtest.NewImage("x")
	config := p.blob(image.Blobs[0].Data)
	wants := func(name string, data map[string]any) {
		t.Helper()
		e := m.event(name)
		for key, want := range data {
			if e.Data[key] != want {
				t.Errorf("%s: %s is %v; want %v", name, key, e.Data[key], want)
			}
		}
	}
	wants("pushed", map[string]any{"repository": "apps/web", "tag": "", "digest": config.String(), "media_type": "application/octet-stream", "size": int64(len(image.Blobs[0].Data))})
	m.sends(201, "PUT", p.path("manifests", "v1"), image.Data, "Content-Type", image.MediaType, "X-User", "alice")
	wants("pushed", map[string]any{"repository": "apps/web", "tag": "v1", "digest": image.Digest.String(), "media_type": image.MediaType, "actor": "alice", "client": "127.0.0.1"})
	m.sends(200, "GET", p.path("manifests", "v1"), nil, "User-Agent", "crane/1")
	wants("pulled", map[string]any{"tag": "v1", "user_agent": "crane/1", "actor": ""})
	m.sends(201, "POST", "/v2/apps/other/blobs/uploads/?mount="+config.String()+"&from=apps/web", nil)
	wants("mounted", map[string]any{"repository": "apps/other", "from": "apps/web", "digest": config.String()})
	m.sends(202, "DELETE", p.path("manifests", "v1"), nil)
	wants("deleted", map[string]any{"repository": "apps/web", "tag": "v1"})
}

// text is all that was logged.
func (l *logs) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprint(l.lines)
}
