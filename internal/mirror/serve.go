package mirror

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/oci"
)

// cache says where an answer came from.
type cache string

const (
	hit         cache = "hit"         // held, and fresh or immutable
	revalidated cache = "revalidated" // held, and the upstream confirmed it
	stale       cache = "stale"       // held, and the upstream could not be asked
	miss        cache = "miss"        // the upstream was asked
	stored      cache = "stored"      // as miss, and its answer is kept
)

// status is the Cache-Status member (RFC 9211) for where an answer came from.
func (c cache) status() string {
	switch c {
	case hit:
		return "registry; hit"
	case revalidated:
		return "registry; fwd=stale; fwd-status=304"
	case stale:
		return `registry; hit; ttl=-1; detail="upstream failed"`
	case stored:
		return "registry; fwd=uri-miss; stored"
	default:
		return "registry; fwd=uri-miss"
	}
}

// A Report says what became of a request, for logs.
type Report struct {
	Upstream   string // empty for what is hosted here
	Repository string
	Reference  string
	Cache      string
	// Err is why the request failed, or nil.
	Err error
	// Location says that the answer's Location is a secret, and no log may have it.
	// It has been sent.
	Location bool
	// Abort says that the answer's header is out and its body cannot be
	// completed: the connection must be broken, so that the client sees it.
	Abort bool
}

// ServeHTTP answers a caller's request below /v2 from a mirror. See
// [oci.ParsePath].
func (s *Site) ServeHTTP(m *Mirror, w http.ResponseWriter, r *http.Request, route oci.Route, caller access.Caller) Report {
	header := w.Header()
	set(header, "Docker-Distribution-Api-Version", "registry/2.0")
	if r.ContentLength != 0 {
		r.Body = content.Incoming(r.Body)
	}
	x := &exchange{site: s, mirror: m, w: w, r: r, route: route, caller: caller, began: m.now()}
	if err := x.serve(); err != nil {
		x.report.Err = err
		if r.Context().Err() == nil {
			m.tell(x.target, x.about(), err, false)
			if judge(err).situation == storeAway {
				m.diskTrouble("asking the store", x.about(), err)
			}
			m.learnLack(x.target, route.Kind, route.Ref, x.began, err)
		}
		if x.listens() && !x.report.Abort {
			content.Hasten(w, r)
			refusal(err, route.Kind, r.UserAgent(), x.about()).Write(w, r)
		}
	}
	return x.report
}

// An exchange is one request and its answer.
type exchange struct {
	site   *Site
	mirror *Mirror
	w      http.ResponseWriter
	r      *http.Request
	route  oci.Route
	caller access.Caller
	target Target
	// opened says that a rule names the repository for the caller to read, who
	// need not ask whether everyone may.
	opened bool
	report Report
	began  time.Time
	id     string // by which events name the request, once there is one
}

// about names what was asked for, for error messages.
func (x *exchange) about() string {
	if x.target.Repository == "" {
		return ""
	}
	name := x.target.Name
	if x.target.Upstream != nil {
		name = x.target.Upstream.Name + "/" + name
	}
	switch ref := x.route.Ref; {
	case ref == "", x.route.Kind == oci.KindUpload:
		return name
	case strings.Contains(ref, ":"):
		return name + "@" + printable(ref)
	default:
		return name + ":" + printable(ref)
	}
}

// action is what a request asks to be allowed, or 0 if nothing at its path
// answers its method.
func (x *exchange) action() access.Action {
	kind := x.route.Kind
	switch method := x.r.Method; {
	case kind == oci.KindUpload:
		switch method {
		case http.MethodPost:
			if x.route.Ref == "" {
				return access.Push
			}
		case http.MethodGet, http.MethodHead, http.MethodPatch, http.MethodPut, http.MethodDelete:
			if x.route.Ref != "" {
				return access.Push
			}
		}
	case method == http.MethodGet, method == http.MethodHead:
		return access.Pull
	case method == http.MethodPut && kind == oci.KindManifest:
		return access.Push
	case method == http.MethodDelete && (kind == oci.KindManifest || kind == oci.KindBlob):
		return access.Delete
	}
	return 0
}

// allow are the methods that a kind of path answers, for what is hosted here.
func allow(route oci.Route) string {
	switch {
	case route.Kind == oci.KindUpload && route.Ref == "":
		return "POST"
	case route.Kind == oci.KindUpload:
		return "GET, HEAD, PATCH, PUT, DELETE"
	case route.Kind == oci.KindManifest:
		return "GET, HEAD, PUT, DELETE"
	case route.Kind == oci.KindBlob:
		return "GET, HEAD, DELETE"
	}
	return "GET, HEAD"
}

// listens reports whether the client may still read an answer. The context of a
// request ends when its body breaks off, and whoever has sent only half of one and
// hears nothing would take it for success.
func (x *exchange) listens() bool {
	return x.r.Context().Err() == nil || x.r.Method != http.MethodGet && x.r.Method != http.MethodHead
}

