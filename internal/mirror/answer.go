package mirror

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/oci"
)

const (
	forever = "max-age=31536000, immutable, no-transform"
	asked   = "no-cache, no-transform" // of a tag
	// personal is added on a site that has rules: no cache in front of it may
	// answer one caller with what another was allowed.
	personal = "private, "
)

// lifetime is the Cache-Control of an answer that is good for everyone for so
// long.
func (x *exchange) lifetime(ofTag bool) string {
	switch personally := x.site.rules != nil; {
	case ofTag && personally:
		return personal + asked
	case ofTag:
		return asked
	case personally:
		return personal + forever
	}
	return forever
}

// warm answers for a manifest or a small blob from memory alone. It reports
// whether it has; if not, nothing has been sent.
func (x *exchange) warm(ref oci.Reference, head bool) (bool, error) {
	if !x.opened && !x.mirror.readable(x.target) {
		return false, nil
	}
	switch {
	case x.route.Kind == oci.KindManifest && !(ref.Tag != "" && x.forced()):
		if answer := x.mirror.warmManifest(x.target, ref, x.began); answer != nil {
			return true, x.sendManifest(answer, ref, head)
		}
	case x.route.Kind == oci.KindBlob && x.r.Header["Range"] == nil && x.r.Header["If-None-Match"] == nil:
		if body, ok := x.mirror.tree.WarmBlob(x.target.Repository, ref.Digest, x.began); ok && !x.redirects(int64(len(body))) {
			x.cached(hit)
			x.blobHeaders(ref.Digest)
			set(x.w.Header(), "Content-Length", strconv.Itoa(len(body)))
			x.pulled(ref.Digest, "", int64(len(body)), "")
			x.w.WriteHeader(http.StatusOK)
			if !head {
				x.w.Write(body)
			}
			return true, nil
		}
	}
	return false, nil
}

// forced reports whether the client wants the upstream to be asked.
func (x *exchange) forced() bool {
	for _, name := range [...]string{"Cache-Control", "Pragma"} {
		for _, value := range x.r.Header[name] {
			for directive := range strings.SplitSeq(value, ",") {
				if strings.EqualFold(strings.TrimSpace(directive), "no-cache") {
					return true
				}
			}
		}
	}
	return false
}

func (x *exchange) manifest(ctx context.Context, ref oci.Reference, head bool) error {
	answer, err := x.mirror.manifest(ctx, x.target, ref, head, x.forced())
	if err != nil {
		return err
	}
	if answer.held != nil {
		x.mirror.asked(x.target, ref, x.began)
	}
	return x.sendManifest(answer, ref, head)
}

func (x *exchange) sendManifest(answer *manifestAnswer, ref oci.Reference, head bool) error {
	d, mediaType := answer.digest, answer.mediaType
	var etag, length string
	if answer.held != nil {
		if err := x.mirror.withinLimits(x.r.Context(), x.target, answer.held); err != nil {
			return err
		}
		if err := x.mirror.obtainable(x.r.Context(), x.target, answer.held); err != nil {
			return err
		}
		d, mediaType, etag, length = answer.held.Digest, answer.held.MediaType, answer.held.ETag, answer.held.Length
	} else {
		etag, length = quoted(d), strconv.FormatInt(answer.size, 10)
	}
	x.cached(answer.cache)
	header := x.w.Header()
	set(header, "Content-Type", mediaType, "Docker-Content-Digest", string(d), "Etag", etag, "Cache-Control", x.lifetime(ref.Tag != ""))
	if answer.stale != "" {
		if answer.age > 0 {
			header.Set("Age", strconv.Itoa(int(answer.age/time.Second)))
		}
		header.Add("Warning", `299 - "`+warning("this tag could not be checked: "+answer.stale)+`"`)
	}
	if !answer.kept.IsZero() {
		header.Add("Warning", `299 - "`+warning("upstream "+x.target.Upstream.Name+" says since "+answer.kept.UTC().Format(time.RFC3339)+" that it has no such tag; it is kept here")+`"`)
	}
	if content.Matches(x.r.Header["If-None-Match"], etag) {
		x.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	set(header, "Content-Length", length)
	if !head {
		x.pulled(d, mediaType, int64(len(answer.held.Body)), ref.Tag)
	}
	x.w.WriteHeader(http.StatusOK)
	if !head {
		x.w.Write(answer.held.Body)
	}
	return nil
}

// blobHeaders sets the headers that every answer about a blob has.
func (x *exchange) blobHeaders(d digest.Digest) {
	// Encoding a blob would take its length and its ranges away; containerd
	// invites it by offering zstd and gzip.
	set(x.w.Header(), "Content-Type", "application/octet-stream", "Docker-Content-Digest", string(d), "Etag", quoted(d), "Accept-Ranges", "bytes", "Cache-Control", x.lifetime(false))
}

func quoted(d digest.Digest) string { return `"` + string(d) + `"` }

// set sets headers of one value each, given as canonical names and values. The
// slices are this answer's own, since Caddy's header directive writes into them.
func set(header http.Header, pairs ...string) {
	values := make([]string, len(pairs)/2)
	for i := range values {
		values[i] = pairs[2*i+1]
		header[pairs[2*i]] = values[i : i+1 : i+1]
	}
}

// warning makes a sentence fit a quoted string of bounded length.
func warning(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r < ' ' || r >= 0x7f:
			return ' '
		case r == '"' || r == '\\':
			return '\''
		}
		return r
	}, s)
	return s[:min(len(s), 400)]
}
