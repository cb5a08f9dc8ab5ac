package module_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// object is JSON that has been read.
type object = map[string]any

// admins asks the admin API for something that must be had, and reads it.
func (m *mirror) admins(method, path string, body ...string) object {
	m.t.Helper()
	a := m.adminDo(method, path, body...)
	var got object
	if err := json.Unmarshal(a.body, &got); err != nil || a.StatusCode/100 != 2 {
		m.t.Fatalf("%s %s %s: %d %s", method, path, body, a.StatusCode, a.body)
	}
	return got
}

func (m *mirror) adminDo(method, path string, body ...string) *answer {
	m.t.Helper()
	return m.ask(func() (*http.Response, error) {
		req, err := http.NewRequest(method, "http://"+m.admin+"/registry/"+path, strings.NewReader(strings.Join(body, "")))
		if err != nil {
			return nil, err
		}
		return client.Do(req)
	})
}

// complete waits until the catalog has everything, and returns the status.
func (m *mirror) complete() (status object) {
	m.t.Helper()
	eventually(m.t, "the catalog to be complete", func() bool {
		status = m.admins("GET", "status")
		return status["complete"] != nil
	})
	return status
}

// names are those of the objects in a list.
func names(list any) (names []string) {
	for _, entry := range list.([]any) {
		names = append(names, entry.(object)["name"].(string))
	}
	return names
}

// job begins a job and waits for its end.
func (m *mirror) job(body string) (job object) {
	m.t.Helper()
	job = m.admins("POST", "jobs", body)
	eventually(m.t, "the end of "+body, func() bool {
		job = m.admins("GET", "jobs/"+job["id"].(string))
		return job["ended"] != nil
	})
	return job
}

