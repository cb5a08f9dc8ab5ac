package backing

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"time"
)

const (
	maxTokens = 100 // of an image
	maxNote   = 200 // bytes
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
	if len(note) > maxNote || len(by) > maxNote {
		return PathToken{}, fail(Malformed, "a note has at most %d bytes", maxNote)
	}
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	t := PathToken{ID: newID()[:12], Note: note, By: by, CreatedAt: l.now().UTC(), Token: base64.RawURLEncoding.EncodeToString(secret)}
	err := l.edit(ctx, name, "", func(r *imageRecord) error {
		if len(r.Tokens) >= maxTokens {
			return fail(Malformed, "backing image %s has %d tokens, which is the most; revoke some", name, maxTokens)
		}
		r.Tokens = append(r.Tokens, t)
		return nil
	})
	if err != nil {
		return PathToken{}, err
	}
	return t, nil
}

// Tokens are those of an image, the latest first, without their secrets.
func (l *Library) Tokens(ctx context.Context, name string) ([]PathToken, error) {
	if err := l.fresh(ctx); err != nil {
		return nil, err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	i := l.images[name]
	if i == nil {
		return nil, noImage(name)
	}
	tokens := []PathToken{}
	if i.record != nil {
		for _, t := range i.record.Tokens {
			t.Token = ""
			tokens = append(tokens, t)
		}
	}
	slices.SortFunc(tokens, func(a, b PathToken) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return tokens, nil
}

// RemoveToken revokes a token by its ID. One that is in the address of a registration is
// InUse: Longhorn comes back with it.
func (l *Library) RemoveToken(ctx context.Context, name, id string) error {
	if err := l.registrar.load(ctx); err != nil {
		return err
	}
	return l.edit(ctx, name, "", func(r *imageRecord) error {
		n := len(r.Tokens)
		for _, t := range r.Tokens {
			if t.ID != id {
				continue
			}
			if by := l.registrar.withToken(name, t.Token); len(by) > 0 {
				return inUse(by, "Longhorn fetches %s with this token; unregister it there first", name)
			}
		}
		r.Tokens = slices.DeleteFunc(r.Tokens, func(t PathToken) bool { return t.ID == id })
		if len(r.Tokens) == n {
			return fail(NotFound, "backing image %s has no token %.80q", name, id)
		}
		return nil
	})
}

// Token is the image that a token in a path is for, or NotFound.
func (l *Library) Token(ctx context.Context, token string) (image string, err error) {
	if err := l.fresh(ctx); err != nil {
		return "", err
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	// How long it takes to find a digest tells nothing of the secret.
	if name, ok := l.tokens[sha256.Sum256([]byte(token))]; ok && token != "" {
		return name, nil
	}
	return "", fail(NotFound, "there is nothing here")
}

// dropToken revokes the token that a registration had, unless another has it.
func (l *Library) dropToken(ctx context.Context, name, token string) error {
	return l.edit(ctx, name, "", func(r *imageRecord) error {
		if len(l.registrar.withToken(name, token)) == 0 {
			r.Tokens = slices.DeleteFunc(r.Tokens, func(t PathToken) bool { return t.Token == token })
		}
		return nil
	})
}
