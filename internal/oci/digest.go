package oci

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
)

// DigestOf reads what r gives to its end, or until ctx ends, and returns its digest
// by an algorithm, which must be available.
func DigestOf(ctx context.Context, algorithm digest.Algorithm, r io.Reader) (digest.Digest, error) {
	hash := algorithm.Hash()
	if _, err := io.Copy(hash, untilDone{ctx, r}); err != nil {
		return "", err
	}
	return digest.NewDigest(algorithm, hash), nil
}

// untilDone is a reader that ends with its context.
type untilDone struct {
	ctx context.Context
	r   io.Reader
}

func (u untilDone) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(p)
}
