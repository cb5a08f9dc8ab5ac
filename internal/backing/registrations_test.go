package backing

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/backing/longhorn"
	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/content"
	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

var testPace = pace{moving: 5 * time.Millisecond, idle: 20 * time.Millisecond, poll: time.Millisecond, resend: time.Hour, stuck: 10 * time.Minute}

// registry is a registrar before a store on disk, with one version and one cluster.
type registry struct {
	*registrar
	t    *testing.T
	v    Version
	data []byte
}

func testVersion(data []byte) Version {
	sum := sha512.Sum512(data)
	d := digest.NewDigestFromEncoded(digest.SHA512, hex.EncodeToString(sum[:]))
	return Version{Name: "ubuntu_24.04", Version: "v1", State: Ready, Format: probe.QCOW2, Size: int64(len(data)), VirtualSize: 3 << 30,
		Digests: Digests{SHA256: digest.FromBytes(data), SHA512: d}, URLs: URLs{File: "http://images.test/v1/files/" + d.Encoded() + "/ubuntu_24.04-v1.qcow2"}}
}

func openStore(t *testing.T, dir string) storage.Store {
	t.Helper()
	store := disktest.Open(t, dir)
	t.Cleanup(func() { store.Close() })
	return store
}

// held is bytes as a store gives them.
func held(data []byte) content.Content {
	return content.Held(struct {
		io.ReadSeeker
		io.Closer
	}{bytes.NewReader(data), io.NopCloser(nil)}, int64(len(data)))
}

func newTestRegistrar(t *testing.T, store storage.Store, v Version, data []byte, clusters ...Cluster) *registry {
	t.Helper()
	r := newRegistrar(Parts{Store: store})
	r.pace = testPace
	r.version = func(context.Context, string, string) (Version, error) { return v, nil }
	r.open = func(context.Context, Version) (content.Content, error) { return held(data), nil }
	t.Cleanup(r.close)
	public, _ := url.Parse("http://images.test")
	if err := r.set(Settings{Prefix: "backing-images", PublicURL: public, Clusters: clusters}); err != nil {
		t.Fatal(err)
	}
	return &registry{r, t, v, data}
}

// files serves data under the address that a version has, and counts.
func serveFiles(t *testing.T, data []byte) func(context.Context, string, string) (net.Conn, error) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/v1/files/") {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(server.Close)
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, server.Listener.Addr().String())
	}
}

func (r *registry) register(o RegistrationOptions) Registration {
	r.t.Helper()
	told, err := r.registrar.register(r.t.Context(), r.v, o)
	if err != nil {
		r.t.Fatal(err)
	}
	return told
}

// until waits for the registration to be in a state; "" is that there is none.
func (r *registry) until(state RegistrationState) Registration {
	r.t.Helper()
	var last Registration
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		all := r.of(r.v.Name, r.v.Version)
		if len(all) == 0 {
			if state == "" {
				return Registration{}
			}
			continue
		}
		if last = all[0]; last.State == state {
			return last
		}
	}
	r.t.Fatalf("it never became %q: %+v", state, last)
	return last
}

func codeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

var diskImage = regtest.Random("image", 1<<20).Data

