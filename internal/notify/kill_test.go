package notify

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

const killDir, killURL, killPoint = "NOTIFY_TEST_DIR", "NOTIFY_TEST_URL", "NOTIFY_TEST_POINT"

// TestKilled is the process that TestKill starts: it dies in between.
func TestKilled(t *testing.T) {
	dir := os.Getenv(killDir)
	if dir == "" {
		return
	}
	point, nth, _ := strings.Cut(os.Getenv(killPoint), "#")
	at, _ := strconv.Atoi(nth)
	var hits atomic.Int64
	failpoint.Set(func(name string) {
		if name == point && hits.Add(1) == int64(at) {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	s := &tested{Sender: New(dir, zap.NewNop()), t: t, clock: &clock{}}
	s.Set([]Webhook{hookAt("audit", os.Getenv(killURL))})
	for range 10 {
		s.push()
	}
	select {} // it dies in the sender
}

// TestKill: a process that is killed between a push and its delivery, or right
// after it, loses no event; one may be delivered twice.
func TestKill(t *testing.T) {
	for point, want := range map[string]struct {
		taken []string // before
		then  []string
	}{
		"webhook.queued#1":  {nil, tags(1, 1)},
		"webhook.queued#7":  {nil, tags(1, 7)},
		"webhook.taken#1":   {tags(1, 1), tags(1, 10)},
		"webhook.taken#10":  {tags(1, 10), tags(10, 10)},
		"webhook.taken#4":   {tags(1, 4), tags(4, 10)},
		"webhook.queued#10": {nil, tags(1, 10)},
	} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			k := newSink(t)
			if strings.HasPrefix(point, "webhook.queued") {
				k.answers(503)
			}
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+dir, killURL+"="+k.URL, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			k.mu.Lock()
			before, ids := len(k.taken), len(k.ids)
			k.mu.Unlock()
			if before != len(want.taken) {
				t.Errorf("%d were taken before; want %d", before, len(want.taken))
			}
			k.answers(200)
			s := open(t, dir)
			s.n = 100
			s.Set([]Webhook{k.hook("audit")})
			s.push()
			if point == "webhook.taken#1" || point == "webhook.taken#4" {
				// How many had been told of by then is up to chance, but no
				// fewer than were taken.
				k.until("the last", func() bool { return k.taken[len(k.taken)-1] == "101" })
				k.mu.Lock()
				defer k.mu.Unlock()
				then := k.taken[before : len(k.taken)-1]
				if len(then) < 1 || strings.Join(then, " ") != strings.Join(want.then[:len(then)], " ") {
					t.Errorf("then came %q", then)
				}
			} else {
				k.takes(append(append(want.taken, want.then...), "101")...)
				k.mu.Lock()
				defer k.mu.Unlock()
			}
			if n := len(k.taken) - before - 1; before > 0 && len(k.ids) != ids+n {
				t.Errorf("%d ids, %d before, and %d more events of which one was sent again", len(k.ids), ids, n)
			}
		})
	}
}
