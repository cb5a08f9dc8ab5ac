// Package storage is the contract between the mirror and the place where its
// bytes lie.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// A Store maps keys to bytes. It is the only truth about content: whatever
// else the mirror remembers can be rebuilt from it.
//
// Keys are slash-separated paths as [CheckKey] allows them. Values below a
// blob's key never change, since the key is their digest; links and records
// are replaced whole.
//
// Absence. A key that holds nothing is reported as an error for which
// errors.Is(err, fs.ErrNotExist) holds, and by nothing else: any other error
// means that the store could not say. Deleting an absent key is not an error.
// A key may not be both a value and the parent of values.
//
// Atomicity. A reader sees the old value or the new one, whole. A Put that
// fails or is killed half way leaves the old value, or none. A value that was
// opened stays readable to its end though it is replaced or deleted meanwhile.
//
// Concurrency. All methods may be called at once from any number of
// goroutines. Of two Puts to one key either may win. A Get, Open, Stat or List that
// begins after a Put or Delete has returned sees its effect.
//
// Durability. After a Put with [Durable] the value survives a loss of power.
// With [Lazy] it survives the death of the process, and after a loss of power
// it may be missing, empty, short, or of the right length with wrong bytes:
// Lazy is for what can be fetched again and is checked before it is trusted. A
// store brings lazy writes to the disk within a minute or so, and all of them
// when it is closed. [Store.Sync] brings chosen ones there at once. A Put with
// Lazy over a value makes the old one as uncertain as the new; one with Durable
// leaves one of the two. What was deleted shortly before a loss of power may be
// back after it, unless its key was synced.
//
// Doubt. A store knows which values a loss of power may have damaged, and
// reports them as [Info].Doubtful, in this process and every later one, until
// they are vouched for, replaced or deleted. It may report others, too: values
// of a durable Put that were written at the same time, or vouched for shortly
// before the loss. A value that is not Doubtful is whole. Get does not tell:
// it is for what is checked at each reading.
//
// Contexts bound the waiting of a backend on a network; a local backend may
// ignore them. Where the network or what is behind it fails, and the store cannot
// tell without it, the error wraps [ErrUnavailable].
//
// What belongs to one machine. Keys below [Local] tell of this process's use of
// the store. A store that several processes may use at once keeps them apart. A
// listing that begins above Local or [Uploads] may leave out what is below them.
type Store interface {
	// Open returns the length bytes of a value from offset, or all of them
	// from there when length is negative, and what Stat would say of the
	// value. A span that does not lie inside the value is an error. Where
	// values are local files and length is negative, the reader is an
	// *os.File positioned at offset, so that it can be sent by sendfile.
	Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Info, error)

	// Get returns a whole value of at most limit bytes. For a larger one the
	// error wraps [ErrTooLarge].
	Get(ctx context.Context, key string, limit int64) ([]byte, error)

	// Stat describes a value without reading it.
	Stat(ctx context.Context, key string) (Info, error)

	// Put stores data under key.
	Put(ctx context.Context, key string, data []byte, d Durability) error

	// PutFile stores the content of the local file at path under key, and
	// takes the file: when it returns nil, path is gone or about to be. The
	// file must not be written any more. A file in a directory of Spool is
	// moved rather than copied where that is possible.
	PutFile(ctx context.Context, key, path string, d Durability) error

	// Sync makes what lies under the keys survive a loss of power when it returns,
	// however it was put there, and that the others hold nothing: an absent key is
	// no error. It speaks of what was there, or was deleted, before it was called.
	// One call for several keys costs less than several calls, and calls at the
	// same time share what they can. After an error any of the keys may be as
	// before; the values are Doubtful after a loss of power.
	Sync(ctx context.Context, keys ...string) error

	// Delete removes a value, and every directory above it that is empty then:
	// a listing shows none where nothing is. What is put there at the same time
	// is not lost.
	Delete(ctx context.Context, key string) error

	// List yields, in no order, the keys that begin with prefix, which is
	// empty or ends in a slash. A deep listing yields every value below. A
	// shallow one yields the values directly below, and each directory once,
	// as a key that ends in a slash. What is added or removed during a
	// listing may or may not appear. An error ends it.
	List(ctx context.Context, prefix string, deep bool) iter.Seq2[Info, error]

	// Vouch says that the value of a key has been read and is whole: it is not
	// Doubtful any more. For a value that is not Doubtful it does nothing.
	// ModTime may change.
	Vouch(ctx context.Context, key string) error

	// Spool returns a local directory for files on their way into the store,
	// and makes it if need be. It belongs to this process alone and outlives
	// it: what an earlier process left there is still there, and removing it
	// is up to whoever uses the name. After a loss of power a file may be
	// missing, short or wrong, unless it was synced. A name is one path
	// component and begins with a letter; two users need two.
	Spool(name string) (string, error)

	// Reserve sets n bytes aside for a value that is about to be written, or
	// fails with an error that wraps [ErrFull]. What is reserved and not yet
	// used counts as used for every later call.
	Reserve(n int64) (Reservation, error)

	// Distant is how to deal with a store whose values are not all on a local
	// disk, and nil for one whose values are.
	Distant() Distant

	// Close brings what was written lazily to the disk and lets go of the
	// store. No other method may be called afterwards, also when it fails: an
	// error means that lazy writes may not survive a loss of power.
	Close() error
}

