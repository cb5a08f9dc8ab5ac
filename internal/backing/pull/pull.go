// Package pull makes sources of a fill out of URLs. It finds out what is there, binds
// everything that it asks for later to that, and tells nobody what it asked with: no
// user information, query or header is in an error or a log.
package pull

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"mime"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"golang.org/x/net/http/httpguts"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/upstream"
)

const (
	userAgent    = "caddy-registry"
	maxRedirects = 10
	maxURL       = 8 << 10  // bytes
	maxHeaders   = 64       // of a request
	maxHeader    = 16 << 10 // bytes of all of them
	maxURLs      = 16
	maxAfter     = 10 * time.Minute
)

// Bounds of waiting, where a Request has none.
const (
	connectPatience = 10 * time.Second
	headerPatience  = 30 * time.Second
	stallPatience   = 30 * time.Second
)

var (
	// ErrChanged: what is there is not what was there when the pull began.
	ErrChanged = errors.New("the file has changed meanwhile; begin the pull again")
	// ErrNoSize: nobody says how large the file is.
	ErrNoSize = errors.New("the server does not say how large the file is; pull from one that sends Content-Length, or upload the file")
	// ErrWebPage: a login page, or a captive portal.
	ErrWebPage = errors.New("the server sent a web page; check the URL, and whether it needs credentials")
)

// Request is what to pull.
type Request struct {
	// URLs have the same file, and are asked in this order: http or https.
	URLs []string
	// Proven says that the digest of the file is known. Without that only the first
	// that answers is a source: parts of two files could make up a third.
	Proven bool

	// What follows is asked with. It goes to the host and port of its URL only, not to
	// where that redirects. Headers may not say what this package says itself.
	Headers        map[string]string
	User, Password string // Basic; user information in a URL does as well
	Token          string // Bearer

	// CA are PEM certificates to trust besides the system's.
	CA string
	// AllowPrivate permits addresses that are not public; see upstream.Guard.
	AllowPrivate bool
	// Proxy as http.Transport has it; nil: the environment's.
	Proxy func(*http.Request) (*url.URL, error)

	// Bounds of waiting; 0: 10 s, 30 s and 30 s.
	Connect time.Duration // to a connection, and again to the end of TLS's handshake
	Header  time.Duration // from the request to the answer's header
	Stall   time.Duration // between two bytes of a body
}

// Content is what there is.
type Content struct {
	// Name tells this content from any other, for fill.Want. It has the query of the
	// URL in it. Where the server has no validator, each Open gives another one: what
	// an earlier pull has fetched may be of another file.
	Name string
	Size int64 // in bytes
	// ETag and LastModified are of the first URL that answered; empty: it has none.
	ETag, LastModified string
	// File is what the file is called; empty: nobody says.
	File    string
	Sources []fill.Source
	// Refused are why the other URLs are no sources.
	Refused []error

	client *client
}

// Open finds out what a request's URLs have. The caller closes the content when nobody
// fetches from it any more.
func Open(ctx context.Context, r Request) (*Content, error) {
	c, err := newClient(r)
	if err != nil {
		return nil, err
	}
	if len(r.URLs) == 0 || len(r.URLs) > maxURLs {
		return nil, fmt.Errorf("a file is pulled from 1 to %d URLs, and these are %d", maxURLs, len(r.URLs))
	}
	content := &Content{client: c}
	for _, text := range r.URLs {
		s, err := c.source(text, r)
		if err == nil {
			err = s.probe(ctx)
		}
		if ctx.Err() != nil {
			content.Close()
			return nil, context.Cause(ctx)
		}
		switch {
		case err != nil:
		case len(content.Sources) == 0:
			content.Size, content.ETag, content.LastModified, content.File = s.is.size, s.is.etag, s.is.modified, s.is.file
			content.Name = s.identity()
			content.Sources = []fill.Source{s}
			continue
		case !r.Proven:
			err = fmt.Errorf("%s is not asked: without a checksum nobody knows that it has the same file", s.name)
		case s.is.size != content.Size:
			err = fmt.Errorf("%s has a file of %d bytes, and %s one of %d", s.name, s.is.size, content.Sources[0].(*source).name, content.Size)
		default:
			content.Sources = append(content.Sources, s)
			continue
		}
		content.Refused = append(content.Refused, err)
	}
	if len(content.Sources) == 0 {
		content.Close()
		return nil, errors.Join(content.Refused...)
	}
	return content, nil
}

// Close lets go of connections that are not in use.
func (c *Content) Close() { c.client.close() }

// A client asks with what one request has.
type client struct {
	guard *upstream.Guard
	proxy func(*http.Request) (*url.URL, error)
	// proxied goes to the proxy that the operator named; direct looks at each address
	// that it dials.
	proxied, direct *http.Transport
	stall           time.Duration
	closed          atomic.Bool // leaves no connection behind
}

