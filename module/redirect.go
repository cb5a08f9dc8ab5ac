package module

import (
	"fmt"
	"math"
	"net/http"
	"net/netip"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/internal/mirror"
)

// Redirect says which clients are sent to the bucket for which blobs.
type Redirect struct {
	// How large a blob is at least: a number of bytes (`10MiB`). Smaller ones are
	// served from here.
	MinSize string `json:"min_size"`

	// Networks, in CIDR notation, of the clients that can reach the bucket. Others
	// are served from here. Default: all can.
	Networks []string `json:"networks,omitempty"`
}

// Check reports what is wrong. A nil Redirect is right.
func (r *Redirect) Check() error {
	_, err := r.parse()
	return err
}

// parse is what is meant; a nil Redirect means none.
func (r *Redirect) parse() (*mirror.Redirect, error) {
	if r == nil {
		return nil, nil
	}
	size, err := humanize.ParseBytes(r.MinSize)
	if err != nil || size == 0 || size > math.MaxInt64 {
		return nil, fmt.Errorf("redirect_to_storage: %q is not a size such as 10MiB", r.MinSize)
	}
	parsed := &mirror.Redirect{Least: int64(size)}
	for _, cidr := range r.Networks {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, fmt.Errorf("redirect_to_storage: %q is not a network such as 10.0.0.0/8", cidr)
		}
		parsed.Networks = append(parsed.Networks, prefix.Masked())
	}
	return parsed, nil
}

// conceal keeps the Location of an answer that has been sent out of the access log,
// which takes the header as it is when the request has ended. Where a handler before
// this one holds the answer back, the Location is still to be sent, and nothing is
// logged of the request.
func conceal(w http.ResponseWriter, r *http.Request) {
	for at := w; at != nil; {
		if recorder, ok := at.(caddyhttp.ResponseRecorder); ok && recorder.Buffered() {
			caddyhttp.SetVar(r.Context(), caddyhttp.LogSkipVar, true)
			return
		}
		wrapper, ok := at.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		at = wrapper.Unwrap()
	}
	w.Header().Del("Location")
}
