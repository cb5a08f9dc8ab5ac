package oci

import (
	"strings"
	"testing"
)

func TestPattern(t *testing.T) {
	for _, c := range []struct {
		pattern string
		match   string // separated by spaces
		differ  string
	}{
		{"apps", "apps", "app apps/web apps2 web/apps"},
		{"apps/web", "apps/web", "apps apps/web/x apps/webs x/apps/web"},
		{"apps/*", "apps/web apps/x", "apps apps/web/x app/web"},
		{"apps/**", "apps apps/web apps/web/x/y", "app apps2/web x/apps"},
		{"*", "apps web", "apps/web"},
		{"*/web", "apps/web x/web", "web apps/web/x a/b/web"},
		{"**", "apps apps/web a/b/c/d", ""},
		{"**/web", "web apps/web a/b/web", "webs web/x"},
		{"**/web/**", "web a/web web/a a/web/b/c", "a/webs/b"},
		{"team/*/web", "team/a/web", "team/web team/a/b/web team/a/web/x"},
		{"team/**/web", "team/web team/a/web team/a/b/web", "team web team/webs"},
		{"**/**", "a a/b", ""},
		{"a/**/b/**/c", "a/b/c a/x/b/c a/b/x/c a/b/b/c/c", "a/c/b a/b a/c"},
		{"a.b/c-d", "a.b/c-d", "axb/c-d"},
	} {
		p, err := ParsePattern(c.pattern)
		if err != nil {
			t.Errorf("%s: %v", c.pattern, err)
			continue
		}
		if p.String() != c.pattern {
			t.Errorf("%s prints as %s", c.pattern, p)
		}
		for name := range strings.FieldsSeq(c.match) {
			if !p.Match(name) {
				t.Errorf("%s does not match %s", c.pattern, name)
			}
		}
		for name := range strings.FieldsSeq(c.differ) {
			if p.Match(name) {
				t.Errorf("%s matches %s", c.pattern, name)
			}
		}
	}
	for _, s := range []string{"", "/", "/apps", "apps/", "a//b", "Apps", "apps/we*", "***", "apps/***", "a:b", "../x", "a b", "[a]", "?"} {
		if p, err := ParsePattern(s); err == nil {
			t.Errorf("ParsePattern(%q) = %v, want an error", s, p)
		}
	}
}

func TestPatterns(t *testing.T) {
	for _, c := range []struct {
		p, q                      string
		overlaps, covers, covered bool
	}{
		{"apps/**", "apps/**", true, true, true},
		{"apps/**", "apps/web", true, true, false},
		{"apps/**", "apps", true, true, false},
		{"apps/*", "apps/**", true, false, true},
		{"apps/*", "apps/web/**", true, false, false},
		{"apps/*", "apps/*/x", false, false, false},
		{"**", "*", true, true, false},
		{"**", "a/**/b", true, true, false},
		{"*/web", "apps/*", true, false, false},
		{"**/web", "apps/**", true, false, false},
		{"**/web", "apps/**/db", false, false, false},
		{"apps/**/web", "apps/web/**", true, false, false},
		{"apps", "libs", false, false, false},
		{"a/*/c", "a/b/*", true, false, false},
		{"a/**/c", "a/*/c", true, true, false},
		{"a/b", "a/b/c", false, false, false},
	} {
		p, _ := ParsePattern(c.p)
		q, _ := ParsePattern(c.q)
		if p.Overlaps(q) != c.overlaps || q.Overlaps(p) != c.overlaps {
			t.Errorf("%s and %s overlap: %v, %v", p, q, p.Overlaps(q), q.Overlaps(p))
		}
		if p.Covers(q) != c.covers || q.Covers(p) != c.covered {
			t.Errorf("%s covers %s: %v; the other way round: %v", p, q, p.Covers(q), q.Covers(p))
		}
	}
}

func TestTagPattern(t *testing.T) {
	for _, c := range []struct {
		pattern, match, differ string // separated by spaces
	}{
		{"v1", "v1", "v v11 xv1"},
		{"v*", "v v1 v1.2-rc", "x xv"},
		{"*-final", "-final x-final", "final x-finals"},
		{"r*-*-final", "r1-2-final r--final", "r-final 1-2-final"},
		{"*", "a 1", ""},
		{"a*a", "aa aba", "a ab"},
		{"*ab*ab*", "abab xabxabx", "ab xab aba"},
	} {
		p, err := ParseTagPattern(c.pattern)
		if err != nil {
			t.Errorf("%s: %v", c.pattern, err)
			continue
		}
		for tag := range strings.FieldsSeq(c.match) {
			if !p.Match(tag) {
				t.Errorf("%s does not match %s", c.pattern, tag)
			}
		}
		for tag := range strings.FieldsSeq(c.differ) {
			if p.Match(tag) {
				t.Errorf("%s matches %s", c.pattern, tag)
			}
		}
	}
	for _, bad := range []string{"", "-x", "a/b", "a:b", "v?", ".x", strings.Repeat("a", 129)} {
		if _, err := ParseTagPattern(bad); err == nil {
			t.Errorf("%q is taken for a pattern", bad)
		}
	}
}
