package retain

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
)

func TestExpired(t *testing.T) {
	now := time.Date(2030, 1, 10, 0, 0, 0, 0, time.UTC)
	var tags []catalog.Tag // one a day, the latest first
	for i, name := range []string{"v5", "pr-3", "v4", "pinned", "v3", "pr-2", "v2", "latest", "pr-1", "v1", "unknown"} {
		tags = append(tags, catalog.Tag{Name: name, Since: now.Add(-time.Duration(i)*day - time.Hour), Pinned: name == "pinned"})
	}
	tags[10].Since = time.Time{}
	for name, c := range map[string]struct {
		hosted  Hosted
		expired string
		kept    int64
	}{
		"none":              {Hosted{}, "", 0},
		"keep all":          {Hosted{Retention: []Rule{{Keep: 11}}}, "", 0},
		"keep of all":       {Hosted{Retention: []Rule{{Keep: 2}}}, "v4 v3 pr-2 v2 latest pr-1 v1", 1},
		"keep on":           {Hosted{Retention: []Rule{{Keep: 2, On: []oci.TagPattern{"v*"}}}}, "v3 v2 v1", 0},
		"keep on two":       {Hosted{Retention: []Rule{{Keep: 2, On: []oci.TagPattern{"v*", "pr-*"}}}}, "v4 v3 pr-2 v2 pr-1 v1", 0},
		"newer":             {Hosted{Retention: []Rule{{Newer: 3 * day}}}, "v3 pr-2 v2 latest pr-1 v1", 1},
		"newer on":          {Hosted{Retention: []Rule{{Newer: 3 * day, On: []oci.TagPattern{"pr-*"}}}}, "pr-2 pr-1", 0},
		"either":            {Hosted{Retention: []Rule{{Newer: 3 * day}, {Keep: 4, On: []oci.TagPattern{"v*"}}}}, "pr-2 latest pr-1 v1", 1},
		"each its own":      {Hosted{Retention: []Rule{{Keep: 1, On: []oci.TagPattern{"v*"}}, {Keep: 1, On: []oci.TagPattern{"pr-*"}}}}, "v4 v3 pr-2 v2 pr-1 v1", 0},
		"immutable":         {Hosted{Retention: []Rule{{Keep: 1, On: []oci.TagPattern{"v*"}}}, Immutable: []oci.TagPattern{"v1", "v2"}}, "v4 v3", 2},
		"a rule for latest": {Hosted{Retention: []Rule{{Keep: 1}, {Newer: 100 * day, On: []oci.TagPattern{"latest"}}}}, "pr-3 v4 v3 pr-2 v2 pr-1 v1", 1},
	} {
		expired, kept := c.hosted.expired(tags, now)
		var names []string
		for _, tag := range expired {
			names = append(names, tag.Name)
		}
		if got := strings.Join(names, " "); got != c.expired || kept != c.kept {
			t.Errorf("%s: %q expired and %d kept, want %q and %d", name, got, kept, c.expired, c.kept)
		}
	}
}

// Tags that no rule keeps go, and what only they meant; the space is given back by
// the next gc. A dry run says the same.
func TestRetention(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/web", "")
	b.repository("docker.io/library/nginx", "docker.io")
	base := content(1, 2000)
	v := map[string]digest.Digest{}
	for i, name := range []string{"v1", "v2", "v3", "v4", "v5"} {
		v[name] = b.pull("apps/web", name, content(10+i, 100), base)
		b.clock.pass(time.Hour)
	}
	b.tag("apps/web", "stable", v["v3"])
	// An index goes with its platforms, and with what says something about it.
	child := image("child", nil, content(20, 300), base)
	b.manifest("apps/web", child)
	b.blob("apps/web", content(20, 300))
	nightly := b.manifest("apps/web", index(child))
	subject := describe("application/vnd.oci.image.index.v1+json", index(child))
	signature := b.manifest("apps/web", image("signature", &subject, content(21, 10)))
	b.tag("apps/web", "nightly-1", nightly)
	b.clock.pass(72 * time.Hour)
	b.tag("apps/web", "nightly-2", v["v5"])
	b.pull("theirs/web", "v1", content(22, 100)) // which nobody has recorded
	b.pull("theirs/web", "v2", content(25, 100))
	b.pull("docker.io/library/nginx", "v1", content(23, 100))
	b.pull("docker.io/library/nginx", "v2", content(24, 100))
	ref := reference(t, "v2")
	if err := b.tree.Pin(t.Context(), "apps/web", ref, b.clock.time()); err != nil {
		t.Fatal(err)
	}
	rules := []Rule{{Keep: 1, On: []oci.TagPattern{"v*"}}, {Newer: 48 * time.Hour, On: []oci.TagPattern{"nightly-*"}}}
	off := hostedPattern(t, "apps/off")
	b.settings.Hosted = []Hosted{{Pattern: off, Retention: rules, NoDelete: true}, {Pattern: hostedPattern(t, "**"), Retention: rules, Immutable: []oci.TagPattern{"v1"}}}
	b.repository("apps/off", "")
	for _, name := range []string{"v1", "v2"} {
		b.pull("apps/off", name, content(30, 10))
	}
	b.Set(b.settings)
	b.flush()

	want := []string{"apps/web:nightly-1", "apps/web:v3", "apps/web:v4"}
	before := b.stored()
	dry := b.done(b.Retention(true))
	if slices.Sort(dry.Found); !slices.Equal(dry.Found, want) || dry.Kept != 2 || dry.Kind != "retention" {
		t.Errorf("would remove %q and keep %d", dry.Found, dry.Kept)
	}
	if after := b.stored(); !slices.Equal(after, before) {
		t.Errorf("a dry run has left\n%q, there were\n%q", after, before)
	}
	real := b.done(b.Retention(false))
	if slices.Sort(real.Found); !slices.Equal(real.Found, want) || real.Kept != 2 || real.Bytes != dry.Bytes || real.Bytes == 0 {
		t.Errorf("job is %+v,\ndry %+v", real, dry)
	}
	for _, name := range []string{"v1", "v2", "v5", "stable", "nightly-2"} {
		if b.means("apps/web", name) == "" {
			t.Errorf("%s is gone", name)
		}
	}
	for name, there := range map[digest.Digest]bool{v["v3"]: true, v["v4"]: false, nightly: false, digest.FromBytes(child): false, signature: false} {
		if b.exists(layout.RevisionLink("apps/web", name)) != there {
			t.Errorf("manifest %s is there: %v", name, !there)
		}
	}
	b.agrees(b.ready())
	// Its layers are for the gc.
	if !b.holds(content(13, 100)) {
		t.Error("a layer has gone with its tag")
	}
	b.clock.pass(time.Hour)
	b.done(b.GC(false))
	if b.holds(content(13, 100)) || b.holds(content(20, 300)) || !b.holds(content(12, 100)) || !b.holds(base) {
		t.Error("the wrong layers are there")
	}
	if again := b.done(b.Retention(false)); again.Removed != 0 {
		t.Errorf("there was more: %q", again.Found)
	}
	b.agrees(b.ready())
}

