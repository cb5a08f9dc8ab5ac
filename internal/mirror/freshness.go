package mirror

import (
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

const (
	// checkPatience is how long a client waits for the check of a tag that is
	// held. The check goes on behind.
	checkPatience = 2 * time.Second
	// popular is how often a tag has been asked for since its last check when
	// it is checked again before it is stale, in the last quarter of tag_ttl.
	popular = 3
)

// A tagState is what is known of a mirrored tag. It is replaced, never changed.
// A tag that is only in the store, after a restart, has never been checked.
type tagState struct {
	digest    digest.Digest
	mediaType string // as a HEAD described it, while the manifest is not held
	size      int64
	checked   time.Time // when the origin was asked that said what it means, or that it is gone
	gone      time.Time // since when the origin says 404; zero: it is there
	use       *use
	read      *tree.LastRead // that the tree was told of; as old as the tag in memory
}

// use is how a tag has been used since it was checked.
type use struct {
	asked atomic.Int32
	ahead atomic.Bool // it is being checked again
}

// A standing is what is to be done for who asks for a tag that is known.
type standing int

const (
	// fresh: what is held is served.
	fresh standing = iota
	// due: the upstream is asked what it means now, and if it fails, or does not
	// say so in time, what is held is served.
	due
	// gone: the origin has just said that there is no such tag.
	gone
	// lost: as due, of a tag that is gone: if the origin fails, it still is.
	lost
)

// standing is the freshness table of a mirrored tag. What an answer of the
// upstream does is in check, failed and remember.
func (s tagState) standing(now time.Time, u *Upstream) standing {
	there := s.gone.IsZero() || u.keeps(now.Sub(s.gone))
	recent := !s.checked.IsZero() && now.Sub(s.checked) < u.TagTTL
	switch {
	case there && recent:
		return fresh
	case there:
		return due
	case recent:
		return gone
	default:
		return lost
	}
}

// ripe reports, once for each check, whether a fresh tag that has been asked for
// now is to be checked before it is stale, so that nobody has to wait.
func (s tagState) ripe(now time.Time, u *Upstream) bool {
	return s.use.asked.Add(1) >= popular && now.Sub(s.checked) >= u.TagTTL/4*3 && s.use.ahead.CompareAndSwap(false, true)
}

// keeps reports whether a held tag that its origin has not had for so long is
// served on.
func (u *Upstream) keeps(gone time.Duration) bool {
	return u.Keep && (u.KeepFor == 0 || gone < u.KeepFor)
}
