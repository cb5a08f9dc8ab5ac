package api

import (
	"context"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
)

const (
	maxField  = 64 << 10 // bytes of one field of a form
	maxFields = 64       // parts of a form
	maxTags   = 50       // of one upload
	maxLabels = 64
)

// create answers POST to the collection: a form with a file, or JSON that says where
// the file is.
func (x *exchange) create() error {
	if _, err := x.query(); err != nil {
		return err
	}
	mediaType, params, err := mime.ParseMediaType(x.r.Header.Get("Content-Type"))
	switch {
	case err == nil && mediaType == "multipart/form-data":
		// Who may push nothing is told so before the file has come.
		if !x.mayAnywhere(access.Push) {
			return x.refused(access.Push, "")
		}
		return x.form(params["boundary"])
	case err == nil && mediaType == "application/json":
		if !x.mayAnywhere(access.Push) {
			return x.refused(access.Push, "")
		}
		return x.pull()
	}
	return fail(badType, "send a form (Content-Type: multipart/form-data) with the fields name and file, or JSON (application/json) with name and source")
}

// mayAnywhere reports whether there may be an image that the caller may do something
// with.
func (x *exchange) mayAnywhere(a access.Action) bool {
	if x.site.Rules == nil {
		return x.may(a, "")
	}
	return x.site.Rules.Anywhere(x.caller, a)
}

// describe sets what a field of a form, a query or the metadata of an upload says of
// what is to become a version.
func describe(d *backing.Draft, field, value string) error {
	switch field {
	case "name":
		if !validImage(value) {
			return fail(malformed, "name: %.80q cannot be the name of an image: that has at most %d lower-case letters and digits, with single '.', '_' or '-' in between", value, maxName)
		}
		d.Name = value
	case "version":
		if value != "" && !oci.ValidTag(value) {
			return fail(malformed, "version: %.80q has to be at most 128 letters, digits, '_', '.' and '-', and not to begin with one of the last two", value)
		}
		d.Version = value
	case "tag":
		for _, tag := range list(value) {
			if !oci.ValidTag(tag) {
				return fail(malformed, "tag: %.80q is no tag", tag)
			}
			if !slices.Contains(d.Tags, tag) {
				d.Tags = append(d.Tags, tag)
			}
		}
		if len(d.Tags) > maxTags {
			return fail(malformed, "tag: one upload sets at most %d", maxTags)
		}
	case "sha256", "sha512":
		sum, err := checksum(value, digest.Algorithm(field))
		if err != nil {
			return err
		}
		if sum.Algorithm() == digest.SHA256 {
			d.SHA256 = sum
		} else {
			d.SHA512 = sum
		}
	case "labels":
		return labels(d, value)
	case "decompress":
		if !slices.Contains([]string{"", "none", "auto", "gz", "xz", "zst"}, value) {
			return fail(malformed, "decompress: %.40q is none of auto, gz, xz, zst and none", value)
		}
		d.Decompress = value
	case "register":
		d.Register = append(d.Register, list(value)...)
		if len(d.Register) > maxTags {
			return fail(malformed, "register: those are more than %d clusters", maxTags)
		}
	default:
		return fail(malformed, "there is no field %.100q", field)
	}
	return nil
}

// checksum reads a digest, with its algorithm before it or without.
func checksum(value string, algorithm digest.Algorithm) (digest.Digest, error) {
	value = strings.ToLower(strings.TrimSpace(value))
	if !strings.Contains(value, ":") {
		value = string(algorithm) + ":" + value
	}
	d, err := oci.ParseDigest(value)
	if err != nil || d.Algorithm() != algorithm {
		return "", fail(malformed, "%s: %.140q is no such checksum in hexadecimal digits", algorithm, value)
	}
	return d, nil
}

