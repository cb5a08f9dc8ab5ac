// Package caddyfile teaches the Caddyfile the global option `registry` and the
// directives `registry_mirror` and `backing_images`.
package caddyfile

import (
	"errors"
	"net/netip"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/module"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("registry", parseApp)
	httpcaddyfile.RegisterHandlerDirective("registry_mirror", parseMirror)
	httpcaddyfile.RegisterHandlerDirective("backing_images", parseBackingSite)
	// After authentication, and before what answers every path, so that it can
	// stand in a site that already has something to say.
	// The first of the two comes first; each passes on what is not its own.
	httpcaddyfile.RegisterDirectiveOrder("backing_images", httpcaddyfile.Before, "respond")
	httpcaddyfile.RegisterDirectiveOrder("registry_mirror", httpcaddyfile.Before, "respond")
}

// parseApp sets up the registry app. All of it may be left out.
//
//	registry {
//		storage <backend> ...
//		catalog <backend> ...
//		hot_cache <size>|off
//		gc <cron>|off [<grace>]
//		scrub <bytes/s>|off
//		trust_networks <cidr...>
//		webhook <name> <url> {
//			header    <field> <value>
//			timeout   <duration>
//			threshold <n>
//			backoff   <duration>
//			ignore    mediatypes|actions <word...>
//		}
//		upstream <host[:port]> {
//			path_name         <name>
//			repository_prefix <prefix>
//			endpoint <url> {
//				capabilities  pull|resolve...
//				credentials   <user> <secret>
//				network_proxy <module> ...
//				ca            <file...>
//			}
//			origin        <url>|off
//			credentials   <user> <secret>
//			network_proxy <module> ...
//			ca            <file...>
//			tls_insecure_skip_verify
//			allow_private
//			tag_ttl    <duration>
//			on_missing follow|keep [<duration>]
//			timeouts <connect> <header> <stall>
//			connections <n>
//			min_speed   <bytes/s> <duration>|off
//			max_size <size>|off
//			ttl      <duration>|off
//		}
//		hosted <pattern> {
//			max_size          <size>|off
//			max_manifest_size <size>
//			delete            on|off
//			immutable         <tag-pattern...>
//			require_blobs     on|off
//			keep  <n>        [on <tag-pattern...>]
//			newer <duration> [on <tag-pattern...>]
//		}
//		backing_images {
//			prefix     <repository>
//			public_url <url>
//			longhorn <name> <url> {
//				token <token>
//				mode  download|upload
//			}
//			longhorn_compat enforce|warn|off
//			max_size        <size>|off
//			max_image_size  <size>|off
//			allow_private
//		}
//	}
func parseApp(d *caddyfile.Dispenser, earlier any) (any, error) {
	d.Next() // registry
	if earlier != nil {
		return nil, d.Err("the registry option is given twice; one store and one set of upstreams serve all sites")
	}
	if d.NextArg() {
		return nil, d.ArgErr()
	}
	app := new(module.App)
	var seen options
	hosts := map[string]bool{}
	for d.NextBlock(0) {
		if d.Val() != "upstream" && d.Val() != "hosted" && d.Val() != "webhook" {
			if err := seen.once(d); err != nil {
				return nil, err
			}
		}
		switch d.Val() {
		case "storage":
			if !d.NextArg() {
				return nil, d.ArgErr()
			}
			backend := d.Val()
			unm, err := caddyfile.UnmarshalModule(d, "registry.storage."+backend)
			if err != nil {
				return nil, err
			}
			app.StorageRaw = caddyconfig.JSONModuleObject(unm, "backend", backend, nil)
		case "catalog":
			if !d.NextArg() {
				return nil, d.ArgErr()
			}
			backend := d.Val()
			unm, err := caddyfile.UnmarshalModule(d, "registry.catalog."+backend)
			if err != nil {
				return nil, err
			}
			app.CatalogRaw = caddyconfig.JSONModuleObject(unm, "backend", backend, nil)
		case "hot_cache":
			if err := parseSize(d, &app.HotCache, app.Check); err != nil {
				return nil, err
			}
		case "gc":
			var err error
			if app.GC, err = parseGC(d); err != nil {
				return nil, err
			}
		case "scrub":
			if err := parseSize(d, &app.Scrub, app.Check); err != nil {
				return nil, err
			}
		case "trust_networks":
			app.TrustNetworks = d.RemainingArgs()
			if len(app.TrustNetworks) == 0 {
				return nil, d.ArgErr()
			}
			for _, cidr := range app.TrustNetworks {
				if _, err := netip.ParsePrefix(cidr); err != nil {
					return nil, d.Errf("trust_networks: %q is not a network such as 10.0.0.0/8", cidr)
				}
			}
		case "webhook":
			w, err := parseWebhook(d, app.Webhooks)
			if err != nil {
				return nil, err
			}
			app.Webhooks = append(app.Webhooks, w)
		case "upstream":
			u, err := parseUpstream(d, hosts)
			if err != nil {
				return nil, err
			}
			app.Upstreams = append(app.Upstreams, u)
		case "hosted":
			var err error
			if app.Hosted, err = parseHosted(d, app.Hosted); err != nil {
				return nil, err
			}
		case "backing_images":
			var err error
			if app.BackingImages, err = parseBackingImages(d); err != nil {
				return nil, err
			}
		default:
			return nil, d.Errf("unrecognized option %q of registry", d.Val())
		}
	}
	return httpcaddyfile.App{Name: "registry", Value: caddyconfig.JSON(app, nil)}, nil
}

