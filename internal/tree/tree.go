// Package tree reads and writes registry:2's tree in a store: which blobs and
// manifests belong to which repository, and what tags mean. Every repository
// has its own members though all share one set of blobs, and nothing is
// answered to a repository that is not a member's (CVE-2024-39897).
package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
)

const (
	maxLink     = 512     // bytes of a link; a digest has at most 135
	maxMembers  = 200_000 // memberships remembered, about 40 MiB when full
	maxRevs     = 100_000 // links to manifests remembered, about 30 MiB when full
	maxRecords  = 20_000  // records remembered, and names that have none
	maxScans    = 4_000   // scanned repositories remembered
	maxWrong    = 1_000   // blobs remembered that are wrong and stay
	scanTimeout = time.Minute
	maxRevision = 5_000 // manifests read to answer one question about a repository
)

// A Tree is registry:2's tree in a store.
type Tree struct {
	store storage.Store
	// members remembers which content belongs to a repository; it is filled
	// from links and from the manifests that pass.
	members *lru.Cache[member, Member]
	// revisions remembers which manifests have been read in a repository: what
	// is hot may be served to whoever asks there.
	revisions *lru.Cache[member, *revision]
	hot       *hot
	records   *lru.Cache[string, *Record] // nil: there is none
	scanned   *lru.Cache[string, struct{}]
	scans     singleflight.Group
	proofs    proofs
	life      life
	sharing   sharing

	// stays and suspect are Guard's. wrong are blobs that stay, as of their
	// ModTime, so that they are not hashed again.
	stays   func(context.Context, digest.Digest) (bool, error)
	suspect func(digest.Digest)
	wrong   *lru.Cache[digest.Digest, time.Time]

	note func(Change)
	now  func() time.Time
	// Changes are made and told of under the lock of what they change, so that
	// they are told of in the order in which they are made.
	pushes, repositories, tags, digests stripes
	unsynced                            unsynced
	guards                              guards // of members, revisions, scanned and records, by repository
	// forgotten are records that Forget has removed, in case somebody who has
	// seen them before still has something to store.
	forgotten *lru.Cache[string, Record]
}

// A revision is a manifest that has been read in a repository.
type revision struct {
	canonical digest.Digest
	read      LastRead
}

type member struct {
	repository string
	digest     digest.Digest
}

// A Member is content that belongs to a repository.
type Member struct {
	// Canonical is the sha256 under which the bytes lie. It is empty where
	// content is named by another digest and has not been stored yet.
	Canonical digest.Digest
	// Size as a manifest says, or -1.
	Size int64
	// Linked says that the repository's own link proves it, so that the proof
	// survives.
	Linked bool
	// Child says that an index of the repository names it as a manifest.
	Child bool

	disputed bool // manifests do not agree on its size
	read     *LastRead
}

// ErrDamaged is wrapped by the error for content that is in the store and is not
// what its key says. It counts as absent, and is an fs.ErrNotExist.
var ErrDamaged = fmt.Errorf("damaged, which counts as absent: %w", fs.ErrNotExist)

// New returns the tree in a store, which it does not close. note is told of every
// change, and of reads; it is called with locks held, and neither blocks nor calls
// the tree. It may be nil.
func New(store storage.Store, note func(Change)) *Tree {
	if note == nil {
		note = func(Change) {}
	}
	// lru.New fails only for a size below 1.
	members, _ := lru.New[member, Member](maxMembers)
	revisions, _ := lru.New[member, *revision](maxRevs)
	records, _ := lru.New[string, *Record](maxRecords)
	scanned, _ := lru.New[string, struct{}](maxScans)
	forgotten, _ := lru.New[string, Record](maxRecords)
	wrong, _ := lru.New[digest.Digest, time.Time](maxWrong)
	t := &Tree{
		store: store, members: members, revisions: revisions, hot: newHot(), records: records, scanned: scanned,
		note: note, now: time.Now, forgotten: forgotten, wrong: wrong,
	}
	t.sharing.distant = store.Distant()
	t.Guard(func(context.Context, digest.Digest) (bool, error) { return false, nil }, func(digest.Digest) {})
	t.proofs.slots = make(chan struct{}, maxProofs)
	t.life.ctx, t.life.cancel = context.WithCancelCause(context.Background())
	return t
}

