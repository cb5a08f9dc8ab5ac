package fill

import (
	_ "crypto/sha512" // go-digest knows only what is linked in
	"encoding"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// proof is the digest of content up to an offset. It is both the digest asked
// for and the sha256 that content is stored under.
type proof struct {
	at     int64
	sha256 hash.Hash
	asked  hash.Hash // nil: the same
}

// saved is a proof that can be gone on from.
type saved struct {
	At        int64            `json:"at"`
	SHA256    []byte           `json:"sha256"`
	Algorithm digest.Algorithm `json:"algorithm,omitempty"` // of the digest asked for, if it is another
	Asked     []byte           `json:"asked,omitempty"`
}

func newProof(algorithm digest.Algorithm) *proof {
	p := &proof{sha256: digest.Canonical.Hash()}
	if algorithm != digest.Canonical {
		p.asked = algorithm.Hash()
	}
	return p
}

// load goes on from what was saved, if that is not beyond an offset, or else
// begins anew.
func (s *saved) load(algorithm digest.Algorithm, limit int64) *proof {
	p := newProof(algorithm)
	if s == nil || s.At < 0 || s.At > limit {
		return p
	}
	err := p.sha256.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.SHA256)
	if p.asked != nil {
		if s.Algorithm != algorithm {
			return newProof(algorithm)
		}
		err = errors.Join(err, p.asked.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.Asked))
	}
	if err != nil {
		return newProof(algorithm)
	}
	p.at = s.At
	return p
}

func (p *proof) save(algorithm digest.Algorithm) *saved {
	// The hashes of the standard library never fail to be marshalled.
	s := &saved{At: p.at}
	s.SHA256, _ = p.sha256.(encoding.BinaryMarshaler).MarshalBinary()
	if p.asked != nil {
		s.Algorithm = algorithm
		s.Asked, _ = p.asked.(encoding.BinaryMarshaler).MarshalBinary()
	}
	return s
}

func (p *proof) Write(b []byte) (int, error) {
	p.sha256.Write(b)
	if p.asked != nil {
		p.asked.Write(b)
	}
	p.at += int64(len(b))
	return len(b), nil
}

// follow hashes what a file has, from where the proof is up to an offset.
func (p *proof) follow(file io.ReaderAt, to int64) error {
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for p.at < to {
		n, err := file.ReadAt(buffer[:min(bufferSize, to-p.at)], p.at)
		p.Write(buffer[:n])
		if err != nil && p.at < to {
			return fmt.Errorf("spool: %w", err)
		}
	}
	return nil
}

// check compares with the digest that was asked for, and returns the one the
// content is stored under.
func (p *proof) check(d digest.Digest, from string) (canonical digest.Digest, err error) {
	canonical = digest.NewDigestFromBytes(digest.Canonical, p.sha256.Sum(nil))
	got := canonical
	if p.asked != nil {
		got = digest.NewDigestFromBytes(d.Algorithm(), p.asked.Sum(nil))
	}
	if got != d {
		return "", fmt.Errorf("%w: %s delivered %s for %s", ErrDigest, from, got, d)
	}
	return canonical, nil
}
