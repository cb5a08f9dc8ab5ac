package hosted

import (
	"context"
	"errors"
	"slices"

	"github.com/caddy-registry/mirror/storage"
)

// mostAhead is how much more than has come is asked of a quota for an upload that
// comes in pieces, so that not each piece is asked for by itself.
const mostAhead = 64 << 20

// allow asks the quota for what an upload will have with n bytes more than have
// come. What it has been allowed counts until it ends; what is beyond what has come,
// until a request fails. The caller is the one who writes.
func (u *Upload) allow(ctx context.Context, n int64) error {
	short := u.Offset() + n - u.allowed
	if short <= 0 {
		return nil
	}
	// More the more it has been; unless there is only room for what is there.
	if ask := min(u.allowed, mostAhead); ask > short {
		if done, err := u.registry.quota(ctx, u.repository, ask); err == nil {
			u.allows(ask, done)
			return nil
		} else if !errors.Is(err, storage.ErrFull) {
			return err
		}
	}
	done, err := u.registry.grant(ctx, u.repository, short)
	if err == nil {
		u.allows(short, done)
	}
	return err
}

// allows takes note of what the quota has allowed.
func (u *Upload) allows(n int64, done func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.allowed += n
	if u.gone {
		done()
	} else {
		u.quotas = append(u.quotas, done)
	}
}

// modest gives back what has been allowed beyond what has come: a request has
// failed, and nobody knows whether another one brings the rest. The caller is the
// one who writes.
func (u *Upload) modest(ctx context.Context) {
	came := u.Offset()
	if u.allowed <= came {
		return
	}
	u.mu.Lock()
	u.disallow()
	u.mu.Unlock()
	if came == 0 {
		return
	}
	// Where somebody else has taken the room meanwhile, what has come is asked for
	// again when it is gone on with.
	if done, err := u.registry.quota(context.WithoutCancel(ctx), u.repository, came); err == nil {
		u.allows(came, done)
	}
}

// disallow gives back what a quota has allowed. u.mu is held.
func (u *Upload) disallow() {
	for _, done := range u.quotas {
		done()
	}
	u.quotas, u.allowed = nil, 0
}

// together reports whether repositories share one quota: then what the one has
// takes no more in the other, but for a link.
func (h *Registry) together(a, b string) bool {
	one, other := h.options(a), h.options(b)
	return len(one.Pattern) > 0 && slices.Equal(one.Pattern, other.Pattern)
}
