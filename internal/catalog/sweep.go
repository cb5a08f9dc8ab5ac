package catalog

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/tree"
)

// What is here is for comparing and cleaning the whole store: nothing that is
// asked often.

// RepositoryNames returns up to n names of repositories, of those too that are
// known by a pin only, in their order, after a name.
func (c *Catalog) RepositoryNames(ctx context.Context, after string, n int) ([]string, error) {
	return c.names(ctx, "SELECT name FROM repositories WHERE name > ? ORDER BY name LIMIT ?", after, n)
}

// Mirrored returns up to n names of mirrored repositories in their order, after
// a name.
func (c *Catalog) Mirrored(ctx context.Context, after string, n int) ([]string, error) {
	return c.names(ctx, "SELECT name FROM repositories WHERE present = 1 AND class = ? AND name > ? ORDER BY name LIMIT ?",
		string(tree.Mirrored), after, n)
}

// IsMirrored reports whether a repository is known, and as a mirrored one.
func (c *Catalog) IsMirrored(ctx context.Context, repository string) (mirrored bool, err error) {
	err = c.read(ctx, func(r *reader) error {
		var one int
		mirrored, err = r.one("SELECT 1 FROM repositories WHERE name = ? AND present = 1 AND class = ?", []any{repository, string(tree.Mirrored)}, &one)
		return err
	})
	return mirrored, err
}

// Empty returns up to n names of recorded repositories, in their order, after a
// name, that were created before a time, and of which nothing is held; of mirrored
// ones nothing but links that are [Catalog.Loose]. Nothing is pinned in them.
func (c *Catalog) Empty(ctx context.Context, before time.Time, after string, n int) ([]string, error) {
	return c.names(ctx, `SELECT name FROM repositories r
		WHERE r.present = 1 AND r.manifests = 0 AND r.tags = 0 AND r.pins = 0 AND (r.created > 0 OR r.class = ?) AND r.created < ? AND r.name > ?
		AND NOT EXISTS (SELECT 1 FROM members m JOIN blobs b ON b.id = m.blob
			WHERE m.repository = r.id AND m.linked = 1 AND (r.class <> ? OR b.stored >= ? OR b.touched >= ?))
		ORDER BY r.name LIMIT ?`,
		string(tree.Mirrored), seconds(before), after, string(tree.Mirrored), seconds(before), seconds(before), n)
}

func (c *Catalog) names(ctx context.Context, query string, args ...any) (names []string, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each(query, args, func(scan func(...any) error) error {
			var name string
			err := scan(&name)
			names = append(names, name)
			return err
		})
	})
	return names, err
}

// A Link is a blob that a repository has for no manifest.
type Link struct {
	Digest digest.Digest
	// Frees is how many bytes nothing refers to any more without this link and
	// its like. Of several links to one blob one has them.
	Frees int64
}

// Loose returns up to n links of a repository of a class, after one, to blobs that
// no manifest there names, and that were stored and last read before a time.
func (c *Catalog) Loose(ctx context.Context, repository string, class tree.Class, before time.Time, after digest.Digest, n int) (links []Link, err error) {
	// What holds a blob besides such links: a repository that nobody has recorded
	// keeps its own.
	const held = `b.tags > 0 OR b.manifests > 0 OR EXISTS (SELECT 1 FROM members o WHERE o.blob = b.id AND o.named > 0)
		OR b.hosted > 0 AND EXISTS (SELECT 1 FROM members o JOIN repositories s ON s.id = o.repository WHERE o.blob = b.id AND s.class = ? AND s.created = 0)`
	const first = `m.repository = (SELECT MIN(o.repository) FROM members o WHERE o.blob = b.id)`
	err = c.read(ctx, func(r *reader) error {
		return r.each(`SELECT b.digest, CASE WHEN (`+held+`) OR NOT `+first+` THEN 0 ELSE b.size END
			FROM repositories r JOIN members m ON m.repository = r.id JOIN blobs b ON b.id = m.blob
			WHERE r.name = ? AND r.class = ? AND m.blob > COALESCE((SELECT a.id FROM blobs a WHERE a.digest = ?), 0)
			AND m.linked = 1 AND m.manifest = 0 AND m.named = 0 AND b.stored > 0 AND b.stored < ? AND b.touched < ?
			ORDER BY m.blob LIMIT ?`,
			[]any{string(tree.Hosted), repository, string(class), []byte(pack(after)), seconds(before), seconds(before), n},
			func(scan func(...any) error) error {
				var raw []byte
				var link Link
				err := scan(&raw, &link.Frees)
				link.Digest = unpack(raw)
				links = append(links, link)
				return err
			})
	})
	return links, err
}

// Unlinked returns up to n blobs, after one, that are stored and that manifests
// of a repository name, and that have no link there.
func (c *Catalog) Unlinked(ctx context.Context, repository string, after digest.Digest, n int) (blobs []digest.Digest, err error) {
	err = c.read(ctx, func(r *reader) error {
		return r.each(`SELECT b.digest FROM repositories r JOIN members m ON m.repository = r.id JOIN blobs b ON b.id = m.blob
			WHERE r.name = ? AND m.blob > COALESCE((SELECT a.id FROM blobs a WHERE a.digest = ?), 0)
			AND m.linked = 0 AND m.manifest = 0 AND m.named > 0 AND b.stored > 0 AND b.manifests = 0
			ORDER BY m.blob LIMIT ?`,
			[]any{repository, []byte(pack(after)), n},
			func(scan func(...any) error) error {
				var raw []byte
				err := scan(&raw)
				blobs = append(blobs, unpack(raw))
				return err
			})
	})
	return blobs, err
}
