package module_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// TestLonghornDelete: what Longhorn uses stays, with all that uses it listed; when
// nothing does any more it goes there first, and then here.
func TestLonghornDelete(t *testing.T) {
	for _, profile := range []longhorn.Profile{longhorn.V1_4, longhorn.V1_12_1} {
		t.Run(string(profile), func(t *testing.T) {
			l := startLonghorn(t, profile, "", "")
			file := diskImage("used", 1<<16)
			l.put("used", file)
			l.register("used", backing.RegistrationOptions{})
			r := l.until("used", backing.InLonghorn)
			registration, volume, backup := "registration "+r.Name+" default", "volume pvc-1 default", "backup b1 default"
			stays := func(path string, want ...string) {
				t.Helper()
				if got := kindsOf(blockersOf(t, l.delete(path))); !slices.Equal(got, want) {
					t.Errorf("DELETE %s: %q; want %q", path, got, want)
				}
				l.want(200, "GET", strings.TrimPrefix(r.URL, l.imagesHost()))
				if now := l.until("used", backing.InLonghorn); now.Name != r.Name {
					t.Errorf("%+v", now)
				}
				if len(l.manager.Requests("DELETE", "")) != 0 {
					t.Fatal("Longhorn was asked to delete it")
				}
			}
			stays("used/versions/v1", registration)
			stays("used", registration)
			l.manager.SetVolume("pvc-1", r.Name)
			l.manager.SetBackup("b1", r.Name, "")
			stays("used", backup, registration, volume)
			stays("used?unregister=true", backup, volume)
			stays("used/versions/v1?unregister=true", backup, volume)
			// The registration alone may go though a backup needs the image.
			stays("used/versions/v1/registrations/default", volume)
			if status, _, errs := command(t, "registry", "image", "rm", "used:v1", "--unregister", "--url", l.URL, "--token", imageToken); status != 1 || !strings.Contains(errs, "pvc-1") {
				t.Errorf("rm: %d %q", status, errs)
			}
			l.manager.SetBackup("b1", "other", "")
			stays("used?unregister=true", volume)
			l.manager.SetVolume("pvc-1", "")
			stays("used", registration)
			if a := l.delete("used/versions/v1?unregister=true"); a.StatusCode != 204 {
				t.Fatalf("unused: %d %s", a.StatusCode, a.body)
			}
			if slices.Contains(l.manager.Names(), r.Name) {
				t.Error("Longhorn still has it")
			}
			l.want(404, "GET", strings.TrimPrefix(r.URL, l.imagesHost()))
			l.want(404, "GET", "/v1/backing-images/used/versions/v1")
		})
	}
}

// TestLonghornReplica: Longhorn has the last word, be it that no volume shows why.
func TestLonghornReplica(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_12_1, "", "")
	l.put("used", diskImage("used", 1<<16))
	l.register("used", backing.RegistrationOptions{})
	r := l.until("used", backing.InLonghorn)
	l.manager.SetVolume("late", r.Name)
	// A list of volumes that lags.
	l.manager.Break(longhorn.Fault{Method: "GET", Path: "/v1/volumes", Times: 3, Status: 200, Body: `{"data":[],"resourceType":"volume","type":"collection"}`})
	if got := kindsOf(blockersOf(t, l.delete("used?unregister=true"))); !slices.Equal(got, []string{"replica " + r.Name + " default"}) {
		t.Errorf("%q", got)
	}
	l.manager.Heal()
	l.want(200, "GET", strings.TrimPrefix(r.URL, l.imagesHost()))
	l.until("used", backing.InLonghorn)
	l.manager.SetVolume("late", "")
	if a := l.delete("used?unregister=true"); a.StatusCode != 204 {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
}

