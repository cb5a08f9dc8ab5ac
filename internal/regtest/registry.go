// Package regtest is a registry for tests to be an upstream. It is unkind
// unless told otherwise, in the ways real registries are:
//
//   - it wants a bearer token, scoped to the repository, from a token server
//     on another port, and tokens end;
//   - it sends blobs by redirect to a CDN on a third port, which refuses a
//     request that carries credentials and an address without its signature;
//   - it answers 404 for a manifest whose type the Accept header does not name.
//
// It counts what it is asked and what it sends, and fails on demand.
package regtest

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
)

// Options make a registry kinder, or unkind in other ways.
type Options struct {
	NoToken     bool
	NoRedirect  bool
	IgnoreRange bool
	// Basic asks for Basic authentication instead of a token.
	Basic bool
	// User and Secret are known to the token server. They may read
	// repositories under "private/", which nobody else can.
	User, Secret string
	// Realm, if set, is named as token server instead of the registry's own.
	Realm string
	// TokenLife is how long tokens last. Default: 5 minutes.
	TokenLife time.Duration
	// NoReferrers answers 404 to the referrers API.
	NoReferrers bool
	// PageSize limits the pages of listings. Default: 100.
	PageSize int
	// NoPaging sends all tags at once, unsorted, whatever is asked for.
	NoPaging bool
	// NoDigestHeader leaves Docker-Content-Digest out.
	NoDigestHeader bool
	// Rate is how many bytes a second each connection gets of a blob's body;
	// 0: as many as it takes.
	Rate int64
	// Latency is how long the registry and the CDN take before each answer.
	Latency time.Duration
	// Target, if set, may change the address at the CDN that a redirect leads
	// to.
	Target func(*url.URL)
}

// A Request is one request as it arrived.
type Request struct {
	Server        string // registry, token or cdn
	Method, Path  string
	Query         url.Values
	Authorization string
	Range, Accept string
	Status        int
	Bytes         int64 // of body sent
	Conn          int   // numbers the connection it came over
}

// A Fault spoils answers.
type Fault struct {
	// Path is a part of the path of the requests it spoils, and Method, if
	// set, their method. Faults strike blobs at the CDN where there is one.
	Path, Method string
	// Status answers with that code and Body. Header is added to whatever is
	// answered.
	Status int
	Header http.Header
	Body   string
	// Cut breaks the connection after the given share of the body, Corrupt
	// turns over a bit there; both between 0 and 1.
	Cut, Corrupt float64
	// Hold sends half of the body and waits for the channel to be closed.
	// At, if it is above 0, is the number of bytes to send instead.
	Hold chan struct{}
	At   int64
	// Offset, if it is above 0, is the byte of the content at which Cut,
	// Corrupt or Hold strikes, whatever part of it was asked for. Answers
	// without that byte are spared.
	Offset int64
	// Rate is how many bytes a second are sent of the body, and Latency how
	// long it takes before the answer.
	Rate    int64
	Latency time.Duration
	// Ranged spares requests without a Range.
	Ranged bool
	// Count is how often it strikes; 0: always.
	Count int

	wait chan struct{}
}

// A Registry is a fake upstream.
type Registry struct {
	// URL is where the registry answers, Host its host and port.
	URL, Host string

	opts     Options
	registry *server
	token    *server
	cdn      *server

	mu       sync.Mutex
	blobs    map[string]map[digest.Digest]Content // by repository
	manifest map[string]map[digest.Digest]Content
	tags     map[string]map[string]digest.Digest
	tokens   map[string]granted
	faults   []*Fault
	log      []Request
	watch    watch
}

type granted struct {
	scopes  []string
	private bool
	until   time.Time
}

