package module_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"testing"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestCatalogPages lists repositories with the catalog and by walking the store:
// the same, whatever the pages are, and with what has just been pulled.
func TestCatalogPages(t *testing.T) {
	for name, options := range map[string]string{
		"names as stored": "",
		"other prefixes":  "repository_prefix zzz/hub\n",
	} {
		t.Run(name, func(t *testing.T) {
			up := regtest.New(t, regtest.Options{})
			other := regtest.New(t, regtest.Options{})
			image := regtest.NewImage("x")
			opens = make(chan struct{})
			file, _ := catalogFile(t)
			m := startAdmin(t, "catalog slow "+file+"\n"+upstreamFor("docker.io", up, options)+upstreamFor("quay.io", other))
			var want []string
			for i := range 5 {
				up.Push(fmt.Sprint("library/r", i), image, "latest")
				m.pull(fmt.Sprint("library/r", i), "latest", image)
				other.Push(fmt.Sprint("o/r", i), image, "latest")
				m.pull(fmt.Sprint("quay.io/o/r", i), "latest", image)
				want = append(want, fmt.Sprint("docker.io/library/r", i), fmt.Sprint("quay.io/o/r", i))
			}
			slices.Sort(want)
			check := func(how string) {
				t.Helper()
				for n := 1; n <= 11; n++ {
					if got := m.listed(n); !slices.Equal(got, want) {
						t.Errorf("%s, %d a page: %q, want %q", how, n, got, want)
					}
				}
			}
			check("without the catalog")
			close(opens)
			m.complete()
			check("with the catalog")
			up.Push("library/r9", image, "latest")
			m.pull("library/r9", "latest", image)
			want = append(want, "docker.io/library/r9")
			slices.Sort(want)
			check("right after a pull")
		})
	}
}

// listed are the repositories of all pages.
func (m *mirror) listed(n int) (all []string) {
	m.t.Helper()
	for next := fmt.Sprint("/v2/_catalog?n=", n); next != ""; {
		a := m.want(200, "GET", next)
		var reply struct{ Repositories []string }
		if err := json.Unmarshal(a.body, &reply); err != nil || len(reply.Repositories) > n {
			m.t.Fatalf("%s: %v", a.body, err)
		}
		all, next = append(all, reply.Repositories...), ""
		base, _ := url.Parse(m.URL + "/v2/_catalog")
		if link := oci.NextLink(a.Header, base); link != nil {
			next = link.RequestURI()
		}
	}
	return all
}
