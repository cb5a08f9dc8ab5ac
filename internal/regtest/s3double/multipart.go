package s3double

import (
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxParts is how many parts an upload may have everywhere.
const maxParts = 10_000

type upload struct {
	id, key, kind string
	begun         time.Time
	parts         map[int]part
}

type part struct {
	body     body
	tag      []byte
	modified time.Time
}

func (p part) etag() string { return fmt.Sprintf(`"%x"`, p.tag) }

func (s *Server) createUpload(r *http.Request, call *Call) (answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	u := &upload{fmt.Sprintf("upload+%d/%s", s.last, hex.EncodeToString([]byte(s.Host))), call.Key, r.Header.Get("Content-Type"), time.Now(), map[int]part{}}
	s.buckets[call.Bucket].uploads[u.id] = u
	return document(http.StatusOK, struct {
		XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ InitiateMultipartUploadResult"`
		Bucket, Key, UploadId string
	}{Bucket: call.Bucket, Key: call.Key, UploadId: u.id}), nil
}

// upload is that of a call. s.mu is held.
func (s *Server) upload(call *Call) (*upload, error) {
	u := s.buckets[call.Bucket].uploads[call.Upload]
	if u == nil || u.key != call.Key {
		return nil, fail("NoSuchUpload", "there is no such upload")
	}
	return u, nil
}

func (s *Server) uploadPart(r *http.Request, call *Call, sum string, quirks Quirks) (answer, error) {
	ceiling := maxParts
	if quirks.MaxParts > 0 {
		ceiling = quirks.MaxParts
	}
	if call.Part < 1 || call.Part > ceiling || call.Query.Get("partNumber") != strconv.Itoa(call.Part) {
		return answer{}, fail("InvalidArgument", "Part number must be an integer between 1 and %d, inclusive", ceiling)
	}
	s.mu.Lock()
	_, err := s.upload(call)
	s.mu.Unlock()
	if err != nil {
		return answer{}, err
	}
	b, tag, err := s.receive(r, call, sum, s.opts.PutLimit)
	if err != nil {
		return answer{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u, err := s.upload(call)
	if err != nil {
		return answer{}, err
	}
	p := part{b, tag, time.Now()}
	u.parts[call.Part] = p
	return answer{status: http.StatusOK, header: http.Header{"Etag": {p.etag()}}}, nil
}

func (s *Server) completeUpload(r *http.Request, call *Call, sum string, quirks Quirks) (answer, error) {
	var wanted struct {
		Part []struct {
			PartNumber int
			ETag       string
			Others     []struct{ XMLName xml.Name } `xml:",any"`
		}
	}
	if err := s.receiveXML(r, call, sum, &wanted); err != nil {
		return answer{}, err
	}
	if len(wanted.Part) == 0 || len(wanted.Part) > maxParts {
		return answer{}, fail("MalformedXML", "name from 1 to %d parts", maxParts)
	}
	s.mu.Lock()
	u, err := s.upload(call)
	if err != nil {
		s.mu.Unlock()
		return answer{}, err
	}
	parts := maps.Clone(u.parts)
	s.mu.Unlock()

	var (
		whole body
		tags  = md5.New()
		last  = 0
	)
	for i, named := range wanted.Part {
		if named.PartNumber <= last {
			return answer{}, fail("InvalidPartOrder", "the parts are not in order")
		}
		last = named.PartNumber
		p, there := parts[last]
		if !there || strings.Trim(named.ETag, `"`) != hex.EncodeToString(p.tag) || len(named.Others) > 0 {
			return answer{}, fail("InvalidPart", "part %d is not there, or is another", last)
		}
		final := i == len(wanted.Part)-1
		if !final && p.body.size < s.opts.MinPart {
			return answer{}, fail("EntityTooSmall", "part %d has %d bytes", last, p.body.size)
		}
		if first := parts[wanted.Part[0].PartNumber].body.size; quirks.EqualParts && (!final && p.body.size != first || p.body.size > first) {
			return answer{}, fail("InvalidPart", "All non-trailing parts must have the same length")
		}
		whole.pieces = append(whole.pieces, p.body.pieces...)
		whole.size += p.body.size
		tags.Write(p.tag)
	}
	o := object{whole, fmt.Sprintf(`"%x-%d"`, quirks.odd(tags.Sum(nil)), len(wanted.Part)), s.now(quirks), u.kind}
	if err := s.store(r, call, o); err != nil {
		return answer{}, err
	}
	s.mu.Lock()
	delete(s.buckets[call.Bucket].uploads, u.id)
	s.mu.Unlock()
	return document(http.StatusOK, struct {
		XMLName                     xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ CompleteMultipartUploadResult"`
		Location, Bucket, Key, ETag string
	}{Location: s.URL + r.URL.Path, Bucket: call.Bucket, Key: call.Key, ETag: o.etag}), nil
}

func (s *Server) abortUpload(call *Call) (answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u, err := s.upload(call)
	if err != nil {
		return answer{}, err
	}
	delete(s.buckets[call.Bucket].uploads, u.id)
	return answer{status: http.StatusNoContent}, nil
}

func (s *Server) listParts(call *Call, quirks Quirks) (answer, error) {
	if quirks.NoListParts {
		return answer{}, fail("NotImplemented", "ListParts is not implemented")
	}
	after, err := number(call, "part-number-marker", 0, maxParts)
	if err != nil {
		return answer{}, err
	}
	limit, err := number(call, "max-parts", s.opts.Page, s.opts.Page)
	if err != nil {
		return answer{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u, err := s.upload(call)
	if err != nil {
		return answer{}, err
	}
	type listed struct {
		PartNumber   int
		ETag         string
		Size         int64
		LastModified string
	}
	result := struct {
		XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListPartsResult"`
		Bucket, Key, UploadId string
		PartNumberMarker      int
		NextPartNumberMarker  int `xml:",omitempty"`
		MaxParts              int
		IsTruncated           bool
		Part                  []listed
	}{Bucket: call.Bucket, Key: call.Key, UploadId: u.id, PartNumberMarker: after, MaxParts: limit}
	for i, n := range slices.Sorted(maps.Keys(u.parts)) {
		if quirks.ShortParts > 0 && i == quirks.ShortParts {
			break
		}
		if n <= after && !quirks.EndlessParts {
			continue
		}
		if len(result.Part) == limit {
			result.IsTruncated = true
			result.NextPartNumberMarker = result.Part[limit-1].PartNumber
			break
		}
		p := u.parts[n]
		result.Part = append(result.Part, listed{n, p.etag(), p.body.size, p.modified.UTC().Format(listTime)})
	}
	if quirks.EndlessParts {
		result.IsTruncated, result.NextPartNumberMarker = true, 0
	}
	return document(http.StatusOK, result), nil
}

func (s *Server) listUploads(call *Call, quirks Quirks) (answer, error) {
	limit, err := number(call, "max-uploads", s.opts.Page, s.opts.Page)
	if err != nil {
		return answer{}, err
	}
	if call.Query.Get("delimiter") != "" {
		return answer{}, fail("NotImplemented", "delimiters are not implemented")
	}
	encode, err := encoding(call)
	if err != nil {
		return answer{}, err
	}
	prefix, keyMarker, idMarker := call.Query.Get("prefix"), call.Query.Get("key-marker"), call.Query.Get("upload-id-marker")
	s.mu.Lock()
	defer s.mu.Unlock()
	type listed struct{ Key, UploadId, Initiated string }
	result := struct {
		XMLName                           xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListMultipartUploadsResult"`
		Bucket, KeyMarker                 string
		UploadIdMarker                    string
		NextKeyMarker, NextUploadIdMarker string `xml:",omitempty"`
		MaxUploads                        int
		IsTruncated                       bool
		EncodingType                      string `xml:",omitempty"`
		Prefix                            string
		Upload                            []listed
	}{Bucket: call.Bucket, KeyMarker: encode(keyMarker), UploadIdMarker: idMarker, MaxUploads: limit, EncodingType: call.Query.Get("encoding-type"), Prefix: encode(prefix)}
	uploads := slices.Collect(maps.Values(s.buckets[call.Bucket].uploads))
	slices.SortFunc(uploads, func(a, b *upload) int {
		if a.key != b.key {
			return strings.Compare(a.key, b.key)
		}
		return strings.Compare(a.id, b.id)
	})
	for _, u := range uploads {
		if !strings.HasPrefix(u.key, prefix) || u.key < keyMarker || u.key == keyMarker && (idMarker == "" || u.id <= idMarker) {
			continue
		}
		if len(result.Upload) == limit {
			result.IsTruncated = true
			last := result.Upload[limit-1]
			result.NextKeyMarker, result.NextUploadIdMarker = last.Key, last.UploadId
			break
		}
		result.Upload = append(result.Upload, listed{encode(u.key), u.id, u.begun.UTC().Format(listTime)})
	}
	return document(http.StatusOK, result), nil
}

// Uploads are the IDs of the uploads of the first bucket that are under way, by
// their keys.
func (s *Server) Uploads() map[string][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := map[string][]string{}
	for _, u := range s.first().uploads {
		found[u.key] = append(found[u.key], u.id)
	}
	return found
}

// Parts are the numbers of the parts that an upload of the first bucket has.
func (s *Server) Parts(id string) []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u := s.first().uploads[id]; u != nil {
		return slices.Sorted(maps.Keys(u.parts))
	}
	return nil
}

// Expire ends all uploads under way, as some places do after a week.
func (s *Server) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.buckets {
		clear(b.uploads)
	}
}
