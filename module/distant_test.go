package module_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

// inBucket is the option for a store in a bucket, with a cache in a directory.
func inBucket(s *s3double.Server, cache string, options ...string) string {
	secret := s3double.Secret
	if len(options) > 0 && strings.HasPrefix(options[0], "secret=") {
		secret, options = strings.TrimPrefix(options[0], "secret="), options[1:]
	}
	return fmt.Sprintf("storage s3 %s {\n endpoint %s\n region %s\n credentials %s %s\n cache %s 1GiB\n %s\n}\n",
		s3double.Bucket, s.URL, s3double.Region, s3double.Key, secret, cache, strings.Join(options, "\n"))
}

// inTime waits for what others do in seconds of their own.
func inTime(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// distant is the part of the status that is about the bucket.
func (m *mirror) distant() object {
	m.t.Helper()
	d, ok := m.admins("GET", "status")["distant"].(object)
	if !ok {
		m.t.Fatal("the status says nothing of the bucket")
	}
	return d
}

func (m *mirror) uploaded() {
	m.t.Helper()
	inTime(m.t, "everything to be uploaded", func() bool { return m.distant()["pending"].(float64) == 0 })
}

// metric is the value of a series, with its labels, as the admin API shows it.
func (m *mirror) metric(series string) (value string, ok bool) {
	m.t.Helper()
	resp, err := client.Get("http://" + m.admin + "/metrics")
	if err != nil {
		m.t.Fatal(err)
	}
	defer resp.Body.Close()
	wanted, labels, _ := strings.Cut(series, "{")
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if family, has, _ := strings.Cut(name, "{"); family == wanted && strings.Contains(has, labels) {
			return value, true
		}
	}
	return "", false
}

// TestBucketStatus: an operator sees what waits for the bucket, that it does not
// answer, and what it was asked for. Pulls go on meanwhile.
func TestBucketStatus(t *testing.T) {
	up, s := regtest.New(t, regtest.Options{}), s3double.New(t, s3double.Options{})
	first, second := layered("a"), layered("b")
	up.Push("library/a", first, "latest")
	up.Push("library/b", second, "latest")
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	app := inBucket(s, m.dir) + upstreamFor("docker.io", up)
	m.subscribe(app, "storage_unavailable", "storage_available")
	t.Cleanup(func() {
		if err := m.loadJSON([]byte(`{"admin": {"disabled": true}}`)); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(m.stop)
	m.pull("library/a", "latest", first)
	m.complete()
	m.uploaded()
	if _, ok := s.Read(layout.Blob(first.Blobs[0].Digest)); !ok {
		t.Errorf("the blob is not in the bucket, which has %q", s.Keys(""))
	}
	d := m.distant()
	if d["listed"] != true || d["near"].(float64) <= 0 || d["near_size"].(float64) != 1<<30 || d["unavailable"] != nil || d["oldest"] != nil {
		t.Errorf("status: %v", d)
	}
	if used := m.admins("GET", "usage")["near"].(object); used["bytes"].(float64) <= 0 {
		t.Errorf("usage: %v", used)
	}
	for series, want := range map[string]string{
		"caddy_registry_store_pending_uploads": "0", "caddy_registry_store_unavailable": "0", "caddy_registry_store_shared": "0",
	} {
		if got, ok := m.metric(series); !ok || got != want {
			t.Errorf("%s is %q, want %s", series, got, want)
		}
	}
	if n, ok := m.metric(`caddy_registry_store_calls_total{operation="put",outcome="answered"`); !ok || n == "0" {
		t.Errorf("puts that were answered: %q", n)
	}

	s.Down()
	m.pull("library/b", "latest", second)
	m.event("storage_unavailable")
	if d := m.distant(); d["unavailable"] == nil || d["trouble"] == "" || d["pending"].(float64) == 0 || d["oldest"] == nil {
		t.Errorf("status: %v", d)
	}
	if got, _ := m.metric("caddy_registry_store_unavailable"); got != "1" {
		t.Errorf("unavailable is %q", got)
	}
	if n, _ := m.metric(`caddy_registry_store_calls_total{operation="put",outcome="failed"`); n == "0" {
		t.Error("no put has failed")
	}
	s.Up(t)
	m.event("storage_available")
	m.uploaded()
	if _, ok := s.Read(layout.Blob(second.Blobs[0].Digest)); !ok {
		t.Error("what was pulled meanwhile is not in the bucket")
	}
}

// TestBucketAwayAtStart: a bucket that does not answer keeps nothing from starting.
func TestBucketAwayAtStart(t *testing.T) {
	up, s := regtest.New(t, regtest.Options{}), s3double.New(t, s3double.Options{})
	image, other := layered("a"), layered("b")
	up.Push("library/a", image, "latest")
	s.Down()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	m.bucket(inBucket(s, m.dir) + upstreamFor("docker.io", up))
	m.pull("docker.io/library/a", "latest", image)
	begun, err := m.try("POST", "/v2/apps/web/blobs/uploads/", nil)
	if err != nil || begun.StatusCode != 202 && begun.StatusCode != 503 {
		t.Errorf("an upload is begun: %v, %v", begun, err)
	}
	s.Up(t)
	m.pushed("apps/web", "v1", other)
	m.uploaded()
	m.complete()
	if _, ok := s.Read(layout.TagLink("apps/web", "v1")); !ok {
		t.Error("what was pushed is not in the bucket")
	}
}

// bucket starts a mirror in which everyone may do everything.
func (m *mirror) bucket(app string) {
	m.t.Helper()
	if err := m.load(app, openToAll); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		if err := m.loadJSON([]byte(`{"admin": {"disabled": true}}`)); err != nil {
			m.t.Error(err)
		}
	})
	m.t.Cleanup(m.stop)
}

