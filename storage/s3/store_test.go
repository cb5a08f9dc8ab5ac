package s3

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/goleak"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

func settingsOf(d *s3double.Server) settings {
	return settings{
		Endpoint: d.URL, Bucket: s3double.Bucket, Region: s3double.Region, PathStyle: true,
		AccessKey: s3double.Key, SecretKey: s3double.Secret,
		PutLimit: 5 << 20, PartSize: 5 << 20, MaxParts: 10_000,
		CacheSize: 1 << 30, Secret: []byte("a secret that is long enough"),
	}
}

// openAt opens a store on the double, with a cache directory.
func openAt(d *s3double.Server, dir string, change func(*settings)) (*store, error) {
	s := settingsOf(d)
	if change != nil {
		change(&s)
	}
	near := &disk.Disk{Directory: dir, MinFree: "1MB"}
	if err := near.Provision(caddy.Context{}); err != nil {
		return nil, err
	}
	b, err := newBucket(context.Background(), s)
	if err != nil {
		return nil, err
	}
	st, err := open(context.Background(), near, b, s)
	if err != nil {
		b.close()
	}
	return st, err
}

func TestStore(t *testing.T) {
	defer goleak.VerifyNone(t)
	storagetest.Test(t, func(t *testing.T) storage.Store {
		s, err := openAt(s3double.New(t, s3double.Options{}), filepath.Join(t.TempDir(), "made", "on", "use"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestDistant(t *testing.T) {
	storagetest.TestDistant(t, func(t *testing.T) storagetest.Place {
		d := s3double.New(t, s3double.Options{})
		return storagetest.Place{
			Open: func(dir string) (storage.Store, error) {
				s, err := openAt(d, dir, nil)
				if err != nil {
					return nil, err
				}
				return s, nil
			},
			Read: d.Read, Size: d.Size, Keys: d.Keys, Write: d.Write, Remove: d.Remove,
			Down: d.Down, Up: func() { d.Up(t) },
			Hold: func() (held, release func()) {
				let := make(chan struct{})
				end := d.Strike(s3double.Fault{Op: s3double.PutObject, Key: "docker/", Hold: let})
				return func() {
						d.Await(t, "an upload", func(calls []s3double.Call) bool {
							for _, call := range calls {
								if call.Held {
									return true
								}
							}
							return false
						})
					}, func() {
						end()
						close(let)
					}
			},
			Lag: func() (caughtUp func()) {
				d.Set(func(q *s3double.Quirks) { q.LaggingList = true })
				return d.CatchUp
			},
		}
	})
}
