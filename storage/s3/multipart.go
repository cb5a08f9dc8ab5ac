package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/storage"
)

// parts is an upload in parts under way: our own ledger, since what servers say of
// parts cannot be relied upon.
type parts struct {
	Upload string   `json:"upload,omitempty"` // its ID; empty: not begun
	Sum    string   `json:"sum,omitempty"`    // sha256 of the whole
	Size   int64    `json:"size,omitempty"`   // bytes of a part, but for the last
	ETags  []string `json:"etags,omitempty"`  // of the parts that are there; "" of one that is not

	Begun time.Time `json:"begun,omitzero"` // by the clock of the server
}

// fits reports whether an upload is of this file, and can be gone on with.
func (p parts) fits(size int64, sum string, l limits) bool {
	return p.Upload != "" && p.Sum == sum && p.Size >= smallestPart && ceil(size, p.Size) == int64(len(p.ETags)) && len(p.ETags) <= l.maxParts
}

// Parts of one object that are on their way at once. They are read from the file as
// they are sent.
const partsAtOnce = 3

// putFile stores a local file: in one call up to put_limit, else in equal parts. p
// is where the upload stands: it goes on from there, and saved is called with what
// it has come to, one call at a time, so that another process can go on after this.
// The upload is over, and p worth nothing, when putFile returns nil. When wanted ends,
// parts that are on their way are given up, and the error is errVoid.
//
// sum is the sha256 of the file in hexadecimal. It is what another file under the
// same key is told from; in parts, nobody checks the whole against it.
func (b *bucket) putFile(ctx, wanted context.Context, key, path string, size int64, sum string, p parts, saved func(parts) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("s3: storing %s: %w", key, err)
	}
	defer f.Close()
	if stat, err := f.Stat(); err != nil || stat.Size() != size {
		return fmt.Errorf("s3: storing %s: the local file has not its %d bytes", key, size)
	}
	p = p.clone()
	limits := b.remote.Load().settings.limits()
	part, count, err := partPlan(size, limits)
	if err != nil {
		return fmt.Errorf("s3: storing %s: %w", key, err)
	}
	goesOn := p.fits(size, sum, limits)
	if p.Upload != "" && !goesOn {
		// What stays is swept later.
		_ = b.abort(ctx, key, p)
	}
	if count == 0 && !goesOn {
		_, err := b.put(ctx, key, io.NewSectionReader(f, 0, size), size, sum)
		return err
	}
	for {
		if ctx.Err() != nil { // which ends wanted, too
			return context.Cause(ctx)
		}
		if wanted.Err() != nil {
			return errVoid
		}
		if !goesOn {
			p = parts{Sum: sum, Size: part, ETags: make([]string, count)}
			if p.Upload, p.Begun, err = b.create(ctx, key); err != nil {
				return err
			}
			if err := saved(p.clone()); err != nil {
				return fmt.Errorf("s3: storing %s: remembering where it stands: %w", key, err)
			}
			failpoint.Hit("s3.created")
		}
		err := b.putParts(wanted, key, f, size, p, saved)
		if wanted.Err() != nil && ctx.Err() == nil {
			return errVoid
		}
		if err == nil {
			err = b.complete(ctx, key, size, p)
		}
		// The upload may have died of old age, or of a rule of the bucket.
		if !goesOn || !coded(err, "NoSuchUpload", "InvalidPart", "InvalidPartOrder") {
			return err
		}
		_ = b.abort(ctx, key, p)
		goesOn = false
		if count == 0 {
			_, err := b.put(ctx, key, io.NewSectionReader(f, 0, size), size, sum)
			return err
		}
	}
}

func (p parts) clone() parts {
	p.ETags = slices.Clone(p.ETags)
	return p
}

func (b *bucket) create(ctx context.Context, key string) (upload string, begun time.Time, err error) {
	err = b.call(ctx, opCreate, key, func(ctx context.Context, c *s3.Client) error {
		out, err := c.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{
			Bucket:      &b.name,
			Key:         b.full(key),
			ContentType: aws.String("application/octet-stream"),
		})
		if err == nil {
			upload, begun = aws.ToString(out.UploadId), serverTime(out.ResultMetadata)
		}
		return err
	}, nil)
	if err == nil && upload == "" {
		err = fmt.Errorf("%s: %s gives the upload no ID; raise put_limit to do without parts", b.about(opCreate, key), b.host())
	}
	return upload, begun, err
}

