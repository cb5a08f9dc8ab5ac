// Package access decides who may do what with which repository. It knows no
// HTTP and no Caddy: who asks has been found out before.
package access

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/caddy-registry/mirror/internal/oci"
)

// An Action is something that a caller wants to do with a repository, or several
// of them.
type Action uint8

const (
	// Pull is reading: manifests, blobs, tags, referrers, and finding a
	// repository in a listing.
	Pull Action = 1 << iota
	// Push is writing: uploads, mounts, manifests, tags.
	Push
	// Delete is the removal of tags, manifests and blobs.
	Delete

	// Any is all of them.
	Any = Pull | Push | Delete
)

// ParseAction reads the name of an action, or `any`.
func ParseAction(s string) (Action, error) {
	switch s {
	case "pull":
		return Pull, nil
	case "push":
		return Push, nil
	case "delete":
		return Delete, nil
	case "any":
		return Any, nil
	}
	return 0, fmt.Errorf("%.50q is no action; there are pull, push, delete and any", s)
}

// A Caller is who asks.
type Caller struct {
	// Identity is the name that an authenticator has found out; empty: none has.
	Identity string
	// Addr is where the request comes from; the zero Addr: nobody knows.
	Addr netip.Addr
}

// A Who says whom a rule is about.
type Who struct {
	kind    whoKind
	user    string
	network netip.Prefix
}

type whoKind int

const (
	anyone whoKind = iota
	authenticated
	user
	network
)

// ParseWho reads `anyone`, `authenticated`, `user:<name>` or `net:<cidr>`.
func ParseWho(s string) (Who, error) {
	switch kind, value, valued := strings.Cut(s, ":"); {
	case s == "anyone":
		return Who{}, nil
	case s == "authenticated":
		return Who{kind: authenticated}, nil
	case kind == "user" && value != "":
		return Who{kind: user, user: value}, nil
	case kind == "net" && valued:
		prefix, err := netip.ParsePrefix(value)
		if err != nil {
			return Who{}, fmt.Errorf("%q: %q is not a network such as 10.0.0.0/8", s, value)
		}
		return Who{kind: network, network: prefix.Masked()}, nil
	}
	return Who{}, fmt.Errorf("%.100q says nobody; write anyone, authenticated, user:<name> or net:<cidr>", s)
}

// is reports whether the caller is meant.
func (w Who) is(c Caller) bool {
	switch w.kind {
	case authenticated:
		return c.Identity != ""
	case user:
		return c.Identity == w.user
	case network:
		return w.network.Contains(c.Addr.Unmap())
	}
	return true
}

// A Rule allows or denies.
type Rule struct {
	Allow   bool
	Actions Action
	To      []Who         // anyone, if there is none
	On      []oci.Pattern // every repository, if there is none
}

// Rules are in order: the first that matches decides, and what none matches is
// denied. Nil Rules, for a site that has none, let anyone pull what is mirrored
// and nobody do anything else.
type Rules []Rule

// A Verdict is what rules say.
type Verdict struct {
	Allowed bool
	// Explicit says that the rule that decided names repositories.
	Explicit bool
}

// Decide says whether a caller may do one thing with a repository. It is named
// as this site's clients ask for it by its path: a mirrored one begins with the
// path name of its registry.
func (r Rules) Decide(c Caller, a Action, repository string, hosted bool) Verdict {
	if r == nil {
		return Verdict{Allowed: a == Pull && !hosted}
	}
	for _, rule := range r {
		if rule.Actions&a != 0 && rule.means(c) && rule.about(repository) {
			return Verdict{Allowed: rule.Allow, Explicit: len(rule.On) > 0}
		}
	}
	return Verdict{}
}

func (r *Rule) means(c Caller) bool {
	for _, who := range r.To {
		if who.is(c) {
			return true
		}
	}
	return len(r.To) == 0
}

func (r *Rule) about(repository string) bool {
	for _, pattern := range r.On {
		if pattern.Match(repository) {
			return true
		}
	}
	return len(r.On) == 0
}
