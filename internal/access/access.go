// Package access decides who may do what with which repository. It knows no
// HTTP and no Caddy: who asks has been found out before.
package access

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
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

func (a Action) String() string {
	var names []string
	for _, one := range [...]struct {
		action Action
		name   string
	}{{Pull, "pull"}, {Push, "push"}, {Delete, "delete"}} {
		if a&one.action != 0 {
			names = append(names, one.name)
		}
	}
	return strings.Join(names, " and ")
}

// MaxIdentity is the longest name of a caller, in bytes. A distinguished name of
// a certificate fits.
const MaxIdentity = 512

// A Caller is who asks.
type Caller struct {
	// Identity is the name that an authenticator has found out; empty: none has,
	// and the caller is anonymous.
	Identity string
	// Addr is where the request comes from; the zero Addr: nobody knows.
	Addr netip.Addr
	// Err is why it could not be found out who asks. Then nothing is allowed.
	Err error
}

// A Who says whom a rule is about.
type Who struct {
	kind     whoKind
	user     string
	networks []netip.Prefix
}

type whoKind int

const (
	anyone whoKind = iota
	authenticated
	user
	network
)

// privateRanges are what Caddy means by private_ranges.
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("fd00::/8"),
	netip.MustParsePrefix("::1/128"),
}

// ParseWho reads `anyone`, `authenticated`, `user:<name>`, `net:<cidr>` or
// `net:private_ranges`. A network can be a single address.
func ParseWho(s string) (Who, error) {
	switch kind, value, valued := strings.Cut(s, ":"); {
	case s == "anyone":
		return Who{}, nil
	case s == "authenticated":
		return Who{kind: authenticated}, nil
	case kind == "user" && value != "":
		if len(value) > MaxIdentity {
			return Who{}, fmt.Errorf("%.50q...: no name is longer than %d bytes", s, MaxIdentity)
		}
		return Who{kind: user, user: value}, nil
	case s == "net:private_ranges":
		return Who{kind: network, networks: privateRanges}, nil
	case kind == "net" && valued:
		prefix, err := netip.ParsePrefix(value)
		if addr, addrErr := netip.ParseAddr(value); addrErr == nil && addr.Zone() == "" {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			return Who{}, fmt.Errorf("%.100q is no network; write net:10.0.0.0/8, net:fd00::/8 or net:private_ranges", s)
		}
		if prefix.Addr().Is4In6() {
			return Who{}, fmt.Errorf("%.100q: write the IPv4 network itself, as in net:10.0.0.0/8", s)
		}
		return Who{kind: network, networks: []netip.Prefix{prefix.Masked()}}, nil
	}
	return Who{}, fmt.Errorf("%.100q says nobody; write anyone, authenticated, user:<name>, net:<cidr> or net:private_ranges", s)
}