// TestAdminStore: what was pulled is listed, by the API and by the command.
func TestAdminStore(t *testing.T) {
	up, other := regtest.New(t, regtest.Options{}), regtest.New(t, regtest.Options{})
	base := regtest.Random("base", 2<<20)
	one, two, three := regtest.NewImage("one", base), regtest.NewImage("two", base), regtest.NewImage("three", regtest.Random("3", 5000))
	up.Push("library/x", one, "1")
	up.Push("library/x", two, "2")
	up.Push("org/y", three, "latest")
	other.Push("org/z", two, "v1")
	m := startAdmin(t, upstreamFor("docker.io", up, "max_size 1GiB")+upstreamFor("ghcr.io", other))
	m.pull("library/x", "1", one)
	m.pull("library/x", "2", two)
	m.pull("org/y", "latest", three)
	m.pull("ghcr.io/org/z", "v1", two)

	status := m.complete()
	use := status["usage"].(object)
	if use["repositories"] != 3.0 || use["tags"] != 4.0 || use["manifests"] != 4.0 || use["allocated"].(float64) < 2<<20 || use["allocated"].(float64) > 3<<20 {
		t.Errorf("status %v", status)
	}
	if status["store"] != "disk:"+m.dir || status["catalog"] != "ready" {
		t.Errorf("status %v", status)
	}

	// Lists, by pages.
	var all []string
	for query := "repositories?n=2"; ; {
		page := m.admins("GET", query)
		all = append(all, names(page["repositories"])...)
		next, more := page["next"]
		if !more {
			break
		}
		query = "repositories?n=2&after=" + url.QueryEscape(next.(string))
	}
	if want := []string{"docker.io/library/x", "docker.io/org/y", "ghcr.io/org/z"}; !slices.Equal(all, want) {
		t.Errorf("%q, want %q", all, want)
	}
	if got := names(m.admins("GET", "repositories?containing=org/")["repositories"]); !slices.Equal(got, []string{"docker.io/org/y", "ghcr.io/org/z"}) {
		t.Errorf("%q", got)
	}
	for _, name := range []string{"x", "docker.io/x", "docker.io/library/x"} {
		page := m.admins("GET", "tags?repository="+name)
		if got := names(page["tags"]); !slices.Equal(got, []string{"1", "2"}) || page["repository"] != "docker.io/library/x" {
			t.Errorf("tags of %s: %v", name, page)
		}
	}
	page := m.admins("GET", "tags?n=1&repository=x")
	if next := m.admins("GET", "tags?n=1&repository=x&after="+page["next"].(string)); !slices.Equal(names(next["tags"]), []string{"2"}) {
		t.Errorf("second page %v", next)
	}

	// What a tag has meant.
	why := m.admins("GET", "why?reference=x:1")
	if history, _ := why["history"].([]any); len(history) != 1 || history[0].(object)["digest"] != why["digest"] || history[0].(object)["since"] == "" {
		t.Errorf("history of x:1: %v", why)
	}

	// What takes how much: the base counts once in each upstream, and once in all.
	report := m.admins("GET", "usage?n=1")
	sizes := map[string]float64{"": report["store"].(object)["bytes"].(float64)}
	for _, u := range report["upstreams"].([]any) {
		sizes[u.(object)["name"].(string)] = u.(object)["usage"].(object)["bytes"].(float64)
	}
	for name, bytes := range sizes {
		if bytes < 2<<20 || bytes > 2<<20+64<<10 {
			t.Errorf("%q takes %v: %v", name, bytes, report)
		}
	}
	if got := names(report["repositories"]); !slices.Equal(got, []string{"docker.io/library/x"}) {
		t.Errorf("largest: %q", got)
	}

	// The same by commands.
	say := func(args ...string) string {
		t.Helper()
		status, out, errs := command(t, append([]string{"registry", "--address", m.admin}, args...)...)
		if status != 0 || errs != "" {
			t.Errorf("%q: %d %q", args, status, errs)
		}
		return out
	}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"status"}, []string{"disk:" + m.dir, "3 repositories, 4 tags", "docker.io", "1.0 GiB", "ready"}},
		{[]string{"ls"}, []string{"docker.io/library/x", "docker.io/org/y", "ghcr.io/org/z", "mirrored"}},
		{[]string{"ls", "/y"}, []string{"docker.io/org/y"}},
		{[]string{"tags", "x"}, []string{one.Digest.String()[:19], two.Digest.String()[:19], "2.0 MiB"}},
		{[]string{"du"}, []string{"docker.io", "ghcr.io", "the store"}},
		{[]string{"why", "x:1"}, []string{"docker.io/library/x:1", one.Digest.String()}},
		{[]string{"jobs"}, []string{"ID"}},
	} {
		out := say(c.args...)
		for _, part := range c.want {
			if !strings.Contains(out, part) {
				t.Errorf("%q does not say %q:\n%s", c.args, part, out)
			}
		}
	}
	if out := say("ls", "/y"); strings.Contains(out, "library") {
		t.Errorf("ls /y:\n%s", out)
	}
	var listed object
	if err := json.Unmarshal([]byte(say("ls", "--json")), &listed); err != nil || len(names(listed["repositories"])) != 3 {
		t.Errorf("ls --json: %v %v", listed, err)
	}
	if status, out, errs := command(t, "registry", "--address", m.admin, "tags", "nobody/has/it"); status != 1 || out != "" || !strings.Contains(errs, "nobody/has/it") || strings.Count(errs, "\n") != 1 {
		t.Errorf("%d %q %q", status, out, errs)
	}

	// Bad questions.
	for path, says := range map[string]string{
		"repositories?n=0":               "1000",
		"repositories?n=1001":            "1000",
		"repositories?n=x":               "n:",
		"repositories?what=1":            "what",
		"repositories?n=1&n=2":           "twice",
		"repositories?after=%zz":         "query",
		"tags":                           "repository",
		"tags?repository=evil.example/x": "evil.example",
		"why":                            "reference",
		"why?reference=X":                "X",
		"status?x=1":                     "x",
		"jobs?x=1":                       "x",
		"jobs/gc-1":                      "gc-1",
	} {
		a := m.adminDo("GET", path)
		if a.StatusCode != 400 && a.StatusCode != 404 {
			t.Errorf("%s: %d", path, a.StatusCode)
		}
		checkRefusal(t, a, a.StatusCode, says)
	}
	for _, path := range []string{"status", "usage", "repositories", "tags", "why", "pins", "jobs", "jobs/x"} {
		if a := m.adminDo("PUT", path); a.StatusCode != 405 || a.Header.Get("Allow") == "" {
			t.Errorf("PUT %s: %d %v", path, a.StatusCode, a.Header)
		}
	}
}

