package mirror

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/tree"
)

// why asks for an explanation, which says each of some things, and checks that the
// upstream was not asked for it.
func (b *bench) why(ref string, says ...string) Why {
	b.t.Helper()
	parsed, err := oci.ParseReference(ref)
	if err != nil {
		b.t.Fatal(err)
	}
	b.asked()
	w, err := b.mirror.Why(b.t.Context(), b.target(), parsed)
	if err != nil {
		b.t.Error(err)
	}
	b.wantAsked("")
	for _, part := range says {
		if !strings.Contains(w.Answer, part) {
			b.t.Errorf("%s: %q does not say %q", ref, w.Answer, part)
		}
	}
	return w
}

// TestWhy follows a tag through its life.
func TestWhy(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	index := regtest.NewIndex(first, second)
	b.registry.Push("team/app", first, "latest")

	w := b.why("latest", "from the upstream: nothing is held")
	if w.Reference != "reg.example/team/app:latest" || w.Upstream != "reg.example" || w.Repository != repository || !strings.HasPrefix(w.Record, "without a record") ||
		len(w.Endpoints) != 1 || !strings.HasPrefix(w.Endpoints[0], b.registry.URL) || !strings.Contains(w.Endpoints[0], "origin") || w.Tag != nil || w.Manifest != nil || w.Digest != "" {
		t.Errorf("%+v", w)
	}
	b.why(first.Digest.String(), "from the upstream: it is not held")

	b.wantManifest(latest, first)
	checked := b.now()
	b.eventually("it to be in memory", func() bool {
		_, ok := b.tree.Warm(repository, first.Digest, time.Time{})
		return ok
	})
	b.pass(12 * time.Second)
	w = b.why("latest", "from memory, and the upstream is not asked", "2 of its 2 blobs, 1.0 KiB, are fetched")
	if w.Digest != first.Digest || !strings.Contains(w.Record, "mirrored from reg.example since 2026-03-01") || w.Tag == nil || w.Tag.Standing != "fresh" || w.Tag.TTL != 60 ||
		!w.Tag.Checked.Equal(checked) || w.Manifest == nil || !w.Manifest.Hot || w.Manifest.Size != int64(len(first.Data)) || len(w.Manifest.Blobs) != 2 || w.Manifest.Blobs[1].Held || w.Manifest.Blobs[1].Size != 1000 {
		t.Errorf("%+v %+v %+v", w, w.Tag, w.Manifest)
	}

	for _, blob := range first.Blobs {
		b.wantBlob(blob)
		b.linked(blob.Digest)
	}
	if err := b.tree.Pin(t.Context(), repository, oci.Reference{Tag: "latest"}, b.now()); err != nil {
		t.Fatal(err)
	}
	b.pass(time.Minute)
	w = b.why("latest", "once the upstream has said that it is current, or after 2s", "all its blobs are held")
	if w.Tag.Standing != "due for a check" || !w.Manifest.Blobs[1].Held || !strings.HasPrefix(w.Pinned, "since 2026-03-01") {
		t.Errorf("%+v %+v", w, w.Tag)
	}
	if w := b.why(first.Digest.String(), "the upstream is not asked"); w.Pinned != "" || w.Tag != nil {
		t.Errorf("%+v", w)
	}

	b.registry.Fail(regtest.Fault{Path: "/manifests/", Status: 500})
	b.wantManifest(latest, first)
	if w := b.why("latest", "though it could not be checked"); !strings.Contains(w.Tag.Failure, "500") {
		t.Errorf("%+v", w.Tag)
	}
	b.registry.Heal()
	b.restart()
	if w := b.why("latest", "from the store once"); w.Tag.Standing != "due for a check" || !w.Tag.Checked.IsZero() {
		t.Errorf("%+v", w.Tag)
	}

	b.pass(time.Hour)
	b.registry.Push("team/app", index, "latest")
	b.wantManifest(latest, index)
	w = b.why("latest", "of the 2 manifests it names 1 are held")
	if w.Tag.Previous != first.Digest || w.Tag.Moved.IsZero() || len(w.Manifest.Children) != 2 || !w.Manifest.Children[0].Held || w.Manifest.Children[1].Held {
		t.Errorf("%+v %+v", w.Tag, w.Manifest)
	}

	b.registry.DeleteTag("team/app", "latest")
	b.pass(time.Minute)
	b.wantStatus(404, "GET", latest)
	if w := b.why("latest", "404: the upstream says since"); w.Tag.Gone.IsZero() || w.Tag.Standing != "gone" {
		t.Errorf("%+v", w.Tag)
	}
	b.upstream.Keep = true
	if w := b.why("latest", "and the upstream is not asked"); w.Tag.Standing != "gone and kept, fresh" {
		t.Errorf("%+v", w.Tag)
	}
	b.upstream.Keep = false
	b.pass(time.Minute)
	b.why("latest", "asked whether it has the tag again")
	b.wantStatus(404, "GET", "team/app/manifests/other")
	b.why("other", "refused for now", "404")

	text, err := json.Marshal(w)
	if err != nil || !strings.Contains(string(text), `"answer":"`) || !strings.Contains(string(text), `"moved":"`) {
		t.Errorf("%s, %v", text, err)
	}
}