// New starts a registry that ends with the test.
func New(t testing.TB, opts Options) *Registry {
	if opts.TokenLife == 0 {
		opts.TokenLife = 5 * time.Minute
	}
	if opts.PageSize == 0 {
		opts.PageSize = 100
	}
	r := &Registry{
		opts:     opts,
		blobs:    map[string]map[digest.Digest]Content{},
		manifest: map[string]map[digest.Digest]Content{},
		tags:     map[string]map[string]digest.Digest{},
		tokens:   map[string]granted{},
	}
	r.watch.settled.L = &r.mu
	r.registry = r.serve(t, "registry", r.serveRegistry)
	r.token = r.serve(t, "token", r.serveToken)
	r.cdn = r.serve(t, "cdn", r.serveCDN)
	r.URL = r.registry.url()
	r.Host = strings.TrimPrefix(r.URL, "http://")
	t.Cleanup(r.Down)
	return r
}

// server is a listener that can be closed and opened again at one address.
type server struct {
	handler http.Handler
	addr    string
	http    *http.Server
}

func (r *Registry) serve(t testing.TB, name string, handle func(http.ResponseWriter, *http.Request)) *server {
	s := &server{addr: FreeAddress(t)} // it must be free again after Down
	s.handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		counted := &counter{ResponseWriter: w, status: 200}
		conn := req.Context().Value(connKey{}).(int)
		r.arrives(name, req, conn, counted)
		defer func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			counted.leave()
			r.log = append(r.log, Request{
				Server: name, Method: req.Method, Path: req.URL.Path, Query: req.URL.Query(),
				Authorization: req.Header.Get("Authorization"),
				Range:         req.Header.Get("Range"), Accept: req.Header.Get("Accept"),
				Status: counted.status, Bytes: counted.bytes, Conn: conn,
			})
		}()
		if name != "token" {
			rest(req, r.opts.Latency)
		}
		if fault := r.strike(name, req); fault != nil {
			if fault.wait != nil {
				select {
				case <-fault.wait:
				case <-req.Context().Done():
				}
			}
			rest(req, fault.Latency)
			if fault.Rate > 0 {
				counted.rate = fault.Rate
			}
			for key, values := range fault.Header {
				w.Header()[key] = values
			}
			if fault.Status != 0 {
				w.Header().Set("Content-Length", strconv.Itoa(len(fault.Body)))
				counted.WriteHeader(fault.Status)
				io.WriteString(counted, fault.Body)
				return
			}
			handle(&spoiler{counter: counted, fault: fault, ctx: req.Context().Done()}, req)
			return
		}
		handle(counted, req)
	})
	s.up()
	return s
}

func (s *server) up() {
	listener, err := net.Listen("tcp", s.addr)
	if err != nil {
		panic(err)
	}
	s.http = &http.Server{Handler: s.handler, ConnContext: numberConn}
	go s.http.Serve(listener)
}

func (s *server) url() string { return "http://" + s.addr }

// TokenURL and CDNURL are where the other two servers answer.
func (r *Registry) TokenURL() string { return r.token.url() }

// CDNURL is where blobs are sent from.
func (r *Registry) CDNURL() string { return r.cdn.url() }

// Down closes all connections and refuses new ones.
func (r *Registry) Down() {
	for _, s := range []*server{r.registry, r.token, r.cdn} {
		s.http.Close()
	}
}

// Up answers again, at the same addresses.
func (r *Registry) Up() {
	for _, s := range []*server{r.registry, r.token, r.cdn} {
		s.up()
	}
}

// Push stores an image with all it names, and points tags to it.
func (r *Registry) Push(repository string, image Image, tags ...string) {
	for _, child := range image.Children {
		r.Push(repository, child)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, blob := range image.Blobs {
		put(r.blobs, repository, blob.Digest, blob)
	}
	put(r.manifest, repository, image.Digest, image.Content)
	for _, tag := range tags {
		put(r.tags, repository, tag, image.Digest)
	}
}

func put[K comparable, V any](m map[string]map[K]V, repository string, key K, value V) {
	if m[repository] == nil {
		m[repository] = map[K]V{}
	}
	m[repository][key] = value
}

// DeleteTag takes a tag away.
func (r *Registry) DeleteTag(repository, tag string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tags[repository], tag)
}

