package s3

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/caddy-registry/mirror/storage"
)

// An index is what is known of the bucket: an entry for each key that is there, and
// for a while one for each that was taken away. It is knowledge, not truth: losing it
// costs one listing.
//
// It is a bbolt file that is never synced, which a killed process does not harm and a
// loss of power may. So beside it lies a card, which is synced, and which says in what
// boot the file was used last and whether it was closed: a file that may be torn is
// not even opened.
//
// Every entry bears the epoch in which it was written. A listing of the whole bucket
// begins an epoch. It leaves alone what bears it already, for that is newer than what
// the listing says; and when it has ended, what bears an earlier one is not there.
type index struct {
	dir  string
	db   *bolt.DB
	card card

	complete atomic.Bool   // what has no entry is not in the bucket
	epoch    atomic.Uint64 // of the entries that are written now

	mu      sync.Mutex
	waiting []*commit // for the next transaction; guarded by mu
	writing bool      // somebody commits; guarded by mu

	accessMu sync.Mutex
	accessed map[string]access // not written yet; guarded by accessMu
	flushing sync.Mutex        // held by who writes them
}

const (
	indexSchema = 1
	maxAccessed = 8192 // that are not written yet, about 2 MiB

	// settle is how long a bucket's listing may lag behind what was put and deleted.
	settle = 10 * time.Minute
)

// A card says whose an index is, and whether it can be believed.
type card struct {
	Schema int    `json:"schema"`
	Bucket string `json:"bucket"` // its identity
	Boot   string `json:"boot"`   // storage.Boot of the process that used it last
	Clean  bool   `json:"clean"`  // it has been closed, and is on the disk
}

var (
	entriesName = []byte("entries")
	goneName    = []byte("gone")
	nearName    = []byte("near")
	metaName    = []byte("meta")
	completeKey = []byte("complete")
	epochKey    = []byte("epoch")
)

// An entry is what is known of one key.
type entry struct {
	size     int64     // -1: not known
	modified time.Time // of the value, as the store's Info has it
	put      time.Time // when this store put it there; zero if it did not
	etag     string    // "" if it has not been seen
	epoch    uint64
	flags    byte
	data     []byte // the value, if held
}

const (
	held       byte = 1 << iota // data is the value
	unsure                      // it may have been deleted, or replaced by what is pending
	distrusted                  // its bytes have been found wrong
)

func (e entry) is(flag byte) bool { return e.flags&flag != 0 }

func (e entry) info(key string) storage.Info {
	return storage.Info{Key: key, Size: e.size, ModTime: e.modified}
}

func (e entry) encode() []byte {
	b := make([]byte, 0, 48+len(e.etag)+len(e.data))
	b = append(b, e.flags)
	b = binary.AppendUvarint(b, e.epoch)
	b = binary.AppendVarint(b, e.size)
	b = binary.AppendVarint(b, e.modified.UnixNano())
	var put int64
	if !e.put.IsZero() {
		put = e.put.UnixNano()
	}
	b = binary.AppendVarint(b, put)
	b = binary.AppendUvarint(b, uint64(len(e.etag)))
	b = append(b, e.etag...)
	return append(b, e.data...)
}

var errEntry = errors.New("an entry of the index is damaged")

// decode copies what it needs of b.
func decode(b []byte) (e entry, err error) {
	if len(b) == 0 {
		return e, errEntry
	}
	e.flags, b = b[0], b[1:]
	unsigned := func() (v uint64) {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			err, n = errEntry, 0
		}
		b = b[n:]
		return v
	}
	signed := func() (v int64) {
		v, n := binary.Varint(b)
		if n <= 0 {
			err, n = errEntry, 0
		}
		b = b[n:]
		return v
	}
	e.epoch = unsigned()
	e.size = signed()
	e.modified = time.Unix(0, signed()).UTC()
	if put := signed(); put != 0 {
		e.put = time.Unix(0, put).UTC()
	}
	length := unsigned()
	if err != nil || length > uint64(len(b)) {
		return entry{}, errEntry
	}
	e.etag, b = string(b[:length]), b[length:]
	if e.is(held) {
		e.data = bytes.Clone(b)
		if e.data == nil {
			e.data = []byte{}
		}
	}
	return e, nil
}

