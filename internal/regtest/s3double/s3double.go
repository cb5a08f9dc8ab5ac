// Package s3double is a place for tests that speaks S3, as strictly as the strictest
// of those in the field:
//
//   - it verifies signatures (version 4, in headers or in the query), their time and
//     their scope, and wants every x-amz header signed;
//   - x-amz-content-sha256 must be the sha256 of the body; UNSIGNED-PAYLOAD is for TLS
//     only; aws-chunked bodies, trailers and checksum headers are refused;
//   - what it does not know, it refuses.
//
// It has the faults of the field, too, which a test turns on and off: see [Quirks]
// and [Fault]. It counts what it is asked.
package s3double

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// What a [Server] is called by, unless its options say otherwise.
const (
	Bucket = "bucket"
	Key    = "doublekey"
	Secret = "doublesecret"
	Region = "us-east-1"
)

// Options make a [Server].
type Options struct {
	// Buckets are the buckets there are. Default: [Bucket].
	Buckets []string
	// Key, Secret and Region sign. Default: the constants.
	Key, Secret, Region string
	// Token, if set, must come with each request, as with temporary credentials.
	Token string
	// Domain is the host whose subdomains are buckets. Default: localhost.
	Domain string
	// MinPart is the least size of a part but the last, and PutLimit the largest of
	// what comes in one request, in bytes. Default: 5 MiB and 5 GiB, as everywhere.
	MinPart, PutLimit int64
	// Page is the largest page of a listing. Default: 1000.
	Page int
	// Quirks are those it begins with.
	Quirks Quirks
}

// A Server is a place that speaks S3.
type Server struct {
	// URL is where it answers in path style, and Host the host and port of that.
	URL, Host string

	opts Options
	dir  string // for large bodies

	mu      sync.Mutex
	http    *http.Server // nil while it is down
	busy    int          // requests under way, and listeners
	quirks  Quirks
	buckets map[string]*bucket
	faults  []*Fault
	calls   []*Call
	changed chan struct{} // closed whenever something of calls changes
	last    int           // of upload IDs
}

type bucket struct {
	objects map[string]object
	listed  map[string]object // what listings tell, while they lag
	uploads map[string]*upload
}

// New starts a server that ends with the test.
func New(t testing.TB, opts Options) *Server {
	t.Helper()
	s := start(opts, t.TempDir(), regtest.FreeAddress(t))
	t.Cleanup(s.Down)
	if err := s.listen(); err != nil {
		t.Fatal(err)
	}
	return s
}

func start(opts Options, dir, address string) *Server {
	if opts.Buckets == nil {
		opts.Buckets = []string{Bucket}
	}
	for _, value := range []struct {
		of       *string
		standard string
	}{{&opts.Key, Key}, {&opts.Secret, Secret}, {&opts.Region, Region}, {&opts.Domain, "localhost"}} {
		if *value.of == "" {
			*value.of = value.standard
		}
	}
	if opts.MinPart == 0 {
		opts.MinPart = 5 << 20
	}
	if opts.PutLimit == 0 {
		opts.PutLimit = 5 << 30
	}
	if opts.Page == 0 {
		opts.Page = 1000
	}
	s := &Server{
		URL: "http://" + address, Host: address, opts: opts, dir: dir, quirks: opts.Quirks,
		buckets: map[string]*bucket{}, changed: make(chan struct{}),
	}
	for _, name := range opts.Buckets {
		s.buckets[name] = &bucket{objects: map[string]object{}, uploads: map[string]*upload{}}
	}
	s.lag(s.quirks.LaggingList)
	return s
}

// patience is how long the server waits for its port.
const patience = 20 * time.Second

// Down makes the server unreachable: connections break, and none is accepted.
func (s *Server) Down() {
	s.mu.Lock()
	running := s.http
	s.http = nil
	s.mu.Unlock()
	if running == nil {
		return
	}
	running.Close()
	for {
		s.mu.Lock()
		busy, changed := s.busy, s.changed
		s.mu.Unlock()
		if busy == 0 {
			return
		}
		<-changed
	}
}

// Up ends Down.
func (s *Server) Up(t testing.TB) {
	t.Helper()
	if err := s.listen(); err != nil {
		t.Fatal(err)
	}
}

func (s *Server) listen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http != nil {
		return nil
	}
	// After Down its port may for a moment be one that somebody else has been given.
	var listener net.Listener
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for late := time.Now().Add(patience); ; <-again.C {
		var err error
		if listener, err = net.Listen("tcp", s.Host); err == nil {
			break
		}
		if time.Now().After(late) {
			return err
		}
	}
	ctx, end := context.WithCancel(context.Background())
	s.http = &http.Server{Handler: s, BaseContext: func(net.Listener) context.Context { return ctx }}
	server := s.http
	s.busy++
	go func() {
		server.Serve(listener)
		end()
		s.note(func() { s.busy-- })
	}()
	return nil
}

