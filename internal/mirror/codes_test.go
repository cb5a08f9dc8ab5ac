package mirror

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// agents are clients as they call themselves, by what they do when a blob
// cannot be had.
var agents = map[bool][]string{
	false: {
		"docker/20.10.24+dfsg1 go/go1.19.8 git-commit/5d6db84 kernel/6.1 os/linux arch/amd64 UpstreamClient(Docker-Client/20.10.24 \\(linux\\))",
		"containerd/1.6.20~ds1", "containerd/2.4.1", "go-containerregistry/v0.20.6", "regclient/regctl (v0.11)", "oras-go", "Helm/3.22", "curl/8", "buildkit/0.25", "",
	},
	true: {"skopeo/1.9.3", "containers/5.23.1 (github.com/containers/image)", "Buildah/1.28.2", "cri-o/1.34 go/1.25", "libpod/4.3.1", "podman/5"},
}

// TestCodes has one line for each cell of the table.
func TestCodes(t *testing.T) {
	want := map[situation][3]string{ // manifest; blob; blob for the family of containers/image
		badName:         {"400 NAME_INVALID", "400 NAME_INVALID", "400 NAME_INVALID"},
		badReference:    {"400 MANIFEST_INVALID", "400 DIGEST_INVALID", "400 DIGEST_INVALID"},
		badTag:          {"400 TAG_INVALID", "400 TAG_INVALID", "400 TAG_INVALID"},
		tooManyTags:     {"414 TAG_INVALID", "414 TAG_INVALID", "414 TAG_INVALID"},
		badPage:         {"400 PAGINATION_NUMBER_INVALID", "400 PAGINATION_NUMBER_INVALID", "400 PAGINATION_NUMBER_INVALID"},
		badRange:        {"416 RANGE_INVALID", "416 RANGE_INVALID", "416 RANGE_INVALID"},
		tooManyRanges:   {"400 RANGE_INVALID", "400 RANGE_INVALID", "400 RANGE_INVALID"},
		unknownEndpoint: {"404 UNSUPPORTED", "404 UNSUPPORTED", "404 UNSUPPORTED"},
		unknownName:     {"404 NAME_UNKNOWN", "404 NAME_UNKNOWN", "404 NAME_UNKNOWN"},
		unknownContent:  {"404 MANIFEST_UNKNOWN", "404 BLOB_UNKNOWN", "404 BLOB_UNKNOWN"},
		unobtainable:    {"403 DENIED", "403 DENIED", "403 DENIED"},
		tooLarge:        {"403 DENIED", "403 DENIED", "403 DENIED"},
		deniedUpstream:  {"403 DENIED", "403 DENIED", "403 DENIED"},
		privateName:     {"403 DENIED", "403 DENIED", "403 DENIED"},
		readOnly:        {"405 UNSUPPORTED", "405 UNSUPPORTED", "405 UNSUPPORTED"},
		denied:          {"403 DENIED", "403 DENIED", "403 DENIED"},
		noUpload:        {"404 BLOB_UPLOAD_UNKNOWN", "404 BLOB_UPLOAD_UNKNOWN", "404 BLOB_UPLOAD_UNKNOWN"},
		badUpload:       {"400 BLOB_UPLOAD_INVALID", "400 BLOB_UPLOAD_INVALID", "400 BLOB_UPLOAD_INVALID"},
		outOfOrder:      {"416 BLOB_UPLOAD_INVALID", "416 BLOB_UPLOAD_INVALID", "416 BLOB_UPLOAD_INVALID"},
		wrongDigest:     {"400 DIGEST_INVALID", "400 DIGEST_INVALID", "400 DIGEST_INVALID"},
		wrongLength:     {"400 SIZE_INVALID", "400 SIZE_INVALID", "400 SIZE_INVALID"},
		badManifest:     {"400 MANIFEST_INVALID", "400 MANIFEST_INVALID", "400 MANIFEST_INVALID"},
		missingBlob:     {"404 MANIFEST_BLOB_UNKNOWN", "404 MANIFEST_BLOB_UNKNOWN", "404 MANIFEST_BLOB_UNKNOWN"},
		oversized:       {"413 SIZE_INVALID", "413 SIZE_INVALID", "413 SIZE_INVALID"},
		immutableTag:    {"403 DENIED", "403 DENIED", "403 DENIED"},
		deleteOff:       {"405 UNSUPPORTED", "405 UNSUPPORTED", "405 UNSUPPORTED"},
		closed:          {"403 DENIED", "403 DENIED", "403 DENIED"},
		stillNamed:      {"405 UNSUPPORTED", "405 UNSUPPORTED", "405 UNSUPPORTED"},
		noRoom:          {"507 DENIED", "507 DENIED", "507 DENIED"},
		tooMany:         {"429 TOOMANYREQUESTS", "429 TOOMANYREQUESTS", "429 TOOMANYREQUESTS"},
		noUpstream:      {"503 UNAVAILABLE", "503 UNAVAILABLE", "429 TOOMANYREQUESTS"},
		limited:         {"503 UNAVAILABLE", "503 UNAVAILABLE", "429 TOOMANYREQUESTS"},
		storeFailed:     {"503 UNAVAILABLE", "503 UNAVAILABLE", "503 UNAVAILABLE"},
		storeAway:       {"503 UNAVAILABLE", "503 UNAVAILABLE", "429 TOOMANYREQUESTS"},
	}
	for s := range codes {
		if _, ok := want[s]; !ok {
			t.Errorf("situation %d has no line here", s)
		}
	}
	for s, cells := range want {
		for family, names := range agents {
			for _, agent := range names {
				for column, kind := range []oci.Kind{oci.KindManifest, oci.KindBlob} {
					cell := cells[column]
					if family && kind == oci.KindBlob {
						cell = cells[2]
					}
					e := refusal(fail(s, "why"), kind, agent, "reg.example/x:1")
					if got := fmt.Sprint(e.Status, " ", e.Code); got != cell {
						t.Errorf("situation %d for %q, %v: %s, want %s", s, agent, kind, got, cell)
					}
					if e.Status == http.StatusTooManyRequests && e.RetryAfter != askAgain || !strings.HasPrefix(e.Message, "reg.example/x:1: why") {
						t.Errorf("situation %d: %+v", s, e)
					}
				}
			}
		}
	}
	e := refusal(&failure{situation: limited, message: "why", after: time.Minute}, oci.KindBlob, "skopeo/1", "")
	if e.RetryAfter != time.Minute {
		t.Errorf("what the upstream says is not passed on: %+v", e)
	}
}

