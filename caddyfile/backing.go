package caddyfile

import (
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/module"
)

// parseBackingImages reads the app's options of backing images.
func parseBackingImages(d *caddyfile.Dispenser) (*module.BackingImages, error) {
	if d.NextArg() {
		return nil, d.ArgErr()
	}
	b := new(module.BackingImages)
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if option != "longhorn" {
			if err := seen.once(d); err != nil {
				return nil, err
			}
		}
		var err error
		switch option { // in the line that is wrong, where only one can be
		case "prefix":
			err = parseText(d, &b.Prefix)
		case "public_url":
			err = parseText(d, &b.PublicURL)
		case "longhorn":
			var l *module.Longhorn
			if l, err = parseLonghorn(d); err == nil {
				b.Longhorn = append(b.Longhorn, l)
			}
		case "longhorn_compat":
			err = parseText(d, &b.LonghornCompat)
		case "max_size":
			err = parseSize(d, &b.MaxSize, func() error { return nil })
		case "max_image_size":
			err = parseSize(d, &b.MaxImageSize, func() error { return nil })
		case "allow_private":
			b.AllowPrivate, err = parseFlag(d)
		default:
			err = d.Errf("unrecognized option %q of backing_images", option)
		}
		if err != nil {
			return nil, err
		}
		if err := b.CheckEach(); err != nil {
			return nil, d.WrapErr(err)
		}
	}
	if err := b.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return b, nil
}

// parseText reads an option of one word that is not empty.
func parseText(d *caddyfile.Dispenser, into *string) error {
	option := d.Val()
	if !d.AllArgs(into) {
		return d.ArgErr()
	}
	if *into == "" {
		return d.Errf("%s is empty", option)
	}
	return nil
}

// parseLonghorn reads a cluster.
//
//	longhorn <name> <url> {
//		token <token>
//		mode  download|upload
//	}
func parseLonghorn(d *caddyfile.Dispenser) (*module.Longhorn, error) {
	l := new(module.Longhorn)
	if !d.AllArgs(&l.Name, &l.URL) {
		return nil, d.ArgErr()
	}
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if err := seen.once(d); err != nil {
			return nil, err
		}
		var err error
		switch option {
		case "token":
			err = parseText(d, &l.Token)
		case "mode":
			err = parseText(d, &l.Mode)
		default:
			err = d.Errf("unrecognized option %q of longhorn", option)
		}
		if err != nil {
			return nil, err
		}
	}
	return l, nil
}

// parseBackingSite sets up the handler of backing images.
//
//	backing_images [<matcher>] {
//		access {
//			identity   <placeholder>
//			allow|deny <pull|push|delete|any...> [to <who...>] [on <pattern...>]
//		}
//		api_token <token>
//	}
func parseBackingSite(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h.Next() // backing_images
	if h.NextArg() {
		return nil, h.ArgErr()
	}
	b := new(module.BackingSite)
	d := h.Dispenser
	var seen options
	for d.NextBlock(0) {
		if err := seen.once(d); err != nil {
			return nil, err
		}
		var err error
		switch d.Val() {
		case "access":
			b.Access, err = parseAccess(d)
		case "api_token":
			err = parseText(d, &b.APIToken)
		default:
			err = d.Errf("unrecognized option %q of backing_images", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}
