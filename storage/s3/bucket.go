package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"
	smithy "github.com/aws/smithy-go/middleware"

	"github.com/caddy-registry/mirror/storage"
)

// A bucket is what the store asks of S3: one prefix of one bucket. It keeps nothing
// in memory, and knows nothing of what is near.
//
// Keys are the store's; the prefix of the configuration is put before them here.
// An absent key is an fs.ErrNotExist. What may be otherwise at another time (no
// answer, 5xx, SlowDown, refused credentials, a bucket that is not there) wraps
// storage.ErrUnavailable, and after several in a row so does every call for a while,
// at once. Errors name no URL and no secret.
//
// A call is tried several times. Bodies take as long as they take, but must not
// stand still.
type bucket struct {
	name   string // of the bucket
	prefix string // empty, or ending in a slash
	where  string // the endpoint, for messages

	http    *http.Client
	remote  atomic.Pointer[remote]
	breaker breaker
	counts  [operations]atomic.Int64
	failed  [operations]atomic.Int64
}

// remote is what configure may change while calls are under way.
type remote struct {
	settings settings
	client   *s3.Client
	refresh  func() // forgets credentials that have expired
	secrets  *strings.Replacer
}

// settings say which bucket is meant and how it is used, and how the store in front
// of it keeps to it.
type settings struct {
	Endpoint  string // URL; empty: AWS's for the region
	Region    string // empty: us-east-1 with an endpoint, else AWS's chain
	Bucket    string
	Prefix    string // before every key; empty, or with no slash at either end
	PathStyle bool   // the bucket in the path, not in the host
	AccessKey string // empty: AWS's chain
	SecretKey string

	PutLimit int64 // bytes up to which an object is stored in one call
	PartSize int64 // least bytes of a part
	MaxParts int   // of one object
	ListV1   bool

	CacheSize int64  // bytes of the near tier that copies may take
	Secret    []byte // what all who share the bucket know; nil: nobody shares uploads
	PushLocal bool   // a durable value need only be near

	transport http.RoundTripper // in place of the network, for tests
}

// newBucket checks nothing of what is at the other end: the first call finds out.
func newBucket(ctx context.Context, s settings) (*bucket, error) {
	b := &bucket{name: s.Bucket, where: s.Endpoint}
	if s.Prefix != "" {
		b.prefix = s.Prefix + "/"
	}
	transport := s.transport
	if transport == nil {
		transport = newTransport()
	}
	b.http = &http.Client{
		Transport: &patient{next: transport, sent: func(o operation) { b.counts[o].Add(1) }},
		// A request is signed for one host.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return b, b.configure(ctx, s)
}

// configure has later calls use other credentials, limits and ways. Endpoint, bucket
// and prefix are those of newBucket.
func (b *bucket) configure(ctx context.Context, s settings) error {
	r, err := b.prepare(ctx, s)
	if err == nil {
		b.remote.Store(r)
	}
	return err
}

// prepare is what configure does before anything changes.
func (b *bucket) prepare(ctx context.Context, s settings) (*remote, error) {
	r := &remote{settings: s, refresh: func() {}, secrets: strings.NewReplacer()}
	region := s.Region
	if region == "" && s.Endpoint != "" {
		region = "us-east-1"
	}
	var provider aws.CredentialsProvider
	if s.AccessKey != "" {
		provider = credentials.NewStaticCredentialsProvider(s.AccessKey, s.SecretKey, "")
		r.secrets = strings.NewReplacer(s.AccessKey, "…", s.SecretKey, "…")
	}
	if provider == nil || region == "" {
		chain, err := config.LoadDefaultConfig(ctx, config.WithLogger(logging.Nop{}))
		if err != nil {
			return nil, fmt.Errorf("s3: reading AWS's configuration from the environment and its files: %w", err)
		}
		if region == "" {
			region = chain.Region
		}
		if provider == nil {
			provider = chain.Credentials
			if cache, ok := provider.(*aws.CredentialsCache); ok {
				r.refresh = cache.Invalidate
			}
		}
	}
	if region == "" {
		return nil, errors.New("s3: no region: give the region of the bucket, or set AWS_REGION")
	}
	options := s3.Options{
		Region:       region,
		UsePathStyle: s.PathStyle,
		Credentials:  chained{provider},
		HTTPClient:   b.http,
		Retryer:      aws.NopRetryer{},
		Logger:       logging.Nop{},
		APIOptions:   []func(*smithy.Stack) error{plain},
		// Checksums in trailers are not understood by many that speak S3.
		RequestChecksumCalculation:                aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:                aws.ResponseChecksumValidationWhenRequired,
		DisableLogOutputChecksumValidationSkipped: true,
	}
	if s.Endpoint != "" {
		options.BaseEndpoint = aws.String(strings.TrimSuffix(s.Endpoint, "/"))
	}
	r.client = s3.New(options)
	return r, nil
}

// refusal asks once, as r says, and returns what the server has against that if it will
// not change by itself. That it does not answer is no matter.
func (b *bucket) refusal(ctx context.Context, r *remote) error {
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, operationKey{}, opGet), greeting)
	defer cancel()
	out, err := r.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &b.name, Key: b.full(ownerKey)})
	if err == nil {
		out.Body.Close()
	} else if err = b.fault(r, opGet, ownerKey, err); !absent(err) {
		return hopeless(err)
	}
	b.breaker.answered()
	return nil
}

