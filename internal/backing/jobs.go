package backing

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/backing/pull"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
)

// PullSettings are how URLs are pulled from.
type PullSettings struct {
	// AllowPrivate permits addresses that are not public, which a URL may name
	// whoever may push; link-local ones are never permitted.
	AllowPrivate bool
	// Proxy as http.Transport has it; nil: the environment's.
	Proxy func(*http.Request) (*url.URL, error)
}

// Source is where a version came from.
type Source struct {
	Type string   `json:"type"` // upload or url
	URL  string   `json:"url,omitempty"`
	Also []string `json:"mirrors,omitempty"` // the same file elsewhere, in order
	ETag string   `json:"etag,omitempty"`

	// What follows is asked with, and in no answer and no record but the job's own.
	Headers map[string]string `json:"headers,omitempty"`
	User    string            `json:"user,omitempty"`
	Secret  string            `json:"password,omitempty"`
	Token   string            `json:"token,omitempty"` // Authorization: Bearer
	CA      string            `json:"ca,omitempty"`    // PEM
}

// Job is work that goes on when its request has been answered, and survives the
// process.
type Job struct {
	ID       string    `json:"id"`
	Kind     string    `json:"kind"` // pull, upload or delete
	State    JobState  `json:"state"`
	Name     string    `json:"name"`
	Version  string    `json:"version"`
	Step     State     `json:"step,omitempty"` // of a pull that is running
	Progress Progress  `json:"progress"`
	Error    string    `json:"error,omitempty"`
	Code     Code      `json:"code,omitempty"` // of the error
	Retry    time.Time `json:"retry,omitzero"` // when it is tried again
	Created  time.Time `json:"createdAt"`
	Ended    time.Time `json:"endedAt,omitzero"`
}

// JobState is where a job stands.
type JobState string

const (
	Running   JobState = "running"
	Succeeded JobState = "succeeded"
	JobFailed JobState = "failed"
	Cancelled JobState = "cancelled"
)

const (
	maxRunning   = 4   // pulls that are at work at once
	maxFinishing = 2   // uploads that are
	maxQueued    = 100 // jobs that are not ended
	maxEnded     = 1000
	jobLife      = 24 * time.Hour // of one that has ended; and how long one tries
	firstRetry   = time.Second
	lastRetry    = 5 * time.Minute
	watchEvery   = time.Second / 4
)

// jobRecord is what is kept of a job on this machine, with the secrets that it asks
// with until it has ended.
type jobRecord struct {
	Schema int    `json:"schema"`
	Job    Job    `json:"job"`
	Draft  Draft  `json:"draft"`
	Source Source `json:"source"`
	// Upload has the bytes, instead of a source. Kept is what the store gets of it.
	Upload string     `json:"upload,omitempty"`
	Kept   *fill.File `json:"kept,omitempty"`
}

// job is a job in memory; Library.mu guards its record and changed.
type job struct {
	record  jobRecord
	changed chan struct{} // closed with each change
	cancel  context.CancelCauseFunc
	release func() // of the version's name
}

var errCancelled = errors.New("the job has been cancelled")

func (j *job) running() bool { return j.record.Job.State == Running }

// shown is a source without secrets: not even the query of its URLs.
func (s Source) shown() Source {
	out := Source{Type: s.Type, URL: shownURL(s.URL), ETag: s.ETag}
	for _, also := range s.Also {
		out.Also = append(out.Also, shownURL(also))
	}
	return out
}

func shownURL(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return ""
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// Pull begins to make a version of what a URL has.
func (l *Library) Pull(ctx context.Context, d Draft, s Source) (Job, error) {
	if err := l.fresh(ctx); err != nil {
		return Job{}, err
	}
	if err := d.valid(); err != nil {
		return Job{}, err
	}
	for _, text := range append([]string{s.URL}, s.Also...) {
		if u, err := url.Parse(text); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return Job{}, fail(Malformed, "a URL to pull from begins with https://host or http://host")
		}
	}
	s.Type = "url"
	return l.beginJob(ctx, jobRecord{Job: Job{Kind: "pull", Step: Fetching, Progress: Progress{Total: -1}}, Draft: d, Source: s})
}

