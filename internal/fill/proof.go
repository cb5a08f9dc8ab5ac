package fill

import (
	_ "crypto/sha512" // go-digest knows only what is linked in
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

// proof is the digest of content up to an offset. It is both the digest asked
// for and the sha256 that content is stored under.
type proof struct {
	at     int64
	sha256 hash.Hash
	asked  hash.Hash // nil: the same
}

func newProof(algorithm digest.Algorithm) *proof {
	p := &proof{sha256: digest.Canonical.Hash()}
	if algorithm != digest.Canonical {
		p.asked = algorithm.Hash()
	}
	return p
}

// clone returns a proof that goes on from here by itself.
func (p *proof) clone() *proof {
	c := &proof{at: p.at, sha256: cloned(p.sha256)}
	if p.asked != nil {
		c.asked = cloned(p.asked)
	}
	return c
}

func cloned(h hash.Hash) hash.Hash {
	// All of the standard library's can be cloned, and do not fail.
	c, _ := h.(hash.Cloner).Clone()
	return c
}

func (p *proof) Write(b []byte) (int, error) {
	if p.asked == nil {
		p.sha256.Write(b)
	} else {
		p.both(b)
	}
	p.at += int64(len(b))
	return len(b), nil
}

// apart is from how many bytes on two hashes are worth two cores.
const apart = 64 << 10

func (p *proof) both(b []byte) {
	var asked sync.WaitGroup
	if len(b) >= apart {
		asked.Go(func() { p.asked.Write(b) })
	} else {
		p.asked.Write(b)
	}
	p.sha256.Write(b)
	asked.Wait()
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

// The proof of larger content has one owner at a time: whoever has set hashing.
// That is run (follow), which reads back from the spool what the prefix has
// gained; or a writer that has just written what is next, and has it in memory.
// Reading back costs a copy, but is done on another core while the next bytes
// come, which nearly halves the time of one large blob. So a writer hashes where
// no core would be idle: with as many fills under way as there are cores.

// lend makes a writer the owner, if what it has written at an offset is next,
// but for some bytes before it in the same segment. f.mu is held.
func (f *Fill) lend(at int64) bool {
	if f.hashing || at >= f.last() || f.table.large.Load() < int64(f.table.cores) {
		return false
	}
	if f.proof.at > at || f.proof.at/f.segment != at/f.segment {
		return false
	}
	f.hashing = true
	return true
}

// hash takes a run that has been written at an offset into the proof, which has
// been lent, and gives it back.
func (f *Fill) hash(file io.ReaderAt, at int64, run []byte) error {
	err := f.proof.follow(file, at)
	if err == nil {
		f.proof.Write(run[:min(int64(len(run)), f.last()-at)])
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hashing = false
	if f.hashable() > f.proof.at { // follow may have looked in the meantime, in vain
		f.wake()
	}
	return err
}

// hashable is how far follow may hash. The last segment is hashed when
// everything is there, and by nobody else: when the fill passes, it is its
// readers' to hash. f.mu is held.
func (f *Fill) hashable() int64 {
	contiguous := f.contiguous()
	if contiguous < f.size {
		return min(contiguous, f.last())
	}
	return contiguous
}

// file is check for content that is taken, of which the sha512 is known too.
func (p *proof) file(d digest.Digest, from string) (File, error) {
	f := File{Size: p.at, SHA256: digest.NewDigest(digest.SHA256, p.sha256), SHA512: digest.NewDigest(digest.SHA512, p.asked)}
	if d != "" && d != f.SHA256 && d != f.SHA512 {
		got := f.SHA256
		if d.Algorithm() == digest.SHA512 {
			got = f.SHA512
		}
		return File{}, fmt.Errorf("%w: %s delivered %s for %s", ErrDigest, from, got, d)
	}
	return f, nil
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