func newClient(r Request) (*client, error) {
	c := &client{guard: upstream.NewGuard(r.AllowPrivate), proxy: r.Proxy, stall: cmp.Or(r.Stall, stallPatience)}
	if c.proxy == nil {
		c.proxy = http.ProxyFromEnvironment
	}
	config := &tls.Config{}
	if r.CA != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM([]byte(r.CA)) {
			return nil, errors.New("ca: no certificate in PEM found")
		}
		config.RootCAs = pool
	}
	connect := cmp.Or(r.Connect, connectPatience)
	// HTTP/1.1, since several ranges at once are to have several congestion windows.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	transport := func(dialer *net.Dialer, proxy func(*http.Request) (*url.URL, error)) *http.Transport {
		return &http.Transport{
			Protocols: protocols, Proxy: proxy, DialContext: dialer.DialContext, TLSClientConfig: config.Clone(),
			TLSHandshakeTimeout: connect, ResponseHeaderTimeout: cmp.Or(r.Header, headerPatience),
			MaxResponseHeaderBytes: 64 << 10, MaxIdleConnsPerHost: perHost, IdleConnTimeout: time.Minute,
			DisableCompression: true, ReadBufferSize: 64 << 10,
		}
	}
	c.proxied = transport(&net.Dialer{Timeout: connect}, c.proxy)
	c.direct = transport(&net.Dialer{Timeout: connect, Control: c.guard.Control}, nil)
	return c, nil
}

func (c *client) close() {
	c.closed.Store(true)
	c.proxied.CloseIdleConnections()
	c.direct.CloseIdleConnections()
}

// roundTrip sends a request once it is certain that it may go there.
func (c *client) roundTrip(req *http.Request) (*http.Response, error) {
	req.Close = c.closed.Load()
	proxy, err := c.proxy(req)
	if err != nil {
		return nil, errors.New("the proxy to use cannot be told; check the configuration") // its error has the proxy's address
	}
	if err := c.guard.Check(req.Context(), req.URL, proxy != nil); err != nil {
		return nil, err
	}
	if proxy != nil {
		return c.proxied.RoundTrip(req)
	}
	return c.direct.RoundTrip(req)
}

// source makes one of a URL.
func (c *client) source(text string, r Request) (*source, error) {
	if len(text) > maxURL {
		return nil, fmt.Errorf("a URL is longer than %d bytes", maxURL)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil: // which would repeat it
		return nil, errors.New("a URL cannot be understood")
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Opaque != "":
		return nil, fmt.Errorf("a URL to pull from begins with https://host or http://host, and not with %.20q", u.Scheme)
	}
	s := &source{client: c, secret: http.Header{}, host: hostPort(u)}
	bytes := 0
	for name, value := range r.Headers {
		if bytes += len(name) + len(value); len(r.Headers) > maxHeaders || bytes > maxHeader {
			return nil, fmt.Errorf("there are more than %d headers, or %d bytes of them", maxHeaders, maxHeader)
		}
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return nil, fmt.Errorf("%.50q is no header, or has no value that can be sent", name)
		}
		switch name := http.CanonicalHeaderKey(name); name {
		case "Host", "Range", "If-Range", "If-Match", "Accept-Encoding", "Content-Length", "Transfer-Encoding", "Connection", "Te", "Trailer", "Upgrade", "Expect":
			return nil, fmt.Errorf("the header %s cannot be set for a pull", name)
		default:
			s.secret.Set(name, value)
		}
	}
	basic := func(user, password string) {
		req := &http.Request{Header: s.secret}
		req.SetBasicAuth(user, password)
	}
	if u.User != nil {
		password, _ := u.User.Password()
		basic(u.User.Username(), password)
		u.User = nil
	}
	switch {
	case r.Token != "" && !httpguts.ValidHeaderFieldValue(r.Token):
		return nil, errors.New("the token has characters that cannot be sent")
	case r.Token != "":
		s.secret.Set("Authorization", "Bearer "+r.Token)
	case r.User != "" || r.Password != "":
		basic(r.User, r.Password)
	}
	u.Fragment, u.RawFragment = "", ""
	s.url = u
	s.name = shown(u)
	return s, nil
}

// shown is a URL as it may be told of.
func shown(u *url.URL) string { return u.Scheme + "://" + u.Host + u.EscapedPath() }

// hostPort is where a URL leads, with the port written out, in lower case.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "443"
		if u.Scheme == "http" {
			port = "80"
		}
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// identity is Content.Name.
func (s *source) identity() string {
	validator := cmp.Or(s.is.etag, s.is.modified)
	if validator == "" {
		validator = rand.Text()
	}
	return s.url.String() + "\n" + validator
}

// fileName is what an answer calls the file, or else the URL does.
func fileName(header http.Header, u *url.URL) string {
	_, parameters, _ := mime.ParseMediaType(header.Get("Content-Disposition"))
	for _, name := range []string{parameters["filename"], u.Path} {
		name = path.Base(strings.ReplaceAll(name, `\`, "/"))
		bad := func(r rune) bool { return !unicode.IsPrint(r) }
		if name != "." && name != ".." && name != "/" && len(name) <= 255 && !strings.ContainsFunc(name, bad) {
			return name
		}
	}
	return ""
}
