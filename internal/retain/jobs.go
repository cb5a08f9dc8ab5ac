package retain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	maxEnded   = 100   // jobs that have ended and are remembered
	maxRunning = 16    // jobs under way
	maxFound   = 1_000 // of Job.Found
)

// Kinds of jobs. Compare is what reindex is when nobody has asked for it: it
// looks for differences only.
const (
	kindGC      = "gc"
	kindScrub   = "scrub"
	kindReindex = "reindex"
	kindCompare = "compare"
	kindPurge   = "purge"
)

var (
	errNotBegun = errors.New("the store is not kept yet, or no more")
	errCanceled = errors.New("canceled")
)

// report says in s what is known of jobs, and of damage.
func (k *Keeper) report(s *Status) {
	s.LastGC, s.LastScrub, s.Damaged = k.lastGC(), k.damage.lastScrub(), k.damage.list()
}
