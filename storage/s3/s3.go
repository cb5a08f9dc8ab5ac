package s3

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk"
)

func init() {
	caddy.RegisterModule(new(S3))
}

// S3 keeps content in a bucket of an object store that speaks S3, in the tree of
// registry:2: a bucket that registry:2 or distribution has written can be used as it
// is, and they can serve what the mirror has written. A directory on a local disk
// stands before it: a cache of what is pulled, and where what is new waits to be
// uploaded.
//
// In all options but numbers, sizes and words to choose from, placeholders such as
// {env.S3_SECRET} and {file./run/secrets/s3} are resolved. One that is not set fails
// the load.
type S3 struct {
	// The bucket. It must exist. Required.
	Bucket string `json:"bucket"`

	// Where the object store is, as an http or https URL without the bucket:
	// `https://minio.example.com:9000`. Its certificate must be one that the system
	// trusts. Requests go through the proxy that HTTPS_PROXY, HTTP_PROXY and
	// NO_PROXY in the environment name. Default: AWS's address for the region.
	Endpoint string `json:"endpoint,omitempty"`

	// The region that requests are signed for. Default: `us-east-1` with an
	// endpoint, which most stores that are not AWS's accept; without, what
	// AWS_REGION or the files of AWS's tools say.
	Region string `json:"region,omitempty"`

	// What stands before every key in the bucket, as `rootdirectory` of registry:2
	// does: with `registry`, content lies below `registry/docker/registry/v2/`.
	// Default: nothing.
	Prefix string `json:"prefix,omitempty"`

	// Who to be there. Default: AWS's chain: the variables AWS_ACCESS_KEY_ID and
	// AWS_SECRET_ACCESS_KEY, the files of AWS's tools, a web identity, and what
	// the machine or container is allowed. It must be allowed to get, put and
	// delete objects and to list the bucket.
	Credentials *Credentials `json:"credentials,omitempty"`

	// `on`: the bucket stands in the path of URLs; `off`: in their host name.
	// Default: `on` with an endpoint, else `off`.
	PathStyle string `json:"path_style,omitempty"`

	// Up to how many bytes a blob is stored by one request; larger ones go in
	// parts. From 5MiB to 5GiB. Default: 64MiB.
	PutLimit string `json:"put_limit,omitempty"`

	// Which version of the request that lists a bucket to use, `v2` or `v1`.
	// Default: v2.
	List string `json:"list,omitempty"`

	// The least size of a part, in bytes, from 5MiB to 5GiB. All parts of a blob
	// but the last are equal; they become larger where it would take more than
	// max_parts. Default: 16MiB.
	PartSize string `json:"part_size,omitempty"`

	// The most parts that the object store takes for one object, from 1 to 10000.
	// Default: 10000.
	MaxParts int `json:"max_parts,omitempty"`

	// The local directory of the cache. What has been pushed or mirrored and is
	// not in the bucket yet is only there. One process at a time uses it. Default:
	// `registry-cache` in Caddy's data directory.
	Cache string `json:"cache,omitempty"`

	// How much the cache may take: a number of bytes (`200GiB`), at least 64MiB.
	// When it is that much, what has not been pulled for longest leaves it. At
	// most half of it is for what waits to be uploaded. Default: 50GiB.
	CacheSize string `json:"cache_size,omitempty"`

	// How much the bucket may take: a number of bytes (`5TiB`), or `off`. When
	// it is nearly that much, what has not been pulled for longest is evicted.
	// Default: off.
	MaxSize string `json:"max_size,omitempty"`

	// The largest blob that is mirrored or pushed: a number of bytes (`20GiB`), or
	// `off`. Default: off.
	MaxBlobSize string `json:"max_blob_size,omitempty"`

	// What all processes know that use the bucket, at least 16 bytes. With it,
	// uploads under way are kept in the bucket, and each of them can go on with
	// what another has begun. Default: none; an upload belongs to the process that
	// it was begun at.
	Secret string `json:"secret,omitempty"`

	// When a push is acknowledged: `remote`, when it is in the bucket; `local`,
	// when it is on the local disk, from which it is uploaded behind. Then the
	// loss of that disk loses what was acknowledged. Default: remote.
	PushAck string `json:"push_ack,omitempty"`

	near     *disk.Disk
	settings settings
	limits   storage.Limits
}

