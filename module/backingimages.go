package module

import (
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/access"
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
	rules access.Rules
	token string
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
	if b.rules, err = b.Access.parse(); err != nil {
		return err
	}
	if b.asker, err = b.Access.asker(); err != nil {
		return err
	}
	if b.APIToken != "" {
		if b.token, err = resolve(b.APIToken); err == nil {
			err = checkToken(b.token)
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
	app.images.all++
	if !b.rules.Open(access.Pull) {
		app.images.private++
	}
	for _, action := range [...]access.Action{access.Push, access.Delete} {
		if b.rules != nil && b.rules.Open(action) {
			b.log.Warn("access: a rule lets everyone who reaches this site write to it", zap.Stringer("action", action))
		}
	}
	b.state = app.state
	return nil
}

func (b *BackingSite) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

var (
	_ caddy.Provisioner           = (*BackingSite)(nil)
	_ caddyhttp.MiddlewareHandler = (*BackingSite)(nil)
)