// TestPins: what is pinned is not purged, and pins are listed.
func TestPins(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one, two, other := regtest.NewImage("one", regtest.Random("1", 5000)), regtest.NewImage("two", regtest.Random("2", 5000)), regtest.NewImage("other", regtest.Random("o", 5000))
	up.Push("library/x", one, "1", "same")
	up.Push("library/x", two, "2")
	up.Push("library/y", other, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 1h"))
	m.pull("library/x", "1", one)
	m.pull("library/x", "2", two)
	m.pull("library/y", "latest", other)
	m.complete()
	run := func(status int, want string, args ...string) {
		t.Helper()
		got, out, errs := command(t, append([]string{"registry", "--address", m.admin}, args...)...)
		if got != status || !strings.Contains(out+errs, want) {
			t.Errorf("%q: %d %q %q, want %q", args, got, out, errs, want)
		}
	}
	run(0, "docker.io/library/x:1 pinned\n", "pin", "x:1")
	run(0, "docker.io/library/y@"+other.Digest.String()+" pinned\n", "pin", "y@"+other.Digest.String())
	run(0, "docker.io/library/x:1 ", "pin")
	run(1, "evil.example", "pin", "evil.example/x")
	run(1, "docker.io/library/x:2 is not pinned", "unpin", "x:2")
	page := m.admins("GET", "pins?n=1")
	pins := page["pins"].([]any)
	if next := m.admins("GET", "pins?after="+url.QueryEscape(page["next"].(string)))["pins"].([]any); len(pins) != 1 || len(next) != 1 || next[0].(object)["reference"] != other.Digest.String() {
		t.Errorf("pins %v, then %v", pins, next)
	}
	run(0, "pinned", "tags", "x")

	// A dry run takes nothing.
	run(0, "would remove 1 ", "purge", "--dry-run", "docker.io/library/*")
	m.pull("library/x", "2", two)
	up.Down()
	m.pull("library/x", "2", two)
	run(0, "docker.io/library/x:2", "purge", "docker.io/library/**")
	m.pull("library/x", "1", one)
	m.pull("library/y", other.Digest.String(), other)
	if a := m.do("GET", "/v2/library/x/manifests/2"); a.StatusCode == 200 {
		t.Error("what was purged is still served")
	}
	if files := kept(m.dir, two.Blobs[1].Digest); len(files) > 0 {
		t.Errorf("purged and still there: %q", files)
	}
	up.Up()
	m.pull("library/x", "2", two)

	// Pins are in the store, and survive it all but unpinning.
	m.stop()
	if err := m.load(upstreamFor("docker.io", up, "tag_ttl 1h"), ""); err != nil {
		t.Fatal(err)
	}
	m.complete()
	run(0, "docker.io/library/x:1 ", "pin")
	if got, out, _ := command(t, "registry", "--address", m.admin, "unpin", "--json", "docker.io/library/x:1"); got != 0 || strings.Contains(out, "since") {
		t.Errorf("%d %s", got, out) // nothing has been pinned since the year 1
	}
	if job := m.job(`{"kind": "purge", "pattern": "docker.io/library/x"}`); job["removed"].(float64) < 2 || job["found"] == nil {
		t.Errorf("%v", job)
	}
	if list := m.adminDo("GET", "jobs").body; strings.Contains(string(list), `"found"`) {
		t.Errorf("%s", list)
	}
	if files := kept(m.dir, one.Blobs[1].Digest); len(files) > 0 {
		t.Errorf("purged and still there: %q", files)
	}
	run(0, "names are as", "purge", "nothing/of/this")
	run(1, "", "purge", "a b")
}

// TestStoredNames: what ls shows can be given to every command, for a registry with
// another path name and for what a site hosts.
func TestStoredNames(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 5000))
	up.Push("org/x", image, "v1")
	configured := upstreamFor("ghcr.io", up, "path_name hub")
	m := startAdmin(t, configured)
	m.pull("hub/org/x", "v1", image)
	run := func(status int, want string, args ...string) {
		t.Helper()
		got, out, errs := command(t, append([]string{"registry", "--address", m.admin}, args...)...)
		if got != status || !strings.Contains(out+errs, want) {
			t.Errorf("%q: %d %q %q, want %q", args, got, out, errs, want)
		}
	}
	for _, name := range []string{"ghcr.io/org/x:v1", "hub/org/x:v1", "hub/org/x@" + image.Digest.String()} {
		run(0, "mirrored from ghcr.io", "why", name)
		run(0, "hub/org/x", "pin", name)
		run(0, "hub/org/x", "unpin", name)
	}
	run(0, "docker.io/hub/org/y", "why", "hub/org/y") // of which nothing is stored

	m.stop()
	forgetRecords(t, m.dir) // as registry:2 has it
	repositories := m.dir + "/docker/registry/v2/repositories/"
	if err := os.Rename(repositories+"hub", repositories+"apps"); err != nil {
		t.Fatal(err)
	}
	if err := m.load(configured, "default off\nhosted apps/**\naccess {\nallow any to anyone\n}"); err != nil {
		t.Fatal(err)
	}
	m.want(200, "GET", "/v2/apps/org/x/manifests/v1")
	run(0, "all its blobs are held", "why", "apps/org/x:v1")
	run(0, "hosted, without a record", "why", "apps/org/x:v1")
	run(0, "404: it is hosted here", "why", "apps/org/x:v2")
	run(0, "docker.io/apps/org/y", "why", "apps/org/y")
}

