// Package notify tells others of what becomes of images: by webhooks as
// distribution has them, from a queue that survives a restart.
package notify

import (
	"crypto/rand"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// An Action is what has happened.
type Action string

const (
	Push   Action = "push"   // a manifest or a blob was stored
	Pull   Action = "pull"   // a manifest or a blob was asked for by GET
	Mount  Action = "mount"  // a blob was taken over from another repository
	Delete Action = "delete" // a tag, a manifest or a blob was removed
)

// An Event is something that has happened to a repository.
type Event struct {
	Action     Action
	At         time.Time
	Repository string // as clients name it here
	From       string // of a mount: the repository it was taken from
	Tag        string // empty: by digest
	Digest     digest.Digest
	MediaType  string
	Size       int64

	// Who did it, and how.
	Actor     string // the identity; empty: nobody known
	Addr      string // of the client, without its port
	Request   string // by NewID, one for all events of a request; empty: as the event's own
	Method    string
	Host      string
	UserAgent string
	URL       string // of the content, absolute; empty where there is none any more
}

// NewID returns a random UUID (RFC 9562, version 4).
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
