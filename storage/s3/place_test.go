package s3

import (
	"context"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

// A double is an S3 double, and what opens stores on it.
type double struct {
	*s3double.Server
	prefix string
	change func(*S3) // of the configuration
}

func newDouble(t *testing.T, opts s3double.Options, change func(*S3)) *double {
	d := &double{s3double.New(t, opts), "", change}
	t.Cleanup(func() {
		// What servers say of parts cannot be relied upon.
		if n := d.Count(s3double.ListParts); n > 0 {
			t.Errorf("the store has listed parts %d times", n)
		}
	})
	return d
}

// backend is a configuration of a store whose near tier is in dir.
func (d *double) backend(dir string) (*S3, error) {
	s := &S3{
		Bucket: s3double.Bucket, Endpoint: d.URL, Cache: dir, Prefix: d.prefix,
		Credentials: &Credentials{Key: s3double.Key, Secret: s3double.Secret},
		PutLimit:    "5MiB", PartSize: "5MiB",
	}
	if d.change != nil {
		d.change(s)
	}
	if err := s.Provision(caddy.Context{}); err != nil {
		return nil, err
	}
	// The disk of the tests may be nearly full.
	s.near = &disk.Disk{Directory: dir, MinFree: "1MB"}
	return s, s.near.Provision(caddy.Context{})
}

func (d *double) open(dir string) (storage.Store, error) {
	s, err := d.backend(dir)
	if err != nil {
		return nil, err
	}
	return s.Open(context.Background())
}

// openedAt opens a store that is closed with the test, and waits until it knows the
// bucket.
func (d *double) openedAt(t *testing.T, dir string) storage.Store {
	t.Helper()
	s, err := d.open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	if err := s.Distant().Listed(t.Context()); err != nil {
		t.Fatalf("Listed: %v", err)
	}
	return s
}

// openedAtOnce is a store in a directory of its own, which the suite closes.
func (d *double) openedAtOnce(t *testing.T) storage.Store {
	t.Helper()
	s, err := d.open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// key is what a key of the store is in the bucket.
func (d *double) key(key string) string {
	if d.prefix == "" {
		return key
	}
	return d.prefix + "/" + key
}

// place is the double as the suite of distant stores sees it.
func (d *double) place(t *testing.T) storagetest.Place {
	return storagetest.Place{
		Open: d.open,
		Read: func(key string) ([]byte, bool) { return d.Read(d.key(key)) },
		Size: func(key string) int64 { return d.Size(d.key(key)) },
		Keys: func(prefix string) (keys []string) {
			for _, key := range d.Keys(d.key(prefix)) {
				keys = append(keys, strings.TrimPrefix(key, d.key("")))
			}
			return keys
		},
		Write:  func(key string, data []byte) { d.Write(d.key(key), data) },
		Remove: func(key string) { d.Remove(d.key(key)) },
		Down:   d.Down,
		Up:     func() { d.Up(t) },
		Hold: func() (held, release func()) {
			ch := make(chan struct{})
			end := d.Strike(s3double.Fault{Key: "docker/", Hold: ch})
			held = func() {
				t.Helper()
				d.Await(t, "a call that is held", func(calls []s3double.Call) bool {
					for _, call := range calls {
						if call.Held {
							return true
						}
					}
					return false
				})
			}
			return held, func() { end(); close(ch) }
		},
		Lag: func() (caughtUp func()) {
			d.Set(func(q *s3double.Quirks) { q.LaggingList = true })
			return d.CatchUp
		},
	}
}
