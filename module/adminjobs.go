package module

import (
	"errors"
	"net/http"
	"strings"

	"github.com/caddy-registry/mirror/internal/retain"
)

// jobRequest is work to begin.
type jobRequest struct {
	Kind    string `json:"kind"`
	DryRun  bool   `json:"dry_run,omitempty"`
	Pattern string `json:"pattern,omitempty"`
}

func beginJob(r *http.Request, in *visit) (any, error) {
	var asked jobRequest
	if err := readBody(r, &asked, `{"kind": "gc", "dry_run": true}`); err != nil {
		return nil, err
	}
	switch {
	case asked.DryRun && asked.Kind != "gc" && asked.Kind != "purge" && asked.Kind != "retention":
		return nil, apiError(http.StatusBadRequest, "dry_run is for gc, purge and retention")
	case asked.Kind == "purge" && asked.Pattern == "":
		return nil, apiError(http.StatusBadRequest, "purge needs a pattern such as docker.io/library/alpine:3.*")
	case asked.Kind != "purge" && asked.Pattern != "":
		return nil, apiError(http.StatusBadRequest, "a pattern is for purge")
	}
	var job retain.Job
	var err error
	switch asked.Kind {
	case "gc":
		job, err = in.keeper.GC(asked.DryRun)
	case "scrub":
		job, err = in.keeper.ScrubNow()
	case "reindex":
		job, err = in.keeper.Reindex()
	case "purge":
		job, err = in.keeper.Purge(asked.Pattern, asked.DryRun)
	case "retention":
		job, err = in.keeper.Retention(asked.DryRun)
	default:
		return nil, apiError(http.StatusBadRequest, "kind: %.100q is none of gc, scrub, reindex, purge and retention", asked.Kind)
	}
	switch {
	case errors.Is(err, retain.ErrPattern):
		return nil, apiError(http.StatusBadRequest, "%w", err)
	case err != nil:
		return nil, apiError(http.StatusConflict, "%w", err)
	}
	in.status = http.StatusAccepted
	return job, nil
}

// jobList is every job that is known of, less what each has found.
type jobList struct {
	Jobs []retain.Job `json:"jobs"`
	// Off is why those that delete do not begin.
	Off string `json:"off,omitempty"`
}

func listJobs(r *http.Request, in *visit) (any, error) {
	if _, err := readQuery(r); err != nil {
		return nil, err
	}
	list := jobList{Jobs: []retain.Job{}, Off: in.keeper.Off()}
	for _, job := range in.keeper.Jobs() {
		job.Found = nil
		list.Jobs = append(list.Jobs, job)
	}
	return list, nil
}

// job is the one that a path names.
func (in *visit) job(r *http.Request) (retain.Job, error) {
	id := strings.TrimPrefix(r.URL.Path, "/registry/jobs/")
	job, ok := in.keeper.Job(id)
	if !ok {
		return job, apiError(http.StatusNotFound, "there is no job %.100q; one that ended long ago, or before the last start, is not remembered", id)
	}
	return job, nil
}

func showJob(r *http.Request, in *visit) (any, error) {
	if _, err := readQuery(r); err != nil {
		return nil, err
	}
	return in.job(r)
}

func cancelJob(r *http.Request, in *visit) (any, error) {
	job, err := in.job(r)
	if err != nil {
		return nil, err
	}
	if !in.keeper.CancelJob(job.ID) {
		return nil, apiError(http.StatusConflict, "%s %s has ended already", job.Kind, job.ID)
	}
	return in.job(r)
}
