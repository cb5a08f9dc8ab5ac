package oci

import (
	"fmt"
	"strings"
)

// A Pattern matches repository names: "*" stands for one component, "**" for
// any number of them, none included, and anything else for itself.
type Pattern []string

// ParsePattern reads a pattern such as apps/** or team/*/web.
func ParsePattern(s string) (Pattern, error) {
	p := Pattern(strings.Split(s, "/"))
	for _, part := range p {
		if part != "*" && part != "**" && !ValidComponent(part) {
			return nil, fmt.Errorf("%q is no pattern of repository names: %q is neither a component of a name, * nor **", s, part)
		}
	}
	return p, nil
}

func (p Pattern) String() string { return strings.Join(p, "/") }

// Match reports whether a repository name fits the pattern. It allocates
// nothing: rules ask it at every request.
func (p Pattern) Match(name string) bool { return match(p, name, true) }

// match matches what is left of a name; left is false if nothing is.
func match(pattern Pattern, name string, left bool) bool {
	for len(pattern) > 0 {
		if pattern[0] == "**" {
			for !match(pattern[1:], name, left) {
				if !left {
					return false
				}
				_, name, left = strings.Cut(name, "/")
			}
			return true
		}
		if !left {
			return false
		}
		var first string
		if first, name, left = strings.Cut(name, "/"); pattern[0] != "*" && pattern[0] != first {
			return false
		}
		pattern = pattern[1:]
	}
	return !left
}

// Overlaps reports whether a name may fit both patterns.
func (p Pattern) Overlaps(q Pattern) bool {
	// meet[j] says of the rest of p and of q[j:] whether a name fits both.
	meet := make([]bool, len(q)+1)
	for i := len(p); i >= 0; i-- {
		below := meet
		meet = make([]bool, len(q)+1)
		for j := len(q); j >= 0; j-- {
			more, other := i < len(p), j < len(q)
			switch {
			case !more && !other:
				meet[j] = true
			case more && p[i] == "**":
				meet[j] = below[j] || other && meet[j+1]
			case other && q[j] == "**":
				meet[j] = meet[j+1] || more && below[j]
			case more && other && (p[i] == "*" || q[j] == "*" || p[i] == q[j]):
				meet[j] = below[j+1]
			}
		}
	}
	return meet[0]
}

// Covers reports whether every name that fits q fits p. It may miss that two or
// more parts of p together do what one of q does.
func (p Pattern) Covers(q Pattern) bool { return covers(p, q) }

func covers(p, q []string) bool {
	for len(p) > 0 {
		if p[0] == "**" {
			for i := range len(q) + 1 {
				if covers(p[1:], q[i:]) {
					return true
				}
			}
			return false
		}
		if len(q) == 0 || q[0] == "**" || p[0] != "*" && p[0] != q[0] {
			return false
		}
		p, q = p[1:], q[1:]
	}
	return len(q) == 0
}

// A TagPattern matches tags: "*" stands for any characters, none included, and
// anything else for itself.
type TagPattern string

// ParseTagPattern reads a pattern such as v* or release-*-final.
func ParseTagPattern(s string) (TagPattern, error) {
	if !ValidTag(strings.ReplaceAll(s, "*", "x")) {
		return "", fmt.Errorf("%.150q is no pattern of tags: want what a tag may have, and * for any of it", s)
	}
	return TagPattern(s), nil
}

// Match reports whether a tag fits the pattern.
func (p TagPattern) Match(tag string) bool {
	parts := strings.Split(string(p), "*")
	first, last := parts[0], parts[len(parts)-1]
	if len(parts) == 1 {
		return tag == first
	}
	if len(tag) < len(first)+len(last) || !strings.HasPrefix(tag, first) || !strings.HasSuffix(tag, last) {
		return false
	}
	tag = tag[len(first) : len(tag)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(tag, part)
		if i < 0 {
			return false
		}
		tag = tag[i+len(part):]
	}
	return true
}
