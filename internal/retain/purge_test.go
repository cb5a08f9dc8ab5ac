package retain

import (
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
)

// One thing can be removed, or many, and what others need stays; so does what is
// pinned, hosted, or in no record (peers §2, 21 and 28).
func TestPeers28Purge(t *testing.T) {
	t.Parallel()
	base := content(1, 5000) // belongs to nginx, tool, apps/web and old/registry
	child := image("child", nil, content(5, 70), content(2, 100))
	dry := keep(t)
	dry.ready()
	dry.populate()
	dry.done(dry.Reindex())
	before := dry.stored()
	for pattern, want := range map[string]struct {
		found string // as in Found, sorted; D is the digest of the child
		gone  [][]byte
		kept  int64
	}{
		"docker.io/library/nginx:latest":   {found: "docker.io/library/nginx:latest"},
		"docker.io/library/nginx:*":        {found: "docker.io/library/nginx:1.27 docker.io/library/nginx:latest", gone: [][]byte{content(3, 50)}},
		"docker.io/library/nginx":          {found: "docker.io/library/nginx:1.27 docker.io/library/nginx:latest", gone: [][]byte{content(3, 50)}},
		"docker.io/**:1.*":                 {found: "docker.io/library/nginx:1.27"},
		"docker.io/*/ng*x:l*t":             {found: "docker.io/library/nginx:latest"},
		"docker.io/*:latest":               {},
		"**/nginx:latest":                  {found: "docker.io/library/nginx:latest"},
		"ghcr.io/org/tool:multi":           {found: "ghcr.io/org/tool:multi", gone: [][]byte{content(5, 70), content(6, 10)}},
		"ghcr.io/org/tool:v1":              {kept: 1},
		"ghcr.io/org/tool@D":               {}, // the index names it
		"ghcr.io/**":                       {found: "ghcr.io/org/tool:multi", gone: [][]byte{content(5, 70), content(6, 10)}, kept: 1},
		"apps/web":                         {},
		"old/registry:v0":                  {},
		"**":                               {found: "docker.io/library/nginx:1.27 docker.io/library/nginx:latest ghcr.io/org/tool:multi", gone: [][]byte{content(3, 50), content(5, 70), content(6, 10)}, kept: 1},
		"docker.io/library/nginx:absent":   {},
		"quay.io/not/here":                 {},
		"docker.io/library/nginx/under:*":  {},
		"docker.io/library/nginx:latest.*": {},
	} {
		t.Run(strings.ReplaceAll(pattern, "/", " "), func(t *testing.T) {
			t.Parallel()
			pattern := strings.ReplaceAll(pattern, "D", digest.FromBytes(child).String())
			check := func(j Job) {
				t.Helper()
				slices.Sort(j.Found)
				if got := strings.Join(j.Found, " "); got != want.found || j.Removed != int64(len(j.Found)) || j.Kept != want.kept || j.Pattern != pattern {
					t.Errorf("job is %+v, want %q", j, want.found)
				}
			}
			check(dry.done(dry.Purge(pattern, true)))
			if after := dry.stored(); !slices.Equal(after, before) {
				t.Errorf("a dry run has left\n%q, there were\n%q", after, before)
			}
			if race && want.found == "" {
				return // and much time saved
			}
			b := keep(t)
			b.ready()
			b.populate()
			b.done(b.Reindex())
			real := b.done(b.Purge(pattern, false))
			check(real)
			for _, data := range want.gone {
				if b.holds(data) {
					t.Errorf("%d bytes are still there", len(data))
				}
			}
			stays := [][]byte{base, content(4, 60), content(7, 80), content(8, 90)}
			for _, data := range stays {
				if !b.holds(data) {
					t.Errorf("%d bytes are gone", len(data))
				}
			}
			if len(want.gone) == 0 && real.Bytes != 0 || len(want.gone) > 0 && real.Bytes == 0 {
				t.Errorf("%d bytes were freed", real.Bytes)
			}
			if n := b.logged.FilterMessage("purge").Len(); n != 1 {
				t.Errorf("%d lines say what was purged", n)
			}
			b.agrees(b.ready())
		})
	}
}

// A whole repository leaves nothing behind, and a dry run knows how much that is
// though its tags share everything.
func TestPurgeWhole(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	d := b.pull("docker.io/a", "x", content(1, 1000), content(2, 2000))
	b.tag("docker.io/a", "y", d)
	b.blob("docker.io/a", content(3, 500)) // no manifest names it
	b.flush()
	dry, real := b.done(b.Purge("docker.io/a", true)), b.done(b.Purge("docker.io/a", false))
	if dry.Bytes != real.Bytes || dry.Bytes < 3500 {
		t.Errorf("%d bytes were freed, and %d said", real.Bytes, dry.Bytes)
	}
	if left := b.stored(); len(left) != 0 {
		t.Errorf("left are %q", left)
	}
	b.agrees(b.ready())
}

// What two repositories share stays with the one (peers §2, 21).
func TestPeers21SharedLayerStays(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.ready()
	b.repository("docker.io/a", "docker.io")
	b.repository("docker.io/b", "docker.io")
	b.pull("docker.io/a", "x", content(1, 100), content(2, 100))
	b.pull("docker.io/b", "x", content(1, 100), content(2, 100))
	b.done(b.Purge("docker.io/a", false))
	if !b.holds(content(2, 100)) || !b.exists(layout.LayerLink("docker.io/b", digest.FromBytes(content(2, 100)))) {
		t.Error("a layer is gone that another repository has")
	}
	if _, err := b.tree.Manifest(t.Context(), "docker.io/b", b.means("docker.io/b", "x")); err != nil {
		t.Error(err)
	}
	if b.exists(layout.Record("docker.io/a")) {
		t.Error("the repository is still there")
	}
	b.done(b.Purge("docker.io/b", false))
	if b.holds(content(2, 100)) {
		t.Error("the layer is there for nobody")
	}
}

func TestPurgePattern(t *testing.T) {
	t.Parallel()
	for _, wrong := range []string{"", "/", "a//b", "a/", "/a", ":x", "a:", "a:/b:", "A", "a@x", "a@sha256:12", "a:b@x", "a:?", "a b", "a/_x", "a:" + strings.Repeat("x", 200)} {
		if _, err := new(Keeper).Purge(wrong, true); err == nil || !strings.Contains(err.Error(), "is no pattern") {
			t.Errorf("%q: %v", wrong, err)
		}
	}
	names := []string{"a", "a/b", "a/b/c", "ab/c", "docker.io/library/x-y"}
	for pattern, want := range map[string]string{
		"a": "a", "*": "a", "**": "a a/b a/b/c ab/c docker.io/library/x-y", "a/*": "a/b", "a/**": "a a/b a/b/c",
		"**/c": "a/b/c ab/c", "a*/c": "ab/c", "*b/c": "ab/c", "a/**/c": "a/b/c", "**/b/**": "a/b a/b/c",
		"docker.io/**/x*y": "docker.io/library/x-y", "docker.io/*/x-y*": "docker.io/library/x-y", "d*k*r.io/l*y/*": "docker.io/library/x-y",
		"*xy/*": "", "docker.io/library/x*x-y": "",
	} {
		p, err := parsePattern(pattern)
		if err != nil {
			t.Errorf("%q: %v", pattern, err)
			continue
		}
		got := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !p.matches(name) })
		if strings.Join(got, " ") != want {
			t.Errorf("%q matches %q, want %q", pattern, got, want)
		}
	}
}
