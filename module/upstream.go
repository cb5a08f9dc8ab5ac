package module

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/retain"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// Upstream is a registry that is mirrored.
type Upstream struct {
	// The registry's host, with a port unless that is 443, as clients name it:
	// `docker.io`, `registry.corp:5000`. `*.example.com` stands for every host
	// of one more label.
	Name string `json:"name"`

	// The first component of a path that means this registry:
	// `/v2/<path_name>/…`. Default: the host, with `__` for a colon.
	PathName string `json:"path_name,omitempty"`

	// What stands before the names of this registry's repositories in the
	// store. The empty string stores them as registry:2 does in proxy mode.
	// Default: path_name.
	RepositoryPrefix *string `json:"repository_prefix,omitempty"`

	// Addresses to ask before the origin, in this order.
	Endpoints []*Endpoint `json:"endpoints,omitempty"`

	// The address of the registry itself, asked last, or `off`. Only the
	// origin's word counts for what does not exist. Default: `https://` and
	// the host.
	Origin string `json:"origin,omitempty"`

	// Who to be at the origin. Default: nobody.
	Credentials *Credentials `json:"credentials,omitempty"`

	// The egress proxy. Default: what HTTPS_PROXY, HTTP_PROXY and NO_PROXY in
	// the environment say.
	NetworkProxyRaw json.RawMessage `json:"network_proxy,omitempty" caddy:"namespace=caddy.network_proxy inline_key=from"`

	// Files of PEM certificates to trust besides the system's.
	CA []string `json:"ca,omitempty"`

	// Trust any certificate. Only for a laboratory.
	InsecureSkipVerify bool `json:"tls_insecure_skip_verify,omitempty"`

	// Let redirects and token realms lead to private addresses, and to http
	// where the endpoint itself is http.
	AllowPrivate bool `json:"allow_private,omitempty"`

	// How long a tag counts as fresh after it was checked; 0 checks at every
	// request. Default: 1m.
	TagTTL *caddy.Duration `json:"tag_ttl,omitempty"`

	// What becomes of a tag that is held when the origin says that it is gone.
	// Default: `{"policy": "follow"}`.
	OnMissing *OnMissing `json:"on_missing,omitempty"`

	// How long to wait on the network.
	Timeouts *Timeouts `json:"timeouts,omitempty"`

	// How many connections a blob is fetched over at once, 1 to 64. Of each
	// address, all blobs together get four times as many. Default: 4.
	Connections int `json:"connections,omitempty"`

	// The least that a connection has to deliver of a blob while there is
	// another address to fetch it from; the last one may be as slow as it
	// likes. Default: `64KiB` over 30s.
	MinSpeed *MinSpeed `json:"min_speed,omitempty"`

	// How much this registry's repositories may take: a number of bytes
	// (`100GiB`), or `off`. What they share with others counts in full. When it
	// is nearly that much, what has not been pulled for longest is evicted.
	// Default: off.
	MaxSize string `json:"max_size,omitempty"`

	// How long an image is kept that nobody pulls. Default: for ever.
	TTL caddy.Duration `json:"ttl,omitempty"`

	host   string // normalised
	origin Endpoint
	limit  retain.Limit
}

// Endpoint is one more address where a registry's content can be had: a
// company's proxy, a national mirror.
type Endpoint struct {
	// http or https. A path is put before `/v2/`; of a path that has a
	// component `v2`, what follows it is put before repository names.
	// Harbor: `https://harbor.corp/v2/hub-proxy`. Artifactory:
	// `https://art.corp/artifactory/api/docker/hub`.
	URL string `json:"url"`

	// What it may be asked: `pull` for content by digest, `resolve` for the
	// meaning of tags. Default: both.
	Capabilities []string `json:"capabilities,omitempty"`

	// Who to be at this endpoint. Default: nobody; the origin's credentials
	// are not sent here.
	Credentials *Credentials `json:"credentials,omitempty"`

	// The egress proxy. Default: that of the registry.
	NetworkProxyRaw json.RawMessage `json:"network_proxy,omitempty" caddy:"namespace=caddy.network_proxy inline_key=from"`

	// Files of PEM certificates to trust. Default: those of the registry.
	CA []string `json:"ca,omitempty"`

	config upstream.Endpoint
}

