package caddyfile

import (
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-registry/mirror/module"
)

// parseHosted reads the options of hosted repositories, behind those of earlier
// patterns.
func parseHosted(d *caddyfile.Dispenser, earlier []*module.Hosted) ([]*module.Hosted, error) {
	h := new(module.Hosted)
	if !d.AllArgs(&h.Pattern) {
		return nil, d.ArgErr()
	}
	all := append(earlier, h)
	// In the line that is wrong, where only one can be.
	if err := module.CheckHosted(all); err != nil {
		return nil, d.Errf("hosted %s: %v", h.Pattern, err)
	}
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if option != "keep" && option != "newer" {
			if err := seen.once(d); err != nil {
				return nil, err
			}
		}
		var err error
		switch option {
		case "max_size":
			err = parseSize(d, &h.MaxSize, h.Check)
		case "max_manifest_size":
			err = parseSize(d, &h.MaxManifestSize, h.Check)
		case "delete":
			err = parseWord(d, &h.Delete)
		case "immutable":
			if h.Immutable = d.RemainingArgs(); len(h.Immutable) == 0 {
				err = d.ArgErr()
			}
		case "require_blobs":
			err = parseWord(d, &h.RequireBlobs)
		case "keep", "newer":
			var rule *module.Retention
			if rule, err = parseRetention(d); err == nil {
				h.Retention = append(h.Retention, rule)
			}
		default:
			err = d.Errf("unrecognized option %q of hosted", option)
		}
		if err == nil {
			if err = h.Check(); err != nil {
				err = d.WrapErr(err)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// parseWord reads an option that is on or off.
func parseWord(d *caddyfile.Dispenser, into *string) error {
	option := d.Val()
	if !d.AllArgs(into) {
		return d.ArgErr()
	}
	if *into != "on" && *into != "off" {
		return d.Errf("%s is on or off, not %q", option, *into)
	}
	return nil
}

// parseRetention reads a rule that says which tags are kept.
//
//	keep  <n>        [on <tag-pattern...>]
//	newer <duration> [on <tag-pattern...>]
func parseRetention(d *caddyfile.Dispenser) (*module.Retention, error) {
	r := new(module.Retention)
	option, args := d.Val(), d.RemainingArgs()
	if len(args) == 0 || len(args) > 1 && (args[1] != "on" || len(args) == 2) {
		return nil, d.ArgErr()
	}
	if len(args) > 1 {
		r.On = args[2:]
	}
	var err error
	if option == "keep" {
		if r.Keep, err = strconv.Atoi(args[0]); err != nil || r.Keep < 1 {
			return nil, d.Errf("keep: %q is no number of tags from 1 on", args[0])
		}
		return r, nil
	}
	if r.Newer, err = parseDuration(d, args[0]); err != nil {
		return nil, err
	}
	if r.Newer == 0 {
		return nil, d.Err("newer: no tag is newer than 0")
	}
	return r, nil
}
