package backing

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// TestReach: whether each Longhorn answers is told, of one that is silent without
// waiting for it.
func TestReach(t *testing.T) {
	asked := make(chan struct{}, 1)
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case asked <- struct{}{}:
		default:
		}
		<-r.Context().Done()
	}))
	t.Cleanup(silent.Close)
	m := fake.New(t, fake.Options{})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage,
		Cluster{Name: "silent", URL: silent.URL}, Cluster{Name: "default", URL: m.URL, Token: "x"})
	l := &Library{registrar: r.registrar}
	until := func(what string, answers bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			told := l.Reach(t.Context())
			if len(told) != 2 || told[0].Cluster != "default" || told[1].Cluster != "silent" || told[1].Err == nil {
				t.Fatalf("%s: %+v", what, told)
			}
			if told[0].Err != errNoAnswer && (told[0].Err == nil) == answers {
				return
			}
		}
		t.Fatalf("%s: it is never told", what)
	}
	until("it is there", true)
	<-asked
	m.Stop()
	until("it is stopped", false)
	m.Start()
	until("it is there again", true)
	m.Require("Bearer y")
	until("it does not let us in", false)
}

// TestReachIsKept: an answer is good for a while.
func TestReachIsKept(t *testing.T) {
	m := fake.New(t, fake.Options{})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	l := &Library{registrar: r.registrar}
	r.pace.reach = time.Hour
	for deadline := time.Now().Add(time.Minute); l.Reach(t.Context())[0].Err != nil; {
		if time.Now().After(deadline) {
			t.Fatal("it is never seen")
		}
	}
	m.Stop()
	if told := l.Reach(t.Context()); told[0].Err != nil {
		t.Errorf("it was asked again: %v", told[0].Err)
	}
}