// beginJob begins a job, behind whoever asks for it.
func (l *Library) beginJob(ctx context.Context, r jobRecord) (Job, error) {
	d := r.Draft
	if err := l.resuming(ctx); err != nil {
		return Job{}, err
	}
	began := false
	if err := l.queue(); err != nil {
		return Job{}, err
	}
	defer func() {
		if !began {
			l.unqueue()
		}
	}()
	name, release, err := l.reserve(d)
	if err != nil {
		return Job{}, err
	}
	if err := l.unused(r); err != nil {
		release()
		return Job{}, err
	}
	r.Schema, r.Job.ID, r.Job.State, r.Job.Created = recordSchema, newID(), Running, l.now().UTC()
	r.Job.Name, r.Job.Version = d.Name, name
	j := &job{changed: make(chan struct{}), release: release, record: r}
	if err := l.keepJob(ctx, j.record); err != nil {
		release()
		return Job{}, err
	}
	out := j.record.Job
	if began = l.startJob(j, true); !began {
		release()
		return Job{}, fail(StoreAway, "backing images are being shut down; try again")
	}
	return out, nil
}

// resuming waits until the jobs of an earlier process go on.
func (l *Library) resuming(ctx context.Context) error {
	l.mu.RLock()
	resumed, running := l.resumed, l.ctx
	l.mu.RUnlock()
	if running == nil {
		return fail(StoreAway, "backing images are being shut down; try again")
	}
	select {
	case <-resumed:
		return nil
	default:
	}
	select {
	case <-resumed:
		return nil
	case <-running.Done():
		return fail(StoreAway, "backing images are being shut down; try again")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// queue makes room for a job that is about to begin, until it is started or unqueued.
func (l *Library) queue() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	queued := l.beginning
	for _, j := range l.jobs {
		if j.running() {
			queued++
		}
	}
	if queued >= maxQueued {
		return fail(Busy, "%d pulls and uploads are not ended, which is the most; wait, or cancel some", maxQueued)
	}
	l.beginning++
	return nil
}

func (l *Library) unqueue() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beginning--
}

// unused fails where a pull with a version's name could only end with a conflict.
func (l *Library) unused(r jobRecord) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	d := r.Draft
	if i := l.images[d.Name]; d.Version != "" && i != nil && i.versions[d.Version] != nil && d.SHA256 == "" && d.SHA512 == "" && r.Upload == "" {
		return fail(VersionConflict, "backing image %s has a version %s; versions never change, so give this one another name, or the checksum of the file", d.Name, d.Version)
	}
	return nil
}

func (l *Library) keepJob(ctx context.Context, r jobRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if len(data) > maxRecord {
		return fail(Malformed, "the pull has more than %d bytes of addresses, headers and certificates", maxRecord)
	}
	return l.parts.Store.Put(ctx, layout.ImageJobs+r.Job.ID+".json", data, storage.Durable)
}

// startJob lets a job go on behind whoever asked. The room of one that is queued is
// its own from then on.
func (l *Library) startJob(j *job, queued bool) bool {
	l.mu.Lock()
	if l.ctx == nil || l.ctx.Err() != nil {
		l.mu.Unlock()
		return false
	}
	ctx, cancel := context.WithCancelCause(l.ctx)
	j.cancel = cancel
	l.jobs[j.record.Job.ID] = j
	if queued {
		l.beginning--
	}
	l.wait.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.wait.Done()
		defer cancel(nil)
		l.runJob(ctx, j)
	}()
	return true
}

