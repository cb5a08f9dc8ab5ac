package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/disk/disktest"
)

// A bench is a tree on a disk, which can be opened anew as after a restart.
type bench struct {
	*Tree
	t     *testing.T
	dir   string
	store storage.Store
	told  told
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir()}
	b.open()
	t.Cleanup(func() {
		b.Tree.Close()
		b.store.Close()
	})
	return b
}

func (b *bench) open() {
	b.t.Helper()
	b.store = disktest.Open(b.t, b.dir)
	b.Tree = New(b.store, b.told.note)
}

// restart forgets what is only in memory.
func (b *bench) restart() {
	b.t.Helper()
	b.Tree.Close()
	if err := b.store.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.open()
}

// file is where a key lies.
func (b *bench) file(key string) string { return filepath.Join(b.dir, filepath.FromSlash(key)) }

// write puts bytes where a key lies, behind the store's back, as registry:2 or
// a crash does.
func (b *bench) write(key string, data []byte) {
	b.t.Helper()
	path := b.file(key)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o640); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) holds(key, want string) {
	b.t.Helper()
	got, err := os.ReadFile(b.file(key))
	if err != nil || string(got) != want {
		b.t.Errorf("%s holds %q, %v; want %q", key, got, err, want)
	}
}

// blob stores the bytes of a blob, for nobody yet.
func (b *bench) blob(data string) digest.Digest {
	b.t.Helper()
	d := digest.FromString(data)
	if err := b.store.Put(b.t.Context(), layout.Blob(d), []byte(data), storage.Lazy); err != nil {
		b.t.Fatal(err)
	}
	return d
}

func (b *bench) layer(repository, data string) digest.Digest {
	b.t.Helper()
	d := b.blob(data)
	if err := b.LinkBlob(b.t.Context(), repository, d, d); err != nil {
		b.t.Fatal(err)
	}
	return d
}

func (b *bench) put(repository, body string) digest.Digest {
	b.t.Helper()
	d := digest.FromString(body)
	m, err := b.PutManifest(b.t.Context(), repository, d, []byte(body), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	if m.Digest != d || string(m.Body) != body {
		b.t.Errorf("PutManifest returned %s %q", m.Digest, m.Body)
	}
	return d
}

func (b *bench) wantManifest(repository string, d digest.Digest, body string) *Manifest {
	b.t.Helper()
	m, err := b.Manifest(b.t.Context(), repository, d)
	if err != nil {
		b.t.Errorf("manifest %s@%s: %v", repository, d, err)
		return nil
	}
	if m.Digest != d || string(m.Body) != body {
		b.t.Errorf("manifest %s@%s is %s %q", repository, d, m.Digest, m.Body)
	}
	return m
}

func (b *bench) wantNoManifest(repository string, d digest.Digest) {
	b.t.Helper()
	if m, err := b.Manifest(b.t.Context(), repository, d); !errors.Is(err, fs.ErrNotExist) {
		b.t.Errorf("manifest %s@%s: %v, %v; want fs.ErrNotExist", repository, d, m, err)
	}
}

func (b *bench) wantMember(repository string, d digest.Digest, want bool) Member {
	b.t.Helper()
	m, ok, err := b.Member(b.t.Context(), repository, d)
	if err != nil || ok != want {
		b.t.Errorf("member %s@%s: %v, %v; want %v", repository, d, ok, err, want)
	}
	return m
}

func image(config digest.Digest, layers ...digest.Digest) string {
	var list []string
	for _, l := range layers {
		list = append(list, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":%q,"size":11}`, l))
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":12},"layers":[%s]}`,
		v1.MediaTypeImageManifest, config, strings.Join(list, ","))
}

func index(children ...digest.Digest) string {
	var list []string
	for _, c := range children {
		list = append(list, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":99}`, v1.MediaTypeImageManifest, c))
	}
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, v1.MediaTypeImageIndex, strings.Join(list, ","))
}

func TestManifestIsStoredAsItCame(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("config"), digest.FromString("layer")) + "\n "
	d := b.put("r/a", body)
	b.holds(layout.Blob(d), body)
	b.holds(layout.RevisionLink("r/a", d), d.String()) // no newline
	for range 2 {
		if m := b.wantManifest("r/a", d, body); m != nil && m.MediaType != v1.MediaTypeImageManifest {
			t.Errorf("media type %q", m.MediaType)
		}
		b.wantNoManifest("r/b", d)
		b.wantNoManifest("r", d)
		b.wantNoManifest("r/a/c", d)
		b.restart()
	}
}

func TestPutManifestRefusesWhatIsNone(t *testing.T) {
	b := newBench(t)
	body := []byte("<html>log in</html>")
	if _, err := b.PutManifest(t.Context(), "r", digest.FromBytes(body), body, nil); err == nil {
		t.Error("a web page was stored as a manifest")
	}
	if _, err := os.Stat(b.file(layout.RevisionLink("r", digest.FromBytes(body)))); err == nil {
		t.Error("and linked")
	}
}

func TestDamagedManifestIsAbsent(t *testing.T) {
	for name, damage := range map[string]string{"empty": "", "short": `{"schemaVersion":2`, "zeros": strings.Repeat("\x00", 300), "other": index()} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			body := image(digest.FromString("config"))
			d := b.put("r", body)
			b.write(layout.Blob(d), []byte(damage))
			b.restart()
			if _, err := b.Manifest(t.Context(), "r", d); !errors.Is(err, ErrDamaged) || !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v, want ErrDamaged, which is absence", err)
			}
			b.put("r", body) // fetched again
			b.wantManifest("r", d, body)
		})
	}
}