// TestLife: in every release a version is registered, downloaded or uploaded,
// becomes ready, and is deleted.
func TestLife(t *testing.T) {
	for _, profile := range fake.Profiles {
		for _, mode := range []Mode{Download, PushUpload} {
			t.Run(string(profile)+" "+string(mode), func(t *testing.T) {
				m := fake.New(t, fake.Options{Profile: profile, Dial: serveFiles(t, diskImage)})
				m.WrongLinks()
				v := testVersion(diskImage)
				r := newTestRegistrar(t, openStore(t, t.TempDir()), v, diskImage, Cluster{Name: "default", URL: m.URL + "/v1/"})
				first := r.register(RegistrationOptions{Mode: mode, MinNumberOfCopies: 2})
				if want := "ubuntu-24-04-" + v.Digests.SHA512.Encoded()[:8]; first.Name != want || first.State != Pending {
					t.Errorf("%+v; want %s", first, want)
				}
				ready := r.until(InLonghorn)
				if copies := len(ready.Copies); profile != fake.V1_4 && copies != 2 || copies == 0 || ready.Progress != 100 || ready.Adopted {
					t.Errorf("%+v", ready)
				}
				for name := range ready.Copies {
					if !strings.HasPrefix(name, "n") || !strings.HasSuffix(name, "/default-disk") {
						t.Errorf("a copy is at %s", name)
					}
				}
				data, _, _, _ := m.Content(first.Name)
				if !bytes.Equal(data, diskImage) {
					t.Error("Longhorn has other bytes")
				}
				if blockers, err := r.blockers(t.Context(), []Version{v}); err != nil || len(blockers) != 1 || blockers[0].Kind != "registration" {
					t.Error(blockers, err)
				}
				if err := r.unregister(t.Context(), v, ""); err != nil {
					t.Fatal(err)
				}
				r.until("")
				if names := m.Names(); len(names) != 0 {
					t.Errorf("Longhorn still has %q", names)
				}
				for _, request := range m.Requests("", "") {
					if strings.HasSuffix(request.Path, "/") || strings.Contains(request.UserAgent, "Mozilla") {
						t.Errorf("%+v", request)
					}
				}
				if len(m.Requests("POST", "/v1/backingimages")) != map[Mode]int{Download: 1, PushUpload: 2}[mode] {
					t.Errorf("%+v", m.Requests("POST", ""))
				}
			})
		}
	}
}

// TestOurs: an image is deleted only if we had it made, whatever bytes it has.
func TestOurs(t *testing.T) {
	sum := digest.SHA512.FromString("x")
	download := registration{SHA512: sum, Mode: Download, URL: "http://images.test/x"}
	made, adopted := download, download
	made.Made, adopted.Made, adopted.Adopted = true, true, true
	upload := registration{SHA512: sum, Mode: PushUpload}
	sent := upload
	sent.Made = true
	from := func(source, url, expected, current string) longhorn.Image {
		return longhorn.Image{SourceType: source, Parameters: map[string]string{"url": url}, ExpectedChecksum: expected, CurrentChecksum: current}
	}
	for name, is := range map[string]struct {
		record registration
		image  longhorn.Image
		ours   bool
	}{
		"nothing known":          {made, longhorn.Image{}, false},
		"our address":            {download, from("download", download.URL, "", ""), true},
		"our address and bytes":  {made, from("download", download.URL, "", sum.Encoded()), true},
		"another's address":      {made, from("download", "http://other.test/x", sum.Encoded(), ""), false},
		"our address, not bytes": {made, from("download", download.URL, sum.Encoded(), "00"), false},
		"adopted":                {adopted, from("download", download.URL, "", sum.Encoded()), false},
		"restored":               {made, from("restore", "", sum.Encoded(), sum.Encoded()), false},
		"cloned":                 {sent, from("clone", "", "", sum.Encoded()), false},
		"exported":               {sent, from("export-from-volume", "", "", sum.Encoded()), false},
		"sent":                   {sent, from("upload", "", sum.Encoded(), sum.Encoded()), true},
		"sent by another":        {upload, from("upload", "", sum.Encoded(), sum.Encoded()), false},
		"sent with other bytes":  {sent, from("upload", "", "00", ""), false},
	} {
		if is.record.ours(is.image) != is.ours {
			t.Errorf("%s: %v", name, !is.ours)
		}
	}
}

// TestLargeRegistration: a record that could not be read again is not written, and one
// that cannot be read keeps nobody from the others.
func TestLargeRegistration(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	store, v := openStore(t, t.TempDir()), testVersion(diskImage)
	key := layout.ImageRegistration("other", "v1", "default")
	if err := store.Put(t.Context(), key, make([]byte, maxRegistration+1), storage.Lazy); err != nil {
		t.Fatal(err)
	}
	r := newTestRegistrar(t, store, v, diskImage, Cluster{Name: "default", URL: m.URL})
	_, err := r.registrar.register(t.Context(), v, RegistrationOptions{NodeSelector: []string{strings.Repeat("x", maxRegistration)}})
	if told := Known(err); told == nil || told.Code != Malformed {
		t.Errorf("a selector of 64 KiB: %v", err)
	}
	r.register(RegistrationOptions{})
	r.until(InLonghorn)
}