// resumeJobs goes on with the jobs of an earlier process.
func (l *Library) resumeJobs(ctx context.Context) {
	for info, err := range l.parts.Store.List(ctx, layout.ImageJobs, true) {
		if err != nil {
			l.parts.Log.Error("jobs of an earlier process cannot be read; they go on at the next start", zap.Error(err))
			return
		}
		data, err := l.parts.Store.Get(ctx, info.Key, maxRecord)
		var r jobRecord
		if err == nil {
			err = decode(data, func() int { return r.Schema }, &r)
		}
		if err != nil {
			l.parts.Log.Error("a job cannot be read; it is left alone", zap.String("key", info.Key), zap.Error(err))
			continue
		}
		j := &job{changed: make(chan struct{}), record: r, release: func() {}, cancel: func(error) {}}
		l.mu.Lock()
		if l.jobs[r.Job.ID] != nil {
			l.mu.Unlock()
			continue
		}
		l.jobs[r.Job.ID] = j
		l.mu.Unlock()
		if !j.running() {
			continue
		}
		if l.madeBy(r.Job) {
			l.endJob(ctx, j, nil)
			// The process may have ended before this.
			l.register(Version{Name: r.Job.Name, Version: r.Job.Version}, r.Draft.Register)
			continue
		}
		d := r.Draft
		d.Version = r.Job.Version
		if _, release, err := l.reserve(d); err == nil {
			j.release = release
		}
		l.startJob(j, false)
	}
}

// madeBy reports whether a job has done its work.
func (l *Library) madeBy(j Job) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if i := l.images[j.Name]; i != nil {
		if v := i.versions[j.Version]; v != nil && v.bad == "" {
			return v.record.Job == j.ID
		}
	}
	return false
}

// changeJob changes what is told of a job.
func (l *Library) changeJob(j *job, change func(*Job)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&j.record.Job)
	close(j.changed)
	j.changed = make(chan struct{})
}

// endJob notes how a job has ended, without what it asked with.
func (l *Library) endJob(ctx context.Context, j *job, err error) {
	j.release()
	l.abandon(ctx, j.record.Upload)
	l.changeJob(j, func(is *Job) {
		is.Ended, is.Retry, is.Step = l.now().UTC(), time.Time{}, ""
		is.Error, is.Code = "", ""
		switch {
		case err == nil:
			is.State = Succeeded
			is.Progress.Total = is.Progress.Received
		case errors.Is(err, errCancelled):
			is.State = Cancelled
		default:
			is.State, is.Error, is.Code = JobFailed, err.Error(), UpstreamError
			if told := Known(err); told != nil {
				is.Error, is.Code = told.Message, told.Code
			}
		}
		j.record.Source = j.record.Source.shown()
	})
	l.mu.RLock()
	record := j.record
	l.mu.RUnlock()
	if err := l.keepJob(context.WithoutCancel(ctx), record); err != nil {
		l.parts.Log.Warn("noting that a job has ended; the next start does it again", zap.String("job", record.Job.ID), zap.Error(err))
	}
}

// runJob does a job's work until it is done, or is of no use any more, or the library
// ends: then the next process goes on.
func (l *Library) runJob(ctx context.Context, j *job) {
	wait, slots := firstRetry, l.slots
	if j.record.Upload != "" {
		slots = l.finishing // pulls take as long as their sources do
	}
	for {
		held := false
		select {
		case slots <- struct{}{}:
			held = true
		case <-ctx.Done():
		}
		err := context.Cause(ctx)
		if err == nil {
			err = l.attempt(ctx, j)
		}
		if held {
			<-slots
		}
		switch {
		case err == nil:
			l.endJob(ctx, j, nil)
			return
		case errors.Is(context.Cause(ctx), errCancelled):
			l.endJob(ctx, j, errCancelled)
			return
		case ctx.Err() != nil:
			return
		case finalPull(err) || l.now().Sub(j.record.Job.Created) > jobLife:
			l.endJob(ctx, j, err)
			return
		}
		message := err.Error()
		if told := Known(err); told != nil {
			message = told.Message
		}
		l.changeJob(j, func(is *Job) { is.Error, is.Retry, is.Step = message, l.now().Add(wait).UTC(), Fetching })
		l.parts.Log.Info("a "+j.record.Job.Kind+" of a backing image failed, and is tried again", zap.String("image", j.record.Job.Name), zap.Duration("after", wait), zap.Error(err))
		if !pause(ctx, wait) {
			continue
		}
		wait = min(2*wait, lastRetry)
		l.changeJob(j, func(is *Job) { is.Error, is.Retry = "", time.Time{} })
	}
}

