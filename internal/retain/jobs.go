package retain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	maxEnded   = 100   // jobs that have ended and are remembered
	maxRunning = 16    // jobs under way
	maxFound   = 1_000 // of Job.Found
)

// Kinds of jobs. Compare is what reindex is when nobody has asked for it: it
// looks for differences only.
const (
	kindGC        = "gc"
	kindScrub     = "scrub"
	kindReindex   = "reindex"
	kindCompare   = "compare"
	kindPurge     = "purge"
	kindRetention = "retention"
)

var (
	errNotBegun = errors.New("the store is not kept yet")
	errCanceled = errors.New("canceled")
)

// A Job is work that takes its time. It goes on when nobody waits for it.
type Job struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind"` // gc, scrub, reindex, compare, purge or retention
	Begun   time.Time `json:"begun"`
	Ended   time.Time `json:"ended,omitzero"`
	Done    int64     `json:"done"` // of Total, which grows while it is being found out
	Total   int64     `json:"total"`
	Unit    string    `json:"unit"` // bytes, repositories, blobs
	Pattern string    `json:"pattern,omitempty"`
	DryRun  bool      `json:"dry_run,omitempty"`
	Found   []string  `json:"found,omitempty"`  // what was or would be removed, or is damaged: the first 1,000
	Removed int64     `json:"removed"`          // how many were or would be
	Kept    int64     `json:"kept,omitempty"`   // how many stay because they are pinned or immutable
	Bytes   int64     `json:"bytes"`            // freed, or that would be
	Error   string    `json:"error,omitempty"`  // why it has ended early
	Healed  int64     `json:"healed,omitempty"` // damaged blobs that have been fetched again
}

// jobs are those that are under way, and the last of the others.
type jobs struct {
	mu      sync.Mutex
	running []*job // the latest first
	ended   []*job // the latest first
	begun   int    // how many ever were
	closed  bool
	wg      sync.WaitGroup

	// turn holds a value while the catalog is compared or something is removed
	// by a job: one of them at a time.
	turn chan struct{}
	// changed is signalled when there are other settings.
	changed chan struct{}
}

func newJobs() jobs {
	return jobs{turn: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
}

// settled says that there are other settings.
func (j *jobs) settled() { signal(j.changed) }

// under reports whether a job of a kind is under way.
func (j *jobs) under(kind string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.running, func(other *job) bool { return other.Kind == kind })
}

// take waits for one's turn.
func take(ctx context.Context, turn chan struct{}) error {
	select {
	case turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A job is a Job under way.
type job struct {
	cancel context.CancelCauseFunc
	over   chan struct{} // closed when it has ended, and another may begin
	err    error         // why it has ended early, once over is closed
	mu     sync.Mutex
	Job    // guarded by mu, but for what it was begun with
}

// update changes what is known of a job. A nil job is nobody's.
func (j *job) update(f func(*Job)) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	f(&j.Job)
}

// found notes one that was, or would be, removed.
func (j *job) found(what string, bytes int64) {
	j.update(func(now *Job) {
		now.Removed++
		now.Bytes += bytes
		now.name(what)
	})
}

func (j *Job) name(what string) {
	if len(j.Found) < maxFound {
		j.Found = append(j.Found, what)
	}
}

func (j *job) snapshot() Job {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := j.Job
	now.Found = slices.Clone(now.Found)
	return now
}

func (k *Keeper) start(as Job, work func(context.Context, *job) error) (Job, error) {
	j, err := k.begin(as, work)
	if err != nil {
		return Job{}, err
	}
	return j.snapshot(), nil
}

// begin begins a job, unless one that does the same is under way, which is
// returned then.
func (k *Keeper) begin(as Job, work func(context.Context, *job) error) (*job, error) {
	if k.tree == nil {
		return nil, errNotBegun
	}
	js := &k.jobs
	js.mu.Lock()
	defer js.mu.Unlock()
	if js.closed {
		return nil, errClosed
	}
	for _, other := range js.running {
		// A gc that deletes tells what a dry run would.
		if other.Kind == as.Kind && other.Pattern == as.Pattern && (other.DryRun == as.DryRun || as.Kind == kindGC && as.DryRun) {
			return other, nil
		}
	}
	if len(js.running) >= maxRunning {
		return nil, fmt.Errorf("%d jobs are under way; wait for one of them, or cancel it", maxRunning)
	}
	js.begun++
	as.Begun = k.now().UTC()
	as.ID = fmt.Sprintf("%s-%s-%d", as.Kind, as.Begun.Format("20060102t150405"), js.begun)
	ctx, cancel := context.WithCancelCause(context.Background())
	j := &job{cancel: cancel, over: make(chan struct{}), Job: as}
	js.running = slices.Insert(js.running, 0, j)
	js.wg.Go(func() {
		defer close(j.over)
		err := work(ctx, j)
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx) // and not how it has shown
		}
		cancel(nil)
		j.err = err
		k.logJob(js.end(j, k.now().UTC(), err), err)
	})
	return j, nil
}

