package longhorn

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// image is a backing image. step says what a client sees of it next.
type image struct {
	name, kind, uuid   string
	parameters         map[string]string
	expected, current  string
	copies             int
	nodes, disks       []string
	secret, secretIn   string
	engine             string
	step               step
	size, virtual      int64
	progress           int
	message            string
	done               bool // the file has come, or failed
	failures           int
	spread             int // of copies that are shown: those beyond the first come one by one
	coming             bool
	unknown            bool
	deleted            string
	deletedShown       int
	hidden             int // from so many listings
	data               []byte
	length             int64
	sum                string
	fetches            []Fetch
	initiated, failing bool
}

// Fetch is a request that a download made.
type Fetch struct {
	Method, URL string
	Status      int // 0: none came
}

type step int

const (
	unbegun  step = iota // without UUID and files
	waiting              // wanted on a disk
	starting             // the downloader's pod
	pending              // for an upload
	coming
	transfer // complete, and goes to the manager's pod
	between  // nobody reports it
	stuck    // the manager's pod did not take it
	ready
	failed
	cleaned // as failed, its file removed
)

const (
	notStarted = "File processing is not started"
	epoch      = "2026-01-01T00:00:00Z"
)

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]+$`)
	checksumPattern = regexp.MustCompile(`^[a-f0-9]{128}$`)
)

// files is the map of an image's copies. The caller holds the lock.
func (m *Manager) files(b *image) object {
	file := func(state string, progress int, message string) object {
		since, engine := epoch, b.engine
		if state == "" {
			since, engine = "", ""
		}
		o := object{"lastStateTransitionTime": since, "message": message, "progress": progress, "state": state}
		if m.since(V1_10) {
			o["dataEngine"] = engine
		}
		return o
	}
	switch b.step {
	case unbegun, between:
		return object{}
	case waiting, stuck:
		return object{disk(0): file("", 0, notStarted)}
	case starting:
		return object{disk(0): file("starting", 0, "")}
	case pending:
		return object{disk(0): file("pending", 0, "")}
	case coming:
		return object{disk(0): file("in-progress", b.progress, "")}
	case transfer:
		return object{disk(0): file("ready-for-transfer", 100, "")}
	}
	all := object{}
	for i := range max(1, b.spread) {
		switch {
		case b.step == failed:
			all[disk(i)] = file("failed", b.progress, b.message)
		case b.step == cleaned:
			all[disk(i)] = file("failed-and-cleanup", b.progress, b.message)
		case b.unknown:
			all[disk(i)] = file("unknown", 0, "")
		case b.coming && i == b.spread-1:
			all[disk(i)] = file("in-progress", 50, "")
		default:
			all[disk(i)] = file("ready", 100, "")
		}
	}
	return all
}

// show renders an image and takes it a step on. The caller holds the lock.
func (m *Manager) show(r *http.Request, b *image) object {
	link := func(action string) string {
		return m.self(r, "/backingimages/"+b.name+"?action="+action)
	}
	actions := object{"backingImageCleanup": link("backingImageCleanup"), "upload": link("upload")}
	parameters := b.parameters
	o := object{"actions": actions, "currentChecksum": b.current, "deletionTimestamp": b.deleted, "diskFileStatusMap": m.files(b),
		"expectedChecksum": b.expected, "id": b.name, "links": object{"self": m.self(r, "/backingimages/"+b.name)}, "name": b.name,
		"parameters": parameters, "size": b.size, "sourceType": b.kind, "type": "backingImage", "uuid": b.uuid}
	if m.since(V1_7) {
		actions["backupBackingImageCreate"], actions["updateMinNumberOfCopies"] = link("backupBackingImageCreate"), link("updateMinNumberOfCopies")
		o["minNumberOfCopies"], o["nodeSelector"], o["diskSelector"] = b.copies, b.nodes, b.disks
		o["secret"], o["secretNamespace"] = b.secret, b.secretIn
	}
	if m.since(V1_10) {
		o["dataEngine"] = b.engine
	}
	if m.since(V1_12_1) {
		o["virtualSize"] = b.virtual
	}
	m.advance(b)
	return o
}

func (m *Manager) advance(b *image) {
	switch b.step {
	case unbegun:
		b.step = waiting
		m.uuids++
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", b.name, m.uuids))
		b.uuid = hex.EncodeToString(sum[:4])
	case waiting:
		b.step = starting
	case starting:
		b.step = coming
		if b.kind == "upload" {
			b.step = pending
		}
	case pending:
		if b.done {
			b.step = coming
		}
	case coming:
		switch {
		case b.done && b.failing:
			b.step = failed
		case b.done:
			b.step, b.current = transfer, b.sum
		}
	case transfer:
		b.step = between
	case between:
		b.step = stuck
		if b.size%512 == 0 {
			b.step, b.virtual, b.spread = ready, b.size, 1
		}
	case ready:
		switch {
		case b.coming:
			b.coming = false
		case b.spread < min(b.copies, m.options.Disks):
			b.spread++
			b.coming = true
		}
	case failed:
		if m.since(V1_7) {
			b.step = cleaned
		}
	}
}

func (m *Manager) list(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var data []object
	for _, b := range m.images {
		if b.hidden > 0 {
			b.hidden--
			continue
		}
		if m.there(b) {
			data = append(data, m.show(r, b))
		}
	}
	m.sendList(w, r, "backingImage", "/backingimages", data)
}

// there lets an image that is being deleted go when it has been shown twice so.
func (m *Manager) there(b *image) bool {
	if b.deleted == "" {
		return true
	}
	if b.deletedShown++; b.deletedShown <= 2 {
		return true
	}
	delete(m.images, b.name)
	return false
}

func (m *Manager) get(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[name]
	if b == nil || !m.there(b) {
		m.sendError(w, r, http.StatusNotFound, fmt.Sprintf("failed to get backing image %s: backingimages.longhorn.io \"%s\" not found", name, name))
		return
	}
	m.send(w, m.show(r, b))
}

func (m *Manager) create(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name, SourceType, ExpectedChecksum, DataEngine, Secret, SecretNamespace string
		Parameters                                                              map[string]string
		MinNumberOfCopies                                                       int
		NodeSelector, DiskSelector                                              []string
	}
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in); err != nil {
		m.sendError(w, r, http.StatusInternalServerError, err.Error())
		return
	}
	asked := in.Name
	b := &image{name: shortName(in.Name), kind: in.SourceType, parameters: map[string]string{}, expected: strings.TrimSpace(in.ExpectedChecksum),
		copies: max(1, in.MinNumberOfCopies), nodes: in.NodeSelector, disks: in.DiskSelector, engine: in.DataEngine,
		secret: in.Secret, secretIn: in.SecretNamespace}
	for k, v := range in.Parameters {
		b.parameters[k] = strings.TrimSpace(v)
	}
	if b.engine == "" || !m.since(V1_10) {
		b.engine = "v1"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rename != nil {
		b.name = m.rename(b.name)
	}
	refusal := m.refusal(b)
	failure := fmt.Sprintf("failed to create backing image %s from source type %s with parameters %v: ", asked, b.kind, b.parameters)
	switch {
	case refusal != "":
		m.sendError(w, r, http.StatusInternalServerError, failure+`admission webhook "validator.longhorn.io" denied the request: `+refusal)
		return
	case m.images[b.name] != nil:
		m.sendError(w, r, http.StatusInternalServerError, failure+fmt.Sprintf("backingimages.longhorn.io %q already exists", b.name))
		return
	}
	if m.lag > 0 {
		b.hidden = m.lag
	}
	m.images[b.name] = b
	if b.kind == "download" {
		m.fetch(b)
	}
	m.send(w, m.show(r, b))
}

// shortName is what the mutating webhook makes of a name (util.AutoCorrectName).
func shortName(name string) string {
	name = strings.ToLower(name)
	if len(name) <= 40 {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return name[:31] + "-" + hex.EncodeToString(sum[:4])
}

// refusal is what the validating webhook says against an image.
func (m *Manager) refusal(b *image) string {
	switch {
	case !namePattern.MatchString(b.name):
		return "invalid name " + b.name
	case b.expected != "" && !checksumPattern.MatchString(b.expected):
		return "invalid checksum " + b.expected
	case b.kind != "download" && b.kind != "upload":
		return "unknown source type " + b.kind
	case b.kind == "download" && b.parameters["url"] == "":
		return "invalid parameter map[] for source type download"
	case m.since(V1_12_1) && b.engine == "v2":
		return "the v2 data engine does not support backing images"
	}
	if b.kind != "download" || !m.since(V1_12_1) {
		return ""
	}
	u, err := url.Parse(b.parameters["url"])
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return fmt.Sprintf("invalid URL %s: only http and https are supported", b.parameters["url"])
	}
	addresses := []net.IP{net.ParseIP(u.Hostname())}
	if addresses[0] == nil {
		switch {
		case m.options.Resolve != nil:
			addresses = m.options.Resolve(u.Hostname())
		case u.Hostname() != "localhost":
			return ""
		default:
			addresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		}
	}
	for _, ip := range addresses {
		if !ip.IsLoopback() && !ip.IsUnspecified() {
			return ""
		}
	}
	return fmt.Sprintf("invalid URL %s: loopback addresses are not allowed", b.parameters["url"])
}

func (m *Manager) remove(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[name]
	if b == nil {
		m.sendError(w, r, http.StatusNotFound, fmt.Sprintf("failed to delete backing image: backingimages.longhorn.io %q not found", name))
		return
	}
	for _, used := range m.volumes {
		if used == name {
			m.sendError(w, r, http.StatusInternalServerError, fmt.Sprintf(
				`failed to delete backing image: admission webhook "validator.longhorn.io" denied the request: cannot delete backing image %s since there are replicas using it`, name))
			return
		}
	}
	if b.deleted == "" {
		b.deleted = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).String()
	}
	w.WriteHeader(http.StatusOK)
}

func (m *Manager) upload(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	b := m.images[name]
	free := b != nil && b.step == pending && !b.initiated
	if free {
		b.initiated = true
	}
	m.mu.Unlock()
	if !free {
		m.sendError(w, r, http.StatusInternalServerError, fmt.Sprintf(
			"failed to get the parameters: upload server for backing image %s has not been initiated", name))
		return
	}
	again := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		b.initiated = false
	}
	size, err := strconv.ParseInt(r.URL.Query().Get("size"), 10, 64)
	if err != nil || size%512 != 0 {
		again()
		http.Error(w, fmt.Sprintf("the uploaded file size %d should be a multiple of 512 bytes since Longhorn uses directIO by default", size), http.StatusInternalServerError)
		return
	}
	form, err := r.MultipartReader()
	if err != nil {
		again()
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	for {
		part, err := form.NextPart()
		if err != nil {
			again()
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if part.FormName() != "chunk" {
			continue
		}
		m.mu.Lock()
		b.size = size
		m.mu.Unlock()
		m.take(b, part, size)
		m.mu.Lock()
		message := b.message
		m.mu.Unlock()
		if message != "" {
			http.Error(w, message, http.StatusInternalServerError)
		}
		return
	}
}

func (m *Manager) download(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	b := m.images[name]
	var data []byte
	if b != nil && b.step == ready {
		data = b.data
	}
	m.mu.Unlock()
	if data == nil {
		m.sendError(w, r, http.StatusInternalServerError, fmt.Sprintf("failed to get disk for downloading backing image %s", name))
		return
	}
	first, _, _ := strings.Cut(name, "-")
	w.Header().Set("Content-Disposition", "attachment; filename="+first+".gz")
	w.Header().Set("Content-Type", "application/octet-stream")
	z := gzip.NewWriter(w)
	z.Write(data)
	z.Close()
}

func (m *Manager) cleanup(w http.ResponseWriter, r *http.Request, name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.images[name]; b != nil {
		m.send(w, m.show(r, b))
		return
	}
	m.sendError(w, r, http.StatusNotFound, fmt.Sprintf("backingimages.longhorn.io %q not found", name))
}

func (m *Manager) setCopies(w http.ResponseWriter, r *http.Request, name string) {
	var in struct{ MinNumberOfCopies int }
	err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&in)
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[name]
	if b == nil {
		panic(http.ErrAbortHandler) // Longhorn's handler dereferences nil
	}
	if err != nil || in.MinNumberOfCopies < 1 {
		m.sendError(w, r, http.StatusInternalServerError, fmt.Sprintf("invalid minimum number of copies %d", in.MinNumberOfCopies))
		return
	}
	b.copies = in.MinNumberOfCopies
	m.send(w, m.show(r, b))
}
