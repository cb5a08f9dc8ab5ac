package tree

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"strings"
	"time"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// A Class says whether a repository's content can be fetched again.
type Class string

const (
	Mirrored Class = "mirrored"
	Hosted   Class = "hosted"
)

const (
	recordSchema = 1
	maxRecord    = 64 << 10
)

// A Record is what a repository's content alone cannot tell. It is written
// when the mirror creates a repository, and no later configuration changes its
// class: nothing may make a hosted image evictable.
type Record struct {
	Schema   int       `json:"schema"`
	Class    Class     `json:"class"`
	Upstream string    `json:"upstream,omitempty"` // docker.io
	Prefix   string    `json:"prefix"`             // under which the upstream stored then
	Created  time.Time `json:"created"`
	// Public is what anonymous probes have found, for an upstream that is
	// asked with credentials.
	Public *Verdict `json:"public,omitempty"`
}

// A Verdict says whether everyone may read a repository at its upstream.
type Verdict struct {
	Public  bool      `json:"public"`
	Checked time.Time `json:"checked"`
}

// Record returns a repository's record. One that registry:2 has created has
// none.
func (t *Tree) Record(ctx context.Context, repository string) (Record, error) {
	shared := t.Shared()
	r, ok := t.records.Get(repository)
	switch {
	case ok && r != nil && (r.Class == Mirrored || !shared):
		return *r, nil
	case ok && !shared:
		return Record{}, fs.ErrNotExist
	}
	g := t.guards.of(repository)
	since := g.removals.Load()
	data, err := t.store.Get(ctx, layout.Record(repository), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		g.mu.Lock()
		if g.removals.Load() == since {
			// Unless one has been written since.
			t.records.ContainsOrAdd(repository, nil)
		}
		g.mu.Unlock()
	}
	if err != nil {
		return Record{}, err
	}
	if len(bytes.Trim(data, "\x00")) == 0 {
		if info, err := t.store.Stat(ctx, layout.Record(repository)); err == nil && info.Doubtful {
			// A loss of power took it before it was synced, so it was a mirrored
			// repository's.
			return Record{}, fmt.Errorf("%w: the record of repository %s is empty", fs.ErrNotExist, repository)
		}
	}
	r = new(Record)
	if err := json.Unmarshal(data, r); err != nil {
		return Record{}, fmt.Errorf("the record of repository %s is damaged: %w", repository, err)
	}
	if r.Schema > recordSchema {
		return Record{}, fmt.Errorf("the record of repository %s has schema %d, which a newer version of this program wrote", repository, r.Schema)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.removals.Load() == since { // or it may have been forgotten
		if had, ok := t.records.Peek(repository); ok && had == nil && r.Class == Mirrored {
			t.records.Remove(repository) // another process has written it since
		}
		t.records.ContainsOrAdd(repository, r)
	}
	return *r, nil
}

// PutRecord writes a repository's record.
func (t *Tree) PutRecord(ctx context.Context, repository string, r Record) error {
	defer t.repositories.lock(repository)()
	return t.putRecord(ctx, repository, r)
}

// putRecord does so. The repository's lock is held.
func (t *Tree) putRecord(ctx context.Context, repository string, r Record) error {
	r.Schema = recordSchema
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	// A mirrored repository that loses its record is recorded again when it is
	// next asked for, and until then nothing in it is evicted.
	durability := storage.Durable
	if r.Class == Mirrored {
		durability = storage.Lazy
	}
	before, none := t.Record(ctx, repository)
	t.note(Change{Kind: Recorded, Repository: repository, Record: &r})
	if err := t.store.Put(ctx, layout.Record(repository), data, durability); err != nil {
		if none == nil {
			t.note(Change{Kind: Recorded, Repository: repository, Record: &before})
		} else if t.absent(context.WithoutCancel(ctx), layout.Record(repository)) {
			// What has no record counts as hosted.
			t.note(Change{Kind: Recorded, Repository: repository, Record: &Record{Class: Hosted}})
		}
		return err
	}
	t.records.Add(repository, &r)
	t.forgotten.Remove(repository)
	return nil
}

// Repositories yields the names of all repositories, in no particular order.
func (t *Tree) Repositories(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) { t.walk(ctx, "", yield) }
}

// walk visits a name and the names below it. It reports whether to go on.
func (t *Tree) walk(ctx context.Context, name string, yield func(string, error) bool) bool {
	prefix := layout.Repositories
	if name != "" {
		prefix += name + "/"
	}
	var below []string
	for info, err := range t.store.List(ctx, prefix, false) {
		if err != nil {
			yield("", err)
			return false
		}
		component, isDir := strings.CutSuffix(strings.TrimPrefix(info.Key, prefix), "/")
		switch {
		case !isDir:
		case component == "_manifests":
			if name != "" && !yield(name, nil) {
				return false
			}
		case oci.ValidComponent(component):
			below = append(below, component)
		}
	}
	for _, component := range below {
		child := component
		if name != "" {
			child = name + "/" + component
		}
		if !t.walk(ctx, child, yield) {
			return false
		}
	}
	return true
}

// Exists reports whether a repository has anything stored.
func (t *Tree) Exists(ctx context.Context, repository string) (bool, error) {
	if _, err := t.Record(ctx, repository); err == nil {
		return true, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	for _, err := range t.store.List(ctx, layout.Revisions(repository), false) {
		return err == nil, err
	}
	return false, nil
}
