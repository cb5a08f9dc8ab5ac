package notify

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

const (
	maxPending = 10_000   // events that wait for one webhook
	maxBytes   = 64 << 20 // that they take
	// fileSize is how large a file of a queue grows. It is removed when nothing
	// in it waits any more.
	fileSize = 1 << 20
	// maxLine bounds what is taken for an event when a file is read.
	maxLine = 64 << 10
)

// A queue is what one webhook has not taken yet, in a directory: files of events
// in the order of their numbers, and the cursor, which says how far they have
// been taken.
//
// A line of a file is an event in JSON, behind its CRC-32C. A line that is not
// right, as a loss of power leaves them, is passed over.
type queue struct {
	dir       string
	maxEvents int
	maxBytes  int64

	syncing sync.Mutex // one sync at a time; before mu

	mu      sync.Mutex
	waiting []entry // the oldest first
	sending bool    // the first of them is being delivered
	bytes   int64   // of waiting
	in      map[int64]int
	out     *os.File // nil: a new one is to be begun
	number  int64    // of the file that is written, or was last
	size    int64
	full    []*os.File // written to their end, and not synced
	dirty   bool       // something is not synced
	cursor  *os.File
	closed  bool

	ready chan struct{} // holds a value when something may be waiting
}

// An entry is where an event lies.
type entry struct {
	file, offset int64
	length       int // of the line
}

var table = crc32.MakeTable(crc32.Castagnoli)

const events = ".events"

// openQueue opens the queue in a directory, or makes one, for so many events at
// most. It reports how many lines were not right.
func openQueue(dir string, most int) (q *queue, damaged int, err error) {
	q = &queue{dir: dir, maxEvents: most, maxBytes: maxBytes, in: map[int64]int{}, ready: make(chan struct{}, 1)}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, 0, err
	}
	if q.cursor, err = os.OpenFile(filepath.Join(dir, "cursor"), os.O_RDWR|os.O_CREATE, 0o640); err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			q.cursor.Close()
		}
	}()
	after := q.taken()
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0, err
	}
	var numbers []int64
	for _, file := range list {
		if name, ok := strings.CutSuffix(file.Name(), events); ok {
			if n, err := strconv.ParseInt(name, 16, 64); err == nil {
				numbers = append(numbers, n)
			}
		}
	}
	slices.Sort(numbers)
	// What is written from now on has a higher number than anything the cursor
	// may mean, though that be lost.
	q.number = after.file
	for _, n := range numbers {
		q.number = max(q.number, n)
		bad, err := q.read(n, after)
		if err != nil {
			return nil, 0, err
		}
		damaged += bad
		if q.in[n] == 0 {
			os.Remove(q.path(n))
		}
	}
	if len(q.waiting) > 0 {
		q.ready <- struct{}{}
	}
	return q, damaged + q.trim(), nil
}

func (q *queue) path(number int64) string {
	return filepath.Join(q.dir, fmt.Sprintf("%016x", number)+events)
}

// taken reads the cursor. Without one that is right everything is delivered
// again.
func (q *queue) taken() (after entry) {
	var text [50]byte
	n, _ := q.cursor.ReadAt(text[:], 0)
	first, _, _ := bytes.Cut(text[:n], []byte("\n"))
	if body, ok := checked(first); ok {
		fmt.Sscanf(string(body), "%x %x", &after.file, &after.offset)
	}
	return after
}

// take writes the cursor: everything before the place has been taken.
func (q *queue) take(file, offset int64) {
	// Where it fails, and the process ends, some events are delivered again.
	q.cursor.WriteAt(line(fmt.Appendf(nil, "%016x %016x", file, offset)), 0)
	q.dirty = true
}

// line puts its sum before a text, and its end behind it.
func line(text []byte) []byte {
	return fmt.Appendf(make([]byte, 0, len(text)+10), "%08x %s\n", crc32.Checksum(text, table), text)
}

// checked is the text of a line without its end, if it is right.
func checked(line []byte) ([]byte, bool) {
	var sum [4]byte
	if len(line) < 10 || line[8] != ' ' {
		return nil, false
	}
	if _, err := hex.Decode(sum[:], line[:8]); err != nil {
		return nil, false
	}
	want := uint32(sum[0])<<24 | uint32(sum[1])<<16 | uint32(sum[2])<<8 | uint32(sum[3])
	return line[9:], crc32.Checksum(line[9:], table) == want
}

// read finds the events of a file that were not taken.
func (q *queue) read(number int64, after entry) (damaged int, err error) {
	f, err := os.Open(q.path(number))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewReaderSize(f, maxLine)
	for offset := int64(0); ; {
		read, err := lines.ReadSlice('\n')
		if len(read) == 0 && err == io.EOF {
			return damaged, nil
		}
		if err != nil && err != io.EOF && err != bufio.ErrBufferFull {
			return damaged, err
		}
		at := offset
		offset += int64(len(read))
		if number < after.file || number == after.file && at < after.offset {
			continue
		}
		if _, ok := checked(bytes.TrimSuffix(read, []byte("\n"))); !ok || err != nil {
			damaged++
			continue
		}
		q.push(entry{number, at, len(read)})
	}
}

