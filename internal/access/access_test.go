package access

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
)

// rule reads a rule as a Caddyfile has it.
func rule(t testing.TB, line string) Rule {
	t.Helper()
	words := strings.Fields(line)
	r := Rule{Allow: words[0] == "allow"}
	into := ""
	for _, word := range words[1:] {
		var err error
		switch {
		case word == "to", word == "on":
			into = word
		case into == "to":
			var who Who
			who, err = ParseWho(word)
			r.To = append(r.To, who)
		case into == "on":
			var pattern oci.Pattern
			pattern, err = oci.ParsePattern(word)
			r.On = append(r.On, pattern)
		default:
			var action Action
			action, err = ParseAction(word)
			r.Actions |= action
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func rules(t testing.TB, lines ...string) Rules {
	t.Helper()
	r := Rules{}
	for _, line := range lines {
		r = append(r, rule(t, line))
	}
	return r
}

func at(addr string) Caller { return Caller{Addr: netip.MustParseAddr(addr)} }

func TestDecide(t *testing.T) {
	bob, eve := Caller{Identity: "bob", Addr: netip.MustParseAddr("203.0.113.9")}, Caller{Identity: "eve", Addr: netip.MustParseAddr("10.1.2.3")}
	const (
		no       = "denied"
		yes      = "allowed"
		explicit = "explicit"
	)
	for name, c := range map[string]struct {
		rules  Rules
		caller Caller
		action Action
		on     string
		hosted bool
		want   string
	}{
		"no rules, mirrored":             {rules: nil, action: Pull, on: "docker.io/library/nginx", want: yes},
		"no rules, hosted":               {rules: nil, caller: bob, action: Pull, on: "apps/web", hosted: true, want: no},
		"no rules, push":                 {rules: nil, caller: bob, action: Push, on: "apps/web", hosted: true, want: no},
		"no rules, delete":               {rules: nil, caller: bob, action: Delete, on: "docker.io/library/nginx", want: no},
		"empty rules":                    {rules: Rules{}, caller: bob, action: Pull, on: "docker.io/library/nginx", want: no},
		"none matches":                   {rules: rules(t, "allow pull on apps/**"), action: Pull, on: "other/web", hosted: true, want: no},
		"anyone pulls hosted":            {rules: rules(t, "allow pull"), action: Pull, on: "apps/web", hosted: true, want: yes},
		"pull is not push":               {rules: rules(t, "allow pull"), caller: bob, action: Push, on: "apps/web", hosted: true, want: no},
		"push is not delete":             {rules: rules(t, "allow push to user:bob"), caller: bob, action: Delete, on: "apps/web", hosted: true, want: no},
		"push is not pull":               {rules: rules(t, "allow push to user:bob"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: no},
		"any is delete":                  {rules: rules(t, "allow any to user:bob"), caller: bob, action: Delete, on: "apps/web", hosted: true, want: yes},
		"two actions":                    {rules: rules(t, "allow push delete to user:bob"), caller: bob, action: Delete, on: "apps/web", hosted: true, want: yes},
		"the first decides, deny":        {rules: rules(t, "deny pull on apps/secret", "allow pull"), caller: bob, action: Pull, on: "apps/secret", hosted: true, want: no},
		"the first decides, allow":       {rules: rules(t, "allow pull to user:bob on apps/secret", "deny pull on apps/secret", "allow pull"), caller: bob, action: Pull, on: "apps/secret", hosted: true, want: explicit},
		"another is denied":              {rules: rules(t, "allow pull to user:bob on apps/secret", "deny pull on apps/secret", "allow pull"), caller: eve, action: Pull, on: "apps/secret", hosted: true, want: no},
		"a deny of another action":       {rules: rules(t, "deny push delete", "allow any to user:bob"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: yes},
		"authenticated":                  {rules: rules(t, "allow pull to authenticated"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: yes},
		"anonymous is not authenticated": {rules: rules(t, "allow pull to authenticated"), caller: at("10.1.2.3"), action: Pull, on: "apps/web", hosted: true, want: no},
		"a user by name":                 {rules: rules(t, "allow pull to user:bob"), caller: eve, action: Pull, on: "apps/web", hosted: true, want: no},
		"a name's case":                  {rules: rules(t, "allow pull to user:Bob"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: no},
		"one of several":                 {rules: rules(t, "allow pull to user:eve user:bob"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: yes},
		"a colon in a name":              {rules: rules(t, "allow pull to user:CN=bob:1"), caller: Caller{Identity: "CN=bob:1"}, action: Pull, on: "apps/web", hosted: true, want: yes},
		"a network":                      {rules: rules(t, "allow pull to net:10.0.0.0/8"), caller: eve, action: Pull, on: "apps/web", hosted: true, want: yes},
		"outside of a network":           {rules: rules(t, "allow pull to net:10.0.0.0/8"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: no},
		"an address":                     {rules: rules(t, "allow pull to net:203.0.113.9"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: yes},
		"an IPv4 address in IPv6":        {rules: rules(t, "allow pull to net:10.0.0.0/8"), caller: at("::ffff:10.1.2.3"), action: Pull, on: "apps/web", hosted: true, want: yes},
		"an address with a zone":         {rules: rules(t, "deny pull to net:fe80::/10", "allow pull"), caller: at("fe80::1%eth0"), action: Pull, on: "apps/web", hosted: true, want: no},
		"a masked network":               {rules: rules(t, "allow pull to net:10.9.9.9/8"), caller: eve, action: Pull, on: "apps/web", hosted: true, want: yes},
		"private ranges":                 {rules: rules(t, "allow pull to net:private_ranges"), caller: at("fd12::1"), action: Pull, on: "apps/web", hosted: true, want: yes},
		"not of private ranges":          {rules: rules(t, "allow pull to net:private_ranges"), caller: at("172.32.0.1"), action: Pull, on: "apps/web", hosted: true, want: no},
		"no address, allowed":            {rules: rules(t, "allow pull to net:0.0.0.0/0 net:::/0"), caller: Caller{Identity: "bob"}, action: Pull, on: "apps/web", hosted: true, want: no},
		"no address, denied":             {rules: rules(t, "deny pull to net:192.0.2.0/24", "allow pull"), caller: Caller{Identity: "bob"}, action: Pull, on: "apps/web", hosted: true, want: no},
		"another address, denied":        {rules: rules(t, "deny pull to net:192.0.2.0/24", "allow pull"), caller: bob, action: Pull, on: "apps/web", hosted: true, want: yes},
		"nobody knows who":               {rules: rules(t, "allow any to anyone"), caller: Caller{Err: errors.New("?")}, action: Pull, on: "apps/web", hosted: true, want: no},
		"one component":                  {rules: rules(t, "allow pull on apps/*"), action: Pull, on: "apps/a/b", hosted: true, want: no},
		"several patterns":               {rules: rules(t, "allow pull on apps/* team/**"), action: Pull, on: "team/a/b", hosted: true, want: explicit},
		"everything is not explicit":     {rules: rules(t, "allow pull on **"), action: Pull, on: "ghcr.io/corp/app", want: yes},
		"a wildcard is not explicit":     {rules: rules(t, "allow pull on */corp/**"), action: Pull, on: "ghcr.io/corp/app", want: yes},
		"one of two is explicit":         {rules: rules(t, "allow pull on */corp/** ghcr.io/**"), action: Pull, on: "ghcr.io/corp/app", want: explicit},
		"the other is explicit":          {rules: rules(t, "allow pull on ** ghcr.io/**"), action: Pull, on: "quay.io/corp/app", want: yes},
	} {
		t.Run(name, func(t *testing.T) {
			v := c.rules.Decide(c.caller, c.action, c.on, c.hosted)
			got := map[Verdict]string{{}: no, {Explicit: true}: no, {Allowed: true}: yes, {Allowed: true, Explicit: true}: explicit}[v]
			if got != c.want {
				t.Errorf("%+v, want it %s", v, c.want)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		rules Rules
		want  string // in the error; "": none
	}{
		{rules(t, "allow pull"), ""},
		{rules(t, "deny any"), ""},
		{rules(t, "allow push delete to anyone"), ""},
		{rules(t, "allow any to net:10.0.0.0/8"), ""},
		{rules(t, "allow pull to user:a", "allow pull to user:b", "deny pull", "allow push to user:a"), ""},
		{rules(t, "allow pull on a/**", "allow pull"), ""},
		{rules(t, "allow pull", "allow any to authenticated"), ""}, // the rest of any
		{rules(t, "allow push"), "allow push needs `to`"},
		{rules(t, "allow delete on apps/**"), "allow delete needs `to`"},
		{rules(t, "allow any"), "allow push and delete needs `to`"},
		{rules(t, "allow pull push"), "allow push needs `to`"},
		{rules(t, "allow pull to anyone user:a"), "anyone includes"},
		{rules(t, "allow pull to user:a anyone"), "anyone includes"},
		{Rules{{Allow: true}}, "no action"},
		{rules(t, "allow pull", "deny pull to user:a"), "rules[1] never decides"},
		{rules(t, "allow pull on **", "deny pull on a/b"), "rules[1] never decides"},
		{rules(t, "allow pull to anyone", "allow push to user:a", "deny pull on a/b"), "rules[2] never decides"},
		{rules(t, "allow pull", "allow push delete to anyone", "deny any"), "rules[2] never decides anything: a rule before it settles pull and push and delete"},
	} {
		err := c.rules.Check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v, want %q", c.rules, err, c.want)
		}
	}
}

// TestOpen is what a site lets people do of whom nothing is known, and what only
// those with a name.
func TestAnywhere(t *testing.T) {
	bob, eve := Caller{Identity: "bob"}, Caller{Identity: "eve"}
	for _, c := range []struct {
		rules  Rules
		caller Caller
		want   bool
	}{
		{nil, bob, false},
		{rules(t, "allow push to user:bob on a/**"), bob, true},
		{rules(t, "allow push to user:bob on a/**"), eve, false},
		{rules(t, "allow pull to user:bob"), bob, false},
		{rules(t, "deny push on a/**", "allow push to user:bob"), bob, true},
		{rules(t, "deny push", "allow push to user:bob"), bob, false},
		{rules(t, "deny push to user:eve", "allow push to user:bob"), bob, true},
		{rules(t, "allow push to anyone"), Caller{Err: errors.New("who?")}, false},
	} {
		if got := c.rules.Anywhere(c.caller, Push); got != c.want {
			t.Errorf("%+v may push something by %+v: %t", c.caller, c.rules, got)
		}
	}
}

func TestOpen(t *testing.T) {
	for _, c := range []struct {
		rules      Rules
		action     Action
		open, name bool
	}{
		{nil, Pull, true, false},
		{nil, Push, false, false},
		{Rules{}, Pull, false, false},
		{rules(t, "allow pull"), Pull, true, false},
		{rules(t, "allow pull on a/**"), Pull, true, false},
		{rules(t, "allow pull to net:10.0.0.0/8"), Pull, false, false},
		{rules(t, "allow pull to authenticated"), Pull, false, true},
		{rules(t, "allow pull", "allow push to user:ci"), Push, false, true},
		{rules(t, "allow any to anyone"), Delete, true, false},
		{rules(t, "deny pull to net:10.0.0.0/8", "allow pull"), Pull, true, false},
		{rules(t, "deny push", "allow any to anyone"), Push, false, false},
		{rules(t, "deny push", "allow any to user:a"), Push, false, false},
		{rules(t, "deny push on a/**", "allow push to net:10.0.0.0/8 user:a"), Push, false, true},
	} {
		if open, name := c.rules.Open(c.action), c.rules.Named(c.action); open != c.open || name != c.name {
			t.Errorf("%+v: %s is open %v and for names %v, want %v and %v", c.rules, c.action, open, name, c.open, c.name)
		}
	}
}

func TestParse(t *testing.T) {
	for _, s := range []string{
		"", "any", "Anyone", "user", "user:", "net", "net:", "net:10.0.0.0/33", "net:private", "net:fe80::1%eth0", "net:fe80::%eth0/10",
		"net:::ffff:10.0.0.0/104", "group:dev", "user:" + strings.Repeat("x", MaxIdentity+1),
	} {
		if who, err := ParseWho(s); err == nil {
			t.Errorf("%.40q is %+v", s, who)
		} else if len(err.Error()) > 300 {
			t.Errorf("%.40q: an error of %d bytes", s, len(err.Error()))
		}
	}
	for _, s := range []string{"", "Pull", "read", "pull,push", "to"} {
		if action, err := ParseAction(s); err == nil {
			t.Errorf("%q is %v", s, action)
		}
	}
}

// TestDecideAllocates nothing: it is asked at every request.
func TestDecideAllocates(t *testing.T) {
	r := rules(t, "deny pull to net:192.0.2.0/24", "allow pull to user:a user:b on team/*/web apps/**", "allow pull to net:private_ranges on **/public/**")
	c := Caller{Identity: "eve", Addr: netip.MustParseAddr("10.1.2.3")}
	if n := testing.AllocsPerRun(100, func() {
		if !r.Decide(c, Pull, "docker.io/library/public/nginx", false).Allowed {
			t.Error("denied")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
