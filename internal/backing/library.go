package backing

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

const (
	sweepEvery = time.Hour
	againAfter = 2 * time.Second // where the store could not be read
)

// A Library is the backing images of a store. It outlives configurations.
type Library struct {
	parts   Parts
	now     func() time.Time
	reading chan struct{}    // has room for the one who reads records
	stamps  map[string]stamp // by keys; of whoever reads

	mu       sync.RWMutex
	settings Settings
	closed   bool
	loaded   bool
	readAt   time.Time
	images   map[string]*image
	files    map[digest.Digest][]*version // by sha512
	tokens   map[[sha256.Size]byte]string // to image names, by digests of the secrets
	total    int                          // of versions
	locks    map[string]*imageLock
	reserved map[string]map[string]bool // image → version names that are on their way
	jobs     map[string]*job
	// beginning are the jobs that have room among those that run, and do not yet.
	beginning int
	// unfinished are uploads whose bytes are stored, by ID.
	unfinished map[string]*Upload

	slots     chan struct{} // of pulls that run
	finishing chan struct{} // and of uploads that are finished behind their answer
	stop      context.CancelFunc
	ctx       context.Context // of what is under way; nil: nothing is
	// resumed is closed once the jobs of an earlier process go on: one that begins before
	// would be taken for one of those.
	resumed <-chan struct{}
	wait    sync.WaitGroup
	change  sync.Mutex // of Set and Close

	registrar *registrar
}

// New returns a library, which does nothing before Set.
func New(p Parts) *Library {
	if p.Log == nil {
		p.Log = zap.NewNop()
	}
	l := &Library{
		parts: p, now: time.Now, reading: make(chan struct{}, 1), stamps: map[string]stamp{},
		images: map[string]*image{}, files: map[digest.Digest][]*version{}, tokens: map[[sha256.Size]byte]string{},
		locks: map[string]*imageLock{}, reserved: map[string]map[string]bool{}, jobs: map[string]*job{}, unfinished: map[string]*Upload{},
		slots: make(chan struct{}, maxRunning), finishing: make(chan struct{}, maxFinishing), registrar: newRegistrar(p),
	}
	l.registrar.version, l.registrar.open = l.Version, l.Open
	l.registrar.token, l.registrar.revoke = l.tokenFor, l.revoke
	return l
}

// Set replaces the settings. With the first that have a Prefix the library reads its
// records and goes on with jobs of an earlier process. Without one, or with another
// one, what is under way ends first.
func (l *Library) Set(s Settings) {
	l.change.Lock()
	defer l.change.Unlock()
	l.mu.RLock()
	was, closed, running := l.settings.Prefix, l.closed, l.ctx != nil
	l.mu.RUnlock()
	if closed {
		return
	}
	if running && s.Prefix != was {
		l.halt()
		running = false
	}
	l.mu.Lock()
	l.settings = s
	l.mu.Unlock()
	if s.Prefix != "" && !running {
		ctx, stop := context.WithCancel(context.Background())
		resumed := make(chan struct{})
		l.mu.Lock()
		l.ctx, l.stop, l.resumed = ctx, stop, resumed
		l.mu.Unlock()
		l.wait.Add(1)
		go l.run(ctx, resumed)
	}
	if err := l.registrar.set(s); err != nil {
		l.parts.Log.Error("a Longhorn cannot be used", zap.Error(err))
	}
}

// Close ends what is under way; jobs go on in the next process.
func (l *Library) Close() {
	l.change.Lock()
	defer l.change.Unlock()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.registrar.close() // which asks the library
	l.halt()
}

// halt ends what is under way, and forgets what was read: another configuration may
// mean other images.
func (l *Library) halt() {
	l.mu.Lock()
	stop := l.stop
	l.stop = nil
	l.mu.Unlock()
	if stop == nil {
		return
	}
	stop()
	l.wait.Wait()
	l.reading <- struct{}{}
	defer func() { <-l.reading }()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ctx, l.loaded, l.total = nil, false, 0
	clear(l.images)
	clear(l.files)
	clear(l.tokens)
	clear(l.jobs)
	clear(l.unfinished)
	clear(l.reserved)
	clear(l.stamps)
}