// close lets go of idle connections.
func (b *bucket) close() { b.http.CloseIdleConnections() }

// chained marks the errors of credentials that cannot be had.
type chained struct{ aws.CredentialsProvider }

type noCredentials struct{ error }

func (n noCredentials) Unwrap() error { return n.error }

func (c chained) Retrieve(ctx context.Context) (aws.Credentials, error) {
	found, err := c.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return found, noCredentials{err}
	}
	return found, nil
}

// plain leaves Accept-Encoding out of what is signed, since proxies in front of some
// stores, Google's among them, change it.
func plain(stack *smithy.Stack) error {
	if _, ok := stack.Finalize.Get("DisableAcceptEncodingGzip"); ok {
		_, err := stack.Finalize.Remove("DisableAcceptEncodingGzip")
		return err
	}
	return nil
}

// signedAs has a request be signed for a body of this sha256, which is then not read
// to find out.
func signedAs(sum string) func(*s3.Options) {
	return s3.WithAPIOptions(func(stack *smithy.Stack) error {
		return stack.Finalize.Insert(smithy.FinalizeMiddlewareFunc("PayloadHashIsKnown",
			func(ctx context.Context, in smithy.FinalizeInput, next smithy.FinalizeHandler) (smithy.FinalizeOutput, smithy.Metadata, error) {
				return next.HandleFinalize(v4.SetPayloadHash(ctx, sum), in)
			}), "ComputePayloadHash", smithy.Before)
	})
}

// An object is what S3 says of one. A shallow listing yields directories as well,
// as keys that end in a slash.
type object struct {
	key      string
	size     int64
	etag     string
	modified time.Time
}

func (b *bucket) full(key string) *string { return aws.String(b.prefix + key) }

// get reads length bytes of an object from offset, or all from there if length is
// negative, in one call. The object is that of which bytes are read. A body that
// ends early or stands still fails with storage.ErrUnavailable.
func (b *bucket) get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, object, error) {
	if offset < 0 {
		return nil, object{}, fmt.Errorf("s3: reading %s: there is nothing at %d", key, offset)
	}
	if length == 0 {
		o, err := b.find(ctx, key)
		if err == nil && offset > o.size {
			err = outside(key, offset, length, o.size)
		}
		if err != nil {
			return nil, object{}, err
		}
		return http.NoBody, o, nil
	}
	in := &s3.GetObjectInput{Bucket: &b.name, Key: b.full(key)}
	switch {
	case length > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	case offset > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-", offset))
	}
	var out *s3.GetObjectOutput
	err := b.call(ctx, opGet, key, func(ctx context.Context, c *s3.Client) (err error) {
		out, err = c.GetObject(ctx, in)
		return err
	}, nil)
	if err != nil {
		if f, ok := errors.AsType[*fault](err); ok && f.status == http.StatusRequestedRangeNotSatisfiable {
			o, err := b.head(ctx, key)
			if err == nil && (length >= 0 || offset != o.size) {
				err = outside(key, offset, length, o.size)
			}
			if err != nil {
				return nil, object{}, err
			}
			return http.NoBody, o, nil
		}
		return nil, object{}, err
	}
	o := object{key: key, size: aws.ToInt64(out.ContentLength), etag: aws.ToString(out.ETag), modified: aws.ToTime(out.LastModified)}
	want := o.size
	if in.Range != nil {
		first, size, ok := contentRange(aws.ToString(out.ContentRange))
		switch {
		case !ok || first != offset:
			out.Body.Close()
			return nil, object{}, fmt.Errorf("s3: reading %s: %s answered the range %s with %q; a store that has no ranges cannot be used", key, b.where, *in.Range, aws.ToString(out.ContentRange))
		case length > size-offset:
			out.Body.Close()
			return nil, object{}, outside(key, offset, length, size)
		case length < 0:
			length = size - offset
		}
		o.size, want = size, length
	} else if out.ContentLength == nil {
		out.Body.Close()
		return nil, object{}, fmt.Errorf("s3: reading %s: %s does not say how long it is", key, b.where)
	}
	return &body{from: out.Body, left: want, failed: func(err error) error { return b.broken(ctx, key, err) }}, o, nil
}

func outside(key string, offset, length, size int64) error {
	return fmt.Errorf("s3: %d bytes from %d do not lie inside the %d of %s", length, offset, size, key)
}

// contentRange reads "bytes 5-9/10".
func contentRange(s string) (first, size int64, ok bool) {
	span, total, found := strings.Cut(strings.TrimPrefix(s, "bytes "), "/")
	if !found {
		return 0, 0, false
	}
	size, err := strconv.ParseInt(total, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	from, _, _ := strings.Cut(span, "-")
	first, err = strconv.ParseInt(from, 10, 64)
	return first, size, err == nil && 0 <= first && first < size
}

// body is what is left to be read of an object.
type body struct {
	from   io.ReadCloser
	left   int64
	failed func(error) error
}

func (r *body) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.from.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	switch {
	case err == nil:
	case r.left == 0:
		err = io.EOF
	default:
		err = r.failed(err)
	}
	return n, err
}

