package s3

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/storage"
)

func provisioned(t *testing.T, s *S3) *S3 {
	t.Helper()
	if s.Cache == "" {
		s.Cache = filepath.Join(t.TempDir(), "cache")
	}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDefaults(t *testing.T) {
	t.Setenv("XDG_DATA_HOME", t.TempDir())
	s := &S3{Bucket: "images"}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	got := s.settings
	if got.Bucket != "images" || got.Endpoint != "" || got.Region != "" || got.Prefix != "" || got.PathStyle || got.AccessKey != "" ||
		got.PutLimit != 64<<20 || got.PartSize != 16<<20 || got.MaxParts != 10_000 || got.ListV1 || got.CacheSize != 50<<30 || got.Secret != nil || got.PushLocal {
		t.Errorf("defaults are %+v", got)
	}
	if s.Limits() != (storage.Limits{}) {
		t.Errorf("limits are %+v", s.Limits())
	}
	if want := filepath.Join(caddy.AppDataDir(), "registry-cache"); s.near.Directory != want {
		t.Errorf("the cache is %s, want %s", s.near.Directory, want)
	}
	if s := provisioned(t, &S3{Bucket: "images", Endpoint: "https://minio.test"}); !s.settings.PathStyle {
		t.Error("with an endpoint the bucket is not in the path")
	}
	if s := provisioned(t, &S3{Bucket: "images", Endpoint: "https://oss.test", PathStyle: "off"}); s.settings.PathStyle {
		t.Error("path_style off does nothing")
	}
}

func TestSettings(t *testing.T) {
	for name, value := range map[string]string{"TEST_S3_KEY": "thekey", "TEST_S3_SECRET": "thesecret\n", "TEST_S3_SHARED": "0123456789abcdef", "TEST_S3_NAME": "images"} {
		t.Setenv(name, value)
	}
	s := provisioned(t, &S3{
		Bucket: "{env.TEST_S3_NAME}", Endpoint: "http://{env.TEST_S3_NAME}.test:9000/", Region: "eu-central-1", Prefix: "/a/b/",
		Credentials: &Credentials{"{env.TEST_S3_KEY}", "{env.TEST_S3_SECRET}"}, PathStyle: "on", PutLimit: "5GiB", List: "v1", PartSize: "5MiB",
		MaxParts: 200, CacheSize: "64MiB", MaxSize: "5TiB", MaxBlobSize: "20GiB", Secret: "{env.TEST_S3_SHARED}", PushAck: "local",
	})
	got := s.settings
	if got.Bucket != "images" || got.Endpoint != "http://images.test:9000" || got.Region != "eu-central-1" || got.Prefix != "a/b" || !got.PathStyle ||
		got.AccessKey != "thekey" || got.SecretKey != "thesecret" || got.PutLimit != 5<<30 || got.PartSize != 5<<20 || got.MaxParts != 200 ||
		!got.ListV1 || got.CacheSize != 64<<20 || string(got.Secret) != "0123456789abcdef" || !got.PushLocal {
		t.Errorf("settings are %+v", got)
	}
	if s.Limits() != (storage.Limits{MaxSize: 5 << 40, MaxBlobSize: 20 << 30}) {
		t.Errorf("limits are %+v", s.Limits())
	}
	// What is written of the configuration names no secret.
	written, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"thekey", "thesecret", "0123456789abcdef"} {
		if strings.Contains(string(written), secret) {
			t.Errorf("%s is in %s", secret, written)
		}
	}
}

func TestIdentity(t *testing.T) {
	cache := t.TempDir()
	of := func(change func(*S3)) string {
		s := &S3{Bucket: "images", Endpoint: "https://minio.test", Cache: cache}
		change(s)
		return provisioned(t, s).Identity()
	}
	base := of(func(*S3) {})
	for name, change := range map[string]func(*S3){
		"credentials": func(s *S3) { s.Credentials = &Credentials{"k", "s"} },
		"put_limit":   func(s *S3) { s.PutLimit = "5GiB" },
		"part_size":   func(s *S3) { s.PartSize = "5MiB" },
		"list":        func(s *S3) { s.List = "v1" },
		"path_style":  func(s *S3) { s.PathStyle = "off" },
		"region":      func(s *S3) { s.Region = "eu-west-7" },
		"cache size":  func(s *S3) { s.CacheSize = "1GiB" },
		"max_size":    func(s *S3) { s.MaxSize = "1GiB" },
		"secret":      func(s *S3) { s.Secret = "0123456789abcdef" },
		"push_ack":    func(s *S3) { s.PushAck = "local" },
		"a slash":     func(s *S3) { s.Endpoint += "/" },
	} {
		if got := of(change); got != base {
			t.Errorf("%s makes another store of it: %s", name, got)
		}
	}
	seen := map[string]string{base: "nothing"}
	for name, change := range map[string]func(*S3){
		"bucket":         func(s *S3) { s.Bucket = "others" },
		"prefix":         func(s *S3) { s.Prefix = "p" },
		"endpoint":       func(s *S3) { s.Endpoint = "https://other.test" },
		"AWS":            func(s *S3) { s.Endpoint = "" },
		"region of AWS":  func(s *S3) { s.Endpoint, s.Region = "", "eu-west-7" },
		"cache":          func(s *S3) { s.Cache += "/other" },
		"prefix in name": func(s *S3) { s.Bucket, s.Prefix = "images.p", "" },
	} {
		got := of(change)
		if other := seen[got]; other != "" {
			t.Errorf("%s and %s have the identity %s", name, other, got)
		}
		seen[got] = name
	}
}

func TestBadSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const unset = "{env.SURELY_NOT_SET_ANYWHERE}"
	t.Setenv("TEST_S3_SHORT", "0123456789abcde")
	for _, c := range []struct {
		s    S3
		want string
	}{
		{S3{}, "bucket: there is none"},
		{S3{Bucket: unset}, "bucket"},
		{S3{Bucket: "a/b"}, "bucket"},
		{S3{Bucket: "ab"}, "bucket"},
		{S3{Bucket: "arn:aws:s3:::x"}, "bucket"},
		{S3{Bucket: "images", Endpoint: unset}, "endpoint"},
		{S3{Bucket: "images", Endpoint: "minio.test:9000"}, "endpoint"},
		{S3{Bucket: "images", Endpoint: "https://user:pw@minio.test"}, "endpoint"},
		{S3{Bucket: "images", Endpoint: "https://minio.test?x=y"}, "endpoint"},
		{S3{Bucket: "images", Region: unset}, "region"},
		{S3{Bucket: "images", Region: "eu west"}, "region"},
		{S3{Bucket: "images", Prefix: unset}, "prefix"},
		{S3{Bucket: "images", Prefix: "a//b"}, "prefix"},
		{S3{Bucket: "images", Prefix: "../b"}, "prefix"},
		{S3{Bucket: "images", Prefix: strings.Repeat("a", 257)}, "prefix"},
		{S3{Bucket: "images", Credentials: &Credentials{unset, "s"}}, "credentials.key"},
		{S3{Bucket: "images", Credentials: &Credentials{"k", unset}}, "credentials.secret"},
		{S3{Bucket: "images", Credentials: &Credentials{"k", "{file." + file + "}"}}, "credentials"},
		{S3{Bucket: "images", Credentials: &Credentials{Key: "k"}}, "credentials"},
		{S3{Bucket: "images", PathStyle: "yes"}, "path_style"},
		{S3{Bucket: "images", PutLimit: "lots"}, "put_limit"},
		{S3{Bucket: "images", PutLimit: "5GiB1"}, "put_limit"},
		{S3{Bucket: "images", PutLimit: "6GiB"}, "put_limit: 6GiB does not lie between 5MiB and 5GiB"},
		{S3{Bucket: "images", PutLimit: "1MiB"}, "put_limit"},
		{S3{Bucket: "images", PartSize: "4MiB"}, "part_size"},
		{S3{Bucket: "images", PartSize: "5.1GiB"}, "part_size"},
		{S3{Bucket: "images", MaxParts: 10_001}, "max_parts"},
		{S3{Bucket: "images", MaxParts: -1}, "max_parts"},
		{S3{Bucket: "images", List: "v3"}, "list"},
		{S3{Bucket: "images", Cache: file}, "cache"},
		{S3{Bucket: "images", Cache: unset}, "cache"},
		{S3{Bucket: "images", CacheSize: "1MiB"}, "cache: 1MiB is less than 64MiB"},
		{S3{Bucket: "images", CacheSize: "off"}, "cache"},
		{S3{Bucket: "images", MaxSize: "0"}, "max_size"},
		{S3{Bucket: "images", MaxBlobSize: "big"}, "max_blob_size"},
		{S3{Bucket: "images", Secret: unset}, "secret"},
		{S3{Bucket: "images", Secret: "0123456789abcde"}, "secret: it has 15 bytes"},
		{S3{Bucket: "images", Secret: "{env.TEST_S3_SHORT}"}, "secret: it has 15 bytes"},
		{S3{Bucket: "images", PushAck: "never"}, "push_ack"},
	} {
		if c.s.Cache == "" {
			c.s.Cache = filepath.Join(t.TempDir(), "cache")
		}
		if err := c.s.Provision(caddy.Context{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want an error about %s", c.s, err, c.want)
		} else if strings.Contains(err.Error(), "0123456789abcde") || strings.Contains(err.Error(), "pw@") {
			t.Errorf("a secret is in %v", err)
		}
	}
}

// TestProvisionTouchesNothing has a configuration be checked beside a live mirror, and
// without a bucket.
func TestProvisionTouchesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	provisioned(t, &S3{Bucket: "images", Endpoint: "http://127.0.0.1:1", Cache: dir})
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Provision made the cache: %v", err)
	}
}