// openIndex opens the index in a directory, or makes a new one; fresh says that it
// did. bucket is the identity of the bucket it must be of.
func openIndex(dir, bucket, boot string) (x *index, fresh bool, err error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, false, err
	}
	x = &index{dir: dir, accessed: map[string]access{}}
	var before card
	data, err := os.ReadFile(x.cardPath())
	if err == nil {
		err = json.Unmarshal(data, &before)
	}
	fresh = err != nil || before.Schema != indexSchema || before.Bucket != bucket ||
		!before.Clean && (before.Boot != boot || boot == "")
	x.card = card{Schema: indexSchema, Bucket: bucket, Boot: boot}
	if !fresh {
		if _, err := os.Stat(x.path()); err != nil || x.open() != nil {
			fresh = true
		}
	}
	if fresh {
		if err := os.Remove(x.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, false, err
		}
		if err := x.open(); err != nil {
			return nil, false, err
		}
	}
	if err := x.card.write(x.cardPath()); err != nil {
		x.db.Close()
		return nil, false, err
	}
	return x, fresh, nil
}

func (x *index) path() string     { return filepath.Join(x.dir, "index.db") }
func (x *index) cardPath() string { return filepath.Join(x.dir, "index.json") }

func (x *index) open() (err error) {
	defer func() {
		// bbolt panics at some kinds of damage.
		if p := recover(); p != nil {
			err = fmt.Errorf("the index is damaged: %v", p)
		}
	}()
	db, err := bolt.Open(x.path(), 0o640, &bolt.Options{
		NoSync: true, NoGrowSync: true, NoFreelistSync: true, FreelistType: bolt.FreelistMapType, Timeout: 10 * time.Second,
	})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{entriesName, goneName, nearName, metaName} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(metaName)
		x.complete.Store(meta.Get(completeKey) != nil)
		x.epoch.Store(1)
		if at := meta.Get(epochKey); at != nil {
			n, _ := binary.Uvarint(at)
			x.epoch.Store(n)
		}
		return nil
	})
	if err != nil {
		db.Close()
		return err
	}
	x.db = db
	return nil
}

// write replaces the card; when it returns nil, it survives a loss of power.
func (c card) write(path string) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return writeFile(path, data)
}

// writeFile replaces a file whole, and syncs it.
func writeFile(path string, data []byte) error {
	temp := path + ".new"
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// close brings the index to the disk and says so. If that fails, the next boot lists
// the bucket again.
func (x *index) close() error {
	err := x.flush()
	if err == nil {
		err = x.db.Sync()
	}
	if closeErr := x.db.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		x.card.Clean = true
		err = x.card.write(x.cardPath())
	}
	return err
}

// get is what is known of a key. What cannot be read may be anything.
func (x *index) get(key string) (e entry, ok bool) {
	err := x.db.View(func(tx *bolt.Tx) (err error) {
		b := tx.Bucket(entriesName).Get([]byte(key))
		if ok = b != nil; ok {
			e, err = decode(b)
		}
		return err
	})
	if err != nil {
		return entry{size: -1, flags: unsure}, true
	}
	return e, ok
}

// current reports whether an entry is as new as the index says it is.
func (x *index) current(e entry) bool { return x.complete.Load() || e.epoch == x.epoch.Load() }

// A commit is a change that waits for a transaction.
type commit struct {
	change func(*bolt.Tx) error
	lead   chan bool // true: make the transaction yourself; false: it is made
	err    error
}