// TestWhyPrivate: who may read a repository decides first.
func TestWhyPrivate(t *testing.T) {
	b := newBench(t, asUser, nil)
	b.registry.Push("team/app", first, "latest")
	b.why("latest", "asked first whether everyone may read it")
	b.wantManifest(latest, first)
	if w := b.why("latest", "the upstream is not asked"); !strings.Contains(w.Readers, "everyone") {
		t.Errorf("%+v", w)
	}
	b.mirror.probes.Add(repository, tree.Verdict{Public: false, Checked: b.now()})
	b.why("latest", "refused")
}

// TestWhyNot: what a request would be refused for.
func TestWhyNot(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	if err := b.tree.PutRecord(t.Context(), repository, tree.Record{Class: tree.Hosted, Created: b.now()}); err != nil {
		t.Fatal(err)
	}
	if w := b.why("latest", "refused: ", "hosted"); !strings.HasPrefix(w.Record, "hosted since") {
		t.Errorf("%+v", w)
	}
	target := b.target()
	target.Upstream = nil
	w, err := b.mirror.Why(t.Context(), target, oci.Reference{Tag: "latest"})
	if err != nil || !strings.HasPrefix(w.Answer, "404: it is hosted here") {
		t.Errorf("%+v, %v", w, err)
	}
	if _, err := b.tree.PutManifest(t.Context(), repository, first.Digest, first.Data, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.tree.SetTag(t.Context(), repository, "latest", first.Digest, b.now(), nil); err != nil {
		t.Fatal(err)
	}
	w, err = b.mirror.Why(t.Context(), target, oci.Reference{Tag: "latest"})
	if err != nil || !strings.Contains(w.Answer, "2 of its 2 blobs are missing") || w.Digest != first.Digest {
		t.Errorf("%+v, %v", w, err)
	}
}

// TestWhyLeftAlone: an endpoint that is not asked is said to be.
func TestWhyLeftAlone(t *testing.T) {
	b := newBench(t, regtest.Options{}, nil)
	b.registry.Fail(regtest.Fault{Path: "/manifests/", Status: 429})
	b.wantStatus(503, "GET", latest)
	if w := b.why("latest"); len(w.Endpoints) != 1 || !strings.Contains(w.Endpoints[0], "left alone: it asked for that, for 1m0s") {
		t.Errorf("%q", w.Endpoints)
	}
	b.registry.Heal()
	b.pass(time.Hour)
	if w := b.why("latest"); strings.Contains(w.Endpoints[0], "left alone") {
		t.Errorf("%q", w.Endpoints)
	}
	b.registry.Down()
	for range 5 {
		b.wantStatus(503, "GET", latest)
	}
	if w := b.why("latest"); !strings.Contains(w.Endpoints[0], "left alone: ") || !strings.Contains(w.Endpoints[0], "refused") {
		t.Errorf("%q", w.Endpoints)
	}
}