// Fail adds a fault.
func (r *Registry) Fail(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, &f)
}

// FailSlowly lets requests for a path wait, before any answer, until the
// channel is closed. method is as in Fault.
func (r *Registry) FailSlowly(method, path string, until chan struct{}) {
	r.Fail(Fault{Method: method, Path: path, wait: until})
}

// Heal takes all faults away.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

func (r *Registry) strike(server string, req *http.Request) *Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	if server == "registry" && strings.Contains(req.URL.Path, "/blobs/") && !r.opts.NoRedirect && req.Method == http.MethodGet {
		return nil // at the CDN
	}
	for i, f := range r.faults {
		if !strings.Contains(req.URL.Path, f.Path) || f.Method != "" && f.Method != req.Method || f.Ranged && req.Header.Get("Range") == "" {
			continue
		}
		if from, to := r.asked(req); f.Offset > 0 && (f.Offset < from || f.Offset > to) {
			continue
		}
		if f.Count > 0 {
			if f.Count--; f.Count == 0 {
				r.faults = slices.Delete(r.faults, i, i+1)
			}
		}
		return f
	}
	return nil
}

// asked is the first and last byte that a request asks for.
func (r *Registry) asked(req *http.Request) (from, to int64) {
	header := req.Header.Get("Range")
	if r.opts.IgnoreRange || header == "" {
		return 0, math.MaxInt64
	}
	if _, err := fmt.Sscanf(header, "bytes=%d-%d", &from, &to); err != nil {
		to = math.MaxInt64 // open
	}
	return from, to
}

// Requests are those that fit a filter, in the order in which they ended.
func (r *Registry) Requests(fits func(Request) bool) []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settle()
	var found []Request
	for _, req := range r.log {
		if fits(req) {
			found = append(found, req)
		}
	}
	return found
}

// Forget empties the log, and lets all counting begin anew.
func (r *Registry) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settle()
	r.log = nil
	r.watch.conns, r.watch.most, r.watch.sent = nil, r.watch.busy, nil
}

// Sent is how many bytes of a blob have been sent.
func (r *Registry) Sent(d digest.Digest) (bytes int64) {
	for _, req := range r.Requests(func(req Request) bool {
		return req.Method == http.MethodGet && strings.HasSuffix(req.Path, d.String())
	}) {
		if req.Status == 200 || req.Status == 206 {
			bytes += req.Bytes
		}
	}
	return bytes
}

// Count is how many requests had the method and a path with the given part,
// at the registry itself. Those refused for want of a token do not count.
func (r *Registry) Count(method, part string) int {
	return len(r.Requests(func(req Request) bool {
		return req.Server == "registry" && req.Method == method && strings.Contains(req.Path, part) && req.Status != http.StatusUnauthorized
	}))
}

func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	user, secret, given := req.BasicAuth()
	known := given && user == r.opts.User && secret == r.opts.Secret
	if given && !known {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}
	value := "token-" + strconv.FormatUint(rand.Uint64(), 36)
	r.mu.Lock()
	r.tokens[value] = granted{req.URL.Query()["scope"], known, time.Now().Add(r.opts.TokenLife)}
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"token": value, "expires_in": r.opts.TokenLife.Seconds()})
}