// TestStates: what a registration says of what has become of its image.
func TestStates(t *testing.T) {
	start := func(t *testing.T, o fake.Options, data []byte) (*fake.Manager, *registry) {
		m := fake.New(t, o)
		return m, newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), data, Cluster{Name: "default", URL: m.URL})
	}
	t.Run("failed, with Longhorn's words", func(t *testing.T) {
		_, r := start(t, fake.Options{Dial: serveFiles(t, diskImage[:512]), Second: time.Hour}, diskImage)
		r.register(RegistrationOptions{})
		if told := r.until(RegFailed); !strings.Contains(told.Message, "doesn't match the file actual checksum") {
			t.Error(told.Message)
		}
	})
	t.Run("refused", func(t *testing.T) {
		m, r := start(t, fake.Options{}, diskImage)
		m.Rename(func(string) string { return "-bad" })
		r.register(RegistrationOptions{})
		if told := r.until(RegFailed); told.Message != "Longhorn refuses: invalid name -bad" {
			t.Error(told.Message)
		}
	})
	t.Run("renamed", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		m.Rename(func(name string) string { return "x-" + name })
		asked := r.register(RegistrationOptions{})
		if told := r.until(InLonghorn); told.Name != "x-"+asked.Name {
			t.Errorf("%+v", told)
		}
	})
	t.Run("degraded and back", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := r.register(RegistrationOptions{}).Name
		r.until(InLonghorn)
		m.SetUnknown(name, true)
		r.until(Degraded)
		m.SetUnknown(name, false)
		r.until(InLonghorn)
	})
	t.Run("lost, and downloaded again from the same address", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := r.register(RegistrationOptions{}).Name
		r.until(InLonghorn)
		m.LoseAll(name)
		r.until(RegFailed)
		r.until(InLonghorn)
		var got []string
		for _, f := range m.Fetches(name) {
			got = append(got, fmt.Sprint(f.Method, f.Status, f.URL == r.v.URLs.File))
		}
		if want := []string{"HEAD200 true", "GET200 true", "HEAD200 true", "GET200 true"}; !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	})
	t.Run("missing, and made again on demand", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := r.register(RegistrationOptions{}).Name
		r.until(InLonghorn)
		m.Remove(name)
		r.until(Missing)
		if len(m.Names()) != 0 {
			t.Error("it was made again though nobody wants it")
		}
		r.register(RegistrationOptions{Ensure: true})
		r.until(InLonghorn)
	})
	t.Run("drifted, and made again on demand", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := r.register(RegistrationOptions{}).Name
		r.until(InLonghorn)
		m.Remove(name)
		r.until(Missing)
		client := longhornClient(t, m.URL)
		if _, err := client.Create(t.Context(), longhorn.Input{Name: name, SourceType: "download",
			Parameters: map[string]string{"url": "http://elsewhere.test/v1/files/t/secret/x"}}); err != nil {
			t.Fatal(err)
		}
		if told := r.until(Drifted); strings.Contains(told.Message, "secret") || !strings.Contains(told.Message, "elsewhere.test") {
			t.Error(told.Message)
		}
		r.register(RegistrationOptions{Ensure: true})
		deadline := time.Now().Add(time.Minute)
		for !strings.Contains(r.until(Drifted).Message, "left alone") {
			if time.Now().After(deadline) {
				t.Fatal("nobody is told that it is somebody else's")
			}
		}
		if len(m.Requests("DELETE", "")) != 0 {
			t.Error("the image of somebody else was deleted")
		}
		m.Remove(name)
		if told := r.until(InLonghorn); told.URL != r.v.URLs.File || m.Fetches(name)[0].URL != told.URL {
			t.Errorf("%+v", m.Fetches(name))
		}
	})
	t.Run("drifted, and not made from here", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := r.register(RegistrationOptions{Ensure: true}).Name
		r.until(InLonghorn)
		m.Break(fake.Fault{Path: "/v1/backingimages", Status: 200, Body: fmt.Sprintf(`{"type":"collection","data":[{"name":%q,"sourceType":"restore","currentChecksum":%q}]}`, name, r.v.Digests.SHA512.Encoded())})
		if told := r.until(Drifted); !strings.Contains(told.Message, "left alone") {
			t.Errorf("%+v", told)
		}
		if asked := m.Requests("DELETE", ""); len(asked) > 0 {
			t.Errorf("%+v", asked)
		}
		m.Heal()
		r.until(InLonghorn)
	})
	t.Run("stuck", func(t *testing.T) {
		odd := diskImage[:4097]
		m := fake.New(t, fake.Options{Dial: serveFiles(t, odd)})
		v := testVersion(odd)
		v.Size = 4096 // as a record that is wrong says
		r := newRegistrar(Parts{Store: openStore(t, t.TempDir())})
		r.pace = testPace
		r.pace.stuck = time.Millisecond
		r.version = func(context.Context, string, string) (Version, error) { return v, nil }
		public, _ := url.Parse("http://images.test")
		t.Cleanup(r.close)
		r.set(Settings{Prefix: "p", PublicURL: public, Clusters: []Cluster{{Name: "default", URL: m.URL}}})
		k := &registry{r, t, v, odd}
		k.register(RegistrationOptions{})
		if told := k.until(Stuck); !strings.Contains(told.Message, "512") {
			t.Error(told.Message)
		}
	})
	t.Run("conflict", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := longhornNameOf(r.v.Name, r.v.Digests.SHA512)
		client := longhornClient(t, m.URL)
		if _, err := client.Create(t.Context(), longhorn.Input{Name: name, SourceType: "upload", ExpectedChecksum: strings.Repeat("ab", 64)}); err != nil {
			t.Fatal(err)
		}
		r.register(RegistrationOptions{})
		r.until(Conflict)
		if err := r.unregister(t.Context(), r.v, "default"); err != nil || len(m.Names()) != 1 {
			t.Errorf("%v; the image of somebody else: %q", err, m.Names())
		}
	})
	t.Run("made to be sent, and nobody was told", func(t *testing.T) {
		m, r := start(t, fake.Options{}, diskImage)
		client := longhornClient(t, m.URL)
		if _, err := client.Create(t.Context(), longhorn.Input{Name: longhornNameOf(r.v.Name, r.v.Digests.SHA512), SourceType: "upload",
			ExpectedChecksum: r.v.Digests.SHA512.Encoded()}); err != nil {
			t.Fatal(err)
		}
		r.register(RegistrationOptions{Mode: PushUpload})
		if told := r.until(InLonghorn); told.Adopted {
			t.Errorf("%+v", told)
		}
	})
	t.Run("adopted", func(t *testing.T) {
		m, r := start(t, fake.Options{Dial: serveFiles(t, diskImage)}, diskImage)
		name := longhornNameOf(r.v.Name, r.v.Digests.SHA512)
		client := longhornClient(t, m.URL)
		if _, err := client.Create(t.Context(), longhorn.Input{Name: name, SourceType: "download", ExpectedChecksum: r.v.Digests.SHA512.Encoded(),
			Parameters: map[string]string{"url": "http://elsewhere.test/v1/files/x"}}); err != nil {
			t.Fatal(err)
		}
		r.register(RegistrationOptions{})
		if told := r.until(InLonghorn); !told.Adopted || len(m.Requests("POST", "")) != 1 {
			t.Errorf("%+v", told)
		}
		if err := r.unregister(t.Context(), r.v, "default"); err != nil || len(m.Names()) != 1 || len(r.of(r.v.Name, r.v.Version)) != 0 {
			t.Errorf("%v; it was not ours to delete: %q", err, m.Names())
		}
	})
}