// update makes a change, together with those of all who come while one is being made.
// Who comes alone does not wait.
func (x *index) update(change func(*bolt.Tx) error) error {
	c := &commit{change: change, lead: make(chan bool, 1)}
	x.mu.Lock()
	x.waiting = append(x.waiting, c)
	if !x.writing {
		x.writing = true
		c.lead <- true
	}
	x.mu.Unlock()
	if !<-c.lead {
		return c.err
	}
	x.mu.Lock()
	group := x.waiting
	x.waiting = nil
	x.mu.Unlock()
	err := x.db.Update(func(tx *bolt.Tx) error {
		for _, c := range group {
			// One that comes too late has changed nothing.
			if c.err = c.change(tx); c.err != nil && !errors.Is(c.err, errOvertaken) {
				return c.err
			}
		}
		return nil
	})
	for _, other := range group {
		if err != nil {
			other.err = fmt.Errorf("s3 storage: writing the index: %w", err)
		}
		if other != c {
			other.lead <- false
		}
	}
	x.mu.Lock()
	if len(x.waiting) > 0 {
		x.waiting[0].lead <- true
	} else {
		x.writing = false
	}
	x.mu.Unlock()
	return c.err
}

// set writes down what the bucket has under a key.
func (x *index) set(key string, e entry) error {
	return x.update(func(tx *bolt.Tx) error {
		e.epoch = x.epoch.Load()
		if err := tx.Bucket(goneName).Delete([]byte(key)); err != nil {
			return err
		}
		return tx.Bucket(entriesName).Put([]byte(key), e.encode())
	})
}

// remove writes down that the bucket has nothing under a key. Late says that something
// may come to be there all the same.
func (x *index) remove(key string, late bool, now time.Time) error {
	return x.update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(entriesName).Delete([]byte(key)); err != nil {
			return err
		}
		b := binary.AppendUvarint(nil, x.epoch.Load())
		b = binary.AppendVarint(b, now.UnixNano())
		if late {
			b = append(b, 1)
		}
		return tx.Bucket(goneName).Put([]byte(key), b)
	})
}

// A deletion is what is remembered of one.
type deletion struct {
	epoch uint64
	at    time.Time
	late  bool
}

// gone says what is remembered of the deletion of a key here, if it is not long ago.
func gone(tx *bolt.Tx, key []byte) (d deletion, ok bool) {
	b := tx.Bucket(goneName).Get(key)
	if b == nil {
		return d, false
	}
	epoch, n := binary.Uvarint(b)
	if n <= 0 {
		return d, false
	}
	nanos, m := binary.Varint(b[n:])
	return deletion{epoch, time.Unix(0, nanos), m > 0 && len(b) > n+m}, true
}

// lately reports whether a key was deleted here so lately that a listing may still
// have it.
func (x *index) lately(key string, now time.Time) (is bool) {
	x.db.View(func(tx *bolt.Tx) error {
		d, ok := gone(tx, []byte(key))
		is = ok && now.Sub(d.at) < settle
		return nil
	})
	return is
}

// setComplete says whether what has no entry is absent.
func (x *index) setComplete(complete bool) error {
	x.complete.Store(false) // whatever becomes of the transaction
	err := x.update(func(tx *bolt.Tx) error {
		if complete {
			return tx.Bucket(metaName).Put(completeKey, []byte{1})
		}
		return tx.Bucket(metaName).Delete(completeKey)
	})
	x.complete.Store(complete && err == nil)
	return err
}

// page returns up to limit entries of keys that begin with prefix, from a key on, in
// order. In a shallow one a directory stands for all below it. next is where to go
// on, nil at the end. No transaction is open when it returns: who walks through the
// index may change it.
func (x *index) page(prefix string, from []byte, deep bool, limit int) (found []named, next []byte, err error) {
	err = x.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(entriesName).Cursor()
		k, v := c.Seek(from)
		for k != nil && bytes.HasPrefix(k, []byte(prefix)) {
			if len(found) == limit {
				next = bytes.Clone(k)
				return nil
			}
			rest := k[len(prefix):]
			if slash := bytes.IndexByte(rest, '/'); !deep && slash >= 0 {
				dir := string(k[:len(prefix)+slash+1])
				found = append(found, named{key: dir})
				// '0' is what comes after '/'.
				k, v = c.Seek([]byte(dir[:len(dir)-1] + "0"))
				continue
			}
			if e, err := decode(v); err == nil {
				e.data = nil // a page of it may be much
				found = append(found, named{string(k), e})
			}
			k, v = c.Next()
		}
		return nil
	})
	return found, next, err
}

// A named entry is one of a page, without its value.
type named struct {
	key string
	entry
}

