package mirror

import (
	"github.com/caddy-registry/mirror/internal/access"
)

// verdict is what the site's rules say of the caller, and of what was asked for.
func (x *exchange) verdict(a access.Action) access.Verdict {
	return x.site.rules.Decide(x.caller, a, x.target.addressed(), x.target.Upstream == nil)
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
	what := map[access.Action]string{access.Pull: "pull from", access.Push: "push to", access.Delete: "delete from"}[a]
	who := "anonymous"
	if x.caller.Identity != "" {
		who = printable(x.caller.Identity)
	}
	return fail(denied, "no rule of this site allows %s to %s it", who, what)
}