func TestManifestWithoutBytesIsAbsent(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("config"))
	d := b.put("r", body)
	if err := os.Remove(b.file(layout.Blob(d))); err != nil {
		t.Fatal(err)
	}
	b.restart()
	b.wantNoManifest("r", d)
}

func TestDamagedLinksAreAbsent(t *testing.T) {
	body := image(digest.FromString("config"))
	for name, link := range map[string]string{
		"empty": "", "half": "sha256:e3b0c442", "zeros": strings.Repeat("\x00", 71), "too long": strings.Repeat("x", 511),
		"a path": "../../../etc/passwd", "another algorithm": "md5:d41d8cd98f00b204e9800998ecf8427e",
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			d := b.put("r", body)
			layer := b.layer("r", "a layer")
			if err := b.SetTag(t.Context(), "r", "latest", d, time.Now(), nil); err != nil {
				t.Fatal(err)
			}
			b.write(layout.RevisionLink("r", d), []byte(link))
			b.write(layout.LayerLink("r", layer), []byte(link))
			b.write(layout.TagLink("r", "latest"), []byte(link))
			b.restart()
			b.wantNoManifest("r", d)
			b.wantMember("r", layer, false)
			if got, err := b.Tag(t.Context(), "r", "latest"); !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, ErrDamaged) {
				t.Errorf("tag: %q, %v; want ErrDamaged, which is absence", got, err)
			}
			// What they led to is put right by the next pull.
			b.put("r", body)
			b.layer("r", "a layer")
			if err := b.SetTag(t.Context(), "r", "latest", d, time.Now(), nil); err != nil {
				t.Fatal(err)
			}
			b.wantManifest("r", d, body)
			b.wantMember("r", layer, true)
		})
	}
}

// registry:2 writes links without newline; editors and scripts do not.
func TestLinkWithNewline(t *testing.T) {
	b := newBench(t)
	d := digest.FromString("x")
	b.write(layout.TagLink("r", "latest"), []byte(d.String()+"\n"))
	if got, err := b.Tag(t.Context(), "r", "latest"); err != nil || got != d {
		t.Errorf("tag: %q, %v", got, err)
	}
}

func TestMembershipIsPerRepository(t *testing.T) {
	b := newBench(t)
	layer := b.layer("r/a", "a layer")
	if m := b.wantMember("r/a", layer, true); !m.Linked || m.Canonical != layer {
		t.Errorf("member %+v", m)
	}
	for _, other := range []string{"r/b", "r", "r/a/a"} {
		b.wantMember(other, layer, false)
	}
	b.holds(layout.LayerLink("r/a", layer), layer.String())

	// A manifest of B naming it makes it one there, and only there. The scan
	// that found nothing must not stand in the way.
	config := digest.FromString("config")
	b.put("r/b", image(config, layer))
	m := b.wantMember("r/b", layer, true)
	if m.Linked || m.Canonical != layer || m.Size != 11 {
		t.Errorf("member %+v", m)
	}
	if m := b.wantMember("r/b", config, true); m.Size != 12 {
		t.Errorf("config %+v", m)
	}
	b.wantMember("r/a", config, false)
	b.wantMember("r", layer, false)

	b.restart()
	b.wantMember("r", layer, false)
	if m := b.wantMember("r/a", layer, true); !m.Linked {
		t.Error("the link does not prove it after a restart")
	}
	if m := b.wantMember("r/b", layer, true); m.Linked || m.Size != 11 {
		t.Errorf("the manifest does not prove it after a restart: %+v", m)
	}
	b.wantMember("r/b", config, true)
	b.wantMember("r/b", digest.FromString("never seen"), false)
}