// putParts sends the parts that are not there yet. When one fails, those under way are
// not given up: what has come of them is worth keeping, and one of them may be the
// trial by which the breaker finds out that S3 is back, while it refused the others.
func (b *bucket) putParts(ctx context.Context, key string, f *os.File, size int64, p parts, saved func(parts) error) error {
	var (
		mu     sync.Mutex
		group  errgroup.Group
		failed atomic.Bool
	)
	group.SetLimit(partsAtOnce)
	for i := range p.ETags {
		mu.Lock()
		there := p.ETags[i] != ""
		mu.Unlock()
		if there {
			continue
		}
		if failed.Load() {
			break
		}
		group.Go(func() error {
			offset := int64(i) * p.Size
			etag, err := b.putPart(ctx, key, p.Upload, i+1, io.NewSectionReader(f, offset, min(p.Size, size-offset)))
			if err != nil {
				failed.Store(true)
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			p.ETags[i] = etag
			if err := saved(p.clone()); err != nil {
				failed.Store(true)
				return fmt.Errorf("s3: storing %s: remembering where it stands: %w", key, err)
			}
			failpoint.Hit("s3.part")
			return nil
		})
	}
	return group.Wait()
}

func (b *bucket) putPart(ctx context.Context, key, upload string, number int, section *io.SectionReader) (etag string, err error) {
	sum, err := hashed(ctx, section)
	if err != nil {
		return "", fmt.Errorf("s3: storing %s: %w", key, err)
	}
	err = b.call(ctx, opPart, key, func(ctx context.Context, c *s3.Client) error {
		if _, err := section.Seek(0, io.SeekStart); err != nil {
			return err
		}
		out, err := c.UploadPart(ctx, &s3.UploadPartInput{
			Bucket:        &b.name,
			Key:           b.full(key),
			UploadId:      &upload,
			PartNumber:    aws.Int32(int32(number)),
			Body:          section,
			ContentLength: aws.Int64(section.Size()),
		}, signedAs(sum))
		if err == nil {
			etag = aws.ToString(out.ETag)
		}
		return err
	}, nil)
	if err == nil && etag == "" {
		err = fmt.Errorf("%s: %s gives the part no ETag; raise put_limit to do without parts", b.about(opPart, key), b.host())
	}
	return etag, err
}

// complete makes the parts the object, and looks whether it came out whole: some
// servers forget parts.
func (b *bucket) complete(ctx context.Context, key string, size int64, p parts) error {
	made := make([]types.CompletedPart, len(p.ETags))
	for i := range made {
		// Without checksums, that were not asked for when the upload began.
		made[i] = types.CompletedPart{ETag: &p.ETags[i], PartNumber: aws.Int32(int32(i + 1))}
	}
	looked := false
	// Of an older object it is told by its time, which is that of its completion or that
	// of the beginning of its upload: ETags are not the same thing everywhere.
	landed := func(ctx context.Context) bool {
		o, err := b.head(ctx, key)
		looked = err == nil && o.size == size && !o.modified.Before(p.Begun.Add(-clockSlack))
		return looked
	}
	err := b.call(ctx, opComplete, key, func(ctx context.Context, c *s3.Client) error {
		_, err := c.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
			Bucket:          &b.name,
			Key:             b.full(key),
			UploadId:        &p.Upload,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: made},
		})
		return err
	}, landed)
	if err != nil {
		// It may have been completed by a call that was not answered.
		if (coded(err, "NoSuchUpload") || errors.Is(err, storage.ErrUnavailable)) && ctx.Err() == nil && landed(ctx) {
			return nil
		}
		return err
	}
	failpoint.Hit("s3.completed")
	if looked {
		return nil
	}
	o, err := b.head(ctx, key)
	if absent(err) {
		return &fault{text: fmt.Sprintf("%s: %s does not show what it has just completed", b.about(opComplete, key), b.host()), is: storage.ErrUnavailable}
	}
	if err != nil {
		return err
	}
	if o.size != size {
		if err := b.delete(ctx, key); err != nil {
			return err
		}
		return &fault{text: fmt.Sprintf("%s: %s made %d bytes of %d out of %d parts, which have been deleted; lower max_parts or raise part_size", b.about(opComplete, key), b.host(), o.size, size, len(made)), code: "InvalidPart"}
	}
	return nil
}

// abort ends an upload that will not be gone on with.
func (b *bucket) abort(ctx context.Context, key string, p parts) error {
	if p.Upload == "" {
		return nil
	}
	err := b.call(ctx, opAbort, key, func(ctx context.Context, c *s3.Client) error {
		_, err := c.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &b.name, Key: b.full(key), UploadId: &p.Upload})
		return err
	}, nil)
	if coded(err, "NoSuchUpload") {
		return nil
	}
	return err
}

// sweepUploads aborts what was begun in parts longer than age ago where the mirror
// stores in parts, and nobody claims: it takes room that no listing shows. A server
// that cannot list uploads keeps them. It returns how many it has aborted.
func (b *bucket) sweepUploads(ctx context.Context, age time.Duration, claimed func(key, upload string) bool) (aborted int, err error) {
	before := time.Now().Add(-age)
	for _, prefix := range []string{"docker/registry/v2/blobs/", "mirror/"} {
		in := &s3.ListMultipartUploadsInput{Bucket: &b.name, Prefix: b.full(prefix)}
		for turns := new(progress); ; {
			var out *s3.ListMultipartUploadsOutput
			err := b.call(ctx, opUploads, prefix, func(ctx context.Context, c *s3.Client) (err error) {
				out, err = c.ListMultipartUploads(ctx, in)
				return err
			}, nil)
			if f, ok := errors.AsType[*fault](err); ok && (f.status == 501 || f.status == 405) {
				return aborted, nil
			}
			if err != nil {
				return aborted, err
			}
			for _, u := range out.Uploads {
				key, ok := strings.CutPrefix(aws.ToString(u.Key), b.prefix)
				upload := aws.ToString(u.UploadId)
				// Some servers take no notice of the prefix.
				if !ok || !strings.HasPrefix(key, prefix) || upload == "" || u.Initiated == nil || u.Initiated.After(before) || claimed(key, upload) {
					continue
				}
				if err := b.abort(ctx, key, parts{Upload: upload}); err != nil {
					return aborted, err
				}
				aborted++
			}
			if !aws.ToBool(out.IsTruncated) {
				break
			}
			in.KeyMarker, in.UploadIdMarker = out.NextKeyMarker, out.NextUploadIdMarker
			at := aws.ToString(in.KeyMarker) + "\x00" + aws.ToString(in.UploadIdMarker)
			if at == "\x00" || !turns.on(at) {
				return aborted, fmt.Errorf("%s: %s goes round in circles", b.about(opUploads, prefix), b.host())
			}
		}
	}
	return aborted, nil
}
