package module_test

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// longhornImages is Caddy with backing images and a Longhorn that fetches from it.
type longhornImages struct {
	*mirror
	manager   *longhorn.Manager
	app, site string
}

// imagesHost is where Longhorn finds the images: it refuses what is loopback.
func (l *longhornImages) imagesHost() string {
	_, port, _ := strings.Cut(strings.TrimPrefix(l.URL, "http://"), ":")
	return "http://images.test:" + port
}

// startLonghorn runs Caddy with a Longhorn named default. A small image is registered
// there, too: see ring.
func startLonghorn(t *testing.T, profile longhorn.Profile, app, site string) *longhornImages {
	t.Helper()
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	manager := longhorn.New(t, longhorn.Options{Profile: profile, Dial: leadTo(m.URL)})
	l := &longhornImages{mirror: m, manager: manager, site: "api_token " + imageToken + "\n" + site}
	l.app = fmt.Sprintf("public_url %s\nlonghorn default %s\n%s", l.imagesHost(), manager.URL, app)
	l.reload()
	t.Cleanup(m.stop)
	m.put("bell", diskImage("bell", 512))
	return l
}

// leadTo dials a server, whatever the address.
func leadTo(url string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, strings.TrimPrefix(url, "http://"))
	}
}

// reload loads what is configured, whether something runs or not.
func (l *longhornImages) reload() {
	l.t.Helper()
	adapted, err := l.adaptImages("backing_images {\n"+l.app+"\n}", l.site, l.imagesHost()+" {\nlog\nbacking_images {\n"+l.site+"\n}\n}\n")
	if err == nil {
		err = l.loadJSON(adapted)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// restart ends what runs, store and all, and runs it anew.
func (l *longhornImages) restart() {
	l.t.Helper()
	l.mirror.stop()
	l.reload()
}

// writeJSON sends JSON as somebody who may do everything.
func (l *longhornImages) writeJSON(method, path string, body any) *answer {
	l.t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.sendBody(method, path, data, append([]string{"Content-Type", "application/json"}, bearer...)...)
}

func (l *longhornImages) delete(path string) *answer {
	l.t.Helper()
	return l.sendBody("DELETE", "/v1/backing-images/"+path, nil, bearer...)
}

// ring has every Longhorn be asked now, and not some seconds later: something is
// registered. And somebody looks at Longhorn, which takes its images on.
func (l *longhornImages) ring() {
	l.t.Helper()
	if a := l.writeJSON("POST", "/v1/backing-images/bell/versions/v1/registrations", backing.RegistrationOptions{Cluster: "default", Mode: backing.PushUpload}); a.StatusCode != 202 {
		l.t.Fatalf("the bell: %d %s", a.StatusCode, a.body)
	}
	if resp, err := http.Get(l.manager.URL + "/v1/backingimages"); err == nil {
		resp.Body.Close()
	}
}

// register registers version v1 of an image.
func (l *longhornImages) register(image string, o backing.RegistrationOptions) backing.Registration {
	l.t.Helper()
	a := l.writeJSON("POST", "/v1/backing-images/"+image+"/versions/v1/registrations", o)
	var r backing.Registration
	if err := json.Unmarshal(a.body, &r); err != nil || a.StatusCode != 202 {
		l.t.Fatalf("registering %s: %d %s", image, a.StatusCode, a.body)
	}
	return r
}

// registration is where v1 of an image stands with Longhorn default.
func (l *longhornImages) registration(image string) backing.Registration {
	l.t.Helper()
	a := l.want(200, "GET", "/v1/backing-images/"+image+"/versions/v1/registrations/default", bearer...)
	var r backing.Registration
	if err := json.Unmarshal(a.body, &r); err != nil {
		l.t.Fatal(err)
	}
	return r
}

// until waits until a registration is in a state.
func (l *longhornImages) until(image string, state backing.RegistrationState) backing.Registration {
	l.t.Helper()
	var r backing.Registration
	eventually(l.t, image+" to be "+string(state), func() bool {
		l.ring()
		r = l.registration(image)
		return r.State == state
	})
	return r
}

// has checks that Longhorn has the bytes of a registration.
func (l *longhornImages) has(r backing.Registration, want []byte) {
	l.t.Helper()
	sum := sha512.Sum512(want)
	data, length, got, ok := l.manager.Content(r.Name)
	if !ok || got != hex.EncodeToString(sum[:]) || length != int64(len(want)) || !bytes.Equal(data, want) {
		l.t.Errorf("Longhorn has %d bytes of %s, with SHA-512 %.16s…", length, r.Name, got)
	}
	var image struct{ CurrentChecksum, ExpectedChecksum string }
	resp, err := http.Get(l.manager.URL + "/v1/backingimages/" + r.Name)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&image); err != nil || image.CurrentChecksum != got || image.ExpectedChecksum != got {
		l.t.Errorf("Longhorn shows %+v, %v; want %s", image, err, got)
	}
}

// blockersOf reads a refusal to delete.
func blockersOf(t *testing.T, a *answer) []backing.Blocker {
	t.Helper()
	var p struct {
		Code     string
		Blockers []backing.Blocker
	}
	if err := json.Unmarshal(a.body, &p); err != nil || a.StatusCode != 409 || p.Code != "in_use" {
		t.Fatalf("want 409 in_use: %d %s", a.StatusCode, a.body)
	}
	return p.Blockers
}

func kindsOf(blockers []backing.Blocker) (kinds []string) {
	for _, b := range blockers {
		kinds = append(kinds, b.Kind+" "+b.Name+" "+b.Cluster)
	}
	slices.Sort(kinds)
	return kinds
}

// TestLonghornSeed: in every release a form with register= becomes a backing image that
// is ready, by the address that the version has; and the command does it by an upload.
func TestLonghornSeed(t *testing.T) {
	for _, profile := range longhorn.Profiles {
		t.Run(string(profile), func(t *testing.T) {
			l := startLonghorn(t, profile, "", "")
			file := diskImage("base", 1<<20)
			a := l.form(map[string]string{"name": "base-ubuntu-20.04", "register": "default"}, file, bearer...)
			var v backing.Version
			if err := json.Unmarshal(a.body, &v); err != nil || a.StatusCode != 201 {
				t.Fatalf("%d %s", a.StatusCode, a.body)
			}
			ready := l.until("base-ubuntu-20.04", backing.InLonghorn)
			l.has(ready, file)
			if want := "base-ubuntu-20-04-" + v.Digests.SHA512.Encoded()[:8]; ready.Name != want || ready.Mode != backing.Download || ready.Progress != 100 || ready.Adopted || len(ready.Copies) == 0 {
				t.Errorf("%+v; want %s", ready, want)
			}
			fetches := l.manager.Fetches(ready.Name)
			for _, f := range fetches {
				if f.Status != 200 || f.URL != v.URLs.File || ready.URL != f.URL {
					t.Errorf("Longhorn fetched %+v; the version is at %s, the registration has %s", f, v.URLs.File, ready.URL)
				}
			}
			if len(fetches) != 2 {
				t.Errorf("%+v", fetches)
			}

			pushed := diskImage("pushed", 1<<20)
			l.put("pushed", pushed)
			type ended struct {
				status    int
				out, errs string
			}
			done := make(chan ended, 1)
			go func() {
				status, out, errs := command(t, "registry", "image", "register", "pushed:v1", "--mode", "upload", "--copies", "2", "--wait", "--url", l.URL, "--token", imageToken)
				done <- ended{status, out, errs}
			}()
			var e ended
			eventually(t, "the command to end", func() bool {
				l.ring()
				select {
				case e = <-done:
					return true
				default:
					return false
				}
			})
			if e.status != 0 || !strings.Contains(e.out, "ready") || strings.Contains(e.errs, "Error") {
				t.Errorf("register: %d %q %q", e.status, e.out, e.errs)
			}
			ready = l.registration("pushed")
			l.has(ready, pushed)
			if ready.Mode != backing.PushUpload || len(l.manager.Fetches(ready.Name)) != 0 {
				t.Errorf("%+v", ready)
			}
			if copies := len(ready.Copies); profile != longhorn.V1_4 && copies != 2 {
				t.Errorf("%d copies: %+v", copies, ready)
			}
			if status, out, errs := command(t, "registry", "image", "show", "pushed:v1", "--url", l.URL); status != 0 || !strings.Contains(out, "default: "+ready.Name+", ready") {
				t.Errorf("show: %d %q %q", status, out, errs)
			}
		})
	}
}

// make has somebody else make a backing image in Longhorn.
func (l *longhornImages) make(in map[string]any) {
	l.t.Helper()
	data, err := json.Marshal(in)
	if err != nil {
		l.t.Fatal(err)
	}
	resp, err := http.Post(l.manager.URL+"/v1/backingimages", "application/json", bytes.NewReader(data))
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		l.t.Fatalf("making %v: %s", in["name"], resp.Status)
	}
}

