package fill

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

const (
	ledgerSuffix = ".ledger"
	goneSuffix   = ".gone"

	ledgerRun  = 8               // segments noted at once
	ledgerWait = time.Second / 4 // longest that a segment is not noted
	syncRun    = 64 << 20        // bytes that are synced at once
	syncPause  = 5 * time.Second // between two syncs: a fast fill needs none
	syncLeast  = 8 << 20         // bytes worth a sync when a fill is put away
	maxLedger  = 64 << 20        // bytes read back
	hashRun    = 1 << 20         // bytes hashed between two looks around
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// spool is the files of one fill of larger content: the content as far as it
// has come, sparse, and a ledger of what of it can be relied on.
//
// The ledger is lines of JSON, each behind its CRC-32C, appended after the data
// they speak of was written. A process that dies takes nothing of that away.
// After a loss of power either file may have lost what was not synced; so in a
// later boot every segment is read, and kept if its checksum is right.
type spool struct {
	path    string
	data    *os.File
	ledger  *os.File
	pending [][2]int64 // segments that are not in the ledger yet, and their sums
	noted   time.Time
	unsaved int64 // bytes noted and not synced
	synced  time.Time
	syncing chan error // of the sync under way, or nil
}

// line is one line of a ledger.
type line struct {
	// In the first one.
	Version int           `json:"version,omitempty"`
	Digest  digest.Digest `json:"digest,omitempty"`
	Size    int64         `json:"size,omitempty"`
	Segment int64         `json:"segment,omitempty"`
	Boot    string        `json:"boot,omitempty"`

	// Pairs of a segment's number and the CRC-32C of its bytes.
	Segments [][2]int64 `json:"segments,omitempty"`
	// What the whole is, in a line written before somebody takes the file.
	SHA256 digest.Digest `json:"sha256,omitempty"`
	SHA512 digest.Digest `json:"sha512,omitempty"`
	// Lost are segments that turned out not to be what was noted.
	Lost []int64 `json:"lost,omitempty"`
}

const ledgerVersion = 1

// openSpool opens the files of a fill, with what an earlier one left in them.
// What it could use it notes in p. It is hashed again, since what the disk gives
// back is what will be served.
func openSpool(ctx context.Context, dir, boot string, k key, p *progress) (*spool, error) {
	s := &spool{path: filepath.Join(dir, k.name()), synced: time.Now()}
	var err error
	if s.data, err = os.OpenFile(s.path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	head := line{Version: ledgerVersion, Digest: k.digest, Size: k.size, Segment: p.segment, Boot: boot}
	sums := s.restore(ctx, head, p)
	if ctx.Err() != nil { // in the middle of it; the files stay as they are
		s.close()
		s.data.Close()
		return nil, context.Cause(ctx)
	}
	if s.ledger == nil {
		// Without a ledger the data says nothing. ext4 takes a truncation as the
		// beginning of a replacement, and writes all of the file out within the
		// next close, whose turn would be a reader's; so a new file gets none.
		var info os.FileInfo
		if info, err = s.data.Stat(); err == nil && info.Size() > 0 {
			err = s.data.Truncate(0)
		}
		if err == nil {
			s.ledger, err = os.OpenFile(s.path+ledgerSuffix, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
		}
		if err == nil {
			err = s.append(head)
		}
		if err != nil {
			s.close()
			s.data.Close()
			s.remove()
			return nil, fmt.Errorf("spool: %w", err)
		}
	}
	for i, sum := range sums {
		p.arrived(i, sum)
	}
	return s, nil
}

// restore reads a ledger that fits, and opens it for more. It returns the
// segments that are there, with their checksums.
func (s *spool) restore(ctx context.Context, head line, p *progress) map[int64]uint32 {
	name := s.path + ledgerSuffix
	info, err := os.Stat(name)
	if err != nil || info.Size() > maxLedger {
		return nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil
	}
	first, rest, whole := readLine(text)
	boot := first.Boot
	first.Boot = head.Boot
	if whole == 0 || first.Version != head.Version || first.Digest != head.Digest || first.Size != head.Size || first.Segment != head.Segment {
		return nil
	}
	sums := map[int64]uint32{}
	length := whole
	for {
		l, more, n := readLine(rest)
		if n == 0 {
			break
		}
		length, rest = length+n, more
		for _, pair := range l.Segments {
			if i := pair[0]; i >= 0 && i < p.segments() {
				sums[i] = uint32(pair[1])
			}
		}
		for _, i := range l.Lost {
			delete(sums, i)
		}
	}
	if info, err = s.data.Stat(); err != nil {
		return nil
	}
	noted := len(sums)
	for i := range sums {
		// Between the rename of a commit and the ledger's removal, a process
		// may die.
		if i*p.segment+p.length(i) > info.Size() {
			delete(sums, i)
		}
	}
	if head.Boot == "" || boot != head.Boot {
		for i, sum := range sums {
			if ctx.Err() != nil {
				return nil
			}
			if got, err := s.sum(i, p); err != nil || got != sum {
				delete(sums, i)
			}
		}
	}
	// A line that was cut short must not spoil the next one.
	if os.Truncate(name, int64(length)) != nil {
		return nil
	}
	if s.ledger, err = os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		s.ledger = nil
		return nil
	}
	if boot != head.Boot || len(sums) < noted {
		// From here on the ledger is of this boot. It says again all that has
		// been found right, and nothing else.
		var found [][2]int64
		for i, sum := range sums {
			found = append(found, [2]int64{i, int64(sum)})
		}
		if os.Truncate(name, 0) != nil || s.append(head) != nil || s.append(line{Segments: found}) != nil {
			s.ledger.Close()
			s.ledger = nil
			return nil
		}
	}
	return sums
}

// readLine takes the first line off a ledger's text; n is its length, or 0 if it
// is not sound.
func readLine(text []byte) (l line, rest []byte, n int) {
	raw, rest, ok := bytes.Cut(text, []byte("\n"))
	if !ok || len(raw) < 9 {
		return line{}, nil, 0
	}
	sum, err := strconv.ParseUint(string(raw[:8]), 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum(raw[9:], castagnoli) || json.Unmarshal(raw[9:], &l) != nil {
		return line{}, nil, 0
	}
	return l, rest, len(raw) + 1
}

// append writes one line at the end of the ledger.
func (s *spool) append(l line) error {
	text, err := json.Marshal(l)
	if err != nil {
		return err
	}
	s.noted = time.Now()
	_, err = fmt.Fprintf(s.ledger, "%08x %s\n", crc32.Checksum(text, castagnoli), text)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	failpoint.Hit("fill.noted")
	return nil
}

// sum is the CRC-32C of a segment as it can be read.
func (s *spool) sum(i int64, p *progress) (uint32, error) {
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	sum := uint32(0)
	for at, end := i*p.segment, i*p.segment+p.length(i); at < end; {
		n, err := s.data.ReadAt(buffer[:min(bufferSize, end-at)], at)
		sum = crc32.Update(sum, castagnoli, buffer[:n])
		if at += int64(n); err != nil && at < end {
			return 0, err
		}
	}
	return sum, nil
}

// keep takes down what is pending when that is due, and says when to be called
// again.
func (s *spool) keep() (due time.Duration, err error) {
	if len(s.pending) == 0 {
		return time.Hour, nil
	}
	if due := ledgerWait - time.Since(s.noted); len(s.pending) < ledgerRun && due > 0 {
		return due, nil
	}
	if err := s.append(line{Segments: s.pending}); err != nil {
		return 0, err
	}
	s.pending = s.pending[:0]
	if s.syncing != nil {
		select {
		case <-s.syncing:
			s.syncing = nil
		default:
		}
	}
	if s.syncing == nil && s.unsaved >= syncRun && time.Since(s.synced) >= syncPause {
		s.sync()
	}
	return time.Hour, nil
}

// lost are the segments that are not what was written.
func (s *spool) lost(p *progress) (lost []int64) {
	for i := range p.segments() {
		if !p.have.get(i) {
			continue
		}
		if sum, err := s.sum(i, p); err != nil || sum != p.sums[i] {
			lost = append(lost, i)
		}
	}
	return lost
}

// sync makes what has been noted outlive a loss of power, behind.
func (s *spool) sync() {
	s.unsaved, s.synced = 0, time.Now()
	done := make(chan error, 1)
	s.syncing = done
	go func() { done <- errors.Join(s.data.Sync(), s.ledger.Sync()) }()
}

// settle waits for a sync under way.
func (s *spool) settle() {
	if s.syncing != nil {
		<-s.syncing
		s.syncing = nil
	}
}

// close closes the ledger. The data stay open for readers; whoever releases the
// fill last closes them.
func (s *spool) close() {
	s.settle()
	if s.ledger != nil {
		s.ledger.Close()
	}
}

// remove removes the files, as far as they still have these names.
func (s *spool) remove() {
	os.Remove(s.path + ledgerSuffix)
	os.Remove(s.path)
}