// TestPurgeHosted: what is hosted is never purged.
func TestPurgeHosted(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 5000))
	up.Push("library/x", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	m.pull("library/x", "latest", image)
	m.stop()
	forgetRecords(t, m.dir) // as registry:2 has it: it may have been pushed
	if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
		t.Fatal(err)
	}
	m.complete()
	if job := m.job(`{"kind": "purge", "pattern": "**"}`); job["removed"] != 0.0 {
		t.Errorf("%v", job)
	}
	up.Down()
	m.pull("library/x", "latest", image)
}

// layered is an image with one layer of 3 MiB.
func layered(name string) regtest.Image {
	return regtest.NewImage(name, regtest.Random(name+" layer", 3<<20))
}

// TestBudget: a new image takes the place of the one not pulled for longest,
// which comes again from its upstream.
func TestBudget(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	images := map[string]regtest.Image{}
	for _, name := range []string{"a", "b", "c"} {
		images[name] = layered(name)
		up.Push("library/"+name, images[name], "latest")
	}
	m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), admin: regtest.FreeAddress(t), dir: t.TempDir(), logs: captureLogs(t)}
	t.Cleanup(func() {
		if err := m.loadJSON([]byte(`{"admin": {"disabled": true}}`)); err != nil {
			t.Error(err)
		}
	})
	load := func(max string, more ...string) {
		t.Helper()
		if err := m.load(fmt.Sprintf("storage disk %s {\n min_free 1MB\n max_size %s\n}\n", m.dir, max)+upstreamFor("docker.io", up, more...), ""); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { m.stop() })
	load("8MiB")
	m.complete()
	layer := func(name string) bool { return len(kept(m.dir, images[name].Blobs[1].Digest)) > 0 }
	for _, name := range []string{"a", "b", "c"} {
		m.pull("library/"+name, "latest", images[name])
	}
	eventually(t, "something to be evicted", func() bool { return !layer("a") || !layer("b") })
	settled := func(limit float64) func() bool {
		return func() bool {
			use := m.admins("GET", "status")["usage"].(object)
			return use["allocated"].(float64) <= limit
		}
	}
	eventually(t, "the budget to be kept", settled(8<<20))
	for name, image := range images {
		m.pull("library/"+name, "latest", image)
	}
	eventually(t, "the budget to be kept again", settled(8<<20))

	// A reload with a smaller budget holds at once; one that is rejected does not.
	rejected := fmt.Sprintf("storage disk %s {\n min_free 1MB\n max_size 1MiB\n}\n", m.dir)
	if err := m.load(rejected+upstreamFor("docker.io", up, "credentials a {env.SURELY_NOT_SET}"), ""); err == nil {
		t.Fatal("it was loaded")
	}
	// Caddy starts apps in any order: this one before the one that fails, or not.
	occupied, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	fails, err := m.adapt(rejected+upstreamFor("docker.io", up), "")
	if err != nil {
		t.Fatal(err)
	}
	fails = bytes.Replace(fails, []byte(`"listen":["`), []byte(`"listen":["`+occupied.Addr().String()+`","`), 1)
	for range 8 {
		if err := m.loadJSON(fails); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Fatalf("loaded with an address in use: %v", err)
		}
		if got := m.admins("GET", "status")["max_size"]; got != float64(8<<20) {
			t.Errorf("max_size %v after a rejected reload", got)
		}
	}
	load("4MiB")
	eventually(t, "the smaller budget to be kept", settled(4<<20))
	load("off", "max_size 2MiB")
	eventually(t, "the upstream's budget to be kept", settled(2<<20))
	if got := m.admins("GET", "status")["evicted"].(object)["blobs"].(float64); got < 2 {
		t.Errorf("%v blobs evicted", got)
	}
	for name, image := range images {
		m.pull("library/"+name, "latest", image)
	}
}

