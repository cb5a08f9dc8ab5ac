package notify

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestEnvelope compares what is sent with what registry:2 sends.
func TestEnvelope(t *testing.T) {
	k := newSink(t)
	s := open(t, t.TempDir())
	s.source = source{"registry.corp", "instance"}
	hook := k.hook("audit")
	hook.Header = http.Header{"Authorization": {"Bearer x"}, "X-Two": {"a", "b"}}
	s.Set([]Webhook{hook})
	at := time.Date(2026, 3, 1, 12, 0, 0, 123, time.UTC)
	request := NewID()
	s.Notify(Event{
		Action: Push, At: at, Repository: "apps/web", Tag: "v1", Digest: "sha256:aa", MediaType: "application/vnd.oci.image.manifest.v1+json", Size: 708,
		Actor: "alice", Addr: "10.0.0.1", Request: request, Method: "PUT", Host: "registry.corp:5000", UserAgent: "crane/0.20", URL: "https://registry.corp:5000/v2/apps/web/manifests/sha256:aa",
	})
	s.Notify(Event{Action: Mount, At: at, Repository: "apps/web", From: "base/os", Digest: "sha256:bb", MediaType: "application/octet-stream", Size: 5, Method: "POST", UserAgent: strings.Repeat("x", 10_000)})
	s.Notify(Event{Action: Delete, At: at, Repository: "apps/web", Tag: "v1", Method: "DELETE"})
	k.tried(3)
	id := regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, want := range []string{
		`{"events":[{"id":"ID","timestamp":"2026-03-01T12:00:00.000000123Z","action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":708,"digest":"sha256:aa","length":708,"repository":"apps/web","url":"https://registry.corp:5000/v2/apps/web/manifests/sha256:aa","tag":"v1"},"request":{"id":"ID","addr":"10.0.0.1","host":"registry.corp:5000","method":"PUT","useragent":"crane/0.20"},"actor":{"name":"alice"},"source":{"addr":"registry.corp","instanceID":"instance"}}]}`,
		`{"events":[{"id":"ID","timestamp":"2026-03-01T12:00:00.000000123Z","action":"mount","target":{"mediaType":"application/octet-stream","size":5,"digest":"sha256:bb","length":5,"repository":"apps/web","fromRepository":"base/os"},"request":{"id":"ID","method":"POST","useragent":"` + strings.Repeat("x", 256) + `"},"actor":{},"source":{"addr":"registry.corp","instanceID":"instance"}}]}`,
		`{"events":[{"id":"ID","timestamp":"2026-03-01T12:00:00.000000123Z","action":"delete","target":{"repository":"apps/web","tag":"v1"},"request":{"id":"ID","method":"DELETE","useragent":""},"actor":{},"source":{"addr":"registry.corp","instanceID":"instance"}}]}`,
	} {
		if got := id.ReplaceAllString(k.bodies[i], "ID"); got != want {
			t.Errorf("sent\n%s\nwant\n%s", got, want)
		}
		r := k.requests[i]
		if r.Method != "POST" || r.URL.Path != "/events" || r.Header.Get("Content-Type") != "application/vnd.docker.distribution.events.v1+json" ||
			r.Header.Get("Authorization") != "Bearer x" || !slices.Equal(r.Header["X-Two"], []string{"a", "b"}) {
			t.Errorf("%s %s, %v", r.Method, r.URL, r.Header)
		}
	}
	if !strings.Contains(k.bodies[0], `"request":{"id":"`+request+`"`) {
		t.Error("the request is named otherwise")
	}
}

// TestOrder: whatever a webhook answers, it is sent one event after another, and
// the same one until it has taken it.
func TestOrder(t *testing.T) {
	k := newSink(t)
	k.answer = func(attempt int, _ string) int {
		return []int{200, 500, 202, 404, 307, 204}[attempt%6]
	}
	s := open(t, t.TempDir())
	s.Set([]Webhook{k.hook("audit")})
	for range 90 {
		s.push()
	}
	k.takes(tags(1, 90)...)
	k.mu.Lock()
	defer k.mu.Unlock()
	var order []string
	for i, tag := range k.attempts {
		if i == 0 || tag != k.attempts[i-1] {
			order = append(order, tag)
		}
		if k.requests[i].URL.Path != "/events" {
			t.Fatal("a redirect was followed")
		}
	}
	if !slices.Equal(order, tags(1, 90)) {
		t.Errorf("events were sent in the order of %q", order)
	}
	if len(k.ids) != 90 {
		t.Errorf("%d ids of 90 events", len(k.ids))
	}
}

