package upstream

import (
	"errors"
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
)

// A Speed is an average.
type Speed struct {
	Bytes int64         // a second; 0: none is asked for
	Over  time.Duration // the time that the average is taken over
}

func (s Speed) String() string {
	return fmt.Sprintf("%s/s over %v", humanize.IBytes(uint64(s.Bytes)), s.Over)
}

// errMinSpeed is wrapped by the error of a stream that is given up for its
// slowness.
var errMinSpeed = errors.New("slower than min_speed")

// slowPause is how long a fill stays away from a source that was too slow.
const slowPause = time.Minute

// pace holds a stream against the least speed. It counts the time spent in
// Read only: a reader that is busy elsewhere is not the source's fault.
type pace struct {
	least Speed
	bytes int64 // in the time spent
	spent time.Duration
}

// add counts a read, and says when the stream has been too slow.
func (p *pace) add(n int, took time.Duration) error {
	p.bytes += int64(n)
	p.spent += took
	if p.spent < p.least.Over {
		return nil
	}
	if float64(p.bytes) < float64(p.least.Bytes)*p.spent.Seconds() {
		return p.verdict()
	}
	p.bytes, p.spent = 0, 0
	return nil
}

// left is how long a read may bring nothing until the stream is too slow.
func (p *pace) left() time.Duration {
	enough := time.Duration(min(float64(p.bytes)/float64(p.least.Bytes), time.Hour.Seconds()) * float64(time.Second))
	return max(enough, p.least.Over) - p.spent
}

func (p *pace) verdict() error {
	measured := float64(p.bytes) / max(p.spent, time.Millisecond).Seconds()
	return fmt.Errorf("%w: %s/s, where %v is asked for", errMinSpeed, humanize.IBytes(uint64(measured)), p.least)
}
