package backing

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/longhorn"
	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// Cluster is a Longhorn to register with.
type Cluster struct {
	Name  string
	URL   string // of its manager; a path and a trailing /v1 are permitted
	Token string // for a proxy in front of it; empty: none
	Mode  Mode   // empty: Download with a PublicURL, else PushUpload
}

// Mode is how Longhorn gets the bytes.
type Mode string

const (
	Download   Mode = "download" // Longhorn fetches them from PublicURL, again if it loses them
	PushUpload Mode = "upload"   // they are sent to Longhorn, which cannot get them again
)

// RegistrationOptions are how a version is registered.
type RegistrationOptions struct {
	Cluster           string   `json:"cluster"`           // empty: the only one
	Mode              Mode     `json:"mode"`              // empty: the cluster's
	Name              string   `json:"name"`              // in Longhorn; empty: made of the image's and the digest
	MinNumberOfCopies int      `json:"minNumberOfCopies"` // 0: Longhorn's default
	NodeSelector      []string `json:"nodeSelector"`
	DiskSelector      []string `json:"diskSelector"`
	// Ensure has it made again where it is lost or has drifted.
	Ensure bool `json:"ensure"`
}

// Registration is a version in a cluster.
type Registration struct {
	Cluster           string            `json:"cluster"`
	Name              string            `json:"name"` // as Longhorn has it
	Mode              Mode              `json:"mode"`
	State             RegistrationState `json:"state"`
	Progress          int               `json:"progress"` // percent
	Message           string            `json:"message,omitempty"`
	URL               string            `json:"url,omitempty"` // that Longhorn was given
	Adopted           bool              `json:"adopted,omitempty"`
	Ensure            bool              `json:"ensure,omitempty"`
	MinNumberOfCopies int               `json:"minNumberOfCopies,omitempty"`
	Copies            map[string]string `json:"copies,omitempty"` // disk or node → state
	CreatedAt         time.Time         `json:"createdAt"`
	CheckedAt         time.Time         `json:"checkedAt,omitzero"`
}

// RegistrationState is where a registration stands.
type RegistrationState string

const (
	Pending     RegistrationState = "pending"
	Downloading RegistrationState = "downloading"
	InLonghorn  RegistrationState = "ready"
	Degraded    RegistrationState = "degraded"
	RegFailed   RegistrationState = "failed"
	Stuck       RegistrationState = "stuck"
	Drifted     RegistrationState = "drifted"
	Conflict    RegistrationState = "conflict"
	Missing     RegistrationState = "missing"
	Unknown     RegistrationState = "unknown" // Longhorn cannot be asked
	Removing    RegistrationState = "removing"
)

const (
	maxRegistration  = 64 << 10 // of a record
	maxRegistrations = 100_000
	maxSelectors     = 100
)

// registrar keeps the registrations of a library. Each is a record, written before
// Longhorn is asked for anything: a process that dies in between leaves one for which
// the next finds the image, and adopts it, or makes it.
type registrar struct {
	store   storage.Store
	log     *zap.Logger
	version func(ctx context.Context, name, reference string) (Version, error)
	open    func(ctx context.Context, v Version) (content.Content, error)
	// token makes a token by which everybody reads an image, or takes the one that is
	// given if it is not revoked; nil: nobody can. revoke ends one.
	token  func(ctx context.Context, image, cluster, old string) (string, error)
	revoke func(ctx context.Context, image, token string) error
	pace   pace

	ctx     context.Context
	cancel  context.CancelFunc
	working sync.WaitGroup

	uploads chan struct{} // holds one for each upload that is under way

	mu       sync.Mutex
	settings Settings
	loaded   bool
	clusters map[string]*cluster
	held     map[place]*registered
}

// place is what a registration is of.
type place struct{ image, version, cluster string }

