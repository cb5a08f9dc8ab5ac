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
// come. What it has been allowed counts until it ends. The caller is the one who
// writes.
func (u *Upload) allow(ctx context.Context, n int64) error {
	short := u.Offset() + n - u.allowed
	if short <= 0 {
		return nil
	}
	quota := u.registry.quota
	// More the more it has been; unless there is only room for what is there.
	ask := max(short, min(u.allowed, mostAhead))
	done, err := quota(ctx, u.repository, ask)
	if errors.Is(err, storage.ErrFull) && ask > short {
		ask = short
		done, err = quota(ctx, u.repository, ask)
	}
	if err != nil {
		return err
	}
	u.allowed += ask
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.gone {
		done()
	} else {
		u.quotas = append(u.quotas, done)
	}
	return nil
}

// disallow gives back what a quota has allowed. u.mu is held.
func (u *Upload) disallow() {
	for _, done := range u.quotas {
		done()
	}
	u.quotas = nil
}

// together reports whether repositories share one quota: then what the one has
// takes no more in the other, but for a link.
func (h *Registry) together(a, b string) bool {
	one, other := h.options(a), h.options(b)
	return len(one.Pattern) > 0 && slices.Equal(one.Pattern, other.Pattern)
}