// Credentials are a user and a secret. Both may be placeholders, `{env.NAME}`
// or `{file./path}`; one that is not set fails the load.
type Credentials struct {
	User   string `json:"user"`
	Secret string `json:"secret"`
}

// Timeouts bound the waiting on an upstream.
type Timeouts struct {
	// Until a connection stands. Default: 10s.
	Connect caddy.Duration `json:"connect,omitempty"`
	// From a request to the header of its answer. Default: 20s.
	Header caddy.Duration `json:"header,omitempty"`
	// Between two bytes of an answer. Default: 30s.
	Stall caddy.Duration `json:"stall,omitempty"`
}

// OnMissing is what becomes of a tag that has gone.
type OnMissing struct {
	// `follow`: it is gone here, too. `keep`: what it meant last is served on,
	// with a warning, and the origin is still asked whether it is back.
	Policy string `json:"policy"`

	// How long it is kept. Default: for ever.
	For caddy.Duration `json:"for,omitempty"`
}

// Check reports what is wrong. A nil policy is right.
func (o *OnMissing) Check() error {
	switch {
	case o == nil:
	case o.Policy != "follow" && o.Policy != "keep":
		return fmt.Errorf("on_missing: %q is neither follow nor keep", o.Policy)
	case o.Policy == "follow" && o.For != 0:
		return errors.New("on_missing: follow has no time; keep has")
	case o.For < 0:
		return errors.New("on_missing: the time cannot be negative")
	}
	return nil
}

// MinSpeed is an average that a connection must not fall below.
type MinSpeed struct {
	// Bytes a second: `64KiB`, `1MB`; or `off`, and then none is too slow.
	Rate string `json:"rate"`
	// The time that the average is taken over; none that a reader here lets
	// pass counts. Default: 30s.
	Over caddy.Duration `json:"over,omitempty"`
}

// Check reports what is no speed.
func (m *MinSpeed) Check() error {
	_, err := m.speed()
	return err
}

// defaultMinSpeed keeps clear of lines that are slow by nature.
var defaultMinSpeed = upstream.Speed{Bytes: 64 << 10, Over: 30 * time.Second}

// speed is what is meant; nothing written means the default.
func (m *MinSpeed) speed() (upstream.Speed, error) {
	switch {
	case m == nil:
		return defaultMinSpeed, nil
	case m.Over < 0:
		return upstream.Speed{}, errors.New("min_speed: the time cannot be negative")
	case m.Rate == "off":
		if m.Over != 0 {
			return upstream.Speed{}, errors.New("min_speed: off has no time")
		}
		return upstream.Speed{}, nil
	}
	bytes, err := humanize.ParseBytes(m.Rate)
	if err != nil || bytes == 0 || bytes > math.MaxInt64 {
		return upstream.Speed{}, fmt.Errorf("min_speed: %q is neither a number of bytes a second such as 64KiB nor off", m.Rate)
	}
	return upstream.Speed{Bytes: int64(bytes), Over: cmp.Or(time.Duration(m.Over), defaultMinSpeed.Over)}, nil
}

