package mirror

import (
	"cmp"
	"context"
	"encoding/json"
	"iter"
	"slices"
	"strconv"
	"strings"
)

const (
	searchPage = 25  // results, unless the client says how many
	maxSearch  = 100 // as docker search has it
	maxQuery   = 256 // bytes
)

// searchPing tells docker search that it may search here, with the credentials
// it has for this host.
func (x *exchange) searchPing() error {
	x.w.Header().Set("X-Docker-Registry-Standalone", "true")
	return x.json([]byte(`{"standalone":true}`))
}

// searchAnswer is what docker search and podman search read (the API of
// index.docker.io, /v1/search).
type searchAnswer struct {
	Pages    int            `json:"num_pages"`
	Total    int            `json:"num_results"`
	PageSize int            `json:"page_size"`
	Page     int            `json:"page"`
	Query    string         `json:"query"`
	Results  []searchResult `json:"results"`
}

type searchResult struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Stars       int    `json:"star_count"`
	Official    bool   `json:"is_official"`
	Automated   bool   `json:"is_automated"`
	rank        int
}

// search finds what is held here by its name, for a caller who may pull it. No
// registry is asked: most of them have nothing to be asked.
func (x *exchange) search() error {
	query := x.r.URL.Query()
	q := strings.ToLower(strings.TrimSpace(query.Get("q")))
	if len(q) > maxQuery {
		return fail(badPage, "q= is longer than any name")
	}
	n, err := searchNumber(query.Get("n"), searchPage)
	if err != nil {
		return err
	}
	n = min(n, maxSearch)
	page, err := searchNumber(query.Get("page"), 1)
	if err != nil {
		return err
	}
	ctx := x.r.Context()
	answer := searchAnswer{PageSize: n, Page: page, Query: query.Get("q"), Results: []searchResult{}}
	var found []searchResult
	seen := 0
	for repository, err := range x.searched(ctx, q) {
		if err != nil {
			return err
		}
		if seen++; seen > maxCatalog {
			x.w.Header().Set("Warning", `299 - "there are more repositories than could be searched"`)
			break
		}
		name, up, ok := x.site.address(repository)
		if !ok {
			continue
		}
		result := searchResult{Name: name, Description: "hosted here"}
		short := name
		if up != nil {
			short = strings.TrimPrefix(name, up.PathName+"/")
			result.Description = "mirrored from " + up.Name
			if up.Name == "docker.io" {
				short, result.Official = strings.CutPrefix(short, "library/")
			}
		}
		if result.rank = rank(name, short, q); result.rank == 0 || !x.sees(ctx, name, repository, up) {
			continue
		}
		found = append(found, result)
	}
	slices.SortFunc(found, func(a, b searchResult) int {
		return cmp.Or(cmp.Compare(b.rank, a.rank), strings.Compare(a.Name, b.Name))
	})
	answer.Total = len(found)
	answer.Pages = (len(found) + n - 1) / n
	if first := (page - 1) * n; first < len(found) {
		answer.Results = append(answer.Results, found[first:min(first+n, len(found))]...)
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	x.cached(hit)
	return x.json(body)
}

func searchNumber(text string, none int) (int, error) {
	if text == "" {
		return none, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > 1_000_000 {
		return 0, fail(badPage, "%s is not a number of results or of a page", printable(text))
	}
	if n == 0 {
		n = none // podman asks for none if it is told of no limit
	}
	return n, nil
}

// rank is how well a name answers a query: 0 is not at all. The short name is
// what people call it who know whose it is.
func rank(name, short, q string) int {
	last := short[strings.LastIndexByte(short, '/')+1:]
	switch {
	case q == "":
		return 1
	case name == q || short == q:
		return 5
	case last == q:
		return 4
	case strings.HasPrefix(name, q) || strings.HasPrefix(short, q):
		return 3
	case strings.HasPrefix(last, q):
		return 2
	case strings.Contains(name, q):
		return 1
	}
	return 0
}

// searched yields the stored repositories that may answer a query.
func (x *exchange) searched(ctx context.Context, q string) iter.Seq2[string, error] {
	c := x.mirror.catalog(ctx)
	if c == nil {
		return x.mirror.tree.Repositories(ctx)
	}
	if !x.site.upstreams.asStored() {
		q = "" // the catalog knows other names than those that are searched
	}
	return cataloged(ctx, c, q, "")
}
