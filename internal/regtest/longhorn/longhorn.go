// Package longhorn is the manager of a Longhorn cluster for tests: its REST API, as
// far as it concerns backing images, in four of its releases. What it is given an
// address of it really downloads, under the rules of Longhorn's downloader
// (backing-image-manager, pkg/sync/handler.go and sync_file.go): a probe of the size,
// then one GET; only status 200 counts; no Range, no resume; gzip accepted, as Go's
// client does by itself; a silence ends it; length, SHA-512 and a multiple of 512.
//
// An image goes through its states as a client looks at it: each GET or listing that
// shows it takes it one step on, if what the step waits for has come. So a test sees
// every state, however slow the machine is.
package longhorn

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// Profile is a release of Longhorn.
type Profile string

const (
	V1_4    Profile = "1.4"  // probes with GET, cuts addresses at "=", reports absence as 500
	V1_7    Profile = "1.7"  // numbers of copies, selectors
	V1_10   Profile = "1.10" // dataEngine, 30 seconds of patience
	V1_12_1 Profile = "1.12.1"
)

// Profiles are all of them, the oldest first.
var Profiles = []Profile{V1_4, V1_7, V1_10, V1_12_1}

func (m *Manager) since(p Profile) bool {
	rank := map[Profile]int{V1_4: 0, V1_7: 1, V1_10: 2, V1_12_1: 3}
	return rank[m.options.Profile] >= rank[p]
}

// Options make a manager.
type Options struct {
	Profile Profile // default: 1.12.1
	// Second is how long one of Longhorn's seconds takes, where it waits before it
	// tries again: 60 to 300 of them after a failure, 300 when all copies are lost.
	// Default: a millisecond.
	Second time.Duration
	// Silence is how long the downloader waits for a byte. Default: the profile's,
	// 4 s before 1.9.2, then 30 s.
	Silence time.Duration
	// Keep is up to how many bytes an image's content is kept; of a larger one its
	// digest and length alone. Default: 64 MiB.
	Keep int64
	// Dial connects the downloader, so that a name that is not loopback can lead to
	// a server of the test. Default: as it says.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolve says what a host name means to the validation of addresses. Default:
	// localhost is loopback, and nothing else.
	Resolve func(host string) []net.IP
	// Disks are how many disks there are, each on its own node. Default: 3.
	Disks int
}

// A Request is one that arrived at the manager.
type Request struct {
	Method, Path, Query, Authorization, UserAgent string
}

// Fault spoils requests that its fields choose, Times of them.
type Fault struct {
	Method string // empty: any
	Path   string // a part of it
	Times  int    // 0: until Heal
	// One of:
	Status int    // answered with Body, as text/html
	Body   string // of Status
	Hang   bool   // no answer until the client goes
	Lose   bool   // it takes effect, and the connection breaks instead of an answer
}

// A Manager is one cluster's. Its methods may be called at any time.
type Manager struct {
	URL     string
	options Options
	tb      testing.TB
	client  *http.Client
	ctx     context.Context
	cancel  context.CancelFunc
	working sync.WaitGroup

	mu       sync.Mutex
	server   *http.Server
	address  string
	images   map[string]*image
	volumes  map[string]string    // → backing image
	backups  map[string][2]string // → backing image, checksum
	requests []Request
	faults   []*Fault
	uuids    int
	token    string
	wrong    bool
	lag      int
	rename   func(string) string
}

// New starts a manager, which is closed with the test.
func New(tb testing.TB, o Options) *Manager {
	tb.Helper()
	if o.Profile == "" {
		o.Profile = V1_12_1
	}
	if o.Second == 0 {
		o.Second = time.Millisecond
	}
	if o.Keep == 0 {
		o.Keep = 64 << 20
	}
	if o.Disks == 0 {
		o.Disks = 3
	}
	m := &Manager{options: o, tb: tb, images: map[string]*image{}, volumes: map[string]string{}, backups: map[string][2]string{}}
	if o.Silence == 0 {
		m.options.Silence = 30 * time.Second
		if !m.since(V1_10) {
			m.options.Silence = 4 * time.Second
		}
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	if o.Dial != nil {
		transport.DialContext = o.Dial
	}
	m.client = &http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		r.Header.Del("Referer")
		if len(via) > 100 { // Longhorn has no limit
			return http.ErrUseLastResponse
		}
		return nil
	}}
	m.address = regtest.FreeAddress(tb)
	m.URL = "http://" + m.address
	m.Start()
	tb.Cleanup(func() {
		m.Stop()
		m.cancel()
		m.working.Wait()
		transport.CloseIdleConnections()
	})
	return m
}

