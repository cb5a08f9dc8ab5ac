package upstream

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Kind is what an upstream's failure means for whoever asked.
type Kind int

const (
	// Unavailable: no usable answer. A connection failed, a deadline passed,
	// a server error, or the breaker is open.
	Unavailable Kind = iota
	// NotFound: the upstream says that it has no such thing. Only the origin
	// can say so.
	NotFound
	// Unauthorized: the upstream wants to know who asks, and no credentials
	// are configured. Registries answer so for what does not exist, too.
	Unauthorized
	// Denied: the upstream refused the credentials that are configured.
	Denied
	// RateLimited: asked too often.
	RateLimited
	// Refused: this program would not go where the upstream sent it.
	Refused
	// Invalid: an answer that is not what was asked for, such as the HTML page
	// of a captive portal, or bytes with another digest.
	Invalid
)

// An Error says which hop failed and how.
type Error struct {
	Kind     Kind
	Upstream string // docker.io
	Endpoint string // https://registry-1.docker.io
	Status   int    // of the HTTP answer, or 0
	// Origin says that the endpoint is the registry itself, whose word on what
	// does not exist is the only one that counts.
	Origin bool
	// After is how long the upstream wants to be left alone; 0 says nothing.
	After time.Duration
	// Reason is for a person: what went wrong at that hop.
	Reason string
	Err    error
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "upstream %s (%s)", e.Upstream, e.Endpoint)
	if e.Status != 0 {
		fmt.Fprintf(&b, " answers %d", e.Status)
	}
	if e.Reason != "" {
		b.WriteString(": " + e.Reason)
	}
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Slow reports whether a source delivers, but slower than `min_speed`.
func (e *Error) Slow() bool { return errors.Is(e.Err, errMinSpeed) }

// Final says that asking elsewhere makes no sense. See fill.Source.
func (e *Error) Final() bool { return e.Kind == NotFound && e.Origin }

// longestWait is how long a rate limit may ask us to wait while a client
// waits with us.
const longestWait = 20 * time.Second

// Retry says whether asking again soon makes sense. See fill.Source.
func (e *Error) Retry() (after time.Duration, worthwhile bool) {
	switch e.Kind {
	case Unavailable:
		// Who is too slow now may be fast again while the others fail.
		return e.After, e.After <= longestWait || errors.Is(e.Err, errMinSpeed)
	case RateLimited:
		return max(e.After, time.Second), e.After <= longestWait
	}
	return 0, false
}
