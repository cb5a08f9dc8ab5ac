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
	if _, err := Feed(ctx, hash, r); err != nil {
		return "", err
	}
	return digest.NewDigest(algorithm, hash), nil
}

// Feed gives a hash everything that a reader has, until ctx ends, and returns how much
// that was.
func Feed(ctx context.Context, hash io.Writer, r io.Reader) (int64, error) {
	return io.Copy(hash, untilDone{ctx, r})
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
