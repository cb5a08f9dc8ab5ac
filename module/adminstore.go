package module

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/retain"
	"github.com/caddy-registry/mirror/internal/tree"
)

// usage is what something takes, in bytes.
type usage struct {
	Repositories int64 `json:"repositories"`
	Tags         int64 `json:"tags"`
	Manifests    int64 `json:"manifests"`
	Blobs        int64 `json:"blobs"`
	Bytes        int64 `json:"bytes"`
	Allocated    int64 `json:"allocated"`
}

// storeStatus is how a store is kept.
type storeStatus struct {
	Store     string          `json:"store"`
	Usage     usage           `json:"usage"`
	MaxSize   int64           `json:"max_size,omitempty"`
	Partial   int64           `json:"partial"`
	Reserved  int64           `json:"reserved"`
	Upstreams []upstreamUsed  `json:"upstreams"`
	Hosted    []hostedUsed    `json:"hosted,omitempty"`
	Catalog   string          `json:"catalog"`
	Complete  time.Time       `json:"complete,omitzero"`
	Evicted   evicted         `json:"evicted"`
	LastGC    *retain.Job     `json:"last_gc,omitempty"`
	LastScrub time.Time       `json:"last_scrub,omitzero"`
	Damaged   []retain.Damage `json:"damaged"`
	Webhooks  []webhookStatus `json:"webhooks,omitempty"`
	// Backing is absent where there are no backing images.
	Backing *backingUsed `json:"backing_images,omitempty"`
	// Off is why nothing is deleted, while another process uses the store.
	Off string `json:"off,omitempty"`
	// Distant is absent of a store that is on a local disk.
	Distant *distantStatus `json:"distant,omitempty"`
}

// distantStatus is how it stands with the distant place, such as a bucket, where a
// store has its values.
type distantStatus struct {
	Pending      int64     `json:"pending"`
	PendingBytes int64     `json:"pending_bytes"`
	Oldest       time.Time `json:"oldest,omitzero"`
	Near         int64     `json:"near"`
	NearSize     int64     `json:"near_size,omitempty"`
	Unavailable  time.Time `json:"unavailable,omitzero"`
	Trouble      string    `json:"trouble,omitempty"`
	Listed       bool      `json:"listed"`
	Others       []string  `json:"others,omitempty"`
}

// webhookStatus is how a webhook does since it was configured in this process.
type webhookStatus struct {
	Name      string `json:"name"`
	Pending   int    `json:"pending"`
	Bytes     int64  `json:"bytes"`
	Delivered int64  `json:"delivered"`
	Failed    int64  `json:"failed"`
	Dropped   int64  `json:"dropped"`
	Trouble   string `json:"trouble,omitempty"`
}

type upstreamUsed struct {
	Name    string  `json:"name"`
	Bytes   int64   `json:"bytes"`
	MaxSize int64   `json:"max_size,omitempty"`
	TTL     float64 `json:"ttl_seconds,omitempty"`
}

// hostedUsed is what a hosted pattern with a max_size takes.
type hostedUsed struct {
	Pattern string `json:"pattern"`
	Bytes   int64  `json:"bytes"`
	MaxSize int64  `json:"max_size"`
}

type evicted struct {
	Roots int64 `json:"images"`
	Blobs int64 `json:"blobs"`
	Bytes int64 `json:"bytes"`
}

func showStatus(r *http.Request, in *visit) (any, error) {
	if _, err := readQuery(r); err != nil {
		return nil, err
	}
	in.settle(r.Context())
	return in.storeStatus(r.Context())
}