// labels reads them as JSON, or as key=value with commas in between.
func labels(d *backing.Draft, value string) error {
	found := map[string]string{}
	if strings.HasPrefix(strings.TrimSpace(value), "{") {
		if err := parse([]byte(value), &found); err != nil {
			return err
		}
	} else {
		for _, pair := range list(value) {
			key, value, ok := strings.Cut(pair, "=")
			if !ok {
				return fail(malformed, "labels: %.80q is not key=value", pair)
			}
			found[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
	if len(found) > maxLabels {
		return fail(malformed, "labels: those are more than %d", maxLabels)
	}
	d.Labels = found
	return nil
}

// body is a part of a request that becomes a file.
func (x *exchange) body(r io.Reader, at, length int64) hosted.Body {
	control := http.NewResponseController(x.w)
	return hosted.Body{
		Reader: r, At: at, Length: length,
		// A time that has passed.
		Interrupt: func() { control.SetReadDeadline(time.Unix(1, 0)) },
	}
}

// small fails for a file that is larger than is taken.
func (x *exchange) small(size int64) error {
	if x.site.MaxImage > 0 && size > x.site.MaxImage {
		return fail(backing.TooLarge, "the file has %d bytes, and an image has at most %d here: raise max_image_size, or send it compressed with decompress", size, x.site.MaxImage)
	}
	return nil
}

// cancelPatience is how long the end of an upload that has failed may take.
const cancelPatience = 10 * time.Second

// abandon ends an upload that nobody can go on with.
func (x *exchange) abandon(u *backing.Upload) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.r.Context()), cancelPatience)
	defer cancel()
	u.Cancel(ctx) // it expires otherwise
}

// put answers PUT of a file, as `curl -T` sends it.
func (x *exchange) put() error {
	q, err := x.query("tag", "sha256", "sha512", "labels", "decompress", "register")
	if err != nil {
		return err
	}
	if x.r.Header.Get("Content-Range") != "" {
		return fail(malformed, "a part of a file cannot be PUT: upload it by tus, at /v1/uploads, to go on where it was cut")
	}
	if encoding := x.r.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return fail(badType, "send the file as it is, without Content-Encoding; a compressed one is unpacked with ?decompress=auto")
	}
	d := backing.Draft{Name: x.vars["name"], Version: x.vars["version"]}
	if strings.Contains(d.Version, ":") {
		return fail(malformed, "a version is named, and not given by its digest, when it is made")
	}
	for field := range q {
		if err := describe(&d, field, q.Get(field)); err != nil {
			return err
		}
	}
	if d.Decompress == "" || d.Decompress == "none" {
		if err := x.small(x.r.ContentLength); err != nil {
			return err
		}
	}
	u, err := x.library.Receive(x.r.Context(), d, x.r.ContentLength)
	if err != nil {
		return err
	}
	if x.later() {
		u.HashLater()
	}
	if _, err = u.Append(x.r.Context(), x.body(x.r.Body, 0, x.r.ContentLength)); err != nil {
		x.abandon(u)
		return err
	}
	return x.finish(u, d)
}

// respondAsync is the preference of a client that does not wait for what is done with
// its bytes once it has sent them (RFC 7240 §4.1).
const respondAsync = "respond-async"

func (x *exchange) later() bool {
	for _, line := range x.r.Header.Values("Prefer") {
		for _, preference := range list(line) {
			if name, _, _ := strings.Cut(preference, ";"); strings.EqualFold(strings.TrimSpace(name), respondAsync) {
				return true
			}
		}
	}
	return false
}

// finish makes a version of an upload that has come, and tells of it.
func (x *exchange) finish(u *backing.Upload, d backing.Draft) error {
	if x.later() {
		j, err := u.FinishLater(x.r.Context(), d)
		if err != nil {
			x.abandon(u)
			return err
		}
		x.w.Header().Set("Preference-Applied", respondAsync)
		return x.begun(j)
	}
	v, created, err := u.Finish(x.r.Context(), d)
	if err != nil {
		x.abandon(u)
		return err
	}
	x.report.Image, x.report.Version = v.Name, v.Version
	x.w.Header().Set("Location", x.relative(versionPath(v.Name, v.Version)))
	if created {
		return x.json(http.StatusCreated, v)
	}
	return x.json(http.StatusOK, v)
}

func versionPath(name, version string) string { return images + "/" + name + "/versions/" + version }

