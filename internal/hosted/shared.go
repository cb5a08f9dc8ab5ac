package hosted

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

const (
	maxSession = 1 << 20 // bytes of a session
	maxPieces  = 10_000  // of an upload
	maxStrays  = 1_000

	// How long may be waited for what a client has brought to be put away, and for
	// what is not needed any more to be removed.
	sharePatience = 5 * time.Minute
	cleanPatience = 30 * time.Second
)

// shared is what is known of an upload that any process can go on with that has the
// secret of the store. What has come is in pieces at the distant place, and what
// can be relied on is what a signed session there says.
//
// A piece is put first, then the session that names it. So a piece that none names
// has not come. Its name is its offset and something random: two processes that
// write at once do not write over each other's.
//
// Nothing there can be changed on a condition. So whoever writes looks at the
// session before, and once more afterwards: before, so that one who was held up
// does not undo what came meanwhile; afterwards, so that of two who looked at the
// same time only the later one tells its client that something has come. Should both
// do, what has been acknowledged here is put back when it is looked at next, unless
// as much has come elsewhere. What is committed is what the digest says in any case.
//
// The file of such an upload has its pieces that this process has taken in, or
// fetched; between them it may have holes. The caller of all of this is the one who
// writes.
type shared struct {
	key    []byte          // signs sessions
	acked  session         // the last one that this process has seen or written
	held   map[string]bool // the names of its pieces that are in the file
	strays []string        // names of pieces put by this process that maybe none names
	looked bool            // acked has been read for the next who writes
}

// A session is what is known of an upload at the distant place: a line of JSON
// behind its HMAC-SHA256.
type session struct {
	state
	Version string  `json:"version"` // another one after each change
	Pieces  []piece `json:"pieces,omitempty"`
}

// A piece is a run of bytes of an upload; it begins where the one before it ends.
type piece struct {
	Name string `json:"name"` // below the upload's
	Size int64  `json:"size"`
}

// signing is the key by which sessions are signed; nil: there are none.
func (h *Registry) signing() []byte {
	if h.distant == nil {
		return nil
	}
	secret := h.distant.Secret()
	if len(secret) == 0 {
		return nil
	}
	mac := hmac.New(sha256.New, secret)
	io.WriteString(mac, "sessions of uploads to a container registry")
	return mac.Sum(nil)
}

// sign is the signature of a session, for one upload.
func sign(key []byte, id string, text []byte) []byte {
	mac := hmac.New(sha256.New, key)
	io.WriteString(mac, id+"\n")
	mac.Write(text)
	return mac.Sum(nil)
}

func sessionKey(id string) string { return storage.Uploads + id + "/state" }

func pieceKey(id, name string) string { return storage.Uploads + id + "/" + name }

func token() string {
	var random [8]byte
	rand.Read(random[:])
	return hex.EncodeToString(random[:])
}

// session reads one. The error is ErrNoUpload if there is none that can be relied
// on.
func (h *Registry) session(ctx context.Context, id string, key []byte) (session, error) {
	text, err := h.store.Get(ctx, sessionKey(id), maxSession)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return session{}, ErrNoUpload
	case errors.Is(err, storage.ErrTooLarge):
		err = errors.New("its state is too large")
	case err != nil:
		return session{}, fmt.Errorf("asking where an upload stands: %w", err)
	}
	var s session
	if err == nil {
		sum, line, _ := bytes.Cut(text, []byte(" "))
		if got, wrong := hex.DecodeString(string(sum)); wrong != nil || !hmac.Equal(got, sign(key, id, line)) {
			h.uploads.distant.forged.Do(func() {
				h.log.Warn("an upload in the bucket is not signed with the secret of this process, and is taken for none; all who share a bucket need the same. This is told once", zap.String("upload", id))
			})
			return session{}, ErrNoUpload
		}
		if err = json.Unmarshal(line, &s); err == nil {
			err = s.check()
		}
	}
	if err != nil {
		h.log.Warn("an upload cannot be gone on with", zap.String("upload", id), zap.Error(err))
		return session{}, ErrNoUpload
	}
	if h.now().Sub(s.Written) >= uploadLife {
		return session{}, ErrNoUpload
	}
	return s, nil
}

func (s *session) check() error {
	if _, err := s.sums(); err != nil {
		return err
	}
	var end int64
	for _, p := range s.Pieces {
		if p.Size <= 0 || p.Size > s.Offset-end || storage.CheckKey(pieceKey("x", p.Name)) != nil {
			return fmt.Errorf("its state names a piece %.100q of %d bytes at %d of %d", p.Name, p.Size, end, s.Offset)
		}
		end += p.Size
	}
	if end != s.Offset {
		return fmt.Errorf("its state names %d bytes of %d", end, s.Offset)
	}
	return nil
}

