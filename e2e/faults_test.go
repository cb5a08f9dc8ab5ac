//go:build e2e

package e2e

import (
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A fault is what an upstream does to requests whose path has a part.
type fault struct {
	part   string // of the path
	status int    // answers with it
	retry  string // its Retry-After, if any
	harm   harm   // to the body, in its middle
	times  int    // how often; 0: always
}

type harm int

const (
	none harm = iota
	cut
	flip // one bit
)

// A troubled stands between the mirror and a registry, and has faults.
type troubled struct {
	addr   string
	server *http.Server

	mu    sync.Mutex
	fault *fault // or nil
	left  int
	met   int // how often the fault was met
}

func startTroubled(t *testing.T, target string, f *fault) *troubled {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tr := &troubled{addr: ln.Addr().String()}
	tr.suffer(f)
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: target}) },
		FlushInterval: -1,
	}
	tr.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f := tr.strikes(r)
		switch {
		case f == nil:
			proxy.ServeHTTP(w, r)
		case f.status != 0:
			if f.retry != "" {
				w.Header().Set("Retry-After", f.retry)
			}
			ociError(w, f.status, "UNKNOWN")
		default:
			proxy.ServeHTTP(&harmer{ResponseWriter: w, harm: f.harm}, r)
		}
	})}
	go tr.server.Serve(ln)
	t.Cleanup(tr.down)
	return tr
}

// down makes it unreachable.
func (tr *troubled) down() { tr.server.Close() }

// suffer puts a fault in place of the one there is.
func (tr *troubled) suffer(f *fault) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.fault, tr.met = f, 0
	if f != nil {
		tr.left = f.times
	}
}

func (tr *troubled) strikes(r *http.Request) *fault {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	f := tr.fault
	if f == nil || !strings.Contains(r.URL.Path, f.part) || f.harm != none && r.Method != http.MethodGet || f.times > 0 && tr.left == 0 {
		return nil
	}
	tr.left--
	tr.met++
	return f
}

// proves checks that the fault was met as often as it was there.
func (tr *troubled) proves(t *testing.T) {
	t.Helper()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.met == 0 || tr.met < tr.fault.times {
		t.Errorf("the fault was met %d times, not %d; this proves nothing", tr.met, max(tr.fault.times, 1))
	}
}

// A harmer does harm in the middle of a body.
type harmer struct {
	http.ResponseWriter
	harm harm
	at   int64 // of the body
	sent int64
}

func (w *harmer) WriteHeader(status int) {
	length, _ := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
	w.at = length / 2
	w.ResponseWriter.WriteHeader(status)
}

func (w *harmer) Write(p []byte) (int, error) {
	if at := w.at - w.sent; 0 <= at && at < int64(len(p)) {
		if w.harm == cut {
			w.ResponseWriter.Write(p[:at])
			http.NewResponseController(w.ResponseWriter).Flush()
			panic(http.ErrAbortHandler)
		}
		p[at] ^= 1 // the proxy's own buffer
	}
	n, err := w.ResponseWriter.Write(p)
	w.sent += int64(n)
	return n, err
}

func (w *harmer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// faultClients are those of clients that ask in ways of their own, and skopeo
// with the library of today.
func faultClients() []client {
	var chosen []client
	for _, c := range clients {
		if !strings.HasSuffix(c.name, "-prefix") {
			chosen = append(chosen, c)
		}
	}
	return append(chosen, client{name: "containers-image", pull: pullWithContainersImage})
}

// each runs a test with every client.
func each(t *testing.T, test func(t *testing.T, c client)) {
	for _, c := range faultClients() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			test(t, c)
		})
	}
}

// unblemished checks that no client has met a fault: some ask again until they
// have what they want.
func (m *mirror) unblemished(t *testing.T) {
	t.Helper()
	requests := m.asked(t, "")
	if len(requests) == 0 {
		t.Error("the access log is empty; this proves nothing")
	}
	for _, r := range requests {
		if r.Status >= 400 {
			t.Errorf("a client's %s %s was answered %d", r.Request.Method, r.Request.URI, r.Status)
		}
	}
	if m.said("answer broken off", "") {
		t.Error("a client's answer was broken off")
	}
}