func longhornClient(t *testing.T, url string) *longhorn.Client {
	t.Helper()
	c, err := longhorn.New(url, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestFaults: whatever becomes of the way to Longhorn, nothing is made twice and
// nothing is deleted.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct{ spoil, heal func(*fake.Manager) }{
		"refused":     {(*fake.Manager).Stop, (*fake.Manager).Start},
		"a 502":       {func(m *fake.Manager) { m.Break(fake.Fault{Status: 502, Body: "<html>Bad Gateway</html>"}) }, (*fake.Manager).Heal},
		"a 404":       {func(m *fake.Manager) { m.Break(fake.Fault{Status: 404, Body: "<html>no such page</html>"}) }, (*fake.Manager).Heal},
		"a page":      {func(m *fake.Manager) { m.Break(fake.Fault{Status: 200, Body: "<html>Log in</html>"}) }, (*fake.Manager).Heal},
		"an object":   {func(m *fake.Manager) { m.Break(fake.Fault{Status: 200, Body: "{}"}) }, (*fake.Manager).Heal},
		"no token":    {func(m *fake.Manager) { m.Require("Bearer x") }, func(m *fake.Manager) { m.Require("") }},
		"half of all": {func(m *fake.Manager) { m.Break(fake.Fault{Path: "/v1/volumes", Status: 503}); m.Stop() }, func(m *fake.Manager) { m.Heal(); m.Start() }},
	} {
		t.Run(name, func(t *testing.T) {
			m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
			r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
			r.register(RegistrationOptions{Ensure: true})
			r.until(InLonghorn)
			c.spoil(m)
			if told := r.until(Unknown); !strings.Contains(told.Message, "cannot be asked") {
				t.Error(told.Message)
			}
			if _, err := r.blockers(t.Context(), []Version{r.v}); codeOf(err) != LonghornAway {
				t.Errorf("blockers: %v", err)
			}
			if err := r.unregister(t.Context(), r.v, "default"); codeOf(err) != LonghornAway {
				t.Errorf("unregister: %v", err)
			}
			c.heal(m)
			r.until(InLonghorn)
			if len(m.Requests("DELETE", "")) != 0 || len(m.Requests("POST", "")) != 1 {
				t.Errorf("%+v %+v", m.Requests("DELETE", ""), m.Requests("POST", ""))
			}
		})
	}
	t.Run("an answer that is lost", func(t *testing.T) {
		m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
		m.Break(fake.Fault{Method: "POST", Lose: true, Times: 1})
		m.Lag(3)
		r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
		r.register(RegistrationOptions{})
		r.until(InLonghorn)
		if n := len(m.Requests("POST", "")); n != 1 || len(m.Names()) != 1 {
			t.Errorf("%d were made: %q", n, m.Names())
		}
	})
	t.Run("an upload that is cut", func(t *testing.T) {
		m := fake.New(t, fake.Options{})
		var once sync.Once
		r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL, Mode: PushUpload})
		r.open = func(context.Context, Version) (content.Content, error) {
			data := diskImage
			once.Do(func() { data = diskImage[:len(diskImage)/2] })
			return held(data), nil
		}
		r.register(RegistrationOptions{})
		r.until(InLonghorn)
		if n := len(m.Requests("POST", "/v1/backingimages/")); n != 2 {
			t.Errorf("%d uploads", n)
		}
	})
	t.Run("a token", func(t *testing.T) {
		m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
		m.Require("Bearer token-a:b")
		r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL, Token: "token-a:b"})
		r.register(RegistrationOptions{})
		r.until(InLonghorn)
	})
}