func (x *exchange) serve() error {
	head := x.r.Method == http.MethodHead
	if x.route.Kind == oci.KindObsolete {
		return fail(unknownEndpoint, "this registry speaks version 2 of the registry API; a client that asks for /v1/ is too old: use Docker 1.6 or a later one")
	}
	action := x.action()
	unanswered := func() error {
		x.w.Header().Set("Allow", allow(x.route))
		return fail(readOnly, "nothing at this path answers %s", printable(x.r.Method))
	}
	if action == 0 && x.route.Name == "" {
		return unanswered()
	}
	switch x.route.Kind {
	case oci.KindPing:
		return x.json([]byte("{}"))
	case oci.KindCatalog:
		return x.catalog()
	case oci.KindSearchPing:
		return x.searchPing()
	case oci.KindSearch:
		return x.search()
	case oci.KindUnknown:
		return fail(unknownEndpoint, "there is nothing at this path of the registry API")
	}
	var err error
	if x.target, err = x.site.Resolve(x.r.Host, x.r.URL.RawQuery, x.route.Name); err != nil {
		return err
	}
	x.report.Repository, x.report.Reference = x.target.Repository, x.route.Ref
	if up := x.target.Upstream; up != nil {
		x.report.Upstream = up.Name
	}
	if ns := x.target.Namespace; ns != "" {
		x.w.Header().Set("OCI-Namespace", ns)
	}
	if x.target.Upstream != nil && action != access.Pull {
		x.w.Header().Set("Allow", "GET, HEAD")
		return fail(readOnly, "what is mirrored answers GET and HEAD only; push to %s itself, or to a name that is hosted here", x.target.Upstream.Name)
	}
	if action == 0 {
		return unanswered()
	}
	var ref oci.Reference
	if x.route.Kind != oci.KindTags && x.route.Kind != oci.KindUpload {
		if ref, err = oci.ParseReference(x.route.Ref); err == nil && x.route.Kind != oci.KindManifest && ref.Digest == "" {
			err = fmt.Errorf("%q is not a digest", printable(x.route.Ref))
		}
		switch {
		case err == nil:
		case x.route.Kind != oci.KindManifest || strings.Contains(x.route.Ref, ":"):
			return fail(badReference, "%v", err)
		case action == access.Push:
			return fail(badTag, "%v", err)
		default:
			// There cannot be such a tag: a 404, says the conformance suite of 1.1.
			return fail(unknownContent, "%v", err)
		}
	}
	verdict := x.verdict(action)
	if !verdict.Allowed {
		return x.denied(action)
	}
	x.opened = verdict.Explicit
	if err := x.mirror.admit(x.r.Context(), x.target); err != nil {
		return err
	}
	switch {
	case x.route.Kind == oci.KindUpload:
		return x.upload()
	case action != access.Pull:
		return x.change(ref)
	}
	if done, err := x.warm(ref, head); done {
		return err
	}
	// What is sent may take as long as it takes; what is looked for may not.
	budget := manifestBudget + time.Second // beyond that of what is shared
	if x.route.Kind == oci.KindBlob {
		budget = x.mirror.patience
	}
	budget -= x.mirror.now().Sub(x.began)
	ctx, cancel := context.WithTimeoutCause(x.r.Context(), budget, errNoAnswer)
	defer cancel()
	if !x.opened {
		if err := x.mirror.public(ctx, x.target, x.route.Kind, ref); err != nil {
			return err
		}
	}
	switch x.route.Kind {
	case oci.KindManifest:
		return x.manifest(ctx, ref, head)
	case oci.KindBlob:
		return x.blob(ctx, ref.Digest, head)
	case oci.KindTags:
		return x.tags(ctx)
	default:
		return x.referrers(ctx, ref.Digest)
	}
}

// cached notes where the answer came from.
func (x *exchange) cached(c cache) {
	x.report.Cache = string(c)
	set(x.w.Header(), "Cache-Status", c.status())
}

// json sends a small document of our own making.
func (x *exchange) json(body []byte) error {
	header := x.w.Header()
	if header.Get("Content-Type") == "" {
		header.Set("Content-Type", "application/json")
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	if x.site.rules != nil {
		header.Set("Cache-Control", personal+"no-cache")
	}
	x.w.WriteHeader(http.StatusOK)
	if x.r.Method != http.MethodHead {
		x.w.Write(body)
	}
	return nil
}

func (x *exchange) blob(ctx context.Context, d digest.Digest, head bool) error {
	header := x.w.Header()
	etag := quoted(d)
	describe := func(c cache) {
		x.cached(c)
		x.blobHeaders(d)
	}
	unchanged := content.Matches(x.r.Header.Values("If-None-Match"), etag)
	if !unchanged {
		if done, err := x.redirect(ctx, d, head); done || err != nil {
			return err
		}
	}
	if head || unchanged {
		size, c, err := x.mirror.describeBlob(ctx, x.target, d)
		if err != nil {
			return err
		}
		describe(c)
		if !head {
			x.w.WriteHeader(http.StatusNotModified)
			return nil
		}
		header.Set("Content-Length", strconv.FormatInt(size, 10))
		x.w.WriteHeader(http.StatusOK)
		return nil
	}
	found, c, err := x.mirror.blob(ctx, x.target, d)
	if err != nil {
		return err
	}
	defer found.Close()
	answer, err := content.Choose(x.w, x.r, found, content.Validator{ETag: etag})
	if err != nil {
		return err
	}
	err = answer.Prepare(ctx)
	defer answer.End()
	if err != nil {
		return x.mirror.lost(x.target, d, err)
	}
	describe(c)
	x.pulled(d, "", found.Size(), "")
	if answer.Whole() {
		x.mirror.ahead(x.target, d)
	}
	x.report.Abort, err = answer.Send()
	return err
}