// Local is the prefix of the keys that belong to one machine; see [Store].
const Local = "mirror/local/"

// A Distant store has its values in a distant place, such as a bucket, and keeps
// near, on a local disk, what was read lately and what is still on its way there.
// It is its own judge of what it keeps near. What is put lazily is near at first,
// and is taken to the distant place behind whoever put it; Sync, and Put with
// [Durable], wait until it is there, and for the distant place survives a loss of
// this machine.
//
// Open and Get read distant values through the network. Whoever serves blobs asks
// OpenNear first, and fetches what is not near once for all who want it.
type Distant interface {
	// OpenNear opens a whole value as Open does, if it is near. If it is not, the
	// error wraps [ErrDistant], and the Info is what is known of it without asking
	// for it there; its Size is -1 if that is not known. If the key holds nothing,
	// the error is an fs.ErrNotExist.
	OpenNear(ctx context.Context, key string) (io.ReadCloser, Info, error)

	// Drop lets go of what is near of a value, if the value is at the distant
	// place, too; it reports whether there was something. It is for a near copy
	// that has been found wrong.
	Drop(key string) bool

	// Distrust says that the distant bytes of a key have been found wrong: what is
	// put there next takes their place though it has the same length.
	Distrust(key string)

	// Shared reports whether another process may be writing to the same place now.
	// What has been read of it more than two seconds ago is then not to be relied
	// upon, unless its key is its digest; and nothing may be deleted because
	// nobody here needs it. It costs nothing to ask. Once it is true it is so for five
	// seconds at least: whoever asks each second misses nobody.
	Shared() bool

	// Listed waits until the store knows all keys at the distant place, which a
	// new one lists once. Until then List asks there.
	Listed(ctx context.Context) error

	// Relist finds out anew what is at the distant place, for what others than
	// this store have written there or taken away.
	Relist(ctx context.Context) error

	// Presign returns a URL by which anybody can read a value from the distant
	// place for the given time, by a GET or HEAD request, which are signed apart.
	// It is a secret. If the value is not there, or not yet, the error is an
	// fs.ErrNotExist.
	Presign(ctx context.Context, method, key string, life time.Duration) (string, error)

	// Secret is what all who share the place know besides it, and nil if there is
	// none: uploads are kept below [Uploads] then, signed with it, so that each can
	// go on with them.
	Secret() []byte
}

// Uploads is the prefix of what has come of uploads under way, in a [Distant]
// store with a secret. What is put there is at the distant place when Put or
// PutFile returns, whatever the durability, and is not kept near; Get, Open, Stat
// and List ask there each time.
const Uploads = "mirror/uploads/"

// Info describes a value, or in a shallow listing a directory.
type Info struct {
	Key     string
	Size    int64
	ModTime time.Time

	// Doubtful says that the value was written lazily shortly before a loss of
	// power. Whoever trusts its bytes hashes them before, and then calls Vouch
	// or Delete. Open, Stat and List set it.
	Doubtful bool
}

// Durability says what a Put must survive.
type Durability int