// registered is a registration: its record, and what has been seen of it, which lasts
// as long as the process.
type registered struct {
	record   registration
	state    RegistrationState
	progress int
	message  string
	copies   map[string]string
	checked  time.Time
	stalled  time.Time // since when nothing follows though the file is complete
	refused  string    // why Longhorn does not make it; it is not asked again before somebody wants it
	attempts int       // of uploads that failed
	sending  bool
	sent     time.Time // when the last upload ended
	settled  bool      // nothing was being sent when Longhorn was last asked
}

// registration is the record.
type registration struct {
	Schema            int           `json:"schema"`
	Image             string        `json:"image"`
	Version           string        `json:"version"`
	Cluster           string        `json:"cluster"`
	Name              string        `json:"name"`
	Mode              Mode          `json:"mode"`
	SHA512            digest.Digest `json:"sha512"`
	URL               string        `json:"url,omitempty"`
	Token             string        `json:"token,omitempty"`
	MinNumberOfCopies int           `json:"minNumberOfCopies,omitempty"`
	NodeSelector      []string      `json:"nodeSelector,omitempty"`
	DiskSelector      []string      `json:"diskSelector,omitempty"`
	Ensure            bool          `json:"ensure,omitempty"`
	Adopted           bool          `json:"adopted,omitempty"`
	Made              bool          `json:"made,omitempty"`     // Longhorn has had it
	Removing          bool          `json:"removing,omitempty"` // somebody wants it gone
	CreatedAt         time.Time     `json:"createdAt"`
}

func newRegistrar(p Parts) *registrar {
	r := &registrar{store: p.Store, log: p.Log, pace: defaultPace, uploads: make(chan struct{}, maxSending), clusters: map[string]*cluster{}, held: map[place]*registered{}}
	if r.log == nil {
		r.log = zap.NewNop()
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// set replaces the settings. A cluster whose address or token has changed is asked
// anew; one that is not configured any more keeps its registrations, and nothing is
// deleted.
func (r *registrar) set(s Settings) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settings = s
	if s.Prefix == "" {
		s.Clusters = nil
	}
	var failed error
	next := map[string]*cluster{}
	for _, c := range s.Clusters {
		if old := r.clusters[c.Name]; old != nil && old.Cluster == c {
			next[c.Name] = old
			continue
		}
		client, err := longhorn.New(c.URL, c.Token)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("longhorn %s: %w", c.Name, err))
			continue
		}
		next[c.Name] = &cluster{Cluster: c, client: client, kick: make(chan struct{}, 1), registering: make(chan struct{}, 1)}
	}
	for name, old := range r.clusters {
		if next[name] != old {
			old.cancel()
		}
	}
	for name, c := range next {
		if r.clusters[name] != c {
			var ctx context.Context
			ctx, c.cancel = context.WithCancel(r.ctx)
			r.working.Go(func() { r.reconcile(ctx, c) })
		}
	}
	r.clusters = next
	return failed
}

// close ends what is under way in this process.
func (r *registrar) close() {
	r.mu.Lock()
	r.cancel()
	r.mu.Unlock()
	r.working.Wait()
}

