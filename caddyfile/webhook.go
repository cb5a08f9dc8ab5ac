package caddyfile

import (
	"net/http"
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-registry/mirror/module"
)

// parseWebhook reads who is told of pushes.
func parseWebhook(d *caddyfile.Dispenser, earlier []*module.Webhook) (*module.Webhook, error) {
	w := new(module.Webhook)
	if !d.AllArgs(&w.Name, &w.URL) {
		return nil, d.ArgErr()
	}
	for _, other := range earlier {
		if other.Name == w.Name {
			return nil, d.Errf("webhook %s is configured twice", w.Name)
		}
	}
	var seen options
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		if option != "header" && option != "ignore" {
			if err := seen.once(d); err != nil {
				return nil, err
			}
		}
		var err error
		switch option {
		case "header":
			err = parseWebhookHeader(d, w)
		case "timeout":
			if err = parseDurations(d, &w.Timeout); err == nil && w.Timeout == 0 {
				err = d.Err("timeout: nothing can be sent in 0")
			}
		case "threshold":
			var arg string
			if !d.AllArgs(&arg) {
				err = d.ArgErr()
			} else if n, parseErr := strconv.Atoi(arg); parseErr != nil || n < 1 {
				err = d.Errf("threshold: %q is no number of failures, from 1 on", arg)
			} else {
				w.Threshold = n
			}
		case "backoff":
			if err = parseDurations(d, &w.Backoff); err == nil && w.Backoff == 0 {
				err = d.Err("backoff: a webhook that fails cannot be asked again after 0")
			}
		case "ignore":
			err = parseWebhookIgnore(d, w, &seen)
		default:
			err = d.Errf("unrecognized option %q of webhook", option)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := w.Check(); err != nil {
		return nil, d.Errf("webhook %s: %v", w.Name, err)
	}
	return w, nil
}

func parseWebhookHeader(d *caddyfile.Dispenser, w *module.Webhook) error {
	var field, value string
	if !d.AllArgs(&field, &value) {
		return d.ArgErr()
	}
	if w.Headers == nil {
		w.Headers = http.Header{}
	}
	if w.Headers.Get(field) != "" {
		return d.Errf("header %s is given twice", field)
	}
	if value == "" {
		return d.Errf("header %s has no value", field)
	}
	w.Headers.Set(field, value)
	return nil
}

func parseWebhookIgnore(d *caddyfile.Dispenser, w *module.Webhook, seen *options) error {
	if !d.NextArg() {
		return d.ArgErr()
	}
	if w.Ignore == nil {
		w.Ignore = new(module.WebhookIgnore)
	}
	what := d.Val()
	into := map[string]*[]string{"mediatypes": &w.Ignore.MediaTypes, "actions": &w.Ignore.Actions}[what]
	if into == nil {
		return d.Errf("ignore is of mediatypes or of actions, not of %q", what)
	}
	if err := seen.once(d); err != nil {
		return err
	}
	if *into = d.RemainingArgs(); len(*into) == 0 {
		return d.ArgErr()
	}
	return nil
}
