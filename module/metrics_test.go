package module_test

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// hub is a registry with library/x:latest, that says how much of a limit of
// 100 in 6 hours is left.
func hub(t *testing.T, opts regtest.Options) (up *regtest.Registry, image regtest.Image, left func(remaining int)) {
	t.Helper()
	up = regtest.New(t, opts)
	image = regtest.NewImage("x", regtest.Random("x", 1000))
	up.Push("library/x", image, "latest")
	return up, image, func(remaining int) {
		up.Heal()
		up.Fail(regtest.Fault{Path: "/manifests/", Header: http.Header{
			"Ratelimit-Limit":     {"100;w=21600"},
			"Ratelimit-Remaining": {fmt.Sprintf("%d;w=21600", remaining)},
		}})
	}
}

// TestLastTenth: what is held is served as it is rather than that the last of
// a budget is spent on checking it; what is not held is fetched.
func TestLastTenth(t *testing.T) {
	up, image, left := hub(t, regtest.Options{})
	other := regtest.NewImage("y", regtest.Random("y", 1000))
	up.Push("library/y", other, "latest")
	m := start(t, upstreamFor("docker.io", up, "tag_ttl 0"), "")
	const path = "/v2/library/x/manifests/latest"
	left(12)
	m.pull("library/x", "latest", image)
	left(10)
	if a := m.want(200, "GET", path); a.Header.Get("Warning") != "" {
		t.Errorf("with more than a tenth left: %v", a.Header)
	}
	up.Forget()
	for _, method := range []string{"GET", "HEAD"} {
		a := m.want(200, method, path)
		if a.Header.Get("Docker-Content-Digest") != image.Digest.String() || !strings.Contains(a.Header.Get("Cache-Status"), "registry; hit; ttl=-1") || a.Header.Get("Age") == "" ||
			!strings.Contains(a.Header.Get("Warning"), "upstream docker.io ("+up.URL+"): 10 of 100 requests are left until ") {
			t.Errorf("%s in the last tenth: %v", method, a.Header)
		}
	}
	if n := len(up.Requests(func(regtest.Request) bool { return true })); n != 0 {
		t.Errorf("%d requests to spare the last tenth", n)
	}
	left(9)
	m.pull("library/y", "latest", other)
	if a := m.want(200, "GET", path); !strings.Contains(a.Header.Get("Warning"), "9 of 100") {
		t.Errorf("after a pull of what was not held: %v", a.Header)
	}
	left(99)
	up.Push("library/y", other, "more")
	m.want(200, "GET", "/v2/library/y/manifests/more") // tells of the new budget
	if a := m.want(200, "GET", path); a.Header.Get("Warning") != "" {
		t.Errorf("with a new budget: %v", a.Header)
	}
}