// end moves a job to those that have ended, in one step: whoever has seen that it has
// can begin another.
func (js *jobs) end(j *job, at time.Time, err error) Job {
	js.mu.Lock()
	defer js.mu.Unlock()
	j.update(func(now *Job) {
		now.Ended = at
		if err != nil {
			now.Error = err.Error()
		}
	})
	js.running = slices.DeleteFunc(js.running, func(other *job) bool { return other == j })
	js.ended = slices.Insert(js.ended, 0, j)
	js.ended = js.ended[:min(len(js.ended), maxEnded)]
	return j.snapshot()
}

func (k *Keeper) logJob(j Job, err error) {
	log := k.log.Info
	if err != nil && !errors.Is(err, errCanceled) && !errors.Is(err, errClosed) && !k.unreachable(err) {
		log = k.log.Warn
	}
	log("job ended", zap.String("job", j.ID), zap.Bool("dry_run", j.DryRun), zap.Int64("removed", j.Removed), zap.Int64("bytes", j.Bytes),
		zap.Int64("kept", j.Kept), zap.Duration("took", j.Ended.Sub(j.Begun)), zap.String("error", j.Error))
}

// work runs what is scheduled, and a reconcile whenever k.reconcile is
// signalled, until the context ends, and waits then for the end of all jobs.
// Begin starts it.
func (k *Keeper) work(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { k.schedule(ctx) })
	wg.Go(func() { k.scrub(ctx) })
	wg.Go(func() { k.compare(ctx) })
	wg.Go(func() { k.watchAfar(ctx) })
	wg.Wait()
	k.jobs.close()
}

func (j *jobs) close() {
	j.mu.Lock()
	j.closed = true
	for _, running := range j.running {
		running.cancel(errClosed)
	}
	j.mu.Unlock()
	j.wg.Wait()
}

// schedule begins a GC whenever it is time, behind a retention where there is one
// to do.
func (k *Keeper) schedule(ctx context.Context) {
	var retained <-chan struct{} // closed when the retention has ended behind which a GC comes; nil: none
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var due time.Time
		if s := k.settings(); s.GC != nil {
			due = s.GC.Next(k.now())
		}
		// Not in one sleep: clocks are set, and machines suspended.
		wait := time.Hour
		if !due.IsZero() {
			wait = min(wait, max(due.Sub(k.now()), 0))
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-k.jobs.changed:
			k.damage.rouse()
		case <-retained:
			retained = nil
			k.scheduled()
		case <-timer.C:
			if due.IsZero() || k.now().Before(due) || retained != nil {
				continue
			}
			if !k.set.Load().retains() || k.afar.mayRemove() != nil {
				k.scheduled()
			} else if j, err := k.begin(k.retention(false)); err != nil {
				k.log.Warn("the scheduled retention could not begin", zap.Error(err))
				k.scheduled()
			} else {
				retained = j.over
			}
		}
	}
}

// scheduled begins the GC for which it is time.
func (k *Keeper) scheduled() {
	if _, err := k.GC(false); err != nil {
		k.log.Warn("the scheduled gc could not begin", zap.Error(err))
	}
}

// Jobs returns those that are under way and the last 100 others, the latest
// first.
func (k *Keeper) Jobs() []Job {
	k.jobs.mu.Lock()
	defer k.jobs.mu.Unlock()
	var all []Job
	for _, j := range slices.Concat(k.jobs.running, k.jobs.ended) {
		all = append(all, j.snapshot())
	}
	return all
}

// Job returns one of them.
func (k *Keeper) Job(id string) (Job, bool) {
	if j := k.job(id); j != nil {
		return j.snapshot(), true
	}
	return Job{}, false
}

func (k *Keeper) job(id string) *job {
	k.jobs.mu.Lock()
	defer k.jobs.mu.Unlock()
	for _, j := range slices.Concat(k.jobs.running, k.jobs.ended) {
		if j.ID == id {
			return j
		}
	}
	return nil
}

// lastGC is the latest that has ended, dry runs aside.
func (k *Keeper) lastGC() *Job {
	k.jobs.mu.Lock()
	defer k.jobs.mu.Unlock()
	for _, j := range k.jobs.ended {
		if j.Kind == kindGC && !j.DryRun {
			now := j.snapshot()
			return &now
		}
	}
	return nil
}

// CancelJob ends a job early, and reports whether it was under way.
func (k *Keeper) CancelJob(id string) bool {
	j := k.job(id)
	if j == nil || !j.snapshot().Ended.IsZero() {
		return false
	}
	j.cancel(errCanceled)
	return true
}

// report says in s what is known of jobs, and of damage.
func (k *Keeper) report(s *Status) {
	s.LastGC, s.LastScrub, s.Damaged = k.lastGC(), k.damage.lastScrub(), k.damage.list()
}
