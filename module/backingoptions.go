package module

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/retain"
)

// BackingImages is how backing images are kept: the disk images that volumes of
// Longhorn begin with.
type BackingImages struct {
	// The repository that those of all images lie under; registry clients find
	// the image `debian` as `backing-images/debian`. What lies there can be
	// pulled, and is pushed and deleted by the API of backing images only.
	// Default: backing-images.
	Prefix string `json:"prefix,omitempty"`

	// Where Longhorn reaches a `backing_images` site, as an http or https URL:
	// `http://images.storage.svc:8080`. Longhorn keeps addresses below it for as
	// long as it has an image, so it should never change. Placeholders are
	// resolved. Default: none; then images are sent to Longhorn, which cannot get
	// them again.
	PublicURL string `json:"public_url,omitempty"`

	// The Longhorn clusters that images can be registered with.
	Longhorn []*Longhorn `json:"longhorn,omitempty"`

	// What becomes of an image that Longhorn cannot use: `enforce`, it is refused;
	// `warn`, it is taken and says what is wrong; `off`, the same without a word
	// in the log. What is dangerous, such as a qcow2 with a backing file, is
	// always refused. Default: enforce with a cluster, else warn.
	LonghornCompat string `json:"longhorn_compat,omitempty"`

	// How much all images may take together, what they share counted once: a
	// number of bytes (`500GiB`), or `off`. Default: off.
	MaxSize string `json:"max_size,omitempty"`

	// How large one image may be: a number of bytes (`50GiB`), or `off`. Default:
	// off; it is as large as the storage takes blobs.
	MaxImageSize string `json:"max_image_size,omitempty"`

	// Permit that images are pulled from addresses that are not public, as those
	// of a web server in the same network. Link-local ones, where clouds tell
	// machines their secrets, are never permitted. Default: false.
	AllowPrivate bool `json:"allow_private,omitempty"`

	parsed   backing.Settings
	maxSize  int64
	pattern  oci.Pattern
	maxImage int64
}

// Longhorn is a cluster to register images with.
type Longhorn struct {
	// What it is called here: up to 63 lower-case letters, digits and dashes.
	Name string `json:"name"`

	// Its manager, as an http or https URL:
	// `http://longhorn-backend.longhorn-system:9500`. Placeholders are resolved.
	URL string `json:"url"`

	// What a proxy before the manager expects as a bearer token; Longhorn itself
	// wants none. Write it as a placeholder. Default: none.
	Token string `json:"token,omitempty"`

	// How Longhorn gets the bytes: `download`, it fetches them from public_url,
	// and again if it loses them; `upload`, they are sent to it. Default: download
	// with a public_url, else upload.
	Mode string `json:"mode,omitempty"`
}

const (
	defaultPrefix = "backing-images"
	maxClusters   = 64
)

// Check reports what is wrong as far as placeholders do not matter.
func (b *BackingImages) Check() error {
	if err := b.CheckEach(); err != nil {
		return err
	}
	for _, l := range b.Longhorn {
		if backing.Mode(l.Mode) == backing.Download && b.PublicURL == "" {
			return fmt.Errorf("longhorn %s: mode download needs public_url, where Longhorn fetches images from", l.Name)
		}
	}
	return nil
}

// CheckEach reports what is wrong with an option by itself.
func (b *BackingImages) CheckEach() error {
	prefix := cmp.Or(b.Prefix, defaultPrefix)
	pattern, err := oci.ParsePattern(prefix + "/**")
	if err != nil || strings.Contains(prefix, "*") {
		return fmt.Errorf("prefix: %.100q is no name of a repository, such as backing-images", b.Prefix)
	}
	b.pattern = pattern
	if b.maxSize, err = parseSize("max_size", b.MaxSize, 0); err != nil {
		return err
	}
	if b.maxImage, err = parseSize("max_image_size", b.MaxImageSize, 0); err != nil {
		return err
	}
	switch backing.Compat(b.LonghornCompat) {
	case "", backing.Enforce, backing.Warn, backing.Off:
	default:
		return fmt.Errorf("longhorn_compat is enforce, warn or off, not %.50q", b.LonghornCompat)
	}
	if b.PublicURL != "" && !strings.Contains(b.PublicURL, "{") {
		if _, err := parsePublicURL(b.PublicURL); err != nil {
			return err
		}
	}
	if len(b.Longhorn) > maxClusters {
		return fmt.Errorf("longhorn: %d clusters are too many; there may be %d", len(b.Longhorn), maxClusters)
	}
	for i, l := range b.Longhorn {
		if err := l.check(); err != nil {
			return fmt.Errorf("longhorn %.63s: %w", l.Name, err)
		}
		if slices.ContainsFunc(b.Longhorn[:i], func(earlier *Longhorn) bool { return earlier.Name == l.Name }) {
			return fmt.Errorf("longhorn %s is configured twice", l.Name)
		}
	}
	return nil
}

func (l *Longhorn) check() error {
	if l.Name == "" || len(l.Name) > 63 || strings.Trim(l.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return errors.New("the name of a cluster has up to 63 lower-case letters, digits and dashes")
	}
	if !strings.Contains(l.URL, "{") {
		if err := checkManagerURL(l.URL); err != nil {
			return err
		}
	}
	switch backing.Mode(l.Mode) {
	case "", backing.PushUpload, backing.Download:
	default:
		return fmt.Errorf("mode is download or upload, not %.50q", l.Mode)
	}
	return nil
}

