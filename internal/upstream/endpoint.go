package upstream

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/docker/distribution/registry/client/auth/challenge"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

const (
	userAgent      = "caddy-registry"
	maxRedirects   = 5
	maxErrorAnswer = 64 << 10
	blameMemory    = 10 * time.Minute
)

const (
	// DefaultConnections is used where Endpoint.Connections is 0.
	DefaultConnections = 4
	// MaxConnections bounds what a configuration may ask for.
	MaxConnections = 64
	// blobsAtOnce is how many blobs can have all their connections at a time.
	blobsAtOnce = 4
)

// Timeouts bound the waiting on an endpoint.
type Timeouts struct {
	Connect time.Duration // to a connection, and again to the end of TLS's handshake
	Header  time.Duration // from the request to the answer's header
	Stall   time.Duration // between two bytes of a body
}

// An Endpoint is one address where an upstream can be asked, as configured.
type Endpoint struct {
	// URL is http or https. Of its path, what stands behind a component "v2"
	// is put before repository names (Harbor: https://harbor.corp/v2/hub).
	// A path without one gets "/v2" appended (Artifactory:
	// https://art.corp/artifactory/api/docker/hub).
	URL *url.URL
	// Origin marks the registry itself: only it can say that something does
	// not exist.
	Origin bool
	// Pull and Resolve are what the endpoint may be asked for: content by
	// digest, and what a tag means.
	Pull, Resolve bool

	Credentials Credentials
	// Proxy chooses the egress proxy, as in http.Transport; nil: the
	// environment's. ProxyID tells two of them apart.
	Proxy   func(*http.Request) (*url.URL, error)
	ProxyID string
	// CA are PEM certificates to trust besides the system's.
	CA                 [][]byte
	InsecureSkipVerify bool
	AllowPrivate       bool
	TrustNetworks      []netip.Prefix
	Timeouts           Timeouts
	// Connections is how many streams one blob is meant to have at once; 0:
	// DefaultConnections. The endpoint delivers four times as many in all, of
	// which the background gets half.
	Connections int
	// MinSpeed is the least that a stream has to deliver while there is
	// another endpoint to turn to. One that does not fails with an Error of
	// kind Unavailable, worth a retry after a minute.
	MinSpeed Speed
}

// streams is how many the endpoint delivers at once.
func (e Endpoint) streams() int { return blobsAtOnce * cmp.Or(e.Connections, DefaultConnections) }

// id tells apart endpoints that must not share tokens, connections or health.
func (e Endpoint) id() string {
	h := sha256.New()
	json.NewEncoder(h).Encode([]any{
		e.URL.String(), e.Origin, e.Credentials, e.ProxyID, e.CA, e.InsecureSkipVerify,
		e.AllowPrivate, e.TrustNetworks, e.Timeouts, e.Connections, e.MinSpeed,
	})
	return hex.EncodeToString(h.Sum(nil))
}

// endpoint is an Endpoint at work. It outlives configurations: one that a new
// configuration still has keeps its connections, tokens and health.
type endpoint struct {
	name   string // for people: scheme, host and path
	origin bool
	base   *url.URL // ends in "/v2" or the repository prefix behind it
	prefix string   // what stands before repository names, "" or ending in "/"

	transports *transports
	tokens     *tokens
	health     *health
	budget     *budget
	account    string // the user of its credentials, or ""
	stall      time.Duration
	minSpeed   Speed
	places     *places
	targets    *targets
	blamed     *lru.Cache[digest.Digest, time.Time]
	configured bool // has credentials
	now        func() time.Time
}