// Check reports what contradicts itself, or cannot be meant. What holds
// placeholders is looked at again once they are resolved.
func (u *Upstream) Check() error {
	switch wild := strings.HasPrefix(u.Name, "*."); {
	case wild && (u.PathName != "" || u.RepositoryPrefix != nil || u.Origin != "" || len(u.Endpoints) > 0):
		return errors.New("it stands for many hosts, so it can have no path_name, repository_prefix, origin or endpoint of its own")
	case u.Origin == "off" && len(u.Endpoints) == 0:
		return errors.New("with `origin off` it needs an endpoint")
	case u.Origin == "off" && u.Credentials != nil:
		return errors.New("credentials are for the origin, which is off; give them to the endpoint")
	case u.PathName != "" && !oci.ValidComponent(u.PathName):
		return fmt.Errorf("path_name: %q is no component of a repository name", u.PathName)
	case u.RepositoryPrefix != nil && *u.RepositoryPrefix != "" && !oci.ValidName(*u.RepositoryPrefix):
		return fmt.Errorf("repository_prefix: %q is no repository name", *u.RepositoryPrefix)
	case u.TagTTL != nil && *u.TagTTL < 0:
		return errors.New("tag_ttl: it cannot be negative")
	}
	limit, err := u.retention()
	switch {
	case err != nil:
		return err
	case limit != (retain.Limit{}) && strings.HasPrefix(u.Name, "*."):
		return errors.New("max_size and ttl are for one host; name those that it stands for")
	}
	if !strings.Contains(u.Name, "{") {
		if err := checkHost(mirror.NormalizeHost(u.Name)); err != nil {
			return err
		}
	}
	if u.Origin != "" && u.Origin != "off" {
		if _, err := parseURL(u.Origin); err != nil {
			return fmt.Errorf("origin: %w", err)
		}
	}
	if t := u.Timeouts; t != nil && (t.Connect < 0 || t.Header < 0 || t.Stall < 0) {
		return errors.New("timeouts: they cannot be negative")
	}
	if u.Connections < 0 || u.Connections > upstream.MaxConnections {
		return fmt.Errorf("connections: %d is not from 1 to %d", u.Connections, upstream.MaxConnections)
	}
	return cmp.Or(u.OnMissing.Check(), u.MinSpeed.Check())
}

// retention is what its repositories may take, and how long.
func (u *Upstream) retention() (retain.Limit, error) {
	size, err := parseSize("max_size", u.MaxSize, 0)
	if err != nil {
		return retain.Limit{}, err
	}
	if u.TTL < 0 {
		return retain.Limit{}, errors.New("ttl: it cannot be negative")
	}
	return retain.Limit{MaxSize: size, TTL: time.Duration(u.TTL)}, nil
}

// parseSize reads an option that is a number of bytes, or off.
func parseSize(option, s string, byDefault int64) (int64, error) {
	switch s {
	case "":
		return byDefault, nil
	case "off":
		return 0, nil
	}
	size, err := humanize.ParseBytes(s)
	if err != nil || size == 0 || size > math.MaxInt64 {
		return 0, fmt.Errorf("%s: %q is neither a size such as 64MiB nor off", option, s)
	}
	return int64(size), nil
}

// Check is like that of Upstream.
func (e *Endpoint) Check() error {
	if _, err := parseURL(e.URL); err != nil {
		return fmt.Errorf("url: %w", err)
	}
	for i, capability := range e.Capabilities {
		if capability != "pull" && capability != "resolve" {
			return fmt.Errorf("capabilities: %q is none; there are pull and resolve", capability)
		}
		if slices.Contains(e.Capabilities[:i], capability) {
			return fmt.Errorf("capabilities: %s is given twice", capability)
		}
	}
	return nil
}

// parseURL reads an address; one with placeholders is nil.
func parseURL(text string) (*url.URL, error) {
	if strings.Contains(text, "{") {
		return nil, nil
	}
	parsed, err := url.Parse(text)
	if err != nil || parsed.Host == "" || parsed.Scheme != "http" && parsed.Scheme != "https" {
		return nil, fmt.Errorf("%q is not an address such as https://registry.corp", text)
	}
	if parsed.User != nil || parsed.RawQuery != "" || parsed.Fragment != "" {
		return nil, errors.New("an address can have a path, and no user, query or fragment; give credentials by their own option")
	}
	return parsed, nil
}