// admitted checks a request's authorization, and answers a challenge where it
// lacks one.
func (r *Registry) admitted(w http.ResponseWriter, req *http.Request, repository string) bool {
	private := strings.HasPrefix(repository, "private/")
	if r.opts.NoToken && !private {
		return true
	}
	if r.opts.Basic {
		user, secret, _ := req.BasicAuth()
		if user == r.opts.User && secret == r.opts.Secret {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return false
	}
	value, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	r.mu.Lock()
	grant, ok := r.tokens[value]
	r.mu.Unlock()
	scope := "repository:" + repository + ":pull"
	if ok && time.Now().Before(grant.until) && (repository == "" || slices.Contains(grant.scopes, scope)) && (grant.private || !private) {
		return true
	}
	realm := r.opts.Realm
	if realm == "" {
		realm = r.token.url() + "/token"
	}
	challenge := fmt.Sprintf(`Bearer realm="%s",service="regtest, with a comma"`, realm)
	if repository != "" {
		challenge += fmt.Sprintf(`,scope="%s"`, scope)
	}
	w.Header().Add("WWW-Authenticate", challenge)
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED")
	return false
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"from the fake registry"}]}`, code)
}

func (r *Registry) serveRegistry(w http.ResponseWriter, req *http.Request) {
	route, ok := oci.ParsePath(req.URL.Path)
	if !ok || !r.admitted(w, req, route.Name) {
		if !ok {
			refuse(w, http.StatusNotFound, "UNSUPPORTED")
		}
		return
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED")
		return
	}
	r.mu.Lock()
	blobs, manifests, tags := r.blobs[route.Name], r.manifest[route.Name], r.tags[route.Name]
	r.mu.Unlock()
	switch route.Kind {
	case oci.KindPing:
		io.WriteString(w, "{}")
	case oci.KindManifest:
		r.mu.Lock()
		d, ok := tags[route.Ref]
		if !ok {
			d = digest.Digest(route.Ref)
		}
		found, ok := manifests[d]
		r.mu.Unlock()
		if !ok || !strings.Contains(strings.Join(req.Header.Values("Accept"), ","), found.MediaType) {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
			return
		}
		w.Header().Set("Content-Type", found.MediaType)
		w.Header().Set("Content-Length", strconv.Itoa(len(found.Data)))
		if !r.opts.NoDigestHeader {
			w.Header().Set("Docker-Content-Digest", d.String())
		}
		if req.Method == http.MethodGet {
			w.Write(found.Data)
		}
	case oci.KindBlob:
		r.mu.Lock()
		found, ok := blobs[digest.Digest(route.Ref)]
		r.mu.Unlock()
		switch {
		case !ok:
			refuse(w, http.StatusNotFound, "BLOB_UNKNOWN")
		case !r.opts.NoRedirect:
			target, _ := url.Parse(r.cdn.url() + req.URL.Path + "?sig=secret")
			if r.opts.Target != nil {
				r.opts.Target(target)
			}
			w.Header().Set("Location", target.String())
			w.WriteHeader(http.StatusTemporaryRedirect)
		default:
			r.sendBlob(w, req, found)
		}
	case oci.KindTags:
		if tags == nil {
			refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
			return
		}
		r.mu.Lock()
		var list []string
		for tag := range tags {
			if tag > req.URL.Query().Get("last") {
				list = append(list, tag)
			}
		}
		r.mu.Unlock()
		sort.Strings(list)
		if r.opts.NoPaging {
			r.mu.Lock()
			list = slices.Collect(maps.Keys(tags))
			r.mu.Unlock()
			json.NewEncoder(w).Encode(map[string]any{"name": route.Name, "tags": list})
			return
		}
		n, err := strconv.Atoi(req.URL.Query().Get("n"))
		if err != nil || n > r.opts.PageSize {
			n = r.opts.PageSize
		}
		if len(list) > n {
			list = list[:n]
			w.Header().Set("Link", fmt.Sprintf(`<%s?n=%d&last=%s>; rel="next"`, req.URL.Path, n, list[n-1]))
		}
		json.NewEncoder(w).Encode(map[string]any{"name": route.Name, "tags": list})
	case oci.KindReferrers:
		if r.opts.NoReferrers {
			refuse(w, http.StatusNotFound, "UNSUPPORTED")
			return
		}
		r.serveReferrers(w, req, digest.Digest(route.Ref), manifests)
	default:
		refuse(w, http.StatusNotFound, "UNSUPPORTED")
	}
}

func (r *Registry) serveReferrers(w http.ResponseWriter, req *http.Request, subject digest.Digest, manifests map[digest.Digest]Content) {
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{}}
	r.mu.Lock()
	for _, m := range manifests {
		parsed, err := oci.ParseManifest(m.Data)
		if err == nil && parsed.Subject != nil && parsed.Subject.Digest == subject {
			d := m.Descriptor()
			d.ArtifactType, d.Annotations = parsed.ArtifactType, parsed.Annotations
			index.Manifests = append(index.Manifests, d)
		}
	}
	r.mu.Unlock()
	sort.Slice(index.Manifests, func(i, j int) bool { return index.Manifests[i].Digest < index.Manifests[j].Digest })
	from, _ := strconv.Atoi(req.URL.Query().Get("from"))
	index.Manifests = index.Manifests[min(from, len(index.Manifests)):]
	if len(index.Manifests) > r.opts.PageSize {
		index.Manifests = index.Manifests[:r.opts.PageSize]
		w.Header().Set("Link", fmt.Sprintf(`<%s?from=%d>; rel="next"`, req.URL.Path, from+r.opts.PageSize))
	}
	w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(index)
}

func (r *Registry) serveCDN(w http.ResponseWriter, req *http.Request) {
	if req.Header.Get("Authorization") != "" {
		http.Error(w, "only one way to authenticate is allowed", http.StatusBadRequest)
		return
	}
	if req.URL.Query().Get("sig") != "secret" || req.Method != http.MethodGet {
		http.Error(w, "the signature does not match", http.StatusForbidden)
		return
	}
	route, _ := oci.ParsePath(req.URL.Path)
	r.mu.Lock()
	found, ok := r.blobs[route.Name][digest.Digest(route.Ref)]
	r.mu.Unlock()
	if !ok {
		http.Error(w, "no such key", http.StatusNotFound)
		return
	}
	r.sendBlob(w, req, found)
}

func (r *Registry) sendBlob(w http.ResponseWriter, req *http.Request, blob Content) {
	w.Header().Set("Content-Type", "application/octet-stream")
	if c := counterOf(w); c.rate == 0 {
		c.rate = r.opts.Rate
	}
	if r.opts.IgnoreRange {
		req.Header.Del("Range")
	}
	http.ServeContent(w, req, "", time.Time{}, strings.NewReader(string(blob.Data)))
}

// spoiler carries out a fault on a body.
type spoiler struct {
	*counter
	fault *Fault
	ctx   <-chan struct{}
	sent  int64
}

func (s *spoiler) Write(p []byte) (int, error) {
	length, _ := strconv.ParseInt(s.Header().Get("Content-Length"), 10, 64)
	at := int64(float64(length) * (s.fault.Cut + s.fault.Corrupt))
	if s.fault.Hold != nil {
		if at = s.fault.At; at == 0 {
			at = length / 2
		}
	}
	if s.fault.Offset > 0 {
		at = s.fault.Offset
		if from, _, ok := strings.Cut(strings.TrimPrefix(s.Header().Get("Content-Range"), "bytes "), "-"); ok {
			first, _ := strconv.ParseInt(from, 10, 64)
			at -= first
		}
	}
	if s.sent <= at && at < s.sent+int64(len(p)) {
		switch {
		case s.fault.Hold != nil:
			n, err := s.counter.Write(p[:at-s.sent])
			s.sent += int64(n)
			if err != nil {
				return n, err
			}
			s.ResponseWriter.(http.Flusher).Flush()
			select {
			case <-s.fault.Hold:
			case <-s.ctx:
			}
			s.fault = &Fault{} // no more
			rest, err := s.Write(p[n:])
			return n + rest, err
		case s.fault.Cut > 0:
			s.counter.Write(p[:at-s.sent])
			s.ResponseWriter.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case s.fault.Corrupt > 0:
			p = slices.Clone(p)
			p[at-s.sent] ^= 1
		}
	}
	n, err := s.counter.Write(p)
	s.sent += int64(n)
	return n, err
}
