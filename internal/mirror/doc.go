// Package mirror is the policy: what is asked of the store, of a fill and of
// an upstream to answer a request, and what the client is told. It is the only
// place that turns outcomes into status codes (codes.go).
//
// A pull reads: [Site.ServeHTTP] takes the request apart and [Site.Resolve]
// finds the repository; [Mirror.manifest] or [Mirror.blob] finds the content;
// serve.go sends it.
package mirror
