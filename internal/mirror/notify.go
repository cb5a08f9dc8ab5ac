package mirror

import (
	"net"
	"net/http"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/oci"
)

// notify tells whoever listens of what the request has done. It is called
// before the client is answered, and costs nothing where nobody listens.
//
// What does not apply is left empty: from is of a mount only. A blob needs no
// media type.
func (x *exchange) notify(a notify.Action, d digest.Digest, mediaType string, size int64, tag, from string) {
	tell := x.mirror.notify.Load()
	if tell == nil || *tell == nil || a == notify.Pull && !x.mirror.pulls.Load() {
		return
	}
	if x.id == "" {
		x.id = notify.NewID()
	}
	e := notify.Event{
		Action: a, At: x.mirror.now().UTC(), Repository: x.target.addressed(), From: from, Tag: tag,
		Digest: d, MediaType: mediaType, Size: size,
		Actor: x.caller.Identity, Request: x.id, Method: x.r.Method, Host: x.r.Host, UserAgent: x.r.UserAgent(),
	}
	if x.caller.Addr.IsValid() {
		e.Addr = x.caller.Addr.Unmap().String()
	} else if host, _, err := net.SplitHostPort(x.r.RemoteAddr); err == nil {
		e.Addr = host
	}
	if d != "" && a != notify.Delete {
		kind := "/blobs/"
		if x.route.Kind == oci.KindManifest {
			kind = "/manifests/"
		} else if mediaType == "" {
			e.MediaType = "application/octet-stream"
		}
		e.URL = x.scheme() + "://" + x.r.Host + "/v2/" + e.Repository + kind + string(d)
	}
	(*tell)(e)
}

// pulled is notify for what is about to be sent of something that is hosted
// here. What is mirrored is pulled too often, and of no news to anybody.
func (x *exchange) pulled(d digest.Digest, mediaType string, size int64, tag string) {
	if x.target.Upstream == nil && x.r.Method == http.MethodGet {
		x.notify(notify.Pull, d, mediaType, size, tag, "")
	}
}

// scheme is how the client has reached this site, as far as a proxy in front of
// it says; nothing is decided by it.
func (x *exchange) scheme() string {
	if x.r.TLS != nil || x.r.Header.Get("X-Forwarded-Proto") == "https" {
		return "https"
	}
	return "http"
}
