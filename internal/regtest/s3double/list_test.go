package s3double_test

import (
	"encoding/xml"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

type page struct {
	IsTruncated                       bool
	NextContinuationToken, NextMarker string
	KeyCount                          int
	Contents                          []struct {
		Key  string
		Size int64
	}
	CommonPrefixes []struct{ Prefix string }
}

func (p page) names() (names []string) {
	for _, o := range p.Contents {
		names = append(names, o.Key)
	}
	for _, o := range p.CommonPrefixes {
		names = append(names, o.Prefix)
	}
	return names
}

func (c *client) page(query string) page {
	c.t.Helper()
	res := c.want(200, "ListBucketResult", "GET", "/bucket?"+query, "")
	var p page
	if err := xml.Unmarshal([]byte(res.body), &p); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// list reads all pages.
func (c *client) list(query string) (names []string) {
	c.t.Helper()
	next := ""
	for {
		p := c.page(query + next)
		names = append(names, p.names()...)
		if !p.IsTruncated {
			return names
		}
		switch {
		case p.NextContinuationToken != "":
			next = "&continuation-token=" + url.QueryEscape(p.NextContinuationToken)
		case p.NextMarker != "":
			next = "&marker=" + url.QueryEscape(p.NextMarker)
		default:
			next = "&marker=" + url.QueryEscape(names[len(names)-1])
		}
		if len(names) > 1000 {
			c.t.Fatal("the listing does not end")
		}
	}
}

func TestList(t *testing.T) {
	s := s3double.New(t, s3double.Options{Page: 2})
	c := newClient(t, s)
	for _, key := range []string{"a/1", "a/2", "a/b/3", "a/b/4", "a-b", "z", "a/c/d/5"} {
		s.Write(key, []byte(key))
	}
	for _, unordered := range []bool{false, true} {
		s.Set(func(q *s3double.Quirks) { q.Unordered = unordered })
		for _, version := range []string{"list-type=2", ""} {
			for query, want := range map[string]string{
				"":                       "a-b a/1 a/2 a/b/3 a/b/4 a/c/d/5 z",
				"&prefix=a%2F":           "a/1 a/2 a/b/3 a/b/4 a/c/d/5",
				"&delimiter=%2F":         "a-b a/ z",
				"&prefix=a/&delimiter=/": "a/1 a/2 a/b/ a/c/",
				"&prefix=none/":          "",
				"&max-keys=1":            "a-b a/1 a/2 a/b/3 a/b/4 a/c/d/5 z",
			} {
				got := c.list(version + query)
				if !unordered && strings.Contains(query, "delimiter") == false && !slices.IsSorted(got) {
					t.Errorf("%s%s is not in order: %q", version, query, got)
				}
				slices.Sort(got)
				if strings.Join(got, " ") != want {
					t.Errorf("%s%s (unordered %v): %q, want %s", version, query, unordered, got, want)
				}
			}
		}
	}
	if p := c.page("list-type=2"); p.KeyCount != 2 || p.Contents[0].Size == 0 {
		t.Errorf("%+v", p)
	}
	if p := c.page(""); p.NextMarker != "" || !p.IsTruncated {
		t.Errorf("V1 without a delimiter names the next marker: %+v", p)
	}
	c.want(400, "InvalidArgument", "GET", "/bucket?list-type=2&continuation-token=x", "")
}

func TestListEncoding(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	s.Write("a/b c+d\x01é", nil)
	if got := c.list("list-type=2&encoding-type=url"); !slices.Equal(got, []string{"a/b+c%2Bd%01%C3%A9"}) {
		t.Errorf("%q", got)
	}
	c.want(400, "InvalidArgument", "GET", "/bucket?encoding-type=rot13", "")
}

func TestListQuirks(t *testing.T) {
	s := s3double.New(t, s3double.Options{Quirks: s3double.Quirks{LaggingList: true}})
	c := newClient(t, s)
	c.want(200, "", "PUT", "/bucket/a", "x")
	c.want(200, "x", "GET", "/bucket/a", "")
	if got := c.list("list-type=2"); got != nil {
		t.Errorf("a listing that lags tells of %q", got)
	}
	s.CatchUp()
	c.want(204, "", "DELETE", "/bucket/a", "")
	if got := c.list("list-type=2"); !slices.Equal(got, []string{"a"}) {
		t.Errorf("a listing that lags does not tell of what was deleted: %q", got)
	}
	s.Set(func(q *s3double.Quirks) { *q = s3double.Quirks{V1Only: true} })
	c.want(501, "NotImplemented", "GET", "/bucket?list-type=2", "")
	if got := c.list(""); got != nil {
		t.Errorf("%q", got)
	}
	s.Set(func(q *s3double.Quirks) { *q = s3double.Quirks{StuckToken: true} })
	for n := range 3 {
		s.Write(fmt.Sprint(n), nil)
	}
	first := c.page("list-type=2&max-keys=2")
	second := c.page("list-type=2&max-keys=2&continuation-token=" + url.QueryEscape(first.NextContinuationToken))
	if !second.IsTruncated || second.NextContinuationToken != first.NextContinuationToken || !slices.Equal(first.names(), second.names()) {
		t.Errorf("the token goes on: %+v, %+v", first, second)
	}
}

func TestDeleteObjects(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	s.Write("a", nil)
	s.Write("b", nil)
	body := "<Delete><Object><Key>a</Key></Object><Object><Key>none</Key></Object></Delete>"
	c.want(400, "InvalidRequest", "POST", "/bucket?delete", body)
	c.want(200, "<Deleted><Key>none</Key></Deleted>", "POST", "/bucket?delete", body, "Content-MD5", md5sum(body))
	if keys := s.Keys(""); !slices.Equal(keys, []string{"b"}) {
		t.Errorf("%q are left", keys)
	}
}
