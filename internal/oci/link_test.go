package oci

import (
	"net/http"
	"net/url"
	"testing"
)

func TestNextLink(t *testing.T) {
	const asked = "https://r.example/v2/a/b/tags/list?n=2"
	for _, c := range []struct {
		name string
		link []string
		want string // "": none
	}{
		{"none", nil, ""},
		{"relative to the host", []string{`</v2/a/b/tags/list?n=2&last=x>; rel="next"`}, "https://r.example/v2/a/b/tags/list?n=2&last=x"},
		{"relative to the path", []string{`<list?last=x>; rel="next"`}, "https://r.example/v2/a/b/tags/list?last=x"},
		{"only a query", []string{`<?last=x>; rel="next"`}, "https://r.example/v2/a/b/tags/list?last=x"},
		{"absolute", []string{`<https://other.example/x?last=y>; rel="next"`}, "https://other.example/x?last=y"},
		{"unquoted", []string{`</x>; rel=next`}, "https://r.example/x"},
		{"any case", []string{`</x>; REL="Next"`}, "https://r.example/x"},
		{"no space", []string{`</x>;rel="next"`}, "https://r.example/x"},
		{"spaces", []string{`</x> ;  rel = "next"`}, "https://r.example/x"},
		{"other parameters", []string{`</x>; title="t"; rel="next"; type="application/json"`}, "https://r.example/x"},
		{"several in one line", []string{`</p>; rel="prev", </x>; rel="next", </l>; rel="last"`}, "https://r.example/x"},
		{"several lines", []string{`</p>; rel="prev"`, `</x>; rel="next"`}, "https://r.example/x"},
		{"comma in the address", []string{`</x?last=a,b>; rel="next"`}, "https://r.example/x?last=a,b"},
		{"quoted comma", []string{`</x>; title="a, b"; rel="next"`}, "https://r.example/x"},
		{"quoted comma in another", []string{`</p>; title="a, b"; rel="prev", </x>; rel="next"`}, "https://r.example/x"},
		{"quoted semicolon", []string{`</x>; title="a; b"; rel="next"`}, "https://r.example/x"},
		{"last page", []string{`</p>; rel="prev"`}, ""},
		{"rel is missing", []string{`</x>`}, ""},
		{"other rel", []string{`</x>; rel="nextcloud"`}, ""},
		{"not a link", []string{`next`, `<`, `</x`, `>; rel="next"`, ``}, ""},
		{"not an address", []string{`<http://[::1>; rel="next"`}, ""},
		{"next as a value of something else", []string{`</x>; title="next"`}, ""},
	} {
		from, err := url.Parse(asked)
		if err != nil {
			t.Fatal(err)
		}
		got := NextLink(http.Header{"Link": c.link}, from)
		if got == nil && c.want != "" || got != nil && got.String() != c.want {
			t.Errorf("%s: NextLink = %v, want %q", c.name, got, c.want)
		}
		if from.String() != asked {
			t.Errorf("%s: the asked address was changed to %s", c.name, from)
		}
	}
}

func TestSetNextLink(t *testing.T) {
	header := http.Header{}
	SetNextLink(header, "/v2/a/b/tags/list", url.Values{"n": {"2"}, "last": {"x&y>"}, "ns": {"docker.io"}})
	asked := &url.URL{Scheme: "https", Host: "mirror.example", Path: "/v2/a/b/tags/list"}
	next := NextLink(header, asked)
	if next == nil {
		t.Fatalf("our own Link %q cannot be read", header)
	}
	if next.Path != asked.Path || next.Host != asked.Host || next.Query().Get("last") != "x&y>" || next.Query().Get("n") != "2" || next.Query().Get("ns") != "docker.io" {
		t.Errorf("next is %s", next)
	}
}

func FuzzNextLink(f *testing.F) {
	f.Add(`</v2/a/b/tags/list?n=2&last=x>; rel="next"`)
	f.Add(`</p>; rel="prev", </x>; title="a, b"; rel=next`)
	f.Add(`<<>>;rel=next`)
	f.Add(`</x`)
	f.Add(`>;<`)
	f.Add(`<http://[::1>; rel="next"`)
	f.Fuzz(func(t *testing.T, line string) {
		asked := &url.URL{Scheme: "https", Host: "r.example", Path: "/v2/a/tags/list"}
		next := NextLink(http.Header{"Link": {line}}, asked)
		if next != nil && next.Scheme == "" {
			t.Errorf("NextLink(%q) = %q, which is not absolute", line, next)
		}
		if NextLink(http.Header{"Link": {line, line}}, asked) == nil && next != nil {
			t.Errorf("NextLink(%q) is not found when given twice", line)
		}
	})
}
