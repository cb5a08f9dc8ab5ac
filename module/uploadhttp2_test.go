package module_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestUploadTakenOverHTTP2: a request that hangs is one of several on its connection,
// and the others, of which one takes its upload over, are not to end with it.
func TestUploadTakenOverHTTP2(t *testing.T) {
	m := start(t, "", "")
	if err := m.behind("servers {\n protocols h1 h2c\n}", "", "", openToAll); err != nil {
		t.Fatal(err)
	}
	u := uploader{m, "apps/web"}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols}
	defer transport.CloseIdleConnections()
	two := &http.Client{Transport: transport, Timeout: time.Minute}
	ask := func(method, path string, body io.Reader) (*http.Response, error) {
		r, err := http.NewRequest(method, m.URL+path, body)
		if err != nil {
			return nil, err
		}
		resp, err := two.Do(r)
		if err == nil {
			resp.Body.Close()
		}
		return resp, err
	}
	data := regtest.Random("taken", 1_500_000).Data
	d := digest.FromBytes(data)
	for _, method := range []string{"PATCH", "PUT"} {
		at := u.begin()
		hangs, more := io.Pipe()
		told := make(chan error, 1)
		go func() {
			resp, err := ask(method, finish(at, d), hangs)
			if err == nil && (resp.StatusCode != 416 || resp.ProtoMajor != 2) {
				err = fmt.Errorf("%s %s", resp.Proto, resp.Status)
			}
			told <- err
		}()
		more.Write(data[:1_000_000])
		eventually(t, "some of it to be written", func() bool { return u.says("204", "GET", at, nil).Header.Get("Range") != "0-0" })
		// On the same connection.
		if resp, err := ask("PATCH", at, http.NoBody); err != nil || resp.StatusCode != 202 {
			t.Fatalf("%s: the one that takes over: %v, %v", method, resp, err)
		}
		if err := <-told; err != nil {
			t.Errorf("%s: the one before: %v", method, err)
		}
		more.Close()
		end := 0
		fmt.Sscanf(u.says("204", "GET", at, nil).Header.Get("Range"), "0-%d", &end)
		if end > 0 {
			end++
		}
		if resp, err := ask("PUT", finish(at, d), bytes.NewReader(data[end:])); err != nil || resp.StatusCode != 201 {
			t.Fatalf("%s: going on: %v, %v", method, resp, err)
		}
		u.keeps(d, data)
	}
}
