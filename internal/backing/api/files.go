package api

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/content"
)

const (
	// forever is for what its address says the digest of.
	forever = "max-age=31536000, immutable, no-transform"
	// asked is for what a name stands for today.
	asked = "no-cache, no-transform"

	filesPath = "/v1/files/"

	// openPatience is how long a file may take to begin. Longhorn waits for a minute
	// for the first byte.
	openPatience = 25 * time.Second
)

// file is the address that is given to machines.
func (x *exchange) file() error {
	v, err := x.fileVersion()
	if err != nil {
		return err
	}
	if err := x.allow(access.Pull, v.Name); err != nil {
		return err
	}
	return x.bytes(v, x.scope(v.Name)+forever)
}

// secretFile is file with a token in its path, which is all the proof that it takes.
func (x *exchange) secretFile() error {
	absent := fail(notFound, "there is no file at this address")
	image, err := x.library.Token(x.r.Context(), x.vars["secret"])
	if err != nil {
		if judge(err).Code == notFound {
			return absent
		}
		return err
	}
	v, err := x.fileVersion()
	if err != nil {
		return err
	}
	if v.Name != image {
		return absent
	}
	return x.bytes(v, "private, "+forever)
}

// fileVersion is the version whose file the path names.
func (x *exchange) fileVersion() (backing.Version, error) {
	sum, name := x.vars["sha512"], x.vars["file"]
	d := digest.NewDigestFromEncoded(digest.SHA512, sum)
	if d.Validate() != nil || len(name) > 255 {
		return backing.Version{}, fail(notFound, "there is no file at this address")
	}
	v, err := x.library.File(x.r.Context(), d, name)
	if err == nil {
		x.report.Image, x.report.Version = v.Name, v.Version
	}
	return v, err
}

// download is the address for people.
func (x *exchange) download() error {
	q, err := x.query("version")
	if err != nil {
		return err
	}
	reference := q.Get("version")
	if reference != "" && !validReference(reference) {
		return fail(notFound, "%.80q names no version: write its name, a tag, or a digest as in sha512:…", reference)
	}
	v, err := x.library.Version(x.r.Context(), x.vars["name"], reference)
	if err != nil {
		return err
	}
	x.report.Version = v.Version
	if v.State != backing.Ready {
		return fail(notFound, "%s %s is not ready to be downloaded: it is %s", v.Name, v.Version, v.State)
	}
	name := fileName(v)
	header := x.w.Header()
	header.Set("Content-Location", x.relative(filesPath+v.Digests.SHA512.Encoded()+"/"+name))
	header.Set("Content-Disposition", `attachment; filename="`+name+`"`)
	return x.bytes(v, x.scope(v.Name)+asked)
}

// fileName is the last component of a version's address. It needs no escaping.
func fileName(v backing.Version) string {
	if u, err := url.Parse(v.URLs.File); err == nil && v.URLs.File != "" {
		return path.Base(u.Path)
	}
	return v.Name + "-" + v.Version + "." + string(v.Format)
}

// scope says who may keep an answer about an image.
func (x *exchange) scope(image string) string {
	if x.public(image) {
		return "public, "
	}
	return "private, "
}

// bytes answers with the file of a version.
func (x *exchange) bytes(v backing.Version, cacheControl string) error {
	validator := content.Validator{ETag: `"sha512-` + v.Digests.SHA512.Encoded() + `"`, Modified: v.CreatedAt}
	header := x.w.Header()
	header.Set("Etag", validator.ETag)
	header.Set("Cache-Control", cacheControl)
	header.Set("Last-Modified", v.CreatedAt.UTC().Format(http.TimeFormat))
	if validator.Unchanged(x.r) {
		x.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	header.Set("Accept-Ranges", "bytes")
	header.Set("Content-Type", "application/octet-stream")
	header.Set("Repr-Digest", reprDigest(v.Digests))
	header.Set("X-Content-Type-Options", "nosniff")
	if x.r.Method == http.MethodHead {
		// Longhorn gives all of a HEAD four seconds: the store is not asked.
		header.Set("Content-Length", strconv.FormatInt(v.Size, 10))
		x.w.WriteHeader(http.StatusOK)
		return nil
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), openPatience)
	defer cancel()
	found, err := x.library.Open(ctx, v)
	if err != nil {
		return err
	}
	defer found.Close()
	answer, err := content.Choose(x.w, x.r, found, validator)
	if err != nil {
		return err
	}
	err = answer.Prepare(ctx)
	defer answer.End()
	if err == nil {
		x.report.Abort, err = answer.Send()
	}
	x.library.Failed(v, err)
	return err
}

// reprDigest is the header of RFC 9530 that has digests of the whole file, whatever
// part of it is sent.
func reprDigest(d backing.Digests) string {
	member := func(d digest.Digest) string {
		sum, _ := hex.DecodeString(d.Encoded())
		return ":" + base64.StdEncoding.EncodeToString(sum) + ":"
	}
	return "sha-256=" + member(d.SHA256) + ", sha-512=" + member(d.SHA512)
}
