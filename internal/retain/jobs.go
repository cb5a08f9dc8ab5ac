package retain

import (
	"context"
	"time"
)

// jobs are those that are under way, and the last of the others.
type jobs struct{}

// work runs what is scheduled, and a reconcile whenever k.reconcile is
// signalled, until the context ends. Begin starts it.
func (k *Keeper) work(ctx context.Context) { <-ctx.Done() }

// A Job is work that takes its time. It goes on when nobody waits for it.
type Job struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind"` // gc, scrub, reindex or purge
	Begun   time.Time `json:"begun"`
	Ended   time.Time `json:"ended,omitzero"`
	Done    int64     `json:"done"` // of Total, which grows while it is being found out
	Total   int64     `json:"total"`
	Unit    string    `json:"unit"` // bytes, repositories, blobs
	DryRun  bool      `json:"dry_run,omitempty"`
	Found   []string  `json:"found,omitempty"` // what was or would be removed, or is damaged: the first 1,000
	Removed int64     `json:"removed"`         // how many were or would be
	Bytes   int64     `json:"bytes"`           // freed, or that would be
	Error   string    `json:"error,omitempty"` // why it has ended early
}

// GC begins to compare the catalog with the store and to delete what nothing
// refers to, or with dry to say what that is. One that is under way is
// returned.
func (k *Keeper) GC(dry bool) (Job, error) { panic("not written") }

// ScrubNow begins to read every blob again, as fast as the disk gives them.
func (k *Keeper) ScrubNow() (Job, error) { panic("not written") }

// Reindex begins to make the catalog again from the store.
func (k *Keeper) Reindex() (Job, error) { panic("not written") }

// Purge begins to remove every mirrored tag and manifest that the pattern
// matches: a repository in which "*" stands for part of a name and "**" for any
// names, and ":" with a tag in which "*" stands for part of it, or "@" with a
// digest; without either the whole repository. What is pinned stays.
func (k *Keeper) Purge(pattern string, dry bool) (Job, error) { panic("not written") }

// Jobs returns those that are under way and the last 100 others, the latest
// first.
func (k *Keeper) Jobs() []Job { panic("not written") }

// Job returns one of them.
func (k *Keeper) Job(id string) (Job, bool) { panic("not written") }

// CancelJob ends a job early, and reports whether it was under way.
func (k *Keeper) CancelJob(id string) bool { panic("not written") }
