package module

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	images "github.com/caddy-registry/mirror/internal/backing/api"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

func init() {
	caddy.RegisterModule(new(BackingSite))
}

// BackingSite answers the API of backing images (`/v1/…`, `/health`, `/ready`)
// from the store of the `registry` app. Every other path goes on to the next
// handler.
//
// It adds these fields to access logs: `registry_image`, `registry_version`, and
// for a request that failed `registry_error`. A request whose path has a token in it
// is in no access log.
type BackingSite struct {
	// Who may do what here; names in `on` are those of images, without the prefix.
	// Default: everyone may read. Without `api_token`, nobody may write.
	Access *Access `json:"access,omitempty"`

	// Whoever sends it as `Authorization: Bearer <token>` is `user:token`, and may
	// do everything unless `access` says otherwise. Write it as a placeholder.
	// Default: none.
	APIToken string `json:"api_token,omitempty"`

	asker
	site  images.Site
	state *state
	log   *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (*BackingSite) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.backing_images",
		New: func() caddy.Module { return new(BackingSite) },
	}
}

// Provision checks the site, and has the app keep backing images even if its option
// for them is left out.
func (b *BackingSite) Provision(ctx caddy.Context) error {
	b.log = ctx.Logger()
	loaded, err := ctx.App("registry")
	if err != nil {
		return fmt.Errorf("registry app: %w", err)
	}
	app := loaded.(*App)
	if b.site.Rules, err = b.Access.parse(); err != nil {
		return err
	}
	if b.asker, err = b.Access.asker(); err != nil {
		return err
	}
	if b.APIToken != "" {
		if b.site.APIToken, err = resolve(b.APIToken); err == nil {
			err = checkToken(b.site.APIToken)
		}
		if err != nil {
			return fmt.Errorf("api_token: %w", err)
		}
	}
	if app.BackingImages == nil {
		app.BackingImages = new(BackingImages)
		if err := app.provisionBacking(); err != nil {
			return err
		}
	}
	b.site.MaxImage = app.BackingImages.maxImage
	app.images.all++
	if !b.site.Rules.Open(access.Pull) {
		app.images.private++
	}
	for _, action := range [...]access.Action{access.Push, access.Delete} {
		if b.site.Rules != nil && b.site.Rules.Open(action) {
			b.log.Warn("access: a rule lets everyone who reaches this site write to it", zap.Stringer("action", action))
		}
	}
	b.state = app.state
	return nil
}

func (b *BackingSite) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	// What is left of Docker's first API is a mirror's.
	if _, mirrors := oci.ParsePath(r.URL.Path); mirrors || !images.Serves(r.URL.Path) {
		return next.ServeHTTP(w, r)
	}
	// The configuration may be cleaned up while this request runs; the state
	// stays until it leaves.
	if !b.state.enter() {
		unavailable(w)
		return nil
	}
	defer b.state.leave()
	open, err := b.state.open(r.Context())
	if err != nil {
		b.log.Error("opening the store", zap.Error(err))
		unavailable(w)
		return nil
	}
	to := newSender(w, r)
	caller := access.Caller{Addr: clientAddr(r)}
	if b.identity != "" {
		caller.Identity, caller.Err = b.named(r)
	}
	report := open.api.ServeHTTP(to, r, &b.site, caller)
	b.note(r, report)
	if report.Abort {
		level := zapcore.WarnLevel
		if to.hungUp() {
			level = zapcore.DebugLevel
		}
		b.log.Log(level, "answer broken off", zap.String("image", report.Image), zap.String("version", report.Version), zap.Error(report.Err))
		panic(http.ErrAbortHandler)
	}
	return nil
}

// note tells the access log of a request. A path that has a token in it is not for a
// log, and the access log has the path of every line that it has.
func (b *BackingSite) note(r *http.Request, report images.Report) {
	if report.Secret {
		caddyhttp.SetVar(r.Context(), caddyhttp.LogSkipVar, true)
		b.log.Debug("asked by a token in the path", zap.String("image", report.Image), zap.String("version", report.Version), zap.Error(report.Err))
		return
	}
	if extra, ok := r.Context().Value(caddyhttp.ExtraLogFieldsCtxKey).(*caddyhttp.ExtraLogFields); ok {
		line := zap.Inline(loggedImage{report})
		line.Key = "backing" // is not written, but tells it from another handler's
		extra.Set(line)
	}
}

// unavailable answers for a store that is not open.
func unavailable(w http.ResponseWriter) {
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Cache-Control", "no-store")
	header.Set("Retry-After", "5")
	w.WriteHeader(http.StatusServiceUnavailable)
	body, _ := json.Marshal(map[string]any{
		"title": "the store cannot be reached", "status": http.StatusServiceUnavailable, "code": backing.StoreAway,
		"detail": "the store of the images is not open; Caddy's log tells why",
	})
	w.Write(append(body, '\n'))
}

// ready is what GET /ready tells. Images are served and taken in without Longhorn.
func (o *opened) ready(ctx context.Context) []images.Check {
	check := images.Check{Name: "store", OK: true}
	room, err := o.keeper.Store().Reserve(readyRoom)
	if err == nil {
		room.Release()
	}
	if b, ok := o.keeper.Backlog(); ok && err == nil {
		err = b.Err
	}
	if err != nil {
		check.OK, check.Message = false, "nothing can be stored at the moment; Caddy's log tells why"
		if errors.Is(err, storage.ErrFull) {
			check.Message = "the store is full"
		}
	}
	checks := []images.Check{check}
	for _, r := range o.images.Reach(ctx) {
		check := images.Check{Name: "longhorn " + r.Cluster, OK: r.Err == nil, Warning: true}
		if !check.OK {
			check.Message = "Longhorn does not answer; Caddy's log tells why"
		}
		checks = append(checks, check)
	}
	return checks
}

// readyRoom is what has to fit into a store that is ready, in bytes.
const readyRoom = 1 << 20

// loggedImage is a report as fields of the access log, made when a line is written.
type loggedImage struct{ images.Report }

func (l loggedImage) MarshalLogObject(line zapcore.ObjectEncoder) error {
	if l.Image != "" {
		line.AddString("registry_image", l.Image)
	}
	if l.Version != "" {
		line.AddString("registry_version", l.Version)
	}
	if l.Err != nil {
		line.AddString("registry_error", l.Err.Error())
	}
	return nil
}

var (
	_ caddy.Provisioner           = (*BackingSite)(nil)
	_ caddyhttp.MiddlewareHandler = (*BackingSite)(nil)
)
