package module

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/notify"
)

// Webhook is told of what becomes of the images that are hosted here, as
// distribution tells it: each event is a POST of
// `application/vnd.docker.distribution.events.v1+json`. Events are sent in their
// order, and again until they are taken with a status of 200 to 299. Up to 10,000
// wait, over restarts too.
type Webhook struct {
	// What it is called in logs and metrics: letters, digits, `-`, `_` and `.`.
	// What waits for it belongs to the name.
	Name string `json:"name"`

	// Where events are sent. It may have placeholders, `{env.NAME}` or
	// `{file./path}`.
	URL string `json:"url"`

	// Header fields of each request; the values may have placeholders.
	Headers http.Header `json:"headers,omitempty"`

	// How long one attempt may take. Default: 5s.
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// After how many failures in a row the webhook is left alone for the time of
	// `backoff` before each further attempt. Default: 5.
	Threshold int `json:"threshold,omitempty"`

	// Default: 10s.
	Backoff caddy.Duration `json:"backoff,omitempty"`

	// What is not sent.
	Ignore *WebhookIgnore `json:"ignore,omitempty"`
}

// WebhookIgnore is what a webhook is not told of.
type WebhookIgnore struct {
	// Media types of manifests; that of a blob is `application/octet-stream`.
	MediaTypes []string `json:"mediatypes,omitempty"`

	// `push`, `pull`, `mount` or `delete`.
	Actions []string `json:"actions,omitempty"`
}

var webhookName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

const maxWebhooks = 32

var webhookActions = []notify.Action{notify.Push, notify.Pull, notify.Mount, notify.Delete}

// Check reports what is wrong with the webhook as far as its placeholders do not
// matter.
func (w *Webhook) Check() error {
	if !webhookName.MatchString(w.Name) {
		return fmt.Errorf("%.80q cannot be the name of a webhook: want up to 64 letters, digits, -, _ and .", w.Name)
	}
	if !strings.Contains(w.URL, "{") {
		if err := checkWebhookURL(w.URL); err != nil {
			return err
		}
	}
	if w.Timeout < 0 || w.Backoff < 0 || w.Threshold < 0 {
		return errors.New("timeout, threshold and backoff cannot be negative")
	}
	for field := range w.Headers {
		switch canonical := http.CanonicalHeaderKey(field); {
		case slices.Contains([]string{"Content-Type", "Content-Length", "Transfer-Encoding", "Connection", "Host"}, canonical):
			return fmt.Errorf("header %s is not up to the configuration", canonical)
		case field == "" || strings.Trim(strings.ToLower(field), "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") != "":
			return fmt.Errorf("%.80q is no name of a header field", field)
		}
	}
	if w.Ignore == nil {
		return nil
	}
	for _, name := range w.Ignore.Actions {
		if !slices.Contains(webhookActions, notify.Action(name)) {
			return fmt.Errorf("ignore: %.50q is no action; there are push, pull, mount and delete", name)
		}
	}
	if !slices.ContainsFunc(webhookActions, func(a notify.Action) bool { return !slices.Contains(w.Ignore.Actions, string(a)) }) {
		return errors.New("ignore: with all actions ignored nothing is ever sent; leave the webhook out")
	}
	return nil
}

// checkWebhookURL says nothing of the URL itself, which may have a secret in it.
func checkWebhookURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return errors.New("the url is not one such as https://hooks.example.com/events")
	}
	return nil
}

// provision resolves the placeholders.
func (w *Webhook) provision(where string) (notify.Webhook, error) {
	if err := w.Check(); err != nil {
		return notify.Webhook{}, fmt.Errorf("%s: %w", where, err)
	}
	to := notify.Webhook{
		Name:      w.Name,
		Header:    http.Header{},
		Timeout:   time.Duration(cmp.Or(w.Timeout, caddy.Duration(5*time.Second))),
		Threshold: cmp.Or(w.Threshold, 5),
		Backoff:   time.Duration(cmp.Or(w.Backoff, caddy.Duration(10*time.Second))),
	}
	var err error
	if to.URL, err = resolve(w.URL); err == nil {
		err = checkWebhookURL(to.URL)
	}
	if err != nil {
		return to, fmt.Errorf("%s.url: %w", where, err)
	}
	for field, values := range w.Headers {
		for i, value := range values {
			resolved, err := resolve(value)
			if err == nil && strings.ContainsFunc(resolved, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
				err = errors.New("the value has a control character in it")
			}
			if err != nil {
				return to, fmt.Errorf("%s.headers.%s[%d]: %w", where, field, i, err)
			}
			to.Header.Add(field, resolved)
		}
	}
	if w.Ignore != nil {
		to.IgnoreMediaTypes = w.Ignore.MediaTypes
		for _, name := range w.Ignore.Actions {
			to.IgnoreActions = append(to.IgnoreActions, notify.Action(name))
		}
	}
	return to, nil
}

// provisionWebhooks resolves those of the app.
func (a *App) provisionWebhooks() error {
	if len(a.Webhooks) > maxWebhooks {
		return fmt.Errorf("webhooks: %d are too many; there may be %d", len(a.Webhooks), maxWebhooks)
	}
	seen := map[string]bool{}
	for i, w := range a.Webhooks {
		where := fmt.Sprintf("webhooks[%d]", i)
		if seen[w.Name] {
			return fmt.Errorf("%s: %s is configured twice", where, w.Name)
		}
		seen[w.Name] = true
		to, err := w.provision(where)
		if err != nil {
			return err
		}
		if strings.HasPrefix(to.URL, "http://") && len(to.Header) > 0 {
			a.log.Warn("header fields are sent over http, where anybody on the way can read them", zap.String("webhook", w.Name))
		}
		a.webhooks = append(a.webhooks, to)
	}
	return nil
}

// told gives a mirror whom to tell: the webhooks, and Caddy's event handlers; nil:
// there is neither.
func (o *opened) told(to tuning) (tell func(notify.Event), pulls bool) {
	handled := map[notify.Action]bool{}
	for action, name := range eventNames {
		if to.emits(name) {
			handled[action] = true
		}
	}
	if len(to.webhooks)+len(handled) == 0 {
		return nil, false
	}
	return func(e notify.Event) {
		o.sender.Notify(e)
		if !handled[e.Action] {
			return
		}
		data := map[string]any{
			"repository": e.Repository, "tag": e.Tag, "digest": e.Digest.String(), "media_type": e.MediaType, "size": e.Size,
			"actor": e.Actor, "client": e.Addr, "user_agent": e.UserAgent,
		}
		if e.Action == notify.Mount {
			data["from"] = e.From
		}
		to.mirror.Emit(eventNames[e.Action], data)
	}, handled[notify.Pull] || o.sender.Wants(notify.Pull)
}

// eventNames are Caddy's events.
var eventNames = map[notify.Action]string{notify.Push: "pushed", notify.Pull: "pulled", notify.Mount: "mounted", notify.Delete: "deleted"}