// Start lets the manager listen, as it does from New on until Stop.
func (m *Manager) Start() {
	m.tb.Helper()
	listener, err := net.Listen("tcp", m.address)
	if err != nil {
		m.tb.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(m.serve)}
	m.mu.Lock()
	m.server = server
	m.mu.Unlock()
	m.working.Go(func() { server.Serve(listener) })
}

// Stop lets connections be refused. What is there, and downloads, go on.
func (m *Manager) Stop() {
	m.mu.Lock()
	server := m.server
	m.mu.Unlock()
	server.Close()
}

// Break adds a fault.
func (m *Manager) Break(f Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.Times == 0 {
		f.Times = -1
	}
	m.faults = append(m.faults, &f)
}

// Heal removes all faults.
func (m *Manager) Heal() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = nil
}

// Require has a proxy before the manager answer 401 to what does not carry this
// Authorization.
func (m *Manager) Require(authorization string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.token = authorization
}

// WrongLinks has links and actions lead to a host where nothing is.
func (m *Manager) WrongLinks() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrong = true
}

// Lag has the next listings leave out images made from now on.
func (m *Manager) Lag(listings int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lag = listings
}

// Rename changes the names of images that are made from now on.
func (m *Manager) Rename(f func(string) string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rename = f
}

// SetVolume makes a volume that uses a backing image; with an empty one it goes.
func (m *Manager) SetVolume(name, backingImage string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.volumes[name] = backingImage
	if backingImage == "" {
		delete(m.volumes, name)
	}
}

// SetBackup makes a backup volume whose backing image has a name and a checksum.
func (m *Manager) SetBackup(name, backingImage, checksum string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.backups[name] = [2]string{backingImage, checksum}
}

// Requests are those that arrived whose method and path contain what is given.
func (m *Manager) Requests(method, path string) []Request {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []Request
	for _, r := range m.requests {
		if strings.Contains(r.Method, method) && strings.Contains(r.Path, path) {
			found = append(found, r)
		}
	}
	return found
}

// spoil does what a fault or the proxy does to a request; it reports whether the
// request is done with, and whether its answer is to be lost.
func (m *Manager) spoil(w http.ResponseWriter, r *http.Request) (done, lose bool) {
	m.mu.Lock()
	if len(m.requests) < 10_000 {
		m.requests = append(m.requests, Request{r.Method, r.URL.Path, r.URL.RawQuery, r.Header.Get("Authorization"), r.UserAgent()})
	}
	refused := m.token != "" && r.Header.Get("Authorization") != m.token
	var fault Fault
	for _, f := range m.faults {
		if f.Times != 0 && (f.Method == "" || f.Method == r.Method) && strings.Contains(r.URL.Path, f.Path) {
			f.Times--
			fault = *f
			break
		}
	}
	m.mu.Unlock()
	switch {
	case refused:
		w.Header().Set("WWW-Authenticate", "Bearer")
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return true, false
	case fault.Hang:
		select {
		case <-r.Context().Done():
		case <-m.ctx.Done():
		}
		return true, false
	case fault.Status != 0:
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(fault.Status)
		fmt.Fprint(w, fault.Body)
		return true, false
	}
	return false, fault.Lose
}

