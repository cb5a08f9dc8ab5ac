package backing_test

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// TestForget: an image whose Longhorn is no more can be deleted once its registration is
// forgotten, and not before; a token that a registration needs is not revoked, and goes
// with the last that needs it.
func TestForget(t *testing.T) {
	m := fake.New(t, fake.Options{})
	s := newShelf(t)
	s.set.PublicURL, s.set.Private = &url.URL{Scheme: "http", Host: "images.test"}, true
	s.set.Clusters = []backing.Cluster{{Name: "one", URL: m.URL}, {Name: "two", URL: m.URL}}
	s.Set(s.set)
	v := s.add(backing.Draft{Name: "a"}, rawDisk(1))
	register := func() backing.Registration {
		r, err := s.Register(t.Context(), "a", "v1", backing.RegistrationOptions{Cluster: "one"})
		if err != nil || !strings.Contains(r.URL, "/v1/files/t/") {
			t.Fatal(r, err)
		}
		return r
	}
	first := register()
	tokens, err := s.Tokens(t.Context(), "a")
	if err != nil || len(tokens) != 1 {
		t.Fatal(tokens, err)
	}
	var told *backing.Error
	if err := s.RemoveToken(t.Context(), "a", tokens[0].ID, false); !errors.As(err, &told) || told.Code != backing.InUse || len(told.Blockers) != 1 || told.Blockers[0].Name != first.Name {
		t.Errorf("%+v", err)
	}
	m.Stop()
	if err := s.Delete(t.Context(), "a", "", "", true); !errors.As(err, &told) || told.Code != backing.LonghornAway || !strings.Contains(told.Message, "forget") {
		t.Errorf("%+v", err)
	}
	s.reads(v, rawDisk(1))

	s.set.Clusters = nil
	s.Set(s.set)
	if err := s.Delete(t.Context(), "a", "", "", false); !errors.As(err, &told) || told.Code != backing.InUse || told.Blockers[0].Kind != "registration" {
		t.Errorf("%+v", err)
	}
	is(t, s.Forget(t.Context(), "a", "v1", "two"), backing.NotFound)
	is(t, s.Forget(t.Context(), "b", "v1", "one"), backing.NotFound)
	if err := s.Forget(t.Context(), "a", "v1", "one"); err != nil {
		t.Fatal(err)
	}
	if tokens, err := s.Tokens(t.Context(), "a"); err != nil || len(tokens) > 0 {
		t.Errorf("%+v, %v", tokens, err)
	}
	s.restart()
	if r := s.version("a", "v1").Registrations; len(r) > 0 {
		t.Errorf("%+v", r)
	}
	if err := s.Delete(t.Context(), "a", "", "", false); err != nil {
		t.Error(err)
	}
}

// TestDeleteRefusedByLonghorn: what Longhorn does not let go of stays as it was.
func TestDeleteRefusedByLonghorn(t *testing.T) {
	m := fake.New(t, fake.Options{})
	s := newShelf(t)
	s.set.PublicURL = &url.URL{Scheme: "http", Host: "images.test"}
	s.set.Clusters = []backing.Cluster{{Name: "one", URL: m.URL}}
	s.Set(s.set)
	v := s.add(backing.Draft{Name: "a", Tags: []string{"stable"}}, rawDisk(1))
	r, err := s.Register(t.Context(), "a", "v1", backing.RegistrationOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for len(m.Names()) == 0 { // until it has been made
		if err := t.Context().Err(); err != nil {
			t.Fatal(err)
		}
	}
	m.SetVolume("pvc-1", r.Name)
	// It is made use of between our look and the deletion.
	m.Break(fake.Fault{Path: "/v1/volumes", Status: 200, Body: `{"type":"collection","data":[]}`, Times: 2})
	s.down.Store(true) // and nothing could be taken back
	var told *backing.Error
	if err := s.Delete(t.Context(), "a", "", "", true); !errors.As(err, &told) || told.Code != backing.InUse {
		t.Errorf("%+v", err)
	}
	s.down.Store(false)
	s.restart()
	s.reads(v, rawDisk(1))
	if got := s.version("a", "stable"); got.State != backing.Ready {
		t.Errorf("%+v", got)
	}
}
