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

// begin starts an upload of key, and returns its ID, escaped.
func (c *client) begin(key string) string {
	c.t.Helper()
	res := c.want(200, "UploadId", "POST", "/bucket/"+key+"?uploads", "")
	var begun struct{ UploadId string }
	if err := xml.Unmarshal([]byte(res.body), &begun); err != nil || begun.UploadId == "" {
		c.t.Fatalf("%v: %s", err, res.body)
	}
	return url.QueryEscape(begun.UploadId)
}

func (c *client) part(key, id string, n int, data string) string {
	c.t.Helper()
	return c.want(200, "", "PUT", fmt.Sprintf("/bucket/%s?partNumber=%d&uploadId=%s", key, n, id), data).Header.Get("ETag")
}

func completion(tags ...string) string {
	var b strings.Builder
	b.WriteString("<CompleteMultipartUpload>")
	for i, tag := range tags {
		fmt.Fprintf(&b, "<Part><ETag>%s</ETag><PartNumber>%d</PartNumber></Part>", tag, i+1)
	}
	return b.String() + "</CompleteMultipartUpload>"
}

func TestMultipart(t *testing.T) {
	s := s3double.New(t, s3double.Options{MinPart: 10})
	c := newClient(t, s)
	id := c.begin("key")
	first := c.part("key", id, 1, "0123456789")
	c.part("key", id, 2, "another second part")
	second := c.part("key", id, 2, "abc")
	c.want(400, "InvalidArgument", "PUT", "/bucket/key?partNumber=0&uploadId="+id, "x")
	c.want(400, "InvalidArgument", "PUT", "/bucket/key?partNumber=10001&uploadId="+id, "x")
	c.want(404, "NoSuchUpload", "PUT", "/bucket/key?partNumber=1&uploadId=none", "x")
	c.want(404, "NoSuchUpload", "PUT", "/bucket/other?partNumber=1&uploadId="+id, "x")

	complete := "/bucket/key?uploadId=" + id
	c.want(400, "MalformedXML", "POST", complete, completion())
	c.want(400, "MalformedXML", "POST", complete, "nonsense")
	c.want(400, "InvalidPart<", "POST", complete, completion(first, first))
	c.want(400, "InvalidPart<", "POST", complete, strings.Replace(completion(first, second), ">2<", ">3<", 1))
	c.want(400, "InvalidPartOrder", "POST", complete, strings.Replace(completion(first, second), ">2<", ">1<", 1))
	c.want(400, "InvalidPart<", "POST", complete, strings.Replace(completion(first), "</ETag>", "</ETag><ChecksumCRC32>AAAAAA==</ChecksumCRC32>", 1))
	if len(s.Uploads()["key"]) != 1 || len(s.Keys("")) != 0 {
		t.Errorf("after failures: %q, %q", s.Uploads(), s.Keys(""))
	}
	res := c.want(200, "-2&#34;</ETag>", "POST", complete, completion(first, second))
	if !strings.Contains(res.body, "<Key>key</Key>") {
		t.Error(res.body)
	}
	c.want(200, "56789abc", "GET", "/bucket/key", "")
	if got := c.want(206, "89a", "GET", "/bucket/key", "", "Range", "bytes=8-10"); got.body != "89a" {
		t.Errorf("%q", got.body)
	}
	c.want(404, "NoSuchUpload", "POST", complete, completion(first, second))

	id = c.begin("key")
	tags := []string{c.part("key", id, 1, "short"), c.part("key", id, 2, "abc")}
	c.want(400, "EntityTooSmall", "POST", "/bucket/key?uploadId="+id, completion(tags...))
	c.want(204, "", "DELETE", "/bucket/key?uploadId="+id, "")
	c.want(404, "NoSuchUpload", "DELETE", "/bucket/key?uploadId="+id, "")
	c.want(404, "NoSuchUpload", "PUT", "/bucket/key?partNumber=1&uploadId="+id, "x")

	id = c.begin("key")
	s.Expire()
	c.want(404, "NoSuchUpload", "PUT", "/bucket/key?partNumber=1&uploadId="+id, "x")
}