func (q *queue) push(e entry) {
	q.waiting = append(q.waiting, e)
	q.bytes += int64(e.length)
	q.in[e.file]++
}

var errQueueClosed = errors.New("the queue is closed")

// add writes an event down. It returns how many of the oldest had to be dropped.
func (q *queue) add(event []byte) (dropped int, err error) {
	text := line(event)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return 0, errQueueClosed
	}
	if len(text) > maxLine {
		return 0, fmt.Errorf("an event of %d bytes", len(text))
	}
	if q.out == nil || q.size >= fileSize {
		if err := q.begin(); err != nil {
			return 0, err
		}
	}
	if _, err := q.out.Write(text); err != nil {
		// There may be a part of it, behind which nothing could be read.
		q.end()
		return 0, err
	}
	failpoint.Hit("webhook.queued")
	q.push(entry{q.number, q.size, len(text)})
	q.size += int64(len(text))
	q.dirty = true
	dropped = q.trim()
	select {
	case q.ready <- struct{}{}:
	default:
	}
	return dropped, nil
}

// begin starts a new file.
func (q *queue) begin() error {
	q.end()
	out, err := os.OpenFile(q.path(q.number+1), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	q.number++
	q.out, q.size = out, 0
	return nil
}

// end is for a file to which nothing more is written.
func (q *queue) end() {
	if q.out == nil {
		return
	}
	q.full = append(q.full, q.out)
	q.out, q.dirty = nil, true
	q.release(q.number)
}

// release removes a file in which nothing waits.
func (q *queue) release(number int64) {
	if q.in[number] == 0 && (q.out == nil || number != q.number) {
		delete(q.in, number)
		os.Remove(q.path(number))
	}
}

// trim drops the oldest events where there are too many. It returns how many
// that were; one that is being delivered may be among them.
func (q *queue) trim() (dropped int) {
	for ; len(q.waiting) > q.maxEvents || q.bytes > q.maxBytes; dropped++ {
		q.pop()
	}
	return dropped
}

// pop forgets the oldest event.
func (q *queue) pop() {
	e := q.waiting[0]
	q.waiting, q.sending = q.waiting[1:], false
	q.bytes -= int64(e.length)
	q.take(e.file, e.offset+int64(e.length))
	q.in[e.file]--
	q.release(e.file)
}

// first returns the oldest event, until done or again is called. It returns nil
// where there is none. What cannot be read is passed over; lost counts it.
func (q *queue) first() (event []byte, lost int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && len(q.waiting) > 0 {
		event, err := q.load(q.waiting[0])
		if err == nil {
			q.sending = true
			return event, lost, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errDamaged) {
			return nil, lost, err
		}
		q.pop()
		lost++
	}
	return nil, lost, nil
}

var errDamaged = errors.New("the event is damaged")

func (q *queue) load(e entry) ([]byte, error) {
	f, err := os.Open(q.path(e.file))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text := make([]byte, e.length)
	if _, err := f.ReadAt(text, e.offset); err == io.EOF {
		return nil, errDamaged
	} else if err != nil {
		return nil, err
	}
	event, ok := checked(bytes.TrimSuffix(text, []byte("\n")))
	if !ok {
		return nil, errDamaged
	}
	return event, nil
}

// done says that the first event has been taken.
func (q *queue) done() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.sending && !q.closed {
		q.pop()
	}
}

// again says that the first event has not been taken.
func (q *queue) again() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.sending = false
}

// pending is how many events wait, and how many bytes they take.
func (q *queue) pending() (events int, bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting), q.bytes
}

// sync brings what was written to the disk.
func (q *queue) sync() error {
	q.syncing.Lock()
	defer q.syncing.Unlock()
	q.mu.Lock()
	full, out, dirty := q.full, q.out, q.dirty
	q.full, q.dirty = nil, false
	closed := q.closed
	q.mu.Unlock()
	if !dirty || closed {
		return nil
	}
	var errs []error
	for _, f := range full {
		errs = append(errs, f.Sync(), f.Close())
	}
	if out != nil {
		errs = append(errs, out.Sync())
	}
	errs = append(errs, q.cursor.Sync(), syncDir(q.dir))
	return errors.Join(errs...)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// close lets go of the files. What waits stays for the next to open the queue.
func (q *queue) close() error {
	err := q.sync()
	q.syncing.Lock()
	defer q.syncing.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return err
	}
	q.closed = true
	for _, f := range append(q.full, q.out) {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return errors.Join(err, q.cursor.Close())
}