// Credentials are an access key and its secret. Write both as placeholders.
type Credentials struct {
	Key    string `json:"key"`
	Secret string `json:"secret"`
}

const (
	defaultPutLimit = 64 << 20
	defaultPartSize = 16 << 20
	defaultCache    = 50 << 30
	smallestCache   = 64 << 20
	shortestSecret  = 16 // bytes
)

// CaddyModule returns the Caddy module information.
func (*S3) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "registry.storage.s3",
		New: func() caddy.Module { return new(S3) },
	}
}

// Provision fills in defaults and checks them. It touches nothing and asks nobody: it
// also runs beside a live mirror, for `caddy validate`.
func (s *S3) Provision(ctx caddy.Context) error {
	for _, o := range []struct {
		name string
		text *string
	}{
		{"bucket", &s.Bucket}, {"endpoint", &s.Endpoint}, {"region", &s.Region}, {"prefix", &s.Prefix},
		{"cache", &s.Cache},
	} {
		if *o.text == "" {
			continue
		}
		var err error
		if *o.text, err = resolve(*o.text); err != nil {
			return fmt.Errorf("%s: %w", o.name, err)
		}
	}
	s.Prefix = strings.Trim(s.Prefix, "/")
	if err := s.check(); err != nil {
		return err
	}
	s.settings = settings{
		Endpoint:  strings.TrimRight(s.Endpoint, "/"),
		Region:    s.Region,
		Bucket:    s.Bucket,
		Prefix:    s.Prefix,
		PathStyle: s.PathStyle == "on" || s.PathStyle == "" && s.Endpoint != "",
		MaxParts:  s.MaxParts,
		ListV1:    s.List == "v1",
		PushLocal: s.PushAck == "local",
	}
	if s.settings.MaxParts == 0 {
		s.settings.MaxParts = mostParts
	}
	// Checked above.
	s.settings.PutLimit, _ = parseSize("put_limit", s.PutLimit, defaultPutLimit, smallestPart, largestPart)
	s.settings.PartSize, _ = parseSize("part_size", s.PartSize, defaultPartSize, smallestPart, largestPart)
	s.settings.CacheSize, _ = parseSize("cache", s.CacheSize, defaultCache, smallestCache, math.MaxInt64)
	s.limits.MaxSize, _ = storage.ParseLimit("max_size", s.MaxSize)
	s.limits.MaxBlobSize, _ = storage.ParseLimit("max_blob_size", s.MaxBlobSize)

	// What is secret does not take the place of its placeholder, since the
	// configuration can be read.
	if c := s.Credentials; c != nil {
		var err error
		if s.settings.AccessKey, err = resolve(c.Key); err != nil {
			return fmt.Errorf("credentials.key: %w", err)
		}
		if s.settings.SecretKey, err = resolve(c.Secret); err != nil {
			return fmt.Errorf("credentials.secret: %w", err)
		}
		if s.settings.AccessKey == "" || s.settings.SecretKey == "" {
			return errors.New("credentials: both a key and a secret are needed")
		}
	}
	if s.Secret != "" {
		secret, err := resolve(s.Secret)
		if err != nil {
			return fmt.Errorf("secret: %w", err)
		}
		if len(secret) < shortestSecret {
			return shortSecret(secret)
		}
		s.settings.Secret = []byte(secret)
	}

	directory := s.Cache
	if directory == "" {
		directory = filepath.Join(caddy.AppDataDir(), "registry-cache")
	}
	s.near = &disk.Disk{Directory: directory}
	if err := s.near.Provision(ctx); err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	s.Cache = s.near.Directory
	return nil
}

func shortSecret(secret string) error {
	return fmt.Errorf("secret: it has %d bytes; at least %d are needed, as `openssl rand -hex 32` makes them", len(secret), shortestSecret)
}

