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
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/robfig/cron/v3"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/retain"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/catalog"

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

	// Where it is written down what the store has, for listing it and for
	// eviction. It can be made again from the store. Default:
	// `{"backend": "sqlite"}`.
	CatalogRaw json.RawMessage `json:"catalog,omitempty" caddy:"namespace=registry.catalog inline_key=backend"`

	// Registries to add to the built-in ones, and changes to those.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// How hosted repositories are kept, by patterns of their names.
	Hosted []*Hosted `json:"hosted,omitempty"`

	// How much memory there is for manifests, image configs and other blobs of
	// up to 64 KiB that are asked for often: a number of bytes (`256MiB`), or
	// `off`. Default: 64MiB.
	HotCache string `json:"hot_cache,omitempty"`

	// When what nothing refers to any more is deleted. Default: `{"schedule":
	// "@daily", "grace": "24h"}`.
	GC *GC `json:"gc,omitempty"`

	// How much of the store is read again in a second, to find what the disk
	// has damaged: a number of bytes (`10MiB`), or `off`; no more than 50
	// blobs in any case. Of a store in a bucket the copies in its cache are read,
	// and what is in the bucket only if this option is given. Default: 4MiB.
	Scrub string `json:"scrub,omitempty"`

	// Networks, in CIDR notation, that upstreams may send the mirror into by a
	// redirect or a token realm, besides public addresses. Default: none.
	TrustNetworks []string `json:"trust_networks,omitempty"`

	// Who is told of what becomes of the images that are hosted here. Default:
	// nobody.
	Webhooks []*Webhook `json:"webhooks,omitempty"`

	// Disk images for volumes of Longhorn. Default: none; or with a
	// `backing_images` site, the defaults of this option.
	BackingImages *BackingImages `json:"backing_images,omitempty"`

	log       *zap.Logger
	backend   storage.Backend
	catalog   catalog.Backend
	hot       int64
	keep      retain.Settings
	emit      func(event string, data map[string]any)
	emits     func(event string) bool
	webhooks  []notify.Webhook
	state     *state
	upstreams *mirror.Upstreams
	hosted    []hosted.Options
	served    []oci.Pattern // what the mirror sites of this configuration host
	images    backingSites
	open      int // mirror sites of this configuration where anyone may pull
}

// GC is when unreferenced content is deleted.
type GC struct {
	// A cron expression of five fields (`30 3 * * *`) or a word such as
	// `@daily`, in the local time zone; or `off`, and then it is done when
	// somebody asks for it. Default: @daily.
	Schedule string `json:"schedule,omitempty"`

	// How old unreferenced content must be. Default: 24h.
	Grace caddy.Duration `json:"grace,omitempty"`
}

// Check reports what is wrong. A nil GC is right.
func (g *GC) Check() error {
	_, _, err := g.parse()
	return err
}