func (m *Manager) serve(w http.ResponseWriter, r *http.Request) {
	done, lose := m.spoil(w, r)
	if done {
		return
	}
	if lose {
		defer panic(http.ErrAbortHandler)
		w = nowhere{http.Header{}}
	}
	if strings.HasSuffix(r.URL.Path, "/") {
		// gorilla/mux's StrictSlash: what was a POST comes back as a GET.
		http.Redirect(w, r, strings.TrimRight(r.URL.Path, "/"), http.StatusMovedPermanently)
		return
	}
	if strings.Contains(r.UserAgent(), "Mozilla") && strings.Contains(r.Header.Get("Accept"), "*/*") {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, "<!DOCTYPE html>\n<script src=\"ui.js\"></script>")
		return
	}
	path, inside := strings.CutPrefix(r.URL.Path, "/v1")
	name, isImage := strings.CutPrefix(path, "/backingimages/")
	name, isDownload := strings.CutSuffix(name, "/download")
	action := r.URL.Query().Get("action")
	switch {
	case !inside || isImage && (name == "" || strings.Contains(name, "/")):
		http.Error(w, "404 page not found", http.StatusNotFound)
	case path == "" && r.Method == http.MethodGet:
		m.send(w, map[string]any{"actions": object{}, "id": "v1", "links": object{"self": m.self(r, "")}, "type": "apiVersion"})
	case path == "/backingimages" && r.Method == http.MethodGet:
		m.list(w, r)
	case path == "/backingimages" && r.Method == http.MethodPost:
		m.create(w, r)
	case path == "/volumes" && r.Method == http.MethodGet:
		m.sendVolumes(w, r)
	case path == "/backupvolumes" && r.Method == http.MethodGet:
		m.sendBackups(w, r)
	case path == "/nodes" && r.Method == http.MethodGet:
		m.sendNodes(w, r)
	case isImage && isDownload && r.Method == http.MethodGet:
		m.download(w, r, name)
	case isImage && r.Method == http.MethodGet:
		m.get(w, r, name)
	case isImage && r.Method == http.MethodDelete:
		m.remove(w, r, name)
	case isImage && r.Method == http.MethodPost && action == "upload":
		m.upload(w, r, name)
	case isImage && r.Method == http.MethodPost && action == "backingImageCleanup":
		m.cleanup(w, r, name)
	case isImage && r.Method == http.MethodPost && action == "updateMinNumberOfCopies" && m.since(V1_7):
		m.setCopies(w, r, name)
	default:
		http.Error(w, "404 page not found", http.StatusNotFound)
	}
}

// nowhere takes an answer that never arrives.
type nowhere struct{ header http.Header }

func (n nowhere) Header() http.Header         { return n.header }
func (n nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (n nowhere) WriteHeader(int)             {}

type object = map[string]any // whose keys JSON sorts, as Longhorn's do

func (m *Manager) self(r *http.Request, path string) string {
	if m.wrong {
		return "http://longhorn-backend.invalid:9500/v1" + path
	}
	return "http://" + r.Host + "/v1" + path
}

func (m *Manager) send(w http.ResponseWriter, answer any) {
	data, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-API-Schemas", m.URL+"/v1/schemas")
	w.Write(append(data, '\n'))
}

// sendError sends what go-rancher's writer does of an error: its header is set too
// late, so it is text/plain. Until 1.5.1 every error is a 500.
func (m *Manager) sendError(w http.ResponseWriter, r *http.Request, status int, message string) {
	code := http.StatusText(status)
	if !m.since(V1_7) {
		status, code = http.StatusInternalServerError, "Server Error"
	}
	data, err := json.Marshal(object{"actions": object{}, "code": code, "detail": "",
		"links": object{"self": m.self(r, strings.TrimPrefix(r.URL.Path, "/v1"))}, "message": message, "status": status, "type": "error"})
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	w.Write(append(data, '\n'))
}

func (m *Manager) sendList(w http.ResponseWriter, r *http.Request, kind, path string, data []object) {
	if data == nil {
		data = []object{}
	}
	sort.Slice(data, func(i, j int) bool { return data[i]["name"].(string) < data[j]["name"].(string) })
	m.send(w, object{"data": data, "links": object{"self": m.self(r, path)}, "resourceType": kind, "type": "collection"})
}

func (m *Manager) sendVolumes(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var data []object
	for name, image := range m.volumes {
		data = append(data, object{"id": name, "type": "volume", "name": name, "size": "10737418240", "backingImage": image,
			"state": "attached", "robustness": "healthy", "actions": object{}, "links": object{"self": m.self(r, "/volumes/"+url.PathEscape(name))}})
	}
	m.sendList(w, r, "volume", "/volumes", data)
}

func (m *Manager) sendBackups(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var data []object
	for name, of := range m.backups {
		data = append(data, object{"id": name, "type": "backupVolume", "name": name, "backingImageName": of[0], "backingImageChecksum": of[1],
			"actions": object{}, "links": object{"self": m.self(r, "/backupvolumes/"+url.PathEscape(name))}})
	}
	m.sendList(w, r, "backupVolume", "/backupvolumes", data)
}

func (m *Manager) sendNodes(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var data []object
	for i := range m.options.Disks {
		name := fmt.Sprintf("n%d", i+1)
		data = append(data, object{"id": name, "type": "node", "name": name, "actions": object{}, "links": object{"self": m.self(r, "/nodes/"+name)},
			"disks": object{"default-disk": object{"path": "/var/lib/longhorn/", "diskUUID": disk(i)}}})
	}
	m.sendList(w, r, "node", "/nodes", data)
}

// disk is the UUID of a disk, which is on the node with the next number.
func disk(i int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", i+1) }
