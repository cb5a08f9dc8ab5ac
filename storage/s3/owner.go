package s3

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/storage"
)

// ownerKey is where those who use the bucket leave their marks.
const ownerKey = "mirror/owner.json"

const (
	beatEvery  = 5 * time.Second
	lookEvery  = 1500 * time.Millisecond // for newcomers, in between: what they delete is not served for long
	deadAfter  = 30 * time.Second        // since an owner's last beat, by our own clock
	missedRead = 3                       // reads in which an owner's mark is missing until it has gone
	maxOwners  = 1000
	maxMarks   = 1 << 20 // bytes
	farewell   = 3 * time.Second
)

// marks is what lies at ownerKey. It is read, changed and written without a lock: an
// owner whose mark is lost that way makes it again with its next beat, and is taken to
// be there meanwhile.
type marks struct {
	Owners map[string]ownerMark `json:"owners"`
	// Last is the node that has written to the bucket last, for all that is known.
	Last string `json:"last"`
}

type ownerMark struct {
	Beat uint64 `json:"beat"` // changes while the owner lives
	Host string `json:"host,omitempty"`
}

// An owner is this store as one of those who may be using the bucket.
type owner struct {
	shared  atomic.Bool // another may be using it now
	suspect atomic.Bool // but all there is of it is a mark that was there before us
	called  atomic.Pointer[[]string]

	mu     sync.Mutex // held through a beat
	node   string     // names the cache directory
	host   string
	beat   uint64
	sure   bool        // the last beat is what was written last
	met    atomic.Bool // the marks have been read once
	first  bool        // they are being read for the first time
	last   string      // who has written last, as we know it
	others map[string]*sighting
}

// A sighting is what has been seen of another owner.
type sighting struct {
	beat    uint64
	changed time.Time // when the beat was seen to change, by our clock
	alive   bool      // it was, or the mark was seen to come
	missing int       // reads in a row without its mark
}

// nodeName reads the name of the cache directory, and gives it one.
func nodeName(dir string) (string, error) {
	path := filepath.Join(dir, "node")
	data, err := os.ReadFile(path)
	if name := strings.TrimSpace(string(data)); err == nil && name != "" {
		return name, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	var random [8]byte
	rand.Read(random[:])
	name := hex.EncodeToString(random[:])
	return name, writeFile(path, []byte(name+"\n"))
}

// readMarks reads what is at ownerKey. What is no JSON counts as nothing: whoever
// wrote it is no owner.
func (s *store) readMarks(ctx context.Context) (m marks, err error) {
	data, _, err := s.bucket.read(ctx, ownerKey, maxMarks)
	s.said(err)
	if err != nil && !absent(err) {
		return m, err
	}
	if err != nil || json.Unmarshal(data, &m) != nil || len(m.Owners) > maxOwners {
		m = marks{}
	}
	if m.Owners == nil {
		m.Owners = map[string]ownerMark{}
	}
	return m, nil
}

func (s *store) writeMarks(ctx context.Context, m marks) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	err = s.bucket.putBytes(ctx, ownerKey, data)
	s.said(err)
	return err
}

// beatOnce looks for other owners and leaves our mark.
func (s *store) beatOnce(ctx context.Context) error {
	o := &s.owner
	o.mu.Lock()
	defer o.mu.Unlock()
	m, err := s.readMarks(ctx)
	if err != nil {
		return err
	}
	o.first = !o.met.Load()
	switch {
	case o.first:
		if m.Last != o.node {
			if err := s.disbelieve(); err != nil {
				return err
			}
		} else {
			s.queue.release(unmet)
		}
		o.met.Store(true)
	case m.Last != o.node && m.Last != o.last && o.others[m.Last] == nil:
		// Somebody has come and gone while we could not look. It counts as if it had
		// gone just now.
		o.others[m.Last] = &sighting{changed: s.now(), alive: true}
	}
	o.last = m.Last
	if mine, ok := m.Owners[o.node]; ok && o.sure && mine.Beat != o.beat {
		// Somebody has copied the cache directory, and the name with it.
		o.others[theCopy] = &sighting{changed: s.now(), alive: true}
	}
	s.share(o.judge(m, s.now()))
	o.call(m)
	for id := range m.Owners {
		if id != o.node && o.others[id] == nil {
			delete(m.Owners, id)
		}
	}
	o.beat = max(o.beat, m.Owners[o.node].Beat) + 1
	m.Owners[o.node] = ownerMark{Beat: o.beat, Host: o.host}
	m.Last = o.node
	err = s.writeMarks(ctx, m)
	if o.sure = err == nil; o.sure {
		o.last = o.node
	}
	return err
}

// theCopy stands for another owner that has our name.
const theCopy = "a copy of this cache directory"

// judge returns an owner that may be using the bucket, or "". Of one that only suspect
// says so, nothing is known but a mark that may be of a process that was killed. The
// caller holds mu.
func (o *owner) judge(m marks, now time.Time) (other string, suspect bool) {
	suspect = true
	for id, mark := range m.Owners {
		if id == o.node {
			continue
		}
		seen := o.others[id]
		if seen == nil {
			seen = &sighting{changed: now, alive: !o.first}
			o.others[id] = seen
		} else if mark.Beat != seen.beat {
			seen.changed, seen.alive = now, true
		}
		seen.beat, seen.missing = mark.Beat, 0
	}
	for id, seen := range o.others {
		mark, ok := m.Owners[id]
		if !ok {
			seen.missing++
		}
		if seen.missing >= missedRead || now.Sub(seen.changed) >= deadAfter {
			delete(o.others, id)
			continue
		}
		other = id
		if mark.Host != "" {
			other += " on " + mark.Host
		}
		suspect = suspect && !seen.alive
	}
	return other, suspect
}