// TestLonghornAway: while Longhorn cannot be asked nothing is deleted, here or there,
// and it goes on when it is back, also with what was registered meanwhile.
func TestLonghornAway(t *testing.T) {
	for name, fault := range map[string][2]func(*longhorn.Manager){
		"refused": {(*longhorn.Manager).Stop, (*longhorn.Manager).Start},
		"a proxy's 502": {func(m *longhorn.Manager) {
			m.Break(longhorn.Fault{Status: 502, Body: "<html>bad gateway</html>"})
		}, (*longhorn.Manager).Heal},
		"a proxy's 401": {func(m *longhorn.Manager) { m.Require("Bearer x") }, func(m *longhorn.Manager) { m.Require("") }},
	} {
		t.Run(name, func(t *testing.T) {
			l := startLonghorn(t, longhorn.V1_10, "", "")
			file, more := diskImage("used", 1<<16), diskImage("more", 1<<16)
			l.put("used", file)
			l.put("free", diskImage("free", 512))
			l.put("more", more)
			l.register("used", backing.RegistrationOptions{Ensure: true})
			r := l.until("used", backing.InLonghorn)
			fault[0](l.manager)
			if r := l.until("used", backing.Unknown); r.Message == "" {
				t.Errorf("%+v", r)
			}
			for _, path := range []string{"used", "used/versions/v1?unregister=true", "used/versions/v1/registrations/default", "free", "free/versions/v1"} {
				a := l.delete(path)
				if code, detail := problemOf(t, a); a.StatusCode/100 != 5 || !strings.HasPrefix(code, "longhorn_") || detail == "" {
					t.Errorf("DELETE %s: %d %s %q", path, a.StatusCode, code, detail)
				} else if name == "refused" && (a.StatusCode != 503 || code != "longhorn_unreachable" || a.Header.Get("Retry-After") == "") {
					t.Errorf("DELETE %s: %d %s, Retry-After %q", path, a.StatusCode, code, a.Header.Get("Retry-After"))
				}
			}
			// It is registered, and begins when Longhorn is there.
			l.register("more", backing.RegistrationOptions{})
			l.until("more", backing.Unknown)
			l.restart()
			l.until("used", backing.Unknown)
			l.want(200, "GET", "/v1/backing-images/free/download")
			l.want(200, "GET", strings.TrimPrefix(r.URL, l.imagesHost()))

			fault[1](l.manager)
			l.until("used", backing.InLonghorn)
			l.has(l.until("more", backing.InLonghorn), more)
			if len(l.manager.Requests("DELETE", "")) != 0 || len(l.manager.Fetches(r.Name)) != 2 {
				t.Errorf("it was deleted or made again: %+v, %+v", l.manager.Requests("DELETE", ""), l.manager.Fetches(r.Name))
			}
			if a := l.delete("free"); a.StatusCode != 204 {
				t.Errorf("%d %s", a.StatusCode, a.body)
			}
		})
	}
}

// TestLonghornDrift: what somebody does to an image in Longhorn is told, and undone only
// for who asks.
func TestLonghornDrift(t *testing.T) {
	for _, profile := range longhorn.Profiles {
		t.Run(string(profile), func(t *testing.T) {
			l := startLonghorn(t, profile, "", "")
			file := diskImage("drifts", 1<<16)
			l.put("drifts", file)
			l.register("drifts", backing.RegistrationOptions{})
			r := l.until("drifts", backing.InLonghorn)
			l.manager.SetUnknown(r.Name, true)
			l.until("drifts", backing.Degraded)
			l.manager.SetUnknown(r.Name, false)
			l.until("drifts", backing.InLonghorn)

			l.manager.Remove(r.Name)
			if r := l.until("drifts", backing.Missing); r.Message == "" {
				t.Errorf("%+v", r)
			}
			for range 20 {
				l.ring()
			}
			l.restart()
			l.until("drifts", backing.Missing)
			if slices.Contains(l.manager.Names(), r.Name) {
				t.Error("it was made again though nobody wants it")
			}
			l.register("drifts", backing.RegistrationOptions{Ensure: true})
			l.has(l.until("drifts", backing.InLonghorn), file)
			// By now it is made again by itself.
			l.manager.Remove(r.Name)
			eventually(t, "it to be made again", func() bool { l.ring(); return slices.Contains(l.manager.Names(), r.Name) })
			l.has(l.until("drifts", backing.InLonghorn), file)

			// Nobody wants that any more, and somebody makes another of its name.
			l.register("drifts", backing.RegistrationOptions{})
			l.manager.Remove(r.Name)
			l.until("drifts", backing.Missing)
			other := diskImage("other", 1<<16)
			l.put("other", other)
			l.make(map[string]any{"name": r.Name, "sourceType": "download", "parameters": map[string]string{"url": l.imagesHost() + "/v1/backing-images/other/download"}})
			if r := l.until("drifts", backing.Drifted); r.Message == "" {
				t.Errorf("%+v", r)
			}
			// It is not what we had made, and is left alone until somebody deletes it there.
			l.register("drifts", backing.RegistrationOptions{Ensure: true})
			eventually(t, "it to be told", func() bool {
				l.ring()
				return strings.Contains(l.registration("drifts").Message, "left alone")
			})
			l.manager.Remove(r.Name)
			now := l.until("drifts", backing.InLonghorn)
			l.has(now, file)
			if now.URL != r.URL || now.Name != r.Name {
				t.Errorf("%+v; was %+v", now, r)
			}
		})
	}
}