// checkManagerURL says nothing of the URL itself, which may have a secret in it.
func checkManagerURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("the url is not one such as http://longhorn-backend.longhorn-system:9500")
	}
	if u.User != nil {
		return errors.New("the url has a user or a password in it; give what a proxy before Longhorn expects as the token, as in \"Basic <user:password in base64>\"")
	}
	return nil
}

// parsePublicURL reads an address that Longhorn can be given: its releases differ in
// what they make of "=" and "," in one.
func parsePublicURL(text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimRight(text, "/"))
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("public_url: it is not an address such as http://images.example.com:8080, without user, query and fragment")
	case strings.ContainsAny(text, "=,"):
		return nil, errors.New("public_url: releases of Longhorn cut an address at = or a comma; use one without")
	}
	return u, nil
}

// provision resolves the placeholders.
func (b *BackingImages) provision() error {
	if err := b.Check(); err != nil {
		return err
	}
	b.parsed = backing.Settings{
		Prefix:   cmp.Or(b.Prefix, defaultPrefix),
		Compat:   backing.Compat(b.LonghornCompat),
		MaxImage: b.maxImage,
		Pull:     backing.PullSettings{AllowPrivate: b.AllowPrivate},
	}
	if b.parsed.Compat == "" {
		b.parsed.Compat = backing.Warn
		if len(b.Longhorn) > 0 {
			b.parsed.Compat = backing.Enforce
		}
	}
	if b.PublicURL != "" {
		text, err := resolve(b.PublicURL)
		if err != nil {
			return fmt.Errorf("public_url: %w", err)
		}
		if b.parsed.PublicURL, err = parsePublicURL(text); err != nil {
			return err
		}
	}
	for i, l := range b.Longhorn {
		c := backing.Cluster{Name: l.Name, Mode: backing.Mode(l.Mode)}
		var err error
		if c.URL, err = resolve(l.URL); err == nil {
			err = checkManagerURL(c.URL)
		}
		if err != nil {
			return fmt.Errorf("longhorn[%d].url: %w", i, err)
		}
		if l.Token != "" {
			if c.Token, err = resolve(l.Token); err == nil {
				err = checkToken(c.Token)
			}
			if err != nil {
				return fmt.Errorf("longhorn[%d].token: %w", i, err)
			}
		}
		b.parsed.Clusters = append(b.parsed.Clusters, c)
	}
	return nil
}

// checkToken says nothing of the token itself.
func checkToken(token string) error {
	if token == "" {
		return errors.New("it is empty")
	}
	if len(token) > 8<<10 || strings.ContainsFunc(token, func(r rune) bool { return r < ' ' || r > '~' }) {
		return errors.New("it is not printable ASCII of up to 8 KiB")
	}
	return nil
}

// provisionBacking checks the backing images against what else is configured. Their
// repositories are kept by this pattern whatever wildcard fits them, too. It is
// called by the app, or by the first site if the app's option is left out.
func (a *App) provisionBacking() error {
	b := a.BackingImages
	if err := b.provision(); err != nil {
		return fmt.Errorf("backing_images: %w", err)
	}
	if err := a.upstreams.Overlap(b.pattern); err != nil {
		return fmt.Errorf("backing_images: prefix %s: %w; choose another prefix", b.parsed.Prefix, err)
	}
	for _, h := range a.Hosted {
		if !strings.HasPrefix(h.pattern[0], "*") && h.pattern.Overlaps(b.pattern) {
			return fmt.Errorf("backing_images: prefix %s lies in hosted %s, whose images are pushed; choose another prefix", b.parsed.Prefix, h.Pattern)
		}
	}
	a.hosted = slices.Insert(a.hosted, 0, hosted.Options{Pattern: b.pattern, Closed: closedPrefix})
	a.keep.Hosted = slices.Insert(a.keep.Hosted, 0, retain.Hosted{Pattern: b.pattern, MaxSize: b.maxSize})
	return nil
}

// closedPrefix is what whoever pushes there is told.
const closedPrefix = "backing images are made and deleted by their own API only: see POST /v1/backing-images, or `caddy registry image`"

// backing is what the sites of this configuration have backing images do.
func (a *App) backing() backing.Settings {
	if a.BackingImages == nil {
		return backing.Settings{}
	}
	settings := a.BackingImages.parsed
	settings.Private = a.images.private > 0
	return settings
}

// backingSites are the backing_images sites of a configuration.
type backingSites struct {
	all     int
	private int // where not everyone may read
}

func (a *App) warnBacking() {
	if a.BackingImages == nil {
		return
	}
	if a.images.all == 0 {
		a.log.Warn("no site serves the backing images; write the directive backing_images in one")
	}
	settings := a.BackingImages.parsed
	if settings.PublicURL == nil {
		if len(settings.Clusters) > 0 {
			a.log.Warn("without public_url images are sent to Longhorn, which cannot get one again that it loses; say by public_url where it reaches this site")
		}
		return
	}
	switch host := settings.PublicURL.Hostname(); {
	case settings.PublicURL.Scheme == "https":
		a.log.Info("Longhorn downloads over https with the certificates of its own image only; one of a private authority, as Caddy's internal one, fails there", zap.String("public_url", settings.PublicURL.String()))
	case host == "localhost" || strings.HasPrefix(host, "127.") || host == "::1" || host == "0.0.0.0":
		a.log.Warn("Longhorn reaches no service of this machine by this address, and refuses it from 1.12.1 on", zap.String("public_url", settings.PublicURL.String()))
	}
}
