package mirror

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
)

const self = "mirror.example"

// siteOptions changes a site that knows the built-in registries, some of its
// own, and docker.io as its default.
type siteOptions struct {
	byDefault string // "off"; "": docker.io
	hosted    string // separated by spaces
	shadow    bool
	allowed   string
	ignoreNS  bool
	hub       func(*Upstream) // alters docker.io
}

func (o siteOptions) site(t testing.TB) (*Site, error) {
	t.Helper()
	list := builtin(t, known(t, "registry.corp:5000"), known(t, "own.pkg.dev"))
	named := known(t, "images.corp")
	named.PathName, named.Prefix = "corp", "mirrors/corp"
	bare := known(t, "bare.corp")
	bare.Prefix = ""
	list = append(list, named, bare)
	if o.hub != nil {
		bare.Prefix = "bare.corp"
		o.hub(list[0])
	}
	cfg := SiteConfig{Upstreams: newUpstreams(t, list), Default: o.byDefault, ShadowDefault: o.shadow, IgnoreNS: o.ignoreNS, Allowed: strings.Fields(o.allowed)}
	switch o.byDefault {
	case "":
		cfg.Default = "docker.io"
	case "off":
		cfg.Default = ""
	}
	for s := range strings.FieldsSeq(o.hosted) {
		p, err := oci.ParsePattern(s)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Hosted = append(cfg.Hosted, p)
	}
	return NewSite(cfg)
}

