package s3double

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// spill is the size from which bodies lie in files.
const spill = 8 << 20

type object struct {
	body     body
	etag     string // in its quotes
	modified time.Time
	kind     string // its content type
}

// A body is bytes that do not change.
type body struct {
	pieces []piece
	size   int64
}

type piece struct {
	at   io.ReaderAt
	size int64
}

func (b body) ReadAt(p []byte, offset int64) (n int, err error) {
	for _, piece := range b.pieces {
		if offset >= piece.size {
			offset -= piece.size
			continue
		}
		k, err := piece.at.ReadAt(p[n:min(int64(len(p)), int64(n)+piece.size-offset)], offset)
		if n += k; n == len(p) {
			return n, nil
		}
		if err != nil && err != io.EOF {
			return n, err
		}
		offset = 0
	}
	return n, io.EOF
}

// receive takes the body of a request, and holds it to what its headers say of it.
func (s *Server) receive(r *http.Request, call *Call, sum string, limit int64) (body, []byte, error) {
	if r.ContentLength < 0 {
		return body{}, nil, fail("MissingContentLength", "say how long the body is")
	}
	if r.ContentLength > limit {
		return body{}, nil, fail("EntityTooLarge", "at most %d bytes", limit)
	}
	var (
		b    = body{size: r.ContentLength}
		hash = hashes{sha256.New(), md5.New()}
		from = io.TeeReader(&counting{r.Body, s, call}, hash)
		err  error
	)
	if b.size < spill {
		data := make([]byte, b.size)
		_, err = io.ReadFull(from, data)
		b.pieces = []piece{{bytes.NewReader(data), b.size}}
	} else {
		b.pieces, err = s.spill(from, b.size)
	}
	if err != nil {
		return body{}, nil, fail("IncompleteBody", "the body ends before its end")
	}
	if sum != "" && sum != hex.EncodeToString(hash.sha256.Sum(nil)) {
		return body{}, nil, fail("XAmzContentSHA256Mismatch", "x-amz-content-sha256 is not that of the body")
	}
	tag := hash.md5.Sum(nil)
	if want := r.Header.Get("Content-MD5"); want != "" && want != base64.StdEncoding.EncodeToString(tag) {
		return body{}, nil, fail("BadDigest", "Content-MD5 is not that of the body")
	}
	return b, tag, nil
}

type hashes struct{ sha256, md5 hash.Hash }

func (h hashes) Write(p []byte) (int, error) {
	h.sha256.Write(p)
	return h.md5.Write(p)
}

// spill stores a body in a file, which has no name any more, and which takes no room
// where the body is zero.
func (s *Server) spill(from io.Reader, size int64) ([]piece, error) {
	file, err := os.CreateTemp(s.dir, "body")
	if err != nil {
		return nil, err
	}
	os.Remove(file.Name())
	buffer, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for offset := int64(0); offset < size; {
		n, err := io.ReadFull(from, buffer[:min(int64(len(buffer)), size-offset)])
		if err == nil && !bytes.Equal(buffer[:n], zero[:n]) {
			_, err = file.WriteAt(buffer[:n], offset)
		}
		if err != nil {
			file.Close()
			return nil, err
		}
		offset += int64(n)
	}
	return []piece{{file, size}}, file.Truncate(size)
}

// counting notes how much of a body has come.
type counting struct {
	io.Reader
	s    *Server
	call *Call
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.s.note(func() { c.call.Received += int64(n) })
	return n, err
}

func (s *Server) putObject(r *http.Request, call *Call, sum string, quirks Quirks) (answer, error) {
	b, tag, err := s.receive(r, call, sum, s.opts.PutLimit)
	if err != nil {
		return answer{}, err
	}
	o := object{b, fmt.Sprintf(`"%x"`, quirks.odd(tag)), s.now(quirks), r.Header.Get("Content-Type")}
	if err := s.store(r, call, o); err != nil {
		return answer{}, err
	}
	return answer{status: http.StatusOK, header: http.Header{"Etag": {o.etag}}}, nil
}

// store puts an object in its place, if its conditions let it.
func (s *Server) store(r *http.Request, call *Call, o object) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.buckets[call.Bucket]
	old, there := b.objects[call.Key]
	if match := r.Header.Get("If-Match"); match != "" && (!there || match != old.etag && match != "*") {
		return fail("PreconditionFailed", "If-Match does not hold")
	}
	if none := r.Header.Get("If-None-Match"); none != "" && there && (none == "*" || none == old.etag) {
		return fail("PreconditionFailed", "If-None-Match does not hold")
	}
	b.objects[call.Key] = o
	return nil
}

func (s *Server) remove(bucket, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.buckets[bucket].objects, key)
}

