package module

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/oci"
)

func init() {
	caddy.RegisterModule(new(Mirror))
}

// Mirror answers the registry API (`/v2/…`) from the store of the `registry`
// app, and fetches from upstream registries what it does not hold. Every other
// path goes on to the next handler. Where none answers `/`, a page tells how clients
// are set up to use this host.
//
// A request says which registry it means in one of four ways, and the first
// that applies decides: `?ns=<host>`, as containerd, BuildKit and Docker 29
// send it; a first path component that is the registry's path name
// (`/v2/ghcr.io/…`); a name that is hosted here; the default registry.
//
// It adds these fields to access logs: `registry_upstream`,
// `registry_repository`, `registry_reference`, `registry_cache` (`hit`,
// `revalidated`, `stale`, `stored` or `miss`) and, for a request that failed,
// `registry_error`.
type Mirror struct {
	// Registries this site answers for. Default: all that the app knows.
	Upstreams []string `json:"upstreams,omitempty"`

	// The registry of a name that says none, or `off`. Default: docker.io.
	Default string `json:"default,omitempty"`

	// `on`, or `ignore` to leave `?ns=` unread. Default: on.
	NS string `json:"ns,omitempty"`

	// Names that belong to this site and to no upstream, as patterns: `*` is
	// one component and `**` any number of them. Rules under `access` say who
	// may pull, push and delete them.
	Hosted []string `json:"hosted,omitempty"`

	// Permit hosted names on a site with a default registry, where they take
	// the place of that registry's names.
	ShadowDefault bool `json:"shadow_default,omitempty"`

	// Who may do what here. Default: anyone may pull what is mirrored, and nobody
	// anything that is hosted.
	Access *Access `json:"access,omitempty"`

	// Send clients to the bucket for blobs, by a redirect to an address that can be
	// used for 20 minutes. Only with the storage s3. Default: all blobs are served
	// from here.
	RedirectToStorage *Redirect `json:"redirect_to_storage,omitempty"`

	state *state
	site  *mirror.Site
	asker
	log *zap.Logger

	closed bool // not everybody may pull
}

// CaddyModule returns the Caddy module information.
func (*Mirror) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.registry_mirror",
		New: func() caddy.Module { return new(Mirror) },
	}
}

// Provision checks the site against what the app knows.
func (m *Mirror) Provision(ctx caddy.Context) error {
	m.log = ctx.Logger()
	loaded, err := ctx.App("registry")
	if err != nil {
		return fmt.Errorf("registry app: %w", err)
	}
	app := loaded.(*App)
	cfg, err := m.config()
	if err != nil {
		return err
	}
	if module, ok := app.backend.(caddy.Module); m.RedirectToStorage != nil && (!ok || module.CaddyModule().ID != "registry.storage.s3") {
		return errors.New("redirect_to_storage: clients can be sent to a bucket only, and the registry app's storage is none; configure `storage s3`, or leave the option out")
	}
	cfg.Upstreams = app.upstreams
	if m.site, err = mirror.NewSite(cfg); err != nil {
		return err
	}
	if m.asker, err = m.Access.asker(); err != nil {
		return err
	}
	m.warn(cfg.Rules)
	m.state = app.state
	app.served = append(app.served, cfg.Hosted...)
	if m.closed = !cfg.Rules.Open(access.Pull); !m.closed {
		app.open++
	}
	return nil
}

// Check reports what is wrong with the site whatever the app's configuration
// is.
func (m *Mirror) Check() error {
	cfg, err := m.config()
	if err != nil {
		return err
	}
	return cfg.Check()
}

// config is the site's configuration less the registries, which the app has.
func (m *Mirror) config() (mirror.SiteConfig, error) {
	cfg := mirror.SiteConfig{Allowed: m.Upstreams, Default: m.Default, ShadowDefault: m.ShadowDefault}
	switch m.Default {
	case "":
		cfg.Default = "docker.io"
	case "off":
		cfg.Default = ""
	}
	switch m.NS {
	case "", "on":
	case "ignore":
		cfg.IgnoreNS = true
	default:
		return cfg, fmt.Errorf("ns: %q is neither on nor ignore", m.NS)
	}
	for _, s := range m.Hosted {
		pattern, err := oci.ParsePattern(s)
		if err != nil {
			return cfg, fmt.Errorf("hosted: %w", err)
		}
		cfg.Hosted = append(cfg.Hosted, pattern)
	}
	var err error
	if cfg.Redirect, err = m.RedirectToStorage.parse(); err != nil {
		return cfg, err
	}
	cfg.Rules, err = m.Access.parse()
	return cfg, err
}

func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	route, ours := oci.ParsePath(r.URL.Path)
	if !ours {
		if err := next.ServeHTTP(w, r); err != nil {
			return err
		}
		return m.land(w, r)
	}
	// The configuration may be cleaned up while this request runs; the state
	// stays until it leaves.
	if !m.state.enter() {
		mirror.Unavailable(w, r, errClosed)
		return nil
	}
	defer m.state.leave()
	open, err := m.state.open(r.Context())
	if err != nil {
		m.log.Error("opening the store", zap.Error(err))
		mirror.Unavailable(w, r, err)
		return nil
	}
	to := newSender(w, r)
	report := m.site.ServeHTTP(open.mirror, to, r, route, m.caller(r))
	if extra, ok := r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		line := zap.Inline(&logged{report})
		line.Key = "registry" // is not written, but tells it from another handler's
		extra.Set(line)
	}
	if report.Location {
		conceal(w, r)
	}
	if report.Abort {
		level := zapcore.WarnLevel
		if to.hungUp() {
			level = zapcore.DebugLevel
		}
		m.log.Log(level, "answer broken off", zap.String("repository", report.Repository), zap.String("reference", report.Reference), zap.Error(report.Err))
		panic(http.ErrAbortHandler)
	}
	return nil
}

// logged is a report as fields of the access log, made when a line is written.
type logged struct{ mirror.Report }

func (l *logged) MarshalLogObject(line zapcore.ObjectEncoder) error {
	for _, field := range [...]struct{ key, value string }{
		{"registry_upstream", l.Upstream},
		{"registry_repository", l.Repository},
		{"registry_reference", l.Reference},
		{"registry_cache", l.Cache},
	} {
		if field.value != "" {
			line.AddString(field.key, field.value)
		}
	}
	if l.Err != nil {
		line.AddString("registry_error", l.Err.Error())
	}
	return nil
}

var (
	_ caddy.Provisioner           = (*Mirror)(nil)
	_ caddyhttp.MiddlewareHandler = (*Mirror)(nil)
)
