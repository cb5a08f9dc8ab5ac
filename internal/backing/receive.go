package backing

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// nameless is the last component of the repository that an upload counts in until it
// is known of which image it is. No repository is called so.
const nameless = "_"

// An Upload is an image that is being uploaded. It outlives the process for a day.
type Upload struct {
	library *Library
	up      *hosted.Upload
	record  uploadRecord
	arrived *arrival // whose bytes are stored, and of which no version could be made; of Library.mu
}

// maxUnfinished is how many of those are remembered; of the others the bytes are
// uploaded again, and collected meanwhile.
const maxUnfinished = 100

// uploadRecord is what the bytes of an upload do not say of it.
type uploadRecord struct {
	Schema int   `json:"schema"`
	Draft  Draft `json:"draft"`
	Size   int64 `json:"size"`
}

// newID names what is under way; nobody can guess it.
func newID() string { return strings.ToLower(rand.Text()) }

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

// Receive begins an upload. size is that of the file, or -1. The draft may be
// incomplete, and have no name yet: Finish is told the rest.
func (l *Library) Receive(ctx context.Context, d Draft, size int64) (*Upload, error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	whole := d
	if whole.Name == "" {
		whole.Name = "unknown"
	}
	if err := whole.valid(); err != nil {
		return nil, err
	}
	if most := l.set().MaxImage; most > 0 && size > most {
		return nil, fail(TooLarge, "the image has %d bytes, and %d are the most", size, most)
	}
	name := d.Name
	if name == "" {
		name = nameless
	}
	up, err := l.parts.Hosted.Receive(ctx, l.repository(name))
	if err != nil {
		return nil, err
	}
	u := &Upload{library: l, up: up, record: uploadRecord{recordSchema, d, size}}
	data, err := json.Marshal(u.record)
	if err == nil {
		err = l.parts.Store.Put(ctx, u.key(), data, storage.Durable)
	}
	if err != nil {
		u.Cancel(context.WithoutCancel(ctx)) // or it expires
		return nil, err
	}
	return u, nil
}

func (u *Upload) key() string { return layout.ImageUploads + u.up.ID() + ".json" }

// Upload returns an upload that is not finished, by its ID.
func (l *Library) Upload(ctx context.Context, id string) (*Upload, error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	l.mu.RLock()
	u := l.unfinished[id]
	l.mu.RUnlock()
	if u != nil {
		return u, nil
	}
	up, err := l.parts.Hosted.Received(ctx, id)
	if err != nil {
		return nil, noUpload(err)
	}
	u = &Upload{library: l, up: up}
	data, err := l.parts.Store.Get(ctx, u.key(), maxRecord)
	if err == nil {
		err = decode(data, func() int { return u.record.Schema }, &u.record)
	}
	if err != nil {
		return nil, noUpload(err)
	}
	return u, nil
}

// noUpload gives an error of the uploads its meaning.
func noUpload(err error) error {
	if errors.Is(err, hosted.ErrNoUpload) || errors.Is(err, fs.ErrNotExist) {
		return &Error{Code: NotFound, Message: "there is no such upload: it is finished or cancelled, or has expired", Err: hosted.ErrNoUpload}
	}
	return err
}

// ID names the upload.
func (u *Upload) ID() string { return u.up.ID() }

// Draft is what the upload was begun with.
func (u *Upload) Draft() Draft { return u.record.Draft }

// Size is that of the file in bytes, or -1.
func (u *Upload) Size() int64 { return u.record.Size }

// Offset is how many bytes have come.
func (u *Upload) Offset() int64 { return u.up.Offset() }

// Expires is when the upload ends by itself, unless more of it comes before.
func (u *Upload) Expires() time.Time { return u.up.Expires() }

// Settle ends what writes to the upload; see hosted.Upload.
func (u *Upload) Settle(ctx context.Context) error {
	u.library.mu.RLock()
	_, stored := u.library.unfinished[u.ID()]
	u.library.mu.RUnlock()
	if stored {
		return nil
	}
	return noUpload(u.up.Settle(ctx))
}

// Append adds what a request brings; see hosted.Upload.
func (u *Upload) Append(ctx context.Context, body hosted.Body) (int64, error) {
	have, most := u.up.Offset(), u.library.set().MaxImage
	if size := u.record.Size; size >= 0 && (most <= 0 || size < most) {
		most = size
	}
	if most > 0 && body.Length > most-have {
		return have, fail(TooLarge, "the image has more than %d bytes, which are the most", most)
	}
	body.Reader = u.library.bounded(body.Reader, have)
	return u.up.Append(ctx, body)
}

// Finish makes a version of what has come. created is false where the image has a
// version with the same bytes already: that is returned. An upload that is refused is
// gone; one that the store could not take may be finished again.
func (u *Upload) Finish(ctx context.Context, d Draft) (v Version, created bool, err error) {
	if err := u.whole(ctx, d); err != nil {
		return Version{}, false, err
	}
	name, release, err := u.library.reserve(d)
	if err != nil {
		var refused *Error
		if errors.As(err, &refused) && final(refused.Code) {
			err = errors.Join(err, u.Cancel(ctx))
		}
		return Version{}, false, err
	}
	defer release()
	return u.become(ctx, &arrival{draft: d, version: name, source: &Source{Type: "upload"}})
}