func TestPartQuirks(t *testing.T) {
	s := s3double.New(t, s3double.Options{MinPart: 10, Quirks: s3double.Quirks{MaxParts: 2, EqualParts: true}})
	c := newClient(t, s)
	for _, parts := range []struct {
		first, second string
		status        int
	}{
		{"0123456789", "0123456789", 200}, {"0123456789", "x", 200}, {"0123456789", "0123456789x", 400},
	} {
		id := c.begin("key")
		tags := []string{c.part("key", id, 1, parts.first), c.part("key", id, 2, parts.second)}
		c.want(parts.status, "", "POST", "/bucket/key?uploadId="+id, completion(tags...))
	}
	s.Set(func(q *s3double.Quirks) { q.MaxParts = 3 })
	id := c.begin("key")
	tags := []string{c.part("key", id, 1, "0123456789"), c.part("key", id, 2, "0123456789x"), c.part("key", id, 3, "x")}
	c.want(400, "same length", "POST", "/bucket/key?uploadId="+id, completion(tags...))
	c.want(400, "between 1 and 3", "PUT", "/bucket/key?partNumber=4&uploadId="+id, "x")
}

func TestListParts(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	id := c.begin("key")
	for n := range 5 {
		c.part("key", id, n+1, "x")
	}
	type listed struct {
		IsTruncated          bool
		NextPartNumberMarker int
		Part                 []struct{ PartNumber int }
	}
	list := func(query string) (l listed, numbers []int) {
		t.Helper()
		res := c.want(200, "ListPartsResult", "GET", "/bucket/key?uploadId="+id+query, "")
		if err := xml.Unmarshal([]byte(res.body), &l); err != nil {
			t.Fatal(err)
		}
		for _, p := range l.Part {
			numbers = append(numbers, p.PartNumber)
		}
		return l, numbers
	}
	if l, numbers := list("&max-parts=2&part-number-marker=1"); !l.IsTruncated || l.NextPartNumberMarker != 3 || !slices.Equal(numbers, []int{2, 3}) {
		t.Errorf("%+v", l)
	}
	if l, numbers := list("&part-number-marker=3"); l.IsTruncated || !slices.Equal(numbers, []int{4, 5}) {
		t.Errorf("%+v", l)
	}
	s.Set(func(q *s3double.Quirks) { q.ShortParts = 3 })
	if l, numbers := list(""); l.IsTruncated || !slices.Equal(numbers, []int{1, 2, 3}) {
		t.Errorf("short: %+v", l)
	}
	s.Set(func(q *s3double.Quirks) { *q = s3double.Quirks{EndlessParts: true} })
	if l, _ := list("&part-number-marker=5"); !l.IsTruncated || l.NextPartNumberMarker != 0 || len(l.Part) != 5 {
		t.Errorf("endless: %+v", l)
	}
	s.Set(func(q *s3double.Quirks) { *q = s3double.Quirks{NoListParts: true} })
	c.want(501, "NotImplemented", "GET", "/bucket/key?uploadId="+id, "")
}

func TestListUploads(t *testing.T) {
	s := s3double.New(t, s3double.Options{Page: 2})
	c := newClient(t, s)
	for _, key := range []string{"p/a", "p/a", "p/b", "q", "p/a"} {
		c.begin(key)
	}
	type listed struct {
		IsTruncated                       bool
		NextKeyMarker, NextUploadIdMarker string
		Upload                            []struct{ Key, UploadId string }
	}
	var found []string
	for after := ""; ; {
		res := c.want(200, "", "GET", "/bucket?uploads&prefix=p%2F&encoding-type=url"+after, "")
		var l listed
		if err := xml.Unmarshal([]byte(res.body), &l); err != nil {
			t.Fatal(err)
		}
		for _, u := range l.Upload {
			found = append(found, u.Key)
		}
		if !l.IsTruncated {
			break
		}
		after = "&key-marker=" + l.NextKeyMarker + "&upload-id-marker=" + url.QueryEscape(l.NextUploadIdMarker)
	}
	if !slices.Equal(found, []string{"p/a", "p/a", "p/a", "p/b"}) {
		t.Errorf("%q", found)
	}
}

// A body of zeros takes neither memory nor room, and others lie in files.
func TestLargeBodies(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	c := newClient(t, s)
	zeros := strings.Repeat("\x00", 9<<20)
	c.want(200, "", "PUT", "/bucket/zeros", zeros)
	c.want(200, "", "PUT", "/bucket/ends", zeros+"end")
	if got := c.want(206, "end", "GET", "/bucket/ends", "", "Range", "bytes=-5"); got.body != "\x00\x00end" {
		t.Errorf("%q", got.body)
	}
	if got := c.do("GET", "/bucket/zeros", ""); got.body != zeros {
		t.Errorf("%d bytes", len(got.body))
	}
	s.Spoil("ends")
	if got := c.do("GET", "/bucket/ends", ""); got.body == zeros+"end" || len(got.body) != len(zeros)+3 {
		t.Errorf("%d bytes, and they may be right", len(got.body))
	}
}