func (in *visit) storeStatus(ctx context.Context) (storeStatus, error) {
	kept, err := in.keeper.Status(ctx)
	if err != nil {
		return storeStatus{}, unlisted(err)
	}
	status := storeStatus{
		Store:     in.app.state.identity,
		Usage:     usage(kept.Usage),
		MaxSize:   kept.MaxSize,
		Partial:   kept.Partial,
		Reserved:  kept.Reserved,
		Upstreams: []upstreamUsed{},
		Catalog:   kept.Catalog,
		Complete:  kept.Complete,
		Evicted:   evicted(kept.Evicted),
		LastGC:    kept.LastGC,
		LastScrub: kept.LastScrub,
		Damaged:   append([]retain.Damage{}, kept.Damaged...),
		Off:       kept.Off,
	}
	if b := kept.Distant; b != nil {
		status.Distant = &distantStatus{
			Pending: b.Pending, PendingBytes: b.PendingBytes, Oldest: b.Oldest, Near: b.NearBytes, NearSize: b.CacheBytes,
			Listed: b.Listed, Others: b.Others,
		}
		if b.Err != nil {
			status.Distant.Unavailable, status.Distant.Trouble = b.Since, b.Err.Error()
		}
	}
	if status.Backing, err = in.backingUsed(ctx); err != nil {
		return storeStatus{}, err
	}
	for _, webhook := range in.sender.Status() {
		status.Webhooks = append(status.Webhooks, webhookStatus(webhook))
	}
	for _, used := range kept.Hosted {
		status.Hosted = append(status.Hosted, hostedUsed(used))
	}
	for name, used := range kept.Upstreams {
		status.Upstreams = append(status.Upstreams, upstreamUsed{name, used.Bytes, used.MaxSize, used.TTL.Seconds()})
	}
	slices.SortFunc(status.Upstreams, func(a, b upstreamUsed) int { return strings.Compare(a.Name, b.Name) })
	return status, nil
}

// settle has written down what was pulled before this request, if that does not
// take long.
func (in *visit) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settlePatience)
	defer cancel()
	// Where it fails, what is listed is a little older, and the log says why.
	_ = in.keeper.Flush(ctx)
}

const settlePatience = 2 * time.Second

// listing is the catalog, if it can be read now.
func (in *visit) listing(ctx context.Context) (*catalog.Catalog, error) {
	in.settle(ctx)
	c, err := in.keeper.Catalog()
	if err != nil {
		return nil, apiError(http.StatusServiceUnavailable, "nothing can be listed now: %v", err)
	}
	return c, nil
}

// repositoryPage is a part of the list of repositories.
type repositoryPage struct {
	Repositories []repositoryLine `json:"repositories"`
	// Next is what to ask for after: absent on the last page.
	Next string `json:"next,omitempty"`
	// Partial says that the catalog is being made again, and there may be more.
	Partial bool `json:"partial,omitempty"`
}

type repositoryLine struct {
	Name     string     `json:"name"`
	Class    tree.Class `json:"class"`
	Upstream string     `json:"upstream,omitempty"`
	Created  time.Time  `json:"created,omitzero"`
	Usage    usage      `json:"usage"`
}

func lineOf(r catalog.Repository) repositoryLine {
	return repositoryLine{r.Name, r.Class, r.Upstream, r.Created, usage(r.Usage)}
}

// partial reports whether the catalog may lack something.
func (in *visit) partial(ctx context.Context) (bool, error) {
	kept, err := in.keeper.Status(ctx)
	return kept.Complete.IsZero(), err
}

// holds reports whether a repository has a tag.
func holds(ctx context.Context, c *catalog.Catalog, repository string) (bool, error) {
	found, err := c.Tags(ctx, repository, "", 1)
	return len(found) > 0, err
}

// unlisted is for an error of the catalog's.
func unlisted(err error) error {
	return apiError(http.StatusServiceUnavailable, "the catalog cannot be read: %v; pulls do not need it, and `caddy registry reindex` makes it again", err)
}

// asked reads what is asked of a page, with these parameters at most, and returns
// the catalog that has it.
func (in *visit) asked(r *http.Request, parameters ...string) (url.Values, page, *catalog.Catalog, error) {
	query, err := readQuery(r, parameters...)
	if err != nil {
		return nil, page{}, nil, err
	}
	p, err := readPage(query)
	if err != nil {
		return nil, page{}, nil, err
	}
	c, err := in.listing(r.Context())
	return query, p, c, err
}

func listRepositories(r *http.Request, in *visit) (any, error) {
	query, p, c, err := in.asked(r, "containing", "after", "n")
	if err != nil {
		return nil, err
	}
	list := repositoryPage{Repositories: []repositoryLine{}}
	found, err := c.Repositories(r.Context(), query.Get("containing"), p.after, p.n)
	if err == nil {
		list.Partial, err = in.partial(r.Context())
	}
	if err != nil {
		return nil, unlisted(err)
	}
	for _, repository := range found {
		list.Repositories = append(list.Repositories, lineOf(repository))
	}
	if len(found) == p.n {
		list.Next = found[p.n-1].Name
	}
	return list, nil
}

// tagPage is a part of the list of a repository's tags.
type tagPage struct {
	Repository string    `json:"repository"`
	Tags       []tagLine `json:"tags"`
	Next       string    `json:"next,omitempty"`
	Partial    bool      `json:"partial,omitempty"`
}

