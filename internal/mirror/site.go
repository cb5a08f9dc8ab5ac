package mirror

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
)

// A Site is one place where clients ask: which registries it answers for, and
// how a request says which one it means.
type Site struct {
	upstreams *Upstreams
	allowed   map[string]bool // names; nil: all
	byDefault *Upstream       // nil: off
	ns        bool
	hosted    []oci.Pattern
	rules     access.Rules
	redirect  *Redirect
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
	Hosted []oci.Pattern
	// ShadowDefault permits hosted names on a site that has a default
	// registry, and so may have the same names.
	ShadowDefault bool
	// Rules say who may do what.
	Rules access.Rules
	// Redirect sends clients to the bucket; nil: everything is served.
	Redirect *Redirect
}

// Check reports what contradicts itself, whatever registries there are.
func (cfg SiteConfig) Check() error {
	switch {
	case cfg.ShadowDefault && (len(cfg.Hosted) == 0 || cfg.Default == ""):
		return errors.New("shadow_default permits hosted names beside a default registry, and there are not both here")
	case len(cfg.Hosted) > 0 && cfg.Default != "" && !cfg.ShadowDefault:
		// dockerd sends no ns: what `docker pull apps/web` means must not
		// change silently.
		return fmt.Errorf("hosted %s: this site has the default registry %s, and hosted names would silently take the place of its names; write `default off`, or `shadow_default` if that is what you want", cfg.Hosted[0], cfg.Default)
	}
	return nil
}

// NewSite checks a site's configuration.
func NewSite(cfg SiteConfig) (*Site, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	s := &Site{upstreams: cfg.Upstreams, ns: !cfg.IgnoreNS, hosted: cfg.Hosted, rules: cfg.Rules, redirect: cfg.Redirect}
	if len(cfg.Allowed) > 0 {
		s.allowed = map[string]bool{}
		for _, name := range cfg.Allowed {
			host := NormalizeHost(name)
			if cfg.Upstreams.byName[host] == nil && cfg.Upstreams.named(host) == nil {
				return nil, fmt.Errorf("upstreams: %s is not a known registry; add `upstream %s` to the registry option", name, name)
			}
			s.allowed[host] = true
		}
	}
	if cfg.Default != "" {
		host := NormalizeHost(cfg.Default)
		entry := cfg.Upstreams.named(host)
		if entry == nil {
			return nil, fmt.Errorf("default: %s is not a known registry; add `upstream %s` to the registry option", cfg.Default, cfg.Default)
		}
		if !s.permits(entry, host) {
			return nil, fmt.Errorf("default: %s is not among this site's upstreams; write `default` with one of them, or `default off`", cfg.Default)
		}
		var err error
		if s.byDefault, err = cfg.Upstreams.concrete(entry, host); err != nil {
			return nil, fmt.Errorf("default: %w", err)
		}
	}
	for _, pattern := range cfg.Hosted {
		if err := cfg.Upstreams.Overlap(pattern); err != nil {
			return nil, fmt.Errorf("hosted %s: %w", pattern, err)
		}
	}
	for i, rule := range cfg.Rules {
		for _, pattern := range rule.On {
			if err := s.means(pattern); err != nil {
				return nil, fmt.Errorf("access: rules[%d]: on %s: %w", i, pattern, err)
			}
		}
	}
	cfg.Upstreams.serve(s)
	return s, nil
}

// Serves is what a site answers for.
type Serves struct {
	Registries []*Upstream // by name, less the wildcards; what is built in comes first
	Default    string      // the registry of names that say none, or empty
	NS         bool        // what ns says is heard
	Every      bool        // of whatever registry a client names by ns, and it knows
	Hosted     bool        // it has names of its own
}

// Serves tells what the site answers for.
func (s *Site) Serves() Serves {
	is := Serves{NS: s.ns, Every: s.ns && s.allowed == nil, Hosted: len(s.hosted) > 0}
	if s.byDefault != nil {
		is.Default = s.byDefault.Name
	}
	for _, entry := range s.upstreams.byName {
		if !strings.HasPrefix(entry.Name, "*") && s.permits(entry, entry.Name) {
			is.Registries = append(is.Registries, entry)
		}
	}
	place := func(u *Upstream) int {
		if i := slices.Index(Builtin, u.Name); i >= 0 {
			return i
		}
		return len(Builtin)
	}
	slices.SortFunc(is.Registries, func(a, b *Upstream) int {
		return cmp.Or(cmp.Compare(place(a), place(b)), strings.Compare(a.Name, b.Name))
	})
	return is
}

