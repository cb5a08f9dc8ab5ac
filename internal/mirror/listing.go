package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"iter"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/upstream"
)

const (
	maxPage    = 1000   // entries of a page; ECR refuses to be asked for more
	maxCatalog = 50_000 // repositories looked at for one page
	// catalogPage is how many repositories are asked of the catalog at once.
	catalogPage = 200
	// maxHostedTags are on a page of hosted tags whose size the client does not
	// say, about 1 MiB.
	maxHostedTags = 10_000
)

// page reads n and last. n is -1 where it is absent.
func (x *exchange) page() (n int, last string, err error) {
	query := x.r.URL.Query()
	n, last = -1, query.Get("last")
	if text := query.Get("n"); text != "" {
		if n, err = strconv.Atoi(text); err != nil || n < 0 {
			return 0, "", fail(badPage, "n=%s is not a number of entries", printable(text))
		}
		n = min(n, maxPage)
	}
	return n, last, nil
}

// more tells the client where the next page is.
func (x *exchange) more(n int, last string) {
	query := x.r.URL.Query()
	query.Del("last")
	query.Set("last", last)
	if n > 0 {
		query.Set("n", strconv.Itoa(n))
	}
	oci.SetNextLink(x.w.Header(), x.r.URL.Path, query)
}

// tags answers with the upstream's tags and those that are held; when the
// upstream cannot be asked, with those that are held.
func (x *exchange) tags(ctx context.Context) error {
	n, last, err := x.page()
	if err != nil {
		return err
	}
	if x.target.Upstream == nil {
		return x.hostedTags(ctx, n, last)
	}
	held, err := x.mirror.tree.Tags(ctx, x.target.Repository)
	if err != nil && !x.mirror.away(x.target, err) {
		return err
	}
	held = slices.DeleteFunc(held, func(tag string) bool {
		if tag <= last {
			return true
		}
		state, ok, err := x.mirror.known(ctx, x.target, tag)
		return err == nil && ok && state.standing(x.mirror.now(), x.target.Upstream) >= gone
	})
	sort.Strings(held)
	var tags []string
	var more bool
	if n != 0 {
		tags, more, err = x.upstreamTags(ctx, n, last)
		var refusal *upstream.Error
		switch {
		case err == nil:
			x.cached(miss)
			// registry:2 before 2.8.3 and others pay no heed to n and last, and
			// send everything each time: then the paging is ours.
			if slices.Contains(tags, last) || n > 0 && len(tags) > n {
				more = false
				tags = slices.DeleteFunc(tags, func(tag string) bool { return tag <= last })
				sort.Strings(tags)
			}
			tags = merge(tags, held, more)
		case errors.As(err, &refusal) && (refusal.Kind == upstream.NotFound || refusal.Kind == upstream.Unauthorized):
			return &failure{situation: unknownName, message: err.Error(), err: err}
		case len(held) > 0:
			x.cached(stale)
			tags = held
			x.w.Header().Set("Warning", `299 - "`+warning("only tags that are held: "+err.Error())+`"`)
		default:
			return err
		}
	}
	if n >= 0 && len(tags) > n {
		tags, more = tags[:n], n > 0
	}
	return x.sendTags(tags, n, more)
}

// hostedTags answers with the tags of a hosted repository, in the order of their
// bytes. One whose tags have all been removed still exists: its list is empty, as
// the spec wants of a repository that is found, and only one in which there is
// nothing is unknown.
func (x *exchange) hostedTags(ctx context.Context, n int, last string) error {
	repository := x.target.Repository
	if exists, err := x.mirror.tree.Exists(ctx, repository); err != nil {
		return err
	} else if !exists {
		return fail(unknownName, "nothing has been pushed to the hosted repository %s", repository)
	}
	var tags []string
	more := false
	if n != 0 {
		held, err := x.mirror.tree.Tags(ctx, repository)
		if err != nil {
			return err
		}
		sort.Strings(held)
		most := n
		if n < 0 {
			most = maxHostedTags
		}
		after, found := slices.BinarySearch(held, last)
		if found {
			after++
		}
		certain := x.mirror.tree.Shared() // see Tags
		for _, tag := range held[after:] {
			// A process that died while it removed a tag has left something of it.
			if !certain {
				switch _, err := x.mirror.tree.Tag(ctx, repository, tag); {
				case errors.Is(err, fs.ErrNotExist):
					continue
				case err != nil:
					return err
				}
			}
			if more = len(tags) == most; more {
				break
			}
			tags = append(tags, tag)
		}
	}
	x.cached(hit)
	return x.sendTags(tags, n, more)
}