func (s *Server) getObject(r *http.Request, call *Call) (answer, error) {
	s.mu.Lock()
	o, there := s.buckets[call.Bucket].objects[call.Key]
	s.mu.Unlock()
	if !there {
		return answer{}, fail("NoSuchKey", "there is no such key")
	}
	if match := r.Header.Get("If-Match"); match != "" && match != "*" && match != o.etag {
		return answer{}, fail("PreconditionFailed", "If-Match does not hold")
	}
	if none := r.Header.Get("If-None-Match"); none == "*" || none == o.etag {
		return answer{}, fail("NotModified", "")
	}
	header := http.Header{
		"Etag": {o.etag}, "Last-Modified": {o.modified.UTC().Format(http.TimeFormat)},
		"Accept-Ranges": {"bytes"}, "Content-Type": {o.kind},
	}
	if o.kind == "" {
		header.Set("Content-Type", "binary/octet-stream")
	}
	for name := range call.Query {
		if replaced, ok := strings.CutPrefix(name, "response-"); ok {
			header.Set(replaced, call.Query.Get(name))
		}
	}
	from, to, ranged, err := span(r.Header.Get("Range"), o.body.size)
	if err != nil {
		return answer{}, err
	}
	status := http.StatusOK
	if ranged {
		status = http.StatusPartialContent
		header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, o.body.size))
	}
	return answer{status, header, io.NewSectionReader(o.body, from, to-from), to - from}, nil
}

// span is the bytes that a Range header names. One that cannot be read, or names
// several, is as good as none.
func span(header string, size int64) (from, to int64, ranged bool, err error) {
	text, ok := strings.CutPrefix(header, "bytes=")
	first, last, dash := strings.Cut(text, "-")
	if !ok || !dash || strings.Contains(text, ",") {
		return 0, size, false, nil
	}
	if first == "" {
		n, err := strconv.ParseInt(last, 10, 64)
		if err != nil {
			return 0, size, false, nil
		}
		if n == 0 || size == 0 {
			return 0, 0, false, fail("InvalidRange", "nothing lies there")
		}
		return max(0, size-n), size, true, nil
	}
	from, err = strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, size, false, nil
	}
	to = size
	if last != "" {
		end, err := strconv.ParseInt(last, 10, 64)
		if err != nil || end < from {
			return 0, size, false, nil
		}
		to = min(size, end+1)
	}
	if from >= size {
		return 0, 0, false, fail("InvalidRange", "nothing lies there")
	}
	return from, to, true, nil
}

func (s *Server) deleteObjects(r *http.Request, call *Call, sum string) (answer, error) {
	if r.Header.Get("Content-MD5") == "" {
		return answer{}, fail("InvalidRequest", "Content-MD5 is missing")
	}
	var wanted struct {
		Quiet  bool
		Object []struct{ Key string }
	}
	if err := s.receiveXML(r, call, sum, &wanted); err != nil {
		return answer{}, err
	}
	if len(wanted.Object) > 1000 {
		return answer{}, fail("MalformedXML", "at most 1000 keys")
	}
	type deleted struct{ Key string }
	result := struct {
		XMLName xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ DeleteResult"`
		Deleted []deleted
	}{}
	for _, o := range wanted.Object {
		s.remove(call.Bucket, o.Key)
		if !wanted.Quiet {
			result.Deleted = append(result.Deleted, deleted{o.Key})
		}
	}
	return document(http.StatusOK, result), nil
}

// receiveXML takes a document of at most 4 MiB.
func (s *Server) receiveXML(r *http.Request, call *Call, sum string, to any) error {
	b, _, err := s.receive(r, call, sum, 4<<20)
	if err != nil {
		return err
	}
	if err := xml.NewDecoder(io.NewSectionReader(b, 0, b.size)).Decode(to); err != nil {
		return fail("MalformedXML", "the document cannot be read")
	}
	return nil
}

// Write puts an object there as somebody else would, and Remove takes one away. They
// are no calls. The bucket is the first one.
func (s *Server) Write(key string, data []byte) {
	tag := md5.Sum(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	data = slices.Clone(data)
	s.first().objects[key] = object{
		body: body{[]piece{{bytes.NewReader(data), int64(len(data))}}, int64(len(data))},
		etag: fmt.Sprintf(`"%x"`, tag), modified: time.Now(),
	}
}

// Remove is the opposite of [Server.Write].
func (s *Server) Remove(key string) { s.remove(s.opts.Buckets[0], key) }

// Read is what lies under a key of the first bucket; it is no call.
func (s *Server) Read(key string) ([]byte, bool) {
	s.mu.Lock()
	o, there := s.first().objects[key]
	s.mu.Unlock()
	if !there {
		return nil, false
	}
	data, err := io.ReadAll(io.NewSectionReader(o.body, 0, o.body.size))
	if err != nil {
		panic(err)
	}
	return data, true
}

// Size is how long an object of the first bucket is, and -1 if there is none.
func (s *Server) Size(key string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, there := s.first().objects[key]; there {
		return o.body.size
	}
	return -1
}

// Keys are the keys in the first bucket that begin with prefix, in order.
func (s *Server) Keys(prefix string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for key := range s.first().objects {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Spoil turns over a bit in the middle of an object of the first bucket, whose ETag
// stays as it was.
func (s *Server) Spoil(key string) {
	data, there := s.Read(key)
	if !there || len(data) == 0 {
		panic("there is nothing to spoil at " + key)
	}
	data[len(data)/2] ^= 1
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.first().objects[key]
	o.body.pieces = []piece{{bytes.NewReader(data), int64(len(data))}}
	s.first().objects[key] = o
}

func (s *Server) first() *bucket { return s.buckets[s.opts.Buckets[0]] }