// Heat changes how many bytes of small content are kept in memory. Where that is
// less than before, what is there goes at once.
func (t *Tree) Heat(size int64) { t.hot.heat(size) }

// link reads a link. A link that does not hold a digest, as a crash may leave
// it, is absent.
func (t *Tree) link(ctx context.Context, key string) (digest.Digest, error) {
	data, err := t.store.Get(ctx, key, maxLink)
	if errors.Is(err, storage.ErrTooLarge) {
		return "", fmt.Errorf("the link %s is %w: %w", key, ErrDamaged, err)
	}
	if err != nil {
		return "", err
	}
	d, err := oci.ParseDigest(strings.TrimSpace(string(data)))
	if err != nil {
		return "", fmt.Errorf("the link %s is %w: %w", key, ErrDamaged, err)
	}
	return d, nil
}

func (t *Tree) setLink(ctx context.Context, key string, d digest.Digest) error {
	return t.store.Put(ctx, key, []byte(d), storage.Lazy)
}

// A Manifest is a stored manifest. It is shared by all who read it.
type Manifest struct {
	Digest digest.Digest
	Body   []byte
	*oci.Manifest
	// Unstored says that it is only in memory: there was no room for it.
	Unstored bool
	// ETag and Length are Digest and the number of bytes, as headers say them.
	ETag, Length string
}

func newManifest(d digest.Digest, body []byte, parsed *oci.Manifest) *Manifest {
	return &Manifest{Digest: d, Body: body, Manifest: parsed, ETag: `"` + d.String() + `"`, Length: strconv.Itoa(len(body))}
}

// Warm returns a manifest that belongs to a repository, if memory alone tells.
// at is when a client has asked for it by its digest; the zero time: none has.
func (t *Tree) Warm(repository string, d digest.Digest, at time.Time) (*Manifest, bool) {
	if !t.believes(repository) {
		return nil, false
	}
	r, ok := t.revisions.Get(member{repository, d})
	if !ok {
		return nil, false
	}
	m, ok := t.hotManifest(d, r.canonical)
	if !ok {
		return nil, false
	}
	if !at.IsZero() && r.read.again(at) {
		t.note(Change{Kind: Read, Repository: repository, Canonical: r.canonical, Digest: otherThan(r.canonical, d), At: at})
	}
	return m, true
}

// hotManifest returns a manifest whose bytes are in memory, whoever it belongs to.
func (t *Tree) hotManifest(d, canonical digest.Digest) (*Manifest, bool) {
	w, ok := t.hot.get(canonical)
	if !ok {
		return nil, false
	}
	m := w.manifest
	if d != canonical {
		m = w.other
	}
	return m, m != nil && m.Digest == d
}

// WarmBlob returns the bytes of a small blob that belongs to a repository, if
// memory alone tells. Nobody may change them. at is when a client has asked for
// it; the zero time: none has.
func (t *Tree) WarmBlob(repository string, d digest.Digest, at time.Time) ([]byte, bool) {
	if !t.believes(repository) {
		return nil, false
	}
	known, ok := t.members.Get(member{repository, d})
	if !ok || !known.Linked {
		return nil, false
	}
	w, ok := t.hot.get(known.Canonical)
	if !ok || known.Size >= 0 && known.Size != int64(len(w.body)) {
		return nil, false
	}
	if !at.IsZero() {
		t.AskedBlob(repository, known, at)
	}
	return w.body, true
}

