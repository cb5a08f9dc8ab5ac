package mirror

import (
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/notify"
	"github.com/caddy-registry/mirror/internal/oci"
)

// maxPushedTags are set by one push. The spec asks for ten at least.
const maxPushedTags = 50

// change answers PUT of a manifest, and DELETE.
func (x *exchange) change(ref oci.Reference) error {
	err := x.changed(ref)
	// Whoever asks after this answer is not to be told what was true before, by
	// somebody who has begun to look by then.
	x.mirror.changes.Add(1)
	return err
}

func (x *exchange) changed(ref oci.Reference) error {
	ctx, repository := x.r.Context(), x.target.Repository
	switch {
	case x.r.Method == http.MethodPut:
		return x.push(ref)
	case x.route.Kind == oci.KindBlob:
		if err := x.mirror.hosted.DeleteBlob(ctx, repository, ref.Digest); err != nil {
			return notHosted(err)
		}
		x.notify(notify.Delete, ref.Digest, "", 0, "", "")
	case ref.Tag != "":
		was, err := x.mirror.hosted.DeleteTag(ctx, repository, ref.Tag)
		if err != nil {
			return notHosted(err)
		}
		x.notify(notify.Delete, was, "", 0, ref.Tag, "")
	default:
		tags, err := x.mirror.hosted.DeleteManifest(ctx, repository, ref.Digest)
		if err != nil {
			return notHosted(err)
		}
		for _, tag := range tags {
			x.notify(notify.Delete, ref.Digest, "", 0, tag, "")
		}
		x.notify(notify.Delete, ref.Digest, "", 0, "", "")
	}
	x.w.Header().Set("Content-Length", "0")
	content.Hasten(x.w, x.r)
	x.w.WriteHeader(http.StatusAccepted)
	return nil
}

// push answers PUT of a manifest: by tag, or by digest and with any tags that
// the query names (spec 1.2-dev, "Pushing Manifests").
func (x *exchange) push(ref oci.Reference) error {
	p := hosted.Push{Repository: x.target.Repository, Digest: ref.Digest, ContentType: x.r.Header.Get("Content-Type")}
	if ref.Tag != "" {
		p.Tags = []string{ref.Tag}
	} else if err := tagsOf(x.r.URL.RawQuery, &p.Tags); err != nil {
		return err
	}
	var err error
	if p.Body, err = x.document(x.mirror.hosted.MaxManifest(p.Repository)); err != nil {
		return err
	}
	m, err := x.mirror.hosted.PutManifest(x.r.Context(), p)
	if err != nil {
		return err
	}
	header := x.w.Header()
	set(header, "Docker-Content-Digest", string(m.Digest), "Content-Length", "0")
	header.Set("Location", (&url.URL{Path: "/v2/" + x.route.Name + "/manifests/" + string(m.Digest)}).String())
	if m.Subject != nil {
		// It tells the client not to write a fallback tag.
		header.Set("OCI-Subject", string(m.Subject.Digest))
	}
	if ref.Tag == "" {
		for _, tag := range p.Tags {
			header.Add("OCI-Tag", tag)
		}
	}
	if len(p.Tags) == 0 {
		x.notify(notify.Push, m.Digest, m.MediaType, int64(len(m.Body)), "", "")
	}
	for _, tag := range p.Tags {
		x.notify(notify.Push, m.Digest, m.MediaType, int64(len(m.Body)), tag, "")
	}
	x.w.WriteHeader(http.StatusCreated)
	return nil
}

// tagsOf adds the tags that a query names, each once.
func tagsOf(rawQuery string, tags *[]string) error {
	for param := range strings.SplitSeq(rawQuery, "&") {
		value, ok := strings.CutPrefix(param, "tag=")
		if !ok {
			continue
		}
		tag, err := url.QueryUnescape(value)
		if err != nil || !oci.ValidTag(tag) {
			return fail(badTag, "tag=%s is not a tag: want up to 128 letters, digits, '.', '_' or '-'", printable(value))
		}
		if slices.Contains(*tags, tag) {
			continue
		}
		if len(*tags) == maxPushedTags {
			return fail(tooManyTags, "more than %d tags at once", maxPushedTags)
		}
		*tags = append(*tags, tag)
	}
	return nil
}

// document reads what is sent, up to a limit: not at all if it says that it is
// longer, and not to its end if it turns out to be (CVE-2020-1702).
func (x *exchange) document(most int64) ([]byte, error) {
	tooLong := fail(oversized, "a manifest may have %d bytes here, and this one has more; see max_manifest_size", most)
	if x.r.ContentLength > most {
		return nil, tooLong
	}
	body, err := io.ReadAll(io.LimitReader(x.r.Body, most+1))
	switch {
	case err != nil:
		return nil, &failure{situation: wrongLength, message: "the manifest has not come whole: " + err.Error(), err: err}
	case int64(len(body)) > most:
		return nil, tooLong
	}
	return body, nil
}
