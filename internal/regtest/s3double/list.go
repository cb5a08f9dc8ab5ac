package s3double

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/xml"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

const listTime = "2006-01-02T15:04:05.000Z"

// number is a parameter that is a number, at most limit.
func number(call *Call, name string, standard, limit int) (int, error) {
	text := call.Query.Get(name)
	if text == "" {
		return standard, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		return 0, fail("InvalidArgument", "%s is not a number", name)
	}
	return min(n, limit), nil
}

// encoding is how keys are written in a listing. A slash stays one.
func encoding(call *Call) (func(string) string, error) {
	switch call.Query.Get("encoding-type") {
	case "":
		return func(key string) string { return key }, nil
	case "url":
		return func(key string) string { return strings.ReplaceAll(url.QueryEscape(key), "%2F", "/") }, nil
	}
	return nil, fail("InvalidArgument", "Invalid Encoding Method specified in Request")
}

// An item of a listing is an object or a common prefix.
type item struct {
	name   string
	order  string // by which it is sorted
	object *object
}

type listedObject struct {
	Key, LastModified, ETag string
	Size                    int64
	StorageClass            string
}

type listedPrefix struct{ Prefix string }

type listing struct {
	XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
	Name, Prefix          string
	Delimiter             string  `xml:",omitempty"`
	Marker                *string // V1
	NextMarker            string  `xml:",omitempty"` // V1
	StartAfter            string  `xml:",omitempty"`
	ContinuationToken     string  `xml:",omitempty"`
	NextContinuationToken string  `xml:",omitempty"`
	KeyCount              *int    // V2
	MaxKeys               int
	EncodingType          string `xml:",omitempty"`
	IsTruncated           bool
	Contents              []listedObject
	CommonPrefixes        []listedPrefix
}

func (s *Server) listObjects(call *Call, quirks Quirks) (answer, error) {
	v2 := call.Op == ListObjectsV2
	if v2 && quirks.V1Only {
		return answer{}, fail("NotImplemented", "list-type=2 is not implemented")
	}
	limit, err := number(call, "max-keys", s.opts.Page, s.opts.Page)
	if err != nil {
		return answer{}, err
	}
	encode, err := encoding(call)
	if err != nil {
		return answer{}, err
	}
	q := call.Query
	prefix, delimiter := q.Get("prefix"), q.Get("delimiter")
	result := listing{
		Name: call.Bucket, Prefix: encode(prefix), Delimiter: encode(delimiter), MaxKeys: limit, EncodingType: q.Get("encoding-type"),
	}
	after := q.Get("marker")
	if v2 {
		after = q.Get("start-after")
		result.StartAfter, result.ContinuationToken = encode(after), q.Get("continuation-token")
		if q.Has("continuation-token") {
			token, err := base64.StdEncoding.DecodeString(result.ContinuationToken)
			last, ok := strings.CutPrefix(string(token), "after ")
			if err != nil || !ok {
				return answer{}, fail("InvalidArgument", "The continuation token provided is incorrect")
			}
			after = last
		}
	} else {
		marker := encode(after)
		result.Marker = &marker
	}
	if quirks.StuckToken {
		after = ""
	}

	items := s.items(call.Bucket, prefix, delimiter, quirks.Unordered)
	rank := order(after, quirks.Unordered)
	var last string
	for _, item := range items {
		if after != "" && item.order <= rank {
			continue
		}
		if len(result.Contents)+len(result.CommonPrefixes) == limit {
			result.IsTruncated = limit > 0
			break
		}
		last = item.name
		if item.object == nil {
			result.CommonPrefixes = append(result.CommonPrefixes, listedPrefix{encode(item.name)})
			continue
		}
		result.Contents = append(result.Contents, listedObject{
			encode(item.name), item.object.modified.UTC().Format(listTime), item.object.etag, item.object.body.size, "STANDARD",
		})
	}
	if quirks.StuckToken {
		result.IsTruncated = true
	}
	if v2 {
		count := len(result.Contents) + len(result.CommonPrefixes)
		result.KeyCount = &count
		if result.IsTruncated {
			result.NextContinuationToken = base64.StdEncoding.EncodeToString([]byte("after " + last))
		}
	} else if result.IsTruncated && delimiter != "" {
		result.NextMarker = encode(last)
	}
	return document(http.StatusOK, result), nil
}

// order is the place of a name in a listing: its bytes, or for a place that does not
// sort, something that is always the same.
func order(name string, unordered bool) string {
	if !unordered {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return string(sum[:])
}

// items are what a listing tells, in its order.
func (s *Server) items(name, prefix, delimiter string, unordered bool) []item {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.buckets[name]
	objects := b.objects
	if b.listed != nil {
		objects = b.listed
	}
	var items []item
	seen := map[string]bool{}
	for key, o := range objects {
		below, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		if delimiter != "" {
			if i := strings.Index(below, delimiter); i >= 0 {
				if common := prefix + below[:i+len(delimiter)]; !seen[common] {
					seen[common] = true
					items = append(items, item{common, order(common, unordered), nil})
				}
				continue
			}
		}
		items = append(items, item{key, order(key, unordered), &o})
	}
	slices.SortFunc(items, func(a, b item) int { return strings.Compare(a.order, b.order) })
	return items
}

// lag makes listings stay as they are now, or ends that. s.mu is held, or nobody
// else has s.
func (s *Server) lag(on bool) {
	for _, b := range s.buckets {
		switch {
		case !on:
			b.listed = nil
		case b.listed == nil:
			b.listed = maps.Clone(b.objects)
		}
	}
}

// CatchUp lets listings that lag see what there is now.
func (s *Server) CatchUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.buckets {
		if b.listed != nil {
			b.listed = maps.Clone(b.objects)
		}
	}
}
