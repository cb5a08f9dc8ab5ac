package module_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/s3double"
)

const redirectingSite = hostedSite + "\nredirect_to_storage 1MiB"

// follow asks again where a redirect leads, as clients do.
func (b *bucketed) follow(a *answer, method string, header ...string) (int, []byte) {
	b.t.Helper()
	req, err := http.NewRequest(method, a.Header.Get("Location"), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	if got := resp.Header.Get("Content-Type"); resp.StatusCode < 300 && got != "application/octet-stream" {
		b.t.Errorf("the bucket sends %q", got)
	}
	return resp.StatusCode, body
}

// TestRedirect: large blobs are fetched from the bucket, by GET and HEAD and in parts,
// whether near or not; what is small, or not there yet, is served.
func TestRedirect(t *testing.T) {
	large, small := regtest.Random("large", 2*mib), regtest.Random("small", 100_000)
	b, registry, _ := newBucketed(t, redirectingSite, large, small)
	p := pusher{b.mirror, "apps/web"}
	hosted := regtest.NewImage("hosted", regtest.Random("pushed", 3*mib))
	p.image(hosted, "v1")
	for _, cold := range []bool{false, true} {
		if cold {
			b.cold()
			registry.Down()
		}
		b.Server.Forget()
		for repository, blob := range map[string]regtest.Content{"registry.test/org/app": large, "apps/web": hosted.Blobs[1]} {
			path := "/v2/" + repository + "/blobs/" + blob.Digest.String()
			a := b.want(http.StatusTemporaryRedirect, http.MethodGet, path)
			if got := a.Header; got.Get("Cache-Control") != "no-store" || got.Get("Docker-Content-Digest") != blob.Digest.String() {
				t.Errorf("%s: %v", repository, got)
			}
			if status, body := b.follow(a, http.MethodGet); status != http.StatusOK || !bytes.Equal(body, blob.Data) {
				t.Errorf("%s: status %d, %d bytes", repository, status, len(body))
			}
			if status, body := b.follow(a, http.MethodGet, "Range", "bytes=1000-1999"); status != http.StatusPartialContent || !bytes.Equal(body, blob.Data[1000:2000]) {
				t.Errorf("%s: status %d, %d bytes of a part", repository, status, len(body))
			}
			at, err := url.Parse(a.Header.Get("Location"))
			if err != nil || at.Query().Get("X-Amz-Expires") != "1200" {
				t.Errorf("%s: it lives for %q s, %v", repository, at.Query().Get("X-Amz-Expires"), err)
			}
			a = b.want(http.StatusTemporaryRedirect, http.MethodHead, path)
			if status, _ := b.follow(a, http.MethodHead); status != http.StatusOK {
				t.Errorf("%s: HEAD: status %d", repository, status)
			}
			a = b.want(http.StatusTemporaryRedirect, http.MethodGet, path, "Range", "bytes=5-")
			if status, _ := b.follow(a, http.MethodGet, "Range", "bytes=5-"); status != http.StatusPartialContent {
				t.Errorf("%s: Range: status %d", repository, status)
			}
			b.want(http.StatusNotModified, http.MethodGet, path, "If-None-Match", `"`+blob.Digest.String()+`"`)
		}
		b.blob("registry.test/org/app", small)
	}

	// What nobody may pull has no address.
	other := regtest.Random("other", 10)
	b.want(http.StatusNotFound, http.MethodGet, "/v2/apps/web/blobs/"+large.Digest.String())
	b.want(http.StatusNotFound, http.MethodGet, "/v2/apps/web/blobs/"+other.Digest.String())

	// What is not in the bucket yet.
	registry.Up()
	hold := make(chan struct{})
	late := regtest.NewImage("late", regtest.Random("late", 2*mib))
	registry.Push("org/late", late, "v1")
	b.Strike(s3double.Fault{Op: s3double.PutObject, Key: layout.Blob(late.Blobs[1].Digest), Status: 503, Code: "SlowDown", Count: 1, Hold: hold})
	b.pull("registry.test/org/late", "v1", late)
	b.blob("registry.test/org/late", late.Blobs[1])
	close(hold)
	b.uploaded(late.Blobs[1])
	eventually(t, "a redirect", func() bool {
		return b.do(http.MethodGet, "/v2/registry.test/org/late/blobs/"+late.Blobs[1].Digest.String()).StatusCode == http.StatusTemporaryRedirect
	})

	// While the bucket cannot be reached.
	b.Server.Down()
	eventually(t, "it to be served from here", func() bool {
		a := b.do(http.MethodGet, "/v2/registry.test/org/late/blobs/"+late.Blobs[1].Digest.String())
		return a.StatusCode == http.StatusOK && bytes.Equal(a.body, late.Blobs[1].Data)
	})
}

// TestRedirectNetworks: only clients in the networks are redirected.
func TestRedirectNetworks(t *testing.T) {
	large := regtest.Random("large", 2*mib)
	b, _, _ := newBucketed(t, "default off\nredirect_to_storage 1MiB 10.0.0.0/8 fd00::/8", large)
	b.blob("registry.test/org/app", large)
	if err := b.load(b.app, "default off\nredirect_to_storage 1MiB 10.0.0.0/8 127.0.0.0/8"); err != nil {
		t.Fatal(err)
	}
	b.want(http.StatusTemporaryRedirect, http.MethodGet, "/v2/registry.test/org/app/blobs/"+large.Digest.String())
}

// TestRedirectDenied: who may not pull gets no address.
func TestRedirectDenied(t *testing.T) {
	large := regtest.Random("large", 2*mib)
	b, _, _ := newBucketed(t, "default off", large)
	if err := b.load(b.app, "default off\nredirect_to_storage 1MiB\naccess {\n allow pull to user:alice\n}"); err != nil {
		t.Fatal(err)
	}
	a := b.want(http.StatusForbidden, http.MethodGet, "/v2/registry.test/org/app/blobs/"+large.Digest.String())
	if a.Header.Get("Location") != "" {
		t.Error("it tells an address")
	}
}

// TestRedirectNeedsBucket: there is nowhere to send clients to with a store on disk.
func TestRedirectNeedsBucket(t *testing.T) {
	m := start(t, "", "default off")
	err := m.load("", "default off\nredirect_to_storage 1MiB")
	if err == nil || !strings.Contains(err.Error(), "redirect_to_storage") || !strings.Contains(err.Error(), "storage s3") {
		t.Errorf("%v", err)
	}
}

// TestRedirectNotLogged: the address of a redirect is in no log, whatever stands before
// the mirror, and arrives all the same.
func TestRedirectNotLogged(t *testing.T) {
	for _, before := range []string{
		"",
		"encode gzip zstd",
		"encode {\n match status 307\n minimum_length 1\n gzip\n}",
		"header >X-Other yes\nheader -Etag",
		"templates {\n mime text/plain\n}", // holds answers back until they are whole
		"intercept {\n @gone status 4xx\n handle_response @gone {\n respond gone 410\n }\n}",
	} {
		large := regtest.Random("large", 2*mib)
		b, _, _ := newBucketed(t, "default off", large)
		text := fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n log {\n output regtest\n level debug\n }\n registry {\n %s\n }\n}\n%s {\n log {\n output regtest\n }\n%s\n registry_mirror {\n default off\n redirect_to_storage 1MiB\n }\n}\n", b.app, b.mirror.URL, before)
		adapted, err := adapt(text)
		if err != nil {
			t.Fatalf("%s: %v", before, err)
		}
		if err := b.loadJSON(adapted); err != nil {
			t.Fatalf("%s: %v", before, err)
		}
		var asked int
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			a := b.want(http.StatusTemporaryRedirect, method, "/v2/registry.test/org/app/blobs/"+large.Digest.String(), "Accept-Encoding", "gzip")
			if status, _ := b.follow(a, method); status != http.StatusOK {
				t.Errorf("%q: %s: status %d", before, method, status)
			}
			asked++
		}
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
		client.CloseIdleConnections()
		unlocked(t, b.dir)
		if strings.HasPrefix(before, "templates") {
			asked = 0
		}
		if n := len(b.logs.with("handled request")); n != asked {
			t.Errorf("%q: %d lines of %d requests", before, n, asked)
		}
		for _, line := range b.logs.with("handled request") {
			headers, _ := line["resp_headers"].(map[string]any)
			if line["status"] != 307.0 || headers["Docker-Content-Digest"] == nil {
				t.Errorf("%q: the line is %v", before, line)
			}
		}
		b.logs.mu.Lock()
		for _, line := range b.logs.lines {
			if strings.Contains(fmt.Sprint(line), "X-Amz-Signature") {
				t.Errorf("%q: the log has %v", before, line)
			}
		}
		b.logs.mu.Unlock()
	}
}