// An answer is what a request comes to.
type answer struct {
	status int
	header http.Header
	body   io.Reader // nil: none
	size   int64     // of the body; of what it would be, to HEAD
}

// ServeHTTP answers one request. A handler of TLS may be put before it.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	call := s.parse(r)
	quirks := s.arrives(call)
	defer s.note(func() { s.busy-- })
	w.Header().Set("x-amz-request-id", strconv.Itoa(call.number))
	w.Header().Set("Date", s.now(quirks).UTC().Format(http.TimeFormat))
	sum, err := s.verify(r, quirks)
	if err == nil && call.Op == "" {
		err = fail("NotImplemented", "what this asks for is not implemented")
	}
	if err == nil && s.buckets[call.Bucket] == nil {
		err = fail("NoSuchBucket", "there is no such bucket")
	}
	if err != nil {
		io.Copy(io.Discard, r.Body)
		s.send(w, r, call, refusal(err, r), nil)
		return
	}
	fault := s.strike(call)
	if fault.Tick != nil && call.takesBody() {
		r.Body = io.NopCloser(&ticking{r.Body, fault, r.Context()})
	}
	var a answer
	switch {
	case fault.Did || fault.answers():
		a = s.do(r, call, sum, quirks)
		// A client that is refused in the middle of its body may not see why.
		if a.status >= 400 && fault.Tick == nil {
			io.Copy(io.Discard, r.Body)
		}
	case fault.Cut:
		io.CopyN(io.Discard, r.Body, fault.At)
	default:
		io.Copy(io.Discard, r.Body)
	}
	if fault.Hold != nil {
		s.note(func() { call.Held = true })
		select {
		case <-fault.Hold:
			s.note(func() { call.Held = false })
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
	if fault.Status != 0 {
		a = refusal(&failure{fault.Status, fault.Code, "a fault that the test asked for"}, r)
		if fault.RetryAfter != "" {
			a.header.Set("Retry-After", fault.RetryAfter)
		}
	}
	s.send(w, r, call, a, fault)
}

// send writes an answer, as spoilt as a fault wants it.
func (s *Server) send(w http.ResponseWriter, r *http.Request, call *Call, a answer, fault *Fault) {
	for key, values := range a.header {
		w.Header()[key] = values
	}
	if a.status != http.StatusNoContent {
		w.Header().Set("Content-Length", strconv.FormatInt(a.size, 10))
	}
	cut := int64(-1)
	if fault != nil && fault.Cut {
		cut = fault.at(a.size)
		if cut == 0 || !fault.Did && !fault.answers() {
			panic(http.ErrAbortHandler)
		}
	}
	s.note(func() { call.Status = a.status })
	w.WriteHeader(a.status)
	if a.body == nil || r.Method == http.MethodHead {
		if cut >= 0 {
			panic(http.ErrAbortHandler)
		}
		return
	}
	body := a.body
	if fault != nil && fault.Wrong {
		body = &wrong{body, fault.at(a.size)}
	}
	if cut >= 0 {
		body = io.LimitReader(body, cut)
	}
	if fault != nil && fault.Tick != nil && !call.takesBody() {
		body = &ticking{io.NopCloser(body), fault, r.Context()}
	}
	buffer := make([]byte, 64<<10)
	for {
		n, err := body.Read(buffer)
		if n > 0 {
			s.note(func() { call.Sent += int64(n) })
			if _, err := w.Write(buffer[:n]); err != nil {
				return
			}
			if fault != nil && (fault.Tick != nil || cut >= 0) {
				http.NewResponseController(w).Flush()
			}
		}
		if err == io.EOF {
			break
		} else if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	if cut >= 0 {
		panic(http.ErrAbortHandler)
	}
}

// parse says what a request asks for. Op is empty if that is not known.
func (s *Server) parse(r *http.Request) *Call {
	call := &Call{Method: r.Method, Range: r.Header.Get("Range"), Header: r.Header.Clone(), Query: r.URL.Query()}
	path := strings.TrimPrefix(r.URL.Path, "/")
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	if name, ok := strings.CutSuffix(host, "."+s.opts.Domain); ok {
		call.Virtual = true
		call.Bucket, call.Key = name, path
	} else {
		call.Bucket, call.Key, _ = strings.Cut(path, "/")
	}
	q := call.Query
	call.Upload = q.Get("uploadId")
	call.Part, _ = strconv.Atoi(q.Get("partNumber"))
	call.Op = operation(r.Method, call.Key != "", q)
	if r.Header.Get("x-amz-copy-source") != "" {
		call.Op = ""
	}
	return call
}

// known are the parameters of the operations there are.
var known = map[string]bool{
	"x-id": true, "list-type": true, "prefix": true, "delimiter": true, "marker": true, "max-keys": true,
	"encoding-type": true, "continuation-token": true, "start-after": true, "fetch-owner": true,
	"uploads": true, "uploadId": true, "partNumber": true, "max-parts": true, "part-number-marker": true,
	"key-marker": true, "upload-id-marker": true, "max-uploads": true, "delete": true, "location": true,
	"response-content-type": true, "response-content-disposition": true, "response-cache-control": true,
	"response-content-encoding": true, "response-content-language": true, "response-expires": true,
}

func operation(method string, key bool, q url.Values) string {
	for name := range q {
		if !known[name] && !strings.HasPrefix(strings.ToLower(name), "x-amz-") {
			return ""
		}
	}
	upload, uploads := q.Has("uploadId"), q.Has("uploads")
	switch {
	case key && method == "PUT" && upload && q.Has("partNumber"):
		return UploadPart
	case key && method == "PUT" && !upload:
		return PutObject
	case key && method == "POST" && uploads:
		return CreateMultipartUpload
	case key && method == "POST" && upload:
		return CompleteMultipartUpload
	case key && method == "DELETE" && upload:
		return AbortMultipartUpload
	case key && method == "DELETE":
		return DeleteObject
	case key && method == "GET" && upload:
		return ListParts
	case key && method == "GET" && !uploads:
		return GetObject
	case key && method == "HEAD" && !upload:
		return HeadObject
	case key:
		return ""
	case method == "HEAD":
		return HeadBucket
	case method == "POST" && q.Has("delete"):
		return DeleteObjects
	case method == "GET" && q.Has("location"):
		return GetBucketLocation
	case method == "GET" && uploads:
		return ListMultipartUploads
	case method == "GET" && q.Get("list-type") == "2":
		return ListObjectsV2
	case method == "GET" && !q.Has("list-type"):
		return ListObjects
	}
	return ""
}

// The operations there are.
const (
	GetObject               = "GetObject"
	HeadObject              = "HeadObject"
	PutObject               = "PutObject"
	DeleteObject            = "DeleteObject"
	DeleteObjects           = "DeleteObjects"
	ListObjects             = "ListObjects"
	ListObjectsV2           = "ListObjectsV2"
	CreateMultipartUpload   = "CreateMultipartUpload"
	UploadPart              = "UploadPart"
	CompleteMultipartUpload = "CompleteMultipartUpload"
	AbortMultipartUpload    = "AbortMultipartUpload"
	ListParts               = "ListParts"
	ListMultipartUploads    = "ListMultipartUploads"
	HeadBucket              = "HeadBucket"
	GetBucketLocation       = "GetBucketLocation"
)

// do does what a request asks for. sum is what its body must hash to, "" if that was
// not said.
func (s *Server) do(r *http.Request, call *Call, sum string, quirks Quirks) answer {
	a, err := s.dispatch(r, call, sum, quirks)
	if err != nil {
		return refusal(err, r)
	}
	if a.header == nil {
		a.header = http.Header{}
	}
	return a
}

func (s *Server) dispatch(r *http.Request, call *Call, sum string, quirks Quirks) (answer, error) {
	if len(call.Key) > 1024 {
		return answer{}, fail("KeyTooLongError", "the key is longer than 1024 bytes")
	}
	if quirks.VirtualOnly && !call.Virtual {
		return answer{}, fail("SecondLevelDomainForbidden", "name the bucket in the host")
	}
	if !call.takesBody() {
		if n, _ := io.Copy(io.Discard, r.Body); n > 0 || sum != "" && sum != emptySum {
			return answer{}, fail("XAmzContentSHA256Mismatch", "x-amz-content-sha256 is not that of no body")
		}
	}
	switch call.Op {
	case GetObject, HeadObject:
		return s.getObject(r, call)
	case PutObject:
		return s.putObject(r, call, sum, quirks)
	case DeleteObject:
		s.remove(call.Bucket, call.Key)
		return answer{status: http.StatusNoContent}, nil
	case DeleteObjects:
		return s.deleteObjects(r, call, sum)
	case ListObjects, ListObjectsV2:
		return s.listObjects(call, quirks)
	case CreateMultipartUpload:
		return s.createUpload(r, call)
	case UploadPart:
		return s.uploadPart(r, call, sum, quirks)
	case CompleteMultipartUpload:
		return s.completeUpload(r, call, sum, quirks)
	case AbortMultipartUpload:
		return s.abortUpload(call)
	case ListParts:
		return s.listParts(call, quirks)
	case ListMultipartUploads:
		return s.listUploads(call, quirks)
	case HeadBucket:
		return answer{status: http.StatusOK}, nil
	case GetBucketLocation:
		return document(http.StatusOK, location{Region: s.opts.Region}), nil
	}
	return answer{}, fmt.Errorf("%s is not written", call.Op)
}

// takesBody reports an operation whose request has a body.
func (c *Call) takesBody() bool {
	switch c.Op {
	case PutObject, UploadPart, CompleteMultipartUpload, DeleteObjects:
		return true
	}
	return false
}

func (s *Server) now(quirks Quirks) time.Time { return time.Now().Add(quirks.Skew) }
