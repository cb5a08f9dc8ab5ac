package s3

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// presign returns a URL for one GET or HEAD request of an object, whether there is
// one or not. It sends nothing. Temporary credentials may end its life earlier, and
// it lives for at most 7 days.
func (b *bucket) presign(ctx context.Context, method, key string, life time.Duration) (string, error) {
	const longest = 7 * 24 * time.Hour
	r := b.remote.Load()
	signer := s3.NewPresignClient(r.client, s3.WithPresignExpires(min(max(life, time.Second), longest)))
	kind := aws.String("application/octet-stream") // no page to be shown, whatever put it there
	var signed *v4.PresignedHTTPRequest
	var err error
	switch method {
	case http.MethodGet:
		signed, err = signer.PresignGetObject(ctx, &s3.GetObjectInput{Bucket: &b.name, Key: b.full(key), ResponseContentType: kind})
	case http.MethodHead:
		signed, err = signer.PresignHeadObject(ctx, &s3.HeadObjectInput{Bucket: &b.name, Key: b.full(key), ResponseContentType: kind})
	default:
		return "", fmt.Errorf("s3: no URL is made for %s", method)
	}
	if err != nil {
		if ctx.Err() != nil {
			return "", b.ended(ctx, opGet, key, nil)
		}
		return "", b.fault(r, opGet, key, err)
	}
	return signed.URL, nil
}