// TestMaxBlobSize: an image with a larger blob is refused by its manifest.
func TestMaxBlobSize(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	large, small := layered("large"), regtest.NewImage("small", regtest.Random("s", 5000))
	up.Push("library/x", large, "large")
	up.Push("library/x", small, "small")
	m := start(t, "", "")
	load := func(size string) {
		t.Helper()
		if err := m.load(fmt.Sprintf("storage disk %s {\n min_free 1MB\n max_blob_size %s\n}\n", m.dir, size)+upstreamFor("docker.io", up), ""); err != nil {
			t.Fatal(err)
		}
	}
	load("1MiB")
	m.wantError(403, "DENIED", "GET", "/v2/library/x/manifests/large", "max_blob_size")
	m.pull("library/x", "small", small)
	load("3MiB")
	m.pull("library/x", "large", large)
}

// TestBackToStore: a store that is left by one reload and taken up by the next,
// while somebody still reads from it, has been one store all the time.
func TestBackToStore(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	one := bigImage(t)
	up.Push("library/x", one, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	m.complete()
	rest, hold := halfPulled(t, m, up, "library/x", one)
	first, second := m.dir, t.TempDir()
	job := m.job(`{"kind": "reindex"}`)["id"].(string)
	for _, dir := range []string{second, first} {
		m.dir = dir
		if err := m.load(upstreamFor("docker.io", up), ""); err != nil {
			t.Fatal(err)
		}
		m.complete()
	}
	// It remembers what only a state in memory can.
	if got := m.admins("GET", "jobs/"+job); got["id"] != job {
		t.Errorf("%v", got)
	}
	close(hold)
	if err := rest(); err != nil {
		t.Error(err)
	}
	m.pull("library/x", "latest", one)
	unlocked(t, second)
	if files := kept(m.dir, one.Blobs[1].Digest); len(files) == 0 {
		t.Error("the layer is not in the store")
	}
}

// TestTwoSitesCountOnce: what two sites pull is in one store, and counts once.
func TestTwoSitesCountOnce(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	up.Push("library/y", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	other := *m
	other.URL = "http://" + regtest.FreeAddress(t)
	adapted, err := m.adapt(upstreamFor("docker.io", up), "")
	if err != nil {
		t.Fatal(err)
	}
	listen := func(m *mirror) string { return `":` + m.URL[strings.LastIndexByte(m.URL, ':')+1:] + `"` }
	adapted = bytes.Replace(adapted, []byte(`"listen":[`+listen(m)), []byte(`"listen":[`+listen(m)+`,`+listen(&other)), 1)
	if err := m.loadJSON(adapted); err != nil {
		t.Fatal(err)
	}
	m.pull("library/x", "latest", image)
	other.pull("library/y", "latest", image)
	use := m.complete()["usage"].(object)
	if use["repositories"] != 2.0 || use["bytes"].(float64) > 2<<20+32<<10 {
		t.Errorf("%v", use)
	}
	if got := len(m.admins("GET", "repositories")["repositories"].([]any)); got != 2 {
		t.Errorf("%d repositories", got)
	}
}

// TestStoreMetrics: what Caddy exposes of stores.
func TestStoreMetrics(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "max_size 1GiB"))
	m.pull("library/x", "latest", image)
	m.complete()
	a := m.ask(func() (*http.Response, error) { return client.Get("http://" + m.admin + "/metrics") })
	for _, series := range []string{
		fmt.Sprintf("caddy_registry_store_catalog_complete{store=%q} 1\n", "disk:"+m.dir),
		fmt.Sprintf("caddy_registry_store_damaged_blobs{store=%q} 0\n", "disk:"+m.dir),
		fmt.Sprintf("caddy_registry_evicted_bytes_total{store=%q} 0\n", "disk:"+m.dir),
		fmt.Sprintf("caddy_registry_upstream_max_size_bytes{store=%q,upstream=\"docker.io\"} 1.073741824e+09\n", "disk:"+m.dir),
		fmt.Sprintf("caddy_registry_store_allocated_bytes{store=%q} 2.", "disk:"+m.dir),
	} {
		if !strings.Contains(string(a.body), series) {
			t.Errorf("no %s:\n%s", series, regexp.MustCompile(`(?m)^caddy_registry_store.*$`).FindAll(a.body, -1))
		}
	}
	if strings.Contains(string(a.body), "caddy_registry_store_max_size_bytes{") {
		t.Error("a max_size that is off")
	}
}