// finalPull reports whether it is of no use to pull again.
func finalPull(err error) bool {
	if told := Known(err); told != nil {
		return final(told.Code) && told.Code != UpstreamError || told.Code == QuotaExceeded
	}
	switch {
	case errors.Is(err, pull.ErrChanged):
		return false
	case errors.Is(err, fill.ErrDigest), errors.Is(err, fill.ErrTooLarge), errors.Is(err, pull.ErrNoSize),
		errors.Is(err, pull.ErrWebPage), errors.Is(err, upstream.ErrGuard):
		return true
	}
	asked, again := worthwhile(err)
	return asked && !again
}

// worthwhile reports whether sources have said if they are to be asked again, and
// whether one is.
func worthwhile(err error) (asked, again bool) {
	if says, ok := err.(interface{ Retry() (time.Duration, bool) }); ok {
		_, again = says.Retry()
		return true, again
	}
	var in []error
	switch err := err.(type) {
	case interface{ Unwrap() []error }:
		in = err.Unwrap()
	case interface{ Unwrap() error }:
		in = []error{err.Unwrap()}
	}
	for _, err := range in {
		if err == nil {
			continue
		}
		one, more := worthwhile(err)
		asked, again = asked || one, again || more
	}
	return asked, again
}

// attempt pulls once.
func (l *Library) attempt(ctx context.Context, j *job) error {
	l.mu.RLock()
	r, settings := j.record, l.settings
	l.mu.RUnlock()
	if r.Upload != "" {
		return l.finishLater(ctx, j, r)
	}
	s, d := r.Source, r.Draft
	content, err := pull.Open(ctx, pull.Request{
		URLs: append([]string{s.URL}, s.Also...), Proven: d.SHA256 != "" || d.SHA512 != "",
		Headers: s.Headers, User: s.User, Password: s.Secret, Token: s.Token, CA: s.CA,
		AllowPrivate: settings.Pull.AllowPrivate, Proxy: settings.Pull.Proxy,
	})
	if err != nil {
		return err
	}
	defer content.Close()
	if most := settings.MaxImage; most > 0 && content.Size > most {
		return fail(TooLarge, "the file has %d bytes, and %d are the most", content.Size, most)
	}
	source := s.shown()
	source.ETag = content.ETag
	a := &arrival{draft: d, version: r.Job.Version, source: &source, job: r.Job.ID}
	l.changeJob(j, func(is *Job) { is.Step, is.Progress = Fetching, Progress{0, content.Size} })
	want := fill.Want{
		Size: content.Size, Sources: content.Sources, Connections: 4,
		Take: func(ctx context.Context, file fill.File) error {
			l.changeJob(j, func(is *Job) { is.Step, is.Progress.Received = Verifying, is.Progress.Total })
			return l.take(ctx, a, file)
		},
	}
	switch {
	case d.SHA512 != "":
		want.Digest = d.SHA512
	case d.SHA256 != "":
		want.Digest = d.SHA256
	default:
		want.Name = content.Name
	}
	err = l.parts.Fills.Pull(ctx, want, func(received int64) {
		l.changeJob(j, func(is *Job) { is.Progress.Received = received })
	})
	if errors.Is(err, fill.ErrDigest) {
		return &Error{Code: ChecksumMismatch, Message: "what the URL has does not have the checksum that was given: " + err.Error(), Err: err}
	}
	if err != nil {
		return err
	}
	v, _, err := l.commit(ctx, a)
	if err != nil {
		return err
	}
	l.changeJob(j, func(is *Job) { is.Version = v.Version })
	l.register(v, d.Register)
	return nil
}

// take is where the bytes of a pull come to the store.
func (l *Library) take(ctx context.Context, a *arrival, file fill.File) error {
	repository := l.repository(a.draft.Name)
	if file.Path == "" {
		return l.takeStored(ctx, a, file)
	}
	err := l.judge(ctx, a, file)
	var refused *Error
	switch {
	case errors.As(err, &refused) && final(refused.Code):
		return errors.Join(refused, fill.ErrRefused)
	case err != nil:
		return err
	case a.had != "" || a.unpacked:
		return nil
	}
	return l.parts.Hosted.KeepFile(ctx, repository, file)
}