// load reads the records, once, or whenever another process may write them.
func (r *registrar) load(ctx context.Context) error {
	distant := r.store.Distant()
	r.mu.Lock()
	again := !r.loaded || distant != nil && distant.Shared()
	r.mu.Unlock()
	if !again {
		return nil
	}
	r.mu.Lock()
	before := map[place]registration{}
	for p, held := range r.held {
		before[p] = held.record
	}
	r.mu.Unlock()
	found := map[place]registration{}
	for info, err := range r.store.List(ctx, layout.Images, true) {
		if err != nil {
			return fail(StoreAway, "the registrations cannot be read: %w", err)
		}
		if !layout.IsImageRegistration(info.Key) {
			continue
		}
		if len(found) == maxRegistrations {
			return fail(StoreAway, "there are more than %d registrations", maxRegistrations)
		}
		data, err := r.store.Get(ctx, info.Key, maxRegistration)
		if errors.Is(err, storage.ErrTooLarge) {
			r.log.Error("a record of a registration is too large to be one; it is left alone", zap.String("key", info.Key), zap.Error(err))
			continue
		}
		if err != nil {
			return fail(StoreAway, "the registration at %s cannot be read: %w", info.Key, err)
		}
		var record registration
		if err := json.Unmarshal(data, &record); err != nil || record.Schema != 1 ||
			layout.ImageRegistration(record.Image, record.Version, record.Cluster) != info.Key {
			r.log.Error("a record of a registration is not one, or is of a newer program; it is left alone", zap.String("key", info.Key), zap.Error(err))
			continue
		}
		found[place{record.Image, record.Version, record.Cluster}] = record
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// What has changed here meanwhile is newer than what was listed.
	for p, record := range found {
		was, known := before[p]
		switch held := r.held[p]; {
		case held == nil && !known:
			r.held[p] = &registered{record: record, state: Unknown, message: "Longhorn has not been asked yet"}
		case held != nil && known && reflect.DeepEqual(held.record, was):
			held.record = record
		}
	}
	for p, was := range before {
		_, listed := found[p]
		if held := r.held[p]; held != nil && !listed && reflect.DeepEqual(held.record, was) {
			delete(r.held, p)
		}
	}
	r.loaded = true
	return nil
}

// write puts a record, and then into memory. The caller holds the cluster's lock.
func (r *registrar) write(ctx context.Context, record registration) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	if len(data) > maxRegistration {
		return fail(Malformed, "the registration has %d bytes of names and selectors, and %d are the most", len(data), maxRegistration)
	}
	p := place{record.Image, record.Version, record.Cluster}
	if err := r.still(ctx, p); err != nil {
		return err
	}
	if err := r.store.Put(ctx, layout.ImageRegistration(p.image, p.version, p.cluster), data, storage.Durable); err != nil {
		return fail(StoreAway, "the registration cannot be written: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if held := r.held[p]; held != nil {
		held.record = record
	} else {
		r.held[p] = &registered{record: record, state: Pending}
	}
	return nil
}

// still fails if another process has removed a registration that is known here: it is
// not to come back by what this one writes, or has Longhorn make.
func (r *registrar) still(ctx context.Context, p place) error {
	r.mu.Lock()
	known := r.held[p] != nil
	r.mu.Unlock()
	if distant := r.store.Distant(); !known || distant == nil || !distant.Shared() {
		return nil
	}
	_, err := r.store.Get(ctx, layout.ImageRegistration(p.image, p.version, p.cluster), maxRegistration)
	if errors.Is(err, fs.ErrNotExist) {
		r.mu.Lock()
		delete(r.held, p)
		r.mu.Unlock()
		return fail(NotFound, "%s %s is not registered with %s any more: another process has removed it", p.image, p.version, p.cluster)
	}
	if err != nil {
		return fail(StoreAway, "the registration cannot be read: %w", err)
	}
	return nil
}

// forget removes a registration and its record.
func (r *registrar) forget(ctx context.Context, p place) error {
	if err := r.store.Delete(ctx, layout.ImageRegistration(p.image, p.version, p.cluster)); err != nil {
		return fail(StoreAway, "the registration cannot be deleted: %w", err)
	}
	r.mu.Lock()
	token := ""
	if held := r.held[p]; held != nil {
		token = held.record.Token
	}
	delete(r.held, p)
	r.mu.Unlock()
	if token == "" || r.revoke == nil || len(r.with(p.image, token)) > 0 {
		return nil
	}
	if err := r.revoke(ctx, p.image, token); err != nil {
		r.log.Warn("the token that Longhorn had for a backing image stays; revoke it", zap.String("image", p.image), zap.String("longhorn", p.cluster), zap.Error(err))
	}
	return nil
}

// with are the registrations of an image whose address has a token.
func (r *registrar) with(image, token string) []Blocker {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []Blocker
	for p, held := range r.held {
		if p.image == image && held.record.Token == token {
			found = append(found, Blocker{Kind: "registration", Name: held.record.Name, Cluster: p.cluster})
		}
	}
	slices.SortFunc(found, func(a, b Blocker) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Name, b.Name))
	})
	return found
}