// TestJobs: work is begun, followed and listed.
func TestJobs(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up))
	m.pull("library/x", "latest", image)
	m.complete()
	for _, kind := range []string{"gc", "scrub", "reindex"} {
		status, out, errs := command(t, "registry", kind, "--address", m.admin)
		if status != 0 || !strings.HasPrefix(out, kind+": ") || errs != "" {
			t.Errorf("%s: %d %q %q", kind, status, out, errs)
		}
	}
	status, out, _ := command(t, "registry", "gc", "--address", m.admin, "--dry-run", "--detach")
	id := strings.TrimSpace(out)
	if status != 0 || !strings.HasPrefix(id, "gc-") {
		t.Fatalf("%d %q", status, out)
	}
	status, out, errs := command(t, "registry", "jobs", "--address", m.admin, "--wait", id)
	if status != 0 || !strings.HasPrefix(out, "gc: would remove 0 ") || errs != "" {
		t.Errorf("%d %q %q", status, out, errs)
	}
	status, out, errs = command(t, "registry", "jobs", "--address", m.admin, "--cancel", id)
	if status != 1 || !strings.Contains(errs, "ended already") {
		t.Errorf("%d %q %q", status, out, errs)
	}
	var list struct{ Jobs []struct{ ID, Kind string } }
	if err := json.Unmarshal(m.adminDo("GET", "jobs").body, &list); err != nil || len(list.Jobs) < 4 || list.Jobs[0].ID != id {
		t.Errorf("%+v %v", list, err)
	}
	for body, says := range map[string]string{
		`{"kind": "mow"}`:                    "mow",
		`{}`:                                 "none of",
		`{"kind": "scrub", "dry_run": true}`: "dry_run",
		`{"kind": "purge"}`:                  "pattern",
		`{"kind": "gc", "pattern": "x"}`:     "pattern",
		`{"kind": "gc", "x": 1}`:             "unknown field",
		`x`:                                  "not like",
	} {
		checkRefusal(t, m.adminDo("POST", "jobs", body), 400, says)
	}
}

// TestScrubHeals: what the disk has damaged is fetched again.
func TestScrubHeals(t *testing.T) {
	up := regtest.New(t, regtest.Options{})
	image := regtest.NewImage("x", regtest.Random("x", 2<<20))
	up.Push("library/x", image, "latest")
	m := startAdmin(t, upstreamFor("docker.io", up, "tag_ttl 1h"))
	m.pull("library/x", "latest", image)
	m.complete()
	layer := image.Blobs[1]
	file := kept(m.dir, layer.Digest)[0]
	damaged := bytes.Clone(layer.Data)
	damaged[1<<20] ^= 1
	if err := os.WriteFile(file, damaged, 0o640); err != nil {
		t.Fatal(err)
	}
	m.job(`{"kind": "scrub"}`)
	eventually(t, "the layer to be whole", func() bool {
		data, err := os.ReadFile(file)
		return err == nil && bytes.Equal(data, layer.Data)
	})
	up.Down()
	m.pull("library/x", "latest", image)
}
