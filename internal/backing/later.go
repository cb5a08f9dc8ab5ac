package backing

import (
	"context"
	"errors"
	"io/fs"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
)

// HashLater has an upload hashed by what finishes it, and not as it comes; see
// hosted.Upload.
func (u *Upload) HashLater() { u.up.HashLater() }

// FinishLater has a job do what Finish does, so that whoever sent the bytes need not
// wait until they are hashed, unpacked and stored. All of them have come. The job
// survives this process; of an upload that is hashed later, it fails where the machine
// stops before that.
func (u *Upload) FinishLater(ctx context.Context, d Draft) (Job, error) {
	if err := u.whole(ctx, d); err != nil {
		return Job{}, err
	}
	return u.library.beginJob(ctx, jobRecord{
		Job:   Job{Kind: "upload", Step: Verifying, Progress: Progress{u.Offset(), u.Offset()}},
		Draft: d, Upload: u.ID(),
	})
}

// finishLater makes a version of the upload that a job is of.
func (l *Library) finishLater(ctx context.Context, j *job, r jobRecord) error {
	a := &arrival{draft: r.Draft, version: r.Job.Version, source: &Source{Type: "upload"}, job: r.Job.ID}
	a.note = func(kept fill.File) error {
		kept.Path = ""
		l.mu.Lock()
		j.record.Kept = &kept
		noted := j.record
		l.mu.Unlock()
		return l.keepJob(ctx, noted)
	}
	l.changeJob(j, func(is *Job) { is.Step = Verifying })
	u, err := l.Upload(ctx, r.Upload)
	if err == nil && u.Offset() != r.Job.Progress.Total {
		err = fail(NotFound, "the end of it was lost")
	}
	var v Version
	switch told := Known(err); {
	case err == nil:
		v, _, err = u.become(ctx, a)
	case told != nil && told.Code == NotFound:
		v, err = l.becomeStored(ctx, a, r.Kept)
	}
	if err != nil {
		return err
	}
	l.changeJob(j, func(is *Job) { is.Version = v.Version })
	return nil
}

// becomeStored makes a version of what an earlier process has stored of an upload that
// is no more.
func (l *Library) becomeStored(ctx context.Context, a *arrival, kept *fill.File) (Version, error) {
	err := fs.ErrNotExist
	if kept != nil {
		a.draft.SHA256, a.draft.SHA512, a.draft.Decompress = "", "", "" // which it has passed
		err = l.takeStored(ctx, a, *kept)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Version{}, fail(NotFound, "what was uploaded is lost: the machine has stopped, or the space was needed, before it was stored; upload it again")
	}
	if err != nil {
		return Version{}, err
	}
	v, _, err := l.commit(ctx, a)
	if err == nil {
		l.register(v, a.draft.Register)
	}
	return v, err
}

// abandon lets nothing be left of the upload of a job that has ended; empty: it had
// none.
func (l *Library) abandon(ctx context.Context, id string) {
	if id == "" {
		return
	}
	ctx = context.WithoutCancel(ctx)
	u, err := l.Upload(ctx, id)
	if err == nil {
		err = u.Cancel(ctx)
	}
	if told := Known(err); told != nil && told.Code == NotFound {
		err = l.parts.Store.Delete(ctx, layout.ImageUploads+id+".json")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.parts.Log.Warn("removing what is left of an upload; it expires", zap.String("upload", id), zap.Error(err))
	}
}
