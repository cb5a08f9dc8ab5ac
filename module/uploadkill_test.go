package module_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// TestUploadKill kills the process at each step of an upload. The next one goes
// on with what it had, shows nothing that is not whole, and in the end nothing is
// left over.
func TestUploadKill(t *testing.T) {
	data := regtest.Random("kill", 1_200_000).Data
	d := digest.FromBytes(data)
	const half = 600_000
	for _, c := range []struct {
		at     string
		end    int  // where the upload ends afterwards; -1: there is none
		stored bool // the blob is there
	}{
		{"upload.written", 0, false},
		{"upload.state", half, false},
		{"push.stored", -1, false},
		{"push.linked", -1, true},
		{"push.synced", -1, true},
	} {
		t.Run(c.at, func(t *testing.T) {
			dir := t.TempDir()
			site := func(url string) string {
				return fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage disk %s {\n min_free 1MB\n }\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}", dir, url, openToAll)
			}
			doomed := childOf(t, dir, site, c.at)
			u := uploader{doomed, "apps/web"}
			at := u.begin()
			for _, step := range []func() (*http.Response, error){
				func() (*http.Response, error) { return u.bring("PATCH", at, data[:half]) },
				func() (*http.Response, error) { return u.bring("PUT", finish(at, d), data[half:]) },
			} {
				resp, err := step()
				if err != nil {
					break
				}
				resp.Body.Close()
			}
			doomed.dead()

			m := &mirror{t: t, URL: "http://" + regtest.FreeAddress(t), dir: dir, logs: captureLogs(t)}
			if err := m.load("", openToAll); err != nil {
				t.Fatal(err)
			}
			defer m.stop()
			u = uploader{m, "apps/web"}
			if c.stored {
				u.keeps(d, data)
			} else {
				u.says("404 BLOB_UNKNOWN", "GET", "blobs/"+d.String(), nil)
			}
			if c.end >= 0 {
				u.at(u.says("204", "GET", at, nil), c.end)
				u.says("201", "PUT", finish(at, d), bytes.NewReader(data[c.end:]))
			} else {
				u.says("404 BLOB_UPLOAD_UNKNOWN", "GET", at, nil)
				u.says("201", "POST", finish("blobs/uploads/", d), bytes.NewReader(data))
			}
			u.keeps(d, data)
			if left := spooled(dir); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// bring sends a body that may not arrive.
func (u uploader) bring(method, to string, data []byte) (*http.Response, error) {
	req, err := http.NewRequest(method, u.URL+to, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	return client.Do(req)
}

// TestUploadKillAnywhere kills the process in the midst of an upload, twice, and
// no byte is asked for again that had been written down.
func TestUploadKillAnywhere(t *testing.T) {
	data := regtest.Random("anywhere", 3_000_000).Data
	d := digest.FromBytes(data)
	dir := t.TempDir()
	site := func(url string) string {
		return fmt.Sprintf("{\n admin off\n auto_https off\n persist_config off\n registry {\n storage disk %s {\n min_free 1MB\n }\n }\n}\n%s {\n registry_mirror {\n %s\n }\n}", dir, url, openToAll)
	}
	at, end := "", 0
	for range 2 {
		u := uploader{childOf(t, dir, site, ""), "apps/web"}
		if at == "" {
			at = u.begin()
		}
		u.at(u.says("202", "PATCH", at, bytes.NewReader(data[end:end+1_000_000])), end+1_000_000)
		end += 1_000_000
		u.raw("PATCH", at, data[end:end+700_000], "Content-Length", "900000")
		eventually(t, "some of the next to be written", func() bool {
			info, err := os.Stat(filepath.Join(dir, "mirror/spool/uploads", filepath.Base(at)))
			return err == nil && info.Size() > int64(end)
		})
		u.process.Kill()
		u.dead()
	}
	u := uploader{childOf(t, dir, site, ""), "apps/web"}
	u.at(u.says("204", "GET", at, nil), end)
	u.has(u.says("201", "PUT", finish(at, d), bytes.NewReader(data[end:])), d, data)
}
