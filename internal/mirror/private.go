package mirror

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/internal/upstream"
)

const (
	publicFor  = time.Hour   // a verdict that all may read is believed without asking again
	privateFor = time.Minute // that only we may is asked again sooner: publishing is common
)

// public checks that everyone may read a repository at its upstream, where we
// ask with credentials. Otherwise whoever reaches this mirror could read with
// them. An anonymous probe decides; its verdict is kept in the record, for
// times when nobody can be asked. Unknown means private. A rule of the site that
// names the repository opens it to whom it names, and this is not asked.
func (m *Mirror) public(ctx context.Context, t Target, kind oci.Kind, ref oci.Reference) error {
	if m.readable(t) {
		return nil
	}
	verdict, known := m.probes.Get(t.Repository)
	if !known {
		if record, err := m.tree.Record(ctx, t.Repository); err == nil && record.Public != nil {
			verdict, known = *record.Public, true
			m.probes.ContainsOrAdd(t.Repository, verdict)
		}
	}
	age := m.now().Sub(verdict.Checked)
	if known && verdict.Public && age < publicFor {
		return nil
	}
	private := fail(privateName, "%s can be read at %s only with the mirror's credentials; a rule of the site that names it opens it to whom it says", t.Name, t.Upstream.Name)
	if known && !verdict.Public && age < privateFor {
		return private
	}
	if known && verdict.Public {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, checkPatience, errNoAnswer)
		defer cancel()
	}
	open, err := share(ctx, m, fmt.Sprint("probe ", kind, " ", t.Repository, " ", ref), func(ctx context.Context) (bool, error) {
		return m.probe(ctx, t, kind, ref, !known)
	})
	switch {
	case err == nil && open:
		return nil
	case err == nil:
		return private
	}
	var refusal *upstream.Error
	if errors.As(err, &refusal) {
		switch refusal.Kind {
		case upstream.NotFound, upstream.Denied:
			// That neither we nor nobody finds one thing says nothing of the
			// repository; and credentials that have expired must not darken what
			// everyone could read.
			if !known || !verdict.Public {
				return err
			}
		case upstream.Invalid, upstream.Refused:
			known = false // an answer, if an odd one: nothing to believe the old verdict for
		}
	}
	if known && verdict.Public {
		// Believed until somebody can be asked again, and not asked at every
		// request meanwhile.
		verdict.Checked = m.now().Add(privateFor - publicFor)
		m.probes.Add(t.Repository, verdict)
		return nil
	}
	return fail(privateName, "nobody could be asked whether %s is public at %s (%v), and it counts as private until then", t.Name, t.Upstream.Name, err)
}

// readable reports whether memory alone tells that everyone may read a
// repository.
func (m *Mirror) readable(t Target) bool {
	if t.Upstream == nil || t.Upstream.Client.Anonymous() == nil {
		return true
	}
	verdict, known := m.probes.Get(t.Repository)
	return known && verdict.Public && m.now().Sub(verdict.Checked) < publicFor
}

// probe asks, and remembers what it learns of the repository.
func (m *Mirror) probe(ctx context.Context, t Target, kind oci.Kind, ref oci.Reference, must bool) (bool, error) {
	client := t.Upstream.Client
	err := client.Anonymous().Readable(ctx, t.Name, kind, ref, must)
	open := err == nil
	if !open {
		var refusal *upstream.Error
		if !errors.As(err, &refusal) || refusal.Kind != upstream.NotFound && refusal.Kind != upstream.Unauthorized {
			return false, err
		}
		// That someone without credentials does not find it says something of
		// the repository only if someone with credentials does.
		if err := client.Readable(ctx, t.Name, kind, ref, must); err != nil {
			return false, err
		}
	}
	verdict := tree.Verdict{Public: open, Checked: m.now().UTC()}
	m.probes.Add(t.Repository, verdict)
	if err := m.claim(ctx, t); errors.Is(err, errUnclaimed) {
		return open, nil
	} else if err != nil {
		return false, err
	}
	record, err := m.tree.Record(ctx, t.Repository)
	if m.absent(t, err) {
		return open, nil // there is no room for one
	}
	if err != nil {
		return false, err
	}
	if record.Public == nil || record.Public.Public != open {
		record.Public = &verdict
		if err := m.tree.PutRecord(ctx, t.Repository, record); err != nil {
			m.diskTrouble("recording what a probe has found", t.Repository, err)
		}
	}
	return open, nil
}