// TestBackoff: a webhook that fails is left alone after so many failures, and
// each further attempt comes after a rest.
func TestBackoff(t *testing.T) {
	k := newSink(t)
	k.answers(503)
	s := open(t, t.TempDir())
	s.Set([]Webhook{k.hook("audit")})
	s.push()
	for attempts := 3; attempts < 6; attempts++ {
		if d := s.clock.rests(); d != 10*time.Second {
			t.Errorf("it rests for %v", d)
		}
		k.mu.Lock()
		if len(k.attempts) != attempts {
			t.Errorf("%d attempts; want %d", len(k.attempts), attempts)
		}
		k.mu.Unlock()
		if status := s.Status()[0]; status.Pending != 1 || status.Failed != int64(attempts) || status.Trouble != "it answers 503" {
			t.Errorf("%+v", status)
		}
		if attempts == 5 {
			k.answers(200)
		}
		s.clock.resume <- struct{}{}
	}
	k.takes("1")
	if status := s.settled(); status.Delivered != 1 || status.Failed != 5 || status.Trouble != "" {
		t.Errorf("%+v", status)
	}
	if n := s.logs.FilterMessageSnippet("does not take events").Len(); n != 1 {
		t.Errorf("its trouble was logged %d times", n)
	}
	if n := s.logs.FilterMessageSnippet("takes events again").Len(); n != 1 {
		t.Errorf("the end of its trouble was logged %d times", n)
	}
	// And it begins anew.
	k.answers(503)
	s.push()
	s.clock.rests()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.attempts) != 6+3 {
		t.Errorf("%d attempts; want 9", len(k.attempts))
	}
}

// TestIgnore: what a webhook ignores is neither sent nor kept for it.
func TestIgnore(t *testing.T) {
	k, other := newSink(t), newSink(t)
	s := open(t, t.TempDir())
	hook := k.hook("audit")
	hook.IgnoreActions, hook.IgnoreMediaTypes = []Action{Pull, Mount}, []string{"application/octet-stream"}
	if s.Wants(Push) {
		t.Error("nobody is there to want anything")
	}
	s.Set([]Webhook{hook})
	if s.Wants(Pull) || !s.Wants(Delete) {
		t.Error("wants what it ignores, or not what it does not")
	}
	all := other.hook("all")
	s.Set([]Webhook{hook, all})
	if !s.Wants(Pull) {
		t.Error("the other one wants pulls")
	}
	s.tell(Event{Action: Pull, Tag: "pull"})
	s.tell(Event{Action: Push, Tag: "blob", MediaType: "application/octet-stream"})
	s.tell(Event{Action: Mount, Tag: "mount"})
	s.tell(Event{Action: Push, Tag: "push", MediaType: "application/json"})
	s.tell(Event{Action: Delete, Tag: "delete"})
	other.takes("pull", "blob", "mount", "push", "delete")
	k.takes("push", "delete")
}

// TestRestart: what was not delivered when the process ended is delivered by the
// next one, and nothing twice.
func TestRestart(t *testing.T) {
	k := newSink(t)
	dir := t.TempDir()
	k.answer = func(attempt int, tag string) int {
		if tag == "3" && attempt == 2 {
			return 0
		}
		return 200
	}
	s := open(t, dir)
	s.Set([]Webhook{k.hook("audit")})
	for range 5 {
		s.push()
	}
	k.tried(3)
	s.Close() // while the third is being sent
	s.push()  // to nobody
	s = open(t, dir)
	s.n = 5
	s.Set([]Webhook{k.hook("audit")})
	s.push()
	k.takes(tags(1, 6)...)
	s.settled()
	s.Close()
	s = open(t, dir)
	s.n = 6
	s.Set([]Webhook{k.hook("audit")})
	s.push()
	k.takes(tags(1, 7)...)
	if files, _ := filepath.Glob(filepath.Join(dir, "audit", "*"+events)); len(files) != 1 {
		t.Errorf("files of events that were taken stay: %q", files)
	}
}

// TestFull: a queue that is full loses its oldest, which is said once.
func TestFull(t *testing.T) {
	k := newSink(t)
	k.answers(503)
	dir := t.TempDir()
	s := open(t, dir)
	s.most = 10
	s.Set([]Webhook{k.hook("audit")})
	s.push()
	s.clock.rests()
	for range 24 {
		s.push()
	}
	if status := s.Status()[0]; status.Pending != 10 || status.Dropped != 15 {
		t.Errorf("%+v", status)
	}
	if n := s.logs.FilterMessageSnippet("is full").Len(); n != 1 {
		t.Errorf("it was said %d times", n)
	}
	s.Close()
	k.answers(200)
	s = open(t, dir)
	s.Set([]Webhook{k.hook("audit")})
	k.takes(tags(16, 25)...)
}