func (r *body) Close() error { return r.from.Close() }

// read is get for small objects, whole; a body that fails is asked for again. For one
// of more than limit bytes the error wraps storage.ErrTooLarge.
func (b *bucket) read(ctx context.Context, key string, limit int64) ([]byte, object, error) {
	for again := false; ; again = true {
		r, o, err := b.get(ctx, key, 0, -1)
		if err != nil {
			return nil, object{}, err
		}
		if o.size > limit {
			r.Close()
			return nil, o, fmt.Errorf("s3: %s has %d bytes, %w (%d)", key, o.size, storage.ErrTooLarge, limit)
		}
		data := make([]byte, o.size)
		_, err = io.ReadFull(r, data)
		r.Close()
		if err == nil {
			return data, o, nil
		}
		if again || !errors.Is(err, storage.ErrUnavailable) {
			return nil, object{}, err
		}
	}
}

// head describes an object.
func (b *bucket) head(ctx context.Context, key string) (object, error) {
	o, _, err := b.look(ctx, key)
	return o, err
}

// find is head for who relies upon there being nothing. What stands before a server that
// is gone says 404, too, as do some servers to an unknown key: only an answer with a body
// can tell that from an object that is not there.
func (b *bucket) find(ctx context.Context, key string) (object, error) {
	o, err := b.head(ctx, key)
	if !absent(err) {
		return o, err
	}
	r, o, err := b.get(ctx, key, 0, 1)
	if err != nil {
		return object{}, err
	}
	r.Close()
	return o, nil
}

// look is head, and how long ago the object was written by the clock of the server.
func (b *bucket) look(ctx context.Context, key string) (object, time.Duration, error) {
	var out *s3.HeadObjectOutput
	err := b.call(ctx, opHead, key, func(ctx context.Context, c *s3.Client) (err error) {
		out, err = c.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &b.name, Key: b.full(key)})
		return err
	}, nil)
	if err != nil {
		return object{}, 0, err
	}
	o := object{key: key, size: aws.ToInt64(out.ContentLength), etag: aws.ToString(out.ETag), modified: aws.ToTime(out.LastModified)}
	return o, serverTime(out.ResultMetadata).Sub(o.modified), nil
}

// serverTime is when an answer was given, by the clock of the server if it says so.
func serverTime(of smithy.Metadata) time.Time {
	if served, ok := middleware.GetServerTime(of); ok {
		return served
	}
	return time.Now()
}

// clockSlack is by how much times of one server may differ: they are in seconds, and
// its machines have a clock each.
const clockSlack = 2 * time.Second

// put stores size bytes under a key, in one call. sum is their sha256 in
// hexadecimal; it is what is signed, so the bytes are not read for that. If it is
// empty they are. It returns the ETag, if the server has told it.
func (b *bucket) put(ctx context.Context, key string, body io.ReadSeeker, size int64, sum string) (etag string, err error) {
	if sum == "" {
		var err error
		if sum, err = hashed(ctx, body); err != nil {
			return "", fmt.Errorf("s3: storing %s: %w", key, err)
		}
	}
	began := time.Now()
	// Whether the bytes came before the answer got lost. Few bytes are sent again
	// for what it costs to ask.
	var landed func(context.Context) bool
	if size >= worthAsking {
		landed = func(ctx context.Context) bool {
			o, age, err := b.look(ctx, key)
			return err == nil && o.size == size && age <= time.Since(began)+clockSlack
		}
	}
	err = b.call(ctx, opPut, key, func(ctx context.Context, c *s3.Client) error {
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return err
		}
		out, err := c.PutObject(ctx, &s3.PutObjectInput{
			Bucket:        &b.name,
			Key:           b.full(key),
			Body:          body,
			ContentLength: &size,
			ContentType:   aws.String("application/octet-stream"),
		}, signedAs(sum))
		if err == nil {
			etag = aws.ToString(out.ETag)
		}
		return err
	}, landed)
	return etag, err
}

// putBytes is put for bytes.
func (b *bucket) putBytes(ctx context.Context, key string, data []byte) error {
	_, err := b.put(ctx, key, bytes.NewReader(data), int64(len(data)), "")
	return err
}

// hashed is the sha256 of a body, in hexadecimal.
func hashed(ctx context.Context, body io.ReadSeeker) (string, error) {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, &wanted{ctx, body}); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// wanted is a reader while somebody waits for what is read.
type wanted struct {
	ctx context.Context
	io.Reader
}

func (w *wanted) Read(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.Reader.Read(p)
}

// delete removes an object. There need not be one.
func (b *bucket) delete(ctx context.Context, key string) error {
	err := b.call(ctx, opDelete, key, func(ctx context.Context, c *s3.Client) error {
		_, err := c.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &b.name, Key: b.full(key)})
		return err
	}, nil)
	if absent(err) {
		return nil
	}
	return err
}