// provision resolves and checks everything that does not depend on a host.
func (u *Upstream) provision(ctx caddy.Context, where string) error {
	if err := u.Check(); err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	name, err := resolve(u.Name)
	if err != nil {
		return fmt.Errorf("%s.name: %w", where, err)
	}
	u.host = mirror.NormalizeHost(name)
	if err := checkHost(u.host); err != nil {
		return fmt.Errorf("%s.name: %w", where, err)
	}
	if u.PathName == "" {
		u.PathName = mirror.DefaultPathName(u.host)
	}
	u.origin = Endpoint{URL: u.Origin, Credentials: u.Credentials, CA: u.CA}
	if u.Origin == "off" {
		u.origin.URL = ""
	}
	if err := u.origin.provision(where); err != nil {
		return err
	}
	proxy, err := loadProxy(ctx, u, u.NetworkProxyRaw, where)
	if err != nil {
		return err
	}
	timeouts := upstream.Timeouts{Connect: 10 * time.Second, Header: 20 * time.Second, Stall: 30 * time.Second}
	if t := u.Timeouts; t != nil {
		for _, o := range []struct {
			value caddy.Duration
			into  *time.Duration
		}{{t.Connect, &timeouts.Connect}, {t.Header, &timeouts.Header}, {t.Stall, &timeouts.Stall}} {
			if o.value > 0 {
				*o.into = time.Duration(o.value)
			}
		}
	}
	if u.limit, err = u.retention(); err != nil {
		return fmt.Errorf("%s.%w", where, err)
	}
	if u.limit != (retain.Limit{}) && strings.HasPrefix(u.host, "*.") {
		return fmt.Errorf("%s: max_size and ttl are for one host; name those that %s stands for", where, u.host)
	}
	u.Connections = cmp.Or(u.Connections, upstream.DefaultConnections)
	speed, err := u.MinSpeed.speed()
	if err != nil {
		return fmt.Errorf("%s.%w", where, err)
	}
	finish := func(e *Endpoint, p proxyChoice) {
		e.config.Proxy, e.config.ProxyID = p.choose, p.id
		e.config.InsecureSkipVerify, e.config.AllowPrivate, e.config.Timeouts = u.InsecureSkipVerify, u.AllowPrivate, timeouts
		e.config.Connections, e.config.MinSpeed = u.Connections, speed
	}
	finish(&u.origin, proxy)
	u.origin.config.Origin = true
	for i, e := range u.Endpoints {
		at := fmt.Sprintf("%s.endpoints[%d]", where, i)
		if err := e.Check(); err != nil {
			return fmt.Errorf("%s.%w", at, err)
		}
		if err := e.provision(at); err != nil {
			return err
		}
		own := proxy
		if e.NetworkProxyRaw != nil {
			if own, err = loadProxy(ctx, e, e.NetworkProxyRaw, at); err != nil {
				return err
			}
		}
		if len(e.CA) == 0 {
			e.config.CA = u.origin.config.CA
		}
		finish(e, own)
	}
	return nil
}

// checkHost reports what cannot be the host of a registry.
func checkHost(host string) error {
	name := strings.TrimPrefix(host, "*.")
	parsed, err := url.Parse("https://" + name)
	if err != nil || name == "" || parsed.Host != name || parsed.User != nil || strings.ContainsAny(name, "*/?#@ {}") {
		return fmt.Errorf("%q is not a host such as ghcr.io or registry.corp:5000", host)
	}
	return nil
}

func (e *Endpoint) provision(where string) error {
	if e.URL != "" {
		text, err := resolve(e.URL)
		if err == nil {
			e.config.URL, err = parseURL(text)
		}
		if err != nil {
			return fmt.Errorf("%s.url: %w", where, err)
		}
	}
	e.config.Pull = len(e.Capabilities) == 0 || slices.Contains(e.Capabilities, "pull")
	e.config.Resolve = len(e.Capabilities) == 0 || slices.Contains(e.Capabilities, "resolve")
	if c := e.Credentials; c != nil {
		var err error
		if e.config.Credentials.User, err = resolve(c.User); err != nil {
			return fmt.Errorf("%s.credentials.user: %w", where, err)
		}
		if e.config.Credentials.Secret, err = resolve(c.Secret); err != nil {
			return fmt.Errorf("%s.credentials.secret: %w", where, err)
		}
		if e.config.Credentials.User == "" || e.config.Credentials.Secret == "" {
			return fmt.Errorf("%s.credentials: both a user and a secret are needed", where)
		}
	}
	for i, file := range e.CA {
		path, err := resolve(file)
		if err != nil {
			return fmt.Errorf("%s.ca[%d]: %w", where, i, err)
		}
		pem, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s.ca[%d]: %w", where, i, err)
		}
		e.config.CA = append(e.config.CA, pem)
	}
	return nil
}