// TestDownForADay: what happens while a webhook is down is delivered in order
// when it is back.
func TestDownForADay(t *testing.T) {
	k := newSink(t)
	k.answers(503)
	s := open(t, t.TempDir())
	hook := k.hook("audit")
	hook.Backoff = time.Minute
	s.Set([]Webhook{hook})
	s.push()
	for up := s.clock.time().Add(24 * time.Hour); s.clock.time().Before(up); {
		s.clock.rests()
		for range 2 {
			s.push()
		}
		s.clock.resume <- struct{}{}
	}
	s.clock.rests()
	k.answers(200)
	s.clock.resume <- struct{}{}
	k.takes(tags(1, s.n)...)
	if s.n < 2_800 {
		t.Errorf("only %d events in a day", s.n)
	}
	if status := s.settled(); status.Dropped != 0 || status.Delivered != int64(s.n) {
		t.Errorf("%+v", status)
	}
	if n := s.logs.Len(); n != 2 {
		t.Errorf("%d lines were logged: %v", n, s.logs.All())
	}
}

// TestReload: a webhook keeps what waits for it when its settings change, is
// tried at once where it now is, and keeps it for a week when it is gone.
func TestReload(t *testing.T) {
	down, k := newSink(t), newSink(t)
	down.answers(500)
	dir := t.TempDir()
	s := open(t, dir)
	s.Set([]Webhook{down.hook("audit"), down.hook("gone"), down.hook("back")})
	for range 3 {
		s.push()
	}
	for range 3 {
		s.clock.rests()
	}
	s.Set([]Webhook{k.hook("audit")})
	k.takes(tags(1, 3)...)
	s.push()
	k.takes(tags(1, 4)...)
	s.settled()
	// Another process, too, knows since when they are gone.
	s.Close()
	now := s.clock.time()
	s = open(t, dir)
	s.clock.now = now.Add(leftFor - time.Hour)
	back := newSink(t)
	s.Set([]Webhook{k.hook("audit"), back.hook("back")})
	back.takes(tags(1, 3)...)
	if _, err := os.Stat(filepath.Join(dir, "gone")); err != nil {
		t.Errorf("what waits for it is gone before a week: %v", err)
	}
	s.clock.add(2 * time.Hour)
	s.Set([]Webhook{k.hook("audit")})
	if _, err := os.Stat(filepath.Join(dir, "gone")); !os.IsNotExist(err) {
		t.Errorf("what waits for it is kept for more than a week: %v", err)
	}
	for _, name := range []string{"audit", "back"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	s.Set([]Webhook{k.hook("audit"), k.hook("back"), k.hook("gone")})
	s.Notify(Event{Action: Push, Tag: "last"})
	k.until("three more", func() bool { return len(k.taken) >= 7 })
}

// TestHang: an attempt that gets no answer in time has failed, and an answer
// without end is not read.
func TestHang(t *testing.T) {
	k := newSink(t)
	k.answer = func(attempt int, tag string) int {
		if attempt == 0 {
			return 0
		}
		return 200
	}
	s := open(t, t.TempDir())
	hook := k.hook("audit")
	hook.Timeout = 50 * time.Millisecond
	s.Set([]Webhook{hook})
	s.push()
	k.tried(1)
	hook.Timeout = 30 * time.Second
	s.Set([]Webhook{hook})
	k.takes("1")
	if status := s.settled(); status.Failed < 1 {
		t.Errorf("%+v", status)
	}

	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}))
	defer endless.Close()
	hook.URL, hook.Timeout = endless.URL, time.Hour
	s.Set([]Webhook{hook})
	s.push()
	if status := s.settled(); status.Delivered != 2 {
		t.Errorf("%+v", status)
	}
}

// TestSecrets: neither the URL nor the header fields of a webhook are said.
func TestSecrets(t *testing.T) {
	gone := newSink(t)
	gone.Close()
	s := open(t, t.TempDir())
	hook := gone.hook("audit")
	hook.URL = strings.Replace(gone.URL, "http://", "http://user:hunter2@", 1) + "/hunter2?token=hunter2"
	hook.Header = http.Header{"Authorization": {"hunter2"}}
	s.Set([]Webhook{hook})
	s.push()
	s.clock.rests()
	status := s.Status()[0]
	if status.Trouble == "" || status.Pending != 1 {
		t.Errorf("%+v", status)
	}
	said := fmt.Sprint(status)
	for _, line := range s.logs.All() {
		said += fmt.Sprint(line.Message, line.ContextMap())
	}
	if strings.Contains(said, "hunter2") || !strings.Contains(said, "refused") {
		t.Error(said)
	}
}
