package notify

import (
	"encoding/json"
	"time"

	"github.com/opencontainers/go-digest"
)

// mediaType is what a webhook is sent, as registry:2 has it.
const mediaType = "application/vnd.docker.distribution.events.v1+json"

// record is an event as distribution writes it (notifications/event.go). Its
// references, which are off there unless they are asked for, are never there.
type record struct {
	ID        string    `json:"id"`
	Timestamp time.Time `json:"timestamp"`
	Action    Action    `json:"action"`
	Target    struct {
		MediaType      string        `json:"mediaType,omitempty"`
		Size           int64         `json:"size,omitempty"`
		Digest         digest.Digest `json:"digest,omitempty"`
		Length         int64         `json:"length,omitempty"`
		Repository     string        `json:"repository,omitempty"`
		FromRepository string        `json:"fromRepository,omitempty"`
		URL            string        `json:"url,omitempty"`
		Tag            string        `json:"tag,omitempty"`
	} `json:"target"`
	Request struct {
		ID        string `json:"id"`
		Addr      string `json:"addr,omitempty"`
		Host      string `json:"host,omitempty"`
		Method    string `json:"method"`
		UserAgent string `json:"useragent"`
	} `json:"request"`
	Actor struct {
		Name string `json:"name,omitempty"`
	} `json:"actor"`
	Source source `json:"source"`
}

// source is who tells.
type source struct {
	Addr       string `json:"addr,omitempty"`
	InstanceID string `json:"instanceID,omitempty"`
}

// encode is one event of an envelope. It has the same id each time it is
// delivered.
func encode(e Event, by source) ([]byte, error) {
	r := record{ID: NewID(), Timestamp: e.At, Action: e.Action, Source: by}
	r.Target.MediaType = clip(e.MediaType)
	r.Target.Size, r.Target.Length = e.Size, e.Size
	r.Target.Digest = e.Digest
	r.Target.Repository, r.Target.FromRepository, r.Target.Tag = e.Repository, e.From, e.Tag
	r.Target.URL = e.URL
	if len(e.URL) > 4*maxField {
		r.Target.URL = ""
	}
	if r.Request.ID = e.Request; e.Request == "" {
		r.Request.ID = r.ID
	}
	r.Request.Addr, r.Request.Host, r.Request.Method, r.Request.UserAgent = e.Addr, clip(e.Host), clip(e.Method), clip(e.UserAgent)
	r.Actor.Name = clip(e.Actor)
	return json.Marshal(r)
}

// maxField is how much is kept of what a client says of itself.
const maxField = 256

func clip(s string) string { return s[:min(len(s), maxField)] }

// envelope is what is sent: one event, as distribution sends them.
func envelope(event []byte) []byte {
	return append(append([]byte(`{"events":[`), event...), "]}"...)
}
