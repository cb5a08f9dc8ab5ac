package api

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/content"
)

func (x *exchange) health() error {
	return x.json(http.StatusOK, map[string]string{"status": "ok"})
}

// readyPatience is how long GET /ready looks.
const readyPatience = 5 * time.Second

func (x *exchange) readiness() error {
	ctx, cancel := context.WithTimeout(x.r.Context(), readyPatience)
	defer cancel()
	answer := struct {
		Status string  `json:"status"`
		Checks []Check `json:"checks"`
	}{"ok", []Check{}}
	status := http.StatusOK
	if x.ready != nil {
		answer.Checks = append(answer.Checks, x.ready(ctx)...)
	}
	for _, check := range answer.Checks {
		if !check.OK && !check.Warning {
			answer.Status, status = "failing", http.StatusServiceUnavailable
			x.w.Header().Set("Retry-After", "5")
		}
	}
	return x.json(status, answer)
}

func (x *exchange) list() error {
	q, err := x.query("limit", "cursor", "label")
	if err != nil {
		return err
	}
	query := backing.Query{Label: q.Get("label"), After: q.Get("cursor"), May: func(name string) bool { return x.may(access.Pull, name) }}
	if limit := q.Get("limit"); limit != "" {
		if query.Limit, err = strconv.Atoi(limit); err != nil || query.Limit < 1 || query.Limit > 1000 {
			return fail(malformed, "limit is a number from 1 to 1000")
		}
	}
	if query.After != "" && !validImage(query.After) {
		return fail(malformed, "cursor is the `next` of the page before")
	}
	if x.site.Rules != nil && x.caller.Err != nil {
		return x.refused(access.Pull, "")
	}
	found, next, err := x.library.Images(x.r.Context(), query)
	if err != nil {
		return err
	}
	answer := struct {
		Items []backing.Image `json:"items"`
		Next  *string         `json:"next"`
	}{Items: found}
	if found == nil {
		answer.Items = []backing.Image{}
	}
	if next != "" {
		answer.Next = &next
	}
	return x.json(http.StatusOK, answer)
}

func (x *exchange) image() error {
	i, err := x.library.Image(x.r.Context(), x.vars["name"])
	if err != nil {
		return err
	}
	return x.sendImage(i)
}

func (x *exchange) sendImage(i backing.Image) error {
	header := x.w.Header()
	header.Set("Etag", etag(i.Revision))
	header.Set("Cache-Control", "private, no-cache")
	if content.Matches(x.r.Header["If-None-Match"], etag(i.Revision)) && (x.r.Method == http.MethodGet || x.r.Method == http.MethodHead) {
		x.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return x.json(http.StatusOK, i)
}

func (x *exchange) edit() error {
	revision, err := x.revision()
	if err != nil {
		return err
	}
	var e backing.Edit
	if err := x.decode(&e, false); err != nil {
		return err
	}
	i, err := x.library.Edit(x.r.Context(), x.vars["name"], revision, e)
	if err != nil {
		return err
	}
	return x.sendImage(i)
}

// remove deletes a version, or all of an image.
func (x *exchange) remove() error {
	q, err := x.query("unregister")
	if err != nil {
		return err
	}
	unregister, err := flag(q, "unregister")
	if err != nil {
		return err
	}
	revision, err := x.revision()
	if err != nil {
		return err
	}
	if err := x.library.Delete(x.r.Context(), x.vars["name"], x.vars["version"], revision, unregister); err != nil {
		return err
	}
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (x *exchange) versions() error {
	i, err := x.library.Image(x.r.Context(), x.vars["name"])
	if err != nil {
		return err
	}
	if i.Versions == nil {
		i.Versions = []backing.Version{}
	}
	return x.json(http.StatusOK, map[string]any{"items": i.Versions, "next": nil})
}

func (x *exchange) version() error {
	v, err := x.library.Version(x.r.Context(), x.vars["name"], x.vars["version"])
	if err != nil {
		return err
	}
	return x.json(http.StatusOK, v)
}

func (x *exchange) tags() error {
	i, err := x.library.Image(x.r.Context(), x.vars["name"])
	if err != nil {
		return err
	}
	if i.Tags == nil {
		i.Tags = map[string]backing.Tag{}
	}
	x.w.Header().Set("Etag", etag(i.Revision))
	return x.json(http.StatusOK, i.Tags)
}

func (x *exchange) tag() error {
	i, err := x.library.Image(x.r.Context(), x.vars["name"])
	if err != nil {
		return err
	}
	t, ok := i.Tags[x.vars["tag"]]
	if !ok {
		return fail(notFound, "the image %s has no tag %s", i.Name, x.vars["tag"])
	}
	x.w.Header().Set("Etag", etag(i.Revision))
	return x.json(http.StatusOK, t)
}

func (x *exchange) setTag() error {
	revision, err := x.revision()
	if err != nil {
		return err
	}
	var body struct {
		Version string `json:"version"`
	}
	if err := x.decode(&body, false); err != nil {
		return err
	}
	if !validReference(body.Version) {
		return fail(malformed, "version names a version, another tag, or a digest as in sha512:…")
	}
	t, err := x.library.SetTag(x.r.Context(), x.vars["name"], x.vars["tag"], body.Version, revision)
	if err != nil {
		return err
	}
	return x.json(http.StatusOK, t)
}

func (x *exchange) removeTag() error {
	revision, err := x.revision()
	if err != nil {
		return err
	}
	if err := x.library.RemoveTag(x.r.Context(), x.vars["name"], x.vars["tag"], revision); err != nil {
		return err
	}
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}

// maxNote is what the library keeps of a note, and of who has made a token, in bytes.
const maxNote = 200

func (x *exchange) tokens() error {
	tokens, err := x.library.Tokens(x.r.Context(), x.vars["name"])
	if err != nil {
		return err
	}
	if tokens == nil {
		tokens = []backing.PathToken{}
	}
	return x.json(http.StatusOK, map[string]any{"items": tokens})
}

func (x *exchange) addToken() error {
	var body struct {
		Note string `json:"note"`
	}
	if err := x.decode(&body, true); err != nil {
		return err
	}
	if len(body.Note) > maxNote {
		return fail(malformed, "a note has at most %d bytes", maxNote)
	}
	t, err := x.library.AddToken(x.r.Context(), x.vars["name"], body.Note, strings.ToValidUTF8(x.caller.Identity[:min(len(x.caller.Identity), maxNote)], ""))
	if err != nil {
		return err
	}
	x.w.Header().Set("Location", x.relative(images+"/"+x.vars["name"]+"/tokens/"+t.ID))
	return x.json(http.StatusCreated, t)
}

func (x *exchange) removeToken() error {
	q, err := x.query("force")
	if err != nil {
		return err
	}
	force, err := flag(q, "force")
	if err != nil {
		return err
	}
	if err := x.library.RemoveToken(x.r.Context(), x.vars["name"], x.vars["token"], force); err != nil {
		return err
	}
	x.w.WriteHeader(http.StatusNoContent)
	return nil
}
