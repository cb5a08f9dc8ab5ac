package mirror

import (
	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/notify"
)

func (x *exchange) notify(a notify.Action, d digest.Digest, mediaType string, size int64, tag, from string) {
	if tell := x.mirror.notify.Load(); tell != nil && *tell != nil {
		(*tell)(notify.Event{Action: a, Repository: x.target.addressed(), From: from, Digest: d, Size: size})
	}
}