// putSession writes one.
func (u *Upload) putSession(ctx context.Context, s session) error {
	text, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("writing down the state of an upload: %w", err)
	}
	if len(text) > maxSession-100 {
		return fmt.Errorf("%w: the upload has come in too many pieces, %d; send larger ones", ErrTooLarge, len(s.Pieces))
	}
	text = append(fmt.Appendf(nil, "%x ", sign(u.shared.key, u.id, text)), text...)
	if err := u.registry.store.Put(ctx, sessionKey(u.id), text, storage.Durable); err != nil {
		return fmt.Errorf("writing down the state of an upload: %w", full(err))
	}
	return nil
}

// beginShared begins an upload that any process can go on with.
func (h *Registry) beginShared(ctx context.Context, u *Upload, key []byte) (*Upload, error) {
	s, err := u.state()
	if err != nil {
		return nil, err
	}
	u.shared = &shared{key: key, held: map[string]bool{}, acked: session{state: s, Version: token()}}
	us := &h.uploads
	us.mu.Lock()
	err = us.takes()
	us.mu.Unlock()
	if err == nil {
		err = u.putSession(ctx, u.shared.acked)
	}
	if err == nil {
		if _, err = h.enter(u); err != nil {
			u.clean(ctx)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("beginning an upload: %w", err)
	}
	return u, nil
}

// enter has this process know of an upload, and returns the one it knows of already,
// if it does.
func (h *Registry) enter(u *Upload) (*Upload, error) {
	us := &h.uploads
	us.mu.Lock()
	defer us.mu.Unlock()
	if known := us.open[u.id]; known != nil {
		return known, nil
	}
	if err := us.takes(); err != nil {
		return nil, err
	}
	us.open[u.id] = u
	h.sweepLater()
	return u, nil
}

// join returns an upload that this process does not know of.
func (h *Registry) join(ctx context.Context, repository, id string, key []byte) (*Upload, error) {
	s, err := h.session(ctx, id, key)
	if err != nil {
		return nil, err
	}
	if s.Repository != repository {
		return nil, ErrNoUpload
	}
	u, err := h.newUpload(repository, s.Algorithm)
	if err != nil {
		return nil, err
	}
	u.id, u.path, u.started = id, h.uploads.path(id), s.Started
	u.shared = &shared{key: key, looked: true}
	if err := u.become(s); err != nil {
		return nil, err
	}
	h.uncrowd()
	return h.enter(u)
}

// Look finds out where the upload ends, if another process may have gone on with it,
// and nobody here does. The error is [ErrNoUpload] if it is over.
func (u *Upload) Look(ctx context.Context) error {
	if u.shared == nil {
		return nil
	}
	u.mu.Lock()
	if u.gone || u.holder != nil {
		defer u.mu.Unlock()
		if u.gone {
			return ErrNoUpload
		}
		return nil
	}
	mine := &holder{done: make(chan struct{})}
	u.holder = mine
	u.mu.Unlock()
	defer u.release(mine)
	err := u.refresh(ctx)
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.gone {
		u.settle()
	}
	return err
}

// refresh finds out where the upload stands.
func (u *Upload) refresh(ctx context.Context) error {
	if u.shared.looked {
		u.shared.looked = false
		return nil
	}
	s, err := u.registry.session(ctx, u.id, u.shared.key)
	if errors.Is(err, ErrNoUpload) || err == nil && s.Repository != u.repository {
		return u.over(ctx)
	}
	if err != nil {
		return err
	}
	return u.follow(ctx, s)
}

// over lets an upload be no more that another process has finished or cancelled.
func (u *Upload) over(ctx context.Context) error {
	u.remove(ctx, u.shared.strays)
	u.mu.Lock()
	defer u.mu.Unlock()
	u.drop()
	return ErrNoUpload
}

// follow makes of an upload what a session says that was read.
func (u *Upload) follow(ctx context.Context, s session) error {
	switch acked := u.shared.acked; {
	case s.Version == acked.Version:
		return nil
	case s.Offset < acked.Offset:
		// None that comes after ours ends before it.
		return u.putSession(ctx, acked)
	}
	return u.become(s)
}

// become makes of an upload what a session says, whatever has come besides.
func (u *Upload) become(s session) error {
	sum, err := s.sums()
	if err != nil {
		return err
	}
	sh := u.shared
	held := map[string]bool{}
	var at, end int64
	for _, p := range s.Pieces {
		if at += p.Size; sh.held[p.Name] {
			held[p.Name], end = true, at
		}
	}
	u.mu.Lock()
	sh.acked, sh.held, u.sums = s, held, sum
	u.ends.Store(s.Offset)
	u.mu.Unlock()
	if info, err := os.Stat(u.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	} else if err == nil && info.Size() > end {
		return os.Truncate(u.path, end)
	}
	return nil
}

// settle counts what is in the file. u.mu is held.
func (u *Upload) settle() {
	var n int64
	for _, p := range u.shared.acked.Pieces {
		if u.shared.held[p.Name] {
			n += p.Size
		}
	}
	u.loosen(n - u.loose)
}

// share puts away what has come since the last session. If it cannot, that has not
// come.
func (u *Upload) share(ctx context.Context) error {
	if u.gone || u.Offset() == u.shared.acked.Offset {
		return nil
	}
	// The client may have gone: what it has brought is kept.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sharePatience)
	defer cancel()
	err := u.putPiece(ctx)
	if err != nil && !u.gone {
		if failed := u.become(u.shared.acked); failed != nil {
			err = errors.Join(err, failed)
		}
	}
	return err
}

func (u *Upload) putPiece(ctx context.Context) error {
	sh, store := u.shared, u.registry.store
	if len(sh.acked.Pieces) >= maxPieces {
		return fmt.Errorf("%w: the upload has come in %d pieces; send larger ones", ErrTooLarge, maxPieces)
	}
	offset, version := sh.acked.Offset, token()
	p := piece{Name: strconv.FormatInt(offset, 10) + "." + version, Size: u.Offset() - offset}
	s, err := u.state()
	if err != nil {
		return err
	}
	next := session{state: s, Version: version, Pieces: append(sh.acked.Pieces[:len(sh.acked.Pieces):len(sh.acked.Pieces)], p)}
	failpoint.Hit("upload.written")
	name, remove, err := u.section(ctx, offset, p.Size)
	if err != nil {
		return fmt.Errorf("putting away what is uploaded: %w", full(err))
	}
	defer remove()
	if len(sh.strays) < maxStrays {
		sh.strays = append(sh.strays, p.Name)
	}
	if err := store.PutFile(ctx, pieceKey(u.id, p.Name), name, storage.Durable); err != nil {
		return fmt.Errorf("putting away what is uploaded: %w", full(err))
	}
	failpoint.Hit("upload.piece")
	if err := u.still(ctx, sh.acked.Version); err != nil {
		return err
	}
	if err := u.putSession(ctx, next); err != nil {
		return err
	}
	failpoint.Hit("upload.state")
	if err := u.still(ctx, next.Version); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	sh.acked, sh.held[p.Name] = next, true
	if n := len(sh.strays); n > 0 && sh.strays[n-1] == p.Name {
		sh.strays = sh.strays[:n-1]
	}
	return nil
}

// still fails if the session is not of a version any more.
func (u *Upload) still(ctx context.Context, version string) error {
	s, err := u.registry.session(ctx, u.id, u.shared.key)
	switch {
	case errors.Is(err, ErrNoUpload):
		return u.over(ctx)
	case err != nil:
		return err
	case s.Version == version:
		return nil
	}
	if err := u.follow(ctx, s); err != nil {
		return err
	}
	return ErrTaken
}

// section makes a file of a part of the upload's.
func (u *Upload) section(ctx context.Context, offset, n int64) (name string, remove func(), err error) {
	name = u.path + ".piece"
	os.Remove(name)
	from, err := os.Open(u.path)
	if err != nil {
		return "", nil, err
	}
	defer from.Close()
	// The whole file may be that part, and nobody writes to it now.
	if info, err := from.Stat(); err == nil && offset == 0 && info.Size() == n && os.Link(u.path, name) == nil {
		return name, func() { os.Remove(name) }, nil
	}
	set, err := u.registry.reserve(ctx, n)
	if err != nil {
		return "", nil, err
	}
	piece := name
	undo := func() {
		os.Remove(piece)
		set.Release()
	}
	defer func() {
		if err != nil {
			undo()
		}
	}()
	to, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return "", nil, err
	}
	if _, err = from.Seek(offset, io.SeekStart); err == nil {
		_, err = io.CopyN(to, from, n)
	}
	return piece, undo, errors.Join(err, to.Close())
}
