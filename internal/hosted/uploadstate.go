package hosted

import (
	"context"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

const (
	stateSuffix = ".state"
	newSuffix   = ".new"
	stateSchema = 1
	maxState    = 16 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A state is what is written down of an upload whenever a request has brought
// some of it, and in between: a line of JSON behind its CRC-32C. What the file of
// the upload has beyond it is cut off by the process that goes on.
type state struct {
	Schema     int              `json:"schema"`
	Repository string           `json:"repository"`
	Started    time.Time        `json:"started"`
	Written    time.Time        `json:"written"` // the last byte
	Offset     int64            `json:"offset"`
	Boot       string           `json:"boot,omitempty"` // storage.Boot
	Algorithm  digest.Algorithm `json:"algorithm,omitempty"`
	Received   bool             `json:"received,omitempty"` // by Registry.Receive
	Late       bool             `json:"late,omitempty"`     // the hashes are of nothing
	// The states of the hashes of everything up to Offset, as the standard
	// library marshals them.
	SHA256 []byte `json:"sha256"`
	Other  []byte `json:"other,omitempty"` // of Algorithm
}

// note writes the state down. The caller is the one who writes.
func (u *Upload) note() error {
	if u.once {
		return nil
	}
	s, err := u.state()
	s.Boot = storage.Boot()
	var text []byte
	if err == nil {
		text, err = json.Marshal(s)
	}
	if err != nil {
		return fmt.Errorf("writing down the state of an upload: %w", err)
	}
	text = append(fmt.Appendf(nil, "%08x ", crc32.Checksum(text, castagnoli)), text...)
	name := u.path + stateSuffix
	if s.Offset == 0 { // the first; one that is torn by the process's end is damaged, and nobody knows of it yet
		err = os.WriteFile(name, text, 0o600)
	} else if err = os.WriteFile(name+newSuffix, text, 0o600); err == nil {
		err = os.Rename(name+newSuffix, name)
	}
	if err != nil {
		os.Remove(name + newSuffix)
		return err
	}
	u.noted = s.Offset
	return nil
}

// state is where the upload stands.
func (u *Upload) state() (state, error) {
	s := state{
		Schema: stateSchema, Repository: u.repository, Started: u.started.UTC(), Written: u.last.UTC(),
		Offset: u.ends.Load(), Algorithm: u.sums.algorithm, Received: u.received, Late: u.late,
	}
	var err error
	if s.SHA256, err = marshal(u.sums.sha256); err == nil && u.sums.other != nil {
		s.Other, err = marshal(u.sums.other)
	}
	return s, err
}

// sums are the hashes that a state tells of.
func (s *state) sums() (sums, error) {
	if s.Schema != stateSchema {
		return sums{}, fmt.Errorf("its state has schema %d, which another version of this program wrote", s.Schema)
	}
	sum, err := newSums(s.Algorithm)
	if err != nil {
		return sums{}, err
	}
	if err = unmarshal(sum.sha256, s.SHA256); err == nil && sum.other != nil {
		err = unmarshal(sum.other, s.Other)
	}
	if err != nil {
		return sums{}, fmt.Errorf("the state of its hash cannot be used: %w", err)
	}
	return sum, nil
}

// recall reads what an earlier process has written down, and cuts off what came
// after. u.mu is held.
func (u *Upload) recall() error {
	f, err := os.Open(u.path + stateSuffix)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxState))
	f.Close()
	if err != nil {
		return err
	}
	var s state
	sum, _ := strconv.ParseUint(string(text[:min(8, len(text))]), 16, 32)
	if len(text) < 9 || uint32(sum) != crc32.Checksum(text[9:], castagnoli) {
		return errors.New("its state is damaged")
	}
	if err := json.Unmarshal(text[9:], &s); err != nil {
		return fmt.Errorf("its state is damaged: %w", err)
	}
	if u.sums, err = s.sums(); err != nil {
		return err
	}
	info, err := os.Stat(u.path)
	if errors.Is(err, os.ErrNotExist) && s.Offset == 0 {
		err = nil
	} else if err == nil && info.Size() < s.Offset {
		err = fmt.Errorf("it has %d bytes of %d", info.Size(), s.Offset)
	} else if err == nil && info.Size() > s.Offset {
		err = os.Truncate(u.path, s.Offset)
	}
	if err != nil {
		return err
	}
	u.loosen(s.Offset - u.loose)
	u.repository, u.started, u.last, u.noted, u.known = s.Repository, s.Started, s.Written, s.Offset, true
	u.received, u.late = s.Received, s.Late
	u.proven = s.Offset == 0 || s.Boot != "" && s.Boot == storage.Boot()
	u.ends.Store(s.Offset)
	return nil
}

// prove reads what has come up to an offset. The error wraps errSpoilt if it is not
// what hashes were made of. After a loss of power that is so where the state has
// survived, and the bytes it speaks of have not.
func (u *Upload) prove(ctx context.Context, end int64, of sums) error {
	f, err := os.Open(u.path)
	if err != nil {
		return fmt.Errorf("reading what has come of an upload: %w", err)
	}
	defer f.Close()
	is, err := oci.DigestOf(ctx, digest.Canonical, io.LimitReader(f, end))
	if err != nil {
		return fmt.Errorf("reading what has come of an upload: %w", err)
	}
	if is != digest.NewDigest(digest.Canonical, of.sha256) {
		return fmt.Errorf("%w: it has other bytes than were sent", errSpoilt)
	}
	return nil
}

// sums are the hashes of what has come.
type sums struct {
	sha256    hash.Hash
	algorithm digest.Algorithm // of other; empty: there is none
	other     hash.Hash
}

func newSums(algorithm digest.Algorithm) (sums, error) {
	s := sums{sha256: digest.Canonical.Hash()}
	switch {
	case algorithm == "", algorithm == digest.Canonical:
		return s, nil
	case !algorithm.Available():
		return s, fmt.Errorf("%.50q: %w", string(algorithm), ErrAlgorithm)
	}
	s.algorithm, s.other = algorithm, algorithm.Hash()
	return s, nil
}

func (s *sums) write(p []byte) {
	s.sha256.Write(p)
	if s.other != nil {
		s.other.Write(p)
	}
}

// sum is the sha256 of everything, and the digest by an algorithm, for which the
// file is read once more where nobody has said before that it would be asked for.
func (u *Upload) sum(ctx context.Context, algorithm digest.Algorithm) (canonical, asked digest.Digest, err error) {
	canonical = digest.NewDigest(digest.Canonical, u.sums.sha256)
	switch algorithm {
	case digest.Canonical:
		return canonical, canonical, nil
	case u.sums.algorithm:
		return canonical, digest.NewDigest(algorithm, u.sums.other), nil
	}
	f, err := os.Open(u.path)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	asked, err = oci.DigestOf(ctx, algorithm, f)
	return canonical, asked, err
}

func marshal(h hash.Hash) ([]byte, error) {
	m, ok := h.(encoding.BinaryMarshaler)
	if !ok {
		return nil, fmt.Errorf("%T cannot be written down", h)
	}
	return m.MarshalBinary()
}

func unmarshal(h hash.Hash, data []byte) error {
	m, ok := h.(encoding.BinaryUnmarshaler)
	if !ok {
		return fmt.Errorf("%T cannot be read", h)
	}
	return m.UnmarshalBinary(data)
}