// resolve replaces placeholders; one that is unknown or empty is an error. The
// error does not contain the value.
func resolve(s string) (string, error) {
	resolved, err := caddy.NewReplacer().ReplaceOrErr(s, true, true)
	if err != nil {
		return "", errors.New(strings.TrimPrefix(err.Error(), "caddy: ") + " (is it set in Caddy's environment, and is the file there?)")
	}
	return strings.TrimSpace(resolved), nil
}

// proxyChoice is a configured egress proxy, or none.
type proxyChoice struct {
	choose func(*http.Request) (*url.URL, error)
	id     string
}

func loadProxy(ctx caddy.Context, owner any, raw json.RawMessage, where string) (proxyChoice, error) {
	if raw == nil {
		return proxyChoice{}, nil
	}
	id := string(raw) // LoadModule clears it
	loaded, err := ctx.LoadModule(owner, "NetworkProxyRaw")
	if err != nil {
		return proxyChoice{}, fmt.Errorf("%s.network_proxy: %w", where, err)
	}
	producer, ok := loaded.(caddy.ProxyFuncProducer)
	if !ok {
		return proxyChoice{}, fmt.Errorf("%s.network_proxy: %T is no network proxy", where, loaded)
	}
	choose := producer.ProxyFunc()
	if choose == nil { // the module "none"
		return proxyChoice{func(*http.Request) (*url.URL, error) { return nil, nil }, id}, nil
	}
	return proxyChoice{func(r *http.Request) (*url.URL, error) {
		// Placeholders in its address are resolved with what a request carries.
		return choose(r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer())))
	}, id}, nil
}

// open makes the registry that the policy works with.
func (u *Upstream) open(pool *upstream.Pool, trusted []netip.Prefix) (*mirror.Upstream, error) {
	up := &mirror.Upstream{Name: u.host, PathName: u.PathName, Prefix: u.PathName, TagTTL: time.Minute, Connections: u.Connections}
	if u.RepositoryPrefix != nil {
		up.Prefix = *u.RepositoryPrefix
	}
	if u.TagTTL != nil {
		up.TagTTL = time.Duration(*u.TagTTL)
	}
	if u.OnMissing != nil {
		up.Keep, up.KeepFor = u.OnMissing.Policy == "keep", time.Duration(u.OnMissing.For)
	}
	if strings.HasPrefix(u.host, "*.") {
		up.Open = func(host string) (*upstream.Upstream, error) {
			return pool.Open(host, u.endpoints(host, trusted))
		}
		return up, nil
	}
	var err error
	up.Client, err = pool.Open(u.host, u.endpoints(u.host, trusted))
	return up, err
}

// endpoints are where a host of this registry is asked.
func (u *Upstream) endpoints(host string, trusted []netip.Prefix) []upstream.Endpoint {
	var list []upstream.Endpoint
	for _, e := range u.Endpoints {
		list = append(list, e.config)
	}
	if u.Origin != "off" {
		origin := u.origin.config
		if origin.URL == nil {
			origin.URL = &url.URL{Scheme: "https", Host: mirror.OriginHost(host)}
		}
		list = append(list, origin)
	}
	for i := range list {
		list[i].TrustNetworks = trusted
	}
	return list
}

// warn tells of what is permitted and unwise.
func (u *Upstream) warn(log *zap.Logger) {
	for _, e := range u.endpoints(u.host, nil) {
		if e.Credentials != (upstream.Credentials{}) && e.URL.Scheme == "http" {
			log.Warn("credentials are sent over http, where everyone on the way can read them",
				zap.String("upstream", u.host), zap.String("endpoint", e.URL.String()))
		}
	}
	if u.InsecureSkipVerify {
		log.Warn("certificates of this upstream are not verified, so anyone on the way can change what tags mean", zap.String("upstream", u.host))
	}
}