// takeStored makes use of bytes that another pull, or an earlier process, has put into
// the store. Where they are not there the error is an fs.ErrNotExist.
func (l *Library) takeStored(ctx context.Context, a *arrival, file fill.File) error {
	if k := a.draft.Decompress; k != "" && k != "none" {
		return fs.ErrNotExist // what was in it was kept
	}
	r, info, err := l.parts.Tree.OpenBlob(ctx, file.SHA256)
	if errors.Is(err, storage.ErrDistant) {
		return fs.ErrNotExist
	}
	if err != nil {
		return err
	}
	defer r.Close()
	at, ok := r.(io.ReaderAt)
	if !ok || info.Size != file.Size {
		return fs.ErrNotExist
	}
	if a.is, err = probe.File(ctx, at, file.Size); err != nil {
		return err
	}
	if err := l.gate(a.is); err != nil {
		return errors.Join(err, fill.ErrRefused)
	}
	a.file = file
	return l.parts.Tree.LinkBlob(ctx, l.repository(a.draft.Name), file.SHA256, file.SHA256)
}

// Job returns a job that is running or has ended within a day.
func (l *Library) Job(ctx context.Context, id string) (Job, error) {
	if err := l.fresh(ctx); err != nil {
		return Job{}, err
	}
	if err := l.resuming(ctx); err != nil {
		return Job{}, err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if j := l.jobs[id]; j != nil {
		return j.record.Job, nil
	}
	return Job{}, fail(NotFound, "there is no job %.80q; one that has ended is kept for a day", id)
}

// Jobs are those, the latest first.
func (l *Library) Jobs(ctx context.Context) ([]Job, error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	if err := l.resuming(ctx); err != nil {
		return nil, err
	}
	l.mu.RLock()
	jobs := []Job{}
	for _, j := range l.jobs {
		jobs = append(jobs, j.record.Job)
	}
	l.mu.RUnlock()
	slices.SortFunc(jobs, func(a, b Job) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	return jobs, nil
}

// CancelJob ends a running job. What it has fetched is kept for another that asks for
// the same, as parts of any fill are.
func (l *Library) CancelJob(ctx context.Context, id string) error {
	if _, err := l.Job(ctx, id); err != nil {
		return err
	}
	l.mu.RLock()
	j := l.jobs[id]
	l.mu.RUnlock()
	if j == nil {
		return fail(NotFound, "there is no job %.80q", id)
	}
	for job, err := range l.WatchJob(ctx, id) {
		if err != nil {
			return err
		}
		if job.State != Running {
			return nil
		}
		l.mu.RLock()
		cancel := j.cancel
		l.mu.RUnlock()
		cancel(errCancelled)
	}
	return context.Cause(ctx)
}

// WatchJob yields a job now and whenever it has changed, four times a second at most,
// until it has ended or ctx has.
func (l *Library) WatchJob(ctx context.Context, id string) iter.Seq2[Job, error] {
	return func(yield func(Job, error) bool) {
		if _, err := l.Job(ctx, id); err != nil {
			yield(Job{}, err)
			return
		}
		for {
			l.mu.RLock()
			j, under := l.jobs[id], l.ctx
			if j == nil || under == nil {
				l.mu.RUnlock()
				return
			}
			is, changed := j.record.Job, j.changed
			l.mu.RUnlock()
			if !yield(is, nil) || is.State != Running {
				return
			}
			if !pause(ctx, watchEvery) {
				return
			}
			select {
			case <-changed:
			case <-under.Done():
				return
			case <-ctx.Done():
				return
			}
		}
	}
}

// pruneJobs removes the jobs that ended long ago, and the oldest beyond so many.
func (l *Library) pruneJobs(ctx context.Context) {
	jobs, err := l.Jobs(ctx)
	if err != nil {
		return
	}
	ended := 0
	for _, j := range jobs {
		if j.State == Running {
			continue
		}
		if ended++; ended <= maxEnded && l.now().Sub(j.Ended) < jobLife {
			continue
		}
		if err := l.parts.Store.Delete(ctx, layout.ImageJobs+j.ID+".json"); err != nil {
			l.parts.Log.Warn("removing a job that has ended; it is done again", zap.Error(err))
			continue
		}
		l.mu.Lock()
		delete(l.jobs, j.ID)
		l.mu.Unlock()
	}
}
