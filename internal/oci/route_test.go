package oci

import (
	"strings"
	"testing"
)

func TestParsePath(t *testing.T) {
	const d = "sha256:" + hex256
	for _, c := range []struct {
		path string
		want Route
	}{
		{"/v2", Route{Kind: KindPing}},
		{"/v2/", Route{Kind: KindPing}},
		{"/v2/_catalog", Route{Kind: KindCatalog}},

		{"/v2/nginx/manifests/latest", Route{KindManifest, "nginx", "latest"}},
		{"/v2/library/nginx/manifests/" + d, Route{KindManifest, "library/nginx", d}},
		{"/v2/nginx/blobs/" + d, Route{KindBlob, "nginx", d}},
		{"/v2/nginx/tags/list", Route{Kind: KindTags, Name: "nginx"}},
		{"/v2/nginx/referrers/" + d, Route{KindReferrers, "nginx", d}},
		{"/v2/nginx/blobs/uploads/", Route{Kind: KindUpload, Name: "nginx"}},
		{"/v2/nginx/blobs/uploads", Route{Kind: KindUpload, Name: "nginx"}},
		{"/v2/nginx/blobs/uploads/0a1b", Route{KindUpload, "nginx", "0a1b"}},

		// Names with components that are also words of the API.
		{"/v2/blobs/manifests/latest", Route{KindManifest, "blobs", "latest"}},
		{"/v2/manifests/manifests/manifests", Route{KindManifest, "manifests", "manifests"}},
		{"/v2/a/manifests/blobs/" + d, Route{KindBlob, "a/manifests", d}},
		{"/v2/a/blobs/blobs/" + d, Route{KindBlob, "a/blobs", d}},
		{"/v2/uploads/blobs/" + d, Route{KindBlob, "uploads", d}},
		{"/v2/a/uploads/manifests/blobs", Route{KindManifest, "a/uploads", "blobs"}},
		{"/v2/a/blobs/uploads/manifests/latest", Route{KindManifest, "a/blobs/uploads", "latest"}},
		{"/v2/a/blobs/uploads/blobs/" + d, Route{KindBlob, "a/blobs/uploads", d}},
		{"/v2/a/blobs/blobs/uploads/", Route{Kind: KindUpload, Name: "a/blobs"}},
		{"/v2/a/blobs/blobs/uploads/0a1b", Route{KindUpload, "a/blobs", "0a1b"}},
		{"/v2/a/manifests/tags/list", Route{Kind: KindTags, Name: "a/manifests"}},
		{"/v2/a/tags/list/tags/list", Route{Kind: KindTags, Name: "a/tags/list"}},
		{"/v2/a/tags/manifests/list", Route{KindManifest, "a/tags", "list"}},
		{"/v2/tags/manifests/list", Route{KindManifest, "tags", "list"}},
		{"/v2/a/referrers/referrers/" + d, Route{KindReferrers, "a/referrers", d}},
		{"/v2/v2/manifests/v2", Route{KindManifest, "v2", "v2"}},

		// Ours, but no endpoint.
		{"/v2/nginx", Route{}},
		{"/v2/nginx/", Route{}},
		{"/v2/tags/list", Route{}},
		{"/v2/manifests/latest", Route{}},
		{"/v2/blobs/" + d, Route{}},
		{"/v2/blobs/uploads/", Route{}},
		{"/v2/nginx/tags", Route{}},
		{"/v2/nginx/tags/", Route{}},
		{"/v2/nginx/manifests", Route{}},
		{"/v2//", Route{}},
		{"/v2/_catalog/", Route{}},
		{"/v2/nginx/layers/" + d, Route{}},

		// What is left of the API before.
		{"/v1/_ping", Route{Kind: KindSearchPing}},
		{"/v1/search", Route{Kind: KindSearch}},
		{"/v1/repositories/library/nginx/images", Route{Kind: KindObsolete}},
		{"/v1/images/0a1b/ancestry", Route{Kind: KindObsolete}},
		{"/v1/users/", Route{Kind: KindObsolete}},
		{"/v1/users", Route{Kind: KindObsolete}},

		// What the client wrote is not checked here, only taken apart.
		{"/v2/UPPER/manifests/latest", Route{KindManifest, "UPPER", "latest"}},
		{"/v2/nginx/manifests/", Route{Kind: KindManifest, Name: "nginx"}},
		{"/v2//manifests/latest", Route{KindManifest, "", "latest"}},
	} {
		got, ours := ParsePath(c.path)
		if !ours || got != c.want {
			t.Errorf("ParsePath(%q) = %+v, %v, want %+v", c.path, got, ours, c.want)
		}
	}
	for _, path := range []string{"", "/", "/v1", "/v1/", "/v1/_pin", "/v1/_ping/", "/v1/search/x", "/v1/usersx", "/v1/api/users/", "/x/v1/search", "/v1/repositoriesx", "/v2x", "/v2x/nginx/manifests/latest", "/v20/", "v2/", "/V2/", "/x/v2/", "/v2.", "/token"} {
		if got, ours := ParsePath(path); ours {
			t.Errorf("ParsePath(%q) = %+v, want it left to others", path, got)
		}
	}
}