// Manifest returns a manifest that belongs to a repository: because it was
// stored there, or, unless it is hosted, because an index stored there names it
// and its bytes are held for another repository. Bytes that do not match the digest count as
// absent, so that they are fetched again.
func (t *Tree) Manifest(ctx context.Context, repository string, d digest.Digest) (*Manifest, error) {
	if m, ok := t.Warm(repository, d, time.Time{}); ok {
		return m, nil
	}
	m, absent := t.linkedManifest(ctx, repository, d)
	// In a hosted one anybody who pushes could name what he may not read, and what
	// has been deleted would be back.
	if !errors.Is(absent, fs.ErrNotExist) || d.Algorithm() != digest.Canonical || t.isHosted(ctx, repository) {
		return m, absent
	}
	// Is it the child of an index? After a start that is not known before the
	// index has been read.
	if _, err := t.store.Stat(ctx, layout.Blob(d)); err != nil {
		return nil, err
	}
	known, _, err := t.named(ctx, repository, d, func(m Member) bool { return m.Child })
	if err != nil {
		return nil, err
	}
	if !known.Child {
		return nil, fmt.Errorf("manifest %s is not part of %s: %w", d, repository, absent)
	}
	return t.adopt(ctx, repository, d)
}

// adopt links a manifest whose bytes are held.
func (t *Tree) adopt(ctx context.Context, repository string, d digest.Digest) (*Manifest, error) {
	m, err := t.load(ctx, d, d) // before the locks: it may take a network
	if err != nil {
		return nil, err
	}
	leave, err := t.enter(ctx, repository)
	if err != nil {
		return nil, err
	}
	defer leave()
	defer t.lockDigest(d)()
	if _, err := t.store.Stat(ctx, layout.Blob(d)); err != nil {
		return nil, err
	}
	// Where there is no room for a link it is known for as long as there is
	// memory.
	t.manifested(ctx, &writing{tree: t}, repository, d, m, func() error { return nil })
	t.known(repository, m, d, t.hot.since(d))
	return m, nil
}

// lookAgain is how often the store is read again for what has been removed
// meanwhile, by the repository's guard. Nothing is read under the guard's lock, which
// others need: it may take a network.
const lookAgain = 3

// linkedManifest returns a manifest that was stored in the repository.
func (t *Tree) linkedManifest(ctx context.Context, repository string, d digest.Digest) (m *Manifest, err error) {
	key, g := layout.RevisionLink(repository, d), t.guards.of(repository)
	for range lookAgain {
		since := g.removals.Load()
		canonical, err := t.link(ctx, key)
		if err != nil {
			return nil, err
		}
		hotSince := t.hot.since(canonical)
		var held bool
		if m, held = t.hotManifest(d, canonical); !held || !t.Shared() { // whose links are read each time
			if m, err = t.load(ctx, d, canonical); err != nil {
				return nil, err
			}
		}
		g.mu.Lock()
		unchanged := g.removals.Load() == since
		if unchanged {
			t.remember(repository, m, canonical, hotSince)
		}
		g.mu.Unlock()
		if unchanged {
			break
		}
	}
	return m, nil
}

// load reads a manifest that lies under a digest.
func (t *Tree) load(ctx context.Context, d, canonical digest.Digest) (*Manifest, error) {
	key := layout.Blob(canonical)
	body, err := t.store.Get(ctx, key, oci.MaxStoredManifest)
	if err == nil && d.Algorithm().FromBytes(body) != d && t.drop(key) {
		body, err = t.store.Get(ctx, key, oci.MaxStoredManifest)
	}
	if errors.Is(err, storage.ErrTooLarge) {
		return nil, fmt.Errorf("%w: %s is no manifest: %w", fs.ErrNotExist, d, err)
	}
	if err != nil {
		return nil, err
	}
	if d.Algorithm().FromBytes(body) != d {
		if distant := t.store.Distant(); distant != nil {
			distant.Distrust(key) // so that what is fetched in its place is stored there
		}
		t.suspect(canonical)
		return nil, fmt.Errorf("the stored bytes of manifest %s are %w", d, ErrDamaged)
	}
	parsed, err := oci.ParseManifest(body)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is no manifest: %w", fs.ErrNotExist, d, err)
	}
	return newManifest(d, body, parsed), nil
}

