package module

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/retain"
)

// Hosted is how repositories that are pushed to are kept. Which of them a site
// serves, and to whom, is the site's matter.
type Hosted struct {
	// Which repositories: `*` is one component of a name and `**` any number of
	// them. The first of the patterns that matches a repository is its own.
	Pattern string `json:"pattern"`

	// How much they may take together, what they share counted once: a number of
	// bytes (`50GiB`), or `off`. A push that does not fit is refused. Default: off.
	MaxSize string `json:"max_size,omitempty"`

	// The largest manifest that is taken in, 32MiB at most. Default: 4MiB.
	MaxManifestSize string `json:"max_manifest_size,omitempty"`

	// `on`, or `off` to refuse the removal of tags, manifests and blobs. Default:
	// on.
	Delete string `json:"delete,omitempty"`

	// Tags that are never moved or removed once they are set, as patterns: `*` is
	// any part of a tag. Default: none.
	Immutable []string `json:"immutable,omitempty"`

	// `on`, or `off` to take in manifests whose config or layers have not been
	// pushed to the repository. Default: on.
	RequireBlobs string `json:"require_blobs,omitempty"`

	// Which tags are kept; the others are removed before each gc. A tag stays that
	// any rule keeps, or no rule is about. Default: all are kept.
	Retention []*Retention `json:"retention,omitempty"`

	pattern     oci.Pattern
	maxSize     int64
	maxManifest int64
	immutable   []oci.TagPattern
	retention   []retain.Rule
}

// Retention keeps some of the tags that it is about. It has one of Keep and
// Newer.
type Retention struct {
	// Keep so many, those that were pushed last.
	Keep int `json:"keep,omitempty"`

	// Keep those that were pushed so lately.
	Newer caddy.Duration `json:"newer,omitempty"`

	// Tags that it is about, as patterns: `*` is any part of a tag. Default: all.
	On []string `json:"on,omitempty"`
}

// Check reports what is wrong.
func (h *Hosted) Check() (err error) {
	if h.pattern, err = oci.ParsePattern(h.Pattern); err != nil {
		return err
	}
	if h.maxSize, err = parseSize("max_size", h.MaxSize, 0); err != nil {
		return err
	}
	if h.maxManifest, err = parseSize("max_manifest_size", h.MaxManifestSize, oci.MaxManifestSize); err != nil || h.maxManifest == 0 || h.maxManifest > oci.MaxStoredManifest {
		return fmt.Errorf("max_manifest_size: %q is no size of up to %s", h.MaxManifestSize, humanize.IBytes(oci.MaxStoredManifest))
	}
	for _, option := range [...]struct{ name, value string }{{"delete", h.Delete}, {"require_blobs", h.RequireBlobs}} {
		if option.value != "" && option.value != "on" && option.value != "off" {
			return fmt.Errorf("%s is on or off, not %q", option.name, option.value)
		}
	}
	if h.immutable, err = tagPatterns("immutable", h.Immutable); err != nil {
		return err
	}
	h.retention = nil
	for i, r := range h.Retention {
		rule, err := r.parse()
		if err != nil {
			return err
		}
		for j, earlier := range h.retention {
			if slices.Equal(sorted(r.On), sorted(h.Retention[j].On)) && (rule.Keep > 0) == (earlier.Keep > 0) {
				return fmt.Errorf("%s and %s contradict each other: they are about the same tags", h.Retention[j], h.Retention[i])
			}
		}
		h.retention = append(h.retention, rule)
	}
	if len(h.retention) > 0 && h.Delete == "off" {
		return errors.New("with delete off all tags are kept, so there is nothing for keep and newer to do")
	}
	return nil
}

func sorted(patterns []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(patterns)))
}

func tagPatterns(option string, patterns []string) ([]oci.TagPattern, error) {
	var all []oci.TagPattern
	for _, s := range patterns {
		pattern, err := oci.ParseTagPattern(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", option, err)
		}
		all = append(all, pattern)
	}
	return all, nil
}

func (r *Retention) String() string {
	if r.Keep != 0 {
		return fmt.Sprintf("keep %d", r.Keep)
	}
	return fmt.Sprintf("newer %v", time.Duration(r.Newer))
}

func (r *Retention) parse() (retain.Rule, error) {
	rule := retain.Rule{Keep: r.Keep, Newer: time.Duration(r.Newer)}
	switch {
	case r.Keep != 0 && r.Newer != 0:
		return rule, errors.New("retention: a rule has either keep or newer; write two rules")
	case r.Newer < 0 || r.Keep < 0 || r.Keep == 0 && r.Newer == 0:
		return rule, errors.New("retention: a rule keeps at least one tag, or those of some time")
	}
	var err error
	rule.On, err = tagPatterns("retention: on", r.On)
	return rule, err
}

// CheckHosted reports what is wrong with the last of some patterns, behind those
// before it.
func CheckHosted(all []*Hosted) error {
	last := all[len(all)-1]
	if err := last.Check(); err != nil {
		return err
	}
	for _, earlier := range all[:len(all)-1] {
		switch {
		case slices.Equal(earlier.pattern, last.pattern):
			return errors.New("it is configured twice")
		case earlier.pattern.Covers(last.pattern):
			return fmt.Errorf("it is of no effect behind hosted %s, which matches all of it first; write it before", earlier.Pattern)
		}
	}
	return nil
}

// provisionHosted checks the hosted patterns, and says what they are for those
// who keep them.
func (a *App) provisionHosted() error {
	for i, h := range a.Hosted {
		if err := CheckHosted(a.Hosted[:i+1]); err != nil {
			return fmt.Errorf("hosted[%d]: hosted %s: %w", i, h.Pattern, err)
		}
		a.hosted = append(a.hosted, hosted.Options{
			Pattern: h.pattern, MaxManifest: h.maxManifest, NoDelete: h.Delete == "off", Immutable: h.immutable, Sparse: h.RequireBlobs == "off",
		})
		a.keep.Hosted = append(a.keep.Hosted, retain.Hosted{
			Pattern: h.pattern, MaxSize: h.maxSize, Retention: h.retention, Immutable: h.immutable, NoDelete: h.Delete == "off",
		})
	}
	return nil
}

// warnHosted says which hosted patterns no site serves.
func (a *App) warnHosted() {
	for _, h := range a.Hosted {
		if !slices.ContainsFunc(a.served, h.pattern.Overlaps) {
			a.log.Warn("no site serves any of these repositories; write the pattern behind hosted of a registry_mirror, too", zap.String("hosted", h.Pattern))
		}
	}
}