// TestMetrics: what Caddy exposes of budgets, in every configuration that
// comes.
func TestMetrics(t *testing.T) {
	up, image, left := hub(t, regtest.Options{User: "robot", Secret: "s"})
	m := start(t, "", "")
	load := func(ttl, site string) error {
		t.Helper()
		adapted, err := adapt(fmt.Sprintf(`{
			admin off
			auto_https off
			persist_config off
			log {
				output regtest
			}
			registry {
				storage disk %s {
					min_free 1MB
				}
				%s
			}
		}
		%s {
			metrics /metrics
			registry_mirror {
				%s
			}
		}`, m.dir, upstreamFor("docker.io", up, "tag_ttl "+ttl, "credentials robot s"), m.URL, site))
		if err != nil {
			return err
		}
		return m.loadJSON(adapted)
	}
	reload := func(ttl string) {
		t.Helper()
		if err := load(ttl, ""); err != nil {
			t.Fatal(err)
		}
	}
	// gauges are those of one account, by their names' ends.
	line := regexp.MustCompile(`(?m)^caddy_registry_upstream_ratelimit_(\w+)\{(.*)\} (\S+)$`)
	gauges := func(account string) map[string]float64 {
		t.Helper()
		found := map[string]float64{}
		for _, match := range line.FindAllStringSubmatch(string(m.want(200, "GET", "/metrics").body), -1) {
			value, err := strconv.ParseFloat(match[3], 64)
			if err != nil {
				t.Error(err)
			}
			switch match[2] {
			case fmt.Sprintf(`account=%q,endpoint=%q,upstream="docker.io"`, account, up.URL):
				found[match[1]] = value
			case fmt.Sprintf(`account="robot",endpoint=%q,upstream="docker.io"`, up.URL), fmt.Sprintf(`account="",endpoint=%q,upstream="docker.io"`, up.URL):
			default:
				t.Errorf("labels %s", match[2])
			}
		}
		return found
	}
	wantLeft := func(why, account string, remaining float64) {
		t.Helper()
		if got := gauges(account); got["limit"] != 100 || got["window_seconds"] != 21600 || got["remaining"] != remaining {
			t.Errorf("%s: %v, want %v of 100 left", why, got, remaining)
		}
	}

	reload("0")
	if got := gauges("robot"); len(got) != 0 {
		t.Errorf("%v before anything was said", got)
	}
	left(80)
	m.pull("library/x", "latest", image)
	wantLeft("after a pull", "robot", 80)
	wantLeft("after a pull", "", 80) // asked whether everyone may read it
	if at, ok := gauges("robot")["exhaustion_timestamp_seconds"]; ok {
		t.Errorf("exhausted at %v though nothing was seen to be used", at)
	}

	reload("1ms")
	wantLeft("after a reload", "robot", 80)
	for range 2 {
		if err := load("1m", "default unknown.test"); err == nil {
			t.Fatal("it was loaded")
		}
		wantLeft("after a reload that was rejected", "robot", 80)
	}
	left(60)
	before := time.Now()
	m.want(200, "HEAD", "/v2/library/x/manifests/latest")
	wantLeft("after another request", "robot", 60)
	// 20 in the window's 64th part, and 60 are left.
	if at, want := gauges("robot")["exhaustion_timestamp_seconds"], float64(before.Unix())+3*21600/64; at < want-60 || at > want+5*60 {
		t.Errorf("exhausted at %v, want about %v", at, want)
	}

	// Another store is another memory.
	m.stop()
	m.dir = t.TempDir()
	reload("0")
	if got := gauges("robot"); len(got) != 0 {
		t.Errorf("%v, of a store that is closed", got)
	}
}

// TestAdminMetrics: the admin API shows metrics of what runs, also after
// configurations that were rejected before their apps were made.
func TestAdminMetrics(t *testing.T) {
	up, image, left := hub(t, regtest.Options{})
	m := startAdmin(t, upstreamFor("docker.io", up))
	left(70)
	m.pull("library/x", "latest", image)
	series := fmt.Sprintf("caddy_registry_upstream_ratelimit_remaining{account=\"\",endpoint=%q,upstream=\"docker.io\"} 70\n", up.URL)
	wants := func(when string) {
		t.Helper()
		a := m.ask(func() (*http.Response, error) { return client.Get("http://" + m.admin + "/metrics") })
		if n := strings.Count(string(a.body), series); n != 1 {
			t.Errorf("%s: %d, and %d times %s", when, a.StatusCode, n, series)
		}
	}
	wants("at first")
	for i := range 5 {
		if err := m.loadJSON(fmt.Appendf(nil, `{"admin": {"listen": %q, "config": {"persist": false}}, "apps": {"nosuchapp": {}}}`, m.admin)); err == nil {
			t.Fatal("it was loaded")
		}
		wants(fmt.Sprintf("after %d rejected reloads", i+1))
	}
	if err := m.load(upstreamFor("docker.io", up, "tag_ttl 5m"), ""); err != nil {
		t.Fatal(err)
	}
	wants("after a reload")
}
