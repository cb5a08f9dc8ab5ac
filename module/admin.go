package module

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/oci"
)

func init() {
	caddy.RegisterModule(new(Admin))
}

// Admin adds to Caddy's admin API, below `/registry/`:
//
// `POST refresh` with `{"reference": "alpine:3.20"}` asks the upstream what a tag
// means now, whatever is known of it, and fetches the new manifest. It answers
// `{"reference": "docker.io/library/alpine:3.20", "digest": "sha256:…", "before":
// "sha256:…", "changed": true}`; `before` is absent if the tag was not held. It
// takes 9 seconds at most.
//
// `GET status` says how the store is kept; `GET usage` what takes how much;
// `GET repositories?containing=&after=&n=` and `GET tags?repository=&after=&n=`
// list it, up to 1,000 a page; `GET why?reference=` says how a pull would be
// answered.
//
// `GET pins` lists what is never evicted; `POST pins` with `{"reference": "…"}`
// adds to it, and `DELETE pins?reference=` takes from it.
//
// `POST jobs` with `{"kind": "gc"}` begins work that takes its time: `gc`,
// `scrub`, `reindex`, or `purge` with a `"pattern"`; gc and purge with
// `"dry_run": true` change nothing. `GET jobs` and `GET jobs/<id>` say how far it
// is, and `DELETE jobs/<id>` ends it early.
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
	var routes []caddy.AdminRoute
	for path, methods := range map[string]methods{
		"refresh":      {http.MethodPost: refresh},
		"status":       {http.MethodGet: showStatus},
		"usage":        {http.MethodGet: showUsage},
		"repositories": {http.MethodGet: listRepositories},
		"tags":         {http.MethodGet: listTags},
		"why":          {http.MethodGet: explainReference},
		"pins":         {http.MethodGet: listPins, http.MethodPost: pin, http.MethodDelete: unpin},
		"jobs":         {http.MethodGet: listJobs, http.MethodPost: beginJob},
		"jobs/":        {http.MethodGet: showJob, http.MethodDelete: cancelJob},
	} {
		routes = append(routes, caddy.AdminRoute{Pattern: "/registry/" + path, Handler: methods})
	}
	return routes
}

// methods are what one path answers, by the method of a request.
type methods map[string]func(r *http.Request, in *visit) (any, error)

// A visit is a request to the admin API and what answers it.
type visit struct {
	app *App
	*opened
	status int // of a good answer; 0 is 200
}

// patience bounds an answer that is looked up, for whoever asks has no other way
// to bound it.
const patience = time.Minute

// ServeHTTP implements [caddy.AdminHandler].
func (m methods) ServeHTTP(w http.ResponseWriter, r *http.Request) error {
	answer := m[r.Method]
	if answer == nil {
		allowed := strings.Join(slices.Sorted(maps.Keys(m)), ", ")
		w.Header().Set("Allow", allowed)
		return apiError(http.StatusMethodNotAllowed, "%s is not for this path; send %s", r.Method, allowed)
	}
	app := running.enter()
	if app == nil {
		return apiError(http.StatusServiceUnavailable, "no configuration with the registry app is running; load one that has a registry_mirror or the registry option")
	}
	defer app.state.leave()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	open, err := app.state.open(ctx)
	if err != nil {
		return explain(err, "")
	}
	in := &visit{app: app, opened: open, status: http.StatusOK}
	found, err := answer(r.WithContext(ctx), in)
	if err != nil {
		return err
	}
	body, err := json.Marshal(found)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(in.status)
	_, err = w.Write(append(body, '\n'))
	return err
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

func refresh(r *http.Request, in *visit) (any, error) {
	reference, err := namedIn(r)
	if err != nil {
		return nil, err
	}
	target, ref, err := in.app.upstreams.Find(reference)
	if err != nil {
		return nil, explain(err, "")
	}
	refreshed, err := in.mirror.Refresh(r.Context(), target, ref)
	if err != nil {
		return nil, explain(err, refreshed.Reference)
	}
	return refreshed, nil
}

// namedIn is the reference that a body names.
func namedIn(r *http.Request) (string, error) {
	var asked struct {
		Reference string `json:"reference"`
	}
	if err := readBody(r, &asked, `{"reference": "alpine:3.20"}`); err != nil {
		return "", err
	}
	return asked.Reference, named(asked.Reference)
}

func named(reference string) error {
	if reference == "" {
		return apiError(http.StatusBadRequest, `"reference" is empty; name a tag such as alpine:3.20`)
	}
	return nil
}

// find is what a person means by a reference: as the list of repositories has it,
// or else as it stands after docker pull.
func (in *visit) find(ctx context.Context, reference string) (mirror.Target, oci.Reference, error) {
	if err := named(reference); err != nil {
		return mirror.Target{}, oci.Reference{}, err
	}
	target, ref, err := in.mirror.Find(ctx, in.app.upstreams, reference)
	if err != nil {
		return target, ref, explain(err, "")
	}
	return target, ref, nil
}

// maxBody bounds a body, which names one reference or one job.
const maxBody = 4 << 10

// readBody reads a body that is one JSON object like the example.
func readBody(r *http.Request, into any, example string) error {
	err := decode(http.MaxBytesReader(nil, r.Body, maxBody), into)
	if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return apiError(http.StatusRequestEntityTooLarge, "the body has more than %d bytes; send one like %s", large.Limit, example)
	}
	if err != nil {
		return apiError(http.StatusBadRequest, "the body is not like %s: %v", example, err)
	}
	return nil
}

// readQuery reads a query that has no more than the given parameters, and each
// of them once.
func readQuery(r *http.Request, known ...string) (url.Values, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, apiError(http.StatusBadRequest, "the query cannot be read: %v", err)
	}
	for name, values := range query {
		if !slices.Contains(known, name) || len(values) > 1 {
			if len(known) == 0 {
				return nil, apiError(http.StatusBadRequest, "%.100q is not for this path, which has no parameters", name)
			}
			return nil, apiError(http.StatusBadRequest, "%.100q is not for this path, or is given twice; there are %s", name, strings.Join(known, ", "))
		}
	}
	return query, nil
}

// A page is which part of a list is asked for.
type page struct {
	after string
	n     int
}

// maxPage is how many of a list one answer has.
const maxPage = 1000

func readPage(query url.Values) (page, error) {
	p := page{query.Get("after"), 100}
	if text := query.Get("n"); text != "" {
		var err error
		if p.n, err = strconv.Atoi(text); err != nil || p.n < 1 || p.n > maxPage {
			return p, apiError(http.StatusBadRequest, "n: %.100q is no number from 1 to %d", text, maxPage)
		}
	}
	return p, nil
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