func newEndpoint(cfg Endpoint, now func() time.Time) (*endpoint, error) {
	base := *cfg.URL
	base.User, base.RawQuery, base.Fragment = nil, "", ""
	base.Path = strings.TrimSuffix(base.Path, "/")
	prefix := ""
	if before, behind, ok := strings.Cut(base.Path+"/", "/v2/"); ok {
		base.Path, prefix = before+"/v2", behind
	} else {
		base.Path += "/v2"
	}
	base.RawPath = ""

	tlsConfig := &tls.Config{InsecureSkipVerify: cfg.InsecureSkipVerify}
	if len(cfg.CA) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, pem := range cfg.CA {
			if !pool.AppendCertsFromPEM(pem) {
				return nil, errors.New("ca: no certificate in PEM found")
			}
		}
		tlsConfig.RootCAs = pool
	}
	g := &guard{base: &base, allowPrivate: cfg.AllowPrivate, trustNetworks: cfg.TrustNetworks}
	proxy := cfg.Proxy
	if proxy == nil {
		proxy = http.ProxyFromEnvironment
	}
	// HTTP/1.1 throughout: HTTP/2 would put all blobs of an upstream into one
	// congestion window.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	transport := func(dialer *net.Dialer, proxy func(*http.Request) (*url.URL, error)) *http.Transport {
		return &http.Transport{
			Protocols:              protocols,
			Proxy:                  proxy,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        tlsConfig.Clone(),
			TLSHandshakeTimeout:    cfg.Timeouts.Connect,
			ResponseHeaderTimeout:  cfg.Timeouts.Header,
			MaxResponseHeaderBytes: 64 << 10,
			MaxIdleConnsPerHost:    cfg.streams(),
			IdleConnTimeout:        time.Minute,
			DisableCompression:     true,
			ReadBufferSize:         64 << 10,
		}
	}
	t := &transports{
		guard:   g,
		proxy:   proxy,
		direct:  transport(&net.Dialer{Timeout: cfg.Timeouts.Connect}, proxy),
		guarded: transport(&net.Dialer{Timeout: cfg.Timeouts.Connect, Control: g.control}, nil),
	}
	blamed, _ := lru.New[digest.Digest, time.Time](1024) // fails only for a size below 1
	return &endpoint{
		name:       strings.TrimSuffix(base.Scheme+"://"+base.Host+strings.TrimSuffix(base.Path, "/v2")+"/"+prefix, "/"),
		origin:     cfg.Origin,
		base:       &base,
		prefix:     prefix,
		transports: t,
		tokens:     newTokens(cfg.Credentials, t, now),
		health:     &health{now: now},
		budget:     &budget{now: now},
		account:    cfg.Credentials.User,
		stall:      cfg.Timeouts.Stall,
		minSpeed:   cfg.MinSpeed,
		places:     &places{limit: cfg.streams()},
		targets:    newTargets(now),
		blamed:     blamed,
		configured: cfg.Credentials != (Credentials{}),
		now:        now,
	}, nil
}

// A call is one request to an endpoint.
type call struct {
	method     string
	repository string // as the upstream names it
	what       string // below the repository: "manifests/latest"
	query      url.Values
	header     http.Header
	// follow says that redirects are followed. Presigned addresses refuse a
	// HEAD, so a HEAD of a blob looks at the redirect itself.
	follow bool
	// must says that the caller has nothing to fall back on: an open breaker
	// still lets one such request through.
	must bool
	// optional says that the caller has something to fall back on. The last
	// part of a budget is not spent on such a request, wherever it goes; must
	// is told only to the last endpoint.
	optional bool
}

// do sends a call, with token and redirects, and returns an answer that is of
// use: 200, 206, or a redirect that was not to be followed. Anything else is
// an *Error.
func (e *endpoint) do(ctx context.Context, c call) (*http.Response, error) {
	var trial bool
	var blocked *Error
	if c.optional {
		blocked = e.budget.withhold()
	}
	if blocked == nil {
		trial, blocked = e.health.admit(c.must)
	}
	if blocked != nil {
		blocked.Endpoint, blocked.Origin = e.name, e.origin
		return nil, blocked
	}
	resp, err := e.exchange(ctx, c)
	if err != nil {
		var known *Error
		if !errors.As(err, &known) {
			known = &Error{Kind: Unavailable, Err: cleanURL(err)}
			if errors.Is(err, ErrGuard) {
				known.Kind = Refused
			}
		} else {
			copied := *known // a token's error is shared by all who waited
			known = &copied
		}
		known.Endpoint, known.Origin = e.name, e.origin
		switch {
		case ctx.Err() != nil && !errors.Is(context.Cause(ctx), ErrSlow):
			e.health.neither(trial)
		case known.Kind == Unavailable:
			e.health.failure(trial, known.Err)
		default:
			e.health.success(trial)
		}
		return nil, known
	}
	if e.transports.guard.trusts(resp.Request.URL) { // a CDN has limits of its own
		e.budget.observe(resp.Header)
	}
	switch {
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent,
		isRedirect(resp.StatusCode):
		e.health.success(trial)
		return resp, nil
	}
	return nil, e.problem(resp, trial)
}

