package catalog

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Root is what is evicted as a whole: a tag, or a manifest without a tag,
// without an index that names it and without a subject that is held.
type Root struct {
	Repository string
	Tag        string // "" of an untagged manifest
	Digest     digest.Digest
	Read       time.Time
}

// Coldest returns up to n evictable roots, those longest unread first, of one
// upstream or with "" of all. Hosted and pinned ones are not evictable. With a
// time that is not zero only those last read before.
func (c *Catalog) Coldest(ctx context.Context, upstream string, before time.Time, n int) (roots []Root, err error) {
	err = c.read(ctx, func(r *reader) error {
		scopes, err := r.scopes(upstream)
		if err != nil {
			return err
		}
		limit := int64(math.MaxInt64)
		if !before.IsZero() {
			limit = before.Unix()
		}
		for _, scope := range scopes {
			for _, query := range []string{
				"SELECT r.name, t.name, b.digest, t.touched FROM tags t JOIN repositories r ON r.id = t.repository JOIN blobs b ON b.id = t.blob WHERE t.scope = ? AND t.touched < ? ORDER BY t.touched LIMIT ?",
				"SELECT r.name, '', b.digest, m.touched FROM manifests m JOIN repositories r ON r.id = m.repository JOIN blobs b ON b.id = m.blob WHERE m.scope = ? AND m.touched < ? ORDER BY m.touched LIMIT ?",
			} {
				err := r.each(query, []any{scope, limit, n}, func(scan func(...any) error) error {
					var root Root
					var raw []byte
					var read int64
					err := scan(&root.Repository, &root.Tag, &raw, &read)
					root.Digest, root.Read = unpack(raw), fromSeconds(read)
					roots = append(roots, root)
					return err
				})
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	slices.SortStableFunc(roots, func(a, b Root) int {
		return cmp.Or(a.Read.Compare(b.Read), cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.Tag, b.Tag), cmp.Compare(a.Digest, b.Digest))
	})
	return roots[:min(n, len(roots))], err
}

// scopes returns the id of an upstream, or with "" those of all.
func (r *reader) scopes(upstream string) (ids []int64, err error) {
	query, args := "SELECT id FROM upstreams WHERE name = ?", []any{upstream}
	if upstream == "" {
		query, args = "SELECT id FROM upstreams", nil
	}
	err = r.each(query, args, func(scan func(...any) error) error {
		var id int64
		err := scan(&id)
		ids = append(ids, id)
		return err
	})
	return ids, err
}

// A Removal is what nobody needs any more without a root.
type Removal struct {
	Root
	// Manifests belong to the repository for no other tag, index or subject,
	// and are not pinned: the root's own first.
	Manifests []digest.Digest
	// Links are blobs that no other manifest of the repository names.
	Links []digest.Digest
	// Blobs are those of both that nothing else in the store refers to, and
	// Bytes what they take.
	Blobs []digest.Digest
	Bytes int64
}

// A part is a blob that a removal may take along.
type part struct {
	digest               digest.Digest
	size, stored         int64
	rows                 int64 // of members, in the whole store
	tags                 int64 // in the whole store
	linked, manifest     bool  // in the repository
	named, parents, mean int64 // in the repository: by manifests; those it goes with; tags
	without              int64 // of named, those that go
	left                 int64 // of parents and mean, those that stay
	goes                 bool  // as a manifest
}

// Removal says what goes with a root: nothing, if it is not there.
func (c *Catalog) Removal(ctx context.Context, root Root) (Removal, error) {
	removal := Removal{Root: root}
	err := c.read(ctx, func(r *reader) error { return r.removal(&removal) })
	return removal, err
}

func (r *reader) removal(removal *Removal) error {
	var repository, pins, first int64
	if ok, err := r.one("SELECT id, pins FROM repositories WHERE name = ?", []any{removal.Repository}, &repository, &pins); !ok {
		return err
	}
	query, args := "SELECT id FROM blobs WHERE digest = ?", []any{[]byte(pack(removal.Digest))}
	if removal.Tag != "" {
		query = "SELECT b.id FROM blobs b JOIN tags t ON t.blob = b.id WHERE b.digest = ? AND t.repository = ? AND t.name = ?"
		args = append(args, repository, removal.Tag)
	}
	if ok, err := r.one(query, args, &first); !ok {
		return err
	}
	parts := map[int64]*part{}
	load := func(id int64) (*part, error) {
		if p := parts[id]; p != nil {
			return p, nil
		}
		p, err := r.part(repository, id)
		parts[id] = p
		return p, err
	}
	goes := func(p *part) (bool, error) {
		if !p.manifest || p.left > 0 || p.goes {
			return false, nil
		}
		if pins > 0 {
			var n int
			pinned, err := r.one("SELECT 1 FROM pins WHERE repository = ? AND name = ?", []any{repository, p.digest.String()}, &n)
			if pinned || err != nil {
				return false, err
			}
		}
		p.goes = true
		return true, nil
	}
	top, err := load(first)
	if err != nil {
		return err
	}
	if removal.Tag != "" {
		top.left--
		top.tags--
	}
	var order []int64 // what may go, some more than once
	var queue []int64
	if ok, err := goes(top); err != nil {
		return err
	} else if ok {
		queue = append(queue, first)
	}
	for len(queue) > 0 {
		id := queue[0]
		queue = queue[1:]
		p := parts[id]
		order = append(order, id)
		removal.Manifests = append(removal.Manifests, p.digest)
		children, err := r.ids("SELECT child FROM edges WHERE parent = ? ORDER BY kind, child", id)
		if err != nil {
			return err
		}
		for _, id := range children {
			child, err := load(id)
			if err != nil {
				return err
			}
			child.left--
			if ok, err := goes(child); err != nil {
				return err
			} else if ok {
				queue = append(queue, id)
			}
		}
		names, err := r.ids("SELECT blob FROM layers WHERE manifest = ? UNION SELECT child FROM edges WHERE parent = ? AND kind = 1", id, id)
		if err != nil {
			return err
		}
		for _, id := range names {
			named, err := load(id)
			if err != nil {
				return err
			}
			named.without++
			order = append(order, id)
		}
	}
	done := map[int64]bool{}
	for _, id := range order {
		p := parts[id]
		if done[id] {
			continue
		}
		done[id] = true
		if p.named > p.without {
			continue
		}
		if p.linked {
			removal.Links = append(removal.Links, p.digest)
		}
		if p.stored > 0 && p.rows == 1 && p.tags == 0 && (p.goes || !p.manifest && p.linked) {
			removal.Blobs = append(removal.Blobs, p.digest)
			removal.Bytes += p.size
		}
	}
	return nil
}

func (r *reader) part(repository, id int64) (*part, error) {
	p := &part{}
	var raw []byte
	_, err := r.one("SELECT digest, size, stored, members, tags FROM blobs WHERE id = ?", []any{id}, &raw, &p.size, &p.stored, &p.rows, &p.tags)
	if err != nil {
		return nil, err
	}
	p.digest = unpack(raw)
	if _, err = r.one("SELECT linked, manifest, named FROM members WHERE repository = ? AND blob = ?", []any{repository, id}, &p.linked, &p.manifest, &p.named); err != nil {
		return nil, err
	}
	if p.manifest {
		_, err = r.one("SELECT parents, tags FROM manifests WHERE repository = ? AND blob = ?", []any{repository, id}, &p.parents, &p.mean)
		p.left = p.parents + p.mean
	}
	return p, err
}

func (r *reader) ids(query string, args ...any) (ids []int64, err error) {
	err = r.each(query, args, func(scan func(...any) error) error {
		var id int64
		err := scan(&id)
		ids = append(ids, id)
		return err
	})
	return ids, err
}

// ColdestBlobs returns up to n blobs that repositories hold, that are no
// manifests, belong to no hosted repository and to no pinned root, those longest
// unread first, of one upstream or with "" of all.
func (c *Catalog) ColdestBlobs(ctx context.Context, upstream string, n int) (blobs []Blob, err error) {
	err = c.read(ctx, func(r *reader) error {
		kept, err := r.pinned()
		if err != nil || n <= 0 {
			return err
		}
		query, args := "", []any(nil)
		if upstream != "" {
			scopes, err := r.scopes(upstream)
			if err != nil || len(scopes) == 0 {
				return err
			}
			query, args = " AND EXISTS (SELECT 1 FROM uses u WHERE u.blob = b.id AND u.upstream = ?)", []any{scopes[0]}
		}
		query = "SELECT " + blobFields + ", b.id FROM blobs b WHERE b.cold >= 0 AND b.hosted = 0 AND b.holders > 0" + query + " ORDER BY b.cold"
		err = r.each(query, args, func(scan func(...any) error) error {
			var id int64
			blob, err := scanBlob(scan, &id)
			if err != nil || kept[id] {
				return err
			}
			if blobs = append(blobs, blob); len(blobs) >= n {
				return errEnough
			}
			return nil
		})
		if errors.Is(err, errEnough) {
			return nil
		}
		return err
	})
	return blobs, err
}

// errEnough ends the reading of rows.
var errEnough = errors.New("enough")

// below are the manifests of a repository that a manifest brings along: itself,
// and those that an index names.
const below = `WITH RECURSIVE below (blob) AS (
	SELECT blob FROM manifests WHERE repository = ? AND blob = ?
	UNION
	SELECT m.blob FROM below JOIN edges e ON e.parent = below.blob AND e.kind = 1 JOIN manifests m ON m.repository = ? AND m.blob = e.child
) `

// pinned returns the blobs that pinned roots name.
func (r *reader) pinned() (map[int64]bool, error) {
	var roots []pair
	for _, query := range []string{
		"SELECT t.repository, t.blob FROM pins p JOIN tags t ON t.repository = p.repository AND t.name = p.name",
		"SELECT m.repository, m.blob FROM pins p JOIN manifests m ON m.repository = p.repository WHERE m.pinned = 1",
	} {
		err := r.each(query, nil, func(scan func(...any) error) error {
			var root pair
			err := scan(&root.a, &root.b)
			roots = append(roots, root)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	kept := map[int64]bool{}
	for _, root := range roots {
		ids, err := r.ids(below+"SELECT l.blob FROM below JOIN layers l ON l.manifest = below.blob", root.a, root.b, root.a)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			kept[id] = true
		}
	}
	return kept, nil
}
