package backing_test

import (
	"net/url"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
)

// A token that a registration uses stays as long as the registration, and no longer.
func TestTokenOfRegistration(t *testing.T) {
	s := newShelf(t)
	v := s.add(backing.Draft{Name: "a"}, rawDisk(1))
	s.set.PublicURL, _ = url.Parse("http://images.test")
	s.set.Private, s.set.Clusters = true, []backing.Cluster{{Name: "default", URL: "http://127.0.0.1:1"}}
	s.Set(s.set)
	if _, err := s.Register(t.Context(), "a", v.Version, backing.RegistrationOptions{}); err != nil {
		t.Fatal(err)
	}
	all, err := s.Tokens(t.Context(), "a")
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	is(t, s.RemoveToken(t.Context(), "a", all[0].ID), backing.InUse)
	if err := s.Forget(t.Context(), "a", v.Version, "default"); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Tokens(t.Context(), "a"); err != nil || len(all) != 0 {
		t.Error(all, err)
	}
}