// TestLonghornPrivate: Longhorn fetches from a site that is not open by a token in the
// path. A token that is revoked opens nothing, Longhorn's failure is told, and no token
// is in any log.
func TestLonghornPrivate(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_12_1, "", "access {\nallow any to user:token\n}")
	file := diskImage("private", 1<<16)
	l.put("private", file)
	// What fails in Longhorn is told there with the address that it was given.
	l.manager.Break(longhorn.Fault{Method: "POST", Path: "/v1/backingimages", Status: 502, Body: "<html>bad gateway</html>"})
	r := l.register("private", backing.RegistrationOptions{})
	l.until("private", backing.Unknown)
	l.manager.Heal()
	l.manager.Break(longhorn.Fault{Method: "POST", Path: "/v1/backingimages", Status: 500,
		Body: `{"type":"error","status":500,"message":"failed to create backing image x with parameters map[url:` + r.URL + `]: etcdserver: request timed out"}`})
	eventually(t, "the failure to be told", func() bool {
		l.ring()
		return strings.Contains(l.registration("private").Message, "etcdserver")
	})
	l.manager.Heal()
	r = l.until("private", backing.InLonghorn)
	l.has(r, file)
	path := strings.TrimPrefix(r.URL, l.imagesHost())
	parts := strings.Split(path, "/")
	if len(parts) != 7 || parts[3] != "t" {
		t.Fatalf("the address is %s", r.URL)
	}
	l.want(200, "GET", path)
	l.want(401, "GET", "/v1/files/"+strings.Join(parts[5:], "/"))
	l.want(401, "GET", "/v1/backing-images/private/versions/v1/registrations")
	// What a manifest names is the same address.
	a := l.want(200, "GET", "/v1/backing-images/private/versions/v1/manifests/backingimage", bearer...)
	if !bytes.Contains(a.body, []byte(r.URL)) {
		t.Errorf("%s", a.body)
	}
	l.restart()
	l.manager.LoseAll(r.Name)
	eventually(t, "Longhorn to fetch again", func() bool { l.ring(); return len(l.manager.Fetches(r.Name)) == 4 })
	l.has(l.until("private", backing.InLonghorn), file)

	a = l.want(200, "GET", "/v1/backing-images/private/tokens", bearer...)
	var tokens struct{ Items []struct{ ID, Token string } }
	if err := json.Unmarshal(a.body, &tokens); err != nil || len(tokens.Items) != 1 || tokens.Items[0].Token != "" {
		t.Fatalf("%s: %v", a.body, err)
	}
	if a := l.delete("private/tokens/" + tokens.Items[0].ID); a.StatusCode != 409 || !strings.Contains(string(a.body), r.Name) {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	if a := l.delete("private/tokens/" + tokens.Items[0].ID + "?force=true"); a.StatusCode != 204 {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	l.want(404, "GET", path)
	l.manager.LoseAll(r.Name)
	eventually(t, "the failure to be told", func() bool {
		l.ring()
		r := l.registration("private")
		return r.State == backing.RegFailed && strings.Contains(r.Message, "404")
	})
	l.logs.mu.Lock()
	defer l.logs.mu.Unlock()
	for _, line := range l.logs.lines {
		if text := fmt.Sprint(line); strings.Contains(text, parts[4]) || strings.Contains(text, imageToken) {
			t.Errorf("a token is in a log: %s", text)
		}
	}
}

// TestLonghornManifests: the manifests as they are served are those that are kept, and
// are YAML with the very address that Longhorn was given.
func TestLonghornManifests(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_12_1, "", "")
	l.put("ubuntu-24.04", diskImage("ubuntu", 1<<20))
	golden := func(kind, file, address string) {
		t.Helper()
		a := l.want(200, "GET", "/v1/backing-images/ubuntu-24.04/versions/v1/manifests/"+kind)
		if typ := a.Header.Get("Content-Type"); !strings.HasPrefix(typ, "application/yaml") {
			t.Errorf("%s is %s", kind, typ)
		}
		want, err := os.ReadFile("testdata/longhorn/" + file + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		if text := strings.ReplaceAll(string(want), "http://HOST", l.imagesHost()); string(a.body) != text {
			t.Errorf("%s: got\n%s\nwant\n%s", file, a.body, text)
		}
		var object struct {
			APIVersion string `yaml:"apiVersion"`
			Kind       string `yaml:"kind"`
		}
		if err := yaml.Unmarshal(a.body, &object); err != nil || object.APIVersion == "" || !strings.EqualFold(object.Kind, kind) || !strings.Contains(string(a.body), address) {
			t.Errorf("%s: %+v, %v; it should have %s", kind, object, err, address)
		}
	}
	kinds := []string{"storageclass", "backingimage", "datavolume"}
	for _, kind := range kinds {
		golden(kind, kind, l.imagesHost())
	}
	r := l.register("ubuntu-24.04", backing.RegistrationOptions{})
	l.until("ubuntu-24.04", backing.InLonghorn)
	for _, kind := range kinds {
		golden(kind, kind, r.URL)
	}
	l.want(404, "GET", "/v1/backing-images/ubuntu-24.04/versions/v1/manifests/pod")
	l.want(404, "GET", "/v1/backing-images/ubuntu-24.04/versions/v1/manifests/storageclass?cluster=none")
}

// TestLonghornPulled: a pull that is to be registered is followed by its events to its
// end, and Longhorn has it then.
func TestLonghornPulled(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_7, "allow_private", "")
	file := diskImage("pulled", 1<<20)
	goOn := make(chan struct{})
	source := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" {
			w.Header().Set("Content-Length", fmt.Sprint(len(file)))
			w.Write(file[:1<<19])
			w.(http.Flusher).Flush()
			<-goOn
			w.Write(file[1<<19:])
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(file)))
	}))
	defer source.Close()
	a := l.writeJSON("POST", "/v1/backing-images", map[string]any{"name": "pulled", "register": []string{"default"},
		"source": map[string]any{"type": "url", "url": source.URL + "/x.img"}})
	var asked struct{ Job, ID string }
	if err := json.Unmarshal(a.body, &asked); err != nil || a.StatusCode != 202 {
		close(goOn)
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	id := asked.Job
	if id == "" {
		id = asked.ID
	}
	events := l.open("GET", "/v1/jobs/"+id+"?watch=1")
	defer events.Body.Close()
	if typ := events.Header.Get("Content-Type"); !strings.HasPrefix(typ, "text/event-stream") {
		close(goOn)
		t.Fatalf("%s %s", events.Status, typ)
	}
	var states []string
	lines := bufio.NewScanner(events.Body)
	opened := false
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var job struct {
			State    string
			Progress struct{ Received int64 }
		}
		if err := json.Unmarshal([]byte(data), &job); err != nil {
			t.Fatalf("%v: %s", err, data)
		}
		states = append(states, job.State)
		if !opened { // the first tells of a pull under way
			opened = true
			close(goOn)
		}
	}
	if err := lines.Err(); err != nil || len(states) < 2 || states[0] != "running" || states[len(states)-1] != "succeeded" {
		t.Fatalf("%q, %v", states, err)
	}
	l.has(l.until("pulled", backing.InLonghorn), file)
	if created := l.registration("pulled").CreatedAt; time.Since(created) < 0 || created.IsZero() {
		t.Errorf("registered at %v", created)
	}
}

