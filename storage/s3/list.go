package s3

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/caddy-registry/mirror/storage"
)

// page is one answer to a listing, and where the next begins.
type page struct {
	contents []types.Object
	prefixes []types.CommonPrefix
	encoded  bool
	next     string // empty: there is none
}

// list yields the objects whose keys begin with a prefix, which is empty or ends in
// a slash, in no order. What no store can have put there is left out, such as the
// empty objects that stand for directories.
func (b *bucket) list(ctx context.Context, prefix string, deep bool) iter.Seq2[object, error] {
	return func(yield func(object, error) bool) {
		ask := b.pageV2
		if b.remote.Load().settings.ListV1 {
			ask = b.pageV1
		}
		delimiter := (*string)(nil)
		if !deep {
			delimiter = aws.String("/")
		}
		var turns progress
		for next := ""; ; {
			p, err := ask(ctx, prefix, delimiter, next)
			if err != nil {
				yield(object{}, err)
				return
			}
			for o, err := range b.ours(p, prefix) {
				if !yield(o, err) || err != nil {
					return
				}
			}
			if p.next == "" {
				return
			}
			if !turns.on(p.next) {
				yield(object{}, fmt.Errorf("%s: %s goes round in circles; if it does not know version 2 of listing, write list v1", b.about(opList, prefix), b.host()))
				return
			}
			next = p.next
		}
	}
}

// ours yields what a page has for the store.
func (b *bucket) ours(p page, prefix string) iter.Seq2[object, error] {
	return func(yield func(object, error) bool) {
		decode := func(raw string) (string, error) {
			key := raw
			if p.encoded {
				var err error
				if key, err = url.QueryUnescape(raw); err != nil {
					return "", fmt.Errorf("%s: a key cannot be decoded", b.about(opList, prefix))
				}
			}
			key, ok := strings.CutPrefix(key, b.prefix)
			if !ok || !strings.HasPrefix(key, prefix) {
				return "", fmt.Errorf("%s: %s lists what was not asked for", b.about(opList, prefix), b.host())
			}
			return key, nil
		}
		for _, c := range p.contents {
			key, err := decode(aws.ToString(c.Key))
			if err == nil && storage.CheckKey(key) != nil {
				continue
			}
			if !yield(object{key, aws.ToInt64(c.Size), aws.ToString(c.ETag), aws.ToTime(c.LastModified)}, err) || err != nil {
				return
			}
		}
		for _, c := range p.prefixes {
			key, err := decode(aws.ToString(c.Prefix))
			if err == nil && storage.CheckKey(strings.TrimSuffix(key, "/")) != nil {
				continue
			}
			if !yield(object{key: key}, err) || err != nil {
				return
			}
		}
	}
}

func (b *bucket) pageV2(ctx context.Context, prefix string, delimiter *string, next string) (p page, err error) {
	in := &s3.ListObjectsV2Input{Bucket: &b.name, Prefix: b.full(prefix), Delimiter: delimiter, EncodingType: types.EncodingTypeUrl}
	if next != "" {
		in.ContinuationToken = &next
	}
	var out *s3.ListObjectsV2Output
	err = b.call(ctx, opList, prefix, func(ctx context.Context, c *s3.Client) (err error) {
		out, err = c.ListObjectsV2(ctx, in)
		return err
	}, nil)
	if err != nil {
		return page{}, err
	}
	if out.Name == nil && out.MaxKeys == nil && out.IsTruncated == nil {
		return page{}, b.noListing(prefix)
	}
	p = page{contents: out.Contents, prefixes: out.CommonPrefixes, encoded: out.EncodingType == types.EncodingTypeUrl}
	if aws.ToBool(out.IsTruncated) {
		if p.next = aws.ToString(out.NextContinuationToken); p.next == "" {
			return page{}, fmt.Errorf("%s: %s has more and does not say where it goes on; if it does not know version 2 of listing, write list v1", b.about(opList, prefix), b.host())
		}
	}
	return p, nil
}

func (b *bucket) pageV1(ctx context.Context, prefix string, delimiter *string, next string) (p page, err error) {
	in := &s3.ListObjectsInput{Bucket: &b.name, Prefix: b.full(prefix), Delimiter: delimiter, EncodingType: types.EncodingTypeUrl}
	if next != "" {
		in.Marker = &next
	}
	var out *s3.ListObjectsOutput
	err = b.call(ctx, opList, prefix, func(ctx context.Context, c *s3.Client) (err error) {
		out, err = c.ListObjects(ctx, in)
		return err
	}, nil)
	if err != nil {
		return page{}, err
	}
	if out.Name == nil && out.MaxKeys == nil && out.IsTruncated == nil {
		return page{}, b.noListing(prefix)
	}
	p = page{contents: out.Contents, prefixes: out.CommonPrefixes, encoded: out.EncodingType == types.EncodingTypeUrl}
	if !aws.ToBool(out.IsTruncated) {
		return p, nil
	}
	// The marker is named only where there is a delimiter; else it is the last key.
	p.next = aws.ToString(out.NextMarker)
	if p.next == "" {
		if n := len(p.contents); n > 0 {
			p.next = aws.ToString(p.contents[n-1].Key)
		}
		if n := len(p.prefixes); n > 0 {
			p.next = max(p.next, aws.ToString(p.prefixes[n-1].Prefix))
		}
	}
	if p.encoded {
		if p.next, err = url.QueryUnescape(p.next); err != nil {
			return page{}, errors.New("s3: the marker of the next page cannot be decoded")
		}
	}
	if p.next == "" {
		return page{}, fmt.Errorf("%s: %s has more and does not say where it goes on", b.about(opList, prefix), b.host())
	}
	return p, nil
}

// noListing is the error of a listing that was answered by something else, such as the
// page of a proxy: the SDK takes that for a bucket with nothing in it.
func (b *bucket) noListing(prefix string) *fault {
	return &fault{text: fmt.Sprintf("%s: what %s answers is no listing; check the endpoint, and what stands before it", b.about(opList, prefix), b.host()), is: storage.ErrUnavailable}
}

// progress finds out that a listing comes to where it has been before (Brent's
// algorithm: the mark moves on at every power of two).
type progress struct {
	mark         string
	steps, limit int
}

func (p *progress) on(token string) bool {
	if token == p.mark {
		return false
	}
	if p.steps++; p.steps > p.limit {
		p.mark, p.steps, p.limit = token, 0, 2*p.limit+1
	}
	return true
}