// run is what goes on behind whoever asks.
func (l *Library) run(ctx context.Context, resumed chan<- struct{}) {
	defer l.wait.Done()
	for l.fresh(ctx) != nil {
		if ctx.Err() != nil || !pause(ctx, againAfter) {
			return
		}
	}
	l.resumeJobs(ctx)
	close(resumed)
	for {
		l.resumeDeletions(ctx)
		l.sweep(ctx)
		if !pause(ctx, sweepEvery) {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// set returns the settings of now.
func (l *Library) set() Settings {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.settings
}

// repository is where an image's bytes lie.
func (l *Library) repository(name string) string { return l.set().Prefix + "/" + name }

// Query chooses images.
type Query struct {
	Label string // key=value, or key
	After string // a name: those that sort behind it
	Limit int    // 0: 100; 1,000 at most
	May   func(name string) bool
}

// Images lists images by their names; next is the After of the next page, or empty.
func (l *Library) Images(ctx context.Context, q Query) (images []Image, next string, err error) {
	if err := l.fresh(ctx); err != nil {
		return nil, "", err
	}
	limit := min(q.Limit, 1000)
	if limit <= 0 {
		limit = 100
	}
	key, value, exact := strings.Cut(q.Label, "=")
	l.mu.RLock()
	var names []string
	for name, i := range l.images {
		if name <= q.After {
			continue
		}
		if q.Label != "" {
			if i.record == nil {
				continue
			}
			if is, ok := i.record.Labels[key]; !ok || exact && is != value {
				continue
			}
		}
		names = append(names, name)
	}
	if q.Label == "" {
		for _, j := range l.jobs {
			if name := j.record.Job.Name; j.running() && l.images[name] == nil && name > q.After {
				names = append(names, name)
			}
		}
	}
	l.mu.RUnlock()
	slices.Sort(names)
	images = []Image{}
	for _, name := range slices.Compact(names) {
		if q.May != nil && !q.May(name) {
			continue
		}
		if len(images) == limit {
			return images, images[limit-1].Name, nil
		}
		if i, ok := l.view(name); ok {
			images = append(images, i)
		}
	}
	return images, "", nil
}

// Image returns an image.
func (l *Library) Image(ctx context.Context, name string) (Image, error) {
	if err := l.fresh(ctx); err != nil {
		return Image{}, err
	}
	i, ok := l.view(name)
	if !ok {
		return Image{}, noImage(name)
	}
	return i, nil
}

func noImage(name string) *Error { return fail(NotFound, "there is no backing image %.80q", name) }

// view is an image as it is told of.
func (l *Library) view(name string) (Image, bool) {
	l.mu.RLock()
	i := l.images[name]
	out := Image{Name: name, Labels: map[string]string{}, Tags: map[string]Tag{}, Versions: []Version{}}
	on := l.onWay(name)
	if i == nil && len(on) == 0 {
		l.mu.RUnlock()
		return Image{}, false
	}
	if i != nil {
		out.Error = i.bad
		if r := i.record; r != nil {
			maps.Copy(out.Labels, r.Labels)
			maps.Copy(out.Tags, r.Tags)
			out.Protected, out.CreatedAt, out.Revision = r.Protected, r.Created, r.revision()
		}
		for v, is := range i.versions {
			out.Versions = append(out.Versions, l.tell(i, name, v, is))
		}
	}
	out.Versions = append(out.Versions, on...)
	l.mu.RUnlock()
	for n := range out.Versions {
		out.Versions[n].Registrations = l.registrations(name, out.Versions[n].Version)
	}
	slices.SortFunc(out.Versions, func(a, b Version) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(b.Version, a.Version)
	})
	if out.CreatedAt.IsZero() && len(out.Versions) > 0 {
		out.CreatedAt = out.Versions[len(out.Versions)-1].CreatedAt
	}
	return out, true
}

// onWay are the versions of an image that jobs are making. l.mu is held.
func (l *Library) onWay(name string) []Version {
	var on []Version
	for _, j := range l.jobs {
		r := j.record.Job
		if r.Name != name || !j.running() {
			continue
		}
		if i := l.images[name]; i != nil && i.versions[r.Version] != nil {
			continue
		}
		progress, source := r.Progress, j.record.Source.shown()
		on = append(on, Version{
			Name: name, Version: r.Version, State: r.Step, Source: &source, Progress: &progress, Tags: []string{},
			Labels: map[string]string{}, CreatedAt: r.Created, Job: r.ID, Registrations: []Registration{}, Error: r.Error,
		})
	}
	return on
}

// tell is a version as it is told of, without its registrations. l.mu is held.
func (l *Library) tell(i *image, name, v string, is *version) Version {
	out := Version{Name: name, Version: v, State: Failed, Tags: []string{}, Labels: map[string]string{}, Registrations: []Registration{}}
	if r := i.record; r != nil {
		maps.Copy(out.Labels, r.Labels)
		out.Protected = r.Protected
		for tag, means := range r.Tags {
			if means.Version == v {
				out.Tags = append(out.Tags, tag)
			}
		}
		slices.Sort(out.Tags)
	}
	if is.bad != "" {
		out.Error = is.bad
		return out
	}
	r := is.record
	out.State, out.Format, out.Size, out.VirtualSize, out.Digests = r.State, r.Format, r.Size, r.VirtualSize, r.Digests
	out.Probe, out.Source, out.CreatedAt, out.Job = r.Probe, r.Source, r.Created, r.Job
	out.URLs = l.urls(r)
	if is.gone != "" && r.State == Ready {
		out.State, out.Error = Failed, is.gone
	}
	return out
}

// urls are where a version can be had. l.mu is held.
func (l *Library) urls(r *versionRecord) URLs {
	u := URLs{File: "/v1/files/" + r.Digests.SHA512.Encoded() + "/" + r.file(), OCI: l.settings.Prefix + "/" + r.Image + ":" + r.Version}
	if public := l.settings.PublicURL; public != nil {
		u.File = strings.TrimSuffix(public.String(), "/") + u.File
		u.OCI = public.Host + "/" + u.OCI
	}
	return u
}

// file is what a version's file is called.
func (r *versionRecord) file() string {
	extension := ".img"
	switch r.Format {
	case probe.QCOW2:
		extension = ".qcow2"
	case probe.ISO:
		extension = ".iso"
	case probe.Raw:
	default:
		extension = "." + string(r.Format)
	}
	return r.Image + "-" + r.Version + extension
}

// Version returns a version by its name, by a tag, or by sha512:… or sha256:….
// An empty reference is the tag latest, or without one the version made last.
func (l *Library) Version(ctx context.Context, name, reference string) (Version, error) {
	if err := l.fresh(ctx); err != nil {
		return Version{}, err
	}
	return l.find(name, reference)
}

// find is Version of what is in memory. Whoever holds an image's lock uses it: reading
// the records again takes that lock.
func (l *Library) find(name, reference string) (Version, error) {
	i, ok := l.view(name)
	if !ok {
		return Version{}, noImage(name)
	}
	if reference == "" {
		tag, tagged := i.Tags["latest"]
		if !tagged {
			for _, v := range i.Versions {
				if v.State == Ready {
					return v, nil
				}
			}
			if len(i.Versions) > 0 {
				return i.Versions[0], nil
			}
			return Version{}, fail(NotFound, "backing image %s has no version", name)
		}
		reference = tag.Version
	}
	if tag, ok := i.Tags[reference]; ok {
		reference = tag.Version
	}
	for _, v := range i.Versions {
		if v.Version == reference || string(v.Digests.SHA256) == reference || string(v.Digests.SHA512) == reference {
			return v, nil
		}
	}
	return Version{}, fail(NotFound, "backing image %s has no version %.150q", name, reference)
}

// Edit is a change of an image; a nil field stays as it is. A label without value ("")
// is removed.
type Edit struct {
	Labels    map[string]string `json:"labels"`
	Protected *bool             `json:"protected"`
}

// Edit changes an image, if its Revision is still the given one; empty: whichever.
func (l *Library) Edit(ctx context.Context, name, revision string, e Edit) (Image, error) {
	err := l.edit(ctx, name, revision, func(r *imageRecord) error {
		if e.Protected != nil {
			r.Protected = *e.Protected
		}
		return label(r.Labels, e.Labels)
	})
	if err != nil {
		return Image{}, err
	}
	return l.Image(ctx, name)
}

// edit changes an image's record.
func (l *Library) edit(ctx context.Context, name, revision string, change func(*imageRecord) error) error {
	if err := l.fresh(ctx); err != nil {
		return err
	}
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := l.existing(ctx, name, revision)
	if err != nil {
		return err
	}
	if err := change(r); err != nil {
		return err
	}
	return l.putImage(context.WithoutCancel(ctx), r)
}

// existing is the record of an image that there is, in a revision. The image's lock is
// held.
func (l *Library) existing(ctx context.Context, name, revision string) (*imageRecord, error) {
	r, err := l.current(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case r == nil:
		return nil, noImage(name)
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	is := ""
	if i := l.images[name]; i != nil && i.record != nil {
		is = i.record.revision()
	}
	if revision != "" && revision != is {
		return nil, fail(PreconditionFail, "backing image %s has been changed since: read it again, and repeat the change", name)
	}
	return r, nil
}

// SetTag lets a tag mean a version, given as to Version.
func (l *Library) SetTag(ctx context.Context, name, tag, reference, revision string) (Tag, error) {
	if !oci.ValidTag(tag) {
		return Tag{}, fail(Malformed, "%.80q is no tag: use at most 128 letters, digits, . _ and -, and begin with none of . and -", tag)
	}
	if err := l.fresh(ctx); err != nil {
		return Tag{}, err
	}
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return Tag{}, err
	}
	defer unlock()
	r, err := l.existing(ctx, name, revision)
	if err != nil {
		return Tag{}, err
	}
	i, _ := l.view(name)
	v, err := l.find(name, reference)
	if err != nil {
		return Tag{}, err
	}
	for _, other := range i.Versions {
		if other.Version == tag {
			return Tag{}, fail(VersionConflict, "%s is a version of %s, and cannot be a tag", tag, name)
		}
	}
	if v.State != Ready {
		return Tag{}, fail(Exists, "version %s of %s is %s, and only one that is ready can have a tag", v.Version, name, v.State)
	}
	if err := r.tag(tag, v.Version, l.now().UTC()); err != nil {
		return Tag{}, err
	}
	if err := l.move(ctx, r, tag); err != nil {
		return Tag{}, err
	}
	return r.Tags[tag], nil
}

// move writes the record of an image in which tags mean something else than before,
// and has the repository's tags follow. The image's lock is held.
func (l *Library) move(ctx context.Context, r *imageRecord, tags ...string) error {
	ctx = context.WithoutCancel(ctx)
	done, err := l.intend(ctx, intent{Image: r.Name, Names: tags})
	if err != nil {
		return err
	}
	if err := l.putImage(ctx, r); err != nil {
		return err
	}
	if err := l.settle(ctx, r.Name, tags); err != nil {
		return err
	}
	done()
	return nil
}

// tag lets a tag mean a version from a time on.
func (r *imageRecord) tag(tag, v string, at time.Time) error {
	was, ok := r.Tags[tag]
	if was.Version == v {
		return nil
	}
	if !ok && len(r.Tags) >= maxTags {
		return fail(Malformed, "image %s has %d tags already; remove some", r.Name, maxTags)
	}
	is := Tag{Version: v, Since: at}
	if ok {
		is.History = append([]TagEvent{{was.Version, was.Since}}, was.History...)
		is.History = is.History[:min(len(is.History), maxHistory)]
	}
	r.Tags[tag] = is
	return nil
}

// RemoveTag removes a tag.
func (l *Library) RemoveTag(ctx context.Context, name, tag, revision string) error {
	if err := l.fresh(ctx); err != nil {
		return err
	}
	unlock, err := l.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := l.existing(ctx, name, revision)
	if err != nil {
		return err
	}
	if _, ok := r.Tags[tag]; !ok {
		return fail(NotFound, "backing image %s has no tag %.150q", name, tag)
	}
	delete(r.Tags, tag)
	return l.move(ctx, r, tag)
}

// File is the version whose file has a digest, under whichever image, if it is ready.
// name is what the last component of its address says, and must be the file name of one
// of them; image is then the one.
func (l *Library) File(ctx context.Context, sha512 digest.Digest, name string) (Version, error) {
	if err := l.fresh(ctx); err != nil {
		return Version{}, err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, is := range l.files[sha512] {
		if i := l.images[is.record.Image]; i != nil && is.usable() && is.record.file() == name {
			return l.tell(i, is.record.Image, is.record.Version, is), nil
		}
	}
	return Version{}, fail(NotFound, "there is no file %.150q with this digest", path.Base(name))
}

// storeConnections is how many parts of a file are fetched from a distant store at
// once.
const storeConnections = 4

// Open finds the bytes of a version, and starts a fill if they are at a distance.
func (l *Library) Open(ctx context.Context, v Version) (content.Content, error) {
	if v.State != Ready {
		return nil, fail(NotFound, "version %s of %s is %s, and has no file", v.Version, v.Name, v.State)
	}
	r, info, err := l.parts.Tree.OpenBlob(ctx, v.Digests.SHA256)
	switch {
	case err == nil && info.Size != v.Size:
		r.Close()
		return nil, fmt.Errorf("the stored bytes of %s %s are damaged: %d of them, and not %d", v.Name, v.Version, info.Size, v.Size)
	case err == nil:
		return content.Held(r, v.Size), nil
	case errors.Is(err, storage.ErrDistant):
		f, err := l.parts.Fills.Join(fill.Want{
			Digest:      v.Digests.SHA256,
			Size:        v.Size,
			Sources:     []fill.Source{l.parts.Fills.Stored(layout.Blob(v.Digests.SHA256), true)},
			Connections: storeConnections,
		})
		if err != nil {
			return nil, err
		}
		return content.Live(f, v.Size), nil
	case errors.Is(err, fs.ErrNotExist):
		l.lost(v)
		l.parts.Log.Error("the bytes of a backing image are gone", zap.String("image", v.Name), zap.String("version", v.Version), zap.Error(err))
		return nil, &Error{Code: NotFound, Message: fmt.Sprintf("the bytes of version %s of %s are gone from the store: delete the version, and upload it again", v.Version, v.Name), Err: err}
	}
	return nil, err
}

// Failed is told why the bytes of a version could not be served: those that are wrong
// are read again soon by the scrub.
func (l *Library) Failed(v Version, err error) {
	if l.parts.Suspect != nil && (errors.Is(err, fill.ErrDigest) || errors.Is(err, fill.ErrSize)) {
		l.parts.Suspect(v.Digests.SHA256)
	}
}

// lost takes note that the bytes of a version are gone.
func (l *Library) lost(v Version) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := l.images[v.Name]; i != nil {
		if is := i.versions[v.Version]; is != nil && is.bad == "" && is.record.Digests == v.Digests {
			is.gone = "its bytes are gone from the store: delete the version, and upload it again"
		}
	}
}
