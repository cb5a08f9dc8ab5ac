package api

import (
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
)

// A method answers one method of a route. GET answers HEAD, too.
type method struct {
	action access.Action // on the image that the path names; 0: what serve asks itself
	serve  func(*exchange) error
}

// A route is a path, whose components in braces stand for any one that is not empty.
type route struct {
	path    string
	methods map[string]method
}

const (
	get, post, put, patch, del = http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete

	images   = "/v1/backing-images"
	versions = images + "/{name}/versions/{version}"
)

// routes are all paths but those of uploads, which tus answers.
var routes = split([]route{
	{"/health", map[string]method{get: {0, (*exchange).health}}},
	{"/ready", map[string]method{get: {0, (*exchange).readiness}}},
	{images, map[string]method{get: {0, (*exchange).list}, post: {0, (*exchange).create}}},
	{images + "/{name}", map[string]method{get: {access.Pull, (*exchange).image}, patch: {access.Push, (*exchange).edit}, del: {access.Delete, (*exchange).remove}}},
	{images + "/{name}/content", map[string]method{put: {access.Push, (*exchange).put}}},
	{images + "/{name}/download", map[string]method{get: {access.Pull, (*exchange).download}}},
	{images + "/{name}/versions", map[string]method{get: {access.Pull, (*exchange).versions}}},
	{versions, map[string]method{get: {access.Pull, (*exchange).version}, del: {access.Delete, (*exchange).remove}}},
	{versions + "/content", map[string]method{put: {access.Push, (*exchange).put}}},
	{versions + "/registrations", map[string]method{get: {access.Pull, (*exchange).registrations}, post: {access.Push, (*exchange).register}}},
	{versions + "/registrations/{cluster}", map[string]method{get: {access.Pull, (*exchange).registration}, del: {access.Delete, (*exchange).unregister}}},
	{versions + "/manifests/{kind}", map[string]method{get: {access.Pull, (*exchange).manifest}}},
	{images + "/{name}/tags", map[string]method{get: {access.Pull, (*exchange).tags}}},
	{images + "/{name}/tags/{tag}", map[string]method{get: {access.Pull, (*exchange).tag}, put: {access.Push, (*exchange).setTag}, del: {access.Delete, (*exchange).removeTag}}},
	{images + "/{name}/tokens", map[string]method{get: {access.Push, (*exchange).tokens}, post: {access.Push, (*exchange).addToken}}},
	{images + "/{name}/tokens/{token}", map[string]method{del: {access.Push, (*exchange).removeToken}}},
	{"/v1/files/{sha512}/{file}", map[string]method{get: {0, (*exchange).file}}},
	{"/v1/files/t/{secret}/{sha512}/{file}", map[string]method{get: {0, (*exchange).secretFile}}},
	{"/v1/jobs", map[string]method{get: {0, (*exchange).jobs}}},
	{"/v1/jobs/{job}", map[string]method{get: {0, (*exchange).job}, del: {0, (*exchange).cancelJob}}},
})

type splitRoute struct {
	components []string
	methods    map[string]method
	allow      string
}

func split(all []route) []splitRoute {
	parts := make([]splitRoute, len(all))
	for i, r := range all {
		var allow []string
		for m := range r.methods {
			if allow = append(allow, m); m == get {
				allow = append(allow, http.MethodHead)
			}
		}
		slices.Sort(allow)
		parts[i] = splitRoute{strings.Split(r.path[1:], "/"), r.methods, strings.Join(allow, ", ")}
	}
	return parts
}

// match fits a path, whose components are still escaped, to the route.
func (r splitRoute) match(components []string) (map[string]string, bool) {
	if len(components) != len(r.components) {
		return nil, false
	}
	var vars map[string]string
	for i, want := range r.components {
		if want[0] != '{' {
			if components[i] != want {
				return nil, false
			}
			continue
		}
		value, err := url.PathUnescape(components[i])
		if err != nil || value == "" {
			return nil, false
		}
		if vars == nil {
			vars = map[string]string{}
		}
		vars[want[1:len(want)-1]] = value
	}
	return vars, true
}

// Bounds of what a request may bring.
const (
	maxPath   = 2048
	maxQuery  = 4096
	maxHeader = 16 << 10 // the value of one that is taken apart
)

func (x *exchange) serve() error {
	path := x.r.URL.EscapedPath()
	// A token is no log's, whatever else is wrong with the request.
	x.report.Secret = strings.HasPrefix(path, "/v1/files/t/")
	if len(path) > maxPath || len(x.r.URL.RawQuery) > maxQuery {
		return fail(malformed, "a path has at most %d bytes, and a query %d", maxPath, maxQuery)
	}
	if path == uploadsPath || strings.HasPrefix(path, uploadsPath+"/") {
		return x.upload()
	}
	components := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for _, r := range routes {
		vars, ok := r.match(components)
		if !ok {
			continue
		}
		name := x.r.Method
		if name == http.MethodHead {
			name = get
		}
		m, ok := r.methods[name]
		if !ok {
			x.w.Header().Set("Allow", r.allow)
			return fail(badMethod, "this path answers %s", r.allow)
		}
		x.vars = vars
		if err := x.checkVars(name); err != nil {
			return err
		}
		if m.action != 0 {
			if err := x.allow(m.action, vars["name"]); err != nil {
				return err
			}
		}
		return m.serve(x)
	}
	return fail(notFound, "there is nothing at this path of the API")
}

// checkVars fails for names that nothing can have: what is to be made cannot be, and
// anything else is not there.
func (x *exchange) checkVars(method string) error {
	code := notFound
	if method == put || method == post {
		code = malformed
	}
	if name, ok := x.vars["name"]; ok {
		if !validImage(name) {
			return fail(code, "%.80q cannot be the name of an image: that has at most %d lower-case letters and digits, with single '.', '_' or '-' in between", name, maxName)
		}
		x.report.Image = name
	}
	if version, ok := x.vars["version"]; ok {
		if !validReference(version) {
			return fail(code, "%.80q names no version: write its name, a tag, or a digest as in sha512:…", version)
		}
		x.report.Version = version
	}
	if tag, ok := x.vars["tag"]; ok && !oci.ValidTag(tag) {
		return fail(code, "%.80q is no tag: that has at most 128 letters, digits, '_', '.' and '-', and does not begin with one of the last two", tag)
	}
	return nil
}
