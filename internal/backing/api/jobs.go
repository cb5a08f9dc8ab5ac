package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
)

func (x *exchange) jobs() error {
	all, err := x.library.Jobs(x.r.Context())
	if err != nil {
		return err
	}
	seen := []backing.Job{}
	for _, j := range all {
		if x.may(access.Pull, j.Name) {
			seen = append(seen, j)
		}
	}
	return x.json(http.StatusOK, map[string]any{"items": seen})
}

// jobVar is the job that the path names, if the caller may do something with its image.
func (x *exchange) jobVar(a access.Action) (backing.Job, error) {
	j, err := x.library.Job(x.r.Context(), x.vars["job"])
	if err != nil {
		return j, err
	}
	x.report.Image, x.report.Version = j.Name, j.Version
	return j, x.allow(a, j.Name)
}

func (x *exchange) job() error {
	q, err := x.query("watch")
	if err != nil {
		return err
	}
	watch, err := flag(q, "watch")
	if err != nil {
		return err
	}
	j, err := x.jobVar(access.Pull)
	if err != nil {
		return err
	}
	if watch && x.r.Method == http.MethodGet {
		return x.watch(j.ID)
	}
	return x.json(http.StatusOK, j)
}

func (x *exchange) cancelJob() error {
	j, err := x.jobVar(access.Push)
	if err != nil {
		return err
	}
	if err := x.library.CancelJob(x.r.Context(), j.ID); err != nil {
		return err
	}
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

const (
	// heartbeat is how often a watcher hears something at least.
	heartbeat = 15 * time.Second
	// eventPatience is how long one event may take to be written.
	eventPatience = 30 * time.Second
)

// watch sends a job whenever it has changed, as server-sent events, until it has ended.
func (x *exchange) watch(id string) error {
	ctx, cancel := context.WithCancel(x.r.Context())
	defer cancel()
	type change struct {
		job backing.Job
		err error
	}
	changes := make(chan change)
	go func() {
		defer close(changes)
		for j, err := range x.library.WatchJob(ctx, id) {
			select {
			case changes <- change{j, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	defer func() {
		cancel()
		for range changes {
		}
	}()
	first, ok := <-changes
	if !ok {
		return ctx.Err()
	}
	if first.err != nil {
		return first.err
	}
	control := http.NewResponseController(x.w)
	event := func(text []byte) error {
		// The server's own deadline is for answers that are all there.
		if err := control.SetWriteDeadline(x.now().Add(eventPatience)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if _, err := x.w.Write(text); err != nil {
			return err
		}
		if err := control.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		return nil
	}
	tell := func(j backing.Job) error {
		body, err := json.Marshal(j)
		if err != nil {
			return err
		}
		return event([]byte("event: job\ndata: " + string(body) + "\n\n"))
	}
	header := x.w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-store, no-transform")
	header.Set("X-Accel-Buffering", "no") // nginx would keep it
	x.w.WriteHeader(http.StatusOK)
	fault := tell(first.job)
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for fault == nil {
		select {
		case next, ok := <-changes:
			if !ok {
				return nil
			}
			if fault = next.err; fault == nil {
				fault = tell(next.job)
			}
		case <-beat.C:
			fault = event([]byte(": still here\n\n"))
		}
	}
	x.report.Abort = true
	return fault
}