// whole fails unless a version can be made of what has come.
func (u *Upload) whole(ctx context.Context, d Draft) error {
	if err := u.library.fresh(ctx); err != nil {
		return err
	}
	if err := d.valid(); err != nil {
		return err
	}
	if size := u.record.Size; size >= 0 && size != u.up.Offset() {
		return fail(Malformed, "%d bytes of %d have come; send the rest first", u.up.Offset(), size)
	}
	return nil
}

// become makes a version of what has come.
func (u *Upload) become(ctx context.Context, a *arrival) (v Version, created bool, err error) {
	l, d := u.library, a.draft
	l.mu.RLock()
	before := u.arrived
	l.mu.RUnlock()
	if before != nil {
		if d.Name != before.draft.Name {
			return Version{}, false, fail(Malformed, "the upload has been stored for the image %s; finish it for that", before.draft.Name)
		}
		a.is, a.file = before.is, before.file
	} else if err := u.keep(ctx, a); err != nil {
		return Version{}, false, err
	}
	v, created, err = l.commit(ctx, a)
	l.mu.Lock()
	delete(l.unfinished, u.ID())
	if err != nil && len(l.unfinished) < maxUnfinished {
		u.arrived = a
		l.unfinished[u.ID()] = u
	}
	l.mu.Unlock()
	if err != nil {
		return Version{}, false, err
	}
	u.drop(ctx)
	l.register(v, d.Register)
	return v, created, nil
}

// keep has the bytes of an upload stored.
func (u *Upload) keep(ctx context.Context, a *arrival) error {
	l := u.library
	_, err := u.up.Keep(ctx, l.repository(a.draft.Name), func(file fill.File) error { return l.check(ctx, a, file) })
	if err == nil || errors.Is(err, errHad) {
		return nil
	}
	var refused *Error
	if errors.As(err, &refused) && errors.Is(err, hosted.ErrRefused) {
		u.drop(ctx)
		return refused
	}
	return noUpload(err)
}

// drop removes what is noted of an upload that is no more.
func (u *Upload) drop(ctx context.Context) {
	if err := u.library.parts.Store.Delete(context.WithoutCancel(ctx), u.key()); err != nil {
		u.library.parts.Log.Warn("removing the note of an upload that is finished; a sweep does", zap.Error(err))
	}
}

// Cancel ends an upload.
func (u *Upload) Cancel(ctx context.Context) error {
	u.library.mu.Lock()
	_, stored := u.library.unfinished[u.ID()]
	delete(u.library.unfinished, u.ID())
	u.library.mu.Unlock()
	if stored {
		u.drop(ctx)
		return nil
	}
	if err := u.up.Cancel(ctx); err != nil {
		return noUpload(err)
	}
	u.drop(ctx)
	return nil
}

// recoverDrafts removes what is noted of uploads that are no more.
func (l *Library) recoverDrafts(ctx context.Context) {
	for info, err := range l.parts.Store.List(ctx, layout.ImageUploads, true) {
		if err != nil {
			l.parts.Log.Warn("looking for uploads of backing images that have ended; it is done again", zap.Error(err))
			return
		}
		id := strings.TrimSuffix(strings.TrimPrefix(info.Key, layout.ImageUploads), ".json")
		if l.now().Sub(info.ModTime) < time.Minute && !info.ModTime.After(l.now()) {
			continue // it may just be beginning
		}
		if _, err := l.parts.Hosted.Received(ctx, id); errors.Is(err, hosted.ErrNoUpload) {
			if err := l.parts.Store.Delete(ctx, info.Key); err != nil {
				l.parts.Log.Warn("removing the note of an upload that has ended; it is done again", zap.Error(err))
			}
		}
	}
}

// register registers a new version with clusters, behind whoever made it.
func (l *Library) register(v Version, clusters []string) {
	for _, cluster := range clusters {
		l.behind(func(ctx context.Context) {
			// What is registered already stays as it was asked for.
			if slices.ContainsFunc(l.registrations(v.Name, v.Version), func(r Registration) bool { return r.Cluster == cluster }) {
				return
			}
			if _, err := l.Register(ctx, v.Name, v.Version, RegistrationOptions{Cluster: cluster}); err != nil {
				l.parts.Log.Warn("a new version of a backing image could not be registered; register it again", zap.String("image", v.Name), zap.String("version", v.Version), zap.String("cluster", cluster), zap.Error(err))
			}
		})
	}
}

// behind does something that ends with the library.
func (l *Library) behind(do func(ctx context.Context)) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx == nil || l.ctx.Err() != nil {
		return false
	}
	ctx := l.ctx
	l.wait.Add(1)
	go func() {
		defer l.wait.Done()
		do(ctx)
	}()
	return true
}