// A tag that is pushed while it is about to be removed stays, and so does the
// manifest that another tag begins to mean.
func TestRetentionMeanwhile(t *testing.T) {
	t.Parallel()
	for _, push := range []string{"the same again", "another", "under another tag"} {
		t.Run(push, func(t *testing.T) {
			t.Parallel()
			var b *kept
			var old digest.Digest
			other := image("other", nil, content(9, 10))
			pushed := false
			b = keep(t, func(b *kept) {
				b.alone = func(string) func() {
					if !pushed {
						pushed = true
						switch push {
						case "the same again":
							b.tag("apps/web", "v1", old)
						case "another":
							b.tag("apps/web", "v1", b.manifest("apps/web", other))
						case "under another tag":
							b.tag("apps/web", "v9", old)
						}
					}
					return func() {}
				}
			})
			b.repository("apps/web", "")
			old = b.pull("apps/web", "v1", content(1, 100))
			b.clock.pass(time.Hour)
			b.pull("apps/web", "v2", content(2, 100))
			b.settings.Hosted = []Hosted{{Pattern: hostedPattern(t, "apps/**"), Retention: []Rule{{Keep: 1}}}}
			b.Set(b.settings)
			b.flush()
			b.done(b.Retention(false))
			if !pushed {
				t.Fatal("nothing was about to be removed")
			}
			tag, want := "v1", old
			switch push {
			case "another":
				want = digest.FromBytes(other)
			case "under another tag":
				tag = "v9"
			}
			if got := b.means("apps/web", tag); got != want || !b.exists(layout.RevisionLink("apps/web", want)) {
				t.Errorf("%s means %q, and its manifest is there: %v", tag, got, b.exists(layout.RevisionLink("apps/web", want)))
			}
			b.agrees(b.ready())
		})
	}
}

// A tag that is pushed again, though it means the same, counts as new.
func TestRetentionOfPushedAgain(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/web", "")
	d := b.pull("apps/web", "nightly", content(1, 100))
	for range 3 {
		b.clock.pass(36 * time.Hour)
		b.tag("apps/web", "nightly", d)
	}
	b.settings.Hosted = []Hosted{{Pattern: hostedPattern(t, "apps/**"), Retention: []Rule{{Newer: 48 * time.Hour}}}}
	b.Set(b.settings)
	if j := b.done(b.Retention(false)); j.Removed != 0 {
		t.Errorf("removed %q", j.Found)
	}
	b.clock.pass(49 * time.Hour)
	if j := b.done(b.Retention(false)); j.Removed != 1 {
		t.Errorf("removed %q", j.Found)
	}
}

// When it is time for a gc, retention comes before, so that the gc gives back what
// it has let go.
func TestRetentionScheduled(t *testing.T) {
	t.Parallel()
	b := keep(t)
	b.repository("apps/web", "")
	for i := range 3 {
		b.pull("apps/web", fmt.Sprint("v", i), content(i, 100))
		b.clock.pass(time.Hour)
	}
	b.flush()
	b.Set(Settings{GC: &once{}, Hosted: []Hosted{{Pattern: hostedPattern(t, "apps/**"), Retention: []Rule{{Keep: 1}}}}})
	eventually(t, "a scheduled gc", until(func() bool {
		return slices.ContainsFunc(b.Jobs(), func(j Job) bool { return j.Kind == "gc" && !j.Ended.IsZero() })
	}))
	if b.means("apps/web", "v1") != "" || b.means("apps/web", "v2") == "" {
		t.Error("the wrong tags are there")
	}
	if b.holds(content(0, 100)) || b.holds(content(1, 100)) || !b.holds(content(2, 100)) {
		t.Error("the wrong layers are there")
	}
}
