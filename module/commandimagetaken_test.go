package module_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestImageTaken: an upload that the server has taken is not called a failure because
// the server is being started again when it is asked what it has made of it.
func TestImageTaken(t *testing.T) {
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost:
			w.Header().Set("Location", "/v1/uploads/u")
			w.WriteHeader(http.StatusCreated)
		case http.MethodPatch:
			w.Header().Set("Upload-Offset", "1024")
			w.Header().Set("Backing-Image-Location", "/v1/backing-images/deb/versions/v1")
			w.WriteHeader(http.StatusNoContent)
		case http.MethodGet:
			switch asked.Add(1) {
			case 1:
				panic(http.ErrAbortHandler)
			case 2:
				w.WriteHeader(http.StatusServiceUnavailable)
			default:
				fmt.Fprint(w, `{"name":"deb","version":"v1","state":"ready"}`)
			}
		}
	}))
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "deb.img")
	if err := os.WriteFile(file, make([]byte, 1024), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "registry", "image", "add", "deb", file, "--url", server.URL)
	cmd.Env = imageEnv(t)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "deb:v1") {
		t.Errorf("%v: %s", err, out)
	}
	if n := asked.Load(); n < 3 {
		t.Errorf("it asked %d times", n)
	}

	cmd = exec.CommandContext(t.Context(), os.Args[0], "registry", "image", "get", "deb:v1", "-", "--url", server.URL)
	cmd.Env, cmd.Dir = imageEnv(t), t.TempDir()
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "into a file") {
		t.Errorf("get into -: %v: %s", err, out)
	}
}