type tagLine struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest"`
	Since  time.Time     `json:"since,omitzero"`
	Read   time.Time     `json:"read,omitzero"`
	Pinned bool          `json:"pinned,omitempty"`
	Bytes  int64         `json:"bytes"`
}

func listTags(r *http.Request, in *visit) (any, error) {
	query, p, c, err := in.asked(r, "repository", "after", "n")
	if err != nil {
		return nil, err
	}
	name, err := in.repository(r.Context(), c, query.Get("repository"))
	if err != nil {
		return nil, err
	}
	list := tagPage{Repository: name, Tags: []tagLine{}}
	found, err := c.Tags(r.Context(), name, p.after, p.n)
	if err == nil {
		list.Partial, err = in.partial(r.Context())
	}
	if err != nil {
		return nil, unlisted(err)
	}
	for _, tag := range found {
		list.Tags = append(list.Tags, tagLine(tag))
	}
	if len(found) == p.n {
		list.Next = found[p.n-1].Name
	}
	return list, nil
}

// repository is the stored name of what a person calls a repository: as the list
// of repositories has it, or else as it stands after docker pull.
func (in *visit) repository(ctx context.Context, c *catalog.Catalog, name string) (string, error) {
	if name == "" {
		return "", apiError(http.StatusBadRequest, `"repository" is empty; name one such as alpine`)
	}
	switch held, err := holds(ctx, c, name); {
	case err != nil:
		return "", unlisted(err)
	case held:
		return name, nil
	}
	target, _, err := in.app.upstreams.Find(name)
	if err != nil {
		return "", explain(err, "")
	}
	switch held, err := holds(ctx, c, target.Repository); {
	case err != nil:
		return "", unlisted(err)
	case !held:
		return "", apiError(http.StatusNotFound, "no tag is held of %s", target.Repository)
	}
	return target.Repository, nil
}

// pinLine is something that is never evicted.
type pinLine struct {
	Repository string    `json:"repository"`
	Reference  string    `json:"reference"`
	Since      time.Time `json:"since,omitzero"` // absent of what was unpinned
}

type pinPage struct {
	Pins []pinLine `json:"pins"`
	Next string    `json:"next,omitempty"`
}

// name is a pin as one word, by which pins are in order.
func (p pinLine) name() string {
	if strings.Contains(p.Reference, ":") {
		return p.Repository + "@" + p.Reference
	}
	return p.Repository + ":" + p.Reference
}

func listPins(r *http.Request, in *visit) (any, error) {
	query, err := readQuery(r, "after", "n")
	if err != nil {
		return nil, err
	}
	p, err := readPage(query)
	if err != nil {
		return nil, err
	}
	var all []pinLine
	for pin, err := range in.tree.Pins(r.Context(), "") {
		if err != nil {
			return nil, explain(err, "")
		}
		if line := (pinLine{pin.Repository, pin.Reference, pin.Since}); line.name() > p.after {
			all = append(all, line)
		}
	}
	slices.SortFunc(all, func(a, b pinLine) int { return strings.Compare(a.name(), b.name()) })
	list := pinPage{Pins: append([]pinLine{}, all[:min(p.n, len(all))]...)}
	if len(all) > p.n {
		list.Next = all[p.n-1].name()
	}
	return list, nil
}

func pin(r *http.Request, in *visit) (any, error) {
	reference, err := namedIn(r)
	if err != nil {
		return nil, err
	}
	target, ref, err := in.find(r.Context(), reference)
	if err != nil {
		return nil, err
	}
	line := pinLine{target.Repository, cmp.Or(ref.Tag, string(ref.Digest)), time.Now().UTC().Truncate(time.Second)}
	if err := in.tree.Pin(r.Context(), line.Repository, ref, line.Since); err != nil {
		return nil, explain(err, line.name())
	}
	return line, nil
}

func unpin(r *http.Request, in *visit) (any, error) {
	query, err := readQuery(r, "reference")
	if err != nil {
		return nil, err
	}
	target, ref, err := in.find(r.Context(), query.Get("reference"))
	if err != nil {
		return nil, err
	}
	line := pinLine{Repository: target.Repository, Reference: cmp.Or(ref.Tag, string(ref.Digest))}
	was, err := in.tree.Unpin(r.Context(), target.Repository, ref)
	switch {
	case err != nil:
		return nil, explain(err, line.name())
	case !was:
		return nil, apiError(http.StatusNotFound, "%s is not pinned", line.name())
	}
	return line, nil
}