// resolve replaces placeholders; one that is unknown or empty is an error. The error
// does not contain the value.
func resolve(s string) (string, error) {
	resolved, err := caddy.NewReplacer().ReplaceOrErr(s, true, true)
	if err != nil {
		return "", errors.New(strings.TrimPrefix(err.Error(), "caddy: ") + " (is it set in Caddy's environment, and is the file there?)")
	}
	return strings.TrimSpace(resolved), nil
}

// Some stores take more than AWS does, which has 3 to 63 small letters, digits, dots
// and hyphens.
var bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]$`)

// check reports what is wrong with the options. Those with a placeholder are let pass.
func (s *S3) check() error {
	raw := func(text string) bool { return strings.Contains(text, "{") }
	switch {
	case s.Bucket == "":
		return errors.New("bucket: there is none; write `storage s3 <bucket>`")
	case !raw(s.Bucket) && !bucketName.MatchString(s.Bucket):
		return fmt.Errorf("bucket: %q is not the name of a bucket", s.Bucket)
	case strings.ContainsAny(s.Region, " /:"):
		return fmt.Errorf("region: %q is not a region such as eu-central-1", s.Region)
	case s.PathStyle != "" && s.PathStyle != "on" && s.PathStyle != "off":
		return fmt.Errorf("path_style: %q is neither on nor off", s.PathStyle)
	case s.List != "" && s.List != "v2" && s.List != "v1":
		return fmt.Errorf("list: %q is neither v2 nor v1", s.List)
	case s.PushAck != "" && s.PushAck != "remote" && s.PushAck != "local":
		return fmt.Errorf("push_ack: %q is neither remote nor local", s.PushAck)
	case s.Secret != "" && !raw(s.Secret) && len(s.Secret) < shortestSecret:
		return shortSecret(s.Secret)
	case s.MaxParts < 0 || s.MaxParts > mostParts:
		return fmt.Errorf("max_parts: %d is not a number from 1 to %d", s.MaxParts, mostParts)
	}
	if prefix := strings.Trim(s.Prefix, "/"); prefix != "" && !raw(prefix) {
		if storage.CheckKey(prefix) != nil || len(prefix) > 256 {
			return fmt.Errorf("prefix: %.300q is not a path of at most 256 bytes", s.Prefix)
		}
	}
	if s.Endpoint != "" && !raw(s.Endpoint) {
		u, err := url.Parse(s.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return errors.New("endpoint: it is not a URL such as https://minio.example.com:9000, without a user and without a query")
		}
	}
	_, put := parseSize("put_limit", s.PutLimit, defaultPutLimit, smallestPart, largestPart)
	_, part := parseSize("part_size", s.PartSize, defaultPartSize, smallestPart, largestPart)
	_, cache := parseSize("cache", s.CacheSize, defaultCache, smallestCache, math.MaxInt64)
	_, most := storage.ParseLimit("max_size", s.MaxSize)
	_, blob := storage.ParseLimit("max_blob_size", s.MaxBlobSize)
	for _, err := range []error{put, part, cache, most, blob} {
		if err != nil {
			return err
		}
	}
	return nil
}

// parseSize reads a size within bounds.
func parseSize(option, s string, byDefault, least, most int64) (int64, error) {
	if s == "" {
		return byDefault, nil
	}
	bytes, err := humanize.ParseBytes(s)
	if err != nil {
		return 0, fmt.Errorf("%s: %q is not a size such as %s", option, s, spaceless(byDefault))
	}
	if bytes < uint64(least) || bytes > uint64(most) {
		if most == math.MaxInt64 {
			return 0, fmt.Errorf("%s: %s is less than %s", option, s, spaceless(least))
		}
		return 0, fmt.Errorf("%s: %s does not lie between %s and %s", option, s, spaceless(least), spaceless(most))
	}
	return int64(bytes), nil
}

// spaceless is a size as it is written in a Caddyfile.
func spaceless(bytes int64) string {
	return strings.NewReplacer(".0 ", "", " ", "").Replace(humanize.IBytes(uint64(bytes)))
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens:
//
//	storage s3 <bucket> {
//		endpoint      <url>
//		region        <region>
//		prefix        <prefix>
//		credentials   <key> <secret>
//		path_style    on|off
//		put_limit     <size>
//		list          v2|v1
//		part_size     <size>
//		max_parts     <n>
//		cache         <directory> [<size>]
//		max_size      <size>|off
//		max_blob_size <size>|off
//		secret        <secret>
//		push_ack      remote|local
//	}
func (s *S3) UnmarshalCaddyfile(tok *caddyfile.Dispenser) error {
	tok.Next() // the module's name
	if !tok.AllArgs(&s.Bucket) {
		return tok.ArgErr()
	}
	if err := s.check(); err != nil {
		return tok.WrapErr(err)
	}
	seen := map[string]bool{}
	for nesting := tok.Nesting(); tok.NextBlock(nesting); {
		option := tok.Val()
		if seen[option] {
			return tok.Errf("%s is given twice", option)
		}
		seen[option] = true
		texts := map[string]*string{
			"endpoint": &s.Endpoint, "region": &s.Region, "prefix": &s.Prefix, "path_style": &s.PathStyle,
			"put_limit": &s.PutLimit, "list": &s.List, "part_size": &s.PartSize, "max_size": &s.MaxSize,
			"max_blob_size": &s.MaxBlobSize, "secret": &s.Secret, "push_ack": &s.PushAck,
		}
		switch option {
		case "credentials":
			s.Credentials = new(Credentials)
			if !tok.AllArgs(&s.Credentials.Key, &s.Credentials.Secret) {
				return tok.ArgErr()
			}
			if s.Credentials.Key == "" || s.Credentials.Secret == "" {
				return tok.Err("credentials: both a key and a secret are needed")
			}
		case "max_parts":
			var text string
			if !tok.AllArgs(&text) {
				return tok.ArgErr()
			}
			var err error
			if s.MaxParts, err = strconv.Atoi(text); err != nil || s.MaxParts == 0 {
				return tok.Errf("max_parts: %q is not a number from 1 to %d", text, mostParts)
			}
		case "cache":
			args := tok.RemainingArgs()
			if len(args) == 0 || len(args) > 2 || args[0] == "" || args[len(args)-1] == "" {
				return tok.ArgErr()
			}
			s.Cache = args[0]
			if len(args) == 2 {
				s.CacheSize = args[1]
			}
		default:
			into := texts[option]
			if into == nil {
				return tok.Errf("unrecognized option %q of s3 storage; it has endpoint, region, prefix, credentials, path_style, put_limit, list, part_size, max_parts, cache, max_size, max_blob_size, secret and push_ack", option)
			}
			if !tok.AllArgs(into) {
				return tok.ArgErr()
			}
			if *into == "" {
				return tok.Errf("%s is empty", option)
			}
		}
		if err := s.check(); err != nil {
			return tok.WrapErr(err)
		}
	}
	return nil
}

// Identity is the bucket and prefix, and the cache, since what is not in the bucket
// yet is only there.
func (s *S3) Identity() string {
	at := s.settings.Endpoint
	if at == "" {
		at = "aws:" + s.Region
	}
	return fmt.Sprintf("s3:%s/%s/%s+%s", at, s.Bucket, s.Prefix, s.Cache)
}

// Open makes and locks the cache, and begins to find out what is in the bucket. It
// does not fail because the bucket cannot be reached.
func (s *S3) Open(ctx context.Context) (storage.Store, error) {
	b, err := newBucket(ctx, s.settings)
	if err != nil {
		return nil, err
	}
	st, err := open(ctx, s.near, b, s.settings)
	if err != nil {
		b.close()
		return nil, err
	}
	return st, nil
}

// Limits implements [storage.Backend].
func (s *S3) Limits() storage.Limits { return s.limits }

// Configure implements [storage.Backend]. It fails if the bucket refuses other credentials
// or another region.
func (s *S3) Configure(to storage.Store) error {
	st, ok := to.(*store)
	if !ok {
		return fmt.Errorf("s3: %T is not an S3 store", to)
	}
	return st.configure(s.settings)
}

var (
	_ caddy.Provisioner     = (*S3)(nil)
	_ caddyfile.Unmarshaler = (*S3)(nil)
	_ storage.Backend       = (*S3)(nil)
)
