package backing

import "time"

// Clock lets a library that has no settings yet have another clock.
func (l *Library) Clock(now func() time.Time) { l.now = now }

// MaxQueued is how many jobs may be under way.
const MaxQueued = maxQueued