// TestBlockers: what uses an image keeps it.
func TestBlockers(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	name := r.register(RegistrationOptions{}).Name
	r.until(InLonghorn)
	m.SetVolume("pvc-1", name)
	m.SetVolume("pvc-2", "another")
	m.SetBackup("b-1", name, "")
	m.SetBackup("b-2", "renamed", r.v.Digests.SHA512.Encoded())
	m.SetBackup("b-3", "another", strings.Repeat("ab", 64))
	blockers, err := r.blockers(t.Context(), []Version{r.v})
	if got := fmt.Sprint(blockers); err != nil || got != fmt.Sprintf("[{registration %s default} {volume pvc-1 default} {backup b-1 default} {backup b-2 default}]", name) {
		t.Error(got, err)
	}
	err = r.unregister(t.Context(), r.v, "default")
	var e *Error
	if !errors.As(err, &e) || e.Code != InUse || len(e.Blockers) != 1 || e.Blockers[0].Name != "pvc-1" {
		t.Errorf("%+v", err)
	}
	// A volume that is made between our look and the deletion: Longhorn has the last word.
	m.Break(fake.Fault{Path: "/v1/volumes", Status: 200, Body: `{"type":"collection","data":[]}`, Times: 1})
	err = r.unregister(t.Context(), r.v, "default")
	if !errors.As(err, &e) || e.Code != InUse || len(e.Blockers) != 1 || e.Blockers[0].Kind != "replica" || !strings.Contains(e.Message, "replicas using it") {
		t.Errorf("%+v", err)
	}
	r.until(InLonghorn)
	m.SetVolume("pvc-1", "")
	if err := r.unregister(t.Context(), r.v, "default"); err != nil {
		t.Error(err)
	}
}

