package module

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/mirror"
	"github.com/caddy-registry/mirror/internal/retain"
	"github.com/caddy-registry/mirror/internal/tree"
)

var update = flag.Bool("update", false, "rewrite what testdata expects")

// TestTables: what people see of the API's answers.
func TestTables(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	const gib = 1 << 30
	gc := retain.Job{
		ID: "gc-20260301t033000-3", Kind: "gc", Begun: now.Add(-9 * time.Hour), Ended: now.Add(-9*time.Hour + 12300*time.Millisecond),
		Done: 300, Total: 300, Unit: "repositories", Removed: 12, Bytes: gib, Found: []string{"sha256:1", "sha256:2"},
	}
	running := retain.Job{ID: "scrub-20260301t110000-4", Kind: "scrub", Begun: now.Add(-time.Hour), Done: 4 * gib, Total: 9 * gib, Unit: "bytes"}
	failed := retain.Job{ID: "purge-20260301t100000-2", Kind: "purge", DryRun: true, Begun: now.Add(-2 * time.Hour), Ended: now.Add(-2*time.Hour + time.Second), Unit: "repositories", Error: "canceled"}
	use := usage{Repositories: 1, Tags: 2204, Manifests: 9120, Blobs: 31877, Bytes: 411 * gib, Allocated: 412 * gib}
	for name, print := range map[string]func(w *strings.Builder) error{
		"status": func(w *strings.Builder) error {
			return storeStatus{
				Store: "disk:/srv/registry", Usage: use, MaxSize: 500 * gib, Partial: gib, Reserved: 2 * gib,
				Upstreams: []upstreamUsed{{"docker.io", 180 * gib, 200 * gib, 0}, {"ghcr.io", 95 * gib, 0, (30 * 24 * time.Hour).Seconds()}, {"quay.io", 0, 0, 5400}},
				Catalog:   "ready", Complete: now.Add(-time.Hour), Evicted: evicted{41, 388, 19 * gib}, LastGC: &gc, LastScrub: now.Add(-72 * time.Hour),
				Damaged:  []retain.Damage{{Digest: "sha256:77ab", Repositories: []string{"apps/web", "apps/db"}, Found: now}},
				Webhooks: []webhookStatus{{Name: "audit", Pending: 2204, Delivered: 31877, Failed: 17, Trouble: "it answers 503"}, {Name: "ci", Delivered: 12}},
			}.print(w, now)
		},
		"status_distant": func(w *strings.Builder) error {
			return storeStatus{
				Store: "s3:registry", Usage: use, MaxSize: 500 * gib, Catalog: "ready", Complete: now,
				Off: "another process uses the store (b on host2): gc is off",
				Distant: &distantStatus{Pending: 12, PendingBytes: 3 * gib, Oldest: now.Add(-90 * time.Second), Near: 41 * gib, NearSize: 50 * gib, Listed: true,
					Unavailable: now.Add(-time.Minute), Trouble: "503 SlowDown", Others: []string{"b on host2"}},
			}.print(w, now)
		},
		"status_distant_quiet": func(w *strings.Builder) error {
			return storeStatus{Store: "s3:registry", Usage: use, Catalog: "rebuilding", Distant: &distantStatus{Near: gib}}.print(w, now)
		},
		"status_backing": func(w *strings.Builder) error {
			return storeStatus{Store: "disk:/srv/registry", Catalog: "ready", Complete: now, Backing: &backingUsed{
				Images: 2, Versions: 17, Bytes: 40 * gib,
				Registrations: map[backing.RegistrationState]int64{backing.InLonghorn: 12, backing.Degraded: 1},
				Jobs:          map[backing.JobState]int64{backing.Running: 3},
			}}.print(w, now)
		},
		"images": func(w *strings.Builder) error {
			v := backing.Version{Name: "debian", Version: "v2", State: backing.Ready, Format: "qcow2", Size: gib, VirtualSize: 10 * gib, CreatedAt: now.Add(-time.Hour), Tags: []string{"stable"},
				Digests: backing.Digests{SHA256: "sha256:77ab", SHA512: "sha512:1e42"}, URLs: backing.URLs{File: "http://images.example/v1/files/1e42/debian-v2.qcow2"},
				Registrations: []backing.Registration{{Cluster: "east", Name: "debian-1a2b3c4d", State: backing.Downloading, Progress: 41}}}
			image := backing.Image{Name: "debian", Labels: map[string]string{"os": "linux"}, Protected: true, CreatedAt: now.Add(-48 * time.Hour),
				Tags: map[string]backing.Tag{"stable": {Version: "v2"}, "latest": {Version: "v1"}}, Versions: []backing.Version{v, {Version: "v1", State: backing.Ready, CreatedAt: now.Add(-48 * time.Hour), Format: "raw", Size: gib, VirtualSize: gib}}}
			coming := backing.Version{Name: "new", Version: "v1", State: backing.Fetching, Progress: &backing.Progress{Received: gib, Total: -1}, CreatedAt: now}
			return errors.Join(printImages(w, []backing.Image{image, {Name: "new", Versions: []backing.Version{coming}}}, now), printImage(w, image, now), versionLines(w, v, now), versionLines(w, coming, now))
		},
		"status_rebuilding": func(w *strings.Builder) error {
			return storeStatus{Store: "disk:/srv/registry", Catalog: "rebuilding"}.print(w, now)
		},
		"tags": func(w *strings.Builder) error {
			return tagPage{Tags: []tagLine{
				{"3.19", "sha256:1e42bbe2508d0c91aa", now.Add(-15 * 24 * time.Hour), now.Add(-9 * 24 * time.Hour), false, 7_500_000},
				{"3.20", "sha256:77ab31c0ffee0c91aa", now.Add(-24 * time.Hour), now.Add(-12 * time.Minute), true, 7_700_000},
				{"edge", "sha256:0badcafe", now.Add(-time.Minute), time.Time{}, false, 0},
			}}.print(w, now)
		},
		"du_distant": func(w *strings.Builder) error {
			return usageReport{Store: use, Near: &nearUsage{41 * gib, 50 * gib}}.print(w)
		},
		"jobs_off": func(w *strings.Builder) error {
			return jobList{Jobs: []retain.Job{gc}, Off: "another process uses the store (b on host2)"}.print(w, now)
		},
		"du": func(w *strings.Builder) error {
			return usageReport{
				Store: use, MaxSize: 500 * gib,
				Upstreams:    []upstreamUsage{{"", use, 0}, {"docker.io", use, 200 * gib}},
				Repositories: []repositoryLine{{"docker.io/library/alpine", tree.Mirrored, "docker.io", now, use}, {"apps/web", tree.Hosted, "", now, usage{}}},
			}.print(w)
		},
		"why": func(w *strings.Builder) error {
			return explanation{mirror.Why{
				Reference: "docker.io/library/alpine:3.20", Answer: "from the store", Upstream: "docker.io",
				Endpoints: []string{"https://hub.corp", "https://registry-1.docker.io"}, Repository: "docker.io/library/alpine", Record: "mirrored from docker.io since 2026-01-01",
				Tag:    &mirror.WhyTag{Standing: "fresh", TTL: 60, Checked: now.Add(-30 * time.Second), Moved: now.Add(-24 * time.Hour), Previous: "sha256:1e42", Failure: "none"},
				Digest: "sha256:77ab31c0ffee0c91aa",
				Manifest: &mirror.WhyManifest{MediaType: "application/vnd.oci.image.manifest.v1+json", Size: 500, Hot: true,
					Blobs: []mirror.WhyBlob{{Digest: "sha256:0123456789abcdef", Size: 1500, Held: true}, {Digest: "sha256:ffff456789abcdef", Size: -1, Platform: "linux/amd64"}}},
			}, &heldReport{Digest: "sha256:77ab31c0ffee0c91aa", Since: now.Add(-24 * time.Hour), Read: now.Add(-12 * time.Minute), Evictable: true, Before: 41, Frees: 3 << 20, Bytes: 7_700_000}, nil}.print(w, now)
		},
		"why_not_held": func(w *strings.Builder) error {
			return explanation{Why: mirror.Why{Reference: "docker.io/library/x:1", Answer: "asked upstream", Upstream: "docker.io", Repository: "docker.io/library/x", Record: "none"}}.print(w, now)
		},
		"why_gone": func(w *strings.Builder) error {
			return explanation{Why: mirror.Why{Reference: "docker.io/library/x:1", Answer: "404", Upstream: "docker.io", Repository: "docker.io/library/x", Record: "mirrored",
				Tag: &mirror.WhyTag{Standing: "gone", TTL: 300, Gone: now.Add(-time.Hour)}}}.print(w, now)
		},
		"jobs": func(w *strings.Builder) error { return jobList{Jobs: []retain.Job{running, failed, gc}}.print(w, now) },
		"job": func(w *strings.Builder) error {
			printEnd(w, gc)
			printEnd(w, failed)
			none := failed
			none.Error, none.DryRun = "", false
			printEnd(w, none)
			w.WriteString(progress(running) + "\n")
			return nil
		},
	} {
		var got strings.Builder
		if err := print(&got); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", name+".txt")
		if *update {
			if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, got.String(), want)
		}
	}
}
