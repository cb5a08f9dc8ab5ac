package fill

import "time"

// Tune makes a table work with small sizes, so that tests can have many
// segments in few bytes.
func Tune(t *Table, segment, small, least, most, ahead int64) {
	t.limits.segment, t.limits.small = segment, small
	t.limits.window = [2]int64{least, most}
	t.limits.ahead = ahead
}

// Cores lets a table believe in so many cores.
func Cores(t *Table, n int) { t.cores = n }

// Linger is how long a fill waits for somebody to come back.
func Linger(t *Table) time.Duration { return t.limits.linger }

// Boot lets a table believe to be in another boot of the machine.
func Boot(t *Table, boot string) { t.boot = boot }

// Hashed is how far larger content has been hashed, and 0 before it is fetched.
func Hashed(f *Fill) int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.proof == nil || f.hashing {
		return 0
	}
	return f.proof.at
}

// Under is how many fills are under way.
func Under(t *Table) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.live) + len(t.ending)
}
