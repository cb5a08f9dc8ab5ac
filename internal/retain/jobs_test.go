package retain

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"testing"

	"go.uber.org/zap"
)

// waiting is a job that goes on until it is told to end, or canceled.
func (b *kept) waiting(pattern string) (Job, chan struct{}) {
	b.t.Helper()
	end := make(chan struct{})
	j, err := b.begun(pattern, end)
	if err != nil {
		b.t.Fatal(err)
	}
	return j, end
}

func (b *kept) begun(pattern string, end chan struct{}) (Job, error) {
	return b.Keeper.start(Job{Kind: kindPurge, Pattern: pattern}, func(ctx context.Context, j *job) error {
		j.found("one", 10)
		select {
		case <-end:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("deep down: %w", ctx.Err())
		}
	})
}

func TestJobs(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	first, end := b.waiting("a")
	second, _ := b.waiting("b")
	if again, err := b.begun("a", nil); err != nil || again.ID != first.ID {
		t.Errorf("begun twice: %+v, %v", again, err)
	}
	eventually(t, "it to find something", until(func() bool {
		now, ok := b.Job(first.ID)
		return ok && now.Removed == 1 && now.Bytes == 10
	}))
	if !b.CancelJob(second.ID) {
		t.Error("not canceled")
	}
	if j := b.ended(second, nil); j.Error != "canceled" || j.Removed != 1 {
		t.Errorf("job is %+v", j)
	}
	if b.CancelJob(second.ID) || b.CancelJob("other") {
		t.Error("canceled what is not under way")
	}
	close(end)
	b.done(first, nil)
	if _, ok := b.Job("other"); ok {
		t.Error("found what there is not")
	}
	ids := func() (ids []string) {
		for _, j := range b.Jobs() {
			ids = append(ids, j.ID)
		}
		return ids
	}
	if got := ids(); len(got) != 3 || got[0] != first.ID || got[1] != second.ID { // and the comparison at the start
		t.Errorf("jobs are %q", got)
	}
	for i := range 110 {
		j, end := b.waiting(fmt.Sprint(i))
		close(end)
		b.done(j, nil)
	}
	last, _ := b.waiting("last")
	if got := ids(); len(got) != 101 || got[0] != last.ID || slices.Contains(got, first.ID) {
		t.Errorf("%d jobs", len(got))
	}
}

// Whoever has seen that a job has ended, and begins one that does the same, is not
// told of the one that has ended.
func TestJobBegunAfterOneThatEnded(t *testing.T) {
	t.Parallel()
	b := keep(t)
	for i := range 200 {
		j, end := b.waiting("a")
		close(end)
		for now, _ := b.Job(j.ID); now.Ended.IsZero(); now, _ = b.Job(j.ID) {
			runtime.Gosched()
		}
		if next, err := b.begun("a", end); err != nil || next.ID == j.ID {
			t.Fatalf("%d: %q, %v", i, next.ID, err)
		} else {
			b.done(next, nil)
		}
	}
}

// The first thousand that a job finds are named, and all are counted.
func TestJobFindsMany(t *testing.T) {
	t.Parallel()
	b := keep(t)
	j := b.done(b.Keeper.start(Job{Kind: kindGC}, func(_ context.Context, j *job) error {
		for i := range 1_005 {
			j.found(fmt.Sprint(i), 2)
		}
		return nil
	}))
	if len(j.Found) != 1_000 || j.Removed != 1_005 || j.Bytes != 2_010 {
		t.Errorf("%d of %d found, %d bytes", len(j.Found), j.Removed, j.Bytes)
	}
}

func TestJobsAreBounded(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	for i := range maxRunning {
		b.waiting(fmt.Sprint(i))
	}
	if _, err := b.begun("more", nil); err == nil {
		t.Error("one more was begun")
	}
}

// The end of the keeper is the end of its jobs, and none begins then.
func TestJobsEndWithKeeper(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	j, _ := b.waiting("a")
	b.stop()
	if now, ok := b.Job(j.ID); !ok || now.Error != errClosed.Error() {
		t.Errorf("job is %+v", now)
	}
	if _, err := b.GC(false); !errors.Is(err, errClosed) {
		t.Errorf("begun after the end: %v", err)
	}
	if _, err := New(nil, zap.NewNop()).GC(false); !errors.Is(err, errNotBegun) {
		t.Errorf("begun before the beginning: %v", err)
	}
}

// A canceled comparison is tried again by itself; what somebody asked for is not.
func TestCompareAgain(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.populate()
	blocked := make(chan struct{})
	b.jobs.turn <- struct{}{}
	go func() {
		defer close(blocked)
		b.incomplete("test")
	}()
	<-blocked
	var j Job
	eventually(t, "a comparison", until(func() bool {
		all := b.Jobs()
		j = all[0]
		return j.Kind == "compare" && j.Ended.IsZero()
	}))
	if !b.CancelJob(j.ID) {
		t.Error("not canceled")
	}
	if j := b.ended(j, nil); j.Error != "canceled" {
		t.Errorf("job is %+v", j)
	}
	<-b.jobs.turn
	b.done(b.GC(false)) // need not wait for the next try
	if b.completeSince().IsZero() {
		t.Error("not complete")
	}
}
