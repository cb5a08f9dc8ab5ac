package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
)

// A Manifest is a manifest as an upstream has it: after Head only its
// description, after Manifest its bytes too, which match the digest.
type Manifest struct {
	Digest    digest.Digest
	Size      int64
	MediaType string
	Body      []byte
	From      string // the endpoint
}

var manifestHeader = http.Header{"Accept": {strings.Join(oci.ManifestTypes, ", ")}}

func reference(ref oci.Reference) (what string, n need) {
	if ref.Tag != "" {
		return "manifests/" + ref.Tag, toResolve
	}
	return "manifests/" + ref.Digest.String(), toPull
}

// Manifest fetches a manifest. must says that the caller holds nothing to
// answer with instead.
func (u *Upstream) Manifest(ctx context.Context, repository string, ref oci.Reference, must bool) (*Manifest, error) {
	what, n := reference(ref)
	var got *Manifest
	err := u.ask(ctx, n, must, func(ctx context.Context, e *endpoint, last bool) error {
		resp, err := e.do(ctx, call{method: http.MethodGet, repository: repository, what: what, header: manifestHeader, follow: true, must: must && last, optional: !must})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := readAll(resp.Body, oci.MaxManifestSize)
		if err != nil {
			return e.fault(err)
		}
		parsed, err := oci.ParseManifest(body)
		if err != nil {
			return &Error{Kind: Invalid, Endpoint: e.name, Err: err}
		}
		d, err := bodyDigest(resp.Header, ref.Digest, body)
		if err != nil {
			return &Error{Kind: Invalid, Endpoint: e.name, Err: err}
		}
		got = &Manifest{Digest: d, Size: int64(len(body)), MediaType: parsed.MediaType, Body: body, From: e.name}
		return nil
	})
	return got, err
}

// bodyDigest names a manifest's bytes by the digest that was asked for, or by
// that of the answer's header, and refuses bytes that do not match it.
func bodyDigest(header http.Header, asked digest.Digest, body []byte) (digest.Digest, error) {
	d := asked
	if d == "" {
		if claimed, err := oci.ParseDigest(header.Get("Docker-Content-Digest")); err == nil {
			d = claimed
		} else {
			return digest.FromBytes(body), nil
		}
	}
	if got := d.Algorithm().FromBytes(body); got != d {
		return "", fmt.Errorf("its manifest is %s where %s was promised", got, d)
	}
	return d, nil
}

// Head asks what a reference means, without spending a pull where pulls are
// counted. An answer without digest, size or a known type is nil, and then
// only Manifest can tell.
func (u *Upstream) Head(ctx context.Context, repository string, ref oci.Reference, must bool) (*Manifest, error) {
	what, n := reference(ref)
	var got *Manifest
	err := u.ask(ctx, n, must, func(ctx context.Context, e *endpoint, last bool) error {
		resp, err := e.do(ctx, call{method: http.MethodHead, repository: repository, what: what, header: manifestHeader, follow: true, must: must && last, optional: !must})
		var invalid *Error
		if errors.As(err, &invalid) && invalid.Kind == Invalid {
			got = nil // HEAD is not known there
			return nil
		}
		if err != nil {
			return err
		}
		resp.Body.Close()
		d, err := oci.ParseDigest(resp.Header.Get("Docker-Content-Digest"))
		mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
		if err != nil || resp.ContentLength <= 0 || !slices.Contains(oci.ManifestTypes, mediaType) || ref.Digest != "" && d != ref.Digest {
			got = nil
			return nil
		}
		got = &Manifest{Digest: d, Size: resp.ContentLength, MediaType: mediaType, From: e.name}
		return nil
	})
	return got, err
}

// Readable reports by its error whether what a request is about can be read at
// this upstream: the manifest or blob it names, or for a listing the list of
// tags. must is as in Head.
func (u *Upstream) Readable(ctx context.Context, repository string, kind oci.Kind, ref oci.Reference, must bool) error {
	var err error
	switch kind {
	case oci.KindManifest:
		var described *Manifest
		if described, err = u.Head(ctx, repository, ref, must); err == nil && described == nil {
			// An answer that describes no manifest proves nothing.
			_, err = u.Manifest(ctx, repository, ref, must)
		}
	case oci.KindBlob:
		_, err = u.BlobSize(ctx, repository, ref.Digest)
	default:
		_, _, err = u.Tags(ctx, repository, 1, "")
	}
	return err
}