// TestResolve fixes the addressing, DESIGN §3.
func TestResolve(t *testing.T) {
	std := siteOptions{}
	off := siteOptions{byDefault: "off"}
	hosted := siteOptions{byDefault: "off", hosted: "apps/** team/*/web"}
	shadow := siteOptions{hosted: "apps/** library/own", shadow: true}
	ghcr := siteOptions{byDefault: "ghcr.io", allowed: "ghcr.io"}
	// A default registry in the place registry:2 has it, where hosted names could lie.
	inPlace := siteOptions{hosted: "apps/**", shadow: true, hub: func(u *Upstream) { u.Prefix = "" }}
	renamed := siteOptions{hub: func(u *Upstream) { u.PathName, u.Prefix = "hub", "cache" }}
	// Hosted patterns that begin with a wildcard: path names are looked at first.
	anything := siteOptions{byDefault: "off", hosted: "**"}

	for _, c := range []struct {
		why   string
		site  siteOptions
		host  string // "": mirror.example
		query string
		name  string
		// What comes out: registry, or "hosted"; its name; the stored name; and
		// the OCI-Namespace.
		upstream, repo, stored, ns string
		err                        error
	}{
		// 1. ns
		{"ns", std, "", "ns=ghcr.io", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io", nil},
		{"ns of the default registry", std, "", "ns=docker.io", "library/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "docker.io", nil},
		{"ns among others", std, "", "n=5&ns=ghcr.io&last=x", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io", nil},
		{"the first ns counts", std, "", "ns=ghcr.io&ns=quay.io", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io", nil},
		{"an empty ns says nothing", std, "", "ns=", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"another parameter that ends alike", std, "", "xns=ghcr.io", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"ns in upper case", std, "", "ns=GHCR.IO", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "GHCR.IO", nil},
		{"ns with a trailing dot", std, "", "ns=ghcr.io.", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io.", nil},
		{"ns with the default port", std, "", "ns=ghcr.io:443", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io:443", nil},
		{"ns with another port is another registry", std, "", "ns=ghcr.io:5000", "org/img", "", "", "", "", errUnknownUpstream},
		{"ns with a port", std, "", "ns=registry.corp:5000", "a/b", "registry.corp:5000", "a/b", "registry.corp__5000/a/b", "registry.corp:5000", nil},
		{"ns with an escaped port", std, "", "ns=registry.corp%3A5000", "a/b", "registry.corp:5000", "a/b", "registry.corp__5000/a/b", "registry.corp:5000", nil},
		{"ns with an escaped port in lower case", std, "", "ns=registry.corp%3a5000", "a", "registry.corp:5000", "a", "registry.corp__5000/a", "registry.corp:5000", nil},
		{"the port belongs to it", std, "", "ns=registry.corp", "a/b", "", "", "", "", errUnknownUpstream},
		{"ns is a host, not a path name", std, "", "ns=registry.corp__5000", "a/b", "", "", "", "", errUnknownUpstream},
		{"ns is a host, not a custom path name", std, "", "ns=corp", "a/b", "", "", "", "", errUnknownUpstream},
		{"unknown ns", std, "", "ns=evil.example", "org/img", "", "", "", "", errUnknownUpstream},
		{"an address as ns", std, "", "ns=169.254.169.254", "latest/meta-data", "", "", "", "", errUnknownUpstream},
		{"ns with user information", std, "", "ns=ghcr.io@evil.example", "org/img", "", "", "", "", errUnknownUpstream},
		{"ns as an address with scheme", std, "", "ns=https://ghcr.io", "org/img", "", "", "", "", errUnknownUpstream},
		{"ns with a path", std, "", "ns=ghcr.io/org", "img", "", "", "", "", errUnknownUpstream},
		{"ns that is broken", std, "", "ns=%zz", "org/img", "", "", "", "", errUnknownUpstream},
		{"ns as the wildcard itself", std, "", "ns=*.pkg.dev", "p/r/i", "", "", "", "", errUnknownUpstream},
		{"unknown ns does not fall to the path", std, "", "ns=evil.example", "ghcr.io/org/img", "", "", "", "", errUnknownUpstream},
		{"unknown ns does not fall to what is hosted", hosted, "", "ns=evil.example", "apps/web", "", "", "", "", errUnknownUpstream},
		{"ns with an alias", std, "", "ns=index.docker.io", "library/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "index.docker.io", nil},
		{"ns with another alias", std, "", "ns=registry-1.docker.io", "nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "registry-1.docker.io", nil},
		{"ns k8s.gcr.io", std, "", "ns=k8s.gcr.io", "pause", "registry.k8s.io", "pause", "registry.k8s.io/pause", "k8s.gcr.io", nil},
		{"ns elastic.co", std, "", "ns=elastic.co", "kibana/kibana", "docker.elastic.co", "kibana/kibana", "docker.elastic.co/kibana/kibana", "elastic.co", nil},
		{"ns registry.gcr.io", std, "", "ns=registry.gcr.io", "p/i", "gcr.io", "p/i", "gcr.io/p/i", "registry.gcr.io", nil},
		{"ns of a wildcard", std, "", "ns=us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", nil},
		{"ns of a wildcard, two labels", std, "", "ns=a.b.pkg.dev", "p/r/i", "", "", "", "", errUnknownUpstream},

		{"own host as ns says nothing", std, "", "ns=mirror.example", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"own host and port", std, "mirror.example:8443", "ns=mirror.example%3A8443", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"own host with the default port", std, "mirror.example", "ns=Mirror.Example.:443", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"own host, then the path decides", std, "", "ns=mirror.example", "ghcr.io/org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "", nil},
		{"own host, then what is hosted", hosted, "", "ns=mirror.example", "apps/web", "hosted", "apps/web", "apps/web", "", nil},
		{"own host that is a registry's", std, "ghcr.io", "ns=ghcr.io", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},

		{"ns and an equal prefix", std, "", "ns=ghcr.io", "ghcr.io/org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io", nil},
		{"ns and an equal prefix, once", std, "", "ns=ghcr.io", "ghcr.io/ghcr.io/img", "ghcr.io", "ghcr.io/img", "ghcr.io/ghcr.io/img", "ghcr.io", nil},
		{"ns and an equal prefix with a port", std, "", "ns=registry.corp:5000", "registry.corp__5000/a/b", "registry.corp:5000", "a/b", "registry.corp__5000/a/b", "registry.corp:5000", nil},
		{"ns and an equal custom path name", std, "", "ns=images.corp", "corp/a/b", "images.corp", "a/b", "mirrors/corp/a/b", "images.corp", nil},
		{"ns and an equal wildcard host", std, "", "ns=us-docker.pkg.dev", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", nil},
		{"ns and an alias as prefix", std, "", "ns=docker.io", "index.docker.io/library/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "docker.io", nil},
		{"alias as ns, name as prefix", std, "", "ns=index.docker.io", "docker.io/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "index.docker.io", nil},
		{"ns and a different prefix", std, "", "ns=quay.io", "ghcr.io/org/img", "quay.io", "ghcr.io/org/img", "quay.io/ghcr.io/org/img", "quay.io", nil},
		{"ns and a different wildcard host", std, "", "ns=us-docker.pkg.dev", "eu-docker.pkg.dev/r/i", "us-docker.pkg.dev", "eu-docker.pkg.dev/r/i", "us-docker.pkg.dev/eu-docker.pkg.dev/r/i", "us-docker.pkg.dev", nil},
		{"a real name with a dot", std, "", "ns=gcr.io", "google.com/project/x", "gcr.io", "google.com/project/x", "gcr.io/google.com/project/x", "gcr.io", nil},
		{"the same with its prefix", std, "", "ns=gcr.io", "gcr.io/google.com/project/x", "gcr.io", "google.com/project/x", "gcr.io/google.com/project/x", "gcr.io", nil},
		{"a name that is only a registry's", std, "", "ns=quay.io", "ghcr.io", "quay.io", "ghcr.io", "quay.io/ghcr.io", "quay.io", nil},
		{"ns is not looked up among hosted names", hosted, "", "ns=ghcr.io", "apps/web", "ghcr.io", "apps/web", "ghcr.io/apps/web", "ghcr.io", nil},

		{"ns ignored", siteOptions{ignoreNS: true}, "", "ns=ghcr.io", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"unknown ns ignored", siteOptions{ignoreNS: true}, "", "ns=evil.example", "quay.io/org/img", "quay.io", "org/img", "quay.io/org/img", "", nil},

		// 2. path names
		{"path", std, "", "", "ghcr.io/org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "", nil},
		{"path of the default registry", std, "", "", "docker.io/library/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"path and a short name", std, "", "", "docker.io/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"path with an alias", std, "", "", "index.docker.io/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"path with k8s.gcr.io", std, "", "", "k8s.gcr.io/pause", "registry.k8s.io", "pause", "registry.k8s.io/pause", "", nil},
		{"path with a port", std, "", "", "registry.corp__5000/a/b", "registry.corp:5000", "a/b", "registry.corp__5000/a/b", "", nil},
		{"custom path name and prefix", std, "", "", "corp/a/b", "images.corp", "a/b", "mirrors/corp/a/b", "", nil},
		{"its host is no path name then", off, "", "", "images.corp/a/b", "", "", "", "", errUnknownUpstream},
		{"its prefix is no path name", off, "", "", "mirrors/corp/a/b", "", "", "", "", errUnknownUpstream},
		{"wildcard", std, "", "", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "", nil},
		{"wildcard, another host", std, "", "", "europe-west1-docker.pkg.dev/p/r/i", "europe-west1-docker.pkg.dev", "p/r/i", "europe-west1-docker.pkg.dev/p/r/i", "", nil},
		{"wildcard, two labels", off, "", "", "a.b.pkg.dev/p/r/i", "", "", "", "", errUnknownUpstream},
		{"wildcard, no label", off, "", "", "pkg.dev/p/r/i", "", "", "", "", errUnknownUpstream},
		{"a real name with a dot by path", std, "", "", "gcr.io/google.com/project/x", "gcr.io", "google.com/project/x", "gcr.io/google.com/project/x", "", nil},
		{"only the first component counts", std, "", "", "quay.io/ghcr.io/img", "quay.io", "ghcr.io/img", "quay.io/ghcr.io/img", "", nil},
		{"twice in the path", std, "", "", "ghcr.io/ghcr.io/img", "ghcr.io", "ghcr.io/img", "ghcr.io/ghcr.io/img", "", nil},
		{"empty prefix", std, "", "", "bare.corp/a/b", "bare.corp", "a/b", "a/b", "", nil},
		{"unknown host in the path", off, "", "", "evil.example/org/img", "", "", "", "", errUnknownUpstream},
		{"a path name in front of what is hosted", anything, "", "", "ghcr.io/org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "", nil},

		// 3. hosted
		{"hosted", hosted, "", "", "apps/web", "hosted", "apps/web", "apps/web", "", nil},
		{"hosted, deep", hosted, "", "", "apps/a/b/c", "hosted", "apps/a/b/c", "apps/a/b/c", "", nil},
		{"hosted, the pattern's own root", hosted, "", "", "apps", "hosted", "apps", "apps", "", nil},
		{"hosted by one component", hosted, "", "", "team/x/web", "hosted", "team/x/web", "team/x/web", "", nil},
		{"not hosted", hosted, "", "", "team/x/y/web", "", "", "", "", errUnknownUpstream},
		{"hosted shadows the default", shadow, "", "", "apps/web", "hosted", "apps/web", "apps/web", "", nil},
		{"hosted name that docker.io would have", shadow, "", "", "library/own", "hosted", "library/own", "library/own", "", nil},
		{"a short name is not made long for it", shadow, "", "", "own", "docker.io", "library/own", "docker.io/library/own", "", nil},
		{"beside what is hosted, the default", shadow, "", "", "other/web", "docker.io", "other/web", "docker.io/other/web", "", nil},
		{"ns in front of what is hosted", shadow, "", "ns=docker.io", "apps/web", "docker.io", "apps/web", "docker.io/apps/web", "docker.io", nil},
		{"path in front of what is hosted", shadow, "", "", "docker.io/apps/web", "docker.io", "apps/web", "docker.io/apps/web", "", nil},
		{"anything hosted", anything, "", "", "a/b/c", "hosted", "a/b/c", "a/b/c", "", nil},
		{"anything hosted that looks like a host", anything, "", "", "evil.example/a", "hosted", "evil.example/a", "evil.example/a", "", nil},
		{"a single component is hosted, be it a registry's name", anything, "", "", "web", "hosted", "web", "web", "", nil},

		{"mirrored is never stored inside hosted, ns", inPlace, "", "ns=docker.io", "apps/web", "", "", "", "", errTakenName},
		{"mirrored is never stored inside hosted, path", inPlace, "", "", "docker.io/apps/web", "", "", "", "", errTakenName},
		{"mirrored is never stored inside hosted, beside it", inPlace, "", "", "docker.io/other/web", "docker.io", "other/web", "other/web", "", nil},
		{"without a registry it is hosted", inPlace, "", "", "apps/web", "hosted", "apps/web", "apps/web", "", nil},

		// 4. the default
		{"default", std, "", "", "org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"default and a short name", std, "", "", "nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"default and library/ written", std, "", "", "library/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"a single component is no path name", std, "", "", "ghcr.io", "docker.io", "library/ghcr.io", "docker.io/library/ghcr.io", "", nil},
		{"library/ for docker.io only", ghcr, "", "", "nginx", "ghcr.io", "nginx", "ghcr.io/nginx", "", nil},
		{"library/ for docker.io only, ns", std, "", "ns=quay.io", "nginx", "quay.io", "nginx", "quay.io/nginx", "quay.io", nil},
		{"library/ for docker.io only, path", std, "", "", "quay.io/nginx", "quay.io", "nginx", "quay.io/nginx", "", nil},
		{"default by an alias", siteOptions{byDefault: "Registry-1.docker.io:443"}, "", "", "nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"default of a wildcard", siteOptions{byDefault: "us-docker.pkg.dev"}, "", "", "p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "", nil},
		{"default off", off, "", "", "org/img", "", "", "", "", errUnknownUpstream},
		{"default off, path", off, "", "", "docker.io/org/img", "docker.io", "org/img", "docker.io/org/img", "", nil},
		{"default off, ns", off, "", "ns=docker.io", "nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "docker.io", nil},

		// Where it is stored.
		{"empty prefix of the default", inPlace, "", "", "nginx", "docker.io", "library/nginx", "library/nginx", "", nil},
		{"renamed", renamed, "", "", "nginx", "docker.io", "library/nginx", "cache/library/nginx", "", nil},
		{"renamed, path", renamed, "", "", "hub/org/img", "docker.io", "org/img", "cache/org/img", "", nil},
		{"renamed, ns and path name", renamed, "", "ns=docker.io", "hub/org/img", "docker.io", "org/img", "cache/org/img", "docker.io", nil},
		{"renamed, alias in the path", renamed, "", "", "index.docker.io/nginx", "docker.io", "library/nginx", "cache/library/nginx", "", nil},

		// upstreams
		{"narrowed, ns", ghcr, "", "ns=ghcr.io", "org/img", "ghcr.io", "org/img", "ghcr.io/org/img", "ghcr.io", nil},
		{"narrowed away, ns", ghcr, "", "ns=docker.io", "library/nginx", "", "", "", "", errUnknownUpstream},
		{"narrowed away, ns by alias", ghcr, "", "ns=index.docker.io", "library/nginx", "", "", "", "", errUnknownUpstream},
		{"narrowed away, path: no name of the default's", ghcr, "", "", "quay.io/org/img", "", "", "", "", errUnknownUpstream},
		{"narrowed away, path by alias", ghcr, "", "", "index.docker.io/org/img", "", "", "", "", errUnknownUpstream},
		{"narrowed away, path of a wildcard", ghcr, "", "", "us-docker.pkg.dev/p/i", "", "", "", "", errUnknownUpstream},
		{"narrowed away, path, no default", siteOptions{byDefault: "off", allowed: "ghcr.io"}, "", "", "quay.io/org/img", "", "", "", "", errUnknownUpstream},
		{"narrowed by alias", siteOptions{byDefault: "off", allowed: "index.docker.io"}, "", "", "docker.io/nginx", "docker.io", "library/nginx", "docker.io/library/nginx", "", nil},
		{"narrowed to a wildcard", siteOptions{byDefault: "off", allowed: "*.pkg.dev"}, "", "", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "", nil},
		{"narrowed to a wildcard, a host with a configuration of its own", siteOptions{byDefault: "off", allowed: "*.pkg.dev"}, "", "", "own.pkg.dev/p/r/i", "own.pkg.dev", "p/r/i", "own.pkg.dev/p/r/i", "", nil},
		{"narrowed to a wildcard, others", siteOptions{byDefault: "off", allowed: "*.pkg.dev"}, "", "ns=gcr.io", "p/i", "", "", "", "", errUnknownUpstream},
		{"narrowed to one host of a wildcard", siteOptions{byDefault: "off", allowed: "us-docker.pkg.dev"}, "", "ns=us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev", "p/r/i", "us-docker.pkg.dev/p/r/i", "us-docker.pkg.dev", nil},
		{"narrowed to one host of a wildcard, another", siteOptions{byDefault: "off", allowed: "us-docker.pkg.dev"}, "", "ns=eu-docker.pkg.dev", "p/r/i", "", "", "", "", errUnknownUpstream},
		{"narrowed to a registry with a port", siteOptions{byDefault: "off", allowed: "registry.corp:5000"}, "", "", "registry.corp__5000/a", "registry.corp:5000", "a", "registry.corp__5000/a", "", nil},

		// Names that are none.
		{"upper case", std, "", "", "Org/img", "", "", "", "", errInvalidName},
		{"empty", std, "", "ns=ghcr.io", "", "", "", "", "", errInvalidName},
		{"dots", std, "", "", "../../etc/passwd", "", "", "", "", errInvalidName},
		{"a colon", std, "", "", "registry.corp:5000/a/b", "", "", "", "", errInvalidName},
		{"registry:2's own directories", std, "", "", "ghcr.io/org/_layers", "", "", "", "", errInvalidName},
		{"too long", std, "", "", strings.Repeat("a/", 127) + "aa", "", "", "", "", errInvalidName},
		{"nothing behind the path name", std, "", "", "ghcr.io/", "", "", "", "", errInvalidName},
	} {
		t.Run(c.why, func(t *testing.T) {
			site, err := c.site.site(t)
			if err != nil {
				t.Fatal(err)
			}
			host := c.host
			if host == "" {
				host = self
			}
			got, err := site.Resolve(host, c.query, c.name)
			if c.err != nil || err != nil {
				if !errors.Is(err, c.err) {
					t.Errorf("error %v, want %v", err, c.err)
				}
				if got != (Target{}) {
					t.Errorf("%+v together with an error", got)
				}
				return
			}
			upstream := "hosted"
			if got.Upstream != nil {
				upstream = got.Upstream.Name
			}
			if upstream != c.upstream || got.Name != c.repo || got.Repository != c.stored || got.Namespace != c.ns {
				t.Errorf("upstream %s, name %s, stored %s, namespace %q\nwant     %s, name %s, stored %s, namespace %q",
					upstream, got.Name, got.Repository, got.Namespace, c.upstream, c.repo, c.stored, c.ns)
			}
		})
	}
}

// An upstream that stores without a prefix must not store where another has
// its images.
func TestEmptyPrefixStaysOutOfOthers(t *testing.T) {
	site, err := siteOptions{byDefault: "off"}.site(t)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ghcr.io/org/img", "mirrors/corp/img", "us-docker.pkg.dev/p/img"} {
		if got, err := site.Resolve(self, "ns=bare.corp", name); !errors.Is(err, errTakenName) {
			t.Errorf("%s of bare.corp would be stored as %q, which is another registry's place: %v", name, got.Repository, err)
		}
	}
}

// An unknown host opens nothing, and neither does one that the site does not
// answer for.
func TestResolveOpensNothingInVain(t *testing.T) {
	var opened []string
	u := newUpstreams(t, []*Upstream{known(t, "docker.io"), known(t, "ghcr.io"), wildcard(t, "*.pkg.dev", &opened)})
	site, err := NewSite(SiteConfig{Upstreams: u, Default: "docker.io", Allowed: []string{"docker.io"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range []string{"", "ns=docker.io", "ns=a.pkg.dev", "ns=evil.example", "ns=169.254.169.254"} {
		for _, name := range []string{"x.pkg.dev/a", "evil.example/a", "127.0.0.1/a"} {
			site.Resolve(self, query, name)
		}
	}
	if len(opened) != 0 {
		t.Errorf("a site narrowed to docker.io opened %q", opened)
	}
}

func TestUnknownNamespaceIsPrintable(t *testing.T) {
	site, err := siteOptions{}.site(t)
	if err != nil {
		t.Fatal(err)
	}
	_, err = site.Resolve(self, "ns="+url.QueryEscape("evil\x1b[31m\n\"`"+strings.Repeat("x", 5000)), "a/b")
	if !errors.Is(err, errUnknownUpstream) {
		t.Fatal(err)
	}
	if s := err.Error(); strings.ContainsAny(s, "\x1b\n") || len(s) > 1000 {
		t.Errorf("%q", s)
	}
}

func TestNewSite(t *testing.T) {
	for _, c := range []struct {
		why  string
		site siteOptions
		want []string // in the error; none: accepted
	}{
		{"default", siteOptions{}, nil},
		{"hosted, default off", siteOptions{byDefault: "off", hosted: "apps/**"}, nil},
		{"hosted, shadow_default", siteOptions{hosted: "apps/**", shadow: true}, nil},
		{"hosted everything, default off", siteOptions{byDefault: "off", hosted: "**"}, nil},
		{"hosted beside a prefix", siteOptions{byDefault: "off", hosted: "mirrors2/**"}, nil},
		{"hosted and a default", siteOptions{hosted: "apps/**"}, []string{"apps/**", "docker.io", "shadow_default"}},
		{"hosted and another default", siteOptions{byDefault: "ghcr.io", hosted: "apps/**"}, []string{"apps/**", "ghcr.io", "shadow_default"}},
		{"shadow_default without hosted", siteOptions{shadow: true}, []string{"shadow_default"}},
		{"shadow_default without default", siteOptions{byDefault: "off", hosted: "apps/**", shadow: true}, []string{"shadow_default"}},
		{"hosted over a path name", siteOptions{byDefault: "off", hosted: "apps/** ghcr.io/**"}, []string{"ghcr.io/**", "path name", "ghcr.io"}},
		{"hosted over part of one", siteOptions{byDefault: "off", hosted: "ghcr.io/own/*"}, []string{"ghcr.io/own/*", "path name"}},
		{"hosted over a path name, shadow_default", siteOptions{hosted: "quay.io/**", shadow: true}, []string{"quay.io/**", "path name"}},
		{"hosted over an alias", siteOptions{byDefault: "off", hosted: "index.docker.io/**"}, []string{"index.docker.io/**", "docker.io"}},
		{"hosted over a wildcard", siteOptions{byDefault: "off", hosted: "us-docker.pkg.dev/**"}, []string{"us-docker.pkg.dev/**"}},
		{"hosted over a custom path name", siteOptions{byDefault: "off", hosted: "corp/**"}, []string{"corp/**", "images.corp"}},
		{"hosted over a port's", siteOptions{byDefault: "off", hosted: "registry.corp__5000/x"}, []string{"registry.corp__5000/x", "registry.corp:5000"}},
		{"hosted over a prefix", siteOptions{byDefault: "off", hosted: "mirrors/corp/**"}, []string{"mirrors/corp/**", "images.corp"}},
		{"hosted around a prefix", siteOptions{byDefault: "off", hosted: "mirrors/**"}, []string{"mirrors/**", "images.corp"}},
		{"hosted over a registry the site does not answer for", siteOptions{byDefault: "off", allowed: "quay.io", hosted: "ghcr.io/**"}, []string{"ghcr.io/**"}},
		{"unknown default", siteOptions{byDefault: "evil.example"}, []string{"default", "evil.example"}},
		{"wildcard as default", siteOptions{byDefault: "*.pkg.dev"}, []string{"default", "*.pkg.dev"}},
		{"unknown among upstreams", siteOptions{allowed: "docker.io evil.example"}, []string{"upstreams", "evil.example"}},
		{"default not among upstreams", siteOptions{allowed: "ghcr.io"}, []string{"default", "docker.io", "upstreams"}},
		{"default among upstreams by alias", siteOptions{byDefault: "index.docker.io", allowed: "DOCKER.io"}, nil},
		{"default off, upstreams", siteOptions{byDefault: "off", allowed: "ghcr.io quay.io *.pkg.dev registry.corp:5000"}, nil},
	} {
		site, err := c.site.site(t)
		if len(c.want) == 0 {
			if err != nil || site == nil {
				t.Errorf("%s: %v", c.why, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: accepted", c.why)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not name %s", c.why, err, want)
			}
		}
	}
}

func TestQueryValue(t *testing.T) {
	for _, c := range []struct{ query, want string }{
		{"", ""},
		{"ns", ""},
		{"ns=", ""},
		{"ns=a", "a"},
		{"x=1&ns=a&y=2", "a"},
		{"ns=a&ns=b", "a"},
		{"nss=a&ns=b", "b"},
		{"ns=a%3A1", "a:1"},
		{"ns=a+b", "a b"},
		{"ns=%zz", "%zz"},
		{"ns=a=b", "a=b"},
		{"&&ns=a", "a"},
	} {
		if got := queryValue(c.query, "ns"); got != c.want {
			t.Errorf("queryValue(%q) = %q, want %q", c.query, got, c.want)
		}
	}
}

func FuzzQueryValue(f *testing.F) {
	for _, s := range []string{"", "ns=a", "ns=a%3A1&x=1", "ns=%zz", "a;ns=b", "%6es=a", "ns=a&ns=b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		got := queryValue(query, "ns")
		// Where the standard library reads the whole query, and every key is
		// written plainly, it reads the same.
		values, err := url.ParseQuery(query)
		if err != nil || strings.ContainsAny(strings.ReplaceAll(query, "ns=", ""), ";") || strings.Contains(query, "%6") || strings.Contains(query, "%7") {
			return
		}
		if want := values.Get("ns"); got != want {
			t.Errorf("queryValue(%q) = %q, and url.ParseQuery says %q", query, got, want)
		}
	})
}

func FuzzResolve(f *testing.F) {
	for _, name := range []string{"nginx", "ghcr.io/org/img", "apps/web", "docker.io/apps/web", "us-docker.pkg.dev/p/r/i", "gcr.io/google.com/project/x", "mirrors/corp/a", "../x", "UPPER", "a//b", "library/own"} {
		for _, query := range []string{"", "ns=ghcr.io", "ns=docker.io", "ns=index.docker.io", "ns=registry.corp%3A5000", "ns=evil.example", "ns=169.254.169.254", "ns=images.corp", "ns=mirror.example"} {
			f.Add(self, query, name)
		}
	}
	site, err := siteOptions{hosted: "apps/** library/own", shadow: true, hub: func(u *Upstream) { u.Prefix = "" }}.site(f)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, host, query, name string) {
		got, err := site.Resolve(host, query, name)
		if err != nil {
			if got != (Target{}) {
				t.Errorf("%+v together with %v", got, err)
			}
			return
		}
		if !oci.ValidName(name) || !oci.ValidComponent(strings.Split(got.Repository, "/")[0]) {
			t.Fatalf("%q is taken for a name: %+v", name, got)
		}
		for part := range strings.SplitSeq(got.Repository, "/") {
			if !oci.ValidComponent(part) {
				t.Fatalf("stored name %q", got.Repository)
			}
		}
		if !strings.HasSuffix(got.Repository, got.Name) || !strings.HasSuffix(got.Name, name[strings.IndexByte(name, '/')+1:]) {
			t.Errorf("(%q, %q, %q): %+v", host, query, name, got)
		}
		hosted := site.hosts(got.Repository)
		if (got.Upstream == nil) != hosted {
			t.Errorf("(%q, %q, %q): %+v, hosted: %v", host, query, name, got, hosted)
		}
		if got.Upstream == nil && got.Repository != name {
			t.Errorf("a hosted name was changed: %q is %q", name, got.Repository)
		}
		if got.Upstream != nil {
			if want := got.Upstream.repository(got.Name); got.Repository != want {
				t.Errorf("stored as %s, want %s", got.Repository, want)
			}
		}
		if got.Namespace != "" && (got.Upstream == nil || NormalizeHost(got.Namespace) != got.Upstream.Name) {
			t.Errorf("namespace %q decided for %+v", got.Namespace, got)
		}
	})
}
