package caddyfile

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-registry/mirror/module"
)

// parseAccess reads the rules of a site.
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
		case "allow", "deny":
			rule := module.AccessRule{Effect: d.Val()}
			for into := &rule.Actions; d.NextArg(); {
				switch d.Val() {
				case "to":
					into = &rule.To
				case "on":
					into = &rule.On
				default:
					*into = append(*into, d.Val())
				}
			}
			if _, err := rule.Parse(); err != nil {
				return nil, d.WrapErr(err)
			}
			a.Rules = append(a.Rules, rule)
		default:
			return nil, d.Errf("unrecognized option %q of access", d.Val())
		}
	}
	return a, nil
}
