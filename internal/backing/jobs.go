package backing

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"time"
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
	Kind     string    `json:"kind"` // pull, or delete
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

// Pull begins to make a version of what a URL has.
func (l *Library) Pull(ctx context.Context, d Draft, s Source) (Job, error) { panic("seam") }

// Job returns a job that is running or has ended within a day.
func (l *Library) Job(ctx context.Context, id string) (Job, error) { panic("seam") }

// Jobs are those, the latest first.
func (l *Library) Jobs(ctx context.Context) ([]Job, error) { panic("seam") }

// CancelJob ends a running job. What it has fetched is kept for another that asks for
// the same, as parts of any fill are.
func (l *Library) CancelJob(ctx context.Context, id string) error { panic("seam") }

// WatchJob yields a job now and whenever it has changed, four times a second at most,
// until it has ended or ctx has.
func (l *Library) WatchJob(ctx context.Context, id string) iter.Seq2[Job, error] { panic("seam") }