// parse is what is meant; no schedule means never.
func (g *GC) parse() (cron.Schedule, time.Duration, error) {
	if g == nil {
		g = new(GC)
	}
	text, grace := cmp.Or(g.Schedule, "@daily"), cmp.Or(time.Duration(g.Grace), 24*time.Hour)
	switch {
	case grace < 0:
		return nil, 0, errors.New("gc: the grace cannot be negative")
	case text == "off":
		return nil, grace, nil
	case strings.HasPrefix(text, "TZ=") || strings.HasPrefix(text, "CRON_TZ="):
		return nil, 0, fmt.Errorf("gc: %q has a time zone; it is always that of the machine", text)
	}
	schedule, err := cron.ParseStandard(text)
	if err != nil {
		return nil, 0, fmt.Errorf("gc: %q is neither a time such as @daily or \"30 3 * * *\" nor off: %w", text, err)
	}
	if schedule.Next(time.Now()).IsZero() {
		return nil, 0, fmt.Errorf("gc: %q never comes", text)
	}
	return schedule, grace, nil
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
	if a.catalog, err = a.loadCatalog(ctx); err != nil {
		return err
	}
	if a.hot, err = parseSize("hot_cache", a.HotCache, mirror.DefaultHot); err != nil {
		return err
	}
	a.keep.MaxSize = backend.Limits().MaxSize
	if a.keep.GC, a.keep.Grace, err = a.GC.parse(); err != nil {
		return err
	}
	if a.keep.Scrub, err = parseSize("scrub", a.Scrub, 4<<20); err != nil {
		return err
	}
	a.keep.ScrubDistant = a.Scrub != ""
	if err := a.provisionHosted(); err != nil {
		return err
	}
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("events app: %w", err)
	}
	a.emit = func(name string, data map[string]any) { events.(*caddyevents.App).Emit(ctx, name, data) }
	a.emits = events.(*caddyevents.App).ShouldEmit
	a.keep.Emit = a.emit
	if err := a.provisionWebhooks(); err != nil {
		return err
	}

	var trusted []netip.Prefix
	for i, cidr := range a.TrustNetworks {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return fmt.Errorf("trust_networks[%d]: %q is not a network such as 10.0.0.0/8", i, cidr)
		}
		trusted = append(trusted, prefix)
	}
	if a.state, err = useState(backend, a.catalog, a.log); err != nil {
		return err
	}
	if err := registerMetrics(ctx.GetMetricsRegistry()); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	if a.upstreams, err = a.buildUpstreams(ctx, &a.state.endpoints, trusted); err != nil {
		return err
	}
	if a.BackingImages != nil {
		return a.provisionBacking()
	}
	return nil
}

// loadCatalog loads the module that opens the catalog. The default one is
// imported by the root package and not here: a program that needs no SQLite can
// be built without.
func (a *App) loadCatalog(ctx caddy.Context) (catalog.Backend, error) {
	if a.CatalogRaw == nil {
		if _, err := caddy.GetModule("registry.catalog.sqlite"); err != nil {
			return nil, errors.New("catalog: this Caddy is built without registry.catalog.sqlite, the default; name another in the catalog option, or build with github.com/caddy-registry/mirror/storage/catalog/sqlite")
		}
		a.CatalogRaw = json.RawMessage(`{"backend":"sqlite"}`)
	}
	loaded, err := ctx.LoadModule(a, "CatalogRaw")
	if err != nil {
		return nil, fmt.Errorf("catalog: %w", err)
	}
	backend, ok := loaded.(catalog.Backend)
	if !ok {
		return nil, fmt.Errorf("catalog: %T is no catalog", loaded)
	}
	return backend, nil
}

// Check reports what is wrong with the app's own options.
func (a *App) Check() error {
	_, hot := parseSize("hot_cache", a.HotCache, 0)
	_, scrub := parseSize("scrub", a.Scrub, 0)
	return cmp.Or(hot, scrub, a.GC.Check())
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
		if u.limit != (retain.Limit{}) {
			if a.keep.Limits == nil {
				a.keep.Limits = map[string]retain.Limit{}
			}
			a.keep.Limits[up.Name] = u.limit
		}
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
	if err := a.state.tune(tuning{
		backend:   a.backend,
		catalog:   a.catalog,
		log:       a.log,
		mirror:    mirror.Settings{Hot: a.hot, MaxBlob: a.backend.Limits().MaxBlobSize, Emit: a.emit},
		hosted:    hosted.Settings{MaxBlob: a.backend.Limits().MaxBlobSize, Options: a.hosted},
		keep:      a.keep,
		backing:   a.backing(),
		webhooks:  a.webhooks,
		emits:     a.emits,
		upstreams: a.upstreams,
	}); err != nil {
		return err
	}
	if a.open > 0 {
		a.log.Warn("registry_mirror lets everyone who reaches it pull; keep it inside your network, put remote_ip, basic_auth or forward_auth in front of it, or say in its access block who may pull",
			zap.Int("sites", a.open))
	}
	a.warnHosted()
	a.warnBacking()
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
