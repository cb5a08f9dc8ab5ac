package mirror

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/caddy-registry/mirror/internal/oci"
)

// A Site is one place where clients ask: which registries it answers for, and
// how a request says which one it means.
type Site struct {
	upstreams *Upstreams
	allowed   map[string]bool // names; nil: all
	byDefault *Upstream       // nil: off
	ns        bool
	hosted    []Pattern
}

// SiteConfig configures a Site.
type SiteConfig struct {
	Upstreams *Upstreams
	// Allowed names the registries of this site; empty: all.
	Allowed []string
	// Default is the registry of a name that says none; "": none.
	Default string
	// IgnoreNS lets ?ns= pass unread.
	IgnoreNS bool
	// Hosted are the names of this site that no upstream has.
	Hosted []Pattern
	// ShadowDefault permits hosted names on a site that has a default
	// registry, and so may have the same names.
	ShadowDefault bool
}

// NewSite checks a site's configuration.
func NewSite(cfg SiteConfig) (*Site, error) {
	s := &Site{upstreams: cfg.Upstreams, ns: !cfg.IgnoreNS, hosted: cfg.Hosted}
	if len(cfg.Allowed) > 0 {
		s.allowed = map[string]bool{}
		for _, name := range cfg.Allowed {
			host := NormalizeHost(name)
			if cfg.Upstreams.byName[host] == nil {
				if up, err := cfg.Upstreams.Named(host); up == nil || err != nil {
					return nil, fmt.Errorf("upstreams: %s is not a configured registry", name)
				}
			}
			s.allowed[host] = true
		}
	}
	if cfg.Default != "" {
		host := NormalizeHost(cfg.Default)
		up, err := cfg.Upstreams.Named(host)
		if err != nil {
			return nil, fmt.Errorf("default: %w", err)
		}
		if up == nil {
			return nil, fmt.Errorf("default: %s is not a configured registry", cfg.Default)
		}
		if !s.permits(up) {
			return nil, fmt.Errorf("default: %s is not among this site's upstreams", cfg.Default)
		}
		s.byDefault = up
		if len(cfg.Hosted) > 0 && !cfg.ShadowDefault {
			return nil, fmt.Errorf("hosted %s: this site has the default registry %s, and hosted names would silently take the place of its names; write `default off`, or `shadow_default` if that is what you want", cfg.Hosted[0], up.Name)
		}
	}
	for _, pattern := range cfg.Hosted {
		if err := cfg.Upstreams.overlap(pattern); err != nil {
			return nil, fmt.Errorf("hosted %s: %w", pattern, err)
		}
	}
	return s, nil
}

// overlap reports a hosted pattern whose first component means a registry, or
// lies where a registry's images are stored. A pattern that begins with a
// wildcard overlaps nothing: registries' path names are looked at first.
func (u *Upstreams) overlap(pattern Pattern) error {
	first := pattern[0]
	if strings.HasPrefix(first, "*") {
		return nil
	}
	up, err := u.InPath(first)
	if err != nil {
		return err
	}
	if up != nil {
		return fmt.Errorf("%s is the path name of upstream %s", first, up.Name)
	}
	for _, up := range u.byName {
		prefix, _, _ := strings.Cut(up.Prefix, "/")
		if prefix != "" && prefix == first {
			return fmt.Errorf("upstream %s stores its images under %s", up.Name, up.Prefix)
		}
	}
	return nil
}

// permits reports whether the site answers for a registry.
func (s *Site) permits(up *Upstream) bool {
	if s.allowed == nil || s.allowed[up.Name] {
		return true
	}
	_, domain, _ := strings.Cut(up.Name, ".")
	return s.allowed["*."+domain]
}

// A Target is what a request is about.
type Target struct {
	Upstream *Upstream // nil: hosted here
	// Name is the repository as its registry calls it.
	Name string
	// Repository is its name in the store.
	Repository string
	// Namespace is the ns parameter that decided, for OCI-Namespace.
	Namespace string
}

// Errors of Resolve.
var (
	errUnknownUpstream = errors.New("unknown registry")
	errInvalidName     = errors.New("invalid repository name")
	errHostedName      = errors.New("a hosted name")
)

// Resolve finds out what a request is about, from the name in its path, its
// raw query and its own host. One rule decides, the first that applies:
//
//  1. ?ns=<host>, as containerd, BuildKit and Docker 29 send it: that
//     registry. An equal first component of the name is dropped. An ns that is
//     the request's own host says nothing.
//  2. a first component that is the path name of a registry.
//  3. a hosted pattern of the site.
//  4. the site's default registry.
//
// A hosted name never falls through to a registry, nor the reverse.
func (s *Site) Resolve(host, rawQuery, name string) (Target, error) {
	if !oci.ValidName(name) {
		return Target{}, fmt.Errorf("%w %.300q: want lower case letters, digits and separators, up to %d characters", errInvalidName, name, oci.MaxNameLength)
	}
	first, rest, nested := strings.Cut(name, "/")
	if ns := s.namespace(host, rawQuery); ns != "" {
		up, err := s.upstreams.Named(NormalizeHost(ns))
		if err != nil {
			return Target{}, err
		}
		if up == nil || !s.permits(up) {
			return Target{}, fmt.Errorf("%w %.300q in ?ns=: this mirror does not know it; add `upstream %s` to its configuration", errUnknownUpstream, ns, printable(ns))
		}
		if nested {
			if inPath, err := s.upstreams.InPath(first); err == nil && inPath == up {
				name = rest
			}
		}
		return s.mirrored(up, name, ns)
	}
	if nested {
		up, err := s.upstreams.InPath(first)
		if err != nil {
			return Target{}, err
		}
		if up != nil && s.permits(up) {
			return s.mirrored(up, rest, "")
		}
	}
	if s.hosts(name) {
		return Target{Name: name, Repository: name}, nil
	}
	if s.byDefault != nil {
		return s.mirrored(s.byDefault, name, "")
	}
	return Target{}, fmt.Errorf("%w: the name %s begins with no registry this mirror knows, is not hosted here, and this site has no default registry", errUnknownUpstream, name)
}

// namespace returns the ns parameter unless it says nothing.
func (s *Site) namespace(host, rawQuery string) string {
	if !s.ns || rawQuery == "" {
		return ""
	}
	ns := queryValue(rawQuery, "ns")
	if ns == "" || NormalizeHost(ns) == NormalizeHost(host) {
		return ""
	}
	return ns
}

func (s *Site) mirrored(up *Upstream, name, ns string) (Target, error) {
	if up.Name == "docker.io" && !strings.Contains(name, "/") {
		name = "library/" + name
	}
	t := Target{Upstream: up, Name: name, Repository: up.repository(name), Namespace: ns}
	if s.hosts(t.Repository) {
		return Target{}, fmt.Errorf("%w: %s of upstream %s would lie where this site hosts images of its own", errHostedName, name, up.Name)
	}
	return t, nil
}

func (s *Site) hosts(repository string) bool {
	return slices.ContainsFunc(s.hosted, func(p Pattern) bool { return p.Match(repository) })
}

// queryValue reads one parameter without building a map of all.
func queryValue(rawQuery, key string) string {
	for param := range strings.SplitSeq(rawQuery, "&") {
		if k, v, _ := strings.Cut(param, "="); k == key {
			value, err := url.QueryUnescape(v)
			if err != nil {
				return v
			}
			return value
		}
	}
	return ""
}

// printable keeps what a client sent from spoiling a terminal or a log.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f || r == '"' || r == '`' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), 100)]
}
