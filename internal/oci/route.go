package oci

import "strings"

// Kind names an endpoint of the distribution API.
type Kind int

const (
	KindUnknown    Kind = iota
	KindPing            // /v2/
	KindCatalog         // /v2/_catalog
	KindManifest        // /v2/<name>/manifests/<reference>
	KindBlob            // /v2/<name>/blobs/<digest>
	KindUpload          // /v2/<name>/blobs/uploads/[<session>]
	KindTags            // /v2/<name>/tags/list
	KindReferrers       // /v2/<name>/referrers/<digest>
	KindSearchPing      // /v1/_ping
	KindSearch          // /v1/search
	KindObsolete        // what else the API had before /v2/
)

// A Route is an API path taken apart. Name and Ref are as the client wrote
// them: not yet checked.
type Route struct {
	Kind Kind
	Name string
	Ref  string // reference, digest or upload session
}

// ParsePath takes an API path apart. It reports false for a path outside /v2/,
// which belongs to somebody else, unless it is one of the API before it. A path
// inside that names no endpoint has KindUnknown.
//
// It reads from the right, because a name may itself have a component called
// "blobs" or "manifests".
func ParsePath(path string) (Route, bool) {
	rest, ok := strings.CutPrefix(path, "/v2")
	if !ok || rest != "" && rest[0] != '/' {
		return parseOld(path)
	}
	rest = strings.TrimPrefix(rest, "/")
	switch rest {
	case "":
		return Route{Kind: KindPing}, true
	case "_catalog":
		return Route{Kind: KindCatalog}, true
	}
	if name, ok := strings.CutSuffix(rest, "/tags/list"); ok {
		return Route{Kind: KindTags, Name: name}, true
	}
	cut := strings.LastIndexByte(rest, '/')
	if cut < 0 {
		return Route{}, true
	}
	before, last := rest[:cut], rest[cut+1:]
	if name, ok := strings.CutSuffix(before, "/blobs/uploads"); ok {
		return Route{Kind: KindUpload, Name: name, Ref: last}, true
	}
	if name, ok := strings.CutSuffix(before, "/blobs"); ok {
		if last == "uploads" {
			return Route{Kind: KindUpload, Name: name}, true
		}
		return Route{Kind: KindBlob, Name: name, Ref: last}, true
	}
	if name, ok := strings.CutSuffix(before, "/manifests"); ok {
		return Route{Kind: KindManifest, Name: name, Ref: last}, true
	}
	if name, ok := strings.CutSuffix(before, "/referrers"); ok {
		return Route{Kind: KindReferrers, Name: name, Ref: last}, true
	}
	return Route{}, true
}

// parseOld takes a path of the first API apart, of which clients still use the
// search. Other paths of /v1/ may be somebody else's.
func parseOld(path string) (Route, bool) {
	switch path {
	case "/v1/_ping":
		return Route{Kind: KindSearchPing}, true
	case "/v1/search":
		return Route{Kind: KindSearch}, true
	}
	for _, first := range [...]string{"/v1/repositories", "/v1/images", "/v1/users"} {
		if rest, ok := strings.CutPrefix(path, first); ok && (rest == "" || rest[0] == '/') {
			return Route{Kind: KindObsolete}, true
		}
	}
	return Route{}, false
}