// of are the registrations of a version, by their clusters.
func (r *registrar) of(image, version string) []Registration {
	r.mu.Lock()
	defer r.mu.Unlock()
	found := []Registration{}
	for p, held := range r.held {
		if p.image == image && p.version == version {
			found = append(found, r.tell(held))
		}
	}
	slices.SortFunc(found, func(a, b Registration) int { return cmp.Compare(a.Cluster, b.Cluster) })
	return found
}

// tell is a registration as it is told of. The token in its address is no secret to
// whoever may read the image. The caller holds the lock.
func (r *registrar) tell(held *registered) Registration {
	record := held.record
	told := Registration{Cluster: record.Cluster, Name: record.Name, Mode: record.Mode, State: held.state, Progress: held.progress,
		Message: held.message, URL: record.URL, Adopted: record.Adopted, Ensure: record.Ensure, MinNumberOfCopies: record.MinNumberOfCopies,
		Copies: held.copies, CreatedAt: record.CreatedAt, CheckedAt: held.checked}
	if r.clusters[record.Cluster] == nil {
		told.State, told.Message = Unknown, "this Longhorn is not configured any more"
	}
	return told
}

// find returns a configured cluster; an empty name is the only one's.
func (r *registrar) find(name string) (*cluster, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if name == "" && len(r.clusters) == 1 {
		for _, c := range r.clusters {
			return c, nil
		}
	}
	switch c := r.clusters[name]; {
	case c != nil:
		return c, nil
	case len(r.clusters) == 0:
		return nil, fail(Malformed, "no Longhorn is configured; write longhorn <name> <url> into backing_images")
	case name == "":
		return nil, fail(Malformed, "there are %d clusters; say which", len(r.clusters))
	}
	return nil, fail(NotFound, "there is no Longhorn %.100q in the configuration", name)
}

