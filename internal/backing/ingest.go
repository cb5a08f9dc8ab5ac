package backing

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

const (
	artifactType = "application/vnd.caddy-registry.backing-image.v1"
	diskType     = "application/octet-stream"
)

// An intent says what is about to be changed in several steps, so that the next start
// brings the repository into agreement with the records if this process does not.
type intent struct {
	Image    string        `json:"image"`
	Names    []string      `json:"names"`              // of tags in the repository
	Version  string        `json:"version,omitempty"`  // that is being made
	Manifest digest.Digest `json:"manifest,omitempty"` // its
	Tags     []string      `json:"tags,omitempty"`     // that it gets
	Labels   map[string]string
}

// intend writes an intent, and returns what removes it.
func (l *Library) intend(ctx context.Context, i intent) (done func(), err error) {
	data, err := json.Marshal(i)
	if err != nil {
		return nil, err
	}
	key := layout.ImageIntents + newID() + ".json"
	if err := l.parts.Store.Put(ctx, key, data, storage.Durable); err != nil {
		return nil, err
	}
	return func() {
		if err := l.parts.Store.Delete(ctx, key); err != nil {
			l.parts.Log.Warn("removing a note of a change that is made; the next start does", zap.Error(err))
		}
	}, nil
}

// recover makes what an earlier process was changing whole, or lets nothing be left of
// it.
func (l *Library) recover(ctx context.Context) error {
	var keys []string
	for info, err := range l.parts.Store.List(ctx, layout.ImageIntents, true) {
		if err != nil {
			return err
		}
		keys = append(keys, info.Key)
	}
	for _, key := range keys {
		data, err := l.parts.Store.Get(ctx, key, maxRecord)
		if err != nil {
			return err
		}
		var i intent
		if err := json.Unmarshal(data, &i); err != nil || !validImage(i.Image) {
			l.parts.Log.Error("a note of a change of a backing image is damaged, and is dropped", zap.String("key", key), zap.Error(err))
		} else if err := l.finish(ctx, i); err != nil {
			var refused *Error
			if !errors.As(err, &refused) {
				return err
			}
			l.parts.Log.Error("a change of a backing image cannot be made whole, and is dropped", zap.String("image", i.Image), zap.Error(err))
		}
		if err := l.parts.Store.Delete(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// finish ends what an intent says.
func (l *Library) finish(ctx context.Context, i intent) error {
	unlock, err := l.lock(ctx, i.Image)
	if err != nil {
		return err
	}
	defer unlock()
	if i.Version != "" {
		l.mu.RLock()
		image := l.images[i.Image]
		made := image != nil && image.versions[i.Version] != nil
		l.mu.RUnlock()
		if made {
			r, err := l.current(ctx, i.Image)
			if err != nil {
				return err
			}
			if err := l.describe(ctx, r, i); err != nil {
				return err
			}
		}
	}
	if err := l.settle(ctx, i.Image, i.Names); err != nil {
		return err
	}
	if i.Manifest == "" {
		return nil
	}
	l.mu.RLock()
	named := false
	if image := l.images[i.Image]; image != nil {
		for _, v := range image.versions {
			named = named || v.bad != "" || v.record.Manifest == i.Manifest
		}
	}
	l.mu.RUnlock()
	if named {
		return nil
	}
	_, err = l.parts.Hosted.Owner().DeleteManifest(ctx, l.repository(i.Image), i.Manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// settle lets the repository's tags of some names mean what the records say. The
// image's lock is held.
func (l *Library) settle(ctx context.Context, name string, names []string) error {
	repository := l.repository(name)
	for _, tag := range names {
		var want digest.Digest
		l.mu.RLock()
		if i := l.images[name]; i != nil {
			v := i.versions[tag]
			if i.record != nil && v == nil {
				v = i.versions[i.record.Tags[tag].Version]
			}
			if v != nil && v.bad == "" && v.gone == "" {
				want = v.record.Manifest
			}
		}
		l.mu.RUnlock()
		is, err := l.parts.Tree.Tag(ctx, repository, tag)
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err
		case is == want:
		case want == "":
			if _, err := l.parts.Hosted.Owner().DeleteTag(ctx, repository, tag); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		default:
			if err := l.parts.Tree.SetTag(ctx, repository, tag, want, l.now(), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// describe writes what an image's record says of a version that has been made. The
// image's lock is held.
func (l *Library) describe(ctx context.Context, r *imageRecord, i intent) error {
	if r == nil {
		r = &imageRecord{Name: i.Image, Created: l.now().UTC(), Labels: map[string]string{}, Tags: map[string]Tag{}}
	}
	r.Last = max(r.Last, number(i.Version))
	if err := label(r.Labels, i.Labels); err != nil {
		return err
	}
	for _, tag := range i.Tags {
		if err := r.tag(tag, i.Version, l.now().UTC()); err != nil {
			return err
		}
	}
	return l.putImage(ctx, r)
}

// reserve finds the name of a version that is to be made, which nobody else gets until
// release.
func (l *Library) reserve(d Draft) (name string, release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxVersions {
		return "", nil, fail(Busy, "there are %d versions of backing images, which is the most; delete some", maxVersions)
	}
	i, taken := l.images[d.Name], l.reserved[d.Name]
	if i != nil && i.bad != "" {
		return "", nil, fail(Exists, "backing image %s cannot be changed: %s", d.Name, i.bad)
	}
	name = d.Version
	if name == "" {
		n := 0
		if i != nil {
			if i.record != nil {
				n = i.record.Last
			}
			for v := range i.versions {
				n = max(n, number(v))
			}
		}
		for v := range taken {
			n = max(n, number(v))
		}
		for tagged := true; tagged; {
			n++
			name, tagged = "v"+strconv.Itoa(n), false
			if i != nil && i.record != nil {
				_, tagged = i.record.Tags[name]
			}
		}
	} else {
		if taken[name] {
			return "", nil, fail(VersionConflict, "another upload is making version %s of %s now", name, d.Name)
		}
		if i != nil && i.record != nil {
			if _, tagged := i.record.Tags[name]; tagged {
				return "", nil, fail(VersionConflict, "%s is a tag of %s, and cannot be a version", name, d.Name)
			}
		}
	}
	if taken == nil {
		taken = map[string]bool{}
		l.reserved[d.Name] = taken
	}
	taken[name] = true
	return name, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(taken, name)
		if len(taken) == 0 && len(l.reserved[d.Name]) == 0 {
			delete(l.reserved, d.Name)
		}
	}, nil
}

// same is the version of an image with certain bytes, or that of the draft's name if
// it has others, which is an error.
func (l *Library) same(d Draft, name string, sum digest.Digest) (found string, gone bool, err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	i := l.images[d.Name]
	if i == nil {
		return "", false, nil
	}
	if i.bad != "" {
		return "", false, fail(Exists, "backing image %s cannot be changed: %s", d.Name, i.bad)
	}
	for v, is := range i.versions {
		if is.bad == "" && is.record.State == Ready && is.record.Digests.SHA256 == sum {
			return v, is.gone != "", nil
		}
	}
	if is := i.versions[name]; is != nil && is.bad == "" && is.record.State == Deleting {
		return "", false, fail(VersionConflict, "version %s of %s is being deleted; try again when it is gone", name, d.Name)
	} else if is != nil {
		return "", false, fail(VersionConflict, "version %s of %s has other bytes; versions never change, so give this one another name", name, d.Name)
	}
	return "", false, nil
}

// An arrival is a file that has come, and is to become a version.
type arrival struct {
	draft   Draft
	version string // reserved
	source  *Source
	job     string
	step    func(State)
	note    func(kept fill.File) error // before the store has it

	is       *probe.Report
	file     fill.File // that is kept
	unpacked bool      // it is another than the one that came
	had      string    // the version that has the bytes already
}

// judge looks at a file that has come, and returns what is to be kept of it: nothing
// (a.had is set then, or it has been unpacked into another), or the file itself.
func (l *Library) judge(ctx context.Context, a *arrival, file fill.File) error {
	d := a.draft
	if d.SHA256 != "" && d.SHA256 != file.SHA256 || d.SHA512 != "" && d.SHA512 != file.SHA512 {
		return fail(ChecksumMismatch, "the file that came has %s and %s, and not the checksum that was given: transfer it again", file.SHA256, file.SHA512)
	}
	f, err := os.Open(file.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	kind := d.Decompress
	if kind == "auto" {
		head := make([]byte, min(file.Size, 512))
		if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		kind = probe.Compression(head)
	}
	if kind != "" && kind != "none" && !a.unpacked {
		return l.unpack(ctx, a, kind, f)
	}
	if most := l.set().MaxImage; most > 0 && file.Size > most {
		return fail(TooLarge, "the image has %d bytes, and %d are the most", file.Size, most)
	}
	if a.is, err = probe.File(ctx, f, file.Size); err != nil {
		return err
	}
	if err := l.gate(a.is); err != nil {
		return err
	}
	had, gone, err := l.same(d, a.version, file.SHA256)
	if err != nil {
		return err
	}
	if had != "" && !gone {
		a.had = had
	}
	a.file = file
	return nil
}

// gate refuses what nobody should use, and by configuration what Longhorn cannot.
func (l *Library) gate(is *probe.Report) error {
	var why *Error
	for _, p := range is.Longhorn.Problems {
		if !p.Refused && l.set().Compat != Enforce && l.set().Compat != "" {
			continue
		}
		code := Unsupported
		switch p.Code {
		case "backing_file":
			return fail(BackingFile, "%s", p.Message) // whatever else is wrong
		case "size_not_aligned", "virtual_size_not_aligned":
			code = NotAligned
		}
		if why == nil {
			why = fail(code, "%s", p.Message)
		}
	}
	if why == nil {
		return nil
	}
	return why
}

// unpack decompresses a file that has come, and keeps what was in it.
func (l *Library) unpack(ctx context.Context, a *arrival, kind string, f io.Reader) error {
	r, err := probe.Decompress(kind, f)
	if err != nil {
		return fail(Unsupported, "the file cannot be decompressed as %s: %w", kind, err)
	}
	defer r.Close()
	repository := l.repository(a.draft.Name)
	u, err := l.parts.Hosted.Receive(ctx, repository)
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			if err := u.Cancel(context.WithoutCancel(ctx)); err != nil && !errors.Is(err, hosted.ErrNoUpload) {
				l.parts.Log.Warn("giving up what was decompressed; it expires", zap.Error(err))
			}
		}
	}()
	from := &source{Reader: r, ctx: ctx}
	if _, err := u.Append(ctx, hosted.Body{Reader: l.bounded(from, 0), At: -1, Length: -1}); err != nil {
		if from.err != nil && ctx.Err() == nil {
			return fail(Unsupported, "the file cannot be decompressed as %s: %w", kind, from.err)
		}
		return err
	}
	a.unpacked = true
	a.draft.SHA256, a.draft.SHA512 = "", ""
	_, err = u.Keep(ctx, repository, func(file fill.File) error { return l.check(ctx, a, file) })
	kept = err == nil
	if errors.Is(err, errHad) {
		return nil
	}
	return err
}

// source remembers the error of whoever decompresses.
type source struct {
	io.Reader
	ctx context.Context
	err error
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// bounded reads no more than an image may have, of which there are some bytes already.
func (l *Library) bounded(r io.Reader, have int64) io.Reader {
	most := l.set().MaxImage
	if most <= 0 || r == nil {
		return r
	}
	return &bounded{r, most - have, most}
}

type bounded struct {
	io.Reader
	left, most int64
}

func (b *bounded) Read(p []byte) (int, error) {
	// One byte more tells an image that ends there from one that goes on.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.Reader.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fail(TooLarge, "the image has more than %d bytes, which are the most", b.most)
	}
	return n, err
}

// errHad is wrapped by the error of a check of a file that is not needed.
var errHad = errors.New("nothing of the file is needed any more")

// check is judge for hosted.Upload.Keep.
func (l *Library) check(ctx context.Context, a *arrival, file fill.File) error {
	unpacked := a.unpacked
	err := l.judge(ctx, a, file)
	var refused *Error
	switch {
	case errors.As(err, &refused) && final(refused.Code):
		return errors.Join(refused, hosted.ErrRefused)
	case err != nil:
		return err
	}
	if a.note != nil {
		if err := a.note(a.file); err != nil {
			return err
		}
	}
	if a.had != "" || a.unpacked && !unpacked {
		return fmt.Errorf("%w: %w", errHad, hosted.ErrRefused)
	}
	return nil
}

// final reports whether what is refused with a code would be refused again.
func final(code Code) bool {
	switch code {
	case StoreAway, NoSpace, Busy, QuotaExceeded, LonghornAway, LonghornError:
		return false
	}
	return true
}

// commit makes a version of an arrival whose bytes the store has.
func (l *Library) commit(ctx context.Context, a *arrival) (Version, bool, error) {
	failpoint.Hit("backing.blob")
	ctx = context.WithoutCancel(ctx) // whoever asked may go, but not half of a commit
	unlock, err := l.lock(ctx, a.draft.Name)
	if err != nil {
		return Version{}, false, err
	}
	defer unlock()
	made, err := l.commitLocked(ctx, a)
	if err != nil {
		return Version{}, false, err
	}
	v, err := l.find(a.draft.Name, a.version)
	return v, made, err
}

func (l *Library) commitLocked(ctx context.Context, a *arrival) (made bool, err error) {
	r, err := l.current(ctx, a.draft.Name)
	if err != nil {
		return false, err
	}
	do := intent{Image: a.draft.Name, Version: a.version, Tags: a.draft.Tags, Labels: a.draft.Labels}
	had, gone, err := l.same(a.draft, a.version, a.file.SHA256)
	if err != nil {
		return false, err
	}
	switch {
	case had != "":
		a.version, do.Version = had, had
	case a.had != "":
		// Its bytes were dropped since the image had them.
		return false, fail(VersionConflict, "version %s of %s had the same bytes, and has been deleted meanwhile: transfer the file again", a.had, a.draft.Name)
	}
	do.Names = append([]string{do.Version}, do.Tags...)
	if err := l.tagsFree(do); err != nil {
		return false, err
	}
	made = had == "" || gone
	record := &versionRecord{
		Image: a.draft.Name, Version: a.version, State: Ready, Format: a.is.Format, Size: a.file.Size,
		VirtualSize: a.is.VirtualSize, Digests: Digests{a.file.SHA256, a.file.SHA512}, Probe: a.is,
		Source: a.source, Created: l.now().UTC(), Job: a.job,
	}
	var manifest []byte
	if made {
		if manifest, err = record.manifest(); err != nil {
			return false, err
		}
		record.Manifest = digest.FromBytes(manifest)
		do.Manifest = record.Manifest
		if err := l.unwritten(ctx, record); err != nil {
			return false, err
		}
	}
	done, err := l.intend(ctx, do)
	if err != nil {
		return false, err
	}
	if made {
		err = l.make(ctx, record, manifest, do)
	}
	if err == nil {
		err = l.describe(ctx, r, do)
	}
	if err == nil {
		err = l.settle(ctx, do.Image, do.Names)
	}
	if err != nil {
		// Of what has no record nothing is to be left; if the store does not do that
		// now, the next start does.
		if l.undo(ctx, do) == nil {
			done()
		}
		return false, err
	}
	done()
	return made && had == "", nil
}

// tagsFree says whether something is a tag and a version.
func (l *Library) tagsFree(do intent) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	i := l.images[do.Image]
	if i == nil {
		return nil
	}
	for _, tag := range do.Tags {
		if i.versions[tag] != nil || tag == do.Version {
			return fail(VersionConflict, "%s is a version of %s, and cannot be a tag", tag, do.Image)
		}
	}
	if i.record != nil {
		if _, tagged := i.record.Tags[do.Version]; tagged {
			return fail(VersionConflict, "%s is a tag of %s, and cannot be a version", do.Version, do.Image)
		}
	}
	return nil
}

// unwritten makes sure, as well as that can be, that no other process has made the
// version.
func (l *Library) unwritten(ctx context.Context, r *versionRecord) error {
	if !l.shared() {
		return nil
	}
	data, err := l.parts.Store.Get(ctx, layout.ImageVersion(r.Image, r.Version), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	is := new(versionRecord)
	if bad := decode(data, func() int { return is.Schema }, is); bad != nil || is.Digests.SHA256 != r.Digests.SHA256 {
		return fail(VersionConflict, "another process has just made version %s of %s; repeat the upload", r.Version, r.Image)
	}
	return nil
}

// undo takes out of the repository what became no version.
func (l *Library) undo(ctx context.Context, do intent) error {
	if err := l.settle(ctx, do.Image, do.Names); err != nil {
		return err
	}
	l.mu.RLock()
	i := l.images[do.Image]
	made := i != nil && i.versions[do.Version] != nil
	l.mu.RUnlock()
	if made || do.Manifest == "" {
		return nil
	}
	_, err := l.parts.Hosted.Owner().DeleteManifest(ctx, l.repository(do.Image), do.Manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// make puts the manifest of a version, its tags, and its record.
func (l *Library) make(ctx context.Context, r *versionRecord, manifest []byte, do intent) error {
	repository := l.repository(r.Image)
	if err := l.empty(ctx, repository); err != nil {
		return err
	}
	push := hosted.Push{Repository: repository, Digest: r.Manifest, ContentType: v1.MediaTypeImageManifest, Body: manifest}
	if _, err := l.parts.Hosted.Owner().PutManifest(ctx, push); err != nil {
		return err
	}
	failpoint.Hit("backing.manifest")
	for _, tag := range do.Names {
		if err := l.parts.Tree.SetTag(ctx, repository, tag, r.Manifest, l.now(), nil); err != nil {
			return err
		}
	}
	failpoint.Hit("backing.tag")
	if err := l.putVersion(ctx, r); err != nil {
		return err
	}
	failpoint.Hit("backing.record")
	return nil
}

// empty makes sure that a repository has the config of an artifact, which says nothing.
func (l *Library) empty(ctx context.Context, repository string) error {
	d := v1.DescriptorEmptyJSON.Digest
	if _, ok, err := l.parts.Tree.Member(ctx, repository, d); err != nil {
		return err
	} else if ok {
		if _, err := l.parts.Tree.StatBlob(ctx, d); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	u, err := l.parts.Hosted.Receive(ctx, repository)
	if err != nil {
		return err
	}
	if _, err = u.Append(ctx, hosted.Body{Reader: newReader(v1.DescriptorEmptyJSON.Data), At: -1, Length: v1.DescriptorEmptyJSON.Size}); err == nil {
		_, err = u.Keep(ctx, repository, func(fill.File) error { return nil })
	}
	if err != nil {
		u.Cancel(ctx) // or it expires
	}
	return err
}

// manifest is the artifact of a version; see the OCI image specification, "Guidelines
// for Artifact Usage".
func (r *versionRecord) manifest() ([]byte, error) {
	return json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: v1.DescriptorEmptyJSON,
		Layers: []v1.Descriptor{{MediaType: diskType, Digest: r.Digests.SHA256, Size: r.Size, Annotations: map[string]string{v1.AnnotationTitle: r.file()}}},
	})
}
