//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/s3"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// TestS3Store: real servers are what the suites of stores ask for, and have what the
// store says.
func TestS3Store(t *testing.T) {
	bothServers(t, func(t *testing.T, kind string) {
		t.Parallel() // they wait most of the time
		server := startS3(t, kind)
		var places atomic.Int64
		place := func(t *testing.T) storagetest.Place { return server.place(t, fmt.Sprintf("place-%d", places.Add(1))) }
		t.Run("any", func(t *testing.T) {
			storagetest.Test(t, func(t *testing.T) storage.Store {
				s, err := place(t).Open(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				return s
			})
		})
		t.Run("distant", func(t *testing.T) { storagetest.TestDistant(t, place) })
	})
}

// place is a prefix of the bucket.
func (s *s3Server) place(t *testing.T, prefix string) storagetest.Place {
	client := s.client()
	full := func(key string) *string { return aws.String(prefix + "/" + key) }
	calls := startS3Calls(t, s.addr) // of its own: the places are used at the same time
	t.Cleanup(func() { calls.setDown(false) })
	size := func(key string) int64 {
		for _, found := range s.keys(t, prefix+"/"+key) {
			if found == prefix+"/"+key {
				head, err := client.HeadObject(t.Context(), &awss3.HeadObjectInput{Bucket: aws.String(s3Bucket), Key: full(key)})
				if err != nil {
					t.Error(err)
					return -1
				}
				return aws.ToInt64(head.ContentLength)
			}
		}
		return -1
	}
	return storagetest.Place{
		Open: func(dir string) (storage.Store, error) {
			ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
			t.Cleanup(cancel)
			module := &s3.S3{
				Bucket: s3Bucket, Prefix: prefix, Endpoint: "http://" + calls.addr, Region: s3Region, Cache: dir,
				Credentials: &s3.Credentials{Key: s3Key, Secret: s3Secret},
			}
			if err := module.Provision(ctx); err != nil {
				return nil, err
			}
			return module.Open(ctx)
		},
		Read: func(key string) ([]byte, bool) {
			if size(key) < 0 {
				return nil, false
			}
			object, err := client.GetObject(t.Context(), &awss3.GetObjectInput{Bucket: aws.String(s3Bucket), Key: full(key)})
			if err != nil {
				t.Error(err)
				return nil, false
			}
			defer object.Body.Close()
			data, err := io.ReadAll(object.Body)
			if err != nil {
				t.Error(err)
			}
			return data, true
		},
		Size: size,
		Keys: func(below string) (keys []string) {
			for _, key := range s.keys(t, prefix+"/"+below) {
				keys = append(keys, strings.TrimPrefix(key, prefix+"/"))
			}
			return keys
		},
		Write: func(key string, data []byte) {
			if _, err := client.PutObject(t.Context(), &awss3.PutObjectInput{Bucket: aws.String(s3Bucket), Key: full(key), Body: bytes.NewReader(data)}); err != nil {
				t.Error(err)
			}
		},
		Remove: func(key string) {
			if _, err := client.DeleteObject(t.Context(), &awss3.DeleteObjectInput{Bucket: aws.String(s3Bucket), Key: full(key)}); err != nil {
				t.Error(err)
			}
		},
		Down: func() { calls.setDown(true) },
		Up:   func() { calls.setDown(false) },
	}
}
