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

// Removal says what goes with a root: nothing, if it is not there.
func (c *Catalog) Removal(ctx context.Context, root Root) (Removal, error) {
	removal := Removal{Root: root}
	err := c.read(ctx, func(r *reader) error { return r.removal(&removal) })
	return removal, err
}

// A part is a blob that a removal may take along.
type part struct {
	digest           digest.Digest
	size, stored     int64
	members, tags    int64 // in the whole store
	linked, manifest bool  // in the repository
	pinned           bool
	named            int64 // by manifests of the repository that stay
	parents          int64 // and tags that stay
	lost             bool  // a manifest that goes names it
	goes             bool  // as a manifest
}

// free says whether a manifest has nothing left that it belongs to.
func (p *part) free() bool { return p.manifest && !p.pinned && p.parents == 0 && !p.goes }

func (p *part) lose() { p.named, p.lost = p.named-1, true }

func (r *reader) removal(removal *Removal) error {
	var repository int64
	if ok, err := r.one("SELECT id FROM repositories WHERE name = ?", []any{removal.Repository}, &repository); !ok {
		return err
	}
	parts := map[int64]*part{}
	var order []int64 // of parts
	load := func(from, where string, args []any, each func(id, kind int64)) error {
		return r.each("SELECT b.id, b.digest, b.size, b.stored, b.members, b.tags, COALESCE(m.linked, 0), COALESCE(m.manifest, 0), COALESCE(m.named, 0), COALESCE(x.parents + x.tags, 0), COALESCE(x.pinned, 0), "+
			from+" LEFT JOIN members m ON m.repository = ? AND m.blob = b.id LEFT JOIN manifests x ON x.repository = ? AND x.blob = b.id WHERE "+where,
			append([]any{repository, repository}, args...), func(scan func(...any) error) error {
				p := &part{}
				var id, kind int64
				var raw []byte
				if err := scan(&id, &raw, &p.size, &p.stored, &p.members, &p.tags, &p.linked, &p.manifest, &p.named, &p.parents, &p.pinned, &kind); err != nil {
					return err
				}
				if p.digest = unpack(raw); parts[id] == nil {
					parts[id], order = p, append(order, id)
				}
				each(id, kind)
				return nil
			})
	}
	var queue []int64
	raw, err := r.raw(removal.Digest)
	if err != nil {
		return err
	}
	if err := load("0 FROM blobs b", "b.digest = ?", []any{raw}, func(id, _ int64) { queue = append(queue, id) }); err != nil || len(queue) == 0 {
		return err
	}
	top := parts[queue[0]]
	if removal.Tag != "" {
		var n int
		if ok, err := r.one("SELECT 1 FROM tags WHERE repository = ? AND name = ? AND blob = ?", []any{repository, removal.Tag, queue[0]}, &n); !ok {
			return err
		}
		top.tags--
		if top.manifest {
			top.parents--
		}
	}
	if !top.free() {
		return nil
	}
	top.goes = true
	for len(queue) > 0 {
		id := queue[0]
		queue = queue[1:]
		removal.Manifests = append(removal.Manifests, parts[id].digest)
		err := load("e.kind FROM edges e JOIN blobs b ON b.id = e.child", "e.parent = ? ORDER BY e.kind, e.child", []any{id}, func(child, kind int64) {
			p := parts[child]
			if kind == isIndex {
				p.lose()
			}
			if p.parents--; p.free() {
				p.goes = true
				queue = append(queue, child)
			}
		})
		if err == nil {
			err = load("0 FROM layers l JOIN blobs b ON b.id = l.blob", "l.manifest = ?", []any{id}, func(layer, _ int64) { parts[layer].lose() })
		}
		if err != nil {
			return err
		}
	}
	for _, id := range order {
		p := parts[id]
		if p.named > 0 || !p.lost && !p.goes {
			continue
		}
		if p.linked {
			removal.Links = append(removal.Links, p.digest)
		}
		// Nothing is left of it here; and it had but one row, which is here.
		if p.stored > 0 && p.members == 1 && p.tags == 0 && (p.goes || !p.manifest && p.linked) {
			removal.Blobs = append(removal.Blobs, p.digest)
			removal.Bytes += p.size
		}
	}
	return nil
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
