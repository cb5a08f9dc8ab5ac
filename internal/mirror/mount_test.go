package mirror

import (
	"net/http"
	"testing"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// TestMountOfWhatWasPublic: where the mirror asks with credentials, a blob is mounted
// as long as it could be pulled: what a probe has found once is asked again.
func TestMountOfWhatWasPublic(t *testing.T) {
	b := newBench(t, asUser, nil)
	registry := hosted.New(hosted.Parts{Store: b.store, Tree: b.tree, Log: zap.NewNop()})
	defer registry.Close()
	b.mirror.hosted = registry
	pattern, err := oci.ParsePattern("apps/**")
	if err != nil {
		t.Fatal(err)
	}
	mirrored, err := oci.ParsePattern("reg.example/**")
	if err != nil {
		t.Fatal(err)
	}
	rules := func(rules ...access.Rule) {
		t.Helper()
		if b.site, err = NewSite(SiteConfig{Upstreams: b.site.upstreams, Hosted: []oci.Pattern{pattern}, Rules: rules}); err != nil {
			t.Fatal(err)
		}
	}
	// Both are held, and a probe of long ago has found that everyone may read them.
	rules(access.Rule{Allow: true, Actions: access.Pull, On: []oci.Pattern{mirrored}})
	layer := string(first.Blobs[1].Digest)
	for _, name := range []string{"team/app", "private/app"} {
		b.registry.Push(name, first, "latest")
		b.wantManifest("reg.example/"+name+"/manifests/latest", first)
		b.wantStatus(200, "GET", "reg.example/"+name+"/blobs/"+layer)
		b.eventually("the layer to be linked", func() bool {
			known, _, err := b.mirror.tree.Member(t.Context(), "reg.example/"+name, first.Blobs[1].Digest)
			return err == nil && known.Linked
		})
		record, err := b.tree.Record(t.Context(), "reg.example/"+name)
		if err != nil {
			t.Fatal(err)
		}
		record.Public = &tree.Verdict{Public: true, Checked: b.now()}
		if err := b.tree.PutRecord(t.Context(), "reg.example/"+name, record); err != nil {
			t.Fatal(err)
		}
	}
	anyone := access.Rule{Allow: true, Actions: access.Any}
	rules(anyone)
	mount := func(name string) int {
		return b.ask(http.MethodPost, "apps/x/blobs/uploads/?mount="+layer+"&from=reg.example/"+name).Code
	}
	b.pass(2 * publicFor)
	if code := mount("private/app"); code != http.StatusAccepted {
		t.Errorf("what is private by now: %d", code)
	}
	b.wantStatus(404, "HEAD", "apps/x/blobs/"+layer)
	if code := mount("team/app"); code != http.StatusCreated {
		t.Errorf("what is public still: %d", code)
	}
	b.pass(2 * publicFor)
	b.registry.Down()
	if code := mount("team/app"); code != http.StatusCreated {
		t.Errorf("what was public when somebody could be asked: %d", code)
	}
}