// known remembers a manifest that belongs to a repository.
func (t *Tree) known(repository string, m *Manifest, canonical digest.Digest, hotSince uint64) {
	g := t.guards.of(repository)
	g.mu.Lock()
	defer g.mu.Unlock()
	t.remember(repository, m, canonical, hotSince)
}

// remember does so, and what the manifest makes a member. The repository's guard
// is held.
func (t *Tree) remember(repository string, m *Manifest, canonical digest.Digest, hotSince uint64) {
	t.learn(repository, m.Manifest)
	key := member{repository, m.Digest}
	if known, ok := t.revisions.Peek(key); !ok || known.canonical != canonical {
		t.revisions.Add(key, &revision{canonical: canonical})
	}
	w := &warm{body: m.Body}
	if m.Digest == canonical {
		w.manifest = m
	} else {
		w.other = m
	}
	t.hot.add(canonical, w, hotSince)
}

// learn remembers what a manifest makes a member. The repository's guard is held.
func (t *Tree) learn(repository string, m *oci.Manifest) {
	add := func(d v1.Descriptor, child bool) {
		key := member{repository, d.Digest}
		known, ok := t.members.Peek(key)
		switch {
		case !ok:
			known = Member{Canonical: canonicalOf(d.Digest), Size: d.Size, read: new(LastRead)}
		case known.Size < 0 && !known.disputed:
			known.Size = d.Size
		case d.Size >= 0 && known.Size != d.Size:
			// One of two manifests lies, and who knows which.
			known.Size, known.disputed = -1, true
		}
		known.Child = known.Child || child
		t.members.Add(key, known)
	}
	for _, d := range m.Blobs {
		add(d, false)
	}
	for _, d := range m.Children {
		add(d, true)
	}
}

func canonicalOf(d digest.Digest) digest.Digest {
	if d.Algorithm() == digest.Canonical {
		return d
	}
	return ""
}

// otherThan is the digest that content was asked for by, if that is not its
// canonical one.
func otherThan(canonical, d digest.Digest) digest.Digest {
	if d == canonical {
		return ""
	}
	return d
}

// absent reports whether it is certain that there is nothing under a key.
func (t *Tree) absent(ctx context.Context, key string) bool {
	_, err := t.store.Stat(ctx, key)
	return errors.Is(err, fs.ErrNotExist)
}

// Member reports whether a blob belongs to a repository: from memory, its links,
// and, unless it is hosted, the manifests stored there, in this order. What a hosted
// repository has not been given by a push or a mount, no manifest gives it: whoever
// pushes one can name anything.
func (t *Tree) Member(ctx context.Context, repository string, d digest.Digest) (Member, bool, error) {
	key := member{repository, d}
	shared := t.Shared()
	known, ok := t.members.Get(key)
	if ok && shared && t.isHosted(ctx, repository) {
		known, ok = Member{}, false
	}
	inherits := ok && known.Linked || !t.isHosted(ctx, repository)
	if ok && known.Canonical != "" && inherits {
		return known, true, nil
	}
	g := t.guards.of(repository)
	var canonical digest.Digest
	for range lookAgain {
		since := g.removals.Load()
		var err error
		canonical, err = t.link(ctx, layout.LayerLink(repository, d))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Member{}, false, err
		}
		linked := err == nil
		if !linked && !inherits {
			return Member{Size: -1}, false, nil
		}
		if !ok && inherits { // the manifests tell, and the size besides
			if known, ok, err = t.named(ctx, repository, d, func(Member) bool { return true }); err != nil {
				return Member{}, false, err
			}
		}
		if !linked {
			return known, ok, nil
		}
		g.mu.Lock()
		unchanged := g.removals.Load() == since
		if unchanged {
			known = t.linked(key, canonical)
		}
		g.mu.Unlock()
		if unchanged {
			return known, true, nil
		}
	}
	// Removals go on and on; it was linked a moment ago.
	return Member{Canonical: canonical, Size: -1, Linked: true, read: new(LastRead)}, true, nil
}

