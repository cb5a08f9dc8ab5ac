package backing

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

const (
	recordSchema = 1
	maxRecord    = 1 << 20 // bytes
	maxVersions  = 100_000 // of all images
	maxTags      = 1_000   // of an image
	maxHistory   = 100     // of a tag
	maxName      = 63
	maxLabels    = 64
	maxLabelKey  = 63
	maxLabel     = 256

	// sharedAge is how old what was read may be while others write; see
	// [storage.Distant].
	sharedAge = 2 * time.Second
	// stampAge is how coarse a store's clock may be.
	stampAge = 3 * time.Second
)

// imageRecord is what no manifest says of an image.
type imageRecord struct {
	Schema    int               `json:"schema"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Protected bool              `json:"protected,omitempty"`
	Created   time.Time         `json:"created"`
	Tags      map[string]Tag    `json:"tags,omitempty"`
	Tokens    []PathToken       `json:"tokens,omitempty"`
	// Last is the highest number that a version has had: none is given twice.
	Last int `json:"last,omitempty"`
}

// versionRecord is what no manifest says of a version. It makes the version one.
type versionRecord struct {
	Schema      int           `json:"schema"`
	Image       string        `json:"image"`
	Version     string        `json:"version"`
	State       State         `json:"state"` // Ready or Deleting
	Format      probe.Format  `json:"format"`
	Size        int64         `json:"size"`
	VirtualSize int64         `json:"virtualSize"`
	Digests     Digests       `json:"digests"`
	Probe       *probe.Report `json:"probe,omitempty"`
	Source      *Source       `json:"source,omitempty"`
	Created     time.Time     `json:"created"`
	Manifest    digest.Digest `json:"manifest"`
	Job         string        `json:"job,omitempty"`
}

// image is an image in memory. What its pointers lead to is replaced, never changed.
type image struct {
	record   *imageRecord
	bad      string // why its record cannot be read; it is left alone then
	versions map[string]*version
}

type version struct {
	record *versionRecord
	bad    string // why its record cannot be read; it is left alone then
	gone   string // why it has no bytes
}

// usable reports whether a version's file can be had.
func (v *version) usable() bool {
	return v.bad == "" && v.gone == "" && v.record.State == Ready
}

// A stamp tells one value of a key from the next.
type stamp struct {
	size    int64
	mod     time.Time
	settled bool // the value was old enough when it was read
}

func (r *imageRecord) clone() *imageRecord {
	c := *r
	c.Labels, c.Tags, c.Tokens = maps.Clone(r.Labels), maps.Clone(r.Tags), slices.Clone(r.Tokens)
	if c.Labels == nil {
		c.Labels = map[string]string{}
	}
	if c.Tags == nil {
		c.Tags = map[string]Tag{}
	}
	return &c
}

// revision is the same wherever the record is, and another for any other record.
func (r *imageRecord) revision() string {
	shown := *r
	shown.Tokens = nil // which come and go with registrations, and are in no answer
	data, err := json.Marshal(shown)
	if err != nil {
		return "" // it was made of JSON
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:12])
}

func decode(data []byte, schema func() int, to any) error {
	if err := json.Unmarshal(data, to); err != nil {
		return fmt.Errorf("its record is damaged, and left alone: %w", err)
	}
	if schema() != recordSchema {
		return fmt.Errorf("its record has schema %d, which another version of this program wrote: use that, or a newer one", schema())
	}
	return nil
}

// fresh makes sure that the records in memory may be relied upon.
func (l *Library) fresh(ctx context.Context) error {
	l.mu.RLock()
	closed, prefix, loaded, at := l.closed, l.settings.Prefix, l.loaded, l.readAt
	l.mu.RUnlock()
	switch {
	case closed:
		return fail(StoreAway, "backing images are being shut down; try again")
	case prefix == "":
		return fail(NotFound, "there are no backing images in this configuration")
	case loaded && (!l.shared() || l.now().Sub(at) < sharedAge):
		return nil
	}
	select {
	case l.reading <- struct{}{}:
		defer func() { <-l.reading }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	l.mu.RLock()
	loaded, at = l.loaded, l.readAt
	l.mu.RUnlock()
	if loaded && (!l.shared() || l.now().Sub(at) < sharedAge) {
		return nil
	}
	begun := l.now()
	if err := l.read(ctx); err != nil {
		return fmt.Errorf("reading the records of backing images: %w", err)
	}
	if !loaded {
		l.recoverDrafts(ctx)
		if err := l.recover(ctx); err != nil {
			return fmt.Errorf("going on with what an earlier process left: %w", err)
		}
		// Nobody is told that a version is not registered before they are read.
		if err := l.registrar.load(ctx); err != nil {
			return err
		}
	}
	l.mu.Lock()
	l.loaded, l.readAt = true, begun
	l.mu.Unlock()
	return nil
}

func (l *Library) shared() bool {
	distant := l.parts.Store.Distant()
	return distant != nil && distant.Shared()
}

// read reads the records that are not known, and forgets those that are gone.
func (l *Library) read(ctx context.Context) error {
	changed, listed := map[string]map[string]storage.Info{}, map[string]bool{}
	for info, err := range l.parts.Store.List(ctx, layout.Images, true) {
		if err != nil {
			return err
		}
		name, version, ok := layout.ImageOf(info.Key)
		if !ok || !validImage(name) || version != "" && !oci.ValidTag(version) {
			continue
		}
		if len(listed) >= 2*maxVersions {
			return fmt.Errorf("there are more than %d records", 2*maxVersions)
		}
		listed[info.Key] = true
		if known, ok := l.stamps[info.Key]; ok && known.settled && known.size == info.Size && known.mod.Equal(info.ModTime) {
			continue
		}
		if changed[name] == nil {
			changed[name] = map[string]storage.Info{}
		}
		changed[name][info.Key] = info
	}
	for key := range l.known() {
		if !listed[key] {
			name, _, _ := layout.ImageOf(key)
			if changed[name] == nil {
				changed[name] = map[string]storage.Info{}
			}
			changed[name][key] = storage.Info{Key: key}
		}
	}
	for name, keys := range changed {
		if err := l.readImage(ctx, name, keys); err != nil {
			return err
		}
	}
	return nil
}

// known are the keys of the records in memory.
func (l *Library) known() map[string]bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	keys := map[string]bool{}
	for name, i := range l.images {
		if i.record != nil || i.bad != "" {
			keys[layout.Image(name)] = true
		}
		for v := range i.versions {
			keys[layout.ImageVersion(name, v)] = true
		}
	}
	return keys
}

// readImage reads records of one image.
func (l *Library) readImage(ctx context.Context, name string, keys map[string]storage.Info) (err error) {
	unlock, free := l.tryLock(name)
	if !free {
		// Everybody waits for this, and whoever has it may wait for a bucket. The next
		// look sees it, as the stamps stay.
		return nil
	}
	defer unlock()
	for key, info := range keys {
		data, err := l.parts.Store.Get(ctx, key, maxRecord)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, storage.ErrTooLarge) {
			return err
		}
		absent := errors.Is(err, fs.ErrNotExist)
		_, v, _ := layout.ImageOf(key)
		switch {
		case v == "" && absent:
			l.setImage(name, nil, "")
		case v == "":
			r, bad := new(imageRecord), err
			if bad == nil {
				bad = decode(data, func() int { return r.Schema }, r)
			}
			l.setImage(name, r, l.unreadable(key, bad))
		case absent:
			l.setVersion(name, v, nil)
		default:
			r, bad := new(versionRecord), err
			if bad == nil {
				bad = decode(data, func() int { return r.Schema }, r)
			}
			if bad == nil && (r.Digests.SHA256.Validate() != nil || r.Digests.SHA512.Validate() != nil || r.Manifest.Validate() != nil) {
				bad = errors.New("its record is damaged, and left alone: it has no digests")
			}
			is := &version{record: r, bad: l.unreadable(key, bad)}
			r.Image, r.Version = name, v
			if bad == nil {
				if is.gone, err = l.missing(ctx, r); err != nil {
					return err
				}
			}
			l.setVersion(name, v, is)
		}
		if absent {
			delete(l.stamps, key)
			continue
		}
		l.stamps[key] = stamp{info.Size, info.ModTime, l.now().Sub(info.ModTime) > stampAge}
	}
	return nil
}

// unreadable says loudly that a record is left alone.
func (l *Library) unreadable(key string, err error) string {
	if err == nil {
		return ""
	}
	l.parts.Log.Error("a record of a backing image cannot be read; it is left as it is, and nothing of it is changed", zap.String("key", key), zap.Error(err))
	return err.Error()
}

// missing says what of a version the store has lost, or nothing.
func (l *Library) missing(ctx context.Context, r *versionRecord) (string, error) {
	info, err := l.parts.Tree.StatBlob(ctx, r.Digests.SHA256)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && info.Size != r.Size:
		return "its bytes are gone from the store: delete the version, and upload it again", nil
	case err != nil:
		return "", err
	}
	if r.State == Deleting {
		return "", nil
	}
	if _, err = l.parts.Store.Stat(ctx, layout.RevisionLink(l.repository(r.Image), r.Manifest)); errors.Is(err, fs.ErrNotExist) {
		return "its manifest is gone from the store: delete the version, and upload it again", nil
	}
	return "", err
}

// setImage replaces what is known of an image's record.
func (l *Library) setImage(name string, r *imageRecord, bad string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := l.images[name]
	if i == nil {
		i = &image{versions: map[string]*version{}}
		l.images[name] = i
	}
	if i.record != nil {
		for _, t := range i.record.Tokens {
			delete(l.tokens, sha256.Sum256([]byte(t.Token)))
		}
	}
	i.record, i.bad = r, bad
	if bad != "" {
		i.record = nil
	}
	if i.record != nil {
		for _, t := range i.record.Tokens {
			l.tokens[sha256.Sum256([]byte(t.Token))] = name
		}
	}
	l.tidy(name, i)
}

// setVersion replaces what is known of a version; nil: there is none.
func (l *Library) setVersion(name, v string, is *version) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := l.images[name]
	if i == nil {
		i = &image{versions: map[string]*version{}}
		l.images[name] = i
	}
	if was := i.versions[v]; was != nil {
		l.total--
		if was.bad == "" {
			d := was.record.Digests.SHA512
			l.files[d] = slices.DeleteFunc(l.files[d], func(o *version) bool { return o == was })
			if len(l.files[d]) == 0 {
				delete(l.files, d)
			}
		}
		delete(i.versions, v)
	}
	if is != nil {
		l.total++
		i.versions[v] = is
		if is.bad == "" {
			l.files[is.record.Digests.SHA512] = append(l.files[is.record.Digests.SHA512], is)
		}
	}
	l.tidy(name, i)
}

// tidy forgets an image of which nothing is left. l.mu is held.
func (l *Library) tidy(name string, i *image) {
	if i.record == nil && i.bad == "" && len(i.versions) == 0 {
		delete(l.images, name)
	}
}

// putImage writes an image's record. The image's lock is held.
func (l *Library) putImage(ctx context.Context, r *imageRecord) error {
	r.Schema = recordSchema
	if err := l.put(ctx, layout.Image(r.Name), r); err != nil {
		return err
	}
	l.setImage(r.Name, r, "")
	return nil
}

// putVersion writes a version's record. The image's lock is held.
func (l *Library) putVersion(ctx context.Context, r *versionRecord) error {
	r.Schema = recordSchema
	if err := l.put(ctx, layout.ImageVersion(r.Image, r.Version), r); err != nil {
		return err
	}
	l.setVersion(r.Image, r.Version, &version{record: r})
	return nil
}

func (l *Library) put(ctx context.Context, key string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	if len(data) > maxRecord {
		return fail(Malformed, "the image has too many tags, labels or tokens for one record of %d bytes; remove some", maxRecord)
	}
	return l.parts.Store.Put(ctx, key, data, storage.Durable)
}

// lock keeps others from changing an image.
func (l *Library) lock(ctx context.Context, name string) (unlock func(), err error) {
	k, leave := l.lockOf(name)
	select {
	case k.held <- struct{}{}:
		return func() { <-k.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

// tryLock is lock, unless somebody else has it.
func (l *Library) tryLock(name string) (unlock func(), free bool) {
	k, leave := l.lockOf(name)
	select {
	case k.held <- struct{}{}:
		return func() { <-k.held; leave() }, true
	default:
		leave()
		return nil, false
	}
}

// lockOf is the lock of an image, which is kept until leave.
func (l *Library) lockOf(name string) (k *imageLock, leave func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k = l.locks[name]; k == nil {
		k = &imageLock{held: make(chan struct{}, 1)}
		l.locks[name] = k
	}
	k.users++
	return k, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(l.locks, name)
		}
	}
}

type imageLock struct {
	held  chan struct{}
	users int // guarded by Library.mu
}

// current is the record of an image as it is now: read again where another process may have written them.
// The image's lock is held, and nobody else's record is overwritten by this then but
// within the moment that follows.
func (l *Library) current(ctx context.Context, name string) (*imageRecord, error) {
	if l.shared() {
		data, err := l.parts.Store.Get(ctx, layout.Image(name), maxRecord)
		switch {
		case err == nil:
			r := new(imageRecord)
			bad := decode(data, func() int { return r.Schema }, r)
			l.setImage(name, r, l.unreadable(layout.Image(name), bad))
		case errors.Is(err, fs.ErrNotExist):
			l.setImage(name, nil, "")
		default:
			return nil, err
		}
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	i := l.images[name]
	switch {
	case i == nil:
		return nil, nil
	case i.bad != "":
		return nil, fail(Exists, "backing image %s cannot be changed: %s", name, i.bad)
	case i.record == nil: // it was to be written when a process ended
		return &imageRecord{Name: name, Created: l.now().UTC(), Labels: map[string]string{}, Tags: map[string]Tag{}}, nil
	}
	return i.record.clone(), nil
}

func validImage(name string) bool { return len(name) <= maxName && oci.ValidComponent(name) }

// valid says what is wrong with a draft that is to become a version.
func (d Draft) valid() error {
	if !validImage(d.Name) {
		return fail(Malformed, "%.80q is no name of an image: use at most %d lower-case letters and digits, with single . _ or - between them", d.Name, maxName)
	}
	if d.Version != "" && !oci.ValidTag(d.Version) {
		return fail(Malformed, "%.80q is no name of a version: use at most 128 letters, digits, . _ and -, and begin with none of . and -", d.Version)
	}
	if len(d.Tags) > maxTags {
		return fail(Malformed, "there are more than %d tags", maxTags)
	}
	for _, tag := range d.Tags {
		if !oci.ValidTag(tag) {
			return fail(Malformed, "%.80q is no tag: use at most 128 letters, digits, . _ and -, and begin with none of . and -", tag)
		}
		if tag == d.Version {
			return fail(Malformed, "%s is both the version and a tag of it; leave one out", tag)
		}
	}
	for _, sum := range []struct {
		d  digest.Digest
		by digest.Algorithm
	}{{d.SHA256, digest.SHA256}, {d.SHA512, digest.SHA512}} {
		if sum.d != "" && (sum.d.Validate() != nil || sum.d.Algorithm() != sum.by) {
			return fail(Malformed, "%.150q is no %s", sum.d, sum.by)
		}
	}
	switch d.Decompress {
	case "", "none", "auto", "gz", "xz", "zst":
	default:
		return fail(Malformed, "%.20q is no way to decompress: use auto, gz, xz, zst or none", d.Decompress)
	}
	return checkLabels(d.Labels)
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fail(Malformed, "there are more than %d labels", maxLabels)
	}
	for key, value := range labels {
		if key == "" || len(key) > maxLabelKey || len(value) > maxLabel || strings.ContainsAny(key, "=\n") {
			return fail(Malformed, "the label %.80q is none: a key has 1 to %d bytes, none of them =, and a value %d at most", key, maxLabelKey, maxLabel)
		}
	}
	return nil
}

// label changes labels; an empty value removes one.
func label(labels, by map[string]string) error {
	if err := checkLabels(by); err != nil {
		return err
	}
	for key, value := range by {
		if value == "" {
			delete(labels, key)
		} else {
			labels[key] = value
		}
	}
	return checkLabels(labels)
}

// number is n of the version name vn, or 0.
func number(version string) int {
	n, err := strconv.Atoi(strings.TrimPrefix(version, "v"))
	if err != nil || n < 1 || version != "v"+strconv.Itoa(n) {
		return 0
	}
	return n
}