// problem reads an answer that is of no use.
func (e *endpoint) problem(resp *http.Response, trial bool) *Error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorAnswer))
	resp.Body.Close()
	err := &Error{Endpoint: e.name, Origin: e.origin, Status: resp.StatusCode, Reason: strings.TrimPrefix(theirWords(body), ": "), Err: rangeRefused(resp)}
	switch status := resp.StatusCode; {
	case status == http.StatusNotFound: // registry.k8s.io leaves it to its redirects
		err.Kind = NotFound
	case !e.transports.guard.trusts(resp.Request.URL):
		// A presigned address lives for minutes; the endpoint gives a new one.
		// And whatever else a CDN says, it is not the registry that says it.
		err.Kind, err.Reason = Unavailable, "so says "+resp.Request.URL.Host+", where it redirected to"+theirWords(body)
		err.After, _ = retryAfter(resp.Header, e.now())
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		err.Kind = Unauthorized
		if e.configured {
			err.Kind = Denied
		}
	case status == http.StatusTooManyRequests:
		err.Kind = RateLimited
		err.After = e.health.limit(resp.Header)
		if rate := e.budget.rateLimit(); rate.Limit > 0 {
			err.Reason = strings.TrimPrefix(fmt.Sprintf("%s; %d of %d requests are left in %v", err.Reason, rate.Remaining, rate.Limit, rate.Window), "; ")
		}
	case status >= 500, status == http.StatusRequestTimeout:
		err.Kind = Unavailable
		err.After, _ = retryAfter(resp.Header, e.now())
	default:
		err.Kind = Invalid
	}
	switch resp.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		e.health.failure(trial, fmt.Errorf("it answered %d", resp.StatusCode))
	default:
		// A 500 is often about one blob only, and no reason to leave the rest.
		e.health.success(trial)
	}
	return err
}

// ErrSlow is the cause of a context that ends because an endpoint has used up
// its time, rather than because nobody wants the answer any more. The endpoint
// is held accountable only for the former.
var ErrSlow = errors.New("no answer in time")

// exchange sends a call and answers a challenge, once.
func (e *endpoint) exchange(ctx context.Context, c call) (*http.Response, error) {
	path := ""
	if c.repository != "" {
		path = e.prefix + c.repository
	}
	authorization, err := e.tokens.authorization(ctx, path)
	if err != nil {
		return nil, err
	}
	resp, err := e.send(ctx, c, path, authorization)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	challenges := challenge.ResponseChallenges(resp)
	if len(challenges) == 0 {
		// Some say 401 to a real request without saying how; the ping tells.
		ping, err := e.send(ctx, call{method: http.MethodGet}, "", "")
		if err != nil {
			return resp, nil
		}
		challenges = challenge.ResponseChallenges(ping)
		drain(ping)
		if len(challenges) == 0 {
			return resp, nil
		}
	}
	drain(resp)
	fresh, err := e.tokens.answer(ctx, challenges, path, authorization)
	if err != nil {
		return nil, err
	}
	return e.send(ctx, c, path, fresh)
}

// send sends one request to the endpoint.
func (e *endpoint) send(ctx context.Context, c call, path, authorization string) (*http.Response, error) {
	target := *e.base
	target.Path += "/"
	if path != "" {
		target.Path += path + "/" + c.what
	}
	target.RawQuery = c.query.Encode()
	return e.request(ctx, c, &target, authorization)
}

