package caddyfile

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-registry/mirror/module"
)

// parseAccess reads the rules of a site. Each is checked where it stands, against
// those before it.
func parseAccess(d *caddyfile.Dispenser) (*module.Access, error) {
	if d.NextArg() {
		return nil, d.ArgErr()
	}
	a := new(module.Access)
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		switch d.Val() {
		case "identity":
			if err := seen.once(d); err != nil {
				return nil, err
			}
			if !d.AllArgs(&a.Identity) {
				return nil, d.ArgErr()
			}
			if err := a.CheckIdentity(); err != nil {
				return nil, d.WrapErr(err)
			}
		case "allow", "deny":
			rule, err := parseRule(d)
			if err != nil {
				return nil, err
			}
			a.Rules = append(a.Rules, rule)
			if err := a.Check(); err != nil {
				return nil, d.WrapErr(err)
			}
		default:
			return nil, d.Errf("unrecognized option %q of access", d.Val())
		}
	}
	if err := a.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return a, nil
}

// parseRule reads one rule: actions, and in either order to whom and on what.
func parseRule(d *caddyfile.Dispenser) (module.AccessRule, error) {
	rule := module.AccessRule{Effect: d.Val()}
	word, into := "", &rule.Actions
	valued := func() error {
		if word != "" && len(*into) == 0 {
			return d.Errf("%s: nothing follows %q", rule.Effect, word)
		}
		return nil
	}
	for d.NextArg() {
		var next *[]string
		switch d.Val() {
		case "to":
			next = &rule.To
		case "on":
			next = &rule.On
		default:
			*into = append(*into, d.Val())
			continue
		}
		if err := valued(); err != nil {
			return rule, err
		}
		if len(*next) > 0 {
			return rule, d.Errf("%s: %q is given twice", rule.Effect, d.Val())
		}
		word, into = d.Val(), next
	}
	return rule, valued()
}