const (
	Lazy    Durability = iota // the death of the process
	Durable                   // a loss of power
)

// A Reservation is room set aside by [Store.Reserve].
type Reservation interface {
	// Use says that n of the reserved bytes now occupy the disk.
	Use(n int64)
	// Release gives back what was not used. It may be called twice.
	Release()
}

// A Measured store says how much room there is. It is optional.
type Measured interface {
	// Free returns how many bytes could be written now, less what is reserved,
	// and how many of those the operator wants kept free.
	Free() (free, keep int64, err error)
}

// A Backlogged store has values that are on their way to a distant place, and says
// how that goes. It is optional.
type Backlogged interface {
	// Backlog costs nothing that is worth saving.
	Backlog() Backlog
}

// A Backlog is what a [Backlogged] store has to say.
type Backlog struct {
	Pending      int64            // values that are not at the distant place yet
	PendingBytes int64            // how much room those take
	NearBytes    int64            // of all values that are near
	CacheBytes   int64            // that they may take
	Oldest       time.Time        // since when one of them has waited, in this process; zero: none does
	Calls        map[string]int64 // requests to the distant place since the store was opened, by operation
	Failed       map[string]int64 // those of them that got no answer, or one that means to try again
	Listed       bool             // what is at the distant place is known
	Shared       bool             // as Distant has it
	Others       []string         // who shares it, as people would know them; ten at most

	// Err is why the last request got no answer, and Since when that began. It is nil
	// after one that did.
	Err   error
	Since time.Time
}

// ErrFull is wrapped by the error of a Reserve that would take the store
// beyond a limit its operator set. The message names the option.
var ErrFull = errors.New("not enough room")

// ErrUnavailable is wrapped by the error of a store that could not say, or do, what
// it was asked for, because what it depends on does not answer or refuses to. It may
// be worth trying again.
var ErrUnavailable = errors.New("the store cannot be reached")

// ErrDistant is wrapped by the error of [Distant].OpenNear for a value that is not
// near.
var ErrDistant = errors.New("not near")

// ErrTooLarge is wrapped by the error of a Get of a value beyond its limit.
var ErrTooLarge = errors.New("larger than expected")

// ErrLocked is wrapped by the error of a Backend.Open that finds the store in
// use by another process.
var ErrLocked = errors.New("in use by another process")

// A Backend is a Caddy module in the namespace registry.storage: one
// configuration of one kind of store.
type Backend interface {
	// Identity names the store this configuration means, and nothing of how it
	// is to be used: two configurations with one identity share one open
	// store, across reloads and while both are running.
	Identity() string

	// Open opens the store: makes directories, takes locks, sweeps what an
	// earlier process left. It is called on first use, never while a
	// configuration is only being checked.
	Open(ctx context.Context) (Store, error)

	// Limits are what this configuration lets the store take. The store itself
	// does not know them: who fills it keeps to them.
	Limits() Limits

	// Configure gives the settings of this configuration to a store that a
	// Backend of the same identity has opened. It is called once the whole
	// configuration has loaded.
	Configure(s Store) error
}

// Limits are what an operator lets a store take, in bytes; 0 is no limit.
type Limits struct {
	MaxSize     int64 // of everything in it
	MaxBlobSize int64 // of one blob
}

// ParseLimit reads one of the Limits as a configuration says it: a number of bytes
// (`500GiB`), or "off", which "" means as well. The error names the option.
func ParseLimit(option, s string) (int64, error) {
	if s == "" || s == "off" {
		return 0, nil
	}
	bytes, err := humanize.ParseBytes(s)
	if err != nil || bytes == 0 || bytes > math.MaxInt64 {
		return 0, fmt.Errorf("%s: %q is neither a size such as 500GiB nor off", option, s)
	}
	return int64(bytes), nil
}

// CheckKey reports what is wrong with a key: it must be a relative path of
// non-empty components, none of them "." or "..", without NUL bytes, and not
// longer than 1,024 bytes, which is what S3 takes.
func CheckKey(key string) error {
	if !fs.ValidPath(key) || key == "." || strings.IndexByte(key, 0) >= 0 || len(key) > 1024 {
		return fmt.Errorf("storage: %.200q is not a key", key)
	}
	return nil
}