func TestMembersOfAnIndex(t *testing.T) {
	b := newBench(t)
	child := digest.FromString("a child that is not held")
	b.put("r", index(child))
	b.wantMember("r", child, true)
	b.wantNoManifest("r", child)
	b.restart()
	b.wantMember("r", child, true)
}

func TestLinkingRemembersTheSize(t *testing.T) {
	b := newBench(t)
	layer := b.blob("eleven byte")
	b.put("r", image(digest.FromString("config"), layer))
	if err := b.LinkBlob(t.Context(), "r", layer, layer); err != nil {
		t.Fatal(err)
	}
	if m := b.wantMember("r", layer, true); m.Size != 11 || !m.Linked {
		t.Errorf("member %+v", m)
	}
}

func TestAddMember(t *testing.T) {
	b := newBench(t)
	d := digest.FromString("the upstream says so")
	if m := b.AddMember("r", d, 5); m.Canonical != d || m.Size != 5 || m.Linked {
		t.Errorf("AddMember = %+v", m)
	}
	if m := b.wantMember("r", d, true); m.Size != 5 || m.Linked {
		t.Errorf("member %+v", m)
	}
	b.wantMember("s", d, false)
	b.restart() // only upstream's word, and gone
	b.wantMember("r", d, false)
}

func TestChildHeldForAnotherRepository(t *testing.T) {
	b := newBench(t)
	childBody := image(digest.FromString("config"), digest.FromString("layer"))
	child := b.put("a", childBody)
	b.wantNoManifest("b", child)
	b.put("b", index(child))
	b.wantManifest("b", child, childBody)
	b.holds(layout.RevisionLink("b", child), child.String())
	b.wantMember("b", digest.FromString("layer"), true)
	b.restart()
	b.wantManifest("b", child, childBody)
	b.wantNoManifest("c", child)
}

func TestLayerIsNoManifest(t *testing.T) {
	large := strings.Repeat("x", oci.MaxStoredManifest+1)
	// A config is JSON with a field called config.
	config := `{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":[]}}`
	for name, data := range map[string]string{"small": "a layer", "large": large, "config": config, "json": `{"a":1}`} {
		t.Run("linked "+name, func(t *testing.T) {
			b := newBench(t)
			b.wantNoManifest("r", b.layer("r", data))
		})
		t.Run("named "+name, func(t *testing.T) {
			b := newBench(t)
			d := b.blob(data)
			b.put("r", image(d, d))
			b.wantNoManifest("r", d)
			if _, err := os.Stat(b.file(layout.RevisionLink("r", d))); err == nil {
				t.Error("a layer is linked as a manifest")
			}
		})
		t.Run("linked and named "+name, func(t *testing.T) {
			b := newBench(t)
			d := b.layer("r", data)
			b.put("r", image(d, d))
			b.wantNoManifest("r", d)
		})
	}
}

// sha512 names the same bytes, which registry:2 keeps under their sha256.
func TestSHA512(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("config"))
	long, canonical := digest.SHA512.FromString(body), digest.FromString(body)
	if _, err := b.PutManifest(t.Context(), "r", long, []byte(body), nil); err != nil {
		t.Fatal(err)
	}
	b.holds(layout.Blob(canonical), body)
	b.holds(layout.RevisionLink("r", long), canonical.String())
	layer := b.blob("a layer")
	layerLong := digest.SHA512.FromString("a layer")
	if err := b.LinkBlob(t.Context(), "r", layerLong, layer); err != nil {
		t.Fatal(err)
	}
	b.holds(layout.LayerLink("r", layerLong), layer.String())
	b.holds(layout.LayerLink("r", layer), layer.String())
	for range 2 {
		b.wantManifest("r", long, body)
		b.wantManifest("r", canonical, body)
		b.wantNoManifest("s", long)
		for _, d := range []digest.Digest{layer, layerLong} {
			if m := b.wantMember("r", d, true); m.Canonical != layer || !m.Linked {
				t.Errorf("member by %s: %+v", d, m)
			}
			b.wantMember("s", d, false)
		}
		b.restart()
	}

	// Named by a manifest and not stored: a member whose sha256 nobody knows.
	unstored := digest.SHA512.FromString("not here")
	b.put("r", image(unstored))
	if m := b.wantMember("r", unstored, true); m.Canonical != "" || m.Size != 12 {
		t.Errorf("member %+v", m)
	}
	if _, err := b.PutManifest(t.Context(), "r", long, []byte(index()), nil); err == nil {
		b.wantNoManifest("r", long) // whatever was stored, it is not that
	}
}

