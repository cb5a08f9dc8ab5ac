package api

import (
	"crypto/subtle"
	"fmt"
	"strings"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/oci"
)

// tokenIdentity is who has sent the site's token.
const tokenIdentity = "token"

// identify finds out whether the caller has sent the site's token.
func (x *exchange) identify() {
	if x.site.APIToken == "" {
		return
	}
	scheme, token, _ := strings.Cut(x.r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") && subtle.ConstantTimeCompare([]byte(strings.TrimSpace(token)), []byte(x.site.APIToken)) == 1 {
		x.caller.Identity, x.caller.Err, x.proven = tokenIdentity, nil, true
	}
}

// may reports whether the caller may do something with an image.
func (x *exchange) may(a access.Action, image string) bool {
	if x.site.Rules == nil {
		return a == access.Pull || x.proven
	}
	return x.site.Rules.Decide(x.caller, a, image, true).Allowed
}

// public reports whether anyone, from anywhere, may read an image: what a shared
// cache may keep.
func (x *exchange) public(image string) bool {
	return x.site.Rules == nil || x.site.Rules.Decide(access.Caller{}, access.Pull, image, true).Allowed
}

// allow fails unless the caller may.
func (x *exchange) allow(a access.Action, image string) error {
	if x.may(a, image) {
		return nil
	}
	return x.refused(a, image)
}

// refused is what a caller is told who may not.
func (x *exchange) refused(a access.Action, image string) error {
	what := map[access.Action]string{access.Pull: "read", access.Push: "change", access.Delete: "delete from"}[a]
	about := "the backing image " + image
	if image == "" {
		about = "backing images"
	}
	switch {
	case x.caller.Err != nil:
		return fail(denied, "it cannot be found out who asks: %v", x.caller.Err)
	case x.site.APIToken != "" && x.caller.Identity == "":
		return fail(unauthorized, "to %s %s takes a token: send Authorization: Bearer <token>", what, about)
	case x.site.Rules == nil:
		return fail(denied, "nobody may %s %s here: configure `api_token`, or a block `access` with a line such as `allow any to user:alice`", what, about)
	case x.caller.Identity == "":
		return fail(denied, "no rule of this site allows anonymous to %s %s", what, about)
	}
	return fail(denied, "no rule of this site allows %.100q to %s %s", x.caller.Identity, what, about)
}

func fail(code backing.Code, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &backing.Error{Code: code, Message: err.Error(), Err: err}
}

// maxName is the longest name of an image.
const maxName = 63

// validImage reports whether a string can be the name of an image.
func validImage(name string) bool { return len(name) <= maxName && oci.ValidComponent(name) }

// validReference reports whether a string can name a version: by its name, a tag or
// a digest.
func validReference(s string) bool {
	if strings.Contains(s, ":") {
		_, err := oci.ParseDigest(s)
		return err == nil
	}
	return oci.ValidTag(s)
}