// is reports whether the caller is meant by a rule. One whose address nobody
// knows is in every network that is denied something, and in none that is
// allowed it.
func (w Who) is(c Caller, allow bool) bool {
	switch w.kind {
	case authenticated:
		return c.Identity != ""
	case user:
		return c.Identity == w.user
	case network:
		if !c.Addr.IsValid() {
			return !allow
		}
		addr := c.Addr.Unmap().WithZone("") // no network contains one with a zone
		for _, prefix := range w.networks {
			if prefix.Contains(addr) {
				return true
			}
		}
		return false
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

// Check reports what is wrong with a rule by itself.
func (r Rule) Check() error {
	switch {
	case r.Actions == 0:
		return errors.New("no action; there are pull, push, delete and any")
	case r.Allow && r.Actions&^Pull != 0 && len(r.To) == 0:
		// Writing must not be open to everybody by something left out.
		return fmt.Errorf("allow %s needs `to`: name who may %[1]s, as in `to authenticated` or `to user:ci`; or write `to anyone`, and everyone who reaches this site may", r.Actions&^Pull)
	case len(r.To) > 1 && slices.ContainsFunc(r.To, func(w Who) bool { return w.kind == anyone }):
		return errors.New("anyone includes everybody else that is named beside it")
	}
	return nil
}

// everyone reports whether a rule is about every caller.
func (r *Rule) everyone() bool { return len(r.To) == 0 || r.To[0].kind == anyone }

// everywhere reports whether a rule is about every repository.
func (r *Rule) everywhere() bool {
	return len(r.On) == 0 || slices.ContainsFunc(r.On, func(p oci.Pattern) bool { return len(p) == 1 && p[0] == "**" })
}

// Rules are in order: the first that matches decides, and what none matches is
// denied. Nil Rules, for a site that has none, let anyone pull what is mirrored
// and nobody do anything else.
type Rules []Rule

// Check reports what is wrong with rules, and what cannot be meant: one that
// never decides anything because those before it leave nothing to it.
func (r Rules) Check() error {
	var settled Action // for everyone and everywhere
	for i, rule := range r {
		if err := rule.Check(); err != nil {
			return fmt.Errorf("rules[%d]: %w", i, err)
		}
		if rule.Actions&^settled == 0 {
			return fmt.Errorf("rules[%d] never decides anything: a rule before it settles %s for everyone; put the narrower rule first", i, rule.Actions)
		}
		if rule.everyone() && rule.everywhere() {
			settled |= rule.Actions
		}
	}
	return nil
}

// Open reports whether anyone, from anywhere and without a name, may do one
// thing with some repository.
func (r Rules) Open(a Action) bool {
	if r == nil {
		return a == Pull
	}
	return r.allows(a, func(rule *Rule) bool { return rule.everyone() })
}

// Named reports whether someone may do one thing because of the name that an
// authenticator has found out.
func (r Rules) Named(a Action) bool {
	return r.allows(a, func(rule *Rule) bool {
		return slices.ContainsFunc(rule.To, func(w Who) bool { return w.kind == authenticated || w.kind == user })
	})
}

// Anywhere reports whether there may be a repository that a caller may do one thing
// with.
func (r Rules) Anywhere(c Caller, a Action) bool {
	if c.Err != nil {
		return false
	}
	for i := range r {
		rule := &r[i]
		if rule.Actions&a == 0 || !rule.means(c) {
			continue
		}
		if rule.Allow {
			return true
		}
		if rule.everywhere() {
			return false
		}
	}
	return false
}

// allows reports whether a rule of a kind allows something, and those before it
// do not settle it.
func (r Rules) allows(a Action, kind func(*Rule) bool) bool {
	for i := range r {
		rule := &r[i]
		if rule.Actions&a == 0 {
			continue
		}
		if rule.Allow && kind(rule) {
			return true
		}
		if rule.everyone() && rule.everywhere() {
			return false
		}
	}
	return false
}

// A Verdict is what rules say.
type Verdict struct {
	Allowed bool
	// Explicit says that the rule that decided names the repository, or where it
	// lies: by a pattern whose first component is no wildcard.
	Explicit bool
}

// Decide says whether a caller may do one thing with a repository. It is named
// as this site's clients ask for it by its path: a mirrored one begins with the
// path name of its registry.
func (r Rules) Decide(c Caller, a Action, repository string, hosted bool) Verdict {
	if r == nil {
		return Verdict{Allowed: a == Pull && !hosted}
	}
	if c.Err != nil {
		return Verdict{}
	}
	for i := range r {
		rule := &r[i]
		if rule.Actions&a == 0 || !rule.means(c) {
			continue
		}
		if matches, explicit := rule.about(repository); matches {
			return Verdict{Allowed: rule.Allow, Explicit: explicit}
		}
	}
	return Verdict{}
}

func (r *Rule) means(c Caller) bool {
	for i := range r.To {
		if r.To[i].is(c, r.Allow) {
			return true
		}
	}
	return len(r.To) == 0
}

// about reports whether a repository is meant, and whether one of the patterns
// that fit names where it lies.
func (r *Rule) about(repository string) (matches, explicit bool) {
	for _, pattern := range r.On {
		if pattern.Match(repository) {
			matches = true
			if !strings.HasPrefix(pattern[0], "*") {
				return true, true
			}
		}
	}
	return matches || len(r.On) == 0, false
}