// TestFaults: whatever the upstream does to the mirror, clients that have no
// other way to it complete, and see nothing of it.
func TestFaults(t *testing.T) {
	img := newImageOf(t, "faults", 6)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	small := ""
	for _, digest := range img.amd64 {
		if img.blobs[digest] < 1<<20 && digest != img.config {
			small = digest
		}
	}

	// The only source has a fault, and is well again.
	for _, c := range []struct {
		name  string
		fault fault
	}{
		{"blob 500", fault{part: img.big, status: 500, times: 1}},
		{"blob 429 twice", fault{part: img.big, status: 429, retry: "1", times: 2}},
		{"blob cut", fault{part: img.big, harm: cut, times: 1}},
		{"small blob corrupt", fault{part: small, harm: flip, times: 1}},
		{"config 500", fault{part: img.config, status: 500, times: 1}},
		{"manifest 500", fault{part: "/manifests/", status: 500, times: 1}},
		{"manifest 429", fault{part: "/manifests/", status: 429, retry: "1", times: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			each(t, func(t *testing.T, client client) {
				source := startTroubled(t, upstream.addr, &c.fault)
				m := startMirror(t, setup{registry: dockerHub(source.addr) + deadRegistry(source.addr), server: accessLog})
				client.pull(t, m.addr, img, ":latest")
				source.proves(t)
				m.unblemished(t)
			})
		})
	}

	// A source has a fault for good, and the origin behind it is well.
	for _, c := range []struct {
		name  string
		fault *fault
	}{
		{"down", nil},
		{"blob 404", &fault{part: "/blobs/", status: 404}},
		{"blob 429", &fault{part: "/blobs/", status: 429, retry: "60"}},
		{"blob 500", &fault{part: "/blobs/", status: 500}},
		{"blob cut", &fault{part: "/blobs/", harm: cut}},
		{"small blob corrupt", &fault{part: small, harm: flip}},
		{"manifest 404", &fault{part: "/manifests/", status: 404}},
		{"manifest 429", &fault{part: "/manifests/", status: 429, retry: "60"}},
		{"manifest 500", &fault{part: "/manifests/", status: 500}},
	} {
		t.Run("for good/"+c.name, func(t *testing.T) {
			each(t, func(t *testing.T, client client) {
				source := startTroubled(t, upstream.addr, c.fault)
				if c.fault == nil {
					source.down()
				}
				m := startMirror(t, setup{registry: twoSources(source.addr, upstream.addr), server: accessLog})
				client.pull(t, m.addr, img, ":latest")
				if c.fault != nil {
					source.proves(t)
				}
				m.unblemished(t)
			})
		})
	}

	// Nothing works any more, and all is held.
	for _, c := range []struct {
		name  string
		fault *fault
	}{
		{"down", nil},
		{"429", &fault{status: 429, retry: "60"}},
		{"500", &fault{status: 500}},
		{"404 of blobs", &fault{part: "/blobs/", status: 404}},
	} {
		t.Run("held/"+c.name, func(t *testing.T) {
			source := startTroubled(t, upstream.addr, nil)
			m := startMirror(t, setup{registry: dockerHub(source.addr) + deadRegistry(source.addr), server: accessLog})
			t.Cleanup(func() { m.unblemished(t) }) // when all have pulled
			pullWithCrane(t, m.addr, img, ":latest")
			pullWithRegctl(t, m.addr, img, ":latest") // of another registry
			source.suffer(c.fault)
			if c.fault == nil {
				source.down()
			}
			each(t, func(t *testing.T, client client) { client.pull(t, m.addr, img, ":latest") })
		})
	}
}

// twoSources is the configuration of docker.io, and of the registry that
// regctl believes in, with an endpoint before the origin.
func twoSources(endpoint, origin string) string {
	options := " {\n endpoint http://" + endpoint + "\n origin http://" + origin + "\n tag_ttl 0s\n}\n"
	return "upstream docker.io" + options + "upstream " + deadAddr + options
}