// Longhorn permits an underscore, too, and Kubernetes forbids it in a name.
var longhornName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,38}[a-z0-9]$`)

// longhornNameOf is the name of a version in every cluster: the same everywhere, since
// a backup is only restored where an image of its name has its checksum. Longhorn
// rewrites what is longer than 40 characters.
func longhornNameOf(image string, sha512 digest.Digest) string {
	slug := strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(image))
	return strings.Trim(slug[:min(31, len(slug))], "-") + "-" + sha512.Encoded()[:8]
}

// checkPublic judges whether Longhorn can be given addresses below one. Up to 1.5.3 it
// cuts them at "=", a later one splits them at commas, and since 1.12.1 it refuses
// what is loopback.
func checkPublic(u *url.URL) error {
	if u == nil {
		return fail(Malformed, "Longhorn has no address to fetch from: set public_url, or register with the mode upload")
	}
	host := u.Hostname()
	ip := net.ParseIP(host)
	switch {
	case u.Scheme != "http" && u.Scheme != "https" || host == "":
		return fail(Malformed, "public_url %s is not http or https", u.Redacted())
	case host == "localhost" || strings.HasSuffix(host, ".localhost") || ip != nil && (ip.IsLoopback() || ip.IsUnspecified()):
		return fail(Malformed, "public_url %s leads Longhorn to itself; it needs a name or an address of this machine", u.Redacted())
	case strings.ContainsAny(u.String(), "=,"):
		return fail(Malformed, "public_url %s contains = or a comma, at which Longhorn cuts it", u.Redacted())
	}
	return nil
}

// address is what Longhorn fetches a version from, for as long as it has it.
func address(public *url.URL, v Version, token string) string {
	name := path.Base(v.URLs.File)
	if v.URLs.File == "" {
		name = v.Name + "-" + v.Version + ".img"
	}
	u := strings.TrimRight(public.String(), "/") + "/v1/files/"
	if token != "" {
		u += "t/" + token + "/"
	}
	return u + v.Digests.SHA512.Encoded() + "/" + name
}

// Register registers a version with a cluster, and goes on with it behind the caller.
// For one that is registered it changes Ensure, and tries again what has failed.
func (l *Library) Register(ctx context.Context, name, reference string, o RegistrationOptions) (Registration, error) {
	v, err := l.Version(ctx, name, reference)
	if err != nil {
		return Registration{}, err
	}
	return l.registrar.register(ctx, v, o)
}

// registrations are those of a version.
func (l *Library) registrations(name, version string) []Registration {
	return l.registrar.of(name, version)
}

// forget lets go of the registrations of a version that is no more.
func (l *Library) forget(ctx context.Context, name, version string) error {
	for _, told := range l.registrar.of(name, version) {
		unlock, err := l.registrar.lock(ctx, told.Cluster)
		if err != nil {
			return err
		}
		err = l.registrar.forget(ctx, place{name, version, told.Cluster})
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *registrar) register(ctx context.Context, v Version, o RegistrationOptions) (Registration, error) {
	if err := r.load(ctx); err != nil {
		return Registration{}, err
	}
	c, err := r.find(o.Cluster)
	if err != nil {
		return Registration{}, err
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return Registration{}, err
	}
	defer unlock()
	p := place{v.Name, v.Version, c.Name}
	r.mu.Lock()
	known := r.held[p] != nil
	r.mu.Unlock()
	if !known {
		// It may have been deleted while this waited.
		if _, err := r.version(ctx, v.Name, v.Version); err != nil {
			return Registration{}, err
		}
	}
	record, err := r.plan(ctx, c, v, o)
	if err != nil {
		return Registration{}, err
	}
	if err := r.write(ctx, record); err != nil {
		if !known && record.Token != "" && r.revoke != nil && len(r.with(p.image, record.Token)) == 0 {
			err = errors.Join(err, r.revoke(context.WithoutCancel(ctx), p.image, record.Token))
		}
		return Registration{}, err
	}
	failpoint.Hit("backing.registering")
	c.wake()
	r.mu.Lock()
	defer r.mu.Unlock()
	held := r.held[p]
	if held == nil { // it is forgotten already
		return Registration{}, fail(NotFound, "%s %s is not registered with %s any more", v.Name, v.Version, c.Name)
	}
	held.refused, held.attempts = "", 0
	if held.state == Unknown || held.state == Conflict || held.state == RegFailed {
		held.state, held.message = Pending, ""
	}
	return r.tell(held), nil
}

// plan is the record of a registration, if it may be.
func (r *registrar) plan(ctx context.Context, c *cluster, v Version, o RegistrationOptions) (registration, error) {
	r.mu.Lock()
	s := r.settings
	old, reuse := r.held[place{v.Name, v.Version, c.Name}], ""
	for p, held := range r.held {
		if p.image == v.Name && p.cluster == c.Name {
			reuse = cmp.Or(reuse, held.record.Token)
		}
	}
	if old != nil {
		record := old.record
		r.mu.Unlock()
		if record.Removing {
			return registration{}, fail(Busy, "%s %s is being removed from Longhorn %s; try again when it is gone", v.Name, v.Version, c.Name)
		}
		if record.Made && record.Mode != cmp.Or(o.Mode, record.Mode) || o.Name != "" && o.Name != record.Name {
			return registration{}, fail(Exists, "%s %s is registered with %s as %s, by %s; unregister it first", v.Name, v.Version, c.Name, record.Name, record.Mode)
		}
		if o.MinNumberOfCopies != 0 && o.MinNumberOfCopies != record.MinNumberOfCopies || o.NodeSelector != nil && !slices.Equal(o.NodeSelector, record.NodeSelector) ||
			o.DiskSelector != nil && !slices.Equal(o.DiskSelector, record.DiskSelector) {
			return registration{}, fail(Exists, "%s %s is registered with %s with other copies or selectors; change those in Longhorn, or unregister it first", v.Name, v.Version, c.Name)
		}
		record.Ensure = o.Ensure
		return record, nil
	}
	r.mu.Unlock()

	if v.State != Ready || v.Digests.SHA512 == "" {
		return registration{}, fail(Busy, "%s %s is not ready to be registered: it is %s", v.Name, v.Version, v.State)
	}
	if v.Size%512 != 0 {
		return registration{}, fail(NotAligned, "Longhorn never finishes with a file whose size is no multiple of 512, as %s %s with %d bytes", v.Name, v.Version, v.Size)
	}
	if v.Probe != nil && !v.Probe.Longhorn.Compatible && s.Compat != Warn && s.Compat != Off {
		why := "for a reason unknown"
		if len(v.Probe.Longhorn.Problems) > 0 {
			why = v.Probe.Longhorn.Problems[0].Message
		}
		return registration{}, fail(Unsupported, "Longhorn cannot use %s %s: %s", v.Name, v.Version, why)
	}
	record := registration{Schema: 1, Image: v.Name, Version: v.Version, Cluster: c.Name, Mode: cmp.Or(o.Mode, c.Mode),
		Name: cmp.Or(o.Name, longhornNameOf(v.Name, v.Digests.SHA512)), SHA512: v.Digests.SHA512, Ensure: o.Ensure,
		MinNumberOfCopies: o.MinNumberOfCopies, NodeSelector: o.NodeSelector, DiskSelector: o.DiskSelector, CreatedAt: time.Now().UTC()}
	if record.Mode == "" {
		record.Mode = Download
		if s.PublicURL == nil {
			record.Mode = PushUpload
		}
	}
	switch {
	case record.Mode != Download && record.Mode != PushUpload:
		return registration{}, fail(Malformed, "a mode is download or upload, not %.50q", record.Mode)
	case !longhornName.MatchString(record.Name):
		return registration{}, fail(Malformed, "Longhorn would rewrite or refuse the name %.100q: it may have 2 to 40 of a-z, 0-9, dot and dash", record.Name)
	case o.MinNumberOfCopies < 0 || o.MinNumberOfCopies > 1000 || len(o.NodeSelector) > maxSelectors || len(o.DiskSelector) > maxSelectors:
		return registration{}, fail(Malformed, "minNumberOfCopies is from 0 to 1000, and there are up to %d selectors", maxSelectors)
	}
	r.mu.Lock()
	for p, held := range r.held {
		if p.cluster == c.Name && held.record.Name == record.Name {
			r.mu.Unlock()
			return registration{}, fail(Exists, "%s in Longhorn %s is %s %s already; give another name", record.Name, c.Name, p.image, p.version)
		}
	}
	full := len(r.held) >= maxRegistrations
	r.mu.Unlock()
	if full {
		return registration{}, fail(Busy, "there are %d registrations already", maxRegistrations)
	}
	if record.Mode == Download {
		if err := checkPublic(s.PublicURL); err != nil {
			return registration{}, err
		}
		if s.PublicURL.Scheme == "https" {
			r.log.Warn("Longhorn trusts public certificate authorities alone: a certificate of another has it fail", zap.String("public_url", s.PublicURL.Redacted()))
		}
		if s.Private {
			if r.token == nil {
				return registration{}, fail(Malformed, "not everybody may read %s, and there is no token for Longhorn; register with the mode upload", v.Name)
			}
			var err error
			if record.Token, err = r.token(ctx, v.Name, c.Name, reuse); err != nil {
				return registration{}, err
			}
		}
		record.URL = address(s.PublicURL, v, record.Token)
	}
	return record, nil
}
