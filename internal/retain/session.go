package retain

import (
	"context"
	"encoding/json"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/storage"
)

// A session is what the store remembers of the last process that changed it.
type session struct {
	Schema int `json:"schema"`
	// Closed is when it was closed together with a catalog that had everything:
	// the catalog says the same. It is zero while the process is running.
	Closed time.Time `json:"closed,omitzero"`
}

// enter returns when the catalog was last closed with everything, and notes that
// this does not hold any more.
func (k *Keeper) enter() time.Time {
	var s session
	data, err := k.store.Get(k.ctx, layout.Session, 4<<10)
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil || s.Schema != sessionSchema {
		s = session{}
	}
	k.leave(time.Time{})
	return s.Closed
}

const sessionSchema = 1

func (k *Keeper) leave(closed time.Time) {
	data, err := json.Marshal(session{Schema: sessionSchema, Closed: closed})
	if err == nil {
		err = k.store.Put(context.Background(), layout.Session, data, storage.Durable)
	}
	if err != nil {
		k.log.Warn("the store cannot be written to, not even a note of who uses it", zap.Error(err))
		// As on a full disk: no note is as good as one that says nothing, and
		// better than the last one.
		if err := k.store.Delete(context.Background(), layout.Session); err != nil {
			k.log.Error("the store's note of the last process that used it could not be removed; remove it yourself after a loss of power",
				zap.String("key", layout.Session), zap.Error(err))
		}
	}
}