// TestChangedOptions: what a registration cannot change is said.
func TestChangedOptions(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	r := newTestRegistrar(t, openStore(t, t.TempDir()), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
	o := RegistrationOptions{MinNumberOfCopies: 2, DiskSelector: []string{"ssd"}}
	r.register(o)
	r.register(o)
	r.register(RegistrationOptions{})
	for _, o := range []RegistrationOptions{{MinNumberOfCopies: 1}, {DiskSelector: []string{}}, {NodeSelector: []string{"a"}}} {
		if _, err := r.registrar.register(t.Context(), r.v, o); codeOf(err) != Exists {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestPreflight: what cannot work is refused before anything is written.
func TestPreflight(t *testing.T) {
	m := fake.New(t, fake.Options{})
	store := openStore(t, t.TempDir())
	for _, c := range []struct {
		public string
		change func(*Version, *RegistrationOptions)
		want   Code
	}{
		{"http://localhost:8080", nil, Malformed},
		{"http://127.0.0.2", nil, Malformed},
		{"http://0.0.0.0:1", nil, Malformed},
		{"http://[::1]", nil, Malformed},
		{"http://a.test/x=y", nil, Malformed},
		{"http://a.test/x,y", nil, Malformed},
		{"ftp://a.test", nil, Malformed},
		{"http://a.test", func(v *Version, _ *RegistrationOptions) { v.Size++ }, NotAligned},
		{"http://a.test", func(v *Version, _ *RegistrationOptions) { v.State = Fetching }, Busy},
		{"http://a.test", func(v *Version, _ *RegistrationOptions) { v.Probe = &probe.Report{} }, Unsupported},
		{"http://a.test", func(_ *Version, o *RegistrationOptions) { o.Name = "Big" }, Malformed},
		{"http://a.test", func(_ *Version, o *RegistrationOptions) { o.Name = strings.Repeat("a", 41) }, Malformed},
		{"http://a.test", func(_ *Version, o *RegistrationOptions) { o.Cluster = "nowhere" }, NotFound},
		{"http://a.test", func(_ *Version, o *RegistrationOptions) { o.Mode = "carry" }, Malformed},
	} {
		r := newTestRegistrar(t, store, testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
		public, _ := url.Parse(c.public)
		r.set(Settings{Prefix: "p", PublicURL: public, Compat: Enforce, Clusters: []Cluster{{Name: "default", URL: m.URL}}})
		var o RegistrationOptions
		if c.change != nil {
			c.change(&r.v, &o)
		}
		if _, err := r.registrar.register(t.Context(), r.v, o); codeOf(err) != c.want || len(r.of(r.v.Name, r.v.Version)) != 0 {
			t.Errorf("%s %+v: %v; want %s", c.public, o, err, c.want)
		}
	}
	if n := len(m.Requests("POST", "")); n != 0 {
		t.Errorf("%d were asked for", n)
	}
}

// TestPrivateAddress: the token in an address is kept, so that the address is the
// same for as long as Longhorn has it.
func TestPrivateAddress(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	store := openStore(t, t.TempDir())
	public, _ := url.Parse("http://images.test/base/")
	made := 0
	open := func() *registry {
		r := newTestRegistrar(t, store, testVersion(diskImage), diskImage)
		r.token = func(_ context.Context, _, _, old string) (string, error) {
			if old != "" {
				return old, nil
			}
			made++
			return fmt.Sprintf("token%d", made), nil
		}
		r.set(Settings{Prefix: "p", PublicURL: public, Private: true, Clusters: []Cluster{{Name: "default", URL: m.URL}}})
		return r
	}
	r := open()
	want := "http://images.test/base/v1/files/t/token1/" + r.v.Digests.SHA512.Encoded() + "/ubuntu_24.04-v1.qcow2"
	if told := r.register(RegistrationOptions{}); told.URL != want {
		t.Error(told.URL)
	}
	second := r.v
	second.Version = "v2"
	if told, err := r.registrar.register(t.Context(), second, RegistrationOptions{Name: "second"}); err != nil || !strings.Contains(told.URL, "/t/token1/") {
		t.Error(told, err)
	}
	r.close()
	public, _ = url.Parse("http://moved.test")
	r = open()
	if told := r.register(RegistrationOptions{}); told.URL != want || made != 1 {
		t.Errorf("%s after %d tokens", told.URL, made)
	}
}

const killDir, killURL, killPoint = "BACKING_TEST_DIR", "BACKING_TEST_URL", "BACKING_TEST_POINT"

// TestKilledRegistering is the process that TestKillRegistering starts.
func TestKilledRegistering(t *testing.T) {
	dir := os.Getenv(killDir)
	if dir == "" {
		return
	}
	failpoint.Set(func(name string) {
		if name == os.Getenv(killPoint) {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	r := newTestRegistrar(t, openStore(t, dir), testVersion(diskImage), diskImage, Cluster{Name: "default", URL: os.Getenv(killURL)})
	r.register(RegistrationOptions{})
	if strings.HasPrefix(os.Getenv(killPoint), "backing.unregister") {
		r.until(InLonghorn)
		r.unregister(t.Context(), r.v, "default")
	}
	select {}
}

// TestKillRegistering: a process that dies between its record and Longhorn leaves what
// the next goes on with: one image, or none.
func TestKillRegistering(t *testing.T) {
	for _, point := range []string{"backing.registering", "backing.registered", "backing.unregistering", "backing.unregistered"} {
		t.Run(point, func(t *testing.T) {
			m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
			if point == "backing.registered" {
				m.Rename(func(name string) string { return "x-" + name })
			}
			dir := t.TempDir()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledRegistering$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+dir, killURL+"="+m.URL, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			store := openStore(t, dir)
			r := newTestRegistrar(t, store, testVersion(diskImage), diskImage, Cluster{Name: "default", URL: m.URL})
			if strings.HasPrefix(point, "backing.unregister") {
				if err := r.load(t.Context()); err != nil {
					t.Fatal(err)
				}
				r.until("")
				if _, err := store.Stat(t.Context(), layout.ImageRegistration(r.v.Name, "v1", "default")); err == nil || len(m.Names()) != 0 {
					t.Errorf("%v, and in Longhorn %q", err, m.Names())
				}
				return
			}
			if told := r.until(InLonghorn); told.Adopted || len(m.Names()) != 1 || told.Name != m.Names()[0] {
				t.Errorf("%+v; in Longhorn %q", told, m.Names())
			}
		})
	}
}