// form takes a form, whose file goes on to the library as it comes; whatever field
// comes behind it is known in time.
func (x *exchange) form(boundary string) (err error) {
	if boundary == "" {
		return fail(malformed, "the Content-Type has no boundary")
	}
	var (
		d    backing.Draft
		u    *backing.Upload
		seen = map[string]bool{}
		all  int64
	)
	defer func() {
		if err != nil && u != nil {
			x.abandon(u)
		}
	}()
	parts := multipart.NewReader(x.r.Body, boundary)
	for n := 0; ; n++ {
		part, err := parts.NextRawPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			return broken(err)
		}
		if n == maxFields {
			return fail(malformed, "the form has more than %d fields", maxFields)
		}
		field := part.FormName()
		if field != "tag" && field != "register" && seen[field] {
			return fail(malformed, "the form has two fields %.100q", field)
		}
		seen[field] = true
		if field != "file" {
			value, err := io.ReadAll(io.LimitReader(part, maxField+1))
			if err != nil {
				return broken(err)
			}
			if all += int64(len(value)); len(value) > maxField || all > maxDocument {
				return fail(backing.TooLarge, "the field %.100q has more than %d bytes", field, maxField)
			}
			if err := describe(&d, field, string(value)); err != nil {
				return err
			}
			if field == "name" {
				if err := x.allow(access.Push, d.Name); err != nil {
					return err
				}
			}
			continue
		}
		if u, err = x.library.Receive(x.r.Context(), d, -1); err != nil {
			return err
		}
		if x.later() {
			u.HashLater()
		}
		if _, err := u.Append(x.r.Context(), x.body(part, 0, -1)); err != nil {
			return broken(err)
		}
	}
	switch {
	case u == nil:
		return fail(malformed, "the form has no field file")
	case d.Name == "":
		return fail(malformed, "the form has no field name")
	}
	x.report.Image = d.Name
	return x.finish(u, d)
}

// broken is what a client is told whose form cannot be read.
func broken(err error) error {
	if e := judge(err); e.Code != internal {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return fail(malformed, "the form cannot be read: %w", err)
}

// pull has the library fetch an image.
func (x *exchange) pull() error {
	var body struct {
		Name     string            `json:"name"`
		Version  string            `json:"version"`
		Tags     []string          `json:"tags"`
		Labels   map[string]string `json:"labels"`
		SHA256   string            `json:"sha256"`
		SHA512   string            `json:"sha512"`
		Register []string          `json:"register"`
		Source   *struct {
			Type    string            `json:"type"`
			URL     string            `json:"url"`
			Mirrors []string          `json:"mirrors"`
			Headers map[string]string `json:"headers"`
			Auth    struct {
				User     string `json:"user"`
				Password string `json:"password"`
				Token    string `json:"token"`
			} `json:"auth"`
			CA         string `json:"ca"`
			Checksum   string `json:"checksum"`
			Decompress string `json:"decompress"`
		} `json:"source"`
	}
	if err := x.decode(&body, false); err != nil {
		return err
	}
	if body.Source == nil || body.Source.Type != "url" || body.Source.URL == "" {
		return fail(malformed, `source is {"type":"url","url":"https://…"}; to send the file itself, send a form or PUT it`)
	}
	d := backing.Draft{Labels: body.Labels}
	fields := [][2]string{{"name", body.Name}, {"version", body.Version}, {"tag", strings.Join(body.Tags, ",")},
		{"decompress", body.Source.Decompress}, {"register", strings.Join(body.Register, ",")}}
	if body.SHA256 != "" {
		fields = append(fields, [2]string{"sha256", body.SHA256})
	}
	if body.SHA512 != "" {
		fields = append(fields, [2]string{"sha512", body.SHA512})
	}
	if sum := body.Source.Checksum; sum != "" {
		algorithm, _, named := strings.Cut(strings.ToLower(sum), ":")
		switch {
		case !named && len(sum) == 128:
			algorithm = "sha512"
		case !named && len(sum) == 64:
			algorithm = "sha256"
		}
		if algorithm != "sha256" && algorithm != "sha512" {
			return fail(malformed, "checksum is sha512:… or sha256:…")
		}
		fields = append(fields, [2]string{algorithm, sum})
	}
	for _, f := range fields {
		if err := describe(&d, f[0], f[1]); err != nil {
			return err
		}
	}
	if len(d.Labels) > maxLabels {
		return fail(malformed, "labels: those are more than %d", maxLabels)
	}
	if err := x.allow(access.Push, d.Name); err != nil {
		return err
	}
	x.report.Image = d.Name
	j, err := x.library.Pull(x.r.Context(), d, backing.Source{
		Type: "url", URL: body.Source.URL, Also: body.Source.Mirrors, Headers: body.Source.Headers,
		User: body.Source.Auth.User, Secret: body.Source.Auth.Password, Token: body.Source.Auth.Token, CA: body.Source.CA,
	})
	if err != nil {
		return err
	}
	return x.begun(j)
}

// begun tells of a job that makes a version.
func (x *exchange) begun(j backing.Job) error {
	x.report.Image, x.report.Version = j.Name, j.Version
	x.w.Header().Set("Location", x.relative("/v1/jobs/"+j.ID))
	return x.json(http.StatusAccepted, j)
}
