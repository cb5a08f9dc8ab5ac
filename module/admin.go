package module

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/mirror"
)

func init() {
	caddy.RegisterModule(new(Admin))
}

// Admin adds to Caddy's admin API:
//
// `POST /registry/refresh` with `{"reference": "alpine:3.20"}` asks the upstream
// what a tag means now, whatever is known of it, and fetches the new manifest.
// It answers `{"reference": "docker.io/library/alpine:3.20", "digest":
// "sha256:…", "before": "sha256:…", "changed": true}`; `before` is absent if the
// tag was not held. It takes 9 seconds at most.
//
// An error is `{"error": "…"}`, a sentence that says what to do.
type Admin struct{}

// CaddyModule returns the Caddy module information.
func (*Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.registry",
		New: func() caddy.Module { return new(Admin) },
	}
}

// Provision has the admin API's own metrics show those of the mirror. The app
// does the same, but where a configuration is rejected before its apps are made,
// Caddy has already replaced the admin API, with metrics of that configuration.
func (*Admin) Provision(ctx caddy.Context) error {
	return registerMetrics(ctx.GetMetricsRegistry())
}

// Routes returns the routes of the registry app.
func (*Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: "/registry/refresh", Handler: caddy.AdminHandlerFunc(refresh)},
	}
}

// running are the apps that have started and have not been cleaned up, the
// latest last: two during a reload. The admin API finds its app here, at each
// request. It cannot keep one: Caddy makes the admin server anew before it
// provisions apps, and does not put the old one back when that fails.
var running runningApps

type runningApps struct {
	mu   sync.Mutex
	apps []*App
}

func (r *runningApps) add(a *App) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.apps = append(r.apps, a)
}

func (r *runningApps) remove(a *App) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.apps = slices.DeleteFunc(r.apps, func(other *App) bool { return other == a })
}

// enter returns the latest app, or nil. Its state stays open until the caller
// has left it.
func (r *runningApps) enter() *App {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.apps) == 0 {
		return nil
	}
	latest := r.apps[len(r.apps)-1]
	if !latest.state.enter() {
		return nil // not while the app has its reference, which it gives up later
	}
	return latest
}

// maxReference bounds a body that names one reference.
const maxReference = 4 << 10

func refresh(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return apiError(http.StatusMethodNotAllowed, "%.20q does nothing here; use POST", r.Method)
	}
	var asked struct {
		Reference string `json:"reference"`
	}
	if err := decode(http.MaxBytesReader(w, r.Body, maxReference), &asked); err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			return apiError(http.StatusRequestEntityTooLarge, "the body has more than %d bytes; send one reference", large.Limit)
		}
		return apiError(http.StatusBadRequest, `the body is not like {"reference": "alpine:3.20"}: %v`, err)
	}
	if asked.Reference == "" {
		return apiError(http.StatusBadRequest, `"reference" is empty; name a tag such as alpine:3.20`)
	}
	app := running.enter()
	if app == nil {
		return apiError(http.StatusServiceUnavailable, "no configuration with the registry app is running; load one that has a registry_mirror or the registry option")
	}
	defer app.state.leave()
	open, err := app.state.open(r.Context())
	if err != nil {
		return explain(err, "")
	}
	target, ref, err := app.upstreams.Find(asked.Reference)
	if err != nil {
		return explain(err, "")
	}
	refreshed, err := open.Refresh(r.Context(), target, ref)
	if err != nil {
		return explain(err, refreshed.Reference)
	}
	body, err := json.Marshal(refreshed)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = io.Copy(w, bytes.NewReader(append(body, '\n')))
	return err
}

// decode reads one JSON object, of which every field is known.
func decode(body io.Reader, into any) error {
	decoder := json.NewDecoder(body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return err
	}
	if _, err := decoder.Token(); err == nil {
		return errors.New("there is more behind it")
	} else if err != io.EOF {
		return err
	}
	return nil
}

func explain(err error, about string) error {
	status, message := mirror.Explain(err, about)
	return apiError(status, "%s", message)
}

func apiError(status int, format string, args ...any) error {
	return caddy.APIError{HTTPStatus: status, Err: fmt.Errorf(format, args...)}
}

var (
	_ caddy.Provisioner = (*Admin)(nil)
	_ caddy.AdminRouter = (*Admin)(nil)
)
