package module

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
)

// Access says who may do what on a site. Without it anyone may pull what is
// mirrored, and nobody anything that is hosted.
type Access struct {
	// The placeholder that has the name of who asks, as an authenticator in front
	// of this handler sets it; empty means anonymous. Default:
	// `{http.auth.user.id}`.
	Identity string `json:"identity,omitempty"`

	// The first rule that matches decides; what none matches is denied.
	Rules []AccessRule `json:"rules,omitempty"`
}

// AccessRule allows something, or denies it.
type AccessRule struct {
	// `allow` or `deny`.
	Effect string `json:"effect"`

	// `pull`, `push`, `delete`, or `any` for all of them.
	Actions []string `json:"actions"`

	// `anyone`, `authenticated`, `user:<name>`, `net:<cidr>` or
	// `net:private_ranges`. Default: anyone.
	To []string `json:"to,omitempty"`

	// Names of repositories as a path of this site has them, as patterns: `*` is
	// one component and `**` any number of them. Default: all.
	On []string `json:"on,omitempty"`
}

// Parse is the rule as it is meant, or what is wrong with it.
func (r *AccessRule) Parse() (access.Rule, error) {
	rule := access.Rule{Allow: r.Effect == "allow"}
	if !rule.Allow && r.Effect != "deny" {
		return rule, fmt.Errorf("effect %q is neither allow nor deny", r.Effect)
	}
	if len(r.Actions) == 0 {
		return rule, errors.New("no action; there are pull, push, delete and any")
	}
	for _, name := range r.Actions {
		action, err := access.ParseAction(name)
		if err != nil {
			return rule, err
		}
		rule.Actions |= action
	}
	for _, name := range r.To {
		who, err := access.ParseWho(name)
		if err != nil {
			return rule, err
		}
		rule.To = append(rule.To, who)
	}
	for _, name := range r.On {
		pattern, err := oci.ParsePattern(name)
		if err != nil {
			return rule, err
		}
		rule.On = append(rule.On, pattern)
	}
	return rule, nil
}

// rules are those of a site; nil: it has none.
func (a *Access) rules() (access.Rules, error) {
	if a == nil {
		return nil, nil
	}
	rules := access.Rules{}
	for i := range a.Rules {
		rule, err := a.Rules[i].Parse()
		if err != nil {
			return nil, fmt.Errorf("access: rules[%d]: %w", i, err)
		}
		rules = append(rules, rule)
	}
	return rules, nil
}

// caller finds out who asks: as an authenticator says, and where from as Caddy
// sees it behind trusted proxies.
func (a *Access) caller(r *http.Request) access.Caller {
	if a == nil {
		return access.Caller{}
	}
	identity := "{http.auth.user.id}"
	if a.Identity != "" {
		identity = a.Identity
	}
	var c access.Caller
	if replacer, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		c.Identity = replacer.ReplaceAll(identity, "")
	}
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	if addr, err := netip.ParseAddr(ip); err == nil {
		c.Addr = addr
	}
	return c
}
