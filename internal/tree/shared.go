package tree

import (
	"context"
	"strings"
	"sync/atomic"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

// sharing is whether another process may be writing to the store. While one may,
// memory is not asked what belongs to a hosted repository, nor whether there is
// one: the store is, which hears of what others do within two seconds. What is
// mirrored is remembered on, since nobody takes it away meanwhile, and what it is
// can be asked of its upstream. Bytes are those of their digest, whoever wrote
// them.
type sharing struct {
	distant storage.Distant // nil: nobody may
	last    atomic.Bool     // as was seen last
}

// Shared reports whether another process may be writing to the store now. It costs
// nothing to ask. Whenever that has changed, everything is forgotten that memory has
// of repositories, before this returns; so it is asked before memory is. While it was
// so memory was not kept right, and what another process has found out by itself when
// it was not is old.
func (t *Tree) Shared() bool {
	s := &t.sharing
	if s.distant == nil {
		return false
	}
	now := s.distant.Shared()
	if now != s.last.Load() {
		t.forgetAll()
		// Last: whoever finds it changed finds everything forgotten. Those who come
		// until then forget as well.
		s.last.Store(now)
	}
	return now
}

// forgetAll forgets what memory has of all repositories. Who has read the store
// before looks again.
func (t *Tree) forgetAll() {
	for i := range t.guards {
		g := &t.guards[i]
		g.mu.Lock()
		defer g.mu.Unlock()
		g.removals.Add(1)
	}
	t.members.Purge()
	t.revisions.Purge()
	t.scanned.Purge()
	t.records.Purge()
}

// believes reports whether what memory has of a repository holds, without asking
// the store: while the store is shared that of mirrored ones alone. It is asked before
// memory is.
func (t *Tree) believes(repository string) bool {
	if !t.Shared() {
		return true
	}
	r, ok := t.records.Peek(repository)
	return ok && r != nil && r.Class == Mirrored
}

// whole are the tags of a repository that mean something, by one listing of
// everything that is kept of tags: to ask for each would be a question to a
// distant place.
func (t *Tree) whole(ctx context.Context, repository string) ([]string, error) {
	var tags []string
	prefix := layout.Tags(repository)
	for info, err := range t.store.List(ctx, prefix, true) {
		if err != nil {
			return nil, err
		}
		tag, ok := strings.CutSuffix(strings.TrimPrefix(info.Key, prefix), "/current/link")
		if ok && oci.ValidTag(tag) {
			tags = append(tags, tag)
		}
	}
	return tags, nil
}