// TestFaultsCorrupt: a wrong byte in the middle of a large layer has gone to a
// client before the whole can be checked. The client is not given the end, so
// none takes it for the image; and when it is asked again, it gets the right
// bytes, as the mirror has fetched them anew.
func TestFaultsCorrupt(t *testing.T) {
	img := newImageOf(t, "corrupt", 6)
	upstream := startRegistry(t, workDir(t), "")
	upstream.push(t, "library/hello", img)
	for _, c := range []struct {
		name  string
		times int
	}{{"once", 1}, {"for good", 0}} {
		t.Run(c.name, func(t *testing.T) {
			each(t, func(t *testing.T, client client) {
				source := startTroubled(t, upstream.addr, &fault{part: img.big, harm: flip, times: c.times})
				registry := dockerHub(source.addr) + deadRegistry(source.addr)
				if c.times == 0 {
					registry = twoSources(source.addr, upstream.addr)
				}
				m := startMirror(t, setup{registry: registry})
				pull := attempts[client.name](t, m.addr)
				if err := pull(); err != nil {
					t.Logf("%s does not ask again by itself: %v", client.name, err)
					if err = pull(); err != nil {
						t.Errorf("the second pull: %v", err)
					}
				}
				source.proves(t)
				client.pull(t, m.addr, img, ":latest")
			})
		})
	}
}

// attempts are pulls that may fail, each of a client that keeps what it has.
var attempts = map[string]func(t *testing.T, mirror string) func() error{
	"docker": func(t *testing.T, mirror string) func() error {
		docker := startDocker(t, mirror)
		return func() error {
			_, err := docker("pull", "hello")
			return err
		}
	},
	"containerd-1.6": func(t *testing.T, mirror string) func() error {
		return tryContainerd(t, 2, "/usr/bin", mirror)
	},
	"containerd-2.4": func(t *testing.T, mirror string) func() error {
		return tryContainerd(t, 3, filepath.Join(checkout, ".cache/containerd2"), mirror)
	},
	"podman": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error {
			_, err := tryPodman(t, dir, mirror, "pull", "--tls-verify=false", "--signature-policy", anySignature(t, dir), "docker.io/library/hello")
			return err
		}
	},
	"skopeo": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error { return trySkopeo(t, dir, mirror, ":latest") }
	},
	"buildah": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error {
			_, err := try(t, bare(dir), tool(t, "buildah"), "--root", dir+"/root", "--runroot", dir+"/run", "--storage-driver", "vfs",
				"--registries-conf", registriesConf(t, dir, mirror), "pull", "--signature-policy", anySignature(t, dir), "docker.io/library/hello")
			return err
		}
	},
	"crane": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error { return tryCrane(t, dir, mirror, ":latest") }
	},
	"regctl": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error {
			_, err := try(t, regctlEnv(t, dir, mirror), tool(t, "regctl"), "image", "copy", "docker.io/library/hello", "ocidir://"+dir+"/out:latest")
			return err
		}
	},
	"containers-image": func(t *testing.T, mirror string) func() error {
		dir := workDir(t)
		return func() error {
			_, err := try(t, bare(dir), tool(t, "cimg"), registriesConf(t, dir, mirror), "docker://docker.io/library/hello", dir+"/out")
			return err
		}
	},
}

func tryContainerd(t *testing.T, configVersion int, bin, mirror string) func() error {
	t.Helper()
	ctr, hosts := startContainerd(t, configVersion, "", bin, mirror)
	first := true
	return func() error {
		if !first {
			// It keeps what it got, and the wrong byte with it, until its next
			// collection, into which this may run.
			eventually(t, 20*time.Second, "containerd to forget", func() bool {
				_, err := ctr("content", "prune", "references")
				return err == nil
			})
		}
		first = false
		_, err := ctr("images", "pull", "--hosts-dir", hosts, "docker.io/library/hello:latest")
		return err
	}
}