// TestSituations: what an upstream says, as clients get to know it. Every
// sentence names the upstream, the endpoint, the reason, and a remedy if there
// is one.
func TestSituations(t *testing.T) {
	for name, c := range map[string]struct {
		fault          regtest.Fault
		user           string
		manifest, blob int // for docker
		patient        int // a blob for skopeo
		says           []string
	}{
		"404":                    {fault: regtest.Fault{Status: 404}, manifest: 404, blob: 404, patient: 404, says: []string{"answers 404"}},
		"anonymous 401":          {fault: regtest.Fault{Status: 401}, manifest: 404, blob: 404, patient: 404, says: []string{"401"}},
		"anonymous 403":          {fault: regtest.Fault{Status: 403}, manifest: 404, blob: 404, patient: 404, says: []string{"403"}},
		"403 to our credentials": {fault: regtest.Fault{Status: 403}, user: "me", manifest: 403, blob: 403, patient: 403, says: []string{"403", "check the credentials"}},
		"429":                    {fault: regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"90"}}}, manifest: 503, blob: 503, patient: 429, says: []string{"429", "wait, or configure credentials"}},
		"500":                    {fault: regtest.Fault{Status: 500}, manifest: 503, blob: 503, patient: 429, says: []string{"500", "try again"}},
		"a web page":             {fault: regtest.Fault{Status: 200, Body: "<html>"}, manifest: 503, blob: 503, patient: 429},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, regtest.Options{NoRedirect: true, User: c.user, Secret: c.user}, nil)
			b.mirror.patience = time.Second
			b.registry.Push("team/app", first, "latest")
			blob := "team/app/blobs/" + first.Blobs[1].Digest.String()
			for _, ask := range []struct {
				agent, path string
				status      int
			}{{"docker/28", latest, c.manifest}, {"docker/28", blob, c.blob}, {"skopeo/1.9.3", blob, c.patient}} {
				b.registry.Heal()
				b.pass(2 * time.Hour)
				if ask.path == blob {
					b.wantStatus(200, "GET", latest) // so that its size is known
				}
				fault := c.fault
				fault.Path = "/team/app/"
				b.registry.Fail(fault)
				b.agent = ask.agent
				w := b.ask("GET", ask.path)
				var said struct {
					Errors []struct{ Code, Message string }
				}
				if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil || w.Code != ask.status || len(said.Errors) != 1 {
					t.Fatalf("%s for %s: %d %s, want %d", ask.path, ask.agent, w.Code, w.Body, ask.status)
				}
				for _, part := range append(c.says, "reg.example/team/app", b.registry.URL) {
					if !strings.Contains(said.Errors[0].Message, part) {
						t.Errorf("%q does not say %q", said.Errors[0].Message, part)
					}
				}
				if w.Code == http.StatusTooManyRequests && w.Header().Get("Retry-After") == "" {
					t.Error("no Retry-After")
				}
			}
		})
	}
}