// options refuses an option that is given twice.
type options map[string]bool

func (o *options) once(d *caddyfile.Dispenser) error {
	if *o == nil {
		*o = options{}
	}
	if (*o)[d.Val()] {
		return d.Errf("%s is given twice", d.Val())
	}
	(*o)[d.Val()] = true
	return nil
}

func parseUpstream(d *caddyfile.Dispenser, hosts map[string]bool) (*module.Upstream, error) {
	u := new(module.Upstream)
	if !d.AllArgs(&u.Name) {
		return nil, d.ArgErr()
	}
	host := mirror.NormalizeHost(u.Name)
	if hosts[host] {
		return nil, d.Errf("upstream %s is configured twice", host)
	}
	hosts[host] = true
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if d.Val() != "endpoint" {
			if err := seen.once(d); err != nil {
				return nil, err
			}
		}
		var err error
		switch d.Val() {
		case "path_name":
			if !d.AllArgs(&u.PathName) {
				err = d.ArgErr()
			}
		case "repository_prefix":
			u.RepositoryPrefix = new(string)
			if !d.AllArgs(u.RepositoryPrefix) {
				err = d.ArgErr()
			}
		case "endpoint":
			var e *module.Endpoint
			if e, err = parseEndpoint(d); err == nil {
				u.Endpoints = append(u.Endpoints, e)
			}
		case "origin":
			if !d.AllArgs(&u.Origin) {
				err = d.ArgErr()
			}
		case "credentials":
			u.Credentials, err = parseCredentials(d)
		case "network_proxy":
			u.NetworkProxyRaw, err = parseProxy(d)
		case "ca":
			if u.CA = d.RemainingArgs(); len(u.CA) == 0 {
				err = d.ArgErr()
			}
		case "tls_insecure_skip_verify":
			u.InsecureSkipVerify, err = parseFlag(d)
		case "allow_private":
			u.AllowPrivate, err = parseFlag(d)
		case "tag_ttl":
			var ttl caddy.Duration
			u.TagTTL = &ttl
			err = parseDurations(d, &ttl)
		case "on_missing":
			u.OnMissing, err = parseOnMissing(d)
		case "timeouts":
			u.Timeouts = new(module.Timeouts)
			err = parseDurations(d, &u.Timeouts.Connect, &u.Timeouts.Header, &u.Timeouts.Stall)
		case "connections":
			u.Connections, err = parseConnections(d)
		case "min_speed":
			u.MinSpeed, err = parseMinSpeed(d)
		case "max_size":
			err = parseSize(d, &u.MaxSize, u.Check)
		case "ttl":
			u.TTL, err = parseTTL(d)
		default:
			err = d.Errf("unrecognized option %q of upstream", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	if err := u.Check(); err != nil {
		return nil, d.Errf("upstream %s: %v", u.Name, err)
	}
	return u, nil
}

func parseEndpoint(d *caddyfile.Dispenser) (*module.Endpoint, error) {
	e := new(module.Endpoint)
	if !d.AllArgs(&e.URL) {
		return nil, d.ArgErr()
	}
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := seen.once(d); err != nil {
			return nil, err
		}
		var err error
		switch d.Val() {
		case "capabilities":
			if e.Capabilities = d.RemainingArgs(); len(e.Capabilities) == 0 {
				err = d.ArgErr()
			} else if err = e.Check(); err != nil {
				err = d.WrapErr(err)
			}
		case "credentials":
			e.Credentials, err = parseCredentials(d)
		case "network_proxy":
			e.NetworkProxyRaw, err = parseProxy(d)
		case "ca":
			if e.CA = d.RemainingArgs(); len(e.CA) == 0 {
				err = d.ArgErr()
			}
		default:
			err = d.Errf("unrecognized option %q of endpoint", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	if err := e.Check(); err != nil {
		return nil, d.Errf("endpoint %s: %v", e.URL, err)
	}
	return e, nil
}

func parseCredentials(d *caddyfile.Dispenser) (*module.Credentials, error) {
	c := new(module.Credentials)
	if !d.AllArgs(&c.User, &c.Secret) {
		return nil, d.ArgErr()
	}
	return c, nil
}

func parseProxy(d *caddyfile.Dispenser) ([]byte, error) {
	if !d.NextArg() {
		return nil, d.ArgErr()
	}
	name := d.Val()
	unm, err := caddyfile.UnmarshalModule(d, "caddy.network_proxy."+name)
	if err != nil {
		return nil, err
	}
	return caddyconfig.JSONModuleObject(unm, "from", name, nil), nil
}

func parseFlag(d *caddyfile.Dispenser) (bool, error) {
	if d.NextArg() {
		return false, d.ArgErr()
	}
	return true, nil
}

func parseDurations(d *caddyfile.Dispenser, into ...*caddy.Duration) error {
	args := d.RemainingArgs()
	if len(args) != len(into) {
		return d.ArgErr()
	}
	for i, arg := range args {
		var err error
		if *into[i], err = parseDuration(d, arg); err != nil {
			return err
		}
	}
	return nil
}

func parseDuration(d *caddyfile.Dispenser, arg string) (caddy.Duration, error) {
	value, err := caddy.ParseDuration(arg)
	if err == nil && value < 0 {
		err = errors.New("it cannot be negative")
	}
	if err != nil {
		return 0, d.Errf("bad duration %q: %v", arg, err)
	}
	return caddy.Duration(value), nil
}

func parseConnections(d *caddyfile.Dispenser) (int, error) {
	var arg string
	if !d.AllArgs(&arg) {
		return 0, d.ArgErr()
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n < 1 || n > upstream.MaxConnections {
		return 0, d.Errf("connections: %q is no number from 1 to %d", arg, upstream.MaxConnections)
	}
	return n, nil
}

func parseOnMissing(d *caddyfile.Dispenser) (*module.OnMissing, error) {
	o := new(module.OnMissing)
	if !d.NextArg() {
		return nil, d.ArgErr()
	}
	o.Policy = d.Val()
	if d.NextArg() {
		d.Prev()
		if err := parseDurations(d, &o.For); err != nil {
			return nil, err
		}
		if o.For == 0 {
			return nil, d.Err("on_missing: kept for 0 is what follow does; without a time it is kept for ever")
		}
	}
	if err := o.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return o, nil
}

func parseMinSpeed(d *caddyfile.Dispenser) (*module.MinSpeed, error) {
	m := new(module.MinSpeed)
	if !d.NextArg() {
		return nil, d.ArgErr()
	}
	if m.Rate = d.Val(); m.Rate == "off" {
		if d.NextArg() {
			return nil, d.ArgErr()
		}
		return m, nil
	}
	if err := parseDurations(d, &m.Over); err != nil {
		return nil, err
	}
	if m.Over == 0 {
		return nil, d.Err("min_speed: no average can be taken over 0; off turns it off")
	}
	if err := m.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return m, nil
}

// parseSize reads an option that is a size or off, and has it checked.
func parseSize(d *caddyfile.Dispenser, into *string, check func() error) error {
	option := d.Val()
	if !d.AllArgs(into) {
		return d.ArgErr()
	}
	if *into == "" {
		return d.Errf(`%s: "" is neither a size such as 64MiB nor off`, option)
	}
	if err := check(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

func parseGC(d *caddyfile.Dispenser) (*module.GC, error) {
	gc := new(module.GC)
	if !d.NextArg() {
		return nil, d.ArgErr()
	}
	gc.Schedule = d.Val()
	if gc.Schedule == "" {
		return nil, d.Err(`gc: "" is neither a time such as @daily or "30 3 * * *" nor off`)
	}
	if d.NextArg() {
		d.Prev()
		if d.CountRemainingArgs() > 1 {
			return nil, d.Errf(`gc has a time and a grace; a time with spaces is quoted: "30 3 * * *"`)
		}
		if err := parseDurations(d, &gc.Grace); err != nil {
			return nil, err
		}
		if gc.Grace == 0 {
			return nil, d.Err("gc: the grace cannot be 0; what has just come may not be linked yet")
		}
	}
	if err := gc.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return gc, nil
}

func parseTTL(d *caddyfile.Dispenser) (caddy.Duration, error) {
	if !d.NextArg() {
		return 0, d.ArgErr()
	}
	if d.Val() == "off" {
		if d.NextArg() {
			return 0, d.ArgErr()
		}
		return 0, nil
	}
	d.Prev()
	var ttl caddy.Duration
	if err := parseDurations(d, &ttl); err != nil {
		return 0, err
	}
	if ttl == 0 {
		return 0, d.Err("ttl: nothing would be kept for 0; off keeps it for ever")
	}
	return ttl, nil
}

// parseMirror sets up the mirror handler.
//
//	registry_mirror [<matcher>] {
//		upstreams <name...>
//		default   <name>|off
//		ns        on|ignore
//		hosted    <pattern...>
//		shadow_default
//		redirect_to_storage <min size> [<cidr...>]
//		access {
//			identity   <placeholder>
//			allow|deny <pull|push|delete|any...> [to <who...>] [on <pattern...>]
//		}
//	}
func parseMirror(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h.Next() // registry_mirror
	if h.NextArg() {
		return nil, h.ArgErr()
	}
	m := new(module.Mirror)
	d := h.Dispenser
	var seen options
	for d.NextBlock(0) {
		if err := seen.once(d); err != nil {
			return nil, err
		}
		var err error
		switch d.Val() {
		case "upstreams":
			if m.Upstreams = d.RemainingArgs(); len(m.Upstreams) == 0 {
				err = d.ArgErr()
			}
		case "default":
			if !d.AllArgs(&m.Default) {
				err = d.ArgErr()
			}
		case "ns":
			if !d.AllArgs(&m.NS) {
				err = d.ArgErr()
			} else if m.NS != "on" && m.NS != "ignore" {
				err = d.Errf("ns is on or ignore, not %q", m.NS)
			}
		case "hosted":
			if m.Hosted = d.RemainingArgs(); len(m.Hosted) == 0 {
				err = d.ArgErr()
			}
			for _, pattern := range m.Hosted {
				if _, patternErr := oci.ParsePattern(pattern); patternErr != nil {
					err = d.WrapErr(patternErr)
				}
			}
		case "shadow_default":
			m.ShadowDefault, err = parseFlag(d)
		case "redirect_to_storage":
			args := d.RemainingArgs()
			if len(args) == 0 {
				err = d.ArgErr()
				break
			}
			m.RedirectToStorage = &module.Redirect{MinSize: args[0], Networks: args[1:]}
			if checkErr := m.RedirectToStorage.Check(); checkErr != nil {
				err = d.WrapErr(checkErr)
			}
		case "access":
			m.Access, err = parseAccess(d)
		default:
			err = d.Errf("unrecognized option %q of registry_mirror", d.Val())
		}
		if err != nil {
			return nil, err
		}
	}
	if err := m.Check(); err != nil {
		return nil, d.WrapErr(err)
	}
	return m, nil
}
