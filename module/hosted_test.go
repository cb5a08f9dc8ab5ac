package module_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// announces sends the header of a request with a body of n bytes, which waits to be
// asked for, and returns the answer.
func (m *mirror) announces(method, to string, n int) *http.Response {
	m.t.Helper()
	host := strings.TrimPrefix(m.URL, "http://")
	conn, err := net.Dial("tcp", host)
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close()
	to = strings.TrimPrefix(to, m.URL)
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/octet-stream\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", method, to, host, n)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	return resp
}

// A push that does not fit into its hosted pattern is refused before a byte of it
// is read, and told which option it is. Other repositories have nothing to do with
// it, and what is deleted makes room.
func TestHostedQuota(t *testing.T) {
	m := startAdmin(t, "gc off 1s\nhosted apps/** {\nmax_size 2MiB\n}", "default off\nhosted apps/** libs/**\naccess {\nallow any to anyone\n}")
	apps, libs := pusher{m, "apps/web"}, pusher{m, "libs/web"}
	m.complete()
	first, second := regtest.Random("first", 1<<20), regtest.Random("second", 1<<20)
	apps.blob(first.Data)
	// What the pattern has already takes nothing.
	other := pusher{m, "apps/other"}
	other.sends(201, "POST", other.path("blobs", "uploads", "")+"?mount="+first.Digest.String()+"&from=apps/web", nil)
	const says = "max_size 2.0 MiB of `hosted apps/**`"
	begun := apps.sends(202, "POST", apps.path("blobs", "uploads", ""), nil)
	at := begun.Header.Get("Location")
	for method, to := range map[string]string{
		"PUT":   withQuery(at, "digest", second.Digest.String()),
		"PATCH": at,
		"POST":  withQuery(apps.path("blobs", "uploads", ""), "digest", second.Digest.String()),
	} {
		if resp := m.announces(method, to, len(second.Data)); resp.StatusCode != http.StatusInsufficientStorage {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
	m.refused(507, "DENIED", "PUT", withQuery(at, "digest", second.Digest.String()), second.Data, says, "Content-Type", "application/octet-stream")
	libs.blob(second.Data)
	// A mount would take as much, and is not made.
	mounted := apps.sends(202, "POST", apps.path("blobs", "uploads", "")+"?mount="+second.Digest.String()+"&from=libs/web", nil)
	apps.sends(204, "DELETE", mounted.Header.Get("Location"), nil)
	apps.sends(404, "HEAD", apps.path("blobs", second.Digest.String()), nil)

	status := m.admins("GET", "status")
	used := status["hosted"].([]any)[0].(object)
	if used["pattern"] != "apps/**" || used["max_size"] != 2.0*(1<<20) || used["bytes"].(float64) < 1<<20 || used["bytes"].(float64) > 2<<20 {
		t.Errorf("status: %v", used)
	}
	a := m.ask(func() (*http.Response, error) { return client.Get("http://" + m.admin + "/metrics") })
	if want := fmt.Sprintf("caddy_registry_hosted_max_size_bytes{pattern=\"apps/**\",store=%q} 2.097152e+06\n", "disk:"+m.dir); !strings.Contains(string(a.body), want) {
		t.Errorf("no %s", want)
	}

	for _, p := range []pusher{apps, other} {
		p.sends(202, "DELETE", p.path("blobs", first.Digest.String()), nil)
	}
	apps.blob(second.Data)
}

// Tags that are not to be kept are listed, and removed; then their space is given
// back. A pattern with `delete off` has none.
func TestHostedRetention(t *testing.T) {
	m := startAdmin(t, "gc off 1s\nhosted apps/** {\nkeep 1 on v*\nimmutable v1\n}", hostedSite)
	p := pusher{m, "apps/web"}
	images := map[string]regtest.Image{}
	for _, tag := range []string{"v1", "v2", "v3", "latest"} {
		images[tag] = regtest.NewImage(tag, regtest.Random(tag, 50_000))
		p.image(images[tag], tag)
	}
	m.complete()
	dry := m.job(`{"kind": "retention", "dry_run": true}`)
	if fmt.Sprint(dry["found"]) != "[apps/web:v2]" || dry["kept"] != 1.0 || dry["error"] != nil {
		t.Errorf("would remove %v", dry)
	}
	if tags, _ := p.tags(""); !slices.Equal(tags, []string{"latest", "v1", "v2", "v3"}) {
		t.Errorf("after a dry run there are %q", tags)
	}
	code, out, errs := command(t, "registry", "retention", "--address", m.admin)
	if code != 0 || !strings.HasPrefix(out, "apps/web:v2\nretention: removed 1 (") || !strings.Contains(out, ", 1 stay since they are pinned or immutable in ") {
		t.Errorf("the command prints %q and %q", out, errs)
	}
	if tags, _ := p.tags(""); !slices.Equal(tags, []string{"latest", "v1", "v3"}) {
		t.Errorf("there are %q", tags)
	}
	for _, ref := range []string{"v2", images["v2"].Digest.String()} {
		p.sends(404, "GET", p.path("manifests", ref), nil)
	}
	// What has been pushed in this second is younger than the grace.
	eventually(t, "the space to be given back", func() bool {
		m.job(`{"kind": "gc"}`)
		a, err := m.try("HEAD", p.path("blobs", images["v2"].Blobs[1].Digest.String()), nil)
		return err == nil && a.StatusCode == 404
	})
	for _, tag := range []string{"v1", "v3", "latest"} {
		p.sends(200, "GET", p.path("manifests", tag), nil)
		for _, blob := range images[tag].Blobs {
			p.sends(200, "GET", p.path("blobs", blob.Digest.String()), nil)
		}
	}
}

// Options of repositories that no site has do nothing, and that is said.
func TestHostedUnserved(t *testing.T) {
	m := start(t, "hosted libs/** {\ndelete off\n}\nhosted apps/*/x {\ndelete off\n}", hostedSite)
	said := m.logs.with("no site serves any of these repositories; write the pattern behind hosted of a registry_mirror, too")
	if len(said) != 1 || said[0]["hosted"] != "libs/**" {
		t.Errorf("the log says %v", said)
	}
}

// What is pushed while the store is full of what is mirrored, and that is being
// evicted for other pulls and for it, finds room and stays: also what was a mirrored
// layer until it was mounted.
func TestPushDuringEviction(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	images := make([]regtest.Image, 16)
	for i := range images {
		name := fmt.Sprint("x", i)
		images[i] = regtest.NewImage(name, regtest.Random(name, 1<<20))
		up.Push("library/"+name, images[i], "latest")
	}
	m := startAdmin(t, "")
	if err := m.load(fmt.Sprintf("storage disk %s {\nmin_free 1MB\nmax_size 8MiB\n}\n", m.dir)+upstreamFor("docker.io", up), hostedSite); err != nil {
		t.Fatal(err)
	}
	m.complete()
	pulls := func(round int) error {
		for i := range images {
			if err := m.tryPull(fmt.Sprint("docker.io/library/x", i), "latest", images[i]); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
		}
		return nil
	}
	evicted := func() float64 { return m.admins("GET", "status")["evicted"].(object)["blobs"].(float64) }
	stop, pulling := make(chan struct{}), make(chan error, 1)
	go func() {
		for round := 0; ; round++ {
			select {
			case <-stop:
				pulling <- nil
				return
			default:
			}
			if err := pulls(round); err != nil {
				pulling <- err
				return
			}
		}
	}()
	eventually(t, "the store to be full", func() bool { return evicted() > 0 })

	// push is as clients do: again where there is no room yet.
	push := func(p pusher, blob regtest.Content) {
		eventually(t, "a push to find room", func() bool {
			a := p.sends(202, "POST", p.path("blobs", "uploads", ""), nil)
			a, err := m.try("PUT", withQuery(a.Header.Get("Location"), "digest", blob.Digest.String()), blob.Data, "Content-Type", "application/octet-stream")
			if err != nil || a.StatusCode != 201 && a.StatusCode != 507 {
				t.Fatalf("%v %v", a, err)
			}
			return a.StatusCode == 201
		})
	}
	var pushed []regtest.Image
	for i := range 3 {
		before, name := evicted(), fmt.Sprint("own", i)
		image := regtest.NewImage(name, regtest.Random(name, 1<<20))
		if i == 2 {
			image = images[0]
		}
		pushed = append(pushed, image)
		p := pusher{m, "apps/" + name}
		for _, blob := range image.Blobs {
			mounted, err := m.try("POST", p.path("blobs", "uploads", "")+"?mount="+blob.Digest.String()+"&from=docker.io/library/x0", nil)
			if err != nil {
				t.Fatal(err)
			}
			if mounted.StatusCode != 201 {
				push(p, blob)
			}
		}
		// Between the blobs and the manifest, too.
		eventually(t, "eviction to go on", func() bool { return evicted() > before })
		p.put("latest", image.Content)
	}
	before := evicted()
	eventually(t, "eviction to go on", func() bool { return evicted() > before+5 })
	close(stop)
	if err := <-pulling; err != nil {
		t.Error(err)
	}
	up.Down()
	for i, image := range pushed {
		p := pusher{m, fmt.Sprint("apps/own", i)}
		for _, blob := range image.Blobs {
			p.sends(200, "HEAD", p.path("blobs", blob.Digest.String()), nil)
		}
		m.pull(p.repository, "latest", image)
	}
}
