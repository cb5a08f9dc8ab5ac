// Package clients has the settings by which registry clients use a mirror: what the
// pages show and the command client-config prints and writes. It knows no server.
package clients

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"unicode"
)

// A Mirror is what clients are to use.
type Mirror struct {
	// URL is the mirror's: https://mirror.example.com, or http://mirror.lan:5000.
	URL string
	// Registries are those to be set up, by the host that images name; with Every, of
	// clients that cannot be told of all at once.
	Registries []Registry
	// Every is for whatever registry an image names: one that the mirror does not know
	// is asked itself.
	Every bool
	// NoNS says that the mirror does not read the parameter ns, by which most clients
	// tell it which registry they mean: those can use it for Default only.
	NoNS bool
	// Default is the registry of names that say none, or empty: docker, which has no
	// other, cannot use the mirror then.
	Default string
	// CA is the file on the client that has the authority of the mirror's certificate;
	// empty: one that the client trusts anyway.
	CA string
	// Strict leaves no way around the mirror: where it fails, the client does.
	Strict bool
}

// A Registry is one that images may come from.
type Registry struct {
	Name string // its host, as images have it
	Path string // what it is called in the paths of the mirror; empty: the same, with "__" for a colon
}

// A Client is a program that pulls images, or several with the same settings.
type Client struct {
	ID   string `json:"id"` // as client-config takes it
	Name Text   `json:"name"`
	// All says that it can use the mirror for every registry, and not for docker.io
	// only.
	All bool `json:"all_registries"`
	// ByPath says that it tells the registry in the path.
	ByPath bool `json:"by_path"`

	steps func(Mirror) ([]Step, error)
}

// A Step is one thing to do, in order. It has text, and a file or commands, or neither.
type Step struct {
	Text     Text   `json:"text"`
	File     string `json:"file,omitempty"` // where Content goes on the client
	Content  string `json:"content,omitempty"`
	Commands string `json:"commands,omitempty"` // to be run there as root, a line each
}

// Text is a sentence in the languages of the pages.
type Text struct {
	English string `json:"en"`
	Chinese string `json:"zh"`
}

// In is the text in a language: zh, or English.
func (t Text) In(language string) string {
	if language == "zh" {
		return t.Chinese
	}
	return t.English
}

// ErrStrict is wrapped by the error of a client that always has a way around a mirror.
var ErrStrict = errors.New("it goes to the registry itself where the mirror fails, and no setting forbids that: block the registry in the network, or pull by the mirror's name")

// Find returns a client.
func Find(id string) (Client, bool) {
	i := slices.IndexFunc(All, func(c Client) bool { return c.ID == id })
	if i < 0 {
		return Client{}, false
	}
	return All[i], true
}

// Steps are what is to be done so that the client uses the mirror.
func (c Client) Steps(m Mirror) ([]Step, error) {
	u, err := url.Parse(m.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil || !PlainHost(u.Host) {
		return nil, fmt.Errorf("%q is no mirror's address: that is https://host, or http://host:port, without a path", m.URL)
	}
	m.URL = u.Scheme + "://" + u.Host
	if len(m.Registries) == 0 {
		return nil, errors.New("there is no registry to be set up")
	}
	for _, r := range m.Registries {
		if host, err := url.Parse("//" + r.Name); err != nil || r.Name == "" || host.Host != r.Name || !PlainHost(r.Name) || !PlainHost(r.Path) {
			return nil, fmt.Errorf("%q is not the host of a registry, such as ghcr.io", r.Name)
		}
	}
	if m.CA != "" && (!path.IsAbs(m.CA) || strings.ContainsFunc(m.CA, strange) || u.Scheme == "http") {
		return nil, fmt.Errorf("the authority %q: the absolute path of a file, without spaces, quotes and what a shell makes something of, for a mirror with https", m.CA)
	}
	if !c.All && (m.Default != "docker.io" || !m.has("docker.io")) {
		return nil, fmt.Errorf("%s: a mirror is used for docker.io only, and that is not the default registry of this one", c.Name.English)
	}
	if m.NoNS && !c.ByPath {
		if m.Every = false; m.Default == "" {
			return nil, fmt.Errorf("%s: it tells by ns which registry it means, and this mirror does not read that", c.Name.English)
		}
		m.Registries = []Registry{{Name: m.Default}}
	}
	steps, err := c.steps(m)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Name.English, err)
	}
	return steps, nil
}

// PlainHost reports whether a host can stand in a shell command, in quotes and in a path:
// it may be what anybody has sent.
func PlainHost(host string) bool {
	strange := func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]", r)
	}
	return !strings.ContainsFunc(host, strange) && !strings.Contains(host, "..")
}

// strange reports whether a rune of a path means something to a shell, or to a file of
// settings.
func strange(r rune) bool {
	return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune("\"'\\$`;|&<>()*?#{}[]!~", r)
}

// host is the mirror's, with its port.
func (m Mirror) host() string { return m.URL[strings.Index(m.URL, "://")+3:] }

func (m Mirror) plain() bool { return strings.HasPrefix(m.URL, "http:") }

// origin is the address of a registry itself.
func origin(registry string) string {
	if registry == "docker.io" {
		registry = "registry-1.docker.io"
	}
	return "https://" + registry
}

func (m Mirror) has(name string) bool {
	return slices.ContainsFunc(m.Registries, func(r Registry) bool { return r.Name == name })
}

// image is one to try it with.
func (m Mirror) image() string {
	if m.has("docker.io") {
		return "docker.io/library/alpine:3"
	}
	return m.Registries[0].Name + "/<image>"
}

// inPath is what a registry is called in the mirror's paths.
func (r Registry) inPath() string {
	return cmp.Or(r.Path, strings.ReplaceAll(r.Name, ":", "__"))
}