// maxNames is how many other owners are named.
const maxNames = 10

// call notes what people call the other owners. The caller holds mu.
func (o *owner) call(m marks) {
	names := []string{}
	for id := range o.others {
		if host := m.Owners[id].Host; host != "" {
			id += " on " + host
		}
		names = append(names, id)
	}
	slices.Sort(names)
	names = names[:min(len(names), maxNames)]
	o.called.Store(&names)
}

// names are those of the other owners, as of the last look.
func (o *owner) names() []string {
	if names := o.called.Load(); names != nil {
		return *names
	}
	return nil
}

// share takes note of whether there is another owner. What the index says is asked for
// again while there is, but that of a suspect nobody is asked while S3 does not answer.
func (s *store) share(other string, suspect bool) {
	s.listing.mu.Lock()
	defer s.listing.mu.Unlock()
	was := s.owner.shared.Load()
	switch {
	case other != "" && !was:
		// Whoever keeps the store is loud about it.
		s.log.Info("another mirror is using the bucket, or was killed", zap.String("other", other))
		s.asked.Purge()
		s.memos.Purge()
		s.owner.suspect.Store(suspect)
		s.owner.shared.Store(true)
		if !suspect {
			s.index.setComplete(false)
		}
		s.listing.change()
	case other != "" && s.owner.suspect.Load() && !suspect:
		s.log.Info("another mirror is using the bucket", zap.String("other", other))
		s.owner.suspect.Store(false)
		s.index.setComplete(false)
		s.listing.change()
	case other == "" && was:
		s.log.Info("no other mirror is using the bucket any more; it is listed anew")
		s.index.setComplete(false)
		s.index.begin()
		s.owner.shared.Store(false)
		s.owner.suspect.Store(false)
		s.listing.change()
		s.listing.ask()
	}
}

// disbelieve is called when another has written to the bucket since the index was
// used last: what it says is asked for again, and what was noted of this machine's use
// of the store is not so any more.
func (s *store) disbelieve() error {
	s.listing.mu.Lock()
	defer s.listing.mu.Unlock()
	err := s.index.setComplete(false)
	if err == nil {
		_, err = s.index.begin()
	}
	if err == nil {
		err = s.forgetLocal(s.ctx)
	}
	s.listing.change()
	s.listing.ask()
	return err
}

// beats leaves marks until Close.
func (s *store) beats() {
	tick, stop := s.ticker(beatEvery)
	defer stop()
	glance, end := s.ticker(lookEvery)
	defer end()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick:
			s.beatOnce(s.ctx) // what is wrong with S3 is told elsewhere
		case <-glance:
			if s.newcomer(s.ctx) {
				s.beatOnce(s.ctx)
			}
		}
	}
}

// newcomer looks for an owner whom the last beat has not seen, if there was none.
func (s *store) newcomer(ctx context.Context) bool {
	o := &s.owner
	if o.shared.Load() || !o.met.Load() {
		return false
	}
	m, err := s.readMarks(ctx)
	if err != nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for id := range m.Owners {
		if id != o.node && o.others[id] == nil {
			return true
		}
	}
	return m.Last != o.node && m.Last != o.last
}

// contested reports whether what is known may have been changed by another, and S3 is
// to be asked. A suspect is no reason to refuse what is known while S3 cannot be asked.
func (s *store) contested() bool {
	return s.owner.shared.Load() && !(s.owner.suspect.Load() && s.bucket.breaker.open())
}

// resort reports whether what S3 could not be asked for is known all the same.
func (s *store) resort(key string, k kind, err error) bool {
	if !errors.Is(err, storage.ErrUnavailable) || s.contested() {
		return false
	}
	_, f, _ := s.look(key, k)
	return f != unknown
}

// leave takes our mark away, also one that an earlier process of this directory has left
// when it was killed. If it cannot be, others take us for dead in a while. Who has
// written last stays as it is: if it is not us, we have not seen what was written.
func (s *store) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	s.owner.mu.Lock()
	defer s.owner.mu.Unlock()
	m, err := s.readMarks(ctx)
	if _, ok := m.Owners[s.owner.node]; err != nil || !ok {
		return
	}
	delete(m.Owners, s.owner.node)
	s.writeMarks(ctx, m)
}

// hopeless is what S3 says that does not change by itself, at the first call.
func hopeless(err error) error {
	f, ok := errors.AsType[*fault](err)
	if !ok || f.again {
		return nil
	}
	switch f.code {
	case "NoSuchBucket", "InvalidBucketName", "XAdminUserNotFound", "InvalidToken",
		"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint":
	default:
		switch f.status {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusMovedPermanently, http.StatusPermanentRedirect:
		default:
			return nil
		}
	}
	return fmt.Errorf("s3 storage: %w", err)
}
