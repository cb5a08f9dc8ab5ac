package backing

import (
	"context"
	"time"
)

// A PathToken is a secret in the path of an address, with which an image's files can be
// had without any other proof. It does not expire: Longhorn returns years later.
type PathToken struct {
	ID        string    `json:"id"` // names it, and is no secret
	Note      string    `json:"note,omitempty"`
	By        string    `json:"by,omitempty"` // who made it
	CreatedAt time.Time `json:"createdAt"`
	// Token is the secret.
	Token string `json:"token,omitempty"`
}

// AddToken makes a token for an image; note (200 bytes at most) is for people, and by is
// who asks.
func (l *Library) AddToken(ctx context.Context, name, note, by string) (PathToken, error) {
	panic("seam")
}

// Tokens are those of an image, the latest first, without their secrets.
func (l *Library) Tokens(ctx context.Context, name string) ([]PathToken, error) { panic("seam") }

// RemoveToken revokes a token by its ID.
func (l *Library) RemoveToken(ctx context.Context, name, id string) error { panic("seam") }