// pushed pushes an image as soon as that is possible.
func (m *mirror) pushed(repository, tag string, image regtest.Image) {
	m.t.Helper()
	for _, blob := range image.Blobs {
		inTime(m.t, "a blob to be pushed", func() bool {
			begun, err := m.try("POST", "/v2/"+repository+"/blobs/uploads/", nil)
			if err != nil || begun.StatusCode != 202 {
				return false
			}
			ended, err := m.try("PUT", withQuery(begun.Header.Get("Location"), "digest", blob.Digest.String()), blob.Data)
			return err == nil && ended.StatusCode == 201
		})
	}
	inTime(m.t, "a manifest to be pushed", func() bool {
		a, err := m.try("PUT", "/v2/"+repository+"/manifests/"+tag, image.Data, "Content-Type", image.MediaType)
		return err == nil && a.StatusCode == 201
	})
}

// TestBucketCredentials: a reload changes them, and what waits goes on. One with such as
// are refused fails, and those before stay.
func TestBucketCredentials(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	m.bucket(inBucket(s, m.dir))
	m.pushed("apps/web", "v1", layered("a"))
	if err := m.load(inBucket(s, m.dir, "secret=wrong"), openToAll); err == nil || !strings.Contains(err.Error(), "check the credentials") || strings.Contains(err.Error(), "wrong") {
		t.Errorf("with a wrong secret: %v", err)
	}
	m.pushed("apps/web", "still", layered("still"))
	// What it cannot ask about it has to take.
	s.Down()
	if err := m.load(inBucket(s, m.dir, "secret=wrong"), openToAll); err != nil {
		t.Fatal(err)
	}
	s.Up(t)
	image := layered("b")
	begun := m.sends(202, "POST", "/v2/apps/web/blobs/uploads/", nil)
	blob := image.Blobs[0]
	m.sends(503, "PUT", withQuery(begun.Header.Get("Location"), "digest", blob.Digest.String()), blob.Data)
	if d := m.distant(); d["trouble"] == "" || strings.Contains(fmt.Sprint(d), "wrong") {
		t.Errorf("status: %v", d)
	}
	if err := m.load(inBucket(s, m.dir), openToAll); err != nil {
		t.Fatal(err)
	}
	m.pushed("apps/web", "v2", image)
	m.uploaded()
}

// TestBucketStop: whoever stops does not wait for uploads, which the next start goes
// on with.
func TestBucketStop(t *testing.T) {
	up, s := regtest.New(t, regtest.Options{}), s3double.New(t, s3double.Options{})
	image := layered("a")
	up.Push("library/a", image, "latest")
	held := make(chan struct{})
	end := s.Strike(s3double.Fault{Op: s3double.PutObject, Key: "/blobs/", Hold: held, Status: 503})
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	app := inBucket(s, m.dir) + upstreamFor("docker.io", up)
	m.bucket(app)
	m.pull("docker.io/library/a", "latest", image)
	s.Await(t, "an upload", func(calls []s3double.Call) bool {
		return slices.ContainsFunc(calls, func(c s3double.Call) bool { return c.Op == s3double.PutObject && strings.Contains(c.Key, "/blobs/") })
	})
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	unlocked(t, m.dir)
	close(held)
	end()
	up.Down()
	if err := m.load(app, openToAll); err != nil {
		t.Fatal(err)
	}
	m.uploaded()
	for _, blob := range image.Blobs {
		if got, ok := s.Read(layout.Blob(blob.Digest)); !ok || string(got) != string(blob.Data) {
			t.Errorf("%s is not in the bucket", blob.Digest)
		}
	}
	m.pull("docker.io/library/a", "latest", image)
}

// TestBucketValidate: to check a configuration asks the bucket nothing, and makes
// nothing.
func TestBucketValidate(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	cache := filepath.Join(m.dir, "cache")
	adapted, err := m.adapt(inBucket(s, cache), openToAll)
	if err != nil {
		t.Fatal(err)
	}
	var config caddy.Config
	if err := json.Unmarshal(adapted, &config); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&config); err != nil {
		t.Fatal(err)
	}
	if n := s.Count(); n != 0 {
		t.Errorf("the bucket was asked %d times: %v", n, s.Calls())
	}
	if _, err := os.Stat(cache); err == nil {
		t.Error("there is a cache")
	}
}

