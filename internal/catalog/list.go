package catalog

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// A Repository as the catalog knows it.
type Repository struct {
	Name     string
	Class    tree.Class // tree.Hosted if it has no record
	Upstream string
	Created  time.Time
	Usage    Usage // of Repositories only
}

// Repositories returns up to n repositories in the order of their names, after
// a name, whose name contains a text.
func (c *Catalog) Repositories(ctx context.Context, containing, after string, n int) (repositories []Repository, err error) {
	query, args := "", []any{after}
	if containing != "" {
		query, args = " AND INSTR(r.name, ?) > 0", append(args, containing)
	}
	query = "SELECT r.name, r.class, u.name, r.created, r.tags, r.manifests, r.blobs, r.bytes, r.blocks, r.extra FROM repositories r JOIN upstreams u ON u.id = r.upstream WHERE r.name > ? AND r.present = 1" + query + " ORDER BY r.name LIMIT ?"
	err = c.read(ctx, func(r *reader) error {
		return r.each(query, append(args, n), func(scan func(...any) error) error {
			v := counts{repositories: 1}
			var repository Repository
			var created int64
			err := scan(&repository.Name, &repository.Class, &repository.Upstream, &created, &v.tags, &v.manifests, &v.blobs, &v.bytes, &v.blocks, &v.extra)
			repository.Created, repository.Usage = fromSeconds(created), v.usage()
			repositories = append(repositories, repository)
			return err
		})
	})
	return repositories, err
}

// Owners returns the repositories that a blob belongs to, up to n of them,
// hosted ones first.
func (c *Catalog) Owners(ctx context.Context, d digest.Digest, n int) (repositories []Repository, err error) {
	err = c.read(ctx, func(r *reader) error {
		raw, err := r.raw(d)
		if err != nil {
			return err
		}
		return r.each("SELECT r.name, r.class, u.name, r.created FROM blobs b JOIN members m ON m.blob = b.id JOIN repositories r ON r.id = m.repository JOIN upstreams u ON u.id = r.upstream WHERE b.digest = ? ORDER BY r.class, r.name LIMIT ?",
			[]any{raw, n}, func(scan func(...any) error) error {
				var repository Repository
				var created int64
				err := scan(&repository.Name, &repository.Class, &repository.Upstream, &created)
				repository.Created = fromSeconds(created)
				repositories = append(repositories, repository)
				return err
			})
	})
	return repositories, err
}

// A Tag as the catalog knows it.
type Tag struct {
	Name   string
	Digest digest.Digest
	Since  time.Time
	Read   time.Time
	Pinned bool // itself, or the manifest it means
	// Bytes are those of its manifests and blobs that are held.
	Bytes int64
}

// Tags returns up to n tags of a repository in the order of their names, after
// a name.
func (c *Catalog) Tags(ctx context.Context, repository, after string, n int) (tags []Tag, err error) {
	err = c.read(ctx, func(r *reader) error {
		var id int64
		if ok, err := r.one("SELECT id FROM repositories WHERE name = ?", []any{repository}, &id); !ok {
			return err
		}
		var blobs []int64
		err := r.each("SELECT t.name, b.digest, t.since, t.touched, t.pinned + t.kept, t.blob FROM tags t JOIN blobs b ON b.id = t.blob WHERE t.repository = ? AND t.name > ? ORDER BY t.name LIMIT ?",
			[]any{id, after, n}, func(scan func(...any) error) error {
				var tag Tag
				var raw []byte
				var since, read, pinned, blob int64
				err := scan(&tag.Name, &raw, &since, &read, &pinned, &blob)
				tag.Digest, tag.Since, tag.Read, tag.Pinned = unpack(raw), fromSeconds(since), fromSeconds(read), pinned > 0
				tags, blobs = append(tags, tag), append(blobs, blob)
				return err
			})
		if err != nil {
			return err
		}
		sizes := map[int64]int64{} // many tags mean one manifest
		for i, blob := range blobs {
			size, ok := sizes[blob]
			if !ok {
				if _, err := r.one(below+`SELECT COALESCE(SUM(size), 0) FROM blobs WHERE stored > 0 AND id IN (
					SELECT blob FROM below UNION SELECT l.blob FROM below JOIN layers l ON l.manifest = below.blob)`, []any{id, blob, id}, &size); err != nil {
					return err
				}
				sizes[blob] = size
			}
			tags[i].Bytes = size
		}
		return nil
	})
	return tags, err
}

// Names are what is known of a repository, for comparing with the store.
type Names struct {
	Tags      map[string]digest.Digest
	Manifests map[digest.Digest]bool
	Links     map[digest.Digest]bool
	Pins      map[string]bool // tags and digests
}

// Names returns all that is known of a repository.
func (c *Catalog) Names(ctx context.Context, repository string) (Names, error) {
	names := Names{map[string]digest.Digest{}, map[digest.Digest]bool{}, map[digest.Digest]bool{}, map[string]bool{}}
	err := c.read(ctx, func(r *reader) error {
		var id int64
		if ok, err := r.one("SELECT id FROM repositories WHERE name = ?", []any{repository}, &id); !ok {
			return err
		}
		err := r.each("SELECT t.name, b.digest FROM tags t JOIN blobs b ON b.id = t.blob WHERE t.repository = ?", []any{id}, func(scan func(...any) error) error {
			var name string
			var raw []byte
			err := scan(&name, &raw)
			names.Tags[name] = unpack(raw)
			return err
		})
		if err != nil {
			return err
		}
		err = r.each("SELECT b.digest, m.linked, m.manifest FROM members m JOIN blobs b ON b.id = m.blob WHERE m.repository = ?", []any{id}, func(scan func(...any) error) error {
			var raw []byte
			var linked, manifest bool
			err := scan(&raw, &linked, &manifest)
			if linked {
				names.Links[unpack(raw)] = true
			}
			if manifest {
				names.Manifests[unpack(raw)] = true
			}
			return err
		})
		if err != nil {
			return err
		}
		return r.each("SELECT name FROM pins WHERE repository = ?", []any{id}, func(scan func(...any) error) error {
			var name string
			err := scan(&name)
			names.Pins[name] = true
			return err
		})
	})
	return names, err
}