// means checks that a rule's pattern can fit what this site is asked for: a name
// that is not the one rules go by would let a deny pass unnoticed.
func (s *Site) means(pattern oci.Pattern) error {
	first := pattern[0]
	if strings.HasPrefix(first, "*") {
		return nil
	}
	if entry, host := s.upstreams.inPath(first); entry != nil && len(pattern) > 1 {
		pathName := entry.PathName
		if entry.Client == nil { // a wildcard's
			pathName = host
		}
		if first != pathName {
			return fmt.Errorf("%s is another name of %s; write %s/%s", first, pathName, pathName, strings.Join(pattern[1:], "/"))
		}
		if entry.Name == "docker.io" && len(pattern) == 2 && pattern[1] != "**" {
			return fmt.Errorf("names of %s without a slash are in library; write %[1]s/library/%s", first, pattern[1])
		}
		return nil
	}
	for _, hosted := range s.hosted {
		if hosted[0] == first || strings.HasPrefix(hosted[0], "*") {
			return nil
		}
	}
	return fmt.Errorf("%s is neither the path name of a registry nor hosted here; what is mirrored from docker.io is docker.io/..., whatever the default is", first)
}

// Overlap reports a hosted pattern whose first component means a registry, or
// lies where a registry's images are stored. A pattern that begins with a
// wildcard overlaps nothing: registries' path names are looked at first.
func (u *Upstreams) Overlap(pattern oci.Pattern) error {
	first := pattern[0]
	if strings.HasPrefix(first, "*") {
		return nil
	}
	if up, _ := u.inPath(first); up != nil {
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

// permits reports whether the site answers for a host, which an entry stands
// for.
func (s *Site) permits(entry *Upstream, host string) bool {
	_, domain, _ := strings.Cut(host, ".")
	return s.allowed == nil || s.allowed[entry.Name] || s.allowed[host] || s.allowed["*."+domain]
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
	errTakenName       = errors.New("the place is taken")
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
	if err := checkName(name); err != nil {
		return Target{}, err
	}
	first, rest, nested := strings.Cut(name, "/")
	if ns := s.namespace(host, rawQuery); ns != "" {
		named := NormalizeHost(ns)
		entry := s.upstreams.named(named)
		if entry == nil {
			return Target{}, fmt.Errorf("%w %q in ?ns=: this mirror does not know it; add `upstream %s` to its configuration", errUnknownUpstream, printable(ns), printable(ns))
		}
		if !s.permits(entry, named) {
			return Target{}, s.leftOut(named)
		}
		if nested {
			if inPath, itsHost := s.upstreams.inPath(first); inPath == entry && itsHost == named {
				name = rest
			}
		}
		return s.mirrored(entry, named, name, ns)
	}
	if nested {
		if entry, itsHost := s.upstreams.inPath(first); entry != nil {
			if !s.permits(entry, itsHost) {
				return Target{}, s.leftOut(itsHost)
			}
			return s.mirrored(entry, itsHost, rest, "")
		}
	}
	if s.hosts(name) {
		return Target{Name: name, Repository: name}, nil
	}
	if s.byDefault != nil {
		return s.mirrored(s.byDefault, s.byDefault.Name, name, "")
	}
	return Target{}, fmt.Errorf("%w: the name %s begins with no registry this mirror knows, is not hosted here, and this site has no default registry", errUnknownUpstream, name)
}

func (s *Site) leftOut(host string) error {
	return fmt.Errorf("%w: this site does not answer for %s; add it to the site's `upstreams`", errUnknownUpstream, host)
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

func (s *Site) mirrored(entry *Upstream, host, name, ns string) (Target, error) {
	t, err := s.upstreams.target(entry, host, name)
	if err == nil {
		err = s.spares(t)
	}
	if err != nil {
		return Target{}, err
	}
	t.Namespace = ns
	return t, nil
}

// spares checks that what is mirrored does not lie among the site's own.
func (s *Site) spares(t Target) error {
	if s.hosts(t.Repository) {
		return fmt.Errorf("%w: %s of upstream %s would lie where this site hosts images of its own", errTakenName, t.Name, t.Upstream.Name)
	}
	return nil
}

// hosts reports whether a name is one of the site's own. What begins with a
// registry's path name, or lies where its images are stored, is not, whatever
// the patterns.
func (s *Site) hosts(repository string) bool {
	if len(s.hosted) == 0 {
		return false
	}
	if first, _, nested := strings.Cut(repository, "/"); nested {
		if entry, _ := s.upstreams.inPath(first); entry != nil || s.upstreams.owner(repository) != nil {
			return false
		}
	}
	return slices.ContainsFunc(s.hosted, func(p oci.Pattern) bool { return p.Match(repository) })
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