// TestLonghornForeign: an image that is there already is taken for ours if it has our
// bytes, and else neither used nor deleted; a Longhorn that was added has the same name.
func TestLonghornForeign(t *testing.T) {
	l := startLonghorn(t, longhorn.V1_12_1, "", "")
	second := longhorn.New(t, longhorn.Options{Profile: longhorn.V1_4, Dial: leadTo(l.URL)})
	file, other := diskImage("ours", 1<<16), diskImage("other", 1<<16)
	version := func(image string, data []byte) (string, backing.Version) {
		var v backing.Version
		l.put(image, data)
		if err := json.Unmarshal(l.want(200, "GET", "/v1/backing-images/"+image+"/versions/v1").body, &v); err != nil {
			t.Fatal(err)
		}
		return image + "-" + v.Digests.SHA512.Encoded()[:8], v
	}
	name, v := version("ours", file)
	theirs, w := version("theirs", other)
	l.make(map[string]any{"name": theirs, "sourceType": "upload", "expectedChecksum": strings.Repeat("ab", 64)})
	l.make(map[string]any{"name": name, "sourceType": "download", "expectedChecksum": v.Digests.SHA512.Encoded(),
		"parameters": map[string]string{"url": l.imagesHost() + "/v1/backing-images/ours/download"}})

	l.register("ours", backing.RegistrationOptions{})
	if r := l.until("ours", backing.InLonghorn); !r.Adopted || r.Name != name {
		t.Errorf("%+v", r)
	}
	l.register("theirs", backing.RegistrationOptions{})
	if r := l.until("theirs", backing.Conflict); r.Name != theirs || r.Message == "" {
		t.Errorf("%+v", r)
	}
	if a := l.delete("theirs/versions/v1?unregister=true"); a.StatusCode != 204 {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	if names := l.manager.Names(); !slices.Contains(names, theirs) {
		t.Errorf("somebody else's image was deleted: %q", names)
	}
	// It is no version any more.
	l.want(404, "GET", strings.TrimPrefix(w.URLs.File, l.imagesHost()))

	// In another Longhorn it has the same name; which one is meant has to be said.
	l.app += "\nlonghorn second " + second.URL
	l.reload()
	if code, _ := problemOf(t, l.writeJSON("POST", "/v1/backing-images/ours/versions/v1/registrations", backing.RegistrationOptions{})); code != "malformed" {
		t.Errorf("without a cluster: %s", code)
	}
	if r := l.register("ours", backing.RegistrationOptions{Cluster: "second"}); r.Name != name || r.Adopted {
		t.Errorf("%+v", r)
	}
	eventually(t, "the second Longhorn to have it", func() bool {
		l.register("ours", backing.RegistrationOptions{Cluster: "second"})
		return bytes.Contains(l.want(200, "GET", "/v1/backing-images/ours/versions/v1/registrations/second").body, []byte(`"state":"ready"`))
	})
	if data, _, _, _ := second.Content(name); !bytes.Equal(data, file) {
		t.Error("other bytes")
	}
}

// TestLonghornLoses: Longhorn that has lost all copies gets the same bytes at the same
// address, after a reload that changes public_url and after a restart.
func TestLonghornLoses(t *testing.T) {
	for _, profile := range []longhorn.Profile{longhorn.V1_4, longhorn.V1_12_1} {
		t.Run(string(profile), func(t *testing.T) {
			l := startLonghorn(t, profile, "", "")
			file := diskImage("kept", 1<<20)
			l.put("kept", file)
			r := l.register("kept", backing.RegistrationOptions{})
			l.until("kept", backing.InLonghorn)
			for i, change := range []func(){
				func() {},
				func() {
					l.app = strings.Replace(l.app, l.imagesHost(), "http://new.test:8080", 1)
					l.reload()
				},
				l.restart,
				func() { l.put("kept", diskImage("newer", 1<<16)) },
			} {
				change()
				if now := l.registration("kept"); now.URL != r.URL || now.Name != r.Name {
					t.Errorf("change %d: %+v; was %+v", i, now, r)
				}
				l.manager.LoseAll(r.Name)
				eventually(t, "Longhorn to fetch again", func() bool {
					l.ring()
					return len(l.manager.Fetches(r.Name)) == 2*(i+2)
				})
				l.until("kept", backing.InLonghorn)
				l.has(r, file)
			}
			for _, f := range l.manager.Fetches(r.Name) {
				if f.URL != r.URL || f.Status != 200 {
					t.Errorf("%+v; want %s", f, r.URL)
				}
			}
			if made := l.manager.Requests("DELETE", ""); len(made) != 0 {
				t.Errorf("something was deleted: %+v", made)
			}
		})
	}
}
