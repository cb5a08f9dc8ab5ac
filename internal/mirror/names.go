package mirror

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

// An Upstream is a mirrored registry as the policy sees it.
type Upstream struct {
	// Name is the registry's host, normalised, with a port where it is not
	// 443: what clients call it. "*.pkg.dev" stands for every host of one more
	// label.
	Name string
	// PathName is the first component that means this registry in a path:
	// /v2/ghcr.io/… . It is the actual host where Name is a wildcard.
	PathName string
	// Prefix stands before the names of its repositories in the store. It may
	// be empty, as registry:2 has it.
	Prefix string
	// TagTTL is how long a tag counts as fresh after it was checked.
	TagTTL time.Duration
	// Keep says that a held tag is served on when the origin says that it is
	// gone: for KeepFor, or for ever where that is 0.
	Keep    bool
	KeepFor time.Duration
	// Connections is how many connections a blob is fetched over at once.
	Connections int
	// Client asks the registry. It is nil in a wildcard.
	Client *upstream.Upstream
	// Open makes the client of a host that a wildcard stands for.
	Open func(host string) (*upstream.Upstream, error)
}

// repository is the stored name of what the upstream calls name.
func (u *Upstream) repository(name string) string {
	if u.Prefix == "" {
		return name
	}
	return u.Prefix + "/" + name
}

// Builtin are the registries that are always known.
var Builtin = []string{
	"docker.io",
	"ghcr.io",
	"gcr.io",
	"*.pkg.dev",
	"quay.io",
	"registry.k8s.io",
	"mcr.microsoft.com",
	"nvcr.io",
	"docker.elastic.co",
	"public.ecr.aws",
	"registry.gitlab.com",
	"lscr.io",
}

// aliases are other names of built-in registries.
var aliases = map[string]string{
	"index.docker.io":      "docker.io",
	"registry-1.docker.io": "docker.io",
	"k8s.gcr.io":           "registry.k8s.io",
	"elastic.co":           "docker.elastic.co",
	"registry.gcr.io":      "gcr.io",
}

// OriginHost is where a registry is reached that goes by another name.
func OriginHost(name string) string {
	if name == "docker.io" {
		return "registry-1.docker.io"
	}
	return name
}

// NormalizeHost brings a registry's host into the one form that is compared:
// lower case, no trailing dot, no default port, no alias.
func NormalizeHost(host string) string {
	host = strings.ToLower(host)
	if name, port, err := net.SplitHostPort(host); err == nil {
		name = strings.TrimSuffix(name, ".")
		if strings.Contains(name, ":") {
			name = "[" + name + "]"
		}
		if host = name; port != "443" {
			host += ":" + port
		}
	}
	host = strings.TrimSuffix(host, ".")
	if canonical, ok := aliases[host]; ok {
		return canonical
	}
	return host
}

// DefaultPathName is the path component that means a registry unless another
// is configured: its host, with "__" for the colon that no name may have.
func DefaultPathName(host string) string {
	return strings.ReplaceAll(host, ":", "__")
}

// maxWild bounds the hosts that wildcards have open clients for.
const maxWild = 256

// Upstreams are all registries that a configuration knows.
type Upstreams struct {
	byName map[string]*Upstream
	byPath map[string]*Upstream
	wild   []*Upstream

	mu     sync.Mutex
	opened *lru.Cache[string, *Upstream] // by host; one that falls out is closed
	sites  []*Site                       // that answer for them
	closed bool
}

// NewUpstreams checks that no two registries claim one name, path name or
// place in the store.
func NewUpstreams(list []*Upstream) (*Upstreams, error) {
	u := &Upstreams{byName: map[string]*Upstream{}, byPath: map[string]*Upstream{}}
	// It fails only for a size below 1.
	u.opened, _ = lru.NewWithEvict(maxWild, func(_ string, up *Upstream) { up.Client.Close() })
	prefixes := map[string]*Upstream{}
	for _, up := range list {
		if u.byName[up.Name] != nil {
			return nil, fmt.Errorf("upstream %s is configured twice", up.Name)
		}
		u.byName[up.Name] = up
		if strings.HasPrefix(up.Name, "*.") {
			u.wild = append(u.wild, up)
			continue
		}
		if !oci.ValidComponent(up.PathName) {
			return nil, fmt.Errorf("upstream %s: %q cannot be a path name, since it is no component of a repository name; set path_name", up.Name, up.PathName)
		}
		if up.Prefix != "" && !oci.ValidName(up.Prefix) {
			return nil, fmt.Errorf("upstream %s: repository_prefix %q is no repository name", up.Name, up.Prefix)
		}
		if other := u.byPath[up.PathName]; other != nil {
			return nil, fmt.Errorf("upstreams %s and %s both have the path name %s; set path_name for one", other.Name, up.Name, up.PathName)
		}
		u.byPath[up.PathName] = up
		if other := prefixes[up.Prefix]; other != nil {
			return nil, fmt.Errorf("upstreams %s and %s both have the repository_prefix %q, and would mix their images", other.Name, up.Name, up.Prefix)
		}
		prefixes[up.Prefix] = up
	}
	for a, ua := range prefixes {
		for b, ub := range prefixes {
			if a != "" && strings.HasPrefix(b, a+"/") {
				return nil, fmt.Errorf("repository_prefix %q of upstream %s lies inside %q of upstream %s", b, ub.Name, a, ua.Name)
			}
		}
	}
	return u, nil
}

