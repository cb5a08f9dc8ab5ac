package mirror

import (
	"context"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
)

// A Redirect lets a site send clients to the bucket for blobs that are there.
type Redirect struct {
	// Least is how large a blob is at least, in bytes.
	Least int64
	// Networks are where clients are that can reach the bucket; empty: anywhere.
	Networks []netip.Prefix
}

// redirectLife is how long the address of a blob in the bucket can be used.
const redirectLife = 20 * time.Minute

// redirects reports whether the caller is sent to the bucket for a blob of that size.
func (x *exchange) redirects(size int64) bool {
	r := x.site.redirect
	if r == nil || x.mirror.distant == nil || size < r.Least {
		return false
	}
	if len(r.Networks) == 0 {
		return true
	}
	addr := x.caller.Addr.Unmap().WithZone("")
	return slices.ContainsFunc(r.Networks, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// redirect sends the caller to the bucket for a blob that belongs to the repository,
// if the site does that for it, and it is there. It reports whether it has; if not,
// nothing has been sent, and the blob can be served.
//
// The address opens the blob to whoever has it. So it is not to be cached, nor logged:
// see [Report.Location].
func (x *exchange) redirect(ctx context.Context, d digest.Digest, head bool) (bool, error) {
	if x.site.redirect == nil || !x.redirects(x.site.redirect.Least) {
		return false, nil
	}
	m, t := x.mirror, x.target
	known, err := m.member(ctx, t, d)
	if err != nil {
		return false, err
	}
	if known.Canonical == "" {
		return false, nil
	}
	// Whatever is the matter here, he who serves it finds too.
	info, err := m.tree.StatBlob(ctx, known.Canonical)
	if err != nil || !intact(known, info.Size) || !x.redirects(info.Size) {
		return false, nil
	}
	url, err := m.distant.Presign(ctx, x.r.Method, layout.Blob(known.Canonical), redirectLife)
	if err != nil {
		return false, nil
	}
	if head && t.Upstream == nil { // as in describeBlob
		err = m.tree.Promise(ctx, t.Repository, d, known, m.now())
	} else {
		err = m.askedFor(ctx, t, d, known)
	}
	if err != nil {
		return false, nil
	}
	const body = "this blob is in the mirror's bucket\n"
	x.cached(hit)
	x.blobHeaders(d)
	set(x.w.Header(), "Location", url, "Cache-Control", "no-store", "Content-Type", "text/plain; charset=utf-8", "Content-Length", strconv.Itoa(len(body)))
	x.report.Location = true
	x.pulled(d, "", info.Size, "")
	x.w.WriteHeader(http.StatusTemporaryRedirect)
	// With a body also to a HEAD, which does not send it: other handlers hold the
	// header back until there is some.
	io.WriteString(x.w, body)
	http.NewResponseController(x.w).Flush()
	return true, nil
}
