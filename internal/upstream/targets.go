package upstream

import (
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

const (
	maxTargets   = 1000
	targetLife   = time.Minute
	targetMargin = 10 * time.Second // before the end that an address names
)

// targets remember where the endpoint's redirects led, so that the next range
// of the same blob need not be asked of it. An address is a bearer secret: it
// is in no log and no error. Nothing is remembered of redirects within the
// endpoint itself, which would want its credentials.
type targets struct {
	now   func() time.Time
	cache *lru.Cache[content, target]
}

// content is what an address is for.
type content struct {
	repository string
	digest     digest.Digest
}

type target struct {
	url   *url.URL
	until time.Time
}

func newTargets(now func() time.Time) *targets {
	cache, _ := lru.New[content, target](maxTargets) // fails only for a size below 1
	return &targets{now: now, cache: cache}
}

// of returns the address, or nil.
func (t *targets) of(what content) *url.URL {
	if held, ok := t.cache.Get(what); ok && t.now().Before(held.until) {
		return held.url
	}
	return nil
}

// remember keeps an address for as long as it lives.
func (t *targets) remember(what content, u *url.URL) {
	now := t.now()
	until := now.Add(targetLife)
	if end, ok := expiry(u, now); ok && end.Add(-targetMargin).Before(until) {
		until = end.Add(-targetMargin)
	}
	if until.After(now) {
		t.cache.Add(what, target{u, until})
	}
}

// drop forgets an address that is of no use, unless another has taken its
// place.
func (t *targets) drop(what content, u *url.URL) {
	if held, ok := t.cache.Peek(what); ok && held.url == u {
		t.cache.Remove(what)
	}
}

// tokenExpiry is in the tokens of several CDNs: st=1~exp=1700000000~acl=/*~hmac=…
var tokenExpiry = regexp.MustCompile(`(?:^|[^A-Za-z])exp=([0-9]{9,11})(?:[^0-9]|$)`)

// expiry is the end of a presigned address that the address itself names.
// Where it names several, the earliest counts.
func expiry(u *url.URL, now time.Time) (end time.Time, ok bool) {
	earliest := func(t time.Time) {
		if !ok || t.Before(end) {
			end, ok = t, true
		}
	}
	query := map[string]string{}
	for key, values := range u.Query() {
		query[strings.ToLower(key)] = values[0]
	}
	// Signatures of AWS's fourth version and their kin.
	for _, vendor := range []string{"x-amz", "x-goog", "x-oss"} {
		seconds, err := strconv.ParseInt(query[vendor+"-expires"], 10, 32)
		if err != nil {
			continue
		}
		signed, err := time.Parse("20060102T150405Z", query[vendor+"-date"])
		if err != nil {
			signed = now
		}
		earliest(signed.Add(time.Duration(seconds) * time.Second))
	}
	// CloudFront, and S3 and GCS of old.
	if unix, err := strconv.ParseInt(query["expires"], 10, 64); err == nil {
		earliest(time.Unix(unix, 0))
	}
	// Azure.
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04Z", time.DateOnly} {
		if t, err := time.Parse(layout, query["se"]); err == nil {
			earliest(t)
			break
		}
	}
	text := u.Path + "?" + u.RawQuery
	if plain, err := url.QueryUnescape(text); err == nil {
		text = plain
	}
	for _, found := range tokenExpiry.FindAllStringSubmatch(text, -1) {
		if unix, err := strconv.ParseInt(found[1], 10, 64); err == nil {
			earliest(time.Unix(unix, 0))
		}
	}
	return end, ok
}