// TestLonghornForget: a registration is forgotten by the API and by the command, and
// Longhorn keeps what it has.
func TestLonghornForget(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_12_1, "", "")
	for _, name := range []string{"by-api", "by-command"} {
		l.put(name, diskImage(name, 1<<16))
		l.register(name, backing.RegistrationOptions{})
		l.until(name, backing.InLonghorn)
	}
	if a := l.delete("by-api/versions/v1/registrations/default?forget=maybe"); a.StatusCode != 400 {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	if a := l.delete("by-api/versions/v1/registrations/default?forget=true"); a.StatusCode != 204 {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	command := func(more ...string) (int, string) {
		status, _, errs := command(t, append([]string{"registry", "image", "register", "by-command", "--url", l.URL, "--token", imageToken}, more...)...)
		return status, errs
	}
	if status, errs := command("--forget", "--delete"); status != 1 || !strings.Contains(errs, "forget") {
		t.Errorf("%d %s", status, errs)
	}
	if status, errs := command("--forget"); status != 0 {
		t.Errorf("%d %s", status, errs)
	}
	for _, name := range []string{"by-api", "by-command"} {
		if a := l.want(200, "GET", "/v1/backing-images/"+name+"/versions/v1/registrations"); !strings.Contains(string(a.body), `"items":[]`) {
			t.Errorf("%s: %s", name, a.body)
		}
		// Longhorn would fetch it from here again.
		if a := l.delete(name); a.StatusCode != 409 || !strings.Contains(string(a.body), "backing-image") {
			t.Errorf("%s: %d %s", name, a.StatusCode, a.body)
		}
	}
	if names := fmt.Sprint(l.manager.Names()); !strings.Contains(names, "by-api-") || !strings.Contains(names, "by-command-") {
		t.Errorf("Longhorn has %s", names)
	}
}