// wire writes a route as a client does.
func wire(r Route) string {
	switch r.Kind {
	case KindManifest:
		return "/v2/" + r.Name + "/manifests/" + r.Ref
	case KindBlob:
		return "/v2/" + r.Name + "/blobs/" + r.Ref
	case KindUpload:
		return "/v2/" + r.Name + "/blobs/uploads/" + r.Ref
	case KindTags:
		return "/v2/" + r.Name + "/tags/list"
	case KindReferrers:
		return "/v2/" + r.Name + "/referrers/" + r.Ref
	case KindCatalog:
		return "/v2/_catalog"
	default:
		return "/v2/"
	}
}

func FuzzParsePath(f *testing.F) {
	for _, path := range []string{
		"/v2", "/v2/", "/v2x", "/v2/_catalog", "/v2/a/manifests/b", "/v2/a/blobs/sha256:x",
		"/v2/a/blobs/uploads", "/v2/a/blobs/uploads/", "/v2/a/blobs/uploads/x", "/v2/a/tags/list",
		"/v1/_ping", "/v1/search", "/v1/users/x", "/v1/imagesx", "/v2/a/referrers/x", "/v2//", "/v2/a/b/../../manifests/x", "/v2/a/blobs/uploads/manifests/x",
	} {
		f.Add(path, "blobs/uploads", "latest")
	}
	f.Add("", "manifests", "list")
	f.Add("/v2/tags/list", "a/tags", "sha256:"+hex256)
	f.Fuzz(func(t *testing.T, path, name, ref string) {
		route, ours := ParsePath(path)
		old := route.Kind == KindSearchPing || route.Kind == KindSearch || route.Kind == KindObsolete
		if want := path == "/v2" || strings.HasPrefix(path, "/v2/"); ours != want && !old || old && (want || !ours || !strings.HasPrefix(path, "/v1/")) {
			t.Errorf("ParsePath(%q) says ours: %v", path, ours)
		}
		if !ours && route != (Route{}) {
			t.Errorf("ParsePath(%q) = %+v for what is not ours", path, route)
		}
		if ours && route.Kind != KindUnknown && !old {
			if got := wire(route); got != path && got != path+"/" {
				t.Errorf("ParsePath(%q) = %+v, which is written %q", path, route, got)
			}
		}

		// Every valid name and reference comes back as it went in.
		if !ValidName(name) {
			return
		}
		r, err := ParseReference(ref)
		if err != nil {
			return
		}
		routes := []Route{{KindManifest, name, ref}, {Kind: KindTags, Name: name}, {Kind: KindUpload, Name: name}}
		if r.Digest != "" {
			routes = append(routes, Route{KindBlob, name, ref}, Route{KindReferrers, name, ref})
		}
		for _, want := range routes {
			if got, ours := ParsePath(wire(want)); !ours || got != want {
				t.Errorf("ParsePath(%q) = %+v, %v, want %+v", wire(want), got, ours, want)
			}
		}
	})
}
