package module

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// usageReport is what takes how much.
type usageReport struct {
	Store   usage `json:"store"`
	MaxSize int64 `json:"max_size,omitempty"`
	// Upstreams are in the order of their names; the one without a name is what
	// is hosted.
	Upstreams []upstreamUsage `json:"upstreams"`
	// Repositories are the largest first.
	Repositories []repositoryLine `json:"repositories"`
	Partial      bool             `json:"partial,omitempty"`
	// Near is what of it is on the local disk, where the store is not. It has what
	// is on its way to the store, too.
	Near *nearUsage `json:"near,omitempty"`
}

type nearUsage struct {
	Bytes   int64 `json:"bytes"`
	MaxSize int64 `json:"max_size,omitempty"`
}

type upstreamUsage struct {
	Name    string `json:"name"`
	Usage   usage  `json:"usage"`
	MaxSize int64  `json:"max_size,omitempty"`
}

func showUsage(r *http.Request, in *visit) (any, error) {
	_, p, c, err := in.asked(r, "n")
	if err != nil {
		return nil, err
	}
	kept, err := in.keeper.Status(r.Context())
	if err != nil {
		return nil, unlisted(err)
	}
	report := usageReport{
		Store: usage(kept.Usage), MaxSize: kept.MaxSize, Partial: kept.Complete.IsZero(),
		Upstreams: []upstreamUsage{}, Repositories: []repositoryLine{},
	}
	if b := kept.Distant; b != nil {
		report.Near = &nearUsage{b.NearBytes, b.CacheBytes}
	}
	upstreams, err := c.Upstreams(r.Context())
	if err != nil {
		return nil, unlisted(err)
	}
	for name, used := range upstreams {
		report.Upstreams = append(report.Upstreams, upstreamUsage{name, usage(used), kept.Upstreams[name].MaxSize})
	}
	slices.SortFunc(report.Upstreams, func(a, b upstreamUsage) int { return strings.Compare(a.Name, b.Name) })
	largest, err := c.Largest(r.Context(), p.n)
	if err != nil {
		return nil, unlisted(err)
	}
	for _, repository := range largest {
		report.Repositories = append(report.Repositories, lineOf(repository))
	}
	return report, nil
}

// explanation is how a pull of a reference would be answered, and what the catalog
// knows of what it means.
type explanation struct {
	mirror.Why
	Held *heldReport `json:"held,omitempty"`
	// History is what a tag that is held has meant, the latest first.
	History []tree.TagEvent `json:"history,omitempty"`
}

// heldReport is what the catalog knows of something that is held.
type heldReport struct {
	Digest digest.Digest `json:"digest"`
	Since  time.Time     `json:"since,omitzero"`
	Read   time.Time     `json:"read,omitzero"`
	Pinned bool          `json:"pinned,omitempty"`
	// Evictable says that it may be evicted; Before how many images go before
	// it, up to 10,000; and Frees what that would free.
	Evictable bool  `json:"evictable"`
	Before    int64 `json:"before,omitempty"`
	Frees     int64 `json:"frees,omitempty"`
	Bytes     int64 `json:"bytes"`
}

func explainReference(r *http.Request, in *visit) (any, error) {
	query, err := readQuery(r, "reference")
	if err != nil {
		return nil, err
	}
	target, ref, err := in.find(r.Context(), query.Get("reference"))
	if err != nil {
		return nil, err
	}
	var why explanation
	if why.Why, err = in.mirror.Why(r.Context(), target, ref); err != nil {
		return nil, explain(err, why.Reference)
	}
	if ref.Tag != "" {
		if why.History, err = in.tree.History(r.Context(), target.Repository, ref.Tag); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, explain(err, why.Reference)
		}
	}
	// Without a catalog there is still something to say.
	if c, err := in.listing(r.Context()); err == nil {
		if why.Held, err = heldIn(r.Context(), c, target.Repository, ref); err != nil {
			return nil, unlisted(err)
		}
	}
	return why, nil
}

func heldIn(ctx context.Context, c *catalog.Catalog, repository string, ref oci.Reference) (*heldReport, error) {
	held, ok, err := c.Held(ctx, repository, ref)
	if err != nil || !ok {
		return nil, err
	}
	report := heldReport{held.Digest, held.Since, held.Read, held.Pinned, held.Evictable, held.Before, 0, held.Bytes}
	if held.Evictable {
		removal, err := c.Removal(ctx, catalog.Root{Repository: repository, Tag: ref.Tag, Digest: held.Digest, Read: held.Read})
		if err != nil {
			return nil, err
		}
		report.Frees = removal.Bytes
	}
	return &report, nil
}
