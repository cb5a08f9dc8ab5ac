package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/caddy-registry/mirror/internal/backing"
)

// The commonest codes, which this package fails with itself.
const (
	malformed = backing.Malformed
	notFound  = backing.NotFound
)

// maxDocument is the largest JSON that a request may bring, in bytes.
const maxDocument = 1 << 20

// decode reads the JSON that a request brings. Optional is a body that may be empty.
func (x *exchange) decode(into any, optional bool) error {
	if optional && x.r.ContentLength == 0 {
		return nil
	}
	mediaType, _, err := mime.ParseMediaType(x.r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" && mediaType != "application/merge-patch+json" {
		return fail(badType, "send JSON, with Content-Type: application/json")
	}
	if x.r.ContentLength > maxDocument {
		return fail(backing.TooLarge, "a document has at most %d bytes", maxDocument)
	}
	body, err := io.ReadAll(io.LimitReader(x.r.Body, maxDocument+1))
	if err != nil {
		return fail(malformed, "the body could not be read: %w", err)
	}
	if len(body) > maxDocument {
		return fail(backing.TooLarge, "a document has at most %d bytes", maxDocument)
	}
	return parse(body, into)
}

// parse reads JSON, in which every field must be known.
func parse(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("there is something behind the document")
		}
	}
	if err != nil {
		var wrong *json.UnmarshalTypeError
		switch field, unknown := strings.CutPrefix(err.Error(), "json: unknown field "); {
		case unknown:
			return fail(malformed, "there is no field %.100s", field)
		case errors.As(err, &wrong) && wrong.Field != "":
			return fail(malformed, "%s cannot be a %s", wrong.Field, wrong.Value)
		}
		return fail(malformed, "the JSON cannot be read: %.200s", strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// query is the query of a request, which may have these fields, once each.
func (x *exchange) query(fields ...string) (url.Values, error) {
	values, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, fail(malformed, "the query cannot be read: %.100s", err)
	}
	for name, all := range values {
		if !slices.Contains(fields, name) {
			return nil, fail(malformed, "there is no query parameter %.100q", name)
		}
		if len(all) > 1 {
			return nil, fail(malformed, "the query parameter %q is there twice", name)
		}
	}
	return values, nil
}

// flag reads a query parameter that is true or false.
func flag(values url.Values, name string) (bool, error) {
	switch values.Get(name) {
	case "", "0", "false":
		return false, nil
	case "1", "true":
		return true, nil
	}
	return false, fail(malformed, "%s is true or false", name)
}

// json sends a document.
func (x *exchange) json(status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return x.send(status, "application/json", append(body, '\n'))
}

func (x *exchange) send(status int, mediaType string, body []byte) error {
	header := x.w.Header()
	header.Set("Content-Type", mediaType)
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Set("X-Content-Type-Options", "nosniff")
	if header.Get("Cache-Control") == "" {
		header.Set("Cache-Control", "no-store")
	}
	x.w.WriteHeader(status)
	if x.r.Method != http.MethodHead {
		x.w.Write(body)
	}
	return nil
}

// relative is a reference to a path of the API from the path of the request: it holds
// behind a proxy, too, whatever that calls the host and puts before the path.
func (x *exchange) relative(path string) string {
	here := strings.Split(x.r.URL.EscapedPath()[1:], "/")
	there := strings.Split(path[1:], "/")
	same := 0
	for same < len(here)-1 && same < len(there)-1 && here[same] == there[same] {
		same++
	}
	ref := strings.Repeat("../", len(here)-1-same) + strings.Join(there[same:], "/")
	if strings.HasPrefix(ref, "../") {
		return ref
	}
	return "./" + ref // what begins with digits and a colon would be a scheme
}

// etag is that of a revision.
func etag(revision string) string { return `"` + revision + `"` }

// revision is what If-Match demands: a revision, or empty if whichever will do.
func (x *exchange) revision() (string, error) {
	values := x.r.Header.Values("If-Match")
	if len(values) == 0 || len(values) == 1 && strings.TrimSpace(values[0]) == "*" {
		return "", nil
	}
	value := strings.TrimSpace(values[0])
	if len(values) > 1 || len(value) < 3 || len(value) > 200 || value[0] != '"' || value[len(value)-1] != '"' || strings.Contains(value[1:len(value)-1], `"`) {
		return "", fail(malformed, `If-Match is one ETag of the image, with its quotes, or *`)
	}
	return value[1 : len(value)-1], nil
}

// list reads names with commas in between.
func list(s string) []string {
	var names []string
	for name := range strings.SplitSeq(s, ",") {
		if name = strings.TrimSpace(name); name != "" {
			names = append(names, name)
		}
	}
	return names
}
