// Package module holds the Caddy modules: it decodes configuration, wires the
// packages under internal together and lends them to Caddy. Policy is in
// internal/mirror.
//
// Lifetimes. The process has the pool of states. A state (state.go) belongs to
// one store, and lives from the first configuration that names the store to
// the last configuration or request that uses it. An App and its handlers
// belong to one configuration. A reload runs the old configuration's Cleanup
// while its requests are still being answered, so nothing that a request needs
// hangs on them.
package module

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"

	_ "github.com/caddy-registry/mirror/storage/disk" // the default storage
)

func init() {
	caddy.RegisterModule(new(App))
}

// App is what all mirror sites of a configuration share: one store, and the
// registries that are mirrored. It need not be configured: without it, sites
// keep their content on disk in Caddy's data directory, and know the built-in
// registries.
//
// docker.io, ghcr.io, gcr.io, *.pkg.dev, quay.io, registry.k8s.io (and its old
// name k8s.gcr.io), mcr.microsoft.com, nvcr.io, docker.elastic.co,
// public.ecr.aws, registry.gitlab.com and lscr.io are built in.
type App struct {
	// Where content is kept. Default: `{"backend": "disk"}`.
	StorageRaw json.RawMessage `json:"storage,omitempty" caddy:"namespace=registry.storage inline_key=backend"`

	// Registries to add to the built-in ones, and changes to those.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// How much memory there is for manifests, image configs and other blobs of
	// up to 64 KiB that are asked for often: a number of bytes (`256MiB`), or
	// `off`. Default: 64MiB.
	HotCache string `json:"hot_cache,omitempty"`

	// Networks, in CIDR notation, that upstreams may send the mirror into by a
	// redirect or a token realm, besides public addresses. Default: none.
	TrustNetworks []string `json:"trust_networks,omitempty"`

	log       *zap.Logger
	backend   storage.Backend
	hot       int64
	emit      func(event string, data map[string]any)
	state     *state
	upstreams *mirror.Upstreams
	sites     int // mirror sites of this configuration
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "registry",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision checks the configuration and takes its references. It writes
// nothing and locks nothing: `caddy validate` runs it beside a live mirror.
func (a *App) Provision(ctx caddy.Context) error {
	a.log = ctx.Logger()
	if a.StorageRaw == nil {
		a.StorageRaw = json.RawMessage(`{"backend":"disk"}`)
	}
	loaded, err := ctx.LoadModule(a, "StorageRaw")
	if err != nil {
		return fmt.Errorf("storage: %w", err)
	}
	backend, ok := loaded.(storage.Backend)
	if !ok {
		return fmt.Errorf("storage: %T is no storage backend", loaded)
	}
	a.backend = backend
	if a.hot, err = parseHotCache(a.HotCache); err != nil {
		return err
	}
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("events app: %w", err)
	}
	a.emit = func(name string, data map[string]any) { events.(*caddyevents.App).Emit(ctx, name, data) }

	var trusted []netip.Prefix
	for i, cidr := range a.TrustNetworks {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return fmt.Errorf("trust_networks[%d]: %q is not a network such as 10.0.0.0/8", i, cidr)
		}
		trusted = append(trusted, prefix)
	}
	if a.state, err = useState(backend, a.log); err != nil {
		return err
	}
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	a.upstreams, err = a.buildUpstreams(ctx, &a.state.endpoints, trusted)
	return err
}

// Check reports what is wrong with the app's own options.
func (a *App) Check() error {
	_, err := parseHotCache(a.HotCache)
	return err
}

func parseHotCache(s string) (int64, error) {
	switch s {
	case "":
		return mirror.DefaultHot, nil
	case "off":
		return 0, nil
	}
	size, err := humanize.ParseBytes(s)
	if err != nil || size > math.MaxInt64 {
		return 0, fmt.Errorf("hot_cache: %q is neither a size such as 64MiB nor off", s)
	}
	return int64(size), nil
}

// buildUpstreams makes the table of registries: the built-in ones, changed and
// added to by configuration.
func (a *App) buildUpstreams(ctx caddy.Context, pool *upstream.Pool, trusted []netip.Prefix) (_ *mirror.Upstreams, err error) {
	configured := map[string]*Upstream{}
	var order []string
	for _, name := range mirror.Builtin {
		configured[name] = &Upstream{Name: name}
		order = append(order, name)
	}
	seen := map[string]bool{}
	for i, u := range a.Upstreams {
		where := fmt.Sprintf("upstreams[%d]", i)
		if err := u.provision(ctx, where); err != nil {
			return nil, err
		}
		if seen[u.host] {
			return nil, fmt.Errorf("%s: %s is configured twice", where, u.host)
		}
		seen[u.host] = true
		if configured[u.host] == nil {
			order = append(order, u.host)
		}
		configured[u.host] = u
	}
	var list []*mirror.Upstream
	defer func() {
		if err != nil {
			for _, up := range list {
				if up.Client != nil {
					up.Client.Close()
				}
			}
		}
	}()
	for _, name := range order {
		u := configured[name]
		if !seen[name] {
			if err := u.provision(ctx, name); err != nil {
				return nil, err
			}
		}
		up, err := u.open(pool, trusted)
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		list = append(list, up)
		u.warn(a.log)
	}
	return mirror.NewUpstreams(list)
}

// Start opens the store. Everything is ready at the end of Provision all the
// same: Caddy starts apps in any order, and a request that comes first opens
// the store itself.
func (a *App) Start() error {
	if _, err := a.state.open(context.Background()); err != nil {
		return err
	}
	if err := a.state.tune(tuning{a.backend, a.log, mirror.Settings{Hot: a.hot, Emit: a.emit}}); err != nil {
		return err
	}
	if a.sites > 0 {
		a.log.Warn("registry_mirror itself refuses nobody who reaches it; keep it inside your network, or put remote_ip, basic_auth or forward_auth in front of it",
			zap.Int("sites", a.sites))
	}
	running.add(a)
	return nil
}

// Stop does nothing: Caddy may stop this app before the HTTP app, whose
// requests still need it.
func (*App) Stop() error { return nil }

// Cleanup gives up this configuration's references, those that a failed
// Provision has taken.
func (a *App) Cleanup() error {
	running.remove(a)
	if a.upstreams != nil {
		a.upstreams.Close()
	}
	if a.state == nil {
		return nil
	}
	// Another app may have failed to start after this one: then the
	// configuration before it runs on, and its settings are put back.
	if !caddy.Exiting() {
		a.state.untune(a.backend)
	}
	return a.state.unuse()
}

var (
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