func TestDamagedSHA512ManifestIsAbsent(t *testing.T) {
	b := newBench(t)
	body := image(digest.FromString("config"))
	long := digest.SHA512.FromString(body)
	if _, err := b.PutManifest(t.Context(), "r", long, []byte(body), nil); err != nil {
		t.Fatal(err)
	}
	other := b.put("s", index())
	b.write(layout.RevisionLink("r", long), []byte(other))
	b.restart()
	b.wantNoManifest("r", long)
}

func TestTags(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	if tags, err := b.Tags(ctx, "r"); err != nil || len(tags) != 0 {
		t.Errorf("tags of nothing: %v, %v", tags, err)
	}
	if _, err := b.Tag(ctx, "r", "latest"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tag of nothing: %v", err)
	}
	one, two := b.put("r", index()), b.put("r", image(digest.FromString("config")))
	for _, set := range []struct {
		tag string
		d   digest.Digest
	}{{"latest", one}, {"latest", two}, {"v1.0", one}, {"_x", two}} {
		if err := b.SetTag(ctx, "r", set.tag, set.d, time.Now(), nil); err != nil {
			t.Fatal(err)
		}
	}
	b.restart()
	if got, err := b.Tag(ctx, "r", "latest"); err != nil || got != two {
		t.Errorf("latest is %s, %v", got, err)
	}
	b.holds(layout.TagLink("r", "latest"), two.String())
	// The index remembers all it ever meant.
	b.holds(layout.TagIndexLink("r", "latest", one), one.String())
	b.holds(layout.TagIndexLink("r", "latest", two), two.String())
	tags, err := b.Tags(ctx, "r")
	slices.Sort(tags)
	if want := []string{"_x", "latest", "v1.0"}; err != nil || !slices.Equal(tags, want) {
		t.Errorf("tags %v, %v; want %v", tags, err, want)
	}
	if tags, err := b.Tags(ctx, "s"); err != nil || len(tags) != 0 {
		t.Errorf("tags of another repository: %v, %v", tags, err)
	}
	if _, err := b.Tag(ctx, "s", "latest"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tag of another repository: %v", err)
	}
	// What is no tag was not written by a registry.
	b.write(layout.Tags("r")+".DS_Store", []byte("x"))
	b.write(layout.Tags("r")+"-x/current/link", []byte("x"))
	if tags, err := b.Tags(ctx, "r"); err != nil || len(tags) != 3 {
		t.Errorf("tags %v, %v", tags, err)
	}
}

func TestRecords(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	if _, err := b.Record(ctx, "r"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a record of nothing: %v", err)
	}
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := Record{Class: Mirrored, Upstream: "docker.io", Prefix: "docker.io", Created: created, Public: &Verdict{Public: true, Checked: created}}
	if err := b.PutRecord(ctx, "r", want); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := b.Record(ctx, "r")
		if err != nil || got.Schema != recordSchema || got.Class != want.Class || got.Upstream != want.Upstream || got.Prefix != want.Prefix ||
			!got.Created.Equal(created) || got.Public == nil || !got.Public.Public || !got.Public.Checked.Equal(created) {
			t.Errorf("record %+v, %v", got, err)
		}
		for _, other := range []string{"r/s", "s"} {
			if _, err := b.Record(ctx, other); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("record of %s: %v", other, err)
			}
		}
		b.restart()
	}
	hosted := Record{Class: Hosted, Created: created}
	if err := b.PutRecord(ctx, "r/s", hosted); err != nil {
		t.Fatal(err)
	}
	if got, err := b.Record(ctx, "r/s"); err != nil || got.Class != Hosted || got.Public != nil {
		t.Errorf("record %+v, %v", got, err)
	}
}

// What cannot be read is not absent: a hosted repository must not be taken for
// a new one.
func TestDamagedRecordIsNotAbsent(t *testing.T) {
	for name, data := range map[string]string{"empty": "", "cut off": `{"schema":1,"class":"hos`, "newer": `{"schema":2,"class":"hosted"}`, "too large": strings.Repeat(" ", maxRecord+1)} {
		b := newBench(t)
		b.write(layout.Record("r"), []byte(data))
		if got, err := b.Record(t.Context(), "r"); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v; want an error that is not fs.ErrNotExist", name, got, err)
		}
		if ok, err := b.Exists(t.Context(), "r"); err == nil {
			t.Errorf("%s: Exists = %v without an error", name, ok)
		}
	}
}

