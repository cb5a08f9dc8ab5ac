package hosted

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
)

// idleAfter is how long after its last byte an upload that nobody writes to may be
// given up for somebody who finds no room: clients that were refused or cut off
// seldom come back, and never say so.
const idleAfter = 15 * time.Minute

// An idleUpload is one that may be given up, and when its last byte came.
type idleUpload struct {
	*Upload
	last time.Time
}

// precise is how many uploads are given up one at a time.
const precise = 10

// giveUp gives up idle uploads, those longest idle first, until enough says so, and
// reports what it said last. gives says what one gives, and is called with its lock
// held: 0 keeps it. enough may be dear: it is asked after each of the first, and then
// when they have given what is needed, and each time as much again.
func (h *Registry) giveUp(needed int64, gives func(*Upload) int64, enough func() bool) bool {
	var given, bytes int64
	var n int
	asked, done := true, false
	for _, u := range h.idle(gives) {
		u.mu.Lock()
		got := u.idle(gives)
		if got > 0 {
			given, bytes, n, asked = given+got, bytes+u.loose, n+1, false
			u.drop()
		}
		u.mu.Unlock()
		if got == 0 || n > precise && given < needed {
			continue
		}
		if done, asked = enough(), true; done {
			break
		}
		if n > precise {
			needed += given
		}
	}
	if !asked {
		done = enough()
	}
	if n > 0 {
		h.log.Info("gave up uploads to which nothing had come for long, for somebody who found no room",
			zap.Int("uploads", n), zap.String("bytes", humanize.IBytes(uint64(bytes))), zap.Bool("enough", done))
	}
	return done
}

// idle are the uploads that may be given up and give something, those longest idle
// first.
func (h *Registry) idle(gives func(*Upload) int64) []idleUpload {
	var idle []idleUpload
	for _, u := range h.uploads.all() {
		u.mu.Lock()
		if u.idle(gives) > 0 {
			idle = append(idle, idleUpload{u, u.last})
		}
		u.mu.Unlock()
	}
	slices.SortFunc(idle, func(a, b idleUpload) int { return a.last.Compare(b.last) })
	return idle
}

// idle is what giving an upload up gives; 0: it may not be, now. u.mu is held.
func (u *Upload) idle(gives func(*Upload) int64) int64 {
	if u.gone || u.holder != nil || u.registry.now().Sub(u.last) < idleAfter {
		return 0
	}
	return gives(u)
}

// reserve sets room aside in the store. Where there is none, what is cached goes
// first, which can be fetched again, and idle uploads then.
func (h *Registry) reserve(ctx context.Context, n int64) (storage.Reservation, error) {
	r, err := h.store.Reserve(n)
	if errors.Is(err, storage.ErrFull) && h.room != nil && h.room(ctx, n) {
		r, err = h.store.Reserve(n)
	}
	if errors.Is(err, storage.ErrFull) && ctx.Err() == nil {
		h.giveUp(n, loose, func() bool {
			r, err = h.store.Reserve(n)
			return !errors.Is(err, storage.ErrFull)
		})
	}
	return r, err
}

// Room does as Parts.Room, and gives idle uploads up where that makes no room: it is
// for those who fetch.
func (h *Registry) Room(ctx context.Context, n int64) bool {
	if h.room != nil && h.room(ctx, n) {
		return true
	}
	return ctx.Err() == nil && h.giveUp(n, loose, func() bool {
		r, err := h.store.Reserve(n)
		if err == nil {
			r.Release()
			if h.room != nil {
				h.room(ctx, n) // which keeps it for the caller
			}
		}
		return err == nil
	})
}

// loose is what an idle upload takes in the store.
func loose(u *Upload) int64 { return u.loose }

// grant asks the quota of a repository. Where that is used up, idle uploads that
// count in it are given up.
func (h *Registry) grant(ctx context.Context, repository string, n int64) (done func(), err error) {
	done, err = h.quota(ctx, repository, n)
	if errors.Is(err, storage.ErrFull) && ctx.Err() == nil {
		h.giveUp(n, func(u *Upload) int64 {
			if len(u.quotas) == 0 || u.repository != repository && !h.together(repository, u.repository) {
				return 0
			}
			return u.allowed
		}, func() bool {
			done, err = h.quota(ctx, repository, n)
			return !errors.Is(err, storage.ErrFull)
		})
	}
	return done, err
}