const (
	maxListAnswer = 8 << 20
	maxPages      = 64
)

// Tags returns one page of a repository's tags after last, at most n of them
// where n is not 0, and whether there are more.
func (u *Upstream) Tags(ctx context.Context, repository string, n int, last string) (tags []string, more bool, err error) {
	query := url.Values{}
	if n > 0 {
		query.Set("n", strconv.Itoa(n))
	}
	if last != "" {
		query.Set("last", last)
	}
	err = u.persist(ctx, toResolve, func(ctx context.Context, e *endpoint, final bool) error {
		resp, err := e.do(ctx, call{method: http.MethodGet, repository: repository, what: "tags/list", query: query, follow: true, must: final})
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var page struct {
			Tags []string `json:"tags"`
		}
		if _, err := e.decode(resp, &page); err != nil {
			return err
		}
		tags = slices.DeleteFunc(page.Tags, func(tag string) bool { return !oci.ValidTag(tag) })
		more = oci.NextLink(resp.Header, resp.Request.URL) != nil
		return nil
	})
	return tags, more, err
}

// Referrers returns all descriptors that refer to a subject: from the
// referrers API, or where an upstream has none from the fallback tag. Having
// none is not an error.
func (u *Upstream) Referrers(ctx context.Context, repository string, subject digest.Digest) ([]v1.Descriptor, error) {
	var all []v1.Descriptor
	err := u.persist(ctx, toResolve, func(ctx context.Context, e *endpoint, last bool) error {
		all = nil
		total := int64(0)
		query := url.Values{}
		for range maxPages {
			resp, err := e.do(ctx, call{method: http.MethodGet, repository: repository, what: "referrers/" + subject.String(), query: query, follow: true, must: last})
			if err != nil {
				var refusal *Error
				if errors.As(err, &refusal) && (refusal.Kind == NotFound || refusal.Kind == Invalid) && all == nil {
					all, err = e.fallbackReferrers(ctx, repository, subject, last)
				}
				return err
			}
			var index v1.Index
			n, err := e.decode(resp, &index)
			next := oci.NextLink(resp.Header, resp.Request.URL)
			resp.Body.Close()
			if err != nil {
				return err
			}
			all = append(all, index.Manifests...)
			if total += n; total > maxListAnswer {
				return nil // more than is ever sent on
			}
			// Of the link only the query counts: where to ask is settled.
			if next == nil || next.RawQuery == query.Encode() {
				return nil
			}
			query = next.Query()
		}
		return nil
	})
	return all, err
}

func (e *endpoint) fallbackReferrers(ctx context.Context, repository string, subject digest.Digest, must bool) ([]v1.Descriptor, error) {
	resp, err := e.do(ctx, call{method: http.MethodGet, repository: repository, what: "manifests/" + oci.FallbackTag(subject), header: manifestHeader, follow: true, must: must})
	var refusal *Error
	if errors.As(err, &refusal) && refusal.Kind == NotFound {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var index v1.Index
	_, err = e.decode(resp, &index)
	return index.Manifests, err
}

// decode reads a JSON answer of bounded size, and says how long it was.
func (e *endpoint) decode(resp *http.Response, into any) (int64, error) {
	body, err := readAll(resp.Body, maxListAnswer)
	if err != nil {
		return 0, e.fault(err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return 0, &Error{Kind: Invalid, Endpoint: e.name, Err: fmt.Errorf("not the JSON that was asked for: %w", err)}
	}
	return int64(len(body)), nil
}

var errTooLarge = errors.New("answer too large")

// fault is a failure in the middle of an answer.
func (e *endpoint) fault(err error) *Error {
	kind := Unavailable
	if errors.Is(err, errTooLarge) {
		kind = Invalid
	}
	return &Error{Kind: kind, Endpoint: e.name, Err: cleanURL(err)}
}

func readAll(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%w: more than %d bytes", errTooLarge, limit)
	}
	return data, err
}