// sendTags sends a page of tags.
func (x *exchange) sendTags(tags []string, n int, more bool) error {
	if more && len(tags) > 0 {
		x.more(n, tags[len(tags)-1])
	}
	body, err := json.Marshal(struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{x.route.Name, append([]string{}, tags...)})
	if err != nil {
		return err
	}
	return x.json(body)
}

type tagPage struct {
	tags []string
	more bool
}

func (x *exchange) upstreamTags(ctx context.Context, n int, last string) ([]string, bool, error) {
	t := x.target
	key := "tags " + t.Repository + " " + strconv.Itoa(n) + " " + last
	page, err := share(ctx, x.mirror, key, func(ctx context.Context) (tagPage, error) {
		tags, more, err := t.Upstream.Client.Tags(ctx, t.Name, max(n, 0), last)
		return tagPage{tags, more}, err
	})
	return slices.Clone(page.tags), page.more, err
}

// merge adds what is held to a page of the upstream's. Where pages follow, only
// what sorts before the page's end belongs on it; a registry that does not sort
// gets what is held at its very end.
func merge(page, held []string, more bool) []string {
	sorted := slices.IsSorted(page)
	if more && (!sorted || len(page) == 0) {
		return page
	}
	seen := make(map[string]bool, len(page))
	for _, tag := range page {
		seen[tag] = true
	}
	merged := page
	for _, tag := range held {
		if !seen[tag] && (!more || tag < page[len(page)-1]) {
			merged = append(merged, tag)
		}
	}
	if sorted {
		sort.Strings(merged)
	}
	return merged
}

// catalog returns the catalog if it has everything that is stored, or nil: it has
// only what this process has stored.
func (m *Mirror) catalog(ctx context.Context) *catalog.Catalog {
	if m.complete == nil || m.tree.Shared() {
		return nil
	}
	return m.complete(ctx)
}

// catalog lists what is held and the caller may pull, under the names by which
// this site answers.
func (x *exchange) catalog() error {
	n, last, err := x.page()
	if err != nil {
		return err
	}
	if n < 0 {
		n = 100
	}
	ctx := x.r.Context()
	var names []string
	seen := 0
	stored, inOrder := x.mirror.tree.Repositories(ctx), false
	if c := x.mirror.catalog(ctx); c != nil {
		after := ""
		if inOrder = x.site.upstreams.asStored(); inOrder {
			after = last
		}
		stored = cataloged(ctx, c, "", after)
	}
	for repository, err := range stored {
		if err != nil {
			return err
		}
		if seen++; seen > maxCatalog {
			x.w.Header().Set("Warning", `299 - "there are more repositories than could be listed"`)
			break
		}
		if name, ok := x.visible(ctx, repository); ok && name > last {
			names = append(names, name)
		}
		if inOrder && len(names) > n {
			break
		}
	}
	sort.Strings(names)
	if len(names) > n {
		names = names[:n]
		if n > 0 {
			x.more(n, names[n-1])
		}
	}
	body, err := json.Marshal(struct {
		Repositories []string `json:"repositories"`
	}{append([]string{}, names...)})
	if err != nil {
		return err
	}
	x.cached(hit)
	return x.json(body)
}

// cataloged yields the repositories after a name that have a manifest, and a text
// in their names, in the order of those.
func cataloged(ctx context.Context, c *catalog.Catalog, containing, after string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for after := after; ; {
			page, err := c.Repositories(ctx, containing, after, catalogPage)
			if err != nil {
				yield("", err)
				return
			}
			for _, repository := range page {
				after = repository.Name
				if (repository.Usage.Manifests > 0 || repository.Usage.Tags > 0) && !yield(after, nil) {
					return
				}
			}
			if len(page) < catalogPage {
				return
			}
		}
	}
}

// address is the name by which a stored repository can be asked for at this
// site, and whose it is; nil: the site's own.
func (s *Site) address(repository string) (string, *Upstream, bool) {
	if s.hosts(repository) {
		return repository, nil, true
	}
	if entry := s.upstreams.owner(repository); entry != nil {
		host := entry.Name
		name := entry.PathName + strings.TrimPrefix(repository, entry.Prefix)
		if entry.Client == nil { // a wildcard's: stored under the host itself
			host, _, _ = strings.Cut(repository, "/")
			name = repository
		}
		if !s.permits(entry, host) {
			return "", nil, false
		}
		up, err := s.upstreams.concrete(entry, host)
		return name, up, err == nil
	}
	for _, up := range s.upstreams.byName {
		if up.Client != nil && up.Prefix == "" {
			return up.PathName + "/" + repository, up, s.permits(up, up.Name)
		}
	}
	return "", nil, false
}