// linked remembers that a repository's link proves a member. The repository's
// guard is held.
func (t *Tree) linked(key member, canonical digest.Digest) Member {
	known, ok := t.members.Peek(key)
	if !ok {
		known = Member{Size: -1, read: new(LastRead)}
	}
	known.Canonical, known.Linked = canonical, true
	t.members.Add(key, known)
	return known
}

// named looks for content among what the manifests of a repository name, until
// it is as it should be. Without it, Size is -1.
func (t *Tree) named(ctx context.Context, repository string, d digest.Digest, is func(Member) bool) (Member, bool, error) {
	g := t.guards.of(repository)
	for range 3 {
		if known, ok := t.members.Get(member{repository, d}); ok && is(known) {
			return known, true, nil
		}
		since := g.removals.Load()
		if err := t.scan(ctx, repository); err != nil {
			return Member{Size: -1}, false, err
		}
		if known, ok := t.members.Get(member{repository, d}); ok && is(known) {
			return known, true, nil
		}
		// What a manifest names that has been removed meanwhile is forgotten, and
		// another may name it too.
		if g.removals.Load() == since && t.scanned.Contains(repository) {
			break
		}
	}
	return Member{Size: -1}, false, nil
}

// AddMember remembers a proof of membership that no link or manifest gives:
// the upstream's own.
func (t *Tree) AddMember(repository string, d digest.Digest, size int64) Member {
	m := Member{Canonical: canonicalOf(d), Size: size, read: new(LastRead)}
	t.members.Add(member{repository, d}, m)
	return m
}

// scan reads the manifests of a repository once, so that what they name is
// known. It stops at 5,000.
func (t *Tree) scan(ctx context.Context, repository string) error {
	if t.scanned.Contains(repository) {
		return nil
	}
	result := t.scans.DoChan(repository, func() (any, error) {
		if t.scanned.Contains(repository) {
			return nil, nil
		}
		// For everyone who waits, and not only for who came first.
		if !t.life.begin() {
			return nil, errClosed
		}
		defer t.life.wg.Done()
		ctx, cancel := context.WithTimeout(t.life.ctx, scanTimeout)
		defer cancel()
		g := t.guards.of(repository)
		since := g.removals.Load()
		if err := t.manifests(ctx, repository, func(*Manifest) {}); err != nil {
			return nil, err
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.removals.Load() == since {
			t.scanned.Add(repository, struct{}{})
		}
		return nil, nil
	})
	select {
	case r := <-result:
		return r.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Remember keeps a manifest that belongs to a repository in memory only.
func (t *Tree) Remember(repository string, d digest.Digest, body []byte) (*Manifest, error) {
	parsed, err := parse(d, body)
	if err != nil {
		return nil, err
	}
	m := newManifest(d, body, parsed)
	m.Unstored = true
	canonical := digest.FromBytes(body)
	t.known(repository, m, canonical, t.hot.since(canonical))
	return m, nil
}

// parse reads a manifest whose bytes must match the digest.
func parse(d digest.Digest, body []byte) (*oci.Manifest, error) {
	if d.Algorithm().FromBytes(body) != d {
		return nil, fmt.Errorf("a manifest of %d bytes does not match %s", len(body), d)
	}
	return oci.ParseManifest(body)
}

// manifests reads the manifests of a repository; reading one learns what it
// names.
func (t *Tree) manifests(ctx context.Context, repository string, visit func(*Manifest)) error {
	n := 0
	for info, err := range t.store.List(ctx, layout.Revisions(repository), true) {
		if err != nil {
			return err
		}
		d, ok := layout.DigestOf(info.Key)
		if !ok {
			continue
		}
		if n++; n > maxRevision {
			break
		}
		m, err := t.linkedManifest(ctx, repository, d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		visit(m)
	}
	return nil
}
