package mirror

import (
	"github.com/caddy-registry/mirror/internal/oci"
)

// change answers PUT of a manifest, and DELETE.
func (x *exchange) change(ref oci.Reference) error {
	return fail(readOnly, "not yet")
}
