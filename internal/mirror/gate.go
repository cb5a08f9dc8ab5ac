package mirror

import (
	"context"
	"errors"
	"io/fs"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
)

// This file is the one gate in front of every byte: what is asked for by its name
// passes serve, which asks verdict; what is found otherwise, in a listing or as
// the source of a mount, passes visible or source.

// verdict is what the site's rules say of the caller, and of what was asked for.
func (x *exchange) verdict(a access.Action) access.Verdict {
	if x.site.rules == nil {
		return x.site.rules.Decide(x.caller, a, "", x.target.Upstream == nil) // names none
	}
	return x.verdictOn(x.target, a)
}

// verdictOn is what they say of the caller, and of any target.
func (x *exchange) verdictOn(t Target, a access.Action) access.Verdict {
	return x.site.rules.Decide(x.caller, a, t.addressed(), t.Upstream == nil)
}

// source is the repository that a caller names as one to mount a blob from. It
// reports false unless the caller may pull it from there: then the caller is to hear
// what it would of a repository that is not there. An upstream is asked only whether
// what everyone could read is still to be read by everyone, as it is at a pull.
func (x *exchange) source(ctx context.Context, from string, d digest.Digest) (Target, bool) {
	t, err := x.site.Resolve(x.r.Host, "", from)
	if err != nil || !x.sees(ctx, t.addressed(), t.Repository, t.Upstream) {
		return Target{}, false
	}
	if !x.verdictOn(t, access.Pull).Explicit {
		err = x.mirror.public(ctx, t, oci.KindBlob, oci.Reference{Digest: d})
	}
	return t, err == nil
}

// visible is the name by which the caller can ask this site for a repository of
// the store. It reports false unless there is one and the caller may pull from
// it, as far as is known without asking an upstream.
func (x *exchange) visible(ctx context.Context, repository string) (name string, ok bool) {
	name, up, ok := x.site.address(repository)
	return name, ok && x.sees(ctx, name, repository, up)
}

// sees reports whether the caller may pull from a repository of the store that
// goes by a name here. Of an upstream that is asked with credentials, the caller
// sees what a probe has found to be public, and what a rule names.
func (x *exchange) sees(ctx context.Context, name, repository string, up *Upstream) bool {
	verdict := x.site.rules.Decide(x.caller, access.Pull, name, up == nil)
	if !verdict.Allowed {
		return false
	}
	record, err := x.mirror.tree.Record(ctx, repository)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false
	case err == nil && conflict(Target{Upstream: up, Repository: repository}, record) != nil:
		return false // it is not what this site would take it for
	case up == nil, verdict.Explicit:
		return true
	case record.Public != nil:
		return record.Public.Public
	}
	return up.Client.Anonymous() == nil
}

// addressed is the name by which a path of this site means the target whatever
// its default registry is.
func (t Target) addressed() string {
	if t.Upstream == nil {
		return t.Name
	}
	return t.Upstream.PathName + "/" + t.Name
}

// denied says so.
func (x *exchange) denied(a access.Action) error {
	if x.caller.Err != nil {
		return fail(denied, "it cannot be found out who asks: %v", x.caller.Err)
	}
	what := map[access.Action]string{access.Pull: "pull from", access.Push: "push to", access.Delete: "delete from"}[a]
	who := "anonymous"
	if x.caller.Identity != "" {
		who = printable(x.caller.Identity)
	}
	return fail(denied, "no rule of this site allows %s to %s it", who, what)
}