// TestTwoOnOneBucket: two processes serve what either is pushed, and nothing is
// deleted while both are there.
func TestTwoOnOneBucket(t *testing.T) {
	s := s3double.New(t, s3double.Options{})
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	m.bucket(inBucket(s, m.dir))
	m.complete()
	if a, err := m.try("GET", "/v2/apps/theirs/tags/list", nil); err != nil || a.StatusCode != 404 {
		t.Fatal(a, err)
	}
	cache := t.TempDir()
	other := childOf(t, cache, func(url string) string {
		return fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n %s\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}", inBucket(s, cache), url, openToAll)
	}, "")
	inTime(t, "the other to be seen", func() bool { return m.admins("GET", "status")["off"] != nil })
	if got, _ := m.metric("caddy_registry_store_shared"); got != "1" {
		t.Errorf("shared is %q", got)
	}
	for _, body := range []string{`{"kind": "gc"}`, `{"kind": "gc", "dry_run": true}`, `{"kind": "retention"}`, `{"kind": "purge", "pattern": "docker.io/**"}`} {
		if a := m.adminDo("POST", "jobs", body); a.StatusCode != 409 || !strings.Contains(string(a.body), "another process") {
			t.Errorf("%s: %d %s", body, a.StatusCode, a.body)
		}
	}
	if off := m.admins("GET", "jobs")["off"]; off == nil {
		t.Error("the list of jobs does not say why there are none")
	}
	image := layered("theirs")
	other.pushed("apps/theirs", "v1", image)
	sees := func(status int, path, says string) {
		t.Helper()
		inTime(t, fmt.Sprint(path, " to be ", status, " ", says), func() bool {
			a, err := m.try("GET", path, nil)
			return err == nil && a.StatusCode == status && strings.Contains(string(a.body), says)
		})
	}
	sees(200, "/v2/apps/theirs/tags/list", `"v1"`)
	sees(200, "/v2/_catalog", `"apps/theirs"`)
	m.pull("apps/theirs", "v1", image)
	subject := regtest.NewImage("ours", regtest.Random("ours", 1000))
	m.pushed("apps/theirs", "v2", subject)
	other.pull("apps/theirs", "v2", subject)

	// Pushed through both: this one has just said that it has no such blob.
	both := layered("both")
	for _, blob := range both.Blobs {
		m.want(404, "HEAD", "/v2/apps/theirs/blobs/"+blob.Digest.String())
		begun := other.sends(202, "POST", "/v2/apps/theirs/blobs/uploads/", nil)
		other.sends(201, "PUT", withQuery(begun.Header.Get("Location"), "digest", blob.Digest.String()), blob.Data)
	}
	m.sends(201, "PUT", "/v2/apps/theirs/manifests/both", both.Data, "Content-Type", both.MediaType)

	// A signature, and its end.
	const signatureType = "application/vnd.example.signature"
	signature := both
	signature.Data = fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"artifactType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
		both.MediaType, signatureType, v1.MediaTypeImageConfig, both.Blobs[0].Digest, len(both.Blobs[0].Data), both.MediaType, both.Digest, len(both.Data))
	signature.Digest = digest.FromBytes(signature.Data)
	referrers := "/v2/apps/theirs/referrers/" + both.Digest.String()
	sees(200, referrers, `"manifests":[]`)
	other.pushed("apps/theirs", signature.Digest.String(), signature)
	sees(200, referrers, signatureType)
	other.sends(202, "DELETE", "/v2/apps/theirs/manifests/"+signature.Digest.String(), nil)
	sees(200, referrers, `"manifests":[]`)
	other.sends(202, "DELETE", "/v2/apps/theirs/manifests/both", nil)

	if a, err := other.try("DELETE", "/v2/apps/theirs/manifests/v1", nil); err != nil || a.StatusCode != 202 {
		t.Fatal(a, err)
	}
	sees(404, "/v2/apps/theirs/manifests/v1", "")
	sees(200, "/v2/apps/theirs/tags/list", `["v2"]`)
	if a, err := other.try("DELETE", "/v2/apps/theirs/manifests/"+image.Digest.String(), nil); err != nil || a.StatusCode != 202 {
		t.Fatal(a, err)
	}
	sees(404, "/v2/apps/theirs/manifests/"+image.Digest.String(), "")
	last := layered("last")
	other.pushed("apps/theirs", "v3", last)
	other.process.Kill()
	other.dead()
	inTime(t, "the other to be taken for dead", func() bool { return m.admins("GET", "status")["off"] == nil })
	m.complete()
	if job := m.job(`{"kind": "gc"}`); job["error"] != nil {
		t.Errorf("gc: %v", job)
	}
	m.pull("apps/theirs", "v3", last)
	if tags := names(m.admins("GET", "tags?repository=apps/theirs")["tags"]); !slices.Equal(tags, []string{"v2", "v3"}) {
		t.Errorf("the catalog has %q", tags)
	}
}
