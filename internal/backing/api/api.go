// Package api answers the HTTP API of backing images: their life, their bytes for
// Longhorn and for people, and uploads that can be resumed. It keeps nothing itself;
// the [backing.Library] does.
//
// [API.ServeHTTP] finds the route of a request in one table (routes.go), asks the
// rules of the site whether the caller may (gate.go), and calls what answers. Nothing
// of a body is read before. Whatever fails becomes application/problem+json by the
// one table in codes.go.
package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/tus/tusd/v2/pkg/handler"
	"go.uber.org/zap"
	"golang.org/x/sync/singleflight"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/content"
)

// Parts are what an API works with. It closes none of them.
type Parts struct {
	Library *backing.Library
	// Ready is what GET /ready tells; nil: nothing is looked at. It must answer within
	// its context.
	Ready func(context.Context) []Check
	Log   *zap.Logger
}

// A Check is one thing that GET /ready has looked at.
type Check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Warning says that the service is of use without it.
	Warning bool   `json:"warning,omitempty"`
	Message string `json:"message,omitempty"`
}

// Site is what one place of the configuration adds.
type Site struct {
	// Rules say who may do what; their repositories are names of images. Nil:
	// everyone may read, and nobody may write but with the APIToken.
	Rules access.Rules
	// APIToken makes whoever sends it as a bearer the identity "token", who may do
	// everything where there are no Rules. Empty: there is none.
	APIToken string
	// MaxImage is the largest file that is taken, in bytes, so that a larger one is
	// refused before it is read; 0: the library alone says.
	MaxImage int64
}

// A Report says what became of a request, for logs.
type Report struct {
	Image, Version string
	// Identity is who asked, which may be found out here.
	Identity string
	// Secret says that the path of the request has a token in it, and no log may
	// have it.
	Secret bool
	// Err is why the request failed, or nil.
	Err error
	// Abort says that the answer's header is out and its body cannot be completed:
	// the connection must be broken, so that the client sees it.
	Abort bool
}

// An API answers requests for a library.
type API struct {
	library *backing.Library
	ready   func(context.Context) []Check
	log     *zap.Logger
	now     func() time.Time

	tus *handler.UnroutedHandler
	// done are uploads that have become versions, for clients that missed the answer
	// to their last bytes.
	done   *lru.Cache[string, finished]
	taking singleflight.Group // of uploads that become versions
}

// New returns an API.
func New(p Parts) (*API, error) {
	a := &API{library: p.Library, ready: p.Ready, log: p.Log, now: time.Now}
	var err error
	if a.done, err = lru.New[string, finished](maxFinished); err != nil {
		return nil, err
	}
	a.tus, err = a.newTus()
	return a, err
}

// Serves reports whether a path is one of the API's.
func Serves(path string) bool {
	switch path {
	case "/health", "/ready", "/v1":
		return true
	}
	return strings.HasPrefix(path, "/v1/")
}

// ServeHTTP answers a caller's request. The path is that of [Serves]: a prefix before
// it has been removed.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request, site *Site, caller access.Caller) Report {
	if r.ContentLength != 0 {
		r.Body = content.Incoming(r.Body)
	}
	x := &exchange{API: a, site: site, w: w, r: r, caller: caller}
	x.identify()
	if err := x.serve(); err != nil {
		x.report.Err = err
		if x.listens() && !x.report.Abort {
			content.Hasten(w, r)
			x.problem(err)
		}
	}
	x.report.Identity = x.caller.Identity
	return x.report
}

// An exchange is one request and its answer.
type exchange struct {
	*API
	site   *Site
	w      http.ResponseWriter
	r      *http.Request
	caller access.Caller
	proven bool // the caller has sent the site's token
	report Report
	vars   map[string]string // what the path has in place of the route's variables

	resumed *backing.Upload // that the path names
	kept    error           // what went wrong within tusd
}

// listens reports whether the client may still read an answer. The context of a
// request ends when its body breaks off, and whoever has sent only half of one and
// hears nothing would take it for success.
func (x *exchange) listens() bool {
	return x.r.Context().Err() == nil || x.r.Method != http.MethodGet && x.r.Method != http.MethodHead
}