// begin starts an epoch.
func (x *index) begin() (n uint64, err error) {
	err = x.update(func(tx *bolt.Tx) error {
		n = x.epoch.Load() + 1
		if err := tx.Bucket(metaName).Put(epochKey, binary.AppendUvarint(nil, n)); err != nil {
			return err
		}
		x.epoch.Store(n)
		return nil
	})
	return n, err
}

// listed takes what the listing of an epoch says. It returns those keys whose listing
// contradicts what was done here shortly before: they are to be asked for one by one.
func (x *index) listed(epoch uint64, objects []object, now time.Time) (doubt []string, err error) {
	err = x.update(func(tx *bolt.Tx) error {
		if x.epoch.Load() != epoch {
			return errOvertaken
		}
		doubt = nil
		entries := tx.Bucket(entriesName)
		for _, o := range objects {
			key := []byte(o.key)
			e := entry{size: o.size, modified: o.modified, etag: o.etag, epoch: epoch}
			if b := entries.Get(key); b != nil {
				old, err := decode(b)
				if err == nil && old.epoch == epoch {
					continue
				}
				switch {
				case err == nil && !old.put.IsZero() && now.Sub(old.put) < settle && !same(o.key, old, o):
					doubt = append(doubt, o.key)
					continue
				case err == nil && same(o.key, old, o):
					old.epoch, old.etag, old.flags = epoch, o.etag, old.flags&^unsure
					e = old
				case err == nil:
					e.flags = old.flags & distrusted
				}
			} else if d, ok := gone(tx, key); ok && (d.epoch == epoch || now.Sub(d.at) < settle) {
				if d.epoch != epoch {
					doubt = append(doubt, o.key)
				}
				continue
			}
			if err := entries.Put(key, e.encode()); err != nil {
				return err
			}
		}
		return nil
	})
	return doubt, err
}

// same reports whether an object is what an entry tells of.
func same(key string, e entry, o object) bool {
	if e.size != o.size || e.is(unsure) {
		return false
	}
	return e.etag != "" && tag(e.etag) == tag(o.etag) || isBlob(key)
}

// tag is an ETag without its quotes, which some leave away in listings.
func tag(etag string) string { return strings.Trim(etag, `"`) }

// unlisted returns up to limit keys from one on that have an entry of an earlier
// epoch: of those put here lately first to be asked for, and of the others.
func (x *index) unlisted(from []byte, limit int, now time.Time) (ask, absent []string, next []byte, err error) {
	err = x.db.View(func(tx *bolt.Tx) error {
		c, epoch := tx.Bucket(entriesName).Cursor(), x.epoch.Load()
		n := 0
		for k, v := c.Seek(from); k != nil; k, v = c.Next() {
			if n++; n > 16*limit || len(ask)+len(absent) == limit {
				next = bytes.Clone(k)
				return nil
			}
			e, err := decode(v)
			switch {
			case err == nil && e.epoch == epoch:
			case err == nil && !e.put.IsZero() && now.Sub(e.put) < settle:
				ask = append(ask, string(k))
			default:
				absent = append(absent, string(k))
			}
		}
		return nil
	})
	return ask, absent, next, err
}

// drop removes entries that are still of an earlier epoch.
func (x *index) drop(epoch uint64, keys []string) error {
	return x.update(func(tx *bolt.Tx) error {
		if x.epoch.Load() != epoch {
			return errOvertaken
		}
		entries := tx.Bucket(entriesName)
		for _, key := range keys {
			b := entries.Get([]byte(key))
			if e, err := decode(b); b == nil || err == nil && e.epoch == epoch {
				continue
			}
			if err := entries.Delete([]byte(key)); err != nil {
				return err
			}
		}
		return nil
	})
}

// emptied reports whether something below a directory was deleted so lately that a
// listing may still have it.
func (x *index) emptied(dir string, now time.Time) (is bool) {
	x.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(goneName).Cursor()
		for k, _ := c.Seek([]byte(dir)); k != nil && bytes.HasPrefix(k, []byte(dir)) && !is; k, _ = c.Next() {
			d, ok := gone(tx, k)
			is = ok && now.Sub(d.at) < settle
		}
		return nil
	})
	return is
}