func TestExists(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.put("a/manifest", index())
	if err := b.PutRecord(ctx, "a/record", Record{Class: Mirrored}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for repository, want := range map[string]bool{"a/manifest": true, "a/record": true, "a": false, "b": false, "a/manifest/c": false, "a/rec": false} {
			if got, err := b.Exists(ctx, repository); err != nil || got != want {
				t.Errorf("Exists(%s) = %v, %v; want %v", repository, got, err, want)
			}
		}
		b.restart()
	}
}

func TestRepositories(t *testing.T) {
	b := newBench(t)
	list := func() []string {
		t.Helper()
		var names []string
		for name, err := range b.Repositories(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
		}
		slices.Sort(names)
		return names
	}
	if names := list(); len(names) != 0 {
		t.Errorf("repositories of nothing: %v", names)
	}
	want := []string{"docker.io/library/nginx", "docker.io/library/nginx/sub", "ghcr.io/a/blobs/b", "x"}
	for _, name := range want {
		b.put(name, index())
	}
	b.layer("x", "a layer")
	b.write(layout.Repositories+"a/_uploads/u/data", nil)
	b.write(layout.Repositories+"stray", []byte("x"))
	b.write(layout.Repositories+"UPPER/_manifests/revisions/x", nil)
	if names := list(); !slices.Equal(names, want) {
		t.Errorf("repositories %v, want %v", names, want)
	}
	n := 0
	for range b.Repositories(t.Context()) { // ends when told to
		n++
		break
	}
	if n != 1 {
		t.Errorf("%d repositories after a break", n)
	}
}

func TestReferrers(t *testing.T) {
	b := newBench(t)
	subject := digest.FromString("subject")
	naming := func(s digest.Digest, kind string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":%q,"annotations":{"k":"v"},"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":1}}`,
			v1.MediaTypeImageManifest, kind, digest.FromString("{}"), v1.MediaTypeImageManifest, s)
	}
	sbom, signature := naming(subject, "application/sbom"), naming(subject, "application/signature")
	b.put("r", sbom)
	b.put("r", signature)
	b.put("r", naming(digest.FromString("another"), "application/sbom"))
	b.put("r", image(digest.FromString("config")))
	b.put("s", naming(subject, "application/of-another-repository"))
	for range 2 {
		found, err := b.Referrers(t.Context(), "r", subject)
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(found, func(x, y v1.Descriptor) int { return strings.Compare(x.ArtifactType, y.ArtifactType) })
		if len(found) != 2 {
			t.Fatalf("referrers %+v", found)
		}
		for i, body := range []string{sbom, signature} {
			got := found[i]
			if got.Digest != digest.FromString(body) || got.Size != int64(len(body)) || got.MediaType != v1.MediaTypeImageManifest || got.Annotations["k"] != "v" {
				t.Errorf("referrer %+v", got)
			}
		}
		if found[0].ArtifactType != "application/sbom" {
			t.Errorf("artifact type %q", found[0].ArtifactType)
		}
		b.restart()
	}
	if found, err := b.Referrers(t.Context(), "empty", subject); err != nil || len(found) != 0 {
		t.Errorf("referrers in nothing: %v, %v", found, err)
	}
	// One that is damaged does not hide the others.
	b.write(layout.Blob(digest.FromString(sbom)), nil)
	b.write(layout.RevisionLink("r", digest.FromString("x")), nil)
	if found, err := b.Referrers(t.Context(), "r", subject); err != nil || len(found) != 1 {
		t.Errorf("referrers %v, %v", found, err)
	}
}

// A store that cannot say is not a store without.
func TestErrorsAreNotAbsence(t *testing.T) {
	b := newBench(t)
	d := b.put("r", index())
	broken := New(failing{b.store}, nil)
	for name, err := range map[string]error{
		"Manifest": second(broken.Manifest(t.Context(), "r", d)),
		"Tag":      second(broken.Tag(t.Context(), "r", "latest")),
		"Record":   second(broken.Record(t.Context(), "r")),
		"Exists":   second(broken.Exists(t.Context(), "r")),
	} {
		if !errors.Is(err, errBroken) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, want the store's own error", name, err)
		}
	}
	if _, ok, err := broken.Member(t.Context(), "r", d); ok || !errors.Is(err, errBroken) {
		t.Errorf("Member: %v, %v", ok, err)
	}
}

func second[T any](_ T, err error) error { return err }

var errBroken = errors.New("input/output error")

type failing struct{ storage.Store }

func (failing) Get(context.Context, string, int64) ([]byte, error) { return nil, errBroken }

func (failing) Open(context.Context, string, int64, int64) (io.ReadCloser, storage.Info, error) {
	return nil, storage.Info{}, errBroken
}

func (failing) Stat(context.Context, string) (storage.Info, error) {
	return storage.Info{}, errBroken
}
