package backing

import (
	"flag"
	"net/url"
	"os"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestManifests: what is generated is what Longhorn and CDI compare, to the letter.
func TestManifests(t *testing.T) {
	m := fake.New(t, fake.Options{Dial: serveFiles(t, diskImage)})
	v := testVersion(diskImage)
	v.VirtualSize++
	r := newTestRegistrar(t, openStore(t, t.TempDir()), v, diskImage, Cluster{Name: "default", URL: m.URL})
	golden := func(file, kind, cluster string) {
		t.Helper()
		got, err := r.manifest(t.Context(), v, kind, cluster)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			return
		}
		path := "testdata/" + file + ".yaml"
		if *update {
			os.MkdirAll("testdata", 0o755)
			os.WriteFile(path, got, 0o644)
		}
		want, err := os.ReadFile(path)
		if err != nil || string(got) != string(want) {
			t.Errorf("%s: %v\n%s\nwant\n%s", file, err, got, want)
		}
		if yaml.Unmarshal(got, &map[string]any{}) != nil {
			t.Errorf("%s is no YAML", file)
		}
	}
	golden("storageclass", "storageclass", "")
	golden("backingimage", "backingimage", "")
	golden("datavolume", "datavolume", "default")
	r.register(RegistrationOptions{MinNumberOfCopies: 2, DiskSelector: []string{"yes", "ssd"}, Name: "2e1"})
	golden("registered", "backingimage", "default")
	r.until(InLonghorn)
	if err := r.unregister(t.Context(), v, ""); err != nil {
		t.Fatal(err)
	}
	r.register(RegistrationOptions{Mode: PushUpload})
	golden("uploaded", "storageclass", "")
	if _, err := r.manifest(t.Context(), v, "backingimage", ""); codeOf(err) != Malformed {
		t.Error(err)
	}
	if _, err := r.manifest(t.Context(), v, "poem", ""); codeOf(err) != NotFound {
		t.Error(err)
	}
	if _, err := r.manifest(t.Context(), v, "storageclass", "nowhere"); codeOf(err) != NotFound {
		t.Error(err)
	}
	other := v
	other.Version = "v2"
	public, _ := url.Parse("http://localhost")
	for want, s := range map[string]Settings{"public_url": {Prefix: "p", PublicURL: public}, "token": {Prefix: "p", Private: true}} {
		r.set(s)
		if _, err := r.manifest(t.Context(), other, "datavolume", ""); codeOf(err) != Malformed || !strings.Contains(err.Error(), want) {
			t.Error(err)
		}
	}
}