// asStored reports whether every mirrored repository is asked for by the name
// under which it is stored.
func (u *Upstreams) asStored() bool {
	for _, up := range u.byName {
		if up.Client != nil && up.Prefix != up.PathName {
			return false
		}
	}
	return true
}

// named returns the entry of a normalised host, which may be a wildcard's, or
// nil.
func (u *Upstreams) named(host string) *Upstream {
	if up := u.byName[host]; up != nil && up.Client != nil {
		return up
	}
	for _, w := range u.wild {
		label, ok := strings.CutSuffix(host, w.Name[1:])
		if ok && oci.ValidComponent(label) && !strings.Contains(label, ".") && len(label) <= 63 {
			return w
		}
	}
	return nil
}

// inPath returns the entry that the first component of a path means, and the
// host it names, or nil.
func (u *Upstreams) inPath(component string) (up *Upstream, host string) {
	if up := u.byPath[component]; up != nil {
		return up, up.Name
	}
	host = component
	if canonical, ok := aliases[component]; ok {
		host = canonical
	} else if u.byName[component] != nil {
		return nil, "" // it has another path name
	}
	return u.named(host), host
}

// concrete is an entry itself, or for a wildcard's the registry of the host.
// It opens no connection.
func (u *Upstreams) concrete(entry *Upstream, host string) (*Upstream, error) {
	if entry.Client != nil {
		return entry, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if up, ok := u.opened.Get(host); ok {
		return up, nil
	}
	if u.closed {
		return nil, errors.New("the configuration is gone; try again")
	}
	client, err := entry.Open(host)
	if err != nil {
		return nil, err
	}
	up := &Upstream{Name: host, PathName: host, Prefix: host, TagTTL: entry.TagTTL, Keep: entry.Keep, KeepFor: entry.KeepFor, Connections: entry.Connections, Client: client}
	u.opened.Add(host, up)
	return up, nil
}

// target is what a registry, the entry itself or a wildcard's of the host, calls
// name.
func (u *Upstreams) target(entry *Upstream, host, name string) (Target, error) {
	up, err := u.concrete(entry, host)
	if err != nil {
		return Target{}, err
	}
	if up.Name == "docker.io" && !strings.Contains(name, "/") {
		name = "library/" + name
	}
	t := Target{Upstream: up, Name: name, Repository: up.repository(name)}
	if up.Prefix == "" {
		if other := u.owner(t.Repository); other != nil {
			return Target{}, fmt.Errorf("%w: %s of upstream %s would lie where images of %s are stored", errTakenName, name, up.Name, other.Name)
		}
	}
	return t, nil
}

func checkName(name string) error {
	if !oci.ValidName(name) {
		return fmt.Errorf("%w %.300q: want lower case letters, digits and separators, up to %d characters", errInvalidName, name, oci.MaxNameLength)
	}
	return nil
}

// serve adds a site that answers for the registries.
func (u *Upstreams) serve(s *Site) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sites = append(u.sites, s)
}

// owner is the entry under whose prefix a stored name lies, or nil. The empty
// prefix owns nothing: it has what is left.
func (u *Upstreams) owner(repository string) *Upstream {
	if first, _, nested := strings.Cut(repository, "/"); nested {
		if w := u.named(first); w != nil && w.Client == nil {
			return w
		}
	}
	for _, up := range u.byName {
		if up.Client != nil && up.Prefix != "" && strings.HasPrefix(repository, up.Prefix+"/") {
			return up
		}
	}
	return nil
}

// Owner is what a stored repository stands for that has the given record, if it is
// mirrored from a registry of this configuration.
func (u *Upstreams) Owner(repository string, r tree.Record) (Target, bool) {
	if r.Class != tree.Mirrored {
		return Target{}, false
	}
	name := repository
	if r.Prefix != "" {
		var ok bool
		if name, ok = strings.CutPrefix(repository, r.Prefix+"/"); !ok {
			return Target{}, false
		}
	}
	entry := u.named(r.Upstream)
	if entry == nil {
		return Target{}, false
	}
	up, err := u.concrete(entry, r.Upstream)
	if err != nil {
		return Target{}, false
	}
	return Target{Upstream: up, Name: name, Repository: repository}, true
}

// Close closes the clients of all registries.
func (u *Upstreams) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	u.opened.Purge()
	for _, up := range u.byName {
		if up.Client != nil {
			up.Client.Close()
		}
	}
}