// request sends one request to an address, and follows redirects if asked to.
func (e *endpoint) request(ctx context.Context, c call, at *url.URL, authorization string) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	for hop := 0; ; hop++ {
		req, err := http.NewRequestWithContext(ctx, c.method, at.String(), nil)
		if err != nil {
			cancel(nil)
			return nil, err
		}
		for key, values := range c.header {
			req.Header[key] = values
		}
		req.Header.Set("User-Agent", userAgent)
		// Credentials are for this host and port alone.
		if authorization != "" && hostPort(at) == hostPort(e.base) && at.Scheme == e.base.Scheme {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := e.transports.roundTrip(req)
		if err != nil {
			cancel(nil)
			return nil, err
		}
		resp.Body = &body{ReadCloser: resp.Body, stall: e.stall, cancel: cancel, now: e.now}
		if !c.follow || !isRedirect(resp.StatusCode) {
			return resp, nil
		}
		location, err := at.Parse(resp.Header.Get("Location"))
		// To its end, so that the connection can be used again.
		io.CopyN(io.Discard, resp.Body, 16<<10)
		resp.Body.(*body).ReadCloser.Close()
		if err == nil && hop == maxRedirects {
			err = fmt.Errorf("%w: more than %d redirects", ErrGuard, maxRedirects)
		}
		if err != nil {
			cancel(nil)
			return nil, fmt.Errorf("redirect: %w", err)
		}
		at = location
	}
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// body is an answer's body with a watchdog: a read that brings nothing for the
// stall timeout ends the request, and so does one that makes the stream too
// slow.
type body struct {
	io.ReadCloser
	stall  time.Duration
	pace   *pace // nil: any is good
	now    func() time.Time
	cancel context.CancelCauseFunc
	once   sync.Once
	timer  *time.Timer
}

var errStalled = errors.New("no byte for the stall timeout")

func (b *body) Read(p []byte) (int, error) {
	wait := b.stall
	if b.pace != nil {
		wait = min(wait, b.pace.left())
	}
	if b.timer == nil {
		b.timer = time.AfterFunc(wait, func() { b.cancel(errStalled) })
	} else {
		b.timer.Reset(wait)
	}
	start := b.now()
	n, err := b.ReadCloser.Read(p)
	expired := !b.timer.Stop()
	var slow error
	if b.pace != nil && !errors.Is(err, io.EOF) {
		if slow = b.pace.add(n, b.now().Sub(start)); slow == nil && expired && wait < b.stall {
			slow = b.pace.verdict()
		}
	}
	switch {
	case slow != nil && (err == nil || expired):
		return n, slow
	case expired && err != nil && !errors.Is(err, io.EOF):
		return n, fmt.Errorf("%w of %v", errStalled, b.stall)
	}
	return n, err
}

func (b *body) Close() error {
	err := b.ReadCloser.Close()
	b.once.Do(func() { b.cancel(nil) })
	return err
}

// drain reads the little that is left of an answer, so that its connection can
// be used again, and closes it.
func drain(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 16<<10)
	resp.Body.Close()
}

// theirWords quotes what a registry says in an error body: its first code and
// message, or the beginning of a short text.
func theirWords(body []byte) string {
	var reply struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Details string `json:"details"`
	}
	var said string
	if json.Unmarshal(body, &reply) == nil && len(reply.Errors) > 0 {
		said = strings.TrimSpace(reply.Errors[0].Code + " " + reply.Errors[0].Message)
	} else if reply.Details != "" {
		said = reply.Details
	} else if len(body) < 200 && !strings.ContainsAny(string(body), "<>{}") {
		said = strings.TrimSpace(string(body))
	}
	if said == "" {
		return ""
	}
	said = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, said)
	if len(said) > 200 {
		said = strings.ToValidUTF8(said[:200], "") + "…"
	}
	return ": it says " + said
}

// cleanURL drops the address from a transport's error: a redirect's query is a
// secret.
func cleanURL(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}
