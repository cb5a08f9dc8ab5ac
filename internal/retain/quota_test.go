package retain

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	registry "github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

func hostedPattern(t *testing.T, s string) oci.Pattern {
	t.Helper()
	p, err := oci.ParsePattern(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// limited lets the repositories of a pattern take so much.
func (b *kept) limited(patterns map[string]int64, order ...string) {
	b.t.Helper()
	b.settings.Hosted = nil
	for _, s := range order {
		b.settings.Hosted = append(b.settings.Hosted, Hosted{Pattern: hostedPattern(b.t, s), MaxSize: patterns[s]})
	}
	b.Set(b.settings)
}

// pushed stores a blob as a push does, if the quota allows it.
func (b *kept) pushed(repository string, data []byte) error {
	b.t.Helper()
	done, err := b.Quota(b.t.Context(), repository, int64(len(data)))
	if err != nil {
		return err
	}
	defer done()
	b.blob(repository, data)
	return nil
}

func (b *kept) granted(repository string, n int64) func() {
	b.t.Helper()
	done, err := b.Quota(b.t.Context(), repository, n)
	if err != nil {
		b.t.Fatal(err)
	}
	return done
}

func (b *kept) refused(repository string, n int64) {
	b.t.Helper()
	done, err := b.Quota(b.t.Context(), repository, n)
	if !errors.Is(err, storage.ErrFull) {
		b.t.Errorf("%d bytes for %s: %v", n, repository, err)
		done()
	}
}

// What is asked for counts until it is given back, in the repositories of its
// pattern and in no others.
func TestQuota(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.limited(map[string]int64{"apps/**": 10 * mib}, "apps/legacy", "apps/**")
	first := b.granted("apps/a", 4*mib)
	second := b.granted("apps/b", 5*mib)
	_, err := b.Quota(t.Context(), "apps/c", 2*mib)
	if !errors.Is(err, storage.ErrFull) || !errors.Is(err, registry.ErrQuota) || !strings.Contains(err.Error(), "max_size 10 MiB of `hosted apps/**`") {
		t.Errorf("the error is %v", err)
	}
	b.granted("libs/a", 50*mib)()
	b.granted("apps/legacy", 50*mib)() // an earlier pattern's
	first()
	first() // once is enough
	b.granted("apps/c", 3*mib)
	b.refused("apps/c", 4*mib)
	second()
	b.granted("apps/c", 4*mib)
}

// What is stored counts, what is shared once, and what is deleted no more.
func TestQuotaOfWhatIsStored(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/a", "")
	b.repository("apps/b", "")
	b.repository("libs/a", "")
	b.limited(map[string]int64{"apps/**": 10 * mib}, "apps/**")
	shared, other := content(1, 4*mib), content(2, 3*mib)
	for _, repository := range []string{"apps/a", "apps/b"} {
		if err := b.pushed(repository, shared); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.pushed("libs/a", content(3, 8*mib)); err != nil {
		t.Fatal(err)
	}
	b.flush()
	status, err := b.Status(t.Context())
	if err != nil || len(status.Hosted) != 1 || status.Hosted[0].Bytes < 4*mib || status.Hosted[0].Bytes > 5*mib {
		t.Errorf("status: %+v, %v", status.Hosted, err)
	}
	if err := b.pushed("apps/b", other); err != nil {
		t.Errorf("7 of 10 MiB: %v", err)
	}
	if err := b.pushed("apps/a", content(4, 3*mib)); !errors.Is(err, storage.ErrFull) {
		t.Errorf("more than 10 MiB: %v", err)
	}
	if err := b.tree.DeleteBlob(t.Context(), "apps/b", digest.FromBytes(other)); err != nil {
		t.Fatal(err)
	}
	// Its link is what the repository has of it.
	if err := b.pushed("apps/a", content(4, 3*mib)); err != nil {
		t.Errorf("after a deletion: %v", err)
	}
	// It is so in the next process, too.
	b.restart()
	b.ready()
	if err := b.pushed("apps/a", content(5, 3*mib)); !errors.Is(err, storage.ErrFull) {
		t.Errorf("after a restart: %v", err)
	}
}

// However many push at once, what all are allowed fits.
func TestQuotaOfMany(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/a", "")
	const limit = 3 * mib
	b.limited(map[string]int64{"apps/**": limit}, "apps/**")
	var wg sync.WaitGroup
	var mu sync.Mutex
	stored := 0
	for i := range 16 {
		wg.Go(func() {
			for j := range 4 {
				data := content(100+4*i+j, 100<<10)
				switch err := b.pushed("apps/a", data); {
				case err == nil:
					mu.Lock()
					stored++
					mu.Unlock()
				case !errors.Is(err, storage.ErrFull):
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.flush()
	usage, err := b.ready().Together(t.Context(), func(name string) bool { return strings.HasPrefix(name, "apps/") })
	if err != nil || usage.Allocated > limit {
		t.Errorf("%d bytes are stored of %d, %v", usage.Allocated, limit, err)
	}
	// And nothing is lost of what there is: one more than was refused for others'
	// sake at most.
	for i := range 64 {
		if err := b.pushed("apps/a", content(300+i, 100<<10)); err != nil {
			break
		}
		stored++
	}
	if stored < limit/(120<<10) {
		t.Errorf("%d blobs of 100 KiB fit into 3 MiB", stored)
	}
}

// Other settings count what is under way, and as long as there is no catalog what
// was known.
func TestQuotaLasts(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/a", "")
	b.limited(map[string]int64{"apps/**": 10 * mib}, "apps/**")
	if err := b.pushed("apps/a", content(1, 5*mib)); err != nil {
		t.Fatal(err)
	}
	b.granted("apps/a", 2*mib)
	b.limited(map[string]int64{"apps/*": 8 * mib}, "apps/*")
	b.refused("apps/a", 2*mib)
	b.limited(map[string]int64{"apps/*": 12 * mib}, "apps/*")
	done := b.granted("apps/a", 3*mib)
	b.refused("apps/a", 2*mib)
	done()
	b.Keeper.dismiss(nil, errors.New("broken"))
	b.refused("apps/a", 6*mib)
	b.granted("apps/a", mib)
	// Nothing is known of a process that has had no catalog yet.
	b.stop()
	never := make(chan struct{})
	b.catalog = later(b, never)
	b.start()
	b.granted("apps/a", 100*mib)
	b.clock.pass(2 * time.Minute)
}

// Nobody waits for a measurement longer than he wants to.
func TestQuotaEnds(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.limited(map[string]int64{"apps/**": 10 * mib}, "apps/**")
	b.quota.turn <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Quota(ctx, "apps/a", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
	<-b.quota.turn
}
